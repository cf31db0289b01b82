"""The forms in which a plan's batches are evaluated: array operations and kernels."""
