"""Any transformers text encoder of BERT's kind: token ids and their mask in, a last hidden state out."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from magnet_fast.models.base import TextEncoder
from magnet_fast.models.config import TextConfig, part
from magnet_fast.models.contract import Text, Words
from magnet_fast.models.state import check_complete, load_strictly, unreachable


@part
class TransformersConfig(TextConfig):
    """An encoder by its name on the hub or by a local folder; sizes are read off its configuration.

    The configuration read is kept in `settings`, so that a checkpoint is built again without that folder.
    """

    kind: Literal["transformers"] = "transformers"
    name: str = Field(min_length=1, description="a local folder, or a name on the hub")
    settings: dict[str, Any] = Field(default_factory=dict, description="of transformers; read off `name` where empty")

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("settings") or not isinstance(values.get("name"), str):
            return values
        try:
            found = AutoConfig.from_pretrained(values["name"], trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"name: transformers finds no text encoder {values['name']!r}: {reason}") from error
        return {**values, "settings": {**found.to_diff_dict(), "model_type": found.model_type}}

    @model_validator(mode="after")
    def _encoder(self) -> TransformersConfig:
        found = self.transformers
        # Those that were trained to say hidden words: they read both ways, and in one stack.
        if type(found) not in MODEL_FOR_MASKED_LM_MAPPING or found.is_encoder_decoder:
            raise ValueError(f"name: {self.name!r} is a {found.model_type}, expected a text encoder of BERT's kind")
        return self

    @property
    def transformers(self) -> PretrainedConfig:
        """transformers' own configuration."""
        return AutoConfig.for_model(**self.settings)

    @property
    def width(self) -> int:
        return self.transformers.hidden_size

    @property
    def tokenizer(self) -> str:
        return self.name

    def build(self) -> TransformersEncoder:
        return TransformersEncoder(self)


class TransformersEncoder(TextEncoder):
    """The encoder run whole, before the image's first stage."""

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__()
        found = config.transformers
        self.name = config.name
        # A stored configuration may name code on the hub, as its class or its attention: neither is taken.
        plain = {"trust_remote_code": False, "attn_implementation": None}
        self.encoder: PreTrainedModel = AutoModel.from_config(found, **plain, **_arguments(found))
        self.width, self.vocab_size = found.hidden_size, found.vocab_size
        # RoBERTa and its kind count positions from behind the padding's.
        positions = getattr(self.encoder.embeddings, "position_embeddings", None)
        padding = getattr(positions, "padding_idx", None)
        self.max_positions = found.max_position_embeddings - (0 if padding is None else padding + 1)

    @property
    def word_embedding(self) -> Tensor:
        return self.encoder.get_input_embeddings().weight

    def start(self, text: Text, embedded: Tensor | None = None) -> Words:
        given = {"input_ids": text.ids} if embedded is None else {"inputs_embeds": embedded}
        hidden = self.encoder(**given, attention_mask=text.mask.long()).last_hidden_state
        return Words(hidden, text.mask)

    def load_pretrained(self, source: str | None) -> None:
        name = source or self.name
        try:
            # Of a source with more layers, the first ones: the configuration says how many.
            config = self.encoder.config
            arguments = {"trust_remote_code": False, **_arguments(config), "config": config}
            found, report = AutoModel.from_pretrained(name, output_loading_info=True, **arguments)
        except (OSError, ValueError) as error:
            raise unreachable("text", name, error) from error
        check_complete(report, f"text weights {name!r}")
        load_strictly(self.encoder, found.state_dict(), f"text weights {name!r}")


def _arguments(config: PretrainedConfig) -> dict[str, Any]:
    """Weights in float32 like the other parts', however they were stored; no pooler: it would get no gradient."""
    model = AutoModel._model_mapping[type(config)]
    pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model).parameters else {}
    return {"dtype": torch.float32, **pooler}
