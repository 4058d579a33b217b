"""A dataset of samples and models of a few numbers, for what does not depend on the real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from magnet_fast.data.sample import Sample
from magnet_fast.models.contract import InputSpec, Prediction, Text

SIZE = 16


class Middle:
    """A fit whose way back takes the middle pixels of the canvas."""

    def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
        top, left = ((side - wanted) // 2 for side, wanted in zip(canvas.shape[-2:], size, strict=True))
        return canvas[..., top : top + size[0], left : left + size[1]]


class FakeDataset(Dataset):
    """Samples that are a function of their index: the bright squares of 4 x 4 pixels are named. Nothing but samples.

    Two sentences of three belong to a ref, the third to the next. Every fifth names nothing, if `negatives`.
    """

    def __init__(
        self, length: int = 24, *, negatives: bool = False, sizes: tuple = ((16, 16),), original: bool = False
    ) -> None:
        self.length, self.negatives, self.sizes, self.original = length, negatives, sizes, original

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 4, 4, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
        exists = not (self.negatives and index % 5 == 4)
        height, width = self.sizes[index % len(self.sizes)]
        sample: Sample = {
            "image": image,
            "text": Text(torch.tensor([index, *torch.randint(1, 50, (5,), generator=generator)]), torch.ones(6) > 0),
            "mask": ((image[0] > 0.3) & exists).to(torch.uint8),
            "exists": exists,
            "index": index,
            "ref": index * 2 // 3,
            "image_id": index,
            "kind": "even" if index % 2 == 0 else None,
            "category": None,
            "size": (height, width),
            "extra": {},
        }
        if self.original:
            whole = F.interpolate(image[None, :1], size=(height, width), mode="nearest")[0, 0]
            sample["original_mask"] = ((whole > 0.3) & exists).to(torch.uint8)
        return sample


class FakeModel(nn.Module):
    """Reads pixels and words; answers at a quarter of the size, with a flag if `presence`."""

    spec = InputSpec(size=SIZE, threshold=0.4)

    def __init__(self, presence: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.words = nn.Embedding(50, 8)
        self.mask = nn.Conv2d(8, 1, 3, padding=1)
        self.flag = nn.Linear(8, 1) if presence else None

    def forward(self, image: Tensor, text: Text, context: dict[str, Tensor] | None = None) -> Prediction:
        words = (self.words(text.ids) * text.mask[..., None]).mean(dim=1)
        features = F.relu(self.patches(image)) * (1 + words[:, :, None, None])
        return Prediction(self.mask(features)[:, 0], None if self.flag is None else self.flag(words)[:, 0])


class Oracle(nn.Module):
    """Answers each sentence with its truth, found by its words: perfect, if the words are the right ones."""

    def __init__(self, dataset: FakeDataset, key: str = "mask", presence: bool = False) -> None:
        super().__init__()
        samples = [dataset[index] for index in range(len(dataset))]
        self.answers = torch.stack([sample[key] for sample in samples])
        self.exists = torch.tensor([sample["exists"] for sample in samples])
        self.presence = presence

    def forward(self, image: Tensor, text: Text, context: dict[str, Tensor] | None = None) -> Prediction:
        which = text.ids[:, 0]
        presence = self.exists[which] * 8.0 - 4 if self.presence else None
        return Prediction(self.answers[which] * 40.0 - 20, presence)


class Says(nn.Module):
    """Always the same prediction, of one sentence."""

    def __init__(self, prediction: Prediction, spec: InputSpec | None = None) -> None:
        super().__init__()
        self.prediction = prediction
        if spec is not None:
            self.spec = spec

    def forward(self, image: Tensor, text: Text, context: dict[str, Tensor] | None = None) -> Prediction:
        return self.prediction
