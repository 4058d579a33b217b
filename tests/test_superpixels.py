"""Superpixels from the picture to the mask: made, kept, trained on, scored, and asked for by a segmenter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import Segmenter, models
from magnet_fast.data import ExpressionDataset, Tokenizer
from magnet_fast.data.context import MAKERS, makers_of, on_canvas
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.scenes import write_scenes
from magnet_fast.data.superpixels import NONE, at_most, superpixels
from magnet_fast.evaluation import evaluate
from magnet_fast.models.contract import InputSpec
from magnet_fast.training import train
from magnet_fast.training.config import parse_config

SIDE = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "easy", 12, seed=3, level="easy")


def quarters(pixels: np.ndarray) -> np.ndarray:
    """Four labels, whatever is in the picture: what a maker gives where SLIC is not the thing tested."""
    height, width = pixels.shape[:2]
    return (np.arange(height)[:, None] * 2 // height * 2 + np.arange(width) * 2 // width).astype(np.uint8)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the pictures that `quarters` was called with, in SLIC's place."""
    calls: list[tuple[int, ...]] = []

    def make(pixels: np.ndarray) -> np.ndarray:
        calls.append(pixels.shape)
        return quarters(pixels)

    monkeypatch.setitem(MAKERS, "superpixels", MAKERS["superpixels"]._replace(make=make, package="numpy"))
    return calls


def test_slic_finds_what_is_drawn() -> None:
    """Three discs on a plain ground: no superpixel has a part of two of them."""
    rows, columns = np.indices((96, 120))
    truth = np.zeros((96, 120), dtype=np.int64)
    for number, (row, column) in enumerate([(30, 30), (60, 90), (70, 30)], 1):
        truth[(rows - row) ** 2 + (columns - column) ** 2 < 15**2] = number
    colours = np.array([[240, 240, 240], [200, 30, 30], [30, 160, 40], [40, 60, 200]], dtype=np.uint8)
    labels = superpixels(colours[truth])
    assert labels.dtype == np.uint8 and labels.shape == (96, 120)
    assert 16 < labels.max() + 1 <= 64 and np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    counts = np.array([np.bincount(truth[labels == label], minlength=4) for label in range(labels.max() + 1)])
    assert counts.max(axis=1).sum() > 0.97 * truth.size  # the purest class of each holds nearly all of it
    assert np.array_equal(superpixels(colours[truth]), labels)


