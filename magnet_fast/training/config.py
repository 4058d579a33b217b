"""What a training run is made of: typed sections, read from YAML, changed by `--set section.key=value`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from magnet_fast.evaluation import PROTOCOLS, TASKS
from magnet_fast.training.sections import DataSection, ModelSection, OptimiserConfig, ScheduleSection
from magnet_fast.training.strict import Strict, explain
from magnet_fast.training.terms import TERMS, TermConfig, read_terms

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def load_config(source: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a configuration and apply overrides.

    A file may name another one to build on, `base: magnet_swin_b_refcoco` (a file beside it or anywhere, or a
    shipped name): its entries replace those of the base, section by section and term by term; lists and
    `model.overrides` as a whole. A length (epochs, max_steps, max_minutes) replaces the base's, whichever that was.

    Args:
        source: a YAML file, or the name of a configuration that ships with the package
            (`magnet_tiny_scenes`); None for the defaults.
        overrides: `"optimiser.lr=1e-4"` and the like; the value is read as YAML.

    Raises:
        FileNotFoundError: no such file and no shipped configuration of that name.
        ValueError: not YAML, an unknown key (named with its path and the nearest known one), or a bad value.
    """
    values: dict[str, Any] = {}
    where = "configuration"
    if source is not None:
        path = find_config(source)
        where = str(path)
        values = _read_with_base(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, where + "".join(f", --set {override}" for override in overrides))


def parse_config(values: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Check a nested dict and make a `TrainConfig` of it; errors as in `load_config`."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {explain(entry, TrainConfig)}" for entry in error.errors())) from None


def shipped_configs() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(source: str | Path) -> Path:
    """The file of a configuration given by path or by the name of a shipped one."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = CONFIG_FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and path.parent == Path("."):
        return shipped
    raise FileNotFoundError(
        f"{source}: no such configuration file, and none of the shipped ones ({', '.join(shipped_configs())})"
    )


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_interval(value: Any) -> Any:
    """1 -> "1 epoch", "200 steps" -> itself."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value} epochs"
    if isinstance(value, str) and (value == "never" or re.fullmatch(r"[1-9]\d* (epochs?|steps?)", value)):
        return value
    raise ValueError("expected '<n> epochs', '<n> steps', a number of epochs, or 'never'")


