"""A sample and a batch: everything known of a sentence travels with it, from the reader to losses and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from magnet_fast.models.contract import Text


class Sample(TypedDict, total=False):
    """One sentence about one image. `Batch` has the same keys, collated by `collate`.

    Keys:
        image: float32 (3, S, S), prepared as the model's `InputSpec` says.
        text: `Text` of ids and mask, (T,) each.
        mask: uint8 (S, S) of 0 and 1, what is named, on the same canvas as the image; empty where nothing is.
        exists: whether the sentence names anything in the image.
        index: position in the dataset.
        ref: id of the referent that the sentence belongs to; sentences of one ref share it.
        image_id: id of the image.
        kind: kind of sentence, such as "relation"; None where the data do not say.
        category: COCO's category id of what is named; None where unknown, or where several are.
        size: (height, width) of the image file, in pixels.
        original_mask: uint8 (height, width), where the dataset was asked for it.
        extra: named tensors that a part of a model may need ("reference_image", "superpixels"); else empty.
    """

    image: Tensor
    text: Text
    mask: Tensor
    exists: bool
    index: int
    ref: int
    image_id: int
    kind: str | None
    category: int | None
    size: tuple[int, int]
    original_mask: Tensor
    extra: dict[str, Tensor]


Batch = dict[str, Any]
"""Keys of `Sample`. image (B, 3, S, S), text of (B, T), mask (B, S, S), exists (B,) bool, index, ref and image_id (B,)
int64; kind, category, size and original_mask are lists of B; extra is a dict of stacked tensors."""

_LISTS = ("kind", "category", "size", "original_mask")


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to a batch. What may differ in shape, or be None, stays a list."""
    first = samples[0]
    batch: Batch = {}
    for key in first:
        values = [sample[key] for sample in samples]
        if key in _LISTS:
            batch[key] = values
        elif key == "text":
            batch[key] = Text(*(torch.stack(parts) for parts in zip(*values, strict=True)))
        elif key == "extra":
            batch[key] = {name: torch.stack([value[name] for value in values]) for name in first["extra"]}
        elif isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values, device="cpu")
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; lists stay where they are."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, Text):
            return Text(*map(move, value))
        return {name: move(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    return {key: move(value) for key, value in batch.items()}
