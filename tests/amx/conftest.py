"""Levels avx512, avx512_bf16 and amx on software models of what the processor may lack: AVX-512
(csrc/cpu/avx512_emulation.h) and tiles (csrc/cpu/tile_emulation.h). The launchers are those of the extension; of the
kernels there is what `KERNELS` lists: each costs seconds, and bindings for Python would cost ten."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
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
MODEL = ["-O1", "-mavx2", "-mfma", "-mf16c", "-DMAGNET_FAST_EMULATE_AVX512", "-Wno-psabi", "-Wno-ignored-attributes"]
# As setup.py compiles level amx.
SHIPPED = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"]
LEVELS = ("avx512", "avx512_bf16", "amx")
LAUNCHERS = ["window_attention", "window_plan", "relative_attention", "cross_modal_attention", "cross_modal_plan"]
LAUNCHERS += ["deformable_attention", "linear_chain"]
PAIRS = ("avx512_bf16", "amx")
KERNELS = {
    "relative_kernel": LEVELS,
    "window_kernel": PAIRS,
    "cross_modal_kernel": PAIRS,
    "cross_modal_backward_kernel": PAIRS,
    "deformable_kernel": ("avx512_bf16",),
    "linear_chain_kernel": PAIRS,
}
"""At which levels: avx512 for every dtype, the others for bfloat16 alone."""

INPUTS = ["image_query", "text_key", "text_value", "text_query", "image_key", "image_value"]
PLACES = ["value", "places", "weights", "reference"]
ORDER = {
    "window_attention_forward": ["qkv", "bias", "pad_qkv", "settings", "threads", "out"],
    "window_attention_backward": ["qkv", "bias", "pad_qkv", "settings", "threads", "grad_out", "grad_qkv", "grad_bias"]
    + ["grad_pad_qkv"],
    "relative_attention_forward": ["qkv", "rel_height", "rel_width", "pad_qkv", "settings", "threads", "out"],
    "relative_attention_backward": ["qkv", "rel_height", "rel_width", "pad_qkv", "settings", "threads", "grad_out"]
    + ["grad_qkv", "grad_rel_height", "grad_rel_width", "grad_pad_qkv"],
    "deformable_attention_forward": [*PLACES, "spatial_shapes", "threads", "out"],
    "deformable_attention_backward": [*PLACES, "spatial_shapes", "threads", "grad_out"]
    + [f"grad_{name}" for name in PLACES],
    "cross_modal_attention_forward": [*INPUTS, "text_mask", "heads", "threads", "image_out", "text_out"],
    "cross_modal_attention_backward": [*INPUTS, "text_mask", "heads", "threads", "grad_image_out", "grad_text_out"]
    + [f"grad_{name}" for name in INPUTS],
    "linear_chain_forward": ["x", "residual", "y", "threads", "layers"],
}
"""Arguments as emulated_tiles.cpp reads them."""


class Unit(NamedTuple):
    """A source and what it is compiled with."""

    source: Path
    flags: list[str]


class Emulated:
    """Stands in for the extension."""

    def __init__(self, path: Path) -> None:
        self.__file__ = str(path)
        self.library = ctypes.CDLL(str(path))
        self.library.products.restype = ctypes.c_int64

    def call(self, name: str, *arguments: object) -> None:
        """RuntimeError with the message of the exception that the function met."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*arguments)
        if message is not None:
            raise RuntimeError(message.decode())

    def set_simd_level(self, name: str) -> None:
        self.library.set_level(["portable", "avx2", "avx512", "avx512_bf16", "amx"].index(name))
        self.level = name

    def simd_level(self) -> str:
        return self.level

    def linear_chain_step(self, dtype: int) -> int:
        return 16

    def linear_chain_packed_bytes(self, dtype: int, inputs: int, outputs: int) -> int:
        count = self.library.linear_chain_packed_bytes_
        count.restype = ctypes.c_int64
        return count(ctypes.c_int64(inputs), ctypes.c_int64(outputs))

    def linear_chain_pack(self, weight_ptr: int, dtype: int, inputs: int, outputs: int, packed_ptr: int) -> None:
        sizes = ctypes.c_int64(inputs), ctypes.c_int64(outputs)
        self.library.linear_chain_pack_(ctypes.c_void_p(weight_ptr), *sizes, ctypes.c_void_p(packed_ptr))

    def __getattr__(self, name: str):
        if name not in ORDER:
            raise AttributeError(name)
        order = ORDER[name]

        def run(**arguments: object) -> None:
            if "settings" in arguments:
                (scale,) = (number for number in arguments["settings"] if isinstance(number, float))
                arguments["settings"] = [number for number in arguments["settings"] if not isinstance(number, float)]
            else:
                scale = arguments.pop("scale", 0.0)  # deformable attention has none
            assert arguments.keys() == set(order)
            numbers = [number for key in order for number in flat(key, arguments[key])]
            self.call(f"{name}_", (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_double(scale))

        return run


def flat(name: str, value: object) -> Iterable[int]:
    """A number, the settings' whole numbers, maps, or a tensor: dimensions, address, dtype, sizes and strides."""
    if name in ("heads", "threads"):
        yield value
    elif name == "settings":
        yield from map(int, value)
    elif name == "spatial_shapes":
        yield from (len(value), *(side for sides in value for side in sides))
    elif name == "layers":
        yield len(value)
        for *numbers, before, after in value:
            yield from numbers
            for weight, bias, epsilon in (before, after):
                yield from (weight, bias, *struct.unpack("q", struct.pack("d", epsilon)))
    elif value is None:
        yield 0
    else:
        address, sizes, strides, dtype = value
        yield from (len(sizes), address, dtype, *sizes, *strides)


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
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]}) to build the emulation with")
    if platform.machine() != "x86_64" or "avx2" not in _cpu.supported_simd_levels():
        pytest.skip("instructions of x86 are emulated, with those of AVX2")

    units = [Unit(ROOT / "csrc" / "cpu" / f"{launcher}.cpp", ["-O1"]) for launcher in LAUNCHERS]
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
    macros = [] if level == "avx512" else ["-DMAGNET_FAST_EMULATE_BFLOAT16_ALONE"]
    macros += [f"-DMAGNET_FAST_SIMD_{name.upper()}=1" for name in LEVELS[: LEVELS.index(level) + 1]]
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
    monkeypatch.setenv("MAGNET_FAST_PROOF", "skip")
    monkeypatch.setattr(_cpu_backend, "extension", model)
    return model


@pytest.fixture(params=["model", "trapped"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """The operators' backend `cpu` runs level amx on emulated tiles, and leaves none of them configured."""
    built = request.getfixturevalue(request.param)
    monkeypatch.setenv("MAGNET_FAST_PROOF", "skip")
    monkeypatch.setattr(_cpu_backend, "extension", built)
    built.set_simd_level("amx")
    built.library.products()
    yield built
    assert not built.library.configured()
