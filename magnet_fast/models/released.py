"""Released MagNet and LAVT checkpoints: names, sizes read off the shapes, strict loading."""

from __future__ import annotations

import os
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import AlignmentConfig, ImageEncoderConfig, LAVTConfig, MagNetConfig, MaskDecoderConfig, TextEncoderConfig
from .lavt import LAVT
from .magnet import MagNet

_PWAM = {
    r"vis_project\.0": "vision",
    r"image_lang_att\.f_query\.0": "query",
    r"image_lang_att\.f_query\.1": "query_norm",
    r"image_lang_att\.f_key\.0": "key",
    r"image_lang_att\.f_value\.0": "value",
    r"image_lang_att\.W\.0": "output",
    r"image_lang_att\.W\.1": "output_norm",
    r"project_mm\.0": "mix",
}
_CROSS = r"transformer_cross_attention_layers\.(\d+)"
_SELF = r"transformer_self_attention_layers\.(\d+)"
_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)"
_SWIN = [
    (r"patch_embed\.(.*)", r"image_encoder.patch_embed.\1"),
    (rf"{_BLOCK}\.attn\.relative_position_bias_table", r"image_encoder.stages.\1.blocks.\2.attention.bias_table"),
    (rf"{_BLOCK}\.attn\.(.*)", r"image_encoder.stages.\1.blocks.\2.attention.\3"),
    (rf"{_BLOCK}\.(.*)", r"image_encoder.stages.\1.blocks.\2.\3"),
    (r"layers\.(\d+)\.downsample\.(.*)", r"image_encoder.stages.\1.downsample.\2"),
]


def _rules(prefix: str, rules: list[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(prefix + old), new) for old, new in rules]


def _pwam_rules(old: str, new: str) -> list[tuple[str, str]]:
    return [
        (rf"{old}\.{released}\.(weight|bias)", rf"{new}.{ours}.\{_groups(old)}") for released, ours in _PWAM.items()
    ]


def _groups(pattern: str) -> int:
    return re.compile(pattern).groups + 1


_MAGNET_RULES = [
    *_rules(
        r"image_model\.",
        [
            *_SWIN,
            *_pwam_rules(r"layers\.(\d+)\.fusion", r"alignment.\1.fusion"),
            *_pwam_rules(r"layers\.(\d+)\.fusions\.(\d+)", r"alignment.\1.level_fusions.\2"),
            (r"layers\.(\d+)\.res_gate\.0\.(.*)", r"alignment.\1.image_gate.first.\2"),
            (r"layers\.(\d+)\.res_gate\.2\.(.*)", r"alignment.\1.image_gate.last.\2"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.1\.(.*)", r"alignment.\1.pools.\2.expand.\3"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.2\.(.*)", r"alignment.\1.pools.\2.norm.\3"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.3\.(.*)", r"alignment.\1.pools.\2.contract.\3"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.5\.(.*)", r"alignment.\1.pools.\2.reduce.\3"),
            (r"layers\.(\d+)\.mixer\.(.*)", r"alignment.\1.mixer.\2"),
        ],
    ),
    *_rules(
        r"language_model\.",
        [
            (r"(embeddings|encoder)\.(.*)", r"text_encoder.bert.\1.\2"),
            *_pwam_rules(r"pwams\.(\d+)", r"alignment.\1.text_fusion"),
            (r"res_gates\.(\d+)\.0\.(.*)", r"alignment.\1.text_gate.first.\2"),
            (r"res_gates\.(\d+)\.2\.(.*)", r"alignment.\1.text_gate.last.\2"),
        ],
    ),
    *_rules(
        r"classifier\.pixel_decoder\.",
        [
            (r"input_proj\.(\d+)\.0\.(.*)", r"pixel_decoder.input_proj.\1.\2"),
            (r"input_proj\.(\d+)\.1\.(.*)", r"pixel_decoder.input_norm.\1.\2"),
            (r"transformer\.level_embed", r"pixel_decoder.level_embed"),
            (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.*)", r"pixel_decoder.layers.\1.attention.\2"),
            (r"transformer\.encoder\.layers\.(\d+)\.(.*)", r"pixel_decoder.layers.\1.\2"),
            (r"mask_features\.(.*)", r"pixel_decoder.mask_features.\1"),
        ],
    ),
    *_rules(
        r"classifier\.predictor\.",
        [
            (rf"{_CROSS}\.multihead_attn\.(in_proj_.*)", r"mask_decoder.layers.\1.cross_attention.\2"),
            (rf"{_CROSS}\.multihead_attn\.out_proj\.(.*)", r"mask_decoder.layers.\1.cross_attention.output.\2"),
            (rf"{_CROSS}\.norm\.(.*)", r"mask_decoder.layers.\1.cross_attention.norm.\2"),
            (rf"{_SELF}\.self_attn\.(in_proj_.*)", r"mask_decoder.layers.\1.self_attention.\2"),
            (rf"{_SELF}\.self_attn\.out_proj\.(.*)", r"mask_decoder.layers.\1.self_attention.output.\2"),
            (rf"{_SELF}\.norm\.(.*)", r"mask_decoder.layers.\1.self_attention.norm.\2"),
            (r"transformer_ffn_layers\.(\d+)\.(.*)", r"mask_decoder.layers.\1.\2"),
            (r"decoder_norm\.(.*)", r"mask_decoder.norm.\1"),
            (r"query_feat\.(.*)", r"mask_decoder.query_feature.\1"),
            (r"(query_embed|level_embed)\.(.*)", r"mask_decoder.\1.\2"),
            (r"class_embed\.(.*)", r"mask_decoder.class_head.\1"),
            (r"mask_embed\.layers\.0\.(.*)", r"mask_decoder.mask_head.0.\1"),
            (r"mask_embed\.layers\.1\.(.*)", r"mask_decoder.mask_head.2.\1"),
            (r"mask_embed\.layers\.2\.(.*)", r"mask_decoder.mask_head.4.\1"),
        ],
    ),
    (re.compile(r"lang_proj\.(.*)"), r"text_projection.\1"),
]

