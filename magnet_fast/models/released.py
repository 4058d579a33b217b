"""Files that the systems' authors released: recognised by their names, sizes read off the shapes, loaded strictly."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.registry import from_config, parse_config, systems
from magnet_fast.models.state import load_strictly, read_checkpoint

Rule = tuple[re.Pattern[str], str]


@dataclass(frozen=True)
class Released:
    """How one system's released files are read.

    Attributes:
        mark: prefix of names that only this system's files have.
        config: state dict and hints to the configuration's parts.
        rules: released name -> ours, the first pattern that matches the whole name.
        dropped: names that no forward pass reads, or a function of state dict and hints that gives them.
        hints: what shapes do not tell and a caller may say.
    """

    mark: str
    config: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]]
    rules: list[Rule]
    dropped: re.Pattern[str] | Callable[[Mapping[str, Tensor], Mapping[str, Any]], re.Pattern[str]]
    hints: tuple[str, ...]

    def unread(self, state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> set[str]:
        """Names in a state dict that are dropped."""
        pattern = self.dropped if isinstance(self.dropped, re.Pattern) else self.dropped(state, hints)
        return {name for name in state if pattern.fullmatch(name)}


def from_released(source: str | os.PathLike[str] | Mapping[str, Any], **hints: Any) -> ReferringModel:
    """Build the model of a file that a system's authors released, in evaluation mode, computing as released.

    Args:
        source: a `.pth` file saved by the released code, or its contents: {"model": …} or the flat state dict, for LAVT
            with "bert_model" beside "model". Every size is read off the tensors' shapes.
        **hints: what shapes do not tell: `fusion_heads`, attention heads of the stages' PWAM (1 in all published
            files); `masking` ("released" unless said).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint, a name that this system's files do not have, a parameter that is missing, or
            a hint that it does not know. Files are read with `weights_only=True`; nothing else in them is run.
    """
    contents = source if isinstance(source, Mapping) else read_checkpoint(source)
    state = _flatten(contents)
    known = [system for system in systems() if system.released is not None]
    found = next((s for s in known if any(name.startswith(s.released.mark) for name in state)), None)
    if found is None:
        some = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(f"not a released checkpoint of {' or '.join(s.name for s in known)}: it holds {some}")
    released = found.released
    unknown = sorted(set(hints) - set(released.hints))
    if unknown:
        raise ValueError(f"{unknown[0]}: not a hint for a released {found.name}; known: {', '.join(released.hints)}")
    unread = released.unread(state, hints)
    kept = {name: tensor for name, tensor in state.items() if name not in unread}
    model = from_config(parse_config({"architecture": found.name, **released.config(kept, hints)}))
    renamed = rename(kept, released.rules, found.name)
    load_strictly(model, _as_linears(renamed, model), "the released checkpoint")
    return model.eval()


def dropped_names(source: Mapping[str, Any]) -> list[str]:
    """Names in a released file's contents that `from_released` leaves out, since no forward pass reads them."""
    state = _flatten(source)
    known = [system.released for system in systems() if system.released is not None]
    return sorted(set().union(*(released.unread(state, {}) for released in known)))


# ---- for the systems ----

_PWAM = {
    r"vis_project\.0": "vision",
    r"image_lang_att\.f_query\.0": "query",
    r"image_lang_att\.f_query\.1": "query_norm",
    r"image_lang_att\.f_key\.0": "key",
    r"image_lang_att\.f_value\.0": "value",
    r"image_lang_att\.W\.0": "output",
    r"image_lang_att\.W\.1": "output_norm",
    r"project_mm\.0": "mix",
}
_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)"
SWIN = [
    (r"patch_embed\.(.*)", r"image_encoder.patch_embed.\1"),
    (rf"{_BLOCK}\.attn\.relative_position_bias_table", r"image_encoder.stages.\1.blocks.\2.attention.bias_table"),
    (rf"{_BLOCK}\.attn\.(.*)", r"image_encoder.stages.\1.blocks.\2.attention.\3"),
    (rf"{_BLOCK}\.(.*)", r"image_encoder.stages.\1.blocks.\2.\3"),
    (r"layers\.(\d+)\.downsample\.(.*)", r"image_encoder.stages.\1.downsample.\2"),
]
"""Names of Swin in released files, after their prefix."""


