"""Files and published weights of whole models: what is accepted and what is refused."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertModel

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.encoders.swin_weights import swin_from_timm
from magnet_fast.models.released import dropped_names
from magnet_fast.models.weights import load_with_metadata
from tests.golden.parameters import golden, released_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def magnet() -> dict[str, Tensor]:
    """The flat state dict of a released MagNet."""
    return released_checkpoint("magnet")["model"]


@pytest.fixture(scope="module")
def lavt() -> dict[str, dict[str, Tensor]]:
    """The contents of a released LAVT's file."""
    return released_checkpoint("lavt")


def test_files_round_trip(tmp_path: Path) -> None:
    model = models.create("magnet_tiny", fusion__form="xmha", input__size=128).eval()
    path = tmp_path / "model.safetensors"
    models.save(model, path, {"step": "7"})
    again, metadata = load_with_metadata(path)
    assert again.config == model.config and metadata["step"] == "7" and not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(models.load(path).parameters(), again.parameters(), strict=True))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    model, path = models.create("lavt_tiny"), tmp_path / "model.safetensors"
    models.save(model, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        models.save(model, path, {"step": object()})  # metadata is text
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.safetensors"):
        models.load(tmp_path / "empty.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by magnet_fast"):
        models.load(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors", {"format": "magnet_fast.model/2"})
    with pytest.raises(ValueError, match="bare.safetensors' has no configuration"):
        models.load(tmp_path / "bare.safetensors")
    later = {"format": "magnet_fast.model/5", "config": "{}"}
    save_file({"x": torch.zeros(1)}, tmp_path / "later.safetensors", later)
    with pytest.raises(ValueError, match="model/5"):
        models.load(tmp_path / "later.safetensors")


def test_released_file_with_arguments(magnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Released files carry an argparse Namespace; with it and behind a DataParallel prefix they still load."""
    state = {f"module.{k}": v for k, v in magnet.items()}
    torch.save({"model": state, "args": Namespace(lr=1.0), "epoch": 39}, tmp_path / "magnet.pth")
    model = models.from_released(tmp_path / "magnet.pth")
    assert model.config.fusion.masking == "released" and not model.training
    assert model.config.image.window_size == 7 and model.config.image.depths == (2, 2, 2, 2)
    assert model.config.text.schedule == "slices"
    flat = models.from_released(magnet)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), flat.parameters(), strict=True))


def test_released_and_saved_computes_the_same(lavt: dict, tmp_path: Path) -> None:
    values = golden("lavt")
    model = models.from_released(lavt, fusion_heads=(1, 2, 1, 4))
    models.save(model, tmp_path / "lavt.safetensors")
    again = models.load(tmp_path / "lavt.safetensors")
    inputs = values["image"], values["input_ids"], values["attention_mask"]
    assert list(again.config.fusion.heads) == [1, 2, 1, 4]
    assert torch.equal(model.predict(*inputs), again.predict(*inputs))


def test_malicious_checkpoint_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    torch.save({"model": Attack()}, tmp_path / "attack.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack()))
    for name in ("attack.pth", "plain.pth"):
        with pytest.raises(ValueError, match="cannot be read safely"):
            models.from_released(tmp_path / name)
    assert not marker.exists()


def test_released_strictness(magnet: dict[str, Tensor], lavt: dict) -> None:
    state = magnet
    extra = {**state, "image_model.layers.0.surprise.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="surprise"):
        models.from_released(extra)
    less = {k: v for k, v in state.items() if k != "image_model.layers.2.mixer.0.bias"}
    with pytest.raises(ValueError, match=r"fusion\.stages\.2\.mixer\.0\.bias"):
        models.from_released(less)
    less = {k: v for k, v in state.items() if k != "image_model.patch_embed.proj.weight"}
    with pytest.raises(ValueError, match=r"lacks 'image_model\.patch_embed\.proj\.weight'"):
        models.from_released(less)
    with pytest.raises(ValueError, match="not a released checkpoint of .*lavt.*magnet.*resnet"):
        models.from_released({"resnet.conv1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="does not divide"):
        models.from_released(state, fusion_heads=(3, 1, 1, 1))
    with pytest.raises(ValueError, match="masking: not a hint for a released lavt; known: fusion_heads"):
        models.from_released(lavt, masking="correct")
    assert models.from_released(state, masking="correct").config.fusion.masking == "correct"


def test_what_released_files_lose_is_told(magnet: dict[str, Tensor], lavt: dict) -> None:
    """Only what no forward pass reads: the released code's own dead weights and indices, and the last stage's gate."""
    dropped = dropped_names({"model": magnet})
    assert {name.split(".")[0] for name in dropped} == {"image_model", "language_model", "lang_proj"}
    read = ("qkv", "fusion.", "mixer", "embeddings.word", "blocks.0.norm", "pwams", "res_gates")
    assert not [name for name in dropped if any(part in name for part in read)]
    gates = [name for name in dropped if ".res_gate." in name]
    assert gates and all(name.startswith("image_model.layers.3.") for name in gates)
    assert any(name.startswith("backbone.layers.3.res_gate") for name in dropped_names(lavt))


def test_fusion_heads_matter(lavt: dict) -> None:
    values = golden("lavt")
    inputs = values["image"], Text(values["input_ids"], values["attention_mask"].bool())
    with torch.inference_mode():
        one = models.from_released(lavt)(*inputs).mask
        four = models.from_released(lavt, fusion_heads=(4, 4, 4, 4))(*inputs).mask
    assert (one - four).abs().max() > 1e-2


SMALL = {
    "image": {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 7,
        "absolute_position": False,
    },
    "text": {"hidden_size": 64, "num_heads": 2, "num_layers": 4, "vocab_size": 50, "intermediate_size": 64},
}


def test_pretrained_from_local_paths(tmp_path: Path) -> None:
    """timm's Swin and a transformers folder load by path, and give the encoder timm's features."""
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    for name, parameter in swin.named_parameters():
        if name.endswith("bias_table"):
            parameter.data.normal_()
    torch.save({"model": swin.state_dict()}, tmp_path / "swin.pth")
    target = models.create("magnet_tiny", **SMALL)
    bert = BertModel(target.text_encoder.bert.config, add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    sources = {"image": str(tmp_path / "swin.pth"), "text": str(tmp_path / "bert")}
    model = models.create("magnet_tiny", pretrained=sources, **SMALL).eval()
    for name, tensor in bert.state_dict().items():
        assert torch.equal(tensor, model.text_encoder.bert.state_dict()[name]), name
    image, encoder = torch.randn(1, 3, 224, 224), model.image_encoder
    with torch.inference_mode():
        x = encoder.start(image)
        for stage in range(3):  # the last map is one window: there timm does not shift
            x = encoder.descend(stage, encoder.stage(stage, x))
        expected = swin.layers[3].downsample(swin.layers[:3](swin.patch_embed(image)))
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_one_encoder_may_start_from_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert = BertModel(models.create("lavt_tiny").text_encoder.bert.config, add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    torch.manual_seed(1)
    expected = models.create("lavt_tiny").image_encoder.state_dict()
    torch.manual_seed(1)
    model = models.create("lavt_tiny", pretrained={"image": False, "text": str(tmp_path / "bert")})
    for name, tensor in model.image_encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(model.text_encoder.word_embedding, bert.get_input_embeddings().weight)


def test_bias_tables_follow_the_window() -> None:
    table = torch.randn(13 * 13, 3)
    state = {"layers.0.blocks.0.attn.relative_position_bias_table": table}
    name = "stages.0.blocks.0.attention.bias_table"
    assert torch.equal(swin_from_timm(state, 7)[name], table)
    assert swin_from_timm(state, 12)[name].shape == (23 * 23, 3)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"image": "no_such_swin"}, "neither a file nor a model that timm knows"),
        ({"image": "missing/file.pth"}, "no such file"),
        ({"picture": "x"}, "unknown entry 'picture'"),
        ({"text": "x"}, "no published Swin"),
    ],
)
def test_pretrained_errors(sources: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create("magnet_tiny", pretrained=sources)


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    sources = {"image": str(tmp_path / "swin.pth"), "text": str(tmp_path / "no-such-folder")}
    with pytest.raises(ValueError, match="text weights .*pretrained=False"):
        models.create("magnet_tiny", pretrained=sources, **SMALL)


def test_pretrained_of_another_size_is_named(tmp_path: Path) -> None:
    bert = BertModel(models.create("lavt_tiny", text__vocab_size=40).text_encoder.bert.config, add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"does not fit BertModel.*word_embeddings.weight: \(40, 64\)"):
        models.create("lavt_tiny", pretrained={"image": False, "text": str(tmp_path / "bert")})
