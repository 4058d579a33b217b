"""Any timm backbone that gives features: channels, strides and normalisation are timm's."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any, Literal

import timm
import torch
from pydantic import Field, model_validator
from timm.layers import Format
from torch import Tensor, nn

from magnet_fast.models.base import ImageEncoder
from magnet_fast.models.config import ImageConfig, part
from magnet_fast.models.files import read_contents
from magnet_fast.models.state import is_derived, load_strictly, unreachable
from magnet_fast.models.wrapping import unwrap

_FROM_ELSEWHERE = {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"}
_FINEST = 4  # stride; heads of this family make masks at a quarter of the image's side


@part
class TimmConfig(ImageConfig):
    """A backbone by timm's name. Its maps of stride 4 and coarser are the stages, at most the last four."""

    kind: Literal["timm"] = "timm"
    name: str = Field(min_length=1, description="as timm.create_model takes it")
    frozen: bool = Field(False, description="weights are not trained, and norms keep their statistics")
    frozen_norms: bool = Field(False, description="BatchNorms keep their statistics, for small batches; weights train")
    arguments: dict[str, Any] = Field(default_factory=dict, description="more for timm.create_model: img_size, …")

    @model_validator(mode="after")
    def _known(self) -> TimmConfig:
        if not timm.is_model(self.name):
            near = timm.list_models(f"*{self.name.split('.')[0].split('_')[0]}*")[:3]
            hint = f"; it has {', '.join(near)}" if near else ""
            raise ValueError(f"name: timm has no model {self.name!r}{hint}")
        elsewhere = sorted(_FROM_ELSEWHERE & self.arguments.keys())
        if elsewhere:  # a stored configuration describes a network, and reads no file
            raise ValueError(f"arguments: expected what describes the network, got {elsewhere[0]!r}")
        self._described  # noqa: B018 (raises where the model gives no features)
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        return self._described[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return self._described[2]

    @property
    def in_stream(self) -> bool:
        return False

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        found = timm.get_pretrained_cfg(self.name)
        return (tuple(found.mean), tuple(found.std)) if found else super().normalisation

    @property
    def _described(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return _describe(self.name, json.dumps(self.arguments, sort_keys=True))

    def build(self) -> TimmEncoder:
        return TimmEncoder(self)


class TimmEncoder(ImageEncoder):
    """All maps at once, by timm's `features_only`: words meet the maps, not the backbone itself."""

    in_stream = False

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        indices, self.channels, self.strides = config._described
        self.name, self.frozen, self.frozen_norms = config.name, config.frozen, config.frozen_norms
        self._arguments = {**config.arguments, "features_only": True, "out_indices": indices}
        self.backbone = timm.create_model(config.name, pretrained=False, **self._arguments)
        self._channels_last = getattr(self.backbone, "output_fmt", Format.NCHW) == Format.NHWC
        if config.frozen:
            self.backbone.requires_grad_(False)

    def start(self, image: Tensor) -> list[Tensor]:
        maps = self.backbone(image)
        return maps if self._channels_last else [x.permute(0, 2, 3, 1) for x in maps]

    def stage(self, i: int, stream: list[Tensor]) -> Tensor:
        return stream[i]

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        elif self.frozen_norms:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def load_pretrained(self, source: str | None) -> None:
        name = source or self.name
        if os.path.isfile(name):
            self._load_file(name)
            return
        try:
            found = timm.create_model(name, pretrained=True, **self._arguments)
        except (OSError, RuntimeError, ValueError) as error:
            raise unreachable("image", name, error) from error
        load_strictly(self.backbone, found.state_dict(), f"image weights {name!r}")

    def _load_file(self, path: str) -> None:
        """Weights of the whole backbone in a file, under timm's names or, in the same order and shapes, others.

        What features do not need (a classifier) may be there, or not.
        """
        what = f"image weights {path!r}"
        state = {name: tensor for name, tensor in unwrap(read_contents(path), what).items() if not is_derived(name)}
        expected = {name: tensor for name, tensor in self.backbone.state_dict().items() if not is_derived(name)}
        if not expected.keys() <= state.keys():
            pairs = list(zip(expected, state.values(), strict=False))
            alike = len(pairs) == len(expected) and all(expected[name].shape == found.shape for name, found in pairs)
            state = dict(pairs) if alike else state
        else:
            state = {name: state[name] for name in expected}
        load_strictly(self.backbone, state, what)


@lru_cache(maxsize=32)
def _describe(name: str, arguments: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Indices, channels and strides of the maps taken; nothing is allocated.

    Args:
        name: timm's.
        arguments: JSON, which unlike a dictionary can be looked up.

    Raises:
        ValueError: the model gives no features, or none coarser than stride 4.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, features_only=True, **json.loads(arguments))
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise ValueError(f"name: timm's {name!r} gives no features ({str(error).splitlines()[0]})") from error
    info = model.feature_info
    found = list(zip(info.out_indices, info.channels(), info.reduction(), strict=True))
    taken = [entry for entry in found if entry[2] >= _FINEST][-4:]
    if not taken:
        raise ValueError(f"name: timm's {name!r} has no features of stride {_FINEST} or coarser")
    indices, channels, strides = zip(*taken, strict=True)
    return indices, channels, strides
