"""Files that are at every moment either what they were or complete: the one writer of the package."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Call `write(file)` on a binary file beside `path`, bring it to the disk, then rename it to `path`.

    Any number of processes and threads may write to one path at once: each has a temporary file of its own, and the
    last to finish stays. What a kill left of an earlier writer is removed.

    Args:
        path: in an existing folder.
        write: receives a file open for writing; where it raises, `path` stays as it was.

    Raises:
        OSError: as `open` and `os.replace` do; it names `path`.
    """
    path = Path(path)
    with naming(path):
        _write(path, write)


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file or folder, there or not yet: by the same name, or by a link of either kind."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system's, as of a full disk, names `path` where it named no file, or one in a temporary's place:
    a hidden file or folder called after it."""
    try:
        yield
    except OSError as error:
        given = error.filename
        parts = () if given is None else Path(str(given)).parts
        if error.errno is None or not (given is None or any(part.startswith(f".{path.name}.") for part in parts)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # of the same kind, by its number


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears as `path` once all is in it, and not at all where something is raised.

    Args:
        path: of no folder yet; those above it are made.

    Raises:
        OSError: it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with naming(path):
            yield folder
            folder.chmod(0o755)  # as any new folder, not a private one
            os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    _remove_left_behind(path)
    temporary, file = _open_temporary(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # inside, since closing gives the lock up
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _bring_to_the_disk(path.parent)  # the rename itself


def _bring_to_the_disk(folder: Path) -> None:
    """Which names a folder holds, where that can be asked for: not of one that may not be listed, nor on some shared
    and network file systems, which answer that the request is invalid. The file itself is there, whole."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomically` of a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked as long as it is open: that tells a writer at work from one that was killed."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        if not _lock(file, wait=True) or temporary.exists():
            return temporary, file
        file.close()  # taken for left behind between its making and its lock


def _remove_left_behind(path: Path) -> None:
    for other in path.parent.glob(f".{_literal(path.name)}.*.tmp"):
        try:
            with open(other, "rb") as file:
                if _lock(file, wait=False):
                    other.unlink(missing_ok=True)
        except OSError:  # its writer has just finished, or it is another user's
            continue


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Whether this process now holds the file's lock; False, too, on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
