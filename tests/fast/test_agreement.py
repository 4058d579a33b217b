"""Every supported family before and after: outputs and all gradients, the way back, and what is replaced."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from magnet_fast import ops

from . import zoo

pytestmark = pytest.mark.slow

BACKENDS = [name for name in ("reference", "cpu") if name in ops.available_backends()]


@pytest.fixture(params=list(zoo.FAMILIES))
def family(request) -> zoo.Family:
    return zoo.FAMILIES[request.param]


def results(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name; the loss gives every element a weight of its own."""
    outputs = zoo.call(model, inputs)
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    loss = 0.0
    for index, output in enumerate(outputs):
        if output.requires_grad:
            finite = output.where(output.isfinite(), 0.0)
            generator = torch.Generator().manual_seed(index)
            loss = loss + (finite * torch.randn(output.shape, generator=generator).to(output)).mean()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            found[f"gradient of {name}"] = gradient
    return found


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_outputs_and_gradients(family: zoo.Family, odd: bool, training: bool) -> None:
    """Both against float64, and against each other.

    The last bits of a deep model's gradients are noise: of small tensors the one form is four times as far off as the
    other by chance, and where more is missing, what counts is how far weights changed by their own rounding move the
    original. Where queries are chosen by score, float64 may choose others than float32 does: hence the second bound,
    between the two in float32.
    """
    size = family.odd if odd else zoo.EVEN
    inputs = family.inputs(size)
    truth = results(family.model(size).double().train(training), inputs)
    plain = results(family.model(size).train(training), inputs)
    assert any(name.endswith(("bias_table", "rel_pos_h")) or "sampling_offsets" in name for name in plain)

    @cache
    def nudged() -> dict[str, Tensor]:
        model = family.model(size).train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randn_like(parameter))
        return results(model, inputs)

    for backend in BACKENDS:
        model = family.model(size).train(training)
        magnet_fast.accelerate(model)
        with ops.backend(backend):
            ours = results(model, inputs)
        assert ours.keys() == plain.keys() == truth.keys()
        for name, expected in truth.items():
            assert torch.equal(ours[name].isfinite(), expected.isfinite()), name
            expected, original, found = (x[expected.isfinite()].double() for x in (expected, plain[name], ours[name]))
            scale = expected.abs().max().item()
            error, baseline = (found - expected).abs().max().item(), (original - expected).abs().max().item()
            if error > 4 * baseline + 1e-5 * scale + 1e-7:
                moved = nudged()[name].double()[truth[name].isfinite()]
                baseline = max(baseline, (moved - expected).abs().max().item())
            assert error <= 4 * baseline + 1e-5 * scale + 1e-7, f"{backend}, {name}: {error:.2g}, plain {baseline:.2g}"
            apart = (found - original).abs().max().item()
            assert apart <= 1e-3 * scale + 1e-5, f"{backend}, {name}: {apart:.2g} apart, values up to {scale:.2g}"


def test_what_is_replaced(family: zoo.Family) -> None:
    """With the installed versions; if this fails after an upgrade, upstream has changed."""
    report = magnet_fast.accelerate(family.model())
    count = Counter(module.path.rpartition(".")[2] for module in report.replaced)
    assert count == family.replaced, str(report)
    assert Counter(module.path.rpartition(".")[2] for module in report.left_alone) == family.left_alone
    assert str(report).startswith(f"magnet_fast: {sum(family.replaced.values())} modules replaced")


def test_restore_is_exact(family: zoo.Family) -> None:
    model = family.model().eval()
    inputs = family.inputs(zoo.EVEN)
    with torch.no_grad():
        before = zoo.call(model, inputs)
        attributes = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        names = list(model.state_dict())
        magnet_fast.accelerate(model)
        assert list(model.state_dict()) == names
        assert {name: set(vars(module)) for name, module in model.named_modules()} == {
            name: held for name, (_, held) in attributes.items()
        }
        zoo.call(model, inputs)
        magnet_fast.restore(model)
        after = zoo.call(model, inputs)
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_state_dict_of_a_trained_model_loads_into_an_untouched_one(family: zoo.Family) -> None:
    model = family.model().train()
    magnet_fast.accelerate(model)
    inputs = family.inputs(zoo.EVEN)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(output.where(output.isfinite(), 0.0).square().mean() for output in zoo.call(model, inputs)).backward()
    optimiser.step()
    untouched = family.model().eval()
    untouched.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        for ours, theirs in zip(zoo.call(model.eval(), inputs), zoo.call(untouched, inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
