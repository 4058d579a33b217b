"""The plugin by which `make versions` finds what upstream deprecates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOLD = {
    "a warning": "warnings.warn('f is old', FutureWarning)",
    "a warning of no such kind": "warnings.warn('f is Deprecated, use g')",
    "a log": "logging.getLogger('transformers.models.swin').warning('`f` is deprecated and will be removed in v6')",
}
UNTOLD = {
    "another warning": "warnings.warn('this is slow')",
    "another log": "logging.getLogger('transformers.models.swin').warning('this is slow')",
    "a foreign one": "warnings.warn('`torch.jit.trace` is deprecated. Please', FutureWarning)",
}


def run(folder: Path, line: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(f"import logging, warnings\ndef test_it():\n    {line}\n")
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, *options, folder]
    return subprocess.run(list(map(str, call)), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_called_deprecated_fails(tmp_path: Path, kind: str) -> None:
    assert run(tmp_path, TOLD[kind]).returncode == 0
    strict = run(tmp_path, TOLD[kind], "-p", "tests.deprecations")
    assert strict.returncode == 1 and "1 failed" in strict.stdout, strict.stdout + strict.stderr


@pytest.mark.parametrize("kind", UNTOLD)
def test_the_rest_does_not(tmp_path: Path, kind: str) -> None:
    strict = run(tmp_path, UNTOLD[kind], "-p", "tests.deprecations")
    assert strict.returncode == 0, strict.stdout + strict.stderr
