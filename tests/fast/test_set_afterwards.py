"""What a user sets on a module after `accelerate` counts as in the plain model: numbers, switches, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from magnet_fast.fast._replacement import upstream_class

from ..models.cases import SMALL
from . import own, zoo

# What says again how large something is: read by one of the two ways alone, and wrong only by itself.
DERIVED = ("window_area", "all_head_size", "in_features", "out_features")
Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], list[Tensor]]]


def of_zoo(name: str) -> Case:
    family = zoo.FAMILIES[name]
    inputs = family.inputs(zoo.EVEN)
    return lambda: family.model().eval(), lambda model: zoo.call(model, inputs)


def of_ours(name: str) -> Case:
    image = own.values(2, 3, 36, 44).float()
    return lambda: own.model(f"{name}_tiny", **SMALL[name][1]), lambda model: own.outputs(model, image)


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """Plain and accelerated, with attention that is far from even."""
    models = case[0](), case[0]()
    sharp = ("qkv.weight", "query.weight", "key.weight", "q_proj.weight", "k_proj.weight", "rel_pos", "bias_table")
    for model in models:
        for name, parameter in model.named_parameters():
            if any(part in name for part in sharp):
                parameter.data *= 8
    assert magnet_fast.accelerate(models[1]).replaced
    return models


def others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, 0 if value else 2]
    if isinstance(value, float):
        return [value / 2 or 0.3]
    if isinstance(value, (tuple, list)) and value and all(type(one) is int for one in value):
        return [type(value)(0 for _ in value)]
    if isinstance(value, Tensor) and value.numel() > 1:
        return [value.flip(0).contiguous()]
    return []


def settings(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Each public attribute of each kind of replaced module and of its parts, once: module, attribute, other value."""
    seen = set()
    for root, module in model.named_modules():
        if upstream_class(module) is None:
            continue
        for path, part in module.named_modules(prefix=root):
            for name, value in {**vars(part), **part._buffers}.items():
                key = type(module), path.removeprefix(root), name
                if name.startswith("_") or name in (*vars(nn.Module()), *DERIVED) or key in seen:
                    continue
                seen.add(key)
                yield from ((path, name, other) for other in others(value))


def compare(case: Case, plain: nn.Module, fast: nn.Module, path: str, name: str, value: Any) -> bool:
    """Whether the plain model takes the value; both answer alike then."""
    parts = [model.get_submodule(path) for model in (plain, fast)]
    before = [getattr(part, name) for part in parts]
    for part in parts:
        setattr(part, name, value)
    try:
        with torch.no_grad():
            try:
                expected = case[1](plain)
            except Exception:  # whatever it says of a value that does not fit
                return False
            found = case[1](fast)
    finally:
        for part, old in zip(parts, before, strict=True):
            setattr(part, name, old)
    for ours, theirs in zip(found, expected, strict=True):
        atol = 2e-3 * float(theirs.abs().max()) + 1e-5
        where = f"{path}.{name} = {value if not isinstance(value, Tensor) else 'flipped'}"
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=atol, msg=lambda text, where=where: f"{where}: {text}")
    return True


@pytest.mark.parametrize(("name", "least"), [("SAM", 8), ("timm SAM", 8), ("SegGPT", 2)])
def test_whatever_is_set(name: str, least: int) -> None:
    """SegGPT's one replaced module, its attention, has but two attributes whose other values it takes."""
    case = of_zoo(name)
    plain, fast = pair(case)
    taken = [one[1] for one in settings(fast) if compare(case, plain, fast, *one)]
    assert len(taken) >= least
    assert {"scale", "use_relative_position_embeddings" if name == "SegGPT" else "use_rel_pos"} <= set(taken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "CLAP", "RT-DETR v2"])
def test_whatever_is_set_on_others(name: str) -> None:
    case = of_zoo(name)
    plain, fast = pair(case)
    assert sum(compare(case, plain, fast, *one) for one in settings(fast)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cris", "risam"])
def test_whatever_is_set_on_ours(name: str) -> None:
    case = of_ours(name)
    plain, fast = pair(case)
    assert sum(compare(case, plain, fast, *one) for one in settings(fast)) >= 2


@pytest.mark.parametrize(
    ("name", "path", "attribute", "value"),
    [
        ("SAM", "layers.0.attn", "use_rel_pos", lambda old: False),
        ("timm SAM", "blocks.1.attn", "use_rel_pos", lambda old: False),
        ("timm", "layers.0.blocks.1", "attn_mask", lambda old: None),
        ("timm", "layers.0.blocks.1", "shift_size", lambda old: (1, 1)),
        ("timm", "layers.0.blocks.0.attn", "relative_position_index", lambda old: old.flip(0)),
        ("torchvision", "features.1.0.attn", "relative_position_index", lambda old: old.flip(0)),
        ("RT-DETR v2", "model.decoder.layers.0.encoder_attn", "n_points_scale", lambda old: 3 * old),
        ("RT-DETR v2", "model.decoder.layers.0.encoder_attn", "method", lambda old: "discrete"),
    ],
)
def test_each_of_these_changes_the_answer(name: str, path: str, attribute: str, value: Callable[[Any], Any]) -> None:
    """So that what is compared above is not blind to them. Setting it back brings the fast way back."""
    case = of_zoo(name)
    plain, fast = pair(case)
    with torch.no_grad():
        before = case[1](fast)
        old = getattr(fast.get_submodule(path), attribute)
        assert compare(case, plain, fast, path, attribute, value(old))
        again = case[1](fast)
        setattr(fast.get_submodule(path), attribute, value(old))
        changed = case[1](fast)
    assert all(map(torch.equal, before, again))
    assert max(float((one - other).abs().max()) for one, other in zip(before, changed, strict=True)) > 1e-3


def test_a_buffer_written_in_place_is_seen() -> None:
    case = of_zoo("timm")
    plain, fast = pair(case)
    with torch.no_grad():
        case[1](fast)
        for model in (plain, fast):
            attention = model.layers[0].blocks[0].attn
            attention.relative_position_index.copy_(attention.relative_position_index.flip(0))
        for ours, theirs in zip(case[1](fast), case[1](plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
