"""How many cores a container allows, from the files by which Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from magnet_fast import cores
from magnet_fast.cli import app
from magnet_fast.ops import _proof


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        # Version 2: the group's own file, that of a group above it, and what a container sees of itself.
        ({"proc/self/cgroup": "0::/pod/box", "sys/fs/cgroup/pod/box/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/pod/box", "sys/fs/cgroup/pod/cpu.max": "800000 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/host/box", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 64),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9900000 100000"}, 64),
        # The least counts.
        (
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/cpu.max": "400000 100000",
                "sys/fs/cgroup/pod/box/cpu.max": "600000 100000",
            },
            4,
        ),
        # Version 1, under both names of its folder.
        (
            {
                "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/box\n1:memory:/box\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/elsewhere\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
        # What is no limit is none.
        ({"proc/self/cgroup": "nothing\n0:\n", "sys/fs/cgroup/cpu.max": "many 0"}, 64),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100 0"}, 64),
    ],
)
def test_the_least_of_affinity_and_every_group(files, expected, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores.allowed_cores(tmp_path) == expected


def test_affinity_counts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores.allowed_cores(tmp_path) == 2


def test_where_nothing_tells_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.allowed_cores(tmp_path) == 1


@pytest.mark.parametrize(("threads", "warned"), [(64, True), (2, False)])
def test_doctor_warns_of_more_threads_than_cores(threads: int, warned: bool, monkeypatch) -> None:
    monkeypatch.setattr(cores, "allowed_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(_proof, "BACKENDS", ())  # no kernel is checked here
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert ("64 threads for the time of 2 cores" in done.output) == warned
