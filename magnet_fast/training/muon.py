"""Muon: momentum whose matrices are orthogonalised before they become a step (Jordan et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Of the quintic iteration x <- a x + (b x x' + c (x x')²) x: the published coefficients, steep at zero.
_A, _B, _C, _STEPS = 3.4445, -4.7750, 2.0315, 5

FUSED_DEVICES = ("cpu", "cuda")
"""Where PyTorch has a fused AdamW."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `muon=True`, AdamW for the others.

    One optimiser for both, so that gradient scaling, schedules and checkpoints need to know nothing of it.
    Beside `torch.optim.Muon`, which takes one two-dimensional parameter at a time, it takes the matrices of
    one shape together (a tiny model has hundreds of small ones), convolutions as (out, in * kernel), and
    stacked projections (a Swin block's qkv) as the matrices they are.

    The step of a matrix is scaled by 0.2 * sqrt(max(rows, columns)), which gives it the root mean square of a
    typical AdamW step (Liu et al., arXiv 2502.16982): learning rate and weight decay mean the same in both.

    Args:
        groups: parameter groups; each may hold `muon` (default False), `lr`, `weight_decay`, and `stacked`: for each
            parameter, of how many equal matrices, one upon the other, it is made (default 1 each).
        lr: learning rate.
        momentum: of Muon (Nesterov's form).
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, {**defaults, "muon": False, "stacked": None})
        for parameter in (p for group in self.param_groups if group["muon"] for p in group["params"]):
            if parameter.dim() < 2:
                raise ValueError(
                    f"groups: Muon takes matrices and kernels, got a parameter of {tuple(parameter.shape)}"
                )
        for group in self.param_groups:
            group["stacked"] = counts = list(group["stacked"] or [1] * len(group["params"]))
            if len(counts) != len(group["params"]):
                raise ValueError(f"groups: stacked has {len(counts)} entries for {len(group['params'])} parameters")
            for parameter, count in zip(group["params"], counts, strict=True):
                if count != 1 and (count < 1 or parameter.shape[0] % count):
                    raise ValueError(f"groups: stacked={count} does not divide a parameter of {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            pairs = zip(group["params"], group["stacked"], strict=True)
            pairs = [(parameter, count) for parameter, count in pairs if parameter.grad is not None]
            if pairs and group["muon"]:
                self._muon_step(group, pairs)
            elif pairs:
                self._adamw_step(group, [parameter for parameter, _ in pairs])

    def _muon_step(self, group: dict[str, Any], parameters: list[tuple[Tensor, int]]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter, count in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            ahead = parameter.grad.lerp(state["momentum"], group["momentum"])
            matrices = ahead.flatten(1).unflatten(0, (count, -1))  # (count, rows, columns), kernels flattened
            by_shape.setdefault((parameter.device, *matrices.shape[1:]), []).append((parameter, matrices))
        for (_, rows, columns), members in by_shape.items():
            steps = orthogonalise(torch.cat([matrices for _, matrices in members]))
            rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
            for (parameter, _), step in zip(members, steps.split([len(m) for _, m in members]), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step.reshape(parameter.shape), alpha=-rate)

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=parameters[0].device.type in FUSED_DEVICES,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, rows, columns) float to matrices of the same singular vectors whose singular values are near 1.

    Five steps of the Newton-Schulz iteration, in float32: values end between about 0.7 and 1.2 (this is enough
    for an optimiser). A matrix of zeros stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.float() / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).to(matrices.dtype)
