"""Chains of Linears at levels avx512_bf16 and amx on the software models of their instructions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_fast.ops import _cpu_backend, _linear_chain
from tests.amx.conftest import PAIRS, Emulated
from tests.amx.test_emulated_tiles import each
from tests.ops import test_linear_chain as chains

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


@pytest.fixture(params=PAIRS)
def level(request: pytest.FixtureRequest, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> str:
    emulated.set_simd_level(request.param)
    monkeypatch.setattr(_cpu_backend, "missing", None)
    monkeypatch.setattr(_linear_chain, "_worthwhile", lambda dtype: True)
    return request.param


@pytest.mark.parametrize("form", ["norm and projection", "pre-norm", "post-norm"])
def test_as_models_use_it(level: str, form: str) -> None:
    chains.test_as_models_use_it(BF16, form, {})


@each(25)
@given(data=st.data())
def test_any_sizes(emulated: Emulated, data: st.DataObject) -> None:
    emulated.set_simd_level(data.draw(st.sampled_from(PAIRS), "level"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear_chain, "_worthwhile", lambda dtype: True)
        chains.check_any_sizes(data, BF16)


@pytest.mark.parametrize("rows", [1, 20, 700])
def test_thread_counts_agree_in_every_bit(level: str, rows: int) -> None:
    chains.test_thread_counts_agree_in_every_bit(BF16, rows)


def test_nan_stays_in_its_row(level: str) -> None:
    chains.check_nan_stays_in_its_row(BF16)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 80), (2080, 32)])
def test_rests_of_tiles(level: str, rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    (linear,), _ = chains.make(BF16, inputs, outputs)
    chains.assert_agree(torch.randn(rows, inputs, dtype=BF16), [_linear_chain.Step(linear, "gelu")])
