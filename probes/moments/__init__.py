"""Second moments of (layer, offset, target): planned, summed, merged, kept with the cache."""
