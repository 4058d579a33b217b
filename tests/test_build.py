"""Building the package: with a compiler, without one, with one that fails, and from its source distribution."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that the tests leave nothing in the repository."""
    copy = tmp_path / "source"
    copy.mkdir()
    # An editable installation puts a link to the kernels into the package.
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors", "kernels")
    for name in ("csrc", "kernels", "magnet_fast"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("# magnet_fast\n")
    (copy / "magnet_fast/weights/small.safetensors").touch()
    return copy


def with_one_operator(source: Path) -> None:
    """Leave the sources of window attention alone: how wheels are made does not depend on how much is compiled."""
    others = ("cross_modal", "deformable", "linear_chain", "pixel_contrastive", "relative")
    for path in (source / "csrc").glob("*/*.cpp"):
        if path.name.startswith(others):
            path.unlink()
    module = source / "csrc" / "bindings" / "cpu_module.cpp"
    lines = module.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not any(f"bind_{name}" in line for name in others)]
    assert len(lines) - len(kept) == 2 * len(others)
    module.write_text("".join(kept))


def build_wheel(source: Path, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", *before, "bdist_wheel", "--dist-dir", "dist"]
    # The CUDA extension has tests of its own, tests/cuda: nvcc takes minutes.
    settings = {**os.environ, "CXXFLAGS": "-O0", "MAGNET_FAST_CUDA": "0", **environment}
    return subprocess.run(command, cwd=source, env=settings, capture_output=True, text=True)


def unpack(source: Path) -> tuple[str, Path]:
    """Name of the one wheel made, and a folder with its contents."""
    (wheel,) = (source / "dist").glob("*.whl")
    folder = source.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return wheel.name, folder


def run(folder: Path, code: str) -> str:
    """Runs `code` with `folder` before everything installed, away from the repository."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_the_wheel_is_pure_python(source):
    done = build_wheel(source, CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("installing WITHOUT the C++ extension") == 1
    assert "'/nowhere/c++'" in done.stderr
    name, folder = unpack(source)
    assert name.endswith("-py3-none-any.whl")
    assert not list(folder.rglob("*.so"))
    for path in ("magnet_fast/kernels/__init__.py", "magnet_fast/py.typed", "magnet_fast/data/vocab.txt"):
        assert (folder / path).is_file(), path
    assert list((folder / "magnet_fast" / "configs").glob("*.yaml"))
    found = run(folder, "import magnet_fast, magnet_fast.kernels; print(magnet_fast.kernels.__file__)")
    assert Path(found.strip()) == folder / "magnet_fast" / "kernels" / "__init__.py"


def test_with_a_compiler_the_wheel_holds_the_extension(source):
    """With the levels of any processor alone; those of this one are in the extension that is in use."""
    setup = (source / "setup.py").read_text()
    assert setup.count("platform.machine()") == 1
    with_one_operator(source)
    (source / "setup.py").write_text(setup.replace("platform.machine()", "'any'"))
    done = build_wheel(source)
    assert done.returncode == 0, done.stderr
    assert "WITHOUT" not in done.stderr
    name, folder = unpack(source)
    assert "none-any" not in name
    levels = run(folder, "import magnet_fast._cpu as c; print(c.__file__, *c.supported_simd_levels())").split()
    assert Path(levels[0]).parent == folder / "magnet_fast"
    assert levels[1:] == ["portable"]


def test_a_failing_compilation_is_an_error(source):
    """A compiler that works but not on these sources must not quietly give a pure-Python package."""
    done = build_wheel(source, CXXFLAGS="-include /nowhere/missing.h")
    assert done.returncode != 0
    assert "building the C++ extension failed" in done.stderr
    assert not (source / "dist").exists()


def test_the_source_distribution_gives_the_same_wheel(source, tmp_path):
    """Whole, and byte for byte: a wheel is the same wherever and whenever it is built."""
    settings = {"CXX": "/nowhere/c++", "SOURCE_DATE_EPOCH": "1750000000"}
    done = build_wheel(source, "sdist", **settings)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as distribution:
        distribution.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    inputs = [path for name in ("csrc", "kernels", "magnet_fast") for path in (source / name).rglob("*.*")]
    assert [str(path) for path in inputs if not (unpacked / path.relative_to(source)).exists()] == []
    done = build_wheel(unpacked, **settings)
    assert done.returncode == 0, done.stderr
    (wheel,), (again,) = (source / "dist").glob("*.whl"), (unpacked / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert one.namelist() == other.namelist()
        assert "magnet_fast/weights/small.safetensors" in one.namelist()
    assert wheel.read_bytes() == again.read_bytes()


def test_the_extension_has_the_same_bytes_wherever_it_is_built(source, tmp_path):
    """In another folder, with other permissions and a mask of other permissions; objects name files by `__FILE__`."""
    with_one_operator(source)
    text = (source / "setup.py").read_text().replace("platform.machine()", "'any'")
    (source / "setup.py").write_text(text)
    module = source / "csrc" / "bindings" / "cpu_module.cpp"
    # As an assertion does it.
    named = 'extern "C" __attribute__((visibility("default"))) const char* file_name() { return __FILE__; }'
    module.write_text(f"{module.read_text()}\n{named}\n")
    other = tmp_path / "a" / "much longer name"
    shutil.copytree(source, other)
    for path in other.rglob("*"):
        path.chmod(0o775 if path.is_dir() else 0o664)
    before = os.umask(0o002)
    try:
        for folder in (source, other):
            done = build_wheel(folder, SOURCE_DATE_EPOCH="1750000000")
            assert done.returncode == 0, done.stderr
            os.umask(0o077)
    finally:
        os.umask(before)
    (wheel,), (again,) = (source / "dist").glob("*.whl"), (other / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        (extension,) = (name for name in one.namelist() if name.endswith(".so"))
        assert b"/bindings/cpu_module.cpp" in one.read(extension) and str(tmp_path).encode() not in one.read(extension)
        for name, twin in zip(one.infolist(), two.infolist(), strict=True):
            assert (name.filename, name.external_attr, name.date_time) == (
                twin.filename,
                twin.external_attr,
                twin.date_time,
            )
            assert one.read(name) == two.read(twin), name.filename
    assert wheel.read_bytes() == again.read_bytes()
