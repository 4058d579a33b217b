"""Applied speed: the same modules on fused operators, in place, and the way back.

For our own models, those of timm, transformers and torchvision, and copies of classes that research code shares.

>>> import magnet_fast, timm
>>> model = timm.create_model("swin_base_patch4_window7_224")
>>> print(magnet_fast.accelerate(model))
>>> magnet_fast.restore(model)

None of the three is imported here, nor are our own models: classes are known by name, copies by their source.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import nn

from magnet_fast.fast import (
    convolutional,
    copies,
    grounding_dino,
    mmcv,
    sam,
    timm,
    torchvision,
    transformers_deformable,
    transformers_swin,
)
from magnet_fast.fast._replacement import Replacement, class_path, fused_class, upstream_class
from magnet_fast.fast._report import ModuleReport, Report
from magnet_fast.fast.convolutional import FoldedBlock
from magnet_fast.fast.copies import fingerprint
from magnet_fast.ops import _int8, _packed
from magnet_fast.ops._convolution import PackedSequential, has_foldable, pack_convolutions, unpack_convolutions
from magnet_fast.ops._linear import (
    MeasuredLinear,
    PackedLinear,
    measure_linear,
    pack_linear,
    plain_linear,
    training_products,
    unpack_linear,
)
from magnet_fast.ops._observed import altered
from magnet_fast.ops._proof import prove
from magnet_fast.ops._proof_cases import OPERATORS

__all__ = ["ModuleReport", "Report", "accelerate", "accelerated", "fingerprint", "restore"]

_FAMILIES = (timm, torchvision, transformers_swin, transformers_deformable, grounding_dino, mmcv, sam)
_FAILED = "looking at it failed"
_OUR_MODELS = "magnet_fast.models."

Weights = Literal["same", "int8"]


def accelerate(
    model: nn.Module, *, pack: bool = False, weights: Weights = "same", freeze: bool | None = None
) -> Report:
    """Put the fused operators under what `model` contains, in place, where the arithmetic is the same.

    Names, parameters, buffers and the state dict stay as they are, as do training, autocast, `torch.compile` and
    saving; `restore` is the way back. What can change from call to call (attention weights asked for, training with
    attention dropout, a hook, an adapter, another module or another `forward` on a part that the fused way does not
    call, a switch or a buffer that was set to what the operators do not have, a transform of `torch.func`, a counter of
    operations, tracing, export) is looked at in every call, which then runs the original.

    A CPU that oneDNN was measured to train float32 Linears on clearly faster than PyTorch's choice does (once a machine
    and number of threads; not with `MAGNET_FAST_CHOICE=guess`) trains those of the model so. Our choice.

    Args:
        model: any module; our own models, timm's SwinTransformer, what transformers builds on Swin layers and on
            multi-scale deformable attention, torchvision's swin_t, swin_s and swin_b, copies of published classes whose
            source is known, and whatever contains them. Wrap for FSDP afterwards.
        pack: a promise that the weights stay as they are while the model is used for inference on a CPU. Every plain
            Linear of the model, also beside attention, then runs on oneDNN with a second copy of its weight, packed in
            the first call, and so does every convolution that a BatchNorm follows in a Sequential or in a block of a
            known class (ResNets, EfficientNets, RT-DETR's pyramid), with the norm folded in; that takes the memory of
            the weights once more. Changes that PyTorch counts (loading,
            optimisers, casts) are seen nevertheless, and what changes a weight as a whole (a merged adapter); a few
            values written through `.data` are not. Training, gradients, other devices and processors that oneDNN is
            not used on are as without it. Our choice.
        weights: with `pack`, what the Linears' packed copies are in: "same" as the weights, or "int8", by output, with
            the inputs brought to int8 row by row when they come; sums, norms, attention and what follows a product stay
            as they were. About 1 % of a product's size is rounded off; a row that is not finite comes out as NaN. Small
            products, and layers whose sizes are no multiples of 16, stay as they are. Our choice.
        freeze: the former name of `pack`.

    Returns:
        What now runs on which operator, and what was left alone and why. `print` it. A module that this function
        replaced before counts as replaced.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `weights` is neither, or int8 without `pack` or where it does not run.
    """
    if freeze is not None:
        warnings.warn("accelerate: freeze= is named pack= now", DeprecationWarning, stacklevel=2)
        pack = freeze
    _check(model)
    _check_weights(weights, pack)
    found: list[ModuleReport] = []
    settled: set[nn.Module] = set()  # parts that go with their module, replaced or not
    for name, module in model.named_modules():
        path = class_path(upstream_class(module) or type(module))
        replacements, left_alone = _known(path, pack or upstream_class(module) is not None)
        if path in replacements:
            found.append(_replace(name, module, replacements[path]))
            settled.update(_parts(module, replacements[path]))
            if pack and isinstance(module, FoldedBlock):
                pack_convolutions(module.layers_of(module))
        elif path in left_alone:
            found.append(ModuleReport(name, path, None, left_alone[path]))
        elif (base := _known_base(module, pack)) is not None:
            reason = f"a subclass of {base.rpartition('.')[2]}: what it changes is not known here"
            found.append(ModuleReport(name, path, None, reason))
        elif module not in settled and isinstance(copy := _look(module), str):
            found.append(ModuleReport(name, path, None, copy))
        elif module not in settled and copy is not None:
            found.append(_replace(name, module, copy))
            settled.update(_parts(module, copy))
        elif plain_linear(module) and (pack or type(module) is PackedLinear):
            int8 = weights == "int8" if pack else _packed.is_int8(module)
            found.append(_pack(name, module, int8))
        elif plain_linear(module) and _trains_faster(module):
            measure_linear(module)
            remark = "in training on a CPU by the products that were measured to be the faster here"
            found.append(ModuleReport(name, path, "linear", remark))
        if isinstance(module, nn.Sequential) and (pack or type(module) is PackedSequential):
            found.extend(_pack_sequential(name, module))
    _prove(model, {module.operator for module in found})
    return Report(tuple(found))


def restore(model: nn.Module) -> None:
    """Give every module that `accelerate` replaced its own class back: nothing of the replacement remains.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the class of a replaced module was changed once more (FSDP2, a parametrisation) and has to be
            changed back first; nothing was restored.
    """
    _check(model)
    _undo(model, {})


@contextmanager
def accelerated(model: nn.Module, *, pack: bool = False, weights: Weights = "same") -> Iterator[Report]:
    """`accelerate` for the length of a block, after which every module has the class it had before it.

    What was replaced when the block began stays replaced. Yields the report.

    Raises:
        TypeError: `model` is not a module.
        ValueError: as `accelerate`, and at the end as `restore`.
    """
    _check(model)
    before = {module: type(module) for module in model.modules() if upstream_class(module) is not None}
    report = accelerate(model, pack=pack, weights=weights)
    try:
        yield report
    finally:
        _undo(model, before)


def _undo(model: nn.Module, kept: Mapping[nn.Module, type]) -> None:
    """Back to the class in `kept`, or else to the one that was replaced."""
    for name, module in model.named_modules():
        if upstream_class(module) is None and any("_upstream_class" in vars(base) for base in type(module).__mro__):
            raise ValueError(
                f"model: {name or 'the model itself'} was replaced and then made a {type(module).__qualname__}; "
                "expected that to be undone before restore"
            )
    for module in model.modules():
        upstream = upstream_class(module)
        cls = kept.get(module, upstream)
        if upstream is None or cls is type(module):
            continue
        if isinstance(module, nn.Sequential):
            unpack_convolutions(list(module))
        elif isinstance(module, FoldedBlock):
            unpack_convolutions(module.layers_of(module))
        if isinstance(module, MeasuredLinear):
            unpack_linear(module)
            if cls is MeasuredLinear:
                measure_linear(module)
        else:
            module.__class__ = cls


def _replace(name: str, module: nn.Module, replacement: Replacement) -> ModuleReport:
    if upstream_class(module) is None:
        try:
            reason = replacement.why_not(module)
        except Exception as error:  # whatever upstream has become, its model goes on as it is
            reason = f"{_FAILED} ({type(error).__name__}: {error}): not a version this was written for"
        if reason is not None:
            return ModuleReport(name, replacement.path, None, reason)
        module.__class__ = fused_class(replacement, type(module))
    return ModuleReport(name, replacement.path, replacement.operator, replacement.note(module))


def _prove(model: nn.Module, operators: set[str | None]) -> None:
    """Kernels that have to prove themselves do so now, before a graph is compiled or captured."""
    wanted = tuple(name for name in OPERATORS if name in operators)
    places = {(p.device, p.dtype) for p in model.parameters() if p.is_floating_point() and not p.is_meta}
    for device in {device for device, _ in places} if wanted else ():
        prove(device, tuple(dtype for where, dtype in places if where == device), wanted)


def _parts(module: nn.Module, replacement: Replacement) -> Iterator[nn.Module]:
    names = {name for name, _ in module.named_modules()}
    return (module.get_submodule(name) for name in replacement.bypassed if name in names)


def _look(module: nn.Module) -> Replacement | str | None:
    """How to replace a class known by its source, or why not one that is near; None for any other."""
    try:
        return copies.look(module)
    except Exception as error:  # whatever the class is, its model goes on as it is
        return f"{_FAILED} ({type(error).__name__}: {error})"


def _pack(name: str, layer: nn.Linear, int8: bool) -> ModuleReport:
    path = class_path(nn.Linear)
    if "forward" in vars(layer):
        return ModuleReport(name, path, None, "its forward was replaced on the module itself")
    if altered(layer):
        return ModuleReport(name, path, None, "a method was replaced, in its class")
    if name.rpartition(".")[2] == "base_layer":
        return ModuleReport(name, path, None, "under an adapter, which may be merged into its weight behind our back")
    pack_linear(layer, int8=int8)
    if not int8:
        note = "packed weight in inference on a CPU"
    elif any(size % _int8.WIDTHS for size in layer.weight.shape):
        note = f"packed weight in inference on a CPU, not in int8: sizes are no multiples of {_int8.WIDTHS}"
    else:
        note = "packed weight in int8 in inference on a CPU"
    return ModuleReport(name, path, "linear", note)


_FEWEST_WEIGHTS = 1 << 12  # of a Linear that can have products worth choosing for


def _trains_faster(layer: nn.Linear) -> bool:
    """Whether this machine has faster products for the layer's training than PyTorch takes. Measures once."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    if weight.numel() < _FEWEST_WEIGHTS or "forward" in vars(layer) or altered(layer):
        return False
    products = training_products()
    return products is not None and products.any


def _pack_sequential(name: str, module: nn.Sequential) -> Iterator[ModuleReport]:
    """PyTorch's own class, and those with a fast form: what others make of the order of their layers is not known."""
    path = class_path(nn.Sequential)
    if upstream_class(module) not in (None, nn.Sequential):
        pack_convolutions(list(module))
    elif type(module) in (nn.Sequential, PackedSequential) and has_foldable(list(module)):
        if "forward" in vars(module) or altered(module):
            yield ModuleReport(name, path, None, "a method was replaced, on the module itself or in its class")
            return
        pack_convolutions(list(module))
        module.__class__ = PackedSequential
        yield ModuleReport(name, path, "convolution", "in inference on a CPU BatchNorms are folded into convolutions")


def _known(path: str, pack: bool) -> tuple[Mapping[str, Replacement], Mapping[str, str]]:
    """The tables that a class of this path may be in; those of our models are imported when they are needed."""
    if path.startswith(_OUR_MODELS):
        return _tables_of(_own())
    return (_CONVOLUTIONAL if pack and path in _CONVOLUTIONAL else _REPLACEMENTS), _LEFT_ALONE


def _tables_of(*families: ModuleType) -> tuple[dict[str, Replacement], dict[str, str]]:
    replacements = {item.path: item for family in families for item in family.REPLACEMENTS}
    return replacements, {path: reason for family in families for path, reason in family.LEFT_ALONE.items()}


_REPLACEMENTS, _LEFT_ALONE = _tables_of(*_FAMILIES)
_CONVOLUTIONAL = {item.path: item for item in convolutional.REPLACEMENTS}  # replaced where weights are packed


def _own() -> ModuleType:
    return importlib.import_module(f"{__name__}.own")


def _known_base(module: nn.Module, pack: bool) -> str | None:
    for base in type(module).__mro__[1:]:
        path = class_path(base)
        if any(path in table for table in _known(path, pack)):
            return path
    return None


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_weights(weights: str, pack: bool) -> None:
    if weights not in get_args(Weights):
        raise ValueError(f"weights: expected 'same' or 'int8', got {weights!r}")
    if weights == "int8" and not pack:
        raise ValueError("weights: int8 is of packed copies; expected pack=True with it")
    if weights == "int8" and not _int8.works():
        raise ValueError(
            "weights: int8 needs the compiled extension and the int8 product of PyTorch's oneDNN; one is missing"
        )


def __getattr__(name: str) -> type:
    """The class of a replaced module, which a pickle of it asks for."""
    if name.startswith("Fused"):
        for replacement in (*_REPLACEMENTS.values(), *_CONVOLUTIONAL.values(), *_own().REPLACEMENTS):
            if replacement.fused_name == name:
                module, _, upstream = replacement.path.rpartition(".")
                return fused_class(replacement, getattr(importlib.import_module(module), upstream))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
