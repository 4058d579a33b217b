"""How often Mask Grounding says the hidden word, beside what the same predictor says without seeing anything."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset

from magnet_fast.data.hidden_tokens import HiddenTokens
from magnet_fast.data.loading import leave_to_the_main_process
from magnet_fast.data.sample import collate, to_device
from magnet_fast.models.contract import Text

_SENTENCES = 2000  # enough for half a percent; two encoder passes each


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
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on hidden words of a dataset's first sentences (`limit`, at most 2000).

    Which words are hidden is a function of `seed` and of the sentence's index alone: neither of batches nor of the
    number of processes. The run's own random generators are left alone.

    Args:
        model: as trained; put into eval mode for the time of the call.
        grounding: the `GroundingTerm`, as trained; likewise.
        dataset: items are samples with an index, by sentences.
        batch_size, workers, limit, autocast: as for `evaluate`.
        seed: of the choice of words.

    Under torch.distributed each process does its share, and all get the whole result.

    Returns:
        Percent, under `accuracy`; `without_image_and_mask`: the same weights, given a grey image and no mask;
        `most_frequent`: the best that one and the same answer for every word could reach here; `uniform`: a guess
        among all ordinary words; `words`: how many were hidden.
    """
    device = next(model.parameters()).device
    count = min(_SENTENCES, len(dataset), limit or len(dataset))
    joined = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    loader = DataLoader(
        Subset(dataset, range(rank, count, world)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # not the training run's
        worker_init_fn=leave_to_the_main_process,
    )
    right = torch.zeros(2, dtype=torch.int64, device=device)
    answers = torch.zeros(len(model.text_encoder.word_embedding), dtype=torch.int64)
    modes = model.training, grounding.training
    model.eval()
    grounding.eval()
    try:
        for batch in loader:
            hidden = _hide(grounding.hider, batch["text"], batch["index"].tolist(), seed)
            answers += torch.bincount(hidden.targets[hidden.valid], minlength=len(answers))
            batch = to_device({**batch, "text": hidden.text}, device)
            hidden = HiddenTokens(batch["text"], *(part.to(device) for part in hidden[1:]))
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                for row, blind in enumerate((False, True)):
                    logits = grounding.predict(model, batch, hidden, blind=blind)
                    right[row] += ((logits.argmax(dim=-1) == hidden.targets) & hidden.valid).sum()
    finally:
        model.train(modes[0])
        grounding.train(modes[1])
    right = right.cpu()
    if joined:
        dist.all_reduce(right)
        dist.all_reduce(answers)
    words = int(answers.sum())
    total = max(1, words)
    accuracy, blind = (100 * right.double() / total).tolist()
    return {
        "accuracy": accuracy,
        "without_image_and_mask": blind,
        "most_frequent": 100 * int(answers.max()) / total,
        "uniform": 100 / grounding.hider.ordinary_words,
        "words": words,
    }


def _hide(hider: Any, text: Text, indices: list[int], seed: int) -> HiddenTokens:
    """The hidden tokens of a batch, every sentence by a generator of its own."""
    rows = []
    for row, index in enumerate(indices):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        one = Text(text.ids[row : row + 1], text.mask[row : row + 1])
        rows.append(hider(one, generator=generator))
    ids = torch.cat([row.text.ids for row in rows])
    return HiddenTokens(
        Text(ids, text.mask), *(torch.cat(parts) for parts in zip(*(row[1:] for row in rows), strict=True))
    )
