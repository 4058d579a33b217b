"""Files that the systems' authors released: recognised by their names, sizes read off the shapes, loaded strictly."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from magnet_fast.devices import on_cpu
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.bounded import build_for
from magnet_fast.models.files import is_safetensors, read_contents, safetensors_metadata
from magnet_fast.models.registry import System, systems
from magnet_fast.models.state import is_derived, load_strictly
from magnet_fast.models.wrapping import listed, unwrap, without_shared_prefix

Rule = tuple[re.Pattern[str], str]


@dataclass(frozen=True)
class Released:
    """How one system's released files are read.

    Attributes:
        mark: what a name begins with that only this system's files have.
        config: state dict and hints to the configuration's parts.
        rules: released name -> ours, the first pattern that matches the whole name.
        dropped: names that no forward pass reads, or a function of state dict and hints that gives them.
        hints: what shapes do not tell and a caller may say.
        beside: entries of the file with state dicts of their own; "bert_model" gives names "bert_model.…".
    """

    mark: str
    config: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]]
    rules: list[Rule]
    dropped: re.Pattern[str] | Callable[[Mapping[str, Tensor], Mapping[str, Any]], re.Pattern[str]]
    hints: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def unread(self, state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> set[str]:
        """Names in a state dict that are dropped."""
        pattern = self.dropped if isinstance(self.dropped, re.Pattern) else self.dropped(state, hints)
        return {name for name in state if pattern.fullmatch(name)}


@on_cpu()
def from_released(source: str | os.PathLike[str] | Mapping[str, Any], **hints: Any) -> ReferringModel:
    """Build the model of a file that a system's authors released, in evaluation mode, computing as released.

    The file may be of torch.save or of safetensors, and its state dict wrapped as `wrapping.unwrap` tells: the model's
    own weights are taken before averaged ones (`from_released(torch.load(…)["ema"])` takes those). Weights of less
    precision become float32. What no forward pass reads is left out; the logger "magnet_fast" says how much (INFO) and
    which (DEBUG).

    Args:
        source: a file saved by the released code, or its contents: {"model": …} or the flat state dict, for LAVT with
            "bert_model" beside "model", or with BERT as "text_encoder" in it. Every size is read off the tensors'
            shapes.
        **hints: what shapes do not tell: `fusion_heads`, attention heads of the stages' PWAM (1 in all published
            files); `masking` ("released" unless said).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint, a name that this system's files do not have, a parameter that is missing, or
            a hint that it does not know. Nothing in a file is run.
    """
    contents = source if isinstance(source, Mapping) else _read(source)
    what = "the released checkpoint" if isinstance(source, Mapping) else f"checkpoint {os.fspath(source)!r}"
    found, state = _recognised(unwrap(contents, what, _beside()), what)
    released = found.released
    unknown = sorted(set(hints) - set(released.hints))
    if unknown:
        raise ValueError(f"{unknown[0]}: not a hint for a released {found.name}; known: {', '.join(released.hints)}")
    unread = released.unread(state, hints)
    kept = {name: tensor for name, tensor in state.items() if name not in unread}
    if unread:
        _log.info("%s: left out %d of %d entries, which no forward pass reads", what, len(unread), len(state))
        _log.debug("%s: left out %s", what, ", ".join(sorted(unread)))
    try:
        config = {"architecture": found.name, **released.config(kept, hints)}
    except KeyError as error:  # of `shape`
        raise ValueError(f"{what} lacks {error}, which the released models have") from error
    except (IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"{what} holds tensors of shapes that no released {found.name} has ({error}): its sizes are not known"
        ) from error
    renamed = rename(kept, released.rules, what, found.name)
    model = build_for(config, kept, what)
    load_strictly(model, _as_linears(renamed, model), what)
    return model.eval()


def dropped_names(source: Mapping[str, Any]) -> list[str]:
    """Names in a released file's contents that `from_released` leaves out, since no forward pass reads them."""
    what = "the released checkpoint"
    found, state = _recognised(unwrap(source, what, _beside()), what)
    return sorted(found.released.unread(state, {}))


_log = logging.getLogger("magnet_fast")


def _known() -> list[System]:
    return [system for system in systems() if system.released is not None]


def _beside() -> list[str]:
    return [name for system in _known() for name in system.released.beside]


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if is_safetensors(path) and safetensors_metadata(path).get("format", "").startswith("magnet_fast."):
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} was written by magnet_fast: checkpoints.load reads it, and models.load "
            "where models.save wrote it"
        )
    return read_contents(path)


def _recognised(state: dict[str, Tensor], what: str) -> tuple[System, dict[str, Tensor]]:
    """The system that has such names, and the state dict without what all of the model's begin with beside that."""
    beside = {name: tensor for name, tensor in state.items() if name.partition(".")[0] in _beside()}
    rest = {name: tensor for name, tensor in state.items() if name not in beside}
    for names in (state, {**without_shared_prefix(rest), **beside}):
        for system in _known():
            if any(name.startswith(system.released.mark) for name in names):
                return system, names
    raise ValueError(_unknown(state, what))


def _unknown(state: Mapping[str, Tensor], what: str) -> str:
    """Why a state dict is no released one: the package's own, or another model's."""
    if {"image_encoder", "text_encoder", "fusion", "head"} <= {name.partition(".")[0] for name in state}:
        return (
            f"{what} holds weights of a model of this package without its configuration; load them into it, "
            "models.create(NAME).load_state_dict(…), and write both by models.save(model, PATH)"
        )
    marks = " or ".join(f"{s.name} (names with {s.released.mark}…)" for s in _known())
    return f"{what} is not a released checkpoint of {marks}: it holds {listed(sorted(state))}"


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
    """The shape of an entry; KeyError where a released file should have it and does not."""
    if name not in state:
        raise KeyError(name)
    return tuple(state[name].shape)


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the pattern's group finds: 0, 1, … in a whole file."""
    return len({m.group(1) for name in state if (m := re.match(pattern, name))})


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


def rename(state: Mapping[str, Tensor], known: list[Rule], what: str, system: str) -> dict[str, Tensor]:
    """Released names to ours; ValueError for those that no rule knows."""
    renamed: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, tensor in state.items():
        for pattern, new in known:
            match = pattern.fullmatch(name)
            if match:
                target = match.expand(new)
                break
        else:
            if not is_derived(name):
                strange.append(name)
            continue
        if ".in_proj_" in target:  # torch.nn.MultiheadAttention stacks query, key and value
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[target.replace("in_proj_", f"{part}.")] = third
        else:
            renamed[target] = tensor
    if strange:
        raise ValueError(f"{what} holds {listed(strange)}, which no released {system} has")
    return renamed


def _as_linears(state: dict[str, Tensor], model: ReferringModel) -> dict[str, Tensor]:
    """Convolutions of size 1 as the Linears that some are here."""
    matrices = {name for name, value in model.state_dict().items() if value.ndim == 2}
    return {
        name: value.flatten(1) if name in matrices and value.ndim > 2 and value.shape[2:].numel() == 1 else value
        for name, value in state.items()
    }
