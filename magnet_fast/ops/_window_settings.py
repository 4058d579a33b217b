"""The settings of window attention, spelled once: schema, reference and kernels take them in this order."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints


class WindowSettings(NamedTuple):
    """What window attention is told beside its tensors; csrc/common/window_settings.h is the same in C++."""

    num_heads: int
    window_h: int
    window_w: int
    shift_h: int
    """0 <= shift < window."""
    shift_w: int
    scale: float
    """Factor of the similarity, above 0."""
    pad_first: bool
    """True pads and then rolls, False rolls and then pads."""


SCHEMA = tuple(f"{kind.__name__} {name}" for name, kind in get_type_hints(WindowSettings).items())
"""As `bind` wants them, e.g. `int num_heads`."""
