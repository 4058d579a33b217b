"""Pretrained Swin and BERT weights, by published name or local path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel

from .released import load_strictly, read_checkpoint

# The ImageNet-22k weights that the papers of this family start from, by (embed_dim, depth of stage 3).
_SWIN_NAMES = {
    (96, 6): "swin_tiny_patch4_window7_224.ms_in22k",
    (96, 18): "swin_small_patch4_window7_224.ms_in22k",
    (128, 18): "swin_base_patch4_window12_384.ms_in22k",
}
_BERT_NAME = "bert-base-uncased"


def load_pretrained(model: nn.Module, sources: Mapping[str, str]) -> None:
    """Load Swin into `model.image_encoder` and BERT into `model.text_encoder`.

    Args:
        sources: {"image": timm name, .safetensors or .pth file; "text": transformers name or folder}; an entry
            that is absent takes the published default of the model's size.

    Raises:
        ValueError: an unknown entry, a size without a published default, weights that do not fit or that neither
            the network nor a cache has.
    """
    unknown = sorted(set(sources) - {"image", "text"})
    if unknown:
        raise ValueError(f"pretrained has the unknown entry {unknown[0]!r}; known: 'image', 'text'")
    image = model.config.image
    default = _SWIN_NAMES.get((image.embed_dim, image.depths[2]))
    name = sources.get("image", default)
    if name is None:
        raise ValueError(
            f"no published Swin has embed_dim {image.embed_dim} and depths {image.depths}: "
            "name weights with pretrained={'image': ..., 'text': ...} or build with pretrained=False"
        )
    swin = _read_swin(name)
    load_strictly(model.image_encoder, swin_from_timm(swin, image.window_size), f"image weights {name!r}")
    text_name = sources.get("text", _BERT_NAME)
    try:
        bert = BertModel.from_pretrained(text_name, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        raise ValueError(_unreachable("text", text_name, error)) from error
    load_strictly(model.text_encoder.bert, bert.state_dict(), f"text weights {text_name!r}")


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


def _read_swin(name: str) -> Mapping[str, Tensor]:
    if os.sep in name or Path(name).exists():
        if not Path(name).is_file():
            raise ValueError(f"image weights {name!r}: no such file")
        contents = load_file(name) if name.endswith(".safetensors") else read_checkpoint(name)
        return contents.get("model", contents)
    if not timm.is_model(name):
        raise ValueError(f"image weights {name!r}: neither a file nor a model that timm knows")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(_unreachable("image", name, error)) from error


def _unreachable(kind: str, name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"pretrained {kind} weights {name!r} could not be loaded: {reason} "
        f"Neither network nor cache has them, or the name is wrong: give a local path "
        f"(pretrained={{'{kind}': PATH}}) or build with pretrained=False."
    )
