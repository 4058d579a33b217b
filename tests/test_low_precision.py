"""Models in bfloat16: near enough to float32 to give the same masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from magnet_fast import Segmenter, accelerate, checkpoints
from magnet_fast.data import ExpressionDataset, Refer
from magnet_fast.data.sample import collate
from magnet_fast.data.scenes import write_scenes
from magnet_fast.inference import in_precision
from magnet_fast.models import Text, from_released
from tests.golden.parameters import golden, released_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "hard"
    write_scenes(root, images=20, seed=777, level="hard")
    return root


@pytest.fixture(scope="module")
def exact(root: Path) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs of 32 sentences, and their masks in float32."""
    loaded = checkpoints.load()
    sentences = ExpressionDataset(Refer(root), "train", loaded.tokenizer(), loaded.model.spec)
    batch = collate([sentences[index] for index in range(32)])
    inputs = batch["image"], *batch["text"]
    with torch.inference_mode():
        return inputs, loaded.model.predict(*inputs)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU of each pair of masks (B, H, W); 1 where both are empty."""
    intersection, union = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


@pytest.mark.parametrize("pack", [None, False, True], ids=["plain", "accelerated", "packed"])
def test_shipped_weights_give_the_same_masks(exact, pack: bool | None) -> None:
    inputs, masks = exact
    low = in_precision(checkpoints.load().model, "bfloat16")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    if pack is not None:
        accelerate(low, pack=pack)
    with torch.inference_mode():
        rough = low.predict(*inputs)
    assert rough.dtype == torch.float32 and not torch.equal(masks, rough)
    assert (masks > 0.5).flatten(1).any(1).float().mean() > 0.9  # there are masks to agree on
    agreement = overlap(masks > 0.5, rough > 0.5)
    assert agreement.mean() >= 0.98
    assert (masks - rough).square().mean().sqrt() < 0.01


def test_golden_values_within_bfloat16() -> None:
    """Random parameters forgive less than trained ones: the bounds are a tenth of the logits' size, and masks whose
    signs agree. The first prediction has passed no mask threshold, so it only carries rounding."""
    values = golden("magnet")
    model = in_precision(from_released(released_checkpoint("magnet")), "bfloat16")
    with torch.inference_mode():
        prediction = model(values["image"], Text(values["input_ids"], values["attention_mask"].bool()))

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        difference = actual.float() - expected
        return (difference.square().mean() / expected.square().mean()).sqrt().item()

    assert error(prediction.earlier[0].mask, values["aux0_pred_masks"][:, 0]) < 0.07
    assert error(prediction.mask, values["pred_masks"][:, 0]) < 0.13
    assert error(prediction.presence, values["pred_logits"][:, 0].diff(dim=1)[:, 0]) < 0.1
    assert ((prediction.mask > 0) == (values["pred_masks"][:, 0] > 0)).float().mean() > 0.95


def test_golden_text_of_lavt_within_bfloat16() -> None:
    """LAVT's words alone: its instance norms divide these random parameters' features by 1e-4, and so no logit keeps a
    digit of bfloat16 (`test_golden.test_lavt` tells of float32's)."""
    values = golden("lavt")
    model = in_precision(from_released(released_checkpoint("lavt")), "bfloat16")
    with torch.inference_mode():
        prediction = model(values["image"], Text(values["input_ids"], values["attention_mask"].bool()))
    torch.testing.assert_close(prediction.words.features.float(), values["text_features"], rtol=0, atol=0.1)
    assert prediction.mask.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=str)
def test_segmenter_in_bfloat16(dtype) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (37, 61, 3), dtype=np.uint8)
    segmenter = Segmenter.from_checkpoint(dtype=dtype)
    found = segmenter(picture, ["the red circle", "the blue box"])
    assert next(segmenter.model.parameters()).dtype == torch.bfloat16
    assert found[0].probability.dtype == np.float32 and found[0].mask.shape == (37, 61)
    assert Segmenter(segmenter.model, segmenter.tokenizer).model is segmenter.model
    assert next(segmenter.model.parameters()).dtype == torch.bfloat16  # no dtype: what the model has


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float16", "float16 is for GPUs"), ("int4", "expected one of float32, bfloat16, ")],
)
def test_precisions_that_do_not_run_here(dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^dtype: {message}"):
        Segmenter.from_checkpoint(dtype=dtype)
