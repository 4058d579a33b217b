"""The models' restructurings change no result: each against the plain form, outputs and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import plain_magnet
from magnet_fast import models
from magnet_fast.models import alignment, mask_decoder
from magnet_fast.models import tokenwise as tokenwise_module
from magnet_fast.models.config import MaskDecoderConfig
from magnet_fast.models.mask_decoder import MaskDecoder, QueryAttention
from magnet_fast.models.pixel_decoder import DeformableLayer, PixelDecoder
from magnet_fast.models.position import sine_position
from magnet_fast.models.pwam import PWAM, Gate
from magnet_fast.models.tokenwise import tokenwise
from magnet_fast.training.determinism import deterministic_algorithms

DECODER = MaskDecoderConfig(width=32, num_heads=4, points=2, pixel_layers=2, mask_layers=4, mask_feedforward=48)
# A key's bias shifts all scores of a query alike, and a single query attends to itself: their gradients are zero, in
# the plain form up to rounding, in ours not computed.
WITHOUT_GRADIENT = ("key.bias", "self_attention.query", "self_attention.key")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(module: nn.Module) -> nn.Module:
    """Random values of float64 in every parameter, so that every path reaches the output."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.double().parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def run(function, inputs: list[Tensor], module: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of inputs and parameters of a fixed weighting of them."""
    module.zero_grad()
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    sum((out * values(*out.shape, seed=9)).sum() for out in outputs).backward()
    grads = {f"input{index}": tensor.grad for index, tensor in enumerate(inputs)}
    grads |= {name: p.grad for name, p in module.named_parameters() if not name.endswith(WITHOUT_GRADIENT[:1])}
    return [out.detach() for out in outputs], grads


def check(function, inputs: list[Tensor], module: nn.Module) -> None:
    """The module as it is, in training and in inference, against the same module in the released form."""
    with plain_magnet.models_run_plainly():
        expected, expected_grads = run(function, inputs, module)
    outputs, grads = run(function, inputs, module)
    with torch.inference_mode():
        inferred = function(*inputs)
    for ours, plain, again in zip(outputs, expected, inferred, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-10)
    for name, plain in expected_grads.items():
        ours = grads[name]
        if plain is None or (ours is None and any(part in name for part in WITHOUT_GRADIENT)):
            assert plain is None or plain.abs().max() < 1e-10, name
            continue
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 8 tokens, so that maps of a test's size are cut."""
    monkeypatch.setattr(tokenwise_module, "_WORTH_SLICING", 0)
    monkeypatch.setattr(tokenwise_module, "_SLICE_BYTES", 1)
    monkeypatch.setattr(tokenwise_module, "_FEWEST_ROWS", 8)


def test_one_query_reads_pixels_without_projecting_them() -> None:
    module = fill(QueryAttention(32, 4))
    allowed = torch.rand(2, 1, 1, 29, generator=torch.Generator().manual_seed(1)) > 0.4
    inputs = [values(2, 1, 32), values(2, 1, 32, seed=1), values(2, 29, 32, seed=2), values(2, 29, 32, seed=3)]
    expected, expected_grads = run(lambda *t: [plain_magnet.query_attention(module, *t, allowed)], inputs, module)
    outputs, grads = run(lambda *t: [module(*t, allowed)], inputs, module)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_mask_decoder() -> None:
    module = fill(MaskDecoder(DECODER))
    shapes = [(2, 3), (4, 6), (7, 11), (14, 22)]
    inputs = [*(values(2, h * w, 32, seed=h) for h, w in shapes), values(2, 32, 14, 22)]

    def function(*tensors: Tensor) -> list[Tensor]:
        predictions = module(list(zip(tensors[:4], shapes, strict=True)), tensors[4])
        return [part for prediction in predictions for part in prediction]

    check(lambda *t: function(*t), inputs, module)


