"""The fast forms of our models' parts change no result: each against its plain form, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

import magnet_fast
from magnet_fast.fast import own_fusion, own_heads, own_parts
from magnet_fast.fast.own_parts import kept_sine_position, tokenwise, with_zero_gradients
from magnet_fast.models.encoders.swin import SwinBlock
from magnet_fast.models.fusion import exchange
from magnet_fast.models.fusion.exchange import Mixer, PooledLevel
from magnet_fast.models.fusion.pixel_word import PWAM, Gate, TextPWAM
from magnet_fast.models.heads.mask_decoder import MaskDecoder, QueryAttention
from magnet_fast.models.heads.pixel_decoder import DeformableLayer, PixelDecoder, PyramidPixelDecoder
from magnet_fast.models.position import sine_position

from .own import fill, results, values


def check(function, inputs: list[Tensor], module: nn.Module) -> None:
    """Plain, then accelerated: recording gradients, in inference, and in inference with packed weights."""
    expected = results(function, inputs, module)
    assert magnet_fast.accelerate(module).replaced
    found = results(function, inputs, module)
    assert found.keys() == expected.keys()
    for name, plain in expected.items():
        ours = found[name]
        assert (ours is None) == (plain is None), name
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for pack in (False, True):
        magnet_fast.accelerate(module, pack=pack)
        with torch.inference_mode():
            inferred = function(*inputs)
        for index, ours in enumerate(inferred):
            torch.testing.assert_close(ours, expected[f"output {index}"], rtol=1e-10, atol=1e-10)
    magnet_fast.restore(module)
    again = results(function, inputs, module)
    assert all(torch.equal(again[name], plain) for name, plain in expected.items() if plain is not None)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 8 tokens, so that maps of a test's size are cut."""
    monkeypatch.setattr(own_parts, "_WORTH_SLICING", 0)
    monkeypatch.setattr(own_parts, "_SLICE_BYTES", 1)
    monkeypatch.setattr(own_parts, "_FEWEST_ROWS", 8)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_swin_block(shift: int, size: tuple[int, int]) -> None:
    module = fill(SwinBlock(16, 2, 4, shift, 0.0))
    check(lambda x: [module(x)], [values(2, *size, 16)], module)


@pytest.mark.parametrize("keys", [29, 1])
def test_one_query_reads_pixels_without_projecting_them(keys: int) -> None:
    module = fill(QueryAttention(32, 4))
    allowed = torch.rand(2, 1, 1, keys, generator=torch.Generator().manual_seed(1)) > 0.4 if keys > 1 else None
    inputs = [values(2, 1, 32), values(2, 1, 32, seed=1), values(2, keys, 32, seed=2), values(2, keys, 32, seed=3)]
    check(lambda *t: [module(*t, allowed)], inputs, module)


def test_several_queries_run_the_plain_form() -> None:
    module = fill(QueryAttention(32, 4))
    inputs = [values(2, 3, 32), values(2, 3, 32, seed=1), values(2, 9, 32, seed=2), values(2, 9, 32, seed=3)]
    check(lambda *t: [module(*t)], inputs, module)


def test_mask_decoder() -> None:
    module = fill(MaskDecoder(levels=4, width=32, num_heads=4, layers=4, feedforward=48))
    shapes = [(2, 3), (4, 6), (7, 11), (14, 22)]
    inputs = [*(values(2, h * w, 32, seed=h) for h, w in shapes), values(2, 32, 14, 22)]

    def function(*tensors: Tensor) -> list[Tensor]:
        predictions = module(list(zip(tensors[:4], shapes, strict=True)), tensors[4])
        return [part for prediction in predictions for part in prediction]

    check(function, inputs, module)


