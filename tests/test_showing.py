"""Values of files in messages, and what is nested too deeply, or too large, to be written."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from magnet_fast.data.safe_pickle import load_plain_pickle
from magnet_fast.inert import PickledArray
from magnet_fast.models import from_released
from magnet_fast.showing import shown


def deep(depth: int = 100_000) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def test_shown() -> None:
    assert shown({"a": "x"}) == "{'a': 'x'}"
    assert shown("x" * 100, 10) == "'" + 9 * "x"
    assert shown(deep()) == "[[[[[...]]]]]"
    assert shown([10**5000]) == "a list too long to print" or "int instance" in shown([10**5000])  # from Python 3.12 on


@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict])
def test_what_names_the_same_many_times_is_not_written_whole(kind: type) -> None:
    class Leaf:
        written = 0

        def __repr__(self) -> str:
            Leaf.written += 1
            return "leaf"

    value: Any = Leaf()
    for _ in range(16):
        value = kind([("a", value), ("b", value)]) if issubclass(kind, dict) else kind([value, value])
    assert len(shown(value)) <= 80 and Leaf.written < 100


@pytest.mark.parametrize("state", [(1, (deep(),), None, False, b""), (1, deep(), None, False, b"")])
def test_an_array_of_a_deep_shape(state: tuple[Any, ...]) -> None:
    array = object.__new__(PickledArray)
    array.__setstate__(state)
    with pytest.raises(ValueError, match="shape|other things"):
        array.array()


def nested_bytes(depth: int) -> bytes:
    """A pickle's list in a list in a list …: what pickle itself would not write of such a depth."""
    return b"]" * depth + b"a" * (depth - 1)


def test_a_released_archive_with_a_deep_number_of_elements(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"w": torch.ones(2)}, whole)
    path = tmp_path / "deep.pth"
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as other:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                # The number of elements, 2, stands behind the device of the storage.
                before, device, after = content.partition(b"cpu")
                place = after.index(b"K\x02")
                content = before + device + after[:place] + nested_bytes(50_000) + after[place + 2 :]
            other.writestr(entry.filename, content)
    with pytest.raises(ValueError, match=r"deep\.pth' is damaged or cut short: \[{5}\.{3}\]{5} elements"):
        from_released(path)


def test_a_data_set_s_pickle_with_a_deep_outside_object(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x04" + nested_bytes(50_000) + b"Q.")  # BINPERSID
    with pytest.raises(ValueError, match=r"refs\.p: the pickle asks for the outside object \[{5}\.{3}\]{5}"):
        load_plain_pickle(path)


def test_a_data_set_s_pickle_with_an_outside_object_of_thousands_of_digits(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x04\x8b" + (3000).to_bytes(4, "little") + b"\x7f" * 3000 + b"Q.")  # LONG4
    with pytest.raises(ValueError, match=r"refs\.p: the pickle asks for the outside object"):
        load_plain_pickle(path)
