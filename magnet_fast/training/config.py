"""What a training run is made of: typed sections, read from YAML, changed by ``--set section.key=value``."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def load_config(source: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a configuration and apply overrides.

    A file may name another one to build on, ``base: magnet_swin_b_refcoco`` (a file beside it or anywhere, or a
    shipped name): its entries replace those of the base, section by section; lists and ``model.overrides`` as a
    whole. A length (epochs, max_steps, max_minutes) replaces the base's, whichever that was.

    Args:
        source: a YAML file, or the name of a configuration that ships with the package
            (``magnet_tiny_scenes``); None for the defaults.
        overrides: ``"optimiser.lr=1e-4"`` and the like; the value is read as YAML.

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
        _apply_override(values, override)
    return parse_config(values, where)


def parse_config(values: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Check a nested dict and make a `TrainConfig` of it; errors as in `load_config`."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {_explain(entry)}" for entry in error.errors())) from None


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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which model: the arguments of ``models.build``."""

    name: str = "magnet_tiny"
    pretrained: bool | dict[str, str] = Field(False, description="or {image: …, text: …}: names or local paths")
    overrides: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of models.build")
    weights: str | None = Field(None, description="start from these weights: a .safetensors file of the same model")

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained: choose one")
        return self


class DataSection(_Section):
    """Which data, in REFER's layout, and how it is brought to the model."""

    root: str | None = Field(None, description="folder of the data; --data overrides it")
    dataset: str = "refcoco"
    split_by: str = "unc"
    also: list[Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]] = Field(
        default_factory=list,
        description="train on these, too: 'refcoco+/unc'; images of any of the sets' other splits are left out",
    )
    train_split: str = "train"
    val_split: str = "val"
    mode: Literal["sentences", "refs"] = Field(
        "sentences",
        description="an epoch sees every sentence once, or every referent once with one of its sentences",
    )
    image_size: int = Field(480, ge=8, description="side the images are squashed to")
    tokenizer: str | None = Field(None, description="vocab.txt or its folder; none for the shipped vocabulary")
    max_words: int = Field(20, ge=3, description="word pieces in all, with [CLS] and [SEP]")
    cache: bool = Field(False, description="keep decoded images in memory")
    workers: int = Field(0, ge=0, description="loader processes per training process")
    val_limit: int | None = Field(None, gt=0, description="validate on the first so many sentences only")


class OptimiserConfig(_Section):
    """AdamW, or Muon for the weight matrices and AdamW for all else."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    image_multiplier: float = Field(1.0, gt=0, description="of the learning rate of the image encoder")
    text_multiplier: float = Field(1.0, gt=0, description="of the learning rate of the text encoder")
    freeze: list[str] = Field(default_factory=list, description="shell patterns of parameter names held fixed")


class ScheduleSection(_Section):
    """Linear warm-up, then (1 - progress) ** power."""

    power: float = Field(0.9, ge=0)
    warmup: int = Field(0, ge=0, description="optimiser steps")


class LossSection(_Section):
    """Weights of the losses; 0 leaves a loss out."""

    bce: float = Field(2.0, ge=0)
    dice: float = Field(2.0, ge=0)
    classification: float = Field(1.0, ge=0)
    alignment: float = Field(0.0, ge=0, description="of MagNet's alignment loss, P2P and P2T alike; its recipes: 0.5")
    grounding: float = Field(0.0, ge=0, description="of Mask Grounding; MagNet's recipes: 1")
    pixel_temperature: float = Field(0.1, gt=0, description="of P2P")
    text_temperature: float = Field(0.1, gt=0, description="of P2T")


class GroundingSection(_Section):
    """Mask Grounding: what is hidden, and the predictor; used where loss.grounding is above 0."""

    share: float = Field(0.15, gt=0, le=1, description="of a sentence's ordinary tokens that is hidden")
    scheme: Literal["90/10", "80/10/10"] = Field("90/10", description="[MASK] or unchanged; or BERT's")
    image_stage: int = Field(3, ge=0, le=3, description="stage whose pixels the predictor reads: 0 (stride 4) to 3")
    layers: int = Field(6, gt=0)
    heads: int = Field(8, gt=0)
    feedforward: int = Field(768, gt=0)
    blind: bool = Field(False, description="a control: the predictor sees neither image nor mask")


def _read_interval(value: Any) -> Any:
    """1 -> "1 epoch", "200 steps" -> itself."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value} epochs"
    if isinstance(value, str) and (value == "never" or re.fullmatch(r"[1-9]\d* (epochs?|steps?)", value)):
        return value
    raise ValueError("expected '<n> epochs', '<n> steps', a number of epochs, or 'never'")


