"""Cross-modal attention's CUDA kernels, emulated, against the reference."""

import pytest
import torch

from magnet_fast.ops import _cpu_cross_modal
from magnet_fast.ops._view import view

from ..ops.cases import CROSS_MODAL_FORMS, Case, cross_modal_case, leaf, weighted_sum
from .agreement import assert_agrees, outputs, results

pytestmark = pytest.mark.slow

LOW = torch.bfloat16


def case_of(form, *, batch, pixels, words, widths, heads, dtype, mask=None):
    """Widths of the queries and keys, the text's values and the image's."""
    sides = (pixels, words, words, words, pixels, pixels)
    channels = (widths[0], widths[0], widths[1], widths[0], widths[0], widths[2])
    present = CROSS_MODAL_FORMS[form]
    leaves = [
        leaf(batch, side, width, dtype=dtype, seed=i)
        for i, (side, width, given) in enumerate(zip(sides, channels, present, strict=True))
        if given
    ]

    def arguments(*given):
        tensors = iter(given)
        return tuple(next(tensors) if wanted else None for wanted in present), {"text_mask": mask, "num_heads": heads}

    return Case("cross_modal_attention", leaves, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", CROSS_MODAL_FORMS)
def test_equals_the_reference(emulated, form, dtype):
    """Widths that no vector divides, two tiles of pixels, a sentence without a word."""
    assert_agrees(cross_modal_case(form, pixels=70, dtype=dtype), emulated, dtype)


SHAPES = {
    "wide heads, many words": {"form": "separate", "pixels": 80, "words": 35, "widths": (144, 80, 80), "heads": 1},
    "64 words, few pixels": {"form": "shared", "pixels": 5, "words": 64, "widths": (16, 16, 16), "heads": 1},
    "one word, one pixel": {"form": "separate", "pixels": 1, "words": 1, "widths": (8, 8, 8), "heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(emulated, shape):
    assert_agrees(case_of(batch=1, dtype=LOW, **SHAPES[shape]), emulated, LOW)


def test_heads_of_1024_channels(emulated):
    case = case_of("shared", batch=1, pixels=9, words=5, widths=(1024, 64, 64), heads=1, dtype=LOW)
    assert_agrees(case, emulated, LOW)


def test_splits_of_the_pixels(emulated):
    """More tiles of pixels than one share holds, shares of different length."""
    case = case_of("words only", batch=1, pixels=64 * 9 + 1, words=3, widths=(16, 8, 16), heads=1, dtype=LOW)
    assert_agrees(case, emulated, LOW)


@pytest.mark.parametrize("which", range(6))
def test_one_gradient_at_a_time(emulated, which):
    case = cross_modal_case("separate", dtype=LOW)
    together = results(case, "cuda")[2 + which]
    leaves = [leaf if i == which else leaf.detach() for i, leaf in enumerate(case.leaves)]
    (alone,) = torch.autograd.grad(weighted_sum(case.registered("cuda")(*leaves)), leaves[which])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("output", range(2), ids=["image_out", "text_out"])
@pytest.mark.parametrize("form", ["separate", "shared"])
def test_gradient_of_one_result_only(emulated, form, output):
    case = cross_modal_case(form, dtype=torch.float32)
    grads = []
    for backend in ("cuda", "reference"):
        out = outputs(case, backend)[output]
        grads.append(torch.autograd.grad(weighted_sum((out,)), case.leaves, materialize_grads=True))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_masked_words_are_never_read(emulated):
    case = cross_modal_case("separate", dtype=torch.float32)
    expected = results(case, "cuda")
    hidden = [leaf.detach().clone() for leaf in case.leaves]
    for i in (1, 2, 3):  # text_key, text_value, text_query
        hidden[i][0, 2] = hidden[i][1] = torch.nan
    poisoned = Case(case.operator, [tensor.requires_grad_() for tensor in hidden], case.arguments)
    for ours, clean in zip(results(poisoned, "cuda"), expected, strict=True):
        assert torch.equal(ours, clean)


def test_views(emulated):
    """Rows of a wider tensor, a batch that is repeated."""
    case = case_of("shared", batch=2, pixels=20, words=6, widths=(16, 16, 16), heads=2, dtype=LOW)
    wide = torch.full((2, 20, 48), torch.nan, dtype=LOW)
    wide[..., 5:21] = case.leaves[0].detach()
    leaves = [wide[..., 5:21], *(tensor.detach() for tensor in case.leaves[1:])]
    leaves[1] = leaves[1][:1].expand(2, -1, -1)
    contiguous = [tensor.contiguous() for tensor in leaves]
    ours, plain = case.registered("cuda")(*leaves), case.registered("cuda")(*contiguous)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_the_launcher_refuses(emulated):
    case = cross_modal_case("shared", dtype=torch.float32)
    tensors = case.normalised()[:6]
    batch, pixels, width = tensors[0].shape
    inputs = {"device": 0, "stream": 0, "tf32": False, **_cpu_cross_modal.inputs(tensors, None, 2, 1.0)}
    image_out, text_out = _cpu_cross_modal.results(tensors)
    outs = {"image_out": view(image_out), "text_out": view(text_out)}
    for changes, blamed in (
        ({name: (64, (batch, 65, width), (0, 0, 1), 0) for name in ("text_key", "text_value")}, "words"),
        ({"heads": 3}, "heads"),
        ({"image_query": (64, (batch, 0, width), (0, 0, 1), 0)}, "image_query"),
        ({"image_value": (64, (batch, pixels + 1, width), (0, 0, 1), 0)}, "image_value"),
        ({"text_key": None}, "image_query"),
        ({"image_query": (64, (batch, pixels, width), (0, 0, 1), 3)}, "image_query"),
    ):
        with pytest.raises(ValueError, match=f"^{blamed}: expected"):
            emulated.extension.cross_modal_attention_workspace(**{**inputs, **changes})
    with pytest.raises(ValueError, match="^workspace: expected at least"):
        workspace = view(torch.empty(16, dtype=torch.uint8))
        emulated.extension.cross_modal_attention_forward(**inputs, **outs, workspace=workspace)
