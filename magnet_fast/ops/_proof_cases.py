"""Small inputs of every operator, on which a kernel proves itself: odd sizes, several tiles, every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPERATORS = (
    "window_attention",
    "relative_attention",
    "cross_modal_attention",
    "deformable_attention",
    "fused_deformable_attention",
    "pixel_contrastive_loss",
)


class ProofCase(NamedTuple):
    """A call of a public operator.

    Attributes:
        leaves: float64 tensors on the CPU that get a gradient.
        arguments: of those, in any dtype and on any device, the positional and named arguments.
    """

    leaves: list[Tensor]
    arguments: Callable[..., tuple[tuple, dict[str, Any]]]


def cases(operator: str) -> list[ProofCase]:
    """Of an operator in `OPERATORS`; the same at every call."""
    generator = torch.Generator().manual_seed(len(operator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    return _MAKERS[operator](normal, generator)


Normal = Callable[..., Tensor]


def _window(normal: Normal, generator: torch.Generator) -> list[ProofCase]:
    def case(size, window, shift, heads, d, padding, pad_first) -> ProofCase:
        leaves = [normal(2, *size, 3 * heads * d), normal((2 * window[0] - 1) * (2 * window[1] - 1), heads)]
        leaves += [normal(3 * heads * d)] if padding else []

        def arguments(qkv: Tensor, table: Tensor, pad: Tensor | None = None) -> tuple[tuple, dict[str, Any]]:
            settings = {"num_heads": heads, "window_size": window, "shift": shift, "pad_first": pad_first}
            return (qkv, table), {**settings, "pad_qkv": pad}

        return ProofCase(leaves, arguments)

    return [
        case((13, 9), (7, 7), (3, 3), 2, 32, True, True),
        case((12, 11), (12, 12), (6, 6), 1, 16, True, False),
        case((5, 6), (2, 3), (1, 2), 3, 5, False, True),
    ]


def _relative(normal: Normal, generator: torch.Generator) -> list[ProofCase]:
    def case(size, window, heads, d, padding) -> ProofCase:
        leaves = [normal(2, *size, 3 * heads * d), *(normal(2 * side - 1, d) for side in window or size)]
        leaves += [normal(3 * heads * d)] if padding else []

        def arguments(*given: Tensor) -> tuple[tuple, dict[str, Any]]:
            return given[:3], {"num_heads": heads, "window_size": window, "pad_qkv": (*given, None)[3]}

        return ProofCase(leaves, arguments)

    return [case((9, 15), (6, 14), 2, 64, True), case((18, 5), None, 1, 20, False)]


def _cross_modal(normal: Normal, generator: torch.Generator) -> list[ProofCase]:
    def case(pixels, words, heads, d, shared, both) -> ProofCase:
        mask = torch.rand(2, words, generator=generator, device="cpu") < 0.7
        mask[0, 0], mask[1] = True, mask[1] & bool(both)  # where both ways are taken the second has a few words, too
        mask[1, -1] = both
        sides = (pixels, words, words) if not both else (pixels, words, words, pixels)
        sides = sides if shared or not both else (pixels, words, words, words, pixels, pixels)
        leaves = [normal(2, side, heads * d) for side in sides]

        def arguments(*given: Tensor) -> tuple[tuple, dict[str, Any]]:
            tensors = given if len(given) in (3, 6) else (*given[:3], None, None, given[3])
            settings = {"text_mask": mask.to(given[0].device), "num_heads": heads}
            return (*tensors, *([None] * (6 - len(tensors)))), settings

        return ProofCase(leaves, arguments)

    return [
        case(131, 20, 2, 32, True, True),
        case(70, 7, 1, 160, False, True),
        case(37, 33, 3, 12, False, False),
    ]


_WIDTHS = 16, 32
"""Of the heads in deformable attention; a Triton kernel is compiled for each, and models of 256 channels have 32."""


def _places(normal: Normal, width: int) -> tuple[list[tuple[int, int]], Tensor, Tensor, Tensor]:
    shapes, queries, heads, points = [(9, 7), (4, 5), (1, 2)], 11, 3, 4
    return (
        shapes,
        normal(2, 85, heads, width),
        normal(2, queries, heads, 3, points, 2),
        normal(2, queries, heads, 3, points),
    )


def _deformable(normal: Normal, generator: torch.Generator) -> list[ProofCase]:
    made = []
    for width in _WIDTHS:
        shapes, value, places, weights = _places(normal, width)
        # Some points lie outside of the maps.
        leaves = [value, 0.5 + 0.4 * places, weights]
        made.append(ProofCase(leaves, lambda value, *rest, shapes=shapes: ((value, shapes, *rest), {})))
    return made


def _fused_deformable(normal: Normal, generator: torch.Generator) -> list[ProofCase]:
    made = []
    for last, width in ((2, _WIDTHS[0]), (2, _WIDTHS[1]), (4, _WIDTHS[1])):
        shapes, value, offsets, logits = _places(normal, width)
        reference = normal(2, 11, 3, last).sigmoid()
        leaves = [value, reference, 2 * offsets, logits]
        made.append(ProofCase(leaves, lambda value, *rest, shapes=shapes: ((value, shapes, *rest), {})))
    return made


def _contrastive(normal: Normal, generator: torch.Generator) -> list[ProofCase]:
    def case(pixels: int, channels: int, normalize: bool) -> ProofCase:
        mask = torch.rand(2, pixels, generator=generator, device="cpu") < 0.4

        def arguments(features: Tensor) -> tuple[tuple, dict[str, Any]]:
            settings = {"temperature": 0.1 if normalize else 5.0, "normalize": normalize}
            return (features, mask.to(features.device)), settings

        return ProofCase([normal(2, pixels, channels)], arguments)

    return [case(133, 40, True), case(35, 7, False)]


_MAKERS: dict[str, Callable[[Normal, torch.Generator], list[ProofCase]]] = dict(
    zip(
        OPERATORS,
        (_window, _relative, _cross_modal, _deformable, _fused_deformable, _contrastive),
        strict=True,
    )
)
