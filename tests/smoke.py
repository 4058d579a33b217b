"""Tries an installed magnet_fast: `python -I tests/smoke.py`, with the Python that it is installed for.

`-I` keeps the repository off the path: what is tried is the installation. Needs nothing that the package does not.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import magnet_fast
from magnet_fast import kernels, ops

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = (
    "window_attention", "relative_attention", "cross_modal_attention", "deformable_attention",
    "fused_deformable_attention", "pixel_contrastive_loss",
)  # fmt: skip


def what_is_installed() -> None:
    installed = Path(sysconfig.get_path("platlib"), "magnet_fast")
    assert Path(magnet_fast.__file__).parent == installed, magnet_fast.__file__
    assert Path(kernels.__file__).parent == installed / "kernels", kernels.__file__
    assert version("magnet_fast") == magnet_fast.__version__


def the_compiled_backend() -> None:
    for operator in OPERATORS:
        assert "cpu" in ops.available_backends(operator), operator
    qkv, table = torch.randn(1, 14, 14, 3 * 16), torch.randn(13 * 13, 2)
    found = ops.explain("window_attention", qkv, table, num_heads=2, window_size=7)
    assert found.chosen == "cpu", found
    result = ops.window_attention(qkv, table, num_heads=2, window_size=7)
    with ops.backend("reference"):
        torch.testing.assert_close(result, ops.window_attention(qkv, table, num_heads=2, window_size=7))
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split(None, 5)[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1, f"one pool of threads was expected, found {runtimes}"


def the_command_line(folder: Path) -> None:
    command = Path(sysconfig.get_path("scripts"), "magnet-fast")
    picture, mask = ROOT / "docs" / "example.jpg", folder / "mask.png"
    sentence = "the square below the little cyan thing"
    subprocess.run([command, "segment", picture, sentence, "--out", mask], cwd=folder, check=True)
    with Image.open(picture) as example, Image.open(mask) as found:
        assert found.size == example.size
        named = np.asarray(found) > 127
    assert 0.005 < named.mean() < 0.25, named.mean()


if __name__ == "__main__":
    what_is_installed()
    the_compiled_backend()
    with tempfile.TemporaryDirectory() as temporary:
        the_command_line(Path(temporary))
    print(f"magnet_fast {magnet_fast.__version__} on Python {sys.version.split()[0]}, torch {torch.__version__}: works")
