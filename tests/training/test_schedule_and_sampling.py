"""The learning rate, and which sentences each step sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from magnet_fast.training.sampling import EpochBatches
from magnet_fast.training.schedule import rate_factor, set_learning_rate


def test_poly_decay_and_warmup() -> None:
    assert rate_factor(0.0, 0) == 1.0
    assert rate_factor(0.5, 50) == pytest.approx(0.5**0.9)
    assert rate_factor(1.0, 100) == 0.0
    assert rate_factor(1.2, 120) == 0.0
    assert rate_factor(0.25, 25, power=1.0) == pytest.approx(0.75)
    steps = [rate_factor(step / 50, step, power=0, milestones=(35 / 50, 0.9)) for step in (0, 34, 35, 44, 45)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    warm = [rate_factor(0.0, step, warmup=4) for step in range(6)]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_factor_scales_each_groups_own_rate() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [p], "lr": rate, "initial_lr": rate} for p, rate in zip(parameters, (1.0, 0.1), strict=True)]
    optimiser = torch.optim.SGD(groups)
    for factor in (0.5, 0.25):  # not compounding
        set_learning_rate(optimiser, factor)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([factor, 0.1 * factor])
    set_learning_rate(optimiser, 0.5, alike=2.0)
    assert [group["lr"] for group in optimiser.param_groups] == [1.0, 1.0]


@given(
    length=st.integers(12, 80),
    share=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    world=st.integers(1, 2),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_a_step_sees_the_same_whoever_trains(length, share, accumulation, world, epoch, seed) -> None:
    """Dealing a step out to micro-batches and processes neither loses nor repeats nor moves a sentence."""
    batch_size = share * accumulation * world

    def batches(**changes: int) -> EpochBatches:
        return EpochBatches(length, batch_size, seed=seed, epoch=epoch, **changes)

    whole = list(batches())
    dealt = [list(batches(accumulation=accumulation, world_size=world, rank=rank)) for rank in range(world)]
    for step, expected in enumerate(whole):
        micros = range(step * accumulation, (step + 1) * accumulation)
        assert [index for micro in micros for rank in range(world) for index in dealt[rank][micro]] == expected
    seen = [index for batch in whole for index in batch]
    assert len(seen) == len(set(seen)) == length // batch_size * batch_size
    assert set(seen) <= set(range(length))


def test_entering_an_epoch_in_the_middle_goes_on_where_it_was() -> None:
    whole = list(EpochBatches(30, 4, accumulation=2, seed=3, epoch=2))
    later = EpochBatches(30, 4, accumulation=2, seed=3, epoch=2, first_step=5)
    assert list(later) == whole[10:]
    assert len(later) == 4
    assert later.steps == 7


@given(together=st.integers(1, 4), groups=st.integers(2, 9), share=st.integers(1, 2), world=st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_items_of_one_image_stay_together(together: int, groups: int, share: int, world: int) -> None:
    length, batch_size = together * groups, together * share * world
    assume(batch_size <= length)
    for rank in range(world):
        for batch in EpochBatches(length, batch_size, rank=rank, world_size=world, together=together):
            for start in range(0, len(batch), together):
                first = batch[start]
                assert first % together == 0 and batch[start : start + together] == [*range(first, first + together)]
    if together > 1:
        with pytest.raises(ValueError, match=f"no multiple of the {together} about one image"):
            EpochBatches(length, together * world + world, world_size=world, together=together)


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(map(tuple, EpochBatches(30, 4, seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((10, 4, 3), "not a multiple"), ((10, 4, 1, 0, 3), r"x processes \(3\)"), ((3, 4), "exceeds the 3 items")],
)
def test_batches_that_cannot_be_dealt(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochBatches(*arguments)
