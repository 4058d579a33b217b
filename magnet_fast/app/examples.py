"""Scenes to try the page with, drawn as it starts."""

from __future__ import annotations

from PIL import Image

from magnet_fast.data.scenes import describe_scene


def drawn_scenes(count: int = 4, size: int = 256) -> list[tuple[Image.Image, str]]:
    """Embedded scenes, the same each time, each with two sentences about it, one a line."""
    scenes = []
    for number in range(count):
        scene = describe_scene(0, number, "hard", "val", size)
        texts = [referent.expressions[0].text for referent in scene.referents[:2]]
        scenes.append((Image.fromarray(scene.picture), "\n".join(texts)))
    return scenes
