"""RISAM's parts: against SAM where they are SAM's, against plain formulas where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SamModel

from magnet_fast import models
from magnet_fast.models import Features, Text, Words
from magnet_fast.models.fusion.mutual import MutualAttention, MutualConfig
from magnet_fast.models.position import RandomPosition
from tests.models.cases import PRESETS, batch, build, open_gates
from tests.models.sam import COMMON, DECODER_HEADS, IMAGE, SIDE, own_names, their_sam

SIZES: dict[str, Any] = {
    "image": {**IMAGE, "tuning": "lora"},
    "fusion": {"width": COMMON},
    "head": {"num_heads": DECODER_HEADS, "feedforward": 96},
}


@pytest.fixture(scope="module")
def sam() -> SamModel:
    return their_sam()


def started(sam: SamModel, folder: Path, form: str = "transformers", **changes: Any) -> models.base.ReferringModel:
    """Ours, with SAM's weights in every part that SAM has."""
    path = folder / "sam.safetensors"
    state = {k: v for k, v in sam.state_dict().items() if "prompt_encoder.shared_embedding" not in k}
    save_file(state if form == "transformers" else own_names(state), path)
    torch.manual_seed(0)
    sources = {"image": str(path), "text": False}
    return models.create("risam_tiny", pretrained=sources, **SIZES, **changes).eval()


def neck_alone(model: nn.Module, image: Tensor) -> Tensor:
    """The map that the head gets, (B, h, w, C)."""
    ids = torch.tensor([[5, 6]] * len(image))
    (found,) = model.encode(image, Text(ids, ids > 0)).maps
    return found


@pytest.mark.parametrize("form", ["transformers", "own code"])
def test_the_start_is_sam(sam: SamModel, form: str, tmp_path: Path) -> None:
    """Without blocks and with the gate closed: its neck, its positions, and its first mask under an empty prompt.

    SAM's other tokens, which ours drops, stand in the words' place.
    """
    model, image = started(sam, tmp_path, form, fusion__layers=0), torch.randn(2, 3, SIDE, SIDE)
    decoder = sam.mask_decoder
    others = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight[1:]])
    with torch.no_grad():
        pixels = neck_alone(model, image)
        expected = sam(image, multimask_output=False)
        torch.testing.assert_close(
            pixels.permute(0, 3, 1, 2), sam.vision_encoder(image).last_hidden_state, rtol=1e-4, atol=1e-4
        )
        place = sam.get_image_wide_positional_embeddings()[0].flatten(1).T
        for part in (model.fusion, model.head):
            torch.testing.assert_close(part.place(SIDE // 16, SIDE // 16, pixels), place, rtol=1e-4, atol=1e-5)
        words = Words(torch.zeros(2, 4, 64), torch.ones(2, 4, dtype=torch.bool))
        found = model.head(Features([pixels], words, [others.expand(2, -1, -1)], (SIDE, SIDE)))
    torch.testing.assert_close(found.mask, expected.pred_masks[:, 0, 0], rtol=1e-4, atol=1e-4)
    assert found.mask.std() > 0.01 and found.aligned_corners is False


def test_a_vision_model_alone_is_no_whole_sam(sam: SamModel, tmp_path: Path) -> None:
    path = tmp_path / "vision.safetensors"
    save_file(sam.vision_encoder.state_dict(prefix="vision_encoder."), path)
    with pytest.raises(ValueError, match="hold no mask decoder of SAM's"):
        models.create("risam_tiny", pretrained={"image": str(path), "text": False}, **SIZES)
    with pytest.raises(ValueError, match="unknown entry 'picture'"):
        models.create("risam_tiny", pretrained={"picture": "x"}, **SIZES)
    with pytest.raises(ValueError, match="CLIP's are read from a state dict in a file"):
        models.create("risam_tiny", pretrained={"image": str(path)}, **SIZES)


def test_positions_at_centres() -> None:
    place = RandomPosition(8)
    found = place(3, 5, torch.zeros(1, dtype=torch.float64))
    assert found.shape == (15, 8) and found.dtype == torch.float64
    for row in range(3):
        for column in range(5):
            u = torch.tensor([2 * (column + 0.5) / 5 - 1, 2 * (row + 0.5) / 3 - 1])
            angle = 2 * torch.pi * (u @ place.matrix)
            expected = torch.cat([angle.sin(), angle.cos()]).double()
            torch.testing.assert_close(found[5 * row + column], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(place.matrix, RandomPosition(8).matrix)
    assert not any(True for _ in place.parameters())


def block(width: int = 8, heads: int = 2, language_guided: bool = True) -> MutualAttention:
    torch.manual_seed(0)
    config = MutualConfig(width=width, num_heads=heads, feedforward=12, language_guided=language_guided)
    return MutualAttention(config).double()


def plain_block(block: MutualAttention, pixels: Tensor, place: Tensor, words: Tensor, mask: Tensor) -> tuple:
    """Head by head, sentence by sentence, padded words cut off."""
    heads, width = block.heads, words.shape[2]
    d = width // heads
    new_pixels, new_words = torch.empty_like(pixels), words.clone()
    for b in range(len(words)):
        w = words[b][mask[b]]
        query, key = block.query(pixels[b] + place), block.key(w)
        word_value, pixel_value = block.word_value(w), block.pixel_value(pixels[b])
        to_pixels, to_words = torch.zeros_like(pixels[b]), torch.zeros_like(w)
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            similarity = query[:, part] @ key[:, part].T / d**0.5
            if len(w):
                to_pixels[:, part] = similarity.softmax(dim=1) @ word_value[:, part]
            to_words[:, part] = similarity.softmax(dim=0).T @ pixel_value[:, part]
        x = block.pixel_norm1(pixels[b] + block.pixel_output(to_pixels))
        new_pixels[b] = block.pixel_norm2(x + block.pixel_feedforward(x))
        y = block.word_norm1(w + block.word_output(to_words))
        new_words[b][mask[b]] = block.word_norm2(y + block.word_feedforward(y))
    return new_pixels, new_words


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_block_is_its_formula(pixels: int, words: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made, mask = block(heads=heads), torch.rand(3, words, generator=generator) > 0.3
    x, w = (torch.randn(3, n, 8, generator=generator, dtype=torch.float64) for n in (pixels, words))
    place = torch.randn(pixels, 8, generator=generator, dtype=torch.float64)
    found, expected = made(x, place, w, mask), plain_block(made, x, place, w, mask)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][mask], expected[1][mask])


def test_block_has_the_gradients_of_its_outputs() -> None:
    made, mask = block(width=4), torch.tensor([[True, True, False]])
    inputs = [torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 3)]
    place = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: made(x, place, w, mask), inputs)


