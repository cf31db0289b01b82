"""Ratios against named baselines, measured in one run; see CONTRIBUTING for the commands."""