class TrainConfig(_Section):
    """A whole run. Exactly one of ``epochs``, ``max_steps`` and ``max_minutes`` says how long it is."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleSection = ScheduleSection()
    loss: LossSection = LossSection()
    grounding: GroundingSection = GroundingSection()
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
    best_metric: Literal["oIoU", "mIoU"] = "oIoU"
    eval_batch_size: int = Field(16, gt=0)
    log_every: int = Field(20, gt=0, description="steps between rows of metrics.jsonl; the losses are read only then")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:1'")
    compile: bool = Field(False, description="torch.compile the model with its losses")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="several processes hold copies, or shards (FSDP2)")
    activation_checkpointing: bool = Field(False, description="compute layers again in backward: less memory")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights, validated and exported")
    deterministic: bool = Field(False, description="PyTorch's deterministic algorithms; slower on a GPU")
    tensorboard: bool = Field(False, description="also write OUT/tensorboard; needs the extra 'logging'")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in ("epochs", "max_steps", "max_minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of epochs, max_steps, max_minutes must be given, found {found}")
        if self.parallel == "fsdp" and self.optimiser.name == "muon":
            raise ValueError("optimiser.name=muon needs whole matrices, and parallel=fsdp cuts them up: take adamw")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}")
        return self

    def interval(self, steps_per_epoch: int) -> int | None:
        """``validate_every`` in optimiser steps; None for never."""
        if self.validate_every == "never":
            return None
        count, unit = self.validate_every.split()
        return int(count) * (steps_per_epoch if unit.startswith("epoch") else 1)


_LENGTHS = ("epochs", "max_steps", "max_minutes")


def _read_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's entries laid over those of the file it builds on."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: expected the name or path of a configuration, got {base!r}")
    beside = path.parent / base
    below = (beside if beside.is_file() else find_config(base)).resolve()
    chain = (*above, path.resolve())
    if below in chain:
        raise ValueError(f"{path}: base: {base} builds on this file itself")
    entries = _read_with_base(below, chain)
    # A mistyped key is told as one of the file that holds it.
    parse_config(entries if any(key in entries for key in _LENGTHS) else {**entries, "epochs": 1}, str(below))
    if any(key in values for key in _LENGTHS):
        entries = {key: value for key, value in entries.items() if key not in _LENGTHS}
    for key, value in values.items():
        inner = entries.get(key)
        entries[key] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    return entries


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"--set {override}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override}: the value is not YAML: {error}") from error
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


def _explain(entry: Any) -> str:
    """One pydantic error as a sentence with the key's path."""
    location = [str(part) for part in entry["loc"]]
    path = ".".join(location)
    if entry["type"] != "extra_forbidden":
        message = entry["msg"].removeprefix("Value error, ")
        given = f", got {entry['input']!r}" if location and not isinstance(entry["input"], dict) else ""
        return f"{path}: {message}{given}" if path else message
    section: type[BaseModel] = TrainConfig
    for part in location[:-1]:
        section = _model_of(section.model_fields[part].annotation) or section
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
    nearest = ".".join([*location[:-1], near[0]]) if near else ""
    return f"unknown key {path!r}; the nearest known one is {nearest!r} (known here: {', '.join(known)})"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _model_of(part))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
