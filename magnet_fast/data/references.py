"""Which picture of a pool goes with which sentence, found once and kept in a file: TV-Net's retrieval.

Stated by its abstract: the most relevant image of an external pool, by visual and by textual similarity. Our choice:
the pool is a training split; the textual key of a sentence is its mean word vector, the visual key of an image the mean
of its coarsest map, both of length 1; of the 50 sentences nearest by text, that with the largest product of both
cosines gives its image. A sentence's own image is never taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast.atomic import write_text_atomically
from magnet_fast.data.datasets.base import read_json
from magnet_fast.data.datasets.reader import Reader, Ref, Sentence
from magnet_fast.data.tokenizers.base import ExpressionTokenizer
from magnet_fast.data.transforms import open_fit, open_image
from magnet_fast.data.values import shown
from magnet_fast.models.base import ReferringModel

FORMAT = "magnet_fast.references/1"
NEAREST = 50
_ROWS = 128  # sentences compared with the pool at a time

References = dict[str, dict[tuple[int, int], int]]
"""Split -> (ref_id, sent_id) -> image_id."""


@torch.no_grad()
def find_references(
    model: ReferringModel,
    tokenizer: ExpressionTokenizer,
    reader: Reader,
    pool: str = "train",
    *,
    nearest: int = NEAREST,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> References:
    """A picture for each sentence of every split.

    Args:
        model: whose image encoder and word vectors compare; put into eval mode. Pretrained ones tell more.
        tokenizer: the model's.
        reader: the data.
        pool: the split that pictures come from.
        nearest: so many sentences by text are compared by image, too.
        batch_size: images at a time.
        progress: called with (images done, images in all).

    Raises:
        ValueError: an unknown split, one whose sentences are about fewer than two images, or a sentence that cannot be
            read.
    """
    spoken = {split: _spoken(reader, split) for split in dict.fromkeys((pool, *reader.splits))}
    images = sorted({ref.image_id for rows in spoken.values() for ref, _ in rows})
    if len({ref.image_id for ref, _ in spoken[pool]}) < 2:
        raise ValueError(f"pool is {pool!r}, whose sentences are about one image; expected at least two")
    place = {image_id: row for row, image_id in enumerate(images)}
    text = {split: _text_keys(model, tokenizer, reader, rows) for split, rows in spoken.items()}
    about = {
        split: torch.tensor([place[ref.image_id] for ref, _ in rows], device="cpu") for split, rows in spoken.items()
    }
    look = _visual_keys(model, reader, images, batch_size, progress)
    found: References = {}
    for split, rows in spoken.items():
        chosen = choose(text[split], about[split], text[pool], about[pool], look, nearest)
        found[split] = {
            (ref.ref_id, sentence.sent_id): images[row]
            for (ref, sentence), row in zip(rows, about[pool][chosen].tolist(), strict=True)
        }
    return found


def choose(
    text: Tensor, about: Tensor, pool_text: Tensor, pool_about: Tensor, look: Tensor, nearest: int = NEAREST
) -> Tensor:
    """For each of N sentences the one of M in the pool, about another image, that is most like it: (N,) int64.

    Of the `nearest` by the cosine of texts it has the largest product of that and the cosine of images, both at least
    0. A sentence whose own image is all that the pool has gets any.

    Args:
        text, pool_text: (N, D) and (M, D), rows of length 1.
        about, pool_about: (N,) and (M,) int64, each sentence's image as a row of `look`.
        look: (I, C), rows of length 1.
    """
    chosen = []
    for start in range(0, len(text), _ROWS):
        part, own = text[start : start + _ROWS], about[start : start + _ROWS]
        alike = (part @ pool_text.T).masked_fill(own[:, None] == pool_about, -torch.inf)
        cosine, item = alike.topk(min(nearest, len(pool_text)), dim=1)
        seen = (look[pool_about[item]] @ look[own][..., None])[..., 0]
        product = (cosine.clamp(min=0) * seen.clamp(min=0)).masked_fill(cosine.isneginf(), -1)
        chosen.append(item.gather(1, product.argmax(dim=1, keepdim=True))[:, 0])
    return torch.cat(chosen)


def write_references(path: str | os.PathLike[str], references: References, pool: str) -> None:
    """One JSON file, atomically: {format, pool, references: {split: [[ref_id, sent_id, image_id], …]}}."""
    rows = {split: [[*key, image_id] for key, image_id in found.items()] for split, found in references.items()}
    write_text_atomically(path, json.dumps({"format": FORMAT, "pool": pool, "references": rows}) + "\n")


def read_references(path: str | os.PathLike[str], reader: Reader, split: str) -> dict[tuple[int, int], int]:
    """The image_id for each (ref_id, sent_id) of a split, checked against the data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one of other data: a sentence without picture, a picture that the pool does not
            hold, or that is the sentence's own.
    """
    path = Path(path)
    content = read_json(path, unique=True)
    format = content.get("format") if isinstance(content, dict) else None
    if format != FORMAT:
        raise ValueError(f"{path}: format is {shown(format)}; expected {FORMAT!r}, as `data retrieve` writes")
    rows, pool = content.get("references"), content.get("pool")
    rows = rows.get(split) if isinstance(rows, dict) else None
    whole = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 3 and all(type(number) is int for number in row) for row in rows
    )
    if not whole:
        raise ValueError(f"{path}: expected a list of [ref_id, sent_id, image_id] for the split {split!r}")
    if pool not in reader.splits:
        raise ValueError(f"{path}: pool is {shown(pool)}; expected one of {', '.join(reader.splits)}")
    found = {(ref_id, sent_id): image_id for ref_id, sent_id, image_id in rows}
    held = {ref.image_id for ref in reader.refs(pool)}
    for ref, sentence in _spoken(reader, split):
        image_id = found.get((ref.ref_id, sentence.sent_id))
        wrong = None
        if image_id is None:
            wrong = "has no picture"
        elif image_id not in held:
            wrong = f"has picture {image_id}, which is not in the split {pool!r}"
        elif image_id == ref.image_id:
            wrong = "has its own picture"
        if wrong is not None:
            raise ValueError(
                f"{path}: ref_id {ref.ref_id}, sent_id {sentence.sent_id} of {reader.source} {wrong}; the file is of "
                "other data, make it again by `data retrieve`"
            )
    return found


def _spoken(reader: Reader, split: str) -> list[tuple[Ref, Sentence]]:
    return [(ref, sentence) for ref in reader.refs(split) for sentence in ref.sentences]


def _text_keys(
    model: ReferringModel, tokenizer: ExpressionTokenizer, reader: Reader, rows: Sequence[tuple[Ref, Sentence]]
) -> Tensor:
    """(N, D) float32 of length 1: means of the vectors of a sentence's words."""
    vectors = model.text_encoder.word_embedding.detach().float().cpu()
    frame = torch.tensor(sorted(set(tokenizer.special_ids.values()) - {tokenizer.unknown_id}), device="cpu")
    keys = []
    for ref, sentence in rows:
        try:
            (reading,) = tokenizer.readings([sentence.raw])
        except ValueError as error:
            raise ValueError(f"{reader.source}: ref_id {ref.ref_id}, sent_id {sentence.sent_id}: {error}") from error
        ids = torch.tensor(reading.ids, device="cpu")
        keys.append(vectors[ids[~torch.isin(ids, frame)]].mean(dim=0))
    return F.normalize(torch.stack(keys), dim=1)


def _visual_keys(
    model: ReferringModel,
    reader: Reader,
    images: Sequence[int],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """(I, C) float32 of length 1: means of the coarsest maps."""
    model.eval()
    fit, device = open_fit(model.spec), next(model.parameters()).device
    keys = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        pixels = torch.stack([fit.image(open_image(reader.image_path(image_id))) for image_id in part])
        keys.append(model.maps(pixels.to(device))[-1].float().mean(dim=(1, 2)).cpu())
        if progress is not None:
            progress(start + len(part), len(images))
    return F.normalize(torch.cat(keys), dim=1)
