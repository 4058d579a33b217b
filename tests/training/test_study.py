"""The ablation study from end to end, with runs of two steps; what its variants are; its table."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from magnet_fast import cli, models
from magnet_fast.data.scenes import write_scenes
from magnet_fast.training.building import build_model, build_tokenizer
from magnet_fast.training.config import load_config
from magnet_fast.training.optim import build_optimiser
from magnet_fast.training.study import _in_hand, run_study
from magnet_fast.training.study_report import spread, write_report
from magnet_fast.training.terms import build_terms
from magnet_fast.training.variants import load_study, row_config

from .fakes import SMALL_MAGNET

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 40, 3, level="hard", image_size=64))


def settings(scenes: Path, *changes: str) -> list[str]:
    model = {key: value for key, value in SMALL_MAGNET.items() if key != "text__vocab_size"}
    return [
        f"data.root={scenes}", "data.image_size=32", "batch_size=4", "max_steps=2", "data.val_limit=6",
        "eval_batch_size=8", f"model.overrides={json.dumps(model)}", "terms.grounding.layers=1", *changes,
    ]  # fmt: skip


def test_variants_turn_off_what_they_go_without() -> None:
    base = load_config("magnet_tiny_scenes_study")
    study = load_study("ablation")
    configs = {name: row_config(study, name, 3, ["data.root=x"]) for name in study.rows}

    def parts_of(config) -> tuple[bool, bool, bool]:
        weights = {name: options.weight for name, options in config.terms.items()}
        return weights["grounding"] > 0, weights["alignment"] > 0, config.terms["grounding"].blind

    parts = {name: parts_of(config) for name, config in configs.items()}
    assert parts == {
        "baseline": (False, False, False), "cam": (False, False, False), "grounding": (True, False, False),
        "alignment": (False, True, False), "all": (True, True, False), "all_xmha": (True, True, False),
        "all_released": (True, True, False), "all_blind": (True, True, True), "lavt": (False, False, False),
        "lavt_grounding": (True, False, False),
    }  # fmt: skip
    built = {name: models.preset_config(c.model.name, **c.model.overrides) for name, c in configs.items()}
    assert [name for name, model in built.items() if model.architecture == "lavt"] == ["lavt", "lavt_grounding"]
    magnets = {name: model.fusion for name, model in built.items() if model.architecture == "magnet"}
    assert {name for name, module in magnets.items() if not module.pyramid} == {"baseline", "grounding", "alignment"}
    assert magnets["all_xmha"].form == "xmha" and magnets["all_released"].masking == "released"
    assert all(config.seed == 3 and config.max_steps == base.max_steps for config in configs.values())
    assert configs["cam"].optimiser.freeze == []


ROWS = [(name, row) for name in ("hosts", "robust", "generalized") for row in load_study(name).rows]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}-{row}" for name, row in ROWS])
def test_rows_of_other_studies_build_with_their_terms(name: str, row: str) -> None:
    study = load_study(name)
    config = row_config(study, row, 2, ["max_steps=7"])
    assert config.max_steps == 7 and config.seed == 2 and config.batch_size == 16
    assert config.model.name == f"{'refsegformer' if row == 'plain' else row.partition('_')[0]}_tiny"
    model = build_model(config)
    terms = build_terms(config.terms, model, build_tokenizer(config, model))
    assert ("grounding" in terms) == (row.endswith(("_grounding", "_blind")))
    assert "alignment" not in terms
    if "grounding" in terms:
        assert terms["grounding"].blind == row.endswith("_blind")
        off, blind = (
            row_config(study, other, 2) for other in (row.partition("_")[0], f"{row.partition('_')[0]}_blind")
        )
        assert off.model == config.model == blind.model and off.optimiser == config.optimiser == blind.optimiser
    if row == "plain":
        assert "presence" not in terms and config.model.overrides["fusion__blank"] == 0


def test_rows_of_risams_study_differ_in_one_part_each() -> None:
    """So that what a row scores beside the whole is what that part does."""
    study = load_study("risam")
    configs = {name: row_config(study, name, 1) for name in study.rows}
    built = {name: models.preset_config(c.model.name, **c.model.overrides) for name, c in configs.items()}
    whole = built.pop("risam")
    assert {name: whole.differences(other) for name, other in built.items() if other.architecture == "risam"} == {
        "without_language": [("fusion.language_guided", True, False)],
        "without_words": [("head.words", True, False)],
    }
    for config in configs.values():
        assert config.model_copy(update={"model": configs["risam"].model}) == configs["risam"]


def test_in_the_baseline_no_word_reads_a_pixel() -> None:
    """Pixels read words at full resolution, and nothing else of the alignment module is there or learns."""
    config = row_config(load_study("ablation"), "baseline", 0)
    model = models.create(config.model.name, **config.model.overrides)
    build_optimiser(model, config.optimiser)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("fusion.stages.0.fusion." in name for name in names)
    assert not [name for name in names if "text_" in name and name.startswith("fusion")]
    assert not any("pools" in name or "level_fusions" in name for name in names)
    text = models.Text(torch.tensor([[2, 9, 8, 3]]), torch.ones(1, 4, dtype=torch.bool))
    model.eval()
    one, other = (model.encode(torch.randn(1, 3, 32, 32), text).words.features for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.slow
def test_from_end_to_end(scenes: Path, tmp_path) -> None:
    out = tmp_path / "study"
    flags = [flag for change in settings(scenes) for flag in ("--set", change)]
    command = ["study", "ablation", "--data", str(scenes), "--out", str(out), *flags, "--seeds", "2", "--variants"]
    result = CliRunner().invoke(cli.app, [*command, "baseline,all"])
    assert result.exit_code == 0, (result.output, result.exception)
    results = json.loads((out / "results.json").read_text())
    runs = {name: row["runs"] for name, row in results["rows"].items()}
    assert {name: [run["seed"] for run in found] for name, found in runs.items()} == {"baseline": [0, 1], "all": [0, 1]}
    run = runs["all"][0]
    assert run["steps"] == 2 and set(run["scores"]) == {"val", "testA", "testB"}
    assert run["shuffled"]["sentences"] == run["scores"]["val"]["sentences"] == 6
    assert 0 <= run["hidden_words"]["accuracy"] <= 100 and "hidden_words" not in runs["baseline"][0]
    assert results["machine"]["torch"] == torch.__version__ and results["config"]["max_steps"] == 2
    assert set(results["rows"]["all"]["config"]) <= {"model", "terms", "optimiser"}
    assert results["how"]["task"] == "single"
    table = (out / "table.md").read_text()
    assert "| baseline (PWAM into the pixels) | 2 |" in table and "| all (pwam, correct masking) | 2 |" in table
    assert run["without_presence"]["sentences"] == 6  # MagNet's has a class for it
    assert "sentences swapped between pictures" in table and "presence ignored" in table
    assert "4 runs of 2 steps, batch 4, 32×32 pixels" in table and "against baseline (PWAM into the pixels): " in table
    with Image.open(out / "plot.png") as picture:
        assert picture.width == 1000

    # A finished run is not run again; one more variant joins the table.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    result = CliRunner().invoke(cli.app, [*command, "all,lavt_grounding"])
    assert result.output.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "| LAVT + Mask Grounding | 2 |" in (out / "table.md").read_text()

    other = CliRunner().invoke(cli.app, [*command, "all", "--set", "optimiser.lr=0.1"])
    assert other.exit_code == 2 and "another configuration (optimiser)" in other.output
    with open(out / "all" / "seed-0" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "all, seed 0: another process has it" in CliRunner().invoke(cli.app, [*command, "all"]).output


def test_a_file_system_without_locks(tmp_path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with _in_hand(tmp_path / "run") as mine:
        assert mine


def test_mistakes(scenes: Path, tmp_path) -> None:
    study = load_study("ablation")
    with pytest.raises(ValueError, match="variants: unknown bilinear; known: baseline, cam"):
        run_study(study, tmp_path, settings(scenes), rows=["bilinear"])
    by_the_clock = study.model_copy(update={"config": "magnet_tiny_scenes"})
    with pytest.raises(ValueError, match="same length"):
        run_study(by_the_clock, tmp_path, settings(scenes)[:1], rows=["lavt"])
    with pytest.raises(ValueError, match=r"data\.val_split: .* has no split 'held-out'; it has train, val"):
        run_study(study, tmp_path, settings(scenes, "data.val_split=held-out"))
    with pytest.raises(FileNotFoundError, match=r"surgery: no such study.*\(ablation, .*robust\)"):
        load_study("surgery")
    (tmp_path / "own.yaml").write_text("config: magnet_tiny_scenes\nrows: {all: {title: all, without: [cam]}}\n")
    with pytest.raises(ValueError, match=r"own\.yaml: rows\.all: there is no part or row 'cam'"):
        load_study(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        write_report(tmp_path, {"all": "all"}, {}, "result.json")
    assert list(tmp_path.iterdir()) == []


def result(seed: int, value: float) -> dict:
    scores = {"oIoU": value, "mIoU": value + 1, "by_kind": {"place": {"oIoU": value}}}
    return {
        "seed": seed, "steps": 5, "training_seconds": 10.0, "scores": dict.fromkeys(("val", "testA", "testB"), scores),
        "config": {"batch_size": 4, "data": {"image_size": 32}, "task": "single"},
        "machine": {"date": "2026-01-01", "processor": "abacus", "gpu": None, "threads": 1, "torch": "2"},
    }  # fmt: skip


def test_the_table_says_mean_spread_and_difference(tmp_path) -> None:
    values = {"baseline": (10.0, 12.0, 14.0), "all": (13.0, 16.0, 19.0), "lavt": (12.0, 12.0, 12.5), "blind": (9.0,)}
    against = {"all": "baseline", "lavt": "baseline", "blind": "all", "all_xmha": "all"}
    for name, found in values.items():
        for seed, value in enumerate(found):
            folder = tmp_path / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result(seed, value)))
    table = write_report(tmp_path, {name: name.upper() for name in values}, against, "result.json").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| ALL"))
    assert row == f"| ALL | 3 |{' 16.00 ± 3.00 | 17.00 ± 3.00 |' * 3}"
    assert "- ALL, against BASELINE: +4.00, more than the spread over seeds (3.00)" in table
    assert "- LAVT, against BASELINE: +0.17, not more than the spread over seeds (2.00)" in table
    assert "- BLIND, against ALL: -4.00\n" in table and "BASELINE, against" not in table and "XMHA" not in table
    assert spread([5.0]) == "5.00"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["processor"] == "abacus" and results["config"]["batch_size"] == 4
    assert results["rows"]["all"]["runs"][2]["scores"]["testB"] == {
        "oIoU": 19.0, "mIoU": 20.0, "by_kind": {"place": {"oIoU": 19.0}}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list"),
        ('{"seed": 0, "config": []}', "for want of config, scores, machine; "),
    ],
)
def test_a_result_that_is_none_is_named(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "one" / "seed-0" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"one/seed-0/result\.json.*{message}"):
        write_report(tmp_path, {"one": "ONE"}, {}, "result.json")
    assert not (tmp_path / "table.md").exists()


def test_scores_that_a_kind_of_sentence_has_not(tmp_path) -> None:
    """Sentences that name nothing have no overlap, but are found to name nothing or not."""
    for seed in (0, 1):
        found = result(seed, 30.0)
        found["config"]["task"] = "robust"
        scores = {"rIoU": 20.0, "mRR": 10.0, "mIoU_ref": 30.0, "oIoU": 30.0, "mIoU": 30.0}
        nothing = {name: float("nan") for name in scores} | {"mRR": 40.0 + seed}
        named = scores | {"rIoU": float("nan"), "mRR": float("nan"), "oIoU": 50.0}
        found["scores"] = {"val": scores | {"by_kind": {"absent/place": nothing, "place": named}}}
        folder = tmp_path / "one" / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(found))
    table = write_report(tmp_path, {"one": "ONE"}, {}, "result.json").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["one"]["runs"][0]["scores"]["val"][
        "by_kind"
    ] == {
        "absent/place": {**dict.fromkeys(("rIoU", "mIoU_ref", "mIoU"), None), "mRR": 40.0, "oIoU": None},
        "place": {"rIoU": None, "mRR": None, "mIoU_ref": 30.0, "mIoU": 30.0, "oIoU": 50.0},
    }
    assert "| variant | absent/place mRR | place mIoU_ref |" in table
    assert "| ONE | 40.50 ± 0.71 | 30.00 ± 0.00 |" in table
    assert spread([1.0, float("nan")]) == "–"
