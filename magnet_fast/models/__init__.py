"""Referring image segmentation models: systems made of small parts on the operators of `magnet_fast.ops`."""

from magnet_fast.models.contract import Features, InputSpec, Prediction, Step, Text, Words, probability
from magnet_fast.models.registry import create, from_config, list_models, parse_config, preset_config, register

__all__ = [
    "Features",
    "InputSpec",
    "Prediction",
    "Step",
    "Text",
    "Words",
    "create",
    "from_config",
    "from_pretrained",
    "from_released",
    "list_models",
    "load",
    "parse_config",
    "preset_config",
    "probability",
    "register",
    "save",
]

_LATER = {"from_pretrained": "hub", "from_released": "released", "load": "weights", "save": "weights"}


def __getattr__(name: str) -> object:
    if name in _LATER:  # models themselves are imported when one is built or read
        from importlib import import_module

        return getattr(import_module(f"magnet_fast.models.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
