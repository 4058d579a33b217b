"""Benchmarks: `pytest benchmarks`; see conftest.py for what a row says."""

PACKED = "cpu, packed weights"
"""Path of the rows measured after `magnet_fast.accelerate(model, pack=True)`."""
