"""Checkpoint files: atomic, safe to read, with every random generator."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from magnet_fast.training.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from magnet_fast.training.randomness import rng_state, seed_everything, set_rng_state
from magnet_fast.training.state import check_form

from .fakes import FakeDataset, FakeModel, fake_config, trainer_of


def test_random_generators_go_on_after_loading(tmp_path) -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    seed_everything(5)
    draw()  # leaves NumPy with a second normal number in store
    save_checkpoint({"rng": [rng_state()]}, tmp_path / "c.safetensors")
    expected = [draw() for _ in range(3)]
    seed_everything(6)
    set_rng_state(load_checkpoint(tmp_path / "c.safetensors")["rng"][0])
    assert [draw() for _ in range(3)] == expected


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path) -> None:
    path = tmp_path / "evil.safetensors"
    torch.save({"format": FORMAT, "model": Payload()}, path)
    with pytest.raises(ValueError, match=r"evil\.safetensors: not a readable checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not Payload.ran


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"something else"])
def test_unreadable_files(tmp_path, content: bytes) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_other_safetensors_files(tmp_path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a training checkpoint of this package"):
        load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_run_of_an_earlier_version_is_refused_with_what_can_be_done(tmp_path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format": "magnet_fast.training/2", "state": "{}"})
    with pytest.raises(ValueError, match=r"earlier version .*training/2.* cannot be resumed.*--set model.weights="):
        load_checkpoint(path)


def test_every_kind_of_value_comes_back(tmp_path) -> None:
    """Nested containers, numbers as keys, tensors of any type and of no dimension, strided ones."""
    tensors = {
        "strided": torch.arange(12.0).view(3, 4).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
    }
    state = {"a": {0: {"x": tensors["scalar"]}, 7: "seven"}, "b": [None, True, 3, 0.1, float("inf"), ["", {}]]}
    save_checkpoint({**state, **tensors}, tmp_path / "c.safetensors")
    found = load_checkpoint(tmp_path / "c.safetensors")
    assert found["b"] == state["b"] and found["a"][7] == "seven" and found["a"][0]["x"] == 2.5
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with pytest.raises(TypeError, match="state: a/0 is a set"):
        save_checkpoint({"a": [{1}]}, tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [
        {"state": "{"},
        {"state": "[]"},
        {"state": "[" * 100_000},
        {"state": '{"a": {"$items": 3}}'},
        {"state": '{"a": {"$items": [[{}, 1]]}}'},
        {"state": '{"a": {"$items": [[1]]}}'},
        {"state": '{"a": {"$items": ["xy"]}}'},
        {"state": '{"a": {"$items": 3}}'},
        {"state": '{"a": {"$tensor": 3}}'},
        {"state": '{"a": {"$tensor": "absent"}}'},
    ],
)
def test_a_state_of_another_form_is_named(tmp_path, metadata: dict) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"x": torch.ones(1)}, path, {"format": FORMAT, **metadata})
    with pytest.raises(ValueError, match="checkpoint.safetensors"):
        load_checkpoint(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What a run with averaged weights has left, as it is read."""
    out = tmp_path_factory.mktemp("run")
    trainer_of(fake_config(max_steps=2, ema=0.5, validate_every="never"), FakeModel(), FakeDataset(24), None, out).run()
    return load_checkpoint(out / "checkpoint.safetensors")


def test_a_whole_state_is_of_the_form(whole) -> None:
    check_form(whole, "x")
    # Entries that a later version added.
    check_form({key: value for key, value in whole.items() if key != "bases"}, "x")


def entries(whole: dict) -> list[str]:
    """Those that must be there: later versions added bases, and nothing reads the place in the data twice."""
    return [key for key in whole if key not in ("bases", "epoch", "position")]


def test_a_state_without_an_entry_is_named(whole) -> None:
    assert len(entries(whole)) > 15
    for key in entries(whole):
        with pytest.raises(ValueError, match=rf"^runs/c\.safetensors: not a readable .*form \(it lacks {key}\)"):
            check_form({name: value for name, value in whole.items() if name != key}, "runs/c.safetensors")
        with pytest.raises(ValueError, match=rf"another form \({key}: expected .*, got tuple\)"):
            check_form({**whole, key: ()}, "runs/c.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": {}}, "ema lacks weights, updates"),
        ({"ema": {"weights": {"x": 3}, "updates": 1}}, "ema/weights/x: expected Tensor, got int"),
        ({"model": {"x": None}}, "model/x: expected Tensor, got NoneType"),
        ({"metadata": {"model_name": 3}}, "metadata/model_name: expected str, got int"),
        ({"optimiser": {"state": {}}}, "optimiser lacks param_groups"),
        ({"window": {"sums": [3], "steps": 0}}, "window/sums/0: expected Tensor, got int"),
        ({"rng": [{"python": [], "torch": torch.zeros(1)}]}, "rng/0 lacks numpy"),
        ({"bases": {"image": {"source": "x"}}}, "bases/image lacks tensors, sha256"),
    ],
)
def test_a_state_of_other_entries_is_named(whole, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"c\.safetensors: .*\({message}\)"):
        check_form({**whole, **change}, "c.safetensors")
