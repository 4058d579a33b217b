"""`accelerate(model, pack=True)`: every Linear on a packed copy of its weight, and nothing else different."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from magnet_fast.ops import _linear, _packed
from tests.onednn import needs_onednn

from . import zoo

# The last bit of a score makes other pixels queries, and what belongs to them is another's.
CHOOSE_BY_SCORE = ("RT-DETR", "RT-DETR v2")


@pytest.fixture(autouse=True)
def any_size(monkeypatch) -> None:
    monkeypatch.setattr(_linear, "_FEWEST_MULTIPLICATIONS", 0)


def linears(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, _linear.PackedLinear)]


def packed(model: nn.Module) -> list[Tensor]:
    copies = (_packed._copies.get(layer) or {} for layer in linears(model))
    return [copy.made for layouts in copies for copy in layouts.values()]


@needs_onednn
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_same_outputs_and_the_way_back(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = family.model(family.odd).eval(), family.inputs(family.odd)
    before = {key: (type(module), set(vars(module))) for key, module in model.named_modules()}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = zoo.call(model, inputs)
        report = magnet_fast.accelerate(model, pack=True)
        found = zoo.call(model, inputs)
        again = zoo.call(model, inputs)
        assert packed(model)
        for ours, theirs, second in zip(found, expected, again, strict=True):
            finite = theirs.isfinite()
            assert torch.equal(ours.isfinite(), finite) and torch.equal(ours, second)
            apart = (ours - theirs)[finite].abs() / max(1.0, float(theirs[finite].abs().max()))
            assert (apart.median() if name in CHOOSE_BY_SCORE else apart.max()) <= 1e-4
        assert sum(module.operator == "linear" for module in report.replaced) == len(linears(model))
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        magnet_fast.restore(model)
        restored = zoo.call(model, inputs)
    assert {key: (type(module), set(vars(module))) for key, module in model.named_modules()} == before
    assert not packed(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(restored, expected, strict=True))


@needs_onednn
def test_low_precision() -> None:
    family = zoo.FAMILIES["timm"]
    inputs = family.inputs(zoo.EVEN)
    with torch.no_grad():
        truth = zoo.call(family.model().eval(), inputs)
        model = family.model().eval().bfloat16()
        plain = zoo.call(model, inputs)
        magnet_fast.accelerate(model, pack=True)
        for expected, original, found in zip(truth, plain, zoo.call(model, inputs), strict=True):
            error, baseline = (found - expected).abs().max(), (original - expected).abs().max()
            assert found.dtype == torch.bfloat16 and error <= 2 * baseline + 2**-8 * expected.abs().max()


def test_training_is_as_without() -> None:
    family = zoo.FAMILIES["timm"]
    inputs = family.inputs(zoo.EVEN)
    gradients = []
    for pack in (False, True):
        model = family.model().train()
        magnet_fast.accelerate(model, pack=pack)
        zoo.call(model, inputs)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert not packed(model)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@needs_onednn
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_read_their_own_weights(way: str) -> None:
    family = zoo.FAMILIES["timm"]
    model, inputs = family.model().eval(), family.inputs(zoo.EVEN)
    magnet_fast.accelerate(model, pack=True)
    with torch.no_grad():
        expected = zoo.call(model, inputs)
        other = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
        assert packed(model) and not packed(other)
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        assert not torch.allclose(zoo.call(other, inputs)[0], expected[0], rtol=1e-2, atol=1e-2)
        assert torch.equal(zoo.call(model, inputs)[0], expected[0])


def test_graphs_do_not_ask_for_this_package() -> None:
    family = zoo.FAMILIES["timm"]
    model, inputs = family.model().eval(), family.inputs(zoo.EVEN)
    with torch.no_grad():
        expected = zoo.call(model, inputs)[0]
        magnet_fast.accelerate(model, pack=True)
        exported = torch.export.export(model, (inputs,))
        traced = torch.jit.trace(model, inputs, check_trace=False)
        assert not any(word in str(exported.graph) for word in ("magnet_fast::", "mkldnn"))
        assert not any(word in str(traced.inlined_graph) for word in ("magnet_fast::", "mkldnn"))
        torch.testing.assert_close(exported.module()(inputs), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(traced(inputs), expected, rtol=1e-4, atol=1e-5)


def test_compiled_in_one_graph() -> None:
    torch.compiler.reset()
    family = zoo.FAMILIES["torchvision"]
    model, inputs = family.model(family.odd).eval(), family.inputs(family.odd)
    with torch.no_grad():
        expected = zoo.call(model, inputs)[0]
        magnet_fast.accelerate(model, pack=True)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_feature_extraction() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    family = zoo.FAMILIES["torchvision"]
    model, inputs = family.model(zoo.ODD).eval(), family.inputs(zoo.ODD)
    magnet_fast.accelerate(model, pack=True)
    extractor = create_feature_extractor(model, ["features.3", "head"])
    with torch.no_grad():
        torch.testing.assert_close(extractor(inputs)["head"], model(inputs))


def test_report_has_one_line_for_all_linears() -> None:
    model = zoo.FAMILIES["timm"].model()
    count = len(linears(model))
    lines = str(magnet_fast.accelerate(model, pack=True)).splitlines()
    assert f"  replaced: * ({count} x torch Linear) -> linear; packed weight in inference on a CPU" in lines
    assert len(lines) == 3


def test_what_is_more_than_a_linear_is_left_alone() -> None:
    class Adapter(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Adapter(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    classes = [type(layer) for layer in model]
    report = magnet_fast.accelerate(model, pack=True)
    assert [module.name for module in report.replaced] == ["0"] and not report.left_alone
    assert [type(layer) for layer in model][1:] == classes[1:] and isinstance(model[0], nn.Linear)
    magnet_fast.restore(model)
    assert [type(layer) for layer in model] == classes


def test_magnet() -> None:
    """A model of this package: its Linears and those of its text encoder."""
    from magnet_fast import models

    torch.manual_seed(0)
    model = models.create("magnet_tiny").eval()
    inputs = (torch.randn(1, 3, 64, 64), torch.randint(5, 100, (1, 7)), torch.ones(1, 7, dtype=torch.long))
    expected = model.predict(*inputs)
    assert magnet_fast.accelerate(model, pack=True).replaced
    torch.testing.assert_close(model.predict(*inputs), expected, rtol=1e-3, atol=1e-4)
