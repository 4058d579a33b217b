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

    What a pickle says once it may use any number of times. So what it has built is counted: a text that becomes
    bytes, or a list that becomes a dictionary, a hundred thousand times would fit in no memory.

    Args:
        file: at the pickle's beginning.
        size: of the pickle, in bytes.
        answers: classes for more names than NumPy's; their construction must be harmless with any arguments.

    Attributes:
        named: what the pickle named, and the class that answered.
        outside: the persistent ids that it asked for.
    """

    def __init__(self, file: BinaryIO, size: int, answers: Mapping[str, type] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._left = _MORE_BUILT + 8 * size
        self._answers = {**_REBUILT, **(answers or {})}
        self.named: dict[str, type] = {}
        self.outside: list[Any] = []

    def find_class(self, module: str, name: str) -> type:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = printable(f"{module}.{name}")
        if full not in self.named:
            # A class of its own for every reading: a pickle can write attributes of the classes that it gets.
            self.named[full] = self._answering(self._answers.get(full, StandIn), full)
        return self.named[full]

    def _answering(self, base: type, full: str) -> type:
        def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
            self._count(sum(_bytes(one) for one in (args, *args, kwargs)))
            return base.__new__(cls, *args, **kwargs)

        def array(made: PickledArray) -> np.ndarray:
            found = PickledArray.array(made)
            self._count(found.nbytes)
            return found

        # Not by an attribute: those a pickle can write.
        counted = {"__new__": __new__, **({"array": array} if issubclass(base, PickledArray) else {})}
        return type(full, (base,), {"type_name": full, **counted})

    def _count(self, built: int) -> None:
        """ValueError where all that was built, in bytes, is far more than the pickle states."""
        self._left -= built
        if self._left < 0:
            raise ValueError("what it builds is many times as large as it is")

    def persistent_load(self, pid: Any) -> Any:
        self.outside.append(pid)
        # Old files of whole modules give their classes so, ("module", class, source): ours, which does nothing.
        return pid[1] if isinstance(pid, tuple) and len(pid) > 1 and isinstance(pid[1], type) else None

    @property
    def unknown(self) -> list[str]:
        """Names that only a `StandIn` answered."""
        return [name for name in self.named if name not in self._answers and name not in _ONLY_NAMED]


def _bytes(used: Any) -> int:
    """What a copy of it takes, of its entries their addresses alone."""
    if isinstance(used, (str, bytes, bytearray)):
        return len(used)
    return 8 * len(used) if isinstance(used, (list, tuple, dict, set, frozenset)) else 0


def check_program(content: bytes) -> None:
    """Refuse a pickle that would harm the unpickler itself: by memory for a memo with gaps or for bytes that do not
    come, or by the tuples that `check_tuples` refuses.

    Raises:
        ValueError: such a pickle, or one that is cut short or has an unknown opcode.
    """
    place, count, tuples, size = 0, 0, 0, len(content)
    again, memo = 0, _Memo()
    while place < size:
        code = content[place]
        width, start = _WIDTHS[code], place + 1
        if width >= 0:
            place = start + width
            if code in _TUPLES:
                tuples += 1
            elif code == _STOP:
                break
        elif width == pickletools.UP_TO_NEWLINE:
            end = _line_end(content, place)
            place = (_line_end(content, end + 1) if code in _PAIRS else end) + 1
        elif width in _LENGTHS:
            start += _LENGTHS[width]
            place = start + int.from_bytes(content[place + 1 : start], "little")
            if place > size:  # the unpickler would make room for all of it first
                raise ValueError("pickle data was truncated")
        else:
            raise ValueError(f"at byte {place}: no opcode {content[place : place + 1]!r}")
        if _NEW[code]:
            memo.top = False
        else:
            argument = content[start:place]
            again += memo.follow(code, int(argument) if code in _TEXT else int.from_bytes(argument, "little"), count)
        count += 1
    if tuples > DEEPEST_TUPLE or again > _FEW_AGAIN:
        check_tuples(pickletools.genops(content))


class _Memo:
    """Where a program may keep tuples, as far as can be said without its stack.

    Attributes:
        top: whether what was pushed last may be a tuple.
    """

    def __init__(self) -> None:
        self.top = False
        self._tuples: set[int] = set()
        self._indexed, self._memoized = False, 0

    def follow(self, code: int, argument: int, count: int) -> int:
        """What an opcode that is not `_NEW` does, the program's number `count`; 1 where it may name a tuple again."""
        if code in _TUPLES:
            self.top = True
        elif code in _PUTS:
            if argument > count:
                raise ValueError(_GAPS)
            self._indexed = True
            if self.top:
                self._tuples.add(argument)
        elif code == _MEMOIZE:
            if self._indexed:  # the unpickler's own count may be another: nothing that writes pickles mixes the two
                return _FEW_AGAIN + 1
            if self.top:
                self._tuples.add(self._memoized)
            self._memoized += 1
        elif code in _GETS:
            self.top = argument in self._tuples
            return self.top
        elif code == _DUP:
            return self.top
        else:
            self.top = True  # it may show what lies below
        return 0


