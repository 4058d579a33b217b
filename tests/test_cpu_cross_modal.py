"""The C++ kernels of cross-modal attention at the extension's edge: memory they may touch, sizes they refuse."""

from __future__ import annotations

import pytest
import torch

from magnet_fast import _cpu
from magnet_fast.ops._cpu_backend import DTYPE_CODES

NAMES = ("image_query", "text_key", "text_value", "text_query", "image_key", "image_value")
BATCH, PIXELS, WORDS, HEADS = 2, 37, 5, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEVELS = _cpu.supported_simd_levels()


@pytest.fixture(params=LEVELS)
def simd(request):
    before = _cpu.simd_level()
    _cpu.set_simd_level(request.param)
    yield request.param
    _cpu.set_simd_level(before)


def inputs(width=24, text_value_width=6, image_value_width=34, dtype=torch.float32, separate=True):
    generator = torch.Generator().manual_seed(0)
    sides = (PIXELS, WORDS, WORDS, WORDS, PIXELS, PIXELS)
    widths = (width, width, text_value_width, width, width, image_value_width)
    return {
        name: torch.randn(BATCH, side, w, generator=generator).to(dtype)
        for name, side, w in zip(NAMES, sides, widths, strict=True)
        if separate or name not in ("text_query", "image_key")
    }


def argument(tensor):
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def arguments(tensors, **changes):
    """Of a call of the extension, for tensors by name."""
    some = next(iter(tensors.values()))
    found = {name: argument(tensors.get(name)) for name in NAMES}
    found |= {
        "text_mask_ptr": 0,
        "batch": BATCH,
        "pixels": PIXELS,
        "words": WORDS,
        "heads": HEADS,
        "width": tensors["image_query"].shape[2],
        "text_value_width": tensors["text_value"].shape[2] if "text_value" in tensors else 0,
        "image_value_width": tensors["image_value"].shape[2] if "image_value" in tensors else 0,
        "scale": 0.3,
        "dtype": DTYPE_CODES[some.dtype],
        "threads": 1,
    }
    return found | changes


def kernel(tensors, allocate, **changes):
    """Both results and the gradients of all tensors, from output gradients of ones."""
    call = arguments(tensors, **changes)
    dtype = tensors["image_query"].dtype
    image_out = allocate((BATCH, PIXELS, call["text_value_width"]), dtype)
    text_out = allocate((BATCH, WORDS, call["image_value_width"]), dtype)
    _cpu.cross_modal_attention_forward(image_out_ptr=image_out.data_ptr(), text_out_ptr=text_out.data_ptr(), **call)
    grads = {name: allocate(tensor.shape, dtype) for name, tensor in tensors.items()}
    ones = [torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype) for out in (image_out, text_out)]
    _cpu.cross_modal_attention_backward(
        grad_image_out=argument(ones[0]),
        grad_text_out=argument(ones[1]),
        **{f"grad_{name}_ptr": grads[name].data_ptr() if name in grads else 0 for name in NAMES},
        **call,
    )
    return [image_out, text_out, *grads.values()]


def not_written(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_is_written_and_nothing_else(simd, dtype, separate):
    buffers = []

    def guarded(shape, dtype):
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 128,), 7.0, dtype=dtype))
        buffers[-1][64:-64] = torch.nan
        return buffers[-1][64:-64].view(shape)

    tensors = inputs(dtype=dtype, separate=separate)
    found = kernel(tensors, guarded)
    assert len(buffers) == 2 + len(tensors)
    for tensor, buffer in zip(found, buffers, strict=True):
        assert (buffer[:64] == 7).all() and (buffer[-64:] == 7).all()
        assert tensor.isfinite().all()


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_neighbouring_memory_is_read(simd, dtype, separate):
    # Every number around the views is NaN: one of them read into a result would show.
    tensors, views = inputs(dtype=dtype, separate=separate), {}
    for name, tensor in tensors.items():
        batch, rows, width = tensor.shape
        wide = torch.full((batch + 2, rows + 2, width + 40), torch.nan, dtype=dtype)
        views[name] = wide[1:-1, 1:-1, 20:-20]
        views[name].copy_(tensor)
    for ours, theirs in zip(kernel(views, not_written), kernel(tensors, not_written), strict=True):
        assert torch.equal(ours, theirs)


