"""Safetensors files by plain reads. The library maps a file into memory, and the system kills a process (SIGBUS) that
touches a mapped file which another cuts short: by copying over it, for instance."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class TensorFile:
    """A safetensors file, open inside `with`: the names, metadata and tensors in it.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be opened.
        safetensors.SafetensorError: it is damaged, or another kind of file.
        ValueError: it changed while it was read; found when it is closed, or at the tensor that is broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __enter__(self) -> TensorFile:
        with safe_open(self.path, framework="pt"):
            pass  # the library's own checks, of the header and of the file's size
        self._file = self.path.open("rb")
        self._unchanged = unchanged(self._file, f"{os.fspath(self.path)!r}")
        self._unchanged.__enter__()
        try:
            length = int.from_bytes(self._file.read(8), "little")
            self._start = 8 + length
            self._entries: dict[str, Any] = json.loads(self._file.read(length))
            self._metadata = self._entries.pop("__metadata__", None)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._unchanged.__exit__(kind, error, trace)
        finally:
            self._file.close()

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._entries)

    def metadata(self) -> dict[str, str]:
        """What is kept beside them."""
        return self._metadata or {}

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU, in memory of its own.

        Raises:
            safetensors.SafetensorError: there is none of that name.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise SafetensorError(f"File does not contain tensor {name}")
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        known = _DTYPES.get(entry["dtype"])
        if known is None or not hasattr(torch, known):
            raise ValueError(
                f"{os.fspath(self.path)!r}: {name} is of dtype {entry['dtype']}, which torch does not have"
            )
        held = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        self._file.seek(self._start + begin)
        if self._file.readinto(held.numpy()) != end - begin:  # type: ignore[arg-type]
            raise ValueError(f"{os.fspath(self.path)!r} ends within {name}")
        return held.view(getattr(torch, known)).reshape(entry["shape"])


@contextmanager
def unchanged(file: BinaryIO, what: str) -> Iterator[None]:
    """ValueError where an open file was written to in the meantime, which comes before errors that follow from it.

    A file that was replaced by another of its name is not meant: this one is whole.
    """
    before = _stamp(file)
    try:
        yield
    except (ValueError, RuntimeError, EOFError, LookupError) as error:
        _compare(file, before, what, error)
        raise
    _compare(file, before, what, None)


def _compare(file: BinaryIO, before: tuple[int, int], what: str, cause: Exception | None) -> None:
    if _stamp(file) != before:
        raise ValueError(
            f"{what} changed while it was read; wait until it is written whole, then start again"
        ) from cause


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
