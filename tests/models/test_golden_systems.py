"""RefSegformer's, ReLA's and CRIS's released outputs, from state dicts in their layouts, plain and accelerated."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import fast
from magnet_fast.models import Text, from_released
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.contract import Prediction, probability
from tests.golden.parameters import FOLDER, golden, released_state

FILES = {"refsegformer_fpn": {}, "refsegformer_topdown": {}, "rela_window7": {"language_gate": "trained"}, "cris": {}}


@pytest.fixture(scope="module", params=["plain", "accelerated"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(way: str) -> Iterator[dict[str, ReferringModel]]:
    built = {file: from_released({"model": released_state(file)}, **hints) for file, hints in FILES.items()}
    if way == "accelerated":
        for model in built.values():
            fast.accelerate(model)
    yield built


def text_of(values: dict[str, Tensor]) -> Text:
    ids = values["input_ids"]
    return Text(ids, values["attention_mask"].bool() if "attention_mask" in values else ids != 0)


def run(model: ReferringModel, values: dict[str, Tensor], **watched: nn.Module) -> tuple[Prediction, dict[str, Tensor]]:
    """The prediction, and what the watched modules returned."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, result, name=name: seen.__setitem__(name, result))
        for name, module in watched.items()
    ]
    try:
        with torch.inference_mode():
            return model(values["image"], text_of(values)), seen
    finally:
        for hook in hooks:
            hook.remove()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def difference(pair: Tensor, dim: int) -> Tensor:
    first, second = pair.unbind(dim)
    return second - first


