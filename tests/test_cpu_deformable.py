"""The C++ kernels of deformable attention against grid_sample in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import _cpu, ops

LEVELS = _cpu.supported_simd_levels()
PYRAMID = [(3, 5), (6, 4), (1, 7), (9, 8)]
NAMES = ("out", "grad_value", "grad_locations", "grad_weights")


@pytest.fixture(params=LEVELS)
def simd(request):
    before = _cpu.simd_level()
    _cpu.set_simd_level(request.param)
    yield request.param
    _cpu.set_simd_level(before)


def inputs(batch=2, maps=(*PYRAMID,), heads=3, d=16, points=2, queries=21, seed=0):
    """value, locations (a quarter of them outside the maps), weights, gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    positions = sum(h * w for h, w in maps)
    grid = (batch, queries, heads, len(maps), points)
    return (
        torch.randn(batch, positions, heads, d, generator=generator),
        torch.rand(*grid, 2, generator=generator) * 1.5 - 0.25,
        torch.rand(grid, generator=generator) - 0.2,
        torch.randn(batch, queries, heads * d, generator=generator),
    )


def by_grid_sample(value: Tensor, maps, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, d = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out, start = 0, 0
    for level, (height, width) in enumerate(maps):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)
        image = image.reshape(batch * heads, d, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) - 1
        samples = F.grid_sample(image, grid, align_corners=False).view(batch, heads, d, queries, points)
        out = out + torch.einsum("bhdqk,bqhk->bqhd", samples, weights[:, :, :, level])
        start += height * width
    return out.flatten(2)


def expected(value, maps, locations, weights, grad_out):
    leaves = [t.double().requires_grad_() for t in (value, locations, weights)]
    out = by_grid_sample(leaves[0], maps, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())]


def not_written(shape) -> Tensor:
    return torch.full(shape, torch.nan)


def kernel(value, maps, locations, weights, grad_out, threads=1, wanted=(True, True, True), allocate=not_written):
    """The extension itself: the result and three gradients, None for those not wanted."""
    batch, positions, heads, d = value.shape
    common = {
        "value_ptr": value.data_ptr(),
        "value_strides": value.stride()[:3],
        "locations_ptr": locations.data_ptr(),
        "weights_ptr": weights.data_ptr(),
        "batch": batch,
        "positions": positions,
        "heads": heads,
        "head_dim": d,
        "queries": locations.shape[1],
        "points": locations.shape[4],
        "spatial_shapes": list(maps),
        "threads": threads,
        "dtype": 0,
    }
    out = allocate(grad_out.shape)
    _cpu.deformable_attention_forward(out_ptr=out.data_ptr(), **common)
    grads = [allocate(t.shape) if want else None for t, want in zip((value, locations, weights), wanted, strict=True)]
    addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
    _cpu.deformable_attention_backward(
        grad_out_ptr=grad_out.data_ptr(),
        grad_value_ptr=addresses[0],
        grad_locations_ptr=addresses[1],
        grad_weights_ptr=addresses[2],
        **common,
    )
    return [out, *grads]


def assert_close(found, reference):
    for name, a, b in zip(NAMES, found, reference, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1.0)
        assert error < 3e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("d", [1, 3, 4, 7, 8, 12, 15, 16, 17, 24, 32, 33, 48, 64, 65, 100, 130])
def test_agrees_with_float64_at_every_width(simd, d):
    value, locations, weights, grad_out = inputs(d=d, heads=2)
    assert_close(
        kernel(value, PYRAMID, locations, weights, grad_out),
        expected(value, PYRAMID, locations, weights, grad_out),
    )


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("batch, heads, queries", [(1, 1, 1), (2, 3, 19), (1, 8, 133)])
def test_agrees_with_float64_at_every_count(simd, levels, points, batch, heads, queries):
    maps = PYRAMID[4 - levels :]
    data = inputs(batch, maps, heads, 8, points, queries, seed=levels)
    value, locations, weights, grad_out = data
    assert_close(kernel(value, maps, locations, weights, grad_out), expected(value, maps, locations, weights, grad_out))


def test_points_exactly_on_edges_and_centres(simd):
    # Powers of two: positions are exact in float32, so that both sides of every kink are the reference's own.
    maps = [(4, 8), (2, 1)]
    steps = torch.tensor([-0.25, -0.0625, 0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 0.9375, 1.0, 1.0625, 1.125, 1.5])
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(1, -1, 1, 1, 1, 2)
    locations = grid.expand(1, -1, 2, 2, 1, 2).contiguous()
    value, _, weights, grad_out = inputs(1, maps, 2, 16, 1, locations.shape[1])
    assert_close(kernel(value, maps, locations, weights, grad_out), expected(value, maps, locations, weights, grad_out))


