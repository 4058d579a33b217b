"""A whole Swin block in inference on a CPU: a few images at a time, its sums and its GELU inside the products.

What lies between two layers is four times as wide as the map. For a batch that is memory which the allocator takes
afresh from the system in every layer, page by page; for a few images it is memory that the layer before has just given
back. In training the same things have to be kept, so there is nothing to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.fast._replacement import class_path, must_run_original
from magnet_fast.ops import _linear_chain
from magnet_fast.ops._linear import LINEARS, linear, plain_weight
from magnet_fast.ops._linear_chain import Step

# glibc maps memory of 32 MiB or more for one use and gives it back to the system; smaller memory it keeps.
_SLICE_BYTES = 28 << 20

NORM = ("torch.nn.modules.normalization.LayerNorm",)
LINEAR = tuple(class_path(kind) for kind in LINEARS)
IDENTITY = ("torch.nn.modules.linear.Identity",)
DROPOUT = ("torch.nn.modules.dropout.Dropout",)
GELU = ("torch.nn.modules.activation.GELU", "transformers.activations.GELUActivation")


def runs_whole(block: nn.Module, x: Tensor, parts: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether `forward` computes what the block computes, in this call.

    Args:
        x: what the block was called with.
        parts: dotted names of all modules within the block, and the classes that each may have. One more, or another
            class, is something that this was not written for.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        return False
    found = {name: module for name, module in block.named_modules() if name}
    return (
        found.keys() == parts.keys()
        and all(class_path(type(module)) in parts[name] for name, module in found.items())
        and all(_exact(module) for module in found.values() if class_path(type(module)) in GELU)
        and all(plain_weight(module) and not module.training for module in found.values())
        and not must_run_original(block, *found.values())
    )


def forward(
    x: Tensor,
    attend: Callable[[Tensor], Tensor],
    project: nn.Linear,
    norm: nn.LayerNorm,
    expand: nn.Linear,
    reduce: nn.Linear,
) -> Tensor:
    """`x + project(attend(x))`, and to that its MLP behind a norm: a block without dropout and stochastic depth.

    Args:
        x: (B, ..., C), images of tokens.
        attend: the first norm, the projection to queries, keys and values, and the attention; (b, ..., C) to the same.
        project: from heads to channels.
        norm, expand, reduce: the second norm and the MLP around an exact GELU.

    Returns:
        (B, ..., C).
    """

    def images(x: Tensor) -> Tensor:
        attended = attend(x)
        steps = [
            Step(project, residual="given"),
            Step(expand, activation="gelu", before=norm),
            Step(reduce, residual=0),
        ]
        if _linear_chain.runs(attended, steps, residual=x):
            return _linear_chain.run(attended, steps, residual=x)
        x = linear(attended, project.weight, project.bias, residual=x)
        return _sliced(tokens, x.flatten(0, -2), width).view(x.shape)

    def tokens(x: Tensor) -> Tensor:
        hidden = linear(norm(x), expand.weight, expand.bias, activation="gelu")
        return linear(hidden, reduce.weight, reduce.bias, residual=x)

    width = max(3 * x.shape[-1], expand.out_features)
    return _sliced(images, x, width * x.shape[1:-1].numel())


def _exact(gelu: nn.Module) -> bool:
    """Not the approximation by a hyperbolic tangent; transformers has one of its own, spelled out, as well."""
    return gelu.approximate == "none" if isinstance(gelu, nn.GELU) else getattr(gelu, "act", None) is F.gelu


def _sliced(function: Callable[[Tensor], Tensor], x: Tensor, values: int) -> Tensor:
    """`function(x)`, in even slices of the first dimension, whose entries have `values` values between two layers."""
    most = max(1, _SLICE_BYTES // max(1, values * x.element_size()))
    if len(x) <= most:
        return function(x)
    slices = -(-len(x) // most)
    return torch.cat([function(part) for part in x.split(-(-len(x) // slices))])
