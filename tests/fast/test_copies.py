"""Copies known by their source: what counts as a copy, what is left alone and why, and that both forms agree."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magnet_fast
from magnet_fast import ops
from magnet_fast.fast import _published, _source, copies
from magnet_fast.fast._replacement import upstream_class

from . import rebuilt

BACKENDS = [name for name in ("reference", "cpu") if name in ops.available_backends()]
TEXT = Path(rebuilt.__file__).read_text()
KINDS = {
    "Block": "sam block",
    "Attention": "sam attention",
    "MLPBlock": "sam mlp",
    "SwinTransformerBlock": "swin backbone block",
    "FixedSwinBlock": "swin block",
    "SizedSwinBlock": "swinir block",
    "WindowAttention": "swin attention",
    "ShiftWindowMSA": "swin map attention",
    "Mlp": "swin mlp",
    "MSDeformAttn": "deformable attention",
    "MultiScaleDeformableAttention": "deformable attention, batch second",
}


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    """What was found with one table is not found with another."""
    monkeypatch.setattr(copies, "_differences", WeakKeyDictionary())
    copies._replacement.cache_clear()
    yield
    copies._replacement.cache_clear()


@pytest.fixture
def known(monkeypatch) -> None:
    """The table has the classes of rebuilt.py, and nothing else."""
    table = tuple(
        _published.Published(kind, "the published", name, _source.fingerprints(getattr(rebuilt, name)), ("here",))
        for name, kind in KINDS.items()
    )
    monkeypatch.setattr(copies, "PUBLISHED", table)


@pytest.fixture
def module_of(tmp_path, monkeypatch) -> Callable[[str], ModuleType]:
    """Writes a text to a file and imports it under a name of its own."""

    def load(text: str) -> ModuleType:
        name = f"copied_{len(list(tmp_path.iterdir()))}"
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swin_inputs(module: nn.Module, size: tuple[int, int]) -> tuple:
    x = draw(2, size[0] * size[1], 16)
    if not hasattr(module, "input_resolution"):
        module.H, module.W = size
        return x, rebuilt.mask_of_shift(size, module.window_size, module.shift_size or 2)
    return (x, size) if isinstance(module, rebuilt.SizedSwinBlock) else (x,)


SIZES = [(3, 4), (2, 5)]


def sampling_inputs(coordinates: int) -> dict[str, Tensor]:
    shapes = torch.tensor(SIZES)
    padding = torch.zeros(2, 22, dtype=torch.bool)
    padding[1, ::3] = True
    return {
        "points": draw(2, 7, 2, coordinates, seed=2).sigmoid(),
        "value": draw(2, 22, 16, seed=3),
        "shapes": shapes,
        "starts": torch.tensor([0, 12]),
        "padding": padding,
    }


def deformable(coordinates: int) -> tuple:
    given = sampling_inputs(coordinates)
    return draw(2, 7, 16), given["points"], given["value"], given["shapes"], given["starts"], given["padding"]


class Named(nn.Module):
    """Grounding DINO's module takes what it takes by name, the batch second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = rebuilt.MultiScaleDeformableAttention(batch_first)

    def forward(self, query: Tensor, points: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, padding: Tensor):
        if not self.inner.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        return self.inner(
            query=query,
            value=value,
            query_pos=0.5 * query,
            key_padding_mask=padding,
            reference_points=points,
            spatial_shapes=shapes,
            level_start_index=starts,
        )


