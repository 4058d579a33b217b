"""Our fusions, faster: values projected instead of pixels, pooled levels mixed before they are upsampled.

The absorbed forms serve training, too; every parameter gets the gradient of the plain form, zeros included.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from magnet_fast import ops
from magnet_fast.fast._replacement import must_run_original, upstream_class
from magnet_fast.fast.own_parts import kept, project, with_zero_gradients
from magnet_fast.models.fusion import exchange, pixel_word
from magnet_fast.ops._linear import linear, plain_linear
from magnet_fast.ops._observed import observed


class PooledLevel:
    """GELU in the product."""

    def forward(self, feature: Tensor) -> Tensor:
        if must_run_original(self):
            return super().forward(feature)
        pooled = exchange.averaged(feature, self.side)
        return self.reduce(project(self.contract, self.norm(self.expand(pooled)), activation="gelu"))


class Mixer:
    """Upsampling and the first Linear commute: its columns that meet the levels are applied to their few tokens, not to
    every pixel, and upsampling all of them is one product."""

    def forward(self, levels: list[Tensor], full: Tensor, size: tuple[int, int]) -> Tensor:
        first, norm, last = self
        if not levels or not plain_linear(first) or must_run_original(self, first):
            return super().forward(levels, full, size)
        *narrow, wide = first.weight.split([*(level.shape[2] for level in levels), full.shape[2]], dim=1)
        tokens = torch.cat([F.linear(level, weight) for level, weight in zip(levels, narrow, strict=True)], dim=1)
        sides = tuple(math.isqrt(level.shape[1]) for level in levels)
        upsampled = kept_upsampling(sides, tuple(size), tokens.device, tokens.dtype) @ tokens
        mixed = linear(full, wide, first.bias, residual=upsampled)
        return project(last, norm(mixed), activation="gelu").unflatten(1, size)


class PWAM:
    """With one head W Σ p v = Σ p (W v): the few words' values are projected instead of the many pixels."""

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        if must_run_original(self):
            return super().forward(pixels, words, word_mask)
        output = self.output
        absorbed = self.num_heads == 1 and words.shape[1] < pixels.shape[1]
        absorbed = absorbed and plain_linear(output) and output.bias is not None and not observed(output)
        vision = self.dropout(project(self.vision, pixels, activation="gelu"))
        value = self.value(words)
        attended, _ = ops.cross_modal_attention(
            self.query_norm(project(self.query, pixels)),
            self.key(words),
            F.linear(value, output.weight) if absorbed else value,
            text_mask=word_mask,  # a masked word is no key, so zeroing its key and value changes nothing
            num_heads=self.num_heads,
            scale=self.scale,
        )
        language = self.output_norm(attended + output.bias if absorbed else project(output, attended))
        return self.dropout(project(self.mix, vision * language, activation="gelu"))


class TextPWAM:
    """The words read the pixels without keys and values for every pixel: there are few words and many pixels.

    With k = W x + b normalised over the pixels, a score q·(k - μ)/σ is ((q/σ) W)·x plus a constant that softmax drops;
    and since probabilities sum to 1, the attended value is W_v (Σ p x - mean x)/σ_v. Only σ is needed, and σ² is the
    diagonal of W Cov(x) Wᵀ.
    """

    def read(self, query: Tensor, pixels: Tensor, word_mask: Tensor | None) -> Tensor:
        key, value, norm = self.key, self.value, self.norm
        if (
            not self._absorbing_pays(pixels, query.shape[2])
            or not plain_linear(key, value)
            or key.bias is None
            or value.bias is None
            or upstream_class_or_own(norm) is not pixel_word.PixelInstanceNorm
            or must_run_original(self, key, value, norm)
        ):
            return super().read(query, pixels, word_mask)
        dtype = pixels.dtype
        wide = pixels if dtype == torch.float64 else pixels.float()
        centred = wide - wide.mean(dim=1, keepdim=True)
        covariance = centred.transpose(1, 2) @ centred / pixels.shape[1]  # (B, C, C)
        key_scale, value_scale = (
            torch.rsqrt(((weight @ covariance) * weight).sum(-1) + norm.eps)[:, None].to(dtype)  # (B, 1, D)
            for weight in (key.weight.to(covariance.dtype), value.weight.to(covariance.dtype))
        )
        centred = centred.to(dtype)
        _, attended = ops.cross_modal_attention(
            None,
            None,
            None,
            text_query=(query * key_scale) @ key.weight,
            image_key=centred,
            image_value=centred,
            text_mask=word_mask,
            scale=self.scale,
        )
        return with_zero_gradients(F.linear(attended, value.weight) * value_scale, key.bias, value.bias)

    def _absorbing_pays(self, pixels: Tensor, width: int) -> bool:
        # Products a pixel: 2·C·D for projected keys and values; C² for the covariance, and 2·C²·D/P for its diagonals,
        # both in float32, which takes twice as long where all else is of 16 bits.
        # Queries of -10000 (released masking) would amplify the other order of rounding, so that form stays as it is.
        count, channels = pixels.shape[1:]
        dearer = 2 if pixels.dtype.itemsize == 2 else 1
        return self.masking == "correct" and dearer * channels * (1 + 2 * width / count) < 2 * width


