"""Samplers of other projects, and obvious ones, beside ours: ``python -m benchmarks``."""
