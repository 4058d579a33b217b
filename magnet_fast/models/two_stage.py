"""In the style of two-stage multi-modal interaction: words and pixels stage by stage, then sentence and picture.

Only an abstract of it is public. Stated there: a cross-modal fusion of several levels between intermediate features of
both sides; then a global alignment that localises the whole object. Our choices: the exchange of MagNet's paper, both
ways, from the second stage on; the gate of `heads/global_gate.py`; the term `global_alignment`. No published number
stands for this model.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN


def _parts(swin: dict[str, Any], bert: dict[str, Any], width: int) -> dict[str, Any]:
    return {
        "image": swin,
        "text": {**bert, "schedule": "slices"},
        "fusion": {"kind": "exchange", "form": "xmha", "first": 1},
        "head": {"kind": "global_gate", "width": width},
    }


@register(
    "two_stage",
    presets={
        "two_stage_tiny": _parts(TINY_SWIN, TINY_BERT, 64),
        **{f"two_stage_{size}": _parts(SWIN_SIZES[size], {"kind": "bert"}, 256) for size in ("swin_t", "swin_b")},
    },
)
class TwoStage(ReferringModel):
    """BERT in quarters beside Swin's stages, exchanges after the last three; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
