"""Small models and batches that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models import Prediction, Text
from magnet_fast.models.base import ReferringModel

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnet": ("magnet_tiny", {}),
    "magnet-xmha": ("magnet_tiny", {"fusion__form": "xmha"}),
    "magnet-released": ("magnet_tiny", {"fusion__masking": "released"}),
    "lavt": ("lavt_tiny", {}),
    "refsegformer": ("refsegformer_tiny", {}),
    "refsegformer-topdown": ("refsegformer_tiny", {"head": {"kind": "token_topdown", "head_dim": 16}}),
    "refsegformer-released": ("refsegformer_tiny", {"fusion__masking": "released", "fusion__blank": 0}),
    "rela": ("rela_tiny", {}),
    "cris": ("cris_tiny", {}),
    "risam": ("risam_tiny", {}),
    "risam-pixels": ("risam_tiny", {"fusion__language_guided": False}),
    "fsfi": ("fsfi_tiny", {}),
    "wgfm": ("wgfm_tiny", {}),
    "rnr": ("rnr_tiny", {}),
    "lda": ("lda_tiny", {}),
    "two-stage": ("two_stage_tiny", {}),
    "nsnpris": ("nsnpris_tiny", {}),
    "cmt": ("cmt_tiny", {}),
    "relation": ("relation_alignment_tiny", {}),
}
"""The tiny presets and their variants."""

_SWIN = {"image__depths": (1, 2, 1, 1)}
_SAM = {"num_layers": 3, "global_layers": (1,), "taps": (0, 1, 2)}
_WHOLE = {**_SWIN, "text__num_layers": 1}  # of a text that is encoded whole
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "magnet": ("magnet_tiny", {**_SWIN, "fusion__pyramid": (2,), "head__mask_layers": 1}),
    "magnet-xmha": ("magnet_tiny", {**_SWIN, "fusion__pyramid": (2,), "head__mask_layers": 1, "fusion__form": "xmha"}),
    "lavt": ("lavt_tiny", _WHOLE),
    "refsegformer": ("refsegformer_tiny", _WHOLE),
    "refsegformer-topdown": ("refsegformer_tiny", {**_WHOLE, "head": {"kind": "token_topdown", "head_dim": 16}}),
    "rela": ("rela_tiny", {**_WHOLE, "head__layers": 2}),
    "cris": ("cris_tiny", {"head__layers": 1, "text__num_layers": 1}),
    "risam": ("risam_tiny", {"fusion__layers": 1, "text__num_layers": 1, "image": _SAM}),
    "fsfi": ("fsfi_tiny", {"text__num_layers": 1}),
    "wgfm": ("wgfm_tiny", {}),
    "rnr": ("rnr_tiny", {"fusion__side": 4}),
    "lda": ("lda_tiny", {"text__num_layers": 1}),
    "two-stage": ("two_stage_tiny", {**_SWIN, "fusion__pyramid": (2,)}),
    "nsnpris": ("nsnpris_tiny", {"head__layers": 1}),
    "cmt": ("cmt_tiny", _WHOLE),
    "relation": ("relation_alignment_tiny", _WHOLE),
}
"""Every kind of block once: where time goes by the number of layers."""


def build(case: tuple[str, dict[str, Any]], **overrides: Any) -> ReferringModel:
    """The model of a case, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    name, settings = case
    return models.create(name, **{**settings, **overrides}).eval()


def batch(
    size: tuple[int, int] = (64, 96), words: int = 9, count: int = 2, vocabulary: int = 1024
) -> tuple[Tensor, Text]:
    """Noise for images and ids; all sentences but the first end in three tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 3, *size, generator=generator)
    ids = torch.randint(5, vocabulary, (count, words), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1:, words - 3 :] = False
    return image, Text(ids * mask, mask)


def open_gates(model: nn.Module) -> None:
    """Much starts at zero: gates, sampling offsets, norms before a sum. With random weights in them every path reaches
    the output."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if (
            "gate." in name
            or not parameter.any()
            and name.endswith("weight")
            or name.endswith("attention_weights.weight")
        ):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def everything(prediction: Prediction) -> Tensor:
    """A loss of all that a prediction holds and a training term may read."""
    total = prediction.words.features.square().mean()
    for each in (prediction, *prediction.earlier):
        for tensor in (each.mask, each.presence, each.pixels):
            if tensor is not None:
                total = total + tensor.square().mean()
        for tensor in each.extra.values():
            total = total + tensor.square().mean()
    return total


def without_gradient(model: nn.Module) -> list[str]:
    """Trained parameters that the backward pass did not reach."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def context_of(model: ReferringModel, image: Tensor) -> dict[str, Tensor]:
    """The tensors that a model needs beside text and images (B, 3, H, W), of noise, squares and halves."""
    count, _, height, width = image.shape
    generator = torch.Generator().manual_seed(3)
    made: dict[str, Callable[[], Tensor]] = {
        "reference_image": lambda: torch.randn(image.shape, generator=generator),
        "superpixels": lambda: (torch.arange(height)[:, None] // 16 * 4 + torch.arange(width) // 16).expand(
            count, -1, -1
        ),
        "proposals": lambda: torch.rand(count, 5, height // 4, width // 4, generator=generator).round(),
        "node_features": lambda: torch.randn(count, 5, model.config.node_width, generator=generator),
    }
    return {name: made[name]() for name in model.needs}
