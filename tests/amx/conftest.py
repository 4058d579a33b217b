"""Levels avx512, avx512_bf16 and amx on software models of what a processor may lack: AVX-512
(csrc/cpu/avx512_emulation.h) and tiles (csrc/cpu/tile_emulation.h). The operators are those of the extension; the
launchers are compiled for these levels alone, and kernels only as far as `KERNELS` says: each costs seconds."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from magnet_fast import _cpu
from magnet_fast.ops import _cpu_backend

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-maybe-uninitialized", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-DMAGNET_FAST_HAS_AVX512=1", "-DMAGNET_FAST_HAS_AVX512_BF16=1", "-DMAGNET_FAST_HAS_AMX=1"]
FLAGS += [f"-I{ROOT / 'csrc'}"]
# Vectors of 64 bytes that the processor has no registers for: no caller outside the file sees how they are passed.
MODEL = ["-O1", "-mavx2", "-mfma", "-mf16c", "-DMAGNET_FAST_EMULATE_AVX512"]
MODEL += ["-Wno-psabi", "-Wno-ignored-attributes"]
# As setup.py compiles level amx.
SHIPPED = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"]
LEVELS = ("avx512", "avx512_bf16", "amx")
OPERATORS = ("cross_modal", "deformable", "relative", "window")
LAUNCHERS = [*(f"{name}_attention" for name in OPERATORS), "window_plan", "cross_modal_plan"]
PAIRS = ("avx512_bf16", "amx")
KERNELS = {
    "relative_kernel": LEVELS,
    "window_kernel": PAIRS,
    "cross_modal_kernel": PAIRS,
    "cross_modal_backward_kernel": PAIRS,
    "deformable_kernel": ("avx512_bf16",),
}
"""At which levels."""


class Unit(NamedTuple):
    """A source and what it is compiled with."""

    source: Path
    flags: list[str]


class Emulated:
    """An emulated extension, and functions of the models by ctypes."""

    def __init__(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("_cpu_emulated", str(path))
        self.extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cpu_emulated", loader))
        loader.exec_module(self.extension)
        self.library = ctypes.CDLL(str(path))
        self.library.products.restype = ctypes.c_int64

    def call(self, name: str, *arguments: object) -> None:
        """RuntimeError with the message of the exception that the function met."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*arguments)
        if message is not None:
            raise RuntimeError(message.decode())


@pytest.fixture(scope="session")
def model() -> Emulated:
    """Both models in place of the intrinsics."""
    return build("model", ["-DMAGNET_FAST_EMULATE_AMX", *MODEL])


@pytest.fixture(scope="session")
def trapped() -> Emulated:
    """The instructions on tiles themselves, which must be illegal here. The rest of level amx is as shipped where the
    processor has AVX-512 with BF16."""
    offered = _cpu.supported_simd_levels()
    if "amx" in offered:
        pytest.skip("this processor has tiles: their instructions cannot be trapped")
    return build("trapped", ["-mamx-tile", "-mamx-bf16", *(SHIPPED if "avx512_bf16" in offered else MODEL)])


def build(name: str, amx: list[str]) -> Emulated:
    """Compiled once for a state of the sources, kept under build/; what does not differ between two is shared."""
    import pybind11

    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]}) to build the emulation with")
    if platform.machine() != "x86_64" or "avx2" not in _cpu.supported_simd_levels():
        pytest.skip("instructions of x86 are emulated, with those of AVX2")

    python = ["-O0", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    units = [Unit(ROOT / "csrc" / "bindings" / f"{operator}_module.cpp", python) for operator in OPERATORS]
    units += [Unit(HERE / "emulated_levels.cpp", python)]
    units += [Unit(ROOT / "csrc" / "cpu" / f"{launcher}.cpp", ["-O1"]) for launcher in LAUNCHERS]
    for kernel, levels in KERNELS.items():
        units += [Unit(ROOT / "csrc" / "cpu" / f"{kernel}.cpp", at_level(level, amx)) for level in levels]
    units += [Unit(HERE / "emulated_tiles.cpp", at_level("amx", amx))]
    units += [Unit(HERE / "emulated_instructions.cpp", at_level("avx512_bf16", amx))]

    folder = ROOT / "build" / "cpu_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for unit in units:
        command = [*compiler, *FLAGS, *unit.flags, "-c", str(unit.source)]
        jobs[folder / f"{unit.source.stem}-{digest(command, unit.source)}.o"] = command
    target = folder / f"{name}-{hashlib.sha256(repr(sorted(jobs)).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 0) or len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda obj: obj.exists() or run(jobs[obj], obj), jobs))
        run([*compiler, "-shared", *map(str, jobs)], target)
    return Emulated(target)


def at_level(level: str, amx: list[str]) -> list[str]:
    macros = [f"-DMAGNET_FAST_SIMD_{name.upper()}=1" for name in LEVELS[: LEVELS.index(level) + 1]]
    return [*(amx if level == "amx" else MODEL), f"-DMAGNET_FAST_SIMD_LEVEL={level}", *macros]


def digest(command: list[str], source: Path) -> str:
    """Of the command and of every file of ours that the source is made of."""
    state = hashlib.sha256("\0".join(command).encode())
    found, left = {source}, [source]
    while left:
        path = left.pop()
        text = path.read_bytes()
        state.update(text)
        names = re.findall(r'^#include "(.+)"', text.decode(), re.M)
        included = {
            next(folder / name for folder in (ROOT / "csrc", HERE) if (folder / name).exists()) for name in names
        }
        left += sorted(included - found)
        found |= included
    return state.hexdigest()[:16]


def run(command: list[str], result: Path) -> None:
    """Runs a compiler; its result appears whole or not at all."""
    unfinished = result.with_suffix(f".{os.getpid()}.unfinished")  # another process may build the same
    command = [*command, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    os.replace(unfinished, result)


@pytest.fixture
def emulated(model: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The operators' backend `cpu` runs on the models."""
    monkeypatch.setattr(_cpu_backend, "extension", model.extension)
    return model


@pytest.fixture(params=["model", "trapped"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """The operators' backend `cpu` runs level amx on emulated tiles, and leaves none of them configured."""
    built = request.getfixturevalue(request.param)
    monkeypatch.setattr(_cpu_backend, "extension", built.extension)
    built.extension.set_simd_level("amx")
    built.library.products()
    if request.param == "trapped":
        built.library.start_trap()
    yield built
    if request.param == "trapped":
        built.call("end_trap")
    assert not built.library.configured()
