"""A plan's arithmetic fused into one launch: Triton for torch on CUDA, CUDA C for CuPy.

Nothing here is imported, and nothing is compiled, before a plan on a GPU is first evaluated.
"""