@pytest.mark.parametrize("file", ["refsegformer_fpn", "refsegformer_topdown"])
def test_refsegformer(models: dict[str, ReferringModel], file: str) -> None:
    model, values = models[file], golden(file)
    every = json.loads((FOLDER / f"{file}.json").read_text())["every"]

    def kept(name: str, found: Tensor) -> Tensor:
        if name not in every:
            return found
        return found.index_select(
            every[name]["axis"], torch.arange(0, found.shape[every[name]["axis"]], every[name]["step"])
        )

    with torch.inference_mode():
        features = model.encode(values["image"], text_of(values))
    close(features.words.features, values["text_features"], 1e-4)
    for i, (output, tokens) in enumerate(zip(features.maps, features.tokens, strict=True)):
        close(kept(f"stage{i}_output", output.flatten(1, 2)), values[f"stage{i}_output"], 1e-3)
        assert (tokens is None) == (i == 0)
        if tokens is not None:
            close(kept(f"stage{i}_tokens", tokens), values[f"stage{i}_tokens"], 1e-3)
    prediction, _ = run(model, values)
    found = [prediction, *reversed(prediction.earlier)]
    assert len(found) == (1 if file.endswith("fpn") else 4)
    for number, each in enumerate(found):
        expected = difference(values[f"mask_logits{number}"], 1)
        resized = F.interpolate(each.mask[:, None], expected.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
        close(resized, expected, 1e-4)
    close(prediction.presence.sigmoid(), values["exist"][:, 0], 1e-5)
    if file.endswith("fpn"):
        close(kept("mask_features", prediction.pixels), values["mask_features"], 1e-4)


def test_rela(models: dict[str, ReferringModel]) -> None:
    model, values = models["rela_window7"], golden("rela_window7")
    decoder = model.head.decoder
    layers = {f"regions{i}": layer for i, layer in enumerate(decoder.layers)}
    prediction, seen = run(model, values, rla_language=decoder.word_attention, **layers)
    with torch.inference_mode():
        features = model.encode(values["image"], text_of(values))
    for i, output in enumerate(features.maps):
        close(output.permute(0, 3, 1, 2), values[f"stage_res{i + 2}"], 1e-3)
    for name, found in seen.items():
        close(found, values[name], 1e-3)
    close(prediction.pixels, values["mask_features"], 1e-3)
    close(prediction.extra["minimap"].flatten(1), difference(values["minimap_logits"], -1), 1e-3)
    close(prediction.presence, -difference(values["no_target_logits"], -1), 1e-3)
    largest = values["mask_logits"].abs().max().item()
    close(prediction.mask, difference(values["mask_logits"], 1), 2e-4 * largest)  # of two logits, both errors
    # Logits are resized without aligned corners. Released code then compares two sigmoids, which logits this large
    # saturate; the sign of the difference is what is meant.
    resized = F.interpolate(values["mask_logits"], (64, 96), mode="bilinear", align_corners=False)
    close(resized.sigmoid(), values["probability"], 1e-2)
    found, expected = probability(prediction._replace(presence=None), (64, 96)), difference(resized, 1)
    clear = expected.abs() > 4e-4 * largest
    assert torch.equal(found[clear] > 0.5, expected[clear] > 0)


def test_rela_gate_of_words() -> None:
    """Released code never loads the gate: its files are run with one half, unless the trained one is asked for."""
    state, values = released_state("rela_window7"), golden("rela_window7")
    released, trained = from_released({"model": state}), from_released({"model": state}, language_gate="trained")
    assert released.head.decoder.language_gate is None
    assert trained.head.decoder.language_gate == state["sem_seg_head.predictor.lang_weight"]
    with torch.inference_mode():
        trained.head.decoder.language_gate.zero_()
        first, second = (model(values["image"], text_of(values)).mask for model in (released, trained))
    assert torch.equal(first, second)


def test_cris(models: dict[str, ReferringModel]) -> None:
    model, values = models["cris"], golden("cris")
    layers = {f"decoder_layer{i}": layer for i, layer in enumerate(model.head.layers)}
    prediction, seen = run(model, values, decoder=model.head.norm, **layers)
    with torch.inference_mode():
        features = model.encode(values["image"], text_of(values))
        stream = model.image_encoder.start(values["image"])
        for i, stride in enumerate((8, 16, 32)):
            feature = model.image_encoder.stage(i, stream)
            close(feature.permute(0, 3, 1, 2), values[f"image_stride{stride}"], 1e-4)
            stream = model.image_encoder.descend(i, feature)
    close(features.words.features, values["words"], 1e-4)
    close(features.words.sentence, values["sentence"], 1e-4)
    (neck,) = features.maps
    close(neck.permute(0, 3, 1, 2), values["neck"], 1e-4)
    for name, found in seen.items():
        close(found, values[name], 1e-4)
    close(prediction.mask, values["mask_logits"][:, 0], 1e-3)
    assert model.spec.fit == "letterbox" and model.spec.size == 416 and model.spec.threshold == 0.35


@pytest.mark.parametrize("file", [file for file in FILES if file != "rela_window7"])
def test_low_precision(file: str) -> None:
    """bfloat16 weights and features: logits agree as far as 8 bits reach through parameters drawn at random.

    Not ReLA's: with such parameters a region's mask is a matter of rounding, and what it may look at with it.
    """
    values = golden(file)
    model = from_released({"model": released_state(file)}, **FILES[file])
    fast.accelerate(model)
    with torch.inference_mode():
        full = model(values["image"], text_of(values)).mask
        low = model.to(torch.bfloat16)(values["image"], text_of(values)).mask.float()
    assert (full - low).square().mean().sqrt() / full.square().mean().sqrt() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("names", ["rela_swin_b", "rela_swin_t", "cris_r50", "cris_r101"])
def test_full_size_names(names: str) -> None:
    """Every name and shape of the full-size models is known; the parts are those of the preset."""
    from magnet_fast.models import preset_config

    shapes = json.loads((FOLDER / f"{names}_names.json").read_text())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    model = from_released(state)
    preset, found = preset_config(names), model.config
    for role in ("image", "text", "fusion", "head"):
        ignored = {"drop_path", "dropout", "language_gate"}
        assert getattr(found, role).model_dump(exclude=ignored) == getattr(preset, role).model_dump(exclude=ignored)
