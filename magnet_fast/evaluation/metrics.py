"""Scores of sentences: pure functions of the rows of a `Table`, in percent, NaN where a score is not defined.

The two plain IoUs are confused all over the literature, so both appear under their names: oIoU, overall or cumulative,
is ΣI / ΣU; mIoU is the mean over the sentences of I / U.

With B sentences, I and U are the pixels of intersection and union of a sentence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from magnet_fast.evaluation.table import Row

NAN = float("nan")


class Rule(NamedTuple):
    """How a protocol reads an IoU.

    Attributes:
        strict: a sentence counts at a threshold X where its IoU exceeds X; otherwise it is enough to reach X.
        epsilon: added to the union of a sentence, I / (U + ε).
    """

    strict: bool = False
    epsilon: float = 0.0


DEFAULT_RULE = Rule()
Rows = Sequence[Row]
Metric = Callable[[Rows, Rule], float]


def intersection_over_union(row: Row, rule: Rule = DEFAULT_RULE) -> float:
    """I / U of a sentence, from 0 to 1; 0 where U = 0, as the field counts it."""
    return row.intersection / (row.union + rule.epsilon) if row.union else 0.0


def overall_iou(rows: Rows, rule: Rule) -> float:
    """oIoU = ΣI / ΣU; 0 where all unions are empty, NaN without sentences."""
    union = sum(row.union for row in rows)
    if not union:
        return 0.0 if rows else NAN
    return 100 * sum(row.intersection for row in rows) / union


def mean_iou(rows: Rows, rule: Rule) -> float:
    """mIoU, the mean of the sentences' I / U; NaN without sentences."""
    return 100 * _mean(intersection_over_union(row, rule) for row in rows)


def precision(threshold: Fraction) -> Metric:
    """P@X: the share of the sentences whose IoU reaches X."""

    def score(rows: Rows, rule: Rule) -> float:
        return 100 * _mean(_reaches(row, threshold, rule) for row in rows)

    return score


# ---- generalised: a sentence names none, one or several objects (ReLA's released evaluator) ----


def generalized_iou(rows: Rows, rule: Rule) -> float:
    """gIoU: the mean IoU, where a sentence that names nothing scores 1 if nothing is claimed, else 0."""
    return 100 * _mean(_generalized(row, rule) for row in rows)


def cumulative_iou(rows: Rows, rule: Rule) -> float:
    """cIoU = ΣI / ΣU; NaN where ΣU = 0.

    A sentence that names nothing adds the predicted area to ΣU where something is claimed, and nothing otherwise,
    whatever its mask. One that names something adds U, with the predicted mask as it is, and I only where something is
    claimed.
    """
    intersection = sum(row.intersection for row in rows if row.exists and row.claimed)
    union = sum(row.union if row.exists else row.predicted if row.claimed else 0 for row in rows)
    return 100 * intersection / union if union else NAN


def no_target_accuracy(rows: Rows, rule: Rule) -> float:
    """N-acc: of the sentences that name nothing, the share of which nothing is claimed; NaN without such sentences."""
    return 100 * _mean(not row.claimed for row in rows if not row.exists)


def target_accuracy(rows: Rows, rule: Rule) -> float:
    """T-acc: of the sentences that name something, the share of which something is claimed."""
    return 100 * _mean(row.claimed for row in rows if row.exists)


def generalized_precision(threshold: Fraction) -> Metric:
    """Pr@X: of the sentences that name something, the share where something is claimed and the IoU reaches X."""

    def score(rows: Rows, rule: Rule) -> float:
        return 100 * _mean(row.claimed and _reaches(row, threshold, rule) for row in rows if row.exists)

    return score


# ---- robust: a ref has sentences that fit it and sentences that fit nothing (RefSegformer's R-RIS) ----


def answers(rows: Rows) -> list[Row]:
    """The rows of sentences that name something, their predicted masks emptied where nothing is claimed."""
    return [_emptied(row) for row in rows if row.exists]


def rejection_rate(rows: Rows, rule: Rule) -> float:
    """mRR: the mean over the refs of the share of their sentences that fit nothing whose mask is empty.

    One pixel is enough to be not empty. A ref without such sentences is left out.
    """
    refs = _by_ref(row for row in rows if not row.exists)
    return 100 * _mean(_mean(not _emptied(row).predicted for row in sentences) for sentences in refs)


