"""Shared by all probes: the Readout protocol, parameters, arguments, resources."""
