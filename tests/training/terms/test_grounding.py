"""Mask Grounding's loss, and the term on a model: what it reads, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magnet_fast import models
from magnet_fast.data.tokenizers import ClipTokenizer, Tokenizer
from magnet_fast.training.terms import GroundingTerm
from magnet_fast.training.terms.grounding import GroundingConfig, grounding_loss
from tests.models.cases import open_gates

from ..fakes import SMALLEST_MAGNET

GOLDEN_CLIP = Path(__file__).parents[2] / "golden" / "clip_vocabulary"

SMALL = {"layers": 1, "heads": 4, "feedforward": 32}


def test_grounding_loss() -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    targets = logits.detach().argmax(dim=-1)
    targets[0, 1] = (targets[0, 1] + 1) % 11
    valid = torch.tensor([[True, True, False], [True, False, False]])
    loss, accuracy = grounding_loss(logits, targets, valid)
    rows = [(0, 0), (0, 1), (1, 0)]
    expected = -sum(logits.detach().double().log_softmax(-1)[b, k, targets[b, k]].item() for b, k in rows) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5) and accuracy.item() == pytest.approx(2 / 3)
    loss.backward()
    assert not logits.grad[~valid].any() and logits.grad[valid].any(dim=-1).all()
    nothing, accuracy = grounding_loss(logits, targets, torch.zeros_like(valid))
    assert nothing == 0 and accuracy == 0


def batch(tokenizer: Tokenizer, side: int = 32) -> dict:
    mask = torch.zeros(2, side, side)
    mask[:, 4:20, 8:30] = 1
    return {"image": torch.randn(2, 3, side, side), "text": tokenizer(["the red circle", "blue square"]), "mask": mask}


def test_blind_it_sees_neither_image_nor_mask() -> None:
    torch.manual_seed(0)
    model, tokenizer = models.create("magnet_tiny", **SMALLEST_MAGNET).eval(), Tokenizer(max_tokens=8)
    term = GroundingTerm.build(GroundingConfig(image_stage=1, **SMALL), model, tokenizer).eval()
    one, other = batch(tokenizer), batch(tokenizer)
    other["mask"] = other["mask"].flip(1)
    hidden = term.hider(one["text"])
    with torch.no_grad():
        blind = [term.predict(model, given, hidden, blind=True) for given in (one, other)]
        seeing = [term.predict(model, given, hidden) for given in (one, other)]
    assert torch.equal(*blind) and not torch.allclose(*seeing)
    assert blind[0].shape == (2, 1, len(model.text_encoder.word_embedding))


def test_refusals() -> None:
    model, tokenizer = models.create("magnet_tiny", **SMALLEST_MAGNET), Tokenizer(max_tokens=8)
    with pytest.raises(ValueError, match=r"terms\.grounding\.image_stage: expected a map.* 0 to 3, got 4"):
        GroundingTerm.build(GroundingConfig(image_stage=4), model, tokenizer)
    with pytest.raises(ValueError, match="multiple of 4 and of heads=7"):
        GroundingTerm.build(GroundingConfig(heads=7), model, tokenizer)

    class Narrow(torch.nn.Module):  # words of another width than the vectors that the ids stand for
        width, word_embedding = 32, torch.zeros(50, 16)

    model.text_encoder = Narrow()
    with pytest.raises(ValueError, match=r"terms\.grounding: .*32 channels.*\(50, 16\): expected 32 columns"):
        GroundingTerm.build(GroundingConfig(), model, tokenizer)


HOSTS = ["magnet_tiny", "lavt_tiny", "refsegformer_tiny", "rela_tiny", "cris_tiny", "risam_tiny"]


@pytest.mark.parametrize(
    ("name", "clip"), [*((name, False) for name in HOSTS), ("cris_tiny", True), ("risam_tiny", True)]
)
def test_on_every_system(name: str, clip: bool) -> None:
    """It learns, it reaches the encoders and the fusion, and a hidden word is not seen."""
    torch.manual_seed(0)
    tokenizer = ClipTokenizer(GOLDEN_CLIP, max_tokens=8) if clip else Tokenizer(max_tokens=8)
    model = models.create(name, text__vocab_size=max(1280, tokenizer.vocab_size))
    term = GroundingTerm.build(GroundingConfig(share=0.5, **SMALL), model, tokenizer)
    assert (term.cover is not None) == clip and term.image_stage == len(model.config.shapes.channels) - 1
    open_gates(model)
    given = batch(tokenizer, 64)
    loss, _ = term(None, given, model)
    loss.backward()
    for part in (model.image_encoder, model.text_encoder, model.fusion, term):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    if clip:
        assert term.cover.grad.any()
    # What stands behind a covered place changes nothing.
    hidden = term.hider(given["text"])
    other = torch.where(hidden.covered & ~torch.isin(hidden.text.ids, hidden.text.ids.max()), 40, hidden.text.ids)
    if clip:
        model.eval(), term.eval()
        with torch.no_grad():
            first = term.predict(model, given, hidden)
            second = term.predict(model, given, hidden._replace(text=hidden.text._replace(ids=other)))
        assert not torch.equal(other, hidden.text.ids) and torch.equal(first, second)
