"""`python -m tests.fuzz TARGET|all COUNT [SEED] [--workers N] [--out FILE [--resume]]`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from magnet_fast.atomic import write_text_atomically
from magnet_fast.evaluation.machine import measured_on
from tests.fuzz import TARGETS, target_class
from tests.fuzz.running import Report, run


def main(arguments: list[str] | None = None) -> int:
    """Run one target or all; 1 where there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("count", type=float, help="inputs; below 1, or with `all`, a share of each target's long count")
    parser.add_argument("seed", type=int, nargs="?", default=None, help="the time if left out")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--workers", type=int, default=1, help="child processes at once")
    parser.add_argument("--out", type=Path, help="a JSON of counts, findings and the machine; targets are added to it")
    parser.add_argument("--resume", action="store_true", help="go on from --out, with its seeds; stop it as you like")
    parser.add_argument("--name", help="of the target in --out, where it is tried in a way of its own")
    given = parser.parse_args(arguments)
    if given.resume and given.out is None:
        parser.error("--resume: expected with --out")
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return int(any([_tried(name, given) for name in (TARGETS if given.target == "all" else (given.target,))]))
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from what --out holds", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _tried(target_name: str, given: argparse.Namespace) -> bool:
    """Run one target; whether there is a finding."""
    target, name = target_class(target_name), given.name or target_name
    shared = given.target == "all" or given.count < 1
    count = max(1, round(given.count * target.long)) if shared else int(given.count)
    report = Report(target_name, int(time.time()) if given.seed is None else given.seed)
    if given.resume and given.out.exists():
        kept = json.loads(given.out.read_text())["targets"]
        report = Report.of(target_name, kept[name]) if name in kept else report
    known = report.done + sum(end - first for first, end in report.left)
    if known < count:
        report.left.append((given.first + known, given.first + count))
    run(report, target, given.workers, kept=partial(_add, given.out, name))
    print(json.dumps({name: report.summary()}))
    for kind, found in report.findings.items():
        print(
            f"FINDING {name}: {kind}, {found['count']} times: {found['told']}\n"
            f"  again: python -m tests.fuzz {target_name} 1 {report.seed} --first {found['input']}",
            file=sys.stderr,
        )
    return bool(report.findings)


def _add(path: Path | None, name: str, report: Report) -> None:
    """Keep a report; a stop at any moment leaves the file whole."""
    if path is None:
        return
    content = json.loads(path.read_text()) if path.exists() else {"targets": {}}
    content["machine"] = measured_on()
    content["targets"][name] = report.summary()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
