"""A vector for each word and an LSTM over them: the text encoder of RNR (Rufus et al., IROS 2021) and of its time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.base import TextEncoder
from magnet_fast.models.config import TextConfig, part
from magnet_fast.models.contract import Text, Words
from magnet_fast.models.encoders.word_vectors import VECTORS, VOCABULARY, read_word_vectors


@part
class VectorsLSTMConfig(TextConfig):
    """Sizes of vectors and states; RNR's unless said, with the vocabulary of BERT's word pieces [our choice]."""

    kind: Literal["vectors_lstm"] = "vectors_lstm"
    vocab_size: int = Field(30522, gt=0)
    vector_width: int = Field(300, gt=0, description="channels of a vector; GloVe's have 50, 100, 200 or 300")
    hidden_size: int = Field(512, gt=0, description="of the LSTM's states, which are the words")
    max_positions: int = Field(512, gt=0, description="the most tokens; an LSTM itself has no limit")

    @property
    def width(self) -> int:
        return self.hidden_size

    def build(self) -> VectorsLSTM:
        return VectorsLSTM(self)


class VectorsLSTM(TextEncoder):
    """One layer, read from left to right; the words are all its states.

    Padding is a vector of zeros, which runs through as in RNR's code: it stands behind the words, so that no word sees
    it. The vectors are trained with the rest; RNR's are GloVe's and fixed.
    """

    def __init__(self, config: VectorsLSTMConfig) -> None:
        super().__init__()
        self.width, self.vocab_size, self.max_positions = config.width, config.vocab_size, config.max_positions
        self.vectors = nn.Embedding(config.vocab_size, config.vector_width)
        self.lstm = nn.LSTM(config.vector_width, config.hidden_size, batch_first=True)
        # A file of vectors leaves the LSTM as it was, and tokens that it does not have: none of it can be had again.
        self.resized = frozenset(name for name, _ in self.named_parameters())

    @property
    def word_embedding(self) -> Tensor:
        return self.vectors.weight

    def start(self, text: Text, embedded: Tensor | None = None) -> Words:
        vectors = self.vectors(text.ids) if embedded is None else embedded
        states, _ = self.lstm(torch.where(text.mask[..., None], vectors, 0))
        return Words(states, text.mask)

    def load_pretrained(self, source: str | None) -> None:
        """Vectors from a folder of `vocab.txt`, a token a line in the order of ids, and `vectors.txt`, GloVe's file.

        Tokens that it does not have, pieces inside words among them, keep what they start from.

        Raises:
            ValueError: no folder is given, or the files are not there or not of these sizes.
        """
        if source is None:
            raise ValueError(
                f"pretrained: an encoder of word vectors has no published weights; give pretrained={{'text': FOLDER}} "
                f"with {VOCABULARY} and {VECTORS}, or {{'text': False}}"
            )
        folder = Path(os.path.expanduser(source))
        for name in (VOCABULARY, VECTORS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"pretrained: {source!r} has no {name}; expected a folder with {VOCABULARY} and {VECTORS}"
                )
        words = [line.rstrip("\r") for line in (folder / VOCABULARY).read_text("utf-8").removesuffix("\n").split("\n")]
        if len(words) > self.vocab_size:
            raise ValueError(
                f"pretrained: {folder / VOCABULARY} has {len(words)} tokens; this encoder embeds {self.vocab_size}"
            )
        vectors, found = read_word_vectors(folder / VECTORS, words, self.vectors.embedding_dim)
        with torch.no_grad():
            self.vectors.weight[: len(words)][found] = vectors[found].to(self.vectors.weight)
