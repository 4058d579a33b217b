"""Files of what was trained: what they leave to the base weights, and that all of it comes back or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from magnet_fast import models
from magnet_fast.models.files import safetensors_metadata
from magnet_fast.models.tuning import merge
from tests.models.cases import open_gates
from tests.models.sam import COMMON, DECODER_HEADS, IMAGE, their_sam

SIZES: dict[str, Any] = {
    "image": {**IMAGE, "tuning": "lora"},
    "fusion": {"width": COMMON, "layers": 1},
    "head": {"num_heads": DECODER_HEADS, "feedforward": 96},
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {k: v for k, v in their_sam().state_dict().items() if "prompt_encoder.shared_embedding" not in k}


@pytest.fixture
def sam(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(weights, tmp_path / "sam.safetensors")
    return tmp_path / "sam.safetensors"


def built(sam: Path, **changes: Any) -> models.base.ReferringModel:
    """With LoRA that changes something, as after training."""
    torch.manual_seed(3)
    model = models.create("risam_tiny", pretrained={"image": str(sam), "text": False}, **SIZES, **changes)
    open_gates(model)
    return model.eval()


def saved(model: nn.Module, path: Path) -> tuple[set[str], dict[str, Any]]:
    """Names in the image encoder that a file of what was trained holds, and the bases that it names."""
    models.save(model, path, whole=False)
    below = "image_encoder."
    held = {name.removeprefix(below) for name in load_file(path) if name.startswith(below)}
    return held, json.loads(safetensors_metadata(path).get("bases", "{}"))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_trained_alone_is_held_and_all_comes_back(sam: Path, tmp_path: Path) -> None:
    model, path = built(sam), tmp_path / "trained.safetensors"
    held, bases = saved(model, path)
    entries = model.image_encoder.state_dict()
    assert held == {name for name in entries if ".lora." in name}
    assert bases.keys() == {"image"} and bases["image"]["source"] == str(sam)
    assert bases["image"]["tensors"] == len(entries) - len(held) and len(bases["image"]["sha256"]) == 64
    assert load_file(path).keys() >= {f"text_encoder.{name}" for name in model.text_encoder.state_dict()}
    again = models.load(path)
    assert_same(again, model)
    assert saved(again, tmp_path / "again.safetensors") == (held, bases)  # trained on, it is saved likewise
    # A file of everything needs no base.
    models.save(again, tmp_path / "whole.safetensors", safetensors_metadata(path))
    sam.unlink()
    assert "bases" not in safetensors_metadata(tmp_path / "whole.safetensors")
    assert_same(models.load(tmp_path / "whole.safetensors"), model)


def test_what_loading_interpolates_is_held(sam: Path, tmp_path: Path) -> None:
    """Machines differ in its last bits; the layers in windows have no such tables."""
    model = built(sam, image__image_size=64)
    held, _ = saved(model, tmp_path / "trained.safetensors")
    tables = {f"layers.{i}.attention.rel_{side}" for i in (1, 3) for side in ("height", "width")}
    assert {name for name in held if ".lora." not in name} == tables | {"positions"}
    assert_same(models.load(tmp_path / "trained.safetensors"), model)


@pytest.mark.parametrize("tuning", ["adapter", "frozen", "full"])
def test_what_is_not_trained_is_left_out(sam: Path, tmp_path: Path, tuning: str) -> None:
    model = built(sam, image__tuning=tuning)
    held, bases = saved(model, tmp_path / "trained.safetensors")
    entries = set(model.image_encoder.state_dict())
    assert (
        held
        == {
            "adapter": {name for name in entries if ".adapter." in name},
            "frozen": set(),
            "full": entries,
        }[tuning]
    )
    assert bool(bases) == (tuning != "full")
    assert_same(models.load(tmp_path / "trained.safetensors"), model)


def test_what_changed_is_held(sam: Path, tmp_path: Path) -> None:
    """Though frozen: LoRA folded in, or all weights rounded."""
    model, path = merge(built(sam)), tmp_path / "trained.safetensors"
    assert saved(model, path)[0] == {f"layers.{i}.attention.qkv.weight" for i in range(4)}
    assert_same(models.load(path), model)
    rounded = built(sam).bfloat16()
    assert saved(rounded, path) == (set(rounded.image_encoder.state_dict()), {})


def test_any_encoder_has_a_base_where_half_of_it_is_frozen(tmp_path: Path) -> None:
    source, path = tmp_path / "bert.safetensors", tmp_path / "trained.safetensors"
    save_file(models.create("lavt_tiny").text_encoder.bert.state_dict(), source)
    model = models.create("lavt_tiny", pretrained={"image": False, "text": str(source)})
    frozen = model.text_encoder.bert.encoder.layer[:1].requires_grad_(False)
    assert saved(model, path)[1] == {}  # little would be saved
    frozen = model.text_encoder.bert.encoder.requires_grad_(False)
    _, bases = saved(model, path)
    assert bases["text"]["tensors"] == len(list(frozen.parameters()))
    assert not any(name.startswith("text_encoder.bert.encoder.") for name in load_file(path))
    assert_same(models.load(path), model)
    model.bases.clear()  # what started from nothing
    assert saved(model, path)[1] == {}


def test_a_base_that_is_gone_or_another_is_refused(
    sam: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = built(sam), tmp_path / "trained.safetensors"
    saved(model, path)
    name = "vision_encoder.layers.2.mlp.lin1.bias"
    save_file({**weights, name: weights[name].nextafter(torch.tensor(torch.inf))}, sam)
    with pytest.raises(ValueError, match=r"was trained on another base: '.*sam\.safetensors' now gives its image enc"):
        models.load(path)
    sam.unlink()
    with pytest.raises(ValueError, match=r"holds only what was trained of its image encoder.*no such file.*merge"):
        models.load(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model.bases["image"] = model.bases["image"]._replace(source="nobody/sam")
    saved(model, path)
    with pytest.raises(ValueError, match=r"the rest is 'nobody/sam', which could not be loaded: pretrained image"):
        models.load(path)
