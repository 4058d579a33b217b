"""The machine of a benchmark run, and what it can do at best: its copy bandwidth and its matrix products."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import magnet_fast
from benchmarks.peak import float32_peak
from magnet_fast import ops
from magnet_fast.evaluation.machine import measured_on

_COPY_BYTES = 256 << 20  # far beyond any cache
_PRODUCT_SIDE = 2048
_SLOW_PRODUCT_SIDE = 256  # where bfloat16 is emulated, the large one takes minutes


def ceilings() -> dict[str, float]:
    """Measured with the present number of threads: "copy" in bytes/s, read and written both counted, of a large tensor;
    "float32" and "bfloat16" in operations/s of a 2048³ matrix product (256³ where bfloat16 is emulated), the better of
    PyTorch's own and oneDNN's; "float32_peak" of multiply-adds on registers alone, where a compiler is."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.zeros_like(source)
    found = {"copy": 2 * _COPY_BYTES / _least(lambda: target.copy_(source))}
    for dtype in (torch.float32, torch.bfloat16):
        quick = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        side = _PRODUCT_SIDE if quick else _SLOW_PRODUCT_SIDE
        matrix = torch.ones(side, side, dtype=dtype)
        out = torch.empty_like(matrix)
        products = [lambda a=matrix, b=out: torch.mm(a, a, out=b)]
        if quick and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix, side)
            products.append(lambda a=matrix, w=packed: torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], ""))
        seconds = min(_least(product) for product in products)
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    if (peak := float32_peak(torch.get_num_threads())) is not None:
        found["float32_peak"] = peak
    return found


def shares(info: dict[str, Any], seconds: float, best: dict[str, float]) -> dict[str, float]:
    """How near a run came to the ceilings: compulsory bytes and operations (extra_info's "bytes" and "flops") over what
    the machine could have moved and computed in that time. "flops" counts against the product of extra_info's "dtype",
    float32 where it names none, and in float32 against the peak as well."""
    found = {}
    if info.get("bytes"):
        found["copy_share"] = info["bytes"] / seconds / best["copy"]
    if info.get("flops"):
        dtype = info.get("dtype", "float32")
        found["product_share"] = info["flops"] / seconds / best.get(dtype, best["float32"])
        if dtype == "float32" and "float32_peak" in best:
            found["peak_share"] = info["flops"] / seconds / best["float32_peak"]
    return found


def description() -> dict[str, Any]:
    """Processor, threads, versions and the date."""
    return {
        **measured_on(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "transformers": _version("transformers"),
        "timm": _version("timm"),
        "openvino": _version("openvino"),
        "magnet_fast": magnet_fast.__version__,
        "backends": list(ops.available_backends()),
    }


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory the process held during `function` beyond what it held before (Linux; 0 elsewhere).

    What the allocator keeps of earlier calls is given back first, and the kernel's high-water mark is reset.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        function()
        return 0
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        function()
        return 0
    before = _kilobytes(status, "VmRSS")
    function()
    return max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


def _least(function: Callable[[], Any], rounds: int = 7) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)  # a ceiling: what the machine can do when nothing disturbs it


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
