"""The examples of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if CODE.search(page.read_text())], ids=lambda page: page.stem)
def test_examples(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in CODE.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("magnet_fast: ")
    for shown in re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        assert shown in printed


def test_every_family_has_a_page() -> None:
    pages = {page.stem for page in PAGES}
    files = {path.stem for path in (ROOT / "magnet_fast" / "fast").glob("[!_]*.py")}
    families = {name for name in files if not name.startswith("own")}  # our own models need no page of their own
    assert {family.replace("_", "-") for family in families} <= pages
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f"integrations/{page}.md" in navigation for page in pages)
