"""Whole models of ours, plain, accelerated and packed; and the rule: what is more than it was built as, is called."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import magnet_fast
from magnet_fast.fast import accelerated, own_fusion
from magnet_fast.fast._replacement import upstream_class
from magnet_fast.models import Text
from magnet_fast.models.fusion.pixel_word import Gate
from magnet_fast.ops._linear import PackedLinear

from .own import MODELS, model, outputs, results, small_model, text, values

pytestmark = pytest.mark.slow

VARIANTS = {
    "magnet_tiny": {},
    "magnet_tiny released": {"fusion__masking": "released"},
    "magnet_tiny xmha": {"fusion__form": "xmha"},
    "lavt_tiny": {},
    "refsegformer_tiny": {},
    "rela_tiny": {},
    "risam_tiny": {},
    "risam_tiny lora": {"image__tuning": "lora"},
}
IMAGE = (2, 3, 50, 67)


def build(variant: str) -> nn.Module:
    return model(variant.split()[0], **VARIANTS[variant])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_every_gradient(variant: str, training: bool) -> None:
    """In float32, both against float64; what has a gradient in the plain model has one, zero where that is zero."""

    def run(made: nn.Module, image: Tensor) -> dict[str, Tensor | None]:
        for module in made.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
                module.eval()
        return results(lambda x: outputs(made, x), [image], made)

    image = values(*IMAGE)
    truth = run(build(variant).double().train(training), image)
    plain = run(build(variant).train(training), image.float())
    made = build(variant).train(training)
    assert magnet_fast.accelerate(made).replaced
    found = run(made, image.float())
    assert found.keys() == plain.keys() == truth.keys()
    for name, expected in truth.items():
        assert (found[name] is None) == (expected is None), name
        if expected is None:
            continue
        scale = expected.abs().max().item()
        error, baseline = ((x[name].double() - expected).abs().max().item() for x in (found, plain))
        assert error <= 4 * baseline + 1e-4 * scale + 1e-5, f"{name}: {error:.2g}, plain {baseline:.2g} of {scale:.2g}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_in_float64(variant: str) -> None:
    made, image = build(variant).double(), values(*IMAGE)
    plain = results(lambda x: outputs(made, x), [image], made)
    magnet_fast.accelerate(made)
    found = results(lambda x: outputs(made, x), [image], made)
    for name, expected in plain.items():
        assert (found[name] is None) == (expected is None), name
        if expected is not None:
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                found[name], expected, rtol=1e-6, atol=1e-8 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_plain_accelerated_packed_and_back(variant: str) -> None:
    made, image = build(variant), values(*IMAGE).float()
    state = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    held = {name: (type(module), set(vars(module))) for name, module in made.named_modules()}
    with torch.no_grad():
        truth = outputs(build(variant).double(), image.double())
        plain = outputs(made, image)
        for pack in (False, True):
            magnet_fast.accelerate(made, pack=pack)
            for ours, original, expected in zip(outputs(made, image), plain, truth, strict=True):
                error, baseline = (ours - expected).abs().max(), (original - expected).abs().max()
                assert error <= 4 * baseline + 1e-5 * expected.abs().max()
            assert list(made.state_dict()) == list(state)
            assert all(torch.equal(tensor, state[key]) for key, tensor in made.state_dict().items())
        magnet_fast.restore(made)
        assert {name: (type(module), set(vars(module))) for name, module in made.named_modules()} == held
        assert all(torch.equal(one, other) for one, other in zip(outputs(made, image), plain, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name: str) -> None:
    made, image = model(name), values(*IMAGE).float()
    magnet_fast.accelerate(made, pack=True)
    with torch.no_grad():
        expected = outputs(made, image)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert [type(module) for module in other.modules()] == [type(module) for module in made.modules()]
            for ours, theirs in zip(outputs(other, image), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_for_several_expressions_is_started_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(name).double()
    magnet_fast.accelerate(made)
    seen = []
    convolve = F.conv2d

    def conv2d(x: Tensor, *given: object) -> Tensor:
        seen.extend([len(x)] if x.shape[1] == 3 else [])
        return convolve(x, *given)

    monkeypatch.setattr(F, "conv2d", conv2d)
    ids = torch.randint(5, 100, (3, 6), generator=torch.Generator().manual_seed(0))
    image = values(1, 3, 40, 56).expand(3, -1, -1, -1)
    with torch.inference_mode():
        shared = made.predict(image, ids, torch.ones_like(ids))
        copied = made.predict(image.contiguous(), ids, torch.ones_like(ids))
    assert seen == [1, 3]
    torch.testing.assert_close(shared, copied, rtol=1e-8, atol=1e-8)
    made.train()(image, Text(ids, torch.ones_like(ids).bool()))
    assert seen == [1, 3, 3]  # stochastic depth draws for each item
    made.eval().image_encoder.stages[0].blocks[0].mlp.register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        made.predict(image, ids, torch.ones_like(ids))
    assert seen == [1, 3, 3, 3]  # who looks on sees every item


@pytest.mark.parametrize("form", ["pwam", "xmha"])
def test_a_closed_text_gate_skips_the_words_side(form: str, monkeypatch) -> None:
    made, image = model("magnet_tiny", fusion__form=form), values(2, 3, 32, 32).float()
    calls = []
    given = own_fusion.Gate.forward

    def forward(self, stream: Tensor, residual: Tensor) -> Tensor:
        calls.append("fast")
        return given(self, stream, residual)

    monkeypatch.setattr(own_fusion.Gate, "forward", forward)
    for stage in made.fusion.stages:
        nn.init.zeros_(stage.text_gate.last.weight)

    def words() -> Tensor:
        calls.clear()
        return made(image, text()).words.features

    with torch.no_grad():
        plain = words()
        # Four of the words, three of the pixels.
        assert calls == [] and sum(type(module) is Gate for module in made.modules()) == 7
        magnet_fast.accelerate(made)
        torch.testing.assert_close(words(), plain, rtol=0, atol=0)
        assert calls == ["fast"] * 3
        seen = []
        handle = made.fusion.stages[0].text_gate.first.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(words(), plain, rtol=0, atol=0)
        assert seen == [1]
        handle.remove()
        # Weights that change are noticed, whichever way they change.
        made.fusion.stages[0].text_gate.last.weight.data.fill_(0.1)
        assert not torch.equal(words(), plain) and calls == ["fast"] * 4
    words()  # with gradients the gate learns from what it does not let through
    assert calls == ["fast"] * 7


# ---- The rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated_first", [None, False, True], ids=["plain", "adapted, accelerated", "accelerated"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_on_every_linear(name: str, accelerated_first: bool | None) -> None:
    """Every adapter gets a gradient, before and after `accelerate`, and the model computes what the plain one does."""
    made, image = model(name).requires_grad_(False), values(*IMAGE).float()
    linears = [key for key, module in made.named_modules() if isinstance(module, nn.Linear)]
    if accelerated_first:
        magnet_fast.accelerate(made)
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=linears, init_lora_weights=False), made)
    if accelerated_first is False:
        magnet_fast.accelerate(made)
    found = outputs(made, image)
    sum((out * values(*out.shape, seed=9).float()).sum() for out in found if out.requires_grad).backward()
    adapters = {key: parameter.grad for key, parameter in made.named_parameters() if "lora_" in key}
    assert len(adapters) == 2 * len(linears)
    assert all(gradient is not None for gradient in adapters.values())
    # A query or key of self-attention with one query has the gradient zero, and so has what closed text gates hide.
    dead = [key for key, gradient in adapters.items() if not gradient.abs().any() and "self_attention" not in key]
    assert dead == []
    magnet_fast.restore(made)
    for ours, plain in zip(found, outputs(made, image), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def calls_of(made: nn.Module, image: Tensor, *, one_at_a_time: bool) -> Counter[str]:
    """How often each module's forward hook fires."""
    counted: Counter[str] = Counter()
    modules = {name: module for name, module in made.named_modules() if name}
    rounds = [[name] for name in modules] if one_at_a_time else [list(modules)]
    for names in rounds:
        handles = [modules[name].register_forward_hook(lambda *_, name=name: counted.update([name])) for name in names]
        with torch.no_grad():
            made(image, Text(*(tensor[:1] for tensor in text())))
        for handle in handles:
            handle.remove()
    return counted


