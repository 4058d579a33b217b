"""mmcv's deformable attention: a module rebuilt from its description, under mmcv's name."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magnet_fast

SHAPES = torch.tensor([[3, 4], [2, 5]])
STARTS = torch.tensor([0, 12])


def residual_is_identity(forward: Any) -> Any:
    """A decorator of another package, as mmengine's: a former name of an argument."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Tensor:
        if "residual" in kwargs:
            assert "identity" not in kwargs
            kwargs["identity"] = kwargs.pop("residual")
        return forward(*args, **kwargs)

    named = FunctionType(
        renamed.__code__, {**globals(), "__name__": "mmengine.utils"}, "forward", closure=renamed.__closure__
    )
    return functools.wraps(forward)(named)


class MultiScaleDeformableAttention(nn.Module):
    def __init__(self, embed_dims: int = 32, batch_first: bool = False, value_proj_ratio: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points, self.batch_first = 4, 2, 3, batch_first
        width = int(embed_dims * value_proj_ratio)
        self.sampling_offsets, self.attention_weights = nn.Linear(embed_dims, 48), nn.Linear(embed_dims, 24)
        self.value_proj, self.output_proj = nn.Linear(embed_dims, width), nn.Linear(width, embed_dims)
        self.dropout = nn.Dropout(0.1)

    @residual_is_identity
    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_padding_mask=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        **kwargs,
    ):
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value * ~key_padding_mask[..., None]
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).unflatten(2, (heads, levels, points, 2))
        weights = self.attention_weights(query).unflatten(2, (heads, -1)).softmax(-1).unflatten(3, (levels, points))
        centres = reference_points[:, :, None, :, None, :2]
        if reference_points.shape[-1] == 2:
            places = centres + offsets / spatial_shapes.flip(1)[None, None, None, :, None]
        else:
            places = centres + offsets / points * reference_points[:, :, None, :, None, 2:] * 0.5
        out = 0
        for level, (part, (h, w)) in enumerate(zip(value.split([12, 10], 1), SHAPES.tolist(), strict=True)):
            feature_map = part.unflatten(2, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (h, w))
            grid = 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            read = F.grid_sample(feature_map, grid, align_corners=False)
            out = out + (read * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        out = self.output_proj(out.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2))
        return self.dropout(out if self.batch_first else out.transpose(0, 1)) + identity


@pytest.fixture
def cls(monkeypatch: pytest.MonkeyPatch) -> type:
    path = "mmcv.ops.multi_scale_deform_attn"
    module = ModuleType(path)
    module.MultiScaleDeformableAttention = MultiScaleDeformableAttention
    for name, each in (("mmcv", ModuleType("mmcv")), ("mmcv.ops", ModuleType("mmcv.ops")), (path, module)):
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(MultiScaleDeformableAttention, "__module__", path)
    return MultiScaleDeformableAttention


def inputs(batch_first: bool, last: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(last)
    query, value, position = (torch.randn(2, n, 32, generator=generator) for n in (5, 22, 5))
    if not batch_first:
        query, value, position = (t.transpose(0, 1) for t in (query, value, position))
    return {
        "query": query.requires_grad_(),
        "value": value,
        "query_pos": position,
        "key_padding_mask": torch.rand(2, 22, generator=generator) < 0.2,
        "reference_points": torch.rand(2, 5, 2, last, generator=generator),
        "spatial_shapes": SHAPES,
        "level_start_index": STARTS,
    }


@pytest.mark.parametrize("last", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize(("batch_first", "ratio"), [(False, 1.0), (True, 0.5)], ids=str)
def test_as_before(cls: type, batch_first: bool, ratio: float, last: int) -> None:
    torch.manual_seed(0)
    module = cls(batch_first=batch_first, value_proj_ratio=ratio).eval()
    given = inputs(batch_first, last)
    leaves = [given["query"], *module.parameters()]
    expected = module(**given)
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    report = magnet_fast.accelerate(module)
    assert [one.operator for one in report.replaced] == ["fused_deformable_attention"]
    found = module(**given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, plain in zip(torch.autograd.grad(found.square().sum(), leaves), grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(**given), found, rtol=0, atol=0)
    magnet_fast.restore(module)
    assert type(module) is cls


def test_the_former_name_and_other_inputs_run_the_original(cls: type) -> None:
    module = cls().eval()
    magnet_fast.accelerate(module)
    given = inputs(False, 2)
    ours = module(**given, identity=2 * given["query"])
    torch.testing.assert_close(module(**given, residual=2 * given["query"]), ours, rtol=1e-4, atol=1e-5)
    shared = {**given, "reference_points": given["reference_points"][:, :, :1]}  # one point for both maps
    torch.testing.assert_close(module(**shared), super(type(module), module).forward(**shared), rtol=0, atol=0)


def test_another_number_of_outputs_is_left_alone(cls: type) -> None:
    module = cls()
    module.attention_weights = nn.Linear(32, 12)
    (left,) = magnet_fast.accelerate(module).left_alone
    assert "its attention_weights does not have 24 outputs" in left.remark
