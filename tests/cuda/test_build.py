"""What setup.py decides about the CUDA extension; nothing is compiled but small probes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


def setup(question: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Answers a question about setup.py's own functions, in a process of its own."""
    code = (
        "import setuptools; setuptools.setup = lambda **given: globals().update(given=given)\n"
        f"exec(compile(open('setup.py').read(), 'setup.py', 'exec'))\nprint({question})"
    )
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("MAGNET_FAST", "CUDA_HOME"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env={**settings, **environment}, capture_output=True, text=True)


def answer(question: str, **environment: str) -> str:
    done = setup(question, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


EXTENSIONS = "[extension.name for extension in given['ext_modules']]"


@pytest.fixture
def bin_folder(tmp_path):
    """CUDA_HOME with an nvcc that ends as `nvcc.status` says."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'error: unsupported GNU version' >&2\nexit $(cat {tmp_path}/status)\n")
    nvcc.chmod(0o755)
    (tmp_path / "status").write_text("0")
    return tmp_path


def test_built_where_nvcc_is_found(bin_folder):
    assert answer(EXTENSIONS, CUDA_HOME=str(bin_folder)) == "['magnet_fast._cpu', 'magnet_fast._cuda']"
    assert answer(EXTENSIONS, CUDA_HOME=str(bin_folder), MAGNET_FAST_CUDA="0") == "['magnet_fast._cpu']"
    assert answer(EXTENSIONS, CUDA_HOME=str(bin_folder / "nowhere")) == "['magnet_fast._cpu']"


def test_a_compiler_that_does_not_fit(bin_folder):
    (bin_folder / "status").write_text("1")
    reason = answer("CUDA_REASON", CUDA_HOME=str(bin_folder))
    assert "do not fit together (error: unsupported GNU version)" in reason and "CXX chooses another" in reason
    assert answer(EXTENSIONS, CUDA_HOME=str(bin_folder)) == "['magnet_fast._cpu']"


def test_wanted_and_not_possible(bin_folder):
    done = setup("0", CUDA_HOME=str(bin_folder / "nowhere"), MAGNET_FAST_CUDA="1")
    assert done.returncode != 0 and "the CUDA extension cannot be built: no nvcc found (CUDA_HOME)" in done.stderr


def test_a_setting_that_is_not_known():
    done = setup("0", MAGNET_FAST_CUDA="yes")
    assert done.returncode != 0 and "MAGNET_FAST_CUDA: expected 0 or 1, got 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("wanted", "names"), [("80;90a", ["80", "90a"]), ("9.0a 8.6,80", ["80", "86", "90a"]), ("120;90", ["90", "120"])]
)
def test_architectures(wanted, names):
    assert answer("architectures()", MAGNET_FAST_CUDA="0", MAGNET_FAST_CUDA_ARCHS=wanted) == str(names)


def test_architectures_that_are_none():
    done = setup("architectures()", MAGNET_FAST_CUDA="0", MAGNET_FAST_CUDA_ARCHS="hopper")
    assert done.returncode != 0 and "MAGNET_FAST_CUDA_ARCHS: expected numbers such as '80;90a'" in done.stderr


def test_architectures_of_the_gpus_present(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '9.0\\n7.5\\n9.0\\n'\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert answer("architectures()", MAGNET_FAST_CUDA="0", PATH=path) == "['90']"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert answer("architectures()", MAGNET_FAST_CUDA="0", PATH=path) == "['80', '90a']"
