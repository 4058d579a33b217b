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

    ``blind`` is a control: the second pass gets a grey image, and the predictor no mask. What it then says, it says
    from the other words alone.
    """

    def __init__(self, head: MaskGrounding, masker: TokenMasker, image_stage: int, blind: bool = False) -> None:
        super().__init__()
        self.head, self.masker, self.image_stage, self.blind = head, masker, image_stage, blind

    def forward(
        self, model: nn.Module, image: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the hidden words."""
        hidden = self.masker(input_ids, attention_mask)
        logits = self.predict(model, image, attention_mask, mask, hidden.input_ids, hidden.positions, blind=self.blind)
        return grounding_loss(logits, hidden.targets, hidden.valid)

    def predict(
        self,
        model: nn.Module,
        image: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        *,
        blind: bool = False,
    ) -> Tensor:
        """Logits (B, K, V) of the words at the positions (B, K), where ``input_ids`` has them hidden."""
        if blind:  # zeros are ImageNet's mean colour, and a mask without pixels
            image, mask = torch.zeros_like(image), torch.zeros_like(mask)
        features, words = model.encode(image, input_ids, attention_mask)
        embedding = model.text_encoder.bert.get_input_embeddings().weight
        return self.head(words, attention_mask, features[self.image_stage], mask, positions, embedding)


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
    masker = TokenMasker(tokenizer, section.share, section.scheme)
    return Grounding(head, masker, section.image_stage, section.blind)


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
