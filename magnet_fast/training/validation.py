"""Validation: the task's scores, and what the terms have to say; the same for a run and for its rehearsal."""

from __future__ import annotations

from typing import Any

from magnet_fast.evaluation import TASKS, evaluate
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.objective import AUTOCAST_DTYPE, Objective


def validate(objective: Objective, dataset: Any, config: TrainConfig, limit: int | None) -> dict[str, Any]:
    """Score the model as the configuration says, on the first `limit` sentences. Collective."""
    options = {
        "limit": limit,
        "workers": config.data.workers,
        "autocast": AUTOCAST_DTYPE[config.precision],
    }
    scores = evaluate(
        objective.model,
        dataset,
        config.eval_batch_size,
        task=config.task,
        protocol=config.protocol,
        resolution=config.resolution,
        fast=config.fast,
        **options,
    )
    for term in objective.terms.values():
        scores.update(term.measure(objective.model, dataset, config.eval_batch_size, **options))
    return scores


def summary(scores: dict[str, Any], config: TrainConfig) -> str:
    """The first scores of the task, the one that decides, and what the terms found, in a line."""
    task = TASKS[config.task]
    names = dict.fromkeys((*task.scores[:2], config.best))
    text = ", ".join(f"{name} {scores[name]:.2f}" for name in names) + f" on {scores['sentences']} sentences"
    for name, found in scores.items():
        if isinstance(found, dict) and name != "by_kind":
            key, value = next(iter(found.items()))
            text += f"; {name.replace('_', ' ')}: {key} {value:.1f}"
    return text
