"""What a training step minimises: the model with its losses, as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magnet_fast.data import Tokenizer
from magnet_fast.data.masking import TokenMasker
from magnet_fast.losses import LossWeights, alignment_loss, grounding_loss, segmentation_loss
from magnet_fast.models.mask_grounding import MaskGrounding
from magnet_fast.training.config import LossSection, TrainConfig

AUTOCAST_DTYPE = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Grounding(nn.Module):
    """Mask Grounding at work on a model: hides words, encodes the sentence again, predicts what was hidden.

    The sentence with hidden words goes through the model's encoders with the image once more; the decoders are not
    run for it. That the segmentation reads the whole sentence, in a pass of its own, is our choice.
    """

    def __init__(self, head: MaskGrounding, masker: TokenMasker, image_stage: int) -> None:
        super().__init__()
        self.head, self.masker, self.image_stage = head, masker, image_stage

    def forward(
        self, model: nn.Module, image: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the hidden words."""
        hidden = self.masker(input_ids, attention_mask)
        features, words = model.encode(image, hidden.input_ids, attention_mask)
        embedding = model.text_encoder.bert.get_input_embeddings().weight
        feature = features[self.image_stage]
        logits = self.head(words, attention_mask, feature, mask, hidden.positions, embedding)
        return grounding_loss(logits, hidden.targets, hidden.valid)


def build_grounding(config: TrainConfig, model: nn.Module, tokenizer: Tokenizer) -> Grounding | None:
    """The Mask Grounding of a run, with random weights; None where its loss has no weight."""
    if config.loss.grounding == 0:
        return None
    section, text = config.grounding, model.config.text
    head = MaskGrounding(
        text.hidden_size,
        model.config.image.channels[section.image_stage],
        text.vocab_size,
        layers=section.layers,
        heads=section.heads,
        feedforward=section.feedforward,
    )
    return Grounding(head, TokenMasker(tokenizer, section.share, section.scheme), section.image_stage)


class Objective(nn.Module):
    """Model and losses as one module: DDP and torch.compile then see tensors in, tensors out.

    forward returns ``total``, to be differentiated, and the detached parts named in `logged`.
    """

    def __init__(self, model: nn.Module, loss: LossSection, precision: str, grounding: Grounding | None = None) -> None:
        super().__init__()
        if loss.alignment and not hasattr(model, "text_projection"):
            raise ValueError(
                f"loss.alignment: {type(model).__name__} has no mask features to align with the sentence; set it to 0"
            )
        self.model, self.grounding, self.loss = model, grounding, loss
        self.weights = LossWeights(loss.bce, loss.dice, loss.classification)
        self.dtype = AUTOCAST_DTYPE[precision]
        self.logged = ("bce", "dice", "class")
        self.logged += ("p2p", "p2t") if loss.alignment else ()
        self.logged += ("grounding", "grounding_accuracy") if grounding else ()

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output = self.model(image, input_ids, attention_mask)
            sentence = self._sentence(output.text_features, attention_mask) if self.loss.alignment else None
        losses = segmentation_loss(output, mask, self.weights)
        if sentence is not None:
            parts = alignment_loss(
                output.mask_features,
                sentence,
                mask,
                pixel_temperature=self.loss.pixel_temperature,
                text_temperature=self.loss.text_temperature,
            )
            losses["total"] = losses["total"] + self.loss.alignment * (parts["p2p"] + parts["p2t"])
            losses.update({name: part.detach() for name, part in parts.items()})
        if self.grounding is not None:
            with torch.autocast(image.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                loss, accuracy = self.grounding(self.model, image, input_ids, attention_mask, mask)
            losses["total"] = losses["total"] + self.loss.grounding * loss
            losses.update({"grounding": loss.detach(), "grounding_accuracy": accuracy})
        return losses

    def _sentence(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D) words to the projected mean of those that are not padding, (B, C)."""
        keep = attention_mask[..., None].to(words.dtype)
        mean = (words * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
        return self.model.text_projection(mean)
