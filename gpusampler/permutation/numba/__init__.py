"""The permutation compiled by Numba."""
