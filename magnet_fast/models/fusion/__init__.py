"""Fusions: what brings words and pixels together, stage by stage."""
