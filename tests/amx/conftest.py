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

WINDOW = ["batch", "height", "width", "channels", "heads", "window_h", "window_w", "shift_h", "shift_w"]
WINDOW += ["pad_first", "threads"]
INPUTS = ["batch", "pixels", "words", "heads", "width", "text_value_width", "image_value_width", "dtype", "threads"]
INPUTS += ["image_query", "text_key", "text_value", "text_query", "image_key", "image_value", "text_mask_ptr"]
GRADS = [f"grad_{name}_ptr" for name in INPUTS[9:15]]
ORDER = {
    "window_attention_forward": [
        *WINDOW,
        "qkv_ptr",
        "qkv_strides",
        "bias_ptr",
        "pad_qkv_ptr",
        "out_ptr",
        "out_strides",
    ],
    "window_attention_backward": [*WINDOW, "grad_out_ptr", "grad_out_strides", "qkv_ptr", "qkv_strides", "bias_ptr"]
    + ["pad_qkv_ptr", "grad_qkv_ptr", "grad_qkv_strides", "grad_bias_ptr", "grad_pad_ptr"],
    "cross_modal_attention_forward": [*INPUTS, "image_out_ptr", "text_out_ptr"],
    "cross_modal_attention_backward": [*INPUTS, "grad_image_out", "grad_text_out", *GRADS],
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

        def run(scale: float, **arguments: object) -> None:
            if name.startswith("window"):
                assert arguments.pop("dtype") == 1
            assert arguments.keys() == set(order)
            numbers = list(flat(arguments[key] for key in order))
            self.call(f"{name}_", (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_double(scale))

        return run


def flat(values: Iterable[object]) -> Iterable[int]:
    for value in values:
        yield from map(int, value) if isinstance(value, tuple) else (int(value),)


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
