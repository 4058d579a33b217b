"""The scores of referring segmentation, from each sentence's intersection and union.

The two IoUs are confused all over the literature, so both always appear under their names: **oIoU**, overall
or cumulative, is ΣI / ΣU; **mIoU** is the mean over the sentences of I / U.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class ReferringSegmentationMetrics:
    """oIoU, mIoU and P@X over sentences, in all and by kind of sentence.

    Sentences carry their index in the dataset, and the sums are taken in the order of the indices: the result
    does not depend on the batches, on their order, or on how the sentences were spread over processes.
    """

    def __init__(self) -> None:
        self._counts: dict[int, tuple[int, int, str | None]] = {}

    def update(
        self,
        prediction: Tensor,
        truth: Tensor,
        indices: Iterable[int],
        kinds: Iterable[str | None] | None = None,
    ) -> None:
        """Add sentences.

        Args:
            prediction: (B, H, W) bool, the predicted masks.
            truth: (B, H, W) the ground truth, bool or 0/1.
            indices: B indices; a sentence that comes again replaces itself.
            kinds: B names of the kind of sentence, None where there is none.
        """
        self.update_counts(*intersection_and_union(prediction, truth), indices, kinds)

    def update_counts(
        self,
        intersection: Tensor | Iterable[int],
        union: Tensor | Iterable[int],
        indices: Iterable[int],
        kinds: Iterable[str | None] | None = None,
    ) -> None:
        """Add sentences by their pixel counts, B of each."""
        indices = [int(index) for index in indices]
        kinds = list(kinds) if kinds is not None else [None] * len(indices)
        intersection, union = (
            value.tolist() if isinstance(value, Tensor) else list(value) for value in (intersection, union)
        )
        for index, i, u, kind in zip(indices, intersection, union, kinds, strict=True):
            if not 0 <= i <= u:
                raise ValueError(f"sentence {index}: intersection {i} must lie between 0 and the union {u}")
            self._counts[index] = (int(i), int(u), kind)

    def __len__(self) -> int:
        return len(self._counts)

    def gather(self) -> None:
        """Under torch.distributed: bring the sentences of all processes together, on every process."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._counts)
        self._counts = {index: counts for part in gathered for index, counts in part.items()}

    def compute(self) -> dict[str, Any]:
        """Scores in percent: ``oIoU``, ``mIoU``, ``P@0.5`` … ``P@0.9``, ``sentences``, and the same
        ``by_kind``.

        Without sentences every score is NaN.
        """
        ordered = [self._counts[index] for index in sorted(self._counts)]
        kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, u, kind in ordered:
            if kind is not None:
                kinds[kind].append((i, u))
        scores: dict[str, Any] = _scores([(i, u) for i, u, _ in ordered])
        scores["by_kind"] = {kind: _scores(kinds[kind]) for kind in sorted(kinds)}
        return scores


def intersection_and_union(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """|prediction ∧ truth| and |prediction ∨ truth|: pixel counts (B,) int64 of two stacks (B, H, W)."""
    if prediction.shape != truth.shape or prediction.dim() != 3:
        raise ValueError(
            f"expected two stacks of masks (B, H, W), got {tuple(prediction.shape)} and {tuple(truth.shape)}"
        )
    prediction, truth = prediction.bool().flatten(1), truth.bool().flatten(1)
    return (prediction & truth).sum(dim=1), (prediction | truth).sum(dim=1)


def _scores(counts: list[tuple[int, int]]) -> dict[str, Any]:
    intersection, union = torch.tensor(counts, dtype=torch.int64).reshape(-1, 2).unbind(dim=1)
    # Nothing predicted where nothing is to be found has U = 0; the field counts it as 0.
    iou = torch.where(union > 0, intersection.double() / union.clamp(min=1), 0.0)
    total_union = int(union.sum())
    nothing = float("nan")
    scores: dict[str, Any] = {
        "oIoU": 100 * int(intersection.sum()) / total_union if total_union else (0.0 if counts else nothing),
        "mIoU": 100 * iou.mean().item() if counts else nothing,
    }
    for threshold in THRESHOLDS:
        # In whole numbers: 7/10 as a float is not what 0.7 rounds to in every sum, and the rule is "at
        # least".
        hits = (10 * intersection >= round(10 * threshold) * union) & (union > 0)
        scores[f"P@{threshold}"] = 100 * hits.double().mean().item() if counts else nothing
    scores["sentences"] = len(counts)
    return scores
