"""Whole models as a GPU needs them: one graph for torch.compile, and nothing that waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from magnet_fast.models import Text
from magnet_fast.training.terms.word_predictor import WordPredictor
from tests.models.cases import SMALL, batch, build, everything

pytestmark = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SMALL if case != "magnet-xmha"])  # whose form is `two-stage`'s
def test_forward_and_backward_are_one_graph(case: str) -> None:
    torch.compiler.reset()
    model, inputs = build(SMALL[case]), batch((72, 48))
    graphs = []

    def count(graph: nn.Module, _: list) -> nn.Module:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=count)
    ours, theirs = compiled(*inputs), model(*inputs)
    assert len(graphs) == 1
    torch.testing.assert_close(ours.mask, theirs.mask)
    wanted = torch.autograd.grad(everything(theirs), list(model.parameters()))
    found = torch.autograd.grad(everything(ours), list(model.parameters()))
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Makes CUDA modules without values of CPU modules; whatever would wait for a value raises an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a few constants stay on the CPU
        yield _moved


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


def on_gpu() -> tuple[Tensor, Text]:
    ids = torch.full((2, 9), 7, device="cuda")
    return torch.randn(2, 3, 72, 48, device="cuda"), Text(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.fixture
def model(case: str) -> nn.Module:
    return build(SMALL[case])


@pytest.mark.parametrize("case", SMALL)
def test_losses_never_wait_for_the_device(model: nn.Module, pretended_gpu) -> None:
    model = pretended_gpu(model.train())
    loss = everything(model(*on_gpu()))
    assert loss.requires_grad and loss.device.type == "cuda"  # autograd itself would want a device


@pytest.mark.parametrize("case", ["magnet"])
def test_mask_grounding_never_waits_for_the_device(model: nn.Module, pretended_gpu) -> None:
    """On what `encode` gives, as the training term attaches it."""
    head = WordPredictor(64, 128, 1280, layers=1, heads=4, feedforward=32)
    model, head = pretended_gpu(model), pretended_gpu(head)
    features = model.encode(*on_gpu())
    positions = torch.ones(2, 1, dtype=torch.int64, device="cuda")
    mask = torch.ones(2, 72, 48, device="cuda")
    words, embedding = features.words, model.text_encoder.word_embedding
    logits = head(words.features, words.mask, features.maps[-1], mask, positions, embedding)
    assert logits.shape == (2, 1, 1280) and logits.device.type == "cuda" and logits.requires_grad


@pytest.mark.parametrize("case", SMALL)
def test_inference_never_waits_for_the_device(model: nn.Module, pretended_gpu) -> None:
    model = pretended_gpu(model)
    image, text = on_gpu()
    with torch.no_grad():
        assert model.predict(image, *text, size=(30, 40)).shape == (2, 30, 40)


def test_waiting_would_be_seen(pretended_gpu) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device="cuda").sum().item()
