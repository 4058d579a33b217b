"""A model with fewer words: for use by people who download it, not for training on.

Most of a small text encoder is its table of words, and most of the words are never said of a picture. Those that are
kept keep their vectors; a word that is not is read in the pieces that are, down to single characters. Our own choice.
"""

from __future__ import annotations

from collections.abc import Collection

from magnet_fast import models
from magnet_fast.data.tokenizers import ExpressionTokenizer, Tokenizer
from magnet_fast.devices import on_cpu
from magnet_fast.models.base import ReferringModel

_PIECE = "##"


def kept_tokens(tokenizer: ExpressionTokenizer, count: int, sentences: Collection[str] = ()) -> list[str]:
    """Which tokens of a WordPiece vocabulary are kept, in the order of their ids.

    Special tokens, every single character and every piece of one, the tokens of `sentences`; then, up to `count`, those
    with the lowest ids that are made of Latin letters: BERT's vocabulary has the most frequent first.

    Raises:
        ValueError: `count` is below what has to be kept.
    """
    vocabulary = tokenizer.vocabulary  # made anew at each mention
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    needed = set(tokenizer.special_ids)
    needed |= {token for token in by_id if len(token.removeprefix(_PIECE)) == 1 and token.isascii()}
    names = {index: token for token, index in vocabulary.items()}
    for sentence in sentences:
        (reading,) = tokenizer.readings([sentence])
        needed |= {names[index] for index in reading.ids}
    if count < len(needed):
        raise ValueError(f"words: expected at least {len(needed)}, what has to be kept; got {count}")
    letters = [token for token in by_id if token.removeprefix(_PIECE).isalpha() and token.isascii()]
    for token in letters:
        if len(needed) >= count:
            break
        needed.add(token)
    return [token for token in by_id if token in needed]


def shrunk(
    model: ReferringModel, tokenizer: ExpressionTokenizer, count: int, sentences: Collection[str] = ()
) -> tuple[ReferringModel, Tokenizer]:
    """A copy of a model that knows `count` tokens, and its tokenizer; both for `model.save_pretrained`.

    Args:
        model: with a text encoder of kind `bert` or `transformers`.
        tokenizer: its own, BERT's lower-casing WordPiece in whatever form.
        count: tokens to keep; see `kept_tokens`.
        sentences: whose tokens are kept whatever their ids, and that both tokenizers must read alike.

    Raises:
        ValueError: another kind of text encoder or tokenizer, or a count that is too small or no smaller than before.
    """
    entries = model.config.model_dump()
    text = {"bert": entries["text"], "transformers": entries["text"].get("settings")}.get(model.config.text.kind)
    if text is None:
        raise ValueError(f"model: its text encoder is {model.config.text.kind!r}; expected 'bert' or 'transformers'")
    if count >= tokenizer.vocab_size:
        raise ValueError(f"words: expected fewer than the tokenizer's {tokenizer.vocab_size}, got {count}")
    vocabulary = tokenizer.vocabulary
    if vocabulary.get("[PAD]") != 0 or not {"[UNK]", "[CLS]", "[SEP]"} <= tokenizer.special_ids.keys():
        raise ValueError(f"tokenizer: expected BERT's WordPiece, with [PAD] as token 0; {tokenizer.source} is another")
    tokens = kept_tokens(tokenizer, count, sentences)
    fewer = Tokenizer(tokens, tokenizer.max_tokens)
    names = [{index: token for token, index in one.vocabulary.items()} for one in (tokenizer, fewer)]
    for sentence in sentences:
        (before,), (after,) = (one.readings([sentence]) for one in (tokenizer, fewer))
        was, now = ([known[i] for i in one.ids] for known, one in zip(names, (before, after), strict=True))
        if was != now and not before.cut:  # of what is too long the two keep other ends
            raise ValueError(f"tokenizer: expected a lower-casing WordPiece; {sentence!r} is {was}, and would be {now}")
    text["vocab_size"] = len(tokens)
    entries["input"]["tokenizer"] = "wordpiece"
    with on_cpu():
        small = models.from_config(entries).eval()
    state, rows = model.state_dict(), model.text_encoder.word_embedding
    (name,) = (key for key, value in model.named_parameters() if value is rows)
    state[name] = rows.detach()[[vocabulary[token] for token in tokens]]
    small.load_state_dict(state)
    return small, fewer
