"""The page in a real browser: what a person does there, against what Python gives."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from magnet_fast import Segmenter
from magnet_fast.app.examples import drawn_scenes
from magnet_fast.app.showing import COLOURS
from tests.app.browser import Page, chromium, lacking, served
from tests.app.test_answer import absent, png, scene  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(lacking() is not None, reason=str(lacking()))]


@pytest.fixture(scope="module")
def opened(absent, tmp_path_factory) -> Iterator[Page]:  # noqa: F811
    """One server and one browser for all."""
    downloads = tmp_path_factory.mktemp("downloads")
    with served("--checkpoint", absent) as address, chromium(downloads) as driver:
        yield Page(driver, address, downloads)


@pytest.fixture
def page(opened) -> Page:
    opened.open()
    opened.choose("checkpoint", "shipped")
    return opened


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_checkpoint()


def coloured(picture: np.ndarray, number: int) -> np.ndarray:
    """Where a picture has the outline's colour of a sentence."""
    return (picture == COLOURS[number]).all(axis=-1)


def test_a_sentence_its_mask_another_threshold_and_the_download(page, segmenter, scene) -> None:  # noqa: F811
    path, (sentence, _) = scene
    page.upload(path)
    page.write(sentence)
    shown = page.press()
    expected = segmenter(path, sentence)
    outline = coloured(shown, 0)
    assert shown.shape == (96, 96, 3) and outline.any() and not (outline & ~expected.mask).any()
    assert not np.array_equal(shown, np.asarray(Image.open(path)))
    assert sentence in page.one("#legend").text and "% of the picture" in page.one("#legend").text
    assert np.array_equal(np.asarray(Image.open(page.download("mask.png"))) > 0, expected.mask)

    moved = page.threshold(0.9)
    higher = expected.probability > 0.9
    assert 0 < higher.sum() < expected.mask.sum()
    assert coloured(moved, 0).any() and not (coloured(moved, 0) & ~higher).any()
    assert np.array_equal(np.asarray(Image.open(page.download("mask.png"))) > 0, higher)
    assert json.loads(page.download("answer.json").read_text())["threshold"] == 0.9
