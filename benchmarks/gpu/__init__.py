"""The proof on a GPU: ``python -m benchmarks.gpu --out DIR``, one command, no installs.

It checks that NumPy, torch on CUDA, CuPy and both kernels make the same batches, that iterating on
the device waits for nothing, and times everything against named baselines and floors. It writes
``gpu-<date>.json`` as it goes and ``gpu-<date>.png`` at the end. ``--dry-run`` runs the same code
on a CPU at toy sizes, with the Triton kernel interpreted: what it prints means nothing, but that it
gets to the end does.
"""