def test_locations_that_are_no_numbers_or_far_away(simd):
    value, locations, weights, grad_out = inputs(heads=2, queries=40)
    far = [torch.nan, torch.inf, -torch.inf, 1e37, -1e37, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**40, -1e9]
    strange = torch.tensor(list(itertools.product([*far, 0.5], repeat=2))[:-1])
    places = torch.randperm(locations[..., 0].numel(), generator=torch.Generator().manual_seed(1))
    places = places[: len(strange)]
    locations.view(-1, 2)[places] = strange
    out, grad_value, grad_locations, grad_weights = kernel(value, PYRAMID, locations, weights, grad_out)

    # Forward as the reference: NaN for what is no number, zeros from far away.
    reference = by_grid_sample(value, PYRAMID, locations, weights)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert out.isnan().any() and out.isfinite().any()

    # Backward: they touch no position, and what is an honest point is as if they were not there.
    quiet, inside = weights.clone(), locations.clone()
    quiet.view(-1)[places], inside.view(-1, 2)[places] = 0.0, 0.5
    _, want_value, want_locations, want_weights = expected(value, PYRAMID, inside, quiet, grad_out)
    torch.testing.assert_close(grad_value.double(), want_value, rtol=1e-5, atol=1e-5)
    honest = torch.ones(weights.numel(), dtype=torch.bool)
    honest[places] = False
    for found, want in (
        (grad_locations.view(-1, 2), want_locations.view(-1, 2)),
        (grad_weights.view(-1), want_weights.view(-1)),
    ):
        torch.testing.assert_close(found[honest].double(), want[honest], rtol=1e-5, atol=3e-5)
    far_away = strange.isfinite().all(1)
    assert (grad_weights.view(-1)[places][far_away] == 0).all()


def test_no_neighbouring_memory_is_read(simd):
    # Every float around the view is NaN: one of them read into a result would show.
    for d in (3, 16, 21):
        value, locations, weights, grad_out = inputs(d=d)
        batch, positions, heads, _ = value.shape
        wide = torch.full((batch + 2, positions + 2, heads + 2, d + 5), torch.nan)
        view = wide[1:-1, 1:-1, 1:-1, 2:-3]
        view.copy_(value)
        found = kernel(view, PYRAMID, locations, weights, grad_out)
        for a, b in zip(found, kernel(value, PYRAMID, locations, weights, grad_out), strict=True):
            assert torch.equal(a, b)


def test_no_neighbouring_memory_is_written(simd):
    for d in (3, 16, 21):
        value, locations, weights, grad_out = inputs(d=d)
        buffers = []

        def guarded(shape, buffers=buffers):
            buffers.append(torch.full((shape.numel() + 128,), 7.0))
            return buffers[-1][64:-64].view(shape)

        found = kernel(value, PYRAMID, locations, weights, grad_out, allocate=guarded)
        assert len(buffers) == 4
        for buffer in buffers:
            assert (buffer[:64] == 7).all() and (buffer[-64:] == 7).all()
        assert_close(found, expected(value, PYRAMID, locations, weights, grad_out))


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=3) if not all(w)])
def test_each_gradient_alone_has_the_same_bits(simd, wanted):
    for batch, heads in ((1, 1), (2, 3)):
        value, locations, weights, grad_out = inputs(batch, heads=heads)
        every = kernel(value, PYRAMID, locations, weights, grad_out)
        some = kernel(value, PYRAMID, locations, weights, grad_out, wanted=wanted)
        for a, b, want in zip(every[1:], some[1:], wanted, strict=True):
            assert torch.equal(a, b) if want else b is None


@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 3), (2, 4), (4, 8)])
@pytest.mark.parametrize("d", [16, 70])
def test_same_bits_for_any_number_of_threads_and_every_time(simd, batch, heads, d):
    value, locations, weights, grad_out = inputs(batch, heads=heads, d=d, queries=300)
    one = kernel(value, PYRAMID, locations, weights, grad_out)
    for threads in (1, 2, 3, 8):
        for a, b in zip(one, kernel(value, PYRAMID, locations, weights, grad_out, threads), strict=True):
            assert torch.equal(a, b), threads


@pytest.mark.parametrize("threads", [1, 4])
def test_many_points_on_one_position(simd, threads):
    # Every point of every query adds to the same four rows.
    maps = [(2, 2)]
    value, locations, weights, grad_out = inputs(1, maps, 1, 16, 4, 200)
    locations.copy_(locations * 0.1 + 0.45)
    assert_close(
        kernel(value, maps, locations, weights, grad_out, threads),
        expected(value, maps, locations, weights, grad_out),
    )


