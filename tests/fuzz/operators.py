"""The public operators with odd shapes, strides, dtypes and values: as the reference, or a ValueError or TypeError."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from magnet_fast import ops
from tests.fuzz.target import READ, REFUSED, Finding, Target, outcome_of

_DTYPES = [torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16]
_TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-9, torch.bfloat16: 8e-2, torch.float16: 1e-2}
_ODD = [
    None,
    True,
    0,
    -1,
    1,
    3,
    1.5,
    float("nan"),
    float("inf"),
    10**6,
    2**31,
    2**63,
    2**70,
    "4",
    (),
    (1,),
    (2, 2),
    (0, 3),
    (1, 2, 3),
    [],
    [2, 2],
]
_VALUES = [float("nan"), float("inf"), float("-inf"), 0.0, 1e30, -1e30, 1e-40]
_SENTINEL = 123.0
Arguments = dict[str, Any]


class FuzzTarget(Target):
    """A call with `auto` and the same one with the reference, forward and, for some, every gradient."""

    quick: ClassVar[int] = 200
    batch: ClassVar[int] = 5000
    long: ClassVar[int] = 100_000
    memory: ClassVar[int] = 4 << 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["MAGNET_FAST_PROOF"] = "skip"  # no kernel is proved here, and no answer written
        for name in _MAKERS:  # compiled and imported
            made = random.Random(name)
            for _ in range(5):
                _call(name, "auto", _MAKERS[name](made, torch.float32), 0)

    def try_one(self, draw: random.Random) -> str:
        name = draw.choice(list(_MAKERS))
        dtype = draw.choice(_DTYPES)
        arguments = _MAKERS[name](draw, dtype)
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[key] = _strided(draw, value)
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            key = draw.choice(list(arguments))
            arguments[key] = _changed(draw, arguments[key])
        with_gradients = draw.random() < 0.4
        before = {
            key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor) and _is_plain(value)
        }
        found: dict[str, list[Tensor]] = {}
        outcomes = {}
        for backend in ("auto", "reference"):
            outcomes[backend] = outcome_of(
                lambda backend=backend: found.update({backend: _call(name, backend, arguments, with_gradients)}),
                allowed=(ValueError, TypeError),
            )
        for key, value in before.items():
            if not torch.equal(torch.nan_to_num(value), torch.nan_to_num(arguments[key])):
                raise Finding(f"{name} changed its argument {key}")
        if outcomes["auto"] != outcomes["reference"]:
            raise Finding(f"{name}: {outcomes['auto']} by auto, {outcomes['reference']} by the reference")
        if outcomes["auto"] == REFUSED:
            return REFUSED
        _compare(name, found["auto"], found["reference"], arguments, with_gradients)
        return READ


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_meta


def _call(name: str, backend: str, arguments: Arguments, with_gradients: float) -> list[Tensor]:
    """The outputs and, if asked for, the gradient of each argument that has one."""
    given = dict(arguments)
    leaves = []
    if with_gradients:
        for key, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_sparse:
                given[key] = value.detach().requires_grad_()
                leaves.append(given[key])
    with ops.backend(backend):
        result = getattr(ops, name)(**given)
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out is not None]
        if not leaves:
            return outputs
        total = sum(
            (out.double() * torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out)).sum()
            for out in outputs
        )
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*(out.detach() for out in outputs), *(one for one in gradients if one is not None)]


def _compare(name: str, ours: list[Tensor], theirs: list[Tensor], arguments: Arguments, with_gradients: float) -> None:
    """Ours may be further from the reference than rounding allows where the reference itself is: a position that its
    low precision moves into another cell has another gradient."""
    if [(one.shape, one.dtype) for one in ours] != [(one.shape, one.dtype) for one in theirs]:
        raise Finding(f"{name}: other shapes or dtypes than the reference")
    tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if any(value.is_meta for value in tensors):
        return  # shapes are all that they have
    if not all(value.isfinite().all() and value.abs().max() < 100 for value in tensors):
        return  # infinities and NaN need not be the same ones
    if any(not 1e-3 <= arguments.get(key, 1) <= 100 for key in ("scale", "temperature") if arguments.get(key)):
        return  # what overflows need not do so in the same place
    tolerance = max(_TOLERANCE[value.dtype] for value in tensors)
    truth: list[Tensor] | None = None
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        allowed = tolerance * max(1.0, other.double().abs().max().item())
        worst = _distance(one, other)
        if worst <= allowed:
            continue
        truth = truth or _call(name, "reference", _in_float64(arguments), with_gradients)
        if not _distance(one, truth[place]) <= _distance(other, truth[place]):
            raise Finding(f"{name}: {worst:.3g} from the reference, {tuple(one.shape)} of {one.dtype}")


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def _in_float64(arguments: Arguments) -> Arguments:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def _strided(draw: random.Random, value: Tensor) -> Tensor:
    """The same values as another view: a part of something larger, transposed, or one number spread out."""
    change = draw.randrange(6)
    if change == 0 and value.dim():
        larger = torch.full([size + draw.randint(0, 2) for size in value.shape], _SENTINEL).to(value.dtype)
        view = larger[tuple(slice(0, size) for size in value.shape)]
        return view.copy_(value)
    if change == 1 and value.dim() > 1:
        a, b = draw.sample(range(value.dim()), 2)
        return value.transpose(a, b).contiguous().transpose(a, b)
    if change == 2 and value.dim():
        place = draw.randrange(value.dim())
        return value.narrow(place, 0, 1).expand(value.shape) if value.shape[place] else value
    if change == 3 and value.numel():
        storage = torch.full((value.numel() + 3,), _SENTINEL).to(value.dtype)
        storage[3:] = value.reshape(-1)
        return storage[3:].view(value.shape)
    return value


def _changed(draw: random.Random, value: Any) -> Any:
    if not isinstance(value, Tensor) or not _is_plain(value):
        return draw.choice(_ODD)
    change = draw.randrange(9)
    if change == 0:
        return draw.choice([None, 3, "x", [1.0], value.numpy() if value.dtype != torch.bfloat16 else None])
    if change == 1:
        return value.to(draw.choice([*_DTYPES, torch.int64, torch.bool, torch.complex64]))
    if change == 2 and value.dim():
        place = draw.randrange(value.dim())
        return value.narrow(place, 0, draw.randint(0, value.shape[place]))
    if change == 3:
        return value.unsqueeze(0) if draw.random() < 0.5 else value.flatten()
    if change == 4 and value.dim():
        return torch.cat([value, value], draw.randrange(value.dim()))
    if change == 5 and value.dim() > 1:
        return value.transpose(*draw.sample(range(value.dim()), 2))
    if change == 6:
        return draw.choice(
            [value.to_sparse() if value.dim() else value, torch.zeros(0), torch.tensor(1.0), value.to("meta")]
        )
    if value.is_floating_point() and value.numel():
        value = value.clone(memory_format=torch.contiguous_format)
        for _ in range(draw.choice([1, 5])):
            value.view(-1)[draw.randrange(value.numel())] = draw.choice(_VALUES)
    return value


def _normal(draw: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.getrandbits(32))).to(dtype)


def _table_dtype(draw: random.Random, dtype: torch.dtype) -> torch.dtype:
    return draw.choice([dtype, torch.float32]) if dtype in (torch.bfloat16, torch.float16) else dtype


def _window(draw: random.Random, dtype: torch.dtype) -> Arguments:
    heads, d = draw.randint(1, 4), draw.choice([1, 2, 3, 4, 8, 16, 32])
    window = draw.randint(1, 7), draw.randint(1, 7)
    qkv = _normal(draw, dtype, draw.randint(1, 2), draw.randint(1, 15), draw.randint(1, 15), 3 * heads * d)
    tables = _table_dtype(draw, dtype)
    return {
        "qkv": qkv,
        "bias_table": _normal(draw, tables, (2 * window[0] - 1) * (2 * window[1] - 1), heads),
        "num_heads": heads,
        "window_size": window,
        "shift": (draw.randrange(window[0]), draw.randrange(window[1])),
        "pad_qkv": draw.choice([None, _normal(draw, tables, 3 * heads * d)]),
        "scale": draw.choice([None, 0.5]),
        "pad_first": draw.random() < 0.5,
    }


def _relative(draw: random.Random, dtype: torch.dtype) -> Arguments:
    heads, d = draw.randint(1, 3), draw.choice([1, 3, 4, 8, 16, 32])
    height, width = draw.randint(1, 12), draw.randint(1, 12)
    window = draw.choice([None, (draw.randint(1, 7), draw.randint(1, 7))])
    sides, tables = window or (height, width), _table_dtype(draw, dtype)
    return {
        "qkv": _normal(draw, dtype, draw.randint(1, 2), height, width, 3 * heads * d),
        "rel_height": _normal(draw, tables, 2 * sides[0] - 1, d),
        "rel_width": _normal(draw, tables, 2 * sides[1] - 1, d),
        "num_heads": heads,
        "window_size": window,
        "pad_qkv": draw.choice([None, _normal(draw, tables, 3 * heads * d)]),
        "scale": draw.choice([None, 0.3]),
    }


def _cross_modal(draw: random.Random, dtype: torch.dtype) -> Arguments:
    batch, heads = draw.randint(1, 3), draw.randint(1, 3)
    pixels, words = draw.choice([1, 2, 7, 33, 100]), draw.choice([1, 2, 5, 17, 40])
    width, image_values, text_values = (heads * draw.choice([1, 2, 5, 8, 16]) for _ in range(3))
    form = draw.choice(
        [(1, 1, 1, 1, 1, 1), (1, 1, 1, 0, 0, 1), (1, 1, 1, 0, 0, 0), (0, 0, 0, 1, 1, 1), (1, 1, 0, 0, 0, 1)]
    )
    names = ("image_query", "text_key", "text_value", "text_query", "image_key", "image_value")
    sides = (pixels, words, words, words, pixels, pixels)
    widths = (width, width, text_values, width, width, image_values)
    tensors = {
        name: _normal(draw, dtype, batch, side, channels) if there else None
        for name, side, channels, there in zip(names, sides, widths, form, strict=True)
    }
    mask = torch.rand(batch, words, generator=torch.Generator().manual_seed(draw.getrandbits(32))) < draw.random()
    return {**tensors, "text_mask": draw.choice([None, mask]), "num_heads": heads, "scale": draw.choice([None, 0.2])}


def _maps(draw: random.Random) -> list[tuple[int, int]]:
    return [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(draw.randint(1, 4))]


def _deformable(draw: random.Random, dtype: torch.dtype) -> Arguments:
    maps, batch, heads, d = _maps(draw), draw.randint(1, 2), draw.randint(1, 3), draw.choice([1, 3, 8, 16])
    shape = batch, draw.randint(1, 9), heads, len(maps), draw.randint(1, 4)
    return {
        "value": _normal(draw, dtype, batch, sum(h * w for h, w in maps), heads, d),
        "spatial_shapes": maps,
        "sampling_locations": _normal(draw, _table_dtype(draw, dtype), *shape, 2) * draw.choice([0.3, 1, 50]) + 0.5,
        "attention_weights": _normal(draw, dtype, *shape),
    }


def _fused(draw: random.Random, dtype: torch.dtype) -> Arguments:
    maps, batch, heads, d = _maps(draw), draw.randint(1, 2), draw.randint(1, 3), draw.choice([1, 3, 8, 16])
    queries = draw.randint(1, 9)
    shape = batch, queries, heads, len(maps), draw.randint(1, 4)
    points = draw.choice([(queries,), (batch, queries), (batch, queries, len(maps))])
    return {
        "value": _normal(draw, dtype, batch, sum(h * w for h, w in maps), heads, d),
        "spatial_shapes": maps,
        "reference_points": _normal(draw, dtype, *points, draw.choice([2, 4])).sigmoid(),
        "sampling_offsets": _normal(draw, _table_dtype(draw, dtype), *shape, 2),
        "attention_logits": _normal(draw, _table_dtype(draw, dtype), *shape),
    }


def _contrastive(draw: random.Random, dtype: torch.dtype) -> Arguments:
    batch, pixels, channels = draw.randint(1, 3), draw.choice([1, 2, 9, 40]), draw.choice([1, 3, 8, 20])
    mask = torch.rand(batch, pixels, generator=torch.Generator().manual_seed(draw.getrandbits(32))) < draw.random()
    return {
        "features": _normal(draw, dtype, batch, pixels, channels),
        "mask": mask,
        "temperature": draw.choice([0.1, 0.5, 2.0]),
        "normalize": draw.random() < 0.7,
    }


_MAKERS: dict[str, Callable[[random.Random, torch.dtype], Arguments]] = {
    "window_attention": _window,
    "relative_attention": _relative,
    "cross_modal_attention": _cross_modal,
    "deformable_attention": _deformable,
    "fused_deformable_attention": _fused,
    "pixel_contrastive_loss": _contrastive,
}
