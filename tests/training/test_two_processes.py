"""Copies and shards of a model on two Gloo processes: against one process, stopped, resumed, scored, and failing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from magnet_fast import models
from magnet_fast.evaluation import evaluate
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.progress import MetricsFile

from .fakes import FakeDataset, FakeModel, same_weights
from .processes import run_module
from .two_processes import fake_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_module("two_processes", folder)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def state_of(out: Path) -> dict:
    return load_checkpoint(out / CHECKPOINT)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(folder, tmp_path, kind: str) -> None:
    """Two micro-batches a step, clipped gradients, averaged weights."""
    one = fake_trainer(tmp_path / "one", None)
    scores = one.run()
    state = state_of(folder / kind)
    assert state["step"] == one.step == 9
    for name, value in one.model.state_dict().items():
        assert torch.allclose(value, state["model"][name], rtol=0, atol=1e-5), name
    for name, value in one.average.weights.items():
        assert torch.allclose(value, state["ema"]["weights"][name], rtol=0, atol=1e-5), name
    (row,) = [r for r in MetricsFile(folder / kind / "metrics.jsonl").rows() if r["kind"] == "train"]
    (expected,) = [r for r in one.log.metrics.rows() if r["kind"] == "train"]
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    found = json.loads((folder / "found-0.json").read_text())[kind]
    assert found["oIoU"] == pytest.approx(scores["oIoU"], abs=1e-6)


def test_shards_train_as_copies_do(folder) -> None:
    """A real MagNet with its own losses: layer by layer, twice in a step, with unused parameters, recomputed."""
    copies, shards = (state_of(folder / f"magnet_{kind}") for kind in ("ddp", "fsdp"))
    for part in ("model", "terms"):
        assert copies[part].keys() == shards[part].keys()
        for name, value in copies[part].items():
            assert torch.allclose(value, shards[part][name], rtol=0, atol=2e-4), name
    rows = [MetricsFile(folder / f"magnet_{kind}" / "metrics.jsonl").rows() for kind in ("ddp", "fsdp")]
    assert [(row["kind"], row["step"]) for row in rows[0]] == [(row["kind"], row["step"]) for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        if one["kind"] == "train":
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert other["grounding"] == pytest.approx(one["grounding"], rel=1e-4)
    assert rows[0][-1]["hidden_words"]["words"] == rows[1][-1]["hidden_words"]["words"] == 15


def test_each_process_holds_a_share(found) -> None:
    """Of every parameter, along its first dimension."""
    expected = [sum(-(-p.shape[0] // 2) * p[0].numel() for p in FakeModel().parameters())]
    expected.append(sum(p.numel() for p in FakeModel().parameters()) - expected[0])
    assert [entry["share"] for entry in found] == expected


def test_a_signal_to_one_stops_both_and_they_go_on_exactly(folder, found) -> None:
    assert [entry["stopped_at"] for entry in found] == [5, 5]  # it came in step 4, and travels for one more
    assert all(entry["received_default"] for entry in found)  # the handler is gone
    whole, resumed, other = (state_of(folder / name) for name in ("fsdp", "resumed", "resumed_as_ddp"))
    assert state_of(folder / "stopped")["step"] == 5
    assert same_weights(whole["model"], resumed["model"])
    assert same_weights(whole["ema"]["weights"], resumed["ema"]["weights"])
    for name, entry in whole["optimiser"]["state"].items():
        assert all(torch.equal(entry[key], resumed["optimiser"]["state"][name][key]) for key in entry)
    for name, value in whole["model"].items():  # the format knows nothing of shards
        assert torch.allclose(value, other["model"][name], rtol=0, atol=1e-5), name


def test_processes_with_folders_of_their_own_go_on_from_the_first_ones(folder, found) -> None:
    """The second process once began anew, and two models' gradients were averaged."""
    assert [entry["started_at"] for entry in found] == [5, 5]
    assert all("own-0: the folder already holds a run" in entry["refused"] for entry in found)
    assert found[1]["own_files"] == []
    whole, resumed = state_of(folder / "fsdp"), state_of(folder / "own-0")
    for part in ("model", "terms"):
        assert same_weights(whole[part], resumed[part])
    assert same_weights(whole["ema"]["weights"], resumed["ema"]["weights"])


def test_exported_weights_are_whole_and_averaged(folder) -> None:
    state = state_of(folder / "fsdp")
    exported = load_file(folder / "fsdp" / "last.safetensors")
    averaged = {f"model.{name}": value for name, value in exported.items()}
    assert same_weights(averaged, state["ema"]["weights"])
    name = "image_encoder.patches.weight"
    assert not torch.equal(exported[name], state["model"][name])
    assert models.load(folder / "magnet_fsdp" / "last.safetensors").config.architecture == "magnet"


def test_every_sentence_is_scored_once(found) -> None:
    """7 sentences on 2 processes in batches of 2: nothing is padded, nothing counted twice."""
    assert sorted(found[0]["scored"] + found[1]["scored"]) == list(range(7))
    assert {len(entry["scored"]) for entry in found} == {3, 4}
    assert found[0]["scores"] == found[1]["scores"]
    assert found[0]["scores"]["sentences"] == 7
    expected = evaluate(FakeModel().eval(), FakeDataset(7), batch_size=1)
    assert found[0]["scores"].keys() == expected.keys()


def test_a_broken_item_stops_both_and_each_saves_its_share(folder, found) -> None:
    for rank, entry in enumerate(found):
        assert f"-rank-{rank}.safetensors" in entry["error"]
        assert "loss" in entry["error"]
    files = sorted(path.name for path in (folder / "broken" / "nonfinite").iterdir())
    assert [name.rsplit("-", 1)[1] for name in files] == ["0.json", "0.safetensors", "1.json", "1.safetensors"]
    facts = [json.loads((folder / "broken" / "nonfinite" / name).read_text()) for name in files[::2]]
    indices = [index for entry in facts for index in entry["indices"]]
    assert 17 in indices and len(set(indices)) == 8
    culprit = next(entry for entry in facts if 17 in entry["indices"])
    assert culprit["values"]["loss"] == "nan"
    image = load_file(folder / "broken" / "nonfinite" / f"step-{culprit['step']}-rank-{culprit['rank']}.safetensors")
    assert image["image"][culprit["indices"].index(17)].isnan().any()
