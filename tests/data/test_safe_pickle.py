"""A pickle may hold plain data only; nothing it names is imported or run."""

from __future__ import annotations

import builtins
import os
import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnet_fast.data import safe_pickle
from magnet_fast.data.datasets.refer import Refer
from magnet_fast.data.safe_pickle import UnsafePickleError, load_plain_pickle

from .layout import small_refs, write_root

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=15,
)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpys_numbers_are_plain(tmp_path, protocol):
    """As pandas and NumPy write records again: numbers and text alike, arrays as lists."""
    numpys = [{"ref_id": np.int64(7), "area": np.float32(0.5), "exist": np.bool_(False), "split": np.str_("val")}]
    numpys.append({"sent_ids": np.array([1, 2], np.int32), "box": [np.array([[0.5, 1.0]]), np.uint8(3)]})
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(numpys, protocol=protocol))
    found = load_plain_pickle(path)
    assert found == [
        {"ref_id": 7, "area": 0.5, "exist": False, "split": "val"},
        {"sent_ids": [1, 2], "box": [[[0.5, 1.0]], 3]},
    ]
    assert [type(value) for value in found[0].values()] == [int, float, bool, str]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("a.jpg"), "PosixPath"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        ([{"deep": {1, 2}}], "set"),
        (np.datetime64("2020-01-01"), "numpy"),
        (np.array([Path("a")]), "numpy.ndarray"),
    ],
)
def test_the_record_and_its_key_are_named(tmp_path, value, named):
    path = tmp_path / "refs.p"
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps([{"ref_id": 1}, {"ref_id": 2, "file": value}], protocol=protocol))
        with pytest.raises(UnsafePickleError, match=rf"refs\.p: .*({named})") as caught:
            load_plain_pickle(path)
        assert "in record 1, key 'file" in str(caught.value) and str(caught.value).isprintable()


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@given(content=plain, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_data_comes_back(tmp_path_factory, content, protocol):
    if protocol == 2 and holds_bytes(content):
        protocol = 3  # Python 3 writes bytes at protocol 2 as a call of _codecs.encode
    path = tmp_path_factory.mktemp("pickle") / "refs.p"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_plain_pickle(path) == content


def holds_bytes(content) -> bool:
    if isinstance(content, dict):
        return any(map(holds_bytes, content.values()))
    if isinstance(content, (list, tuple)):
        return any(map(holds_bytes, content))
    return isinstance(content, bytes)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("function", ["system", "exec"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, protocol, nested, function):
    traces = tmp_path / "traces"
    attack = {
        "system": Call(os.system, f"touch {traces}"),
        "exec": Call(builtins.exec, f"open({str(traces)!r}, 'w')"),
    }[function]
    refs = small_refs()
    if nested:
        refs[1]["sentences"][0]["tokens"] = [{"deep": (1, [attack])}]
    root = write_root(tmp_path / "root", refs=refs if nested else attack)
    with pytest.raises(UnsafePickleError, match=rf"refs\(unc\)\.p.*{function}"):
        Refer(root)
    assert not traces.exists()
    pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    assert traces.exists()  # the attack is a real one: plain pickle runs it


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (OrderedDict(a=1), "collections.OrderedDict"),
        (Path("a"), "Path"),
        ([len], "len"),
        (int, "int"),
        ({1, 2}, "set"),
        ({"a": [bytearray(b"a")]}, "bytearray"),
        (frozenset({1}), "frozenset"),
        (1j, "complex"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_other_types_are_refused_by_name(tmp_path, content, named, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UnsafePickleError, match=rf"refs\.p: the pickle (asks for|holds a) .*{named}"):
        load_plain_pickle(path)


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch traces'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch traces'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch traces'\no.",  # OBJ
        b"Pan id\n.",  # PERSID
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
    ],
)
def test_handwritten_opcodes_are_refused(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(UnsafePickleError, match=r"refs\.p"):
        load_plain_pickle(tmp_path / "refs.p")
    assert [path.name for path in tmp_path.iterdir()] == ["refs.p"]


@pytest.mark.parametrize("content", [b"", b"\x80\x02]q\x00(K\x01", b"not a pickle", b"\x80\x02.", b"\x80\x63N."])
def test_broken_pickle_names_the_file(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p: not a readable pickle"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("behind", [pickle.dumps([{"ref_id": 2}]), b"junk"])
def test_what_follows_a_pickle_is_not_lost_without_a_word(tmp_path, behind):
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{"ref_id": 1}]) + behind)
    with pytest.raises(ValueError, match=r"refs\.p: something follows the pickle.*expected one list in one pickle"):
        load_plain_pickle(tmp_path / "refs.p")


