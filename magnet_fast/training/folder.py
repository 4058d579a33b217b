"""A run's folder, which one run at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from magnet_fast.training.distributed import World, done_on_main

_held: set[int] = set()  # descriptors of folders, which carry the locks


@contextmanager
def held_folder(out: Path, world: World) -> Iterator[None]:
    """Make the folder and keep other runs out of it; where the run does not begin, it is as it was. Collective.

    The lock is on the folder itself, in the first process, and ends with that, however it ends.

    Raises:
        ValueError: another run holds the folder.
        OSError: it cannot be made.
    """
    made: list[Path] = []
    descriptor: list[int] = []

    def hold() -> None:
        made.extend(folder for folder in (out, *out.parents) if not os.path.lexists(folder))
        descriptor.append(_locked(out))

    done_on_main(hold, world)
    try:
        yield
    finally:
        for number in descriptor:
            with suppress(OSError):  # a folder that holds something stays, and those above it
                for folder in made:
                    folder.rmdir()
            _held.discard(number)
            os.close(number)


def _locked(out: Path) -> int:
    """A descriptor of the folder with its lock."""
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(out)) from error  # not one of those above it
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))
        number = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"{out}: another run writes to this folder; wait for its end, or name another one"
                    ) from None
            # Another run that did not begin may have taken its folder away meanwhile.
            if os.path.lexists(out) and os.path.samestat(os.fstat(number), os.stat(out)):
                _held.add(number)
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def _leave_to_the_parent() -> None:
    """A loader's process outlives a run that was killed by some seconds: it must not hold the folder so long."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_the_parent)
