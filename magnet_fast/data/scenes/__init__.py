"""Embedded scenes: drawn pictures with expressions that need reading, written in REFER's layout."""

from __future__ import annotations

from magnet_fast.data.scenes.describing import DescribedScene, Referent, describe_scene
from magnet_fast.data.scenes.writing import assign_splits, write_scenes

__all__ = ["DescribedScene", "Referent", "assign_splits", "describe_scene", "write_scenes"]