def check_tuples(operations: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> None:
    """Refuse tuples that Python cannot hash: it hashes what is in one, and what is in that, by calls in C and each
    time anew.

    Args:
        operations: of a pickle, from `pickletools.genops`.

    Raises:
        ValueError: tuples lie deeper in one another than `DEEPEST_TUPLE`, or name one another so often that written
            out they would be many times as large as the pickle.
    """
    plain = 0, 1
    stack: list[tuple[int, int] | None] = []  # how deep each object is as a tuple, and its size; None for a mark
    memo: dict[int, tuple[int, int]] = {}
    again = 0  # the size of all that is named again
    for count, (operation, argument, _) in enumerate(operations):
        name = operation.name
        if name == "MARK":
            stack.append(None)
        elif name == "MEMOIZE" or name.endswith("PUT"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1] or plain
        elif name == "DUP" or name.endswith("GET"):
            one = (stack[-1] if name == "DUP" else memo.get(int(argument))) or plain
            again += one[1] if one[1] > 1 else 0
            if again > _MOST_AGAIN + 100 * count:
                raise ValueError("tuples that name one another too often")
            stack.append(one)
        else:
            taken: list[tuple[int, int] | None] = []
            before = operation.stack_before
            if pickletools.markobject in before:
                while (one := stack.pop()) is not None:
                    taken.append(one)
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            made = plain
            if name in _TUPLE_NAMES:
                inner = [one or plain for one in taken]
                made = 1 + max((one[0] for one in inner), default=0), 1 + sum(one[1] for one in inner)
            elif name in _FILLS:
                made = taken[-1] or plain
            if made[0] > DEEPEST_TUPLE:
                raise ValueError(f"tuples in one another, over {DEEPEST_TUPLE} deep")
            stack += [made] * len(operation.stack_after)


_MORE_BUILT = 1 << 20
"""Bytes that a pickle may have built beyond eight times its size."""
_FEW_AGAIN = 8
"""Tuples named again: so few cannot make much of a pickle."""
_MOST_AGAIN = 1_000_000
DEEPEST_TUPLE = 10_000
"""Tuples in one another: some 100,000 overflow a stack of 8 MiB, plain data have three."""

_GAPS = "its memo has gaps"  # which take memory
# What they fill stays, a tuple, too, where they fill in nothing.
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
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
_STOP, _DUP, _MEMOIZE = b".2\x94"
_PUTS, _GETS, _TEXT = frozenset(b"pqr"), frozenset(b"ghj"), frozenset(b"pg")
_PAIRS = frozenset(b"ci")  # of two lines
_TUPLES = frozenset(b"t\x85\x86\x87")


def _new() -> list[bool]:
    """Of each opcode, whether it pushes an object of its own that is no tuple of anything."""
    made = (
        "MARK",
        "LIST",
        "DICT",
        "FROZENSET",
        "INST",
        "OBJ",
        "REDUCE",
        "NEWOBJ",
        "NEWOBJ_EX",
        "STACK_GLOBAL",
        "BINPERSID",
    )
    new = [False] * 256
    for operation in pickletools.opcodes:
        pushes = operation.stack_after and not operation.stack_before and not operation.name.endswith("GET")
        new[ord(operation.code)] = bool(pushes) or operation.name in made
    return new


_NEW = _new()


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
