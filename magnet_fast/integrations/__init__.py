"""The fused operators under models of timm, transformers and torchvision.

>>> import magnet_fast, timm
>>> model = timm.create_model("swin_base_patch4_window7_224")
>>> print(magnet_fast.accelerate(model))
>>> magnet_fast.restore(model)

None of the three is imported here: their classes are known by name.
"""

from __future__ import annotations

import importlib

from torch import nn

from ..ops._linear import FrozenLinear, freeze_linear, plain_linear, thaw_linear
from . import grounding_dino, timm, torchvision, transformers_deformable, transformers_swin
from ._replacement import Replacement, class_path, fused_class, upstream_class
from ._report import ModuleReport, Report

__all__ = ["ModuleReport", "Report", "accelerate", "restore"]

_FAMILIES = (timm, torchvision, transformers_swin, transformers_deformable, grounding_dino)
_REPLACEMENTS: dict[str, Replacement] = {item.path: item for family in _FAMILIES for item in family.REPLACEMENTS}
_LEFT_ALONE: dict[str, str] = {path: reason for family in _FAMILIES for path, reason in family.LEFT_ALONE.items()}


def accelerate(model: nn.Module, *, freeze: bool = False) -> Report:
    """Put the fused operators under the attention that `model` contains, in place, where the arithmetic is the same.

    Names, parameters, buffers and the state dict stay as they are, as do training, autocast, ``torch.compile`` and
    saving; :func:`restore` is the way back. What can change from call to call (attention weights asked for, training
    with attention dropout, a hook on a part that the fused way does not call, tracing, export) is looked at in every
    call, which then runs the original.

    Args:
        model: any module; timm's SwinTransformer, what transformers builds on Swin layers and on multi-scale deformable
            attention, torchvision's swin_t, swin_s and swin_b, and whatever contains them. Wrap for FSDP afterwards.
        freeze: a promise that the weights stay as they are while the model is used for inference on a CPU. Every plain
            Linear of the model, also beside attention, then runs on oneDNN with a second copy of its weight, packed in
            the first call; that takes the memory of the weights once more. Changes that PyTorch counts (loading,
            optimisers, casts) are seen nevertheless, what is written through ``.data`` is not. Training, gradients,
            other devices and processors that oneDNN is not used on are as without it. Our choice.

    Returns:
        What now runs on which operator, and what was left alone and why. ``print`` it. A module that this function
        replaced before counts as replaced.

    Raises:
        TypeError: `model` is not a module.
    """
    _check(model)
    found = []
    for name, module in model.named_modules():
        path = class_path(upstream_class(module) or type(module))
        if path in _REPLACEMENTS:
            found.append(_replace(name, module, _REPLACEMENTS[path]))
        elif path in _LEFT_ALONE:
            found.append(ModuleReport(name, path, None, _LEFT_ALONE[path]))
        elif (base := _known_base(module)) is not None:
            reason = f"a subclass of {base.rpartition('.')[2]}: what it changes is not known here"
            found.append(ModuleReport(name, path, None, reason))
        elif freeze and plain_linear(module):
            freeze_linear(module)
            found.append(ModuleReport(name, path, "linear", "packed weight in inference on a CPU"))
    return Report(tuple(found))


def restore(model: nn.Module) -> None:
    """Give every module that :func:`accelerate` replaced its own class back: nothing of the replacement remains.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the class of a replaced module was changed once more (FSDP2, a parametrisation) and has to be
            changed back first; nothing was restored.
    """
    _check(model)
    for name, module in model.named_modules():
        if upstream_class(module) is None and any("_upstream_class" in vars(base) for base in type(module).__mro__):
            raise ValueError(
                f"model: {name or 'the model itself'} was replaced and then made a {type(module).__qualname__}; "
                "expected that to be undone before restore"
            )
    for module in model.modules():
        upstream = upstream_class(module)
        if isinstance(module, FrozenLinear):
            thaw_linear(module)
        elif upstream is not None:
            module.__class__ = upstream


def _replace(name: str, module: nn.Module, replacement: Replacement) -> ModuleReport:
    if upstream_class(module) is None:
        try:
            reason = replacement.why_not(module)
        except Exception as error:  # whatever upstream has become, its model goes on as it is
            reason = f"looking at it failed ({type(error).__name__}: {error}): not a version this was written for"
        if reason is not None:
            return ModuleReport(name, replacement.path, None, reason)
        module.__class__ = fused_class(replacement, type(module))
    return ModuleReport(name, replacement.path, replacement.operator, replacement.note(module))


def _known_base(module: nn.Module) -> str | None:
    paths = (class_path(base) for base in type(module).__mro__[1:])
    return next((path for path in paths if path in _REPLACEMENTS or path in _LEFT_ALONE), None)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def __getattr__(name: str) -> type:
    """The class of a replaced module, which a pickle of it asks for."""
    for replacement in _REPLACEMENTS.values():
        if replacement.fused_name == name:
            module, _, upstream = replacement.path.rpartition(".")
            return fused_class(replacement, getattr(importlib.import_module(module), upstream))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
