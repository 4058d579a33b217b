"""Model and terms together, and all terms in whole runs of a small, real MagNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magnet_fast import models
from magnet_fast.data.scenes import write_scenes
from magnet_fast.data.tokenizers import Tokenizer
from magnet_fast.training import train
from magnet_fast.training.checkpoint import load_checkpoint
from magnet_fast.training.config import TrainConfig, parse_config
from magnet_fast.training.objective import Objective, tensors_of
from magnet_fast.training.optim import parameter_groups
from magnet_fast.training.progress import MetricsFile
from magnet_fast.training.terms import build_terms
from magnet_fast.training.trainer import Trainer

from .fakes import SMALL_MAGNET, SMALLEST_MAGNET, same_weights

pytestmark = pytest.mark.slow

GROUNDING = {"layers": 1, "heads": 4, "feedforward": 32}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 24, 3, level="easy", image_size=64))


SMALLEST = {"name": "magnet_tiny", "overrides": SMALLEST_MAGNET}


def config(scenes: Path, **changes) -> TrainConfig:
    values = {
        "model": {"name": "magnet_tiny", "overrides": SMALL_MAGNET},
        "data": {"root": str(scenes), "image_size": 32, "max_tokens": 12, "cache": True},
        "optimiser": {"lr": 1e-3, "eps": 1e-3},
        "terms": {"alignment": {"weight": 0.5}, "grounding": GROUNDING},
        "max_steps": 4,
        "batch_size": 4,
        "checkpoint_every": 1,
        "validate_every": "never",
        "log_every": 1,
        "device": "cpu",
        "precision": "float32",
    }
    return parse_config({**values, **changes})


def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 32, 32)
    mask[:, 4:20, 8:30] = 1
    return {
        "image": torch.randn(2, 3, 32, 32, generator=generator),
        "text": Tokenizer(max_tokens=12)(["the red circle", "blue square on the left"]),
        "mask": mask,
        "exists": torch.tensor([True, True]),
        "kind": ["place", None],
        "extra": {},
    }


def objective(scenes: Path, **changes) -> Objective:
    torch.manual_seed(0)
    settings = config(scenes, **changes)
    model = models.create(settings.model.name, **settings.model.overrides)
    return Objective(model, build_terms(settings.terms, model, Tokenizer(max_tokens=12)), "float32")


def test_total_is_the_weighted_sum_of_its_terms(scenes: Path) -> None:
    torch.manual_seed(5)
    whole = objective(scenes, terms={"alignment": {"weight": 0.25}, "grounding": {**GROUNDING, "weight": 2.0}})
    alone = objective(scenes, terms={})
    alone.model.load_state_dict(whole.model.state_dict())
    whole.eval()  # without dropout
    alone.eval()
    given = tensors_of(batch())
    losses = whole(given)
    extra = 0.25 * (losses["p2p"] + losses["p2t"]) + 2.0 * losses["grounding"]
    torch.testing.assert_close(losses["total"], alone(given)["total"] + extra)
    assert set(whole.logged) == losses.keys() - {"total"}
    assert alone.logged == ("bce", "dice", "presence")
    assert [name for name, _ in alone.named_parameters() if not name.startswith("model.")] == []
    assert not any(losses[name].requires_grad for name in whole.logged)


def test_a_step_reads_tensors_alone() -> None:
    """A list of texts in its input would make torch.compile start anew for every batch."""
    assert set(tensors_of(batch())) == {"image", "text", "mask", "exists", "extra"}


# What no loss can depend on, by the architecture: biases that a softmax or an instance norm removes; the gate of the
# last stage, after which no stage comes; similarities of the one query with itself; the token of an absent referent.
IDLE = (
    "text_fusion.key.bias",
    "text_fusion.value.bias",
    "fusion.stages.3.image_gate",
    "self_attention.query",
    "no_mask",
)
IDLE += ("self_attention.key", "attention.key.bias")


def test_gradients_reach_what_should_learn(scenes: Path) -> None:
    whole = objective(scenes)
    # Gates start closed (see `Gate`), sampling points in fixed places: what is behind them learns once they move.
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "gate.last" in name or "sampling_offsets.weight" in name:
                parameter.normal_(std=0.1)
    given = batch()
    for name in ("image", "mask"):  # at 32 px the last stage is one pixel, whose instance norm is zero
        given[name] = given[name].repeat_interleave(3, -1).repeat_interleave(3, -2)
    whole(tensors_of(given))["total"].backward()
    still = [name for name, p in whole.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in still if not any(part in name for part in IDLE)] == []


def test_gates_that_never_learn_as_released_do_in_ours(scenes: Path) -> None:
    whole = objective(scenes)
    whole(tensors_of(batch()))["total"].backward()
    gates = {name: p.grad for name, p in whole.named_parameters() if "text_gate.last" in name}
    assert len(gates) == 4 and all(grad.any() for grad in gates.values())


def test_optimiser_takes_the_terms_among_the_rest(scenes: Path) -> None:
    whole = objective(scenes)
    groups = parameter_groups(whole.model, config(scenes).optimiser, whole.terms)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in whole.parameters())
    owned = {id(p) for p in whole.terms.parameters()}
    assert all(group["name"].startswith("rest") for group in groups for p in group["params"] if id(p) in owned)


def test_a_run_logs_learns_and_exports_the_model_alone(scenes: Path, tmp_path: Path) -> None:
    train(config(scenes, model=SMALLEST, max_steps=20, optimiser={"lr": 3e-3}), tmp_path)
    rows = [row for row in MetricsFile(tmp_path / "metrics.jsonl").rows() if row["kind"] == "train"]
    assert len(rows) == 20
    for row in rows:
        assert row["p2p"] > 0 and row["p2t"] > 0 and row["grounding"] > 0 and 0 <= row["grounding_accuracy"] <= 1
    assert sum(row["grounding"] for row in rows[-3:]) < 0.9 * sum(row["grounding"] for row in rows[:3])
    model = models.load(tmp_path / "last.safetensors")
    plain = models.create("magnet_tiny", **SMALLEST_MAGNET)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_run_with_all_losses_resumes_bit_for_bit(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    whole, broken, settings = tmp_path / "whole", tmp_path / "broken", config(scenes, model=SMALLEST)
    train(settings, whole)

    class Killed(BaseException):
        pass

    after_step = Trainer._after_step

    def die(self) -> None:
        after_step(self)
        if self.step == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_after_step", die)
        with pytest.raises(Killed):
            train(settings, broken)
    torch.manual_seed(123)
    train(settings, broken, resume=True)
    one, other = (load_checkpoint(folder / "checkpoint.safetensors") for folder in (whole, broken))
    assert {name.split(".")[0] for name in one["terms"]} == {"alignment", "grounding"}
    assert same_weights(one["terms"], other["terms"])
    assert same_weights(one["model"], other["model"])


def test_mask_grounding_attaches_to_lavt(scenes: Path, tmp_path: Path) -> None:
    small = {"text__vocab_size": 1280, "image__embed_dim": 8}
    settings = config(
        scenes,
        model={"name": "lavt_tiny", "overrides": small},
        terms={"mask": {"weight": 0}, "grounding": {**GROUNDING, "image_stage": 1}},
    )
    torch.manual_seed(0)
    model = models.create("lavt_tiny", **small)
    terms = build_terms(settings.terms, model, Tokenizer(max_tokens=12))
    losses = Objective(model, terms, "float32")(tensors_of(batch()))
    torch.testing.assert_close(losses["total"], losses["grounding"])
    losses["total"].backward()
    # The hidden words are predicted from what both encoders and their fusion make of the rest.
    assert model.fusion.stages[1].fusion.query.weight.grad.any()
    assert model.text_encoder.bert.encoder.layer[3].output.dense.weight.grad.any()
    assert model.head.classify.weight.grad is None or not model.head.classify.weight.grad.any()
    train(settings, tmp_path)
    exported = models.load(tmp_path / "last.safetensors")
    assert exported.state_dict().keys() == model.state_dict().keys()


def test_a_model_without_what_a_term_reads_is_refused(scenes: Path, tmp_path: Path) -> None:
    settings = config(scenes, model={"name": "lavt_tiny"}, terms={"objects": {"classes": 3}})
    with pytest.raises(ValueError, match=r"terms\.objects: the model has no fusion that says boxes"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