class TrainConfig(Strict):
    """A whole run. Exactly one of `epochs`, `max_steps` and `max_minutes` says how long it is."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleSection = ScheduleSection()
    terms: Annotated[dict[str, SerializeAsAny[TermConfig]], BeforeValidator(read_terms)] = Field(
        default_factory=dict,
        description="losses by name; mask, and presence where the model has one, unless named with weight 0",
    )
    epochs: int | None = Field(None, gt=0)
    max_steps: int | None = Field(None, gt=0)
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="wall-clock budget; the schedule then runs by time: not repeatable bit for bit",
    )
    batch_size: int = Field(32, gt=0, description="sentences per optimiser step, over all processes and micro-batches")
    accumulation: int = Field(1, gt=0, description="micro-batches that an optimiser step is split into")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm")
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    seed: int = Field(0, ge=0, lt=2**31)
    checkpoint_every: int = Field(500, gt=0, description="steps between checkpoints; one also follows each validation")
    validate_every: Annotated[str, BeforeValidator(_read_interval)] = "1 epoch"
    task: str = Field("single", description=f"whose scores a validation gives: {', '.join(TASKS)}")
    protocol: str = Field("family", description=f"how a validation scores: {', '.join(PROTOCOLS)}")
    resolution: Literal["input", "original"] = Field("input", description="where a validation compares masks")
    best_metric: str | None = Field(None, description="which score chooses best.safetensors; none: the task's")
    eval_batch_size: int = Field(16, gt=0)
    log_every: int = Field(20, gt=0, description="steps between rows of metrics.jsonl; the losses are read only then")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:1'")
    fast: bool = Field(True, description="accelerate the model; its plain form is slower and computes the same")
    compile: bool = Field(False, description="torch.compile the model with its losses")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="several processes hold copies, or shards (FSDP2)")
    activation_checkpointing: bool = Field(False, description="compute layers again in backward: less memory")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights, validated and exported")
    deterministic: bool = Field(False, description="PyTorch's deterministic algorithms; slower on a GPU")
    tensorboard: bool = Field(False, description="also write OUT/tensorboard; needs the extra 'logging'")

    @model_validator(mode="after")
    def _known_scores(self) -> TrainConfig:
        for key, known in (("task", TASKS), ("protocol", PROTOCOLS)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}: expected one of {', '.join(known)}, got {getattr(self, key)!r}")
        scores = TASKS[self.task].scores
        if self.best_metric is not None and self.best_metric not in scores:
            raise ValueError(
                f"best_metric: expected a score of task {self.task!r} ({', '.join(scores)}), got {self.best_metric!r}"
            )
        return self

    @property
    def best(self) -> str:
        """The score that chooses the best weights."""
        return self.best_metric or TASKS[self.task].best

    @property
    def sentences_per_image(self) -> int:
        """How many samples in a row have the same image."""
        return 1 if self.data.phrases is None else self.data.phrases.per_image

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in ("epochs", "max_steps", "max_minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of epochs, max_steps, max_minutes must be given, found {found}")
        if self.parallel == "fsdp" and self.optimiser.name == "muon":
            raise ValueError("optimiser.name=muon needs whole matrices, and parallel=fsdp cuts them up: take adamw")
        if self.data.phrases is not None and self.data.also:
            raise ValueError("data.phrases makes sentences of one data set; leave out data.also")
        if self.data.references is not None and (self.data.also or self.data.phrases is not None):
            raise ValueError("data.references is of one data set's own sentences; leave out data.also and data.phrases")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}")
        return self

    def interval(self, steps_per_epoch: int) -> int | None:
        """`validate_every` in optimiser steps; None for never."""
        if self.validate_every == "never":
            return None
        count, unit = self.validate_every.split()
        return int(count) * (steps_per_epoch if unit.startswith("epoch") else 1)


_LENGTHS = ("epochs", "max_steps", "max_minutes")


def _read_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's entries laid over those of the file it builds on."""
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: expected the name or path of a configuration, got {base!r}")
    if "\0" in base:
        raise ValueError(f"{path}: base: expected the name or path of a configuration, got {base!r:.80}")
    beside = path.parent / base
    try:
        below = (beside if beside.is_file() else find_config(base)).resolve()
    except OSError as error:  # of a name that is too long, too
        raise FileNotFoundError(
            f"{path}: base: expected a configuration that exists, got {base!r:.120} ({error})"
        ) from error
    chain = (*above, path.resolve())
    if below in chain:
        raise ValueError(f"{path}: base: {base} builds on this file itself")
    entries = _read_with_base(below, chain)
    # A mistyped key is told as one of the file that holds it.
    parse_config(entries if any(key in entries for key in _LENGTHS) else {**entries, "epochs": 1}, str(below))
    if any(key in values for key in _LENGTHS):
        entries = {key: value for key, value in entries.items() if key not in _LENGTHS}
    return _laid_over(entries, values, depth=2)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML of plain values, or has more of them than any configuration; the path is named.
    """
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a YAML file: {_on_one_line(error)}") from error


_MOST = 100_000  # values: aliases of aliases make millions of a few lines


def _parsed(text: str) -> Any:
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # of dates, numbers and lists in lists, many kinds
        raise ValueError(str(error)) from error
    waiting, count = [content], 0
    while waiting:
        item = waiting.pop()
        count += 1
        if count > _MOST:
            raise ValueError(f"expected at most {_MOST} values, aliases (*) counted each time, got more")
        waiting += [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list | set) else []
    return content


def _on_one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _laid_over(below: dict[str, Any], above: dict[str, Any], depth: int) -> dict[str, Any]:
    """Entries replace those of the same name; sections, and each term within theirs, are laid over one another."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        deeper = depth == 2 or key in TERMS
        if depth and deeper and isinstance(inner, dict) and isinstance(value, dict):
            value = _laid_over(inner, value, depth - 1 if key == "terms" else 0)
        merged[key] = value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Write `section.key=value` into nested entries, the value read as YAML; ValueError where it cannot be read."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"--set {override}: expected section.key=value")
    try:
        value = _parsed(text)
    except ValueError as error:
        raise ValueError(f"--set {override}: the value is not YAML: {_on_one_line(error)}") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 takes 1e-4, having no dot, for a string
    if key in _LENGTHS and value is not None:
        for other in _LENGTHS:  # the length given last is the one that is meant
            values.pop(other, None)
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {'.'.join(sections[: depth + 1])} is not a section")
    values[last] = value
