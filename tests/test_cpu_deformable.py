"""The C++ kernels of deformable attention against grid_sample in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import _cpu, ops
from magnet_fast.ops._view import view

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
    common = {
        "value": view(value),
        "places": view(locations),
        "weights": view(weights),
        "reference": None,
        "spatial_shapes": list(maps),
        "threads": threads,
    }
    out = allocate(grad_out.shape)
    _cpu.deformable_attention_forward(out=view(out), **common)
    grads = [allocate(t.shape) if want else None for t, want in zip((value, locations, weights), wanted, strict=True)]
    _cpu.deformable_attention_backward(
        grad_out=view(grad_out),
        grad_value=view(grads[0]),
        grad_places=view(grads[1]),
        grad_weights=view(grads[2]),
        grad_reference=None,
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


SIZES = {"value": (2, 118, 3, 16), "places": (2, 21, 3, 4, 2, 2), "weights": (2, 21, 3, 4, 2)}
MOST = 2**31 - 1


def fake(*sizes, address=64, strides=None, dtype=0):
    """A contiguous tensor that is not there, but for its description."""
    dense = tuple(torch.empty(sizes, device="meta").stride()) if strides is None else strides
    return address, sizes, dense, dtype


def assert_refused(changes, message):
    call = {name: fake(*sizes) for name, sizes in SIZES.items()}
    call |= {"reference": None, "spatial_shapes": PYRAMID, "threads": 1, **changes}
    out = torch.full((2, 21, 48), 7.0)
    with pytest.raises(ValueError, match=f"^{message}"):
        _cpu.deformable_attention_forward(out=view(out), **call)
    grads = {f"grad_{name}": None for name in (*SIZES, "reference")}
    with pytest.raises(ValueError, match=f"^{message}"):
        _cpu.deformable_attention_backward(grad_out=view(out), **grads, **call)
    assert (out == 7).all()


def points(queries, count, heads=3, maps=4):
    """Places and weights of these sizes, all in one place."""
    sizes = (2, queries, heads, maps, count)
    return {"places": fake(*sizes, 2, strides=(0,) * 6), "weights": fake(*sizes, strides=(0,) * 5)}


BAD = [
    ({"value": None}, "value: expected a tensor of 4 dimensions, got 0"),
    ({"value": fake(2, 118, 48)}, "value: expected a tensor of 4 dimensions, got 3"),
    ({"value": fake(-1, 118, 3, 16, strides=(1, 48, 16, 1))}, "value: expected sizes of at least 0, got -1"),
    ({"value": fake(2, 118, 3, 0)}, r"value: expected positions, heads and channels of 1 \.\. 2\^31 - 1, got 0"),
    ({"value": fake(2, 0, 3, 16)}, r"value: expected positions, heads and channels of 1 \.\. 2\^31 - 1, got 0"),
    ({"value": fake(2, 109, 3, 16)}, "spatial_shapes: expected maps of 109 positions together, as value has, got 118"),
    ({"value": fake(2, 118, 3, 16, strides=(5664, -48, 16, 1))}, "value: expected strides of at least 0, got -48"),
    ({"value": fake(2, 118, 3, 16, strides=(11328, 96, 32, 2))}, "value: expected stride 1 in dimension 3, got 2"),
    ({"value": fake(2, 118, 3, 16, address=0)}, "value: expected the address of a tensor"),
    ({"value": fake(2, 118, 3, 16, dtype=4)}, "value: expected dtype 0 .float32.* got 4"),
    (
        {"value": fake(2, 118, 3, MOST, strides=(0, 0, 0, 1)), "spatial_shapes": [(2**9, 2**20)]},
        "places: expected size",
    ),
    ({"places": fake(2, 21, 3, 4, 2, 3)}, "places: expected size 2 in dimension 5, got 3"),
    ({"places": fake(2, 21, 2, 4, 2, 2)}, "places: expected size 3 in dimension 2, got 2"),
    ({"places": fake(1, 21, 3, 4, 2, 2)}, "places: expected size 2 in dimension 0, got 1"),
    ({"weights": fake(2, 20, 3, 4, 2)}, "weights: expected size 21 in dimension 1, got 20"),
    ({"weights": fake(2, 21, 3, 4, 2, address=6)}, "weights: expected an address aligned for its dtype, got 2"),
    (points(21, 0), r"places: expected 1 \.\. 2\^31 - 1 points, got 0"),
    (points(21, 2**20), r"places: expected at most 2\^20 points a query on all levels"),
    (points(2**31, 2), r"places: expected 0 \.\. 2\^31 - 1 queries"),
    ({"threads": 0}, "threads: expected 1 .. 4096, got 0"),
    ({"spatial_shapes": []}, "spatial_shapes: expected at least one"),
    ({"spatial_shapes": [(0, 5)] * 4}, r"spatial_shapes: expected heights of 1 \.\. 2\^24, got 0"),
    ({"spatial_shapes": [(5, -5)] * 4}, r"spatial_shapes: expected widths of 1 \.\. 2\^24, got -5"),
    ({"spatial_shapes": [(2**20, 2**20)] * 4}, r"spatial_shapes: expected at most 2\^30 positions"),
    (
        {"spatial_shapes": [(1, 2**24)] * 40, **points(21, 2, maps=40)},
        r"spatial_shapes: expected fewer than 2\^31 positions with .* borders",
    ),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments_are_refused(change, message):
    assert_refused(change, message)


def test_sizes_that_cannot_be_addressed_are_refused():
    value = fake(MOST, 118, MOST, MOST, strides=(0, 0, 0, 1))
    sizes = (MOST, 21, MOST, 4, 2)
    call = {"value": value, "places": fake(*sizes, 2, strides=(0,) * 6), "weights": fake(*sizes, strides=(0,) * 5)}
    assert_refused(call, "value: expected it to be addressable")
    value = fake(2, 118, MOST, 1, strides=(0, 0, 0, 1))
    assert_refused({"value": value, **points(MOST, 2, heads=MOST)}, "places: expected the points and the result")


PLAIN = [
    ({"places": fake(2, 21, 3, 4, 2, 2, dtype=1)}, "places: expected dtype 0, got 1"),
    ({"weights": fake(2, 21, 3, 4, 2, dtype=1)}, "weights: expected dtype 0, got 1"),
    ({"places": fake(2, 21, 3, 4, 2, 2, strides=(2016, 96, 32, 4, 2, 1))}, "places: expected stride 16"),
    ({"weights": fake(2, 21, 3, 4, 2, strides=(1008, 48, 16, 2, 1))}, "weights: expected stride 8"),
]
FUSED = [
    ({"reference": fake(3, 21, 1, 2)}, "reference: expected a batch of 1 or 2, got 3"),
    ({"reference": fake(1, 20, 1, 2)}, "reference: expected 21 queries, got 20"),
    ({"reference": fake(1, 21, 2, 2)}, "reference: expected 1 or 4 maps, got 2"),
    ({"reference": fake(1, 21, 1, 3)}, "reference: expected 2 or 4 coordinates, got 3"),
    ({"reference": fake(21, 2)}, "reference: expected a tensor of 4 dimensions, got 2"),
    ({"reference": fake(1, 21, 1, 2, address=0)}, "reference: expected the address of a tensor"),
    ({"reference": fake(1, 21, 1, 2, address=6)}, "reference: expected an address aligned for its dtype, got 2"),
    ({"reference": fake(1, 21, 1, 2, dtype=1)}, "reference: expected dtype 0, got 1"),
    ({"places": fake(2, 21, 3, 4, 2, 2, dtype=1)}, "places: expected dtype 0, got 1"),
    ({"weights": fake(2, 21, 3, 4, 2, dtype=1)}, "weights: expected dtype 0, got 1"),
    ({"places": fake(2, 21, 3, 4, 2, 2, strides=(1008, -48, 16, 4, 2, 1))}, "places: expected strides of at least 0"),
    ({"weights": fake(2, 21, 3, 4, 2, strides=(504, 24, -8, 2, 1))}, "weights: expected strides of at least 0"),
    ({"weights": fake(2, 21, 3, 4, 2, strides=(504, 24, 8, 4, 1))}, "weights: expected stride 2 in dimension 3, got 4"),
]


@pytest.mark.parametrize("change, message", PLAIN)
def test_bad_arguments_of_the_plain_form_are_refused(change, message):
    assert_refused(change, message)


@pytest.mark.parametrize("change, message", [*BAD, *FUSED])
def test_bad_arguments_of_the_fused_form_are_refused(change, message):
    queries = change.get("places", fake(2, 21))[1][1]
    assert_refused({"reference": fake(1, queries, 1, 2), **change}, message)


def test_gradients_are_shaped_like_their_tensors():
    value, locations, weights, grad_out = inputs()
    call = {"value": view(value), "places": view(locations), "weights": view(weights), "reference": None}
    call |= {"grad_out": view(grad_out), "spatial_shapes": PYRAMID, "threads": 1}
    nothing = {f"grad_{name}": None for name in (*SIZES, "reference")}
    for name, wrong, message in (
        ("grad_value", fake(2, 118, 3, 15), "the sizes of its tensor, got 15"),
        ("grad_places", fake(*SIZES["places"], dtype=1), "dtype 0"),
        ("grad_weights", fake(*SIZES["weights"], address=2), "an address aligned"),
        ("grad_reference", fake(1, 21, 1, 2), "None without reference points"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected {message}"):
            _cpu.deformable_attention_backward(**call, **(nothing | {name: wrong}))
