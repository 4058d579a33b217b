"""Nothing unproven is chosen: before `auto` takes a kernel that may be wrong here, the kernel proves itself.

What a GPU runs depends on its model, its driver, the compiler and their versions, and this package cannot have been
tested on all of them. So the first call that would take a Triton or CUDA kernel, or a CPU kernel of level amx, makes a
small check: the forward pass and every gradient of a few fixed inputs, against the reference in float64, by the error
rule of the tests. The answer is remembered on disk for this operator, backend, dtype, device and all versions. A kernel
that fails is not taken; one warning says which, and by how much. Checks on a GPU are made in a process of their own
where there can be one (`_proof_apart`): a kernel that ends it, or breaks the GPU for it, has failed.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend, _cuda_backend, _kept, _proof_apart, _registry
from magnet_fast.ops._checks import dtype_name
from magnet_fast.ops._observed import moded
from magnet_fast.ops._proof_apart import Place
from magnet_fast.ops._proof_cases import OPERATORS, ProofCase, cases

BACKENDS = ("cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MODE_VARIABLE = "MAGNET_FAST_PROOF"
FOLDER = "proofs"
"""Of the cache (`_kept`)."""
_MODES = ("once", "again", "skip")
_REPORT = "please report it with the output of `magnet-fast doctor`"


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        passed: whether the kernel may be taken.
        detail: the largest error by what the rule allows, or what was raised.
        measured: whether results were compared. What was raised may be of the moment (memory that is full): it holds
            for this process alone,
        lasting: unless the kernel has ended its process, or broken the device for it.
    """

    passed: bool
    detail: str
    measured: bool = True
    lasting: bool = False


_AMX = _cpu_backend.extension is not None and _cpu_backend.extension.simd_level() == "amx"
"""Few processors with AMX have run its kernels yet: as for a GPU's, the proof is left to the machine."""

_BEGUN = "proofs-begun"
"""Folder of the checks that began, in the cache."""

_verdicts: dict[tuple[str, ...], Verdict] = {}
"""By `_held_as`."""
_lock = threading.RLock()


def unproven(operator: str, name: str, arguments: tuple) -> str | None:
    """None where `auto` may take the backend for these normalised arguments, else why not. Checks at the first call."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    if not needs_proof(name, first.dtype):
        return None
    if torch.compiler.is_compiling():
        return _said(operator, name, first.dtype, first.device)
    place = operator, name, dtype_name(first.dtype), str(first.device)
    if _remembered(place) is None and mode() != "skip" and may_run(first.device):
        # In one process of their own, all that such a call may take.
        others = _checkable((operator,), (first.dtype,), first.device) if _proof_apart.wanted(place) else []
        _prove([place, *others])
    return _refusal(place, _verdicts.get(_held_as(place)))


def expected(operator: str, name: str, arguments: tuple) -> str | None:
    """What `explain` says of a kernel that was not checked yet, or has failed. Nothing is computed on a GPU; a CPU's
    check takes milliseconds, and is made."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    if not needs_proof(name, first.dtype):
        return None
    if name == "cpu":
        return unproven(operator, name, arguments)
    return _said(operator, name, first.dtype, first.device)


def prove(device: torch.device | str, dtypes: tuple[torch.dtype, ...], operators: tuple[str, ...] = OPERATORS) -> None:
    """Check now what `auto` may take on a device, before a graph is compiled or captured there.

    Args:
        device: of the tensors to come; nothing happens for one whose kernels need no proof.
        dtypes: of the tensors to come; those that a kernel does not take are left out.
        operators: names.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not may_run(device):
        return
    _prove(_checkable(operators, dtypes, device))


def why_unchecked(operator: str, name: str, dtype: torch.dtype, device: str) -> str | None:
    """None where a backend can be checked in this process, else why not."""
    there = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    return _registry.why_not(operator, name, _normalised(operator, dtype, torch.device(there)))


def check(operator: str, name: str, dtype: torch.dtype, device: torch.device | str) -> Verdict:
    """Run an operator's fixed inputs on a backend and compare every result with the reference in float64.

    Remembers nothing; see the module. An error that is raised is a failed check, not an exception.
    """
    worst, where = 0.0, "nothing"
    try:
        with undisturbed():
            for number, case in enumerate(cases(operator)):
                given = [leaf.to(device, dtype) for leaf in case.leaves]
                truth = _results(operator, case, "reference", [leaf.double() for leaf in given])
                plain = _results(operator, case, "reference", given)
                ours = _results(operator, case, name, given)
                for result, (our, reference, true) in enumerate(zip(ours, plain, truth, strict=True)):
                    what = f"result {result} of case {number}"
                    if our.shape != reference.shape or our.dtype != reference.dtype:
                        return Verdict(False, f"{what}: {our.dtype} {tuple(our.shape)} for {tuple(reference.shape)}")
                    found = share(our, reference, true, dtype)
                    if found > worst:
                        worst, where = found, what
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return Verdict(False, f"{type(error).__name__}: {first[:300]}", measured=False)
    return Verdict(worst <= 1, f"largest error {worst:.3g} of what is allowed ({where})")


def mode() -> str:
    """How the environment wants it: "once" a machine and version, "again" in every process, or "skip"."""
    found = os.environ.get(MODE_VARIABLE) or "once"
    if found not in _MODES:
        raise ValueError(f"environment variable {MODE_VARIABLE}: expected one of {', '.join(_MODES)}, got {found!r}")
    return found


# ---- The check ------------------------------------------------------------------------------------------------------


def share(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The error by what is allowed: as the tests have it, a few times that of the same maths done plainly."""
    if not bool(ours.isfinite().all()):
        return math.inf
    scale = truth.abs().max().item()
    error, baseline = ((tensor.double() - truth).abs().max().item() for tensor in (ours, plain))
    if dtype == torch.float32:
        exact = not (ours.is_cuda and _cuda_backend.tf32())
        step = 32 * torch.finfo(torch.float32).eps if exact else 2.0**-9
        allowed = 4 * baseline + step * max(scale, 1e-2)
    else:
        step = torch.finfo(dtype).eps
        allowed = max(min(2 * baseline + step * scale, 16 * step * scale), 1e-30)
    return error / allowed if math.isfinite(allowed) else math.inf  # the reference itself is not finite


