"""cross_modal_attention against loops, torch.nn.MultiheadAttention, and its own promises about masked words."""

import pytest
import torch
from torch import nn

from magnet_fast import ops

from . import loops
from .cases import CROSS_MODAL_FORMS, WORDS, assert_low_precision, cross_modal_case, weighted_sum

FORMS = pytest.mark.parametrize("form", CROSS_MODAL_FORMS)


def by_loops(form, leaves, heads, mask):
    present, tensors = CROSS_MODAL_FORMS[form], iter(leaves)
    image_query, text_key, text_value, text_query, image_key, image_value = (
        next(tensors) if given else None for given in present
    )
    out = []
    scale = ((image_query if text_query is None else text_query).shape[2] // heads) ** -0.5
    if text_value is not None:
        out.append(loops.attention(image_query, text_key, text_value, heads, scale, mask))
    if image_value is not None:
        words, pixels = (text_key, image_query) if text_query is None else (text_query, image_key)
        rows = loops.attention(words, pixels, image_value, heads, scale, None)
        out.append(rows if mask is None else torch.where(mask[..., None], rows, torch.zeros_like(rows)))
    return tuple(out)


@FORMS
@pytest.mark.parametrize("mask", [None, WORDS], ids=["no mask", "mask"])
@pytest.mark.parametrize("pixels", [1, 5])
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_loops(form, mask, pixels, heads):
    case = cross_modal_case(form, pixels=pixels, heads=heads, mask=mask)
    expected = by_loops(form, case.leaves, heads, mask)
    torch.testing.assert_close(case(), expected)
    grads = torch.autograd.grad(weighted_sum(expected), case.leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(case.gradients(), grads)


@FORMS
def test_one_word(form):
    mask = torch.ones(2, 1, dtype=torch.bool)
    case = cross_modal_case(form, mask=mask)
    torch.testing.assert_close(case(), by_loops(form, case.leaves, 2, mask))


def test_equals_multihead_attention():
    """Twenty words, the padded ones as MultiheadAttention's key_padding_mask."""
    heads, width, pixels, words = 4, 32, 50, 20
    attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    image, text = (torch.randn(3, n, width, dtype=torch.float64, requires_grad=True) for n in (pixels, words))
    mask = torch.arange(words) < torch.tensor([[20], [7], [1]])

    def project(x, part):
        weight, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias.chunk(3)[part]
        return nn.functional.linear(x, weight, bias)

    image_out, text_out = ops.cross_modal_attention(
        project(image, 0),
        project(text, 1),
        project(text, 2),
        project(text, 0),
        project(image, 1),
        project(image, 2),
        text_mask=mask,
        num_heads=heads,
    )
    theirs = attention(image, text, text, key_padding_mask=~mask)[0], attention(text, image, image)[0]
    ours = attention.out_proj(image_out), attention.out_proj(text_out)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][mask], theirs[1][mask])
    torch.testing.assert_close(
        torch.autograd.grad(ours[0].sin().sum(), [image, text], retain_graph=True),
        torch.autograd.grad(theirs[0].sin().sum(), [image, text], retain_graph=True),
    )


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sentence_without_words_gives_zeros(form, dtype):
    case = cross_modal_case(form, dtype=dtype)
    outputs, grads = case(), case.gradients()
    for tensor in (*outputs, *grads):
        assert tensor[0].isfinite().all() and tensor[0].any()
        assert not tensor[1].any()


@FORMS
def test_masked_rows_are_never_read(form):
    case, spoiled = cross_modal_case(form), cross_modal_case(form)
    words = [leaf for leaf in spoiled.leaves if leaf.shape[1] == 3]
    for leaf in words:
        leaf.data[~WORDS] = float("nan")
    torch.testing.assert_close(spoiled(), case(), rtol=0, atol=0)
    torch.testing.assert_close(spoiled.gradients(), case.gradients(), rtol=0, atol=0)
    for leaf, grad in zip(spoiled.leaves, spoiled.gradients(), strict=True):
        if leaf.shape[1] == 3:
            assert not grad[~WORDS].any()


