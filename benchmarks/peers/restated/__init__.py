"""Peers whose code no package carries alone, restated: designs, and Streaming's constructor."""
