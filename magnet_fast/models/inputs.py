"""The input contract that every model checks before it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .bert import BertSlices


def check_inputs(image: Tensor, input_ids: Tensor, attention_mask: Tensor, text: BertSlices) -> None:
    """Raise TypeError or ValueError naming what does not fit (B, 3, H, W), (B, T) and (B, T).

    Only shapes and dtypes are looked at: values would cost a synchronisation on a GPU.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be a floating-point tensor, normalised; got {image.dtype}")
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (B, 3, H, W) with no empty dimension; got {tuple(image.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32; got {input_ids.dtype}")
    if input_ids.ndim != 2 or input_ids.shape[0] != image.shape[0] or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be (B, T) with the image's batch of {image.shape[0]}; got {tuple(input_ids.shape)}"
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}; got {tuple(attention_mask.shape)}"
        )
    if input_ids.shape[1] > text.max_positions:
        raise ValueError(
            f"input_ids holds {input_ids.shape[1]} tokens; this text encoder has {text.max_positions} positions"
        )
