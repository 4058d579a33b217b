"""Files of weights: told by what is in them, read without running anything, refused with what and where."""

from __future__ import annotations

import builtins
import collections
import enum
import gzip
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from magnet_fast.inert import StandIn
from magnet_fast.models.files import is_safetensors, read_contents
from magnet_fast.models.released import from_released
from magnet_fast.models.wrapping import unwrap
from tests.golden.parameters import released_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3).T, "b.count": torch.tensor(3)}


class Colour(enum.Enum):
    red = 1


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Node(dict):
    """A configuration that is a dictionary."""


class Nodes(list):
    """A configuration that is a list."""


class Stated:
    """A configuration with a state of its own form."""

    def __getstate__(self) -> tuple:
        return "text", 1, None

    def __setstate__(self, state: tuple) -> None:
        raise AssertionError("run while reading")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes above lie in a module "lib.parts" that is gone when a file is read."""
    module = types.ModuleType("lib.parts")
    for kind in (Colour, Whole, Node, Nodes, Stated):
        monkeypatch.setattr(kind, "__module__", "lib.parts")
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "lib.parts", module)
    monkeypatch.setitem(sys.modules, "lib", types.ModuleType("lib"))
    yield


def torch_bytes(contents: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def read(tmp_path: Path, content: bytes, name: str = "model.pth") -> dict[str, Any]:
    """The contents, read where none of the classes can be imported."""
    path = tmp_path / name
    path.write_bytes(content)
    sys.modules.pop("lib.parts", None)
    return read_contents(path)


def refusal(tmp_path: Path, content: bytes, name: str = "model.pth") -> str:
    """One clean line that names the file."""
    with pytest.raises(ValueError) as caught:
        unwrap(read(tmp_path, content, name), f"checkpoint {str(tmp_path / name)!r}")
    text = str(caught.value)
    assert name in text and text.isprintable() and "holds nothing" not in text
    return text.replace(str(tmp_path), "")


def same(found: dict[str, Tensor], expected: dict[str, Tensor] = WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
    )


BESIDE = {
    "NumPy scalar": np.float64(71.25),
    "NumPy flag": np.bool_(True),
    "NumPy text": np.str_("val"),
    "NumPy date": np.datetime64("2026-01-01"),
    "NumPy records": np.zeros(2, [("a", "i4"), ("b", "f8")]),
    "NumPy dtype": np.dtype("M8[s]"),
    "NumPy array": np.zeros((2, 3), np.float32),
    "path": pathlib.PurePosixPath("runs/a"),
    "arguments": Namespace(out=pathlib.PurePosixPath("runs/a"), deep=Namespace(lr=np.float32(0.1))),
    "enumeration": Colour.red,
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "counter": collections.Counter("aab"),
    "torch's": [torch.Size([2]), torch.float16, torch.device("cpu"), torch.strided],
    "dictionary of a class": Node(a=Node(b=1)),
    "list of a class": Nodes([Node(), 2]),
    "object": Stated(),
    "class": Stated,
    "random generator": np.random.RandomState(0).get_state(),
    "slice": slice(1, 2),
    "Python's constants": [..., NotImplemented],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", BESIDE)
def test_what_stands_beside_the_weights_does_not_matter(tmp_path: Path, what: str, zipped: bool) -> None:
    content = torch_bytes({"model": WEIGHTS, "x": BESIDE[what]}, _use_new_zipfile_serialization=zipped)
    assert same(unwrap(read(tmp_path, content), "file"))


def test_numbers_and_arrays_come_back(tmp_path: Path) -> None:
    """Exactly, in any order and byte order; what is no number does not."""
    arrays = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 4), np.int64),
        "scalar": np.array(2.5),
    }
    for protocol in (2, 4, 5):
        content = {"model": arrays, "best": [np.float64(0.1), np.int16(-3), np.bool_(True), np.str_("é")]}
        found = read(tmp_path, pickle.dumps(content, protocol=protocol), "model.pkl")
        assert found["best"] == [0.1, -3, True, "é"] and [type(x) for x in found["best"]] == [float, int, bool, str]
        for name, tensor in unwrap(found, "file").items():
            np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    found = unwrap(read(tmp_path, torch_bytes({"model": arrays})), "file")
    assert all(np.array_equal(found[name].numpy(), value) for name, value in arrays.items())


FORMS = {
    "zip": lambda: torch_bytes(WEIGHTS),
    "before 1.6": lambda: torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False),
    "packed again": lambda: packed_again(torch_bytes(WEIGHTS)),
    "pickle of arrays": lambda: pickle.dumps({name: value.numpy() for name, value in WEIGHTS.items()}),
    "in a dictionary's class": lambda: torch_bytes(Node(model=Node(WEIGHTS))),
    "ordered, in a pickle": lambda: pickle.dumps(
        {"model": collections.OrderedDict((name, value.numpy()) for name, value in WEIGHTS.items())}, protocol=2
    ),
}


def packed_again(content: bytes) -> bytes:
    """As a tool for archives packs it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_by_their_content(tmp_path: Path, form: str, name: str) -> None:
    assert same(unwrap(read(tmp_path, FORMS[form](), name), "file"))
    assert not is_safetensors(tmp_path / name)


