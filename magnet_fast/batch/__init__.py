"""Many pictures at once: a table or a folder in, a folder of masks out; what is done stays done."""

from __future__ import annotations

from magnet_fast.batch.results import ERRORS, FORMATS, Failure, Results
from magnet_fast.batch.rows import MASKS, Row, read_rows
from magnet_fast.batch.run import segment_rows

__all__ = ["ERRORS", "FORMATS", "MASKS", "Failure", "Results", "Row", "read_rows", "segment_rows"]
