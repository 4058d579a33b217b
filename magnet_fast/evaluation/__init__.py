"""Scores and protocols of referring segmentation."""

from magnet_fast.evaluation.metrics import ReferringSegmentationMetrics, intersection_and_union
from magnet_fast.evaluation.protocol import evaluate

__all__ = ["ReferringSegmentationMetrics", "evaluate", "intersection_and_union"]
