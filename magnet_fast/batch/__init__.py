"""Many pictures at once: a table or a folder in, a folder of masks out; what is done stays done."""

from __future__ import annotations

from magnet_fast.batch.results import COCO, ERRORS, FORMATS, Failure, Results
from magnet_fast.batch.rows import LINES, MASKS, Row, read_rows
from magnet_fast.batch.run import segment_rows

__all__ = ["COCO", "ERRORS", "FORMATS", "LINES", "MASKS", "Failure", "Results", "Row", "read_rows", "segment_rows"]
