"""What a figure was measured on, for files of results."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch


def measured_on() -> dict[str, Any]:
    """Date, processor, threads of this process, GPU and PyTorch."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The name that the processor gives itself."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
