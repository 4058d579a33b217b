"""From a configuration to a mask with nodes of scenes: trained, scored, saved, loaded, asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from magnet_fast import Segmenter
from magnet_fast.cli import app
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.scenes import write_scenes
from magnet_fast.training.terms.node_choice import best_node
from tests.node_scenes import write_node_scenes

pytestmark = pytest.mark.slow

SETTINGS = (
    "model.name=dumoga_tiny", "max_steps=4", "batch_size=4", "data.dataset=ris_cq", "data.image_size=60",
    "schedule.warmup=1", "data.cache=false", "terms.node_choice.weight=1", "terms.mask.weight=0.1",
)  # fmt: skip


def run(*command: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(entry) for entry in command])
    assert (result.exit_code != 0) == fails, (result.output, result.exception)
    return result.output


def train(root: Path, out: Path, *settings: str, fails: bool = False) -> str:
    sets = [argument for setting in (*SETTINGS, *settings) for argument in ("--set", setting)]
    return run("train", "--config", "magnet_tiny_scenes", "--data", root, "--out", out, *sets, fails=fails)


def test_from_configuration_to_mask(tmp_path: Path) -> None:
    root, out = write_node_scenes(tmp_path / "data", {"train": 8, "val": 4}), tmp_path / "run"
    assert "dumoga_tiny" in train(root, out)
    weights = out / "last.safetensors"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("node_choice" in row and 0 <= row["node_accuracy"] <= 1 for row in rows)
    scores = tmp_path / "scores.json"
    run("evaluate", "--checkpoint", weights, "--data", root, "--dataset", "ris_cq", "--split", "val", "--out", scores)
    assert json.loads(scores.read_text())["image_size"] == 60

    reader, segmenter = open_reader(root, "ris_cq"), Segmenter.from_checkpoint(weights)
    assert segmenter.lacking == ("proposals", "node_features")
    ref, other = reader.refs("val")[0], reader.refs("val")[-1]
    picture, sentence = reader.image_path(ref.image_id), ref.sentences[0].raw
    context = reader.extra(ref, ref.sentences[0])
    prepared = segmenter.prepare(picture, context=context)
    found = segmenter(prepared, sentence)
    assert found.probability.shape == (60, 60)
    beside = {name: tensor[None] for name, tensor in context.items()}
    with torch.inference_mode():
        scores = segmenter.model(prepared.pixels[None], segmenter.tokenizer([sentence]), beside).extra["nodes"]
    inside = torch.from_numpy(reader.mask(ref))
    node, _ = best_node(beside["proposals"], inside[None])
    share = scores.softmax(dim=1)[0, node].item()
    assert 0 < share < 1 and found.probability[inside.bool().numpy()].mean() == pytest.approx(share, abs=0.02)

    second = segmenter.prepare(reader.image_path(other.image_id), context=reader.extra(other, other.sentences[0]))
    both = segmenter([second, prepared], [other.sentences[0].raw, sentence])
    np.testing.assert_allclose(both[1].probability, found.probability, atol=1e-5)

    with pytest.raises(ValueError, match="context: the model needs proposals, node_features beside the picture"):
        segmenter(picture, sentence)
    with pytest.raises(ValueError, match=r"expected what the model reads beside the picture.*got 'edges'"):
        segmenter.prepare(picture, context={**context, "edges": torch.zeros(10, 10)})
    fewer = segmenter.prepare(picture, context={name: one[:5] for name, one in context.items()})
    with pytest.raises(ValueError, match="expected the same tensors beside all pictures of a batch"):
        segmenter([prepared, fewer], sentence)
    said = run("segment", picture, sentence, "--checkpoint", weights, "--out", tmp_path / "mask.png", fails=True)
    assert "context: the model needs proposals" in said and not (tmp_path / "mask.png").exists()
    many = ("--input", root / "images/train2017", "--expression", sentence, "--out", tmp_path / "many")
    assert "which --input does not give" in run("segment", *many, "--checkpoint", weights, fails=True)
    assert not (tmp_path / "many").exists()


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    root, scenes = write_node_scenes(tmp_path / "data", {"train": 4, "val": 2}), tmp_path / "scenes"
    refused = {
        "model.overrides.alignment=edges": "the model needs edges beside image and text",
        "model.name=lavt_tiny": "terms.node_choice: the model chooses among no proposals",
        "terms.grounding.weight=1": "terms.grounding: the model makes no maps of the image",
        "terms.alignment.weight=1": "terms.alignment: the model gives no embedding of the pixels",
    }
    for setting, message in refused.items():
        assert message in train(root, tmp_path / "run", setting, fails=True)
        assert not (tmp_path / "run").exists()
    write_scenes(scenes, images=4, seed=1, level="easy", image_size=64)
    assert "needs proposals, node_features beside" in train(
        scenes, tmp_path / "run", "data.dataset=refcoco", fails=True
    )
