"""What a training loss is, and how a recipe names one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from magnet_fast.models.contract import Prediction
from magnet_fast.training.strict import Strict, explain, unknown_key


class TermConfig(Strict):
    """Options that every term has; each adds its own."""

    weight: float = Field(1.0, ge=0, description="of the loss in the sum; 0 leaves the term out")


class Term(nn.Module):
    """A training loss; it may own parameters, which are trained with the model and never exported.

    Attributes:
        config_class: its options in a recipe.
        logged: names of the values that `forward` returns beside the loss; no two terms of a run share one.
        encodes: whether it encodes the batch's images again, with other sentences.
        looks: whether it reads `looked`.
        name: that of the recipe.
        weight: factor of the loss in the sum.
    """

    config_class: ClassVar[type[TermConfig]] = TermConfig
    logged: tuple[str, ...] = ()
    encodes: ClassVar[bool] = False
    looks: ClassVar[bool] = False
    name: ClassVar[str]

    def __init__(self, config: TermConfig) -> None:
        super().__init__()
        self.weight = config.weight

    @classmethod
    def build(cls, config: Any, model: nn.Module, tokenizer: Any) -> Term:
        """The term for a model, with random weights.

        Args:
            config: an instance of `config_class`.
            model: what it will be trained with; only looked at.
            tokenizer: of the training data.

        Raises:
            ValueError: the model lacks what the term reads.
        """
        return cls(config)

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and detached scalars for the log.

        Args:
            prediction: the model's, for this batch.
            batch: image, text, mask, exists, image_id and extra, as collated (see `magnet_fast.data.sample`);
                `category`, (B,) int64, -1 where unknown; `progress`, the share of the run that is done, a float32
                scalar; and `seen`, what the model has made of the images before words come, where a term `encodes` or
                `looks` and the model looks first; `looked` is the same, once for images that several samples in a row
                share.
            model: for terms that run parts of it once more.

        Returns:
            A float32 scalar without the weight, a mean over the images of the batch; and one value for each name in
            `logged`.
        """
        raise NotImplementedError

    def check(self, dataset: Any) -> None:
        """Raise a ValueError for training data that lack what the term reads."""

    def repeated_layers(self) -> list[nn.Module]:
        """Layers whose activations may be recomputed, and that are sharded one by one; as of a model."""
        return []

    def measure(
        self,
        model: nn.Module,
        dataset: Any,
        batch_size: int,
        *,
        limit: int | None = None,
        workers: int = 0,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """What the term has to say at a validation, beside the task's scores. Collective under torch.distributed."""
        return {}

    @classmethod
    def refuse(cls, lack: str) -> ValueError:
        """The error for a model without what the term reads."""
        return ValueError(f"terms.{cls.name}: {lack}; set terms.{cls.name}.weight to 0, or train another model")


def says_presence(model: nn.Module) -> bool:
    """Whether the model's predictions have a presence, by a part of its own or by its head."""
    return model.presence is not None or model.head.says_presence


TERMS: dict[str, type[Term]] = {}
"""All terms by the name that recipes use."""


def register(name: str) -> Callable[[type[Term]], type[Term]]:
    """Class decorator: recipes may name this term."""

    def add(term: type[Term]) -> type[Term]:
        if name in TERMS:
            raise ValueError(f"name: there is a term {name!r} already ({TERMS[name].__qualname__})")
        term.name, TERMS[name] = name, term
        return term

    return add


def read_terms(value: Any) -> Any:
    """A recipe's `terms` with the options checked by each term's own class; for pydantic, before its validation."""
    if not isinstance(value, Mapping):
        raise ValueError("expected terms by name, such as {mask: {dice: 2}, alignment: {weight: 0.5}}")
    found, wrong = {}, []
    for name, options in value.items():
        if name not in TERMS:
            wrong.append(unknown_key(str(name), list(TERMS), "terms."))
            continue
        options_of = TERMS[name].config_class
        try:
            found[name] = options_of.model_validate({} if options is None else options)
        except ValidationError as error:
            wrong += [explain(entry, options_of, f"terms.{name}.").replace(".: ", ": ") for entry in error.errors()]
    if wrong:
        raise PydanticCustomError("explained", "{text}", {"text": "\n".join(wrong)})
    return found


def build_terms(configs: Mapping[str, TermConfig], model: nn.Module, tokenizer: Any) -> dict[str, Term]:
    """The terms of a run: those that the recipe names, and unless it names them with weight 0, `mask`, and `presence`
    where the model has one.

    Raises:
        ValueError: a term with a weight reads what the model does not have, or all weights are 0.
    """
    chosen = {"mask": TERMS["mask"].config_class()}
    if says_presence(model):
        chosen["presence"] = TERMS["presence"].config_class()
    chosen |= dict(sorted(configs.items()))  # sums and random weights shall not depend on the recipe's order
    names = [name for name, config in chosen.items() if config.weight > 0]
    if not names:
        raise ValueError("terms: all weights are 0; nothing is left to train for")
    return {name: TERMS[name].build(chosen[name], model, tokenizer) for name in names}
