"""Rows through a segmenter: pictures read ahead by threads, several in one forward pass, on after a bad one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from magnet_fast.batch.results import Failure, Results
from magnet_fast.batch.rows import Row
from magnet_fast.inference import Prepared, Segmenter

_PIXELS_AT_ONCE = 1 << 26
"""Of the masks of a batch: five bytes each are in memory until they are written."""

_Batch = list[tuple[Row, Prepared]]


def segment_rows(
    segmenter: Segmenter,
    rows: Sequence[Row],
    results: Results,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Failure]:
    """Segment all rows that are not done, each picture once for all its rows, and add what is found to the results.

    A batch has at most the segmenter's `batch_size` rows, fewer where pictures are large.

    Args:
        segmenter: the model.
        rows: in any order; those about one picture are brought together.
        results: where they go; finished here, also when Ctrl-C or an error stops the work.
        workers: threads that read pictures ahead.
        progress: called with (rows done or failed, rows in all) after each batch.

    Returns:
        The rows that cannot be used, whose picture or sentence cannot be read, or for which the model answers NaN, in
        the order of their numbers.

    Raises:
        ValueError: no worker.
        OSError: a result cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    failed = [Failure(row, row.problem) for row in rows if row.problem]
    pictures: dict[str, list[Row]] = {}
    for row in rows:
        if not row.problem and row.number not in results.done:
            pictures.setdefault(row.image, []).append(row)
    pool = ThreadPoolExecutor(workers)
    complete = False
    try:
        read = _read_ahead(pool, segmenter, pictures.values(), segmenter.batch_size + workers, failed)
        for batch in _batches(read, segmenter.batch_size):
            _segment(segmenter, batch, results, failed)
            if progress is not None:
                progress(len(results.done) + len(failed), len(rows))
        complete = True
    finally:
        pool.shutdown(cancel_futures=True)
        failed.sort(key=lambda one: one.row.number)
        results.finish(failed, complete)
    return failed


def _read_ahead(
    pool: ThreadPoolExecutor, segmenter: Segmenter, pictures: Iterable[list[Row]], most: int, failed: list[Failure]
) -> Iterator[tuple[list[Row], Prepared]]:
    """Each picture's rows with the picture, at most `most` of them read ahead; those without a picture that can be read
    go to `failed`."""
    waiting: deque[tuple[list[Row], Future[Prepared]]] = deque()
    coming = iter(pictures)
    while True:
        while len(waiting) < most and (rows := next(coming, None)):
            waiting.append((rows, pool.submit(segmenter.prepare, rows[0].path)))
        if not waiting:
            return
        rows, future = waiting.popleft()
        try:
            picture = future.result()
        except (ValueError, TypeError, OSError, MemoryError) as error:
            failed += [Failure(row, _reason(error)) for row in rows]
        else:
            yield rows, picture


def _batches(read: Iterable[tuple[list[Row], Prepared]], batch_size: int) -> Iterator[_Batch]:
    """Whole pictures together as long as their rows and masks fit; the rows of one that does not, by itself."""
    batch: _Batch = []
    pixels = 0
    for rows, picture in read:
        each = picture.size[0] * picture.size[1]
        most = max(1, min(batch_size, _PIXELS_AT_ONCE // each))
        if batch and (len(batch) + len(rows) > batch_size or pixels + len(rows) * each > _PIXELS_AT_ONCE):
            yield batch
            batch, pixels = [], 0
        if len(rows) > most:
            for start in range(0, len(rows), most):
                yield [(row, picture) for row in rows[start : start + most]]
        else:
            batch += [(row, picture) for row in rows]
            pixels += len(rows) * each
    if batch:
        yield batch


def _segment(segmenter: Segmenter, batch: _Batch, results: Results, failed: list[Failure]) -> None:
    try:
        found = segmenter([picture for _, picture in batch], [row.sentence for row, _ in batch])
    except ValueError as error:  # of one sentence: the others are asked without it
        if len(batch) == 1:
            failed.append(Failure(batch[0][0], _reason(error)))
            return
        for one in batch:
            _segment(segmenter, [one], results, failed)
        return
    for (row, _), one in zip(batch, found, strict=True):
        results.add(row, one)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
