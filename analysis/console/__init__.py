"""Shared by the commands of the command line: options, progress, messages."""
