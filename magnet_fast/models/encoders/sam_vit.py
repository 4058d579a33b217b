"""Segment Anything's image encoder: a plain vision transformer on windows and, in a few layers, the whole map.

Kirillov et al., "Segment Anything", ICCV 2023 (arXiv 2304.02643); Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection", ECCV 2022. Its neck, which makes one map of it, belongs to what reads the map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers import trunc_normal_
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import ImageEncoder
from magnet_fast.models.config import ImageConfig, part
from magnet_fast.models.contract import MAX_INPUT_SIDE
from magnet_fast.models.encoders.sam_weights import (
    part_of_sam,
    published_sam,
    read_sam,
    resized_map,
    resized_table,
)
from magnet_fast.models.encoders.swin import Mlp
from magnet_fast.models.state import load_strictly
from magnet_fast.models.tuning import Adapter, LowRank

_PATCH = 16


@part
class SamVitConfig(ImageConfig):
    """SAM's ViT-B unless said.

    Taps and fine-tuning are our choice: the last three layers that see the whole map, and LoRA.
    """

    kind: Literal["sam_vit"] = "sam_vit"
    embed_dim: int = Field(768, gt=0)
    num_layers: int = Field(12, gt=0)
    num_heads: int = Field(12, gt=0)
    window_size: int = Field(14, gt=0, description="side of an attention window, in tokens")
    global_layers: tuple[int, ...] = Field((2, 5, 8, 11), description="layers whose window is the whole map")
    taps: tuple[int, ...] = Field((5, 8, 11), min_length=1, description="layers after which a map is given")
    image_size: int = Field(
        480,
        gt=0,
        le=MAX_INPUT_SIDE,
        multiple_of=_PATCH,
        description="side of the square that tables of positions are kept for",
    )
    tuning: Literal["lora", "adapter", "frozen", "full"] = Field(
        "lora", description="low-rank updates, bottlenecks beside the MLPs, nothing, or every weight is trained"
    )

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.embed_dim,) * len(self.taps)

    @property
    def strides(self) -> tuple[int, ...]:
        return (_PATCH,) * len(self.taps)

    def build(self) -> SamVit:
        return SamVit(self)

    @model_validator(mode="after")
    def _consistent(self) -> SamVitConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}")
        last = self.num_layers - 1
        if sorted(set(self.taps)) != list(self.taps) or self.taps[0] < 0 or self.taps[-1] != last:
            raise ValueError(f"taps={self.taps}; expected layers in order, each once, the last one {last}")
        if any(not 0 <= layer <= last for layer in self.global_layers):
            raise ValueError(f"global_layers={self.global_layers}; expected layers from 0 to {last}")
        return self


class SamVit(ImageEncoder):
    """Maps of one size, (B, ⌈H/16⌉, ⌈W/16⌉, C), after the layers that are tapped.

    Images are padded with zeros at the right and at the bottom to whole patches. Tables of positions are kept for one
    size, and resized for images of another one.
    """

    def __init__(self, config: SamVitConfig) -> None:
        super().__init__()
        self.config, self.channels, self.strides = config, config.channels, config.strides
        side = config.image_size // _PATCH
        self.patch_embed = nn.Conv2d(3, config.embed_dim, _PATCH, _PATCH)
        self.positions = nn.Parameter(torch.empty(1, side, side, config.embed_dim))
        trunc_normal_(self.positions, std=0.02)
        self.layers = nn.ModuleList(SamLayer(config, layer) for layer in range(config.num_layers))
        if config.tuning != "full":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(_is_beside(name))

    def start(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image = F.pad(image, (0, -width % _PATCH, 0, -height % _PATCH))
        x = self.patch_embed(image).permute(0, 2, 3, 1)
        return x + resized_map(self.positions, x.shape[1:3])

    def stage(self, i: int, stream: Tensor) -> Tensor:
        first = self.config.taps[i - 1] + 1 if i else 0
        for layer in self.layers[first : self.config.taps[i] + 1]:
            stream = layer(stream)
        return stream

    def load_pretrained(self, source: str | None) -> None:
        name = source or published_sam(self.config.embed_dim)
        self.load_sam(read_sam(name), f"image weights {name!r}")

    def load_sam(self, state: Mapping[str, Tensor], what: str) -> None:
        """Load the image encoder of SAM's weights, its tables of positions resized to `image_size`.

        Args:
            state: as `read_sam` gives it. LoRA and adapters stay as they are.
            what: they are called, in errors.

        Raises:
            ValueError: they are of another size, or hold no image encoder.
        """
        own = self.state_dict()
        found = part_of_sam(state, _RULES, what, "image encoder")
        given = dict(found)
        for name, table in given.items():
            if name == "positions" and table.ndim == 4:
                found[name] = resized_map(table, own[name].shape[1:3])
            layer = re.fullmatch(r"layers\.(\d+)\.attention\.rel_\w+", name)
            if layer and int(layer[1]) in self.config.global_layers and name in own:
                found[name] = resized_table(table, len(own[name]))
        self.resized = frozenset(name for name in found if found[name] is not given[name])
        load_strictly(self, {**{name: value for name, value in own.items() if _is_beside(name)}, **found}, what)


class SamLayer(nn.Module):
    """Pre-norm attention and MLP of four times the width, an adapter beside it where the configuration says so.

    forward takes and returns (B, H, W, C).
    """

    is_repeated_layer = True

    def __init__(self, config: SamVitConfig, index: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = SamAttention(config, whole=index in config.global_layers)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adapter = Adapter(width) if config.tuning == "adapter" else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        changed = x + self.mlp(y)
        return changed if self.adapter is None else changed + self.adapter(y)


class SamAttention(nn.Module):
    """Projections and tables of relative positions around `ops.relative_attention`.

    forward takes and returns (B, H, W, C).

    Args:
        config: of the encoder.
        whole: the window is the whole map.
    """

    def __init__(self, config: SamVitConfig, whole: bool) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.window_size = config.num_heads, None if whole else config.window_size
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.stacked = 3  # three projections in one weight: an optimiser of matrices takes them one by one
        self.proj = nn.Linear(width, width)
        rows = 2 * (config.image_size // _PATCH if whole else config.window_size) - 1
        self.rel_height, self.rel_width = (nn.Parameter(torch.zeros(rows, width // config.num_heads)) for _ in range(2))
        self.lora = LowRank(width) if config.tuning == "lora" else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window = self.window_size
        if window is not None:  # padded tokens are zero after the norm, and keys like the others
            x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        qkv = self.qkv(x)
        if self.lora is not None:
            qkv = self.lora(x, qkv)
        rows, columns = x.shape[1:3] if window is None else (window, window)
        attended = ops.relative_attention(
            qkv,
            resized_table(self.rel_height, 2 * rows - 1),
            resized_table(self.rel_width, 2 * columns - 1),
            num_heads=self.num_heads,
            window_size=window,
        )
        return self.proj(attended[:, :height, :width])


def _is_beside(name: str) -> bool:
    """Whether a parameter is one that fine-tuning adds."""
    return not {"lora", "adapter"}.isdisjoint(name.split("."))


_LAYER = r"vision_encoder\.layers\.(\d+)"
_RULES = [
    (re.compile(old), new)
    for old, new in [
        (r"vision_encoder\.patch_embed\.projection\.(.*)", r"patch_embed.\1"),
        (r"vision_encoder\.pos_embed", "positions"),
        (rf"{_LAYER}\.layer_norm(\d)\.(.*)", r"layers.\1.norm\2.\3"),
        (rf"{_LAYER}\.attn\.rel_pos_h", r"layers.\1.attention.rel_height"),
        (rf"{_LAYER}\.attn\.rel_pos_w", r"layers.\1.attention.rel_width"),
        (rf"{_LAYER}\.attn\.(.*)", r"layers.\1.attention.\2"),
        (rf"{_LAYER}\.mlp\.lin(\d)\.(.*)", r"layers.\1.mlp.fc\2.\3"),
    ]
]
