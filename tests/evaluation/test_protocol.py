"""Each protocol does what its authors' code does: ReLA's mask and flag apart, CRIS's letterbox and strict P@X."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from magnet_fast.data.transforms import open_fit
from magnet_fast.evaluation import evaluate
from magnet_fast.evaluation.protocol import PROTOCOLS, probability_at_input
from magnet_fast.models.contract import InputSpec, Prediction, Text

from .fakes import Says

GOLDEN = Path(__file__).parents[1] / "golden"


class One(Dataset):
    """One sentence."""

    def __init__(self, mask: Tensor, size: int, original: bool = False) -> None:
        self.sample = {
            "image": torch.zeros(3, size, size),
            "text": Text(torch.ones(2, dtype=torch.int64), torch.ones(2) > 0),
            "mask": torch.zeros(size, size, dtype=torch.uint8) if original else mask,
            "exists": True,
            "index": 0,
            "ref": 0,
            "image_id": 0,
            "kind": None,
            "category": None,
            "size": tuple(mask.shape),
            "extra": {},
        }
        if original:
            self.sample["original_mask"] = mask

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        return self.sample


def test_gres_reads_mask_and_flag_apart() -> None:
    """A flag that says "none" over a mask that is not empty: the mask stays in the union, the family empties it."""
    truth = torch.zeros(4, 4, dtype=torch.uint8)
    truth[:2] = 1  # 8 pixels
    logits = torch.full((1, 4, 4), -3.0)
    logits[0, 1:] = 3  # 12 pixels, 4 of them right
    denied, said = (Says(Prediction(logits, torch.tensor([flag]))) for flag in (-1.0, 1.0))
    options = {"task": "generalized", "fast": False}
    found = evaluate(said, One(truth, 4), protocol="gres", **options)
    assert found["gIoU"] == found["cIoU"] == pytest.approx(100 * 4 / 16)
    found = evaluate(denied, One(truth, 4), protocol="gres", **options)
    assert (found["gIoU"], found["cIoU"], found["T-acc"]) == (0, 0, 0)
    both = [One(truth, 4), One(truth, 4)]
    both[1].sample["index"] = 1

    class Pair(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict:
            return both[index][0]

    mixed = Says(Prediction(logits.expand(2, 4, 4), torch.tensor([1.0, -1.0])))
    found = evaluate(mixed, Pair(), protocol="gres", **options)
    assert found["cIoU"] == pytest.approx(100 * 4 / (16 + 16))
    found = evaluate(mixed, Pair(), protocol="family", **options)
    assert found["cIoU"] == pytest.approx(100 * 4 / (16 + 8))


def test_gres_counts_an_empty_mask_under_a_flag_as_a_claim() -> None:
    truth = torch.zeros(4, 4, dtype=torch.uint8)
    dataset = One(truth, 4)
    dataset.sample["exists"] = False
    empty = Says(Prediction(torch.full((1, 4, 4), -3.0), torch.tensor([1.0])))
    found = evaluate(empty, dataset, task="generalized", protocol="gres", fast=False)
    assert (found["gIoU"], found["N-acc"]) == (0, 0) and math.isnan(found["cIoU"])
    # Without a flag, an empty mask is the answer "none".
    silent = Says(Prediction(torch.full((1, 4, 4), -3.0)))
    assert evaluate(silent, dataset, task="generalized", protocol="gres", fast=False)["gIoU"] == 100


def test_thresholds() -> None:
    """The model's own under "family", one half where it names none; those of the protocols elsewhere."""
    truth = torch.ones(4, 4, dtype=torch.uint8)
    weak = Prediction(torch.full((1, 4, 4), -0.4))  # a probability of 0.401
    options = {"fast": False}
    assert evaluate(Says(weak), One(truth, 4), **options)["mIoU"] == 0
    eager = Says(weak, InputSpec(threshold=0.4))
    assert evaluate(eager, One(truth, 4), **options)["mIoU"] == 100
    assert evaluate(eager, One(truth, 4), protocol="gres", **options)["mIoU"] == 0


# ---- CRIS, by its released code (tests/golden/cris_data) ----