def test_pixel_decoder() -> None:
    module = fill(PixelDecoder((8, 16, 24, 32), DECODER))
    sizes = [(13, 10), (7, 5), (4, 3), (2, 2)]
    inputs = [values(2, h, w, c, seed=c) for (h, w), c in zip(sizes, (8, 16, 24, 32), strict=True)]

    def function(*features: Tensor) -> list[Tensor]:
        levels, mask_features = module(list(features))
        return [*(tokens for tokens, _ in levels), mask_features]

    check(function, inputs, module)


def test_deformable_layer_in_slices() -> None:
    module = fill(DeformableLayer(DECODER, 2))
    shapes = [(3, 4), (6, 8)]
    reference = torch.rand(60, 2, generator=torch.Generator().manual_seed(5))
    check(
        lambda tokens, position: [module(tokens, position, reference, shapes)],
        [values(2, 60, 32), values(1, 60, 32, seed=1)],
        module,
    )


@pytest.mark.parametrize("size", [(5, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("sides", [(1, 2, 3, 6), (3,), ()], ids=str)
def test_levels_are_mixed_before_they_are_upsampled(sides: tuple[int, ...], size: tuple[int, int]) -> None:
    module = fill(alignment.Mixer(8, 8 + 2 * len(sides)))
    levels = [values(2, side * side, 2, seed=side) for side in sides]
    full = values(2, size[0] * size[1], 8, seed=7)
    check(lambda *t: [module(list(t[:-1]), t[-1], size)], [*levels, full], module)


def test_a_mixer_whose_first_layer_is_watched_calls_it_with_the_upsampled_levels() -> None:
    module = fill(alignment.Mixer(8, 12))
    levels, full = [values(2, 4, 4)], values(2, 15, 8)
    expected = module(levels, full, (3, 5))
    seen = []
    module[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape))
    torch.testing.assert_close(module(levels, full, (3, 5)), expected, rtol=1e-10, atol=1e-10)
    assert seen == [(2, 15, 12)]


def test_upsampling_is_kept_and_serves_training() -> None:
    module = fill(alignment.Mixer(8, 12))
    with torch.inference_mode():
        module([values(2, 4, 4)], values(2, 15, 8), (3, 5))
    made = alignment._kept_upsampling.cache_info().misses
    module([values(2, 4, 4)], values(2, 15, 8), (3, 5)).sum().backward()
    assert alignment._kept_upsampling.cache_info().misses == made
    assert module[0].weight.grad.abs().sum() > 0


def test_pixels_lie_as_products_read_them() -> None:
    """One image's, too: with a stride of 6 from batch to batch oneDNN would copy all features first."""
    features = torch.randn(1, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    pixels = mask_decoder._pixels_last(features)
    assert torch.equal(pixels, features.flatten(2))
    assert pixels.stride() == (90, 1, 6) and pixels.data_ptr() == features.data_ptr()


@pytest.mark.parametrize("norm", ["layer", "instance"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pixels", [4, 50], ids=["fewer pixels than words", "more"])
def test_pixels_read_words_with_projected_values(norm: str, heads: int, pixels: int) -> None:
    module = fill(PWAM(16, 24, num_heads=heads, norm=norm))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0] * 7], dtype=torch.bool)  # the last has no word
    check(lambda p, w: [module(p, w, mask)], [values(3, pixels, 16), values(3, 7, 24)], module)


@pytest.mark.parametrize("name", ["magnet_tiny", "magnet_tiny released", "lavt_tiny"])
def test_whole_models(name: str) -> None:
    overrides = {"masking": "released"} if name.endswith("released") else {}
    model = models.build(name.split()[0], **overrides, text__vocab_size=100)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.double().eval().named_parameters():
        if "gate." in key or key.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(5, 100, (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    image = values(2, 3, 50, 67)

    def function(image: Tensor) -> list[Tensor]:
        output = model(image, ids * mask, mask)
        parts = [output.mask_logits, output.class_logits, output.mask_features, output.text_features]
        parts += [part for prediction in output.auxiliary for part in prediction]
        return [part for part in parts if part is not None]

    with plain_magnet.models_run_plainly(), torch.no_grad():
        expected = function(image)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(function(image), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["magnet_tiny", "lavt_tiny"])
def test_an_image_for_several_expressions_is_started_once(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, text__vocab_size=100).double().eval()
    seen = []
    model.image_encoder.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    ids = torch.randint(5, 100, (3, 6), generator=torch.Generator().manual_seed(0))
    image = values(1, 3, 40, 56).expand(3, -1, -1, -1)
    with torch.inference_mode():
        shared = model.predict(image, ids, torch.ones_like(ids))
        copied = model.predict(image.contiguous(), ids, torch.ones_like(ids))
    assert seen == [1, 3]
    torch.testing.assert_close(shared, copied, rtol=1e-8, atol=1e-8)
    model.train()(image, ids, torch.ones_like(ids))
    assert seen == [1, 3, 3]  # stochastic depth draws for each item


@pytest.mark.parametrize("kind", ["pwam", "xmha"])
def test_a_closed_text_gate_skips_the_words_side(kind: str) -> None:
    torch.manual_seed(0)
    model = models.build("magnet_tiny", alignment=kind, text__vocab_size=100).eval()
    calls = []
    name = "text_fusion" if kind == "pwam" else "text_gate"
    for module in model.alignment:
        getattr(module, name).register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(5, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = (values(2, 3, 32, 32).float(), ids, torch.ones_like(ids))

    def text_features() -> Tensor:
        with torch.no_grad():
            return model(*inputs).text_features

    closed = text_features()
    assert calls == []
    with plain_magnet.models_run_plainly():
        torch.testing.assert_close(text_features(), closed, rtol=0, atol=0)
    assert len(calls) == 4
    model(*inputs)  # with gradients the gate learns from what it does not let through
    assert len(calls) == 8
    # Weights that change are noticed, whichever way they change.
    model.alignment[0].text_gate.last.weight.data.fill_(0.1)
    opened = text_features()
    assert len(calls) == 9 and not torch.equal(opened, closed)
    torch.nn.init.zeros_(model.alignment[0].text_gate.last.weight)
    assert torch.equal(text_features(), closed) and len(calls) == 9


def test_a_gate_keeps_its_answer_off_the_cpu_until_its_weights_change() -> None:
    gate = Gate(4, "relu").to("meta")
    state = (gate.last.weight.data_ptr(), gate.last.weight._version)
    gate._known = state, True  # as if asked before: nothing is read back, which "meta" could not
    with torch.no_grad():
        assert gate.closed()
        gate.last.weight.add_(1)
        with pytest.raises(RuntimeError, match="meta"):  # it asks again
            gate.closed()
    gate._known = state, True
    gate.train()
    assert gate._known is None


def test_a_gate_that_opens_in_its_last_row_alone_is_not_closed() -> None:
    gate = Gate(4, "gelu")
    with torch.no_grad():
        assert gate.closed()
        gate.last.weight[3, 3] = 1e-3
        assert not gate.closed()


def test_positions_are_kept_and_serve_training() -> None:
    arguments = (3, 5, 8, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        position = sine_position(*arguments)
    assert sine_position(*arguments) is position and not position.is_inference()
    weight = torch.ones(8, requires_grad=True)
    (weight * position).sum().backward()
    assert weight.grad.shape == (8,)


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


@pytest.mark.parametrize("size", [(12, 12), (15, 7), (4, 9)])
def test_deterministic_pooling_is_adaptive_average_pooling(size, monkeypatch) -> None:
    level = fill(alignment.PooledLevel(8, 4, side=6))
    expected = run(level, [values(2, *size, 8)], level)
    monkeypatch.delattr(alignment.F, "adaptive_avg_pool2d")  # its backward pass has no deterministic form on CUDA
    with deterministic_algorithms(True):
        got = run(level, [values(2, *size, 8)], level)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
