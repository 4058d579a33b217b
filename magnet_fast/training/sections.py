"""The sections of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from magnet_fast.models.contract import MAX_INPUT_SIDE
from magnet_fast.training.strict import Strict


class ModelSection(Strict):
    """Which model: the arguments of `models.create`."""

    name: str = "magnet_tiny"
    pretrained: bool | dict[str, str | bool] = Field(False, description="or {image: …, text: …}: names or local paths")
    overrides: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of models.create")
    weights: str | None = Field(None, description="start from the weights of the same model in this file")

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained: choose one")
        return self


class PhrasesSection(Strict):
    """Sentences made of the regions in instances.json, over photographs changed at random; for training alone."""

    size: int = Field(256, ge=32, multiple_of=8, description="side that photographs are brought to in training")
    per_image: int = Field(6, gt=0, description="sentences about each photograph, which is encoded once")
    pastes: float = Field(1.0, ge=0, le=2, description="objects pasted into a photograph, on average")


class DataSection(Strict):
    """Which data, and how they are brought to the model."""

    root: str | None = Field(None, description="folder of the data; --data overrides it")
    dataset: str = "refcoco"
    split_by: str = "unc"
    format: str | None = Field(None, description="name of a reader; none: told from the files")
    images: list[str] = Field(default_factory=list, description="folders of the images; none: where the format says")
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
    image_size: int | None = Field(
        None, ge=8, le=MAX_INPUT_SIDE, description="side that images are brought to; none: the model's own"
    )
    max_tokens: int | None = Field(None, ge=3, description="with the special ones; none: the model's own")
    tokenizer: str | None = Field(None, description="a vocabulary or its folder; none: what the model's spec names")
    truth: Literal["resized", "polygons"] | None = Field(
        None, description="masks at the model's square: resized, or drawn there from polygons; none: as the protocol"
    )
    cache: bool = Field(False, description="keep prepared images in memory, shared by loader workers")
    workers: int = Field(0, ge=0, description="loader processes per training process")
    references: str | None = Field(
        None, description="file of `data retrieve`: samples carry the picture found for their sentence"
    )
    phrases: PhrasesSection | None = Field(
        None, description="train on sentences made of the training images' regions, in place of those of the data"
    )
    val_limit: int | None = Field(None, gt=0, description="validate on the first so many sentences only")


class OptimiserConfig(Strict):
    """AdamW, or Muon for the weight matrices and AdamW for all else."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    image_multiplier: float = Field(1.0, gt=0, description="of the learning rate of the image encoder")
    text_multiplier: float = Field(1.0, gt=0, description="of the learning rate of the text encoder")
    multipliers: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="of the learning rate, by shell pattern of parameter names; the first that fits, before a part's",
    )
    multiply_from: float = Field(0, ge=0, le=1, description="share of the run from which on the three count")
    freeze: list[str] = Field(default_factory=list, description="shell patterns of parameter names held fixed")


class ScheduleSection(Strict):
    """Linear warm-up, then (1 - progress) ** power, and a tenth of it from each milestone on."""

    power: float = Field(0.9, ge=0, description="0: constant but for the milestones")
    warmup: int = Field(0, ge=0, description="optimiser steps")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list, description="shares of the run at which the rate falls to a tenth"
    )
