"""Referring image segmentation models on the operators of `magnet_fast.ops`."""

from .config import LAVTConfig, MagNetConfig, ModelConfig
from .files import load_model, save_model
from .lavt import LAVT
from .magnet import MagNet
from .outputs import SegmentationOutput
from .presets import build, from_config, preset_config, presets
from .released import from_released

__all__ = [
    "LAVT",
    "LAVTConfig",
    "MagNet",
    "MagNetConfig",
    "ModelConfig",
    "SegmentationOutput",
    "build",
    "from_config",
    "from_released",
    "load_model",
    "preset_config",
    "presets",
    "save_model",
]
