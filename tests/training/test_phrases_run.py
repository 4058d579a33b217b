"""Training on sentences made of regions: several about an image that is encoded once, from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from magnet_fast.training import train
from magnet_fast.training.building import build_trainer
from magnet_fast.training.config import TrainConfig, parse_config
from magnet_fast.training.distributed import World
from magnet_fast.training.objective import tensors_of
from tests.data.photographs import write_photographs

from .fakes import same_weights

WORDS = {"model_type": "bert", "vocab_size": 1280, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photos"))


def config(root: Path, **changes: Any) -> TrainConfig:
    values = {
        "model": {
            "name": "photos_lite0",
            "overrides": {
                "text": {"kind": "transformers", "name": "words", "settings": WORDS},
                "fusion": {"width": 16, "middle": 16, "fine": 8, "num_heads": 2, "layers": 1},
                "input": {"tokenizer": "wordpiece"},
            },
        },
        "data": {"root": str(root), "dataset": "own", "image_size": 64, "max_tokens": 12,
                 "phrases": {"size": 32, "per_image": 3}},
        "terms": {"objects": {"classes": 6}},
        "max_steps": 2,
        "batch_size": 3,
        "checkpoint_every": 1,
        "validate_every": "never",
        "log_every": 1,
        "device": "cpu",
        "precision": "float32",
        "ema": 0.9,
        **changes,
    }  # fmt: skip
    return parse_config(values)


def test_an_image_is_encoded_once_and_gives_the_losses_of_separate_ones(root: Path, tmp_path: Path) -> None:
    trainer = build_trainer(config(root), tmp_path, World(0, 1, torch.device("cpu")))
    objective = trainer.objective.eval()
    batch = tensors_of(next(iter(trainer.loader(0, 0))))
    images: list[int] = []
    encoder = objective.model.image_encoder
    encoder.backbone.register_forward_pre_hook(lambda module, given: images.append(len(given[0])))
    with torch.no_grad():
        together = objective(batch)
        objective.sentences_per_image = 1
        apart = objective(batch)
    assert images == [1, 3]
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name])


def test_a_run_repeats_bit_for_bit(root: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "another")]
    for run in runs:
        train(config(root), run)
    first, second = (load_file(run / "last.safetensors") for run in runs)
    assert same_weights(first, second)


def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="no multiple of the 3 about one image"):
        build_trainer(config(root, batch_size=4), tmp_path, world)
    with pytest.raises(ValueError, match=r"terms\.objects\.classes: expected at least the data's 6, got 5"):
        build_trainer(config(root, terms={"objects": {"classes": 5}}), tmp_path, world)
    data = {"root": str(root), "dataset": "own", "image_size": 64, "max_tokens": 12}
    with pytest.raises(ValueError, match=r"data\.phrases makes them"):
        build_trainer(config(root, data=data), tmp_path, world)
    with pytest.raises(ValueError, match=r"leave out data\.also"):
        config(root, data={**data, "phrases": {}, "also": ["more/unc"]})
