"""Models as folders for other runtimes: what is in them, what they answer, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from magnet_fast import exporting, models
from magnet_fast.data import Tokenizer

pytestmark = pytest.mark.slow
SMALL = {
    "image": {"kind": "swin", "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
    "text": {"kind": "bert", "hidden_size": 32, "num_layers": 4, "num_heads": 2, "intermediate_size": 32},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(max_tokens=12)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> models.ReferringModel:
    torch.manual_seed(0)
    built = models.create("lavt_tiny", pretrained=False, **SMALL, text__vocab_size=tokenizer.vocab_size).eval()
    built.spec = built.spec._replace(size=64, max_tokens=12)
    return built


@pytest.mark.parametrize("format", exporting.FORMATS)
def test_answers_as_the_model_does(format: str, model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "new" / format
    difference = exporting.export(model, tokenizer, out, format)
    assert 0 <= difference < 1e-4
    assert [path.name for path in out.parent.iterdir()] == [format]  # nothing left beside it
    described = json.loads((out / "input.json").read_text())
    assert described["inputs"]["image"] == ["batch", 3, 64, 64, "float32"]
    assert described["spec"]["size"] == 64 and described["special_ids"]["[CLS]"] == tokenizer.special_ids["[CLS]"]
    assert json.loads((out / "vocabulary.json").read_text()) == tokenizer.vocabulary
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(3, 3, 64, 64, generator=generator), tokenizer(["the red circle", "a square", "blue"])
    with torch.no_grad():
        expected = models.probability(model(image, text), (64, 64)).numpy()
    np.testing.assert_allclose(run(out, format, image, *text), expected, atol=1e-4)


def run(folder: Path, format: str, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """As somebody does who has the folder alone: inputs by their names."""
    if format == "torch":
        with torch.no_grad():
            return torch.export.load(folder / "masks.pt2").module()(image, ids, mask).numpy()
    given = {"image": image.numpy(), "ids": ids.numpy(), "mask": mask.numpy()}
    if format == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(folder / "masks.onnx").run(["probability"], given)[0]
    import openvino

    compiled = openvino.compile_model(folder / "masks.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(given)["probability"]


def test_a_graph_that_answers_otherwise_is_not_kept(model, tokenizer, tmp_path, monkeypatch) -> None:
    def lying(program, folder: Path) -> exporting.Run:
        (folder / "masks.pt2").write_bytes(b"")
        return lambda *inputs: exporting.Masks(model)(*inputs).detach().numpy() + 0.01

    monkeypatch.setattr(torch.export, "export", lambda *arguments, **named: None)  # seconds
    monkeypatch.setitem(exporting.FORMATS, "torch", ((), lying))
    with pytest.raises(ValueError, match="answers otherwise than the model, by 0.01"):
        exporting.export(model, tokenizer, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_refused_before_any_work(model, tokenizer, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="format is 'tflite'; expected one of torch, onnx, openvino"):
        exporting.export(model, tokenizer, tmp_path / "out", "tflite")
    with pytest.raises(FileExistsError, match="expected a new folder"):
        exporting.export(model, tokenizer, tmp_path, "torch")
    monkeypatch.setitem(exporting.FORMATS, "onnx", (("a_package_that_is_not_there",), lambda program, folder: None))
    with pytest.raises(ImportError, match=r"needs a_package_that_is_not_there: pip install 'magnet_fast\[export\]'"):
        exporting.export(model, tokenizer, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())
