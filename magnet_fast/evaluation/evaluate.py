"""A model scored on a dataset, in batches and over several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from magnet_fast.data.loader import Loader
from magnet_fast.data.loading import leave_to_the_main_process, workers_watched
from magnet_fast.data.sample import Batch, collate, to_device
from magnet_fast.data.tokenizers import shortened
from magnet_fast.evaluation.finite import nan_answers, where_nan_begins
from magnet_fast.evaluation.protocol import find_protocol, probability_at_input, probability_at_original
from magnet_fast.evaluation.table import Table, as_tensor, nan_in
from magnet_fast.evaluation.tasks import find_task, scores
from magnet_fast.models.contract import Prediction

DEFAULT_THRESHOLD = 0.5


@torch.no_grad()  # not inference_mode: what a model caches on the way must still serve training
@workers_watched()
def evaluate(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 16,
    *,
    task: str = "single",
    protocol: str = "family",
    resolution: str = "input",
    device: torch.device | str | None = None,
    workers: int = 0,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    fast: bool = True,
) -> dict[str, Any]:
    """Score a model on every sentence of a dataset. The result equals that of batch size 1.

    Args:
        model: `model(image, text, context) -> Prediction`; put into eval mode for the time of the call.
        dataset: of `Sample`s, a sentence each, prepared as its `spec` says (an `InputSpec`; the model's where it has
            none). Where images were not squashed, its `fit` brings a map back: `fit.back(map, size)`.
        batch_size: sentences at a time.
        task: one of `TASKS`: which scores.
        protocol: one of `PROTOCOLS`: how masks are made and IoUs read.
        resolution: "input" compares at the model's square; "original" brings the prediction to each image's own size
            and compares there, with a dataset opened with `original=True`.
        device: where to compute; default the device of the model's parameters.
        workers: loader processes.
        limit: score the first so many sentences only.
        autocast: a dtype to autocast to; default full precision.
        progress: called with (sentences done, sentences in all) of this process after each batch.
        fast: accelerate the model for the time of the call, in what has a faster form.

    Under torch.distributed each process scores its share of the sentences, none twice, and all get the whole result.

    Returns:
        The scores of `tasks.scores`, and `task`, `protocol`, `rules` (the protocol in words), `resolution`, `fit`,
        `truth`, `threshold`, `image_size`.

    Raises:
        ValueError: for bad arguments, a dataset that does not fit the protocol or lacks what task or model need, and
            a model that answers NaN, naming the first such sentence and the layer where it begins.
        ChildProcessError: one of the `workers` died.
    """
    spec = getattr(model, "spec", None)
    prepared = getattr(dataset, "spec", spec)
    fit = "squash" if prepared is None else prepared.fit
    find_task(task)
    rules = find_protocol(protocol, task, resolution, fit)
    way_back = None if fit == "squash" else dataset.fit.back
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 1:
        raise ValueError("dataset: it holds no sentence to evaluate")
    device = torch.device(device) if device is not None else _device_of(model)
    threshold = rules.threshold
    if threshold is None:
        threshold = DEFAULT_THRESHOLD if spec is None else spec.threshold
    mine = _share(count)
    loader = Loader(
        dataset,
        batch_size,
        sampler=mine,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # A loader draws a seed when its iteration starts; from its own generator, not from the training run's.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=leave_to_the_main_process,
    )

    if mine[:1] == [0] and hasattr(dataset, "tell_unread"):
        dataset.tell_unread(count)
    table, done = Table(), 0
    with _evaluation_mode(model):
        with _accelerated(model) if fast else nullcontext():
            for batch in loader:
                truths = _truths(batch, resolution)
                batch = to_device(batch, device)
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    prediction = model(batch["image"], batch["text"], _context(model, batch))
                if resolution == "input":
                    found = probability_at_input(prediction, rules, batch["mask"].shape[-2:])
                    _add(table, batch, slice(None), prediction, found, batch["mask"], threshold)
                else:
                    square = batch["image"].shape[-2:]
                    for i, truth in enumerate(truths):
                        one = _one(prediction, i)
                        found = probability_at_original(one, rules, way_back, square, truth.shape)[None]
                        truth = truth[None].to(device, non_blocking=True)
                        _add(table, batch, slice(i, i + 1), one, found, truth, threshold)
                done += len(batch["index"])
                if progress is not None:
                    progress(done, len(mine))
        table.gather()
        if nan := table.nan():  # on every process, so that none waits for another
            raise ValueError(_nan_message(model, dataset, nan, device, autocast))
    return {
        "task": task,
        "protocol": protocol,
        "rules": rules.says,
        "resolution": resolution,
        "fit": fit,
        "truth": getattr(dataset, "truth", None),
        "threshold": threshold,
        "image_size": None if prepared is None else prepared.size,
        **scores(table, task, rules.rule),
    }


def _add(
    table: Table, batch: Batch, part: slice, prediction: Prediction, found: Tensor, truth: Tensor, threshold: float
) -> None:
    """The rows of a part of a batch: `prediction`, `found` and `truth` are of that part."""
    # A presence of NaN claims nothing: where it is no answer, the mask must not pass for one.
    found = found.masked_fill(nan_answers(prediction)[:, None, None], torch.nan)
    presence = prediction.presence
    columns = {name: batch[name][part] for name in ("index", "ref", "exists", "kind", "category") if name in batch}
    claimed = None if presence is None else presence >= 0
    table.add(found > threshold, truth, claimed=claimed, probability=found, **columns)


def _nan_message(
    model: nn.Module, dataset: Any, sentences: list[int], device: torch.device, autocast: torch.dtype | None
) -> str:
    """What is said of a model that answers NaN: the first sentence, how many others, the layer concerned."""
    index = sentences[0]
    batch = to_device(collate([dataset[index]]), device)
    where = where_nan_begins(model, batch["image"], batch["text"], _context(model, batch), autocast)
    named = ""
    if hasattr(dataset, "record"):
        said = dataset.record(index)
        named = (
            f" (ref_id {said['ref_id']}, sent_id {said['sent_id']}: {shortened(said['expression'])} "
            f"in {said['image_path']})"
        )
    return f"{nan_in(sentences)}{named}: {where}"


def _one(prediction: Prediction, i: int) -> Prediction:
    presence = prediction.presence
    return Prediction(
        prediction.mask[i : i + 1],
        presence if presence is None else presence[i : i + 1],
        presence_weighs=prediction.presence_weighs,
        aligned_corners=prediction.aligned_corners,
    )


def _truths(batch: Batch, resolution: str) -> list[Tensor]:
    if resolution == "input":
        return []
    if "original_mask" not in batch:
        raise ValueError(
            "dataset: resolution 'original' needs masks at the images' own size; open it with original=True"
        )
    return [as_tensor(mask) for mask in batch["original_mask"]]


def _context(model: nn.Module, batch: Batch) -> dict[str, Tensor] | None:
    extra = batch.get("extra") or {}
    missing = [name for name in getattr(model, "needs", ()) if name not in extra]
    if missing:
        raise ValueError(
            f"dataset: the model reads {', '.join(missing)} beside image and text; these samples have none"
        )
    return extra or None


def _share(count: int) -> list[int]:
    """This process's part of the first `count` sentences."""
    joined = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    return list(range(rank, count, world))


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _accelerated(model: nn.Module) -> Any:
    from magnet_fast.fast import accelerated  # here: scores of one's own masks need no accelerated model

    return accelerated(model)
