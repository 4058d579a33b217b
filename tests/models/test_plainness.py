"""What a plain model lets others do: adapt, hook, quantise, export, and transform it; `test_whole_model` compiles."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from magnet_fast import ops
from magnet_fast.models import Prediction, Text
from tests.models.cases import PRESETS, SMALL, batch, build, everything, open_gates, without_gradient

pytestmark = pytest.mark.slow

# What transformers itself never calls: its scaled dot product takes the rate alone.
UNCALLED = ".attention.self.dropout"
# Modules that hold others and are not called themselves: the host runs an encoder stage by stage.
HOLDERS = ("image_encoder", "image_encoder.backbone", "text_encoder", "text_encoder.bert", "text_encoder.bert.encoder")


def close(found: Prediction, expected: Prediction, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.mask, expected.mask, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.presence, expected.presence, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.words.features, expected.words.features, rtol=tolerance, atol=tolerance)
    assert len(found.earlier) == len(expected.earlier) and found.presence_weighs == expected.presence_weighs


@pytest.mark.parametrize("case", PRESETS)
def test_hooks_fire_on_every_module(case: str) -> None:
    model = build(PRESETS[case])
    fired = set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and name not in HOLDERS:
            module.register_forward_hook(lambda *_, name=name: fired.add(name))
    for gradients in (True, False):
        fired.clear()
        with torch.set_grad_enabled(gradients):
            model(*batch())
        silent = {
            name
            for name, module in model.named_modules()
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and name not in (*HOLDERS, *fired)
        }
        assert {name for name in silent if not name.endswith(UNCALLED)} == set()


@pytest.mark.parametrize("case", PRESETS)
def test_hooks_may_change_what_goes_on(case: str) -> None:
    """Of every Linear, from the outside: doubling its output is doubling its weight and bias."""
    hooked, doubled = build(PRESETS[case]), build(PRESETS[case])
    for module in hooked.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: 1.25 * output)
    for module in doubled.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 1.25
            if module.bias is not None:
                module.bias.data *= 1.25
    with torch.no_grad():
        first, second = hooked(*batch()), doubled(*batch())
    torch.testing.assert_close(first.words.features, second.words.features, rtol=1e-4, atol=1e-4)
    masks = [(p.earlier[0] if p.earlier else p).mask for p in (first, second)]
    torch.testing.assert_close(*masks, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", PRESETS)
def test_every_adapter_learns(case: str) -> None:
    """peft's LoRA on every Linear, ours and BERT's."""
    from peft import LoraConfig, inject_adapter_in_model

    model = build(PRESETS[case])
    open_gates(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=linears, init_lora_weights=False), model)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(linears) > 10
    everything(model(*batch())).backward()
    assert [name for name, p in adapters.items() if p.grad is None] == []
    dead = [name for name, p in adapters.items() if not p.grad.any()]
    # A single query attends to itself, whatever its query and key are; released words ask for nothing.
    blind = ("self_attention.query", "self_attention.key")
    if case == "magnet-released":
        blind = (*blind, "text_fusion")
    assert [name for name in dead if not any(part in name for part in blind)] == []
    assert [n for n in without_gradient(model) if "lora_" in n] == []


@pytest.mark.parametrize("case", PRESETS)
def test_quantised_linears_run(case: str) -> None:
    """PyTorch's dynamic quantisation replaces every Linear; their `weight` is then a method."""
    model = build(PRESETS[case])
    exact = model.predict(batch()[0], *batch()[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    found = quantised.predict(batch()[0], *batch()[1])
    assert found.isfinite().all() and (found - exact).abs().mean() < 0.1


@pytest.mark.parametrize("case", ["magnet", "lavt"])
def test_reparametrised_weights_are_used(case: str) -> None:
    """torch.nn.utils.parametrize on every Linear of fusion and head changes what the model computes."""
    model, halved = build(PRESETS[case]), build(PRESETS[case])

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 0.5 * weight

    for part, twin in ((model.fusion, halved.fusion), (model.head, halved.head)):
        linears, twins = ([m for m in each.modules() if type(m) is nn.Linear] for each in (part, twin))
        for linear, other in zip(linears, twins, strict=True):
            nn.utils.parametrize.register_parametrization(linear, "weight", Half())
            other.weight.data *= 0.5
    with torch.no_grad():
        first, second = model(*batch()), halved(*batch())
    assert torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("case", SMALL)
def test_transforms_of_functions(case: str) -> None:
    """A gradient by torch.func is autograd's, and vmap over stacked weights runs each of the models.

    In float64: norms over the few pixels of such images magnify rounding.
    """
    model = build(SMALL[case]).double()
    image, text = batch((32, 40))
    image = image.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return everything(functional_call(model, {**parameters, **buffers}, (image, text)))

    with ops.backend("reference"):
        found = grad(loss)(parameters)
        everything(model(image, text)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)
        if any(isinstance(module, nn.LSTM) for module in model.modules()):
            return  # vmap has no rule for PyTorch's LSTM
        stacked = {name: torch.stack([p, 0.9 * p]) for name, p in parameters.items()}
        try:
            together = vmap(loss)(stacked)
        except RuntimeError as error:  # of PyTorch's own group_norm, for some layouts in 2.11
            assert "NYI: querying is_contiguous inside of vmap" in str(error)
            return
        alone = torch.stack([loss({name: p[i] for name, p in stacked.items()}) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "case", [case for case in SMALL if case not in ("magnet", "magnet-xmha", "lavt", "cris", "risam")]
)
def test_exports(case: str) -> None:
    """torch.export gives a program of the same nested prediction; `test_export` has the others, with any batch.

    MagNet's other form is `two-stage`'s."""
    model, inputs = build(SMALL[case]), batch((32, 40))
    with torch.no_grad(), ops.backend("reference"):
        program = torch.export.export(model, inputs)
        found, expected = program.module()(*inputs), model(*inputs)
    assert isinstance(found, Prediction)
    torch.testing.assert_close(found.mask, expected.mask)
    if expected.presence is not None:
        close(found, expected)
    else:
        assert found.presence is None
    image, text = batch((32, 40), count=2)
    other = Text(text.ids.flip(0), text.mask.flip(0))
    with torch.no_grad(), ops.backend("reference"):
        torch.testing.assert_close(program.module()(image, other).mask, model(image, other).mask)
