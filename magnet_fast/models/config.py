"""Configurations: what a checkpoint must know to build its model again, part by part."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator
from torch import nn

from magnet_fast.models.contract import MAX_INPUT_SIDE, InputSpec

ROLES = ("image", "text", "fusion", "head", "presence")
"""What parts a model is made of."""

_parts: dict[str, dict[str, type[PartConfig]]] = {role: {} for role in ROLES}


class Settings(BaseModel):
    """Settings that are checked when they are read, and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shapes(NamedTuple):
    """What a head and a presence are built for.

    Attributes:
        channels: of each map that the fusion gives.
        strides: pixels of the image a pixel of each map.
        text_width: channels of a word.
        sentence_width: channels of the whole sentence.
        tokens: channels of the tokens beside each map; None for one without.
        pixels: channels of the head's `Prediction.pixels`; None where it gives none, and for the head itself.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    text_width: int
    sentence_width: int
    tokens: tuple[int | None, ...]
    pixels: int | None = None


class PartConfig(Settings):
    """One part of a model: its settings, and how it is built. `kind` names it within its role."""

    role: ClassVar[str]
    kind: str


class ImageConfig(PartConfig):
    """An image encoder."""

    role: ClassVar[str] = "image"

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the map of each stage."""
        raise NotImplementedError

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image a pixel of each map, to each side."""
        raise NotImplementedError

    @property
    def in_stream(self) -> bool:
        """Whether what a fusion adds to a stage's stream reaches the next stage."""
        return True

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation that images are normalised with: ImageNet's unless said."""
        return InputSpec().mean, InputSpec().std

    def build(self) -> nn.Module:
        """An `ImageEncoder`."""
        raise NotImplementedError


class TextConfig(PartConfig):
    """A text encoder."""

    role: ClassVar[str] = "text"

    @property
    def width(self) -> int:
        """Channels of a word."""
        raise NotImplementedError

    @property
    def sentence_width(self) -> int:
        """Channels of the whole sentence; those of a word unless said."""
        return self.width

    @property
    def tokenizer(self) -> str:
        """As in `InputSpec`."""
        return "wordpiece"

    def check(self, image: ImageConfig) -> None:
        """Raise a ValueError for an image encoder that this one cannot run beside."""

    def build(self) -> nn.Module:
        """A `TextEncoder`."""
        raise NotImplementedError


class FusionConfig(PartConfig):
    """What brings words and pixels together, stage by stage."""

    role: ClassVar[str] = "fusion"

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        """Raise a ValueError for encoders that this fusion cannot work on."""

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        """Channels of the maps that the head gets; those of the image encoder unless said."""
        return image.channels

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        """Strides of the maps that the head gets; those of the image encoder unless said."""
        return image.strides

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        """Channels of the tokens beside each map that the head gets; None for one without, as all are unless said."""
        return (None,) * len(self.channels(image))

    def build(self, image: ImageConfig, text: TextConfig) -> nn.Module:
        """A `Fusion`."""
        raise NotImplementedError


class HeadConfig(PartConfig):
    """What makes masks of the stages' outputs."""

    role: ClassVar[str] = "head"
    says_presence: ClassVar[bool] = False

    def pixel_channels(self, shapes: Shapes) -> int | None:
        """Channels of `Prediction.pixels`; None for a head that gives none."""
        return None

    def check(self, shapes: Shapes) -> None:
        """Raise a ValueError for maps or tokens that this head cannot read."""

    def build(self, shapes: Shapes) -> nn.Module:
        """A `Head`."""
        raise NotImplementedError


class PresenceConfig(PartConfig):
    """What says whether anything is named, for a head that does not."""

    role: ClassVar[str] = "presence"

    def check(self, shapes: Shapes) -> None:
        """Raise a ValueError for what this part cannot read."""

    def build(self, shapes: Shapes) -> nn.Module:
        """A `Presence`."""
        raise NotImplementedError