def test_without_language_guided_attention_words_stay() -> None:
    made, mask = block(language_guided=False), torch.ones(1, 3, dtype=torch.bool)
    x, w, place = torch.randn(1, 5, 8).double(), torch.randn(1, 3, 8).double(), torch.zeros(5, 8).double()
    pixels, words = made(x, place, w, mask)
    assert words is w
    whole = block()
    whole.load_state_dict(made.state_dict(), strict=False)
    torch.testing.assert_close(pixels, whole(x, place, w, mask)[0])
    left_out = {name.partition(".")[0] for name in whole.state_dict()} - {
        name.partition(".")[0] for name in made.state_dict()
    }
    assert left_out == {"pixel_value", "word_output", "word_norm1", "word_norm2", "word_feedforward"}


@pytest.mark.parametrize("head", [{}, {"words": False}, {"auxiliary": False}], ids=str)
def test_what_padded_words_hold_changes_nothing(head: dict[str, bool]) -> None:
    """Of mask, presence and pixels, in the decoder and before it."""
    model = build(PRESETS["risam"], head=head)
    open_gates(model)
    image, (ids, mask) = batch((64, 48))
    with torch.no_grad():
        one = model(image, Text(ids, mask))
        other = model(image, Text(F.pad(torch.where(mask, ids, 9), (0, 3), value=4), F.pad(mask, (0, 3))))
    torch.testing.assert_close(one.mask, other.mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.presence, other.presence, rtol=1e-4, atol=1e-5)
    assert len(one.earlier) == (0 if "auxiliary" in head else 2)


def test_words_reach_the_decoder_in_both_ways() -> None:
    """By the query, whose Linear starts at 0, and as tokens of their own."""
    image, (ids, mask) = batch((64, 64))

    def difference(model: nn.Module) -> float:
        with torch.no_grad():
            one, other = (model(image, Text(given, mask)).mask for given in (ids, ids + 1))
        return (one - other).abs().max().item()

    alone, beside = (build(PRESETS["risam"], fusion__layers=0, head__words=words) for words in (False, True))
    assert difference(alone) == 0 and difference(beside) > 1e-3
    open_gates(alone)
    assert difference(alone) > 1e-3


