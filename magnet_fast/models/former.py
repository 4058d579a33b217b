"""Weights written before models had parts by name (format 1): their configuration and names, brought up to date."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NAMES = [
    (re.compile(r"(alignment|fusions)\.(.*)"), r"fusion.stages.\2"),
    (re.compile(r"mask_decoder\.(query_feature|query_embed|level_embed)\.weight"), r"head.mask_decoder.\1"),
    (re.compile(r"(pixel_decoder|mask_decoder)\.(.*)"), r"head.\1.\2"),
    (re.compile(r"decoder\.(.*)"), r"head.\1"),
]
# The last stage's gate, whose stream nothing reads, and the projection that now belongs to the alignment loss.
_DROPPED = re.compile(r"(alignment\.3\.image_gate|fusions\.3\.gate|text_projection)\..*")


def is_former(entries: Mapping[str, Any]) -> bool:
    """Whether a configuration is of that time."""
    return "fusion" not in entries


def present_config(
    entries: Mapping[str, Any], size: int | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """A configuration of that time with parts by name.

    Args:
        entries: as it was stored.
        size, max_tokens: of images and expressions, which stood beside it.
    """
    image = {"kind": "swin", **entries["image"]}
    given = {"size": size, "max_tokens": max_tokens}
    common = {
        "architecture": entries["architecture"],
        "image": image,
        "input": {key: value for key, value in given.items() if value is not None},
    }
    if entries["architecture"] == "lavt":
        fusion = {"kind": "pwam", "heads": entries["fusion_heads"], "dropout": entries["dropout"]}
        return {
            **common,
            "text": {"kind": "bert", **entries["text"]},
            "fusion": fusion,
            "head": {"kind": "topdown"},
        }
    alignment = dict(entries["alignment"])
    form, heads = alignment.pop("kind"), alignment.pop("fusion_heads")
    return {
        **common,
        "text": {"kind": "bert", "schedule": "slices", **entries["text"]},
        "fusion": {"kind": "exchange", "form": form, "heads": heads, **alignment},
        "head": {"kind": "mask2former", **entries["decoder"]},
    }


def present_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of that time under the present names, without what no model holds any more."""
    renamed = {}
    for name, tensor in state.items():
        if _DROPPED.fullmatch(name):
            continue
        for pattern, new in _NAMES:
            if match := pattern.fullmatch(name):
                name = match.expand(new)
                break
        renamed[name] = tensor
    return renamed
