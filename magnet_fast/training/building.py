"""Model, tokenizer, data and terms of a run, from its configuration; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from magnet_fast import checkpoints, models
from magnet_fast.data.dataset import require_context
from magnet_fast.data.tokenizers import open_tokenizer
from magnet_fast.showing import shown
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.datasets import build_datasets, open_readers
from magnet_fast.training.distributed import World
from magnet_fast.training.progress import check_tensorboard
from magnet_fast.training.randomness import seed_everything
from magnet_fast.training.terms import build_terms
from magnet_fast.training.trainer import Trainer


def build_trainer(config: TrainConfig, out: Path, world: World) -> Trainer:
    """The trainer of a run, on this process.

    Raises:
        ValueError: parts of the configuration do not fit each other, the data or this machine.
    """
    if config.tensorboard:
        check_tensorboard()
    readers = open_readers(config)
    seed_everything(config.seed)
    model = build_model(config)
    tokenizer = build_tokenizer(config, model)
    training_set, validation_set = build_datasets(config, readers, tokenizer, model.spec, model.needs)
    for dataset in filter(None, (training_set, validation_set)):
        require_context(dataset, model.needs)
    if world.is_main:
        training_set.tell_unread()
    terms = build_terms(config.terms, model, tokenizer)
    for term in terms.values():
        term.check(training_set)
    metadata = {"model_name": config.model.name, "tokenizer_vocab": tokenizer.digest()}
    return Trainer(config, model, terms, training_set, validation_set, out, world, metadata)


def build_model(config: TrainConfig) -> nn.Module:
    """The configuration's model, with its specification of images and expressions.

    With `model.weights` it starts from any file that `checkpoints.load` reads, whose model must be the same; without
    `data.image_size` and `data.max_tokens` it keeps the file's.
    """
    model = models.create(config.model.name, pretrained=config.model.pretrained, **config.model.overrides)
    spec = model.spec
    if config.model.weights is not None:
        start = checkpoints.load(config.model.weights).model
        spec = start.spec
        different = model.config.differences(start.config)
        if different:
            raise ValueError(f"model.weights: {config.model.weights} {_other_model(config.model.name, different)}")
        model.load_state_dict(start.state_dict())
        model.bases = start.bases
    changes = {"size": config.data.image_size, "max_tokens": config.data.max_tokens}
    model.spec = spec._replace(**{key: value for key, value in changes.items() if value is not None})
    return model


def _other_model(name: str, different: list[tuple[str, Any, Any]]) -> str:
    """How a file's model differs from the configuration's, and what makes them the same."""
    listed = "; ".join(f"{key}: file {shown(there, 60)}, here {shown(here, 60)}" for key, here, there in different[:4])
    more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
    # Parts of another kind have other entries as well: such overrides would not fit.
    if more or any(key.rpartition(".")[2] in ("architecture", "kind") for key, _, _ in different):
        return f"is no {name}: {listed}{more}; choose the model.name or the overrides of the file"
    sets = " ".join(f"--set model.overrides.{key}={json.dumps(there)}" for key, _, there in different)
    return f"is another {name}: {listed}; to start from it: {sets}"


def build_tokenizer(config: TrainConfig, model: nn.Module) -> Any:
    """The tokenizer that the model's specification names, checked to give no id that the model does not embed."""
    spec, known = model.spec, model.text_encoder.vocab_size
    tokenizer = open_tokenizer(spec.tokenizer, vocabulary=config.data.tokenizer, max_tokens=spec.max_tokens)
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"data.tokenizer: its vocabulary has {tokenizer.vocab_size} entries, but the text encoder of "
            f"{config.model.name} embeds {known}; choose the model's vocabulary, or set its text.vocab_size"
        )
    return tokenizer
