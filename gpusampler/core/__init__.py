"""Devices, arrays, transfers, memory and argument checks, shared by all other packages."""
