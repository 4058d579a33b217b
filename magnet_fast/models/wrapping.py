"""Weights out of whatever they were wrapped in: dictionaries of a training script, prefixes of what trained them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magnet_fast.inert import PickledArray, StandIn, key_text, printable, type_name

WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "weights", "params")
"""Entries under which training scripts keep a model's weights, the first one with tensors in it is taken."""

AVERAGED = ("model_ema", "ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "state_dict_ema", "params_ema")
"""Entries of averaged weights: taken where there are no others."""

SAVE_WEIGHTS = "torch.save({'model': model.state_dict()}, PATH)"
"""What makes a file of weights alone, for messages."""

# Kept beside the weights, and full of tensors.
_BESIDE = ("optim", "sched", "scaler", "criterion", "loss", "rng", "queue", "teacher", "discriminator")

# Segments of a name that come from what a model was wrapped in: DDP, torch.compile, FSDP, activation checkpointing,
# Fabric.
_WRAPS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel, a tensor beside the weights
_DEPTH = 8


def unwrap(contents: Mapping[str, Any], what: str, beside: Iterable[str] = ()) -> dict[str, Tensor]:
    """The state dict in a checkpoint's contents, under plain names.

    Entries of `WRAPPERS` are opened, also within each other; the model's own weights go before averaged ones, of which
    a warning tells. NumPy arrays become tensors. What DDP, FSDP and torch.compile add to names is taken off, in any
    place; what all of them begin with (Lightning's "model.") is left to `without_shared_prefix`.

    Args:
        contents: a state dict, or dictionaries with one somewhere inside.
        what: they are called, in errors.
        beside: further state dicts that may stand beside the model's; their names get that of the entry, and a dot.

    Raises:
        ValueError: no tensors, an entry among them that was not read, two entries of one name, or tensors without
            values.
    """
    level, place, parts = contents, "", {}
    for _ in range(_DEPTH):
        key = _wrapper(level)
        if key not in (*WRAPPERS, *AVERAGED):
            _refuse_whole(level, what)
        if key is None:
            break
        place = f"{place}/{key_text(key)}" if place else key_text(key)
        parts |= {name: level[name] for name in beside if isinstance(level.get(name), Mapping)}
        level = level[key]
    if not set(AVERAGED).isdisjoint(place.split("/")):
        warnings.warn(f"{what} holds averaged weights alone ({place!r}): they are taken", stacklevel=3)
    found = _tensors(level, what, place)
    if not found:
        raise ValueError(_without_weights(contents, what))
    for name, inner in parts.items():
        tensors = without_shared_prefix(_tensors(inner, what, name))
        found |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return found


def plain_name(name: str) -> str:
    """A name without what DDP, FSDP, torch.compile and activation checkpointing add, wherever it stands."""
    return ".".join(part for part in name.split(".") if part not in _WRAPS)


def listed(names: Iterable[str]) -> str:
    """The first three names and how many more there are, for a message."""
    names = list(names)
    return ", ".join(map(printable, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def part_of(state: Mapping[str, Tensor], entry: str) -> dict[str, Tensor]:
    """What a larger model's weights hold of the part that has such an entry: "backbone.patch_embed.…", for one."""
    if entry in state:
        return dict(state)
    prefix = next((name.removesuffix(entry) for name in state if name.endswith(f".{entry}")), "")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def without_shared_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the parts that all of them begin with; a name's last two parts stay."""
    state = dict(state)
    while len({name.partition(".")[0] for name in state}) == 1 and len(state) > 1:
        if any(name.count(".") < 2 for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state


def _wrapper(level: Mapping[str, Any]) -> str | None:
    """The entry of a level that leads to the weights; None where they are there, or nowhere."""
    for key in (*WRAPPERS, *AVERAGED):
        if isinstance(level.get(key), Mapping) and _holds_tensors(level[key]):
            return key
    if any(_is_tensor(value) for value in level.values()):
        return None
    inner = [
        key
        for key, value in level.items()
        if isinstance(value, Mapping) and not _is_beside(key) and _holds_tensors(value)
    ]
    return inner[0] if len(inner) == 1 else None


def _is_beside(key: Any) -> bool:
    return any(word in key_text(key).lower() for word in _BESIDE)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | PickledArray | np.ndarray)


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    waiting, seen = [value], set()
    while waiting:
        level = waiting.pop()
        if id(level) in seen:
            continue
        seen.add(id(level))
        if any(map(_is_tensor, level.values())):
            return True
        waiting += [item for item in level.values() if isinstance(item, Mapping)]
    return False


def _tensors(level: Mapping[str, Any], what: str, place: str) -> dict[str, Tensor]:
    """The tensors of one level, or of the parts that it keeps apart, under plain names."""
    found: dict[str, Tensor] = {}
    for name, value in _leaves(level, what):
        if not isinstance(name, str):
            if _is_tensor(value):
                under = f" under {place!r}" if place else ""
                raise ValueError(
                    f"{what} holds a tensor{under} whose name is of type {type_name(name)}; expected names as text: "
                    f"{SAVE_WEIGHTS}"
                )
            continue
        where = printable(f"{place}/{name}" if place else name)
        if isinstance(value, StandIn):
            raise ValueError(
                f"{what} holds {type_name(value)} under {where!r}, not a tensor of weights; where that class is at "
                f"hand, save the model's whole state dict: {SAVE_WEIGHTS}"
            )
        if not _is_tensor(value):
            continue  # numbers and text beside the weights
        plain = plain_name(name)
        if plain in _COUNTERS:
            continue
        if plain in found:
            raise ValueError(f"{what} holds {printable(plain)!r} twice, once as {where!r}: the weights of two models?")
        found[plain] = _as_tensor(value, what, where)
    return found


_MOST_ENTRIES = 1_000_000
"""Of all parts together: a few megabytes may name one part a hundred thousand times."""


def _leaves(level: Mapping[Any, Any], what: str, depth: int = 1) -> Iterable[tuple[Any, Any]]:
    if any(map(_is_tensor, level.values())):
        yield from level.items()
    elif depth:
        parts = [(part, one) for part, one in level.items() if isinstance(one, Mapping) and not _is_beside(part)]
        if sum(len(one) for _, one in parts) > _MOST_ENTRIES:
            raise ValueError(f"{what} holds parts of over {_MOST_ENTRIES} entries: no model has so many weights")
        for part, inner in parts:
            leaves = _leaves(inner, what, depth - 1)
            yield from ((f"{key_text(part)}.{key_text(name)}", value) for name, value in leaves)


def _as_tensor(value: Any, what: str, where: str) -> Tensor:
    try:
        if isinstance(value, PickledArray):
            value = value.array()
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} holds a NumPy array under {where!r} that is no tensor: {error}") from error
    if value.layout is not torch.strided:
        raise ValueError(f"{what} holds {where!r} as a sparse tensor; save it dense: tensor.to_dense()")
    if value.is_meta:
        raise ValueError(
            f"{what} holds {where!r} on the meta device, a shape without values: load the model before it is saved"
        )
    return value.detach()


def _refuse_whole(level: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError where a model lies as an object in place of its weights."""
    for key in WRAPPERS:
        if isinstance(level.get(key), StandIn):
            raise ValueError(
                f"{what} cannot be read safely: under {key!r} it holds a whole {type_name(level[key])} as an object, "
                f"which is code as well; where its class is at hand, save its weights alone: {SAVE_WEIGHTS}"
            )


def _without_weights(contents: Mapping[str, Any], what: str) -> str:
    if not contents:
        return f"{what} is an empty dictionary; expected one of weights"
    entries = [f"{printable(key_text(key))!r} ({type_name(value)})" for key, value in contents.items()]
    listed = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
    return f"{what} holds no weights, but {listed}; expected a state dict: {SAVE_WEIGHTS}"
