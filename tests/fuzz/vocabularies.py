"""vocab.txt, tokenizer.json, merges: mutated, read, and tried with a sentence."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import ClassVar

from magnet_fast.data.tokenizers import ClipTokenizer, Tokenizer
from tests.data.vocabularies import GOLDEN_CLIP
from tests.fuzz.mutating import mutated_bytes, mutated_tree, nested
from tests.fuzz.target import Target, outcome_of

_SENTENCES = ["the red circle", "left", "zebra äöü", "[MASK] [SEP]", "\u2028\x00 x", "a" * 300]


class FuzzTarget(Target):
    """What opens encodes, too: ids are in the table, or the file is refused."""

    quick: ClassVar[int] = 60
    batch: ClassVar[int] = 1000
    long: ClassVar[int] = 50_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *"abcdefghijklmnopqrstuvwxyz",
            "the",
            "red",
            "##e",
            "##d",
        ]
        self.lines = "\n".join(words).encode()
        self.tree = json.loads(Tokenizer(words).to_json())
        self.clip = {file.name: file.read_bytes() for file in GOLDEN_CLIP.iterdir() if file.is_file()}
        self.clip_tree = json.loads(ClipTokenizer(GOLDEN_CLIP).to_json())

    def try_one(self, draw: random.Random) -> str:
        folder = self.folder / "vocabulary"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        opener = draw.choice([Tokenizer, Tokenizer, ClipTokenizer])
        files = self._files(draw, opener)
        for name, content in files.items():
            (folder / name).write_bytes(content)

        def read() -> None:
            tokenizer = opener(folder, draw.choice([3, 20]))
            tokenizer.digest(), tokenizer.to_json()
            for sentence in _SENTENCES:
                try:
                    ids, mask = tokenizer(sentence)
                except ValueError as error:  # of a sentence of which nothing is left, which names it
                    if "expression 0" not in str(error):
                        raise
                    continue
                assert int(ids.min()) >= 0 and int(ids.max()) < tokenizer.vocab_size, "an id beyond the vocabulary"
                assert ids.shape == mask.shape == (1, tokenizer.max_tokens)

        return outcome_of(read, *(folder / name for name in files), named="vocabulary")

    def _files(self, draw: random.Random, opener: type) -> dict[str, bytes]:
        if opener is Tokenizer:
            if draw.random() < 0.5:
                return {"vocab.txt": mutated_bytes(draw, self.lines, [self.lines])}
            return {"tokenizer.json": self._json(draw, self.tree)}
        if draw.random() < 0.3:
            return {"tokenizer.json": self._json(draw, self.clip_tree)}
        files = dict(self.clip)
        name = draw.choice(list(files))
        packed = name.endswith(".gz") and draw.random() < 0.5
        content = gzip.decompress(files[name]) if packed else files[name]
        content = self._json(draw, json.loads(content)) if name.endswith(".json") else mutated_bytes(draw, content)
        files[name] = gzip.compress(content) if packed else content
        return files

    def _json(self, draw: random.Random, tree: object) -> bytes:
        if draw.random() < 0.03:
            return nested(draw, draw.choice([100, 100_000])).encode()
        for _ in range(draw.choice([0, 1, 1, 2])):
            tree = mutated_tree(draw, tree)
        try:
            content = json.dumps(tree).encode()
        except ValueError:
            return b"9" * 5000
        return mutated_bytes(draw, content, most=2) if draw.random() < 0.2 else content
