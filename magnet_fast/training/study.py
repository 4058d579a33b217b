"""A study: the same run with parts of the method on and off, over several seeds."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.atomic import write_text_atomically
from magnet_fast.data import ExpressionDataset
from magnet_fast.devices import on_cpu
from magnet_fast.evaluation import evaluate
from magnet_fast.evaluation.machine import measured_on
from magnet_fast.training.building import build_model, build_tokenizer
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.datasets import check_split, chosen_truth, dataset_kind, open_readers
from magnet_fast.training.run import train
from magnet_fast.training.study_report import read_result, write_report
from magnet_fast.training.terms import build_terms
from magnet_fast.training.variants import Study, row_config

RESULT = "result.json"


@on_cpu()
def run_study(
    study: Study,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    say: Callable[[str], None] = print,
) -> Path:
    """Train and score every row with every seed, then write `table.md`, `results.json` and `plot.png`.

    Each run has its folder `out/<row>/seed-<n>`, and its scores in `result.json` there: a finished run is not run
    again, an unfinished one is resumed. Several processes may work on the same `out`, on one machine or on a shared
    disk with locks: a run that another process has in hand is left to it. Each of them writes the report of all runs
    that are finished by then.

    Args:
        study: its rows; their runs have the same length.
        out: folder of the runs and of the report, made if absent.
        overrides: of every row's configuration, `"data.root=scenes"`.
        rows: some of them only.
        seeds: of the runs of each row.
        say: receives a line for each run.

    Returns:
        The table's path.

    Raises:
        ValueError: an unknown row or one that does not fit its configuration, no length in steps or epochs, data
            without the split that is scored, or `out` holds results of another configuration.
    """
    rows = list(study.rows) if rows is None else rows
    unknown = [name for name in rows if name not in study.rows]
    if unknown:
        raise ValueError(f"variants: unknown {', '.join(unknown)}; known: {', '.join(study.rows)}")
    settings = {(name, seed): row_config(study, name, seed, overrides) for seed in seeds for name in rows}
    # Before anything is trained: what would fail after hours must fail now.
    for (_, seed), own in settings.items():
        if own.max_minutes is not None:
            raise ValueError("max_minutes: runs of a study must have the same length: give max_steps or epochs")
        if seed == seeds[0]:
            reader = open_readers(own)[0]
            check_split(reader, str(own.data.root), "val_split", own.data.val_split)
            _own_sets(own, reader, build_model(own))[own.data.val_split].shuffle_expressions(seed)
    out = Path(out)
    for (name, seed), own in settings.items():  # seed by seed: a study that is stopped early has whole comparisons
        folder = out / name / f"seed-{seed}"
        with _in_hand(folder) as mine:
            if not mine:
                say(f"{name}, seed {seed}: another process has it")
            elif _finished(folder, own):
                say(f"{name}, seed {seed}: finished before")
            else:
                say(f"{name}, seed {seed}: training in {folder}")
                _run(name, own, folder)
    titles = {name: row.title for name, row in study.rows.items()}
    against = {name: row.against for name, row in study.rows.items() if row.against is not None}
    return write_report(out, titles, against, RESULT)


def _run(name: str, config: TrainConfig, folder: Path) -> None:
    train(config, folder, resume=True)
    state = load_checkpoint(folder / CHECKPOINT)
    result = {
        "variant": name,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "steps": state["step"],
        "training_seconds": state["trained_seconds"],
        **_scores(config, folder, state["terms"]),
        "machine": measured_on(),
    }
    write_text_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")


def _scores(config: TrainConfig, folder: Path, terms_state: dict[str, Tensor]) -> dict[str, Any]:
    """The last weights on every split but that of training, and what the terms say on the one of validation."""
    model = models.load(folder / "last.safetensors")
    data, size = config.data, config.eval_batch_size
    sets = _own_sets(config, open_readers(config)[0], model)
    terms = build_terms(config.terms, model, build_tokenizer(config, model))
    nn.ModuleDict(terms).load_state_dict(terms_state)
    how = {"task": config.task, "protocol": config.protocol, "resolution": config.resolution, "fast": config.fast}
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scores": {split: evaluate(model, part, size, limit=data.val_limit, **how) for split, part in sets.items()},
    }
    for term in terms.values():
        found.update(term.measure(model, sets[data.val_split], size))
    validation = sets[data.val_split]
    if "presence" in terms:
        with _presence_ignored(model):
            found["without_presence"] = evaluate(model, validation, size, limit=data.val_limit, **how)
    validation.shuffle_expressions(config.seed)  # the last: it stays so
    found["shuffled"] = evaluate(model, validation, size, limit=data.val_limit, **how)
    return found


@contextmanager
def _presence_ignored(model: nn.Module) -> Iterator[None]:
    """What the model says of presence is dropped: its masks are as its pixels say, and claim what is in them."""
    handle = model.register_forward_hook(lambda module, inputs, prediction: prediction._replace(presence=None))
    try:
        yield
    finally:
        handle.remove()


def _own_sets(config: TrainConfig, reader: Any, model: nn.Module) -> dict[str, ExpressionDataset]:
    """Every split but that of training, as the model takes it."""
    options = {
        "original": config.resolution == "original",
        "truth": chosen_truth(config, reader, model.spec),
        "needs": model.needs,
    }
    tokenizer = build_tokenizer(config, model)
    return {
        split: dataset_kind(config)(reader, split, tokenizer, model.spec, **options)
        for split in reader.splits
        if split != config.data.train_split
    }


def _finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds the result of this very configuration."""
    path = folder / RESULT
    if not path.exists():
        return False
    before, now = read_result(path)["config"], config.model_dump(mode="json")
    for values in (before, now):
        values["data"] = {
            key: value for key, value in dict(values.get("data") or {}).items() if key not in ("root", "cache")
        }
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        raise ValueError(f"{path}: it is of another configuration ({', '.join(differing)}); choose another folder")
    return True


@contextmanager
def _in_hand(folder: Path) -> Iterator[bool]:
    """Whether this process may work on the run; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
