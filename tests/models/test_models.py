"""The contract of every model, on sizes nothing divides, and the properties training relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from magnet_fast import models, ops
from magnet_fast.models import Text
from magnet_fast.models.encoders.swin import SwinBlock
from magnet_fast.models.heads.mask_decoder import DecoderLayer
from magnet_fast.models.heads.pixel_decoder import DeformableLayer
from tests.models.cases import PRESETS, batch, build, everything, open_gates, without_gradient

CORRECT = [
    "magnet",
    "magnet-xmha",
    "lavt",
    "refsegformer",
    "refsegformer-topdown",
    "cris",
    "risam",
    "fsfi",
    "wgfm",
    "rnr",
    "lda",
    "two-stage",
    "nsnpris",
    "cmt",
    "relation",
]
"""Padding is no word; ReLA reads it, as released."""

SAYS_PRESENCE = ("magnet", "refsegformer", "rela", "risam")
MASK_STRIDES = {"wgfm": 8, "lda": 8}
"""Of masks and pixels; 4 unless said."""
EXTRA = {
    "rela": {"minimap"},
    "two-stage": {"global_pixels", "global_sentence"},
    "relation": {"roles", "instances"},
}
FIXED = {"rnr": (32, 8)}
"""Sides of masks, and of the maps below them, that are the same for every image."""


@pytest.mark.parametrize("case", PRESETS)
@pytest.mark.parametrize("size", [(64, 96), (67, 45), (32, 33)], ids=str)
def test_contract(case: str, size: tuple[int, int]) -> None:
    model = build(PRESETS[case])
    image, text = batch(size)
    fixed_mask, fixed_map = FIXED.get(case, (None, None))
    mask_size = tuple(fixed_mask or -(-side // MASK_STRIDES.get(case, 4)) for side in size)
    with torch.inference_mode():
        prediction = model(image, text)
        features = model.encode(image, text)
        probability = model.predict(image, *text)
        resized = model.predict(image, *text, size=(51, 38))
    assert prediction.mask.shape == (2, *mask_size)
    says = model.head.says_presence or model.presence is not None
    assert says == (case.partition("-")[0] in SAYS_PRESENCE)
    assert (prediction.presence is None) != says and (prediction.presence is None or prediction.presence.shape == (2,))
    shapes = model.config.shapes
    assert model.head.pixel_channels == model.config.head.pixel_channels(shapes)
    pixels = mask_size if case != "refsegformer-topdown" else tuple(-(-side // 8) for side in size)
    assert prediction.pixels.shape == (2, model.head.pixel_channels, *pixels)
    if case.startswith("magnet"):
        assert [(p.mask.shape, p.presence.shape) for p in prediction.earlier] == [((2, *mask_size), (2,))] * 9
    elif case == "refsegformer-topdown":
        assert [p.mask.shape[1:] for p in prediction.earlier] == [
            tuple(-(-side // stride) for side in size) for stride in (32, 16, 8)
        ]
    elif case.startswith("risam"):
        assert [(p.mask.shape, p.presence.shape) for p in prediction.earlier] == [((2, *mask_size), (2,))] * 2
    elif case in ("cmt", "relation"):
        assert [p.mask.shape for p in prediction.earlier] == [(2, *(-(-side // 16) for side in size))]
    else:
        assert prediction.earlier == ()
    assert model.needs == () and prediction.extra.keys() == EXTRA.get(case, set())
    width, sentence_width = model.text_encoder.width, model.head.sentence_width
    assert prediction.words.features.shape == (2, 9, width if sentence_width is None else sentence_width)
    assert prediction.words.sentence.shape == (2, sentence_width or shapes.sentence_width)
    assert torch.equal(prediction.words.mask, text.mask)
    assert model.text_encoder.word_embedding.shape == (model.text_encoder.vocab_size, width)
    assert features.size == size and len(features.maps) == len(features.tokens) == len(shapes.channels)
    for feature, tokens, stride, channels, token_channels in zip(
        features.maps, features.tokens, shapes.strides, shapes.channels, shapes.tokens, strict=True
    ):
        assert feature.shape == (2, *(fixed_map or -(-side // stride) for side in size), channels)
        assert (None if tokens is None else tokens.shape[2]) == token_channels
    assert probability.shape == (2, *size) and resized.shape == (2, 51, 38)
    assert probability.min() >= 0 and probability.max() <= 1 and probability.dtype == torch.float32


def test_the_sentence_is_the_mean_of_its_words() -> None:
    words = models.Words(torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5]).bool())
    expected = torch.stack([words.features[0].mean(0), words.features[1, :2].mean(0), torch.zeros(4)])
    torch.testing.assert_close(words.sentence, expected)
    pooled = torch.randn(3, 4)
    assert words._replace(pooled=pooled).sentence is pooled


@pytest.mark.parametrize("case", CORRECT)
def test_padding_is_never_seen(case: str) -> None:
    """With correct masking, the number of padding tokens and what stands in them change nothing."""
    model = build(PRESETS[case])
    open_gates(model)
    image, (ids, mask) = batch()
    more, filled = F.pad(mask, (0, 6)), F.pad(ids, (0, 6), value=7)
    short, long = model.predict(image, ids, mask), model.predict(image, filled, more)
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


def test_released_masking_does_see_padding() -> None:
    """The quirk that released checkpoints need: padding enters the words' instance norm."""
    model = build(PRESETS["magnet-released"])
    open_gates(model)
    image, (ids, mask) = batch()
    with torch.inference_mode():
        short = model(image, Text(ids, mask)).words.features
        long = model(image, Text(F.pad(ids, (0, 6)), F.pad(mask, (0, 6)))).words.features[:, :9]
    assert (short - long).abs().max() > 1e-2