class Gate:
    """The activation in the product."""

    def forward(self, stream: Tensor, residual: Tensor) -> Tensor:
        if must_run_original(self):
            return super().forward(stream, residual)
        hidden = project(self.first, residual, activation=self.activation)
        return stream + torch.tanh(project(self.last, hidden)) * residual

    def train(self, mode: bool = True) -> nn.Module:
        _known.pop(self, None)  # what was written to the weights behind autograd's back is seen now
        return super().train(mode)


_known: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], bool]] = WeakKeyDictionary()
"""Off the CPU: memory and version of a gate's last weight, and whether all of it is zero."""


def closed(gate: nn.Module) -> bool:
    """Whether the gate surely lets nothing through: its residual then need not be computed in inference.

    Always False while gradients are recorded (a closed gate still learns from its residual) or a graph is traced.
    On a GPU, where looking at the weights waits for the device, the answer is kept until the weights change (or `train`
    or `eval` is called, for changes behind autograd's back).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or upstream_class(gate) is not pixel_word.Gate:
        return False
    if not plain_linear(gate.first, gate.last) or gate.last.bias is not None:
        return False
    weight = gate.last.weight
    if weight.is_inference():
        return False
    if weight.device.type == "cpu":
        return not (weight[0].any() or weight.any())  # most open gates show it in their first row
    state = (StorageWeakRef(weight.untyped_storage()), weight.storage_offset(), weight._version)
    found = _known.get(gate)
    if found is None or found[0] != state:
        found = _known[gate] = state, not bool(weight.any())
    return found[1]


class _ExchangeStage:
    """In inference a closed text gate, as in released checkpoints, spares the words' residual: they go on unchanged."""

    def forward(self, feature: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._deaf():
            return super().forward(feature, words, word_mask)
        size = feature.shape[1:3]
        full, levels, image_residual = self._into_pixels(feature, words, word_mask)
        output = self.mixer(levels, full, size)
        stream = feature
        if self.image_gate is not None:
            stream = self.image_gate(feature, image_residual.unflatten(1, size))
        return output, stream, words

    def _deaf(self) -> bool:
        """Whether the words hear nothing, and nothing on the way to them wants to be called."""
        text_fusion = getattr(self, "text_fusion", None)
        parts = () if text_fusion is None else text_fusion.modules()
        return (
            not must_run_original(self, *self.text_gate.modules())  # first: an offloaded weight cannot be looked at
            and closed(self.text_gate)
            and not observed(*parts)
        )


class PWAMExchange(_ExchangeStage):
    __doc__ = _ExchangeStage.__doc__

    def _into_pixels(self, feature: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        levels = [
            fuse(pool(feature), words, word_mask) for pool, fuse in zip(self.pools, self.level_fusions, strict=True)
        ]
        residual = self.fusion(feature.flatten(1, 2), words, word_mask)
        return residual, levels, residual


class XMHAExchange(_ExchangeStage):
    __doc__ = _ExchangeStage.__doc__

    def _into_pixels(self, feature: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        return self.exchange(feature, words, word_mask)[:3]


def upstream_class_or_own(module: nn.Module) -> type:
    """The class that `module` had before anything was replaced."""
    return upstream_class(module) or type(module)


def _upsampling(sides: tuple[int, ...], size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H·W, Σp²): the product with tokens of all levels is the sum of what `exchange.upsample` makes of each."""
    wide = torch.promote_types(dtype, torch.float32)
    maps = [exchange.upsample(torch.eye(p * p, device=device, dtype=wide)[None], size) for p in sides]
    return torch.cat(maps, dim=-1).flatten(0, 2).to(dtype)


kept_upsampling = kept(_upsampling)