def test_scale_and_strong_similarities():
    image, text = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    hot = ops.cross_modal_attention(image, text, text, None, None, image, scale=1e4)
    assert all(out.isfinite().all() for out in hot)
    # So strong a softmax picks one row.
    best = (image @ text.mT).argmax(2)
    torch.testing.assert_close(hot[0], text[:, best[0]])


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(form, dtype):
    low, truth = cross_modal_case(form, dtype=dtype), cross_modal_case(form)
    for tensor, other in zip(truth.leaves, low.leaves, strict=True):
        tensor.data.copy_(other.data)
    plain = by_loops(form, low.leaves, 2, WORDS)
    plain_grads = torch.autograd.grad(weighted_sum(plain), low.leaves)
    for ours, *others in zip(
        (*low(), *low.gradients()), (*plain, *plain_grads), (*truth(), *truth.gradients()), strict=True
    ):
        assert ours.dtype == dtype
        assert_low_precision(ours, *others, dtype, form)


IMAGE, TEXT = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)
GOOD = {
    "image_query": IMAGE,
    "text_key": TEXT,
    "text_value": TEXT,
    "text_query": TEXT,
    "image_key": IMAGE,
    "image_value": IMAGE,
    "text_mask": torch.ones(2, 3, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "text_key: expected a tensor .* got float", {"text_key": 1.0}),
        (TypeError, "image_query: expected float32.* got int64", {"image_query": IMAGE.long()}),
        (ValueError, r"image_key: expected 3 dimensions \(B, P, C\), got shape \(5, 4\)", {"image_key": IMAGE[0]}),
        (ValueError, "image_value: every dimension .* at least 1", {"image_value": IMAGE[:, :0]}),
        (TypeError, "text_value: expected dtype float32", {"text_value": TEXT.double()}),
        (ValueError, "text_value: expected the device of image_query", {"text_value": TEXT.to("meta")}),
        (ValueError, "text_key: expected the batch of image_query, 2", {"text_key": TEXT[:1]}),
        (ValueError, "text_key: expected the width of image_query, 4", {"text_key": TEXT[..., :2]}),
        (ValueError, "text_value: expected the number of words of text_key, 3", {"text_value": TEXT[:, :2]}),
        (ValueError, "text_query: expected the number of words of text_key", {"text_query": TEXT[:, :2]}),
        (ValueError, "image_value: expected the number of pixels of image_", {"image_value": IMAGE[:, :2]}),
        (ValueError, "num_heads: 3 heads do not divide the 4 channels of image_query", {"num_heads": 3}),
        (ValueError, "num_heads: 4 .* the 2 channels of text_value", {"num_heads": 4, "text_value": TEXT[..., :2]}),
        (ValueError, "scale: expected a finite number above 0", {"scale": float("inf")}),
        (TypeError, "text_mask: expected bool .* got int64", {"text_mask": torch.ones(2, 3).long()}),
        (TypeError, "text_mask: expected a bool tensor", {"text_mask": [[True]]}),
        (ValueError, r"text_mask: expected shape \(2, 3\)", {"text_mask": torch.ones(2, 5).bool()}),
        (ValueError, "text_mask: expected the device", {"text_mask": torch.ones(2, 3).bool().to("meta")}),
        (ValueError, "text_value, image_value: expected at least one", {"text_value": None, "image_value": None}),
        (ValueError, "text_query, image_key: expected both", {"text_query": None}),
        (ValueError, "image_query, text_key: expected both or neither", {"text_key": None}),
        (ValueError, "image_query, text_key: expected beside text_value", {"image_query": None, "text_key": None}),
        (ValueError, "image_value: expected beside text_query and image_key", {"image_value": None}),
        (ValueError, "text_value: expected beside image_query and text_key", {"text_value": None}),
        (
            ValueError,
            "image_value: expected text_query and image_key, or",
            {"image_query": None, "text_key": None, "text_value": None, "text_query": None, "image_key": None},
        ),
    ],
)  # fmt: skip
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.cross_modal_attention(**{**GOOD, **change})


def test_a_sparse_mask_is_refused():
    case = cross_modal_case("separate")
    args, kwargs = case.arguments(*case.leaves)
    with pytest.raises(TypeError, match="text_mask: expected a dense tensor"):
        ops.cross_modal_attention(*args, **{**kwargs, "text_mask": WORDS.to_sparse()})
