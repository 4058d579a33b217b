"""A discriminator tells true masks from predicted ones, and the model learns to make masks that it cannot tell.

In the style of ASGN (TMM 2020), of which only an abstract is public: beside the loss of each pixel one of the
consistency of predicted and true distributions, trained adversarially. How is our choice: one backward pass and one
optimiser train both sides, by the gradient reversal of Ganin and Lempitsky (ICML 2015).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from magnet_fast.models.contract import Prediction, resized
from magnet_fast.training.terms.mask import check_mask
from magnet_fast.training.terms.term import Term, TermConfig, register


class AdversarialConfig(TermConfig):
    """The discriminator, and how much of its gradient the model gets [our choices]."""

    reversal: float = Field(0.02, ge=0, description="of the discriminator's gradient that the model gets, reversed")
    rise: float = Field(0.2, gt=0, le=1, description="share of the run in which it rises to that from 0")
    soft: float = Field(0.05, ge=0, lt=0.5, description="true masks are of this and 1 minus this, not of 0 and 1")
    widths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (64, 128, 256, 512), min_length=1, description="of the discriminator's convolutions; each halves the sides"
    )


@register("adversarial")
class AdversarialTerm(Term):
    """BCE(D(image, truth), 1) + BCE(D(image, R(p)), 0), at half the image's sides.

    D gives a logit for each patch; p is the predicted probability; R is the identity, and its gradient is minus
    `reversal` times that of what comes after. D's learning rate: `optimiser.multipliers: {adversarial.*: 2}`.

    Args:
        config: its options.

    Attributes:
        discriminator: D; it takes (B, 4, h, w), colours and mask.
    """

    config_class = AdversarialConfig
    logged = ("adversarial", "told_apart")

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__(config)
        self.reversal, self.rise, self.soft = config.reversal, config.rise, config.soft
        layers: list[nn.Module] = []
        channels = 4
        for width in config.widths:
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            channels = width
        self.discriminator = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))

    @classmethod
    def build(cls, config: AdversarialConfig, model: nn.Module, tokenizer: Any) -> AdversarialTerm:
        side, needed = model.spec.size, 2 ** (1 + len(config.widths))
        if side < needed:
            raise ValueError(
                f"terms.adversarial.widths: expected fewer than {len(config.widths)} for images of {side} pixels; each "
                f"halves the sides, and {needed} pixels are needed"
            )
        return cls(config)

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_mask(prediction, batch["mask"])
        with torch.autocast(batch["mask"].device.type, enabled=False):
            image, mask = batch["image"].float(), batch["mask"].float()
            truth = self.soft + (1 - 2 * self.soft) * mask
            found = resized(prediction, mask.shape[-2:]).sigmoid()
            found = reversed_gradient(found, self.reversal * (batch["progress"] / self.rise).clamp(max=1))
            both = torch.cat([torch.cat([image, one[:, None]], dim=1) for one in (truth, found)])
            true, false = self.discriminator(F.avg_pool2d(both, 2, ceil_mode=True)).chunk(2)
            loss = F.softplus(-true).mean() + F.softplus(false).mean()
            told_apart = ((true > 0).float().mean() + (false < 0).float().mean()) / 2
        return loss, {"adversarial": loss.detach(), "told_apart": told_apart}


def reversed_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """x itself, with a gradient of -factor times that of the result."""
    return x.detach() - factor * (x - x.detach())
