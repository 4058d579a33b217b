"""A data set whose samples carry the picture that was retrieved for their sentence, as TV-Net reads it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magnet_fast.data.dataset import ExpressionDataset
from magnet_fast.data.datasets.reader import Reader
from magnet_fast.data.references import read_references
from magnet_fast.data.sample import Sample
from magnet_fast.data.transforms import open_image

REFERENCE = "reference_image"


class RetrievalDataset(ExpressionDataset):
    """Samples with `extra["reference_image"]`, float32 (3, S, S), prepared as their own image is.

    A sentence that is lent to another item (`shuffle_expressions`) brings its picture along; where that is the item's
    own there is none, that is zeros.

    Args:
        reader, split, and all further ones: as of `ExpressionDataset`.
        references: the file that `write_references` wrote.

    Raises:
        FileNotFoundError, ValueError: as `read_references` and `ExpressionDataset`.
    """

    def __init__(
        self, reader: Reader, split: str, *arguments: Any, references: str | os.PathLike[str], **options: Any
    ) -> None:
        self._references = read_references(references, reader, split)
        super().__init__(reader, split, *arguments, **options)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample["extra"] = {**sample["extra"], REFERENCE: self._reference(sample["index"], sample["image_id"])}
        return sample

    @property
    def context(self) -> tuple[str, ...]:
        return (*super().context, REFERENCE)

    def _cached_images(self) -> list[int]:
        found = {self._references[ref.ref_id, one.sent_id] for ref in self._refs for one in ref.sentences}
        return [*super()._cached_images(), *sorted(found)]

    def _reference(self, index: int, own: int) -> Tensor:
        place, sentence = self._own(index if self._swapped is None else self._swapped[index])
        image_id = self._references[self._refs[place].ref_id, sentence.sent_id]
        if image_id == own:
            return torch.zeros(3, self.spec.size, self.spec.size, device="cpu")

        def make() -> np.ndarray:
            return self.fit.pixels(open_image(self.reader.image_path(image_id)))

        return self.fit.normalise(self._kept(image_id, self.reader.image_size(image_id), make))
