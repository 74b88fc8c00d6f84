"""The client of a service: `connect`, and the commands that run on a server."""
