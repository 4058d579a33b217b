"""One table of pixel counts, a row a sentence: every score of every task is a function of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NEVER = 2**62
"""The rank of a truth without pixels: none of the most probable pixels, however many, lies inside."""


class Row(NamedTuple):
    """One sentence.

    Attributes:
        index: position in the dataset.
        ref: id of the referent that it belongs to; None where the data name none.
        exists: whether it names anything in the image.
        claimed: whether the model says that something is named.
        intersection, union, predicted, true: pixels of prediction ∧ truth, of prediction ∨ truth, of each alone.
        rank: pixels outside the truth that come before the first inside, the most probable first, pixels of one
            probability in reading order; `NEVER` where the truth is empty, None where no probability was given.
        nan: whether the probability holds NaN.
        kind: kind of sentence; None where the data do not say.
        category: COCO's category id; None where unknown.
    """

    index: int
    ref: int | None
    exists: bool
    claimed: bool
    intersection: int
    union: int
    predicted: int
    true: int
    rank: int | None
    nan: bool
    kind: str | None
    category: int | None


class _Pending(NamedTuple):
    """Sentences whose counts may still be on their way on a device."""

    index: Tensor
    ref: Tensor | None
    counts: Tensor  # (8, B) int64
    ranked: bool
    kinds: list[str | None]
    categories: list[int | None]

    def rows(self) -> list[Row]:
        exists, claimed, *pixels, rank, nan = self.counts.tolist()
        size = len(exists)
        refs = [None] * size if self.ref is None else self.ref.tolist()
        columns = [
            self.index.tolist(), refs, map(bool, exists), map(bool, claimed), *pixels,
            rank if self.ranked else [None] * size, map(bool, nan), self.kinds, self.categories,
        ]  # fmt: skip
        return [Row(*values) for values in zip(*columns, strict=True)]


class Table:
    """Pixel counts of sentences, in the order of their indices.

    What is computed from it depends neither on the batches, nor on their order, nor on how the sentences were spread
    over processes: a sentence that comes again replaces itself.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._pending: list[_Pending] = []

    def add(
        self,
        prediction: Tensor,
        truth: Tensor,
        *,
        index: Tensor | Sequence[int],
        ref: Tensor | Sequence[int] | None = None,
        exists: Tensor | Sequence[bool] | None = None,
        claimed: Tensor | Sequence[bool] | None = None,
        kind: Sequence[str | None] | None = None,
        category: Sequence[int | None] | None = None,
        probability: Tensor | None = None,
    ) -> None:
        """Add B sentences. Counts stay on the masks' device until the table is read: nothing waits for it here.

        Args:
            prediction: (B, H, W) bool, or integers that count as bool: the predicted masks.
            truth: (B, H, W) likewise.
            index: B positions in the dataset.
            ref: B ids of the sentences' refs; the task "robust" needs them.
            exists: B bool, whether the sentence names anything; None: where the truth is not empty.
            claimed: B bool, whether the model says that something is named; None: where its mask is not empty.
            kind: B kinds of sentence, None where there is none.
            category: B category ids, None where unknown.
            probability: (B, H, W) floating point, for the task "region". A sentence with NaN in it is refused, by its
                index, when the table is read.

        Raises:
            ValueError, TypeError: for an argument of another shape or dtype; nothing is added then.
        """
        prediction, truth = _masks("prediction", prediction), _masks("truth", truth)
        if prediction.shape != truth.shape:
            shapes = f"{tuple(prediction.shape)} and {tuple(truth.shape)}"
            raise ValueError(f"prediction and truth: expected one shape (B, H, W), got {shapes}")
        size, device = len(prediction), prediction.device
        index = _integers("index", index, size)
        ref = None if ref is None else _integers("ref", ref, size)
        predicted_pixels, true_pixels = prediction.flatten(1), truth.to(device).flatten(1)
        intersection = _count(predicted_pixels & true_pixels)
        predicted, true = _count(predicted_pixels), _count(true_pixels)
        if probability is None:
            rank = nan = torch.zeros_like(true)
        else:
            pixels = _pixels(probability, prediction.shape, device)
            rank, nan = _rank(pixels, true_pixels), _has_nan(pixels)
        counts = [
            true > 0 if exists is None else _flags("exists", exists, size, device),
            predicted > 0 if claimed is None else _flags("claimed", claimed, size, device),
            intersection, predicted + true - intersection, predicted, true,
            rank, nan,
        ]  # fmt: skip
        kinds = _entries("kind", kind, size, str)
        categories = _entries("category", category, size, int)
        stacked = torch.stack([count.to(torch.int64) for count in counts])
        self._pending.append(_Pending(index, ref, stacked, probability is not None, kinds, categories))

    def __len__(self) -> int:
        self._read()
        return len(self._rows)

    def rows(self) -> list[Row]:
        """The rows in the order of their indices.

        Raises:
            ValueError: where a prediction held NaN, naming the first such sentence.
        """
        nan = self.nan()
        if nan:
            raise ValueError(f"{nan_in(nan)}; a model that answers NaN has no score")
        return [self._rows[index] for index in sorted(self._rows)]

    def nan(self) -> list[int]:
        """The indices of the sentences whose prediction held NaN, in order."""
        self._read()
        return sorted(index for index, row in self._rows.items() if row.nan)

    def gather(self) -> None:
        """Under torch.distributed: bring the sentences of all processes together, on every process. Collective."""
        self._read()
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._rows)
        self._rows = {index: row for part in gathered for index, row in part.items()}

    def _read(self) -> None:
        pending, self._pending = self._pending, []
        for part in pending:
            self._rows.update((row.index, row) for row in part.rows())


