"""Documents and their labels, read from files, folders and the hub."""
