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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_rivals, machine, plot
from benchmarks.window_shapes import Shape, traffic
from magnet_fast import ops

SHAPES = [Shape("Swin-B", 480, stage, window, True) for window in (7, 12) for stage in (1, 2, 3, 4)]
TINY = [Shape("Swin-T", 24, 1, 7, True)]
PATHS = ("reference", "SDPA", "torch.compile", "FlexAttention", "triton")
BASELINE = "torch.compile"

_ROTATED = 256 << 20  # bytes of all sets of inputs: several times any L2
_ROUNDS, _WARMUP = 50, 10
_SMALL = 200e-6  # seconds below which the gaps between launches count


def runner(path: str, shape: Shape, batch: int, dtype: torch.dtype, backward: bool, device: str, sets: int) -> Callable:
    """A function of a number that runs the path once on that set of inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(size, generator=generator)).to(device, dtype)

    extent, channels = shape.extent, shape.channels
    table = draw((2 * shape.window - 1) ** 2, shape.heads, factor=0.1).requires_grad_(backward)
    pad = draw(3 * channels).requires_grad_(backward)
    grad = draw(batch, extent, extent, channels)
    inputs = [draw(batch, extent, extent, 3 * channels).requires_grad_(backward) for _ in range(sets)]
    attend = {"reference": gpu_rivals.eager, "SDPA": gpu_rivals.sdpa, "FlexAttention": gpu_rivals.flex}.get(path)
    if path == "torch.compile":
        attend = torch.compile(gpu_rivals.eager, dynamic=False)

    def forward(qkv: Tensor) -> Tensor:
        if attend is not None:
            return attend(shape, qkv, table, pad)
        settings = {"num_heads": shape.heads, "window_size": shape.window, "shift": shape.shift}
        with ops.backend(path):
            return ops.window_attention(qkv, table, pad_qkv=pad, **settings)

    def run(number: int) -> object:
        out = forward(inputs[number % sets])
        if not backward:
            return out
        return torch.autograd.grad(out, (inputs[number % sets], table, pad), grad, allow_unused=True)

    return run


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


def measure(shapes: Sequence[Shape], batch: int, dtypes: Sequence[torch.dtype], dry_run: bool) -> list[dict[str, Any]]:
    """One row for each shape, dtype, pass and path."""
    device, rows = "cpu" if dry_run else "cuda", []
    for shape in shapes:
        for dtype in dtypes:
            for backward in (False, True):
                group = f"window attention, {shape}, batch {batch}, {str(dtype)[6:]}, "
                group += "forward+backward" if backward else "forward"
                rows += _group(group, shape, batch, dtype, backward, device)
    return rows


def _group(
    group: str, shape: Shape, batch: int, dtype: torch.dtype, backward: bool, device: str
) -> list[dict[str, Any]]:
    counts = traffic(shape, dtype, backward, batch)
    sets = 2 if device == "cpu" else max(2, min(8, -(-_ROTATED // counts["bytes"])))
    rows = []
    for path in PATHS:
        if device == "cpu" and path in ("torch.compile", "FlexAttention"):
            continue  # minutes of compilation that would tell nothing about a GPU
        row = {"suite": "window_attention_gpu", "group": group, "path": path, "baseline": BASELINE}
        row |= {"dtype": str(dtype)[6:], "median_seconds": None, **counts}
        try:
            run = runner(path, shape, batch, dtype, backward, device, sets)
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
    shapes, batch = (TINY, 1) if options.dry_run else (SHAPES, options.batch)
    rows = with_ratios(measure(shapes, batch, (torch.bfloat16,), options.dry_run), best)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    contents = {"machine": description(), "ceilings": best, "rows": rows}
    options.results.write_text(json.dumps(contents, indent=1) + "\n")
    for row in rows:
        print(line(row))
    timed = [row for row in rows if row["median_seconds"] is not None]
    if options.picture and timed:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        plot.draw({**contents, "rows": timed}).save(options.picture)


if __name__ == "__main__":
    main()
