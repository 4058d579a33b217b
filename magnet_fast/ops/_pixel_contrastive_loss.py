"""The pixel-to-pixel term of MagNet's alignment loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from magnet_fast.ops import (
    _autocast,
    _checks,
    _cpu_backend,
    _cpu_pixel_contrastive,
    _registry,
    _triton_backend,
    _triton_pixel_contrastive,
)
from magnet_fast.ops._binding import bind

_NAME = "pixel_contrastive_loss"

# Similarities held at once by the reference, in numbers: 64 MiB of float32.
_CHUNK = 1 << 24


def pixel_contrastive_loss(
    features: Tensor, mask: Tensor, *, temperature: float = 0.1, normalize: bool = True
) -> Tensor:
    """Pixels inside the mask should resemble each other more than those outside, and the other way round.

    Per image:

        mean_{i in +} -log( sum_{j in +} exp(z_i . z_j / t) / sum_{j in + or -} exp(z_i . z_j / t) )
        + the same with + and - exchanged

    with z the L2-normalised features of a pixel, + the pixels inside the mask and - those outside. A pixel
    is one of its own positives. When the mask is empty or full, one mean is over nothing and counts 0, and
    the other is log 1 = 0: the loss is 0, with zero gradient.

    Args:
        features: (B, C, H, W) or (B, P, C); float32, bfloat16, float16 or float64. Computed in float32
            (float64 for float64), also under autocast.
        mask: (B, H, W) or (B, P), bool or integer; nonzero is inside. It needs the features' own size.
        temperature: t, above 0. The paper gives no value; 0.1 is our choice.
        normalize: L2-normalise over the channels here; False when the features already are.

    Returns:
        (B,) losses, each >= 0, in nats; float32, or float64 for float64 features.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message
            names it.
        RuntimeError: a forced backend cannot run this; the message says why.

    Source: MagNet (arXiv 2312.12198), the P2P term. That pixel i itself belongs to the sums, and the temperature,
    are our choice: the paper's text leaves both open.
    """
    arguments = _prepare(features, mask, temperature=temperature, normalize=normalize)
    backend = _registry.choose(_NAME, arguments)
    with _autocast.disabled(features):
        if backend == "reference":
            return pixel_contrastive_loss_reference(*arguments)
        return _run(*arguments, backend)


def pixel_contrastive_loss_reference(features: Tensor, inside: Tensor, temperature: float, normalize: bool) -> Tensor:
    """The operator in plain differentiable PyTorch: features (B, P, C), inside (B, P) bool.

    The similarities are made a band of rows at a time, and again in the backward pass, so that memory
    grows with P and not P * P.
    """
    z = features if features.dtype == torch.float64 else features.float()
    if normalize:
        # eps bounds the gradient at a pixel whose features are all zero.
        z = F.normalize(z, dim=-1, eps=1e-6)
    batch, pixels, _ = z.shape
    count = inside.sum(1, keepdim=True)
    # Every pixel has the mean's weight of its own side; a side without pixels weighs no pixel.
    weight = torch.where(inside, count, pixels - count).to(z.dtype).reciprocal()

    rows = max(1, _CHUNK // (batch * pixels))
    if rows >= pixels:
        return _band(z, z, inside, inside, weight, temperature)
    total = None
    for start in range(0, pixels, rows):
        band = slice(start, start + rows)
        part = checkpoint(
            _band, z[:, band], z, inside[:, band], inside, weight[:, band], temperature,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        total = part if total is None else total + part
    return total


def _band(z_rows: Tensor, z: Tensor, inside_rows: Tensor, inside: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Weighted losses of a band of rows, summed: (B,)."""
    similarity = (z_rows / temperature) @ z.transpose(1, 2)  # (B, rows, P)
    other = inside_rows.unsqueeze(2) != inside.unsqueeze(1)
    # No row of either is empty: a pixel is always on its own side.
    own = similarity.masked_fill(other, float("-inf")).logsumexp(2)
    return (weight * (similarity.logsumexp(2) - own)).sum(1)


def _prepare(features: Tensor, mask: Tensor, *, temperature: float = 0.1, normalize: bool = True) -> tuple:
    """Check the public arguments and return those of `pixel_contrastive_loss_reference`."""
    if isinstance(features, Tensor) and features.dim() == 4:
        _checks.floating_tensor(features, "features", 4, "(B, C, H, W)")
        shape, meaning = (features.shape[0], *features.shape[2:]), "batch, height and width of features"
    else:
        _checks.floating_tensor(features, "features", 3, "(B, C, H, W) or (B, P, C)")
        shape, meaning = tuple(features.shape[:2]), "batch and pixels of features"
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    _checks.dense(mask, "mask")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask: expected bool or an integer type (threshold it), got {_checks.dtype_name(mask.dtype)}")
    _checks.exact_shape(mask, "mask", shape, meaning)
    _checks.same_device(mask, "mask", features, "features")
    temperature = _checks.positive_number(temperature, "temperature")
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
    if features.dim() == 4:
        features, mask = features.flatten(2).transpose(1, 2), mask.flatten(1)
    return features, mask != 0, temperature, normalize


_DIFFERENTIABLE = (0,)


def _fake(features: Tensor, inside: Tensor, temperature: float, normalize: bool) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty(features.shape[0], dtype=dtype)


_run = bind(
    _NAME,
    tensors=("Tensor features", "Tensor inside"),
    settings=("float temperature", "bool normalize"),
    outputs=1,
    fake=_fake,
    differentiable=_DIFFERENTIABLE,
    reference=pixel_contrastive_loss_reference,
    keeps=True,
)

_registry.register_operator(_NAME, _prepare)
_registry.register(
    _NAME,
    "cpu",
    _cpu_pixel_contrastive.forward,
    _cpu_pixel_contrastive.backward,
    _cpu_backend.supports,
    _cpu_backend.missing,
    _cpu_backend.passed_over,
    _cpu_pixel_contrastive.statistics,
)
_registry.register(
    _NAME,
    "triton",
    _triton_pixel_contrastive.forward,
    _triton_pixel_contrastive.backward,
    _triton_backend.supports,
    _triton_backend.missing,
    _triton_backend.passed_over,
    _triton_pixel_contrastive.statistics,
)
