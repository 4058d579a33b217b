"""3 x 3 convolutions by Winograd's algorithm: against float64 at every level, and when they run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import magnet_fast
from magnet_fast.models.encoders.clip_resnet import Bottleneck
from magnet_fast.ops import _convolution, _cpu_backend, _winograd
from magnet_fast.ops._view import view
from tests.onednn import needs_onednn

_cpu = _cpu_backend.extension
LEVELS = _cpu.supported_simd_levels()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.simd_level()
    _cpu.set_simd_level(request.param)
    yield request.param
    _cpu.set_simd_level(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_agree(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rectify: bool) -> None:
    """Of x's dtype, against the sum in float64, by the error rule."""

    def plainly(dtype: torch.dtype) -> Tensor:
        y = F.conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding=1)
        y = y if residual is None else y + residual.to(dtype)
        return F.relu(y) if rectify else y

    given = [tensor if tensor is None else tensor.clone() for tensor in (x, residual)]
    found = _winograd.run(x, _winograd.pack(weight), bias, residual, rectify)
    truth, eager = plainly(torch.float64), plainly(x.dtype)
    assert found.shape == truth.shape and found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    if found.numel():
        error, baseline = (found - truth).abs().max(), (eager - truth).abs().max()
        step = 4e-6 if x.dtype == torch.float32 else 1e-14
        assert error <= 4 * baseline + step * truth.abs().max().clamp(min=1e-2)
    for tensor, before in zip((x, residual), given, strict=True):  # what is read is not written
        assert tensor is None or torch.equal(tensor, before)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_at_every_level(level: str, with_residual: bool, with_bias: bool, rectify: bool) -> None:
    """Two panels, the last one narrower, and a depth that is cut twice."""
    x, weight = drawn(2, 272, 7, 10).float(), drawn(112, 272, 3, 3, seed=1).float()
    bias = drawn(112, seed=2).float() if with_bias else None
    residual = drawn(2, 112, 7, 10, seed=3).float() if with_residual else None
    assert_agree(x, weight, bias, residual, rectify)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes_and_strides(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    step = _cpu.winograd_step(weight=view(torch.empty(1, 1, 3, 3, dtype=dtype)))
    channels = st.integers(1, 5).map(lambda count: step * count)
    side = st.integers(1, 9)
    images, height, width = data.draw(st.integers(0, 3), "images"), data.draw(side), data.draw(side)
    inputs, outputs = data.draw(channels, "inputs"), data.draw(channels, "outputs")

    def laid_out(channels: int, seed: int) -> Tensor:
        form = data.draw(st.sampled_from(["channels first", "channels last", "slice", "broadcast"]))
        if form == "channels first":
            return drawn(images, channels, height, width, seed=seed).to(dtype)
        if form == "broadcast":
            return drawn(1, channels, 1, 1, seed=seed).to(dtype).expand(images, channels, height, width)
        wide = drawn(images, height + 1, width + 2, channels + (3 if form == "slice" else 0), seed=seed).to(dtype)
        return wide[:, 1:, 1:-1, :channels].permute(0, 3, 1, 2)

    residual = laid_out(outputs, 3) if data.draw(st.booleans(), "residual") else None
    bias = drawn(outputs, seed=2).to(dtype) if data.draw(st.booleans(), "bias") else None
    weight = drawn(outputs, inputs, 3, 3, seed=1).to(dtype)
    weight = weight if data.draw(st.booleans(), "contiguous") else weight.to(memory_format=torch.channels_last)
    assert_agree(laid_out(inputs, 0), weight, bias, residual, data.draw(st.booleans(), "rectify"))


def test_threads_change_no_bit() -> None:
    x, packed = drawn(3, 32, 41, 37).float(), _winograd.pack(drawn(32, 32, 3, 3).float())
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(_winograd.run(x, packed, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_many_chunks() -> None:
    """Of tiles, some of them across two images."""
    assert_agree(drawn(2, 16, 61, 47).float(), drawn(16, 16, 3, 3, seed=1).float(), None, None, False)


def test_what_is_not_finite_stays_so() -> None:
    x, packed = drawn(1, 16, 12, 12).float(), _winograd.pack(drawn(16, 16, 3, 3, seed=1).float())
    clean = _winograd.run(x, packed, None, None, True)
    x[0, 3, 5, 5] = torch.nan
    found = _winograd.run(x, packed, None, None, True)
    assert found[0, :, 4:7, 4:7].isnan().all()
    far = torch.ones(12, 12, dtype=torch.bool)
    far[2:9, 2:9] = False
    assert torch.equal(found[..., far], clean[..., far])


CALL: dict[str, Any] = {
    "x": torch.zeros(1, 4, 5, 16),
    "packed": _winograd.pack(torch.zeros(32, 16, 3, 3)),
    "bias": torch.zeros(32),
    "residual": None,
    "y": torch.zeros(1, 4, 5, 32),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(1, 4, 5, 24)}, "packed: expected size 24"),
        ({"x": torch.zeros(1, 4, 5, 32)[..., ::2]}, "x: expected stride 1"),
        ({"x": torch.zeros(1, 4, 5, 16, dtype=torch.bfloat16)}, "x: expected dtype 0"),
        ({"x": torch.zeros(4, 5, 16)}, "x: expected a tensor of 4 dimensions"),
        ({"bias": torch.zeros(16)}, "bias: expected size 32"),
        ({"bias": torch.zeros(64)[::2]}, "bias: expected stride 1"),
        ({"residual": torch.zeros(1, 4, 5, 16)}, "residual: expected size 32"),
        ({"residual": torch.zeros(1, 4, 4, 32)}, "residual: expected size 5"),
        ({"y": torch.zeros(1, 4, 6, 32)}, "y: expected size 5"),
        ({"y": torch.zeros(1, 4, 10, 32)[:, :, ::2]}, "y: expected stride"),
        ({"packed": torch.zeros(16, 16, 33)[..., 1:]}, "packed: expected stride"),
        ({"packed": torch.zeros(16 * 16 * 32 + 1)[1:].view(16, 16, 32)}, "weight: expected an address aligned"),
    ],
)
def test_wrong_calls(changed: dict[str, Any], message: str) -> None:
    arguments = {name: view(value) for name, value in {**CALL, **changed}.items()}
    with pytest.raises(ValueError, match=message):
        _cpu.winograd_forward(**arguments, rectify=False, threads=1)


