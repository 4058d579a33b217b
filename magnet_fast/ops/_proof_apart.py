"""Checks in a process of their own: what a kernel does to its process it does to that one.

A GPU's kernel that reaches outside its memory leaves its GPU unusable for the process, or ends it, and one that hangs
never comes back. A child (`_proof_child`) answers a line of JSON for each check; of one that ends at a check, or is
silent for too long, that is the answer, and another child makes the checks after it. Where no child can be had nothing
is answered.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from magnet_fast.ops import _cuda_backend, _kept

BEGIN_SECONDS, SECONDS = 120.0, 120.0
"""The longest that a child may take to begin, and then for each check: Triton compiles its kernels in it."""

_TURN = 1.0  # seconds

Place = tuple[str, str, str, str]  # operator, backend, dtype, device
Answer = dict[str, Any]

# Not `-m`, by which whatever lies in the working folder would be imported first.
_START = "import sys; sys.path[:] = sys.argv[1:]; from magnet_fast.ops._proof_child import main; main()"
_BEGUN = b'"begun"'
_ITS_OWN_DOING = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")


def wanted(place: Place) -> bool:
    """Whether a check is to be made in a process of its own: on a CPU it takes milliseconds, and cannot hurt."""
    return place[3].startswith("cuda") and _is_python(sys.executable)


def answers(places: Sequence[Place], keys: Sequence[_kept.Key]) -> list[Answer | None]:
    """The entries of a `_proof.Verdict` for each place; None where it has to be found out otherwise.

    Args:
        places: what to check.
        keys: what the answers depend on: a child that finds itself elsewhere answers nothing.
    """
    found: list[Answer | None] = []
    while len(found) < len(places):
        more = _child(places[len(found) :], keys[len(found) :])
        if not more:
            break
        found += more
    return found + [None] * (len(places) - len(found))


def _is_python(executable: str | None) -> bool:
    """Not a program that Python is a part of, which would be started once more."""
    return bool(executable) and re.match(r"(python|pypy)", Path(executable).name, re.IGNORECASE) is not None


def _child(places: Sequence[Place], keys: Sequence[_kept.Key]) -> list[Answer | None]:
    """The answers of one child, with what its end says of the place that it was at; none if it did not begin."""
    settings = {"tf32": _cuda_backend.tf32(), "seconds": SECONDS}
    job = json.dumps({"places": places, "keys": keys, **settings}).encode()
    path = [entry for entry in sys.path if isinstance(entry, str)]
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", _START, *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MAGNET_FAST_PROOF": "skip"},  # the child itself asks for no proof
        )
    except OSError:
        return []
    found, begun, how = [], False, f"no answer within {SECONDS:.0f} s"
    lasting = True
    try:
        with suppress(OSError):
            child.stdin.write(job)
            child.stdin.close()
        for line in _lines(child.stdout):
            if begun:
                found.append(json.loads(line))
            begun = begun or line == _BEGUN  # what is printed before it, while packages are imported, is no answer
            if len(found) == len(places):
                return found
        child.wait(SECONDS)
        how, lasting = _end(child.returncode)
    except (TimeoutError, subprocess.TimeoutExpired):
        pass
    finally:
        child.kill()
        child.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
    if not begun or (found and found[-1] is not None and found[-1]["lasting"]):  # no more of it were expected
        return found
    return [*found, {"passed": False, "detail": how, "measured": False, "lasting": lasting}]


def _end(status: int) -> tuple[str, bool]:
    """What a child's end says of the check that it was at, and whether the kernel did it: others send signals, too."""
    if status >= 0:
        return f"the process that checked it ended with status {status}", False
    known = {one.value: one.name for one in signal.Signals}
    name = known.get(-status, f"signal {-status}")
    return f"{name} ended the process that checked it", name in _ITS_OWN_DOING


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Every line, until the other end is closed; TimeoutError when it is silent for too long."""
    poll, held, seconds = select.poll(), b"", BEGIN_SECONDS
    poll.register(stream, select.POLLIN)
    while True:
        silent = 0.0
        while b"\n" not in held:
            # By turns, not by the clock, which goes on while this process and the child are stopped or frozen together.
            if not poll.poll(1000 * _TURN):
                silent += _TURN
                if silent >= seconds:
                    raise TimeoutError
                continue
            more = os.read(stream.fileno(), 1 << 16)
            if not more:
                return
            held += more
        line, _, held = held.partition(b"\n")
        yield line
        seconds = SECONDS if line == _BEGUN else seconds
