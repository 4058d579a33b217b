"""What a training step minimises: the model with its losses, as one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast.models.contract import Text
from magnet_fast.training.terms import Term

AUTOCAST_DTYPE = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Objective(nn.Module):
    """Model and terms as one module: DDP, FSDP2 and torch.compile then see tensors in, tensors out.

    Args:
        model: as `magnet_fast.models` makes them.
        terms: the losses by name.
        precision: "float32", "bf16" or "fp16"; of the model under autocast.
        sentences_per_image: so many samples in a row have the same image; a model that looks first looks once.

    Attributes:
        logged: names of the values that `forward` returns beside the total.
    """

    def __init__(
        self, model: nn.Module, terms: Mapping[str, Term], precision: str, sentences_per_image: int = 1
    ) -> None:
        super().__init__()
        self.model, self.terms = model, nn.ModuleDict(terms)
        self.dtype = AUTOCAST_DTYPE[precision]
        self.sentences_per_image = sentences_per_image
        self.logged = tuple(name for term in terms.values() for name in term.logged)
        twice = sorted({name for name in self.logged if self.logged.count(name) > 1})
        if twice:
            raise ValueError(f"terms: more than one of them logs {', '.join(twice)}")

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`total`, to be differentiated, and the detached values named in `logged`; float32 scalars.

        Args:
            batch: `tensors_of` a collated batch, on the model's device; and `progress`, the share of the run that is
                done, for terms that change with it.
        """
        with torch.autocast(batch["image"].device.type, dtype=self.dtype, enabled=self.dtype is not None):
            shared = self._look(batch["image"])
            seen = {"seen": shared["seen"]} if shared else {}
            prediction = self.model(batch["image"], batch["text"], batch.get("extra"), **seen)
            batch = {**batch, **shared}
            total, values = None, {}
            for term in self.terms.values():
                loss, parts = term(prediction, batch, self.model)
                # Not 0 + …: the first loss as it is, and a sum in the order of the terms.
                total = term.weight * loss if total is None else total + term.weight * loss
                values.update(parts)
        return {"total": total, **values}

    def _look(self, image: Tensor) -> dict[str, list[Tensor]]:
        """`looked`, once for each image, and `seen`, for each sentence; nothing where they would serve nobody."""
        each = self.sentences_per_image
        wanted = each > 1 or any(term.encodes or term.looks for term in self.terms.values())
        if not (wanted and getattr(self.model, "looks_first", False)):
            return {}
        looked = self.model.look(image[::each])
        seen = looked if each == 1 else [one.repeat_interleave(each, dim=0) for one in looked]
        return {"looked": looked, "seen": seen}

    def repeated_layers(self) -> list[nn.Module]:
        """Those of the model and of every term: units of recomputation and of sharding."""
        return [layer for part in (self.model, *self.terms.values()) for layer in part.repeated_layers()]


def tensors_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What a step may read of a batch: its tensors, and `category` as one (B,) int64, -1 where it is unknown.

    Lists would make torch.compile start anew for every batch.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor | Text | dict)}
    if "category" in batch:
        known = [-1 if one is None else one for one in batch["category"]]
        tensors["category"] = torch.tensor(known, device="cpu")
    return tensors
