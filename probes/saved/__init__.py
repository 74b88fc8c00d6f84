"""Probes on disk, under a root, and on the hub."""
