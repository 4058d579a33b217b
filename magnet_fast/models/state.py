"""State dicts, loaded strictly: every weight has its place, and every place its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from magnet_fast.models.wrapping import listed, plain_name, printable, without_shared_prefix

_DERIVED = (
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "position_ids",
    "token_type_ids",
    "num_batches_tracked",
)


def is_derived(name: str) -> bool:
    """Whether an entry follows from a model's sizes, or is read by nothing: files have or lack it by version."""
    return name.rpartition(".")[2] in _DERIVED


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load all of `state`, in the model's dtype, or raise a ValueError that names the first differences.

    Names may have what DDP, FSDP and torch.compile add, in the state or in the model, and all of them one more prefix;
    what `is_derived` may be absent or too many.
    """
    expected = model.state_dict()
    places = {plain_name(name): name for name in expected}
    state = {places.get(plain_name(name), name): tensor for name, tensor in state.items()}
    if expected.keys().isdisjoint(state):
        state = {places.get(name, name): tensor for name, tensor in without_shared_prefix(state).items()}
    missing = sorted(name for name in expected.keys() - state.keys() if not is_derived(name))
    unexpected = sorted(name for name in state.keys() - expected.keys() if not is_derived(name))
    both = sorted(expected.keys() & state.keys())
    both = [name for name in both if not is_derived(name) or expected[name].shape == state[name].shape]
    wrong = [name for name in both if expected[name].shape != state[name].shape]
    kinds = [
        name  # averaging makes fractions of counters, which nothing reads
        for name in both
        if expected[name].is_floating_point() != state[name].is_floating_point() and not is_derived(name)
    ]
    problems = [
        f"{len(names)} {kind} ({listed(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if wrong:
        first = wrong[0]
        shapes = f"{tuple(state[first].shape)}, expected {tuple(expected[first].shape)}"
        problems.append(f"{len(wrong)} of another shape ({first}: {shapes})")
    if kinds:
        first = kinds[0]
        problems.append(f"{len(kinds)} of another kind of number ({first}: {state[first].dtype}; quantised?)")
    if problems:
        likely = _likely(model, missing, unexpected, wrong)
        raise ValueError(f"{what} does not fit {type(model).__name__}: {'; '.join(problems)}{likely}")
    kept = {**expected, **{name: state[name] for name in both}}
    model.load_state_dict(kept)


def check_complete(report: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError where transformers left weights random, as its loading report says."""
    missing = sorted(name for name in report["missing_keys"] if not is_derived(name))
    if missing:
        raise ValueError(
            f"{what} lack {len(missing)} of the encoder's ({listed(missing)}): "
            "they are of another model, or under other names"
        )


def unreachable(role: str, name: str, error: Exception) -> ValueError:
    """What to say where published weights cannot be had."""
    reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
    return ValueError(
        f"pretrained {role} weights {name!r} could not be loaded: {reason}; neither network nor cache has them, or "
        f"the name is wrong: give a local path (pretrained={{'{role}': PATH}}) or build with pretrained=False"
    )


def _likely(model: nn.Module, missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    """The likely reason of differences, where one can be told."""
    places = {plain_name(name) for name in model.state_dict()}
    for name in unexpected[:1]:
        tail = next((name[i + 1 :] for i, c in enumerate(name) if c == "." and name[i + 1 :] in places), None)
        if tail is not None:
            return f"; its names begin with {printable(name.removesuffix(tail))!r}, take that off"
    if wrong and not missing and not unexpected:
        return "; these are weights of a model of another size"
    if len(missing) == len(places):
        return "; these are weights of another model"
    return ""
