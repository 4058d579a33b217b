"""How often Mask Grounding says the hidden word, beside what the same predictor says without seeing anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from magnet_fast.training.objective import Grounding

_SENTENCES = 2000  # enough for half a percent; two encoder passes each


@torch.no_grad()
def hidden_word_accuracy(
    model: nn.Module,
    grounding: Grounding,
    dataset: Any,
    batch_size: int = 16,
    *,
    workers: int = 0,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on hidden words of a dataset's first sentences (``limit``, at most 2000), which words being a function
    of ``seed`` alone.

    Args:
        model, grounding: as trained; put into eval mode for the time of the call.
        dataset: an ``ExpressionDataset`` by sentences.
        batch_size, workers, limit, autocast: as for `evaluate`.

    Under torch.distributed each process does its share, and all get the whole result.

    Returns:
        Percent, under ``accuracy``; ``without_image_and_mask``: the same weights, given a grey image and no mask;
        ``most_frequent``: the best that one and the same answer for every word could reach here; ``uniform``: a
        guess among all ordinary words; ``words``: how many were hidden.
    """
    device = next(model.parameters()).device
    count = min(_SENTENCES, len(dataset), limit or len(dataset))
    expressions = [dataset.record(index)["expression"] for index in range(count)]
    # All at once: what is hidden then depends neither on the batches nor on the number of processes.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = grounding.masker(*dataset.tokenizer(expressions))
    joined = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    loader = DataLoader(
        Subset(dataset, range(rank, count, world)),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # not the training run's
    )
    right = torch.zeros(2, dtype=torch.int64, device=device)
    modes = model.training, grounding.training
    model.eval()
    grounding.eval()
    try:
        for batch in loader:
            chosen = [part[batch["index"]].to(device) for part in hidden]
            image, words, mask = (batch[key].to(device) for key in ("image", "attention_mask", "mask"))
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                for row, blind in enumerate((False, True)):
                    logits = grounding.predict(model, image, words, mask, chosen[0], chosen[1], blind=blind)
                    right[row] += _right(logits, chosen[2], chosen[3])
    finally:
        model.train(modes[0])
        grounding.train(modes[1])
    if joined:
        right = right.cpu()
        dist.all_reduce(right)
    answers = Counter(hidden.targets[hidden.valid].tolist())
    total = max(1, sum(answers.values()))
    accuracy, blind = (100 * right.double() / total).tolist()
    return {
        "accuracy": accuracy,
        "without_image_and_mask": blind,
        "most_frequent": 100 * max(answers.values(), default=0) / total,
        "uniform": 100 / grounding.masker.ordinary_words,
        "words": sum(answers.values()),
    }


def _right(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    return ((logits.argmax(dim=-1) == targets) & valid).sum()
