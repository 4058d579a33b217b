"""Photographs changed at random and sentences that are true of them, as a torch dataset."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from magnet_fast.data.datasets.reader import Reader
from magnet_fast.data.phrases.changing import Cutout, changed, cut_out
from magnet_fast.data.phrases.photograph import Photograph
from magnet_fast.data.phrases.reading import RegionReader
from magnet_fast.data.phrases.saying import Phrase, phrases
from magnet_fast.data.sample import Sample, collate
from magnet_fast.data.tokenizers.base import ExpressionTokenizer
from magnet_fast.data.transforms import open_fit
from magnet_fast.models.contract import InputSpec, Text

WEIGHTS = {
    "unique": 5.0,
    "stuff": 2.0,
    "all": 1.5,
    "place": 2.0,
    "order": 2.0,
    "size": 1.2,
    "colour": 1.0,
    "relation": 0.7,
    "general": 0.5,
    "absent": 0.8,
}
"""How often each kind of sentence is drawn, among the kinds that a photograph has a sentence of [our choice]."""

STRIDE = 8
"""Pixels a cell of the maps of classes and boxes."""

_KEPT = 1.5  # times the size that photographs are kept at: a crop is seldom enlarged
_TRIES = 4  # photographs that are looked into for an object to paste


class PhraseDataset(Dataset):
    """`per_image` samples in a row are of one photograph, changed in the same way, with a sentence each.

    Everything is drawn from (seed, epoch, photograph): call `set_epoch` before each epoch. Beside what `Sample` says,
    `extra` holds what is known of the whole photograph, on cells of `STRIDE` pixels (their middles):

        classes: int64 (S/8, S/8), 1 + the place of the class in `names`; 0 where no region is.
        boxes: float32 (4, S/8, S/8), the box of the thing that a cell belongs to: middle x and y, width and height,
            shares of the picture; width 0 where there is none.

    Args:
        reader: of a data set with COCO's instances.json.
        split: whose images are taken.
        tokenizer: of the model's vocabulary.
        spec: how images are normalised.
        size: side of the square that photographs are brought to; a multiple of `STRIDE`.
        per_image: sentences about each.
        pastes: objects pasted into a photograph, on average.
        seed: of all that is drawn.
        cache: keep photographs in memory; read at once.

    Raises:
        ValueError: what `RegionReader` raises, or a size that is no multiple.
    """

    collate = staticmethod(collate)
    context = ("classes", "boxes")
    categories: frozenset[int] = frozenset()  # its sentences have none: their words name the class

    def __init__(
        self,
        reader: Reader,
        split: str,
        tokenizer: ExpressionTokenizer,
        spec: InputSpec,
        *,
        size: int,
        per_image: int = 6,
        pastes: float = 1.0,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        if size % STRIDE:
            raise ValueError(f"size is {size}; expected a multiple of {STRIDE}")
        self.spec = spec._replace(size=size, fit="squash")
        self.fit = open_fit(self.spec)
        self.regions = RegionReader(reader, split, round(_KEPT * size), cache=cache)
        self.names = self.regions.names
        self.tokenizer, self.size, self.per_image, self.pastes, self.seed = tokenizer, size, per_image, pastes, seed
        self._number = {name: 1 + place for place, name in enumerate(self.names)}
        self._with: dict[str, list[int]] = {}
        for place in range(len(self.regions)):
            for name in self.regions.classes_of(place):
                self._with.setdefault(name, []).append(place)
        self._epoch = 0
        self._last: tuple[tuple[int, int], Photograph, list[Phrase], Tensor, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.regions) * self.per_image

    def set_epoch(self, epoch: int) -> None:
        """Draw everything anew."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> Sample:
        place, photo, phrase, image, extra = self._made(index)
        ids, mask = self.tokenizer.rows(self.tokenizer.readings([phrase.text]))
        return Sample(
            image=image,
            text=Text(ids[0], mask[0]),
            mask=torch.from_numpy(self._mask(photo, phrase)),
            exists=bool(phrase.regions),
            index=index % len(self),
            ref=index % len(self),
            image_id=self.regions.images[place],
            kind=phrase.kind,
            category=None,
            size=(self.size, self.size),
            extra=extra,
        )

    def record(self, index: int) -> dict[str, Any]:
        """As `ExpressionDataset.record`; the picture is the changed one."""
        place, _, phrase, _, _ = self._made(index)
        image = self.regions.images[place]
        return {
            "ref_id": index % len(self),
            "sent_id": index % len(self),
            "image_id": image,
            "expression": phrase.text,
            "kind": phrase.kind,
            "exists": bool(phrase.regions),
            "image_path": self.regions.reader.image_path(image),
            "height": self.size,
            "width": self.size,
        }

    def tell_unread(self, limit: int | None = None) -> None:
        """Nothing to tell: sentences are made of plain words, which every tokenizer reads in pieces at least."""

    def _made(self, index: int) -> tuple[int, Photograph, Phrase, Tensor, dict[str, Tensor]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; there are {len(self)} items")
        place, number = divmod(index % len(self), self.per_image)
        key = self._epoch, place
        if self._last is None or self._last[0] != key:
            draw = random.Random(f"{self.seed} {self._epoch} {place}")
            photo = changed(self.regions.photograph(place), self.size, self.pastes, self._find, draw)
            chosen = self.choose(phrases(photo, self.regions.countable, draw), draw)
            self._last = key, photo, chosen, self.fit.normalise(photo.pixels), self._maps(photo)
        _, photo, chosen, image, extra = self._last
        return place, photo, chosen[number], image, extra

    def choose(self, found: list[Phrase], draw: random.Random) -> list[Phrase]:
        """`per_image` phrases: a kind drawn by `WEIGHTS`, then one of it; none twice, as long as there are others."""
        chosen: list[Phrase] = []
        while len(chosen) < self.per_image:
            left = [phrase for phrase in found if phrase not in chosen] or found
            kinds = sorted({phrase.kind for phrase in left})
            kind = draw.choices(kinds, [WEIGHTS[one] for one in kinds])[0]
            chosen.append(draw.choice([phrase for phrase in left if phrase.kind == kind]))
        return chosen

    def _find(self, name: str | None, draw: random.Random) -> Cutout | None:
        """An object of a class, or of any, out of any of the photographs."""
        places = range(len(self.regions)) if name is None else self._with.get(name, ())
        for _ in range(_TRIES if places else 0):
            photo = self.regions.photograph(draw.choice(places))
            fit = [i for i, own in enumerate(photo.names) if name in (None, own) and photo.things[i]]
            cutout = cut_out(photo, draw.choice(fit)) if fit else None
            if cutout is not None:
                return cutout
        return None

    def _mask(self, photo: Photograph, phrase: Phrase) -> np.ndarray:
        if not phrase.regions:
            return np.zeros((self.size, self.size), dtype=np.uint8)
        return photo.masks[list(phrase.regions)].any(axis=0).astype(np.uint8)

    def _maps(self, photo: Photograph) -> dict[str, Tensor]:
        middle = slice(STRIDE // 2, None, STRIDE)
        side = self.size // STRIDE
        classes, boxes = np.zeros((side, side), dtype=np.int64), np.zeros((4, side, side), dtype=np.float32)
        for region in np.argsort(-photo.areas):  # the smaller one lies before the larger
            cells = photo.masks[region, middle, middle]
            classes[cells] = self._number[photo.names[region]]
            left, top, right, bottom = photo.boxes[region]
            alone = photo.things[region] and not photo.crowds[region]
            box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top) if alone else (0, 0, 0, 0)
            boxes[:, cells] = np.array(box, dtype=np.float32)[:, None]
        return {"classes": torch.from_numpy(classes), "boxes": torch.from_numpy(boxes)}
