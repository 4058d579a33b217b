"""RNR: its published code's outputs, and its parts against formulas written the slow way."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.contract import probability
from magnet_fast.models.encoders.resnet import ResNetConfig
from magnet_fast.models.encoders.vectors_lstm import VectorsLSTMConfig
from magnet_fast.models.fusion.joint import JointLayer, largest
from tests.golden.parameters import FOLDER, golden, released_state
from tests.models.cases import PRESETS, batch, build
from tests.models.plain_forms import layer_norm, linear, randomised

RULES = [
    (r"image_encoder\.(.*)", r"image_encoder.backbone.\1"),
    (r"joint_model\.text_encoder\.lstm\.(.*)", r"text_encoder.lstm.\1"),
    (r"joint_model\.conv_3x3\.layer([234])\.(.*)", lambda found: f"fusion.pool.{int(found[1]) - 2}.{found[2]}"),
    (r"joint_model\.transformer_encoder\.norm\.(.*)", r"fusion.norm.\1"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.self_attn\.out_proj\.(.*)", r"fusion.\1.attention.output.\2"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.linear1\.(.*)", r"fusion.\1.feedforward.0.\2"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.linear2\.(.*)", r"fusion.\1.feedforward.3.\2"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.(norm\d)\.(.*)", r"fusion.\1.\2.\3"),
    (r"joint_model\.conv_fuse\.(.*)", r"fusion.fuse.\1"),
    (r"joint_model\.aspp_decoder\.convs\.4\.(.*)", r"head.aspp.image.\1"),
    (r"joint_model\.aspp_decoder\.convs\.(.*)", r"head.aspp.branches.\1"),
    (r"joint_model\.aspp_decoder\.project\.(.*)", r"head.aspp.project.\1"),
    (
        r"joint_model\.conv_upsample\.deconv\.([024])\.(.*)",
        lambda found: f"head.enlarge.{int(found[1]) // 2}.{found[2]}",
    ),
    (r"joint_model\.conv_upsample\.deconv\.6\.0\.weight", "head.classify.weight"),
]


def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published code's entries under this package's names; queries, keys and values are one there."""
    renamed = {}
    for name, tensor in state.items():
        packed = re.fullmatch(r"joint_model\.transformer_encoder\.(layers\.\d+)\.self_attn\.in_proj_(.*)", name)
        if packed:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"fusion.{packed[1]}.attention.{part}.{packed[2]}"] = piece
            continue
        pattern, new = next(rule for rule in RULES if re.fullmatch(rule[0], name))
        renamed[re.sub(pattern, new, name)] = tensor
    return renamed


@pytest.fixture(scope="module")
def published() -> ReferringModel:
    """The published network, of one block a stage and three in the last."""
    config = models.preset_config("rnr_resnet101", text__vocab_size=1).model_dump()
    config["image"]["arguments"]["layers"] = [1, 1, 1, 3]
    with torch.device("meta"):  # all but two of its weights are loaded
        model = models.from_config(config).eval()
    missing, unexpected = model.load_state_dict(ours(released_state("rnr")), strict=False, assign=True)
    assert unexpected == [] and set(missing) == {"text_encoder.vectors.weight", "head.classify.bias"}
    model.text_encoder.vectors = nn.Embedding(1, 300)
    model.head.classify.bias = nn.Parameter(torch.zeros(1))  # the published code has none
    return model


@pytest.mark.slow
def test_golden(published: ReferringModel) -> None:
    values, every = golden("rnr"), json.loads((FOLDER / "rnr.json").read_text())["every"]

    def close(name: str, found: Tensor, tolerance: float = 1e-4) -> None:
        step = every.get(name)
        if step is not None:
            found = found.index_select(step["axis"], torch.arange(0, found.shape[step["axis"]], step["step"]))
        torch.testing.assert_close(found, values[name], rtol=0, atol=tolerance)

    model, seen = published, {"norm": [], "fuse": [], "aspp": []}
    for name, module in (("norm", model.fusion.norm), ("fuse", model.fusion.fuse[1]), ("aspp", model.head.aspp)):
        module.register_forward_hook(lambda _, __, result, name=name: seen[name].append(result))
    mask = values["phrase_mask"].bool()
    text = Text(torch.zeros_like(values["phrase_mask"]), mask)
    with torch.inference_mode():
        for i, stage in enumerate(model.maps(values["image"])[1:], 2):
            close(f"image_layer{i}", stage.permute(0, 3, 1, 2))
        features = model.encode(values["image"], text, embedded=values["phrase"])
        prediction = model.head(features)
    close("text_features", features.words.features)
    for tap in range(3):
        close(f"joint{tap}", seen["norm"][tap])
        close(f"fused{tap}_before_activation", seen["fuse"][tap])
    close("aspp", seen["aspp"][0])
    close("low_resolution_logits", prediction.mask[:, None])
    close("probability", probability(prediction, (56, 56)), 1e-5)


