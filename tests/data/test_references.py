"""TV-Net's retrieval: which picture a sentence gets, the file it is kept in, samples that carry it, the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from magnet_fast import models
from magnet_fast.cli import app
from magnet_fast.data import ExpressionDataset, Refer, Tokenizer
from magnet_fast.data.references import choose, find_references, read_references, write_references
from magnet_fast.data.retrieval import RetrievalDataset

from .layout import small_ref, small_refs, write_root


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), st.integers(1, 150), st.integers(2, 12), st.integers(2, 6), st.integers(1, 15))
def test_the_choice_is_the_plain_one(seed: int, count: int, pool: int, images: int, nearest: int) -> None:
    """Of the nearest by text about other images, the largest product of both cosines."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int, width: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator).double(), dim=1)

    text, pool_text, look = unit(count, 5), unit(pool, 5), unit(images, 4)
    about = torch.randint(images, (count,), generator=generator)
    pool_about = torch.randint(images, (pool,), generator=generator)
    pool_about[:2] = torch.tensor([0, 1])  # at least two images
    found = choose(text, about, pool_text, pool_about, look, nearest)
    for row in range(count):
        others = [item for item in range(pool) if pool_about[item] != about[row]]
        by_text = {item: sum((text[row] * pool_text[item]).tolist()) for item in others}
        near = sorted(others, key=by_text.get, reverse=True)[:nearest]
        seen = {item: sum((look[about[row]] * look[pool_about[item]]).tolist()) for item in near}
        product = {item: max(by_text[item], 0) * max(seen[item], 0) for item in near}
        assert int(found[row]) in near
        assert product[int(found[row])] == pytest.approx(max(product.values()), abs=1e-12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    refs = [
        small_ref(1, 70, 7, "Left man", "man on left"),
        small_ref(2, 80, 8, "the man on the left"),
        small_ref(3, 71, 7, "woman", split="val"),
    ]
    return write_root(tmp_path_factory.mktemp("data") / "root", refs=refs)


@pytest.fixture(scope="module")
def file(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two images the other one is all that is left."""
    torch.manual_seed(0)
    model = models.create("tvnet_tiny", input__size=32)
    found = find_references(model, Tokenizer(), Refer(root), batch_size=1)
    assert found == {"train": {(1, 10): 8, (1, 11): 8, (2, 20): 7}, "val": {(3, 30): 8}}
    path = tmp_path_factory.mktemp("file") / "references.json"
    write_references(path, found, "train")
    return path


def test_samples_carry_the_picture(root: Path, file: Path) -> None:
    refer, plain = Refer(root), ExpressionDataset(Refer(root), "train", Tokenizer(), 16)
    dataset = RetrievalDataset(refer, "train", Tokenizer(), 16, references=file)
    assert dataset.context == ("reference_image",) and plain.context == ()
    of_image = {7: plain[0]["image"], 8: plain[2]["image"]}
    for index, expected in enumerate((8, 8, 7)):
        sample = dataset[index]
        assert torch.equal(sample["extra"]["reference_image"], of_image[expected])
        assert torch.equal(sample["image"], plain[index]["image"]) and sample["index"] == index
    assert dataset.collate([dataset[0], dataset[2]])["extra"]["reference_image"].shape == (2, 3, 16, 16)
    drawn = RetrievalDataset(refer, "train", Tokenizer(), 16, references=file, mode="refs", cache=True)
    for _ in range(2):  # made, then kept; the validation split keeps pictures of the pool
        assert [torch.equal(drawn[i]["extra"]["reference_image"], of_image[8 - i]) for i in range(2)] == [True, True]
    other = RetrievalDataset(refer, "val", Tokenizer(), 16, references=file, cache=True, cache_shared=False)
    assert torch.equal(other[0]["extra"]["reference_image"], of_image[8])


def test_a_lent_sentence_brings_its_picture_along(tmp_path: Path) -> None:
    """None where it is the item's own."""
    root = write_root(tmp_path / "root", refs=[small_ref(1, 70, 7, "man"), small_ref(2, 80, 8, "woman")])
    refer, path = Refer(root), tmp_path / "references.json"
    write_references(path, {"train": {(1, 10): 8, (2, 20): 7}}, "train")
    dataset = RetrievalDataset(refer, "train", Tokenizer(), 16, references=path)
    dataset.shuffle_expressions(0)
    assert not any(dataset[index]["extra"]["reference_image"].any() for index in range(2))


def change(**entries: Any) -> Callable[[dict], dict]:
    return lambda content: {**content, **entries}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(format="other"), "format is 'other'; expected 'magnet_fast.references/1', as"),
        (lambda content: [content], "format is null; expected"),
        (change(references={"val": []}), r"expected a list of \[ref_id, sent_id, image_id\] for the split 'train'"),
        (change(references={"train": [[1, 10]]}), r"expected a list of \[ref_id, sent_id, image_id\]"),
        (change(references={"train": [[1, 10, True]]}), r"expected a list of \[ref_id, sent_id, image_id\]"),
        (change(pool="pool"), "pool is 'pool'; expected one of train, val"),
        (change(references={"train": [[1, 10, 8]]}), "ref_id 1, sent_id 11 of .* has no picture; the file is of other"),
        (
            change(references={"train": [[1, 10, 9]]}),
            "ref_id 1, sent_id 10 .* has picture 9, which is not in the split",
        ),
        (change(references={"train": [[1, 10, 7]]}), "ref_id 1, sent_id 10 .* has its own picture; the file is of"),
    ],
)
def test_what_does_not_fit_is_refused(
    root: Path, file: Path, tmp_path: Path, edit: Callable[[dict], Any], message: str
) -> None:
    path = tmp_path / "references.json"
    path.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message):
        read_references(path, Refer(root), "train")


def test_a_pool_of_one_image_has_nothing_to_give(tmp_path: Path) -> None:
    refer, model = Refer(write_root(tmp_path / "root", refs=small_refs())), models.create("tvnet_tiny")
    with pytest.raises(ValueError, match="pool is 'train', whose sentences are about one image; expected at least two"):
        find_references(model, Tokenizer(), refer)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_references(tmp_path / "nowhere.json", refer, "train")


@pytest.mark.slow
def test_found_trained_with_and_evaluated(easy_root: Path, tmp_path: Path) -> None:
    """The way a user goes; without the file both are refused."""

    def run(*arguments: object, status: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    entries = ["model.name=tvnet_tiny", "max_steps=2", "batch_size=4"]
    entries += ["data.image_size=32", "data.val_limit=4", "data.cache=false", "log_every=1"]
    common = ["--config", "magnet_tiny_scenes", "--data", easy_root, *(x for one in entries for x in ("--set", one))]
    path, out = tmp_path / "found" / "references.json", tmp_path / "run"
    refused = run("train", *common, "--out", out, status=2)
    assert "the model needs reference_image beside image and text" in refused and not out.exists()
    assert f"--set data.references={path}" in run("data", "retrieve", *common, "--out", path)
    run("train", *common, "--set", f"data.references={path}", "--out", out)
    given = ["--checkpoint", out / "best.safetensors", "--data", easy_root, "--limit", 2]
    assert "reads reference_image beside image and text" in run("evaluate", *given, status=2)
    run("evaluate", *given, "--references", path, "--out", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["sentences"] == 2
    also = ["--set", f"data.references={path}", "--set", "data.also=[refcoco+/unc]", "--out", tmp_path / "other"]
    assert "data.references is of one data set's own sentences" in run("train", *common, *also, status=2)
