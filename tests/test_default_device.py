"""What reads files, words and pictures works on the CPU or on the model's device, whatever `torch.set_default_device`
says; what makes a model follows it, as PyTorch's own modules do.

"meta" stands for every other device: what lands there by mistake has no memory, and cannot be computed with. The
operators have their own such tests, in tests/ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from magnet_fast import Segmenter, checkpoints, exporting, models, shrinking
from magnet_fast.data import ExpressionDataset, Refer, TokenHider, open_tokenizer
from magnet_fast.data.loader import Loader
from magnet_fast.data.sample import collate
from magnet_fast.data.scenes import write_scenes
from magnet_fast.devices import on_cpu
from magnet_fast.evaluation import evaluate
from magnet_fast.evaluation.table import Table
from magnet_fast.models.contract import InputSpec
from magnet_fast.models.heads.pixel_decoder import DeformableAttention
from magnet_fast.models.position import RandomPosition
from magnet_fast.training import load_config, train, trainer
from magnet_fast.training.checkpoint import load_checkpoint

from .training.fakes import SMALLEST_MAGNET

EXPRESSIONS = ["the large red circle", "the blue square on the left"]


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        assert torch.zeros(1).is_meta
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 12, 3, level="easy", image_size=64))


def same(found: Any, expected: Any) -> bool:
    """Equal, tensors on the CPU."""
    if isinstance(expected, Tensor):
        return found.device.type == "cpu" and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_on_cpu() -> None:
    with elsewhere():
        with on_cpu():
            assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).is_meta
    with on_cpu():
        assert torch.zeros(1).device.type == "cpu"


# ---- Models follow the default device -------------------------------------------------------------------------------


def test_starts_with_the_same_numbers_on_any_device() -> None:
    expected = RandomPosition(8).matrix
    with torch.device("meta"):
        made = RandomPosition(8)
        attention = DeformableAttention(16, num_heads=4, levels=2, points=3)
        with on_cpu():
            assert torch.equal(RandomPosition(8).matrix, expected)
    assert made.matrix.is_meta and made.matrix.shape == expected.shape and made.matrix.dtype == expected.dtype
    assert all(parameter.is_meta for parameter in attention.parameters())


# ---- Files, words, pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_a_segmenter_and_its_file(fast: bool, picture: Image.Image) -> None:
    def masks() -> list[np.ndarray]:
        segmenter = Segmenter.from_checkpoint(fast=fast, pack=fast)
        assert {tensor.device.type for tensor in segmenter.model.state_dict().values()} == {"cpu"}
        return [one.probability for one in segmenter([picture, picture.rotate(90)], EXPRESSIONS)]

    expected = masks()
    with elsewhere():
        found = masks()
    assert all(np.array_equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


def test_files_are_written_and_read(tmp_path: Path) -> None:
    with elsewhere():
        loaded = checkpoints.load()
        models.save(loaded.model, tmp_path / "whole.safetensors", loaded.metadata)
        models.save(loaded.model, tmp_path / "compact.safetensors", loaded.metadata, compact=True)
        loaded.model.save_pretrained(tmp_path / "folder")
        again = {path.name: checkpoints.load(path).model.state_dict() for path in tmp_path.iterdir()}
    assert len(again) == 3
    assert same(again["whole.safetensors"], loaded.model.state_dict())
    assert same(again["folder"], loaded.model.state_dict())
    assert same(again["compact.safetensors"], checkpoints.load(tmp_path / "compact.safetensors").model.state_dict())


def test_a_model_of_fewer_words() -> None:
    loaded = checkpoints.load()
    tokenizer = loaded.tokenizer()
    smaller = [tokenizer.vocab_size - 40, EXPRESSIONS]
    expected, _ = shrinking.shrunk(loaded.model, tokenizer, *smaller)
    with elsewhere():
        found, _ = shrinking.shrunk(loaded.model, tokenizer, *smaller)
    assert same(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize("fit", ["squash", "letterbox", "longest"])
def test_a_data_set(fit: str, scenes: Path) -> None:
    def samples(workers: int) -> list[Any]:
        spec, kept = InputSpec(size=32, fit=fit), fit == "squash"
        dataset = ExpressionDataset(Refer(scenes), "val", open_tokenizer(), spec, original=True, cache=kept)
        drawn = torch.Generator().manual_seed(0)
        loader = Loader(dataset, 2, shuffle=False, collate_fn=collate, num_workers=workers, generator=drawn)
        return [dataset[0], *loader]

    expected = samples(0)
    with elsewhere():
        assert same(samples(0), expected)
        assert same(samples(1), expected)


def test_hidden_words() -> None:
    tokenizer = open_tokenizer()

    def hidden() -> Any:
        text = tokenizer(EXPRESSIONS)
        hider = TokenHider(tokenizer, preferred=[int(text.ids[0, 2])])
        return [hider(text, torch.Generator().manual_seed(0)), hider.one_by_one(text)]

    expected = hidden()
    with elsewhere():
        assert same(hidden(), expected)


def test_a_table_takes_lists_and_arrays() -> None:
    def row() -> Any:
        table = Table()
        masks = np.arange(18).reshape(2, 3, 3) % 2 == 0
        table.add(masks, torch.from_numpy(~masks), index=[3, 4], claimed=[True, False], probability=masks * 0.5)
        return [tuple(row) for row in table.rows()]

    expected = row()
    with elsewhere():
        assert row() == expected


# ---- Evaluation, training, exporting --------------------------------------------------------------------------------


def test_evaluation(scenes: Path) -> None:
    torch.manual_seed(0)
    model = models.create("magnet_tiny", **SMALLEST_MAGNET).eval()
    model.spec = model.spec._replace(size=32, threshold=0.2)

    def scores(workers: int, resolution: str) -> str:
        dataset = ExpressionDataset(Refer(scenes), "val", open_tokenizer(), model.spec, original=True)
        # As text: a score that is not defined is NaN, which equals nothing.
        return repr(evaluate(model, dataset, 4, resolution=resolution, workers=workers, limit=6))

    for workers, resolution in ((0, "original"), (1, "input")):
        expected = scores(0, resolution)
        with elsewhere():
            assert scores(workers, resolution) == expected


@pytest.mark.slow
def test_training_and_going_on(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a default device, bit for bit: begun, stopped after a checkpoint, and resumed."""
    values = tmp_path / "run.yaml"
    values.write_text(
        f"""
        model: {{name: magnet_tiny, overrides: {SMALLEST_MAGNET}}}
        data: {{root: {scenes}, image_size: 32, max_tokens: 12, cache: true, workers: 1}}
        terms: {{grounding: {{weight: 1, layers: 1, heads: 4, feedforward: 32}}}}
        max_steps: 4
        batch_size: 4
        checkpoint_every: 2
        validate_every: 2 steps
        device: cpu
        """
    )
    config = load_config(values)
    expected_scores = train(config, tmp_path / "plain")
    save = trainer.save_checkpoint

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise InterruptedError("as when the process is killed")

    with elsewhere():
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(trainer, "save_checkpoint", save_and_stop)
            train(config, tmp_path / "elsewhere")
        found_scores = train(config, tmp_path / "elsewhere", resume=True)
        found = load_checkpoint(tmp_path / "elsewhere" / "checkpoint.safetensors")
    expected = load_checkpoint(tmp_path / "plain" / "checkpoint.safetensors")
    assert found["step"] == expected["step"] == 4
    assert all(same(found[part], expected[part]) for part in ("model", "terms", "optimiser"))
    assert found_scores == expected_scores


@pytest.mark.slow
def test_exporting(tmp_path: Path) -> None:
    model, tokenizer = models.create("lavt_tiny"), checkpoints.load().tokenizer()
    with elsewhere():
        difference = exporting.export(model, tokenizer, tmp_path / "graph", "torch")
    assert 0 <= difference < 1e-4
