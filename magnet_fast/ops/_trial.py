"""Chosen by measurement: `auto` times the proven candidates once for each class of calls, and keeps the fastest.

Which of several right implementations is the fastest depends on the GPU, and on shapes that nobody has measured. So the
first ordinary call of a class on a GPU runs the candidates on its own tensors a few times, as an autotuner does:
forward, and backward where a gradient will be asked for. The answer holds for the process, and on disk for this GPU and
all versions. What the registry says by itself, by committed measurements, is the first guess: it stays unless
another is clearly faster.

Times are those of a device that has nothing else to do: of small calls the host's part counts as well, as it does in a
model of small calls.

Nothing is measured on a CPU, in a graph that is compiled, exported or traced, during a capture, under a mode or a
transform, and where deterministic algorithms are asked for: what a run computes must not hang on a clock there.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magnet_fast.ops import _cuda_backend, _kept, _proof, _registry
from magnet_fast.ops._checks import dtype_name
from magnet_fast.ops._observed import taken_elsewhere, transformed

MODE_VARIABLE = "MAGNET_FAST_CHOICE"
FOLDER = "choices"
"""Of the cache (`_kept`)."""
_MODES = ("measure", "guess")

_WARM, _ROUNDS = 2, 9  # calls of each candidate
_SECONDS = 0.5  # after which no new round begins; compiling, in the first calls, is not counted
_HOPELESS = 2.0  # times the fastest: such a one is not called again
_CLEARLY = 0.95  # of the first guess's time: what is not below it is no reason for another
_MOST_FORMS = 4096  # more than that is a stream of new shapes

ShapeClass = tuple[Any, ...]


class Choice(NamedTuple):
    """What a class of calls runs on. `str()` of it is for people.

    Attributes:
        winner: the backend.
        seconds: the median time of a call, by backend; empty for a guess that the process has begun with.
        failed: what the others raised, by backend.
        date: the day of the measurement.
    """

    winner: str
    seconds: dict[str, float]
    failed: dict[str, str]
    date: str = ""

    def __str__(self) -> str:
        if not self.seconds:
            return "not measured in this process: such a call came first under a mode or during a capture"
        by_time = sorted(self.seconds, key=self.seconds.__getitem__)
        parts = [f"{name} {1e3 * self.seconds[name]:.3g} ms" for name in by_time]
        parts += [f"{name} failed ({said})" for name, said in self.failed.items()]
        return ", ".join([*parts, *([f"measured {self.date}"] if self.date else [])])


_forms: dict[Any, str] = {}
"""What exactly such a call runs on: the one look-up of an ordinary call."""
_choices: dict[ShapeClass, Choice] = {}
"""Filled with `setdefault`, and never while a lock is held: of two threads that measure at once the first counts. The
backward pass of one may wait for a thread in which the other's call stands."""


def mode() -> str:
    """How the environment wants it: "measure" or "guess"."""
    found = os.environ.get(MODE_VARIABLE) or "measure"
    if found not in _MODES:
        raise ValueError(f"environment variable {MODE_VARIABLE}: expected one of {', '.join(_MODES)}, got {found!r}")
    return found


def choice(operator: str, arguments: tuple) -> str | None:
    """The backend for these normalised arguments; None where it is the first guess, unmeasured. May measure."""
    if not _on_gpu(arguments) or not _asked():
        return None
    if torch.compiler.is_compiling():
        return _in_a_graph(operator, arguments)
    form = None if transformed() else _form(operator, arguments)
    if form is None:
        return None
    found = _forms.get(form)
    return found if found is not None else _look(operator, arguments, form)


def known(operator: str, arguments: tuple) -> tuple[str | None, str]:
    """What `choice` would say without measuring, and the times, for `explain`. Nothing runs on the device."""
    if not _on_gpu(arguments) or not _asked() or transformed() or _form(operator, arguments) is None:
        return None, ""
    able = _able(operator, arguments, _registry.doubt)
    if len(able) < 2:
        return None, ""
    found = _recalled(_with_tf32(shape_class(operator, arguments)), able)
    if found is None:
        return None, "not measured yet: the first ordinary call of such shapes is"
    return (found.winner if found.winner in able else None), str(found)


def taken() -> list[tuple[str, Choice]]:
    """Every choice of this process: of which calls, in words, and what was found."""
    found = []
    for (operator, gradients, *rest, _), choice in _choices.items():
        found.append((f"{operator} {_in_words(gradients, rest)}", choice))
    return found


def remembered() -> list[tuple[str, Choice]]:
    """Every choice on disk by this process's version of PyTorch: of which calls, in words, and what was found."""
    found = []
    for answer in _kept.all_of(FOLDER):
        key, read = answer["key"], _parsed(answer, None)
        if read is not None and key.get("torch") == torch.__version__:
            found.append((f"{key.get('operator')} {key.get('class')} on {key.get('device')}", read))
    return sorted(found, key=lambda one: one[0])


