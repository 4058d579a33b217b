"""Heads: what makes masks of the stages' outputs."""
