"""TV-Net's enrichment, around any fusion: before words come, a map reads that of another image, found by the sentence.

In the style of TV-Net (ACM MM 2021), of which an abstract and a figure are public. Stated: maps of the last three
stages are enriched with those of the most relevant image of a pool, by the same encoder. How they read it, its 12×12
grid and the gate that starts closed are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part, read_part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.exchange import averaged
from magnet_fast.models.fusion.pixel_word import Gate

REFERENCE = "reference_image"
"""In the context: float (B, 3, S, S), prepared as images are; zeros where there is none."""
_FINEST = 8  # stride of the maps that are enriched: Res3 and deeper


@part
class EnrichConfig(FusionConfig):
    """Another fusion, `inner`, on enriched maps of stride 8 and coarser."""

    kind: Literal["enrich"] = "enrich"
    inner: Annotated[SerializeAsAny[FusionConfig], read_part("fusion")]
    side: int = Field(12, gt=0, description="of the grid that the other image's maps are averaged to")

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        self.inner.check(image, text)
        if image.strides[-1] < _FINEST:
            raise ValueError(
                f"fusion: enrich reads maps of stride {_FINEST} and coarser; the image encoder's are {image.strides}"
            )

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return self.inner.channels(image)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return self.inner.strides(image)

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        return self.inner.tokens(image)

    def build(self, image: ImageConfig, text: TextConfig) -> Enrich:
        return Enrich(self, image, text)


class Enrich(Fusion):
    """The other image passes the same encoder once, without words. Without one the inner fusion works alone."""

    def __init__(self, config: EnrichConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        self.inner: Fusion = config.inner.build(image, text)
        self.needs = (REFERENCE, *self.inner.needs)
        self.optional = (REFERENCE, *self.inner.optional)
        self.side = config.side
        self.stages = nn.ModuleDict(
            {
                str(stage): Enrichment(channels)
                for stage, (channels, stride) in enumerate(zip(image.channels, image.strides, strict=True))
                if stride >= _FINEST
            }
        )

    def start(self, maps_of: Callable[[Tensor], list[Tensor]], context: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """The other images' maps on the grid, by stage, with which of them are there, (B,); None without a context."""
        image, inner = context.get(REFERENCE), self.inner.start(maps_of, context)
        if image is None:
            return None, inner
        if not image.is_floating_point() or image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"context[{REFERENCE!r}] is {tuple(image.shape)} of {image.dtype}; expected float (B, 3, S, S)"
            )
        maps = maps_of(image)
        grids = {stage: averaged(maps[int(stage)], self.side) for stage in self.stages}
        return (grids, image.flatten(1).any(dim=1)), inner

    def forward(self, i: int, x: Tensor, words: Words, carry: tuple[Any, Any], context: Mapping[str, Tensor]) -> Step:
        reference, inner = carry
        if reference is not None and str(i) in self.stages:
            grids, there = reference
            x = self.stages[str(i)](x, grids[str(i)], there)
        step = self.inner(i, x, words, inner, context)
        return step._replace(carry=(reference, step.carry))


class Enrichment(nn.Module):
    """x + Gate(attention of x over the other map): (B, H, W, C), (B, N, C) and (B,) bool to (B, H, W, C).

    Where nothing is there, x stays as it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.gate = Gate(channels, "relu")

    def forward(self, x: Tensor, other: Tensor, there: Tensor) -> Tensor:
        read, _ = ops.cross_modal_attention(
            self.query(x.flatten(1, 2)),
            self.key(other),
            self.value(other),
            text_mask=there[:, None].expand(-1, other.shape[1]),
        )
        return self.gate(x, read.unflatten(1, x.shape[1:3]))