@pytest.mark.parametrize("form", [PixelDecoder, PyramidPixelDecoder])
def test_pixel_decoder(form: type[nn.Module]) -> None:
    module = form((8, 16, 24, 32), width=32, num_heads=4, points=2, layers=2, feedforward=48)
    fill(module)
    sizes = [(13, 10), (7, 5), (4, 3), (2, 2)]
    inputs = [values(2, h, w, c, seed=c) for (h, w), c in zip(sizes, (8, 16, 24, 32), strict=True)]

    def function(*maps: Tensor) -> list[Tensor]:
        levels, mask_features = module(list(maps))
        return [*(tokens for tokens, _ in levels), mask_features]

    check(function, inputs, module)


def test_deformable_layer_in_slices() -> None:
    module = fill(DeformableLayer(32, 4, 2, 2, 48))
    reference = torch.rand(60, 2, generator=torch.Generator().manual_seed(5))
    check(
        lambda tokens, position: [module(tokens, position, reference, [(3, 4), (6, 8)])],
        [values(2, 60, 32), values(1, 60, 32, seed=1)],
        module,
    )


@pytest.mark.parametrize("size", [(5, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("sides", [(1, 2, 3, 6), (3,), ()], ids=str)
def test_levels_are_mixed_before_they_are_upsampled(sides: tuple[int, ...], size: tuple[int, int]) -> None:
    module = fill(Mixer(8, 8 + 2 * len(sides)))
    levels = [values(2, side * side, 2, seed=side) for side in sides]
    full = values(2, size[0] * size[1], 8, seed=7)
    check(lambda *t: [module(list(t[:-1]), t[-1], size)], [*levels, full], module)


@pytest.mark.parametrize("size", [(12, 12), (15, 7), (4, 9)], ids=str)
def test_pooled_level(size: tuple[int, int]) -> None:
    module = fill(PooledLevel(8, 4, side=6))
    check(lambda x: [module(x)], [values(2, *size, 8)], module)


@pytest.mark.parametrize("size", [(12, 12), (15, 7), (4, 9)], ids=str)
def test_deterministic_pooling_is_adaptive_average_pooling(size: tuple[int, int], monkeypatch) -> None:
    module = fill(PooledLevel(8, 4, side=6))
    expected = results(lambda x: [module(x)], [values(2, *size, 8)], module)
    monkeypatch.delattr(exchange.F, "adaptive_avg_pool2d")  # its backward pass has no deterministic form on CUDA
    torch.use_deterministic_algorithms(True)
    try:
        found = results(lambda x: [module(x)], [values(2, *size, 8)], module)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_gate(activation: str) -> None:
    module = fill(Gate(16, activation))
    check(lambda *t: [module(*t)], [values(2, 9, 16), values(2, 9, 16, seed=1)], module)


@pytest.mark.parametrize("norm", ["layer", "instance"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pixels", [4, 50], ids=["fewer pixels than words", "more"])
def test_pixels_read_words_with_projected_values(norm: str, heads: int, pixels: int) -> None:
    module = fill(PWAM(16, 24, num_heads=heads, norm=norm))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0] * 7], dtype=torch.bool)  # the last has no word
    check(lambda p, w: [module(p, w, mask)], [values(3, pixels, 16), values(3, 7, 24)], module)


@pytest.mark.parametrize("masking", ["correct", "released"])
@pytest.mark.parametrize("channels, pixels", [(8, 60), (40, 5)], ids=["absorbed", "not worth it"])
def test_words_read_pixels_without_keys_and_values(masking: str, channels: int, pixels: int) -> None:
    module = fill(TextPWAM(24, channels, masking=masking))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    check(lambda w, p: [module(w, p, mask)], [values(2, 7, 24), values(2, pixels, channels, seed=1)], module)


# ---- What is kept, and slices -----------------------------------------------------------------------------------


def test_upsampling_is_kept_and_serves_training() -> None:
    module = fill(Mixer(8, 12))
    magnet_fast.accelerate(module)
    with torch.inference_mode():
        module([values(2, 4, 4)], values(2, 15, 8), (3, 5))
    made = own_fusion.kept_upsampling.cache_info().misses
    module([values(2, 4, 4)], values(2, 15, 8), (3, 5)).sum().backward()
    assert own_fusion.kept_upsampling.cache_info().misses == made
    assert module[0].weight.grad.abs().sum() > 0


def test_positions_are_kept_and_serve_training() -> None:
    arguments = (3, 5, 8, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        position = kept_sine_position(*arguments)
    assert kept_sine_position(*arguments) is position and not position.is_inference()
    assert torch.equal(position, sine_position(*arguments))
    weight = torch.ones(8, requires_grad=True)
    (weight * position).sum().backward()
    assert weight.grad.shape == (8,)


def test_fake_tensors_are_not_kept() -> None:
    arguments = (4, 7, 8, torch.device("cpu"), torch.float32)
    with FakeTensorMode():
        assert type(kept_sine_position(*arguments)) is not Tensor
    assert torch.equal(kept_sine_position(*arguments), sine_position(*arguments))


def test_what_a_transform_makes_is_not_kept() -> None:
    arguments = (4, 9, 8, torch.device("cpu"), torch.float32)
    misses = kept_sine_position.cache_info().misses
    seen = torch.func.vmap(lambda x: x * kept_sine_position(*arguments))(torch.ones(3, 1, 1))
    assert kept_sine_position.cache_info().misses == misses and seen.shape == (3, 1, 36, 8)


def test_pixels_lie_as_products_read_them() -> None:
    """One image's, too: with a stride of 6 from batch to batch oneDNN would copy all features first."""
    features = torch.randn(1, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    pixels = own_heads.pixels_last(features)
    assert torch.equal(pixels, features.flatten(2))
    assert pixels.stride() == (90, 1, 6) and pixels.data_ptr() == features.data_ptr()


def test_gradients_of_zero() -> None:
    x, bias = values(3).requires_grad_(), values(4).requires_grad_()
    (with_zero_gradients(2 * x, bias, values(2)) * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 6.0, dtype=torch.float64)) and torch.equal(bias.grad, 0 * bias)
    with torch.no_grad():
        assert with_zero_gradients(x, bias) is x


def test_tokenwise_calls_in_slices_only_in_inference() -> None:
    linear = nn.Linear(6, 5).eval()
    x, sizes = torch.randn(2, 3, 7, 6), []

    def function(t: Tensor) -> Tensor:
        sizes.append(t.shape[:-1].numel())
        return linear(t)

    whole = tokenwise(linear, function, x, width=5)
    with torch.no_grad():
        sliced = tokenwise(linear, function, x, width=5)
        tokenwise(linear.train(), function, x, width=5)
    assert sizes == [42, 8, 8, 8, 8, 8, 2, 42] and sliced.shape == (2, 3, 7, 5)
    torch.testing.assert_close(sliced, whole)


def test_a_gate_that_opens_in_its_last_row_alone_is_not_closed() -> None:
    gate = Gate(4, "gelu")
    magnet_fast.accelerate(gate)
    with torch.no_grad():
        assert own_fusion.closed(gate)
        gate.last.weight[3, 3] = 1e-3
        assert not own_fusion.closed(gate)


def test_a_gate_keeps_its_answer_off_the_cpu_until_its_weights_change() -> None:
    gate = Gate(4, "relu").to("meta")
    magnet_fast.accelerate(gate)
    weight = gate.last.weight
    state = (StorageWeakRef(weight.untyped_storage()), 0, weight._version)
    own_fusion._known[gate] = state, True  # as if asked before: nothing is read back
    with torch.no_grad():
        assert own_fusion.closed(gate)
        weight.add_(1)
        with pytest.raises(RuntimeError, match="meta"):  # it asks again
            own_fusion.closed(gate)
    own_fusion._known[gate] = state, True
    gate.train()
    assert gate not in own_fusion._known
