"""CLIP's encoders: its published layout is read, and the text transformer is transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig as TheirTextConfig
from transformers import CLIPTextModelWithProjection

from magnet_fast import models
from magnet_fast.models import Text
from tests.golden.parameters import released_state

SIZES = {
    "image": {"stem": 16, "blocks": (1, 2, 2, 1), "joint_width": 96, "table_side": 7},
    "text": {
        "vocab_size": 200,
        "hidden_size": 128,
        "num_layers": 3,
        "num_heads": 2,
        "max_positions": 24,
        "joint_width": 96,
    },
    "fusion": {"widths": (64, 128, 256)},
}


def clip_state() -> dict[str, Tensor]:
    """As OpenAI's own state dict names it: both encoders, the scale, no part of CRIS."""
    prefix = "backbone."
    state = {k.removeprefix(prefix): v for k, v in released_state("cris").items() if k.startswith(prefix)}
    return {name: value for name, value in state.items() if ".connect." not in name}


@pytest.mark.parametrize("form", ["openai", "open_clip", "wrapped"])
def test_published_layouts(form: str, tmp_path: Path) -> None:
    state, path = clip_state(), tmp_path / "RN.safetensors"
    if form == "open_clip":  # its CustomTextCLIP keeps the text side under a name of its own
        text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
        state = {f"text.{name}" if name.startswith(text) else name: value for name, value in state.items()}
    if form == "wrapped":
        path = path.with_suffix(".pt")
        torch.save(
            {
                "state_dict": {
                    f"module.{name}": value.half() if value.is_floating_point() else value
                    for name, value in state.items()
                }
            },
            path,
        )
    else:
        save_file(state, path)
    model = models.create("cris_tiny", pretrained={"image": str(path), "text": str(path)}, **SIZES)
    found, half = model.state_dict(), form == "wrapped"
    pairs = {
        "image_encoder.stem.0.weight": "visual.conv1.weight",
        "image_encoder.layers.1.1.branch.7.weight": "visual.layer2.1.conv3.weight",
        "image_encoder.layers.3.0.shortcut.2.running_var": "visual.layer4.0.downsample.1.running_var",
        "image_encoder.pool.positions": "visual.attnpool.positional_embedding",
        "text_encoder.positions": "positional_embedding",
        "text_encoder.text_projection": "text_projection",
        "text_encoder.layers.2.contract.weight": "transformer.resblocks.2.mlp.c_proj.weight",
    }
    for ours, theirs in pairs.items():
        expected = state[f"text.{theirs}" if f"text.{theirs}" in state else theirs]
        torch.testing.assert_close(found[ours], expected.half().float() if half else expected)
    query = state[
        "text.transformer.resblocks.0.attn.in_proj_weight"
        if form == "open_clip"
        else "transformer.resblocks.0.attn.in_proj_weight"
    ]
    torch.testing.assert_close(
        found["text_encoder.layers.0.query.weight"], query[:128].half().float() if half else query[:128]
    )


def test_without_the_joint_space(tmp_path: Path) -> None:
    """The projection is left in the file, and the mean of the words stands for the sentence."""
    save_file(clip_state(), tmp_path / "RN.safetensors")
    sources = {"image": False, "text": str(tmp_path / "RN.safetensors")}
    model = models.create("risam_tiny", pretrained=sources, text={**SIZES["text"], "joint_width": None})
    encoder = model.text_encoder
    assert torch.equal(encoder.positions, clip_state()["positional_embedding"])
    assert "text_projection" not in encoder.state_dict() and encoder.sentence_width == 128
    ids = torch.tensor([[5, 6, 7, 0]])
    found = encoder.start(Text(ids, ids > 0))
    assert found.pooled is None and torch.equal(found.sentence, found.features[:, :3].sum(dim=1) / 3)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="read from a state dict in a file, and none was given; name it by pretrained="
    ):
        models.create("cris_tiny", pretrained=True)
    with pytest.raises(ValueError, match="'nowhere.pt' is no file"):
        models.create("cris_tiny", pretrained={"image": "nowhere.pt", "text": False})
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"hold no image encoder of CLIP's: expected names such as visual.conv1.weight"
    ):
        models.create("cris_tiny", pretrained={"image": str(tmp_path / "other.safetensors"), "text": False})
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "RN50.pt")
    with pytest.raises(ValueError, match="TorchScript archive, a program"):
        models.create("cris_tiny", pretrained={"image": str(tmp_path / "RN50.pt"), "text": False})
    save_file(clip_state(), tmp_path / "RN.safetensors")
    with pytest.raises(ValueError, match="does not fit ClipResNet"):
        models.create("cris_tiny", pretrained={"image": str(tmp_path / "RN.safetensors"), "text": False})


def test_text_transformer_is_transformers() -> None:
    torch.manual_seed(0)
    config = TheirTextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=256, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, eos_token_id=99, bos_token_id=98, pad_token_id=0,
    )  # fmt: skip
    theirs = CLIPTextModelWithProjection(config).eval()
    ours = models.create("cris_tiny", text__vocab_size=100, text__joint_width=32).text_encoder.eval()
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positions",
        "text_model.final_layer_norm.": "norm.",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            if name.startswith(old):
                state[name.replace(old, new)] = value
        if ".layers." in name:
            for old, new in (
                ("text_model.encoder.", ""), ("self_attn.q_proj", "query"), ("self_attn.k_proj", "key"),
                ("self_attn.v_proj", "value"), ("self_attn.out_proj", "output"), ("layer_norm", "norm"),
                ("mlp.fc1", "expand"), ("mlp.fc2", "contract"),
            ):  # fmt: skip
                name = name.replace(old, new)
            state[name] = value
    state["text_projection"] = theirs.text_projection.weight.T
    rows = ours.state_dict()["positions"].clone()
    rows[:24] = state["positions"]
    ours.load_state_dict({**state, "positions": rows})
    ids = torch.tensor([[98, 5, 7, 9, 99, 0, 0], [98, 3, 99, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = theirs(input_ids=ids)
        found = ours.start(Text(ids, ids != 0))
    torch.testing.assert_close(found.features, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sentence, expected.text_embeds, rtol=1e-4, atol=1e-5)


def test_slices_with_nothing_between_them_are_the_whole() -> None:
    """The last of the three ends in norm and sentence."""
    torch.manual_seed(0)
    whole = models.create("cris_tiny", **SIZES).text_encoder.eval()
    sliced = models.preset_config("cris_tiny", **SIZES, text__schedule="slices").text.build().eval()
    sliced.load_state_dict(whole.state_dict())
    text = Text(torch.randint(1, 200, (2, 9)), torch.arange(9) < torch.tensor([[9], [6]]))
    with torch.no_grad():
        words, expected = sliced.start(text), whole.start(text)
        assert words.pooled is None
        for i in range(3):
            assert whole.advance(i, expected) is expected
            words = sliced.advance(i, words)
    assert torch.equal(words.features, expected.features) and torch.equal(words.pooled, expected.pooled)