@pytest.mark.parametrize("pack", [False, True], ids=["accelerated", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_hooks_fire_for_every_module(name: str, pack: bool) -> None:
    made, image = model(name), values(1, 3, 32, 32).float()
    expected = calls_of(made, image, one_at_a_time=False)
    assert len(expected) > 100
    magnet_fast.accelerate(made, pack=pack)
    assert calls_of(made, image, one_at_a_time=False) == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_hook_alone_fires(name: str) -> None:
    made, image = small_model(name), values(1, 3, 32, 32).float()
    expected = calls_of(made, image, one_at_a_time=False)
    magnet_fast.accelerate(made, pack=True)
    found = calls_of(made, image, one_at_a_time=True)
    assert found.keys() == expected.keys()
    assert {key: (found[key], times) for key, times in expected.items() if found[key] != times} == {}


@pytest.mark.parametrize("kind", ["forward", "before"])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_for_all_modules(name: str, kind: str) -> None:
    made, image = model(name), values(*IMAGE).float()
    register = {
        "forward": nn.modules.module.register_module_forward_hook,
        "before": nn.modules.module.register_module_forward_pre_hook,
    }[kind]

    def count() -> Counter[int]:
        seen: Counter[int] = Counter()
        handle = register(lambda module, *_: seen.update([id(module)]))
        try:
            with torch.no_grad():
                outputs(made, image)
        finally:
            handle.remove()
        return seen

    expected = count()
    magnet_fast.accelerate(made, pack=True)
    assert count() == expected


@pytest.mark.parametrize("pack", [False, True], ids=["accelerated", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_replaced_on_a_module(name: str, pack: bool) -> None:
    image = values(1, 3, 32, 32).float()

    def patched(made: nn.Module) -> tuple[list[str], Tensor]:
        called = []
        for key, module in made.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)) and "text_encoder" not in key:
                old = module.forward
                module.forward = lambda *a, key=key, old=old: called.append(key) or old(*a) * 0.9
        with torch.no_grad():
            return called, made(image, Text(*(tensor[:1] for tensor in text()))).mask

    plain, fast = model(name), model(name)
    magnet_fast.accelerate(fast, pack=pack)
    (expected, mask), (found, ours) = patched(plain), patched(fast)
    assert Counter(found) == Counter(expected)
    torch.testing.assert_close(ours, mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_parametrised_and_subclassed_parts(name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def change(made: nn.Module) -> None:
        stage = made.fusion.stages[0]
        for layer in (stage.fusion.output, made.image_encoder.stages[0].blocks[0].attention.qkv):
            nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
        for layer in (stage.fusion.query, made.image_encoder.stages[0].blocks[1].mlp.fc1):
            layer.__class__ = Mine

    found = []
    for order in ("plain", "before", "after"):
        made = model(name)
        if order == "after":
            magnet_fast.accelerate(made, pack=True)
        change(made)
        if order == "before":
            magnet_fast.accelerate(made, pack=True)
        with torch.no_grad():
            found.append(outputs(made, values(*IMAGE).float()))
    for ours in found[1:]:
        for one, other in zip(ours, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("accelerate_first", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_dynamic_quantisation(name: str, accelerate_first: bool) -> None:
    image = values(*IMAGE).float()
    quantise = torch.ao.quantization.quantize_dynamic
    with torch.no_grad():
        expected = outputs(quantise(model(name), {nn.Linear}), image)
        made = model(name)
        if accelerate_first:
            magnet_fast.accelerate(made)
            made = quantise(made, {nn.Linear})
        else:
            made = quantise(made, {nn.Linear})
            magnet_fast.accelerate(made)
        found = outputs(made, image)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all() and (ours - plain).abs().median() <= 0.05 * plain.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_transforms_of_torch_func(name: str) -> None:
    """The gradient and the product with a direction, of a part that has every form of ours, as the plain part's."""
    made = model(name).double()
    stage = made.fusion.stages[0]
    x, words = values(1, 8, 8, made.image_encoder.channels[0]), values(1, 6, made.text_encoder.width)
    mask = torch.ones(1, 6, dtype=torch.bool)

    def transformed() -> list[Tensor]:
        return [
            torch.func.grad(lambda x: stage(x, words, mask)[0].square().sum())(x),
            torch.func.functional_call(stage, dict(stage.named_parameters()), (x, words, mask))[0].detach(),
        ]

    expected = transformed()
    magnet_fast.accelerate(made, pack=True)
    for ours, plain in zip(transformed(), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_vmap_over_a_gate_runs_the_original() -> None:
    gate = Gate(16, "gelu").double().eval()
    nn.init.normal_(gate.last.weight)
    x, residual = values(5, 9, 16), values(5, 9, 16, seed=1)
    with torch.no_grad():
        expected = torch.func.vmap(gate)(x, residual)
        tangent = torch.func.jvp(gate, (x, residual), (residual, x))[1]
        magnet_fast.accelerate(gate, pack=True)
        assert torch.equal(torch.func.vmap(gate)(x, residual), expected)
        assert torch.equal(torch.func.jvp(gate, (x, residual), (residual, x))[1], tangent)


@pytest.mark.parametrize("name", MODELS)
def test_counted_operations_are_those_of_the_plain_model(name: str) -> None:
    made, image = model(name).requires_grad_(False), values(*IMAGE).float()

    def count() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs(made, image)
        return counter.get_total_flops()

    expected = count()
    magnet_fast.accelerate(made, pack=True)
    assert count() == expected > 0


@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors_leave_nothing_behind(name: str) -> None:
    made, image = model(name), values(2, 3, 72, 40).float()  # a size that no other test keeps constants of
    with torch.no_grad():
        expected = outputs(made, image)
        magnet_fast.accelerate(made)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = outputs(made, mode.from_tensor(image))
        assert [out.shape for out in fake] == [out.shape for out in expected]
        for ours, plain in zip(outputs(made, image), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_one_graph_in_inference(name: str) -> None:
    made, image = small_model(name), values(*IMAGE).float()
    torch.compiler.reset()
    with torch.no_grad():
        expected = outputs(made, image)
        magnet_fast.accelerate(made, pack=True)
        found = outputs(torch.compile(made, backend="eager", fullgraph=True), image)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_compiled_in_one_graph_in_training() -> None:
    """Forward and backward, by the ahead-of-time compiler; MagNet has every part with products that LAVT has."""
    made, image = small_model("magnet_tiny"), values(*IMAGE).float()
    torch.compiler.reset()
    plain = results(lambda x: outputs(made, x), [image], made)
    magnet_fast.accelerate(made)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for key, ours in results(lambda x: outputs(compiled, x), [image], made).items():
        assert (ours is None) == (plain[key] is None), key
        if ours is not None:
            scale = float(plain[key].abs().max())
            torch.testing.assert_close(ours, plain[key], rtol=1e-2, atol=1e-3 * scale + 1e-4, msg=key)


# ---- Ways in and out --------------------------------------------------------------------------------------------


def classes(made: nn.Module) -> list[type]:
    return [type(module) for module in made.modules()]


def test_accelerated_undoes_what_it_did_alone() -> None:
    made = model("magnet_tiny")
    plain = classes(made)
    with accelerated(made) as report:
        assert report.replaced and not any(cls is PackedLinear for cls in classes(made))
    assert classes(made) == plain
    magnet_fast.accelerate(made.image_encoder)
    before = classes(made)
    with pytest.raises(RuntimeError, match="inside"), accelerated(made, pack=True):
        assert PackedLinear in classes(made)
        raise RuntimeError("inside")
    assert classes(made) == before != plain
    magnet_fast.restore(made)
    assert classes(made) == plain


def test_former_name_of_pack() -> None:
    made = model("lavt_tiny")
    with pytest.warns(DeprecationWarning, match="freeze= is named pack= now"):
        magnet_fast.accelerate(made, freeze=True)
    assert PackedLinear in classes(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        magnet_fast.accelerate(made, pack=True)


def test_report_is_short() -> None:
    made = model("magnet_tiny")
    report = magnet_fast.accelerate(made, pack=True)
    assert len(str(report).splitlines()) <= 9 and not report.left_alone
    assert magnet_fast.accelerate(made, pack=True) == report
    kinds = {module.path.rpartition(".")[2]: module.operator for module in report.replaced}
    assert kinds["WindowAttention"] == "window_attention" and kinds["Linear"] == "linear"
    assert kinds["DeformableAttention"] == "fused_deformable_attention"
    assert all(upstream_class(made.get_submodule(module.name)) is not None for module in report.replaced)


def test_subclassed_parts_and_adapted_linears_are_named() -> None:
    made = model("lavt_tiny")
    gate = made.fusion.stages[0].gate
    gate.__class__ = type("MyGate", (type(gate),), {})
    made.fusion.stages[1].gate.forward = made.fusion.stages[1].gate.forward
    made.extra = nn.ModuleDict({"base_layer": nn.Linear(2, 2)})
    left = {module.name: module.remark for module in magnet_fast.accelerate(made, pack=True).left_alone}
    assert left == {
        "fusion.stages.0.gate": "a subclass of Gate: what it changes is not known here",
        "fusion.stages.1.gate": "its forward was replaced on the module itself",
        "extra.base_layer": "under an adapter, which may be merged into its weight behind our back",
    }
