"""Systems and parts by name: what is known, what may be changed, what is refused when a configuration is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models import Features, Prediction, Step, Text, Words
from magnet_fast.models import config as config_module
from magnet_fast.models import registry as registry_module
from magnet_fast.models.base import Fusion, Head, ImageEncoder, Presence, ReferringModel, TextEncoder
from magnet_fast.models.config import FusionConfig, HeadConfig, ImageConfig, PresenceConfig, Shapes, TextConfig, part
from tests.models.cases import batch


def test_names() -> None:
    names = models.list_models()
    assert names == sorted(names) and len(set(names)) == len(names)
    sizes = ("tiny", "swin_t", "swin_s", "swin_b")
    assert {f"{system}_{size}" for system in ("magnet", "lavt") for size in sizes} <= set(names)
    assert models.list_models("lavt_swin_?") == ["lavt_swin_b", "lavt_swin_s", "lavt_swin_t"]
    assert models.list_models("nothing*") == []


def test_presets_build_and_sizes() -> None:
    tiny = models.create("magnet_tiny")
    assert tiny.training
    assert 1.0e6 < sum(p.numel() for p in tiny.parameters()) < 3e6
    counts, elsewhere = {}, {}
    for name in models.list_models():
        with torch.device("meta"):
            model = models.create(name)
        counts[name] = sum(p.numel() for p in model.parameters())
        tensors = [*model.named_parameters(), *model.named_buffers()]
        elsewhere[name] = [entry for entry, tensor in tensors if not tensor.is_meta]
    assert 290e6 < counts["magnet_swin_b"] < 300e6  # the released model has 297 M
    assert {name: entries for name, entries in elsewhere.items() if entries} == {}  # all of it on the default device


def test_importing_the_package_imports_no_model() -> None:
    """Nor timm and transformers, which take seconds."""
    code = (
        "import sys, magnet_fast.models\n"
        "heavy = [n for n in sys.modules if n.split('.')[0] in ('timm', 'transformers', 'peft')]\n"
        "ours = [n for n in sys.modules if n in ('magnet_fast.models.magnet', 'magnet_fast.models.encoders')]\n"
        "assert not heavy and not ours, (heavy[:3], ours)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_overrides() -> None:
    config = models.preset_config(
        "magnet_tiny", fusion__form="xmha", text__vocab_size=200, image={"window_size": 5}, input__size=96
    )
    assert config.fusion.form == "xmha" and config.text.vocab_size == 200 and config.image.window_size == 5
    assert config.spec.size == 96
    before = models.preset_config("magnet_tiny")
    assert config.image.embed_dim == before.image.embed_dim and config.head == before.head
    assert before.image.window_size == 8 and before.spec.size == 480  # a preset is never changed


def test_mapping_of_the_same_kind_changes_settings_and_another_replaces_the_part() -> None:
    same = models.preset_config("magnet_tiny", head={"kind": "mask2former", "points": 3}).head
    assert same.points == 3 and same.width == 64
    other = models.preset_config("magnet_tiny", head={"kind": "topdown", "width": 20}).head
    assert other.model_dump() == {"kind": "topdown", "width": 20}
    crossed = models.create("lavt_tiny", fusion={"kind": "exchange", "pyramid": (2,)}, head={"kind": "topdown"})
    with torch.no_grad():
        assert crossed.eval()(*batch()).mask.shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("magnet_tin", {}, "did you mean 'magnet_tiny'"),
        ("no such", {}, "unknown model 'no such'; known: .*lavt_swin_b"),
        ("magnet_tiny", {"windowsize": 3}, "unknown model setting 'windowsize'"),
        ("magnet_tiny", {"heat__width": 3}, "unknown model setting 'heat__width'"),
        ("magnet_tiny", {"head__width__more": 3}, "unknown model setting 'head__width__more'"),
        ("magnet_tiny", {"image__windw_size": 3}, "did you mean 'window_size'"),
        ("magnet_tiny", {"image": {"windw_size": 3}}, r"'image.windw_size'; did you mean 'window_size'"),
        ("magnet_tiny", {"image": {"kind": "swin2"}}, "image: kind: no image part 'swin2'; known are .*swin.*timm"),
        ("magnet_tiny", {"head": {"kind": "topdown", "points": 3}}, "head.*points"),
        ("magnet_tiny", {"presence": {"hidden": 3}}, "no presence part None"),
        ("magnet_tiny", {"head": 3}, "head"),
        ("magnet_tiny", {"fusion__form": "other"}, "form"),
        ("magnet_tiny", {"fusion__masking": "released", "fusion__form": "xmha"}, "PWAM"),
        ("magnet_tiny", {"fusion__heads": (1, 1, 1)}, "3 numbers for 4 stages"),
        ("magnet_tiny", {"fusion__heads": 3}, "does not divide the 16 channels of stage 0"),
        ("magnet_tiny", {"fusion__pyramid": (1, 2, 3)}, "3 levels"),
        ("magnet_tiny", {"text__num_layers": 5}, "multiple of 4"),
        ("magnet_tiny", {"text__num_heads": 5}, "num_heads=5 does not divide hidden_size=64"),
        ("magnet_tiny", {"image__num_heads": (3, 2, 4, 8)}, "does not divide"),
        ("magnet_tiny", {"head__width": 66}, "multiple of 4"),
        ("magnet_tiny", {"input__size": 4}, "size"),
        ("magnet_tiny", {"input__std": (1, 0, 1)}, "std"),
        ("lavt_tiny", {"fusion__masking": "released"}, "unknown model setting"),
        ("lavt_tiny", {"fusion__heads": (1, 1, 5, 1)}, "5 does not divide the 64 channels of stage 2"),
    ],
)
def test_refused_configurations(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config(name, **overrides)


def test_slices_need_their_stages() -> None:
    """A backbone with three stages would leave a quarter of a sliced BERT without use."""
    three = {"kind": "timm", "name": "test_vit"}
    with pytest.raises(ValueError, match="text.schedule='slices' .* the image encoder has 3: use schedule='whole'"):
        models.preset_config("magnet_tiny", image=three)
    assert len(models.preset_config("magnet_tiny", image=three, text__schedule="whole").image.channels) == 3


@pytest.mark.parametrize("name", models.list_models("*_tiny"))
def test_configurations_round_trip(name: str) -> None:
    config = models.preset_config(name)
    text = config.model_dump_json()
    again = models.parse_config(json.loads(text))
    assert again == config and type(again) is type(config) and again.model_dump_json() == text
    assert type(again.image) is type(config.image) and again.spec == config.spec
    with pytest.raises(ValueError, match="frozen"):
        config.input = None


def test_unknown_systems_are_refused() -> None:
    entries = models.preset_config("lavt_tiny").model_dump()
    with pytest.raises(ValueError, match="unknown architecture 'lavt3'; known: .*lavt.*magnet"):
        models.parse_config({**entries, "architecture": "lavt3"})
    with pytest.raises(ValueError, match="unknown architecture None"):
        models.from_config({})


def test_spec_is_stored(tmp_path) -> None:
    model = models.create("lavt_tiny")
    spec = models.InputSpec(96, "letterbox", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "clip", 17, 0.35)
    model.spec = spec
    assert model.spec == spec
    models.save(model, tmp_path / "model.safetensors")
    again = models.load(tmp_path / "model.safetensors")
    assert again.spec == spec and isinstance(again.spec.mean, tuple) and again.config == model.config
    assert again.config.same_model(models.preset_config("lavt_tiny"))
    assert not again.config.same_model(models.preset_config("magnet_tiny"))
    with pytest.raises(ValueError, match="size"):
        model.spec = spec._replace(size=0)
    assert model.spec == spec


# ---- a system of the test's own ----


class MeanImageConfig(ImageConfig):
    kind: Literal["test_mean"] = "test_mean"
    width: int = 6

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.width, self.width)

    @property
    def strides(self) -> tuple[int, ...]:
        return (8, 8)

    def build(self) -> nn.Module:
        return MeanImage(self)


class MeanImage(ImageEncoder):
    def __init__(self, config: MeanImageConfig) -> None:
        super().__init__()
        self.channels, self.strides = config.channels, config.strides
        self.convolutions = nn.ModuleList(nn.Conv2d(c, config.width, 3, padding=1) for c in (3, config.width))

    def start(self, image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, 8).permute(0, 2, 3, 1)

    def stage(self, i: int, stream: Tensor) -> Tensor:
        return self.convolutions[i](stream.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TableConfig(TextConfig):
    kind: Literal["test_table"] = "test_table"
    size: int = 50

    @property
    def width(self) -> int:
        return 6

    @property
    def tokenizer(self) -> str:
        return "clip"

    def build(self) -> nn.Module:
        return Table(self)


class Table(TextEncoder):
    def __init__(self, config: TableConfig) -> None:
        super().__init__()
        self.width, self.vocab_size, self.max_positions = 6, config.size, 12
        self.table = nn.Embedding(config.size, 6)

    @property
    def word_embedding(self) -> Tensor:
        return self.table.weight

    def start(self, text: Text) -> Words:
        return Words(self.table(text.ids), text.mask)


class TimesConfig(FusionConfig):
    kind: Literal["test_times"] = "test_times"

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if image.channels[0] != text.width:
            raise ValueError(f"test_times needs one width; got {image.channels[0]} and {text.width}")

    def build(self, image: ImageConfig, text: TextConfig) -> nn.Module:
        return Times()


class Times(Fusion):
    """Counts its stages in `carry`, keeps tokens, and reads the context."""

    needs = ("edges",)

    def forward(self, i: int, x: Tensor, words: Words, carry: int | None, context: dict[str, Tensor]) -> Step:
        y = x * words.sentence[:, None, None, :] + context["edges"]
        return Step(y, y, words, words.features, (carry or 0) + 1 + i)


class LastConfig(HeadConfig):
    kind: Literal["test_last"] = "test_last"

    def check(self, shapes: Shapes) -> None:
        if shapes.strides != (8, 8):
            raise ValueError(f"test_last reads maps of stride 8, twice; got {shapes.strides}")

    def build(self, shapes: Shapes) -> nn.Module:
        return Last()


class Last(Head):
    def forward(self, features: Features) -> Prediction:
        return Prediction(features.maps[-1].mean(dim=-1), words=features.words, extra={"first": features.tokens[0]})


class BrightConfig(PresenceConfig):
    kind: Literal["test_bright"] = "test_bright"
    threshold: float = 0.0

    def build(self, shapes: Shapes) -> nn.Module:
        return Bright(self)


class Bright(Presence):
    def __init__(self, config: BrightConfig) -> None:
        super().__init__()
        self.threshold = config.threshold

    def forward(self, features: Features, prediction: Prediction) -> Tensor:
        return features.maps[0][:, 0].mean(dim=(1, 2)) - self.threshold  # not of all channels, which a norm makes 0


PARTS = {"image": "test_mean", "text": "test_table", "fusion": "test_times", "head": "test_last"}


@pytest.fixture
def own_system() -> Iterator[type[ReferringModel]]:
    """A system "test_own" of parts that this file registers; all forgotten afterwards."""
    models.list_models()  # the package's own are known
    for config in (MeanImageConfig, TableConfig, TimesConfig, LastConfig, BrightConfig):
        part(config)

    class Own(ReferringModel):
        pass

    kinds = {role: {"kind": kind} for role, kind in PARTS.items()}
    models.register("test_own", presets={"test_own_small": kinds})(Own)
    try:
        yield Own
    finally:
        del registry_module._systems["test_own"]
        for role in (*PARTS, "presence"):
            for kind in [kind for kind in config_module._parts[role] if kind.startswith("test_")]:
                del config_module._parts[role][kind]


def test_own_system(own_system: type[ReferringModel], tmp_path) -> None:
    assert "test_own_small" in models.list_models("*own*")
    model = models.create("test_own_small", text__size=30)
    assert type(model) is own_system and model.text_encoder.vocab_size == 30 and model.spec.tokenizer == "clip"
    image, text = batch((32, 40), words=5, vocabulary=30)
    edges = torch.full((1,), 0.5)
    prediction = model(image, text, {"edges": edges})
    # By hand: each stage multiplies by the mean of the words that are read, and the context is added.
    words = model.text_encoder.table.weight[text.ids]
    sentence = torch.stack([words[0].mean(0), words[1, :2].mean(0)])[:, None, None, :]
    x = nn.functional.avg_pool2d(image, 8)
    for convolution in model.image_encoder.convolutions:
        x = (convolution(x).permute(0, 2, 3, 1) * sentence + 0.5).permute(0, 3, 1, 2)
    torch.testing.assert_close(prediction.mask, x.mean(dim=1))
    torch.testing.assert_close(prediction.extra["first"], words)
    assert model.needs == ("edges",) and prediction.presence is None
    models.save(model, tmp_path / "own.safetensors")
    again = models.load(tmp_path / "own.safetensors")
    assert type(again) is own_system
    torch.testing.assert_close(again(image, text, {"edges": edges}).mask, prediction.mask)


def test_missing_context_is_named(own_system: type[ReferringModel]) -> None:
    model = models.create("test_own_small")
    image, text = batch((32, 40), words=5, vocabulary=30)
    for context in (None, {}, {"other": image}):
        with pytest.raises(ValueError, match="context lacks edges, which this model needs"):
            model(image, text, context)
        with pytest.raises(ValueError, match="context lacks edges"):
            model.encode(image, text, context)


def test_presence_is_a_part_of_any_model(own_system: type[ReferringModel]) -> None:
    """On a head that does not say; LAVT's masks are then emptied where nothing is named."""
    image, text = batch()
    model = models.create("lavt_tiny").eval()
    with torch.no_grad():
        means = model.encode(image, text).maps[0][:, 0].mean(dim=(1, 2))
        threshold = means.mean().item()
        gated = models.create("lavt_tiny", presence={"kind": "test_bright", "threshold": threshold}).eval()
        gated.load_state_dict(model.state_dict())
        prediction = gated(image, text)
        found, plain = gated.predict(image, *text), model.predict(image, *text)
    torch.testing.assert_close(prediction.presence, means - threshold)
    assert not prediction.presence_weighs
    for item in range(2):
        assert torch.equal(found[item], plain[item] if means[item] >= threshold else torch.zeros_like(plain[item]))
    assert sorted((means >= threshold).tolist()) == [False, True]


