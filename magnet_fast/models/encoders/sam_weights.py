"""SAM's published weights: transformers' files by name or folder, and files of SAM's own code."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from magnet_fast.models.files import read_contents, read_safetensors
from magnet_fast.models.released import Rule, rename
from magnet_fast.models.state import unreachable
from magnet_fast.models.wrapping import unwrap

_PUBLISHED = {768: "facebook/sam-vit-base", 1024: "facebook/sam-vit-large", 1280: "facebook/sam-vit-huge"}

# SAM's own code's names to those of transformers, one after the other.
_OWN_NAMES = [
    (r"^image_encoder\.", "vision_encoder."),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(_mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
]


def published_sam(width: int) -> str:
    """The hub's name of the published weights with this width; ValueError where there are none."""
    if width not in _PUBLISHED:
        raise ValueError(
            f"no published SAM has embed_dim {width}: name weights with pretrained={{'image': ..., 'text': ...}} or "
            "build with pretrained=False"
        )
    return _PUBLISHED[width]


def read_sam(source: str) -> dict[str, Tensor]:
    """SAM's weights under transformers' names.

    Args:
        source: a name on the hub (its safetensors alone are read), a folder of transformers, or a file, also one of
            SAM's own code.

    Raises:
        ValueError: they cannot be had, or the file is damaged or something else.
    """
    path = Path(source)
    if path.is_dir():
        path = path / SAFE_WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(f"image weights {source!r}: the folder holds no {SAFE_WEIGHTS_NAME}")
    if path.is_file():
        state = unwrap(read_contents(path), f"image weights {source!r}")
    elif path.is_absolute() or source.startswith(os.curdir):
        raise ValueError(f"image weights {source!r}: no such file")
    else:
        try:
            path = cached_file(source, SAFE_WEIGHTS_NAME)
        except (OSError, ValueError) as error:
            raise unreachable("image", source, error) from error
        state = read_safetensors(path)[0]
    if any(name.startswith("image_encoder.") for name in state):
        return {_transformers_name(name): tensor for name, tensor in state.items()}
    return state


def part_of_sam(state: Mapping[str, Tensor], rules: list[Rule], what: str, part: str) -> dict[str, Tensor]:
    """The entries that some rule knows, renamed by it.

    Args:
        state: as `read_sam` gives it.
        rules: transformers' name to ours.
        what: the weights are called, in errors.
        part: of SAM, in errors.

    Raises:
        ValueError: there are none.
    """
    known = {name: value for name, value in state.items() if any(pattern.fullmatch(name) for pattern, _ in rules)}
    if not known:
        raise ValueError(f"{what} hold no {part} of SAM's, as transformers' SamModel and SAM's own code name it")
    return rename(known, rules, what, "SAM")


def resized_map(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Absolute positions (1, h, w, C) for a map of another size, bicubically with corners not aligned [our choice]."""
    if table.shape[1:3] == size:
        return table
    grid = _wide(table).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).to(table.dtype)


def resized_table(table: Tensor, rows: int) -> Tensor:
    """Relative positions (n, d) for distances along another side, linearly as SAM's own code resizes them."""
    if len(table) == rows:
        return table
    return F.interpolate(_wide(table).t()[None], size=rows, mode="linear")[0].t().to(table.dtype)


def _wide(table: Tensor) -> Tensor:
    """At least float32: interpolation in less would round twice."""
    return table if table.dtype == torch.float64 else table.float()


def _transformers_name(name: str) -> str:
    for old, new in _OWN_NAMES:
        name = re.sub(old, new, name)
    return name