class PlainLetterbox:
    """The way back as cris.md writes it, in float64, without OpenCV 4's rounding of coordinates."""

    def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        side = canvas.shape[-1]
        scale = min(side / height, side / width)
        x = scale * torch.arange(width, dtype=torch.float64) + (side - width * scale) / 2
        y = scale * torch.arange(height, dtype=torch.float64) + (side - height * scale) / 2
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        grid = (2 * grid + 1) / side - 1
        return F.grid_sample(
            canvas.double()[None, None], grid[None], mode="bicubic", padding_mode="zeros", align_corners=False
        )[0, 0].float()


def test_cris_from_logits_to_the_score() -> None:
    """Between OpenCV 4, by which the score was taken, and the plain formula lie 0.002 of a probability."""
    golden = np.load(GOLDEN / "cris_data.npz")
    prediction = Prediction(torch.from_numpy(golden["logits"])[:, 0])
    square = golden["probability"].shape
    upsampled = probability_at_input(prediction, PROTOCOLS["cris"], square)[0]
    assert torch.allclose(upsampled, torch.from_numpy(golden["probability"]), atol=2e-6)
    original = PlainLetterbox().back(upsampled, golden["mask"].shape)
    assert torch.allclose(original, torch.from_numpy(golden["original"]), atol=2e-3)

    dataset = One(torch.from_numpy(golden["mask"] > 0).to(torch.uint8), square[0], original=True)
    dataset.spec, dataset.fit = InputSpec(fit="letterbox"), PlainLetterbox()
    found = evaluate(Says(prediction), dataset, protocol="cris", resolution="original", fast=False)
    assert found["mIoU"] == pytest.approx(100 * golden["iou"][0], abs=0.2)
    assert (found["P@0.6"], found["P@0.7"]) == (100, 0)
    assert found["threshold"] == 0.35


def test_cris_with_the_letterbox_equals_the_released_score() -> None:
    """To the last digit that float32 holds: the way back rounds coordinates as OpenCV 4 does."""
    golden = np.load(GOLDEN / "cris_data.npz")
    side = golden["probability"].shape[0]
    dataset = One(torch.from_numpy(golden["mask"] > 0).to(torch.uint8), side, original=True)
    dataset.spec = InputSpec(size=side, fit="letterbox")
    dataset.fit = open_fit(dataset.spec)
    prediction = Prediction(torch.from_numpy(golden["logits"])[:, 0])
    found = evaluate(Says(prediction), dataset, protocol="cris", resolution="original", fast=False)
    assert found["mIoU"] == pytest.approx(100 * golden["iou"][0], abs=1e-9)


def test_cris_says_how_an_iou_is_formed() -> None:
    """Its small number in the divisor, and more than, not at least."""
    size = 10
    truth = torch.zeros(size, size, dtype=torch.uint8)
    truth[:, :] = 1
    logits = torch.full((1, size, size), -9.0)
    logits[0, :5] = 9  # exactly half

    class Same(PlainLetterbox):
        def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
            return canvas

    dataset = One(truth, size, original=True)
    dataset.spec, dataset.fit = InputSpec(fit="letterbox"), Same()
    found = evaluate(Says(Prediction(logits)), dataset, protocol="cris", resolution="original", fast=False)
    assert found["P@0.5"] == 0
    assert found["mIoU"] == 100 * 50 / (100 + 1e-6)
    assert found["mIoU"] < 50
    found = evaluate(Says(Prediction(logits)), dataset, resolution="original", fast=False)
    assert (found["P@0.5"], found["mIoU"]) == (100, 50)


def test_cris_empty_union_is_zero() -> None:
    dataset = One(torch.zeros(8, 8, dtype=torch.uint8), 8, original=True)
    dataset.spec, dataset.fit = InputSpec(fit="letterbox"), PlainLetterbox()
    nothing = Says(Prediction(torch.full((1, 2, 2), -9.0)))
    found = evaluate(nothing, dataset, protocol="cris", resolution="original", fast=False)
    assert (found["mIoU"], found["P@0.5"]) == (0, 0)
