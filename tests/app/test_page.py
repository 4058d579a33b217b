"""The page in a real browser: what a person does there, against what Python gives."""

from __future__ import annotations

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
from tests.app.test_answer import png

pytestmark = [pytest.mark.slow, pytest.mark.skipif(lacking() is not None, reason=str(lacking()))]


@pytest.fixture(scope="module")
def opened(absent, tmp_path_factory) -> Iterator[Page]:
    """One server and one browser for all."""
    downloads = tmp_path_factory.mktemp("downloads")
    with served("--checkpoint", absent) as address, chromium(downloads) as driver:
        yield Page(driver, address(), downloads)


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


def test_a_sentence_its_mask_another_threshold_and_the_download(page, segmenter, scene) -> None:
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


def test_several_sentences(page, segmenter, scene) -> None:
    path, sentences = scene
    page.upload(path)
    page.write("\n".join(sentences))
    shown = page.press()
    expected = [one.mask for one in segmenter(path, sentences)]
    for number, mask in enumerate(expected):
        outline = coloured(shown, number)
        assert outline.any() and not (outline & ~mask).any()
    assert len(page.all("#legend li")) == 2
    runs = json.loads(page.download("rle.json").read_text())
    for number, mask in enumerate(expected):
        assert np.array_equal(coco_mask.decode(runs[number]), mask)
        assert np.array_equal(np.asarray(Image.open(page.download(f"mask-{number + 1}.png"))) > 0, mask)


def test_a_model_that_finds_nothing_says_so(page, scene, absent) -> None:
    path, (sentence, _) = scene
    page.choose("checkpoint", absent.name)
    page.wait(lambda: page.one("#threshold input[type=number]").get_attribute("value") == "0.35")  # its own
    page.upload(path)
    page.write(sentence)
    shown = page.press()
    assert not coloured(shown, 0).any()
    assert "nothing of that kind is here (0.9" in page.one("#legend").text
    assert not np.asarray(Image.open(page.download("mask.png"))).any()


def test_what_is_wrong_is_said(page, scene, tmp_path) -> None:
    path, (sentence, _) = scene
    (tmp_path / "letter.png").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000))

    def said(picture: Path | None, text: str) -> str:
        if picture is not None:
            page.upload(picture)
        page.write(text)
        page.click(lambda: page.one("#segment"))
        return page.said()

    assert "there is no picture: upload one" in said(None, sentence)
    assert "image letter.png cannot be read: no format that Pillow knows" in said(tmp_path / "letter.png", sentence)
    assert "image bomb.png has" in (bomb := said(tmp_path / "bomb.png", sentence)) and "pixels; expected at" in bomb
    assert "there is no sentence: write what to look for" in said(path, " ")
    assert "the model knows no word of '東京'" in said(None, "東京")
    page.write(sentence)
    page.press()  # and it goes on


def test_a_drawn_scene_a_paste_and_the_camera(page, segmenter, scene) -> None:
    page.example(2)
    text = page.one("#sentences textarea").get_attribute("value")
    assert text == drawn_scenes()[1][1]
    assert page.press().shape == (256, 256, 3)

    page.open()
    page.choose("checkpoint", "shipped")
    path, (sentence, _) = scene
    page.paste(path)
    page.write(sentence)
    page.press()
    assert np.array_equal(np.asarray(Image.open(page.download("mask.png"))) > 0, segmenter(path, sentence).mask)

    page.open()
    page.photograph()
    page.write(sentence)
    page.press()
    assert json.loads(page.download("answer.json").read_text())["width"] >= 320


def test_nothing_comes_from_elsewhere(opened) -> None:
    """Of all that was asked for until here."""
    asked = opened.requested()
    assert any(address.startswith(opened.address) for address in asked)
    assert [one for one in asked if not one.startswith((opened.address, "data:", "blob:"))] == []
