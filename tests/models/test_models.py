"""The output contract of every model, on sizes nothing divides, and the properties training relies on."""

from __future__ import annotations

import pytest
import torch

from magnet_fast import models, ops
from magnet_fast.models.pwam import TextPWAM

TINY = {
    "magnet_tiny": {},
    "magnet_tiny xmha": {"alignment": "xmha"},
    "magnet_tiny released": {"masking": "released"},
    "lavt_tiny": {},
}


def build(case: str, **overrides):
    torch.manual_seed(0)
    return models.build(case.split()[0], **TINY[case], **overrides).eval()


def batch(size=(64, 96), words=9, count=2, vocab=1024):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 3, *size, generator=generator)
    input_ids = torch.randint(5, vocab, (count, words), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1:, words - 3 :] = 0
    return image, input_ids * attention_mask, attention_mask


def open_gates(model: torch.nn.Module) -> None:
    """Gates and sampling offsets start at zero; with random weights in them every path reaches the output."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "gate." in name or name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("size", [(64, 96), (67, 45), (32, 33)], ids=str)
def test_contract(case: str, size: tuple[int, int]) -> None:
    model = build(case)
    inputs = batch(size)
    with torch.inference_mode():
        output = model(*inputs)
        probability = model.predict(*inputs)
        resized = model.predict(*inputs, size=(51, 38))
    if case.startswith("magnet"):
        quarter = (-(-size[0] // 4), -(-size[1] // 4))
        assert output.mask_logits.shape == (2, 1, *quarter)
        assert output.class_logits.shape == (2, 1, 2)
        assert [(m.shape, c.shape) for m, c in output.auxiliary] == [((2, 1, *quarter), (2, 1, 2))] * 9
        assert output.mask_features.shape == (2, model.config.decoder.width, *quarter)
    else:
        assert output.mask_logits.shape == (2, 2, *size)
        assert output.class_logits is None and output.auxiliary == []
    assert output.text_features.shape == (2, 9, model.config.text.hidden_size)
    assert probability.shape == (2, *size) and resized.shape == (2, 51, 38)
    assert probability.min() >= 0 and probability.max() <= 1 and probability.dtype == torch.float32


@pytest.mark.parametrize("case", ["magnet_tiny", "magnet_tiny xmha", "lavt_tiny"])
def test_padding_is_never_seen(case: str) -> None:
    """With correct masking, the number of padding tokens and what stands in them change nothing."""
    model = build(case)
    open_gates(model)
    image, input_ids, attention_mask = batch()
    more = torch.nn.functional.pad(attention_mask, (0, 6))
    filled = torch.nn.functional.pad(input_ids, (0, 6), value=7)
    with torch.inference_mode():
        short = model.predict(image, input_ids, attention_mask)
        long = model.predict(image, filled, more)
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


def test_released_masking_does_see_padding() -> None:
    """The quirk that released checkpoints need: padding enters the words' instance norm."""
    model = build("magnet_tiny released")
    open_gates(model)
    image, input_ids, attention_mask = batch()
    with torch.inference_mode():
        short = model(image, input_ids, attention_mask).text_features
        long = model(
            image,
            torch.nn.functional.pad(input_ids, (0, 6)),
            torch.nn.functional.pad(attention_mask, (0, 6)),
        ).text_features[:, :9]
    assert (short - long).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["magnet_tiny", "magnet_tiny xmha", "lavt_tiny"])
