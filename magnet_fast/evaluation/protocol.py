"""The family's evaluation protocol (LAVT, MagNet, ReLA), in batches and over several processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from magnet_fast.evaluation.metrics import ReferringSegmentationMetrics, intersection_and_union

Resolution = Literal["input", "original"]
RESOLUTIONS = ("input", "original")
PROBABILITY_THRESHOLD = 0.5


@torch.no_grad()  # not inference_mode: what a model caches on the way must still serve training
def evaluate(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 16,
    resolution: Resolution = "input",
    *,
    device: torch.device | str | None = None,
    workers: int = 0,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a model on every sentence of a dataset.

    An image is squashed to the dataset's square; a pixel belongs to the referent where ``model.predict``
    gives more than 0.5 (for MagNet softmax(class)[1] · sigmoid(mask)). The result equals that of batch size
    1.

    Args:
        model: a model of this package; put into eval mode for the time of the call.
        dataset: an ``ExpressionDataset`` in mode "sentences".
        batch_size: sentences at a time.
        resolution: "input" compares at the dataset's square, with the ground truth resized by nearest (the
            family's protocol); "original" resizes the prediction to the image's own size and compares there.
        device: where to compute; default the device of the model's parameters.
        workers: loader processes.
        limit: score the first so many sentences only.
        autocast: a dtype to autocast to; default full precision.
        progress: called with (sentences done, sentences in all) of this process after each batch.

    Under torch.distributed each process scores its share of the sentences, none twice, and all get the whole
    result.

    Returns:
        The scores of `ReferringSegmentationMetrics.compute`, and ``resolution``, ``image_size``,
        ``protocol``.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution: expected one of {', '.join(RESOLUTIONS)}, got {resolution!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise ValueError("dataset: it holds no sentence to evaluate")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    joined = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    mine = list(range(rank, count, world))
    records = {index: dataset.record(index) for index in mine}

    metrics = ReferringSegmentationMetrics()
    counts: list[Tensor] = []  # (2, B) each, left on the device until the end: no wait for it in the loop
    order: list[int] = []
    training = model.training
    model.eval()
    try:
        for batch in _loader(dataset, mine, records, batch_size, resolution, workers, device):
            indices = batch["index"].tolist()
            inputs = [batch[key].to(device, non_blocking=True) for key in ("image", "input_ids", "attention_mask")]
            if resolution == "input":
                truth = batch["mask"].to(device, non_blocking=True)
            else:
                truth = torch.stack([torch.as_tensor(dataset.original_mask(index)) for index in indices]).to(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                probability = model.predict(*inputs, size=tuple(truth.shape[-2:]))
            counts.append(torch.stack(intersection_and_union(probability > PROBABILITY_THRESHOLD, truth)))
            order += indices
            if progress is not None:
                progress(len(order), len(mine))
    finally:
        model.train(training)
    if order:
        intersection, union = torch.cat(counts, dim=1).cpu()
        metrics.update_counts(intersection, union, order, [records[index].get("kind") for index in order])
    metrics.gather()
    return {
        "protocol": "image squashed to a square, every sentence of every referent, probability > 0.5",
        "resolution": resolution,
        "image_size": getattr(dataset, "image_size", None),
        **metrics.compute(),
    }


def _loader(
    dataset: Dataset,
    indices: list[int],
    records: dict[int, dict],
    batch_size: int,
    resolution: Resolution,
    workers: int,
    device: torch.device,
) -> DataLoader:
    if resolution == "input":
        groups = [indices]
    else:  # a batch is resized and compared at once, so its images must agree in size
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in indices:
            by_size[records[index]["height"], records[index]["width"]].append(index)
        groups = list(by_size.values())
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=_Batches(batches),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # A loader draws a seed when its iteration starts; from its own generator, not from the training
        # run's.
        generator=torch.Generator().manual_seed(0),
    )


class _Batches:
    """A fixed list of batches, as DataLoader wants it."""

    def __init__(self, batches: list[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
