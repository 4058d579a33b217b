"""`magnet-fast doctor`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_files


@user_errors
def doctor(
    out: Annotated[
        Path | None, typer.Option(help="Write the report to this file as JSON, to attach to an issue.")
    ] = None,
) -> None:
    """Check every kernel that can run here against the reference, and say what this machine is.

    All is asked anew, and of kernels that have to prove themselves the new answer is remembered. Then come the times by
    which kernels were chosen on a GPU, and products for training on a CPU. Ends with status 1 if a kernel is wrong.
    """
    import json
    import platform

    import torch

    import magnet_fast
    from magnet_fast.atomic import write_text_atomically
    from magnet_fast.cores import allowed_cores
    from magnet_fast.ops import _cpu_backend, _linear_chain, _proof, _trial
    from magnet_fast.ops._linear import training_products

    if out is not None:
        check_files({"--out": out}, {})
    machine = {
        "magnet_fast": magnet_fast.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "CPU level": _cpu_backend.extension.simd_level() if _cpu_backend.extension else _cpu_backend.missing,
        "threads": torch.get_num_threads(),
        "cores": allowed_cores(),
        "GPUs": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "CUDA": torch.version.cuda,
    }
    for name, value in machine.items():
        typer.echo(f"{name:15} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    if machine["threads"] > machine["cores"]:
        typer.echo(
            f"warning: {machine['threads']} threads for the time of {machine['cores']} cores that this container may "
            f"use wait for each other; set OMP_NUM_THREADS={machine['cores']}",
            err=True,
        )
    results, wrong = [], 0
    gpu = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    where = {"cpu": "cpu", "triton": gpu, "cuda": gpu}
    apart = _proof.checked_apart(  # what a kernel does to its process must not end the report
        [
            (operator, backend, str(dtype).removeprefix("torch."), where[backend])
            for operator, backend, dtype in product(_proof.OPERATORS, _proof.BACKENDS, _proof.DTYPES)
            if _proof.why_unchecked(operator, backend, dtype, where[backend]) is None
        ]
    )

    def report(backend: str, operator: str, dtype: torch.dtype, reason: str | None, check: Callable[[], Any]) -> None:
        nonlocal wrong
        place = {"backend": backend, "operator": operator, "dtype": str(dtype).removeprefix("torch.")}
        if reason is None:
            asked = operator, backend, place["dtype"], where[backend]
            verdict = apart[asked] if asked in apart else check()
            if _proof.needs_proof(backend, dtype):
                _proof.remember(asked, verdict)
            wrong += not verdict.passed
            results.append({**place, **verdict._asdict()})
            said = f"{'right' if verdict.passed else 'WRONG'}: {verdict.detail}"
        else:
            results.append({**place, "passed": None, "detail": reason})
            said = f"not here: {reason}"
        typer.echo(f"{backend:7} {operator:27} {place['dtype']:9} {said}")

    for backend in _proof.BACKENDS:
        device = where[backend]
        for operator in _proof.OPERATORS:
            for dtype in _proof.DTYPES:
                reason = _proof.why_unchecked(operator, backend, dtype, device)
                report(backend, operator, dtype, reason, partial(_proof.check, operator, backend, dtype, device))
        if backend == "cpu":
            for dtype in _linear_chain.DTYPES:
                reason = _linear_chain.why_unchecked(dtype)
                report(backend, _linear_chain.OPERATOR, dtype, reason, partial(_linear_chain.check, dtype))
    remembered = _trial.remembered()
    for calls, choice in remembered:
        typer.echo(f"choice  {calls}: {choice.winner} ({choice})")
    products = training_products()
    seconds = {} if products is None else products.seconds
    for name, (mkl, onednn) in seconds.items():
        said = "oneDNN" if getattr(products, name) else "PyTorch's"
        typer.echo(
            f"choice  float32 Linears in training, {name.replace('_', ' ')}: {said} "
            f"(MKL {1e3 * mkl:.3g} ms, oneDNN {1e3 * onednn:.3g} ms)"
        )
    if out is not None:
        choices = [{"calls": calls, **choice._asdict()} for calls, choice in remembered]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(
            out,
            json.dumps(
                {"machine": machine, "kernels": results, "choices": choices, "training_products": seconds}, indent=1
            )
            + "\n",
        )
        typer.echo(f"report: {out}")
    if wrong:
        typer.echo(
            f"{wrong} kernels are wrong on this machine; `auto` does not use them on a GPU, nor at level amx.", err=True
        )
        raise typer.Exit(1)