# ---- Classes of calls -----------------------------------------------------------------------------------------------


def shape_class(operator: str, arguments: Sequence[Any]) -> ShapeClass:
    """What decides on the speed of a call, roughly, so that a model has a few classes.

    Sizes are rounded up to powers of two (batch, rows, words, maps), but for the channels, the last dimension of what
    is floating-point; whole numbers and switches count as they are, other numbers do not.
    """
    described: list[Any] = [operator, _gradients_are_asked(arguments)]
    for argument in arguments:
        if isinstance(argument, Tensor):
            exact = 1 if argument.is_floating_point() else 0
            shape = tuple(argument.shape)
            rounded = [_rounded(size) for size in shape[: len(shape) - exact]]
            described.append((argument.dtype, argument.device, (*rounded, *shape[len(shape) - exact :])))
        elif isinstance(argument, (list, tuple)):
            described.append(tuple([_rounded(size) for size in argument]))
        elif not isinstance(argument, float):
            described.append(argument)
    return tuple(described)


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 1 else size


def _gradients_are_asked(arguments: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for argument in arguments:  # noqa: SIM110 (a compiler traces it)
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def _on_gpu(arguments: Sequence[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.is_cuda
    return False


def _asked() -> bool:
    """Whether the environment, and what the call stands in, leave it to times."""
    if mode() == "guess" or torch.are_deterministic_algorithms_enabled():
        return False
    return not taken_elsewhere()


def _form(operator: str, arguments: Sequence[Any]) -> Any:
    """All that a choice reads of a call; None for tensors that are anything but ordinary ones."""
    described: list[Any] = [operator, torch.is_grad_enabled(), _cuda_backend.tf32()]
    for argument in arguments:
        if isinstance(argument, Tensor):
            if type(argument) is not Tensor and type(argument) is not nn.Parameter:
                return None  # fake tensors, sharded ones
            described.append(
                (argument.shape, argument.stride(), argument.dtype, argument.device, argument.requires_grad)
            )
        else:
            described.append(tuple(argument) if isinstance(argument, list) else argument)
    return tuple(described)


def _with_tf32(place: ShapeClass) -> ShapeClass:
    return (*place, _cuda_backend.tf32())


def _able(operator: str, arguments: tuple, doubt: Callable[[str, str, tuple], str | None]) -> tuple[str, ...]:
    """What can run a call and is proven, whatever is thought of its speed, the preferred first."""
    able = []
    for name in _registry.PREFERENCE:
        if _registry.why_not(operator, name, arguments) is None and doubt(operator, name, arguments) is None:
            able.append(name)
    return tuple(able)


# ---- What is known, and finding out ---------------------------------------------------------------------------------


def _look(operator: str, arguments: tuple, form: Any) -> str:
    """A form's first call."""
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    guess, able = _registry.first_guess(operator, arguments), _able(operator, arguments, _registry.unproven)
    name, ordinary = guess, _proof.may_run(device)
    if len(able) > 1:
        place = _with_tf32(shape_class(operator, arguments))
        found = _recalled(place, able)
        if found is None:
            # What a process begins with it goes on with: what is computed again for a backward pass must be the same.
            new = _measured(operator, arguments, place, able, guess) if ordinary else Choice(guess, {}, {})
            found = _choices.setdefault(place, new)
        name = found.winner if found.winner in able else guess
    if ordinary:  # else more may be proven later
        if len(_forms) >= _MOST_FORMS:
            _forms.clear()
        _forms[form] = name
    return name


def _in_a_graph(operator: str, arguments: tuple) -> str | None:
    """`choice` while a compiler traces: what is known, for shapes that will not change."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    for argument in arguments:
        sizes = argument.shape if isinstance(argument, Tensor) else argument if isinstance(argument, list) else ()
        for size in sizes:
            if not has_static_value(size):
                return None
    able = _able(operator, arguments, _registry.unproven)
    return _told(shape_class(operator, arguments), able) if len(able) > 1 else None


def _told(place: ShapeClass, able: tuple[str, ...]) -> str | None:
    """A compiler calls it while it traces, and keeps the answer in the graph."""
    found = _recalled(_with_tf32(place), able)
    return found.winner if found is not None and found.winner in able else None


# As `torch.compiler.assume_constant_result` does, which imports the compiler, and Triton with it.
_told._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _recalled(place: ShapeClass, able: tuple[str, ...]) -> Choice | None:
    """What is known of a class, in this process or on disk."""
    found = _choices.get(place)
    if found is None and (answer := _kept.read(FOLDER, _key(place, able))) is not None:
        found = _parsed(answer, able)
        if found is not None:
            found = _choices.setdefault(place, found)
    return found


def _measured(operator: str, arguments: tuple, place: ShapeClass, able: tuple[str, ...], guess: str) -> Choice:
    seconds, failed = _times(operator, arguments, [guess, *(name for name in able if name != guess)])
    if not seconds:
        return Choice(guess, {}, {})  # whatever all of them raised, the call itself will
    winner = min(seconds, key=seconds.__getitem__)
    if guess in seconds and seconds[winner] > _CLEARLY * seconds[guess]:
        winner = guess
    answer = {"winner": winner, "seconds": seconds, "failed": failed}
    key = _key(place, able)
    _kept.write_first(FOLDER, key, answer, lambda other: _parsed(other, able) is not None)
    # Another process of this machine may have been first: all take the same.
    kept = _parsed(_kept.read(FOLDER, key) or {}, able)
    return kept if kept is not None else Choice(winner, seconds, failed)


def _key(place: ShapeClass, able: tuple[str, ...]) -> _kept.Key:
    """All that an answer depends on."""
    operator, gradients, *rest, _ = place
    first = next(part for part in rest if _of_a_tensor(part))
    key: _kept.Key = {"operator": operator, "class": _in_words(gradients, rest), "package": _kept.package_version()}
    key["candidates"] = {name: None if name == "reference" else _kept.kernels(name) for name in able}
    if "triton" in able:
        key["triton"] = _kept.triton_version()
    return key | _kept.machine(first[1])


def _of_a_tensor(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) > 0 and isinstance(part[0], torch.dtype)


def _in_words(gradients: bool, described: Sequence[Any]) -> str:
    parts = []
    for part in described:
        if _of_a_tensor(part):
            parts.append(f"{dtype_name(part[0])} {'x'.join(map(str, part[2]))}")
        else:
            parts.append(str(part))
    return f"{', '.join(parts)}, {'with' if gradients else 'without'} gradients"


def _parsed(answer: dict[str, Any], able: tuple[str, ...] | None) -> Choice | None:
    """A choice as it is kept on disk; None for what is none, or of others than `able`."""
    winner, seconds, failed = answer.get("winner"), answer.get("seconds"), answer.get("failed")
    if not (isinstance(winner, str) and isinstance(seconds, dict) and isinstance(failed, dict) and winner in seconds):
        return None
    if able is not None and not seconds.keys() <= set(able):
        return None
    if not all(isinstance(one, float) and math.isfinite(one) and one > 0 for one in seconds.values()):
        return None
    return Choice(winner, seconds, {str(name): str(said) for name, said in failed.items()}, str(answer.get("date", "")))


# ---- Measuring ------------------------------------------------------------------------------------------------------


def _times(operator: str, arguments: tuple, names: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of a call by backend, in turns, and what those raised that cannot be taken, memory that does not
    suffice among it."""
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    gradients = _gradients_are_asked(arguments)
    failed: dict[str, str] = {}
    left = {name: _runner(operator, arguments, name, gradients) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}

    def turn() -> dict[str, float]:
        taken = {}
        for name in list(left):
            try:
                taken[name] = _seconds(left[name], device)
            except Exception as error:
                said = (str(error).strip() or "no message").splitlines()[0]
                failed[name] = f"{type(error).__name__}: {said[:200]}"
                del left[name], found[name]
        return taken

    with _undisturbed(gradients), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for _ in range(_WARM):
            turn()
        end = monotonic() + _SECONDS
        for _ in range(_ROUNDS):
            for name, one in turn().items():
                found[name].append(one)
            medians = {name: statistics.median(taken) for name, taken in found.items()}
            for name in list(left):
                if medians[name] > _HOPELESS * min(medians.values()):
                    del left[name]
            if len(left) < 2 or monotonic() > end:
                break
    return {name: statistics.median(taken) for name, taken in found.items() if taken}, failed


def _runner(operator: str, arguments: tuple, name: str, gradients: bool) -> Callable[[], None]:
    """A call on the tensors themselves, of which no graph reaches the caller's."""
    call, weights = _registry.call_of(operator), []

    def run() -> None:
        if not gradients:
            call(name, *arguments)
            return
        given = [_detached(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
        found = call(name, *given)
        leaves = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
        outputs = [out for out in (found if isinstance(found, tuple) else (found,)) if out is not None and out.numel()]
        if not weights:
            weights.extend(torch.ones_like(out) for out in outputs)
        torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    return run


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one run on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


@contextmanager
def _undisturbed(gradients: bool) -> Iterator[None]:
    """As `_proof.undisturbed`, without what would slow the operations of one candidate more than another's."""
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        _proof.unhooked(),
    ):
        yield


_registry.set_trial(choice, known)
