"""Mask Grounding: say the hidden word from the other words, the pixels and where the mask is.

MagNet, section 3.1 (Chng et al., CVPR 2024). It attaches to any model through `encode`; nothing of it is needed, or
saved, for inference.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.data.hidden_tokens import HiddenTokens, TokenHider
from magnet_fast.data.scenes.word_kinds import ATTRIBUTES, kinds_of_ids
from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.hidden_words import hidden_word_accuracy
from magnet_fast.training.terms.term import Term, TermConfig, register
from magnet_fast.training.terms.word_predictor import WordPredictor


class GroundingConfig(TermConfig):
    """What is hidden, and the predictor. Our choices: the weight, `hide: attributes`, the tokens `place`, `shape`."""

    hide: Literal["uniform", "attributes"] = Field(
        "uniform", description="all words alike (the paper); or mostly colours, shapes, sizes and textures, on scenes"
    )
    share: float = Field(0.15, gt=0, le=1, description="of a sentence's ordinary tokens that is hidden")
    scheme: Literal["90/10", "80/10/10"] = Field("90/10", description="[MASK] or unchanged; or BERT's")
    token: Literal["centre", "place", "shape"] = Field(
        "centre",
        description="what the mask's token knows: its centre (the paper); that in the pixels' code; or more",
    )
    image_stage: int | None = Field(None, ge=0, description="which fused map the predictor reads; none: the last")
    layers: int = Field(6, gt=0)
    heads: int = Field(8, gt=0)
    feedforward: int = Field(768, gt=0)
    blind: bool = Field(False, description="a control: the predictor sees neither image nor mask")


@register("grounding")
class GroundingTerm(Term):
    """Hides words, encodes the sentence again with the image, predicts what was hidden.

    The head is not run for that sentence. That the segmentation reads the whole one, in a pass of its own, is our
    choice.

    Args:
        config: its options.
        predictor: of the hidden words.
        hider: chooses tokens and hides them. In a vocabulary without [MASK] a learned vector, the term's own, stands in
            a hidden word's place.
    """

    config_class = GroundingConfig
    logged = ("grounding", "grounding_accuracy")
    encodes = True

    def __init__(self, config: GroundingConfig, predictor: WordPredictor, hider: TokenHider) -> None:
        super().__init__(config)
        self.predictor, self.hider = predictor, hider
        self.image_stage, self.blind, self.hide = config.image_stage, config.blind, config.hide
        self.cover = None if hider.mask_id is not None else nn.Parameter(0.02 * torch.randn(predictor.text_width))

    @classmethod
    def build(cls, config: GroundingConfig, model: nn.Module, tokenizer: Any) -> GroundingTerm:
        text, channels = model.text_encoder, model.config.shapes.channels
        if not channels:
            raise cls.refuse("the model makes no maps of the image, which hidden words could be read off")
        stage = len(channels) - 1 if config.image_stage is None else config.image_stage
        if stage >= len(channels):
            raise ValueError(
                f"terms.grounding.image_stage: expected a map of the model's, 0 to {len(channels) - 1}, got {stage}"
            )
        embedding = getattr(text, "word_embedding", None)
        if embedding is None or embedding.shape[1] != text.width:
            shape = None if embedding is None else tuple(embedding.shape)
            raise cls.refuse(
                f"the model's words have {text.width} channels, and its word embedding, which says the hidden words, "
                f"is {shape}: expected {text.width} columns"
            )
        predictor = WordPredictor(
            text.width,
            channels[stage],
            len(embedding),
            layers=config.layers,
            heads=config.heads,
            feedforward=config.feedforward,
            token=config.token,
        )
        config = config.model_copy(update={"image_stage": stage})
        preferred = []
        if config.hide == "attributes":
            preferred = [index for index, kind in kinds_of_ids(tokenizer).items() if kind in ATTRIBUTES]
            if not preferred:
                raise ValueError(
                    "terms.grounding.hide: expected 'uniform' for a vocabulary without the scenes' words, "
                    f"got {config.hide!r} and {tokenizer.source}"
                )
        return cls(config, predictor, TokenHider(tokenizer, config.share, config.scheme, preferred))

    def check(self, dataset: Any) -> None:
        if self.hide == "attributes" and not getattr(dataset, "word_kinds", {}):
            raise ValueError(
                "terms.grounding.hide: expected 'uniform' for data that do not tell which words are attributes, "
                f"got {self.hide!r}; embedded scenes know it"
            )

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hider(batch["text"])
        sight = not self.blind
        logits = self.predict(model, batch, hidden, self.read(model, batch, hidden, image=sight), mask=sight)
        loss, accuracy = grounding_loss(logits, hidden.targets, hidden.valid)
        return loss, {"grounding": loss.detach(), "grounding_accuracy": accuracy}

    def read(
        self, model: nn.Module, batch: dict[str, Any], hidden: HiddenTokens, *, image: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Words (B, T, D) and pixels (B, H, W, C) of the sentences with hidden words.

        Without `image`, a control, the image is grey: zeros, the mean colour.
        """
        picture, text = batch["image"], hidden.text
        embedded = None
        if self.cover is not None:
            own = F.embedding(text.ids, model.text_encoder.word_embedding)
            embedded = torch.where(hidden.covered[..., None], self.cover.to(own.dtype), own)
        shared = {"seen": batch["seen"]} if "seen" in batch and image else {}
        picture = picture if image else torch.zeros_like(picture)
        features = model.encode(picture, text, batch.get("extra"), embedded=embedded, **shared)
        return features.words.features, features.maps[self.image_stage]

    def predict(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        hidden: HiddenTokens,
        features: tuple[Tensor, Tensor],
        *,
        mask: bool = True,
    ) -> Tensor:
        """Logits (B, K, V) of the words at the hidden positions (B, K).

        Args:
            model, batch, hidden: as for `read`.
            features: what `read` gave.
            mask: False, a control, for an empty mask: its token is then the one of a referent that is not there.
        """
        words, pixels = features
        place = batch["mask"] if mask else torch.zeros_like(batch["mask"])
        vocabulary = model.text_encoder.word_embedding
        return self.predictor(words, hidden.text.mask, pixels, place, hidden.positions, vocabulary)

    def repeated_layers(self) -> list[nn.Module]:
        return list(self.predictor.layers)

    def measure(self, model: nn.Module, dataset: Any, batch_size: int, **options: Any) -> dict[str, Any]:
        return {"hidden_words": hidden_word_accuracy(model, self, dataset, batch_size, **options)}


def grounding_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the chosen tokens.

    Args:
        logits: (B, K, V).
        targets: (B, K) int64.
        valid: (B, K) bool, which of them count.

    Returns:
        (loss, accuracy), float32 scalars, both 0 where no token was chosen; the accuracy carries no gradient.
    """
    count = valid.sum().clamp(min=1)
    entropy = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    loss = entropy.masked_fill(~valid, 0.0).sum() / count
    right = (logits.detach().argmax(dim=-1) == targets) & valid
    return loss, right.sum() / count
