"""RISAM: Segment Anything, tuned by few parameters, whose decoder reads words that have read the pixels.

After Zhang, Liu, Yin, Yue, Yang, "RISAM: Referring Image Segmentation via Mutual-Aware Attention Features" (arXiv
2311.15727; first called MARIS). Nothing of it was released, and its method section could not be read: what the parts'
files call our choice is ours, and no score of the paper stands for this model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.base_weights import base_of
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.encoders.sam_vit import SamVit
from magnet_fast.models.encoders.sam_weights import part_of_sam, published_sam, read_sam
from magnet_fast.models.fusion.mutual import MutualFusion
from magnet_fast.models.heads.two_way import TwoWay
from magnet_fast.models.registry import register
from magnet_fast.models.released import rules
from magnet_fast.models.state import load_strictly

_PLACE = (r"(?:shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding", "place.matrix")
_FUSION = rules(
    "",
    [
        _PLACE,
        (r"vision_encoder\.neck\.conv1\.(.*)", r"enhance.neck.narrow.\1"),
        (r"vision_encoder\.neck\.conv2\.(.*)", r"enhance.neck.smooth.\1"),
        (r"vision_encoder\.neck\.layer_norm(\d)\.(.*)", r"enhance.neck.norm\1.\2"),
    ],
)
_TWO_WAY = r"mask_decoder\.transformer\.layers\.(\d+)"
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_READERS = {
    "self_attn": "self_attention",
    "cross_attn_token_to_image": "read_pixels",
    "cross_attn_image_to_token": "read_tokens",
}
_HEAD = rules(
    "",
    [
        _PLACE,
        (r"prompt_encoder\.no_mask_embed\.weight", "no_mask"),
        (r"mask_decoder\.mask_tokens\.weight", "query"),
        *(
            (rf"{_TWO_WAY}\.{reader}\.{projection}\.(.*)", rf"layers.\1.{ours}.{ours_projection}.\2")
            for reader, ours in _READERS.items()
            for projection, ours_projection in _PROJECTIONS.items()
        ),
        (rf"{_TWO_WAY}\.layer_norm(\d)\.(.*)", r"layers.\1.norm\2.\3"),
        (rf"{_TWO_WAY}\.mlp\.lin1\.(.*)", r"layers.\1.mlp.0.\2"),
        (rf"{_TWO_WAY}\.mlp\.lin2\.(.*)", r"layers.\1.mlp.2.\2"),
        *(
            (rf"mask_decoder\.transformer\.final_attn_token_to_image\.{projection}\.(.*)", rf"last_read.{ours}.\1")
            for projection, ours in _PROJECTIONS.items()
        ),
        (r"mask_decoder\.transformer\.layer_norm_final_attn\.(.*)", r"norm.\1"),
        (r"mask_decoder\.upscale_conv1\.(.*)", r"enlarge.0.\1"),
        (r"mask_decoder\.upscale_layer_norm\.(.*)", r"enlarge.1.\1"),
        (r"mask_decoder\.upscale_conv2\.(.*)", r"enlarge.3.\1"),
        (r"mask_decoder\.output_hypernetworks_mlps\.0\.proj_in\.(.*)", r"kernel.0.\1"),
        (r"mask_decoder\.output_hypernetworks_mlps\.0\.layers\.0\.(.*)", r"kernel.2.\1"),
        (r"mask_decoder\.output_hypernetworks_mlps\.0\.proj_out\.(.*)", r"kernel.4.\1"),
    ],
)

_HUGE = {"embed_dim": 1280, "num_layers": 32, "num_heads": 16, "global_layers": (7, 15, 23, 31), "taps": (15, 23, 31)}


def _parts(size: int, **image: Any) -> dict[str, Any]:
    return {
        "image": {"kind": "sam_vit", "image_size": size, **image},
        "text": {"kind": "clip_text", "joint_width": None},
        "fusion": {"kind": "mutual"},
        "head": {"kind": "two_way"},
        "input": {"size": size},
    }


_TINY = {
    "image": {
        "kind": "sam_vit",
        "embed_dim": 64,
        "num_layers": 4,
        "num_heads": 4,
        "window_size": 7,
        "global_layers": (1, 3),
        "taps": (1, 2, 3),
        "image_size": 128,
        "tuning": "full",  # there are no weights to keep
    },
    "text": {
        "kind": "clip_text",
        "vocab_size": 1280,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "max_positions": 64,
        "joint_width": None,
    },
    "fusion": {"kind": "mutual", "width": 128, "num_heads": 4, "feedforward": 256, "max_words": 64},
    "head": {"kind": "two_way", "num_heads": 4, "feedforward": 256},
    "input": {"size": 128, "tokenizer": "wordpiece"},  # CLIP's vocabulary does not ship
}


@register(
    "risam",
    presets={
        "risam_tiny": _TINY,
        "risam_vit_b": _parts(480),
        "risam_vit_b_1024": _parts(1024),
        "risam_vit_h_1024": _parts(1024, **_HUGE),
    },
)
class RISAM(ReferringModel):
    """SAM's map, CLIP's words, blocks in which each reads the other, SAM's decoder; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig

    def load_pretrained(self, sources: Mapping[str, str | bool]) -> None:
        """Load published weights: the image encoder's source is a whole SAM, and starts every part that SAM has.

        Those are the neck, the position encoding, the embedding of no mask, the first mask token, the decoder's layers,
        the enlargement and the first mask token's MLP. Parts of another kind stay as they are.
        """
        source = sources.get("image", True)
        if source is False or not isinstance(self.image_encoder, SamVit):
            super().load_pretrained(sources)
            return
        super().load_pretrained({**sources, "image": False})
        name = published_sam(self.image_encoder.config.embed_dim) if source is True else source
        state, what = read_sam(name), f"image weights {name!r}"
        self.image_encoder.load_sam(state, what)
        self.bases["image"] = base_of(self.image_encoder, name)
        if isinstance(self.head, TwoWay):
            found = part_of_sam(state, _HEAD, what, "mask decoder")
            found = {k: v[:1] if k == "query" else v for k, v in found.items()}  # the first of four mask tokens
            own = {k: v for k, v in self.head.state_dict().items() if k.startswith(("sentence.", "class_head."))}
            load_strictly(self.head, {**own, **found}, what)
        if isinstance(self.fusion, MutualFusion):
            found = part_of_sam(state, _FUSION, what, "neck")
            own = {k: v for k, v in self.fusion.state_dict().items() if not k.startswith(("enhance.neck.", "place."))}
            load_strictly(self.fusion, {**own, **found}, what)
