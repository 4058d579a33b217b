"""Sentences made from masks: photographs with regions of known classes, changed at random, and what is true of them."""

from __future__ import annotations

from magnet_fast.data.phrases.dataset import PhraseDataset
from magnet_fast.data.phrases.photograph import Photograph
from magnet_fast.data.phrases.saying import Phrase, phrases

__all__ = ["Photograph", "Phrase", "PhraseDataset", "phrases"]