def test_items_of_a_batch_do_not_mix(case: str) -> None:
    model = build(case)
    image, input_ids, attention_mask = batch(count=3)
    with torch.inference_mode():
        together = model.predict(image, input_ids, attention_mask)
        alone = torch.cat(
            [model.predict(image[i : i + 1], input_ids[i : i + 1], attention_mask[i : i + 1]) for i in range(3)]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", TINY)
def test_expression_and_gradients_reach_everything(case: str) -> None:
    """Every parameter that the masks depend on gets a gradient, the gates' first Linears from the first step on."""
    model = build(case)
    open_gates(model)
    output = model(*batch(count=2))
    predictions = [(output.mask_logits, output.class_logits), *output.auxiliary]
    loss = sum((m.square().mean() + (0 if c is None else c.square().mean())) for m, c in predictions)
    loss = loss + output.text_features.square().mean()
    loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike: softmax is blind to it, and a single query attends to itself.
    blind = ("text_projection.", ".key.bias", "word_key.bias", "self_attention.query.", "self_attention.key.")
    blind = (*blind, "text_fusion.value.bias")  # its instance norm removes any constant
    unread = ("alignment.3.image_gate.", "fusions.3.gate.")  # the last stage's stream feeds nothing
    blind = (*blind, *unread)
    dead = [n for n in dead if not any(part in n for part in blind)]
    if case == "magnet_tiny released":  # words get zero queries there: uniform attention over zero-mean values
        dead = [n for n in dead if "text_fusion" not in n]
    assert dead == []


def test_gates_start_closed_and_learn() -> None:
    model = build("magnet_tiny")
    for alignment in model.alignment:
        for gate in (alignment.image_gate, alignment.text_gate):
            assert gate.last.weight.abs().sum() == 0 and gate.first.weight.abs().sum() > 0
    output = model(*batch())
    (output.mask_logits.square().mean() + output.text_features.square().mean()).backward()
    for stage, alignment in enumerate(model.alignment):
        assert alignment.text_gate.last.weight.grad.abs().sum() > 0
        if stage < 3:  # the last stage's stream feeds nothing
            assert alignment.image_gate.last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]], ids=["all words", "padded"])
def test_absorbed_projections_are_exact(mask: list | None) -> None:
    torch.manual_seed(0)
    module = TextPWAM(48, 16, masking="correct").double()
    words = torch.randn(2, 7, 48, dtype=torch.float64)
    pixels = torch.randn(2, 400, 16, dtype=torch.float64) * torch.rand(16) + 1
    word_mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    assert module._absorbing_pays(pixels) and not module._absorbing_pays(torch.empty(1, 9, 1024))
    query = module.query(words)
    direct = module._attend(query, pixels, word_mask)
    torch.testing.assert_close(module._attend_absorbed(query, pixels, word_mask), direct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["magnet_tiny", "lavt_tiny"])
def test_backends_agree(case: str) -> None:
    model = build(case)
    inputs = batch((67, 45))
    grads, outputs = [], []
    for backend in ("reference", "auto"):
        model.zero_grad()
        with ops.backend(backend):
            output = model(*inputs).mask_logits
            output.square().mean().backward()
        outputs.append(output.detach())
        grads.append([p.grad for p in model.image_encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_compiles_whole() -> None:
    model = build("magnet_tiny")
    inputs = batch((64, 64))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs).mask_logits, model(*inputs).mask_logits, rtol=1e-4, atol=1e-4)


def test_autocast_stays_finite_and_near() -> None:
    model = build("magnet_tiny")
    inputs = batch()
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(*inputs)
    # The first prediction has passed no mask threshold, so it moves continuously with rounding.
    difference = (exact.auxiliary[0][0] - rough.auxiliary[0][0].float()).abs().max()
    assert difference < 0.05 * exact.auxiliary[0][0].abs().max()
    assert rough.mask_logits.isfinite().all()


def test_presets_build_and_sizes() -> None:
    tiny = models.build("magnet_tiny")
    assert 1.0e6 < sum(p.numel() for p in tiny.parameters()) < 3e6
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in models.build(name).parameters()) for name in models.presets()}
    assert {"magnet_tiny", "magnet_swin_t", "magnet_swin_s", "magnet_swin_b"} <= counts.keys()
    assert {"lavt_tiny", "lavt_swin_t", "lavt_swin_s", "lavt_swin_b"} <= counts.keys()
    assert 290e6 < counts["magnet_swin_b"] < 300e6  # the released model has 297 M


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, t, m: (i[0], t, m), "image must be"),
        (lambda i, t, m: (i.long(), t, m), "image must be a floating-point"),
        (lambda i, t, m: (i[:, :1], t, m), "image must be"),
        (lambda i, t, m: (i, t[:1], m), "input_ids must be"),
        (lambda i, t, m: (i, t.float(), m), "input_ids must be int64"),
        (lambda i, t, m: (i, t, m[:, :-1]), "attention_mask must have"),
        (lambda i, t, m: (i, t.repeat(1, 30), m.repeat(1, 30)), "positions"),
    ],
)
def test_bad_inputs(change, message: str) -> None:
    model = build("magnet_tiny")
    with pytest.raises((TypeError, ValueError), match=message):
        model(*change(*batch()))
