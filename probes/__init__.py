"""Probes: everything that is fitted from a cache, out of core, without the model."""
