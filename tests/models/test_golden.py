"""The released models' outputs, from checkpoints in the released format, on every backend that runs here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import ops
from magnet_fast.models import Text, from_released
from magnet_fast.models.base import ReferringModel
from tests.golden.parameters import golden, released_checkpoint

LOGITS, FEATURES = 1e-3, 1e-4
BACKENDS = ["reference", "cpu"]


@pytest.fixture(scope="module")
def magnet() -> ReferringModel:
    return from_released(released_checkpoint("magnet"), fusion_heads=(1, 1, 1, 1))


@pytest.fixture(scope="module")
def lavt() -> ReferringModel:
    return from_released(released_checkpoint("lavt"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in ops.available_backends():
        pytest.fail(f"backend {request.param} is not available: build the extension before running the tests")
    # Forcing "cpu" would refuse the operators that have no C++ kernel yet: "auto" takes it wherever there is one.
    with ops.backend("reference" if request.param == "reference" else "auto"):
        yield request.param


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def inputs(name: str) -> tuple[Tensor, Text]:
    values = golden(name)
    return values["image"], Text(values["input_ids"], values["attention_mask"].bool())


def difference(pair: Tensor, dim: int) -> Tensor:
    """Two logits, of what is not meant and of what is, as the one that a `Prediction` holds."""
    without, named = pair.unbind(dim)
    return named - without


def test_magnet_predictions(magnet: ReferringModel, backend: str) -> None:
    values = golden("magnet")
    with torch.inference_mode():
        prediction = magnet(*inputs("magnet"))
    found = [*prediction.earlier, prediction]
    prefixes = [*(f"aux{index}_" for index in range(9)), ""]
    for each, prefix in zip(found, prefixes, strict=True):
        close(each.mask, values[f"{prefix}pred_masks"][:, 0], LOGITS)
        close(each.presence, difference(values[f"{prefix}pred_logits"][:, 0], -1), 2 * LOGITS)
        assert each.presence_weighs


def exchanges(magnet: ReferringModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """What every exchange and patch merging returns, by golden name, and the text residuals by stage."""
    seen = {}

    def keep(name: str):
        return lambda module, inputs, result: seen.__setitem__(name, result)

    hooks = []
    for i, exchange in enumerate(magnet.fusion.stages, start=1):
        hooks.append(exchange.register_forward_hook(keep(f"exchange{i}")))
        hooks.append(exchange.text_fusion.register_forward_hook(keep(f"text_residual{i}")))
        downsample = magnet.image_encoder.stages[i - 1].downsample
        if downsample is not None:
            hooks.append(downsample.register_forward_hook(keep(f"merged{i}")))
    try:
        image, text = inputs("magnet")
        with torch.inference_mode():
            magnet(image.to(dtype), text)
    finally:
        for hook in hooks:
            hook.remove()
    features = {}
    for i in range(1, 5):
        output, _, words = seen[f"exchange{i}"]
        features[f"image_fusion{i}"] = output.permute(0, 3, 1, 2)
        features[f"text_fusion{i}_next"] = words
        features[f"text_residual{i}"] = seen[f"text_residual{i}"]
        if i < 4:  # image_fusion4_next cannot be compared: nothing reads the last stage's stream, so it has no gate
            features[f"image_fusion{i}_next"] = seen[f"merged{i}"].flatten(1, 2)
    return features


def test_magnet_features(magnet: ReferringModel, backend: str) -> None:
    values = golden("magnet")
    features = exchanges(magnet, torch.float32)
    assert len(features) == 15
    for name, feature in features.items():
        if not name.startswith("text_residual"):
            close(feature, values[name], FEATURES)


def test_magnet_encode(magnet: ReferringModel, backend: str) -> None:
    """What terms and heads read: the stages' outputs, the words, and the picture's size."""
    values = golden("magnet")
    with torch.inference_mode():
        features = magnet.encode(*inputs("magnet"))
    for i, feature in enumerate(features.maps, start=1):
        close(feature.permute(0, 3, 1, 2), values[f"image_fusion{i}"], FEATURES)
    close(features.words.features, values["text_fusion4_next"], FEATURES)
    assert torch.equal(features.words.mask, values["attention_mask"].bool())
    assert features.tokens == [None] * 4 and features.size == tuple(values["image"].shape[2:])


def test_magnet_text_residuals() -> None:
    """The released code also normed these residuals, for nothing.

    In float64, because the file's own float32 rounding takes nearly all of the tolerance: queries of -10000
    amplify it (9.8e-5 between the file and the exact value in stage 3).
    """
    values, checkpoint = golden("magnet"), released_checkpoint("magnet")
    features = exchanges(from_released(checkpoint).double(), torch.float64)
    for i in range(1, 5):
        residual = features[f"text_residual{i}"]
        weight, bias = (checkpoint["model"][f"language_model.norms.{i - 1}.{p}"] for p in ("weight", "bias"))
        normed = F.layer_norm(residual, residual.shape[-1:], weight.double(), bias.double())
        close(normed, values[f"text_fusion{i}"].double(), FEATURES)


def at_full_size(mask: Tensor, like: Tensor) -> Tensor:
    """The released LAVT resizes its logits; the difference of two resized is the resized difference."""
    return F.interpolate(mask[:, None], size=like.shape[-2:], mode="bilinear", align_corners=True)[:, 0]


def test_lavt(lavt: ReferringModel, backend: str) -> None:
    """LAVT's parameters here make an instance norm divide by 1e-4 what is near 0.8: float32 rounding grows 10,000-fold.

    The file itself is 1.8e-3 away from the exact logits (`test_lavt_exact`), and the released code differs from
    itself by as much between one thread and two. So float32 is held to a rounding's distance, float64 to the file's.
    Two logits' difference carries both of their errors.
    """
    values = golden("lavt")
    with torch.inference_mode():
        prediction = lavt(*inputs("lavt"))
    close(prediction.words.features, values["text_features"], FEATURES)
    expected = difference(values["logits"], 1)
    found = at_full_size(prediction.mask, expected)
    close(found, expected, 10 * LOGITS)
    assert (found - expected).square().mean().sqrt() < 2 * LOGITS
    assert prediction.presence is None and prediction.earlier == ()


def test_lavt_exact() -> None:
    values = golden("lavt")
    exact = from_released(released_checkpoint("lavt")).double()
    image, text = inputs("lavt")
    with torch.inference_mode():
        prediction = exact(image.double(), text)
    expected = difference(values["logits"], 1).double()
    found = at_full_size(prediction.mask, expected)
    close(found, expected, 4 * LOGITS)
    assert (found - expected).square().mean().sqrt() < LOGITS


def test_prediction_rules(magnet: ReferringModel, lavt: ReferringModel) -> None:
    """predict: softmax(class)[1] · sigmoid(mask) for MagNet, the softmax of two logits for LAVT."""
    values = golden("magnet")
    probability = magnet.predict(values["image"], values["input_ids"], values["attention_mask"], size=(50, 70))
    masks = F.interpolate(values["pred_masks"], size=(50, 70), mode="bilinear", align_corners=True)
    expected = values["pred_logits"].softmax(-1)[..., 1][:, :, None, None] * masks.sigmoid()
    close(probability, expected[:, 0], LOGITS)

    values = golden("lavt")
    probability = lavt.predict(values["image"], values["input_ids"], values["attention_mask"])
    close(probability, values["logits"].softmax(1)[:, 1], 5 * LOGITS)  # > 0.5 is the argmax