def test_slic_of_small_pictures() -> None:
    for size in ((1, 1), (2, 7), (5, 5)):
        labels = superpixels(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
        assert labels.shape == size and labels.max() < 64


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_small_ones_join_the_nearest_large_one(height: int, width: int, given: int, count: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, given, (height, width))
    labels = np.unique(drawn, return_inverse=True)[1].reshape(drawn.shape)
    found = at_most(labels, count)
    before, after = labels.max() + 1, found.max() + 1
    assert after == min(before, count) and np.array_equal(np.unique(found), np.arange(after))
    areas = np.bincount(labels.ravel())
    kept = sorted(sorted(range(before), key=lambda label: (-areas[label], label))[:count])
    centres = [np.argwhere(labels == label).mean(axis=0) for label in range(before)]
    for label in range(before):
        new = set(found[labels == label])
        assert len(new) == 1  # whole
        home = kept[new.pop()]
        if label in kept:
            assert home == label
        else:
            distance = [np.square(centres[label] - centres[one]).sum() for one in kept]
            assert np.square(centres[label] - centres[home]).sum() <= min(distance) + 1e-9


def test_refused_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(TypeError, match="pixels: expected uint8, got float64"):
        superpixels(pixels.astype(float))
    with pytest.raises(ValueError, match=r"pixels: expected \(H, W, 3\)"):
        superpixels(pixels[..., 0])
    with pytest.raises(ValueError, match="count is 256; expected 1 to 255"):
        superpixels(pixels, 256)
    monkeypatch.setitem(__import__("sys").modules, "skimage.segmentation", None)
    with pytest.raises(ImportError, match=r"pip install 'magnet_fast\[superpixels\]'"):
        superpixels(pixels)


def test_without_the_package_nothing_starts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("magnet_fast.data.context.find_spec", lambda name: None if name == "skimage" else real(name))
    message = r"the model needs superpixels, which are made by skimage: pip install 'magnet_fast\[superpixels\]'"
    with pytest.raises(ImportError, match=message):
        Segmenter(models.create("superpixel_tiny"), Tokenizer())
    with pytest.raises(ImportError, match=message):
        ExpressionDataset(open_reader(root, "refcoco"), "val", Tokenizer(), 32, needs=("superpixels",))
    assert makers_of(("edges",)) == {}


@pytest.mark.parametrize("fit", ["squash", "letterbox", "longest"])
@pytest.mark.parametrize("cache", [False, True])
def test_samples_carry_them(root: Path, made: list, fit: str, cache: bool) -> None:
    spec = InputSpec(size=SIDE, fit=fit)
    dataset = ExpressionDataset(
        open_reader(root, "refcoco"), "val", Tokenizer(), spec, cache=cache, cache_shared=False, needs=("superpixels",)
    )
    assert dataset.context == ("superpixels",) and made == []
    for _ in range(2):
        for index in range(len(dataset)):
            sample = dataset[index]
            labels = sample["extra"]["superpixels"]
            height, width = dataset.fit.extent(sample["size"])
            assert labels.shape == (SIDE, SIDE) and labels.dtype == torch.uint8
            assert np.array_equal(labels[:height, :width], quarters(np.zeros((height, width, 3))))
            assert (labels[height:] == NONE).all() and (labels[:, width:] == NONE).all()
    images = len({dataset[index]["image_id"] for index in range(len(dataset))})
    assert len(made) == (images if cache else 3 * len(dataset))


def test_the_datas_own_come_first(root: Path, made: list, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(root, "refcoco")
    own = torch.arange(16).view(4, 4)
    monkeypatch.setattr(type(reader), "extra", lambda self, ref, sentence: {"superpixels": own})
    dataset = ExpressionDataset(reader, "val", Tokenizer(), SIDE, needs=("superpixels",))
    assert dataset.context == ("superpixels",) and dataset[0]["extra"]["superpixels"] is own and made == []


@pytest.fixture(scope="module")
def model() -> models.ReferringModel:
    torch.manual_seed(0)
    return models.create("superpixel_tiny", input={"size": SIDE, "threshold": 0.5}).eval()


def test_scores_and_masks_are_those_of_the_model_itself(root: Path, made: list, model: models.ReferringModel) -> None:
    reader, tokenizer = open_reader(root, "refcoco"), Tokenizer(max_tokens=20)
    dataset = ExpressionDataset(reader, "val", tokenizer, model.spec, needs=model.needs)
    results = evaluate(model, dataset, batch_size=4)
    assert results["sentences"] == len(dataset) and 0 <= results["oIoU"] <= 100
    segmenter = Segmenter(model, tokenizer)
    sample, picture = dataset[0], dataset.load_image(0)
    expression = dataset.record(0)["expression"]
    found = segmenter(picture, expression)
    with torch.no_grad():
        context = {"superpixels": sample["extra"]["superpixels"][None]}
        text = models.Text(*(part[None] for part in sample["text"]))
        prediction = model(sample["image"][None], text, context)
        expected = models.probability(prediction, found.mask.shape)[0].numpy()
    np.testing.assert_allclose(found.probability, expected, atol=1e-5)
    # Several pictures and sentences, and labels of one's own in place of those that are made.
    both = segmenter([picture, dataset.load_image(len(dataset) - 1), picture], [expression, "the circle", "a square"])
    np.testing.assert_allclose(both[0].probability, expected, atol=1e-5)
    prepared = segmenter.prepare(picture)
    assert np.array_equal(prepared.context["superpixels"], sample["extra"]["superpixels"])
    own = segmenter.prepare(picture, {"superpixels": torch.arange(SIDE * SIDE).view(SIDE, SIDE) // 99})
    assert np.abs(segmenter(own, expression).probability - expected).max() > 1e-6


def test_on_canvas_stands_at_the_top_left() -> None:
    maker = MAKERS["superpixels"]._replace(make=quarters)
    canvas = on_canvas(maker, np.zeros((3, 5, 3), dtype=np.uint8), 6)
    assert np.array_equal(canvas[:3, :5], quarters(np.zeros((3, 5, 3)))) and (canvas[3:] == NONE).all()


def test_a_model_is_trained_on_them(root: Path, made: list, tmp_path: Path) -> None:
    values = {
        "model": {"name": "superpixel_tiny"},
        "data": {"root": str(root), "image_size": 32, "max_tokens": 12, "cache": True},
        "max_steps": 2,
        "batch_size": 4,
        "validate_every": "2 steps",
        "precision": "float32",
        "device": "cpu",
    }
    assert 0 <= train(parse_config(values), tmp_path / "run")["oIoU"] <= 100
    shipped = Segmenter.from_checkpoint(tmp_path / "run" / "best.safetensors")
    assert shipped(np.zeros((20, 36, 3), dtype=np.uint8), "the circle").mask.shape == (20, 36)
