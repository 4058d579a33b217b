"""Whole models on a GPU: latency, throughput, training steps and peak memory, ours against the reference path.

    python -m benchmarks.gpu_models --results benchmarks/results/gpu_models.json

Every row of a group is timed in one process, one after the other. The model is accelerated in all of them; "reference"
runs the plain PyTorch form of every operator, "ours" what `auto` chooses; "+ compile" is torch.compile of the whole
model, which in inference also captures CUDA graphs. Weights are random; gates and offsets are opened as in
`bench_magnet`: trained models compute behind them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.bench_magnet import copied, model_of, operations
from magnet_fast import accelerate, models, ops
from magnet_fast.training.terms import build_terms

WORDS = 20
PATHS = ("reference", "reference + compile", "ours", "ours + compile")


class Case(NamedTuple):
    """A model, the side of its square images and the batches: of inference, of a training step."""

    model: str  # of bench_magnet.CASES
    title: str
    side: int
    inference: tuple[int, ...]
    training: tuple[int, ...]


FULL = (Case("swin_b", "MagNet Swin-B 480x480", 480, inference=(1, 32), training=(8, 32)),)
SMALL = (Case("tiny", "MagNet tiny 64x64", 64, inference=(1,), training=(2,)),)


def rows(cases: tuple[Case, ...], device: torch.device, rounds: int = 20) -> Iterator[dict[str, Any]]:
    """Times every case; yields one row for each path as soon as it is known.

    A path that fails (out of memory, say) gives a row with "error" instead of times: the others still count.

    Args:
        cases: what to run.
        device: a CUDA device; the CPU only to see that the measurement works.
        rounds: runs that are timed for each row, after as many unmeasured ones as a compilation needs.
    """
    for case in cases:
        for batch in case.inference:
            yield from _group(
                f"{case.title}, inference, batch {batch}, bfloat16", case, batch, device, rounds, _inference
            )
        for batch in case.training:
            group = f"{case.title}, training step, batch {batch}, bfloat16 autocast"
            yield from _group(group, case, batch, device, rounds, _training)


def _group(
    group: str,
    case: Case,
    batch: int,
    device: torch.device,
    rounds: int,
    prepare: Callable[[nn.Module, tuple[Tensor, ...], bool], Callable[[], Any]],
) -> Iterator[dict[str, Any]]:
    baseline = None
    flops = None
    for path in PATHS:
        row = {"suite": "gpu_models", "group": group, "path": path, "baseline": PATHS[0], "dtype": "bfloat16"}
        row |= {"median_seconds": None, "ratio": None}
        torch.compiler.reset()
        model = copied(model_of(case.model))
        accelerate(model)
        inputs = _inputs(case, batch, model.config.text.vocab_size, device)
        try:
            with ops.backend("auto" if path.startswith("ours") else "reference"):
                run = prepare(model.to(device), inputs, path.endswith("compile"))
                flops = flops or operations(prepare(model, inputs, False))
                seconds, peak = _time(run, device, rounds)
        except RuntimeError as error:  # out of memory is one, too
            yield row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        median = statistics.median(seconds)
        baseline = median if path == PATHS[0] else baseline
        yield row | {
            "median_seconds": median,
            "min_seconds": min(seconds),
            "rounds": rounds,
            "ratio": baseline and baseline / median,
            "images_per_second": batch / median,
            "flops": flops,
            "peak_bytes": peak,
        }


def _inputs(case: Case, batch: int, vocabulary: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, case.side, case.side, generator=generator)
    input_ids = torch.randint(5, vocabulary, (batch, WORDS), generator=generator)
    return image.to(device), input_ids.to(device), torch.ones_like(input_ids).to(device)


def _inference(model: nn.Module, inputs: tuple[Tensor, ...], compiled: bool) -> Callable[[], Any]:
    """One batch from normalised images to masks, weights in bfloat16."""
    image, input_ids, attention_mask = inputs
    model = model.eval().requires_grad_(False).to(torch.bfloat16)
    if compiled:
        mode = "reduce-overhead" if image.is_cuda else None
        model.compile(fullgraph=True, dynamic=False, mode=mode)

    def run() -> Tensor:
        with torch.no_grad():
            return model.predict(image.to(torch.bfloat16), input_ids, attention_mask)

    return run


def _training(model: nn.Module, inputs: tuple[Tensor, ...], compiled: bool) -> Callable[[], Any]:
    """Forward under autocast, losses, backward and a step of fused AdamW."""
    image, input_ids, attention_mask = inputs
    model = model.train()
    if compiled:
        model.compile(fullgraph=True, dynamic=False)
    mask = torch.zeros(len(image), *image.shape[-2:], device=image.device)
    mask[:, image.shape[2] // 4 : image.shape[2] // 2, image.shape[3] // 3 :] = 1
    batch = {"mask": mask, "exists": torch.ones(len(image), dtype=torch.bool, device=image.device)}
    terms = build_terms({}, model, None).values()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # the weights stay as they are

    def run() -> None:
        optimiser.zero_grad()
        with torch.autocast(image.device.type, dtype=torch.bfloat16):
            prediction = model(image, models.Text(input_ids, attention_mask.bool()))
        sum(term.weight * term(prediction, batch, model)[0] for term in terms).backward()
        optimiser.step()

    return run


def _time(run: Callable[[], Any], device: torch.device, rounds: int) -> tuple[list[float], int]:
    """Seconds of each round, and the most memory that was allocated at once (0 on the CPU)."""
    for _ in range(3):  # compiles, records CUDA graphs, tunes kernels
        run()
    if device.type != "cuda":
        return [_seconds(run) for _ in range(rounds)], 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    times = [1e-3 * begin.elapsed_time(end) for begin, end in zip(marks, marks[1:], strict=False)]
    return times, torch.cuda.max_memory_allocated(device)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_models: torch sees no GPU here")
    found: list[dict[str, Any]] = []
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for row in rows(FULL, torch.device("cuda")):
        print(gpu.line(row), flush=True)
        found.append(row)
        contents = {"machine": gpu.description(), "rows": found}
        options.results.write_text(json.dumps(contents, indent=1) + "\n")  # what is known outlives a run cut short


if __name__ == "__main__":
    main()
