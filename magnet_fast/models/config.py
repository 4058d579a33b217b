"""Model configurations: what a checkpoint must know to build its model again."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageEncoderConfig(_Config):
    """A Swin transformer (version 1): channels double and resolution halves from stage to stage."""

    embed_dim: int = Field(128, gt=0, description="channels of the first stage")
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    num_heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    window_size: int = Field(12, gt=0, description="side of an attention window, in tokens")
    drop_path: float = Field(0.3, ge=0, lt=1, description="stochastic depth of the last block; grows linearly")
    absolute_position: bool = Field(False, description="add a sine position to the patches (Swin's option 'ape')")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.embed_dim * 2**stage for stage in range(4))

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> ImageEncoderConfig:
        for stage, (channels, heads) in enumerate(zip(self.channels, self.num_heads, strict=True)):
            if channels % heads:
                raise ValueError(f"num_heads[{stage}]={heads} does not divide the stage's {channels} channels")
        return self


class TextEncoderConfig(_Config):
    """A BERT encoder; its layers run in four equal slices, one for each image stage."""

    vocab_size: int = Field(30522, gt=0)
    hidden_size: int = Field(768, gt=0)
    num_layers: int = Field(12, gt=0)
    num_heads: int = Field(12, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    max_positions: int = Field(512, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> TextEncoderConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        if self.num_layers % 4:
            raise ValueError(f"num_layers={self.num_layers} must be a multiple of 4: one slice for each stage")
        return self


class AlignmentConfig(_Config):
    """The cross-modal alignment module between a stage of the image and a slice of the text."""

    kind: Literal["pwam", "xmha"] = "pwam"
    masking: Literal["correct", "released"] = "correct"
    fusion_heads: tuple[int, int, int, int] = (1, 1, 1, 1)
    pyramid: tuple[int, ...] = Field((1, 2, 3, 6), description="sides of the pooled levels; () for none, an ablation")
    head_dim: int = Field(32, gt=0, description="channels per head, alignment 'xmha' only")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _known_combination(self) -> AlignmentConfig:
        if self.kind == "xmha" and self.masking == "released":
            raise ValueError("masking='released' reproduces the released PWAM form; use it with kind='pwam'")
        return self


class MaskDecoderConfig(_Config):
    """Mask2Former's pixel decoder and one-query mask decoder (MagNet)."""

    width: int = Field(256, gt=0)
    num_heads: int = Field(8, gt=0)
    points: int = Field(4, gt=0, description="sampling points per level and head")
    pixel_layers: int = Field(4, gt=0)
    pixel_feedforward: int = Field(1024, gt=0)
    mask_layers: int = Field(9, gt=0)
    mask_feedforward: int = Field(2048, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> MaskDecoderConfig:
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4 and of num_heads={self.num_heads}")
        return self


class MagNetConfig(_Config):
    """Configuration of a MagNet."""

    architecture: Literal["magnet"] = "magnet"
    image: ImageEncoderConfig = ImageEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    decoder: MaskDecoderConfig = MaskDecoderConfig()

    @model_validator(mode="after")
    def _pyramid_divides_channels(self) -> MagNetConfig:
        levels = len(self.alignment.pyramid)
        if levels and self.image.embed_dim % levels:
            raise ValueError(
                f"alignment.pyramid has {levels} levels, which must divide image.embed_dim={self.image.embed_dim}"
            )
        return self


class LAVTConfig(_Config):
    """Configuration of a LAVT."""

    architecture: Literal["lavt"] = "lavt"
    image: ImageEncoderConfig = ImageEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    fusion_heads: tuple[int, int, int, int] = (1, 1, 1, 1)
    dropout: float = Field(0.0, ge=0, lt=1)


ModelConfig = MagNetConfig | LAVTConfig
