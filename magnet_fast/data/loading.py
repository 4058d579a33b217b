"""The processes that read data: left alone by a job's signals, and told of in one line when they fail."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

_RAISED = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback")
_DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: \w+|exited unexpectedly)")


def leave_to_the_main_process(worker: int) -> None:
    """For DataLoader's workers: a scheduler that signals every process of a job must not take them from a run that
    is about to stop in good order. SIGTERM of the main process itself ends them."""
    main = multiprocessing.parent_process()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_signal_of, args=(main and main.pid,), daemon=True).start()


def _wait_for_signal_of(process: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)  # as torch's workers do


@contextmanager
def workers_watched() -> Iterator[None]:
    """Around work with a loader's processes, since torch tells of a dead one anywhere, by a signal.

    Raises:
        ChildProcessError: one of them died.
        Exception: what reading an item raised, with its own words: torch's have the traceback in them.
    """
    try:
        yield
    except (RuntimeError, BrokenProcessPool) as error:
        died = _DIED.search(str(error))
        if died is None and not isinstance(error, BrokenProcessPool):
            raise
        how = died.group(1).replace("is killed", "was killed") if died else "died"
        raise ChildProcessError(
            f"workers: a process that reads or draws data {how}, as when memory runs out; take fewer workers"
        ) from error
    except Exception as error:
        if not (raised := _RAISED.match(str(error))):
            raise
        *_, last = re.finditer(rf"^(?:[\w.]+\.)?{raised.group(1)}: ", str(error), re.MULTILINE)
        raise type(error)(str(error)[last.end() :].strip()) from error
