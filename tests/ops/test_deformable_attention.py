"""deformable_attention against loops and against transformers' Mask2Former."""

import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from magnet_fast import ops

from . import loops
from .cases import assert_low_precision, deformable_case, weighted_sum


def by_loops(case, leaves):
    (_, shapes, *_), _ = case.arguments(*case.leaves)
    return loops.deformable_attention(leaves[0], shapes, *leaves[1:])


def test_equals_loops():
    case = deformable_case()
    expected = by_loops(case, case.leaves)
    torch.testing.assert_close(case(), (expected,))
    torch.testing.assert_close(case.gradients(), torch.autograd.grad(weighted_sum((expected,)), case.leaves))


def test_equals_mask2former():
    """Four levels from large to small, eight heads, four points, as the pixel decoder uses them."""
    shapes = [(2, 3), (4, 5), (7, 9), (13, 17)]
    length, queries = sum(h * w for h, w in shapes), 29
    value = torch.randn(2, length, 8, 4, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(2, queries, 8, 4, 4, 2, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    weights = torch.randn(2, queries, 8, 16, dtype=torch.float64).softmax(-1).view(2, queries, 8, 4, 4).requires_grad_()
    ours = ops.deformable_attention(value, shapes, locations, weights)
    theirs = multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(ours, theirs)
    leaves = [value, locations, weights]
    torch.testing.assert_close(
        torch.autograd.grad(weighted_sum((ours,)), leaves), torch.autograd.grad(weighted_sum((theirs,)), leaves)
    )


def test_points_outside_read_zero():
    value = torch.ones(1, 6, 1, 2)
    far = torch.tensor([-3.0, 0.5]).expand(1, 1, 1, 1, 1, 2)
    corner = torch.tensor([0.0, 0.0]).expand(1, 1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, 1)
    assert not ops.deformable_attention(value, [(2, 3)], far, weight).any()
    # The corner of the map is half a pixel from its first pixel both ways.
    torch.testing.assert_close(ops.deformable_attention(value, [(2, 3)], corner, weight), torch.full((1, 1, 2), 0.25))


def test_sliced_inputs():
    case = deformable_case()
    wide = [torch.cat([leaf, leaf], -1 if leaf.shape[-1] != 2 else 1)[..., : leaf.shape[-1]] for leaf in case.leaves]
    narrow = [t[tuple(slice(0, n) for n in leaf.shape)] for t, leaf in zip(wide, case.leaves, strict=True)]
    assert not narrow[0].is_contiguous()
    torch.testing.assert_close(case(*narrow), case())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    low, truth = deformable_case(dtype=dtype), deformable_case()
    for tensor, other in zip(truth.leaves, low.leaves, strict=True):
        tensor.data.copy_(other.data)
    plain = by_loops(low, low.leaves)
    grads = torch.autograd.grad(weighted_sum((plain,)), low.leaves)
    assert low()[0].dtype == dtype
    assert_low_precision(low()[0], plain, truth()[0], dtype, "output")
    for name, ours, *others in zip(
        ("value", "locations", "weights"), low.gradients(), grads, truth.gradients(), strict=True
    ):
        assert_low_precision(ours, *others, dtype, f"gradient of {name}")


def test_exact_locations_beside_low_precision():
    """In bfloat16 a location near 1 is only known to 1/256; float32 locations are taken as they are."""
    value = torch.arange(200.0).view(1, 200, 1, 1).bfloat16()
    x = torch.tensor([(170 + 0.5) / 200, 0.5]).view(1, 1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    assert ops.deformable_attention(value, [(1, 200)], x, weight).item() == 170
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.deformable_attention(value.float(), [(1, 200)], x, weight.float()).item() == 170


VALUE, LOCATIONS = torch.zeros(2, 10, 2, 3), torch.zeros(2, 5, 2, 2, 4, 2)
GOOD = {
    "value": VALUE,
    "spatial_shapes": [(2, 3), (2, 2)],
    "sampling_locations": LOCATIONS,
    "attention_weights": LOCATIONS[..., 0],
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "value: expected a tensor", {"value": None}),
        (TypeError, "value: expected float32.* got uint8", {"value": VALUE.byte()}),
        (ValueError, "value: expected 4 dimensions", {"value": VALUE[0]}),
        (ValueError, "value: every dimension .* at least 1", {"value": VALUE[:0]}),
        (TypeError, "spatial_shapes: expected a list .* got Tensor", {"spatial_shapes": torch.ones(2, 2)}),
        (TypeError, r"spatial_shapes\[1\]: expected a pair .* got int", {"spatial_shapes": [(2, 3), 4]}),
        (TypeError, r"spatial_shapes\[0\]: .* ints", {"spatial_shapes": [(2.0, 3), (2, 2)]}),
        (ValueError, r"spatial_shapes\[0\]: expected at least 1", {"spatial_shapes": [(0, 3), (2, 5)]}),
        (ValueError, "spatial_shapes: .* 12 positions together, value has 10", {"spatial_shapes": [(2, 3), (2, 3)]}),
        (ValueError, "sampling_locations: expected shape .* 3 levels", {"spatial_shapes": [(2, 3), (1, 2), (1, 2)]}),
        (ValueError, "sampling_locations: expected shape", {"sampling_locations": LOCATIONS[:1]}),
        (ValueError, "sampling_locations: expected 6 dimensions", {"sampling_locations": LOCATIONS[0]}),
        (ValueError, "attention_weights: expected shape", {"attention_weights": LOCATIONS[..., :3, 0]}),
        (TypeError, "attention_weights: expected dtype float32", {"attention_weights": LOCATIONS[..., 0].half()}),
        (TypeError, "sampling_locations: expected dtype float32", {"sampling_locations": LOCATIONS.half()}),
        (ValueError, "attention_weights: expected the device", {"attention_weights": LOCATIONS[..., 0].to("meta")}),
    ],
)  # fmt: skip
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.deformable_attention(**{**GOOD, **change})
