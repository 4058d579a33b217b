"""What stands behind the page, without a browser: questions refused, answers, what is shown and what is downloaded."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from magnet_fast import Segmenter, checkpoints, models
from magnet_fast.app.answer import MOST_SENTENCES, Answer, ask
from magnet_fast.app.examples import drawn_scenes
from magnet_fast.app.files import write_files
from magnet_fast.app.segmenters import Segmenters
from magnet_fast.app.showing import COLOURS, drawn, legend
from magnet_fast.data import Tokenizer
from magnet_fast.data.segmentation import bounding_box


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_checkpoint()


@pytest.fixture(scope="module")
def answer(segmenter, scene) -> Answer:
    path, sentences = scene
    return ask(segmenter, "tiny", path, "\n".join(sentences))


def test_an_answer_is_the_segmenters(segmenter, scene, answer) -> None:
    path, sentences = scene
    assert len(sentences) == 2 and answer.sentences == sentences
    for one, expected, mask in zip(
        answer.found, segmenter(path, sentences), answer.masks(segmenter.spec.threshold), strict=True
    ):
        assert np.array_equal(one.probability, expected.probability)
        assert np.array_equal(mask, expected.mask) and mask.any()
    blank_lines = ask(segmenter, "tiny", path, f"\n  {sentences[0]}\t\r\n\n")
    assert blank_lines.sentences == sentences[:1]


def test_another_threshold_asks_no_model(answer) -> None:
    """An answer has no model any more; its masks shrink as the threshold rises."""
    low, middle, high = (answer.masks(threshold)[0] for threshold in (0.1, 0.5, 0.9))
    assert low.sum() > middle.sum() > high.sum() > 0
    assert (low | middle).sum() == low.sum() and (middle | high).sum() == middle.sum()
    assert not answer.masks(1.0)[0].any()


def test_a_photo_is_answered_upright(segmenter, scene, tmp_path) -> None:
    path, sentences = scene
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).crop((0, 0, 96, 64)).save(tmp_path / "photo.png", exif=exif)
    found = ask(segmenter, "tiny", tmp_path / "photo.png", sentences[0])
    assert found.picture.size == (64, 96) and found.masks(0.5)[0].shape == (96, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no sentence: write what to look for"),
        (" \n\t\n", "there is no sentence"),
        ("circle\n" * (MOST_SENTENCES + 1), f"sentences: expected at most {MOST_SENTENCES}, one a line, got "),
        ("the red circle\n東京", "the model knows no word of '東京': the vocabulary lacks all its words: '東京'"),
        ("\u200b", "leaves no word to read"),
    ],
)
def test_sentences_that_are_refused(segmenter, scene, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(segmenter, "tiny", scene[0], text)


def png(width: int, height: int) -> bytes:
    """A PNG's header that promises so many pixels, and none of them."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT")
    framed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "^image odd.png cannot be read: no format that Pillow knows"),
        (b"", "^image odd.png is empty"),
        (png(30_000, 30_000), "^image odd.png has 900000000 pixels; expected at most 178956970, .*; scale it down"),
        (png(9_000, 9_000), "^image odd.png has 9000 x 9000 pixels, too many for 4 sentences: scale it down$"),
        (png(50, 50), "^image odd.png cannot be read: .*is the file whole"),
    ],
)
def test_pictures_that_are_refused_by_their_own_names(segmenter, tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ask(segmenter, "tiny", tmp_path / "odd.png", "circle\n" * 4)
    with pytest.raises(ValueError, match="there is no picture"):
        ask(segmenter, "tiny", None, "circle")


def test_what_is_shown(answer) -> None:
    masks = answer.masks(0.5)
    shown = np.asarray(drawn(answer, masks))
    assert shown.shape == (96, 96, 3)
    for mask, colour in zip(masks, COLOURS, strict=False):
        outline = (shown == colour).all(axis=-1)
        assert outline.any() and not (outline & ~mask).any()
    lines = legend(answer, masks, 0.5)
    assert lines.count("<li>") == 2 and f"rgb{COLOURS[1]}" in lines
    assert f"{100 * masks[0].mean():.1f} % of the picture above 0.5, highest " in lines
    assert "no probability above 1, highest " in legend(answer, answer.masks(1.0), 1.0)


def test_each_sentence_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS)) == MOST_SENTENCES


