"""Few trained parameters beside frozen ones: low-rank updates of attention, and bottlenecks.

LoRA: Hu et al., ICLR 2022; adapters: Houlsby et al., ICML 2019. Which projections they stand at, rank, scale and widths
are our choice: what RISAM's paper says of it could not be read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from magnet_fast.models.base import ReferringModel


class LowRank(nn.Module):
    """LoRA on the query and the value of a fused projection: W + (alpha / rank) B A for each of the two.

    A starts as a Linear's weight does, B at 0: at first nothing changes.

    Args:
        width: C, channels that go in, and of query, key and value each.
        rank: of the updates.
        alpha: their scale is alpha / rank.
    """

    def __init__(self, width: int, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.query_down, self.value_down = (nn.Linear(width, rank, bias=False) for _ in range(2))
        self.query_up, self.value_up = (nn.Linear(rank, width, bias=False) for _ in range(2))
        for down in (self.query_down, self.value_down):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for up in (self.query_up, self.value_up):
            nn.init.zeros_(up.weight)

    def forward(self, x: Tensor, qkv: Tensor) -> Tensor:
        """x (..., C) and its projection (..., 3 C), `[q | k | v]`, to the projection with the updates."""
        query, key, value = qkv.chunk(3, dim=-1)
        query = query + self.scale * self.query_up(self.query_down(x))
        value = value + self.scale * self.value_up(self.value_down(x))
        return torch.cat([query, key, value], dim=-1)

    @torch.no_grad()
    def fold(self, qkv: nn.Linear) -> None:
        """Add the updates to the weight of the projection itself."""
        query, _, value = qkv.weight.chunk(3)  # views
        query += self.scale * self.query_up.weight @ self.query_down.weight
        value += self.scale * self.value_up.weight @ self.value_down.weight


class Adapter(nn.Module):
    """A bottleneck, width → bottleneck → width with a GELU, whose last Linear starts at 0.

    forward takes and returns (..., C).
    """

    def __init__(self, width: int, bottleneck: int = 64) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


def merge(model: ReferringModel) -> ReferringModel:
    """Fold LoRA into the image encoder's projections, in place: fewer products, the same answers up to rounding.

    The model's configuration then says `tuning="frozen"`, so that it is saved and loaded as it is.

    Returns:
        The model itself.

    Raises:
        ValueError: its image encoder has no LoRA.
    """
    encoder = model.image_encoder
    tuning = getattr(model.config.image, "tuning", None)
    if tuning != "lora":
        raise ValueError(f"model: its image encoder has tuning {tuning!r}; expected 'lora', which alone can be merged")
    for module in encoder.modules():
        if isinstance(getattr(module, "lora", None), LowRank):
            module.lora.fold(module.qkv)
            module.lora = None
    image = model.config.image.model_copy(update={"tuning": "frozen"})
    model.config = model.config.model_copy(update={"image": image})
    return model