def pwam_rules(old: str, new: str) -> list[tuple[str, str]]:
    """Pairs for the Linears and norms of one PWAM."""
    last = re.compile(old).groups + 1
    return [(rf"{old}\.{released}\.(weight|bias)", rf"{new}.{ours}.\{last}") for released, ours in _PWAM.items()]


LAVT_STAGES = [
    *pwam_rules(r"layers\.(\d+)\.fusion", r"fusion.stages.\1.fusion"),
    (r"layers\.(\d+)\.res_gate\.0\.(.*)", r"fusion.stages.\1.gate.first.\2"),
    (r"layers\.(\d+)\.res_gate\.2\.(.*)", r"fusion.stages.\1.gate.last.\2"),
    (r"norm(\d)\.(.*)", r"fusion.stages.\1.norm.\2"),
]
"""Names of LAVT's fusion in released files, after their prefix."""

BERT = [(r"(embeddings|encoder)\.(.*)", r"text_encoder.bert.\1.\2")]
"""Names of BERT in released files, after their prefix."""


def rules(prefix: str, pairs: list[tuple[str, str]]) -> list[Rule]:
    """Pairs of (released name after a prefix, our name) as rules."""
    return [(re.compile(prefix + old), new) for old, new in pairs]


def shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of an entry; ValueError where a released file should have it and does not."""
    if name not in state:
        raise ValueError(f"the checkpoint lacks {name!r}, which the released models have")
    return tuple(state[name].shape)


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds."""
    indices = [int(m.group(1)) for name in state if (m := re.match(pattern, name))]
    return 1 + max(indices, default=-1)


def swin_sizes(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The image part of a configuration."""
    tables = [shape(state, f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(4)]
    return {
        "kind": "swin",
        "embed_dim": shape(state, f"{prefix}patch_embed.proj.weight")[0],
        "depths": tuple(count(state, rf"{re.escape(prefix)}layers\.{i}\.blocks\.(\d+)\.") for i in range(4)),
        "num_heads": tuple(table[1] for table in tables),
        "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,
    }


def bert_sizes(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The text part of a configuration."""
    vocab_size, hidden_size = shape(state, f"{prefix}embeddings.word_embeddings.weight")
    return {
        "kind": "bert",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": count(state, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\."),
        "num_heads": max(1, hidden_size // 64),  # every published BERT has heads of 64 channels
        "intermediate_size": shape(state, f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        "max_positions": shape(state, f"{prefix}embeddings.position_embeddings.weight")[0],
    }


def _flatten(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    state = dict(contents.get("model", contents))
    for name, tensor in contents.get("bert_model", {}).items():
        state[f"bert_model.{name}"] = tensor
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def rename(state: Mapping[str, Tensor], known: list[Rule], system: str) -> dict[str, Tensor]:
    """Released names to ours; ValueError for one that no rule knows."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, new in known:
            match = pattern.fullmatch(name)
            if match:
                target = match.expand(new)
                break
        else:
            raise ValueError(f"the checkpoint holds {name!r}, which no released {system} has")
        if ".in_proj_" in target:  # torch.nn.MultiheadAttention stacks query, key and value
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[target.replace("in_proj_", f"{part}.")] = third
        else:
            renamed[target] = tensor
    return renamed


def _as_linears(state: dict[str, Tensor], model: ReferringModel) -> dict[str, Tensor]:
    """Convolutions of size 1 as the Linears that some are here."""
    matrices = {name for name, value in model.state_dict().items() if value.ndim == 2}
    return {
        name: value.flatten(1) if name in matrices and value.shape[2:].numel() == 1 else value
        for name, value in state.items()
    }
