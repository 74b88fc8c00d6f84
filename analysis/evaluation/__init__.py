"""Measures of probes on held-out text, as plain data."""
