"""What of the words that describe an object can be read off a model's maps at all, where those words are hidden.

    python -m benchmarks.probe RUN --results benchmarks/results/probe_grounding.json

RUN is a run on embedded scenes with Mask Grounding: its weights, its data. Every colour, shape, texture and size in the
first sentences of the training and the validation split is hidden, one at a time; the image is encoded with what is
left of the sentence; and of every map, and of the image itself, the mean under the mask goes to a linear classifier of
the hidden word, fitted on the first and scored on the second. What it cannot say, a predictor of hidden words that sees
the map will hardly learn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from magnet_fast import models
from magnet_fast.data.sample import collate
from magnet_fast.data.scenes.word_kinds import ATTRIBUTES, kinds_of_ids
from magnet_fast.evaluation.machine import measured_on
from magnet_fast.models.contract import Text
from magnet_fast.training.building import build_tokenizer
from magnet_fast.training.config import TrainConfig, load_config
from magnet_fast.training.datasets import chosen_truth, dataset_kind, open_readers
from magnet_fast.training.terms import build_terms

TRAINING, VALIDATION = 2500, 1000  # sentences
_DECAY = 1e-3


class Hidden(NamedTuple):
    """Hidden words (N,), and the mean under the mask of the image and of each map, (N, C) each."""

    words: Tensor
    means: list[Tensor]


@torch.no_grad()
def hidden_words(model: nn.Module, term: Any, dataset: Any, count: int, kinds: dict[int, str]) -> Hidden:
    """Every describing word of the first `count` sentences."""
    words, means = [], []
    for batch in DataLoader(Subset(dataset, range(min(count, len(dataset)))), batch_size=32, collate_fn=collate):
        rows, hidden = term.hider.one_by_one(batch["text"])
        chosen = torch.tensor([kinds.get(int(word)) in ATTRIBUTES for word in hidden.targets[:, 0]])
        rows, text = rows[chosen], Text(*(part[chosen] for part in hidden.text))
        extra = {name: value[rows] for name, value in batch["extra"].items()}
        maps = model.encode(batch["image"][rows], text, extra or None).maps
        mask = (batch["mask"][rows] > 0.5).float()
        image = batch["image"][rows].permute(0, 2, 3, 1)
        words.append(hidden.targets[chosen, 0])
        means.append([mean(features, mask) for features in (image, *maps)])
    return Hidden(torch.cat(words), [torch.cat(parts) for parts in zip(*means, strict=True)])


def mean(features: Tensor, mask: Tensor) -> Tensor:
    """(B, H, W, C) and (B, H', W') to (B, C); a pixel of the map counts by its share of the mask."""
    share = F.adaptive_avg_pool2d(mask[:, None], features.shape[1:3])[:, 0]
    return (features * share[..., None]).sum((1, 2)) / share.sum((1, 2)).clamp(min=1e-6)[:, None]


def accuracy(x: Tensor, words: Tensor, other: Tensor, truth: Tensor) -> float:
    """Percent that a linear classifier, fitted on (x, words), says right of (other, truth)."""
    middle, spread = x.mean(0), x.std(0) + 1e-6
    x, other = ((rows - middle) / spread for rows in (x, other))
    classes, labels = words.unique(return_inverse=True)
    classify = nn.Linear(x.shape[1], len(classes))
    nn.init.zeros_(classify.weight)
    nn.init.zeros_(classify.bias)
    optimizer = torch.optim.LBFGS(classify.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(classify(x), labels) + _DECAY * classify.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return 100 * (classes[classify(other).argmax(dim=1)] == truth).float().mean().item()


def probe(run: Path, config: TrainConfig) -> dict[str, Any]:
    """Percent said right by kind of word and by what is read."""
    model = models.load(run / "last.safetensors").eval()
    tokenizer, reader = build_tokenizer(config, model), open_readers(config)[0]
    term = build_terms(config.terms, model, tokenizer)["grounding"]
    kinds = kinds_of_ids(tokenizer)
    splits = (config.data.train_split, TRAINING), (config.data.val_split, VALIDATION)
    seen = []
    for split, count in splits:
        options = {"original": False, "truth": chosen_truth(config, reader, model.spec), "needs": model.needs}
        dataset = dataset_kind(config)(reader, split, tokenizer, model.spec, **options)
        seen.append(hidden_words(model, term, dataset, count, kinds))
    fitted, scored = seen
    found: dict[str, Any] = {}
    for kind in ATTRIBUTES:
        here, there = (
            torch.tensor([kinds.get(int(word)) == kind for word in part.words], dtype=torch.bool) for part in seen
        )
        if not (here.any() and there.any()):
            continue
        truth = scored.words[there]
        means = zip(fitted.means, scored.means, strict=True)
        found[kind] = {
            "words": int(there.sum()),
            "most_frequent": 100 * int(truth.bincount().max()) / len(truth),
            "read": [accuracy(one[here], fitted.words[here], other[there], truth) for one, other in means],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = load_config(str(options.run / "config.yaml"))
    found = probe(options.run, config)
    for kind, said in found.items():
        read = ", ".join(f"{one:.0f}" for one in said["read"])
        print(f"{kind:8} most frequent {said['most_frequent']:.0f} %; image, then maps: {read} %")
    settings = {"steps": config.max_steps, "seed": config.seed, "terms": config.model_dump(mode="json")["terms"]}
    text = json.dumps({"machine": measured_on(), "model": config.model.name, **settings, "kinds": found}, indent=1)
    options.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
