"""Forward passes over the parts of a cache: batches, device to host, writer."""
