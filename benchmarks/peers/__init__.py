"""Samplers of other projects, simple ones, and ours: ``python -m benchmarks``."""
