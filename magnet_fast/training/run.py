"""From a configuration to a trained model: prepares the folder, runs the trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from magnet_fast.atomic import same_file, write_text_atomically
from magnet_fast.devices import on_cpu
from magnet_fast.training.building import build_trainer
from magnet_fast.training.checkpoint import CHECKPOINT, hand_out, load_checkpoint
from magnet_fast.training.config import TrainConfig, dump_config, parse_config
from magnet_fast.training.determinism import deterministic_algorithms
from magnet_fast.training.distributed import World, broadcast_object, distributed_world, done_on_main
from magnet_fast.training.failure import FOLDER
from magnet_fast.training.folder import held_folder
from magnet_fast.training.state import check_form
from magnet_fast.training.stopping import stopped_at_once

RUN_FILES = (CHECKPOINT, "metrics.jsonl", "config.yaml", "best.safetensors", "last.safetensors")
RUN_FOLDERS = (FOLDER, "tensorboard")


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train a model and leave everything in the folder `out`; the same call under torchrun trains with DDP or FSDP2.

    Args:
        config: the run; `config.data.root` must be set.
        out: receives `config.yaml`, `metrics.jsonl`, `checkpoint.safetensors` (to resume from),
            `best.safetensors` (by `config.best` on the validation split) and, at the end,
            `last.safetensors`.
        resume: go on from `out/checkpoint.safetensors`; from the start where there is none yet.
        overwrite: delete the files of a run that `out` holds.

    Returns:
        The last validation's scores, or an empty dict for `validate_every: never`.

    Raises:
        ValueError: the configuration does not fit the data, the device, the number of processes or the run to
            resume; another run writes to `out`.
        OSError: a file cannot be written or read, or another process has ended.
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` was given.
        TrainingError: a loss or the gradient became NaN or infinite.
        TrainingStopped: SIGTERM came; the checkpoint is written.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite: choose one")
    out = Path(out)
    with (
        on_cpu(),
        distributed_world(config.device) as world,
        deterministic_algorithms(config.deterministic),
        stopped_at_once(),
        held_folder(out, world),
    ):
        state = state_to_resume(config, out, resume, overwrite, world)
        trainer = build_trainer(config, out, world)
        # Only now, when nothing can be wrong any more, in any process.
        broadcast_object(None, world)
        if world.is_main:
            _open_folder(config, out, fresh=state is None)
        if state is not None:
            trainer.load_state(state)
        return trainer.run()


def state_to_resume(
    config: TrainConfig, out: Path, resume: bool, overwrite: bool, world: World
) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one, on every process. Collective.

    The first process looks into its folder and decides: those of the others may be other folders, on other machines.
    """
    found: list[dict[str, Any] | None] = [None]

    def look() -> None:
        found[0] = _state_in_folder(config, out, resume, overwrite)

    done_on_main(look, world)
    return hand_out(found[0], world)


def _state_in_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check the folder, changing nothing; the checkpoint to go on from, if there is one."""
    found = [name for name in RUN_FILES if (out / name).exists()]
    if found and not (resume or overwrite):
        raise FileExistsError(
            f"{out}: the folder already holds a run ({', '.join(found)}); pass --resume to go on with it, "
            "--overwrite to delete it, or choose another folder"
        )
    pretrained = config.model.pretrained
    starts = [config.model.weights, *(pretrained.values() if isinstance(pretrained, dict) else ())]
    if lost := [one for one in starts if isinstance(one, str) and any(same_file(one, out / name) for name in found)]:
        raise ValueError(
            f"{lost[0]}: the run starts from this file, and --overwrite would delete it; name another folder"
        )
    if not resume or not (out / CHECKPOINT).exists():
        return None
    state = load_checkpoint(out / CHECKPOINT)
    check_form(state, out / CHECKPOINT)
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
    write_text_atomically(out / "config.yaml", dump_config(config))


# What may differ in a continuation: where and how it computes and reports, not what.
_FREE_KEYS = {
    "data.root", "data.cache", "data.workers", "device", "log_every", "checkpoint_every", "eval_batch_size",
    "data.images", "fast", "parallel", "activation_checkpointing", "deterministic", "tensorboard",
}  # fmt: skip


def check_resumable(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Compare a checkpoint's configuration with the present one; ValueError names each key that differs."""
    before, now = _flat(saved), _flat(current)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    differing = [key for key in differing if key not in _FREE_KEYS]
    if not differing:
        return
    changes = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differing)
    former = f"give the former values again ({path.parent / 'config.yaml'} holds them all)"
    if any(key.startswith("model.") for key in differing):
        raise ValueError(
            f"{path}: this checkpoint is of another model ({changes}); {former}, or start a new run with another --out"
        )
    raise ValueError(
        f"{path}: cannot go on exactly with another configuration ({changes}); {former}, or start a new run from its "
        f"weights, with another --out and --set model.weights={path}. Free to change: {', '.join(sorted(_FREE_KEYS))}"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
