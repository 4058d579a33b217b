"""Level amx's kernels, compiled with a software model of the tile registers: see csrc/cpu/tile_emulation.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from magnet_fast import _cpu
from magnet_fast.ops import _cpu_backend

ROOT = Path(__file__).resolve().parent.parent.parent
# As setup.py compiles the level.
LEVEL = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"]
LEVEL += ["-mamx-tile", "-mamx-bf16"]
LEVEL += [f"-DMAGNET_FAST_SIMD_{name}=1" for name in ("AVX512", "AVX512_BF16", "AMX")]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
FLAGS += [
    "-ffp-contract=fast",
    "-DMAGNET_FAST_HAS_AMX=1",
    "-DMAGNET_FAST_SIMD_LEVEL=amx",
    f"-I{ROOT / 'csrc'}",
]
LAUNCHERS = ["window_attention.cpp", "window_plan.cpp", "cross_modal_attention.cpp", "cross_modal_plan.cpp"]
KERNELS = ["window_kernel.cpp", "cross_modal_kernel.cpp", "cross_modal_backward_kernel.cpp"]

INPUTS = ["image_query", "text_key", "text_value", "text_query", "image_key", "image_value"]
ORDER = {
    "window_attention_forward": ["qkv", "bias", "pad_qkv", "settings", "threads", "out"],
    "window_attention_backward": ["qkv", "bias", "pad_qkv", "settings", "threads", "grad_out", "grad_qkv", "grad_bias"]
    + ["grad_pad_qkv"],
    "cross_modal_attention_forward": [*INPUTS, "text_mask", "heads", "threads", "image_out", "text_out"],
    "cross_modal_attention_backward": [*INPUTS, "text_mask", "heads", "threads", "grad_image_out", "grad_text_out"]
    + [f"grad_{name}" for name in INPUTS],
}
"""Arguments as emulated_tiles.cpp reads them."""


class Emulated:
    """Stands in for the extension; for bfloat16 alone."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.products.restype = ctypes.c_int64

    def call(self, name: str, *arguments: object) -> None:
        """RuntimeError with the message of the exception that the function met."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*arguments)
        if message is not None:
            raise RuntimeError(message.decode())

    def __getattr__(self, name: str):
        if name not in ORDER:
            raise AttributeError(name)
        order = ORDER[name]

        def run(**arguments: object) -> None:
            if "settings" in arguments:
                *integers, scale, pad_first = arguments["settings"]
                arguments["settings"] = (*integers, pad_first)
            else:
                scale = arguments.pop("scale")
            assert arguments.keys() == set(order)
            numbers = [number for key in order for number in flat(key, arguments[key])]
            self.call(f"{name}_", (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_double(scale))

        return run


def flat(name: str, value: object) -> Iterable[int]:
    """A number, the settings' whole numbers, or a tensor: dimensions, address, dtype, sizes and strides."""
    if name in ("heads", "threads"):
        yield value
    elif name == "settings":
        yield from map(int, value)
    elif value is None:
        yield 0
    else:
        address, sizes, strides, dtype = value
        yield from (len(sizes), address, dtype, *sizes, *strides)


@pytest.fixture(scope="session")
def model() -> Emulated:
    """The model in place of the intrinsics."""
    return build(["-DMAGNET_FAST_EMULATE_AMX", "-O1"])


@pytest.fixture(scope="session")
def trapped() -> Emulated:
    """The model in place of the instructions, which must be illegal here."""
    if "amx" in _cpu.supported_simd_levels():
        pytest.skip("this processor has tiles: their instructions cannot be trapped")
    return build([])


def build(flags: list[str]) -> Emulated:
    """Compiled once for a state of the sources, kept under build/."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]}) to build the emulation with")
    if platform.machine() != "x86_64" or "avx512_bf16" not in _cpu.supported_simd_levels():
        pytest.skip("tiles alone are emulated: the rest of level amx needs a processor with avx512_bf16")
    sources = [ROOT / "csrc" / "cpu" / name for name in LAUNCHERS + KERNELS]
    sources.append(Path(__file__).parent / "emulated_tiles.cpp")
    state = hashlib.sha256("\0".join([*compiler, *FLAGS, *LEVEL, *flags]).encode())
    for path in [*sources, *sorted((ROOT / "csrc").rglob("*.h")), *sorted(Path(__file__).parent.glob("*.h"))]:
        state.update(path.read_bytes())
    folder = ROOT / "build" / "amx_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"emulated_tiles-{state.hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            objects = [str(Path(place, f"{source.stem}.o")) for source in sources]
            for source, obj in zip(sources, objects, strict=True):
                # Launchers serve every level, so they are compiled for any processor.
                level = [] if source.name in LAUNCHERS else [*LEVEL, *flags]
                run([*compiler, *FLAGS, *level, "-c", str(source), "-o", obj])
            unfinished = Path(place, target.name)
            run([*compiler, "-shared", *objects, "-o", str(unfinished)])
            os.replace(unfinished, target)
    return Emulated(target)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


@pytest.fixture(params=["model", "trapped"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The operators' backend `cpu` runs level amx on emulated tiles, and leaves none of them configured."""
    built = request.getfixturevalue(request.param)
    monkeypatch.setattr(_cpu_backend, "extension", built)
    built.library.products()
    yield built
    assert not built.library.configured()
