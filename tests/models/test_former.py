"""Files written before models had parts by name (format 1): they load, and give the same masks.

`former_files` and `magnet_tiny_scenes` in tests/golden hold names, configurations and outputs of the code of that time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from magnet_fast import models, ops
from magnet_fast.models import Text
from magnet_fast.models.weights import load_with_metadata
from tests.golden.parameters import FOLDER, parameter

CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "former_files.json").read_text())
SHIPPED = Path(models.__file__).parent.parent / "weights" / "magnet_tiny_scenes.safetensors"


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def state_of(case: str) -> dict[str, Tensor]:
    """Every entry of the case's state dict, its value following from its former name."""
    state = {}
    for name, shape in CASES[case]["state"].items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            value = parameter(name, shape)
            state[name] = value.abs() + 0.5 if name.endswith("running_var") else value
    return state


def write(path: Path, case: str, state: dict[str, Tensor] | None = None, **more: str) -> Path:
    """A file as `save_model` wrote it."""
    config = json.dumps(CASES[case]["config"])
    metadata = {**more, "format": "magnet_fast.model/1", "config": config}
    save_file(state_of(case) if state is None else state, path, metadata)
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_same_masks_as_before(case: str, backend: str, tmp_path: Path) -> None:
    """X-MHA with two levels, the released masking with several heads and no pyramid, and a LAVT."""
    expected = arrays("former_files")
    model = models.load(write(tmp_path / "former.safetensors", case))
    image, ids, mask = expected["image"], expected["input_ids"], expected["attention_mask"]
    with torch.inference_mode(), ops.backend(backend):
        prediction = model(image, Text(ids, mask.bool()))
        full, small = model.predict(image, ids, mask), model.predict(image, ids, mask, size=(20, 31))
    assert not model.training
    torch.testing.assert_close(full, expected[f"{case}_probability"], rtol=0, atol=5e-5)
    torch.testing.assert_close(small, expected[f"{case}_small"], rtol=0, atol=5e-5)
    torch.testing.assert_close(prediction.words.features, expected[f"{case}_words"], rtol=1e-4, atol=1e-4)
    logits = expected[f"{case}_mask_logits"]
    if case == "lavt":
        assert prediction.presence is None
    else:
        classes = expected[f"{case}_class_logits"][:, 0]
        torch.testing.assert_close(prediction.presence, classes[:, 1] - classes[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prediction.mask, logits[:, 0], rtol=1e-3, atol=1e-4)


def test_settings_come_along(tmp_path: Path) -> None:
    """Every former setting has its place now; sizes of images and expressions were metadata."""
    path = write(tmp_path / "former.safetensors", "no_pyramid", image_size="192", max_words="15", step="7")
    model, metadata = load_with_metadata(path)
    former = CASES["no_pyramid"]["config"]
    fusion, head = model.config.fusion, model.config.head
    assert fusion.form == "pwam" and fusion.masking == "released" and fusion.pyramid == ()
    assert list(fusion.heads) == former["alignment"]["fusion_heads"] == [1, 2, 2, 4]
    assert {key: getattr(head, key) for key in former["decoder"]} == former["decoder"]
    for part, kept in (("image", model.config.image), ("text", model.config.text)):
        assert json.loads(kept.model_dump_json()).items() >= former[part].items()
    assert model.config.text.schedule == "slices"
    assert model.spec.size == 192 and model.spec.max_tokens == 15 and metadata["step"] == "7"
    lavt = models.load(write(tmp_path / "lavt.safetensors", "lavt"))
    assert lavt.config.text.schedule == "whole" and list(lavt.config.fusion.heads) == [2, 1, 1, 4]
    assert lavt.spec == models.InputSpec()  # what nobody wrote down is as it always was


def test_written_again_it_is_of_the_present_format(tmp_path: Path) -> None:
    former = models.load(write(tmp_path / "former.safetensors", "xmha", image_size="96"))
    models.save(former, tmp_path / "present.safetensors")
    again, metadata = load_with_metadata(tmp_path / "present.safetensors")
    assert metadata["format"] == "magnet_fast.model/2" and again.config == former.config
    for (name, a), b in zip(former.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CASES)
def test_nothing_else_is_dropped(case: str, tmp_path: Path) -> None:
    """A former name that no model held then is not passed over, and one that is missing is named."""
    state = state_of(case)
    extra = {**state, "surprise.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="unexpected.*surprise"):
        models.load(write(tmp_path / "extra.safetensors", case, extra))
    stage = "fusions.2.gate.first.weight" if case == "lavt" else "alignment.2.text_gate.first.weight"
    with pytest.raises(ValueError, match=r"1 missing \(fusion\.stages\.2\.(text_)?gate\.first\.weight\)"):
        models.load(write(tmp_path / "less.safetensors", case, {k: v for k, v in state.items() if k != stage}))


def scene() -> Tensor:
    """Three discs on a light ground, (1, 3, 96, 128), normalised."""
    y, x = np.mgrid[:96, :128]
    image = np.full((3, 96, 128), 0.9, np.float32)
    discs = [((30, 30, 16), (0.85, 0.1, 0.1)), ((90, 60, 20), (0.1, 0.2, 0.85)), ((40, 75, 12), (0.1, 0.6, 0.2))]
    for (column, row, radius), colour in discs:
        image[:, (x - column) ** 2 + (y - row) ** 2 <= radius * radius] = np.array(colour, np.float32)[:, None]
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)[:, :, None, None]
    return torch.from_numpy((image - mean) / std)[None]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_shipped_weights(backend: str) -> None:
    """ "the red circle", "the blue circle on the right", "the green circle"."""
    expected = arrays("magnet_tiny_scenes")
    model = models.load(SHIPPED)
    ids, mask = expected["input_ids"].long(), expected["attention_mask"].bool()
    image = scene().expand(3, -1, -1, -1)
    with torch.inference_mode(), ops.backend(backend):
        prediction = model(image, Text(ids, mask))
        found = model.predict(image, ids, mask, size=(48, 64))
    classes = expected["class_logits"]
    torch.testing.assert_close(found, expected["probability"], rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.presence, classes[:, 1] - classes[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prediction.words.features, expected["words"], rtol=1e-3, atol=1e-3)
    assert torch.equal(found > 0.5, expected["probability"] > 0.5)
    assert ((found > 0.5).flatten(1).sum(1) > 50).all()
    assert model.spec.size == 192 and model.spec.max_tokens == 20
