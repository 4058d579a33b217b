"""What may happen to a model with replaced modules: copies, compilers, autocast, hooks, weights asked for, dropout."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

import magnet_fast
from magnet_fast.fast import Report, _replacement

from . import zoo

pytestmark = pytest.mark.slow

SOME = ["timm", "torchvision", "Swin", "MaskFormer", "Donut", "Mask2Former", "SAM", "timm SAM", "ViTDet"]


@pytest.fixture(params=SOME)
def family(request) -> zoo.Family:
    return zoo.FAMILIES[request.param]


def accelerated(family: zoo.Family) -> nn.Module:
    model = family.model().eval()
    assert magnet_fast.accelerate(model).replaced
    return model


def fused_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _replacement.upstream_class(module) is not None]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SOME)
def test_copies_and_pickles_are_replaced_themselves(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = accelerated(family), family.inputs(zoo.EVEN)
    copies = [copy.deepcopy(model)]
    if name != "Mask2Former":  # transformers gives its backbone hooks that cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    expected = zoo.call(model, inputs)
    for other in copies:
        assert len(fused_modules(other)) == len(fused_modules(model))
        assert equal(zoo.call(other, inputs), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        assert not equal(zoo.call(other, inputs), expected)  # it reads its own weights
        magnet_fast.restore(other)
        assert fused_modules(other) == [] and fused_modules(model)
    assert equal(zoo.call(model, inputs), expected)


@pytest.mark.parametrize("name", ["timm", "torchvision", "Swin backbone", "Mask2Former", "timm SAM"])
def test_compiled(name: str) -> None:
    """timm and torchvision in one graph; without a code generator, which takes minutes on a CPU."""
    torch.compiler.reset()
    family = zoo.FAMILIES[name]
    model, inputs = family.model(family.odd).eval(), family.inputs(family.odd)
    magnet_fast.accelerate(model)
    graphs = []

    def keep(graph: torch.fx.GraphModule, given: list) -> Callable:
        graphs.append(str(graph.graph))
        return lookup_backend("aot_eager")(graph, given)

    with torch.no_grad():
        expected = zoo.call(model, inputs)
        compiled = torch.compile(model, backend=keep, fullgraph=name in ("timm", "torchvision", "timm SAM"))
        found = zoo.call(compiled, inputs)
    assert any("magnet_fast." in graph for graph in graphs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compiled_to_code() -> None:
    """By PyTorch's code generator, forward and backward: a plain and a shifted block, of a map with padding."""
    torch.compiler.reset()
    inputs = torch.randn(2, 10, 7, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        blocks = zoo.timm_swin((40, 28)).layers[0].blocks
        assert len(magnet_fast.accelerate(blocks).replaced) == 2
        run = torch.compile(blocks, fullgraph=True) if compiled else blocks
        output = run(inputs)
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in blocks.parameters())])
    for eager, generated in zip(*found, strict=True):
        torch.testing.assert_close(generated, eager, rtol=1e-3, atol=1e-5 * float(eager.detach().abs().max()) + 1e-6)


def test_autocast(family: zoo.Family) -> None:
    """bfloat16 against the original in float32: at most twice the error of the original in bfloat16."""
    model, inputs = family.model().eval(), family.inputs(zoo.EVEN)
    with torch.no_grad():
        truth = zoo.call(model, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = zoo.call(model, inputs)
            magnet_fast.accelerate(model)
            ours = zoo.call(model, inputs)
    for expected, original, found in zip(truth, plain, ours, strict=True):
        assert found.dtype == original.dtype
        scale = expected.abs().max()
        error, baseline = (found - expected).abs().max(), (original - expected).abs().max()
        assert error <= 2 * baseline + 2**-8 * scale


def test_bfloat16_weights() -> None:
    for name in ("timm", "Swin backbone"):
        family = zoo.FAMILIES[name]
        inputs = family.inputs(zoo.EVEN)
        truth = zoo.call(family.model().eval(), inputs)
        model = family.model().eval().bfloat16()
        plain = zoo.call(model, inputs)
        magnet_fast.accelerate(model)
        for expected, original, found in zip(truth, plain, zoo.call(model, inputs), strict=True):
            assert found.dtype == torch.bfloat16
            error, baseline = (found - expected).abs().max(), (original - expected).abs().max()
            assert error <= 2 * baseline + 2**-8 * expected.abs().max()


@pytest.mark.parametrize("name", ["timm", "Swin"])
def test_gradient_checkpointing(name: str) -> None:
    family = zoo.FAMILIES[name]
    inputs = family.inputs(zoo.EVEN)
    gradients = []
    for checkpointed in (False, True):
        model = family.model().train()
        magnet_fast.accelerate(model)
        if checkpointed:
            names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
            next(getattr(model, name) for name in names if hasattr(model, name))()  # the last is transformers' old name
        sum(output.square().sum() for output in zoo.call(model, inputs)).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(once, again)


def test_saving_with_safetensors(tmp_path) -> None:
    from transformers import SwinForImageClassification

    family = zoo.FAMILIES["Swin"]
    model, inputs = accelerated(family), family.inputs(zoo.EVEN)
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]
    loaded = SwinForImageClassification.from_pretrained(tmp_path).eval()
    assert fused_modules(loaded) == [] and loaded.config.architectures == ["SwinForImageClassification"]
    magnet_fast.accelerate(loaded)
    assert equal(zoo.call(loaded, inputs), zoo.call(model, inputs))