def test_simd_levels_agree():
    before, found = _cpu.simd_level(), []
    try:
        for level in LEVELS:
            _cpu.set_simd_level(level)
            found.append(kernel(inputs(width=64), not_written))
    finally:
        _cpu.set_simd_level(before)
    assert "portable" in LEVELS
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_direction_alone_has_the_bits_of_both():
    tensors = inputs()
    both = kernel(tensors, not_written)
    image = {name: tensors[name] for name in ("image_query", "text_key", "text_value")}
    out = not_written(both[0].shape, torch.float32)
    _cpu.cross_modal_attention_forward(image_out_ptr=out.data_ptr(), text_out_ptr=0, **arguments(image))
    assert torch.equal(out, both[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, r"batch: expected 1 \.\. 2\^31 - 1, got 0"),
        ({"pixels": 0}, "pixels: expected 1"),
        ({"pixels": 2**31}, "pixels: expected 1"),
        ({"words": -1}, "words: expected 1"),
        ({"heads": 0}, "heads: expected 1"),
        ({"heads": 5}, "width: expected a multiple of the 5 heads, got 24"),
        ({"width": 0}, "width: expected at least 1"),
        ({"width": -2}, "width: expected 0"),
        ({"text_value_width": 0}, "text_value_width: expected 0 without text_value only"),
        ({"image_value_width": 0}, "image_value_width: expected 0 without image_value only"),
        ({"pixels": 2**31 - 1, "batch": 2**31 - 1}, "width: expected the image tensors to be addressable"),
        ({"words": 2**31 - 1, "batch": 2**31 - 1}, "width: expected the text tensors to be addressable"),
        ({"scale": 0.0}, "scale: expected a finite number above 0"),
        ({"scale": float("nan")}, "scale: expected a finite number above 0"),
        ({"scale": float("inf")}, "scale: expected a finite number above 0"),
        ({"threads": 0}, r"threads: expected 1 \.\. 4096, got 0"),
        ({"dtype": 4}, r"dtype: expected 0 \(float32\)"),
        ({"image_query": (0, 0, 0)}, "image_query: expected text_key beside it and only then, got 0"),
        ({"text_key": (0, 0, 0)}, "image_query: expected text_key beside it and only then, got 1"),
        ({"image_key": (0, 0, 0)}, "image_key: expected text_query beside it and only then, got 0"),
        ({"image_value": (0, 0, 0)}, "image_value: expected it beside image_key"),
        ({"text_value": (0, 0, 0)}, "text_value: expected it beside image_query when image_key is given"),
        ({"image_key": (6, 8, 8)}, "image_key: expected an address aligned for its dtype, got 2"),
        ({"text_value": (8, 8, -8)}, "text_value: expected strides of at least 0, got -8"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    tensors = inputs()
    call = arguments(tensors) | change
    with pytest.raises(ValueError, match=message):
        _cpu.cross_modal_attention_forward(image_out_ptr=8, text_out_ptr=8, **call)
    grads = {f"grad_{name}_ptr": 8 for name in NAMES}
    with pytest.raises(ValueError, match=message):
        _cpu.cross_modal_attention_backward(grad_image_out=(8, 8, 8), grad_text_out=(8, 8, 8), **grads, **call)


def test_forms_that_do_not_exist_are_refused():
    for given in (
        ("image_query", "text_key"),
        ("image_query", "text_key", "text_query", "image_key", "image_value"),
        ("text_query", "image_key"),
        ("text_value", "text_query", "image_key", "image_value"),
        (),
    ):
        call = arguments(inputs()) | {name: (0, 0, 0) for name in NAMES if name not in given}
        call["text_value_width"] *= "text_value" in given
        call["image_value_width"] *= "image_value" in given
        with pytest.raises(ValueError, match="expected"):
            _cpu.cross_modal_attention_forward(image_out_ptr=8, text_out_ptr=8, **call)


def test_results_and_gradients_belong_to_their_values():
    tensors = inputs()
    call = arguments(tensors)
    with pytest.raises(ValueError, match="image_out_ptr: expected an address, got 0"):
        _cpu.cross_modal_attention_forward(image_out_ptr=0, text_out_ptr=8, **call)
    image = arguments({name: tensors[name] for name in ("image_query", "text_key", "text_value")})
    with pytest.raises(ValueError, match="text_out_ptr: expected 0, for lack of values, got 1"):
        _cpu.cross_modal_attention_forward(image_out_ptr=8, text_out_ptr=8, **image)
    nothing = {f"grad_{name}_ptr": 0 for name in NAMES}
    for name, there in (("text_query", "grad_image_out"), ("text_key", "grad_text_out")):
        wanted = nothing | {f"grad_{name}_ptr": 8}
        grads = {"grad_image_out": (0, 0, 0), "grad_text_out": (0, 0, 0), there: (8, 8, 8)}
        with pytest.raises(ValueError, match=f"grad_{name}_ptr: expected 0: nothing flows into this gradient"):
            _cpu.cross_modal_attention_backward(**grads, **wanted, **call)
    with pytest.raises(ValueError, match="grad_text_out: expected image_value beside it"):
        _cpu.cross_modal_attention_backward(grad_image_out=(8, 8, 8), grad_text_out=(8, 8, 8), **nothing, **image)
