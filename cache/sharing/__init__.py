"""Caches for others: plain files, dataset repositories of the hub, their cards."""