class InputConfig(Settings):
    """How images and expressions are prepared: an `InputSpec`, in which None takes what the encoders ask for."""

    size: int = Field(480, ge=8, le=MAX_INPUT_SIDE)
    fit: Literal["squash", "letterbox", "longest"] = "squash"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    tokenizer: str | None = None
    max_tokens: int = Field(20, ge=3)
    threshold: float = Field(0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _positive_deviation(self) -> InputConfig:
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be above 0")
        return self


def part(config: type[PartConfig]) -> type[PartConfig]:
    """Make a part known by its `kind`; a decorator of its configuration.

    Raises:
        ValueError: another configuration of that role has this kind.
    """
    (kind,) = get_args(config.model_fields["kind"].annotation)
    known = _parts[config.role].setdefault(kind, config)
    if known.__qualname__ != config.__qualname__ or known.__module__ != config.__module__:
        raise ValueError(f"kind: the {config.role} part {kind!r} is {known.__module__}.{known.__qualname__} already")
    _parts[config.role][kind] = config
    return config


def part_kinds(role: str) -> dict[str, type[PartConfig]]:
    """The configurations of a role, by kind."""
    return dict(_parts[role])


def read_part(role: str) -> BeforeValidator:
    """The union of all parts of a role, told apart by `kind`. It is open: a part may be registered at any time.

    For a field that holds a part: `Annotated[SerializeAsAny[FusionConfig], read_part("fusion")]`.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get("kind")
        if kind not in _parts[role]:
            raise ValueError(f"kind: no {role} part {kind!r}; known are {', '.join(sorted(_parts[role]))}")
        return _parts[role][kind].model_validate(value)

    return BeforeValidator(read)


class ModelConfig(Settings):
    """A whole model. `architecture` is the name of the system that it belongs to."""

    architecture: str
    image: Annotated[SerializeAsAny[ImageConfig], read_part("image")]
    text: Annotated[SerializeAsAny[TextConfig], read_part("text")]
    fusion: Annotated[SerializeAsAny[FusionConfig], read_part("fusion")]
    head: Annotated[SerializeAsAny[HeadConfig], read_part("head")]
    presence: Annotated[SerializeAsAny[PresenceConfig] | None, read_part("presence")] = None
    input: InputConfig = InputConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        self.text.check(self.image)
        self.fusion.check(self.image, self.text)
        shapes = self.shapes
        self.head.check(shapes)
        if self.presence is not None:
            if self.head.says_presence:
                raise ValueError(f"presence: the head {self.head.kind!r} says it already; leave it out")
            self.presence.check(shapes._replace(pixels=self.head.pixel_channels(shapes)))
        return self

    @property
    def shapes(self) -> Shapes:
        """What head and presence get from encoders and fusion."""
        image, text, fusion = self.image, self.text, self.fusion
        maps = fusion.channels(image), fusion.strides(image)
        return Shapes(*maps, text.width, text.sentence_width, fusion.tokens(image))

    @property
    def spec(self) -> InputSpec:
        """How images and expressions are prepared for this model."""
        mean, std = self.image.normalisation
        given = self.input.model_dump()
        defaults = {"mean": mean, "std": std, "tokenizer": self.text.tokenizer}
        return InputSpec(**{key: defaults[key] if value is None else value for key, value in given.items()})

    def same_model(self, other: ModelConfig) -> bool:
        """Whether both describe the same parts, however images and expressions are prepared."""
        return not self.differences(other)

    def differences(self, other: ModelConfig) -> list[tuple[str, Any, Any]]:
        """Settings in which the parts of two models differ, however images and expressions are prepared.

        Returns:
            (name, here, there), in the configuration's order: ("image.embed_dim", 96, 128). A part of another kind is
            one difference. Empty for the same model.
        """
        return _differences("", self.model_dump(exclude={"input"}), other.model_dump(exclude={"input"}))


def _differences(name: str, here: Any, there: Any) -> list[tuple[str, Any, Any]]:
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return [] if here == there else [(name, here, there)]
    if here.get("kind") != there.get("kind"):
        return [(f"{name}.kind", here.get("kind"), there.get("kind"))]
    below = f"{name}." if name else ""
    return [
        difference
        for key in [*here, *(key for key in there if key not in here)]
        for difference in _differences(f"{below}{key}", here.get(key), there.get(key))
    ]