@pytest.mark.parametrize("case", PRESETS)
def test_items_of_a_batch_do_not_mix(case: str) -> None:
    model = build(PRESETS[case])
    image, (ids, mask) = batch(count=3)
    together = model.predict(image, ids, mask)
    alone = torch.cat([model.predict(image[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", PRESETS)
def test_no_parameter_without_gradient(case: str) -> None:
    """From the first step on, closed gates and all: processes that train together wait for every gradient."""
    model = build(PRESETS[case]).train()
    everything(model(*batch())).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("case", PRESETS)
def test_masks_alone_leave_only_the_last_words(case: str) -> None:
    """Without a term that reads the words, what the last exchange gives them has nowhere to go."""
    model = build(PRESETS[case]).train()
    prediction = model(*batch())
    everything(prediction._replace(words=prediction.words._replace(features=torch.zeros(1)))).backward()
    unread = {"magnet": ("text_", "image_value"), "magnet-xmha": ("text_gate", "word_output", "pixel_value")}
    unread["magnet-released"] = unread["magnet"]
    for name in without_gradient(model):
        assert name.startswith("fusion.stages.3.") and any(part in name for part in unread.get(case, ())), name


@pytest.mark.parametrize("case", PRESETS)
def test_gradients_reach_everything(case: str) -> None:
    """Every parameter that the masks depend on gets a gradient that is not zero."""
    # FSFI's ReLUs are open or shut for all pixels alike where BatchNorms do not know their maps yet.
    model = build(PRESETS[case]).train(case == "fsfi")
    open_gates(model)
    everything(model(*batch())).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike: softmax is blind to it, and a single query attends to itself.
    blind = (".key.bias", "word_key.bias", "self_attention.query.", "self_attention.key.")
    blind = (*blind, "text_fusion.value.bias")  # its instance norm removes any constant
    dead = [n for n in dead if not any(part in n for part in blind)]
    if case == "magnet-released":  # words get zero queries there: uniform attention over zero-mean values
        dead = [n for n in dead if "text_fusion" not in n]
    assert dead == []


def test_gates_start_closed_and_learn() -> None:
    model = build(PRESETS["magnet"])
    *gated, last = model.fusion.stages
    assert last.image_gate is None  # nothing reads the last stage's stream
    gates = [gate for stage in gated for gate in (stage.image_gate, stage.text_gate)] + [last.text_gate]
    for gate in gates:
        assert gate.last.weight.abs().sum() == 0 and gate.first.weight.abs().sum() > 0
    everything(model(*batch())).backward()
    for gate in gates:
        assert gate.last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("case", ["magnet", "lavt"])
def test_backends_agree(case: str) -> None:
    model = build(PRESETS[case])
    image, text = batch((67, 45))
    grads, outputs = [], []
    for backend in ("reference", "auto"):
        model.zero_grad()
        with ops.backend(backend):
            output = model(image, text).mask
            output.square().mean().backward()
        outputs.append(output.detach())
        grads.append([p.grad for p in model.image_encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["magnet", "lavt"])
def test_autocast_stays_finite_and_near(case: str) -> None:
    model = build(PRESETS[case])
    image, text = batch()
    with torch.no_grad():
        exact = model(image, text)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(image, text)
    # MagNet's first prediction has passed no mask threshold, so it moves continuously with rounding.
    first, rounded = (p.earlier[0].mask if p.earlier else p.mask for p in (exact, rough))
    assert (first - rounded.float()).norm() < 0.05 * first.norm()
    assert rough.mask.isfinite().all()


@pytest.mark.parametrize("case", CORRECT)
def test_whole_in_bfloat16(case: str) -> None:
    """Weights and all; images may come in float32."""
    model = build(PRESETS[case])
    image, text = batch()
    exact = model.predict(image, *text)
    found = model.bfloat16().predict(image, *text)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found, model.predict(image.bfloat16(), *text))
    if case == "lavt":
        assert (found - exact).abs().max() < 0.05


def test_layers_are_found_once() -> None:
    """Blocks of Swin, layers of BERT, and both decoders' layers: units of checkpointing and of sharding."""
    magnet = build(PRESETS["magnet"])
    layers = magnet.repeated_layers()
    assert len({id(layer) for layer in layers}) == len(layers)
    counts = {kind.__name__: sum(type(layer) is kind for layer in layers) for kind in map(type, layers)}
    assert counts == {"SwinBlock": 8, "DeformableLayer": 1, "DecoderLayer": 9, "BertLayer": 4}
    for kind in (SwinBlock, DeformableLayer, DecoderLayer):
        assert sum(isinstance(module, kind) for module in magnet.modules()) == counts[kind.__name__]
    inside = [m for layer in layers for m in layer.modules() if m is not layer and any(m is other for other in layers)]
    assert inside == []
    assert len(build(PRESETS["lavt"]).repeated_layers()) == 8 + 4


IMAGE, (IDS, MASK) = batch()


@pytest.mark.parametrize(
    ("image", "text", "error", "message"),
    [
        (IMAGE[0], Text(IDS, MASK), ValueError, r"image must be \(B, 3, H, W\)"),
        (IMAGE.long(), Text(IDS, MASK), TypeError, "image must be a floating-point tensor.*int64"),
        (IMAGE[:, :1], Text(IDS, MASK), ValueError, r"image must be .*got \(2, 1, 64, 96\)"),
        (IMAGE[:0], Text(IDS[:0], MASK[:0]), ValueError, "image must be .* no empty dimension"),
        (IMAGE, IDS, TypeError, r"text must be a models.Text\(ids, mask\); got Tensor"),
        (IMAGE, (IDS, MASK), TypeError, r"text must be a models.Text\(ids, mask\); got tuple"),
        (IMAGE, Text(IDS[:1], MASK), ValueError, "text.ids must be"),
        (IMAGE, Text(IDS[0], MASK[0]), ValueError, "text.ids must be"),
        (IMAGE, Text(IDS[:, :0], MASK[:, :0]), ValueError, r"text.ids must be .*got \(2, 0\)"),
        (IMAGE, Text(IDS.float(), MASK), TypeError, "text.ids must be int64 or int32; got torch.float32"),
        (IMAGE, Text(IDS, MASK.long()), TypeError, "text.mask must be bool, .*got torch.int64"),
        (IMAGE, Text(IDS, MASK[:, :-1]), ValueError, r"text.mask must have the shape of text.ids, \(2, 9\)"),
        (IMAGE, Text(IDS.repeat(1, 30), MASK.repeat(1, 30)), ValueError, "text.ids holds 270 tokens.* 64 positions"),
    ],
)
def test_bad_inputs(image: Any, text: Any, error: type[Exception], message: str) -> None:
    model = build(PRESETS["magnet"])
    for call in (model, model.encode):
        with pytest.raises(error, match=message):
            call(image, text)


def test_modules_are_called_and_nothing_is_kept() -> None:
    """Two pictures of other sizes, one after the other, and the first again: nothing of a call stays behind."""
    model = build(PRESETS["magnet"])
    first, second = batch((64, 96)), batch((45, 40))
    state = {name for name, _ in model.named_buffers()}
    once = model.predict(first[0], *first[1])
    model.predict(second[0], *second[1])
    assert torch.equal(model.predict(first[0], *first[1]), once)
    assert {name for name, _ in model.named_buffers()} == state
