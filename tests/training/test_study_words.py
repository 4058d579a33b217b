"""The study of Mask Grounding: its rows, and the report's tables and picture of hidden words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magnet_fast.training.building import build_model, build_tokenizer
from magnet_fast.training.study_report import write_report
from magnet_fast.training.study_words import hidden_words
from magnet_fast.training.terms import build_terms
from magnet_fast.training.variants import load_study, row_config

STUDY = load_study("grounding")
CONFIGS = {name: row_config(STUDY, name, 1) for name in STUDY.rows}


def test_rows_differ_in_what_they_name() -> None:
    assert {config.model.name for config in CONFIGS.values()} == {"lavt_tiny"}
    whole = CONFIGS["grounding"]
    usual = whole.terms["grounding"]
    assert (usual.hide, usual.share, usual.token, usual.blind, usual.weight) == ("uniform", 0.15, "centre", False, 1)
    found = {}
    for name, config in CONFIGS.items():
        assert config.model_copy(update={"terms": whole.terms}) == whole  # nothing but terms
        own = config.terms["grounding"]
        found[name] = {key: value for key, value in own if value != getattr(usual, key)}
    every = {"hide": "attributes", "share": 0.5, "token": "shape"}
    assert found == {
        "lavt": {"weight": 0}, "blind": {"blind": True}, "grounding": {}, "attributes": {"hide": "attributes"},
        "several": {"share": 0.5}, "place": {"token": "place"}, "shape": {"token": "shape"},
        "all_blind": {**every, "blind": True}, "all": every, "finest": {**every, "image_stage": 0},
    }  # fmt: skip


@pytest.mark.parametrize("name", STUDY.rows)
def test_a_row_builds_with_its_terms(name: str) -> None:
    config = CONFIGS[name]
    model = build_model(config)
    terms = build_terms(config.terms, model, build_tokenizer(config, model))
    assert terms.keys() == ({"mask"} if name == "lavt" else {"mask", "grounding"})


def run_of(seed: int, said: dict[str, float] | None, *, blind: bool = False, kinds: bool = True) -> dict:
    scores = {"oIoU": 30.0 + seed, "mIoU": 31.0 + seed, "by_kind": {"place": {"oIoU": 30.0, "mIoU": 31.0}}}
    run = {
        "seed": seed, "steps": 5, "training_seconds": 10.0, "scores": dict.fromkeys(("val", "testA", "testB"), scores),
        "config": {
            "batch_size": 4, "data": {"image_size": 32}, "task": "single", "terms": {"grounding": {"blind": blind}},
        },
        "machine": {"date": "2026-01-01", "processor": "abacus", "gpu": None, "threads": 1, "torch": "2"},
    }  # fmt: skip
    if said is not None:
        one = {**said, "most_frequent": 20.0, "words": 100}
        shape = {name: value + 10 for name, value in said.items()} | {"most_frequent": 40.0, "words": 60}
        run["hidden_words"] = {**one, "uniform": 0.1}
        if kinds:
            run["hidden_words"]["kinds"] = {"colour": {**one, "words": 40}, "shape": shape}
    return run


def said(seed: int, accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy + seed, "without_image": 30.0 + seed, "without_mask": 25.0, "without_image_and_mask": 22.0,
    }  # fmt: skip


TITLES = {"lavt": "HOST", "seeing": "SEEING", "blind": "BLIND"}


def write(out: Path, name: str, *runs: dict) -> None:
    for run in runs:
        folder = out / name / f"seed-{run['seed']}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(run))


def test_the_report_tells_words_apart_by_kind_and_by_sight(tmp_path: Path) -> None:
    write(tmp_path, "lavt", run_of(0, None), run_of(1, None))
    write(tmp_path, "seeing", run_of(0, said(0, 60.0)), run_of(1, said(1, 60.0)))
    write(tmp_path, "blind", run_of(0, said(0, 5.0), blind=True), run_of(1, said(1, 5.0), blind=True))
    table = write_report(tmp_path, TITLES, {"seeing": "blind", "blind": "lavt"}, "result.json").read_text()
    lines = table.splitlines()
    given = "image and mask | grey image | empty mask | neither"
    assert f"| variant | {given} | always the most frequent word | uniform guess |" in lines
    values = "60.50 ± 0.71 | 30.50 ± 0.71 | 25.00 ± 0.00 | 22.00 ± 0.00 | 20.00 ± 0.00 | 0.10 ± 0.00"
    assert f"| SEEING | {values} |" in lines
    first = lines.index("| variant | given | colour | shape |")
    assert lines[first + 2 : first + 10] == [
        "| words |  | 40 | 60 |",
        "| always the kind's most frequent word | nothing | 20.00 ± 0.00 | 40.00 ± 0.00 |",
        "| SEEING | image and mask | 60.50 ± 0.71 | 70.50 ± 0.71 |",
        "| SEEING | grey image | 30.50 ± 0.71 | 40.50 ± 0.71 |",
        "| SEEING | empty mask | 25.00 ± 0.00 | 35.00 ± 0.00 |",
        "| SEEING | neither | 22.00 ± 0.00 | 32.00 ± 0.00 |",
        "| BLIND | neither | 22.00 ± 0.00 | 32.00 ± 0.00 |",
        "",
    ]
    # Against the control on the attributes' split and on the relations' alike.
    assert table.count("- SEEING, against BLIND: +0.00, not more than the spread over seeds (0.71)") == 2
    assert "testA oIoU, means of" in table and "testB oIoU, means of" in table
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]["seeing"]["runs"][0]["hidden_words"]
    assert kept["kinds"]["shape"]["accuracy"] == 70.0 and kept["kinds"]["colour"]["words"] == 40
    with Image.open(tmp_path / "words.png") as picture:
        assert picture.width == 1000
        pixels = np.asarray(picture)

    def column(value: float) -> int:
        return round(300 + value / 100 * 670)

    band = pixels[52 : 52 + 44]  # of the first row: colours on its first line
    blue = np.array([0x28, 0x78, 0xC8])  # shapes' is the second
    assert (band[22, column(70.5)] == blue).all()  # full at what is said with sight
    assert (band[22, column(32.0)] != blue).any() and (band[22, column(32.0) - 4] == blue).all()  # open without
    below = pixels[96:140]
    assert (below[22, column(32.0) - 4] == blue).all()
    assert not (below[:, column(10.0) : column(16.0)] == blue).all(-1).any()  # the control has no full ones


def test_results_without_kinds(tmp_path: Path) -> None:
    """Of other data, and of runs that were measured before kinds were told apart."""
    before = {"accuracy": 50.0, "without_image_and_mask": 48.0}
    write(tmp_path, "seeing", run_of(0, before, kinds=False))
    table = write_report(tmp_path, TITLES, {}, "result.json").read_text()
    assert "| variant | image and mask | neither | always the most frequent word | uniform guess |" in table
    assert "by kind of word" not in table and not (tmp_path / "words.png").exists()
    assert hidden_words({"lavt": [run_of(0, None)]}, TITLES) == []
