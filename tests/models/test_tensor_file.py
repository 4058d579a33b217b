"""Files of weights that change while they are read: an error, not the end of the process, nor a mixture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from magnet_fast.models import files, tensor_file
from magnet_fast.models.tensor_file import TensorFile

SIZE = 3_000_000  # of more than a page, and of more than a reader's buffer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(SIZE), "b": torch.ones(SIZE)}, tmp_path / "w.safetensors", {"k": "v"})
    return tmp_path / "w.safetensors"


def test_every_dtype_and_shape_as_the_library_reads_them(tmp_path: Path) -> None:
    dtypes = [getattr(torch, name) for name in tensor_file._DTYPES.values() if hasattr(torch, name)]
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(torch.float32).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "all")
    with TensorFile(tmp_path / "all") as own, safe_open(tmp_path / "all", framework="pt") as other:
        assert sorted(own.keys()) == sorted(other.keys()) == sorted(tensors)
        assert own.metadata() == {}
        for name in tensors:
            one, two = own.get_tensor(name), other.get_tensor(name)
            assert (one.dtype, one.shape) == (two.dtype, two.shape)
            assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)), name


def test_one_that_is_cut_short_meanwhile(path: Path) -> None:
    with pytest.raises(ValueError, match="changed while it was read; wait until it is written whole"):  # noqa: SIM117
        with TensorFile(path) as file:
            os.truncate(path, 1000)
            file.get_tensor("b")


def test_one_that_is_written_over_meanwhile(path: Path) -> None:
    with pytest.raises(ValueError, match="w.safetensors' changed while it was read"):  # noqa: SIM117
        with TensorFile(path) as file:
            held = file.get_tensor("a")
            with path.open("r+b") as other:  # as cp does it, to a file of the same size
                other.seek(-4 * SIZE, os.SEEK_END)
                other.write(bytes(4 * SIZE))
            os.utime(path, ns=(0, 0))
            file.get_tensor("b")
    assert held.sum() == 0  # of no mapped file: it stays as it was read


def test_one_that_is_replaced_meanwhile_is_the_old_one_whole(path: Path) -> None:
    with TensorFile(path) as file:
        save_file({"a": torch.ones(1)}, path.with_name("new"))
        os.replace(path.with_name("new"), path)
        assert file.get_tensor("b").sum() == SIZE and file.metadata() == {"k": "v"}


@pytest.mark.parametrize("broken", [False, True])
def test_a_file_of_torch_save_that_changes_meanwhile(tmp_path: Path, monkeypatch, broken: bool) -> None:
    path, given = tmp_path / "w.pth", files._read_zip
    torch.save({"weight": torch.ones(SIZE)}, path)

    def read(file, what: str):
        if broken:
            os.truncate(path, 1000)
        found = given(file, what)
        path.touch()
        return found

    monkeypatch.setattr(files, "_read_zip", read)
    with pytest.raises(ValueError, match="^checkpoint '.*w.pth' changed while it was read"):
        files.read_contents(path)


def test_a_dtype_that_torch_does_not_have(path: Path, monkeypatch) -> None:
    monkeypatch.setitem(tensor_file._DTYPES, "F32", "float31")
    with TensorFile(path) as file, pytest.raises(ValueError, match="b is of dtype F32, which torch does not have"):
        file.get_tensor("b")
