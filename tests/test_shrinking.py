"""Smaller copies of models: int8 files, fewer words."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from magnet_fast import Segmenter, checkpoints, models
from magnet_fast.cli import app
from magnet_fast.models.compact import compacted, expanded
from magnet_fast.models.files import safetensors_metadata
from magnet_fast.shrinking import kept_tokens, shrunk

SENTENCES = ["the large red circle", "the square left of the triangle"]


def test_rows_come_back_within_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 130, generator=generator) * torch.logspace(-4, 3, 40)[:, None]
    rows[3] = 0
    tensors = {"a": rows, "kernel": torch.randn(64, 8, 3, 3, generator=generator), "norm": torch.randn(5000)}
    tensors |= {"small": torch.randn(4, 4), "count": torch.arange(5000).view(50, 100)}
    stored = compacted(tensors)
    assert {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype == torch.int8}.keys() == {
        "a",
        "kernel",
    }
    found = expanded(stored, "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        step = tensor.abs().flatten(1).amax(1) / 127 if name in ("a", "kernel") else torch.zeros(1)
        off = (found[name] - tensor).abs().flatten(min(1, tensor.dim() - 1))
        assert bool((off <= 0.5001 * (step[:, None] if off.dim() > 1 else 0)).all()), name
    assert not found["a"][3].any()
    with pytest.raises(ValueError, match="compact: expected finite weights, got NaN or infinity in a"):
        compacted({"a": rows / 0})


@pytest.mark.parametrize("damage", ["no weights", "other rows", "floats"])
def test_damaged_scales_are_refused(damage: str) -> None:
    stored = compacted({"a": torch.randn(64, 64)})
    stored["a::scales"] = stored["a::scales"][:-1] if damage == "other rows" else stored["a::scales"]
    stored = {name: tensor for name, tensor in stored.items() if damage != "no weights" or name != "a"}
    if damage == "floats":
        stored["a"] = stored["a"].float()
    with pytest.raises(ValueError, match="the file: expected int8 rows of a and a scale for each"):
        expanded(stored, "the file")


@pytest.fixture(scope="module")
def shipped() -> checkpoints.Checkpoint:
    return checkpoints.load()


def test_a_compact_file(shipped, tmp_path) -> None:
    plain, small = tmp_path / "plain.safetensors", tmp_path / "small.safetensors"
    models.save(shipped.model, plain)
    models.save(shipped.model, small, {"note": "x"}, compact=True)
    assert small.stat().st_size < 0.35 * plain.stat().st_size
    assert safetensors_metadata(small)["format"].endswith("/4") and safetensors_metadata(small)["note"] == "x"
    found = models.load(small).state_dict()
    for name, tensor in shipped.model.state_dict().items():
        if tensor.is_floating_point():
            assert (found[name] - tensor).abs().max() <= tensor.abs().max() / 127 + 1e-12, name
    stored = load_file(small)
    save_file({name: tensor for name, tensor in stored.items() if not name.endswith("word.weight::scales")}, plain)
    with pytest.raises(ValueError, match="was not written by magnet_fast"):
        models.load(plain)


def test_fewer_words(shipped) -> None:
    tokenizer = shipped.tokenizer()
    small, fewer = shrunk(shipped.model, tokenizer, 400, SENTENCES)
    assert fewer.vocab_size == 400 == small.text_encoder.vocab_size and small.spec.tokenizer == "wordpiece"
    image = torch.randn(1, 3, 64, 64)
    for sentence in SENTENCES:
        answers = []
        for model, words in ((shipped.model, tokenizer), (small, fewer)):
            ids, mask = words.rows(words.readings([sentence]))
            with torch.no_grad():
                answers.append(model(image, models.Text(ids, mask)).mask)
        torch.testing.assert_close(*answers)
    unknown = "the purple xylophone"
    assert not fewer.readings([unknown])[0].unknown  # spelled in pieces, with no letter lost


def test_kept_tokens(shipped) -> None:
    tokenizer = shipped.tokenizer()
    kept = kept_tokens(tokenizer, 400, SENTENCES)
    ids = [tokenizer.vocabulary[token] for token in kept]
    assert len(kept) == 400 and ids == sorted(ids) and kept[0] == "[PAD]"
    assert {"large", "red", "circle", "a", "##a", "z", "##z", *tokenizer.special_ids} <= set(kept)
    with pytest.raises(ValueError, match="words: expected at least"):
        kept_tokens(tokenizer, 10)


def test_what_cannot_be_shrunk(shipped) -> None:
    with pytest.raises(ValueError, match="words: expected fewer than the tokenizer's"):
        shrunk(shipped.model, shipped.tokenizer(), 10**6)
    with pytest.raises(ValueError, match="its text encoder is 'clip_text'; expected 'bert' or 'transformers'"):
        shrunk(models.create("cris_tiny"), shipped.tokenizer(), 400)


def test_the_command(tmp_path) -> None:
    out, keep = tmp_path / "small", tmp_path / "keep.txt"
    keep.write_text("\n".join(SENTENCES) + "\n\n")
    arguments = ["shrink", "--checkpoint", str(checkpoints.shipped_weights()), "--words", "400", "--keep", str(keep)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0 and "400 tokens" in result.output, result.output
    assert sum(path.stat().st_size for path in out.iterdir()) < 4e6
    small, large = Segmenter.from_checkpoint(out), Segmenter.from_checkpoint()
    picture, sentence = "docs/example.jpg", "the square below the little cyan thing"
    ours, theirs = (segmenter(picture, sentence).mask for segmenter in (small, large))
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 2 and "--out: " in result.output and "expected a new folder" in result.output