@pytest.mark.parametrize(
    ("weight", "packed", "message"),
    [
        (torch.zeros(32, 16, 3, 1), torch.zeros(16, 16, 32), "weight: expected size 3"),
        (torch.zeros(32, 16, 3, 3), torch.zeros(16, 32, 16), "packed: expected size 16"),
        (torch.zeros(32, 16, 3, 3, dtype=torch.float16), torch.zeros(16, 16, 32), "weight: expected dtype 0"),
        (torch.zeros(32, 15, 3, 3), torch.zeros(16, 15, 32), "in: expected a multiple of"),
    ],
)
def test_wrong_weights(weight: Tensor, packed: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _cpu.winograd_pack(weight=view(weight), packed=view(packed))


# ---- In models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Whether each call had a residual, and a ReLU; of any size."""
    found: list[tuple[bool, bool]] = []
    run = _winograd.run

    def noted(x: Tensor, packed: Tensor, bias: Tensor, residual: Tensor | None = None, rectify: bool = False) -> Tensor:
        found.append((residual is not None, rectify))
        return run(x, packed, bias, residual, rectify)

    monkeypatch.setattr(_winograd, "run", noted)
    monkeypatch.setattr(_winograd, "_FEWEST_TILES", 0)
    monkeypatch.setattr(_convolution, "_FEWEST_MULTIPLICATIONS", 0)
    return found


def filled(module: nn.Module) -> nn.Module:
    for seed, (name, tensor) in enumerate(module.state_dict().items()):
        if name.endswith("running_var"):
            tensor.copy_(drawn(*tensor.shape, seed=seed).abs() + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(drawn(*tensor.shape, seed=seed) * (tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 1))
    return module.eval().requires_grad_(False)


def convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(
        **{"in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1, "bias": False, **options}
    )


vectorised = pytest.mark.skipif(_cpu.simd_level() == "portable", reason="oneDNN's sum is the faster one")


@needs_onednn
@vectorised
@torch.no_grad()
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6(), nn.SiLU(inplace=True), nn.Hardswish()])
def test_with_its_norm_and_what_follows(activation: nn.Module | None, runs: list) -> None:
    layers = [convolution(), nn.BatchNorm2d(32), *([activation] if activation else [])]
    layers = filled(nn.Sequential(*layers))
    x = drawn(2, 16, 9, 8).float()
    truth, plain = copy.deepcopy(layers).double()(x.double()), layers(x)
    magnet_fast.accelerate(layers, pack=True)
    found, smaller = layers(x), layers(x[..., :5])
    error, baseline = (found - truth).abs().max(), (plain - truth).abs().max()
    assert error <= 4 * baseline + 4e-6 * truth.abs().max()
    torch.testing.assert_close(smaller[..., :3], found[..., :3])
    assert runs == 2 * [(False, type(activation) is nn.ReLU)]


@needs_onednn
@vectorised
@torch.no_grad()
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.SiLU()])
def test_with_a_residual(activation: nn.Module | None, runs: list) -> None:
    layers = filled(nn.Sequential(convolution(), nn.BatchNorm2d(32)))
    x, residual = drawn(2, 16, 9, 8).float(), drawn(2, 32, 9, 8, seed=1).float()
    expected = layers(x) + residual
    _convolution.pack_convolutions(list(layers))
    found = _convolution.run_layers(list(layers), x, residual, activation)
    torch.testing.assert_close(found, activation(expected) if activation else expected, atol=1e-4, rtol=1e-5)
    assert runs == [(True, type(activation) is nn.ReLU)]


