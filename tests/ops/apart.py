"""A child of `_proof_apart` whose Triton kernel is a stand-in that does to its process what `DEEDS` says, by dtype."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from magnet_fast.ops import _proof_child, _registry

DEEDS = "MAGNET_FAST_TEST_DEEDS"
REACHED = "MAGNET_FAST_TEST_REACHED"
"""Where it is set: a file that is made when a kernel hangs."""
OPERATOR = "window_attention"


def deed(name: str, out: Any) -> Any:
    """What the forward pass gives."""
    if name == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name in ("hang", "slow"):
        if REACHED in os.environ:
            Path(os.environ[REACHED]).touch()
        time.sleep(60 if name == "hang" else 0.5)
    elif name == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    elif name == "exit":
        os._exit(7)
    elif name == "prints":
        print("a kernel that prints")
        os.system("echo so does what it starts")
    elif name == "asserts":  # on a GPU, which this process cannot use any more
        out[torch.tensor([10**6], device=out.device)].sum().item()
    elif name in ("raises", "breaks", "full"):
        raise RuntimeError(f"what {name}")
    return 2 * out if name == "wrong" else out


def main() -> None:
    """As `_proof_child.main`."""
    print("something that a package says while it is imported", flush=True)
    deeds = json.loads(os.environ[DEEDS])
    item = _registry.implementation(OPERATOR, "triton" if "asserts" in deeds.values() else "cpu")

    def forward(*arguments: Any) -> Any:
        name = deeds[str(arguments[0].dtype).removeprefix("torch.")]
        if name == "breaks":
            _proof_child.works = lambda device: False
        return deed(name, item.forward(*arguments))

    free = {"supports": lambda *arguments: None, "passed_over": lambda *arguments: None, "missing": None}
    _registry._implementations[OPERATOR, "triton"] = replace(item, forward=forward, **free)
    if "full" in deeds.values():  # a GPU without memory for another process, or that takes no other
        _proof_child.works = lambda device: False
    if "absent" in deeds.values():
        sys.exit(3)
    _proof_child.main()
