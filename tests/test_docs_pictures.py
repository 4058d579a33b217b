"""The page "Segment and edit your own pictures": its commands and its Python run as printed."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from magnet_fast.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "example.jpg", tmp_path / "docs")
    names: dict[str, object] = {}
    said = ""
    kinds = []
    for kind, text in BLOCK.findall((ROOT / "docs" / "pictures.md").read_text()):
        kinds.append(kind)
        if kind == "csv":
            Path("pictures.csv").write_text(text)
        elif kind == "text":
            assert said.endswith(text)
        elif kind == "python":
            exec(compile(text, "pictures.md", "exec"), names)
        else:
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                result = CliRunner().invoke(app, arguments)
                said = result.output
                # One table of the page has a row without a picture, and says so.
                assert program == "magnet-fast" and result.exit_code == int("problem: " in said), said
    assert kinds.count("sh") >= 4 and kinds.count("python") >= 2 and {"csv", "text"} <= set(kinds)
    assert sorted(path.name for path in Path("results/masks").iterdir()) == [
        "000001-example.png",
        "000002-example.png",
    ]
    with Image.open("cut-out.png") as cut, Image.open("red.png") as red, Image.open("docs/example.jpg") as example:
        assert cut.mode == "RGBA" and red.mode == "RGB" and cut.size == red.size == example.size
    assert {"mask.png", "overlay.png", "alone.png"} <= {path.name for path in tmp_path.iterdir()}
