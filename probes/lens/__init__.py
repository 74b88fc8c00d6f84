"""Logit lens, tuned lens, future lens."""
