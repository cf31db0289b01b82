"""Times on a GPU: ``python -m benchmarks.gpu --out DIR``, one command, no installs.

It times epochs, steps, loaders and grouping against named baselines and floors. Results go to
``DIR/gpu.jsonl`` as they are found; the same command goes on where an earlier run ended. That all
backends make the same batches is shown by ``pytest tests/gpu``. ``--dry-run`` runs the same code on
a CPU at toy sizes, with the Triton kernel interpreted: its times mean nothing.
"""
