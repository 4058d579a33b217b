"""RefSegformer: words in tokens, blank tokens beside them, and a head that says whether anything is named.

Wu et al., "Towards Robust Referring Image Segmentation", TIP 2024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.released import BERT, SWIN, Released, bert_sizes, count, rules, shape, swin_sizes
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN

_STAGE = r"layers\.(\d+)\.VLTF"


def _attention(old: str, new: str) -> list[tuple[str, str]]:
    last = re.compile(old).groups + 1
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return [(rf"{old}\.fc_{short}\.(.*)", rf"{new}.{name}.\{last}") for short, name in names.items()]


_RULES = [
    *rules(
        r"image_encoder\.",
        [
            *SWIN,
            (rf"{_STAGE}\.memory_token\.weight", r"fusion.stages.\1.memory"),
            (rf"{_STAGE}\.neg_memory_token\.weight", r"fusion.stages.\1.blank"),
            (rf"{_STAGE}\.input_proj\.0\.(.*)", r"fusion.stages.\1.pixel_in.\2"),
            (rf"{_STAGE}\.input_proj\.1\.(.*)", r"fusion.stages.\1.pixel_in_norm.\2"),
            (rf"{_STAGE}\.lan_proj\.0\.(.*)", r"fusion.stages.\1.word_in.\2"),
            *_attention(rf"{_STAGE}\.memory_fuse", r"fusion.stages.\1.read_words"),
            *_attention(rf"{_STAGE}\.feature_fuse", r"fusion.stages.\1.read_tokens"),
            (rf"{_STAGE}\.output_proj\.0\.(.*)", r"fusion.stages.\1.out.\2"),
            (rf"{_STAGE}\.output_proj\.1\.(.*)", r"fusion.stages.\1.out_norm.\2"),
        ],
    ),
    *rules(r"text_encoder\.", BERT),
    *rules(
        r"segmentation\.",
        [
            *_attention(r"src_cross_attn", "presence.attention"),
            (r"exist_pred\.(.*)", r"presence.classify.\1"),
            (r"mask_conv\.(.*)", r"head.classify.\1"),
            (r"mask_convs\.(\d+)\.(.*)", r"head.classify.\1.\2"),
            (r"projects\.(\d+)\.conv1\.(.*)", r"head.blocks.\1.0.\2"),
            (r"projects\.(\d+)\.norm1\.(.*)", r"head.blocks.\1.1.\2"),
            (r"projects\.(\d+)\.conv2\.(.*)", r"head.blocks.\1.3.\2"),
            (r"projects\.(\d+)\.norm2\.(.*)", r"head.blocks.\1.4.\2"),
            # Of the stages that fuse, which begin with the second.
            *(
                rule
                for index in range(3)
                for rule in (
                    *_attention(rf"cross_attns\.{index}", f"head.reads.{index + 1}.attention"),
                    (rf"norms\.{index}\.(.*)", rf"head.reads.{index + 1}.norm.\1"),
                )
            ),
        ],
    ),
    *rules(
        r"segmentation\.pixel_decoder\.",
        [
            (r"input_convs\.(\d+)\.conv\.(.*)", r"head.pixel_decoder.input_proj.\1.\2"),
            (r"input_convs\.(\d+)\.gn\.(.*)", r"head.pixel_decoder.input_norm.\1.\2"),
            (r"level_encoding\.weight", r"head.pixel_decoder.level_embed"),
            (r"encoder\.layers\.(\d+)\.attentions\.0\.(.*)", r"head.pixel_decoder.layers.\1.attention.\2"),
            (r"encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.(.*)", r"head.pixel_decoder.layers.\1.linear1.\2"),
            (r"encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.(.*)", r"head.pixel_decoder.layers.\1.linear2.\2"),
            (r"encoder\.layers\.(\d+)\.norms\.0\.(.*)", r"head.pixel_decoder.layers.\1.norm1.\2"),
            (r"encoder\.layers\.(\d+)\.norms\.1\.(.*)", r"head.pixel_decoder.layers.\1.norm2.\2"),
            (r"lateral_convs\.0\.conv\.(.*)", r"head.pixel_decoder.lateral.\1"),
            (r"lateral_convs\.0\.gn\.(.*)", r"head.pixel_decoder.lateral_norm.\1"),
            (r"output_convs\.0\.conv\.(.*)", r"head.pixel_decoder.smooth.\1"),
            (r"output_convs\.0\.gn\.(.*)", r"head.pixel_decoder.smooth_norm.\1"),
            (r"mask_feature\.(.*)", r"head.pixel_decoder.mask_features.\1"),
        ],
    ),
]


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    found = {int(match.group(1)) for name in state if (match := re.match(rf"image_encoder\.{_STAGE}\.", name))}
    stages = tuple(sorted(found))
    first = f"image_encoder.layers.{min(found, default=1)}.VLTF."
    blank = f"{first}neg_memory_token.weight"
    return {
        "image": swin_sizes(state, "image_encoder."),
        "text": bert_sizes(state, "text_encoder."),
        "fusion": {
            "kind": "tokens",
            "memory": shape(state, f"{first}memory_token.weight")[0],
            "blank": shape(state, blank)[0] if blank in state else 0,
            "stages": stages,
            "masking": hints.get("masking", "released"),
        },
        "head": _head(state, hints.get("decoder_heads", 8)),
        "presence": {"kind": "token_exist"} if "segmentation.exist_pred.weight" in state else None,
    }


def _head(state: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    decoder = "segmentation.pixel_decoder."
    if not any(name.startswith(decoder) for name in state):
        return {"kind": "token_topdown"}
    levels = count(state, re.escape(decoder) + r"input_convs\.(\d+)\.")
    samples = shape(state, f"{decoder}encoder.layers.0.attentions.0.attention_weights.bias")[0]
    return {
        "kind": "fpn",
        "width": shape(state, f"{decoder}mask_feature.weight")[0],
        "num_heads": heads,
        "points": samples // (levels * heads),
        "layers": count(state, re.escape(decoder) + r"encoder\.layers\.(\d+)\."),
        "feedforward": shape(state, f"{decoder}encoder.layers.0.ffns.0.layers.0.0.weight")[0],
    }


_UNREAD = (
    # Derived indices; the last norm, whose result is thrown away; the dummy of a stage that does not fuse; words over
    # pixels, computed and thrown away; BERT's pooler.
    r".*\.relative_position_index|.*\.embeddings\.position_ids|text_encoder\.pooler\..*"
    r"|image_encoder\.norm\..*|image_encoder\.layers\.\d+\.memory\..*|.*\.VLTF\.vision_lan_fuse\..*"
)
# The way down and its masks are in files of the pixel decoder, too, where nothing calls them.
_UNREAD_BESIDE_PIXEL_DECODER = r"|segmentation\.(cross_attns|norms|projects|mask_convs)\..*"


def _dropped(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> re.Pattern[str]:
    beside = any(name.startswith("segmentation.pixel_decoder.") for name in state)
    return re.compile(_UNREAD + (_UNREAD_BESIDE_PIXEL_DECODER if beside else ""))


_RELEASED = Released(
    mark="segmentation.",
    config=_config,
    rules=_RULES,
    dropped=_dropped,
    hints=("masking", "decoder_heads"),
)


def _parts(image: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": {**image, "drop_path": 0.3},
        "text": {"kind": "bert"},
        "fusion": {"kind": "tokens"},
        "head": {"kind": "fpn"},
        "presence": {"kind": "token_exist"},
    }


_TINY = {
    "image": TINY_SWIN,
    "text": TINY_BERT,
    "fusion": {"kind": "tokens", "memory": 8, "blank": 4, "head_dim": 16},
    "head": {"kind": "fpn", "width": 64, "num_heads": 4, "points": 2, "layers": 1, "feedforward": 128},
    "presence": {"kind": "token_exist", "head_dim": 16},
}


@register(
    "refsegformer",
    presets={
        "refsegformer_tiny": _TINY,
        **{f"refsegformer_{size}": _parts(SWIN_SIZES[size]) for size in ("swin_b", "swin_t")},
    },
    released=_RELEASED,
)
class RefSegformer(ReferringModel):
    """BERT first, then Swin with tokens after its stages; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
