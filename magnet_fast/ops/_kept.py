"""Answers about this machine that outlast the process: small JSON files in the user's cache.

Each stands under all that it depends on. What cannot be read, is damaged or is of something else is no answer, and is
asked again; where nothing can be written an answer holds for its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from magnet_fast.atomic import write_text_atomically
from magnet_fast.ops import _cpu_backend, _cuda_backend

CACHE_VARIABLE = "MAGNET_FAST_CACHE"

Key = dict[str, Any]
"""All that an answer depends on; of what JSON has."""


def cache_folder() -> Path:
    """Where answers are kept: `MAGNET_FAST_CACHE`, else `magnet_fast` in the user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "magnet_fast"
    try:
        return Path.home() / ".cache" / "magnet_fast"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise OSError(f"{CACHE_VARIABLE} is not set, and there is no home folder") from error


def read(folder: str, key: Key) -> dict[str, Any] | None:
    """The answer to `key` in a folder of the cache, if there is one."""
    try:
        found = json.loads(_file(folder, key).read_text())
    except (OSError, ValueError, RecursionError):  # none yet, another user's, or no answer of ours
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def write(folder: str, key: Key, answer: dict[str, Any]) -> None:
    """Keep an answer, in the place of another, if that can be done."""
    with suppress(OSError):  # a read-only home, a full disk
        path = _file(folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, _text(key, answer))


def write_first(folder: str, key: Key, answer: dict[str, Any], valid: Callable[[dict[str, Any]], bool]) -> None:
    """Keep an answer unless another process has kept a valid one meanwhile, which `read` then returns."""
    with suppress(OSError):
        path = _file(folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        write_text_atomically(new, _text(key, answer))
        try:
            if not _linked(new, path):  # of several processes exactly one is the first
                there = read(folder, key)
                if there is None or not valid(there):
                    os.replace(new, path)  # what is there is damaged
        finally:
            new.unlink(missing_ok=True)


def _linked(new: Path, path: Path) -> bool:
    """Whether the file now has the other name, too; False where a file has it already, or there are no links."""
    try:
        os.link(new, path)
    except OSError:
        return False
    return True


def remove(folder: str, key: Key) -> None:
    """Forget the answer, if there is one."""
    with suppress(OSError):
        _file(folder, key).unlink(missing_ok=True)


def all_of(folder: str) -> Iterator[dict[str, Any]]:
    """Every answer in a folder of the cache, with its key, in the order of its file's name."""
    with suppress(OSError):
        for path in sorted((cache_folder() / folder).glob("*.json")):
            with suppress(OSError, ValueError, RecursionError):
                found = json.loads(path.read_text())
                if isinstance(found, dict) and isinstance(found.get("key"), dict):
                    yield found


def _text(key: Key, answer: dict[str, Any]) -> str:
    day = datetime.now(timezone.utc).date().isoformat()
    return json.dumps({"key": key, **answer, "date": day}, indent=1) + "\n"


def _file(folder: str, key: Key) -> Path:
    return cache_folder() / folder / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest() + ".json")


# ---- What answers depend on -----------------------------------------------------------------------------------------


def machine(device: torch.device) -> Key:
    """What runs a device's kernels, and how."""
    key: Key = {"torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        key["device"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        key["driver"] = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else None
        # The number above is that of the newest CUDA a driver knows, which many releases of it share.
        key["driver release"] = _first_line(_NVIDIA, "NVRM version")
        key["tf32"] = _cuda_backend.tf32()
    else:
        key["device"] = "cpu, " + (_cpu_backend.extension.simd_level() if _cpu_backend.extension else "no extension")
        key["processor"] = _first_line(_PROCESSORS, "model name")  # a home may be that of many machines
    return key


_NVIDIA, _PROCESSORS = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")


def _first_line(file: Path, name: str) -> str:
    """What a file of Linux says of itself in the first line of that name; "" where it does not."""
    with suppress(OSError, UnicodeDecodeError):
        for line in file.read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def package_version() -> str:
    import magnet_fast

    return magnet_fast.__version__


@cache
def operators() -> str:
    """A hash of the operators' source: what gives the kernels their arguments, the references, the checks."""
    return _hash(sorted(Path(__file__).parent.glob("*.py")))


@cache
def kernels(backend: str) -> str:
    """A hash of what the backend's kernels are made of: their source, or the compiled extension."""
    if backend == "triton":
        import magnet_fast.kernels

        files = sorted(Path(magnet_fast.kernels.__path__[0]).glob("*.py"))
    else:
        extension = (_cuda_backend if backend == "cuda" else _cpu_backend).extension
        files = [Path(extension.__file__)] if extension is not None else []
    return _hash(files)


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
