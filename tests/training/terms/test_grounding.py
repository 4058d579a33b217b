"""Mask Grounding's loss, and the term on a model: what it reads, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

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


@pytest.mark.parametrize("token", ["centre", "place", "shape"])
def test_what_it_sees(token: str) -> None:
    """Without image and mask nothing of them, without one of them the other."""
    torch.manual_seed(0)
    model, tokenizer = models.create("magnet_tiny", **SMALLEST_MAGNET).eval(), Tokenizer(max_tokens=8)
    term = GroundingTerm.build(GroundingConfig(image_stage=1, token=token, **SMALL), model, tokenizer).eval()
    open_gates(model)
    one = batch(tokenizer)
    images = {**one, "image": torch.randn_like(one["image"])}
    masks = {**one, "mask": one["mask"].flip(1)}
    hidden = term.hider(one["text"])

    @torch.no_grad()
    def said(given: dict, image: bool, mask: bool) -> torch.Tensor:
        return term.predict(model, given, hidden, term.read(model, given, hidden, image=image), mask=mask)

    for image in (True, False):
        for mask in (True, False):
            first = said(one, image, mask)
            assert torch.allclose(first, said(images, image, mask)) is not image
            assert torch.allclose(first, said(masks, image, mask)) is not mask
    assert first.shape == (2, 1, len(model.text_encoder.word_embedding))


def test_the_blind_control_trains_on_neither() -> None:
    torch.manual_seed(0)
    model, tokenizer = models.create("magnet_tiny", **SMALLEST_MAGNET).eval(), Tokenizer(max_tokens=8)
    losses = {}
    for blind in (True, False):
        torch.manual_seed(1)
        term = GroundingTerm.build(GroundingConfig(image_stage=1, blind=blind, **SMALL), model, tokenizer).eval()
        one = batch(tokenizer)
        other = {**one, "image": torch.randn_like(one["image"]), "mask": one["mask"].flip(1)}
        losses[blind] = []
        for given in (one, other):
            torch.manual_seed(2)
            losses[blind].append(term(None, given, model)[0].item())
    assert losses[True][0] == losses[True][1] and losses[False][0] != losses[False][1]


def test_words_that_are_hidden_mostly() -> None:
    model, tokenizer = models.create("magnet_tiny", **SMALLEST_MAGNET), Tokenizer(max_tokens=8)
    text = tokenizer(["the red circle on the left"])
    text = type(text)(text.ids.repeat(3000, 1), text.mask.repeat(3000, 1))
    shares = {}
    for hide in ("uniform", "attributes"):
        term = GroundingTerm.build(GroundingConfig(hide=hide, **SMALL), model, tokenizer)
        hidden = term.hider(text, torch.Generator().manual_seed(0))
        words = torch.tensor([tokenizer.vocabulary[word] for word in ("red", "circle")])
        shares[hide] = torch.isin(hidden.targets, words).float().mean().item()
    # One of six words: a third of them are attributes, ten fourteenths of the chances.
    assert shares == pytest.approx({"uniform": 2 / 6, "attributes": 10 / 14}, abs=0.05)


def test_attributes_are_known_on_scenes_alone() -> None:
    model, tokenizer = models.create("magnet_tiny", **SMALLEST_MAGNET), Tokenizer(max_tokens=8)
    uniform, attributes = (
        GroundingTerm.build(GroundingConfig(hide=hide, **SMALL), model, tokenizer) for hide in ("uniform", "attributes")
    )

    class Photographs:
        word_kinds: ClassVar[dict] = {}

    class Scenes:
        word_kinds: ClassVar[dict] = {"red": "colour"}

    uniform.check(Photographs())
    attributes.check(Scenes())
    with pytest.raises(ValueError, match=r"terms\.grounding\.hide: expected 'uniform' for data .*, got 'attributes'"):
        attributes.check(Photographs())
    with pytest.raises(ValueError, match=r"terms\.grounding\.hide: expected 'uniform' for a vocabulary without"):
        other = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"], max_tokens=8)
        GroundingTerm.build(GroundingConfig(hide="attributes", **SMALL), model, other)


@pytest.mark.parametrize("change", [{"hide": "attributes", "share": 0.5}, {"token": "place"}, {"token": "shape"}])
def test_options_leave_no_parameter_unused_and_padded_words_unread(change: dict) -> None:
    """Processes that train together wait for every gradient."""
    torch.manual_seed(0)
    model, tokenizer = models.create("lavt_tiny", text__vocab_size=1280), Tokenizer(max_tokens=8)
    term = GroundingTerm.build(GroundingConfig(**change, **SMALL), model, tokenizer)
    given = batch(tokenizer, 64)
    loss, _ = term(None, given, model)
    loss.backward()
    assert [name for name, p in term.named_parameters() if p.grad is None] == []
    model.eval(), term.eval()
    hidden = term.hider(given["text"])
    padded = torch.where(given["text"].mask, hidden.text.ids, 77)
    with torch.no_grad():
        one, other = (
            term.predict(model, given, changed, term.read(model, given, changed))
            for changed in (hidden, hidden._replace(text=hidden.text._replace(ids=padded)))
        )
    assert not torch.equal(padded, hidden.text.ids) and torch.equal(one[hidden.valid], other[hidden.valid])


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
            first, second = (
                term.predict(model, given, changed, term.read(model, given, changed))
                for changed in (hidden, hidden._replace(text=hidden.text._replace(ids=other)))
            )
        assert not torch.equal(other, hidden.text.ids) and torch.equal(first, second)
