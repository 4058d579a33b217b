"""The process in which kernels are checked (`_proof_apart`): questions on stdin, a line of JSON an answer on stdout."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

import torch

from magnet_fast.ops import _proof


def main() -> None:
    """Answer until the questions end, or the device no longer works."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever else is printed is no answer
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _answer(json.load(sys.stdin), lambda entry: print(json.dumps(entry), file=answers, flush=True))
    os._exit(0)  # what a broken device would raise at the end is nobody's business


def _answer(job: dict[str, Any], say: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = job["tf32"]
    places = [tuple(place) for place in job["places"]]
    if [_proof.key_of(place) for place in places] != job["keys"]:
        return  # another device or another version than the one that is asked about
    if not all(works(torch.device(device)) for device in {place[3] for place in places}):
        return  # there is no memory for this process beside the one that asks, say: that is no kernel's doing
    say("begun")
    for place in places:
        operator, name, dtype, device = place
        signal.alarm(int(2 * job["seconds"]) + 1)  # should nobody be left to end a check that hangs
        verdict = _proof.check(operator, name, getattr(torch, dtype), device)
        if verdict.measured:
            say(verdict._asdict())
        elif works(torch.device(device)):
            say(None)  # memory, say, that was full: in the process that asks it may be there
        else:
            say(verdict._replace(lasting=True)._asdict())
            return


def works(device: torch.device) -> bool:
    """Whether a device can still be used after an error."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True