_LAVT_RULES = [
    *_rules(
        r"backbone\.",
        [
            *_SWIN,
            *_pwam_rules(r"layers\.(\d+)\.fusion", r"fusions.\1.fusion"),
            (r"layers\.(\d+)\.res_gate\.0\.(.*)", r"fusions.\1.gate.first.\2"),
            (r"layers\.(\d+)\.res_gate\.2\.(.*)", r"fusions.\1.gate.last.\2"),
            (r"norm(\d)\.(.*)", r"fusions.\1.norm.\2"),
        ],
    ),
    *_rules(
        r"classifier\.",
        [
            *(
                (rf"{kind}{half}_{level}\.(.*)", rf"decoder.blocks.{4 - level}.{3 * (half - 1) + offset}.\1")
                for level in (4, 3, 2)
                for half in (1, 2)
                for offset, kind in enumerate(("conv", "bn"))
            ),
            (r"conv1_1\.(.*)", r"decoder.classify.\1"),
        ],
    ),
    (re.compile(r"bert_model\.((?:embeddings|encoder)\..*)"), r"text_encoder.bert.\1"),
]

# In the files, but read by no forward pass: derived indices, and MagNet's norms whose results are thrown away.
_UNUSED = re.compile(
    r".*\.relative_position_index|.*\.embeddings\.position_ids|bert_model\.pooler\..*|language_model\.pooler\..*"
    r"|image_model\.norm\d\..*|language_model\.norms\.\d\..*"
)