def test_simd_levels_agree():
    before, found = _cpu.simd_level(), []
    value, locations, weights, grad_out = inputs(d=36)
    try:
        for level in LEVELS:
            _cpu.set_simd_level(level)
            found.append(kernel(value, PYRAMID, locations, weights, grad_out))
    finally:
        _cpu.set_simd_level(before)
    assert "portable" in LEVELS
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        lambda v: torch.cat([v, v], -1)[..., : v.shape[3]],
        lambda v: torch.cat([v, v])[: v.shape[0]],
        lambda v: v[:1].expand_as(v),
        lambda v: v[:, :, :1].expand_as(v),
        lambda v: v.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    ],
)
def test_operator_takes_views(view):
    value, locations, weights, grad_out = inputs()
    value = view(value)
    leaves = [t.clone(memory_format=torch.preserve_format) for t in (locations, weights)]
    leaves = [value.detach(), *leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    with ops.backend("cpu"):
        out = ops.deformable_attention(leaves[0], PYRAMID, *leaves[1:])
    grads = torch.autograd.grad(out, leaves, grad_out)
    assert_close([out.detach(), *grads], expected(value, PYRAMID, locations, weights, grad_out))


def test_operator_chooses_it_and_takes_any_gradient_of_the_result():
    value, locations, weights, _ = inputs()
    assert ops.explain("deformable_attention", value, PYRAMID, locations, weights).chosen == "cpu"
    ones = torch.ones(2, 21, 48)
    reference = expected(value, PYRAMID, locations, weights, ones)
    leaves = [t.clone().requires_grad_() for t in (value, locations, weights)]
    out = ops.deformable_attention(leaves[0], PYRAMID, *leaves[1:])
    out.sum().backward()  # an expanded gradient
    assert_close([out.detach(), *(leaf.grad for leaf in leaves)], reference)
    strided = locations.permute(5, 0, 1, 2, 3, 4).contiguous().permute(1, 2, 3, 4, 5, 0)
    assert torch.equal(ops.deformable_attention(value, PYRAMID, strided, weights), out)


def test_operator_says_why_it_cannot_run_here():
    arguments = [t.to("meta") for t in inputs()[:3]]
    with ops.backend("cpu"), pytest.raises(RuntimeError, match="device meta is not supported, CPU tensors only"):
        ops.deformable_attention(arguments[0], PYRAMID, *arguments[1:])


def test_nothing_to_do():
    value, locations, weights, grad_out = inputs(queries=1)
    _, grad_value, grad_locations, grad_weights = kernel(
        value, PYRAMID, locations[:, :0], weights[:, :0], grad_out[:, :0]
    )
    assert (grad_value == 0).all()
    out = kernel(value[:0], PYRAMID, locations[:0], weights[:0], grad_out[:0])
    assert all(t.numel() == 0 for t in (*out, grad_locations, grad_weights))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": -1}, r"batch: expected 0 \.\. 2\^31 - 1, got -1"),
        ({"heads": 0}, "heads: expected 1"),
        ({"head_dim": 0}, "head_dim: expected 1"),
        ({"queries": -1}, "queries: expected 0"),
        ({"queries": 2**31}, "queries: expected 0"),
        ({"points": 0}, "points: expected 1"),
        ({"points": 2**20}, r"points: expected at most 2\^20 points a query on all levels"),
        ({"threads": 0}, "threads: expected 1 .. 4096, got 0"),
        ({"positions": 0}, "positions: expected 1"),
        ({"positions": 109}, "spatial_shapes: expected maps of 109 positions together, as value has, got 118"),
        ({"spatial_shapes": []}, "spatial_shapes: expected at least one"),
        ({"spatial_shapes": [(0, 5)]}, r"spatial_shapes: expected heights of 1 \.\. 2\^24, got 0"),
        ({"spatial_shapes": [(5, -5)]}, r"spatial_shapes: expected widths of 1 \.\. 2\^24, got -5"),
        ({"spatial_shapes": [(2**20, 2**20)]}, r"spatial_shapes: expected at most 2\^30 positions"),
        ({"spatial_shapes": [(1, 2**24)] * 40}, r"spatial_shapes: expected fewer than 2\^31 positions with .* borders"),
        ({"head_dim": 2**31 - 1, "batch": 2**31 - 1}, "batch: expected value to be addressable"),
        ({"queries": 2**31 - 1, "heads": 2**31 - 1}, "queries: expected the points and the result"),
        ({"value_strides": (-1, 48, 16)}, "value_strides: expected strides of at least 0, got -1"),
        ({"value_ptr": 0}, "value_ptr: expected the address of a tensor"),
        ({"locations_ptr": 0}, "locations_ptr: expected the address of a tensor"),
        ({"weights_ptr": 6}, "weights_ptr: expected an address aligned for its dtype, got 2"),
        ({"weights_ptr": 5, "dtype": 1}, "weights_ptr: expected an address aligned for its dtype, got 1"),
        ({"weights_ptr": 20, "dtype": 3}, "weights_ptr: expected an address aligned for its dtype, got 4"),
        ({"dtype": 4}, "dtype: expected 0 .float32.* got 4"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    value, locations, weights, grad_out = inputs()
    arguments = {
        "value_ptr": value.data_ptr(),
        "value_strides": value.stride()[:3],
        "locations_ptr": locations.data_ptr(),
        "weights_ptr": weights.data_ptr(),
        "batch": 2,
        "positions": 118,
        "heads": 3,
        "head_dim": 16,
        "queries": 21,
        "points": 2,
        "spatial_shapes": PYRAMID,
        "threads": 1,
        "dtype": 0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        _cpu.deformable_attention_forward(out_ptr=grad_out.data_ptr(), **arguments)
    with pytest.raises(ValueError, match=message):
        _cpu.deformable_attention_backward(
            grad_out_ptr=grad_out.data_ptr(),
            grad_value_ptr=value.data_ptr(),
            grad_locations_ptr=0,
            grad_weights_ptr=0,
            **arguments,
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 0}, "heads: expected 1"),
        ({"points": 2**20}, r"points: expected at most 2\^20 points a query on all levels"),
        ({"queries": 2**31 - 1, "heads": 2**31 - 1}, "queries: expected the points and the result"),
        ({"spatial_shapes": [(0, 5)]}, r"spatial_shapes: expected heights of 1 \.\. 2\^24, got 0"),
        ({"value_strides": (-1, 48, 16)}, "value_strides: expected strides of at least 0, got -1"),
        ({"offsets_strides": (1, -2, 1)}, "offsets_strides: expected strides of at least 0, got -2"),
        ({"logits_strides": (1, 2, -3)}, "logits_strides: expected strides of at least 0, got -3"),
        ({"reference_batch": 3}, "reference_batch: expected 1 or the batch 2, got 3"),
        ({"reference_levels": 2}, "reference_levels: expected 1 or the number of maps 4, got 2"),
        ({"coordinates": 3}, "coordinates: expected 2 or 4, got 3"),
        ({"value_ptr": 0}, "value_ptr: expected the address of a tensor"),
        ({"reference_ptr": 0}, "reference_ptr: expected the address of a tensor"),
        ({"offsets_ptr": 0}, "offsets_ptr: expected the address of a tensor"),
        ({"logits_ptr": 0}, "logits_ptr: expected the address of a tensor"),
        ({"offsets_ptr": 6}, "offsets_ptr: expected an address aligned for its dtype, got 2"),
        ({"logits_ptr": 6, "dtype": 1, "wide": True}, "logits_ptr: expected an address aligned for its dtype, got 2"),
        ({"reference_ptr": 6, "dtype": 1}, "reference_ptr: expected an address aligned for its dtype, got 2"),
    ],
)
def test_bad_sizes_of_the_fused_form_are_refused(change, message):
    value, locations, weights, grad_out = inputs()
    arguments = {
        "value_ptr": value.data_ptr(),
        "value_strides": value.stride()[:3],
        "reference_ptr": locations.data_ptr(),
        "reference_batch": 1,
        "reference_levels": 1,
        "coordinates": 2,
        "offsets_ptr": locations.data_ptr(),
        "offsets_strides": locations.stride()[:3],
        "logits_ptr": weights.data_ptr(),
        "logits_strides": weights.stride()[:3],
        "wide": False,
        "batch": 2,
        "positions": 118,
        "heads": 3,
        "head_dim": 16,
        "queries": 21,
        "points": 2,
        "spatial_shapes": PYRAMID,
        "threads": 1,
        "dtype": 0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        _cpu.fused_deformable_attention_forward(out_ptr=grad_out.data_ptr(), **arguments)
    with pytest.raises(ValueError, match=message):
        _cpu.fused_deformable_attention_backward(
            grad_out_ptr=grad_out.data_ptr(),
            grad_value_ptr=value.data_ptr(),
            grad_reference_ptr=0,
            grad_offsets_ptr=0,
            grad_logits_ptr=0,
            **arguments,
        )
