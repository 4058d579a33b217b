"""Small inputs of every operator, and the comparisons that the tests share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from magnet_fast import ops
from magnet_fast.ops import _registry

WORDS = torch.tensor([[True, True, False], [False, False, False]])
"""One sentence of two words and one with none."""


@dataclass
class Case:
    """A call of one public operator, as a function of the tensors that get a gradient."""

    operator: str
    leaves: list[Tensor]
    arguments: Callable[..., tuple[tuple, dict]]
    """leaves -> positional and keyword arguments of the public function"""

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The outputs that there are, from the public function."""
        args, kwargs = self.arguments(*(leaves or self.leaves))
        return outputs_of(getattr(ops, self.operator)(*args, **kwargs))

    def registered(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        """The same function by way of the registered operators, for a backend of choice."""
        run = importlib.import_module(f"magnet_fast.ops._{self.operator}")._run
        return lambda *leaves: outputs_of(run(*self.normalised(*leaves), backend))

    def normalised(self, *leaves: Tensor) -> tuple:
        """What the registered operators take, but for the backend's name."""
        args, kwargs = self.arguments(*(leaves or self.leaves))
        return _registry._prepare[self.operator](*args, **kwargs)

    def gradients(self, function: Callable[..., tuple[Tensor, ...]] | None = None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(weighted_sum((function or self)(*self.leaves)), self.leaves)


def run(case: Case, backend: str) -> tuple[Tensor, ...]:
    """Output and every gradient."""
    with ops.backend(backend):
        return (*case(), *case.gradients())


def in_float64(case: Case) -> Case:
    return Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)


def outputs_of(result: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    result = result if isinstance(result, tuple) else (result,)
    return tuple(out for out in result if out is not None and out.numel())


def weighted_sum(outputs: tuple[Tensor, ...]) -> Tensor:
    """Every element of every output with a weight of its own."""
    return sum((out * weights_like(out)).sum() for out in outputs)


def weights_like(out: Tensor) -> Tensor:
    """From 0.5 to 1.5, rounded last: torch 2.14 counts float16's steps in float16."""
    return torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def window_case(
    *,
    batch: int = 2,
    size: tuple[int, int] = (5, 4),
    window: tuple[int, int] = (2, 3),
    shift: tuple[int, int] = (1, 2),
    heads: int = 2,
    d: int = 2,
    padding: bool = True,
    pad_first: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    leaves = [
        leaf(batch, *size, 3 * heads * d, dtype=dtype, seed=1),
        leaf((2 * window[0] - 1) * (2 * window[1] - 1), heads, dtype=dtype, seed=2),
    ]
    if padding:
        leaves.append(leaf(3 * heads * d, dtype=dtype, seed=3))

    def arguments(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None = None) -> tuple[tuple, dict]:
        named = {"num_heads": heads, "window_size": window, "shift": shift, "pad_qkv": pad_qkv}
        return (qkv, bias_table), {**named, "pad_first": pad_first}

    return Case("window_attention", leaves, arguments)


def relative_case(
    *,
    batch: int = 2,
    size: tuple[int, int] = (5, 4),
    window: tuple[int, int] | None = (2, 3),
    heads: int = 2,
    d: int = 2,
    padding: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """`window` None: the whole map is one."""
    sides = window or size
    leaves = [
        leaf(batch, *size, 3 * heads * d, dtype=dtype, seed=1),
        *(leaf(2 * side - 1, d, dtype=dtype, seed=2 + i) for i, side in enumerate(sides)),
    ]
    if padding:
        leaves.append(leaf(3 * heads * d, dtype=dtype, seed=4))

    def arguments(*given: Tensor) -> tuple[tuple, dict]:
        return given[:3], {"num_heads": heads, "window_size": window, "pad_qkv": (*given, None)[3]}

    return Case("relative_attention", leaves, arguments)


CROSS_MODAL_FORMS = {
    # image_query, text_key, text_value, text_query, image_key, image_value
    "separate": (1, 1, 1, 1, 1, 1),
    "shared": (1, 1, 1, 0, 0, 1),
    "pixels only": (1, 1, 1, 0, 0, 0),
    "words only": (0, 0, 0, 1, 1, 1),
    "words only, shared": (1, 1, 0, 0, 0, 1),
}


def cross_modal_case(
    form: str,
    *,
    pixels: int = 5,
    heads: int = 2,
    mask: Tensor | None = WORDS,
    dtype: torch.dtype = torch.float64,
) -> Case:
    words = 3 if mask is None else mask.shape[1]
    sides, widths = (pixels, words, words, words, pixels, pixels), (4, 4, 6, 4, 4, 2)
    present = CROSS_MODAL_FORMS[form]
    leaves = [
        leaf(2, side, width, dtype=dtype, seed=i)
        for i, (side, width, given) in enumerate(zip(sides, widths, present, strict=True))
        if given
    ]

    def arguments(*given: Tensor) -> tuple[tuple, dict]:
        tensors = iter(given)
        args = tuple(next(tensors) if wanted else None for wanted in present)
        return args, {"text_mask": mask, "num_heads": heads}

    return Case("cross_modal_attention", leaves, arguments)


def deformable_case(*, dtype: torch.dtype = torch.float64) -> Case:
    shapes, queries, heads, points = [(3, 4), (2, 1)], 3, 2, 2
    generator = torch.Generator().manual_seed(5)
    # Some points lie outside of the maps.
    locations = torch.rand(2, queries, heads, 2, points, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    leaves = [
        leaf(2, 14, heads, 3, dtype=dtype, seed=1),
        locations.to(dtype).requires_grad_(),
        leaf(2, queries, heads, 2, points, dtype=dtype, seed=2),
    ]
    return Case("deformable_attention", leaves, lambda value, *rest: ((value, shapes, *rest), {}))


def fused_deformable_case(*, boxes: bool = False, dtype: torch.dtype = torch.float64) -> Case:
    shapes, queries, heads, points = [(3, 4), (2, 1)], 3, 2, 2
    generator = torch.Generator().manual_seed(6)
    reference = torch.rand(2, queries, 2, 4 if boxes else 2, generator=generator, dtype=torch.float64)
    leaves = [
        leaf(2, 14, heads, 3, dtype=dtype, seed=1),
        reference.to(dtype).requires_grad_(),
        leaf(2, queries, heads, 2, points, 2, dtype=dtype, seed=2),
        leaf(2, queries, heads, 2, points, dtype=dtype, seed=3),
    ]
    return Case("fused_deformable_attention", leaves, lambda value, *rest: ((value, shapes, *rest), {}))


def contrastive_case(*, dtype: torch.dtype = torch.float64) -> Case:
    inside = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6]).bool()
    return Case(
        "pixel_contrastive_loss",
        [leaf(3, 6, 4, dtype=dtype)],
        lambda features: ((features, inside), {"temperature": 0.3}),
    )


def all_cases(dtype: torch.dtype = torch.float64) -> dict[str, Case]:
    """Every operator, and every form of those that have several."""
    return {
        "window": window_case(dtype=dtype),
        "window, roll first": window_case(pad_first=False, dtype=dtype),
        "window, no padding token": window_case(padding=False, dtype=dtype),
        "relative": relative_case(dtype=dtype),
        "relative, whole map": relative_case(window=None, padding=False, dtype=dtype),
        **{f"cross-modal, {form}": cross_modal_case(form, dtype=dtype) for form in CROSS_MODAL_FORMS},
        "deformable": deformable_case(dtype=dtype),
        "fused deformable": fused_deformable_case(dtype=dtype),
        "fused deformable, boxes": fused_deformable_case(boxes=True, dtype=dtype),
        "contrastive": contrastive_case(dtype=dtype),
    }


def assert_low_precision(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, what: str) -> None:
    """At most twice the error of the same maths done plainly in ``dtype``, and never more than an absolute cap."""
    step = torch.finfo(dtype).eps
    scale = truth.abs().max().item()
    error = (ours.double() - truth).abs().max().item()
    baseline = (plain.double() - truth).abs().max().item()
    assert error <= 2 * baseline + step * scale, f"{what}: error {error:.3g}, plain {dtype} has {baseline:.3g}"
    assert error <= 16 * step * scale, f"{what}: error {error:.3g} of values up to {scale:.3g}"


def random_cross_modal_case(
    form="separate", *, batch=2, pixels=37, words=7, heads=2, d=8, dv=8, dw=8, mask="some", dtype=torch.float32, seed=0
) -> Case:
    """`d`, `dv`, `dw`: widths of one head; `mask`: none, some words masked, or the last sentence without words."""
    generator = torch.Generator().manual_seed(seed)
    sides, widths = (pixels, words, words, words, pixels, pixels), (d, d, dv, d, d, dw)
    leaves = [
        torch.randn(batch, side, heads * width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for side, width, present in zip(sides, widths, CROSS_MODAL_FORMS[form], strict=True)
        if present
    ]
    text_mask = None
    if mask != "none":
        text_mask = torch.rand(batch, words, generator=generator) < 0.6
        text_mask[:, -1] = True
    if mask == "empty":
        text_mask[-1] = False

    def arguments(*tensors):
        tensors = iter(tensors)
        args = tuple(next(tensors) if present else None for present in CROSS_MODAL_FORMS[form])
        return args, {"text_mask": text_mask, "num_heads": heads}

    return Case("cross_modal_attention", leaves, arguments)


def random_deformable_case(
    *,
    batch=1,
    maps=((4, 3), (2, 2), (1, 1)),
    queries=5,
    heads=1,
    points=4,
    d=8,
    form="plain",
    reference=("B", "Q", "L"),
    spread=0.7,
    dtype=torch.float32,
    places=torch.float32,
) -> Case:
    """`form`: plain, fused, or boxes; `reference`: its dimensions; `spread`: how far from 0.5 the points lie."""
    generator = torch.Generator().manual_seed(queries + d + points)
    levels, total = len(maps), sum(h * w for h, w in maps)
    shape = (batch, queries, heads, levels, points)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    value, logits = normal(batch, total, heads, d), normal(*shape)
    leaves = [value.to(dtype)]
    if form == "plain":
        leaves += [(0.5 + spread * normal(*shape, 2)).to(places), logits.to(dtype)]
    else:
        sizes = {"B": batch, "Q": queries, "L": levels}
        boxes = normal(*(sizes[name] for name in reference), 4 if form == "boxes" else 2).sigmoid()
        leaves += [boxes.to(places), normal(*shape, 2).to(places), logits.to(dtype)]
    operator = "deformable_attention" if form == "plain" else "fused_deformable_attention"
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return Case(operator, leaves, lambda value, *rest: ((value, list(maps), *rest), {}))
