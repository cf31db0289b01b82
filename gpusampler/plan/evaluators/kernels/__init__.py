"""A plan's arithmetic in a single launch: Triton for torch on CUDA, CUDA C for CuPy.

Nothing is imported or compiled before a plan on a GPU is first evaluated.
"""
