"""How many cores this process may use: its affinity, and the limit of the container that it runs in.

PyTorch starts a thread for each core that it may be put on. A container's limit (`docker run --cpus 2`, a pod's
`limits.cpu`) is another thing, a share of time: 64 threads that share two cores' time are stopped together for most of
each tenth of a second, and a small model that takes milliseconds then takes seconds.
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def allowed_cores(root: Path = Path("/")) -> int:
    """Cores of the process's affinity, or as many as the time of its control groups amounts to, where that is less.

    Args:
        root: of the files of Linux that tell it. Elsewhere it is the machine's cores.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(limit) for limit in _limits(root))]))


def _limits(root: Path) -> list[float]:
    """In cores, of every control group that the process is in, those above included."""
    mounted, found = root / "sys/fs/cgroup", []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":  # version 2
            folders, read = [mounted, mounted / "unified"], _limit
        elif "cpu" in controllers.split(","):
            folders, read = [mounted / controllers, mounted / "cpu"], _limit_of_version_1
        else:
            continue
        # Within a container the path may be the host's, while its own group is what is mounted.
        groups = [PurePosixPath(path), *PurePosixPath(path).parents]
        found += [read(folder / str(group).lstrip("/")) for folder in folders for group in groups]
    return [limit for limit in found if limit is not None]


def _limit(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _limit_of_version_1(group: Path) -> float | None:
    return _ratio(_text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """None where there is no limit: "max", -1, or no such file."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) > 0 else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
