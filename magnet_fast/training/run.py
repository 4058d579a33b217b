"""From a configuration to a trained model: builds the parts, prepares the folder, runs the trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from magnet_fast import models
from magnet_fast.data import ExpressionDataset, MixedDataset, Refer, Tokenizer
from magnet_fast.inference import vocabulary_digest
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint, seed_everything, write_atomically
from magnet_fast.training.config import TrainConfig, dump_config, parse_config
from magnet_fast.training.determinism import deterministic_algorithms
from magnet_fast.training.distributed import World, broadcast_object, distributed_world
from magnet_fast.training.guard import FOLDER
from magnet_fast.training.objective import build_grounding
from magnet_fast.training.progress import check_tensorboard
from magnet_fast.training.trainer import Trainer

RUN_FILES = (CHECKPOINT, "metrics.jsonl", "config.yaml", "best.safetensors", "last.safetensors")
RUN_FOLDERS = (FOLDER, "tensorboard")


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train a model and leave everything in the folder ``out``; the same call under torchrun trains with DDP or FSDP2.

    Args:
        config: the run; ``config.data.root`` must be set.
        out: receives ``config.yaml``, ``metrics.jsonl``, ``checkpoint.safetensors`` (to resume from),
            ``best.safetensors`` (by ``config.best_metric`` on the validation split) and, at the end,
            ``last.safetensors``.
        resume: go on from ``out/checkpoint.safetensors``; from the start where there is none yet.
        overwrite: delete the files of a run that ``out`` holds.

    Returns:
        The last validation's scores, or an empty dict for ``validate_every: never``.

    Raises:
        ValueError: the configuration does not fit the data, the device, the number of processes or the run to
            resume.
        FileExistsError: ``out`` holds a run, and neither ``resume`` nor ``overwrite`` was given.
        TrainingError: a loss or the gradient became NaN or infinite.
        TrainingStopped: SIGTERM came; the checkpoint is written.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite: choose one")
    out = Path(out)
    with distributed_world(config.device) as world, deterministic_algorithms(config.deterministic):
        state = _state_to_resume(config, out, resume, overwrite)
        trainer = build_trainer(config, out, world)
        # Only now, when nothing can be wrong any more, and when every process has looked into the folder.
        broadcast_object(None, world)
        if world.is_main:
            _open_folder(config, out, fresh=state is None)
        if state is not None:
            trainer.load_state(state)
        return trainer.run()


def build_trainer(config: TrainConfig, out: Path, world: World) -> Trainer:
    """Datasets, model and trainer of a run, on this process; nothing is written."""
    if config.tensorboard:
        check_tensorboard()
    tokenizer, training_set, validation_set = build_datasets(config)
    seed_everything(config.seed)
    model = build_model(config, tokenizer)
    metadata = checkpoint_metadata(config, tokenizer)
    grounding = build_grounding(config, model, tokenizer)
    return Trainer(config, model, training_set, validation_set, out, world, metadata, grounding)


def build_datasets(
    config: TrainConfig,
) -> tuple[Tokenizer, ExpressionDataset | MixedDataset, ExpressionDataset | None]:
    """The tokenizer, the training split (with those of ``data.also``) and, unless validation is off, the validation
    split."""
    data = config.data
    if data.root is None:
        raise ValueError("data.root: no data folder given (--data ROOT, or data.root in the configuration)")
    tokenizer = Tokenizer(data.tokenizer, max_words=data.max_words)
    refer = Refer(data.root, dataset=data.dataset, split_by=data.split_by)
    for key, split in (("train_split", data.train_split), ("val_split", data.val_split)):
        if split not in refer.splits and not (key == "val_split" and config.validate_every == "never"):
            raise ValueError(f"data.{key}: {data.root} has no split {split!r}; it has {', '.join(refer.splits)}")
    refers = [refer, *(Refer(data.root, *name.split("/")) for name in data.also)]
    # The sets share COCO's images: what one trains on may be what another is tested on.
    held_out = {
        ref.image_id
        for other in (refers if data.also else [])
        for split in other.splits
        if split != data.train_split
        for ref in other.refs(split)
    }
    parts = [
        ExpressionDataset(
            other,
            data.train_split,
            tokenizer,
            data.image_size,
            mode=data.mode,
            seed=config.seed,
            cache=data.cache,
            without_images=held_out,
        )
        for other in refers
    ]
    training_set = MixedDataset(parts) if data.also else parts[0]
    validation_set = None
    if config.validate_every != "never":
        validation_set = ExpressionDataset(refer, data.val_split, tokenizer, data.image_size, cache=data.cache)
    return tokenizer, training_set, validation_set


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> nn.Module:
    """The configuration's model, checked to have a word embedding for every id of the tokenizer.

    With ``model.weights`` it starts from a file of `models.save_model` (a run's ``best.safetensors``), whose model must
    be the same; the file's image size and vocabulary may differ.
    """
    model = models.build(config.model.name, pretrained=config.model.pretrained, **config.model.overrides)
    if config.model.weights is not None:
        start, _ = models.load_model(config.model.weights)
        if start.config != model.config:
            raise ValueError(
                f"model.weights: {config.model.weights} holds another model ({start.config}), expected {model.config}"
            )
        model.load_state_dict(start.state_dict())
    known = model.config.text.vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"data.tokenizer: its vocabulary has {tokenizer.vocab_size} entries, but the text encoder of "
            f"{config.model.name} embeds {known}; choose the model's vocabulary, or set its text.vocab_size"
        )
    return model


def checkpoint_metadata(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """What a user of the weights must know besides the model's own configuration."""
    return {
        "model_name": config.model.name,
        "image_size": str(config.data.image_size),
        "max_words": str(config.data.max_words),
        "tokenizer_vocab": vocabulary_digest(tokenizer),
    }


def _state_to_resume(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check the folder, changing nothing; the checkpoint to go on from, if there is one."""
    found = [name for name in RUN_FILES if (out / name).exists()]
    if found and not (resume or overwrite):
        raise FileExistsError(
            f"{out}: the folder already holds a run ({', '.join(found)}); pass --resume to go on with it, "
            "--overwrite to delete it, or choose another folder"
        )
    if not resume or not (out / CHECKPOINT).exists():
        return None
    state = load_checkpoint(out / CHECKPOINT)
    # Parsed, so that entries younger than the checkpoint have their defaults.
    saved = parse_config(state["config"], f"{out / CHECKPOINT}").model_dump(mode="json")
    check_resumable(saved, config.model_dump(mode="json"), out / CHECKPOINT)
    return state


def _open_folder(config: TrainConfig, out: Path, fresh: bool) -> None:
    """Make the folder, write the configuration; a fresh run first removes the files of another one.

    A run that was killed before its first checkpoint starts fresh, too.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        for name in RUN_FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
    write_atomically(out / "config.yaml", lambda file: file.write(dump_config(config).encode()))


# What may differ in a continuation: where and how it computes and reports, not what.
_FREE_KEYS = {
    "data.root", "data.cache", "data.workers", "device", "log_every", "checkpoint_every", "eval_batch_size",
    "parallel", "activation_checkpointing", "deterministic", "tensorboard",
}  # fmt: skip


def check_resumable(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Compare a checkpoint's configuration with the present one; ValueError names each key that differs."""
    before, now = _flat(saved), _flat(current)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    differing = [key for key in differing if key not in _FREE_KEYS]
    if not differing:
        return
    changes = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differing)
    if any(key.startswith("model.") for key in differing):
        raise ValueError(f"{path}: this checkpoint is of another model ({changes})")
    raise ValueError(f"{path}: cannot go on exactly with another configuration ({changes})")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