@needs_onednn
@vectorised
@torch.no_grad()
def test_a_bottleneck_and_the_way_back(runs: list) -> None:
    block = filled(Bottleneck(64, 32, 1))
    x = drawn(1, 64, 12, 10).float()
    expected = block(x)
    magnet_fast.accelerate(block, pack=True)
    torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-5)
    assert runs == [(False, True)]
    block.branch[3].weight.mul_(2)  # a change is seen
    changed = block(x)
    magnet_fast.restore(block)
    torch.testing.assert_close(changed, block(x), atol=1e-4, rtol=1e-5)
    assert len(runs) == 2


@needs_onednn
@vectorised
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"padding": 0}, {"groups": 2}, {"kernel_size": 1}, {"out_channels": 24 - 1}],
)
def test_others_are_left_to_onednn(options: dict[str, Any], runs: list) -> None:
    layer = convolution(**options)
    layers = filled(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    x = drawn(1, 16, 9, 8).float()
    expected = layers(x)
    magnet_fast.accelerate(layers, pack=True)
    torch.testing.assert_close(layers(x), expected)
    assert runs == []


@needs_onednn
@vectorised
@torch.no_grad()
def test_each_level_has_its_own_copy(level: str, runs: list) -> None:
    """And so has each of both ways, for maps of few and of many pixels."""
    layers = filled(nn.Sequential(convolution(), nn.BatchNorm2d(32)))
    x = drawn(1, 16, 9, 8).float()
    expected = layers(x)
    magnet_fast.accelerate(layers, pack=True)
    for other in (level, *LEVELS):
        _cpu.set_simd_level(other)
        torch.testing.assert_close(layers(x), expected, atol=1e-4, rtol=1e-5)
    assert len(runs) == sum(other != "portable" for other in (level, *LEVELS))
    _winograd._FEWEST_TILES = 10**6  # the fixture puts it back
    torch.testing.assert_close(layers(x), expected, atol=1e-4, rtol=1e-5)
    assert len(runs) == sum(other != "portable" for other in (level, *LEVELS))
