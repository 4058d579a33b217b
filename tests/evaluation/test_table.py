"""The table's rows: counts, order, repetition, devices, processes, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_fast.evaluation import Table, scores
from magnet_fast.evaluation.table import NEVER


def masks(*rows: str) -> torch.Tensor:
    """(B, 1, W) bool from strings of 0 and 1."""
    return torch.tensor([[[pixel == "1" for pixel in row]] for row in rows])


def test_counts_by_hand() -> None:
    table = Table()
    table.add(
        masks("1100", "0000", "1111"),
        masks("0110", "0000", "0000"),
        index=[4, 2, 9],
        ref=[7, 7, 8],
        kind=["place", None, "size"],
        category=[1, None, 3],
    )
    first, second, third = table.rows()
    assert (first.index, second.index, third.index) == (2, 4, 9)
    assert second[4:8] == (1, 3, 2, 2)  # intersection, union, predicted, true
    assert first[4:8] == (0, 0, 0, 0)
    assert third[4:8] == (0, 4, 4, 0)
    assert [row.ref for row in table.rows()] == [7, 7, 8]
    assert [row.kind for row in table.rows()] == [None, "place", "size"]
    assert [row.category for row in table.rows()] == [None, 1, 3]
    assert len(table) == 3


def test_flags_default_to_masks_that_are_not_empty() -> None:
    table = Table()
    table.add(masks("10", "00"), masks("00", "01"), index=[0, 1])
    assert [(row.exists, row.claimed) for row in table.rows()] == [(False, True), (True, False)]
    table.add(masks("10", "00"), masks("00", "01"), index=[0, 1], exists=[True, False], claimed=[False, True])
    assert [(row.exists, row.claimed) for row in table.rows()] == [(True, False), (False, True)]


def test_integers_count_as_bool() -> None:
    """A mask of 0 and 255, read from a picture, is a mask."""
    table = Table()
    table.add(torch.tensor([[[0, 255]]], dtype=torch.uint8), torch.tensor([[[1, 1]]]), index=[0])
    assert table.rows()[0][4:8] == (1, 2, 1, 2)


@given(seed=st.integers(0, 1000), batch=st.integers(1, 5), levels=st.integers(1, 4))
def test_rank_against_sorting(seed: int, batch: int, levels: int) -> None:
    """Few levels of probability make many ties, which a stable sort breaks in reading order."""
    generator = np.random.default_rng(seed)
    shape = (batch, *generator.integers(1, 6, 2))
    truth = generator.random(shape) > 0.6
    probability = generator.integers(0, levels, shape) / 4
    table = Table()
    table.add(
        torch.from_numpy(probability > 0.4),
        torch.from_numpy(truth),
        index=range(batch),
        probability=torch.from_numpy(probability),
    )
    for row, values, inside in zip(table.rows(), probability, truth, strict=True):
        order = sorted(range(values.size), key=lambda pixel, values=values: -values.flat[pixel])
        hits = [place for place, pixel in enumerate(order) if inside.flat[pixel]]
        assert row.rank == (hits[0] if hits else NEVER)


@given(seed=st.integers(0, 1000), pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_batches_order_and_repetition_do_not_change_a_bit(seed: int, pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = sum(pieces)
    prediction, truth = (torch.rand(2, count, 5, 4, generator=generator) > 0.5).unbind()
    kinds = [("a", "b", None)[i % 3] for i in range(count)]
    whole, parts = Table(), Table()
    whole.add(prediction, truth, index=range(count), ref=[i // 2 for i in range(count)], kind=kinds)
    order = torch.randperm(count, generator=generator)
    # Wrong answers first: the later ones replace them.
    parts.add(~prediction[:2], truth[:2], index=range(min(2, count)), ref=[9, 9][:count])
    for piece in order.split(pieces):
        parts.add(prediction[piece], truth[piece], index=piece, ref=piece // 2, kind=[kinds[i] for i in piece.tolist()])
    assert parts.rows() == whole.rows()
    assert repr(scores(parts, "robust")) == repr(scores(whole, "robust"))


def test_adding_waits_for_no_device() -> None:
    """On the meta device there is no number to wait for: reading one would raise."""
    table = Table()
    stack = torch.empty(2, 3, 3, dtype=torch.bool, device="meta")
    probability = torch.empty(2, 3, 3, device="meta")
    flags = torch.empty(2, dtype=torch.bool, device="meta")
    index = torch.empty(2, dtype=torch.int64, device="meta")
    table.add(stack, stack, index=index, ref=index, exists=flags, claimed=flags, probability=probability)
    table.add(stack, stack, index=[0, 1])


def test_gather_alone_changes_nothing() -> None:
    table = Table()
    table.add(masks("10"), masks("11"), index=[3])
    before = table.rows()
    table.gather()
    assert table.rows() == before


def _add_as_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    table = Table()
    indices = range(6) if rank == 0 else range(3, 9)
    table.add(*drawn_masks(indices), index=indices, ref=[i // 2 for i in indices])
    table.gather()
    (folder / f"{rank}.json").write_text(json.dumps([scores(table, "robust"), len(table)]))
    torch.distributed.destroy_process_group()


def drawn_masks(indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and truths that follow from the index."""
    return (torch.rand(2, 9, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5)[:, list(indices)].unbind()


def test_a_sentence_of_two_processes_counts_once(tmp_path: Path) -> None:
    """A sampler that fills the last round with sentences of the first does not change the scores."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_as_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = Table()
    alone.add(*drawn_masks(range(9)), index=range(9), ref=[i // 2 for i in range(9)])
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == json.dumps([scores(alone, "robust"), 9])


def test_nan_is_refused_by_the_sentence() -> None:
    table = Table()
    probability = torch.rand(3, 1, 2)
    probability[1, 0, 1] = probability[2, 0, 0] = float("nan")
    table.add(probability > 0.5, masks("10", "01", "11"), index=[30, 20, 10], probability=probability)
    message = "prediction: NaN in that of sentence 10, and of 1 others"
    with pytest.raises(ValueError, match=message):
        table.rows()
    with pytest.raises(ValueError, match=message):
        scores(table, "single")
    # A good answer to the same sentences replaces the bad ones.
    table.add(masks("01", "11"), masks("01", "11"), index=[20, 10], probability=torch.ones(2, 1, 2))
    assert len(table.rows()) == 3


STACK = torch.zeros(2, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prediction": STACK[0]}, ValueError, "prediction: expected masks (B, H, W), got shape (3, 3)"),
        ({"truth": torch.zeros(2, 3, 4) > 0}, ValueError, "expected one shape (B, H, W), got (2, 3, 3) and (2, 3, 4)"),
        ({"prediction": STACK.float()}, TypeError, "prediction: expected bool, got torch.float32; compare"),
        ({"prediction": STACK * torch.nan}, TypeError, "prediction: expected bool, got torch.float32"),
        ({"truth": STACK.double()}, TypeError, "truth: expected bool, got torch.float64"),
        ({"index": [0]}, ValueError, "index: expected 2 integers, one a mask, got shape (1,)"),
        ({"index": [0.0, 1.0]}, TypeError, "index: expected integers, got torch.float32"),
        ({"index": [False, True]}, TypeError, "index: expected integers, got torch.bool"),
        ({"ref": [1, 2, 3]}, ValueError, "ref: expected 2 integers"),
        ({"exists": [True]}, ValueError, "exists: expected 2 bool, one a mask, got shape (1,)"),
        ({"claimed": [0.2, 0.9]}, TypeError, "claimed: expected bool, got torch.float32"),
        ({"kind": "ab"}, TypeError, "kind: expected 2 entries, one a mask, got the string 'ab'"),
        ({"kind": ["a"]}, ValueError, "kind: expected 2 entries, one a mask, got 1"),
        ({"kind": [1, None]}, TypeError, "kind: expected str or None, got 1"),
        ({"category": ["cat", None]}, TypeError, "category: expected int or None, got 'cat'"),
        (
            {"probability": torch.zeros(2, 3)},
            ValueError,
            "probability: expected the masks' shape (2, 3, 3), got (2, 3)",
        ),
        ({"probability": STACK}, TypeError, "probability: expected floating point, got torch.bool"),
    ],
)
def test_bad_arguments_add_nothing(changes: dict, error: type, message: str) -> None:
    table = Table()
    arguments = {"prediction": STACK, "truth": STACK, "index": [0, 1], **changes}
    with pytest.raises(error, match=re.escape(message)):
        table.add(**arguments)
    assert len(table) == 0


def test_masks_without_pixels() -> None:
    table = Table()
    table.add(STACK[:, :0], STACK[:, :0], index=[0, 1], probability=torch.zeros(2, 0, 3))
    assert [row[4:9] for row in table.rows()] == [(0, 0, 0, 0, NEVER)] * 2


def test_a_batch_of_none() -> None:
    table = Table()
    table.add(STACK[:0], STACK[:0], index=[], ref=[], exists=[], claimed=[], kind=[], probability=torch.zeros(0, 3, 3))
    assert len(table) == 0
