"""Files of weights, told by what is in them and not by their names, read without running anything in them."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from magnet_fast.inert import InertUnpickler, StandIn, check_tuples, paths, printable, type_name
from magnet_fast.models.tensor_file import TensorFile, unchanged
from magnet_fast.models.wrapping import SAVE_WEIGHTS
from magnet_fast.showing import shown

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file that torch.save wrote before version 1.6
_AGAIN = "download or copy it again"
# Begins with -> what that is.
_FOREIGN = (
    (b"version https://git-lfs", "is the pointer that Git LFS keeps in place of a file; fetch the file: git lfs pull"),
    (b"\x1f\x8b", "is compressed (gzip); unpack it first"),
    (b"BZh", "is compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ", "is compressed (xz); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd); unpack it first"),
    (b"7z\xbc\xaf", "is an archive (7z); unpack it first"),
    (b"Rar!", "is an archive (rar); unpack it first"),
    (b"\x89HDF", "is an HDF5 file (Keras, TensorFlow); expected PyTorch's weights"),
    (b"\x93NUMPY", "is one NumPy array; expected a dictionary of weights"),
    (b"GGUF", "is a GGUF file; expected PyTorch's weights"),
    (b"%PDF", f"is a PDF, not a checkpoint; {_AGAIN}"),
    (b"\xff\xd8\xff", "is a picture (JPEG), neither weights nor data"),
    (b"\x89PNG\r\n\x1a\n", "is a picture (PNG), neither weights nor data"),
)
_BLANK = b"\xef\xbb\xbf \t\r\n"


def foreign(head: bytes) -> str | None:
    """What a file that begins so is instead of weights or data, and what helps; None for what may be either."""
    if head.lstrip(_BLANK).lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<!--")):
        return f"is a web page: the link that it came from leads to a page; {_AGAIN} from there"
    return next((meaning for start, meaning in _FOREIGN if head.startswith(start)), None)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file is of safetensors; False for one of PyTorch's or a pickle.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else: a web page, an archive, an empty file; the error says what.
    """
    path, what = Path(path), _named(path)
    if path.is_dir():
        held = sorted(one.name for one in path.iterdir() if one.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise ValueError(f"{what} is a folder; name the file in it{f', such as {held[-1]}' if held else ''}")
    if not path.is_file():
        raise FileNotFoundError(f"{what} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise ValueError(f"{what} is empty; {_AGAIN}")
    if (meaning := foreign(head)) is not None:
        raise ValueError(f"{what} {meaning}")
    if head[257:262] == b"ustar":
        raise ValueError(f"{what} is a tar archive; unpack it first (where torch.save wrote it, save it again)")
    if head[8:9] == b"{" and head[9:10] in (b'"', b"}", b" "):
        if int.from_bytes(head[:8], "little") + 8 > size:
            raise ValueError(f"{what} is cut short: {size} bytes do not hold its safetensors header; {_AGAIN}")
        return True
    if head.lstrip(_BLANK).startswith((b"{", b"[")):
        raise ValueError(f"{what} {_described_json(path)}")
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head.lower()):
        raise ValueError(f"{what} is an ONNX program; expected the weights of the model it was made from")
    if head.startswith(b"PK\x03\x04") or head[:1] == b"\x80" or re.match(rb"[()\]}cdl]", head):
        return False
    raise ValueError(
        f"{what} cannot be read safely: it is no file of torch.save, of safetensors or a pickle (it begins with "
        f"{head[:8]!r}); {_AGAIN}"
    )


def read_contents(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The dictionary in a file of torch.save (of any age), of safetensors, or in a pickle of NumPy arrays.

    Tensors are on the CPU. What is no tensor, number, text or container of them stays unread: an `inert.StandIn`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else, damaged, or asks for what could run code; the error says what and where.
    """
    what = _named(path)
    if is_safetensors(path):
        return read_safetensors(path)[0]
    with Path(path).open("rb") as file, unchanged(file, what):
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        contents = _read_zip(file, what) if zipped else _read_pickle(file, what)
    if isinstance(contents, StandIn):
        raise ValueError(
            f"{what} holds a whole {type_name(contents)} as an object, which is code as well; where its class is at "
            f"hand, save its weights alone: {SAVE_WEIGHTS}"
        )
    if not isinstance(contents, Mapping):
        raise ValueError(f"{what} holds a {type_name(contents)}, expected a dictionary of weights: {SAVE_WEIGHTS}")
    return contents


def read_safetensors(path: str | os.PathLike[str], below: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors of a safetensors file and its metadata.

    Args:
        below: only names that begin so are read; it is taken off.

    Raises:
        ValueError: damaged.
    """
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(below)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(below): file.get_tensor(name) for name in names}, file.metadata()


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file alone; ValueError where it is damaged."""
    with _opened(path) as file:
        return file.metadata()


def read_json(path: str | os.PathLike[str], limit: int = 1 << 20) -> dict[str, Any]:
    """The dictionary in a JSON file of a stranger's.

    Args:
        limit: bytes; no more are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is larger, no JSON, or something else than a dictionary.
    """
    what = f"{os.fspath(path)!r}"
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{what} has more than {limit} bytes, which is not read as a configuration; {_AGAIN}")
    if (meaning := foreign(content)) is not None:
        raise ValueError(f"{what} {meaning}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({_reason(error)}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds a {type(found).__name__}, expected a dictionary in JSON")
    return found


def dict_of(metadata: Mapping[str, str], entry: str, what: str) -> dict[str, Any]:
    """The dictionary that an entry of a file's metadata holds as JSON; empty where there is none.

    Raises:
        ValueError: it is no dictionary in JSON; `what` names the file.
    """
    try:
        found = json.loads(metadata.get(entry, "{}"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {entry!r} in its metadata is no JSON ({_reason(error)}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{what}: {entry!r} in its metadata is a {type(found).__name__}, expected a dictionary in JSON"
        )
    return found


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    try:
        with TensorFile(path) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{_named(path)} is not a readable .safetensors file: it is damaged or cut short ({error}); {_AGAIN}"
        ) from error


def _named(path: str | os.PathLike[str]) -> str:
    return f"checkpoint {os.fspath(path)!r}"


def _read_zip(file: BinaryIO, what: str) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickled = _checked_entries(entries, os.fstat(file.fileno()).st_size, what)
            data = archive.read(pickled)
    except _RefusedError:
        raise
    except Exception as error:  # of a broken archive, many kinds
        raise ValueError(f"{what} is damaged or cut short; {_AGAIN}") from error
    return _load(file, what, *_inspected(io.BytesIO(data), what))


class _RefusedError(ValueError):
    """An archive that is whole, and no file of weights."""


def _checked_entries(entries: Sequence[zipfile.ZipInfo], size: int, what: str) -> str:
    """The name of the pickle in an archive of `size` bytes; ValueError for one that is read in no case."""
    names = list(dict.fromkeys(entry.filename for entry in entries))
    pickled = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if any(name.endswith("/constants.pkl") for name in names):
        raise _RefusedError(
            f"{what} is a TorchScript archive, a program; where you trust it, save its weights alone: "
            "torch.save(torch.jit.load(PATH).state_dict(), OTHER)"
        )
    if pickled is None:
        inside = ", ".join(map(printable, names[:3])) or "nothing"
        raise _RefusedError(f"{what} is a zip archive that torch.save did not write (in it: {inside}); unpack it")
    if sum(entry.file_size for entry in entries) > 100 * size:
        raise _RefusedError(
            f"{what} cannot be read safely: unpacked it is over a hundred times as large, which weights never "
            "are; do not load it by other means either"
        )
    return pickled


def _read_pickle(file: BinaryIO, what: str) -> Any:
    unpickler, first = _inspected(file, what)
    if first != _TORCH_MAGIC:
        for place, item in paths(first):
            if isinstance(item, StandIn) and item.type_name.startswith("torch."):
                raise ValueError(
                    f"{what} is a pickle of PyTorch's objects (under {place!r} {item.type_name}), not a file of "
                    f"torch.save, and is not read; where you trust it, save its weights again: {SAVE_WEIGHTS}"
                )
        return first
    for _ in range(2):  # the protocol, and the machine that wrote it
        _inspected(file, what)
    return _load(file, what, *_inspected(file, what))


def _inspected(file: BinaryIO, what: str) -> tuple[InertUnpickler, Any]:
    """What the next pickle of a file names and would build, without building it; what could run code is refused."""
    start = file.tell()
    try:
        check_tuples(_without_gaps(pickletools.genops(file)))
        size = file.tell() - start
        file.seek(start)
        answers = {name: _Entries for name in ("collections.OrderedDict", *_DICTIONARIES)}
        unpickler = InertUnpickler(file, size, answers)
        contents = unpickler.load()
    except Exception as error:  # pickle raises nearly any exception for bytes that are no pickle
        raise ValueError(f"{what} cannot be read safely: damaged or cut short ({_reason(error)}); {_AGAIN}") from error
    for name in unpickler.unknown:
        if _runs_code(name):
            found = (place for place, item in paths(contents) if type_name(item) == name)
            place = next(found, "")
            where = f" under {place!r}" if place else ""
            raise ValueError(
                f"{what} cannot be read safely: it asks for {name}{where}, which could run code, and no weights need "
                "it; do not load it by other means either"
            )
    return unpickler, contents


def _without_gaps(operations: Iterator[tuple[Any, Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
    for count, (operation, argument, place) in enumerate(operations):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError("its memo has gaps")  # which take memory
        yield operation, argument, place


def _load(file: BinaryIO, what: str, unpickler: InertUnpickler, inert: Any) -> Any:
    """By torch's own safe reader, which takes our stand-ins for all names that it does not know."""
    size = os.fstat(file.fileno()).st_size
    for pid in unpickler.outside:  # ("storage", type, key, device, elements, …)
        if isinstance(pid, tuple) and len(pid) > 4 and not (isinstance(pid[4], int) and 0 <= pid[4] <= size):
            raise ValueError(f"{what} is damaged or cut short: {shown(pid[4], 40)} elements in {size} bytes; {_AGAIN}")
    answers = [(_for_torch(answer), name) for name, answer in unpickler.named.items()]
    file.seek(0)
    try:
        with torch.serialization.safe_globals(answers), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols, of storages
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # as of pickle
        if isinstance(error, RuntimeError | EOFError):
            raise ValueError(f"{what} is damaged or cut short ({_reason(error)}); {_AGAIN}") from error
        if "Unsupported operand" in str(error):
            raise ValueError(
                f"{what} was written with a pickle protocol that is not read safely; where you trust the file, write "
                "it again with the usual one: torch.save(torch.load(PATH, weights_only=False), OTHER)"
            ) from error
        found = ((place, type_name(item)) for place, item in paths(inert) if _unread(item))
        unread = [f"{name} under {place!r}" if place else name for place, name in found]
        also = f"; it holds {', '.join(list(dict.fromkeys(unread))[:3])}" if unread else ""
        raise ValueError(
            f"{what} cannot be read safely: {_reason(error)}{also}; where you trust it, save its weights alone: "
            f"{SAVE_WEIGHTS}"
        ) from error


class _Entries:
    """A dictionary, whatever class of dictionary it was."""

    type_name = "dict"

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict(*args) if args and isinstance(args[0], (list, dict)) else OrderedDict()


class _Items:
    """A list, whatever class of list it was: most versions of torch fill no subclass of `list`."""

    type_name = "list"

    def __new__(cls, *_: Any) -> Any:
        return []


_CODE_MODULES = {"os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "importlib", "pty", "ctypes", "socket"}
_DICTIONARIES = ("collections.defaultdict", "collections.Counter")


def _for_torch(answer: type) -> type:
    """torch fills dictionaries and lists only: an answer that the file fills becomes one."""
    if issubclass(answer, StandIn) and answer.has_entries:
        return type(answer.__name__, (_Entries,), {})
    if issubclass(answer, StandIn) and answer.has_items:
        return type(answer.__name__, (_Items,), {})
    return answer


def _runs_code(name: str) -> bool:
    """Whether a name is a way to run code that no data need. What is not told so is not run either, only unread."""
    module, _, rest = name.partition(".")
    if module == "builtins":
        known = getattr(builtins, rest, object)
        return rest != "getattr" and callable(known) and not isinstance(known, type)
    return module in _CODE_MODULES


def _unread(item: Any) -> bool:
    return isinstance(item, StandIn) and not item.type_name.startswith(("torch._utils.", "torch.storage."))


def _reason(error: Exception) -> str:
    """What an error says, as one clean line: torch's own is a page with terminal codes."""
    text = str(error) or type(error).__name__
    told = re.search(r"(?:WeightsUnpickler error|Error): (.*?)(?:\.? Please |\n|$)", text)
    line = told.group(1) if told else text.splitlines()[0]
    return re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]", "", line).rstrip(". ") or "an object that torch does not build"


def _described_json(path: Path) -> str:
    """What a JSON file is instead of a checkpoint."""
    try:
        content = json.loads(path.read_bytes()[:50_000_000])
    except ValueError:
        content = None
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if isinstance(shards, dict):
        names = sorted(set(map(str, shards.values())))
        listed = ", ".join(names[:2]) + (", …" if names[2:] else "")
        return (
            f"is the index of {len(names)} shards ({listed}), which hold the weights; join them into one file: "
            "safetensors.torch.save_file the union of what load_file gives of each"
        )
    return "is JSON, a configuration or a log; expected the file of weights beside it"
