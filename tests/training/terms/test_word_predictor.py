"""Mask Grounding's head: its parts against plain versions, what it may and may not see."""

from __future__ import annotations

import math

import pytest
import torch

from magnet_fast.training.terms.word_predictor import WordPredictor

WIDTH, CHANNELS, VOCABULARY = 32, 24, 50


def built(token: str) -> WordPredictor:
    torch.manual_seed(0)
    head = WordPredictor(WIDTH, CHANNELS, VOCABULARY, layers=2, heads=4, feedforward=48, token=token)
    return head.eval()  # no dropout


@pytest.fixture(params=["centre", "place", "shape"])
def head(request) -> WordPredictor:
    return built(request.param)


def inputs(batch: int = 2, words: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(batch, 20, 30)
    mask[:, 5:9, 10:20] = 1
    word_mask = torch.ones(batch, words, dtype=torch.int64)
    word_mask[0, 5:] = 0
    return {
        "words": torch.randn(batch, words, WIDTH, generator=generator),
        "word_mask": word_mask,
        "feature": torch.randn(batch, 3, 5, CHANNELS, generator=generator),
        "mask": mask,
        "positions": torch.tensor([[1, 3], [2, 6]]),
        "word_embedding": torch.randn(VOCABULARY, WIDTH, generator=generator),
    }


def test_the_mask_token_is_its_centre() -> None:
    head = built("centre")
    mask = torch.zeros(3, 20, 30)
    mask[0, 5:9, 10:20] = 1  # rows 5..8, columns 10..19: centre (15, 7) in pixels
    mask[1, 6, 14:16] = 1  # another shape, the same... not quite: row 6 is centred at 6.5
    mask[1, 7, 14:16] = 1
    found = head.encode_mask(mask, torch.randn(3, 3, 5, WIDTH))
    expected = head.mask_encoder(torch.tensor([15 / 30, 7 / 20]))
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], expected)  # position alone counts, not shape or size
    assert torch.equal(found[2], head.no_mask)


def test_the_mask_token_is_its_centre_in_the_code_of_the_pixels() -> None:
    """A mask in the middle of a pixel has the code that is added to that pixel, and to no other."""
    head = built("place")
    mask = torch.zeros(2, 30, 40)
    mask[0, 10:20, 8:16] = 1  # of 3 × 5 pixels the one in row 1, column 1
    seen: list[torch.Tensor] = []
    head.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        head.pixel_projection.weight.zero_(), head.pixel_projection.bias.zero_()
        head.mask_encoder[2].weight.zero_(), head.mask_encoder[2].bias.zero_(), head.kinds.zero_()
        given = inputs()
        head(**{**given, "mask": mask})
    pixels, token = seen[0][:, 7:22].unflatten(1, (3, 5)), seen[0][:, 22]
    torch.testing.assert_close(token[0], pixels[0, 1, 1])
    assert ((pixels[0] - token[0]).square().mean(-1) > 0.05).sum() == 14
    y, half = 2 * torch.pi * 0.5, WIDTH // 2  # the row's: sine and cosine at each of the frequencies 20^(-2k / half)
    expected = [f(y * 20 ** (-2 * k / half)) for k in range(half // 2) for f in (math.sin, math.cos)]
    torch.testing.assert_close(token[0, :half], torch.tensor(expected))
    assert torch.equal(token[1], head.no_mask)


def test_the_mask_token_is_its_shape_and_its_pixels() -> None:
    head = built("shape")
    pixels = torch.randn(4, 2, 3, WIDTH, dtype=torch.float64).float()
    mask = torch.zeros(4, 20, 30)
    mask[0, 5:9, 8:20] = 1  # columns 8 and 9 in the first cell, ten in the second; rows 5..8 in the upper one
    mask[1, 0, 0] = mask[1, 19, 29] = 1  # two corners: all that is between belongs to the extent, not to the area
    mask[2, 12, 25] = 1  # less than a cell
    found = head.encode_mask(mask, pixels)
    numbers = [
        [14 / 30, 7 / 20, 12 / 30, 4 / 20, 48 / 600],
        [0.5, 0.5, 1.0, 1.0, 2 / 600],
        [25.5 / 30, 12.5 / 20, 1 / 30, 1 / 20, 1 / 600],
    ]
    means = [
        (2 * pixels[0, 0, 0] + 10 * pixels[0, 0, 1]) / 12,
        (pixels[1, 0, 0] + pixels[1, 1, 2]) / 2,
        pixels[2, 1, 2],
    ]
    for row, (own, mean) in enumerate(zip(numbers, means, strict=True)):
        torch.testing.assert_close(found[row], head.mask_encoder(torch.tensor(own)) + mean)
    assert torch.equal(found[3], head.no_mask)
    more = sum(p.numel() for p in head.parameters()) - sum(p.numel() for p in built("centre").parameters())
    assert more == 3 * WIDTH


def test_the_mask_token_is_as_exact_under_autocast() -> None:
    """Of a picture of 480 pixels eight bits would tell no more than every second."""
    head, mask = built("shape"), torch.zeros(1, 480, 480)
    mask[:, 401:404, 17] = 1
    seen: list[torch.Tensor] = []
    head.mask_encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head.encode_mask(mask, torch.randn(1, 4, 4, WIDTH))
    expected = torch.tensor([[17.5 / 480, 402.5 / 480, 1 / 480, 3 / 480, 3 / 480**2]])
    torch.testing.assert_close(seen[0], expected)


def test_logits_at_chosen_positions_only(head: WordPredictor) -> None:
    given = inputs()
    logits = head(**given)
    assert logits.shape == (2, 2, VOCABULARY)
    every = head(**{**given, "positions": torch.arange(7).repeat(2, 1)})
    torch.testing.assert_close(logits, every.gather(1, given["positions"][..., None].expand(-1, -1, VOCABULARY)))


def test_the_decoder_is_the_word_embedding(head: WordPredictor) -> None:
    given = inputs()
    logits = head(**given)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))
    permuted = head(**{**given, "word_embedding": given["word_embedding"][order]})
    torch.testing.assert_close(permuted, logits[..., order])


def test_padding_is_never_seen(head: WordPredictor) -> None:
    given = inputs()
    changed = {**given, "words": given["words"].clone()}
    changed["words"][0, 5:] = 100.0
    assert torch.equal(head(**given), head(**changed))
    changed["words"][0, 4] = 100.0  # a word
    assert not torch.equal(head(**given)[0], head(**changed)[0])


@pytest.mark.parametrize("name", ["words", "feature", "mask"])
def test_everything_else_is_seen(head: WordPredictor, name: str) -> None:
    given = inputs()
    changed = {**given, name: given[name].roll(1, dims=2)}  # words' and pixels' columns, the mask's place
    assert not torch.allclose(head(**given), head(**changed), atol=1e-4)


def test_pixels_have_places(head: WordPredictor) -> None:
    """Another order of the same pixels is another picture."""
    given = inputs()
    changed = {**given, "feature": given["feature"].flip(2)}
    assert not torch.allclose(head(**given), head(**changed), atol=1e-4)


def test_gradients_reach_every_parameter(head: WordPredictor) -> None:
    given = inputs()
    given["mask"][1] = 0  # so that the token of an absent referent is used, too
    head(**given).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match="text_width=30 must be a multiple of 4 and of heads=8"):
        WordPredictor(30, CHANNELS, VOCABULARY)
    with pytest.raises(ValueError, match="token: expected one of centre, place, shape, got 'box'"):
        WordPredictor(32, CHANNELS, VOCABULARY, token="box")