def test_python_2_pickles(tmp_path):
    # What Python 2.7 writes for [{'raw': 'caf\xe9', 'n': 5L, 'u': u'\u20ac', 'ok': True}] at protocols 0 and 2.
    protocol_0 = (
        b"(lp0\n(dp1\nS'raw'\np2\nS'caf\\xe9'\np3\nsS'n'\np4\nL5L\nsS'u'\np5\nV\\u20ac\np6\nsS'ok'\np7\nI01\nsa."
    )
    protocol_2 = (
        b"\x80\x02]q\x00}q\x01(U\x03rawq\x02U\x04caf\xe9q\x03U\x01nq\x04\x8a\x01\x05"
        b"U\x01uq\x05X\x03\x00\x00\x00\xe2\x82\xacq\x06U\x02okq\x07\x88ua."
    )
    for content in (protocol_0, protocol_2):
        (tmp_path / "refs.p").write_bytes(content)
        assert load_plain_pickle(tmp_path / "refs.p") == [{"raw": "café", "n": 5, "u": "€", "ok": True}]


def test_shared_and_recursive_containers(tmp_path):
    shared = ["a"]
    shared.append(shared)
    (tmp_path / "refs.p").write_bytes(pickle.dumps([shared, shared]))
    first, second = load_plain_pickle(tmp_path / "refs.p")
    assert first is second and first[1] is first


@pytest.mark.parametrize("kind", [list, dict])
def test_lists_that_name_one_another_too_often_are_refused(tmp_path, kind):
    """Sentences that a hundred thousand refs share are ten billion samples; forty lists, each twice the one before,
    more."""
    sentences = [{"sent_id": number, "sent": "left man"} for number in range(3_000)]
    twice = kind()
    for _ in range(40):
        twice = {"a": twice, "b": twice} if kind is dict else [twice, twice]
    for content in ([{"ref_id": number, "sentences": sentences} for number in range(3_000)], [twice]):
        (tmp_path / "refs.p").write_bytes(pickle.dumps(content))
        with pytest.raises(
            ValueError, match=r"refs\.p: its lists name one another so often that written out they hold"
        ):
            load_plain_pickle(tmp_path / "refs.p")
    content = [{"ref_id": number, "sentences": sentences[:100]} for number in range(3_000)]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(content))
    assert load_plain_pickle(tmp_path / "refs.p") == content


def nested_tuples(depth: int) -> bytes:
    """A dictionary whose key is a tuple in a tuple, and so on."""
    return b"\x80\x02](}(" + b")" + b"\x85" * depth + b"K\x01ue."


def test_tuples_that_would_overflow_the_stack_are_refused(tmp_path):
    """Python's hash of a tuple calls itself in C: 200,000 of them end the process by a signal."""
    path = tmp_path / "refs.p"
    path.write_bytes(nested_tuples(9_000))
    assert len(load_plain_pickle(path)) == 1
    for content in (nested_tuples(300_000), b"\x80\x02](}(" + b")" + b"\x85N0" * 300_000 + b"K\x01ue."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"refs\.p: not a readable pickle .*tuples in one another, over"):
            load_plain_pickle(path)


def test_what_is_shared_is_looked_into_once(tmp_path, monkeypatch):
    """However many name it: looking into it each time would take as long as what is refused."""
    wide = [[] for _ in range(300)]
    (tmp_path / "refs.p").write_bytes(pickle.dumps([np.int64(1), *[wide] * 300]))
    looked, inner = [], safe_pickle._inner
    monkeypatch.setattr(safe_pickle, "_inner", lambda item: looked.append(item) or inner(item))
    assert load_plain_pickle(tmp_path / "refs.p") == [1, *[wide] * 300]
    assert 300 < len(looked) <= 2 * 302


