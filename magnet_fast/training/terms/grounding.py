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
from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.hidden_words import hidden_word_accuracy
from magnet_fast.training.terms.term import Term, TermConfig, register
from magnet_fast.training.terms.word_predictor import WordPredictor


class GroundingConfig(TermConfig):
    """What is hidden, and the predictor. The weight of 1 is our choice."""

    share: float = Field(0.15, gt=0, le=1, description="of a sentence's ordinary tokens that is hidden")
    scheme: Literal["90/10", "80/10/10"] = Field("90/10", description="[MASK] or unchanged; or BERT's")
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
        self.image_stage, self.blind = config.image_stage, config.blind
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
        )
        config = config.model_copy(update={"image_stage": stage})
        return cls(config, predictor, TokenHider(tokenizer, config.share, config.scheme))

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hider(batch["text"])
        logits = self.predict(model, batch, hidden, blind=self.blind)
        loss, accuracy = grounding_loss(logits, hidden.targets, hidden.valid)
        return loss, {"grounding": loss.detach(), "grounding_accuracy": accuracy}

    def predict(self, model: nn.Module, batch: dict[str, Any], hidden: HiddenTokens, *, blind: bool = False) -> Tensor:
        """Logits (B, K, V) of the words at the hidden positions (B, K).

        `blind` is a control: image and mask are grey and empty. What is then said, is said from the other words alone.
        """
        image, mask, text = batch["image"], batch["mask"], hidden.text
        if blind:  # zeros are the mean colour, and a mask without pixels
            image, mask = torch.zeros_like(image), torch.zeros_like(mask)
        vocabulary, embedded = model.text_encoder.word_embedding, None
        if self.cover is not None:
            own = F.embedding(text.ids, vocabulary)
            embedded = torch.where(hidden.covered[..., None], self.cover.to(own.dtype), own)
        shared = {"seen": batch["seen"]} if "seen" in batch and not blind else {}
        features = model.encode(image, text, batch.get("extra"), embedded=embedded, **shared)
        words, pixels = features.words, features.maps[self.image_stage]
        return self.predictor(words.features, text.mask, pixels, mask, hidden.positions, vocabulary)

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
