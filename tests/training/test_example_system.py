"""The complete small system of the documentation: one file, and everything else takes it by its name."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magnet_fast import accelerate, checkpoints, models
from magnet_fast.cli import app
from magnet_fast.data.scenes import write_scenes
from magnet_fast.models import config, registry

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "docs" / "examples" / "film.py"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The system is known while these tests run, and to no others."""
    models.list_models()  # the package's own systems first: they are imported once
    before = dict(registry._systems), {role: dict(parts) for role, parts in config._parts.items()}
    runpy.run_path(str(FILE))
    yield
    registry._systems.clear()
    registry._systems.update(before[0])
    for role, parts in before[1].items():
        config._parts[role].clear()
        config._parts[role].update(parts)


def test_it_is_short() -> None:
    assert len(FILE.read_text().splitlines()) <= 120


def test_it_is_trained_evaluated_saved_and_loaded(tmp_path) -> None:
    root, out = tmp_path / "scenes", tmp_path / "run"
    write_scenes(root, images=24, seed=1, level="easy", image_size=64)
    settings = [
        "model.name=film_tiny", "max_steps=3", "batch_size=4", "data.image_size=32", "schedule.warmup=1",
        "data.workers=0", "terms.alignment.weight=0.5", "terms.grounding.weight=1", "terms.grounding.layers=1",
    ]  # fmt: skip
    arguments = [argument for setting in settings for argument in ("--set", setting)]

    def run(*command: object) -> str:
        result = CliRunner().invoke(app, [str(entry) for entry in command])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    said = run("train", "--config", "magnet_tiny_scenes", "--data", root, "--out", out, *arguments)
    assert "film_tiny" in said and "oIoU" in said
    run("evaluate", "--checkpoint", out / "last.safetensors", "--data", root, "--out", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["image_size"] == 32
    loaded = checkpoints.load(out / "last.safetensors").model
    assert loaded.config.architecture == "film" and loaded.spec.size == 32


def test_accelerate_leaves_its_parts_as_they_are() -> None:
    model = models.create("film_tiny")
    report = accelerate(model)
    replaced = {entry.name.split(".")[0] for entry in report.replaced}
    assert "image_encoder" in replaced and not replaced & {"fusion", "head"}
