"""FSFI's parts, against the released decoder and the formulas; ResNets stage by stage, against timm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models import Features, Words
from magnet_fast.models.config import Shapes
from magnet_fast.models.fusion.funnel import FunnelConfig, FunnelStage
from magnet_fast.models.heads.maed import Maed, MaedConfig
from tests.golden.parameters import golden, released_state
from tests.models.cases import PRESETS, batch, build
from tests.models.plain_forms import conv_block, convolve, layer_norm, linear, normalise, randomised, resize

WORDS = Words(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
MAPS = ("stride4_stem", "stride4", "stride8", "stride16", "stride16_dilated")


# ---- the head ----


def released_names() -> dict[str, str]:
    """Ours, of five maps, by the released decoder's: convolution and norm of each block below."""
    chain = ["x1", "x2", "x3", "x4", "x5"]
    names = {f"{x}_dem_1": f"reduce.{k}" for k, x in enumerate(chain)}
    for row in range(4):
        for k in range(4 - row):
            names["_".join(reversed(chain[k : k + row + 2]))] = f"rows.{row}.{k}.block"
    names |= {f"level{k}": f"levels.{k - 1}" for k in (1, 2, 3)} | {f"output{k}": f"outputs.{k - 2}" for k in (2, 3, 4)}
    return names | {"x5_dem_4": "top", "x5_dem_5": "coarsest"}


def released_decoder() -> Maed:
    """Its convolutions have biases before a BatchNorm: here they are part of the running mean."""
    state, ours = released_state("fsfi_maed"), {}
    for theirs, name in released_names().items():
        ours[f"{name}.0.weight"] = state[f"{theirs}.0.weight"]
        for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            ours[f"{name}.1.{entry}"] = state[f"{theirs}.1.{entry}"]
        ours[f"{name}.1.running_mean"] = ours[f"{name}.1.running_mean"] - state[f"{theirs}.0.bias"]
    ours |= {f"classify.{entry}": state[f"output1.0.{entry}"] for entry in ("weight", "bias")}
    head = MaedConfig().build(Shapes((128, 256, 512, 1024, 2048), (4, 4, 8, 16, 16), 4, 4, (None,) * 5))
    head.load_state_dict(ours)
    return head.eval()


