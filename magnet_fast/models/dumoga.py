"""DuMoGa: the node of a scene that a complex query names (Ji et al., TOMM 2024).

"Towards Complex-query Referring Image Segmentation: A Novel Benchmark", after its released code, whose files of nodes
and alignments are not public. A model of its own: it has no pixels of the image, but nodes that something else found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.base import Head, ReferringModel
from magnet_fast.models.config import ModelConfig, Shapes
from magnet_fast.models.contract import Features, InputSpec, Prediction, Text, Words
from magnet_fast.models.graph_alignment import graph_alignment, in_a_row, nearest_nodes, touching
from magnet_fast.models.heads.mixture import mixture_logit
from magnet_fast.models.heads.node_choice import NodeScores, SlotScores
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import TINY_BERT

_NEEDS = ("proposals", "node_features")
_ALIGNED_BY = {"touching": (), "edges": ("edges",), "given": ("alignment",)}


class NodeChoiceConfig(ModelConfig):
    """A text encoder, and how nodes are scored. There is no image encoder, no fusion and no other head."""

    image: None = None
    fusion: None = None
    head: None = None
    presence: None = None
    node_width: int = Field(1024, gt=0, description="features of a node, as the data give them")
    width: int = Field(1536, gt=0)
    layout: Literal["correct", "released"] = Field(
        "correct",
        description="a score a node; or as released: one for each of `slots` places of the nodes, which are summed, by "
        "an alignment read in the wrong order",
    )
    slots: int = Field(10, gt=0, description="nodes of every image, for layout 'released'")
    alignment: Literal["touching", "edges", "given"] = Field(
        "touching",
        description="of words with nodes: nodes that touch are related; or `edges` of the context say which are; or "
        "the context's `alignment` is taken",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> NodeChoiceConfig:
        if getattr(self.text, "schedule", "whole") != "whole":
            raise ValueError(f"text.schedule={self.text.schedule!r}: there are no stages of an image; expected 'whole'")
        if self.input.fit != "squash":
            raise ValueError(f"input.fit={self.input.fit!r}: proposals are of squashed images; expected 'squash'")
        return self

    @property
    def shapes(self) -> Shapes:
        return Shapes((), (), self.text.width, self.text.sentence_width, ())

    @property
    def spec(self) -> InputSpec:
        given = {key: value for key, value in self.input.model_dump().items() if value is not None}
        return InputSpec(**{"tokenizer": self.text.tokenizer, **given})


class NodeHead(Head):
    """Scores of the nodes, and the mask that they make of the nodes' own: Σₙ softmax(scores)ₙ · proposalsₙ.

    `extra` has "nodes" (B, N), the scores. The mask has the proposals' size; logits are to be resized without aligned
    corners.
    """

    def __init__(self, config: NodeChoiceConfig) -> None:
        super().__init__()
        widths = config.text.width, config.node_width, config.width
        self.needs = (*_NEEDS, *_ALIGNED_BY[config.alignment])
        self.aligned_by = config.alignment
        self.scores = NodeScores(*widths) if config.layout == "correct" else SlotScores(*widths, config.slots)

    def forward(self, features: Features, context: Mapping[str, Tensor]) -> Prediction:
        words, proposals = features.words, context["proposals"]
        present = proposals.flatten(2).amax(dim=2) > 0
        alignment = self.align(words, present, context)
        scores = self.scores(words, context["node_features"].to(words.features.dtype), present, alignment)
        mask = mixture_logit(scores, proposals)
        return Prediction(mask, words=words, extra={"nodes": scores}, aligned_corners=False)

    def align(self, words: Words, present: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """(B, T, N): the nearest node of each word, and how near it is."""
        if self.aligned_by == "given":
            return context["alignment"]
        edges = touching(context["proposals"]) if self.aligned_by == "touching" else context["edges"]
        return nearest_nodes(graph_alignment(in_a_row(words.mask), edges), words.mask, present)


_TINY = {"text": TINY_BERT, "node_width": 16, "width": 64}


@register(
    "dumoga",
    config=NodeChoiceConfig,
    presets={
        "dumoga_tiny": _TINY,
        "dumoga_bert_base": {"text": {"kind": "bert"}, "input": {"max_tokens": 128}},
    },
)
class NodeChoice(ReferringModel):
    """BERT, then a choice among given nodes. The image says no more than the size of what is asked.

    The context has `proposals` (B, N, h, w), from 0 to 1, each node's share of the cells of the squashed image, all 0
    where there is no such node; `node_features` (B, N, F); and where the configuration says so `edges` (B, N, N) bool,
    symmetric, or `alignment` (B, T, N), of words with nodes.
    """

    config: NodeChoiceConfig

    def __init__(self, config: NodeChoiceConfig) -> None:
        nn.Module.__init__(self)  # the host would build an image encoder
        self.config, self.bases = config, {}
        self.image_encoder = self.fusion = self.presence = None
        self.text_encoder = config.text.build()
        self.head = NodeHead(config)

    def forward(self, image: Tensor, text: Text, context: Mapping[str, Tensor] | None = None) -> Prediction:
        """Predict masks; arguments as of `ReferringModel`, and the context as said above.

        Raises:
            TypeError, ValueError: as `ReferringModel`; and for a tensor of the context that does not fit.
        """
        features = self.encode(image, text, context)
        return self.head(features, context)

    def encode(
        self,
        image: Tensor,
        text: Text,
        context: Mapping[str, Tensor] | None = None,
        *,
        embedded: Tensor | None = None,
    ) -> Features:
        """Words, and no maps."""
        self._check(image, text, context)
        self._check_context(text, context)
        words = self.text_encoder.start(*((text,) if embedded is None else (text, embedded)))
        return Features([], words, [], (image.shape[2], image.shape[3]))

    @property
    def needs(self) -> tuple[str, ...]:
        return self.head.needs

    @property
    def required(self) -> tuple[str, ...]:
        return self.needs

    def load_pretrained(self, sources: Mapping[str, str | bool]) -> None:
        if sources.get("image", False) is not False:
            raise ValueError(f"pretrained: this model has no image encoder; got {sources['image']!r} for one")
        super().load_pretrained({**sources, "image": False})

    def _check_context(self, text: Text, context: Mapping[str, Tensor]) -> None:
        """Raise a ValueError naming what does not fit the batch, the nodes or the configuration."""
        proposals = context["proposals"]
        if proposals.ndim != 4 or proposals.shape[0] != text.ids.shape[0] or 0 in proposals.shape:
            raise ValueError(
                f"context['proposals'] must be (B, N, h, w), B that of the text, {text.ids.shape[0]}; got "
                f"{tuple(proposals.shape)}"
            )
        batch, nodes = proposals.shape[:2]
        if self.config.layout == "released" and nodes != self.config.slots:
            raise ValueError(
                f"context['proposals'] has {nodes} nodes; this model chooses among slots={self.config.slots}"
            )
        expected = {
            "node_features": (batch, nodes, self.config.node_width),
            "edges": (batch, nodes, nodes),
            "alignment": (batch, text.ids.shape[1], nodes),
        }
        for name in self.needs[1:]:
            if context[name].shape != expected[name]:
                raise ValueError(f"context[{name!r}] must be {expected[name]}; got {tuple(context[name].shape)}")
        if "edges" in self.needs and context["edges"].dtype != torch.bool:
            raise TypeError(f"context['edges'] must be bool; got {context['edges'].dtype}")