def _results(operator: str, case: ProofCase, name: str, given: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs and every gradient."""
    leaves = [leaf.detach().requires_grad_() for leaf in given]
    args, kwargs = case.arguments(*leaves)
    with _registry.backend(name):
        found = _public(operator)(*args, **kwargs)
        outputs = [out for out in (found if isinstance(found, tuple) else (found,)) if out is not None]
        weights = [
            torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64, device="cpu").view(out.shape) for out in outputs
        ]
        loss = sum((out * weight.to(out)).sum() for out, weight in zip(outputs, weights, strict=True))
        return (*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever the caller is in the middle of: no autocast, gradients, its random numbers untouched, no hooks on what
    is kept for the backward pass, which activation checkpointing would count among its own."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.device("cpu"),
        unhooked(),
    ):
        yield


def unhooked() -> AbstractContextManager[Any]:
    """No hooks of the caller's on what is kept for the backward pass. Where there are none nothing is done: the caller
    may also have forbidden them."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _public(operator: str) -> Callable[..., Any]:
    from magnet_fast import ops

    return getattr(ops, operator)


def _checkable(operators: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Place]:
    """All that `auto` may take on a device, and has to prove itself."""
    found = []
    for operator in operators:
        for name in BACKENDS:
            for dtype in [dtype for dtype in dtypes if needs_proof(name, dtype)]:
                arguments = _normalised(operator, dtype, device)
                if _registry.why_not(operator, name, arguments) is not None:
                    continue
                # On a GPU it is the first guess that passes over: by time it may be taken all the same.
                if device.type == "cuda" or _registry.why_passed_over(operator, name, arguments) is None:
                    found.append((operator, name, dtype_name(dtype), str(device)))
    return found


def _normalised(operator: str, dtype: torch.dtype, device: torch.device) -> tuple:
    with undisturbed():
        case = cases(operator)[0]
        args, kwargs = case.arguments(*(leaf.to(device, dtype) for leaf in case.leaves))
        return _registry.prepare_of(operator)(*args, **kwargs)


# ---- When, and what is remembered -----------------------------------------------------------------------------------


def may_run(device: torch.device) -> bool:
    """Not while something watches every function, nor where a stream is recorded: the check would end up in it."""
    return not moded() and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _said(operator: str, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """A compiler calls it while it traces, and keeps the answer in the graph."""
    place = operator, name, dtype_name(dtype), str(device)
    return _refusal(place, _remembered(place))


# As `torch.compiler.assume_constant_result` does, which imports the compiler, and Triton with it.
_said._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(place: Place, verdict: Verdict | None) -> str | None:
    if mode() == "skip" or (verdict is not None and verdict.passed):
        return None
    if verdict is None:
        return NOT_YET
    return f"it failed its check on this machine: {verdict.detail}"


NOT_YET = "it has not proved itself on this machine yet: its first ordinary call does, or `magnet-fast doctor`"


def _remembered(place: Place) -> Verdict | None:
    """What is known without a check."""
    with _lock:
        held = _held_as(place)
        if held not in _verdicts and mode() == "once" and (found := _read(place) or _died(place)) is not None:
            _conclude(place, found)
        return _verdicts.get(held)


def _prove(places: Sequence[Place]) -> None:
    """Check those of which nothing is known."""
    if mode() == "skip":
        return
    with _lock:
        unknown = [place for place in dict.fromkeys(places) if _remembered(place) is None]
        for place, verdict in checked_apart(unknown).items():
            remember(place, verdict)
        for place in unknown:
            if _held_as(place) not in _verdicts:
                operator, name, dtype, device = place
                with begun(place):
                    verdict = check(operator, name, getattr(torch, dtype), device)
                remember(place, verdict)


def checked_apart(places: Sequence[Place]) -> dict[Place, Verdict]:
    """Of the places that are checked in a process of their own, those for which there was one. Remembers nothing."""
    places = [place for place in places if _proof_apart.wanted(place)]
    found = {}
    for place, answer in zip(places, _proof_apart.answers(places, [key_of(place) for place in places]), strict=True):
        if answer is not None:
            found[place] = Verdict(**answer)
    return found


@contextmanager
def begun(place: Place) -> Iterator[None]:
    """A kernel that reaches outside its memory takes the process with it: the next one is told that a check began.

    Not of a check in a process of its own, whose end the one that asks sees: where both are gone, both were stopped.
    """
    key = key_of(place)
    _kept.write(_BEGUN, key, {"process": os.getpid(), "host": socket.gethostname()})
    try:
        yield
    finally:
        _kept.remove(_BEGUN, key)


def _died(place: Place) -> Verdict | None:
    """A verdict where a process of this machine began a check, and is gone without an answer."""
    begun = _kept.read(_BEGUN, key_of(place))
    if begun is None or begun.get("host") != socket.gethostname() or not isinstance(begun.get("process"), int):
        return None
    try:
        os.kill(begun["process"], 0)
    except ProcessLookupError:
        return Verdict(False, "the process that checked it died; `magnet-fast doctor` checks it again", measured=False)
    except (OSError, OverflowError):  # another user's
        pass
    return None


def proved(operator: str, dtype: torch.dtype, check: Callable[[], Verdict]) -> bool:
    """`unproven` for a kernel of the CPU that is no operator of the registry: whether it may be taken.

    Args:
        operator: its name in answers and warnings.
        check: makes the check; called where nothing is known.
    """
    if not needs_proof("cpu", dtype) or mode() == "skip":
        return True
    place = operator, "cpu", dtype_name(dtype), "cpu"
    with _lock:
        if (verdict := _remembered(place)) is None:
            with begun(place):
                verdict = check()
            remember(place, verdict)
    return verdict.passed


def remember(place: Place, verdict: Verdict) -> None:
    """Take a verdict for (operator, backend, dtype, device) from now on; on disk, too, unless it is of the moment."""
    if verdict.measured or verdict.lasting:
        _write(place, verdict)
        _kept.remove(_BEGUN, key_of(place))
    _conclude(place, verdict)  # last: a warning may be an error to the caller


def needs_proof(name: str, dtype: torch.dtype) -> bool:
    """Whether `auto` takes a backend's kernels only once they have proved themselves. Level amx has bfloat16 alone."""
    return name in ("cuda", "triton") or (name == "cpu" and _AMX and dtype == torch.bfloat16)


def _conclude(place: Place, verdict: Verdict) -> None:
    _verdicts[_held_as(place)] = verdict
    if not verdict.passed:
        operator, name, dtype, device = place
        found = "gives wrong results" if verdict.measured else "could not be checked"
        warnings.warn(
            f"magnet_fast: the {name} kernel of {operator} {found} in {dtype} on {device} and is not used "
            f"({verdict.detail}); {_REPORT}",
            stacklevel=2,
        )


def _held_as(place: Place) -> tuple[str, ...]:
    """What the process knows a place by: where TF32 is allowed later, other products have to prove themselves."""
    of_tf32 = place[2] == "float32" and place[3].startswith("cuda") and _cuda_backend.tf32()
    return (*place, "tf32") if of_tf32 else place


def key_of(place: Place) -> _kept.Key:
    """All that an answer depends on: kernels, what calls them, what they are compared with and how."""
    operator, name, dtype, device = place
    key = {"operator": operator, "backend": name, "dtype": dtype, "kernels": _kept.kernels(name)}
    key |= {"package": _kept.package_version(), "operators": _kept.operators()}
    if name == "triton":
        key["triton"] = _kept.triton_version()
    return key | _kept.machine(torch.device(device))


def _read(place: Place) -> Verdict | None:
    found = _kept.read(FOLDER, key_of(place))
    if found is None or not isinstance(found.get("passed"), bool):
        return None
    measured = found.get("measured") is not False
    return Verdict(found["passed"] and measured, str(found.get("detail", "")), measured, not measured)


def _write(place: Place, verdict: Verdict) -> None:
    _kept.write(FOLDER, key_of(place), verdict._asdict())


_registry.set_proof(unproven, expected)
