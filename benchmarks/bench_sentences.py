"""Ten sentences about one picture against one: what a `Segmenter` keeps of the picture, in turns.

"ten" is one call with a list, "ten, one by one" ten calls about the same picture, "ten pictures" ten calls of which
each sees its picture anew; `ratio` is the time of "one", which sees its picture anew as well, by the path's. Small
models without `--full`. Random weights.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_sentences.py --full --results benchmarks/results/sentences_cpu.json
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.turns import in_turns
from magnet_fast import Segmenter, models
from magnet_fast.data import Tokenizer

COLOURS = ("red", "blue", "green", "white", "black")
SENTENCES = [f"the {size} {colour} circle" for size in ("large", "small") for colour in COLOURS]


class Case(NamedTuple):
    """A preset, with the shipped vocabulary; `quick` is measured without --full."""

    preset: str
    title: str
    quick: bool = False


CASES = (
    Case("risam_tiny", "RISAM tiny 128x128", quick=True),
    Case("cris_tiny", "CRIS tiny 128x128", quick=True),
    Case("risam_vit_b", "RISAM ViT-B 480x480"),
    Case("cris_r50", "CRIS R50 416x416"),
    Case("magnet_swin_b", "MagNet Swin-B 480x480"),
)


@pytest.mark.parametrize("case", CASES, ids=[case.preset for case in CASES])
def test_sentences(case: Case, request: pytest.FixtureRequest) -> None:
    if not case.quick and not request.config.getoption("--full"):
        pytest.skip("--full")
    torch.manual_seed(0)
    segmenter = Segmenter(models.create(case.preset), Tokenizer(), pack=True)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (480, 640, 3), dtype=np.uint8) for _ in range(11)]
    turn = [0]

    def anew() -> np.ndarray:
        turn[0] += 1
        return pictures[turn[0] % len(pictures)]

    def one_by_one() -> None:
        picture = anew()
        for sentence in SENTENCES:
            segmenter(picture, sentence)

    runs = {
        "one": lambda: segmenter(anew(), SENTENCES[0]),
        "ten": lambda: segmenter(anew(), SENTENCES),
        "ten, one by one": one_by_one,
        "ten pictures": lambda: [segmenter(anew(), sentence) for sentence in SENTENCES],
    }
    rows = in_turns(runs, "one", 9 if case.quick else 3, request.config._ceilings, dtype="float32")
    group = f"{case.title}, sentences about one picture, float32"
    request.config._turns += [{"suite": "sentences", "group": group, **row} for row in rows]
