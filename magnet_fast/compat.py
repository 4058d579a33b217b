"""Modules that stand in for extensions which others have to compile: multi-scale deformable attention, on our operator.

Research code asks for a module of its own that holds two functions; where it was not built, or not for this PyTorch, an
import fails before anything runs. `install` puts a module with the same functions in its place, for this process.

>>> from magnet_fast import compat
>>> compat.install("MultiScaleDeformableAttention")  # before the model's own files are imported
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from magnet_fast import ops
from magnet_fast.ops._maps import read_maps

NAMES = ("MultiScaleDeformableAttention", "groundingdino._C", "mmcv._ext")
"""What can be installed: of Deformable DETR, Mask2Former and those made after them; of Grounding DINO; of mmcv-lite."""

_MARK = "_stands_in_by_magnet_fast"


def install(name: str) -> ModuleType:
    """Make `import name` find a module on our operator, unless one that works is there.

    Args:
        name: one of `NAMES`. A module of this name that can be imported is left as it is, and returned; so is one that
            was installed before.

    Returns:
        The module that `import name` now gives.

    Raises:
        ValueError: an unknown name.
        ImportError: the package that `name` is part of cannot be imported.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    package, _, last = name.rpartition(".")
    parent = importlib.import_module(package) if package else None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # not there, or built for another PyTorch
        pass
    kind, backward = (_OneOfMany, _write_gradients) if name == "mmcv._ext" else (ModuleType, ms_deform_attn_backward)
    module = kind(name, "magnet_fast: multi-scale deformable attention in place of a compiled extension.")
    module.__spec__ = ModuleSpec(name, None)
    module.ms_deform_attn_forward = ms_deform_attn_forward
    module.ms_deform_attn_backward = backward
    setattr(module, _MARK, True)
    sys.modules[name] = module
    if parent is not None:
        setattr(parent, last, module)
    return module


def uninstall(name: str) -> None:
    """Undo `install`; what imported the module meanwhile keeps it. Anything else of this name stays.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    module = sys.modules.get(name)
    if not getattr(module, _MARK, False):
        return
    del sys.modules[name]
    package, _, last = name.rpartition(".")
    if package and getattr(sys.modules.get(package), last, None) is module:
        delattr(sys.modules[package], last)


class _OneOfMany(ModuleType):
    """mmcv's extension holds many operators, and `mmcv.ops` asks for the names of all: they say when called that they
    are not here."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(
                f"{self.__name__}.{name}: magnet_fast.compat stands in for multi-scale deformable attention alone; for "
                "this operator install mmcv with its compiled operators"
            )

        return missing


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Every query reads K points on each of L maps, bilinearly, and sums them with its weights.

    Args:
        value: (B, S, h, d), the maps flattened one after the other.
        spatial_shapes: (L, 2), whole numbers, the height and width of each map.
        level_start_index: (L), where each map begins in `value`: at the end of the one before.
        sampling_loc: (B, Q, h, L, K, 2), as (x, y), 0 to 1 from edge to edge.
        attn_weight: (B, Q, h, L, K).
        im2col_step: how many images the original takes at a time; of no consequence here.

    Returns:
        (B, Q, h * d). Any device and dtype that `ops.deformable_attention` takes, the CPU among them.

    Raises:
        ValueError: `spatial_shapes` has another shape, or the maps do not lie one after the other.

    Source: the header ms_deform_attn.h of Deformable DETR, as Grounding DINO's.
    """
    return ops.deformable_attention(value, _sizes(spatial_shapes, level_start_index), sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """Gradients of `value`, `sampling_loc` and `attn_weight`; the forward pass is computed once more.

    Args:
        value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step: as before.
        grad_output: (B, Q, h * d).

    Raises:
        ValueError: `spatial_shapes` has another shape, or the maps do not lie one after the other.
    """
    sizes = _sizes(spatial_shapes, level_start_index)
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in (value, sampling_loc, attn_weight)]
        out = ops.deformable_attention(given[0], sizes, *given[1:])
    return list(torch.autograd.grad(out, given, grad_output))


def _write_gradients(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """mmcv's form of `ms_deform_attn_backward`: gradients are written where the caller says."""
    given = value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output, im2col_step
    targets = grad_value, grad_sampling_loc, grad_attn_weight
    for target, grad in zip(targets, ms_deform_attn_backward(*given), strict=True):
        target.copy_(grad)


def _sizes(shapes: Tensor, starts: Tensor) -> list[tuple[int, int]]:
    if shapes.dim() != 2 or shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes: expected shape (maps, 2), got {tuple(shapes.shape)}")
    maps = read_maps(shapes, starts)
    if maps.starts != maps.ends:
        raise ValueError(
            f"level_start_index: expected {maps.ends}, each map where the one before ends, got {maps.starts}"
        )
    return maps.sizes
