"""Measurements of a model before a row is kept, and again on resume."""