TWICE = {
    "by the stack": b"2\x86",
    "by the memo": b"q\x05h\x05\x86",
    "by the memo in text": b"p5\ng5\n\x86",
    "by the memo's own count": b"%c",
    "behind something thrown away": b"N0q\x05h\x05\x86",
    "after nothing was appended": b"(eq\x05h\x05\x86",
}


def named_twice(way: str, times: int) -> bytes:
    """A dictionary whose key is a tuple that names another twice, which names another twice, and so on."""
    step = TWICE[way]
    steps = b"".join(b"\x94h" + bytes([number]) + b"\x86" for number in range(times)) if b"%c" in step else step * times
    return b"\x80\x02](" + b"K\x00" * 6 + b"}K\x01\x85" + steps + b"K\x01se."


@pytest.mark.parametrize("way", TWICE)
def test_tuples_that_no_computer_can_hash_are_refused(tmp_path, way):
    """Python hashes the innermost twice as often with each: with forty, for hours."""
    path = tmp_path / "refs.p"
    path.write_bytes(named_twice(way, 10))
    assert len(load_plain_pickle(path)) == 7
    path.write_bytes(named_twice(way, 24))
    with pytest.raises(ValueError, match=r"refs\.p: not a readable pickle .*tuples that name one another too often"):
        load_plain_pickle(path)


def test_a_wide_tuple_as_a_key_again_and_again_is_refused(tmp_path):
    wide = b"(" + b"K\x01" * 5_000 + b"tq\x05N" + b"h\x05N" * 50_000
    (tmp_path / "refs.p").write_bytes(b"\x80\x02](" + b"K\x00" * 6 + b"}(" + wide + b"ue.")
    with pytest.raises(ValueError, match="tuples that name one another too often"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("protocol", range(6))
def test_tuples_that_are_shared_are_read(tmp_path, protocol):
    box = (1.5, (2, "a"), None)
    content = [{"box": box, "boxes": [box, box]} for _ in range(2_000)]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(content, protocol))
    assert load_plain_pickle(tmp_path / "refs.p") == content


def test_many_tuples_beside_each_other_are_read(tmp_path):
    boxes = [{"box": (number, (1.5, "a"), (2, number, None))} for number in range(8_000)]
    for protocol in range(6):
        (tmp_path / "refs.p").write_bytes(pickle.dumps(boxes, protocol))
        assert load_plain_pickle(tmp_path / "refs.p") == boxes


def test_one_text_that_becomes_bytes_again_and_again_is_refused(tmp_path):
    """Each copy is of a megabyte, and asking for one takes five bytes."""
    arguments = b"(X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"X\x06\x00\x00\x00latin1tq\x01"
    (tmp_path / "refs.p").write_bytes(
        b"\x80\x02c_codecs\nencode\nq\x00" + arguments + b"](" + b"h\x00h\x01R" * 1_000 + b"e."
    )
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"refs\.p: .*what it builds is many times as large as it is"):
            load_plain_pickle(tmp_path / "refs.p")
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_array_that_many_records_share_is_read_once(tmp_path, protocol):
    array = np.arange(3_000)
    content = [{"box": array, "number": number} for number in range(300)]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(content, protocol))
    found = load_plain_pickle(tmp_path / "refs.p")
    assert found[0]["box"] == array.tolist() and all(one["box"] is found[0]["box"] for one in found)


def test_bytes_that_do_not_come_take_no_memory(tmp_path):
    """Python makes room for a bytearray of any length that the file states before it reads it."""
    (tmp_path / "refs.p").write_bytes(b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b"x.")
    with pytest.raises(ValueError, match=r"refs\.p: not a readable pickle \(ValueError: pickle data was truncated\)"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x0f", b"p268435455\n", b"q\xff"])
def test_a_memo_with_gaps_is_refused_before_it_takes_memory(tmp_path, put):
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]" + put + b".")
    with pytest.raises(ValueError, match=r"refs\.p: not a readable pickle .*its memo has gaps"):
        load_plain_pickle(tmp_path / "refs.p")
