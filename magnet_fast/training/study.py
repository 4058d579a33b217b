"""An ablation study: the same run with parts of the method on and off, over several seeds."""

from __future__ import annotations

import copy
import fcntl
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from magnet_fast import models
from magnet_fast.data import ExpressionDataset, Refer, Tokenizer
from magnet_fast.evaluation import evaluate
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint, write_atomically
from magnet_fast.training.config import TrainConfig, parse_config
from magnet_fast.training.hidden_words import hidden_word_accuracy
from magnet_fast.training.objective import build_grounding
from magnet_fast.training.run import train
from magnet_fast.training.study_report import write_report

SPLITS = ("val", "testA", "testB")
RESULT = "result.json"


class Variant(NamedTuple):
    """One row of the study.

    Attributes:
        title: of its row.
        alignment_module: the Cross-modal Alignment Module, or without it one PWAM a stage: pixels read the words at
            full resolution; no pooled levels, and the words never read the pixels (their gates, closed at the start,
            are held closed).
        grounding, alignment_loss: whether these losses have the weights of the study's configuration, or 0.
        overrides: of the model's configuration.
        lavt: LAVT instead of MagNet.
        blind: the control in which Mask Grounding's predictor sees neither image nor mask.
        against: the row that this one is one change of; its differences are to that row.
    """

    title: str
    alignment_module: bool = True
    grounding: bool = False
    alignment_loss: bool = False
    overrides: dict[str, Any] = {}
    lavt: bool = False
    blind: bool = False
    against: str = "baseline"


_ALL = Variant("all (pwam, correct masking)", grounding=True, alignment_loss=True)
_CHANGE_OF_ALL = _ALL._replace(against="all")

VARIANTS = {
    "baseline": Variant("baseline (PWAM into the pixels)", alignment_module=False),
    "cam": Variant("+ CAM"),
    "grounding": Variant("+ Mask Grounding", alignment_module=False, grounding=True),
    "alignment": Variant("+ alignment loss", alignment_module=False, alignment_loss=True),
    "all": _ALL,
    "all_xmha": _CHANGE_OF_ALL._replace(title="all, xmha instead of pwam", overrides={"alignment__kind": "xmha"}),
    "all_released": _CHANGE_OF_ALL._replace(
        title="all, released masking", overrides={"alignment__masking": "released"}
    ),
    "all_blind": _CHANGE_OF_ALL._replace(title="all, blind Mask Grounding (control)", blind=True),
    "lavt": Variant("LAVT", lavt=True),
    "lavt_grounding": Variant("LAVT + Mask Grounding", grounding=True, lavt=True, against="lavt"),
}
"""The rows by name: MagNet's parts one by one and together, its two forms and maskings, and LAVT."""

_WITHOUT_CAM = {"alignment__pyramid": []}
_WORDS_STAY = ["alignment.*.text_gate.*", "alignment.*.text_fusion.*"]


def run_ablation(
    config: TrainConfig,
    out: str | Path,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: Sequence[int] = (0, 1, 2),
    say: Callable[[str], None] = print,
) -> Path:
    """Train and score every variant with every seed, then write ``table.md``, ``results.json`` and ``plot.png``.

    Each run has its folder ``out/<variant>/seed-<n>``, and its scores in ``result.json`` there: a finished run is
    not run again, an unfinished one is resumed. Several processes may work on the same ``out``, on one machine or
    on a shared disk with locks: a run that another process has in hand is passed over. Each of them writes the
    report of all runs that are finished by then.

    Args:
        config: the full method (`variant_config` turns parts off); its length should be ``max_steps``.
        say: receives a line for each run.

    Returns:
        The table's path.

    Raises:
        ValueError: an unknown variant, no length in steps or epochs, or ``out`` holds results of another
            configuration.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants: unknown {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    if config.max_minutes is not None:
        raise ValueError("max_minutes: runs of a study must have the same length: give max_steps or epochs")
    out = Path(out)
    for seed in seeds:  # seed by seed: a study that is stopped early has whole comparisons
        for name in variants:
            folder = out / name / f"seed-{seed}"
            settings = variant_config(config, VARIANTS[name], seed)
            with _in_hand(folder) as mine:
                if not mine:
                    say(f"{name}, seed {seed}: another process has it")
                elif _finished(folder, settings):
                    say(f"{name}, seed {seed}: finished before")
                else:
                    say(f"{name}, seed {seed}: training in {folder}")
                    _run(name, settings, folder)
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    against = {name: variant.against for name, variant in VARIANTS.items() if name != variant.against}
    return write_report(out, titles, against, RESULT)


def variant_config(config: TrainConfig, variant: Variant, seed: int) -> TrainConfig:
    """The study's configuration with the parts that the variant goes without turned off."""
    values = copy.deepcopy(config.model_dump(mode="json"))
    values["seed"] = seed
    overrides = {**values["model"]["overrides"], **variant.overrides}
    if variant.lavt:
        values["model"]["name"] = values["model"]["name"].replace("magnet", "lavt")
        overrides = {key: value for key, value in overrides.items() if key.split("__")[0] in ("image", "text")}
    elif not variant.alignment_module:
        overrides |= _WITHOUT_CAM
        values["optimiser"]["freeze"] = [*values["optimiser"]["freeze"], *_WORDS_STAY]
    values["model"]["overrides"] = overrides
    if not variant.grounding:
        values["loss"]["grounding"] = 0.0
    if not variant.alignment_loss:
        values["loss"]["alignment"] = 0.0
    values["grounding"]["blind"] = variant.blind
    return parse_config(values)


def _run(name: str, config: TrainConfig, folder: Path) -> None:
    train(config, folder, resume=True)
    state = load_checkpoint(folder / CHECKPOINT)
    result = {
        "variant": name,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "steps": state["step"],
        "training_seconds": state["trained_seconds"],
        **_scores(config, folder, state["grounding"]),
        "machine": {
            "date": date.today().isoformat(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / RESULT, lambda file: file.write(text.encode()))


def _scores(config: TrainConfig, folder: Path, grounding_state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The last weights on every split that the data have, and the hidden words where a predictor was trained."""
    model, _ = models.load_model(folder / "last.safetensors")
    data = config.data
    tokenizer = Tokenizer(data.tokenizer, max_words=data.max_words)
    refer = Refer(data.root, dataset=data.dataset, split_by=data.split_by)
    sets = {
        split: ExpressionDataset(refer, split, tokenizer, data.image_size) for split in SPLITS if split in refer.splits
    }
    size = config.eval_batch_size
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scores": {split: evaluate(model, part, size, limit=data.val_limit) for split, part in sets.items()},
    }
    grounding = build_grounding(config, model, tokenizer)
    if grounding is not None:
        grounding.load_state_dict(grounding_state)
        found["hidden_words"] = hidden_word_accuracy(model, grounding, sets["val"], size)
    return found


def _finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds the result of this very configuration."""
    path = folder / RESULT
    if not path.exists():
        return False
    before, now = json.loads(path.read_text())["config"], config.model_dump(mode="json")
    for values in (before, now):
        values["data"] = {key: value for key, value in values["data"].items() if key not in ("root", "cache")}
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
        yield True


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
