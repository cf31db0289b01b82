"""Ratios against named baselines, measured in one run; see the README's table of commands."""
