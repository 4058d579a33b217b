"""`python -m tests.fuzz TARGET|all COUNT [SEED] [--out FILE]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from magnet_fast.evaluation.machine import measured_on
from tests.fuzz import TARGETS, target_class
from tests.fuzz.running import run


def main(arguments: list[str] | None = None) -> int:
    """Run one target or all; 1 where there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("count", type=float, help="inputs; below 1, or with `all`, a share of each target's long count")
    parser.add_argument("seed", type=int, nargs="?", default=None, help="the time if left out")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path, help="a JSON of counts, findings and the machine; targets are added to it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seed = int(time.time()) if given.seed is None else given.seed
    failed = False
    for name in TARGETS if given.target == "all" else (given.target,):
        target = target_class(name)
        shared = given.target == "all" or given.count < 1
        count = max(1, round(given.count * target.long)) if shared else int(given.count)
        report = run(name, target, count, seed, given.first)
        summary = {"seed": seed, **report.summary()}
        print(json.dumps({name: summary}))
        for kind, found in report.findings.items():
            failed = True
            print(
                f"FINDING {name}: {kind}, {found['count']} times: {found['told']}\n"
                f"  again: python -m tests.fuzz {name} 1 {seed} --first {found['input']}",
                file=sys.stderr,
            )
        if given.out is not None:
            _add(given.out, name, summary)
    return int(failed)


def _add(path: Path, name: str, summary: dict) -> None:
    content = json.loads(path.read_text()) if path.exists() else {"targets": {}}
    content["machine"] = measured_on()
    content["targets"][name] = summary
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
