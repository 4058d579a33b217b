"""Classes that research repositories copied from one another, known by their source wherever they stand.

A class is looked at if its bare name is in the table of `_published`, and if its modules have what a class of its kind
has. It is taken if all that a call runs has the fingerprints of one published form (`_source`), and the classes of the
parts that the fused way passes by do as well. What is near and not equal is left alone, with the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from magnet_fast.fast import _copied_deformable, _copied_swin, sam
from magnet_fast.fast._published import PUBLISHED
from magnet_fast.fast._replacement import Replacement, class_path, fused_class, upstream_class
from magnet_fast.fast._source import UnreadableError, fingerprints
from magnet_fast.ops._observed import altered


class _Kind(NamedTuple):
    """What copies of one kind are made of, and how they are replaced.

    Attributes:
        attributes: dotted names that a module of another kind does not have all of.
        parts: submodules that have to be copies as well, by name, and their kind.
        whole: the same, but only for a block to run as a whole in inference on a CPU.
        replacement: of the class, the classes of `parts`, those of `whole` or None, and what makes a module anew.
    """

    attributes: tuple[str, ...]
    parts: dict[str, str]
    whole: dict[str, str]
    replacement: Callable[..., Replacement]


def _swin(kind: str) -> _Kind:
    return _Kind(
        _copied_swin.attributes(kind),
        {"attn": "swin attention"},
        {"mlp": "swin mlp"},
        lambda cls, attention, mlp, remake: _copied_swin.copied_block(kind, cls, attention, mlp, remake),
    )


def _deformable(kind: str) -> _Kind:
    return _Kind(
        _copied_deformable.attributes(kind),
        {},
        {},
        lambda cls, remake: _copied_deformable.copied_attention(kind, cls, remake),
    )


_KINDS = {
    "sam block": _Kind(sam.BLOCK_ATTRIBUTES, {"attn": "sam attention"}, {"mlp": "sam mlp"}, sam.copied_block),
    "sam attention": _Kind(sam.ATTENTION_ATTRIBUTES, {}, {}, sam.copied_attention),
    **{kind: _swin(kind) for kind in _copied_swin.KINDS},
    "swin map attention": _Kind(
        _copied_swin.MAP_ATTRIBUTES, {"w_msa": "swin attention"}, {}, _copied_swin.copied_map_attention
    ),
    **{kind: _deformable(kind) for kind in _copied_deformable.KINDS},
}


def look(module: nn.Module) -> Replacement | str | None:
    """How to replace a module whose class is a copy, or why it is left alone though it is near one; else None."""
    cls = type(module)
    if "_upstream_class" in vars(cls):
        replacement = vars(cls).get("_replacement")
        return replacement if replacement is not None and replacement.remake is not None else None
    nearest: str | None = None
    for kind in dict.fromkeys(one.kind for one in PUBLISHED if one.name == cls.__name__ and one.kind in _KINDS):
        wanted = _KINDS[kind]
        if not all(_has(module, name) for name in wanted.attributes):
            continue
        parts = [module.get_submodule(name) for name in wanted.parts]
        classes = [cls, *(upstream_class(part) or type(part) for part in parts)]
        differences = list(map(_difference, classes, (kind, *wanted.parts.values())))
        if any(differences):
            found = "; ".join(text for text in differences if text)
            nearest = found if nearest is None or len(found) < len(nearest) else nearest
            continue
        if any(map(altered, parts)):
            return "no copy by source: a method of a part was replaced"
        whole = [type(module.get_submodule(name)) for name in wanted.whole]
        copies = [
            None if _difference(part, of) else part for part, of in zip(whole, wanted.whole.values(), strict=True)
        ]
        return _replacement(kind, *classes, *copies)
    return nearest


_NAMED = 4  # of what differs, in a report

_differences: WeakKeyDictionary[type, dict[str, str | None]] = WeakKeyDictionary()


def _difference(cls: type, kind: str) -> str | None:
    """What sets a class apart from the published form that is nearest to it; None if it is a copy of one."""
    known = _differences.setdefault(cls, {})
    if kind not in known:
        known[kind] = _compare(cls, kind)
    return known[kind]


def _compare(cls: type, kind: str) -> str | None:
    candidates = [one for one in PUBLISHED if one.kind == kind]
    try:
        found = fingerprints(cls)
    except UnreadableError as error:
        return f"no copy by source: {error}"
    nearest = min(candidates, key=lambda one: len(one.differences(found)))
    differ = nearest.differences(found)
    if not differ:
        return None
    verb = "differs" if len(differ) == 1 else "differ"
    named = ", ".join(differ[:_NAMED]) + (f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else "")
    return f"no copy by source: {named} of {cls.__qualname__} {verb} from {nearest.title}"


@cache
def _replacement(kind: str, cls: type, *parts: type | None) -> Replacement:
    replacement = _KINDS[kind].replacement(cls, *parts, (_remade, (kind, cls, *parts)))
    title = next(one.title for one in PUBLISHED if one.kind == kind and not one.differences(fingerprints(cls)))
    note = replacement.note
    remark = f"a copy of {title} by source"
    return replace(replacement, note=lambda module: "; ".join(filter(None, (remark, note(module)))))


def _remade(kind: str, cls: type, *parts: type | None) -> nn.Module:
    """A replaced module without its state, where a copy or a pickle is made; the original where the source changed."""
    kinds = (kind, *_KINDS[kind].parts.values(), *_KINDS[kind].whole.values())
    copies = all(part is None or _difference(part, of) is None for part, of in zip((cls, *parts), kinds, strict=True))
    if copies:
        cls = fused_class(_replacement(kind, cls, *parts), cls)
    return cls.__new__(cls)


def _has(module: nn.Module, name: str) -> bool:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def fingerprint(cls: type) -> str:
    """The fingerprints of what a call of a class runs, one a line, to ask for a copy to be known.

    Args:
        cls: a class of modules.

    Raises:
        TypeError: not a class of modules.
        UnreadableError: there is no source, or not that of the code that runs.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a class of torch.nn.Modules, got {cls!r}")
    lines = [class_path(cls)]
    return "\n".join(lines + [f"    {name}: {value}" for name, value in fingerprints(cls).items()])
