"""The models one builds by name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .config import ImageEncoderConfig, LAVTConfig, MagNetConfig, MaskDecoderConfig, ModelConfig, TextEncoderConfig
from .lavt import LAVT
from .magnet import MagNet
from .pretrained import load_pretrained

# The shipped vocabulary has fewer entries; room is left so that it can grow without a new preset.
_TINY_IMAGE = ImageEncoderConfig(
    embed_dim=16,
    depths=(2, 2, 2, 2),
    num_heads=(1, 2, 4, 8),
    window_size=8,
    drop_path=0.0,
    absolute_position=True,
)
_TINY_TEXT = TextEncoderConfig(
    vocab_size=1280, hidden_size=64, num_layers=4, num_heads=4, intermediate_size=128, max_positions=64, dropout=0.0
)
_SWIN = {
    "swin_t": ImageEncoderConfig(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7, drop_path=0.2
    ),
    "swin_s": ImageEncoderConfig(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window_size=7),
    "swin_b": ImageEncoderConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12),
}

_PRESETS: dict[str, ModelConfig] = {
    "magnet_tiny": MagNetConfig(
        image=_TINY_IMAGE,
        text=_TINY_TEXT,
        decoder=MaskDecoderConfig(
            width=64, num_heads=4, points=2, pixel_layers=1, pixel_feedforward=128, mask_layers=9, mask_feedforward=128
        ),
    ),
    "lavt_tiny": LAVTConfig(image=_TINY_IMAGE, text=_TINY_TEXT),
    **{f"magnet_{size}": MagNetConfig(image=image) for size, image in _SWIN.items()},
    **{f"lavt_{size}": LAVTConfig(image=image) for size, image in _SWIN.items()},
}

_CONFIG = TypeAdapter(ModelConfig)


def presets() -> list[str]:
    """Names that `build` knows."""
    return list(_PRESETS)


def build(name: str, *, pretrained: bool | Mapping[str, str] = False, **overrides: Any) -> MagNet | LAVT:
    """Build a model by preset name, in training mode, with random weights unless `pretrained`.

    Args:
        name: one of `presets()`.
        pretrained: True loads Swin (timm) and BERT-base (transformers) by their published names; a mapping
            {"image": …, "text": …} names others or local paths. False builds offline.
        **overrides: configuration entries to change, nested by mapping or by double underscore:
            `alignment={"kind": "xmha"}`, `text__vocab_size=200`. `alignment="xmha"` and `masking="released"`
            are short for the two entries people change.

    Raises:
        ValueError: an unknown name or override, or pretrained weights that cannot be had or do not fit.
    """
    config = preset_config(name, **overrides)
    model = _construct(config)
    if pretrained:
        load_pretrained(model, {} if pretrained is True else pretrained)
    return model


def preset_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration `build` would use."""
    if name not in _PRESETS:
        near = get_close_matches(name, _PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(_PRESETS)}")
    entries = _PRESETS[name].model_dump()
    for key, value in overrides.items():
        if key == "masking" or (key == "alignment" and isinstance(value, str)):
            path = ["alignment", "masking" if key == "masking" else "kind"]
        else:
            path = key.split("__")
        _override(entries, path, value, key)
    return parse_config(entries)


def parse_config(entries: Mapping[str, Any]) -> ModelConfig:
    """A configuration from its plain dictionary (as `model.config.model_dump()` gives it)."""
    try:
        return _CONFIG.validate_python(dict(entries))
    except ValidationError as error:
        wanted = f"{str(entries.get('architecture')).lower()}config"
        problems = [e for e in error.errors() if str(e["loc"][0]).lower() == wanted] or error.errors()
        text = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in problems)
        raise ValueError(f"model configuration: {text}") from error


def from_config(entries: Mapping[str, Any] | ModelConfig) -> MagNet | LAVT:
    """The model of a configuration, with random weights."""
    config = entries if isinstance(entries, MagNetConfig | LAVTConfig) else parse_config(entries)
    return _construct(config)


def _construct(config: ModelConfig) -> MagNet | LAVT:
    return MagNet(config) if isinstance(config, MagNetConfig) else LAVT(config)


def _override(entries: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    *parents, leaf = path
    for parent in parents:
        entries = entries.get(parent) if isinstance(entries, dict) else None
    if not isinstance(entries, dict) or leaf not in entries:
        near = get_close_matches(leaf, entries, n=1) if isinstance(entries, dict) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model setting {name!r}{hint}")
    if isinstance(entries[leaf], dict) and isinstance(value, Mapping):
        for key, inner in value.items():
            _override(entries[leaf], [key], inner, f"{name}.{key}")
    else:
        entries[leaf] = value
