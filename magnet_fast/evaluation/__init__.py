"""Scores, tasks and protocols of referring segmentation."""

from magnet_fast.evaluation.evaluate import evaluate
from magnet_fast.evaluation.metrics import Rule
from magnet_fast.evaluation.protocol import PROTOCOLS, RESOLUTIONS, Protocol
from magnet_fast.evaluation.report import score_table
from magnet_fast.evaluation.table import Row, Table
from magnet_fast.evaluation.tasks import TASKS, Task, scores

__all__ = [
    "PROTOCOLS",
    "RESOLUTIONS",
    "TASKS",
    "Protocol",
    "Row",
    "Rule",
    "Table",
    "Task",
    "evaluate",
    "score_table",
    "scores",
]