@pytest.mark.parametrize("count", [1, 7, 60])
def test_lstm_is_its_formula(count: int) -> None:
    """Gates one by one; padding is a vector of zeros, whatever its id."""
    encoder = randomised(VectorsLSTMConfig(vocab_size=20, vector_width=5, hidden_size=3).build())
    ids = torch.randint(0, 20, (2, count), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[1, count // 2 :] = False
    found = encoder.start(Text(ids, mask))
    lstm = encoder.lstm
    for b in range(2):
        state = cell = torch.zeros(3, dtype=torch.float64)
        for t in range(count):
            vector = encoder.vectors.weight[ids[b, t]] if mask[b, t] else torch.zeros(5, dtype=torch.float64)
            gates = lstm.weight_ih_l0 @ vector + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ state + lstm.bias_hh_l0
            entry, forget, candidate, output = gates.split(3)
            cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
            state = output.sigmoid() * cell.tanh()
            torch.testing.assert_close(found.features[b, t], state)
        torch.testing.assert_close(
            found.sentence[b], found.features[b, : int(mask[b].sum())].sum(0) / max(1, mask[b].sum())
        )


@pytest.mark.parametrize("count", [1, 9])
def test_joint_layer_is_its_formula(count: int) -> None:
    layer = randomised(JointLayer(8, num_heads=2, feedforward=6, dropout=0.1))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, count, 8, generator=generator, dtype=torch.float64)
    place = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[1, count // 2 + 1 :] = False
    found = layer(x, place, mask)
    attention = layer.attention
    for b in range(2):
        y = layer_norm(x[b], layer.norm1)
        query, key = linear(y + place, attention.query), linear(y + place, attention.key)
        value = linear(y, attention.value)
        for n in range(count):
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                scores = torch.stack([query[n, part] @ key[m, part] / 2 for m in range(count) if mask[b, m]])
                heads.append(scores.softmax(0) @ value[mask[b]][:, part])
            z = x[b, n] + linear(torch.cat(heads), attention.output)
            hidden = linear(layer_norm(z, layer.norm2), layer.feedforward[0]).clamp(min=0)
            torch.testing.assert_close(found[b, n], z + linear(hidden, layer.feedforward[3]))


def test_joint_brings_every_map_to_one_size() -> None:
    """Whatever the image: the largest values of each cell, then the convolution, `side` to each side."""
    model = build(PRESETS["rnr"])
    for size in ((128, 128), (67, 45), (33, 300)):
        image, text = batch(size)
        with torch.no_grad():
            maps, seen = model.maps(image), model.look(image)
            shared = model(image, text, seen=seen).mask
            torch.testing.assert_close(shared, model(image, text).mask)
        assert [one.shape for one in seen] == [(2, 8, 8, 64)] * 3
        x, (height, width) = maps[1], maps[1].shape[1:3]
        pooled = torch.zeros(2, 32, 16, 16)
        for row in range(16):
            for column in range(16):
                rows = slice(row * height // 16, -(-(row + 1) * height // 16))
                columns = slice(column * width // 16, -(-(column + 1) * width // 16))
                pooled[:, :, row, column] = x[:, rows, columns].amax(dim=(1, 2))
        with torch.no_grad():
            torch.testing.assert_close(model.fusion.pool[0](pooled).permute(0, 2, 3, 1), seen[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_largest_is_adaptive_max_pooling(height: int, width: int, side: int) -> None:
    x = torch.randn(2, height, width, 3, generator=torch.Generator().manual_seed(height)).requires_grad_()
    found, expected = largest(x, side), F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((pooled * weights).sum(), x)[0] for pooled in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_multi_grid() -> None:
    """Dilations of the last stage's blocks; the weights are those of the network without."""
    config = {"name": "resnet10t", "arguments": {"output_stride": 16, "channels": [8, 8, 8, 8], "stem_width": 8}}
    plain, dilated = ResNetConfig(**config).build(), ResNetConfig(**config, multi_grid=(4,)).build()
    dilated.load_state_dict(randomised(plain).float().state_dict())  # at the start its branches are closed
    x = torch.randn(1, 8, 9, 7)
    with torch.no_grad():
        found = dilated.eval().backbone["layer4"](x)
        assert found.shape == (1, 8, 9, 7)
        assert not torch.equal(found, plain.eval().backbone["layer4"](x))
    convolutions = [m for m in dilated.backbone["layer4"].modules() if isinstance(m, nn.Conv2d)]
    assert {m.dilation for m in convolutions if m.kernel_size == (3, 3)} == {(4, 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image__multi_grid": (2, 4)}, r"multi_grid=\(2, 4\) gives 2 dilations for the 1 blocks of the last stage"),
        ({"image": {"arguments": {"output_stride": 32}}}, "the last stage steps; add output_stride=16"),
        ({"fusion__num_heads": 7}, "num_heads=7 does not divide width=64"),
        ({"fusion__maps": 5}, "fusion.maps=5: the image encoder has 4"),
        ({"text__hidden_size": 32}, "fusion.width=64: words, which are tokens beside pixels, have 32"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config("rnr_tiny", **changes)
