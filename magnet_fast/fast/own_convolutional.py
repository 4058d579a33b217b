"""Convolutional parts, faster in inference: BatchNorms folded in, ReLU and residual in the convolution's own call."""

from __future__ import annotations

from torch import Tensor, nn

from magnet_fast.fast._replacement import must_run_original
from magnet_fast.ops._convolution import run_layers

_RELU = nn.ReLU()  # the block calls the function


class ConvBlock:
    """Its convolutions, packed, with what follows each."""

    def forward(self, input: Tensor) -> Tensor:
        if must_run_original(self):
            return super().forward(input)
        return run_layers(list(self), input)


class Bottleneck:
    """The last convolution adds the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        if must_run_original(self, self.branch) or not isinstance(self.branch, nn.Sequential):
            return super().forward(x)
        return run_layers(list(self.branch), x, self.shortcut(x), _RELU)