def test_safetensors_under_any_name(tmp_path: Path) -> None:
    save_file({name: value.contiguous() for name, value in WEIGHTS.items()}, tmp_path / "model.pth")
    assert is_safetensors(tmp_path / "model.pth") and same(read_contents(tmp_path / "model.pth"))


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle", "pickle 5"])
@pytest.mark.parametrize("function", ["system", "exec", "eval"])
def test_what_could_run_code_is_refused_with_its_place(tmp_path: Path, form: str, function: str) -> None:
    traces = tmp_path / "traces"
    attack = {
        "system": Call(os.system, f"touch {traces}"),
        "exec": Call(builtins.exec, f"open({str(traces)!r}, 'w')"),
        "eval": Call(builtins.eval, f"open({str(traces)!r}, 'w')"),
    }[function]
    contents = {"model": {"a": np.zeros(2)}, "args": {"hook": [attack]}}
    content = {
        "zip": lambda: torch_bytes(contents),
        "before 1.6": lambda: torch_bytes(contents, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(contents, protocol=2),
        "pickle 5": lambda: pickle.dumps(contents, protocol=5),
    }[form]()
    message = refusal(tmp_path, content)
    assert not traces.exists()
    assert f".{function} under 'args/hook/0'" in message and "could run code" in message


def test_names_that_are_called_and_built_do_nothing(tmp_path: Path) -> None:
    """A class named like a harmless one of this test is not imported, called or written to."""

    class Payload:
        ran = False

    Payload.__qualname__ = "Payload"
    Payload.__module__ = "lib.parts"
    sys.modules["lib.parts"].Payload = Payload
    sys.modules["lib.parts"].run = run = lambda *_: setattr(Payload, "ran", True)
    run.__module__, run.__qualname__, run.__name__ = "lib.parts", "run", "run"
    attack = {"model": {"a": np.zeros(2)}, "called": Call(run, 1), "class": Payload}
    for content in (torch_bytes(attack), pickle.dumps(attack)):
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        found = read_contents(path)  # the module is there, and still not used
        assert isinstance(found["called"], StandIn) and found["called"].type_name == "lib.parts.run"
        assert found["class"] is not Payload and not Payload.ran


class Both:
    """Filled like a list and like a dictionary."""

    def __reduce__(self) -> tuple:
        return Stated, (), None, iter([1]), iter([("a", 1)])


# What weights are not: how it is made, and what is said of it.
OTHERS = {
    "whole module": (lambda: torch_bytes(Whole()), "holds a whole lib.parts.Whole as an object"),
    "whole module in an entry": (
        lambda: torch_bytes({"model": Whole(), "epoch": 3}),
        "under 'model' it holds a whole lib.parts.Whole as an object",
    ),
    "whole module beside an optimiser": (
        lambda: torch_bytes({"net": Whole(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}),
        "under 'net' it holds a whole lib.parts.Whole",
    ),
    "whole module in an old file": (
        lambda: torch_bytes({"model": Whole()}, _use_new_zipfile_serialization=False),
        "it holds lib.parts.Whole under 'model'",
    ),
    "object among weights": (
        lambda: torch_bytes({"model": {**WEIGHTS, "c": Stated()}}),
        "holds lib.parts.Stated under 'model/c', not a tensor",
    ),
    "object with items and entries": (
        lambda: torch_bytes({"model": WEIGHTS, "a": Both()}),
        "cannot be read safely: an object that torch does not build; it holds lib.parts.Stated under 'a'",
    ),
    "array of objects": (
        lambda: torch_bytes({"model": {**WEIGHTS, "c": np.array([Stated()])}}),
        "NumPy array under 'model/c' that is no tensor",
    ),
    "meta": (lambda: torch_bytes({"model": {"a.b": torch.zeros(2, device="meta")}}), "'model/a.b' on the meta device"),
    "no weights": (
        lambda: torch_bytes({"epoch": 3, "args": Namespace(), "best": np.float64(1)}),
        "holds no weights, but 'epoch' (int), 'args' (argparse.Namespace), 'best' (float)",
    ),
    "only an optimiser": (
        lambda: torch_bytes({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}),
        "holds no weights, but 'optimizer' (dict)",
    ),
    "a tensor": (lambda: torch_bytes(torch.zeros(2)), "holds a Tensor, expected a dictionary"),
    "a list": (lambda: torch_bytes([WEIGHTS]), "holds a list, expected a dictionary"),
    "empty dictionary": (lambda: torch_bytes({}), "is an empty dictionary"),
    "pickled tensors": (lambda: pickle.dumps({"model": WEIGHTS}), "under 'model/a.weight' torch._utils"),
    "another protocol": (lambda: torch_bytes(WEIGHTS, pickle_protocol=4), "pickle protocol"),
    "web page": (lambda: b"\n<!DOCTYPE html><html><head>Quota exceeded", "is a web page"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
    "empty": (lambda: b"", "is empty"),
    "garbage": (lambda: b"garbage", "it begins with b'garbage'"),
    "cut zip": (lambda: torch_bytes(WEIGHTS)[:-100], "damaged or cut short"),
    "cut old file": (
        lambda: torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False)[:-10],
        "damaged or cut short",
    ),
    "cut pickle": (lambda: pickle.dumps({"a": np.zeros(100)})[:-300], "damaged or cut short"),
    "TorchScript": (lambda: script(), "is a TorchScript archive"),
    "gzip": (lambda: gzip.compress(torch_bytes(WEIGHTS)), "is compressed (gzip); unpack it"),
    "tar": (lambda: tar(), "is a tar archive"),
    "zip of a file": (lambda: zip_of("magnet.pth"), "torch.save did not write (in it: magnet.pth); unpack it"),
    "shards": (
        lambda: json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode(),
        "is the index of 2 shards (model-1.safetensors, model-2.safetensors)",
    ),
    "configuration": (lambda: b'{"hidden_size": 768}', "is JSON"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "is an ONNX program"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "one array": (lambda: npy(), "is one NumPy array"),
    "cut safetensors header": (lambda: struct.pack("<Q", 10**6) + b'{"a":', "cut short"),
    "memo with gaps": (lambda: b"\x80\x02}r\xff\xff\xff\x3f.", "its memo has gaps"),
}


def script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return file.getvalue()


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x")
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(2))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("what", OTHERS)
def test_everything_else_is_named_as_what_it_is(tmp_path: Path, what: str) -> None:
    make, named = OTHERS[what]
    assert named in refusal(tmp_path, make())


def test_cut_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    assert "cut short" in refusal(tmp_path, content[:-8], "model.safetensors")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        read_contents(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder; name the file in it$"):
        read_contents(tmp_path)
    for name in ("best.safetensors", "last.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"is a folder; name the file in it, such as last\.safetensors$"):
        read_contents(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_in_the_place_of_weights(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "model.pth", format=kind)
    with pytest.raises(ValueError, match=rf"model\.pth' is a picture \({kind}\), neither weights nor data$"):
        read_contents(tmp_path / "model.pth")


def test_sizes_that_a_file_claims_are_checked(tmp_path: Path) -> None:
    """An old file's storages are as large as it says before they are read; an array is as large as its bytes."""
    content = torch_bytes({"a": torch.zeros(4)}, _use_new_zipfile_serialization=False)
    assert content.count(b"K\x04Nt") == 1  # the elements of the storage
    claimed = content.replace(b"K\x04Nt", b"\x8a\x05\x00\x00\x00\x00\x10Nt")  # 2 ** 36
    assert "68719476736 elements" in refusal(tmp_path, claimed)
    array = pickle.dumps({"model": {"a": np.zeros(4)}}, protocol=2)
    assert array.count(b"K\x04\x85") == 1
    assert "no tensor: 32 bytes for shape" in refusal(tmp_path, array.replace(b"K\x04\x85", b"J\x00\x00\x00\x7f\x85"))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert "over a hundred times" in refusal(tmp_path, bomb.getvalue())


def pickled(form: str, program: bytes) -> bytes:
    """A pickle as a file of its own, or in one of torch.save's two forms."""
    if form == "legacy":
        whole = io.BytesIO()
        torch.save({}, whole, _use_new_zipfile_serialization=False)
        return whole.getvalue()[: whole.getvalue().index(b"}q")] + program[2:]
    if form == "zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", program)
        return archive.getvalue()
    return program


@pytest.mark.parametrize("name", ["OrderedDict", "Counter"])
@pytest.mark.parametrize("form", ["bare", "legacy", "zip"])
def test_one_list_that_is_copied_again_and_again_is_refused(tmp_path: Path, form: str, name: str) -> None:
    """A dictionary of 2,000 entries, made anew by five bytes."""
    items = b"".join(b"(M" + struct.pack("<H", number) + b"Nt" for number in range(2_000))
    class_name = b"ccollections\n" + name.encode() + b"\nq\x00"
    program = b"\x80\x02" + class_name + b"((" + items + b"ltq\x01](" + b"h\x00h\x01R" * 5_000 + b"e."
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"file\.pth.* cannot be read safely: damaged .*what it builds is many times"
        ):
            read(tmp_path, pickled(form, program), "file.pth")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tuples", [b"\x85" * 300_000, b"2\x86" * 24], ids=["deep", "each twice the one before"])
@pytest.mark.parametrize("form", ["bare", "legacy", "zip"])
def test_tuples_that_cannot_be_hashed_are_refused(tmp_path: Path, form: str, tuples: bytes) -> None:
    program = b"\x80\x02}(" + b")" + tuples + b"K\x01u."
    with pytest.raises(
        ValueError, match=r"file\.pth.* cannot be read safely: damaged .*tuples (in|that name) one another"
    ):
        read(tmp_path, pickled(form, program), "file.pth")


def zipped(path: Path, change: Callable[[bytes], bytes]) -> Path:
    torch.save({"model": {"a": torch.ones(2)}}, path)
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b"data.pkl", b"da\xff\xfepkl"),  # no UTF-8, where the flag says so
        lambda content: content.replace(b"PK\x01\x02\x00\x00\x00\x00\x00\x08", b"PK\x01\x02\x00\x00\x00\x00\x01\x08"),
        lambda content: content[: len(content) // 2] + b"\x00" * 40 + content[len(content) // 2 + 40 :],
    ],
)
def test_archives_with_a_damaged_directory_are_named(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    try:
        read_contents(zipped(tmp_path / "file.pth", change))
    except ValueError as error:
        assert "file.pth" in str(error)


def test_keys_that_python_cannot_print_are_named_by_their_kind() -> None:
    deep: tuple = ()
    for _ in range(5000):
        deep = (deep,)
    with pytest.raises(ValueError, match=r"it holds no weights, but 'tuple' \(int\), 'int' \(int\); expected"):
        unwrap({deep: 1, 10**5000: 2}, "it")
    with pytest.raises(ValueError, match="it holds no weights, but 'tuple'"):
        unwrap({deep: {deep: {}, 10**5000: 1}, "a": 3}, "it")


def test_weights_under_a_key_that_is_no_text(tmp_path: Path) -> None:
    contents = {("a", 1): {"w": torch.ones(2)}}
    assert unwrap(contents, "it")["w"].shape == (2,)


@pytest.mark.parametrize("name", ["bert_model", "model"])
def test_released_shapes_that_tell_no_size_are_named(name: str) -> None:
    checkpoint = {part: dict(state) for part, state in released_checkpoint("lavt").items()}
    table = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    checkpoint[name]["embeddings.word_embeddings.weight" if name == "bert_model" else table] = torch.ones(3)
    with pytest.raises(ValueError, match="the released checkpoint holds tensors of shapes that no released lavt has"):
        from_released(checkpoint)


def test_a_released_file_cannot_ask_for_a_model_beyond_its_bytes() -> None:
    """One number spread over a large shape takes four bytes."""
    checkpoint = {part: dict(state) for part, state in released_checkpoint("lavt").items()}
    checkpoint["bert_model"]["embeddings.word_embeddings.weight"] = torch.ones(1).expand(1 << 40, 64)
    with pytest.raises(ValueError, match="its configuration asks for a model of over .* numbers, and the file holds"):
        from_released(checkpoint)
