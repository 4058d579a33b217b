"""The page "Train on your own pictures": its commands as printed, to a mask, and each of its examples."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from magnet_fast.cli import app
from magnet_fast.data import import_data
from magnet_fast.data.datasets import open_reader
from magnet_fast.training import load_config

PAGE = (Path(__file__).parent.parent / "docs" / "own-data.md").read_text()
SIZE = (480, 640)
FEW_STEPS = ["max_steps=2", "batch_size=2", "data.image_size=32", "schedule.warmup=1", "data.cache=false"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]


def save(path: Path, pixels: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path)


def run(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.slow
def test_from_a_folder_to_a_mask(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        picture = Image.new("RGB", (64, 48), "green")
        for colour, left in (("black", 10), ("white", 40)):
            place, mask = [left, 5 + number, left + 15, 25 + number], Image.new("L", (64, 48))
            ImageDraw.Draw(picture).ellipse(place, colour)
            ImageDraw.Draw(mask).ellipse(place, 255)
            save(Path(f"mine/masks/cat{number:02}__the_{colour}_cat.png"), mask)
        save(Path(f"mine/images/cat{number:02}.jpg"), picture)
    told = []
    for _, *words in commands(blocks("sh")[0]):
        settings = FEW_STEPS if words[0] == "train" else []
        told.append(run(*words, *(word for one in settings for word in ("--set", one))))
    assert "train: 8 images, 16 objects, 16 sentences" in told[0] and "complete" in told[1] and "mIoU" in told[3]
    with Image.open("mask.png") as mask:
        assert mask.size == (64, 48) and mask.mode == "L"
    _, *printed = shlex.split(told[0].partition("to train on it: ")[2])
    assert printed == [*commands(blocks("sh")[0])[2][1:-2], "--set", "batch_size=16", "--out", "runs/own"]


def test_commands_that_need_downloads_are_configurations() -> None:
    for _, command, *words in commands(blocks("sh")[1]):
        options = dict(zip(words[::2], words[1::2], strict=True))
        sets = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        settings = load_config(options["--config"], sets)
        assert command == "train" and settings.model.pretrained and settings.data.dataset == "own"


@pytest.mark.parametrize(
    ("language", "ending", "objects"),
    [("csv", "csv", 2), ("jsonl", "jsonl", 2), ("json", "json", 2), ("json", "json", 1), ("xml", "xml", 2)],
    ids=["csv", "jsonl", "coco", "label studio", "cvat"],
)
def test_examples(language: str, ending: str, objects: int, tmp_path) -> None:
    save(tmp_path / "images/cat01.jpg", np.zeros((*SIZE, 3), dtype=np.uint8))
    save(tmp_path / "masks/cat01-a.png", np.pad(np.full((160, 200), 255, dtype=np.uint8), ((100, 220), (100, 340))))
    example = blocks(language)[1 if objects == 1 else 0]
    (tmp_path / f"source.{ending}").write_text(example)
    import_data(tmp_path / f"source.{ending}", tmp_path / "out", val=0, test=0)
    reader = open_reader(tmp_path / "out", "own")
    masks = {sentence.raw: reader.mask(ref) for ref in reader.refs("train") for sentence in ref.sentences}
    bowl = np.zeros(SIZE, dtype=np.uint8)
    bowl[300:360, 400:520] = 1
    assert np.array_equal(masks["the bowl of milk"], bowl)
    if objects == 2:
        cat = np.zeros(SIZE, dtype=np.uint8)
        cat[100:260, 100:300] = 1
        assert np.array_equal(masks["the black cat"], cat)
