"""Small vocabularies for the tests of tokenizers."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import transformers

GOLDEN_CLIP = Path(__file__).parent.parent / "golden" / "clip_vocabulary"
SENTENCES = ["the small red star above the blue box", "second circle from the left", "café: the über-waiter's plate"]


def save_roberta(folder: Path) -> str:
    """A tokenizer of RoBERTa's kind, byte pairs with <s>, </s>, <pad> as 1 and <mask>, in a folder."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(SENTENCES * 3, vocab_size=300, special_tokens=special, show_progress=False)
    folder.mkdir()
    tokenizer.save_model(str(folder))
    saved = transformers.RobertaTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    )  # transformers' own class, from its own files
    saved.save_pretrained(folder)
    return str(folder)
