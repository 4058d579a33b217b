"""A model and a dataset of a few numbers, for what does not depend on the real ones, and settings for those."""

from __future__ import annotations

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from magnet_fast.models import SegmentationOutput
from magnet_fast.training.config import TrainConfig, parse_config

# The smallest MagNet that has every part of a real one.
SMALL_MAGNET = {
    "text__vocab_size": 1280,
    "decoder": {
        "width": 32, "num_heads": 2, "points": 2, "pixel_layers": 1, "pixel_feedforward": 32,
        "mask_layers": 3, "mask_feedforward": 32,
    },
}  # fmt: skip

# One block a stage and no pyramid: a fifth of the tensors, for what costs time by the tensor.
SMALLEST_MAGNET = {
    **SMALL_MAGNET,
    "image__depths": [1, 1, 1, 1],
    "alignment__pyramid": [],
    "decoder": {**SMALL_MAGNET["decoder"], "mask_layers": 1},
}


class FakeConfig(BaseModel):
    width: int = 8


class FakeModel(nn.Module):
    """Reads words and pixels, drops some of them, predicts at a quarter of the size with one auxiliary prediction."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = FakeConfig(width=width)
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.words = nn.Embedding(50, width)
        self.dropout = nn.Dropout(dropout)
        self.mask = nn.Conv2d(width, 1, 3, padding=1)
        self.referent = nn.Linear(width, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> SegmentationOutput:
        words = (self.words(input_ids) * attention_mask[..., None]).mean(dim=1)
        features = self.dropout(F.relu(self.patches(image)) * (1 + words[:, :, None, None]))
        mask, referent = self.mask(features), self.referent(words)[:, None]
        return SegmentationOutput(mask, referent, [(0.5 * mask, 0.5 * referent)])

    @torch.no_grad()
    def predict(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, size: tuple | None = None) -> Tensor:
        logits = self(image, input_ids, attention_mask).mask_logits
        size = size or image.shape[-2:]
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True).sigmoid()[:, 0]


class FakeDataset(Dataset):
    """Items that are a function of their index: the bright squares are the referent."""

    image_size = 16

    def __init__(self, length: int = 24) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 4, 4, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return {
            "image": image,
            "mask": (image[0] > 0.3).to(torch.uint8),
            "input_ids": torch.randint(1, 50, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.int64),
            "index": index,
        }

    def record(self, index: int) -> dict:
        return {"kind": "even" if index % 2 == 0 else None, "height": 16, "width": 16}


def fake_config(**changes: object) -> TrainConfig:
    """A run of 9 steps over `FakeDataset`, 3 steps an epoch."""
    length = {} if "max_steps" in changes else {"epochs": 3}
    values = {
        **length,
        "batch_size": 8,
        "log_every": 2,
        "checkpoint_every": 2,
        "optimiser": {"lr": 1e-2},
        "precision": "float32",
        "data": {"image_size": 16},
        "device": "cpu",
    }
    return parse_config({**values, **changes})


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
