"""Devices, arrays, transfers, memory, argument checks: what every other wing stands on."""