def robust_iou(rows: Rows, rule: Rule) -> float:
    """rIoU: the mean over the refs of ΣI / (ΣU + F), F the predicted pixels of their sentences that fit nothing.

    ΣI and ΣU are over the ref's sentences that fit it; a ref without these is left out, 0 / 0 counts 0.
    """
    values = []
    for sentences in _by_ref(rows):
        fitting = answers(sentences)
        if fitting:
            union = sum(row.union for row in fitting)
            union += sum(_emptied(row).predicted for row in sentences if not row.exists)
            values.append(sum(row.intersection for row in fitting) / union if union else 0.0)
    return 100 * _mean(values)


def mean_iou_of_refs(rows: Rows, rule: Rule) -> float:
    """mIoU_ref: the mean over the refs of the mean I / U of their sentences that fit; published as mIoU of R-RIS."""
    refs = _by_ref(answers(rows))
    return 100 * _mean(_mean(intersection_over_union(row, rule) for row in sentences) for sentences in refs)


# ---- region: a command names a place (Talk2Car-RegSeg) ----


def pointing_game(rows: Rows, rule: Rule) -> float:
    """The share of the sentences whose most probable pixel lies inside the truth."""
    return recall(1)(rows, rule)


def recall(count: int) -> Metric:
    """recall@k: the share of the sentences with any of the k most probable pixels inside the truth."""
    if count < 1:
        raise ValueError(f"recall@k: expected a count of at least 1, got {count}")

    def score(rows: Rows, rule: Rule) -> float:
        ranks = [row.rank for row in rows]
        if None in ranks:
            where = rows[ranks.index(None)].index
            raise ValueError(f"probability: pointing game and recall@k need it; sentence {where} came without")
        return 100 * _mean(rank < count for rank in ranks)

    return score


_METRICS: dict[str, Metric] = {
    "oIoU": overall_iou,
    "mIoU": mean_iou,
    "gIoU": generalized_iou,
    "cIoU": cumulative_iou,
    "N-acc": no_target_accuracy,
    "T-acc": target_accuracy,
    "mRR": rejection_rate,
    "rIoU": robust_iou,
    "mIoU_ref": mean_iou_of_refs,
    "pointing": pointing_game,
}
_METRICS_AT: dict[str, tuple[Callable, Callable[..., Metric]]] = {
    "P": (Fraction, precision),
    "Pr": (Fraction, generalized_precision),
    "recall": (int, recall),
}


def metric(name: str) -> Metric:
    """The score of a name: "oIoU", "P@0.5", "recall@10", ….

    Raises:
        ValueError: for a name that is no score's.
    """
    head, at, number = name.partition("@")
    if not at and name in _METRICS:
        return _METRICS[name]
    if at and head in _METRICS_AT:
        read, make = _METRICS_AT[head]
        try:
            return make(read(number))
        except (ValueError, ZeroDivisionError):
            pass  # said below, with what there is
    known = [*_METRICS, *(f"{entry}@…" for entry in _METRICS_AT)]
    raise ValueError(f"score: {name!r} is none; there are {', '.join(known)}")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else NAN


def _reaches(row: Row, threshold: Fraction, rule: Rule) -> bool:
    # In whole numbers: 7/10 as a float is not what 0.7 rounds to in every division. An epsilon, far below one pixel,
    # can only take equality away, which a strict rule does already.
    reached, needed = threshold.denominator * row.intersection, threshold.numerator * row.union
    return row.union > 0 and (reached > needed if rule.strict else reached >= needed)


def _generalized(row: Row, rule: Rule) -> float:
    if row.exists != row.claimed:
        return 0.0
    return intersection_over_union(row, rule) if row.exists else 1.0


def _emptied(row: Row) -> Row:
    return row if row.claimed else row._replace(intersection=0, union=row.true, predicted=0)


def _by_ref(rows: Iterable[Row]) -> list[list[Row]]:
    refs: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ref is None:
            raise ValueError(
                f"ref: scores of refs need the id of each sentence's ref; sentence {row.index} came without"
            )
        refs[row.ref].append(row)
    return list(refs.values())
