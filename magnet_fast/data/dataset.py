"""Expressions as a torch dataset: image, mask and token ids per sentence or per ref."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, default_collate

from magnet_fast.data.refer import Ref, Refer, Sentence
from magnet_fast.data.tokenizer import Tokenizer
from magnet_fast.data.transforms import normalise, open_image, prepare_mask, resize_image

MODES = ("sentences", "refs")


class ExpressionDataset(Dataset):
    """Items of one split.

    mode "sentences": one item per sentence of every ref (the evaluation protocol). mode "refs": one item per ref
    with one of its sentences, drawn from (seed, epoch, index); call `set_epoch` before each epoch.

    The sentence used is its `raw` wording, as in LAVT's and MagNet's released code; what goes beyond the tokenizer's
    max_words is cut off. cache=True keeps resized images (uint8) and masks in memory after their first use, in each
    process for itself. Refs of images in `without_images` (image_ids) are left out.

    An item is a dict: image float32 (3, S, S), mask uint8 (S, S) of 0 and 1, input_ids and attention_mask
    int64 (T,), index int. Images are squashed to S x S (see `prepare_image`).

    Raises ValueError for an unknown split or mode and for an empty sentence, naming ref and sentence; getting
    an item raises FileNotFoundError or ValueError, naming file and ref, for an image that is absent or
    unreadable.
    """

    collate = staticmethod(default_collate)

    def __init__(
        self,
        refer: Refer,
        split: str,
        tokenizer: Tokenizer,
        image_size: int,
        *,
        mode: str = "sentences",
        seed: int = 0,
        cache: bool = False,
        without_images: Collection[int] = (),
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size is {image_size!r}; expected an int of at least 1")
        self.refer, self.split, self.tokenizer = refer, split, tokenizer
        self.image_size, self.mode, self.seed = image_size, mode, seed
        self._refs = [ref for ref in refer.refs(split) if ref.image_id not in without_images]
        for ref in self._refs:
            for sentence in ref.sentences:
                if not isinstance(sentence.raw, str) or not sentence.raw.strip():
                    raise ValueError(
                        f"{refer.refs_path}: ref_id {ref.ref_id}, sent_id {sentence.sent_id}: "
                        f"the sentence is empty ({sentence.raw!r})"
                    )
        # An item is (ref, sentence or None for one drawn per epoch).
        if mode == "sentences":
            self._items = [(ref, sentence) for ref in self._refs for sentence in ref.sentences]
        else:
            self._items = [(ref, None) for ref in self._refs]
        self._epoch = 0
        self._swapped: list[int] | None = None  # index of the item that lends its sentence
        self._cache: dict[Any, Any] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._checked(index)
        ref, _ = self._items[index]
        input_ids, attention_mask = self.tokenizer(self._sentence(index).raw)
        return {
            "image": normalise(self._cached(("image", ref.image_id), lambda: self._resized(index))),
            "mask": self._cached(
                ("mask", ref.ann_ids, ref.image_id),
                lambda: prepare_mask(self.refer.mask(ref), self.image_size),
            ).clone(),
            "input_ids": input_ids[0],
            "attention_mask": attention_mask[0],
            "index": index,
        }

    def set_epoch(self, epoch: int) -> None:
        """Choose the sentences of mode "refs" anew; no effect in mode "sentences"."""
        self._epoch = epoch

    def record(self, index: int) -> dict[str, Any]:
        """What an item is about: ref_id, sent_id, image_id, expression, kind, image_path, height, width."""
        index = self._checked(index)
        ref, _ = self._items[index]
        sentence = self._sentence(index)
        height, width = self.refer.image_size(ref.image_id)
        return {
            "ref_id": ref.ref_id,
            "sent_id": sentence.sent_id,
            "image_id": ref.image_id,
            "expression": sentence.raw,
            "kind": sentence.kind,
            "image_path": self._image_path(ref),
            "height": height,
            "width": width,
        }

    def original_mask(self, index: int) -> np.ndarray:
        """Ground truth at the image's own size, uint8 (H, W)."""
        return self.refer.mask(self._items[self._checked(index)][0])

    def load_image(self, index: int) -> Image.Image:
        """The item's picture at its own size, RGB."""
        ref, _ = self._items[self._checked(index)]
        path = self._image_path(ref)
        try:
            image = open_image(path)
        except ValueError as error:
            raise ValueError(f"ref_id {ref.ref_id} of {self.refer.refs_path}: {error}") from error
        height, width = self.refer.image_size(ref.image_id)
        if image.size != (width, height):
            raise ValueError(
                f"ref_id {ref.ref_id}: image {path} is {image.width} x {image.height}; "
                f"{self.refer.instances_path} says {width} x {height}"
            )
        return image

    def shuffle_expressions(self, seed: int) -> None:
        """Swap sentences between items, none staying with its own image: a control for reading.

        A fixed permutation by `seed`; the masks stay. Raises ValueError if one image has more than half the
        items.
        """
        self._swapped = _derangement([ref.image_id for ref, _ in self._items], seed)

    def _checked(self, index: int) -> int:
        if not -len(self._items) <= index < len(self._items):
            raise IndexError(f"index is {index}; the split {self.split!r} has {len(self._items)} items")
        return index % len(self._items)

    def _sentence(self, index: int) -> Sentence:
        lender = index if self._swapped is None else self._swapped[index]
        ref, sentence = self._items[lender]
        if sentence is not None:
            return sentence
        draw = random.Random(f"{self.seed} {self._epoch} {lender}")
        return draw.choice(ref.sentences)

    def _image_path(self, ref: Ref) -> Path:
        try:
            return self.refer.image_path(ref.image_id)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"ref_id {ref.ref_id} of {self.refer.refs_path}: {error}") from error

    def _resized(self, index: int) -> np.ndarray:
        return resize_image(self.load_image(index), self.image_size)

    def _cached(self, key: Any, make: Any) -> Any:
        if self._cache is None:
            return make()
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


class MixedDataset(Dataset):
    """The items of several `ExpressionDataset`s one after the other; `index` counts through."""

    def __init__(self, parts: Sequence[ExpressionDataset]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, inner = self._place(index)
        return {**part[inner], "index": index % len(self)}

    def set_epoch(self, epoch: int) -> None:
        """`ExpressionDataset.set_epoch` of every part."""
        for part in self.parts:
            part.set_epoch(epoch)

    def record(self, index: int) -> dict[str, Any]:
        """`ExpressionDataset.record` of an item."""
        part, inner = self._place(index)
        return part.record(inner)

    def _place(self, index: int) -> tuple[ExpressionDataset, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; the {len(self.parts)} datasets have {len(self)} items")
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def _derangement(image_ids: list[int], seed: int) -> list[int]:
    """A permutation that maps each item to one of another image.

    Items are laid out image by image, images in random order, and shifted by the largest image's count: no
    shift of that length stays within an image.
    """
    draw = random.Random(seed)
    groups: dict[int, list[int]] = {}
    for index, image_id in enumerate(image_ids):
        groups.setdefault(image_id, []).append(index)
    largest = max(map(len, groups.values()))
    if 2 * largest > len(image_ids):
        raise ValueError(f"one image has {largest} of the {len(image_ids)} sentences; expected at most half")
    order = list(groups.values())
    draw.shuffle(order)
    laid = []
    for group in order:
        draw.shuffle(group)
        laid += group
    permutation = [0] * len(laid)
    shift = draw.randint(largest, len(laid) - largest)
    for position, index in enumerate(laid):
        permutation[index] = laid[(position + shift) % len(laid)]
    return permutation
