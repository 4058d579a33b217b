"""A run on base weights: its files hold what it trained, and it goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from magnet_fast import checkpoints, cli, models
from magnet_fast.training import Trainer
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from tests.models.sam import COMMON, DECODER_HEADS, IMAGE, their_sam

from .fakes import FakeDataset, fake_config, same_weights, trainer_of

SIZES = {
    "image": {**IMAGE, "image_size": 32, "tuning": "lora"},
    "text": {"vocab_size": 50, "num_layers": 1},
    "fusion": {"width": COMMON, "layers": 1},
    "head": {"num_heads": DECODER_HEADS, "feedforward": 96},
    "input": {"size": 16, "max_tokens": 6},
}


@pytest.fixture
def sam(tmp_path: Path) -> Path:
    state = {k: v for k, v in their_sam().state_dict().items() if "prompt_encoder.shared_embedding" not in k}
    save_file(state, tmp_path / "sam.safetensors")
    return tmp_path / "sam.safetensors"


def made(sam: Path, out: Path) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(11)
    model = models.create("risam_tiny", pretrained={"image": str(sam), "text": False}, **SIZES)
    config = fake_config(ema=0.8, max_steps=4, checkpoint_every=2)
    return trainer_of(config, model, FakeDataset(40), FakeDataset(4), out)


def test_its_files_hold_what_it_trained_and_it_resumes_bit_for_bit(sam: Path, tmp_path: Path) -> None:
    whole = made(sam, tmp_path / "whole")
    scores = whole.run()
    broken = made(sam, tmp_path / "broken")
    after_step = broken._after_step

    def stop() -> None:
        after_step()
        if broken.step == 3:
            raise KeyboardInterrupt

    broken._after_step = stop
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = made(sam, tmp_path / "broken")
    resumed.load_state(load_checkpoint(tmp_path / "broken" / CHECKPOINT))
    assert resumed.step == 2 and resumed.run() == scores
    assert same_weights(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert same_weights(resumed.average.weights, whole.average.weights)

    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    tables = {f"image_encoder.layers.{i}.attention.rel_{side}" for i in (1, 3) for side in ("height", "width")}
    held = trained | tables | {"image_encoder.positions", "fusion.place.matrix", "head.place.matrix"}
    state = load_checkpoint(tmp_path / "whole" / CHECKPOINT)
    assert state["bases"]["image"]["source"] == str(sam)
    assert state["model"].keys() == held and state["optimiser"]["state"].keys() == {f"model.{name}" for name in trained}
    assert state["ema"]["weights"].keys() == {f"model.{name}" for name in held}
    averaged = {name.removeprefix("model."): value for name, value in whole.average.weights.items()}
    for name in (CHECKPOINT, "best.safetensors", "last.safetensors"):
        assert name == CHECKPOINT or load_file(tmp_path / "whole" / name).keys() == held
        found = checkpoints.load(tmp_path / "whole" / name).model.state_dict()
        assert name.startswith("best") or same_weights(dict(found), averaged)


def test_another_base_is_refused_and_a_merged_file_needs_none(sam: Path, tmp_path: Path) -> None:
    made(sam, tmp_path / "run").run()
    last, merged = tmp_path / "run" / "last.safetensors", tmp_path / "new" / "merged.safetensors"
    before = checkpoints.load(last)
    result = CliRunner().invoke(cli.app, ["merge", "--checkpoint", str(last), "--out", str(merged)])
    assert result.exit_code == 0, result.output
    state = load_file(sam)
    state["vision_encoder.layers.0.mlp.lin1.weight"][0, 0] += 1
    save_file(state, sam)
    trainer = made(sam, tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint was trained on another base"):
        trainer.load_state(load_checkpoint(tmp_path / "run" / CHECKPOINT))
    sam.unlink()
    result = CliRunner().invoke(cli.app, ["merge", "--checkpoint", str(last), "--out", str(merged)])
    assert result.exit_code == 2 and "holds only what was trained of its image encoder" in result.output
    after = checkpoints.load(merged)
    assert after.metadata["step"] == before.metadata["step"] and after.model.config.image.tuning == "frozen"
    image, ids = torch.randn(1, 3, 16, 16), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        one, other = (each.model(image, models.Text(ids, ids > 0)).mask for each in (before, after))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