class Adapted(nn.Module):
    """A block that is no copy, as many with adapters are, around attention that is one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = rebuilt.Attention(16, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.attn(x)


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], tuple]]
CASES: dict[str, Case] = {
    "SAM, windows": (lambda: rebuilt.Block(), lambda block: (draw(2, 9, 6, 16),)),
    "SAM, global": (lambda: rebuilt.Block(side=5, window=0), lambda block: (draw(2, 7, 5, 16),)),
    "SAM, attention alone": (Adapted, lambda block: (draw(2, 7, 5, 16),)),
    "Swin, shifted and padded": (rebuilt.SwinTransformerBlock, lambda block: swin_inputs(block, (7, 9))),
    "Swin, smaller than a window": (rebuilt.SwinTransformerBlock, lambda block: swin_inputs(block, (3, 9))),
    "Swin, not shifted": (lambda: rebuilt.SwinTransformerBlock(shift=0), lambda block: swin_inputs(block, (7, 9))),
    "Swin, fixed": (rebuilt.FixedSwinBlock, lambda block: swin_inputs(block, (8, 12))),
    "Swin, fixed, not shifted": (
        lambda: rebuilt.FixedSwinBlock(shift=0),
        lambda block: swin_inputs(block, (8, 12)),
    ),
    "SwinIR": (rebuilt.SizedSwinBlock, lambda block: swin_inputs(block, (8, 8))),
    "SwinIR, another size": (rebuilt.SizedSwinBlock, lambda block: swin_inputs(block, (4, 12))),
    "OpenMMLab's Swin": (rebuilt.ShiftWindowMSA, lambda module: (draw(2, 63, 16), (7, 9))),
    "OpenMMLab's Swin, not shifted": (
        lambda: rebuilt.ShiftWindowMSA(shift=0),
        lambda module: (draw(2, 27, 16), (3, 9)),
    ),
    "Deformable DETR, points": (rebuilt.MSDeformAttn, lambda module: deformable(2)),
    "Deformable DETR, boxes": (rebuilt.MSDeformAttn, lambda module: deformable(4)),
    "Grounding DINO": (lambda: Named(False), lambda module: deformable(2)),
    "Grounding DINO, batch first": (lambda: Named(True), lambda module: deformable(4)),
}


def made(name: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    module = build()
    return module, inputs(module)


def results(module: nn.Module, inputs: tuple, dtype: torch.dtype) -> list[Tensor]:
    """The output, the gradient of each floating input, and that of each parameter."""
    module = module.to(dtype)
    given = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    leaves = [x.requires_grad_() for x in given[:1]] + list(module.parameters())
    output = module(*given)
    weight = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, backend: str) -> None:
    """In float32 against float64: no worse than four times the plain form. And nothing but the fused way runs."""
    module, inputs = made(name)
    truth = results(copy.deepcopy(module), inputs, torch.float64)
    plain = results(copy.deepcopy(module), inputs, torch.float32)
    report = magnet_fast.accelerate(module)
    assert len(report.replaced) == 1 and "a copy of the published by source" in str(report), str(report)
    replaced = next(part for part in module.modules() if upstream_class(part) is not None)
    upstream_class(replaced).forward, kept = None, upstream_class(replaced).forward
    try:
        with ops.backend(backend), pytest.MonkeyPatch.context() as patch:
            patch.setattr("magnet_fast.ops._observed._overridden", lambda module: False)
            ours = results(module, inputs, torch.float32)
    finally:
        upstream_class(replaced).forward = kept
    for found, original, expected in zip(ours, plain, truth, strict=True):
        error, baseline = (found - expected).abs().max().item(), (original - expected).abs().max().item()
        assert error <= 4 * baseline + 1e-5 * expected.abs().max().item() + 1e-7


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["SAM, windows", "Swin, shifted and padded", "Swin, fixed"])
def test_whole_blocks_in_inference(name: str, monkeypatch) -> None:
    """On a CPU without gradients the block is taken whole, as those that are known by name."""
    module, inputs = made(name)
    given = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        expected = module.eval()(*given)
        magnet_fast.accelerate(module)
        taken = []
        whole = magnet_fast.fast._block.forward
        monkeypatch.setattr(magnet_fast.fast._block, "forward", lambda *a: taken.append(1) or whole(*a))
        torch.testing.assert_close(module(*given), expected, rtol=1e-4, atol=1e-5)
    assert taken == [1]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_the_way_back(name: str) -> None:
    module, inputs = made(name)
    module = module.double()
    cls = type(module)
    expected = module(*inputs)
    magnet_fast.accelerate(module)
    assert str(magnet_fast.accelerate(module)).startswith("magnet_fast: 1 modules replaced, 0 left alone")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(part) for part in other.modules()] == [type(part) for part in module.modules()]
        torch.testing.assert_close(other(*inputs), expected, rtol=1e-9, atol=1e-9)
        magnet_fast.restore(other)
        assert type(other) is cls and torch.equal(other(*inputs), expected)
    magnet_fast.restore(module)
    assert type(module) is cls and torch.equal(module(*inputs), expected)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("SAM, windows", change) for change in ("hook", "part", "method")),
        *(("Swin, shifted and padded", change) for change in ("hook", "part", "method", "dropout")),
    ],
)
def test_calls_left_to_the_original(name: str, change: str, monkeypatch) -> None:
    """What may come after, and is looked at in every call."""
    module, inputs = made(name)
    magnet_fast.accelerate(module.double())
    called = []
    attention = module.attn
    if change == "hook":
        attention.register_forward_hook(lambda *_: called.append(1))
    elif change == "dropout":
        attention.attn_drop.p = 0.5
        monkeypatch.setattr(type(attention.softmax), "forward", lambda self, x: called.append(1) or x.softmax(-1))
    elif change == "part":
        module.attn = nn.Module()
        module.attn.forward = lambda x, mask=None: called.append(1) or x
    else:
        monkeypatch.setattr(type(attention), "forward", lambda self, x, mask=None: called.append(1) or x)
    module(*inputs)
    assert called == [1]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", [name for name in CASES if "Swin" in name])
def test_an_index_or_a_softmax_that_changed_runs_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the index, too; what was in place is fused again: no softmax is called then."""
    softmax, called = F.softmax, []
    monkeypatch.setattr(F, "softmax", lambda *args, **kwargs: called.append(1) or softmax(*args, **kwargs))

    def original(*inputs: Tensor) -> tuple[Tensor, bool]:
        """What the accelerated module gives, and whether by its class's own lines."""
        called.clear()
        return module(*inputs), bool(called)

    module, inputs = made(name)
    plain = copy.deepcopy(module.double())
    magnet_fast.accelerate(module)
    module(*inputs)
    kept = copy.deepcopy(module.state_dict())
    assert any(key.endswith("relative_position_index") for key in kept)
    other = {key: value if value.is_floating_point() else value.flip(0) for key, value in kept.items()}
    for assign in (False, True):
        for state in (other, kept):
            for one in (plain, module):
                one.load_state_dict(state, assign=assign)
            (found, by_itself), expected = original(*inputs), plain(*inputs)
            assert by_itself == (state is other)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for one in (plain, module):
        next(part for part in one.modules() if isinstance(part, nn.Softmax)).dim = -2
    found, by_itself = original(*inputs)
    assert by_itself and torch.equal(found, plain(*inputs))


