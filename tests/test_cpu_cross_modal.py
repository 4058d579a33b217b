"""The C++ kernels of cross-modal attention at the extension's edge: memory they may touch, sizes they refuse."""

from __future__ import annotations

import pytest
import torch

from magnet_fast import _cpu
from magnet_fast.ops._view import view

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


def arguments(tensors, **changes):
    """Of a call of the extension, for tensors by name."""
    found = {name: view(tensors.get(name)) for name in NAMES}
    return found | {"text_mask": None, "heads": HEADS, "scale": 0.3, "threads": 1} | changes


def kernel(tensors, allocate, **changes):
    """Both results and the gradients of all tensors, from output gradients of ones."""
    call = arguments(tensors, **changes)
    dtype = tensors["image_query"].dtype
    image_out = allocate((BATCH, PIXELS, tensors["text_value"].shape[2]), dtype)
    text_out = allocate((BATCH, WORDS, tensors["image_value"].shape[2]), dtype)
    _cpu.cross_modal_attention_forward(image_out=view(image_out), text_out=view(text_out), **call)
    grads = {name: allocate(tensor.shape, dtype) for name, tensor in tensors.items()}
    ones = [torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype) for out in (image_out, text_out)]
    _cpu.cross_modal_attention_backward(
        grad_image_out=view(ones[0]),
        grad_text_out=view(ones[1]),
        **{f"grad_{name}": view(grads.get(name)) for name in NAMES},
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
    _cpu.cross_modal_attention_forward(image_out=view(out), text_out=None, **arguments(image))
    assert torch.equal(out, both[0])


def fake(*sizes, address=64, strides=None, dtype=0):
    """A contiguous tensor that is not there, but for its description."""
    dense = tuple(torch.empty(sizes, device="meta").stride()) if strides is None else strides
    return address, sizes, dense, dtype


IMAGE, TEXT = (BATCH, PIXELS, 24), (BATCH, WORDS, 24)
HUGE = 2**31 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_query": fake(0, PIXELS, 24)}, "text_key: expected size 0 in dimension 0|image_query: expected sizes"),
        ({"image_query": fake(BATCH, 0, 24)}, "image_query: expected sizes of at least 1"),
        (
            {"image_query": fake(BATCH, -1, 24, strides=(24, 24, 1))},
            "image_query: expected sizes of at least 0",
        ),
        ({"image_query": fake(BATCH, PIXELS)}, "image_query: expected a tensor of 3 dimensions, got 2"),
        ({"image_key": fake(BATCH, 36, 24)}, "image_key: expected size 37 in dimension 1, got 36"),
        ({"text_key": fake(BATCH, WORDS, 22)}, "text_key: expected size 24 in dimension 2, got 22"),
        ({"text_value": fake(BATCH, 4, 6)}, "text_value: expected size 5 in dimension 1, got 4"),
        ({"image_value": fake(3, PIXELS, 34)}, "image_value: expected size 2 in dimension 0, got 3"),
        ({"text_value": fake(BATCH, WORDS, 0)}, "text_value: expected sizes of at least 1"),
        ({"text_query": fake(*TEXT, dtype=1)}, "text_query: expected dtype 0"),
        ({"heads": 0}, "heads: expected a divisor of the 24 channels of image_query, got 0"),
        ({"heads": 5}, "heads: expected a divisor of the 24 channels of image_query, got 5"),
        ({"scale": 0.0}, "scale: expected a finite number above 0"),
        ({"scale": float("nan")}, "scale: expected a finite number above 0"),
        ({"scale": float("inf")}, "scale: expected a finite number above 0"),
        ({"threads": 0}, r"threads: expected 1 \.\. 4096, got 0"),
        ({"image_query": fake(*IMAGE, dtype=4)}, r"image_query: expected dtype 0 \(float32\).*got 4"),
        ({"image_query": None}, "image_query: expected text_key beside it and only then, got 0"),
        ({"text_key": None}, "image_query: expected text_key beside it and only then, got 1"),
        ({"image_key": None}, "image_key: expected text_query beside it and only then, got 0"),
        ({"image_value": None}, "image_value: expected it beside image_key"),
        ({"text_value": None}, "text_value: expected it beside image_query when image_key is given"),
        ({"image_key": fake(*IMAGE, address=6)}, "image_key: expected an address aligned for its dtype, got 2"),
        ({"image_key": fake(*IMAGE, address=0)}, "image_key: expected the address of a tensor"),
        ({"text_value": fake(BATCH, WORDS, 6, strides=(30, -6, 1))}, "text_value: expected strides of at least 0"),
        ({"text_value": fake(BATCH, WORDS, 6, strides=(60, 12, 2))}, "text_value: expected stride 1 in dimension 2"),
        ({"text_mask": fake(BATCH, WORDS)}, "text_mask: expected dtype 4"),
        ({"text_mask": fake(BATCH, PIXELS, dtype=4)}, "text_mask: expected size 5 in dimension 1, got 37"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    assert_refused(arguments(inputs()) | change, message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((HUGE + 1, 1), r"pixels: expected at most 2\^31 - 1"),
        ((HUGE, 1), "pixels: expected the image tensors to be addressable"),
        ((1, HUGE), "words: expected the text tensors to be addressable"),
    ],
)
def test_sizes_that_cannot_be_addressed_are_refused(sizes, message):
    pixels, words = sizes
    image, text = ((HUGE, rows, 24) for rows in (pixels, words))
    call = {name: fake(*(image if name.startswith("image") else text), strides=(0, 0, 1)) for name in NAMES}
    assert_refused(arguments(inputs()) | call, message)


def assert_refused(call, message):
    image, text = fake(BATCH, PIXELS, 6), fake(BATCH, WORDS, 34)
    with pytest.raises(ValueError, match=message):
        _cpu.cross_modal_attention_forward(image_out=image, text_out=text, **call)
    grads = {f"grad_{name}": None for name in NAMES}
    with pytest.raises(ValueError, match=message):
        _cpu.cross_modal_attention_backward(grad_image_out=image, grad_text_out=text, **grads, **call)


def test_forms_that_do_not_exist_are_refused():
    for given in (
        ("image_query", "text_key"),
        ("image_query", "text_key", "text_query", "image_key", "image_value"),
        ("text_query", "image_key"),
        ("text_value", "text_query", "image_key", "image_value"),
        (),
    ):
        assert_refused(arguments(inputs()) | {name: None for name in NAMES if name not in given}, "expected")


def test_results_and_gradients_belong_to_their_values():
    tensors = inputs()
    call = arguments(tensors)
    image_out, text_out = fake(BATCH, PIXELS, 6), fake(BATCH, WORDS, 34)
    with pytest.raises(ValueError, match="image_out: expected a tensor, got 0"):
        _cpu.cross_modal_attention_forward(image_out=None, text_out=text_out, **call)
    with pytest.raises(ValueError, match="text_out: expected size 5 in dimension 1, got 37"):
        _cpu.cross_modal_attention_forward(image_out=image_out, text_out=fake(BATCH, PIXELS, 34), **call)
    image = arguments({name: tensors[name] for name in ("image_query", "text_key", "text_value")})
    with pytest.raises(ValueError, match="text_out: expected None, for lack of values, got 1"):
        _cpu.cross_modal_attention_forward(image_out=image_out, text_out=text_out, **image)
    nothing = {f"grad_{name}": None for name in NAMES}
    given = {"grad_image_out": image_out, "grad_text_out": text_out}
    for name, there in (("text_query", "grad_image_out"), ("text_key", "grad_text_out")):
        wanted = nothing | {f"grad_{name}": fake(*TEXT)}
        grads = {result: given[result] if result == there else None for result in given}
        with pytest.raises(ValueError, match=f"grad_{name}: expected None: nothing flows into this gradient"):
            _cpu.cross_modal_attention_backward(**grads, **wanted, **call)
    with pytest.raises(ValueError, match="grad_image_key: expected size 37 in dimension 1, got 5"):
        _cpu.cross_modal_attention_backward(**given, **(nothing | {"grad_image_key": fake(*TEXT)}), **call)
    with pytest.raises(ValueError, match="grad_text_out: expected image_value beside it"):
        _cpu.cross_modal_attention_backward(**given, **nothing, **image)
