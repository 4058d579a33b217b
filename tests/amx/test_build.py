"""Level amx of the real extension: its instructions are in it, and nothing chooses it by itself."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from magnet_fast import _cpu

pytestmark = pytest.mark.slow

PROBE = "#include <immintrin.h>\nint main() { _tile_dpbf16ps(0, 1, 2); _tile_release(); return 0; }\n"


@pytest.fixture(scope="module")
def instructions():
    """How often each instruction on tiles stands in the extension."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which("objdump") is None or shutil.which(compiler[0]) is None:
        pytest.skip("needs objdump, and the C++ compiler to ask whether it knows the tiles")
    probe = [*compiler, "-mamx-tile", "-mamx-bf16", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input=PROBE, capture_output=True, text=True).returncode:
        pytest.skip("the C++ compiler does not know the tiles")
    with subprocess.Popen(
        ["objdump", "-d", "--no-show-raw-insn", _cpu.__file__], stdout=subprocess.PIPE, text=True
    ) as dump:
        lines = [line for line in dump.stdout if re.search(r"\t(tdp|tile|ldtile|sttile)", line)]
    return [line.split("\t")[1].split()[0] for line in lines]


def test_extension_holds_the_instructions(instructions):
    assert {"ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"} == set(instructions)


def test_the_best_level_is_chosen():
    code = "import magnet_fast._cpu as c; print(c.simd_level(), *c.supported_simd_levels())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chosen, *offered = done.stdout.split()
    assert chosen == offered[0]


def test_level_that_is_not_there_is_refused():
    if "amx" in _cpu.supported_simd_levels():
        pytest.skip("this processor has tiles")
    with pytest.raises(ValueError, match="name: 'amx' is not a SIMD level of this processor"):
        _cpu.set_simd_level("amx")
