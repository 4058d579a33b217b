"""Pickles read without importing or calling anything that they name.

A pickle is a program: it names classes and functions and asks for their call. Here every name is answered by a class
of ours, made for that one reading: numbers and arrays of NumPy are rebuilt from their bytes, anything else becomes a
`StandIn`, which keeps what it was given and does nothing.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, as pickle itself maps them
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np

from magnet_fast.showing import shown


class StandIn:
    """What stands for an object that the pickle would have had built.

    Attributes:
        type_name: what the pickle named, "argparse.Namespace".
        parts: arguments, state, entries and items that it was given.
        has_entries, has_items: whether any of its class was filled like a dictionary, or like a list.
    """

    type_name: ClassVar[str]
    has_entries: ClassVar[bool] = False
    has_items: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = object.__new__(cls)
        made.parts = [*args, *kwargs.values()]
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return type(self)(self, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        type(self).has_entries = True
        self.parts.append({key: value})

    def append(self, item: Any) -> None:
        type(self).has_items = True
        self.parts.append(item)

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)


class PickledArray:
    """A NumPy array, as its pickle describes it; `array` rebuilds it from its bytes."""

    type_name: ClassVar[str]

    def __new__(cls, *args: Any) -> PickledArray:
        made = object.__new__(cls)
        made._described = None
        if len(args) == 4:  # protocol 5's _frombuffer(bytes, dtype, shape, order)
            raw, dtype, shape, order = args
            made._described = shape, dtype, order == "F", raw
        return made

    def __setstate__(self, state: Any) -> None:
        self._described = tuple(state)[-4:]  # (version, shape, dtype, in Fortran's order, bytes)

    def array(self) -> np.ndarray:
        """The array, writable; ValueError where its bytes are not those of its shape, or no numbers."""
        try:
            shape, dtype, fortran, raw = self._described
            dtype, shape = dtype.dtype(), tuple(shape)
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"shape {shown(shape)}")
            raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)  # Python 2's bytes
            if math.prod(shape) * dtype.itemsize != len(raw):
                raise ValueError(f"{len(raw)} bytes for shape {shown(shape)} of {dtype}")
            flat = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))
        except (AttributeError, TypeError, UnicodeError) as error:
            raise ValueError("of other things than numbers") from error
        return flat.reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """A dtype of numbers or text, by its code; records, objects and dates are none."""

    type_name: ClassVar[str]
    _CODE = re.compile(r"[biufcSU]\d{1,9}")

    def __new__(cls, code: Any = None, *_: Any) -> _Dtype:
        made = object.__new__(cls)
        made._code, made._order = code, "="
        return made

    def __setstate__(self, state: Any) -> None:
        self._order = state[1]  # (version, byte order, …)

    def dtype(self) -> np.dtype:
        code = self._code.decode("latin1") if isinstance(self._code, bytes) else self._code
        if not isinstance(code, str) or not self._CODE.fullmatch(code):
            raise TypeError(f"dtype {shown(code, 40)}")
        return np.dtype(code).newbyteorder(self._order if self._order in ("<", ">") else "=")


class _Scalar(StandIn):
    """A NumPy scalar: the plain number or text that it is; a stand-in for dates and records."""

    def __new__(cls, dtype: Any = None, raw: Any = b"") -> Any:
        try:
            found = dtype.dtype()
            raw = raw.encode("latin1") if isinstance(raw, str) else raw
            return np.frombuffer(raw, found).reshape(()).item() if raw else found.type().item()
        except (AttributeError, TypeError, ValueError):
            return super().__new__(cls, dtype, raw)


class _Bytes:
    """Bytes as protocols 0 to 2 write them: text and "latin1"."""

    type_name: ClassVar[str]

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes in the encoding {shown(encoding, 40)}")
        return text.encode("latin1")


_REBUILT: dict[str, type] = {
    "_codecs.encode": _Bytes,
    "builtins.bytes": _Bytes,  # of no bytes
    "numpy.dtype": _Dtype,
    **{f"numpy.{core}.multiarray.scalar": _Scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": PickledArray for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": PickledArray for core in ("core", "_core")},
}
_ONLY_NAMED = ("numpy.ndarray",)  # an argument of _reconstruct, not called itself


class InertUnpickler(pickle.Unpickler):
    """Python's unpickler, with every name answered by a class of ours.

    Args:
        file: at the pickle's beginning.
        answers: classes for more names than NumPy's; their construction must be harmless with any arguments.

    Attributes:
        named: what the pickle named, and the class that answered.
        outside: the persistent ids that it asked for.
    """

    def __init__(self, file: BinaryIO, answers: Mapping[str, type] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._answers = {**_REBUILT, **(answers or {})}
        self.named: dict[str, type] = {}
        self.outside: list[Any] = []

    def find_class(self, module: str, name: str) -> type:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = printable(f"{module}.{name}")
        if full not in self.named:
            # A class of its own for every reading: a pickle can write attributes of the classes that it gets.
            self.named[full] = type(full, (self._answers.get(full, StandIn),), {"type_name": full})
        return self.named[full]

    def persistent_load(self, pid: Any) -> Any:
        self.outside.append(pid)
        # Old files of whole modules give their classes so, ("module", class, source): ours, which does nothing.
        return pid[1] if isinstance(pid, tuple) and len(pid) > 1 and isinstance(pid[1], type) else None

    @property
    def unknown(self) -> list[str]:
        """Names that only a `StandIn` answered."""
        return [name for name in self.named if name not in self._answers and name not in _ONLY_NAMED]


def check_program(content: bytes) -> None:
    """Refuse a pickle that would harm the unpickler itself: by memory for a memo with gaps or for bytes that do not
    come, or by tuples so deep that Python's hash of one, which calls itself in C, overflows the stack.

    Raises:
        ValueError: such a pickle, or one that is cut short or has an unknown opcode.
    """
    place, count, tuples, size = 0, 0, 0, len(content)
    while place < size:
        code = content[place]
        width = _WIDTHS[code]
        if width >= 0:
            argument, place = place + 1, place + 1 + width
            if code in _PUTS and int.from_bytes(content[argument:place], "little") > count:
                raise ValueError(_GAPS)
            if code in _TUPLES:
                tuples += 1
            elif code == _STOP:
                break
        elif width == pickletools.UP_TO_NEWLINE:
            end = _line_end(content, place)
            if code == _PUT and int(content[place + 1 : end]) > count:
                raise ValueError(_GAPS)
            place = (_line_end(content, end + 1) if code in _PAIRS else end) + 1
        elif width in _LENGTHS:
            start = place + 1 + _LENGTHS[width]
            place = start + int.from_bytes(content[place + 1 : start], "little")
            if place > size:  # the unpickler would make room for all of it first
                raise ValueError("pickle data was truncated")
        else:
            raise ValueError(f"at byte {place}: no opcode {content[place : place + 1]!r}")
        count += 1
    if tuples > DEEPEST_TUPLE:
        check_depth(pickletools.genops(content))


def check_depth(operations: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> None:
    """ValueError where tuples lie deeper in one another than `DEEPEST_TUPLE`; `pickletools.genops` gives operations."""
    stack: list[int | None] = []  # how deep each object is as a tuple; None for a mark
    memo: dict[int, int | None] = {}
    for operation, argument, _ in operations:
        name = operation.name
        if name == "MARK":
            stack.append(None)
        elif name == "MEMOIZE" or name.endswith("PUT"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo.get(int(argument), 0))
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken: list[int | None] = []
            before = operation.stack_before
            if pickletools.stackslice in before or pickletools.markobject in before:
                while (one := stack.pop()) is not None:
                    taken.append(one)
                before = [one for one in before if one not in (pickletools.stackslice, pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            depth = 1 + max((one or 0 for one in taken), default=0) if name in _TUPLE_NAMES else 0
            if depth > DEEPEST_TUPLE:
                raise ValueError(f"tuples in one another, over {DEEPEST_TUPLE} deep")
            stack += [depth] * len(operation.stack_after)


DEEPEST_TUPLE = 10_000
"""Tuples in one another: some 100,000 overflow a stack of 8 MiB, plain data have three."""

_GAPS = "its memo has gaps"  # which take memory
_TUPLE_NAMES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _widths() -> list[int]:
    """Bytes of each opcode's argument, or pickletools' sign for a length before it; -9 for what is no opcode."""
    widths = [-9] * 256
    for operation in pickletools.opcodes:
        widths[ord(operation.code)] = 0 if operation.arg is None else operation.arg.n
    return widths


_WIDTHS = _widths()
_STOP, _PUT = ord("."), ord("p")
_PUTS = frozenset(b"qr")
_PAIRS = frozenset(b"ci")  # of two lines
_TUPLES = frozenset(b"t\x85\x86\x87")


def _line_end(content: bytes, place: int) -> int:
    end = content.find(b"\n", place)
    if end < 0:
        raise ValueError("a line without its end")
    return end


def paths(content: Any) -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries, lists, tuples and stand-ins, with its place: "args/out".

    What a stand-in was given has the stand-in's own place. Nothing is visited twice.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        place, item = waiting.pop()
        yield place, item
        if not isinstance(item, (dict, list, tuple, set, frozenset, StandIn)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            keys = [printable(key_text(key)) for key in item]
            inner = [
                (f"{place}/{key}" if place else key, value) for key, value in zip(keys, item.values(), strict=True)
            ]
            inner += [(place, key) for key in item if not isinstance(key, (str, int))]
        elif isinstance(item, StandIn):
            inner = [(place, part) for part in item.parts]
        else:
            inner = [(f"{place}/{index}" if place else f"{index}", value) for index, value in enumerate(item)]
        waiting.extend(reversed(inner))


def key_text(key: Any) -> str:
    """A dictionary's key as text, whatever it is: a tuple may be nested beyond what Python prints, a number, too."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and key.bit_length() < 1000 else type_name(key)


def printable(text: str, length: int = 120) -> str:
    """Text of a file as a message can hold it: of no terminal codes and no great length."""
    text = text if len(text) <= length else f"{text[:length]}…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def type_name(item: Any) -> str:
    """What an item is called in messages: the name that the pickle used, where it was not built."""
    if isinstance(item, PickledArray):
        return "numpy.ndarray"
    if isinstance(item, type):
        return getattr(item, "type_name", item.__name__)
    return getattr(type(item), "type_name", type(item).__name__)
