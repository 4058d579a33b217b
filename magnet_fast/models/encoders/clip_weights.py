"""CLIP's published weights, from a state dict in a file: its own names, which open_clip keeps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from magnet_fast.models.files import read_contents
from magnet_fast.models.released import rename
from magnet_fast.models.state import load_strictly
from magnet_fast.models.wrapping import unwrap, without_shared_prefix

_EXAMPLES = {"image": "visual.conv1.weight", "text": "transformer.resblocks.0.ln_1.weight"}
_ROOTS = {"image": r"visual\.", "text": r"(?:text\.)?"}


def load_clip(encoder: nn.Module, source: str | None, role: str, names: Callable[[str], list[tuple[str, str]]]) -> None:
    """Load one side of a CLIP into an encoder; what CLIP does not have stays as it is.

    Args:
        encoder: ours.
        source: path of a state dict (.safetensors, or .pth and .bin of `torch.save`). OpenAI's own RN50.pt is a
            TorchScript archive, which runs code when it is read: save its `state_dict()` first.
        role: "image" or "text".
        names: from a prefix to pairs of CLIP's name and ours.

    Raises:
        ValueError: no source, or a file that holds no CLIP of this size.
    """
    if source is None or not Path(source).is_file():
        given = "none was given" if source is None else f"{source!r} is no file"
        raise ValueError(
            f"pretrained {role} weights: CLIP's are read from a state dict in a file, and {given}; name it by "
            f"pretrained={{'{role}': PATH}}, or build with pretrained=False"
        )
    rules = [(re.compile(old), new) for old, new in names(_ROOTS[role])]
    what = f"pretrained {role} weights {source!r}"
    found = without_shared_prefix(unwrap(read_contents(source), what))
    known = {name: value for name, value in found.items() if any(pattern.fullmatch(name) for pattern, _ in rules)}
    if not known:
        raise ValueError(f"{what} hold no {role} encoder of CLIP's: expected names such as {_EXAMPLES[role]}")
    kept: dict[str, Tensor] = {
        name: value for name, value in encoder.state_dict().items() if name.startswith("pool.connect.")
    }
    load_strictly(encoder, {**kept, **rename(known, rules, what, "CLIP")}, what)
