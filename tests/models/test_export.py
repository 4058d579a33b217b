"""Ways out: `torch.export` of models and of what is around them, run at other sizes; traces."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from magnet_fast import models, ops

pytestmark = pytest.mark.slow

SMALL = {
    "image": {"kind": "swin", "embed_dim": 16, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4), "window_size": 4},
    "text": {
        "kind": "bert",
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 100,
    },
}
KINDS = {
    "magnet": ("magnet_tiny", {**SMALL, "fusion__pyramid": (2,), "head__mask_layers": 1}),
    "lavt": ("lavt_tiny", {**SMALL, "text": {**SMALL["text"], "num_layers": 1}}),
    "cris": ("cris_tiny", {}),
    "risam": ("risam_tiny", {}),
    "lavt on timm": (
        "lavt_tiny",
        {"image": {"kind": "timm", "name": "test_efficientnet"}, "text__vocab_size": 100, "text__num_layers": 1},
    ),
}
PAGE = Path(__file__).parents[2] / "docs" / "training.md"


class Masks(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return models.probability(self.model(image, models.Text(ids, mask)), (64, 64))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, overrides = KINDS[kind]
    return models.create(name, pretrained=False, **overrides).eval()


def inputs(batch: int, side: int = 64) -> tuple[Tensor, models.Text]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(4, 100, (batch, 8), generator=generator)
    mask = torch.arange(8) < 8 - torch.arange(batch)[:, None] % 3
    return torch.randn(batch, 3, side, side, generator=generator), models.Text(ids, mask)


def export(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, models.Text({0: batch}, {0: batch}))
    with torch.no_grad():
        return torch.export.export(model, inputs(2), dynamic_shapes=shapes, strict=strict)


def same(found: models.Prediction, expected: models.Prediction) -> None:
    assert type(found) is models.Prediction and len(found.earlier) == len(expected.earlier)
    assert found.presence_weighs == expected.presence_weighs and found.extra == expected.extra == {}
    for ours, theirs in zip((found, *found.earlier), (expected, *expected.earlier), strict=True):
        for name in ("mask", "presence", "pixels"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("error:.*weights_only")
@pytest.mark.parametrize("kind", ["magnet", "lavt on timm"])
def test_exported_with_any_batch_saved_and_loaded(kind: str, caplog) -> None:
    """An accelerated model; `test_the_documented_way` does the same to a plain one."""
    model = build(kind)
    magnet_fast.accelerate(model, pack=True)
    program = export(model)
    assert not any(word in str(program.graph) for word in ("magnet_fast", "mkldnn"))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert "weights_only" not in caplog.text  # it was read as data alone
    with torch.no_grad():
        for batch in (2, 5):
            same(loaded(*inputs(batch)), model(*inputs(batch)))


@pytest.mark.parametrize("kind", ["cris", "risam"])
def test_exported_with_any_batch(kind: str) -> None:
    model = build(kind)
    program = export(model)
    with torch.no_grad():
        same(program.module()(*inputs(5)), model(*inputs(5)))


def test_exported_strictly() -> None:
    model = build("lavt")
    program = export(model, strict=True)
    with torch.no_grad():
        same(program.module()(*inputs(3)), model(*inputs(3)))


def test_a_forced_backend_stays_in_the_graph() -> None:
    model = build("lavt")
    with ops.backend("cpu"):
        program = export(model)
    assert "magnet_fast.window_attention" in str(program.graph)
    with torch.no_grad():
        same(program.module()(*inputs(3)), model(*inputs(3)))
    qkv, table = torch.randn(1, 4, 4, 12), torch.randn(9, 1)
    explained = str(ops.explain("window_attention", qkv, table, num_heads=1, window_size=2))
    assert "graph is being taken" not in explained


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("kind", "accelerated"), [("magnet", True), ("lavt", False)], ids=str)
def test_traced(kind: str, accelerated: bool) -> None:
    masks = Masks(build(kind))
    if accelerated:
        magnet_fast.accelerate(masks, pack=True)
    image, text = inputs(2)
    traced = torch.jit.trace(masks, (image, *text), check_trace=False)
    assert "magnet_fast::" not in str(traced.inlined_graph)
    other, words = inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(traced(other + 1, *words), masks(other + 1, *words), rtol=1e-3, atol=1e-4)


def test_the_documented_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the file runs where this package is not imported. Of a LAVT with every kind of block once."""
    monkeypatch.chdir(tmp_path)
    create = models.create
    monkeypatch.setattr(models, "create", lambda name, **given: create(name, **given, **KINDS["lavt"][1]))
    section = PAGE.read_text().partition("## Taking a model out")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    image, text = inputs(3)
    torch.save((image, *text), "inputs.pt")
    run = (
        "import sys, torch\n"
        "out = torch.export.load('masks.pt2').module()(*torch.load('inputs.pt'))\n"
        "assert not [name for name in sys.modules if name.startswith('magnet_fast')]\n"
        "torch.save(out, 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", run], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = names["Masks"](names["model"])(image, *text)
    torch.testing.assert_close(torch.load("out.pt"), expected, rtol=1e-3, atol=1e-4)