def from_released(
    source: str | os.PathLike[str] | Mapping[str, Any], fusion_heads: tuple[int, int, int, int] = (1, 1, 1, 1)
) -> MagNet | LAVT:
    """Build the MagNet or LAVT of a released checkpoint, in evaluation mode, with `masking="released"`.

    Args:
        source: a `.pth` file saved by the released code, or its contents: {"model": …} or the flat state dict
            for MagNet, {"model": …, "bert_model": …} for LAVT. Every size is read off the tensors' shapes.
        fusion_heads: attention heads of each stage's PWAM: shapes do not tell them (1 in all published files).

    Raises:
        FileNotFoundError: no such file. ValueError: not such a checkpoint, a name this map does not know, or a
            parameter that is missing. Files are read with `weights_only=True`; nothing else in them is run.
    """
    contents = source if isinstance(source, Mapping) else read_checkpoint(source)
    state = {name: tensor for name, tensor in _flatten(contents).items() if not _UNUSED.fullmatch(name)}
    if any(name.startswith("image_model.") for name in state):
        model, rules = MagNet(_magnet_config(state, fusion_heads)), _MAGNET_RULES
    elif any(name.startswith("backbone.") for name in state):
        model, rules = LAVT(_lavt_config(state, fusion_heads)), _LAVT_RULES
    else:
        some = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(f"not a released MagNet or LAVT checkpoint: it holds {some}")
    load_strictly(model, _rename(state, rules), "the released checkpoint")
    return model.eval()


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping in a file of `torch.save`, tensors and plain containers only; a Namespace of arguments is allowed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {os.fspath(path)!r} does not exist")
    try:
        with torch.serialization.safe_globals([Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {os.fspath(path)!r} cannot be read safely: {reason}") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"checkpoint {os.fspath(path)!r} holds a {type(contents).__name__}, expected a dictionary")
    return contents


def load_strictly(model: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load all of `state`, or raise a ValueError that names the first differences."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape)
    problems = [
        f"{len(v)} {kind} ({', '.join(v[:3])})" for kind, v in (("missing", missing), ("unexpected", unexpected)) if v
    ]
    if wrong:
        first = wrong[0]
        shapes = f"{tuple(state[first].shape)}, expected {tuple(expected[first].shape)}"
        problems.append(f"{len(wrong)} of another shape ({first}: {shapes})")
    if problems:
        raise ValueError(f"{what} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state)


def _flatten(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    state = dict(contents.get("model", contents))
    for name, tensor in contents.get("bert_model", {}).items():
        state[f"bert_model.{name}"] = tensor
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _rename(state: Mapping[str, Tensor], rules: list[tuple[re.Pattern[str], str]]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            match = pattern.fullmatch(name)
            if match:
                target = match.expand(new)
                break
        else:
            raise ValueError(f"the checkpoint holds {name!r}, which no released MagNet or LAVT has")
        if ".in_proj_" in target:  # torch.nn.MultiheadAttention stacks query, key and value
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[target.replace("in_proj_", f"{part}.")] = third
        else:
            renamed[target] = _as_linear(target, tensor)
    return renamed


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Convolutions of size 1 on tokens and pooled pixels are Linears here; the decoders keep their convolutions."""
    on_tokens = name.startswith(("alignment.", "fusions."))
    return tensor.flatten(1) if on_tokens and tensor.ndim > 2 else tensor


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size:
    if name not in state:
        raise ValueError(f"the checkpoint lacks {name!r}, which the released models have")
    return state[name].shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    indices = [int(m.group(1)) for name in state if (m := re.match(pattern, name))]
    return 1 + max(indices, default=-1)


def _image_config(state: Mapping[str, Tensor], prefix: str) -> ImageEncoderConfig:
    tables = [_shape(state, f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(4)]
    return ImageEncoderConfig(
        embed_dim=_shape(state, f"{prefix}patch_embed.proj.weight")[0],
        depths=tuple(_count(state, rf"{re.escape(prefix)}layers\.{i}\.blocks\.(\d+)\.") for i in range(4)),
        num_heads=tuple(table[1] for table in tables),
        window_size=(round(tables[0][0] ** 0.5) + 1) // 2,
    )


def _text_config(state: Mapping[str, Tensor], prefix: str) -> TextEncoderConfig:
    vocab_size, hidden_size = _shape(state, f"{prefix}embeddings.word_embeddings.weight")
    return TextEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=_count(state, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\."),
        num_heads=max(1, hidden_size // 64),  # every published BERT has heads of 64 channels
        intermediate_size=_shape(state, f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        max_positions=_shape(state, f"{prefix}embeddings.position_embeddings.weight")[0],
    )


def _magnet_config(state: Mapping[str, Tensor], fusion_heads: tuple[int, int, int, int]) -> MagNetConfig:
    pixel, mask = "classifier.pixel_decoder.transformer.encoder.layers", "classifier.predictor.transformer"
    width = _shape(state, "classifier.pixel_decoder.mask_features.weight")[0]
    heads = max(1, width // 32)  # Mask2Former: 8 heads of 32
    samples = _shape(state, f"{pixel}.0.self_attn.attention_weights.bias")[0]
    decoder = MaskDecoderConfig(
        width=width,
        num_heads=heads,
        points=samples // (4 * heads),
        pixel_layers=_count(state, rf"{re.escape(pixel)}\.(\d+)\."),
        pixel_feedforward=_shape(state, f"{pixel}.0.linear1.weight")[0],
        mask_layers=_count(state, rf"{re.escape(mask)}_ffn_layers\.(\d+)\."),
        mask_feedforward=_shape(state, f"{mask}_ffn_layers.0.linear1.weight")[0],
    )
    return MagNetConfig(
        image=_image_config(state, "image_model."),
        text=_text_config(state, "language_model."),
        alignment=AlignmentConfig(masking="released", fusion_heads=fusion_heads),
        decoder=decoder,
    )


def _lavt_config(state: Mapping[str, Tensor], fusion_heads: tuple[int, int, int, int]) -> LAVTConfig:
    return LAVTConfig(
        image=_image_config(state, "backbone."), text=_text_config(state, "bert_model."), fusion_heads=fusion_heads
    )
