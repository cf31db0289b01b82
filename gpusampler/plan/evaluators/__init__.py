"""Evaluators of a plan's batches: on the host, by array operations and by kernels."""
