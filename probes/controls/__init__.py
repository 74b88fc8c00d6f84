"""Any probe, fitted on a cache in which one thing is changed."""
