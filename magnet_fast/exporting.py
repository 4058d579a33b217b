"""A model taken out: a folder that other runtimes run, checked against the model before it appears."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.atomic import new_folder
from magnet_fast.data.tokenizers import ExpressionTokenizer
from magnet_fast.devices import on_cpu
from magnet_fast.models.base import ReferringModel

INPUTS = ("image", "ids", "mask")
OUTPUT = "probability"
TOLERANCE = 1e-3  # of a probability [our choice]
_INPUT_NAME, _VOCABULARY_NAME = "input.json", "vocabulary.json"
_SENTENCES = ("the large red circle", "a square", "the blue triangle left of the small ring", "the one at the top")

Run = Callable[[Tensor, Tensor, Tensor], np.ndarray]


class Masks(nn.Module):
    """What is exported: tensors in, one tensor out.

    image (B, 3, S, S) float32, prepared as `model.spec` says; ids (B, T) int64; mask (B, T) bool, True for a token that
    is read. Out: the probability (B, S, S) float32 that a pixel belongs to what is named, presence included.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        prediction = self.model(image, models.Text(ids, mask))
        return models.probability(prediction, size=(image.shape[2], image.shape[3]))


@on_cpu()  # of what `torch.export` and the runtimes make
def export(
    model: ReferringModel, tokenizer: ExpressionTokenizer, out: str | os.PathLike[str], format: str = "onnx"
) -> float:
    """Write a model as a folder that runs without this package.

    In it are the graph (`masks.pt2`, `masks.onnx`, or `masks.xml` and `masks.bin`) of `Masks`, float32, for any batch
    and for pictures of `model.spec.size`; `input.json`, which says how pictures and sentences are prepared; and
    `vocabulary.json`, each token's id. The folder appears once the graph has been read back, run on one row and on
    four, and agreed with the model.

    Args:
        model: in evaluation mode, on the CPU, float32.
        tokenizer: the model's.
        out: a new folder.
        format: "torch" (`torch.export`), "onnx" (read back by ONNX Runtime) or "openvino".

    Returns:
        The largest difference of a probability between what was written and the model.

    Raises:
        FileExistsError: `out` exists.
        ImportError: the format's runtime is not installed.
        OSError: the folder cannot be written; nothing of it stays.
        ValueError: no such format, a model that needs more than a picture and a sentence, or one whose graph answers
            otherwise than the model.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if model.required:
        raise ValueError(f"model: it needs {', '.join(model.required)} beside image and expression; no graph has those")
    if out.exists():
        raise FileExistsError(f"{out} exists; expected a new folder")
    packages, write = FORMATS[format]
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"format {format!r} needs {package}: pip install 'magnet_fast[export]'") from error
    masks, inputs = Masks(model).eval(), _inputs(model, tokenizer)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(masks, inputs, dynamic_shapes=({0: batch},) * len(INPUTS))
    with new_folder(out) as folder:
        run = write(program, folder)
        difference = max(_difference(masks, run, inputs, rows) for rows in (1, len(_SENTENCES)))
        if not difference <= TOLERANCE:  # nor NaN
            raise ValueError(f"format {format!r}: its graph answers otherwise than the model, by {difference:.2g}")
        vocabulary = sorted(tokenizer.vocabulary.items(), key=lambda entry: entry[1])
        (folder / _INPUT_NAME).write_text(json.dumps(_description(model, tokenizer), indent=1) + "\n")
        (folder / _VOCABULARY_NAME).write_text(json.dumps(dict(vocabulary), ensure_ascii=False, indent=0) + "\n")
    return difference


def _inputs(model: ReferringModel, tokenizer: ExpressionTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(len(_SENTENCES), 3, model.spec.size, model.spec.size, generator=generator, device="cpu")
    text = tokenizer(_SENTENCES)
    return image, text.ids, text.mask


def _difference(masks: nn.Module, run: Run, inputs: tuple[Tensor, ...], rows: int) -> float:
    some = tuple(one[:rows] for one in inputs)
    with torch.no_grad():
        expected = masks(*some).numpy()
    found = run(*some)
    if found.shape != expected.shape:
        raise ValueError(f"format: its graph answers {found.shape} to {rows} rows; expected {expected.shape}")
    return float(np.abs(found - expected).max())


def _description(model: ReferringModel, tokenizer: ExpressionTokenizer) -> dict[str, Any]:
    side, length = model.spec.size, tokenizer.max_tokens
    return {
        "inputs": {
            "image": ["batch", 3, side, side, "float32"],
            "ids": ["batch", length, "int64"],
            "mask": ["batch", length, "bool"],
        },
        "outputs": {OUTPUT: ["batch", side, side, "float32"]},
        "spec": model.spec._asdict(),
        "special_ids": tokenizer.special_ids,
    }


def _write_torch(program: torch.export.ExportedProgram, folder: Path) -> Run:
    # In memory first: where the disk is full, PyTorch's own writer ends the whole process.
    written = io.BytesIO()
    torch.export.save(program, written)
    (folder / "masks.pt2").write_bytes(written.getbuffer())
    loaded = torch.export.load(folder / "masks.pt2").module()

    def run(*inputs: Tensor) -> np.ndarray:
        with torch.no_grad():
            return loaded(*inputs).numpy()

    return run


def _write_onnx(program: torch.export.ExportedProgram, folder: Path) -> Run:
    import onnxruntime

    path = folder / "masks.onnx"
    written = torch.onnx.export(program, dynamo=True, input_names=list(INPUTS), output_names=[OUTPUT], verbose=False)
    written.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: session.run([OUTPUT], dict(zip(names, (one.numpy() for one in inputs), strict=True)))[0]


def _write_openvino(program: torch.export.ExportedProgram, folder: Path) -> Run:
    import openvino

    converted = openvino.convert_model(program)
    for port, name in zip((*converted.inputs, *converted.outputs), (*INPUTS, OUTPUT), strict=True):
        port.get_tensor().set_names({name})
    try:
        openvino.save_model(converted, folder / "masks.xml", compress_to_fp16=False)
    except RuntimeError as error:  # which does not say what the system said
        raise OSError(errno.EIO, f"OpenVINO could not write masks.xml; is the disk full? ({error})") from error
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Core().read_model(folder / "masks.xml"), "CPU", options)
    return lambda *inputs: compiled([one.numpy() for one in inputs])[0]


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[torch.export.ExportedProgram, Path], Run]]] = {
    "torch": ((), _write_torch),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), _write_onnx),
    "openvino": (("openvino",), _write_openvino),
}
"""By name: the packages that each needs, and what writes it and reads it back."""
