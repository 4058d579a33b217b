"""Convolutional parts, faster in inference: BatchNorms folded in, ReLU and residual in the convolution's own call; and
the sentence's own kernel as a product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.fast._replacement import must_run_original
from magnet_fast.fast.own_parts import plain_pointwise, pointwise
from magnet_fast.models.fusion.neck import enlarge
from magnet_fast.models.heads.text_kernel import KERNEL, part_of
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


class Projector:
    """A convolution with one output channel reads every pixel once: nine products of it, summed where they belong. As
    a convolution with a group for each image it first brings the map into another layout."""

    def forward(self, x: Tensor, sentence: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if must_run_original(self, self.pixels) or not plain_pointwise(self.pixels):
            return super().forward(x, sentence, size)
        x = self.enlarge1(enlarge(x, part_of(size, 8)))
        x = self.enlarge2(enlarge(x, part_of(size, 4)))
        pixels = pointwise(self.pixels, x.permute(0, 2, 3, 1))
        kernels, bias = self.kernel(sentence).split([pixels.shape[3] * KERNEL**2, 1], dim=1)
        # What a pixel gives to its neighbours lies the other way round than what it takes from them.
        kernels = kernels.unflatten(1, (pixels.shape[3], KERNEL**2)).flip(2)
        products = (pixels.flatten(1, 2) @ kernels).transpose(1, 2)
        products = products.to(torch.promote_types(products.dtype, torch.float32))
        mask = F.fold(products, pixels.shape[1:3], KERNEL, padding=KERNEL // 2)[:, 0]
        return (mask + bias[:, None]).to(pixels.dtype), pixels.permute(0, 3, 1, 2)
