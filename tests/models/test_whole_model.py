"""Whole models as a GPU needs them: one graph for torch.compile, and nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from magnet_fast import models
from magnet_fast.data import Tokenizer
from magnet_fast.models import position
from magnet_fast.models.pwam import Gate
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.objective import Objective, build_grounding

# Small, but with every kind of block: tracing takes time by the number of layers.
SMALL = {
    "magnet_tiny": {"image__depths": (1, 2, 1, 1), "alignment__pyramid": (2,), "decoder__mask_layers": 1},
    "lavt_tiny": {"image__depths": (1, 2, 1, 1)},
}
CASES = [("magnet_tiny", {}), ("magnet_tiny", {"alignment__kind": "xmha"}), ("lavt_tiny", {})]
IDS = ["magnet", "magnet-xmha", "lavt"]


def build(name: str, overrides: dict) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, **SMALL[name], **overrides)


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    attention_mask = torch.ones(2, 9, dtype=torch.int64, device=device)
    return torch.randn(2, 3, 72, 48, device=device), torch.full_like(attention_mask, 7), attention_mask


def objective(model: nn.Module) -> Objective:
    """All losses of the training recipe that this model can have."""
    loss = {"grounding": 1.0, "alignment": 1.0 if isinstance(model, models.MagNet) else 0.0}
    config = TrainConfig(model={"name": "magnet_tiny"}, data={"root": "-"}, loss=loss, max_steps=1)
    return Objective(model, config.loss, config.precision, build_grounding(config, model, Tokenizer()))


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=IDS)
def test_forward_and_backward_are_one_graph(name: str, overrides: dict) -> None:
    torch.compiler.reset()
    model, (image, ids, words) = build(name, overrides), inputs()
    graphs = []

    def count(graph: nn.Module, _: list) -> nn.Module:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=count)
    ours, theirs = compiled(image, ids, words), model(image, ids, words)
    assert len(graphs) == 1
    torch.testing.assert_close(ours.mask_logits, theirs.mask_logits)
    wanted = torch.autograd.grad(theirs.mask_logits.square().sum(), list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad(ours.mask_logits.square().sum(), list(model.parameters()), allow_unused=True)
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Makes CUDA modules without values of CPU modules; whatever would wait for a value raises an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    position._kept.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):  # a few constants stay on the CPU
        yield _moved
    position._kept.cache_clear()  # no test after this one finds encodings without values


def _moved(module: nn.Module) -> nn.Module:
    new: dict[int, Tensor] = {}  # by the old one's address: tied parameters stay tied
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in new:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    new[id(tensor)] = nn.Parameter(empty) if tensors is part._parameters else empty
                tensors[name] = None if tensor is None else new[id(tensor)]
    return module


@pytest.fixture
def step(name: str, overrides: dict) -> Objective:
    return objective(build(name, overrides))


@pytest.mark.filterwarnings("ignore:.*autocast.*")
@pytest.mark.parametrize(("name", "overrides"), CASES, ids=IDS)
def test_losses_never_wait_for_the_device(step: Objective, pretended_gpu) -> None:
    step = pretended_gpu(step)
    image, ids, words = inputs("cuda")
    losses = step(image, ids, words, torch.ones(2, 72, 48, device="cuda"))
    assert losses["total"].requires_grad and losses["total"].device.type == "cuda"
    assert "grounding" in losses
    assert ("p2p" in losses) == hasattr(step.model, "text_projection")


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=IDS)
def test_inference_never_waits_for_the_device(step: Objective, pretended_gpu, monkeypatch) -> None:
    # A gate looks at its weights once, when they have changed; that answer is given here.
    monkeypatch.setattr(Gate, "closed", lambda gate: False)
    model = pretended_gpu(step.model.eval())
    with torch.no_grad():
        assert model.predict(*inputs("cuda"), size=(30, 40)).shape == (2, 30, 40)


def test_waiting_would_be_seen(pretended_gpu) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device="cuda").sum().item()