@pytest.mark.parametrize("language_guided", [True, False])
def test_pixels_are_aligned_with_words_that_have_read_the_pixels(language_guided: bool) -> None:
    """The mean of the fusion's words, of its width; without language-guided attention they know no image."""
    from magnet_fast.training.terms.alignment import AlignmentConfig, AlignmentTerm

    model = build(PRESETS["risam"], fusion__language_guided=language_guided)
    image, text = batch((64, 48))
    with torch.no_grad():
        one, other = (model(given, text) for given in (image, image.flip(0)))
        (tokens,) = model.encode(image, text).tokens
    assert torch.equal(one.words.features, tokens) and torch.equal(one.words.mask, text.mask)
    assert torch.equal(one.words.sentence, other.words.sentence) == (not language_guided)
    term = AlignmentTerm.build(AlignmentConfig(), model, None)
    assert term.projection.weight.shape == (model.head.pixel_channels, model.config.fusion.width)
    loss, parts = term(one, {"mask": torch.ones(2, 64, 48).tril()}, model)
    assert loss > 0 and parts.keys() == {"p2p", "p2t"}


def test_lora_alone_is_trained_in_the_encoder_and_the_text_follows_the_recipe() -> None:
    from magnet_fast.training.config import load_config
    from magnet_fast.training.optim import parameter_groups

    for recipe in ("risam_vit_b_refcoco", "risam_vit_b_grefcoco"):
        model = models.create("risam_tiny", image__tuning="lora")
        groups = parameter_groups(model, load_config(recipe).optimiser)
        trained = {name: group for group in groups for name in group["param_names"]}
        encoders = {name for name in trained if name.startswith(("image_encoder.", "text_encoder."))}
        assert {name for name in encoders if ".lora." not in name} == {
            "text_encoder.norm.weight",
            "text_encoder.norm.bias",
        }
        assert len([name for name in encoders if ".lora." in name]) == 4 * 4
        assert {name.partition(".")[0] for name in trained} >= {"fusion", "head"}
        assert all(group["initial_lr"] == 1e-4 for group in groups)
        plain = {name for name, group in trained.items() if group["weight_decay"] == 0}
        assert {"fusion.word_positions", "head.query", "fusion.enhance.gate.gamma", "head.norm.weight"} <= plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"kind": "swin"}}, r"mutual joins 3 maps of one stride; the image encoder's are \(4, 8, 16, 32\)"),
        ({"fusion__num_heads": 3}, "num_heads=3 does not divide width=128"),
        ({"fusion__width": 100, "fusion__num_heads": 4}, "100 channels must be a multiple of 8"),
        ({"head__num_heads": 128}, "half of them one of num_heads=128"),
    ],
)
def test_parts_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config("risam_tiny", **changes)
    with pytest.raises(ValueError, match="two_way reads one map"):
        models.preset_config("lavt_tiny", head={"kind": "two_way"})
    with pytest.raises(ValueError, match="two_way reads tokens of the map's 128 channels"):
        models.preset_config("cris_tiny", fusion__widths=(32, 128, 128), head={"kind": "two_way"})


def test_layers_are_found_once() -> None:
    """Units of checkpointing and of sharding."""
    layers = [type(layer).__name__ for layer in build(PRESETS["risam"]).repeated_layers()]
    assert {name: layers.count(name) for name in layers} == {
        "SamLayer": 4, "MutualAttention": 3, "TwoWayLayer": 2, "ClipLayer": 4,
    }  # fmt: skip


def test_too_many_words_are_refused() -> None:
    model = build(PRESETS["risam"], fusion__max_words=5)
    with pytest.raises(ValueError, match="text.ids holds 9 tokens; this fusion has 5 positions"):
        model(*batch((32, 32)))


def test_presets_have_the_sizes_of_sam() -> None:
    for name, size, width, layers in (
        ("risam_vit_b", 480, 768, 12), ("risam_vit_b_1024", 1024, 768, 12), ("risam_vit_h_1024", 1024, 1280, 32)
    ):  # fmt: skip
        config = models.preset_config(name)
        assert (config.spec.size, config.image.image_size, config.image.embed_dim) == (size, size, width)
        assert len(config.image.taps) == 3 and config.image.num_layers == layers and config.image.tuning == "lora"
        assert config.spec.tokenizer == "clip" and config.text.width == 512 and config.spec.fit == "squash"
    assert models.preset_config("risam_vit_b", text={"kind": "bert"}).spec.tokenizer == "wordpiece"
    with torch.device("meta"):
        model = models.create("risam_vit_b")
    lora = sum(p.numel() for name, p in model.named_parameters() if ".lora." in name)
    assert lora == 294_912
