"""The CUDA kernels' own source, compiled for the host: see csrc/cuda/host_emulation.h."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from magnet_fast.ops import _cuda_backend

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ELEMENTS = ("float", "BFloat16", "Float16")
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
# The fibers' longjmp is no mistake; glibc's check of it would take it for one.
FLAGS += [
    "-U_FORTIFY_SOURCE",
    "-DMAGNET_FAST_EMULATE_CUDA",
    "-DMAGNET_FAST_MODULE=_cuda_emulated",
    f"-I{ROOT / 'csrc'}",
]


class Emulated:
    """The emulated extension, and the device it runs on."""

    def __init__(self, extension: ModuleType, device: ctypes.CDLL) -> None:
        self.extension, self.device = extension, device


@pytest.fixture(scope="session")
def built() -> Emulated:
    """Compiled once for a state of the sources, kept under build/."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]}) to build the emulation with")
    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.c*")) if path.suffix in (".cpp", ".cu")]
    sources += [HERE / "emulated_device.cpp", HERE / "emulated_bindings.cpp"]
    common = hashlib.sha256("\0".join([*compiler, *FLAGS]).encode())
    for path in [*headers, *sorted((ROOT / "csrc" / "bindings").glob("cuda_*.cpp"))]:
        common.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_emulation"
    target = compile_emulation(compiler, sources, folder, common)
    loader = importlib.machinery.ExtensionFileLoader("_cuda_emulated", str(target))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda_emulated", loader))
    loader.exec_module(module)
    device = ctypes.CDLL(str(target))
    device.run_faulty.restype = device.check_maps.restype = ctypes.c_char_p
    for name in ("source_coordinate", "shift_region", "bias_row"):
        getattr(device, name).restype = ctypes.c_int64
    return Emulated(module, device)


def compile_emulation(compiler: list[str], sources: list[Path], folder: Path, common: hashlib._Hash) -> Path:
    """Every object file is named after all that it is made of, and so is the module."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    jobs = {}
    for source in sources:
        state = common.copy()
        state.update(source.read_bytes())
        # Kernels run for seconds, bindings do not.
        level = "-O0" if source.stem == "emulated_bindings" else "-O1"
        for element in ELEMENTS if source.name.endswith("_kernel.cu") else ("",):
            obj = folder / f"{source.stem}{element}-{state.hexdigest()[:16]}.o"
            flags = [f"-DMAGNET_FAST_ELEMENT={element}"] if element else []
            jobs[obj] = [*compiler, *FLAGS, level, *include, *flags, "-x", "c++", "-c", str(source)]
    target = folder / f"_cuda_emulated-{hashlib.sha256(repr(sorted(jobs)).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 0) or len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda obj: obj.exists() or run(jobs[obj], obj), jobs))
        run([*compiler, "-shared", *map(str, jobs)], target)
    return target


def run(command: list[str], result: Path) -> None:
    """Runs a compiler; its result appears whole or not at all."""
    unfinished = result.with_suffix(f".{os.getpid()}.unfinished")  # another process may build the same
    command = [*command, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    os.replace(unfinished, result)


@pytest.fixture
def emulated(built: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The operators' backend `cuda` runs on the emulated device, on tensors of the CPU."""
    monkeypatch.setattr(_cuda_backend, "extension", built.extension)
    monkeypatch.setattr(_cuda_backend, "place", place)
    yield built
    built.device.set_reversed(0)
    built.device.set_shared_limit(227 * 1024)


def place(like: torch.Tensor) -> dict[str, object]:
    return {"device": 0, "stream": 0, "tf32": torch.backends.cuda.matmul.allow_tf32}
