"""One request, from options to a complete cache; also repair, and the workers of a dask cluster."""