@pytest.mark.parametrize("name", ["Swin", "Donut"])
def test_a_map_of_one_window_ends_the_shift(name: str) -> None:
    """For good, upstream: the layer forgets its shift, with its fused operator as without."""
    from transformers import DonutSwinConfig, DonutSwinModel, SwinModel

    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        config = zoo.swin_config(window_size=8)
        if name == "Donut":
            config = DonutSwinConfig(**{key: getattr(config, key) for key in ("embed_dim", "depths", "num_heads")})
            config.window_size, config.image_size, config.drop_path_rate = 8, 64, 0.0
        model = (SwinModel if name == "Swin" else DonutSwinModel)(config).eval()
        if fused:
            assert len(magnet_fast.accelerate(model).replaced) == 4
        with torch.no_grad():
            outputs = [zoo.call(model, zoo.pixels(size))[0] for size in ((128, 128), (64, 64), (128, 128))]
        found.append((outputs, [layer.shift_size for stage in model.encoder.layers for layer in stage.blocks]))
    assert found[0][1] == found[1][1] == [0, 4, 0, 0]
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1][0][0], found[1][0][2], rtol=1e-3, atol=1e-4)


def test_timm_model_whose_size_is_changed_afterwards() -> None:
    outputs = []
    for fused in (False, True):
        model = zoo.FAMILIES["timm"].model().eval()
        if fused:
            magnet_fast.accelerate(model)
        model.set_input_size((88, 72), window_size=(5, 6))
        outputs += zoo.call(model, zoo.image((88, 72)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


# ---- Calls that run the original --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Swin", "Donut", "CLAP", "Mask2Former", "Deformable DETR", "SAM, eager"])
def test_attention_weights_asked_for(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = family.model().eval(), family.inputs(zoo.EVEN)
    if name == "Swin":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = zoo.call(model, inputs, output_attentions=True)
        magnet_fast.accelerate(model)
        found = zoo.call(model, inputs, output_attentions=True)
        assert len(found) == len(expected) > len(zoo.call(model, inputs))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["timm", "torchvision", "Swin", "MaskFormer", "Donut", "CLAP", "SAM, eager", "timm SAM"]
)
def test_attention_dropout_runs_the_original_in_training(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = family.model().train(), family.inputs(zoo.EVEN)
    for module in model.modules():
        for attribute, value in (("attention_dropout", 0.5), ("attn_drop", nn.Dropout(0.5))):
            if attribute in vars(module) or attribute in module._modules:
                setattr(module, attribute, value)
        if type(module).__name__.endswith("SwinSelfAttention") or type(module).__name__ == "ClapAudioSelfAttention":
            module.dropout = nn.Dropout(0.5)
        if type(module).__name__ == "SamVisionAttention":
            module.dropout = 0.5
    torch.manual_seed(3)
    expected = zoo.call(model, inputs)
    report = magnet_fast.accelerate(model)
    torch.manual_seed(3)
    assert equal(zoo.call(model, inputs), expected)  # the same random numbers in the same places
    assert "attention dropout 0.5: in training the original runs" in str(report)
    model.eval()
    assert not equal(zoo.call(model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("timm", "WindowAttention"),
        ("timm", "attn_drop"),
        ("Swin", "SwinAttention"),
        ("MaskFormer", "MaskFormerSwinSelfAttention"),
        ("SAM", "SamVisionSdpaAttention"),
        ("timm SAM", "k_norm"),
        ("ViTDet", "VitDetAttention"),
    ],
)
def test_hooks_on_what_is_bypassed_are_called(name: str, inner: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = accelerated(family), family.inputs(zoo.EVEN)
    expected = zoo.call(model, inputs)
    called = []
    attentions = [
        module for name, module in model.named_modules() if type(module).__name__ == inner or name.endswith(inner)
    ]
    handles = [module.register_forward_hook(lambda *arguments: called.append(1)) for module in attentions]
    hooked = zoo.call(model, inputs)
    assert len(called) == len(attentions) > 0
    for handle in handles:
        handle.remove()
    assert equal(zoo.call(model, inputs), expected)
    for one, other in zip(hooked, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_replaced_projection_runs_the_original() -> None:
    """An adapter put in place of a Linear is called, and padded tokens are what it makes of them."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * self.base(x)

    for name, attribute in (("timm", "qkv"), ("torchvision", "qkv"), ("Swin", "q_proj"), ("Donut", "query")):
        if name == "torchvision":
            continue  # it never called its Linear
        family = zoo.FAMILIES[name]
        inputs = family.inputs(zoo.ODD)
        outputs = []
        for replaced in (False, True):
            model = family.model(zoo.ODD).eval()
            if replaced:
                magnet_fast.accelerate(model)
            for module in list(model.modules()):
                if attribute in module._modules:
                    setattr(module, attribute, Adapter(getattr(module, attribute)))
            outputs.append(zoo.call(model, inputs))
        assert equal(*outputs)


def test_traced_and_exported_graphs_do_not_ask_for_this_package() -> None:
    family = zoo.FAMILIES["timm"]
    model, inputs = accelerated(family), family.inputs(zoo.EVEN)
    for strict in (True, False):
        exported = torch.export.export(model, (inputs,), strict=strict)
        assert "magnet_fast::" not in str(exported.graph) and "magnet_fast." not in str(exported.graph)
    traced = torch.jit.trace(model, inputs, check_trace=False)
    assert "magnet_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(exported.module()(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_torchvision_feature_extraction() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    family = zoo.FAMILIES["torchvision"]
    model, inputs = accelerated(family), family.inputs(zoo.ODD)
    extractor = create_feature_extractor(model, ["features.3", "head"])
    torch.testing.assert_close(extractor(inputs)["head"], model(inputs))
    assert any(node.op == "call_function" and "_attend" in str(node.target) for node in extractor.graph.nodes)


# ---- Reports, and what is left alone ----------------------------------------------------------------------------


def test_report() -> None:
    model = nn.ModuleDict({"detector": zoo.FAMILIES["Grounding DINO"].model(), "encoder": zoo.timm_swin(zoo.EVEN)})
    report = magnet_fast.accelerate(model)
    assert isinstance(report, Report)
    lines = str(report).splitlines()
    assert lines[0] == "magnet_fast: 12 modules replaced, 1 left alone"
    assert "  replaced: encoder.layers.*.blocks.* (4 x timm SwinTransformerBlock) -> window_attention" in lines
    (left,) = report.left_alone
    assert left.name == "detector.model.encoder.layers.0.fusion_layer.attn" and left.operator is None
    assert "masks pixels as well as words" in left.remark and left.remark in lines[-1]
    assert magnet_fast.accelerate(model) == report  # what was replaced before counts as replaced
    assert "no attention found" in str(magnet_fast.accelerate(nn.Linear(2, 2)))
    assert (
        str(magnet_fast.accelerate(model["encoder"].layers[0].blocks[0]))
        .splitlines()[1]
        .startswith("  replaced: the model itself (1 x timm SwinTransformerBlock)")
    )


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        magnet_fast.accelerate([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        magnet_fast.restore(lambda x: x)


def test_a_class_made_of_a_replaced_one_is_not_restored() -> None:
    model = zoo.timm_swin(zoo.EVEN)
    magnet_fast.accelerate(model)
    block = model.layers[1].blocks[0]
    replaced = type(block)
    block.__class__ = type("Sharded", (replaced,), {})
    with pytest.raises(ValueError, match=r"model: layers\.1\.blocks\.0 was replaced and then made a Sharded"):
        magnet_fast.restore(model)
    assert len(fused_modules(model)) == 3  # nothing was restored
    block.__class__ = replaced
    magnet_fast.restore(model)
    assert fused_modules(model) == []


def test_subclasses_are_left_alone() -> None:
    model = zoo.timm_swin(zoo.EVEN)
    block = model.layers[0].blocks[1]
    block.__class__ = type("MyBlock", (type(block),), {})
    report = magnet_fast.accelerate(model)
    assert [(module.name, module.remark) for module in report.left_alone] == [
        ("layers.0.blocks.1", "a subclass of SwinTransformerBlock: what it changes is not known here")
    ]
    assert len(report.replaced) == 3


def test_discrete_sampling_is_left_alone() -> None:
    report = magnet_fast.accelerate(zoo.rt_detr_v2(zoo.EVEN, decoder_method="discrete"))
    assert report.replaced == ()
    assert {module.remark for module in report.left_alone} == {"its sampling method is 'discrete', not bilinear"}


def test_quantised_projections_are_left_alone() -> None:
    model = torch.ao.quantization.quantize_dynamic(zoo.swin(zoo.EVEN).eval(), {nn.Linear})
    report = magnet_fast.accelerate(model)
    assert report.replaced == () and "are not plain Linears" in str(report)


def test_upstream_that_moved(monkeypatch) -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    model = zoo.timm_swin(zoo.EVEN)

    def remark() -> str:
        report = magnet_fast.accelerate(model)
        assert report.replaced == () and type(model.layers[0].blocks[0]) is SwinTransformerBlock
        return report.left_alone[0].remark

    with monkeypatch.context() as patch:
        patch.setattr(SwinTransformerBlock, "_attn", lambda self, x, rotary=None: x)
        assert remark() == "_attn has the unknown parameter rotary: not a version this was written for"
    with monkeypatch.context() as patch:
        patch.setattr(SwinTransformerBlock, "_attn", lambda self: None)
        assert remark() == "_attn has no parameter x: not a version this was written for"
    with monkeypatch.context() as patch:
        patch.delattr(SwinTransformerBlock, "_attn")
        assert remark() == "its class has no method _attn: not a version this was written for"
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.scaling = block.attn.__dict__.pop("scale")
    assert remark() == "it has no attribute attn.scale: not a version this was written for"
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.scale = 1.0
            block.attn.__class__ = type("Rotary", (type(block.attn),), {})
    assert remark().endswith("Rotary, not a timm.models.swin_transformer.WindowAttention")
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.__class__ = type(block.attn).__mro__[1]
            block.attn.scale, block.attn.relative_position_bias_table = 1.0, nn.Parameter(torch.zeros(7, 7))
    assert remark() == "its relative position bias table is not that of Swin v1 for its window"
    monkeypatch.setattr(SwinTransformerBlock, "window_size", property(lambda self: 1 / 0), raising=False)
    assert remark().startswith("looking at it failed (ZeroDivisionError: ")


def test_no_framework_is_imported_nor_our_models_for_others() -> None:
    code = (
        "import sys, torch, magnet_fast\n"
        "magnet_fast.accelerate(torch.nn.Linear(2, 2))\n"
        "print(sorted({'timm', 'transformers', 'torchvision'} & set(sys.modules)))\n"
        "import timm\n"
        "model = timm.create_model('swin_tiny_patch4_window7_224')\n"
        "assert magnet_fast.accelerate(model).replaced\n"
        "print([name for name in sys.modules if name.startswith('magnet_fast.models')])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-2:] == ["[]", "[]"]


def test_names_of_replaced_classes_differ() -> None:
    """A pickle finds a class by that name alone."""
    from magnet_fast import fast

    names = [replacement.fused_name for replacement in fast._REPLACEMENTS.values()]
    assert len(set(names)) == len(names)
    model = zoo.timm_swin(zoo.EVEN)
    magnet_fast.accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(model)
    with pytest.raises(AttributeError, match="no attribute 'FusedNothing'"):
        fast.FusedNothing  # noqa: B018
