"""What `make versions` says of a run."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests import versions

RESULTS = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/></testsuites>'


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, results: str | None) -> dict[str, Any]:
    """`checked` with a pytest that ends with a code and leaves these results, in place of all that it starts."""
    python = folder / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()

    def started(command: list[Any], **_: Any) -> CompletedProcess[bytes]:
        if command[1:3] != ["-m", "pytest"]:
            return CompletedProcess(command, 0, b"")
        if results is not None:
            (folder / "results.xml").write_text(results)
        return CompletedProcess(command, code)

    monkeypatch.setattr(versions.subprocess, "run", started)
    monkeypatch.setattr(versions, "versions", lambda python, lines: {})
    return versions.checked(folder, "oldest", ["tests"])


def test_what_passed_and_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, 1, RESULTS) == {"versions": {}, "passed": 1, "failed": 1, "skipped": 1}


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_run_that_does_not_come_to_its_end_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Least of all that of an earlier one, which the folder keeps."""
    (tmp_path / "results.xml").write_text(RESULTS)
    with pytest.raises(SystemExit, match=f"oldest: pytest ended with {code}"):
        run(tmp_path, monkeypatch, code, None)
    assert not (tmp_path / "results.xml").exists()
