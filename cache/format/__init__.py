"""The format on disk: layout, shards, journal, manifest; plain zarr v3."""
