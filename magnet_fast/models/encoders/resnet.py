"""timm's ResNets stage by stage: unlike behind kind `timm`, words that a fusion adds to a map enter the next stage."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Literal

import timm
import torch
from pydantic import Field, PositiveInt, model_validator
from timm.models.resnet import ResNet
from torch import Tensor, nn

from magnet_fast.models.config import part
from magnet_fast.models.encoders.timm import TimmConfig, TimmEncoder

_STEM = ("conv1", "bn1", "act1", "maxpool")  # timm's names, of stride 4 together


@part
class ResNetConfig(TimmConfig):
    """A ResNet, ResNeXt, ResNeSt or another of timm's class `ResNet`.

    `arguments` such as `{"output_stride": 16}` go to timm: the last stage is then dilated, and its stride is 16.
    """

    kind: Literal["resnet"] = "resnet"
    stem: bool = Field(False, description="the stem's map, of stride 4, is the first stage")
    multi_grid: tuple[PositiveInt, ...] = Field(
        (), description="a dilation for each block of the last stage (DeepLabv3: 2, 4, 8); none: timm's"
    )

    @model_validator(mode="after")
    def _is_resnet(self) -> ResNetConfig:
        self._stem_channels  # noqa: B018 (raises for another class)
        if self.multi_grid:
            with torch.device("meta"):
                _dilate(timm.create_model(self.name, pretrained=False, **self.arguments).layer4, self.multi_grid)
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        return (*self._stem_channels, *super().channels) if self.stem else super().channels

    @property
    def strides(self) -> tuple[int, ...]:
        return (4, *super().strides) if self.stem else super().strides

    @property
    def in_stream(self) -> bool:
        return True

    @property
    def _stem_channels(self) -> tuple[int]:
        return _stem_of(self.name, json.dumps(self.arguments, sort_keys=True))

    def build(self) -> ResNetEncoder:
        return ResNetEncoder(self)


class ResNetEncoder(TimmEncoder):
    """The stem, then a stage for each of the four layers; the first is the stem's own where that is asked for."""

    in_stream = True

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.channels, self.strides = config.channels, config.strides
        if config.multi_grid:
            _dilate(self.backbone["layer4"], config.multi_grid)
        self._stages = (*(("stem",) if config.stem else ()), "layer1", "layer2", "layer3", "layer4")

    def start(self, image: Tensor) -> Tensor:
        for name in _STEM:
            image = self.backbone[name](image)
        return image

    def stage(self, i: int, stream: Tensor) -> Tensor:
        name = self._stages[i]
        x = stream if name == "stem" else self.backbone[name](stream)
        return x.permute(0, 2, 3, 1)

    def descend(self, i: int, stream: Tensor) -> Tensor:
        return stream.permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def _stem_of(name: str, arguments: str) -> tuple[int]:
    """Channels after the stem; nothing is allocated. ValueError for a model that is not of timm's class `ResNet`."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **json.loads(arguments))
    if not isinstance(model, ResNet):
        raise ValueError(f"name: expected one of timm's ResNets, got {name!r}, of class {type(model).__name__}")
    return (model.feature_info[0]["num_chs"],)


def _dilate(stage: nn.Sequential, dilations: tuple[int, ...]) -> None:
    """Give each block of a stage a dilation of its own, and leave its weights: a multi-grid (Chen et al., "Rethinking
    Atrous Convolution for Semantic Image Segmentation", 2017).

    Raises:
        ValueError: a stage of another number of blocks, or one that steps.
    """
    if len(stage) != len(dilations):
        raise ValueError(
            f"multi_grid={dilations} gives {len(dilations)} dilations for the {len(stage)} blocks of the last stage"
        )
    for block, dilation in zip(stage, dilations, strict=True):
        for conv in (one for one in block.modules() if isinstance(one, nn.Conv2d) and one.kernel_size != (1, 1)):
            if conv.stride != (1, 1):
                raise ValueError(f"multi_grid={dilations}: the last stage steps; add output_stride=16 to arguments")
            conv.dilation = (dilation, dilation)
            conv.padding = tuple(dilation * (side - 1) // 2 for side in conv.kernel_size)
