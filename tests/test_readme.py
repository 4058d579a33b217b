"""The README runs as printed, with few pictures and few steps; the commands of all pages are commands there are."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from magnet_fast.cli import app
from magnet_fast.training import load_config
from tests.golden.parameters import released_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FEW_STEPS = ["max_steps=2", "batch_size=2", "data.image_size=32", "schedule.warmup=1", "data.cache=false"]


def commands(block: str) -> list[list[str]]:
    """The words of each line, without its comment."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line) for line in lines if line.strip()]


def ours(page: Path) -> list[list[str]]:
    """What the package's command line is given on a page, whoever starts it."""
    lines = [words for kind, text in BLOCK.findall(page.read_text()) if kind == "sh" for words in commands(text)]
    starts = [(words, max(words.index(name) for name in ("magnet-fast", "magnet_fast") if name in words))
              for words in lines if {"magnet-fast", "magnet_fast"} & set(words)]  # fmt: skip
    return [words[start + 1 :] for words, start in starts if words[-1] != "…"]


@pytest.mark.slow
def test_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    shutil.copy(ROOT / "docs" / "example.jpg", "docs")
    Path("pictures.csv").write_text("image,sentence\ndocs/example.jpg,the little cyan thing\n")
    for name in ("images/{}.jpg", "masks/{}__the_dog.png"):
        Path("mine", name).parent.mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), "white").save(Path("mine", name.format(number)))
    torch.save(released_checkpoint("magnet"), "magnet.pth")
    create = timm.create_model

    def small(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        """Without published weights, which would be downloaded; of Swin the smallest."""
        return create(name.replace("swin_base", "swin_tiny"), **options)

    monkeypatch.setattr(timm, "create_model", small)
    names: dict[str, object] = {}
    ran = []
    for kind, text in BLOCK.findall((ROOT / "README.md").read_text()):
        if kind == "python":
            exec(compile(text, "README.md", "exec"), names)
            continue
        for program, *words in commands(text):
            if program != "magnet-fast" or words == ["app"]:
                continue
            if words[0] == "train":
                words += [word for setting in FEW_STEPS for word in ("--set", setting)]
            ran.append(words[0])
            result = CliRunner().invoke(app, ["24" if word == "4000" else word for word in words])
            assert result.exit_code == 0, (words, result.output, result.exception)
    assert ran == ["segment", "segment", "edit", "data", "data", "train", "evaluate"]
    made = {"mask.png", "overlay.png", "blue.png", "results/results.json", "data", "runs/demo/last.safetensors"}
    assert [name for name in made | {"metrics.json"} if not Path(name).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if ours(page)], ids=lambda page: page.stem)
def test_commands_have_the_options_that_are_printed(page: Path) -> None:
    for words in ours(page):
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command, *words = command.commands[words[0]], *words[1:]
        given = command.make_context(page.stem, list(words)).params
        if command.name == "train":
            load_config(given["config"], given["set_"])


def test_make_has_the_targets_that_are_printed() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        printed = {words[1] for kind, block in BLOCK.findall(text) if kind == "sh" for words in commands(block)
                   if words[0] == "make"} | set(re.findall(r"`make ([\w-]+)", text))  # fmt: skip
        assert printed <= targets, page
