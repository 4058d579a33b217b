"""Presets, overrides, released and own files, pretrained weights: what is accepted and what is refused."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace

import pytest
import timm
import torch
from transformers import BertModel

from magnet_fast import models
from magnet_fast.models.bert import bert_config
from magnet_fast.models.pretrained import swin_from_timm
from tests.golden.parameters import golden, released_checkpoint


def test_overrides() -> None:
    config = models.preset_config("magnet_tiny", alignment="xmha", text__vocab_size=200, image={"window_size": 5})
    assert config.alignment.kind == "xmha" and config.text.vocab_size == 200 and config.image.window_size == 5
    assert config.image.embed_dim == models.preset_config("magnet_tiny").image.embed_dim


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("magnet_tin", {}, "did you mean 'magnet_tiny'"),
        ("magnet_tiny", {"windowsize": 3}, "unknown model setting 'windowsize'"),
        ("magnet_tiny", {"image__windw_size": 3}, "did you mean 'window_size'"),
        ("magnet_tiny", {"image": {"dept": 3}}, "image.dept"),
        ("magnet_tiny", {"alignment": "other"}, "alignment.kind"),
        ("magnet_tiny", {"text__num_layers": 5}, "multiple of 4"),
        ("magnet_tiny", {"image__num_heads": (3, 2, 4, 8)}, "does not divide"),
        ("magnet_tiny", {"alignment": {"kind": "xmha", "masking": "released"}}, "PWAM"),
        ("lavt_tiny", {"masking": "released"}, "unknown model setting"),
    ],
)
def test_refused_configurations(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, **overrides)


def test_files_round_trip(tmp_path) -> None:
    model = models.build("magnet_tiny", alignment="xmha").eval()
    path = tmp_path / "model.safetensors"
    models.save_model(model, path, {"image_size": "128"})
    again, metadata = models.load_model(path)
    assert again.config == model.config and metadata["image_size"] == "128"
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_refused_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.load_model(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.safetensors"):
        models.load_model(tmp_path / "empty.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by magnet_fast"):
        models.load_model(tmp_path / "other.safetensors")


def test_released_file_with_arguments(tmp_path) -> None:
    """Released files carry an argparse Namespace; with it and behind a DataParallel prefix they still load."""
    state = {f"module.{k}": v for k, v in released_checkpoint("magnet")["model"].items()}
    torch.save({"model": state, "args": Namespace(lr=1.0), "epoch": 39}, tmp_path / "magnet.pth")
    model = models.from_released(tmp_path / "magnet.pth")
    assert model.config.alignment.masking == "released" and not model.training
    assert model.config.image.window_size == 7 and model.config.image.depths == (2, 2, 2, 2)
    flat = models.from_released(released_checkpoint("magnet")["model"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), flat.parameters(), strict=True))


def test_malicious_checkpoint_is_refused(tmp_path) -> None:
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


def test_released_strictness() -> None:
    state = released_checkpoint("magnet")["model"]
    extra = {**state, "image_model.layers.0.surprise.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="surprise"):
        models.from_released(extra)
    less = {k: v for k, v in state.items() if k != "image_model.layers.2.mixer.0.bias"}
    with pytest.raises(ValueError, match=r"alignment\.2\.mixer\.0\.bias"):
        models.from_released(less)
    with pytest.raises(ValueError, match="not a released MagNet or LAVT"):
        models.from_released({"resnet.conv1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="does not divide"):
        models.from_released(state, fusion_heads=(3, 1, 1, 1))


def test_fusion_heads_matter() -> None:
    values = golden("lavt")
    inputs = values["image"], values["input_ids"], values["attention_mask"]
    with torch.inference_mode():
        one = models.from_released(released_checkpoint("lavt"))(*inputs).mask_logits
        four = models.from_released(released_checkpoint("lavt"), fusion_heads=(4, 4, 4, 4))(*inputs).mask_logits
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


def test_pretrained_from_local_paths(tmp_path) -> None:
    """timm's Swin and a transformers folder load by path, and give the encoder timm's features."""
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    for name, parameter in swin.named_parameters():
        if name.endswith("bias_table"):
            parameter.data.normal_()
    torch.save({"model": swin.state_dict()}, tmp_path / "swin.pth")
    target = models.build("magnet_tiny", **SMALL)
    bert = BertModel(bert_config(target.config.text), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    sources = {"image": str(tmp_path / "swin.pth"), "text": str(tmp_path / "bert")}
    model = models.build("magnet_tiny", pretrained=sources, **SMALL).eval()
    for name, tensor in bert.state_dict().items():
        assert torch.equal(tensor, model.text_encoder.bert.state_dict()[name]), name
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        x = model.image_encoder.patch_embed(image)
        for stage in model.image_encoder.stages[:3]:  # the last map is one window: there timm does not shift
            x = stage.downsample(stage(x))
        expected = swin.layers[3].downsample(swin.layers[:3](swin.patch_embed(image)))
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


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
def test_pretrained_errors(sources: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build("magnet_tiny", pretrained=sources)


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    sources = {"image": str(tmp_path / "swin.pth"), "text": str(tmp_path / "no-such-folder")}
    with pytest.raises(ValueError, match="text weights .*pretrained=False"):
        models.build("magnet_tiny", pretrained=sources, **SMALL)
