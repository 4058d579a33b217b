"""Every copy of transformers' deformable attention module alone: points, boxes, masks, and calls left to upstream."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from magnet_fast.fast import _REPLACEMENTS, _replacement

PATHS = [path for path, replacement in _REPLACEMENTS.items() if "Multiscale" in path]
SIZES = [(5, 4), (3, 2), (1, 3)]
POSITIONS, HEADS, POINTS, WIDTH, QUERIES = 29, 2, 4, 16, 7


def build(path: str) -> nn.Module:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError:
        pytest.skip(f"{module} is not in this version of transformers")
    torch.manual_seed(0)
    settings = {"d_model": WIDTH, "num_feature_levels": len(SIZES), "disable_custom_kernels": True}
    if "rt_detr_v2" in path:
        settings |= {"decoder_attention_heads": HEADS, "decoder_n_points": POINTS, "decoder_n_levels": len(SIZES)}
        settings |= {"decoder_offset_scale": 0.7, "decoder_method": "default"}
        return cls(SimpleNamespace(**settings)).double()
    if "PixelDecoder" in name:
        return cls(WIDTH, HEADS, len(SIZES), POINTS).double()
    return cls(SimpleNamespace(**settings), num_heads=HEADS, n_points=POINTS).double()


def arguments(path: str, coordinates: int, levels: int = 1) -> dict[str, Tensor | list]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(2, POSITIONS, dtype=torch.bool)
    mask[1, ::4] = False
    shapes = torch.tensor(SIZES)
    given = {
        "hidden_states": draw(2, QUERIES, WIDTH).requires_grad_(),
        "attention_mask": mask,
        "encoder_hidden_states": draw(2, POSITIONS, WIDTH).requires_grad_(),
        "position_embeddings": draw(2, QUERIES, WIDTH),
        "reference_points": draw(2, QUERIES, levels, coordinates).sigmoid().requires_grad_(),
        "spatial_shapes": shapes,
        "spatial_shapes_list": SIZES,
        "level_start_index": shapes.prod(1).cumsum(0) - shapes.prod(1),
    }
    # Mask2Former has no tensor of sizes; OneFormer had no list of them up to transformers 5.17.
    taken = inspect.signature(type(build(path)).forward).parameters
    return {name: value for name, value in given.items() if name in taken}


def run(module: nn.Module, given: dict) -> list[Tensor]:
    out, weights = module(**given)
    inputs = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad((out * weight).sum() + weights.square().sum(), [*inputs, *module.parameters()])
    return [out.detach(), weights.detach(), *gradients]


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.rpartition(".")[2])
def test_every_module(path: str, coordinates: int) -> None:
    if "rt_detr_v2" in path and coordinates == 2:
        pytest.skip("upstream takes boxes only: with points its shapes do not fit")
    for levels in (1,) if "rt_detr_v2" in path else (1, len(SIZES)):
        module, given = build(path), arguments(path, coordinates, levels)
        expected = run(module, given)
        report = magnet_fast.accelerate(module)
        assert len(report.replaced) == 1, str(report)
        found = run(module, given)
        assert torch.equal(found[1], expected[1])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_sizes_in_a_tensor_alone() -> None:
    """OneFormer up to transformers 5.17."""
    path = next(path for path in PATHS if "oneformer" in path)
    module, given = build(path), arguments(path, 2, len(SIZES))
    expected = run(module, given)
    magnet_fast.accelerate(module)
    given.pop("spatial_shapes_list", None)
    for ours, theirs in zip(run(module, given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_calls_left_to_upstream(monkeypatch) -> None:
    path = next(path for path in PATHS if "deformable_detr" in path)
    module, given = build(path), arguments(path, 2)
    upstream = type(module)
    magnet_fast.accelerate(module)
    called = []
    monkeypatch.setattr(upstream, "forward", lambda self, *args, **kwargs: called.append((args, kwargs)))
    module(*list(given.values())[:3], None, *list(given.values())[3:])  # everything by position
    module(**{**given, "spatial_shapes_list": [(torch.tensor(5), 4), (3, 2), (1, 3)]})
    module(**{**given, "reference_points": given["reference_points"][:, :, 0]})
    module(**{**given, "reference_points": torch.rand(2, QUERIES, 1, 3)})
    module(**{**given, "reference_points": torch.rand(2, QUERIES, 2, 2)})
    assert len(called) == 5
    assert all(args[0] is given["hidden_states"] for args, _ in called)
    assert called[1][1]["level_start_index"] is given["level_start_index"]


def test_wrong_sizes_are_an_error() -> None:
    path = next(path for path in PATHS if "deformable_detr" in path)
    module, given = build(path), arguments(path, 2)
    magnet_fast.accelerate(module)
    with pytest.raises(ValueError, match="the maps have 9 positions together, value has 29"):
        module(**{**given, "spatial_shapes_list": [(1, 1), (2, 3), (1, 2)]})


def test_all_classes_are_there() -> None:
    """Of the installed versions: which replaced classes exist. Two came after transformers 5.17."""
    missing = []
    for replacement in _REPLACEMENTS.values():
        module, _, name = replacement.path.rpartition(".")
        if module.startswith(("segment_anything_hq", "mmcv")):
            continue  # the first registers models of its own with timm; see test_sam_users.py and test_mmcv.py
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            missing.append(replacement.fused_name)
            continue
        assert issubclass(_replacement.fused_class(replacement, cls), cls)
    later = {"FusedPPDocLayoutV4MultiscaleDeformableAttention", "FusedUnlimitedOcrSamVisionLayer"}
    assert set(missing) <= later
