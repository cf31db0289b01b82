"""Batches that come from one patch each: exact, seekable, the same on every backend, fast."""

__version__ = "0.1.0"