@pytest.mark.usefixtures("known")
def test_another_mask_runs_the_original() -> None:
    for wrong in (None, "less", "more", "weak", "other shape"):
        module, (x, mask) = made("Swin, shifted and padded")
        if wrong is None:
            mask = None
        elif wrong == "less":
            mask[-1, 0, -1] = 0.0
        elif wrong == "more":
            mask[0, 1, 2] = -100.0
        elif wrong == "weak":
            mask = mask / 50
        else:
            mask = mask[:1] * 0
        expected = module.double()(x, mask)
        magnet_fast.accelerate(module)
        assert torch.equal(module(x, mask), expected), wrong
    module, (x, mask) = made("Swin, shifted and padded")
    expected = module.double()(x, mask)
    magnet_fast.accelerate(module)
    found = module(x, torch.where(mask == 0, 0.0, -torch.inf).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert module.to("meta")(x.to("meta"), mask.to("meta")).shape == x.shape  # nothing to be read there


@pytest.mark.usefixtures("known")
def test_sizes_are_read_once_and_never_stale(monkeypatch) -> None:
    module, inputs = made("Deformable DETR, points")
    module = module.double()
    query, points, value, shapes, starts, padding = inputs
    expected = [module(query, points, value, sizes, starts, padding) for sizes in (shapes, shapes.flip(1))]
    magnet_fast.accelerate(module)
    read = []
    monkeypatch.setattr(torch, "cat", lambda *a, cat=torch.cat, **k: read.append(1) or cat(*a, **k))
    for sizes, wanted in zip((shapes, shapes.flip(1)), expected, strict=True):
        for _ in range(3):
            found = module(query, points, value, sizes, starts, padding)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert len(read) == 2
    shapes.copy_(shapes.flip(1))
    torch.testing.assert_close(module(query, points, value, shapes, starts, padding), expected[1])
    wrong = starts + torch.tensor([0, 1])  # a hole between the maps: what the original makes of it is its own matter
    assert torch.equal(module(query, points, value, shapes, wrong, padding), expected[1])


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("name", "attribute", "value", "reason"),
    [
        ("Swin, fixed", "attn.relative_position_index", lambda x: x.t(), "relative position index"),
        ("Swin, fixed", "attn.scale", lambda x: 2 * x, "scale"),
        ("Swin, fixed", "attn.softmax.dim", lambda x: 2, "softmax"),
        ("Swin, fixed", "shift_size", lambda x: (2, 2), "shift"),
        ("Swin, fixed", "attn.window_size", lambda x: (2, 4), "windows of"),
        ("SAM, windows", "attn.use_rel_pos", lambda x: False, "no relative positions"),
        ("Deformable DETR, points", "n_points", lambda x: 4, "outputs"),
    ],
)
def test_what_init_made_is_looked_at(name: str, attribute: str, value: Callable, reason: str) -> None:
    module, _ = made(name)
    path, _, last = attribute.rpartition(".")
    part = module.get_submodule(path)
    setattr(part, last, value(getattr(part, last)))
    report = magnet_fast.accelerate(module)
    assert not report.replaced and reason in report.left_alone[0].remark, str(report)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("kept = x\n", "kept = x  # the residual\n"),
        ("def forward(self, x):", 'def forward(self, x: "torch.Tensor") -> torch.Tensor:\n        """Doc."""'),
        ("logits = (query * self.scale) @ key", "logits = (query * self.scale) @ \\\n            key"),
        ("x = kept + x\n", "x: object = kept + x\n"),
        ("(width // heads) ** -0.5", "(width // heads) ** -0.25"),  # its __init__: `scale` is read as it is
        ("        return self.proj(read", "        'said'\n        return self.proj(read"),
        ("def cut(x, side):\n", "def cut(x, side):\n    '\\sum'\n"),  # an escape that a compiler warns of
    ],
)
def test_what_does_not_count(old: str, new: str, module_of) -> None:
    assert old in TEXT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = module_of(TEXT.replace(old, new)).Block()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = magnet_fast.accelerate(block)
    assert len(report.replaced) == 1, str(report)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("x = kept + x\n", "x = kept - x\n", "forward of Block differs"),
        ("(query * self.scale) @", "(key * self.scale) @", "forward of Attention differs"),
        ("-width % side, 0, -height % side", "-width % side, -height % side, 0", "cut of Block differs"),
        ("rows[..., None] + columns", "rows[..., None] - columns", "with_positions of Attention differs"),
        ('mode="linear"', 'mode="nearest"', "resized of Attention differs"),
        ("import math\n", "import numpy as math\n", "math of Block differs"),
        ("class Block(nn.Module)", "class Block(nn.Identity)", "bases of Block"),
        (
            "class Block(nn.Module):\n",
            "class Block(nn.Module):\n    def __call__(self, x):\n        return x\n\n",
            "__call__",
        ),
        ("def cut(x, side)", "@(lambda function: lambda *a: function(*a))\ndef cut(x, side)", "no copy by source"),
    ],
)
def test_near_copies_are_left_alone(old: str, new: str, named: str, module_of) -> None:
    assert old in TEXT
    report = magnet_fast.accelerate(module_of(TEXT.replace(old, new)).Block())
    first = report.modules[0]
    assert first.operator is None and first.path.endswith(".Block") and named in first.remark, str(report)


