"""Baselines that count tokens."""
