"""Modules that stand in for extensions that were not built."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, gradcheck

from magnet_fast import compat

NAME = "MultiScaleDeformableAttention"
SHAPES = torch.tensor([[3, 4], [2, 5]])
STARTS = torch.tensor([0, 12])


@pytest.fixture(params=compat.NAMES)
def name(request, monkeypatch) -> str:
    package = request.param.rpartition(".")[0]
    if package:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    yield request.param
    compat.uninstall(request.param)


def given() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 22, 2, 3, generator=generator, dtype=torch.float64)
    places = 1.4 * torch.rand(2, 5, 2, 2, 3, 2, generator=generator, dtype=torch.float64) - 0.2
    weights = torch.rand(2, 5, 2, 2, 3, generator=generator, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (value, places, weights)]


class Attention(Function):
    """How research code calls the two functions."""

    @staticmethod
    def forward(ctx, module: ModuleType, value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(value, places, weights)
        return module.ms_deform_attn_forward(value, SHAPES, STARTS, places, weights, 64)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        value, places, weights = ctx.saved_tensors
        if ctx.module.__name__ == "mmcv._ext":
            written = [torch.full_like(tensor, torch.nan) for tensor in (value, places, weights)]
            ctx.module.ms_deform_attn_backward(
                value, SHAPES, STARTS, places, weights, grad.contiguous(), *written, im2col_step=64
            )
            return None, *written
        return None, *ctx.module.ms_deform_attn_backward(value, SHAPES, STARTS, places, weights, grad, 64)


def plain(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    out = 0
    for level, (part, (height, width)) in enumerate(zip(value.split([12, 10], 1), SHAPES.tolist(), strict=True)):
        feature_map = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        read = F.grid_sample(
            feature_map, 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1, align_corners=False
        )
        out = out + (read * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return out.view(2, 6, 5).transpose(1, 2)


def test_both_functions(name: str) -> None:
    module = compat.install(name)
    assert importlib.import_module(name) is module and compat.install(name) is module
    inputs = given()
    torch.testing.assert_close(Attention.apply(module, *inputs), plain(*inputs), rtol=1e-9, atol=1e-9)
    assert gradcheck(lambda *tensors: Attention.apply(module, *tensors), inputs)


def test_from_a_package(monkeypatch) -> None:
    package = ModuleType("groundingdino")
    monkeypatch.setitem(sys.modules, "groundingdino", package)
    with pytest.raises(ImportError):
        from groundingdino import _C
    module = compat.install("groundingdino._C")
    from groundingdino import _C  # noqa: F811

    assert _C is module is package._C
    compat.uninstall("groundingdino._C")
    assert not hasattr(package, "_C") and "groundingdino._C" not in sys.modules


def test_other_operators_of_mmcv_say_that_they_are_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mmcv", ModuleType("mmcv"))
    module = compat.install("mmcv._ext")
    assert hasattr(module, "nms")  # what mmcv.ops asks when it is imported
    with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms: magnet_fast\.compat stands in for multi-scale"):
        module.nms(torch.zeros(1, 4), iou_threshold=0.5)
    assert not hasattr(module, "__wrapped__")
    compat.uninstall("mmcv._ext")


def test_one_that_works_is_never_shadowed(monkeypatch) -> None:
    working = ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, working)
    assert compat.install(NAME) is working
    compat.uninstall(NAME)
    assert sys.modules[NAME] is working


def test_one_that_was_built_for_another_torch_is(tmp_path, monkeypatch) -> None:
    (tmp_path / f"{NAME}.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.install(NAME).ms_deform_attn_forward is compat.ms_deform_attn_forward
    compat.uninstall(NAME)
    with pytest.raises(ImportError, match="undefined symbol"):
        importlib.import_module(NAME)


def test_errors() -> None:
    for change in (compat.install, compat.uninstall):
        with pytest.raises(ValueError, match="name: expected one of MultiScale.*got 'torch'"):
            change("torch")
    value, places, weights = given()
    with pytest.raises(ValueError, match=r"level_start_index: expected \[0, 12\].*got \[0, 13\]"):
        compat.ms_deform_attn_forward(value, SHAPES, torch.tensor([0, 13]), places, weights, 64)
    with pytest.raises(ValueError, match=r"spatial_shapes: expected shape \(maps, 2\), got \(4,\)"):
        compat.ms_deform_attn_forward(value, SHAPES.flatten(), torch.tensor([0, 12]), places, weights, 64)
