"""Settings of fusions that let words into some stages; the head gets the maps of those alone."""

from __future__ import annotations

from pydantic import Field

from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig


class StagesConfig(FusionConfig):
    """Which stages fuse; the others give the head nothing."""

    stages: tuple[int, ...] | None = Field(None, description="that fuse; none: all of them")

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        stages = self.fused(image)
        if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < len(image.channels):
            raise ValueError(
                f"fusion.stages={self.stages}: expected some of 0 to {len(image.channels) - 1} in order, each once"
            )

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return tuple(image.channels[stage] for stage in self.fused(image))

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return tuple(image.strides[stage] for stage in self.fused(image))

    def fused(self, image: ImageConfig) -> tuple[int, ...]:
        """Numbers of the stages that fuse."""
        return tuple(range(len(image.channels))) if self.stages is None else self.stages
