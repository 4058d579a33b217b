"""Everything that a run depends on, out of a trainer and back into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from torch import Tensor

from magnet_fast.models.base_weights import with_bases, without_bases
from magnet_fast.training.distributed import gather_objects
from magnet_fast.training.parallel import whole_on_cpu
from magnet_fast.training.randomness import rng_state, seed_everything, set_rng_state
from magnet_fast.training.weights_state import load_optimiser_state, load_weights, optimiser_state_of, weights_of

if TYPE_CHECKING:
    from magnet_fast.training.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The state as tensors and plain containers. Collective; whole on the first process, which saves it."""
    weights = weights_of(trainer.objective)
    model, bases = without_bases(trainer.model, _below("model.", weights))
    held = _above("model.", model) | _above("terms.", _below("terms.", weights))
    averaged: dict[str, Any] = {}
    if trainer.average:  # what is not trained is its own average
        with trainer.average.in_place():
            means = weights_of(trainer.objective)
        means = {name: value for name, value in means.items() if name in held}
        averaged = {"weights": means, "updates": trainer.average.updates}
    epoch, position = divmod(trainer.step, trainer.steps_per_epoch)
    return {
        "config": trainer.config.model_dump(mode="json"),
        "model_config": trainer.model.config.model_dump(mode="json"),
        "metadata": dict(trainer.metadata),
        "model": model,
        "bases": bases,
        "terms": _below("terms.", weights),
        "ema": averaged,
        "optimiser": optimiser_state_of(trainer.objective, trainer.optimiser),
        "scaler": trainer.scaler.state_dict(),
        "step": trainer.step,
        "epoch": epoch,
        "position": position,
        "steps_per_epoch": trainer.steps_per_epoch,
        "trained_seconds": trainer.elapsed(),
        "best": trainer.best,
        "scores": trainer.scores,
        "validated_at": trainer.validated_at,
        "window": trainer.log.state(),
        "rng": gather_objects(rng_state(), trainer.world),
    }


def check_form(state: dict[str, Any], path: str | Path) -> None:
    """ValueError, naming the file, where what was read of a checkpoint is not made as `state_of` makes it.

    Looked at is every entry that `load_state_into` reads, before a run's folder is touched.
    """
    fault = _fault(state, _FORM, "")
    if fault is None and state["config"].get("ema") is not None:
        fault = _fault(state["ema"], _AVERAGED, "ema")
    if fault is not None:
        raise ValueError(f"{path}: not a readable checkpoint: its state is of another form ({fault})")


_WEIGHTS = {...: Tensor}
_AVERAGED = {"weights": _WEIGHTS, "updates": int}
_FORM = {
    "config": dict,
    "model_config": dict,
    "metadata": {...: str},
    "model": _WEIGHTS,
    "terms": _WEIGHTS,
    "ema": dict,
    "optimiser": {"state": dict, "param_groups": list},
    "scaler": dict,
    "step": int,
    "steps_per_epoch": int,
    "trained_seconds": (int, float),
    "best": (int, float, type(None)),
    "scores": dict,
    "validated_at": int,
    "window": {"sums": [Tensor], "steps": int},
    "rng": [{"python": list, "numpy": list, "torch": Tensor}],
}
"""What a file's state must be: a type, the entries of a dict (`...`: each of them), or the one kind of a list's."""
_OPTIONAL = {"bases": {...: {"source": (str, bool), "tensors": int, "sha256": str}}}
"""Entries of later versions, which earlier files of this format lack."""


def _fault(value: Any, form: Any, name: str) -> str | None:
    """The first difference between a value and its form, in words."""
    kind = type(form) if isinstance(form, dict | list) else form
    if not isinstance(value, kind):
        expected = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        return f"{name or 'it'}: expected {expected}, got {type(value).__name__}"
    if form is _FORM:
        form = _FORM | {key: inner for key, inner in _OPTIONAL.items() if key in value}
    if isinstance(form, list):
        below = [(str(index), entry, form[0]) for index, entry in enumerate(value)]
    elif isinstance(form, dict):
        keys = list(value) if ... in form else list(form)
        if lacking := [key for key in keys if key not in value]:
            return f"{name or 'it'} lacks {', '.join(lacking)}"
        below = [(str(key), value[key], form.get(key, form.get(...))) for key in keys]
    else:
        return None
    prefix = f"{name}/" if name else ""
    return next(filter(None, (_fault(entry, inner, f"{prefix}{key}") for key, entry, inner in below)), None)


def load_state_into(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go on from a checkpoint's state; ValueError where it is of another model, base or amount of data."""
    present = trainer.model.config
    if not _describes(state["model_config"], present):
        raise ValueError(
            f"checkpoint: it is of another model (its configuration is {state['model_config']}, this model's is "
            f"{present.model_dump(mode='json')})"
        )
    if state["steps_per_epoch"] != trainer.steps_per_epoch:
        raise ValueError(
            f"checkpoint: its run had {state['steps_per_epoch']} steps an epoch, this one has "
            f"{trainer.steps_per_epoch}: the training data are not the same"
        )
    own = trainer.model.state_dict()
    own = {name: whole_on_cpu(value) for name, value in own.items() if name not in state["model"]}
    # One of an earlier version holds everything.
    model = with_bases(state["model"], own, state.get("bases", {}), "checkpoint")
    weights = {**_above("model.", model), **_above("terms.", state["terms"])}
    if trainer.average:
        load_weights(trainer.objective, {**weights, **state["ema"]["weights"]})
        trainer.average.begin(state["ema"]["updates"])
    load_weights(trainer.objective, weights)
    load_optimiser_state(trainer.objective, trainer.optimiser, state["optimiser"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.step = trainer.saved_at = state["step"]
    trainer.trained_seconds = state["trained_seconds"]
    trainer.best, trainer.scores, trainer.validated_at = state["best"], state["scores"], state["validated_at"]
    trainer.log.load_state(state["window"], trainer.step)
    world, generators = trainer.world, state["rng"]
    if len(generators) == world.size:
        set_rng_state(generators[world.rank])
    else:  # another number of processes: the data go on exactly, dropout draws anew
        seed_everything(trainer.config.seed + 1 + world.rank + trainer.step)


def _describes(entries: dict[str, Any], config: BaseModel) -> bool:
    """Whether entries are those of a configuration; settings that came later than they are at their defaults."""
    try:
        return type(config).model_validate(entries) == config
    except ValidationError:
        return False


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _above(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}
