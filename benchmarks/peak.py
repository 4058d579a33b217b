"""The processor's peak, by a loop of multiply-adds on registers: what no product in float32 can pass."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".cpp")
_ROUNDS = 20_000_000
_REPEATS = 3


def float32_peak(threads: int) -> float | None:
    """Operations/s of so many threads at once, a multiply-add being two; None without a C++ compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        run = ctypes.CDLL(str(library)).fma_float32
    run.restype = ctypes.c_int64
    return max(_together(run, threads) for _ in range(_REPEATS))


def _together(run: ctypes._CFuncPtr, threads: int) -> float:
    operations = [0] * threads

    def work(index: int) -> None:  # ctypes lets the others run meanwhile
        operations[index] = run(ctypes.c_int64(_ROUNDS), ctypes.byref(ctypes.c_float(1.0)))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(operations) / (time.perf_counter() - start)
