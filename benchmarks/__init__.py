"""Ratios against named baselines, measured in one run: ``pytest benchmarks --benchmark-enable``."""
