"""Results lie where the given tensors do, whatever the default device: `torch.set_default_device`, `torch.device`.

"meta" stands for every other device: what lands there by mistake has no memory, and cannot be computed with.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.ops import _linear, _linear_chain, _winograd

from .cases import Case, all_cases, weights_like

CASES = list(all_cases())


def results(case: Case, weights: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """The outputs, every gradient, and with `create_graph` the gradients of those gradients' sum."""
    outputs = case()
    used = list(outputs)[: len(weights)]
    grads = torch.autograd.grad(used, case.leaves, weights, create_graph=create_graph, materialize_grads=True)
    if not create_graph:
        return [*outputs, *grads]
    twice = torch.autograd.grad(sum(grad.square().sum() for grad in grads), case.leaves, materialize_grads=True)
    return [*outputs, *grads, *twice]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operators(name: str, dtype: torch.dtype, backend: str) -> None:
    case = all_cases(dtype)[name]
    with ops.backend(backend):
        weights = [weights_like(out) for out in case()]
        for some in (weights, weights[:1]):  # the gradient of a second result may be missing
            expected = results(case, some)
            with torch.device("meta"):
                found = results(case, some)
            assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    case = all_cases()[name]
    with ops.backend("cpu"):
        weights = [weights_like(out) for out in case()]
        try:
            expected = results(case, weights, create_graph=True)
        except RuntimeError as error:
            if "is not implemented" in str(error):
                pytest.skip("PyTorch's grid_sample of this version has no second derivative")
            raise
        with torch.device("meta"):
            found = results(case, weights, create_graph=True)
    assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_tensors_of_another_device_stay_there(name: str) -> None:
    """The reference runs on any; the default is the CPU here, and the tensors are not."""
    case = all_cases()[name]

    def there(value: object) -> object:
        return value.to("meta") if isinstance(value, Tensor) else value

    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in case.leaves]
    args, kwargs = case.arguments(*leaves)
    args, kwargs = [there(value) for value in args], {key: there(value) for key, value in kwargs.items()}
    with torch.device("cpu"), ops.backend("reference"):
        found = getattr(ops, case.operator)(*args, **kwargs)
        outputs = [out for out in (found if isinstance(found, tuple) else (found,)) if out is not None]
        grads = torch.autograd.grad([out.sum() for out in outputs], leaves)
    assert {tensor.device.type for tensor in (*outputs, *grads)} == {"meta"}


def test_a_winograd_convolution() -> None:
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 40, 40)
    if not _winograd.takes(convolution, x):
        pytest.skip("no vectors for Winograd's algorithm on this processor")
    expected = _winograd.run(x, _winograd.pack(convolution.weight), convolution.bias)
    with torch.device("meta"):
        found = _winograd.run(x, _winograd.pack(convolution.weight), convolution.bias)
    assert torch.equal(found, expected)


def test_a_chain_of_linears() -> None:
    if _linear_chain.why_unchecked(torch.float32) is not None:
        pytest.skip("this processor runs Linears one by one")
    with torch.device("meta"):
        verdict = _linear_chain.check(torch.float32)
    assert verdict.passed, verdict.detail


def test_packed_linears() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 128).requires_grad_(False), torch.randn(300, 64)
    _linear.pack_linear(layer)
    with torch.inference_mode():
        expected = layer(x)
        again = nn.Linear(64, 128).requires_grad_(False)
        again.load_state_dict(layer.state_dict())
        with torch.device("meta"):
            _linear.pack_linear(again)
            found = again(x)
    assert torch.equal(found, expected)