@pytest.mark.usefixtures("known")
def test_code_that_is_not_that_of_its_source(module_of) -> None:
    module = module_of(TEXT)
    Path(module.__file__).write_text(TEXT.replace("x = kept + x\n", "x = kept - x\n"))
    report = magnet_fast.accelerate(module.Block())
    assert "is not that of its source" in report.left_alone[0].remark


@pytest.mark.usefixtures("known")
def test_a_class_typed_at_a_prompt() -> None:
    typed: dict = {"__name__": "typed"}
    exec(TEXT, typed)
    report = magnet_fast.accelerate(typed["Block"]())
    assert "the source of Block.forward cannot be read" in report.left_alone[0].remark


@pytest.mark.usefixtures("known")
def test_a_method_replaced_before(module_of) -> None:
    module = module_of(TEXT + "\n\ndef changed(self, x):\n    return x\n\n\nBlock.forward = changed\n")
    report = magnet_fast.accelerate(module.Block())
    assert "forward, cut, joined of Block differ" in report.left_alone[0].remark
    module = module_of(TEXT + "\n\nBlock.forward = torch.no_grad()(Block.forward)\n")
    report = magnet_fast.accelerate(module.Block())
    assert "uses variables of the function that made it" in report.left_alone[0].remark


@pytest.mark.usefixtures("known")
def test_others_of_the_same_name_are_not_spoken_of(monkeypatch) -> None:
    other = type("Block", (nn.Linear,), {})
    monkeypatch.setattr(copies, "fingerprints", None)  # no source is read
    assert magnet_fast.accelerate(nn.Sequential(other(8, 8), nn.Linear(8, 8))).modules == ()


