"""Timing on a GPU: device events, a cold L2, medians; and the file and picture of the results.

    python -m benchmarks.gpu --results benchmarks/results/gpu.json --picture docs/benchmarks-gpu.png

Every row is the median of many runs, each on another of several sets of inputs, together far larger than the L2. Times
of small launches are those of a CUDA graph's replays. A path that cannot run has its reason in the row, and no time.
`--dry-run` goes through everything once with tiny shapes on the CPU, where the kernels need TRITON_INTERPRET=1; the
times of such a run mean nothing and are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, plot
from benchmarks.gpu_cases import CASES, OURS, TINY, Case
from magnet_fast import ops
from magnet_fast.ops import _trial

_ROTATED, _MOST_SETS = 256 << 20, 64  # bytes of all sets of inputs: several times any L2; and sets
_ROUNDS, _WARMUP = 50, 10
_SMALL = 200e-6  # seconds below which the gaps between launches count


def runner(path: str, case: Case, batch: int, dtype: torch.dtype, backward: bool, device: str, sets: int) -> Callable:
    """A function of a number that runs the path once on that set of inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(size, generator=generator)).to(device, dtype)

    inputs = [case.tensors(batch, draw) for _ in range(sets)]
    leaves = [case.differentiable(tensors) for tensors in inputs]
    function = case.function(OURS[0] if path == "auto" else path)
    if path == "torch.compile":
        function = torch.compile(function, dynamic=False)
    if backward:
        for leaf in chain(*leaves):
            leaf.requires_grad_()

    def forward(number: int) -> Sequence[Tensor]:
        with ops.backend(path) if path in (*OURS, "auto") else nullcontext():
            outs = function(*inputs[number % sets])
        return [outs] if isinstance(outs, Tensor) else outs

    if not backward:
        return forward
    grads = [draw(*out.shape) for out in forward(0)]
    return lambda number: torch.autograd.grad(forward(number), leaves[number % sets], grads, allow_unused=True)


def median_seconds(run: Callable[[int], object], sets: int) -> float:
    """Median time of one run on the device."""
    for number in range(_WARMUP):
        run(number)
    torch.cuda.synchronize()
    found = statistics.median(_events(run, _ROUNDS))
    if found >= _SMALL:
        return found
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for number in range(sets):
            run(number)
    return statistics.median(_events(lambda number: graph.replay(), _ROUNDS)) / sets


def _events(run: Callable[[int], object], rounds: int) -> list[float]:
    pairs = []
    for number in range(rounds):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        run(number)
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def ceilings() -> dict[str, float]:
    """Measured: "copy" in bytes/s (read and written) of 1 GiB; a product of 8192³ in operations/s, by dtype."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    found = {"copy": 2 * (1 << 30) / statistics.median(_events(lambda number: target.copy_(source), 20))}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        out = torch.empty_like(a)
        seconds = _events(lambda number, a=a, out=out: torch.mm(a, a, out=out), 10)
        found[str(dtype)[6:]] = 2 * 8192**3 / statistics.median(seconds)
    return found


def measure(cases: Sequence[Case], batch: int, dtypes: Sequence[torch.dtype], dry_run: bool) -> list[dict[str, Any]]:
    """One row for each case, dtype, pass and path."""
    device, rows = "cpu" if dry_run else "cuda", []
    for case in cases:
        for dtype in dtypes:
            for backward in (False, True):
                group = f"{case.title}, {case}, batch {batch}, {str(dtype)[6:]}, "
                group += "forward+backward" if backward else "forward"
                rows += _group(group, case, batch, dtype, backward, device)
    return rows


def _group(group: str, case: Case, batch: int, dtype: torch.dtype, backward: bool, device: str) -> list[dict[str, Any]]:
    counts = case.floor(dtype, backward, batch)
    sets = 2 if device == "cpu" else max(2, min(_MOST_SETS, -(-_ROTATED // counts["bytes"])))
    rows = []
    for path in case.paths:
        if not case.present(path) or device == "cpu" and path in ("torch.compile", "FlexAttention", "cuda"):
            continue  # on the CPU minutes of compilation would tell nothing about a GPU
        row = {"suite": f"{case.operator}_gpu", "group": group, "path": path, "baseline": case.baseline}
        row |= {"dtype": str(dtype)[6:], "median_seconds": None, **counts}
        if path == "triton":
            row["moved_bytes"] = case.moved(dtype, backward, batch)
        try:
            torch.compiler.reset()
            run = runner(path, case, batch, dtype, backward, device, sets)
            if device == "cpu":
                run(0)
            else:
                row["median_seconds"] = median_seconds(run, sets)
        except Exception as error:  # the other rows are worth having
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def choices(cases: Sequence[Case], batch: int, dtypes: Sequence[torch.dtype], device: str) -> list[dict[str, Any]]:
    """What `auto` takes for each class of our operators' calls, and the times by which it does; none on a CPU."""
    for case in cases:
        for dtype in dtypes:
            for backward in (False, True):
                try:
                    runner("auto", case, batch, dtype, backward, device, 1)(0)
                except Exception as error:  # the others are worth having
                    print(f"auto: {case.title}, {case}: {type(error).__name__}: {error}"[:300])
                if device == "cuda":
                    torch.cuda.empty_cache()
    return [{"calls": calls, **choice._asdict()} for calls, choice in _trial.taken()]


def with_ratios(rows: list[dict[str, Any]], best: dict[str, float]) -> list[dict[str, Any]]:
    """Ratios to the group's baseline, and shares of the ceilings, for the rows that have a time."""
    baselines = {row["group"]: row["median_seconds"] for row in rows if row["path"] == row["baseline"]}
    for row in rows:
        seconds, base = row["median_seconds"], baselines.get(row["group"])
        row["ratio"] = base / seconds if base and seconds else None
        if seconds and best:
            row |= machine.shares(row, seconds, best)
    return rows


def description() -> dict[str, Any]:
    """The machine's description with the GPU's name, driver and the versions of CUDA and Triton."""
    from importlib.metadata import version

    found = {**machine.description(), "triton": version("triton"), "cuda": torch.version.cuda, "driver": None}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.cuda.is_available():
        found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or None
        found["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    return found


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if row["median_seconds"] is None:
        return f"{row['group']:<84} {row['path']:<14} {row.get('error', 'ran, not timed')}"
    text = f"{row['group']:<84} {row['path']:<14} {1e6 * row['median_seconds']:10.1f} us"
    text += f" {row['ratio']:6.2f}x" if row["ratio"] else "       -"
    return text + "".join(f"   {100 * row[k]:3.0f} % of {k[:-6]}" for k in ("copy_share", "product_share") if k in row)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no GPU here (--dry-run goes through it on the CPU)")
    best = {} if options.dry_run else ceilings()
    cases, batch = (TINY, 1) if options.dry_run else (CASES, options.batch)
    rows = with_ratios(measure(cases, batch, (torch.bfloat16,), options.dry_run), best)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    chosen = choices(cases, batch, (torch.bfloat16,), "cpu" if options.dry_run else "cuda")
    contents = {"machine": description(), "ceilings": best, "rows": rows, "choices": chosen}
    options.results.write_text(json.dumps(contents, indent=1) + "\n")
    for row in rows:
        print(line(row))
    for choice in chosen:
        print(f"auto: {choice['calls']}: {choice['winner']}, {choice['seconds']}")
    timed = [row for row in rows if row["median_seconds"] is not None]
    if options.picture and timed:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        plot.draw({**contents, "rows": timed}).save(options.picture)


if __name__ == "__main__":
    main()
