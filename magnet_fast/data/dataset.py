"""Sentences about images as a torch dataset: everything known of one travels in its sample."""

from __future__ import annotations

import random
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from magnet_fast.data.cache import ArrayCache
from magnet_fast.data.context import Maker, makers_of, on_canvas
from magnet_fast.data.datasets.reader import Reader, Ref, Sentence
from magnet_fast.data.sample import Sample, collate
from magnet_fast.data.tokenizers.base import ExpressionTokenizer, Reading, shortened
from magnet_fast.data.transforms import open_fit, open_image
from magnet_fast.models.contract import InputSpec, Text

MODES = ("sentences", "refs")
TRUTHS = ("resized", "polygons")
_UNREAD = {
    "unknown": "have words that the tokenizer does not know",
    "spelled": "have words that it reads letter by letter",
    "dropped": "have characters that it leaves out",
    "cut": "are cut at its length",
}


class ExpressionDataset(Dataset):
    """Samples of one split, as `Sample` describes them.

    The sentence used is its `raw` wording, as in LAVT's and MagNet's released code; what goes beyond the tokenizer's
    `max_tokens` is cut off. A sentence that does not exist has an empty mask.

    Args:
        reader: the data set on disk.
        split: one of the reader's.
        tokenizer: of the model's vocabulary.
        spec: how images are prepared; an int is the side of a square they are squashed to, all else by default.
        mode: "sentences": an item for every sentence of every ref (the evaluation protocol). "refs": an item for every
            ref with one of its sentences, drawn from (seed, epoch, index), those that do not exist among them; call
            `set_epoch` before each epoch.
        seed: of the sentences drawn.
        cache: keep prepared images (uint8) and masks after their first use.
        cache_shared: in shared memory, for all loader workers; False in this process's own, for a loader without any.
        without_images: image_ids whose refs are left out.
        original: samples carry the mask at the image's own size, too.
        truth: the mask on the canvas is the image's own, "resized" (by nearest neighbour), or drawn there from scaled
            "polygons", as ReLA does for gRefCOCO; for squashed images, and readers that have polygons (`mask_at`).
        needs: tensors of the context that a model needs, its `needs`. What the reader does not have is made of the
            picture where that can be done (`data.context.MAKERS`).

    Attributes:
        spec: the specification, `size` being the side of the canvas.
        fit: made from it; its `back` and `probability` lead to the images' own size.

    Raises:
        ValueError: an unknown split or mode, an empty sentence or one of which the tokenizer reads nothing (naming ref
            and sentence), a cache for which there is no memory. Getting an item raises FileNotFoundError or ValueError,
            naming file and ref, for an image that is absent or unreadable. A warning says once of the first sentence
            that the tokenizer cannot read as it is, or, after `tell_unread`, how many there are.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        reader: Reader,
        split: str,
        tokenizer: ExpressionTokenizer,
        spec: InputSpec | int,
        *,
        mode: str = "sentences",
        seed: int = 0,
        cache: bool = False,
        cache_shared: bool = True,
        without_images: Collection[int] = (),
        original: bool = False,
        truth: str = "resized",
        needs: Collection[str] = (),
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        self.spec = spec if isinstance(spec, InputSpec) else InputSpec(size=spec)
        _check_truth(truth, self.spec.fit, reader)
        self.truth = truth
        self.fit = open_fit(self.spec)
        self.reader, self.split, self.tokenizer = reader, split, tokenizer
        self.mode, self.seed, self.original = mode, seed, original
        self._refs = [ref for ref in reader.refs(split) if ref.image_id not in without_images]
        for ref in self._refs:
            for sentence in ref.sentences:
                if not isinstance(sentence.raw, str) or not sentence.raw.strip():
                    raise ValueError(f"{self._name(ref, sentence)}: the sentence is empty ({sentence.raw!r})")
                if not any(map(str.isalnum, sentence.raw)):  # the tokenizer may leave nothing of it
                    self._read(ref, sentence)
        # An item is (position of its ref, sentence or None for one drawn per epoch).
        if mode == "sentences":
            self._items = [(place, sentence) for place, ref in enumerate(self._refs) for sentence in ref.sentences]
        else:
            self._items = [(place, None) for place in range(len(self._refs))]
        self._epoch = 0
        self._told = False
        self._swapped: list[int] | None = None  # index of the item that lends its sentence
        self._images = self._masks = None
        self._makers: dict[str, Maker] = {}
        if cache:
            side = self.spec.size
            self._images = ArrayCache(self._cached_images(), side * side * 3, "images", cache_shared)
            self._masks = ArrayCache(range(len(self._refs)), -(-side * side // 8), "masks", cache_shared)
        self._makers = makers_of([name for name in needs if name not in self.context])
        self._made = {
            name: ArrayCache([ref.image_id for ref in self._refs], self.spec.size**2, name, cache_shared)
            for name in (self._makers if cache else ())
        }

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        index = self._checked(index)
        place, sentence = self._own(index)
        ref, spoken = self._refs[place], self._spoken(index)
        reading = self._read(ref, spoken)
        if not (reading.complete or self._told):
            self._told = True
            worker = get_worker_info()
            if worker is None or worker.id == 0:
                notes = "; ".join(reading.notes.values())
                warnings.warn(
                    f"{self._name(ref, spoken)}: sentence {shortened(spoken.raw)}: {notes}; others are not told of",
                    stacklevel=2,
                )
        ids, mask = self.tokenizer.rows([reading])
        size = self.reader.image_size(ref.image_id)
        pixels = self._pixels(index, ref, size)
        sample = Sample(
            image=self.fit.normalise(pixels),
            text=Text(ids[0], mask[0]),
            mask=self._mask(place, sentence),
            exists=sentence.exists,
            index=index,
            ref=ref.ref_id,
            image_id=ref.image_id,
            kind=spoken.kind,
            category=ref.category_id,
            size=size,
            extra={**self.reader.extra(ref, sentence), **self._context_of(ref, pixels)},
        )
        if self.original:
            sample["original_mask"] = torch.from_numpy(self.reader.mask(ref, sentence))
        return sample

    @property
    def context(self) -> tuple[str, ...]:
        """Names of the context tensors that samples carry in `extra`, told from the first."""
        if not self._items:
            return ()
        place, sentence = self._own(0)
        return (*self.reader.extra(self._refs[place], sentence), *self._makers)

    @property
    def categories(self) -> frozenset[int]:
        """COCO's category ids that are named; empty where the data say none."""
        return frozenset(ref.category_id for ref in self._refs if ref.category_id is not None)

    @property
    def word_kinds(self) -> Mapping[str, str]:
        """Kind of each word that says something ("red": "colour"); empty where the data do not know their words."""
        return getattr(self.reader, "word_kinds", {})

    def set_epoch(self, epoch: int) -> None:
        """Choose the sentences of mode "refs" anew; no effect in mode "sentences"."""
        self._epoch = epoch

    def tell_unread(self, limit: int | None = None) -> None:
        """Warn, once, how many sentences the tokenizer cannot read as they are, and name the first of each kind.

        It reads the sentences of the first `limit` items, all by default: some 50 µs a sentence.
        """
        if self._told:
            return
        self._told = True
        count, found = 0, {kind: [] for kind in _UNREAD}
        for place, own in self._items[:limit]:
            ref = self._refs[place]
            for sentence in ref.sentences if own is None else (own,):
                count += 1
                for kind, note in self._read(ref, sentence).notes.items():
                    found[kind].append(f"ref_id {ref.ref_id}, sent_id {sentence.sent_id}: {note}")
        said = [f"{len(some)} {_UNREAD[kind]} (the first: {some[0]})" for kind, some in found.items() if some]
        if said:
            warnings.warn(f"{self.reader.source}, {self.split}: of {count} sentences {'; '.join(said)}", stacklevel=2)

    def record(self, index: int) -> dict[str, Any]:
        """What pictures and messages say of an item.

        Its keys: ref_id, sent_id, image_id, expression, kind, exists, image_path, height, width.
        """
        index = self._checked(index)
        place, own = self._own(index)
        ref, sentence = self._refs[place], self._spoken(index)
        height, width = self.reader.image_size(ref.image_id)
        return {
            "ref_id": ref.ref_id,
            "sent_id": sentence.sent_id,
            "image_id": ref.image_id,
            "expression": sentence.raw,
            "kind": sentence.kind,
            "exists": own.exists,
            "image_path": self._image_path(ref),
            "height": height,
            "width": width,
        }

    def original_mask(self, index: int) -> np.ndarray:
        """Ground truth at the image's own size, uint8 (H, W)."""
        place, sentence = self._own(self._checked(index))
        return self.reader.mask(self._refs[place], sentence)

    def load_image(self, index: int) -> Image.Image:
        """The item's picture at its own size, RGB."""
        ref = self._refs[self._items[self._checked(index)][0]]
        path = self._image_path(ref)
        try:
            image = open_image(path)
        except ValueError as error:
            raise ValueError(f"ref_id {ref.ref_id} of {self.reader.source}: {error}") from error
        height, width = self.reader.image_size(ref.image_id)
        if image.size != (width, height):
            where = getattr(self.reader, "instances_path", self.reader.source)
            raise ValueError(
                f"ref_id {ref.ref_id}: image {path} is {image.width} x {image.height}; {where} says {width} x {height}"
            )
        return image

    def shuffle_expressions(self, seed: int) -> None:
        """Swap sentences between items, none staying with its own image: a control for reading.

        A fixed permutation by `seed`; the masks stay, and with them what exists. Raises ValueError if one image has
        more than half the items.
        """
        self._swapped = _derangement([self._refs[place].image_id for place, _ in self._items], seed)

    def _name(self, ref: Ref, sentence: Sentence) -> str:
        return f"{self.reader.source}: ref_id {ref.ref_id}, sent_id {sentence.sent_id}"

    def _read(self, ref: Ref, sentence: Sentence) -> Reading:
        try:
            return self.tokenizer.readings([sentence.raw])[0]
        except ValueError as error:
            raise ValueError(f"{self._name(ref, sentence)}: {error}") from error

    def _checked(self, index: int) -> int:
        if not -len(self._items) <= index < len(self._items):
            raise IndexError(f"index is {index}; the split {self.split!r} has {len(self._items)} items")
        return index % len(self._items)

    def _own(self, index: int) -> tuple[int, Sentence]:
        """Position of the item's ref, and its own sentence."""
        place, sentence = self._items[index]
        if sentence is None:
            draw = random.Random(f"{self.seed} {self._epoch} {index}")
            sentence = draw.choice(self._refs[place].sentences)
        return place, sentence

    def _spoken(self, index: int) -> Sentence:
        """The sentence that is read: the item's own, or the one lent to it."""
        return self._own(index if self._swapped is None else self._swapped[index])[1]

    def _image_path(self, ref: Ref) -> Path:
        try:
            return self.reader.image_path(ref.image_id)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"ref_id {ref.ref_id} of {self.reader.source}: {error}") from error

    def _pixels(self, index: int, ref: Ref, size: tuple[int, int]) -> np.ndarray:
        def make() -> np.ndarray:
            return self.fit.pixels(self.load_image(index))

        return self._kept(ref.image_id, size, make)

    def _cached_images(self) -> list[int]:
        return [ref.image_id for ref in self._refs]

    def _kept(self, image_id: int, size: tuple[int, int], make: Callable[[], np.ndarray]) -> np.ndarray:
        """An image's pixels out of the cache, or made: `size` is that of its file."""
        if self._images is None:
            return make()
        return self._images.get(image_id, (*self.fit.extent(size), 3), make)

    def _context_of(self, ref: Ref, pixels: np.ndarray) -> dict[str, torch.Tensor]:
        """What is made of a picture, uint8 (S, S) each."""
        side = self.spec.size
        found = {}
        for name, maker in self._makers.items():

            def make(maker: Maker = maker) -> np.ndarray:
                return on_canvas(maker, pixels, side)

            cache = self._made.get(name)
            found[name] = torch.from_numpy(make() if cache is None else cache.get(ref.image_id, (side, side), make))
        return found

    def _mask(self, place: int, sentence: Sentence) -> torch.Tensor:
        side, ref = self.spec.size, self._refs[place]
        if self._masks is None or not sentence.exists:  # an empty mask is cheap; the cache has the ref's
            return self._on_canvas(ref, sentence)

        def make() -> np.ndarray:
            return np.packbits(self._on_canvas(ref, sentence).numpy())

        packed = self._masks.get(place, (-(-side * side // 8),), make)
        return torch.from_numpy(np.unpackbits(packed, count=side * side).reshape(side, side))

    def _on_canvas(self, ref: Ref, sentence: Sentence) -> torch.Tensor:
        if self.truth == "polygons":
            return torch.from_numpy(self.reader.mask_at(ref, sentence, (self.spec.size, self.spec.size)))
        return self.fit.mask(self.reader.mask(ref, sentence))


class MixedDataset(Dataset):
    """The items of several `ExpressionDataset`s one after the other; `index` counts through."""

    collate = staticmethod(collate)

    def __init__(self, parts: Sequence[ExpressionDataset]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        part, inner = self._place(index)
        return Sample({**part[inner], "index": index % len(self)})

    @property
    def spec(self) -> InputSpec:
        """That of the parts."""
        return self.parts[0].spec

    @property
    def context(self) -> tuple[str, ...]:
        """Names of the context tensors that the samples of every part carry."""
        return tuple(name for name in self.parts[0].context if all(name in part.context for part in self.parts))

    @property
    def categories(self) -> frozenset[int]:
        """`ExpressionDataset.categories` of all parts together."""
        return frozenset().union(*(part.categories for part in self.parts))

    @property
    def word_kinds(self) -> Mapping[str, str]:
        """`ExpressionDataset.word_kinds`, if all parts know their words."""
        kinds = [part.word_kinds for part in self.parts]
        return {word: kind for one in kinds for word, kind in one.items()} if all(kinds) else {}

    def set_epoch(self, epoch: int) -> None:
        """`ExpressionDataset.set_epoch` of every part."""
        for part in self.parts:
            part.set_epoch(epoch)

    def tell_unread(self, limit: int | None = None) -> None:
        """`ExpressionDataset.tell_unread` of every part that the first `limit` items reach into."""
        for part in self.parts:
            if limit is None or limit > 0:
                part.tell_unread(limit)
            limit = None if limit is None else limit - len(part)

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


def require_context(dataset: ExpressionDataset | MixedDataset, needs: Iterable[str]) -> None:
    """Refuse a data set whose samples lack a context tensor that a model needs, before training starts.

    Args:
        dataset: what the model is to be trained or scored on.
        needs: names of the tensors, a model's `needs`.

    Raises:
        ValueError: it names those that are lacking, and those that the data have.
    """
    missing = [name for name in needs if name not in dataset.context]
    if missing:
        parts = dataset.parts if isinstance(dataset, MixedDataset) else [dataset]
        sources = ", ".join(f"{part.reader.source} ({part.split})" for part in parts)
        raise ValueError(
            f"dataset: the model needs {', '.join(missing)} beside image and text; samples of {sources} carry "
            f"{', '.join(dataset.context) or 'nothing of the kind'}"
            + (
                "; `data retrieve` finds reference images, data.references names its file"
                if "reference_image" in missing
                else ""
            )
        )


def _check_truth(truth: str, fit: str, reader: Reader) -> None:
    if truth not in TRUTHS:
        raise ValueError(f"truth is {truth!r}; expected one of {', '.join(TRUTHS)}")
    if truth == "polygons" and fit != "squash":
        raise ValueError(f"truth is 'polygons', which is for squashed images; the model's are fitted by {fit!r}")
    if truth == "polygons" and not hasattr(reader, "mask_at"):
        raise ValueError(f"truth is 'polygons'; {reader.source} is of a format without them; expected 'resized'")


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
