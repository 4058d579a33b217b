"""Benchmarks: `pytest benchmarks`; see conftest.py for what a row says."""

FROZEN = "cpu, frozen weights"
"""Path of the rows measured after `magnet_fast.accelerate(model, freeze=True)`."""
