"""An exponential moving average of the weights: what is validated and exported in place of the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average ← d · average + (1 - d) · weight after each step, with d = min(decay, (1 + n) / (10 + n)) at step n.

    The rise of d (that of TensorFlow's moving average) keeps the random first weights out of it. Parameters and
    floating buffers (a BatchNorm's statistics) are averaged, other buffers copied; what is held fixed stays.
    `torch.optim.swa_utils` copies the whole module instead, which a sharded one does not survive, and knows no exchange
    in place.

    Args:
        model: on its device, sharded or not; the average begins at its present weights.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.begin()

    def begin(self, updates: int = 0) -> None:
        """Begin at the model's present weights, as the average of so many updates."""
        self.updates = updates
        self.weights: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in self.model.state_dict().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        present = self.model.state_dict()
        fixed = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        floating = [name for name, value in self.weights.items() if value.is_floating_point() and name not in fixed]
        torch._foreach_lerp_([self.weights[name] for name in floating], [present[name] for name in floating], 1 - decay)
        for name in self.weights.keys() - set(floating) - fixed:
            self.weights[name].copy_(present[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averaged weights, for the time of the block; its own come back bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self.model.state_dict().items():  # in place: others hold on to these tensors
            own = value.clone()
            value.copy_(self.weights[name])
            self.weights[name].copy_(own)
