"""The relation of two instances against that of two words (Pu et al., Neural Processing Letters 2024).

In the style of Mingxing Pu et al., "Text-Vision Relationship Alignment for Referring Image Segmentation". Its abstract
names the parts: a semantic component parser (SCP) finds subject, object and relation of a sentence without an external
parser; instance activation maps (IAM) find instances by subject and object; relationship-based visual localization
(RBVL) lets instances learn of one another, decodes their relations and aligns these with the sentence's. Formulas and
widths are our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.layers import trunc_normal_
from torch import Tensor, nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction, changed
from magnet_fast.models.heads.language_query import Layer, SelfAttention, middle_map
from magnet_fast.models.heads.mixture import mixture_logit
from magnet_fast.models.heads.topdown import TopDownConfig

ROLES = ("subject", "object", "relation")
_BOX = 4  # numbers: where an instance is and how far it spreads, in rows and in columns
_LEAST_SPREAD = 1e-3  # of the image's side: the root of nothing has no gradient


@part
class RelationConfig(HeadConfig):
    """How many instances are told apart, and in what width; masks are made as by `topdown`."""

    kind: Literal["relation"] = "relation"
    width: int = Field(256, gt=0)
    instances: int = Field(16, gt=0)
    num_heads: int = Field(8, gt=0, description="of the instances' attention to one another")

    @model_validator(mode="after")
    def _divisible(self) -> RelationConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def pixel_channels(self, shapes: Shapes) -> int | None:
        return TopDownConfig().pixel_channels(shapes)

    def check(self, shapes: Shapes) -> None:
        middle_map(shapes.strides, self.kind)

    def build(self, shapes: Shapes) -> Relation:
        return Relation(shapes, self)


class Relation(Head):
    """The mask has the finest map's size; an earlier mask, of instances alone, that of the first map of stride 16.

    `extra` has "roles" (B, 3, T), each word's part in subject, object and relation, and "instances" (B, N, h, w), each
    pixel's part in the instances.
    """

    def __init__(self, shapes: Shapes, config: RelationConfig) -> None:
        super().__init__()
        self.middle = middle_map(shapes.strides, config.kind)
        self.parser = SemanticComponentParser(shapes.text_width)
        self.pixels = nn.Linear(shapes.channels[self.middle], config.width)
        self.instances = InstanceActivation(shapes.text_width, config)
        self.localization = RelationLocalization(shapes.text_width, config)
        self.decoder = TopDownConfig().build(shapes)
        self.pixel_channels = self.decoder.pixel_channels

    def forward(self, features: Features) -> Prediction:
        maps, words = list(features.maps), features.words
        middle = maps[self.middle]
        roles, parts = self.parser(words.features, words.mask)
        instances, found, boxes = self.instances(self.pixels(middle), parts)
        logit = mixture_logit(self.localization(found, boxes, parts), instances)
        maps[self.middle] = middle * (1 + logit.sigmoid().to(middle.dtype))[..., None]
        earlier = Prediction(logit, aligned_corners=False)
        extra = {"roles": roles, "instances": instances}
        return changed(self.decoder(features._replace(maps=maps)), earlier=(earlier,), extra=extra)


class SemanticComponentParser(nn.Module):
    """Three learned queries read the words: forward(words (B, T, D), mask (B, T)) returns roles (B, 3, T), which sum to
    one over the words that are read, and what is read by them (B, 3, D)."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(len(ROLES), text_width))
        trunc_normal_(self.queries)
        self.key = nn.Linear(text_width, text_width, bias=False)

    def forward(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.queries @ self.key(words).mT * words.shape[2] ** -0.5
        # The least number instead of minus infinity: a sentence without words has no NaN.
        roles = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min).softmax(dim=-1)
        return roles, roles.to(words.dtype) @ words


class InstanceActivation(nn.Module):
    """Instances compete for pixels.

    forward(x (B, h, w, d), parts (B, 3, D)) returns each pixel's part in each instance (B, N, h, w), one in sum; the
    instances' means of the pixels (B, N, d); and their boxes (B, N, 4), middle and spread of rows and columns in shares
    of the image's sides.
    """

    def __init__(self, text_width: int, config: RelationConfig) -> None:
        super().__init__()
        width = config.width
        self.subject, self.object = (nn.Linear(text_width, width, bias=False) for _ in range(2))
        self.instances = nn.Parameter(torch.empty(config.instances, width))
        trunc_normal_(self.instances)
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size, x = x.shape[1:3], x.flatten(1, 2)
        subject, object_, _ = parts.unbind(dim=1)
        queries = self.instances + (self.subject(subject) + self.object(object_))[:, None]  # (B, N, d)
        logits = queries @ self.key(x).mT * x.shape[2] ** -0.5  # (B, N, P)
        instances = logits.softmax(dim=1)
        # A / ΣA over the pixels; an instance that no pixel chose divides nothing by nothing otherwise.
        share = logits.log_softmax(dim=1).softmax(dim=2)
        return instances.unflatten(2, size), share.to(x.dtype) @ x, _boxes(share.unflatten(2, size)).to(x.dtype)


class RelationLocalization(nn.Module):
    """Every pair's relation against the sentence's.

    forward(instances (B, N, d), boxes (B, N, 4), parts (B, 3, D)) returns a score (B, N) of each instance: how well it
    is the subject, together with how well some instance is its object.
    """

    def __init__(self, text_width: int, config: RelationConfig) -> None:
        super().__init__()
        width = config.width
        self.layer = Layer(SelfAttention(width, config.num_heads, 0.0), width, 4 * width)
        self.pair = nn.Sequential(nn.Linear(2 * width + _BOX, width), nn.GELU(), nn.Linear(width, width))
        self.subject, self.object, self.relation = (nn.Linear(text_width, width, bias=False) for _ in range(3))

    def forward(self, instances: Tensor, boxes: Tensor, parts: Tensor) -> Tensor:
        z = self.layer(instances)
        scale = z.shape[2] ** -0.5
        subject, object_, relation = (
            project(part)[..., None]
            for project, part in zip((self.subject, self.object, self.relation), parts.unbind(1), strict=True)
        )  # (B, d, 1) each
        count = z.shape[1]
        first, second = z[:, :, None].expand(-1, -1, count, -1), z[:, None].expand(-1, count, -1, -1)
        pairs = self.pair(torch.cat([first, second, boxes[:, :, None] - boxes[:, None]], dim=-1))  # (B, N, N, d)
        related = (pairs.flatten(1, 2) @ relation).unflatten(1, (count, count))[..., 0] * scale
        as_object = (z @ object_).mT * scale  # (B, 1, N)
        return (z @ subject)[..., 0] * scale + (related + as_object).logsumexp(dim=2)


def _boxes(share: Tensor) -> Tensor:
    """Means and deviations (B, N, 4) of row and column under shares (B, N, h, w)."""
    share = share.to(torch.promote_types(share.dtype, torch.float32))
    found = []
    for along, across in ((2, 3), (3, 2)):
        of_line = share.sum(dim=across)  # (B, N, side)
        side = share.shape[along]
        centres = (torch.arange(side, device=share.device, dtype=share.dtype) + 0.5) / side
        mean = (of_line * centres).sum(dim=-1, keepdim=True)
        variance = (of_line * (centres - mean).square()).sum(dim=-1, keepdim=True)
        found += [mean, (variance + _LEAST_SPREAD**2).sqrt()]
    return torch.cat(found, dim=-1)
