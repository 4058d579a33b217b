"""Checkpoint files: atomic, safe to read, with every random generator."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from magnet_fast.training.checkpoint import (
    load_checkpoint,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
    write_atomically,
)


def test_a_failing_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"step": 1}, path)

    def fail(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"step": 1}, path)
    (tmp_path / ".last.pt.tmp").write_bytes(b"left by a kill")

    def write(file) -> None:
        assert load_checkpoint(path)["step"] == 1
        torch.save({"format": "magnet_fast.training/1", "step": 2}, file)
        assert load_checkpoint(path)["step"] == 1

    write_atomically(path, write)
    assert load_checkpoint(path)["step"] == 2


def test_random_generators_go_on_after_loading(tmp_path) -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    seed_everything(5)
    draw()  # leaves NumPy with a second normal number in store
    save_checkpoint({"rng": [rng_state()]}, tmp_path / "c.pt")
    expected = [draw() for _ in range(3)]
    seed_everything(6)
    set_rng_state(load_checkpoint(tmp_path / "c.pt")["rng"][0])
    assert [draw() for _ in range(3)] == expected


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"format": "magnet_fast.training/1", "model": Payload()}, path)
    with pytest.raises(ValueError, match=r"evil\.pt: not a readable checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not Payload.ran


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"something else"])
def test_unreadable_files(tmp_path, content: bytes) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_other_files_of_torch(tmp_path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a training checkpoint of this package"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_checkpoint(tmp_path / "none.pt")
