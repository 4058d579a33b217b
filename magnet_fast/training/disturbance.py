"""A full disk, the end of another process and the like: told with the step that the run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from magnet_fast.data.loading import workers_watched
from magnet_fast.training.checkpoint import CHECKPOINT


@contextmanager
def told_with_checkpoint(out: Path, saved_at: Callable[[], int]) -> Iterator[None]:
    """Errors of the machine and of data that cannot be read any more end with the step that the checkpoint holds.

    Args:
        out: the run's folder.
        saved_at: the step of its checkpoint; below 0 where there is none.
    """
    try:
        with workers_watched():
            yield
    except (OSError, ValueError) as error:
        if saved_at() < 0 or not (isinstance(error, OSError) or type(error) is ValueError):
            raise
        after = f"{out / CHECKPOINT} holds step {saved_at()}, --resume goes on"
        if isinstance(error, OSError) and error.strerror:
            raise OSError(error.errno, f"{error.strerror}; {after}", error.filename) from error
        raise type(error)(f"{error}; {after}") from error
