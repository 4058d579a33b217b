"""PyTorch's loader, whatever the default device."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from magnet_fast.devices import on_cpu


class Loader(DataLoader):
    """A DataLoader that draws its seed, and starts its processes, with the CPU as the default device: PyTorch's own
    fails where that is another one than its generator's."""

    def __iter__(self) -> Any:
        with on_cpu():
            return super().__iter__()