def test_wrong_combinations_are_refused_when_read(own_system: type[ReferringModel]) -> None:
    with pytest.raises(ValueError, match="one width; got 8 and 6"):
        models.preset_config("test_own_small", image__width=8)
    with pytest.raises(ValueError, match=r"stride 8, twice; got \(4, 8, 16, 32\)"):
        models.preset_config("lavt_tiny", head={"kind": "test_last"})
    with pytest.raises(ValueError, match="presence: the head 'mask2former' says it already"):
        models.preset_config("magnet_tiny", presence={"kind": "test_bright"})


def test_names_are_taken_once(own_system: type[ReferringModel]) -> None:
    parts = {role: {"kind": kind} for role, kind in PARTS.items()}

    class Second(ReferringModel):
        pass

    with pytest.raises(ValueError, match="'test_own' is registered already"):
        models.register("test_own", presets={"other": parts})(Second)
    with pytest.raises(ValueError, match="'magnet_tiny' is registered already"):
        models.register("test_second", presets={"magnet_tiny": parts})(Second)
    assert "test_second" not in registry_module._systems

    class OtherSwin(ImageConfig):
        kind: Literal["swin"] = "swin"

    with pytest.raises(ValueError, match="the image part 'swin' is .*SwinConfig already"):
        part(OtherSwin)


def test_parts_without_published_weights_say_so(own_system: type[ReferringModel]) -> None:
    with pytest.raises(ValueError, match="MeanImage has no published weights"):
        models.create("test_own_small", pretrained=True)
    with pytest.raises(ValueError, match="Table has no published weights"):
        models.create("test_own_small", pretrained={"image": False})
