"""Encoders by name: timm's backbones and transformers' text encoders as parts of our models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import InputSpec, Text
from tests.models.cases import batch, everything, without_gradient

pytestmark = pytest.mark.slow

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
KINDS = {
    "bert": transformers.BertConfig(**SIZES, max_position_embeddings=20),
    "roberta": transformers.RobertaConfig(**SIZES, max_position_embeddings=22),
    "mpnet": transformers.MPNetConfig(**SIZES, max_position_embeddings=22),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=16, max_position_embeddings=20),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=24, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=20
    ),
}
BACKBONES: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": [64, 96], "window_size": 2},  # gives maps channels-last
    "test_vit": {"img_size": [64, 96]},  # three maps of one stride
}


def timm_part(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "timm", "name": name, "arguments": BACKBONES.get(name, {}), **more}


def text_part(folder: Path) -> dict[str, Any]:
    return {"kind": "transformers", "name": str(folder)}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A transformers folder with random weights; of the kind that `indirect` names, BERT unless said."""
    torch.manual_seed(3)
    encoder = transformers.AutoModel.from_config(KINDS[getattr(request, "param", "bert")])
    encoder.save_pretrained(tmp_path / "text")
    return tmp_path / "text"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# ---- images ----


@pytest.mark.parametrize("preset", ["lavt_tiny", "magnet_tiny"])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_runs_and_learns(preset: str, name: str) -> None:
    """Under either head: masks have the finest map's size, and every parameter that is trained gets a gradient."""
    whole = {"text__schedule": "whole"} if preset == "magnet_tiny" else {}
    model = models.create(preset, image=timm_part(name), **whole)
    encoder = model.image_encoder
    prediction = model(*batch())
    finest = encoder.strides[0]
    assert prediction.mask.shape == (2, 64 // finest, 96 // finest)
    everything(prediction).backward()
    assert without_gradient(model) == []
    with torch.no_grad():
        features = model.encode(*batch())
    for feature, stride, channels in zip(features.maps, encoder.strides, encoder.channels, strict=True):
        assert feature.shape == (2, 64 // stride, 96 // stride, channels)
    assert model.predict(batch()[0], *batch()[1]).shape == (2, 64, 96)


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_are_timms(name: str) -> None:
    """Its own `features_only`, at the strides of 4 and more, channels-last."""
    encoder = models.create("lavt_tiny", image=timm_part(name)).image_encoder.eval()
    theirs = timm.create_model(name, features_only=True, **BACKBONES[name]).eval()
    wanted = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    shared = {key: wanted[key] for key in encoder.state_dict()}
    encoder.load_state_dict(shared)
    image = batch()[0]
    with torch.no_grad():
        stream, expected = encoder.start(image), theirs(image)
    reduction = theirs.feature_info.reduction()
    expected = [each for each, stride in zip(expected, reduction, strict=True) if stride >= 4]
    for i, reference in enumerate(expected):
        found = encoder.stage(i, stream)
        if found.shape != reference.shape:
            reference = reference.permute(0, 2, 3, 1)
        torch.testing.assert_close(found, reference)
    assert len(expected) == len(encoder.channels) == len(encoder.strides)


def test_strides_repeat_where_a_transformer_keeps_its_size() -> None:
    image = models.preset_config("lavt_tiny", image=timm_part("test_vit")).image
    assert image.strides == (16, 16, 16) and image.channels == (64, 64, 64)
    assert not image.in_stream
    model = models.create("lavt_tiny", image=timm_part("test_vit"))
    # Words meet the maps; with no stream to gate into, no stage has a gate.
    assert [stage.gate for stage in model.fusion.stages] == [None] * 3


def test_normalisation_is_the_backbones() -> None:
    assert models.preset_config("lavt_tiny").spec.mean == InputSpec().mean
    spec = models.create("lavt_tiny", image=timm_part("tf_efficientnet_lite0")).spec
    assert spec.mean == (0.5, 0.5, 0.5) and spec.std == (0.5, 0.5, 0.5)
    given = models.preset_config(
        "lavt_tiny", image=timm_part("tf_efficientnet_lite0"), input={"mean": (0.1, 0.2, 0.3)}
    ).spec
    assert given.mean == (0.1, 0.2, 0.3) and given.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_means_unchanged(frozen: bool) -> None:
    """Weights and the norms' statistics, in training mode."""
    model = models.create("lavt_tiny", image=timm_part("resnet18", frozen=frozen))
    before = {name: tensor.clone() for name, tensor in model.image_encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    everything(model(*batch())).backward()
    assert without_gradient(model) == []
    optimizer.step()
    changed = [name for name, t in model.image_encoder.state_dict().items() if not torch.equal(t, before[name])]
    assert bool(changed) != frozen
    if not frozen:
        assert any("running_mean" in name for name in changed) and any("conv1.weight" in name for name in changed)


def test_published_weights_by_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is asked for the backbone's own weights; without network that fails by name, unless it is not asked."""
    asked = []
    create = timm.create_model

    def record(name: str, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
        asked.append((name, pretrained))
        if pretrained:
            raise OSError("no network here")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", record)
    with pytest.raises(ValueError, match="image weights 'resnet18' could not be loaded: no network here"):
        models.create("lavt_tiny", pretrained={"text": False}, image=timm_part("resnet18"))
    assert ("resnet18", True) in asked
    asked.clear()
    models.create("lavt_tiny", pretrained={"image": False, "text": False}, image=timm_part("resnet18"))
    assert asked and not any(pretrained for _, pretrained in asked)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "timm", "name": "resnet_18"}, "timm has no model 'resnet_18'; it has .*resnet"),
        ({"kind": "timm", "name": ""}, "name"),
        ({"kind": "timm"}, "name"),
        ({"kind": "timm", "name": "resnet18", "arguments": {"no_such": 1}}, "gives no features.*no_such"),
        ({"kind": "timm", "name": "resnet18", "depth": 3}, "depth"),
    ],
)
def test_refused_backbones(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config("lavt_tiny", image=part)


# ---- text ----


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_sizes_are_read_off(folder: Path) -> None:
    """Hidden size, layers (three: no multiple of four where nothing is sliced), vocabulary, positions."""
    model = models.create("lavt_tiny", text=text_part(folder))
    encoder = model.text_encoder
    assert encoder.width == 24 and encoder.vocab_size == VOCABULARY and encoder.max_positions == 20
    assert encoder.word_embedding.shape[0] == VOCABULARY
    assert encoder.encoder.config.num_hidden_layers == 3
    assert model.spec.tokenizer == str(folder)
    image, _ = batch((32, 32), count=1)
    full = torch.full((1, 20), 7)
    assert model(image, Text(full, torch.ones_like(full, dtype=torch.bool))).mask.isfinite().all()
    more = torch.full((1, 21), 7)
    with pytest.raises(ValueError, match="text.ids holds 21 tokens"):
        model(image, Text(more, torch.ones_like(more, dtype=torch.bool)))


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_words_are_transformers(folder: Path) -> None:
    """With its folder's weights: the last hidden state of transformers' own model."""
    model = models.create("lavt_tiny", pretrained={"text": True, "image": False}, text=text_part(folder)).eval()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    image, text = batch(vocabulary=VOCABULARY)
    with torch.no_grad():
        words = model.encode(image, text).words
        expected = theirs(input_ids=text.ids, attention_mask=text.mask.long()).last_hidden_state
    torch.testing.assert_close(words.features[text.mask], expected[text.mask])
    assert torch.equal(model.text_encoder.word_embedding, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_padding_is_never_seen(folder: Path) -> None:
    model = models.create("lavt_tiny", pretrained={"text": True, "image": False}, text=text_part(folder)).eval()
    image, (ids, mask) = batch(vocabulary=VOCABULARY)
    ids = torch.where(mask, ids, model.text_encoder.encoder.config.pad_token_id)
    more = torch.nn.functional.pad(ids, (0, 6), value=int(model.text_encoder.encoder.config.pad_token_id))
    short = model.predict(image, ids, mask)
    long = model.predict(image, more, torch.nn.functional.pad(mask, (0, 6)))
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_every_parameter_learns(folder: Path) -> None:
    model = models.create("lavt_tiny", text=text_part(folder))
    everything(model(*batch(vocabulary=VOCABULARY))).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_layers_are_found(folder: Path) -> None:
    model = models.create("lavt_tiny", text=text_part(folder))
    layers = model.repeated_layers()
    text = [layer for layer in layers if any(layer is part for part in model.text_encoder.modules())]
    assert len(text) == 3 and len(layers) == 3 + 8


def test_stored_precision_does_not_matter(folder: Path) -> None:
    """Folders on the hub are often stored in 16 bits; our models have one dtype."""
    stored = transformers.AutoModel.from_pretrained(folder).to(torch.bfloat16)
    stored.save_pretrained(folder)
    model = models.create("lavt_tiny", pretrained={"text": True, "image": False}, text=text_part(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.text_encoder.word_embedding, stored.get_input_embeddings().weight.float())
    model(*batch(vocabulary=VOCABULARY))


def test_weights_of_another_folder(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = transformers.AutoModel.from_config(KINDS["bert"])
    other.save_pretrained(tmp_path / "other")
    sources = {"image": False, "text": str(tmp_path / "other")}
    model = models.create("lavt_tiny", pretrained=sources, text=text_part(folder))
    assert torch.equal(model.text_encoder.word_embedding, other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="text weights .*nowhere"):
        models.create(
            "lavt_tiny", pretrained={"image": False, "text": str(tmp_path / "nowhere")}, text=text_part(folder)
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.ViTConfig(hidden_size=24, num_hidden_layers=1), "is a vit, expected a text encoder"),
        (transformers.T5Config(vocab_size=60, d_model=24), "is a t5, expected a text encoder"),
        (transformers.GPT2Config(n_embd=24, n_layer=1), "is a gpt2, expected a text encoder"),
    ],
)
def test_others_are_refused(config: transformers.PretrainedConfig, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.preset_config("lavt_tiny", text=text_part(tmp_path))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformers finds no text encoder '.*nowhere'"):
        models.preset_config("lavt_tiny", text=text_part(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="text.*name"):
        models.preset_config("lavt_tiny", text={"kind": "transformers"})


# ---- both ----


@pytest.mark.parametrize("preset", ["lavt_tiny", "magnet_tiny"])
@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)]
)
def test_trains_saves_and_loads(preset: str, name: str, folder: Path, tmp_path: Path) -> None:
    """A step changes every part; the file gives the same masks where neither folder nor network is."""
    torch.manual_seed(0)
    sources = {"text": True, "image": False}
    model = models.create(preset, pretrained=sources, image=timm_part(name), text=text_part(folder))
    image, text = batch(vocabulary=VOCABULARY)
    target = torch.zeros(2, 16, 24)
    target[:, 3:9, 4:12] = 1

    def loss() -> Tensor:
        prediction = model(image, text)
        masks = [prediction.mask, *(each.mask for each in prediction.earlier)]
        total = sum(torch.nn.functional.binary_cross_entropy_with_logits(mask, target) for mask in masks)
        return total + 1e-3 * everything(prediction)

    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = loss()
    first.backward()
    assert without_gradient(model) == []
    optimizer.step()
    changed = {key.split(".")[0] for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {"image_encoder", "text_encoder", "fusion", "head"}
    assert loss() < first
    model.eval()
    models.save(model, tmp_path / "model.safetensors")
    folder.rename(tmp_path / "gone")
    again = models.load(tmp_path / "model.safetensors")
    assert again.config == model.config and again.spec == model.spec
    assert torch.equal(again.predict(image, *text), model.predict(image, *text))