def test_a_large_picture_is_shown_reduced_and_downloaded_whole(answer, tmp_path) -> None:
    large = Answer("large.png", answer.picture.resize((3200, 800)), "tiny", ["a"], answer.found[:1])
    mask = np.zeros((800, 3200), dtype=bool)
    mask[200:600, 800:1600] = True
    shown = np.asarray(drawn(large, [mask]))
    assert shown.shape == (400, 1600, 3) and tuple(shown[100, 400]) == COLOURS[0]
    assert Image.open(write_files(large, [mask], 0.5, tmp_path)[0]).size == (3200, 800)


def test_markup_in_a_sentence_is_text(segmenter, scene) -> None:
    with pytest.warns(UserWarning, match="it is cut after 20 tokens"):
        found = ask(segmenter, "tiny", scene[0], "<script>alert(1)</script> circle")
    shown = legend(found, found.masks(0.5), 0.5)
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "it is cut after 20 tokens" in shown  # and what is not read of it is told


def test_files(answer, segmenter, scene, tmp_path) -> None:
    masks = [answer.masks(0.3)[0], np.zeros((96, 96), dtype=bool)]
    files = write_files(answer, masks, 0.3, tmp_path)
    assert [file.name for file in files] == ["mask-1.png", "mask-2.png", "rle.json", "answer.json"]
    runs = json.loads(files[2].read_text())
    for file, run, mask in zip(files, runs, masks, strict=False):
        assert np.array_equal(np.asarray(Image.open(file)), mask * np.uint8(255))
        assert np.array_equal(coco_mask.decode(run), mask)
    told = json.loads(files[3].read_text())
    assert (told["picture"], told["width"], told["height"]) == ("scene.png", 96, 96)
    assert (told["model"], told["threshold"]) == ("tiny", 0.3)
    first, second = told["sentences"]
    assert first["sentence"] == answer.sentences[0] and first["area"] == masks[0].sum()
    assert first["box"] == bounding_box(masks[0]) == coco_mask.toBbox(runs[0]).tolist()
    assert first["highest_probability"] == pytest.approx(answer.found[0].probability.max())
    assert second["area"] == 0 and second["box"] is None
    (tmp_path / "one").mkdir()
    single = ask(segmenter, "tiny", scene[0], "circle")
    assert write_files(single, single.masks(0.5), 0.5, tmp_path / "one")[0].name == "mask.png"


def test_each_checkpoint_is_loaded_once(absent, scene, monkeypatch) -> None:
    loads, load = [], checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda path: loads.append(path) or load(path))
    with pytest.raises(TypeError, match="paths: expected a list of paths, got"):
        Segmenters(absent)
    segmenters = Segmenters([absent, absent])
    assert segmenters.names == [str(absent), "magnet_tiny_scenes (shipped)", "photos (shipped)"] and not loads
    chosen = segmenters(str(absent), "cpu")
    assert segmenters(str(absent), "cpu") is chosen and loads == [str(absent)]
    found = ask(chosen, str(absent), scene[0], "the red circle")
    (mask,) = found.masks(0.5)
    assert not mask.any()
    assert f"nothing of that kind is here ({1 - found.found[0].presence:.2f})" in legend(found, [mask], 0.5)
    with pytest.raises(ValueError, match="checkpoint: expected one of .*shipped.*, got '/etc/passwd'"):
        segmenters("/etc/passwd", "cpu")


def test_a_vocabulary_serves_those_that_need_one(absent, tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "circle", "heart"]))
    own = Tokenizer(tmp_path / "vocab.txt")
    model = models.create("refsegformer_tiny", input={"size": 48}, text={"vocab_size": own.vocab_size})
    models.save(model, tmp_path / "own.safetensors", {"tokenizer_vocab": own.digest()})
    paths = [tmp_path / "own.safetensors", absent]
    segmenters = Segmenters(paths, str(tmp_path / "vocab.txt"))
    assert segmenters(str(paths[0]), "cpu").tokenizer.vocab_size == own.vocab_size
    assert segmenters(str(paths[1]), "cpu").tokenizer.digest() == Tokenizer().digest()
    with pytest.raises(ValueError, match="was trained with another vocabulary"):
        Segmenters(paths)(str(paths[0]), "cpu")


def test_examples_are_the_same_each_time() -> None:
    first, second = drawn_scenes(2, 64), drawn_scenes(2, 64)
    assert [text for _, text in first] == [text for _, text in second]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert all(len(text.splitlines()) == 2 for _, text in first)