def test_decoder_is_the_released_one() -> None:
    values = golden("fsfi_maed")
    maps = [values[name].permute(0, 2, 3, 1) for name in MAPS]
    size = tuple(values["out_logits"].shape[2:])
    with torch.inference_mode():
        prediction = released_decoder()(Features(maps, WORDS, [None] * 5, size))
    found = models.contract.resized(prediction, size)
    torch.testing.assert_close(found, values["out_logits"][:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [3, 4])
def test_decoder_of_other_maps(count: int) -> None:
    """By recursion, with sizes that do not halve."""
    widths, sizes = (3, 4, 5, 6)[:count], ((7, 9), (7, 9), (4, 5), (3, 3))[:count]
    head = randomised(MaedConfig(width=4).build(Shapes(widths, (4, 4, 8, 16)[:count], 4, 4, (None,) * count)))
    maps = [torch.randn(2, *size, c, dtype=torch.float64) for size, c in zip(sizes, widths, strict=True)]
    x = [each.permute(0, 3, 1, 2) for each in maps]

    def detail(row: int, k: int) -> Tensor:
        """Row 0 are the maps themselves."""
        if row == 0:
            return conv_block(x[k], head.reduce[k])
        low, high = detail(row - 1, k), detail(row - 1, k + 1)
        if row == count - 1:
            high = conv_block(high, head.top)
        left_out = 1 - 1 / (1 + torch.exp(-resize(high, sizes[k])))
        return conv_block(left_out * low, head.rows[row - 1][k].block)

    levels = []
    for k in range(count - 1):
        total = sum(detail(row, k) for row in range(count - k))
        levels.append(conv_block(total, head.levels[min(k, count - 3)]))
    out = conv_block(x[-1], head.coarsest)
    for k in range(count - 2, 0, -1):
        out = conv_block(resize(out, sizes[k]) + levels[k], head.outputs[k - 1])
    expected = resize(out, sizes[0]) + levels[0]
    found = head(Features(maps, WORDS, [None] * count, (28, 36)))
    torch.testing.assert_close(found.pixels, expected)
    torch.testing.assert_close(found.mask, convolve(expected, head.classify)[:, 0])


def test_decoder_wants_three_maps() -> None:
    with pytest.raises(ValueError, match="maed reads three maps or more; this fusion gives 1"):
        models.preset_config("cris_tiny", head={"kind": "maed"})


# ---- the fusion ----


def prelu_block(x: Tensor, block: nn.Sequential) -> Tensor:
    x = normalise(convolve(x, block[0]), block[1])
    return torch.where(x > 0, x, block[2].weight * x)


def funnelled(stage: FunnelStage, x: Tensor, words: Tensor, mask: Tensor, config: FunnelConfig) -> Tensor:
    """The formula, (B, H, W, C): cells, words, kernels, responses, stream."""
    x = x.permute(0, 3, 1, 2)
    _, _, height, width = x.shape
    if config.form == "released":
        cells = convolve(x, stage.cells)
    else:
        side, means = config.grid, []
        for i in range(side):
            for j in range(side):
                rows = slice(i * height // side, -(-(i + 1) * height // side))
                columns = slice(j * width // side, -(-(j + 1) * width // side))
                means.append(x[:, :, rows, columns].mean(dim=(2, 3)))
        cells = convolve(torch.stack(means, dim=2).unflatten(2, (side, side)), stage.cells)
        words = words.masked_fill(~mask[..., None], 0)
    read = layer_norm(linear(words, stage.words[0]), stage.words[1]).clamp(min=0)
    read = layer_norm(linear(read, stage.words[3]), stage.words[4]).clamp(min=0)
    cells = cells.flatten(2).transpose(1, 2)
    scores = cells @ read.transpose(1, 2) / math.sqrt(config.width)
    if config.form == "free":
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    kernels = scores.softmax(-1) @ read
    value, depth, responses = prelu_block(x, stage.value), config.width // config.heads, []
    for head in range(config.heads):
        part = slice(head * depth, (head + 1) * depth)
        products = torch.einsum("bdhw,bkd->bkhw", value[:, part], kernels[:, :, part]) / math.sqrt(depth)
        responses.append(products.clamp(min=0))
    mixed = convolve(torch.cat(responses, dim=1), stage.convolution.mix)
    return normalise(x + prelu_block(mixed, stage.output), stage.norm).clamp(min=0).permute(0, 2, 3, 1)


@pytest.mark.parametrize("form", ["free", "released"])
@pytest.mark.parametrize("count", [1, 9, 60])
def test_stage_is_its_formula(form: str, count: int) -> None:
    config = FunnelConfig(width=8, heads=2, grid=3, form=form)
    stage = randomised(FunnelStage(5, 16, 6, config))
    size = (6, 6) if form == "released" else (7, 4)
    x, words = torch.randn(2, *size, 5, dtype=torch.float64), torch.randn(2, count, 6, dtype=torch.float64)
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[1, (count + 1) // 2 :] = False
    torch.testing.assert_close(stage(x, words, mask), funnelled(stage, x, words, mask, config))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 60), st.integers(0, 9))
def test_any_map_and_any_padding(height: int, width: int, count: int, padding: int) -> None:
    """As many kernels for each, and padded words, whatever they hold, change nothing."""
    stage = randomised(FunnelStage(5, 16, 6, FunnelConfig(width=8, heads=2, grid=3)))
    seen = []
    stage.convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].shape))
    x, words = torch.randn(2, height, width, 5, dtype=torch.float64), torch.randn(2, count, 6, dtype=torch.float64)
    mask = torch.ones(2, count, dtype=torch.bool)
    short = stage(x, words, mask)
    long = stage(x, F.pad(words, (0, 0, 0, padding), value=9.0), F.pad(mask, (0, padding)))
    assert short.shape == x.shape and seen == [(2, 9, 8)] * 2
    torch.testing.assert_close(short, long)


