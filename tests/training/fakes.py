"""A model and a dataset of a few numbers, for what does not depend on the real ones, and settings for those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from magnet_fast.data.sample import Sample
from magnet_fast.models import Features, InputSpec, Prediction, Text, Words
from magnet_fast.training import Trainer
from magnet_fast.training.config import TrainConfig, parse_config
from magnet_fast.training.distributed import World
from magnet_fast.training.terms import build_terms

# The smallest MagNet that has every part of a real one.
SMALL_MAGNET = {
    "text__vocab_size": 1280,
    "head": {
        "width": 32, "num_heads": 2, "points": 2, "pixel_layers": 1, "pixel_feedforward": 32,
        "mask_layers": 3, "mask_feedforward": 32,
    },
}  # fmt: skip

# One block a stage and no pyramid: a fifth of the tensors, for what costs time by the tensor.
SMALLEST_MAGNET = {
    **SMALL_MAGNET,
    "image__depths": [1, 1, 1, 1],
    "fusion__pyramid": [],
    "head": {**SMALL_MAGNET["head"], "mask_layers": 1},
}


class FakeConfig(BaseModel):
    width: int = 8


class FakeImageEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)


class FakeTextEncoder(nn.Module):
    vocab_size, max_positions = 50, 6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = self.sentence_width = width
        self.words = nn.Embedding(50, width)

    @property
    def word_embedding(self) -> Tensor:
        return self.words.weight


class FakeHead(nn.Module):
    """At a quarter of the size, with one earlier prediction of half the logits."""

    says_presence = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pixel_channels = width
        self.mask = nn.Conv2d(width, 1, 3, padding=1)
        self.named = nn.Linear(width, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, features: Features) -> Prediction:
        pixels, words = features.maps[-1].permute(0, 3, 1, 2), features.words
        mask, presence = self.mask(pixels)[:, 0], self.named(words.sentence)[:, 0]
        return Prediction(mask, presence, (Prediction(0.5 * mask, 0.5 * presence),), pixels, words)


class FakeModel(nn.Module):
    """Reads words and pixels, drops some of them, and obeys the contract of models."""

    needs: tuple[str, ...] = ()

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = FakeConfig(width=width)
        self.spec = InputSpec(size=16, max_tokens=6)
        self.image_encoder, self.text_encoder = FakeImageEncoder(width), FakeTextEncoder(width)
        self.fusion, self.head, self.presence = nn.Dropout(dropout), FakeHead(width), None

    def encode(
        self,
        image: Tensor,
        text: Text,
        context: dict[str, Tensor] | None = None,
        *,
        embedded: Tensor | None = None,
    ) -> Features:
        words = Words(self.text_encoder.words(text.ids) if embedded is None else embedded, text.mask)
        pixels = F.relu(self.image_encoder.patches(image)) * (1 + words.sentence[:, :, None, None])
        return Features([self.fusion(pixels).permute(0, 2, 3, 1)], words, [None], tuple(image.shape[-2:]))

    def forward(self, image: Tensor, text: Text, context: dict[str, Tensor] | None = None) -> Prediction:
        return self.head(self.encode(image, text, context))

    def repeated_layers(self) -> list[nn.Module]:
        return []


class FakeDataset(Dataset):
    """Samples that are a function of their index: the bright squares are what is named."""

    image_size = 16

    def __init__(self, length: int = 24) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 4, 4, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
        mask = (image[0] > 0.3).to(torch.uint8)
        ids = torch.randint(1, 50, (6,), generator=generator)
        return {
            "image": image,
            "text": Text(ids, torch.ones(6, dtype=torch.bool)),
            "mask": mask,
            "exists": bool(mask.any()),
            "index": index,
            "ref": index // 2,
            "image_id": 100 + index,
            "kind": "even" if index % 2 == 0 else None,
            "category": None,
            "size": (16, 16),
            "extra": {},
        }


def fake_config(**changes: Any) -> TrainConfig:
    """A run of 9 steps over `FakeDataset`, 3 steps an epoch."""
    length = {} if "max_steps" in changes else {"epochs": 3}
    values = {
        **length,
        "batch_size": 8,
        "log_every": 2,
        "checkpoint_every": 2,
        "optimiser": {"lr": 1e-2},
        "precision": "float32",
        "device": "cpu",
    }
    return parse_config({**values, **changes})


def trainer_of(
    config: TrainConfig,
    model: nn.Module,
    training_set: Any,
    validation_set: Any | None,
    out: str | Path,
    world: World | None = None,
    tokenizer: Any = None,
) -> Trainer:
    """A trainer with the terms that the configuration names."""
    terms = build_terms(config.terms, model, tokenizer)
    return Trainer(config, model, terms, training_set, validation_set, out, world)


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
