"""How often Mask Grounding says the hidden word, by kind of word, beside what the same weights say without seeing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset

from magnet_fast.data.hidden_tokens import HiddenTokens
from magnet_fast.data.loader import Loader
from magnet_fast.data.loading import leave_to_the_main_process
from magnet_fast.data.sample import collate, to_device
from magnet_fast.data.scenes.word_kinds import KINDS, kinds_of_ids
from magnet_fast.models.contract import Text

SIGHTS = {
    "accuracy": (True, True),
    "without_image": (False, True),
    "without_mask": (True, False),
    "without_image_and_mask": (False, False),
}
"""What the predictor is given, image and mask, by the name of what it then gets right."""

_SENTENCES = 1000  # some 4000 words of scenes: a percent or two of a kind; two encoder passes a word


@torch.no_grad()
def hidden_word_accuracy(
    model: nn.Module,
    grounding: Any,
    dataset: Any,
    batch_size: int = 16,
    *,
    workers: int = 0,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Accuracy on the words of a dataset's first sentences (`limit`, at most 1000), hidden one at a time.

    Every ordinary word of a sentence is hidden once, alone and always behind [MASK]. Nothing is drawn: the result
    depends neither on batches nor on the number of processes, and the run's random generators are left alone.

    Without image: the encoders see a grey one (zeros, the mean colour). Without mask: it is empty, so that its token is
    the one that training gave to referents that are not there. Both are inputs that training has seldom or never
    shown; what a predictor reaches that was trained without them, a term with `blind` says.

    Args:
        model: as trained; put into eval mode for the time of the call.
        grounding: the `GroundingTerm`, as trained; likewise.
        dataset: items are samples, by sentences; where it has `word_kinds`, words are told apart by kind.
        batch_size: sentences whose words are encoded so many at a time.
        workers, limit, autocast: as for `evaluate`.

    Under torch.distributed each process does its share, and all get the whole result.

    Returns:
        Percent of words said right: `accuracy`, `without_image`, `without_mask`, `without_image_and_mask`, by the same
        weights; `most_frequent`: the best that one and the same answer for every word could reach here; `uniform`: a
        guess among all ordinary words; `words`: how many were hidden. And `kinds`: the same, but for `uniform`, for the
        words of each kind (`scenes.word_kinds.KINDS`) that occurs; empty where the data do not know their words.
    """
    device = next(model.parameters()).device
    count = min(_SENTENCES, len(dataset), limit or len(dataset))
    joined = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    loader = Loader(
        Subset(dataset, range(rank, count, world)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # not the training run's
        worker_init_fn=leave_to_the_main_process,
    )
    # By word: how often it was hidden, and how often it was then said right with each sight.
    counts = torch.zeros(1 + len(SIGHTS), len(model.text_encoder.word_embedding), dtype=torch.int64, device="cpu")
    modes = model.training, grounding.training
    model.eval()
    grounding.eval()
    try:
        for batch in loader:
            batch = to_device(batch, device)
            rows, hidden = grounding.hider.one_by_one(batch["text"])
            for some in torch.arange(len(rows), device=device).split(batch_size):
                chosen = HiddenTokens(Text(*(part[some] for part in hidden.text)), *(part[some] for part in hidden[1:]))
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    right = _right(model, grounding, _rows(batch, rows[some]), chosen)
                targets = chosen.targets[:, 0].cpu()
                for row, found in zip(counts, (torch.ones_like(targets, dtype=torch.bool), *right), strict=True):
                    row += torch.bincount(targets[found], minlength=len(row))
    finally:
        model.train(modes[0])
        grounding.train(modes[1])
    if joined:
        dist.all_reduce(counts)
    return _summary(counts, grounding, getattr(dataset, "word_kinds", {}))


def _right(model: nn.Module, grounding: Any, batch: dict[str, Any], hidden: HiddenTokens) -> list[Tensor]:
    """Which words are said right, (N,) bool for each of `SIGHTS`; the encoders run twice."""
    features = {image: grounding.read(model, batch, hidden, image=image) for image in (True, False)}
    said = [
        grounding.predict(model, batch, hidden, features[image], mask=mask).argmax(dim=-1)
        for image, mask in SIGHTS.values()
    ]
    return [(words == hidden.targets)[:, 0].cpu() for words in said]


def _rows(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """What `read` and `predict` take, for these sentences of a batch."""
    extra = {name: value[rows] for name, value in batch["extra"].items()}
    return {"image": batch["image"][rows], "mask": batch["mask"][rows], "extra": extra}


def _summary(counts: Tensor, grounding: Any, word_kinds: Any) -> dict[str, Any]:
    known = kinds_of_ids(grounding.hider.tokenizer, word_kinds) if word_kinds else {}
    kinds = {}
    for kind in KINDS if known else ():
        of_kind = torch.tensor([known.get(index, KINDS[-1]) == kind for index in range(counts.shape[1])], device="cpu")
        if counts[0, of_kind].any():
            kinds[kind] = _percent(counts[:, of_kind])
    return {**_percent(counts), "uniform": 100 / grounding.hider.ordinary_words, "kinds": kinds}


def _percent(counts: Tensor) -> dict[str, Any]:
    words = int(counts[0].sum())
    total = max(1, words)
    return {
        **{name: 100 * int(row.sum()) / total for name, row in zip(SIGHTS, counts[1:], strict=True)},
        "most_frequent": 100 * int(counts[0].max()) / total,
        "words": words,
    }