def nan_in(sentences: Sequence[int]) -> str:
    """The beginning of a message: the predictions of these sentences, at least one, hold NaN."""
    others = f", and of {len(sentences) - 1} others" if len(sentences) > 1 else ""
    return f"prediction: NaN in that of sentence {sentences[0]}{others}"


def as_tensor(values: Any) -> Tensor:
    """A tensor where it is, and what is none on the CPU, whatever the default device."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def _masks(name: str, masks: Tensor) -> Tensor:
    masks = as_tensor(masks)
    if masks.dim() != 3:
        raise ValueError(f"{name}: expected masks (B, H, W), got shape {tuple(masks.shape)}")
    if masks.is_floating_point() or masks.is_complex():
        raise TypeError(f"{name}: expected bool, got {masks.dtype}; compare probabilities with a threshold first")
    return masks.bool()


def _integers(name: str, values: Tensor | Sequence[int], size: int) -> Tensor:
    values = as_tensor(values)
    if values.shape != (size,):
        raise ValueError(f"{name}: expected {size} integers, one a mask, got shape {tuple(values.shape)}")
    if size and (values.dtype == torch.bool or values.is_floating_point() or values.is_complex()):
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    return values.to(torch.int64)


def _flags(name: str, values: Tensor | Sequence[bool], size: int, device: torch.device) -> Tensor:
    values = as_tensor(values)
    if values.shape != (size,):
        raise ValueError(f"{name}: expected {size} bool, one a mask, got shape {tuple(values.shape)}")
    if size and values.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {values.dtype}")
    return values.to(device, non_blocking=True)


def _entries(name: str, values: Sequence[Any] | None, size: int, type_: type) -> list[Any]:
    if values is None:
        return [None] * size
    if isinstance(values, str):
        raise TypeError(f"{name}: expected {size} entries, one a mask, got the string {values!r}")
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) != size:
        raise ValueError(f"{name}: expected {size} entries, one a mask, got {len(values)}")
    for value in values:
        if value is not None and not isinstance(value, type_):
            raise TypeError(f"{name}: expected {type_.__name__} or None, got {value!r}")
    return values


def _count(pixels: Tensor) -> Tensor:
    """True pixels of (B, P) bool: (B,). In 32 bits, twice as fast as in 64."""
    return pixels.sum(dim=1, dtype=torch.int32)


def _pixels(probability: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    probability = as_tensor(probability)
    if probability.shape != shape:
        raise ValueError(f"probability: expected the masks' shape {tuple(shape)}, got {tuple(probability.shape)}")
    if not probability.is_floating_point():
        raise TypeError(f"probability: expected floating point, got {probability.dtype}")
    return probability.to(device).flatten(1)


def _has_nan(pixels: Tensor) -> Tensor:
    """Of (B, P): (B,) bool. The largest of numbers among which is NaN is NaN."""
    if not pixels.shape[1]:
        return torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    return pixels.amax(dim=1).isnan()


def _rank(pixels: Tensor, truth: Tensor) -> Tensor:
    """`Row.rank` of B sentences, (B, P) each, without sorting their pixels."""
    if not pixels.shape[1]:
        return torch.full((len(pixels),), NEVER, device=truth.device)
    # The first of the most probable pixels inside; torch.max gives the first of several.
    best, first = pixels.masked_fill(~truth, -torch.inf).max(dim=1, keepdim=True)
    place = torch.arange(pixels.shape[1], device=truth.device)
    ahead = (pixels > best) | ((pixels == best) & (place < first))
    return torch.where(truth.any(dim=1), _count(ahead).to(torch.int64), NEVER)
