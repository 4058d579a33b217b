"""Datasets and checks ask a reader for nothing but what the protocol promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from magnet_fast.data import ExpressionDataset, Tokenizer
from magnet_fast.data.check import check_reader
from magnet_fast.data.datasets.reader import Ref, Sentence, Tally


class Pictures:
    """Two pictures of 8 x 12 pixels in a folder; a mask is a column, as the ref's id says. No annotations, no JSON."""

    def __init__(self, folder: Path) -> None:
        self.source = folder
        for image_id in (1, 2):
            Image.new("RGB", (12, 8), (image_id, 0, 0)).save(folder / f"{image_id}.png")
        self.skipped = Tally({"no phrase": 2}, {"no phrase": ["record 4"]})

    @property
    def splits(self) -> tuple[str, ...]:
        return ("all",)

    def refs(self, split: str) -> list[Ref]:
        there, absent = Sentence(10, "red", "red", ("red",), "name"), Sentence(20, "blue", "blue", (), None, False)
        return [Ref(3, (), 1, None, "all", (there,)), Ref(5, (), 2, None, "all", (there, absent))]

    def image_size(self, image_id: int) -> tuple[int, int]:
        return 8, 12

    def image_path(self, image_id: int) -> Path:
        path = self.source / f"{image_id}.png"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return path

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        mask = np.zeros((8, 12), dtype=np.uint8)
        mask[:, ref.ref_id] = sentence is None or sentence.exists
        return mask

    def extra(self, ref: Ref, sentence: Sentence) -> dict[str, Tensor]:
        return {"edges": torch.full((2,), sentence.sent_id)}


@pytest.mark.parametrize("cache", [False, True])
def test_samples(tmp_path: Path, cache: bool) -> None:
    dataset = ExpressionDataset(Pictures(tmp_path), "all", Tokenizer(), 24, cache=cache)
    for _ in range(2):
        batch = dataset.collate([dataset[index] for index in range(3)])
        columns = [row.any(dim=0).nonzero()[:, 0].tolist() for row in batch["mask"]]
        assert columns == [[6, 7], [10, 11], []]
        assert batch["ref"].tolist() == [3, 5, 5] and batch["exists"].tolist() == [True, True, False]
        assert batch["kind"] == ["name", "name", None] and batch["size"] == [(8, 12)] * 3
        assert batch["extra"]["edges"].tolist() == [[10, 10], [10, 10], [20, 20]]
    assert dataset.context == ("edges",)


@pytest.mark.parametrize("text", ["", "  \t", None])
def test_a_sentence_without_words_names_ref_and_sentence(tmp_path: Path, text: str) -> None:
    reader = Pictures(tmp_path)
    ref = Ref(3, (), 1, None, "all", (Sentence(10, "red", "red", ()), Sentence(11, text, text, ())))
    reader.refs = lambda split: [ref]
    with pytest.raises(ValueError, match="ref_id 3, sent_id 11: the sentence is empty"):
        ExpressionDataset(reader, "all", Tokenizer(), 24)


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, seen = Pictures(tmp_path), []
    report = check_reader(reader, progress=lambda done, total: seen.append((done, total)))
    assert report.problems == [] and report.counts == {"all": (2, 3, 2)} and seen == [(1, 2), (2, 2)]
    assert report.where == str(tmp_path) and report.notes == ["left out 2 records: no phrase (record 4; and 1 more)"]
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "2.png").unlink()
    monkeypatch.setattr(reader, "mask", lambda ref, sentence=None: np.zeros((8, 12), dtype=np.uint8))
    problems = check_reader(reader, images_advice="; take others", masks_advice="; draw them").problems
    assert [problem.split(":")[0] for problem in problems] == [
        "1 image absent", "1 image of another size", "2 masks unusable",
    ]  # fmt: skip
    assert problems[0].endswith("; take others") and problems[2].endswith("; draw them")
    assert f"1.png is 8x8, {tmp_path.name} says 8x12 (height x width)" in problems[1]
    assert len(check_reader(reader, masks=False).problems) == 2