def test_a_copy_of_segment_anything(module_of) -> None:
    """With the table as it is: the installed package's text, written otherwise, in another place."""
    import ast

    from segment_anything.modeling import common, image_encoder

    text = "\n".join(Path(module.__file__).read_text() for module in (common, image_encoder))
    text = ast.unparse(ast.parse(text.replace("from .common import LayerNorm2d, MLPBlock", "")))
    build = {"dim": 16, "num_heads": 2, "use_rel_pos": True, "window_size": 4}
    report = magnet_fast.accelerate(module_of(text).Block(**build))
    assert "a copy of segment_anything's Block by source" in str(report)
    changed = text.replace("x = shortcut + x", "x = shortcut - x")
    assert changed != text
    report = magnet_fast.accelerate(module_of(changed).Block(**build))
    assert report.left_alone[0].remark == "no copy by source: forward of Block differs from segment_anything's Block"
    assert [module.name for module in report.replaced] == ["attn"]


def test_fingerprint_is_printed() -> None:
    lines = magnet_fast.fast.fingerprint(rebuilt.Block).splitlines()
    assert lines[0].endswith("rebuilt.Block")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["forward", "cut", "joined"]
    with pytest.raises(TypeError, match="cls: expected a class"):
        magnet_fast.fast.fingerprint(rebuilt.Block())


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations" / "copies.md").read_text()
    for published in copies.PUBLISHED:
        assert published.places
        for place in published.places:
            assert place in page, place
    shown = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and ": " in line}
    assert shown == {place for published in copies.PUBLISHED for place in published.places}
