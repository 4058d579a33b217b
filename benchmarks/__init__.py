"""Benchmarks: `pytest benchmarks`; see conftest.py for what a row says."""

PACKED = "cpu, packed weights"
"""Path of the rows measured after `magnet_fast.accelerate(model, pack=True)`."""

COMPILED = "cpu, torch.compile"
"""Path of the rows of an accelerated model compiled by torch.compile."""
