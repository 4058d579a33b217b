"""The small model for photographs: one look for all sentences, boxes that only their loss moves, weights from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.encoders.timm import TimmEncoder
from magnet_fast.models.fusion.objects import places, written

WORDS = {
    "model_type": "bert", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def model(**changes: Any) -> models.ReferringModel:
    torch.manual_seed(0)
    text = {"kind": "transformers", "name": "words", "settings": WORDS}
    small = {"fusion__width": 16, "fusion__middle": 16, "fusion__fine": 8, "fusion__num_heads": 2, "fusion__layers": 1}
    return models.create("photos_lite0", text=text, **{**small, **changes}).eval()


def inputs(images: int = 2, each: int = 1, size: tuple[int, int] = (64, 96)) -> tuple[Tensor, Text]:
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (images * each, 7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1:, 5:] = False
    return torch.randn(images, 3, *size), Text(ids, mask)


def test_sentences_about_an_image_share_one_look() -> None:
    built = model()
    image, text = inputs(each=3)
    every = image.repeat_interleave(3, dim=0)
    with torch.no_grad():
        seen = built.look(image)
        together = built(every, text, seen=[one.repeat_interleave(3, dim=0) for one in seen])
        apart = built(every, text)
    assert together.mask.shape == (6, 16, 24)
    torch.testing.assert_close(together.mask, apart.mask)
    assert [tuple(one.shape[1:]) for one in seen] == [(16, 4, 6), (16, 8, 12), (8, 16, 24), (4, 8, 12)]


def test_words_matter_and_padding_does_not() -> None:
    built = model()
    image, (ids, mask) = inputs()
    with torch.no_grad():
        masks = built(image, Text(ids, mask)).mask
        padded = built(image, Text(torch.where(mask, ids, 7), mask)).mask
        other = built(image, Text(ids.flip(0), mask)).mask
    torch.testing.assert_close(masks, padded)
    assert (masks - other).abs().max() > 1e-4


def test_any_size_that_the_encoder_takes() -> None:
    built = model()
    with torch.no_grad():
        assert built(*inputs(size=(72, 100))).mask.shape == (2, 18, 25)


def test_only_their_own_loss_moves_the_boxes() -> None:
    built = model()
    torch.nn.init.normal_(built.fusion.layers[0].scale_shift.weight)  # it starts at zero
    built(*inputs()).mask.square().sum().backward()
    trained = {name for name, p in built.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    lacking = {name for name, _ in built.named_parameters()} - trained
    assert {name for name in lacking if "fusion" in name} == {"fusion.seen.box.weight", "fusion.seen.box.bias"}
    built.zero_grad()
    built.look(inputs()[0])[3].sum().backward()
    assert built.fusion.seen.box.weight.grad is not None


def test_boxes_are_near_their_pixels_and_written_in_waves() -> None:
    x, y = places(2, 4, torch.zeros(()))
    assert x.tolist() == [[0.125, 0.375, 0.625, 0.875]] * 2 and y[:, 0].tolist() == [0.25, 0.75]
    waves = written(torch.stack([x, y]))
    assert waves.shape == (16, 2, 4)
    torch.testing.assert_close(waves[0], (torch.pi * x).sin())
    torch.testing.assert_close(waves[-1], (8 * torch.pi * y).cos())


def test_norms_that_are_held_keep_their_statistics_and_learn_their_weights() -> None:
    built = model().train()
    before = {name: value.clone() for name, value in built.image_encoder.state_dict().items()}
    built(*inputs()).mask.square().sum().backward()
    after = built.image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert built.image_encoder.backbone.bn1.weight.grad.abs().max() > 0
    free = model(image__frozen_norms=False).train()
    free(*inputs())
    assert not torch.equal(free.image_encoder.backbone.bn1.running_mean, before["backbone.bn1.running_mean"])


@pytest.fixture(scope="module")
def lite() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()


@pytest.mark.parametrize("renamed", [False, True])
def test_image_weights_from_a_file_by_name_or_in_order(renamed: bool, lite: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({f"_{i}.{name.rpartition('.')[2]}" if renamed else name: t for i, (name, t) in enumerate(lite.items())},
               tmp_path / "lite0.pth")  # fmt: skip
    built = model()
    built.load_pretrained({"image": str(tmp_path / "lite0.pth"), "text": False})
    for name, tensor in built.image_encoder.backbone.state_dict().items():
        assert torch.equal(tensor, lite[name])


def test_weights_of_another_model_are_refused(lite: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"image weights '.*other\.pth' does not fit"):
        model().load_pretrained({"image": str(tmp_path / "other.pth"), "text": False})
    mixed = list(lite.items())
    mixed[0], mixed[6] = mixed[6], mixed[0]
    torch.save({f"_{i}": tensor for i, (_, tensor) in enumerate(mixed)}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="does not fit"):
        model().load_pretrained({"image": str(tmp_path / "mixed.pth"), "text": False})


def test_the_first_layers_of_a_deeper_text_encoder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    deeper = transformers.AutoModel.from_config(transformers.BertConfig(**{**WORDS, "num_hidden_layers": 4}))
    deeper.save_pretrained(tmp_path)
    built = model()
    built.load_pretrained({"image": False, "text": str(tmp_path)})
    expected = deeper.state_dict()
    own = built.text_encoder.encoder.state_dict()
    assert any("layer.1." in name for name in own) and not any("layer.2." in name for name in own)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"kind": "timm", "name": "test_vit", "arguments": {"img_size": 64}}}, "objects joins 4 maps"),
        ({"fusion__num_heads": 3}, "num_heads=3 does not divide width=16"),
        ({"fusion": {"kind": "pwam"}}, "pixel reads one map; this fusion gives 4"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_saves_and_loads(tmp_path: Path) -> None:
    built = model()
    models.save(built, tmp_path / "model.safetensors")
    again = models.load(tmp_path / "model.safetensors")
    assert isinstance(again.image_encoder, TimmEncoder) and again.spec == built.spec
    with torch.no_grad():
        assert torch.equal(again(*inputs()).mask, built(*inputs()).mask)
