"""Vectors of words out of a text file, as GloVe, fastText and word2vec publish them: a word, then its numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCABULARY, VECTORS = "vocab.txt", "vectors.txt"


def read_word_vectors(path: str | os.PathLike[str], words: Sequence[str], width: int) -> tuple[Tensor, Tensor]:
    """The vectors of a vocabulary's words.

    A line is a word and `width` numbers, separated by single blanks; a word may itself hold blanks, as some of GloVe's
    do, and a first line of two whole numbers, word2vec's header, is passed over. Of a word that stands twice the first
    line counts. Only what is asked for is kept: GloVe's file of 5 GB needs no more memory than the vocabulary.

    Args:
        path: the file, UTF-8.
        words: in the order of their ids; they are looked up as they stand.
        width: numbers of a vector.

    Returns:
        float32 (len(words), width), zeros for a word that the file does not have; bool (len(words),), whether it does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of this form, naming file and line; or none of the words is in the file.
    """
    path = Path(path)
    places: dict[bytes, list[int]] = {}
    for place, word in enumerate(words):
        places.setdefault(word.encode(), []).append(place)
    vectors, found = np.zeros((len(words), width), dtype=np.float32), np.zeros(len(words), dtype=bool)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            word, *numbers = line.rstrip().rsplit(b" ", width)
            if number == 1 and len(numbers) == 1 and width != 1 and word.isdigit() and numbers[0].isdigit():
                if int(numbers[0]) != width:
                    raise ValueError(f"{path}: its vectors have {int(numbers[0])} numbers, expected {width}")
                continue
            if len(numbers) != width or not _is_number(numbers[0]):
                raise ValueError(f"{path}, line {number}: expected a word and {width} numbers, got {_shown(line)}")
            if number == 1 and b" " in word and _is_number(word.rsplit(b" ", 1)[1]):
                raise ValueError(f"{path}, line {number}: it has more than the {width} numbers expected")
            if word not in places or found[places[word][0]]:
                continue
            try:
                vector = np.array(numbers, dtype=np.float64)
            except ValueError:
                vector = np.full(1, np.nan)
            if not np.isfinite(vector).all():
                raise ValueError(f"{path}, line {number}: expected finite numbers after the word, got {_shown(line)}")
            vectors[places[word]], found[places[word]] = vector, True
    if not found.any():
        raise ValueError(f"{path}: it has none of the {len(words)} words of the vocabulary")
    return torch.from_numpy(vectors), torch.from_numpy(found)


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:60] + "…")
