"""Paths on disk or in an object store, atomic JSON, leases, disk errors."""
