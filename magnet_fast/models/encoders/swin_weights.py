"""Pretrained weights of Swin, by published name or local path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import timm
from torch import Tensor, nn

from magnet_fast.models.files import read_contents
from magnet_fast.models.state import unreachable
from magnet_fast.models.wrapping import part_of, unwrap

# The ImageNet-22k weights that the papers of this family start from, by (embed_dim, depth of stage 3).
_NAMES = {
    (96, 6): "swin_tiny_patch4_window7_224.ms_in22k",
    (96, 18): "swin_small_patch4_window7_224.ms_in22k",
    (128, 18): "swin_base_patch4_window12_384.ms_in22k",
}


def published_swin(embed_dim: int, depths: tuple[int, ...]) -> str:
    """timm's name of the published weights of this size; ValueError where there are none."""
    name = _NAMES.get((embed_dim, depths[2]))
    if name is None:
        raise ValueError(
            f"no published Swin has embed_dim {embed_dim} and depths {depths}: "
            "name weights with pretrained={'image': ..., 'text': ...} or build with pretrained=False"
        )
    return name


def read_swin(name: str, window_size: int) -> dict[str, Tensor]:
    """Weights for a `SwinEncoder` of a window from a timm name, or a file of safetensors or torch.save.

    Raises:
        ValueError: neither a file nor a name that timm knows, or weights that cannot be had.
    """
    return swin_from_timm(_read(name), window_size)


def swin_from_timm(state: Mapping[str, Tensor], window_size: int) -> dict[str, Tensor]:
    """Names of timm's Swin or of Microsoft's files → `SwinEncoder`'s; bias tables resized to `window_size`.

    timm keeps a stage's patch merging at the start of the next stage, Microsoft at the end of its own.
    """
    microsoft = "layers.0.downsample.norm.weight" in state
    renamed = {}
    for name, tensor in state.items():
        if re.search(r"relative_position_index|attn_mask", name) or re.match(r"(head|norm)\.", name):
            continue
        name = name.replace("attn.relative_position_bias_table", "attention.bias_table")
        name = name.replace(".attn.", ".attention.")
        merging = re.fullmatch(r"layers\.(\d)\.downsample\.(.*)", name)
        if merging:
            stage = int(merging.group(1)) - (0 if microsoft else 1)
            name = f"stages.{stage}.downsample.{merging.group(2)}"
        name = re.sub(r"^layers\.", "stages.", name)
        renamed[name] = _resize_table(tensor, window_size) if name.endswith("bias_table") else tensor
    return renamed


def _resize_table(table: Tensor, window_size: int) -> Tensor:
    """((2w−1)², h) resized bicubically to another window, as is usual when the window grows."""
    side, wanted = round(table.shape[0] ** 0.5), 2 * window_size - 1
    if side == wanted:
        return table
    grid = table.T.reshape(1, -1, side, side).float()
    grid = nn.functional.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return grid.reshape(-1, wanted * wanted).T.contiguous().to(table.dtype)


def _read(name: str) -> Mapping[str, Tensor]:
    if os.sep in name or Path(name).exists():
        if not Path(name).is_file():
            raise ValueError(f"image weights {name!r}: no such file")
        return part_of(unwrap(read_contents(name), f"image weights {name!r}"), "patch_embed.proj.weight")
    if not timm.is_model(name):
        raise ValueError(f"image weights {name!r}: neither a file nor a model that timm knows")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable("image", name, error) from error