def test_released_form_is_of_one_size_and_reads_padding() -> None:
    model = build(PRESETS["fsfi"], fusion__form="released")
    image, (ids, mask) = batch((128, 128))
    assert [stage.cells.kernel_size for stage in model.fusion.stages] == [(8, 8), (4, 4), (2, 2), (2, 2)]
    short = model.predict(image, ids, mask)
    long = model.predict(image, F.pad(ids, (0, 6)), F.pad(mask, (0, 6)))
    assert (short - long).abs().max() > 1e-6
    with pytest.raises(ValueError, match="form='released' expected 128x128 pixels, .* got one of 16x24"):
        model.predict(batch()[0], ids, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion__heads": 3}, "fusion.heads=3 does not divide width=32"),
        ({"fusion__first": 5}, "fusion.first=5: the image encoder has 5 stages"),
        (
            {
                "fusion__form": "released",
                "image": {"kind": "timm", "name": "test_vit3", "arguments": {"img_size": 96, "patch_size": 12}},
            },
            "form='released': expected strides that divide 32, got 12",
        ),
    ],
)
def test_refused_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config("fsfi_tiny", **changes)


def test_words_enter_the_next_stage() -> None:
    """The stem's map is as it was, and what later stages get follows the words."""
    model = build(PRESETS["fsfi"])
    image, text = batch()
    with torch.no_grad():
        first = model.encode(image, text).maps
        for stage in model.fusion.stages[1:]:  # from the second on they give what they get
            stage.forward = lambda x, words, mask: x
        one, other = model.encode(image, text).maps, model.encode(image, text._replace(ids=text.ids + 1)).maps
    assert torch.equal(one[0], other[0]) and torch.equal(one[0], first[0])
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(one[1:], other[1:], strict=True))


# ---- ResNets stage by stage ----


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_maps_are_timms(stride: int) -> None:
    arguments = {"output_stride": stride}
    part = {"kind": "resnet", "name": "test_resnet", "arguments": arguments, "stem": True}
    encoder = models.create("lavt_tiny", image=part).image_encoder.eval()
    theirs = timm.create_model("test_resnet", features_only=True, **arguments).eval()
    encoder.backbone.load_state_dict(theirs.state_dict())
    image = batch((67, 45))[0]
    with torch.no_grad():
        half, *expected = theirs(image)
        expected = [theirs.maxpool(half), *expected]
        stream = encoder.start(image)
        for i, reference in enumerate(expected):
            found = encoder.stage(i, stream)
            torch.testing.assert_close(found, reference.permute(0, 2, 3, 1))
            stream = encoder.descend(i, found)
            assert reference.shape[1] == encoder.channels[i]
            assert reference.shape[2:] == tuple(-(-side // encoder.strides[i]) for side in (67, 45))
    assert encoder.strides == (4, 4, 8, *[(8, 8), (16, 16), (16, 32)][[8, 16, 32].index(stride)])


def test_weights_by_path_and_frozen(tmp_path: Path) -> None:
    theirs = timm.create_model("test_resnet")
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    part = {"kind": "resnet", "name": "test_resnet", "frozen": True}
    sources = {"image": str(tmp_path / "resnet.pth"), "text": False}
    model = models.create("lavt_tiny", pretrained=sources, image=part).train()
    for name, tensor in model.image_encoder.backbone.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert not any(p.requires_grad for p in model.image_encoder.parameters())
    assert not any(module.training for module in model.image_encoder.backbone.modules())


def test_others_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of timm's ResNets, got 'test_vit', of class VisionTransformer"):
        models.preset_config("lavt_tiny", image={"kind": "resnet", "name": "test_vit"})
    assert models.preset_config("fsfi_resnest101").image.channels == (128, 256, 512, 1024, 2048)
