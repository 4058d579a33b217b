"""What a target is, and what counts as a finding: any outcome but a result or an error of the documented kinds."""

from __future__ import annotations

import os
import random
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

READ, REFUSED = "read", "refused"

_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
_CHANGES = ("os.remove", "os.rename", "os.truncate", "os.rmdir", "os.chmod", "os.symlink", "os.link", "shutil.rmtree")
_watched: list[Path] = []  # the one folder in which a reading may change files; none: nothing is read at the moment


class Finding(AssertionError):
    """A promise that was not kept."""


class _Forbidden(BaseException):
    """Raised by the audit hook; no reader's `except Exception` takes it for a damaged file."""


class Target(ABC):
    """Inputs of one kind, and the reader that gets them.

    Args:
        folder: empty, of the target's own.
    """

    batch: ClassVar[int] = 500
    """Inputs of one child process."""
    quick: ClassVar[int] = 40
    """Inputs of the quick test."""
    long: ClassVar[int] = 10_000
    """Inputs of `make fuzz-long`."""
    memory: ClassVar[int] = 1 << 30
    """Bytes by which a child's data may grow."""

    together: ClassVar[int] = 1
    """Inputs that are tried at once: those after one of them that died are left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def try_one(self, draw: random.Random) -> str:
        """Make an input, give it to the reader, and say what came of it; whatever is raised is a finding."""

    def try_many(self, seed: int, first: int, count: int, done: Callable[[int, str | BaseException], None]) -> None:
        """Try inputs by their numbers, and tell of each what came of it."""
        for number in range(first, first + count):
            try:
                outcome: str | BaseException = self.try_one(draw_of(seed, number))
            except BaseException as error:  # panics of native code, too
                outcome = error
            done(number, outcome)


def draw_of(seed: int, number: int) -> random.Random:
    """The source of one input."""
    return random.Random(f"{seed} {number}")


def outcome_of(
    read: Callable[[], Any],
    *files: Path,
    named: str = "",
    allowed: tuple[type[BaseException], ...] = (ValueError, FileNotFoundError),
    writes: Path | None = None,
) -> str:
    """Read, and say what came of it.

    Args:
        read: gives a result, or raises one of `allowed`.
        files: must be the same afterwards.
        named: what the message of an error must hold.
        writes: the folder in which files may come and go.

    Raises:
        Finding: code was run, the network was asked, a file was changed, or an error names nothing.
        Exception: of another kind than `allowed`.
    """
    before = [path.read_bytes() for path in files]
    _watched.append(writes or Path("/nowhere"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        outcome = READ
    except allowed as error:
        if isinstance(error, UnicodeError) or not str(error).strip():
            raise Finding(f"an error that explains nothing: {type(error).__name__}: {error}") from error
        if named not in str(error):
            raise Finding(f"an error that does not name {named!r}: {str(error)[:300]}") from error
        outcome = REFUSED
    finally:
        _watched.clear()
    for path, content in zip(files, before, strict=True):
        if not path.is_file() or path.read_bytes() != content:
            raise Finding(f"the file {path.name} was changed or lost")
    return outcome


def watch_for_code() -> None:
    """From now on code, network and changes of files end a reading. For the rest of the process."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _CODE or event in _NETWORK:
        raise _Forbidden(f"{event} {arguments!r:.200}")
    if event in _CHANGES or (event == "open" and _opens_for_writing(arguments)):
        paths = [
            os.path.abspath(os.fsdecode(one)) for one in arguments[:2] if isinstance(one, (str, bytes, os.PathLike))
        ]
        paths = paths[:1] if event in ("open", "os.chmod") else paths
        if not all(Path(path).is_relative_to(_watched[0]) for path in paths if path != os.devnull):
            raise _Forbidden(f"{event} {arguments!r:.200}")


def _opens_for_writing(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC))
