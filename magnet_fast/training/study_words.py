"""A study's part about Mask Grounding: hidden words said right, by kind of word, with sight and without."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from magnet_fast.data.scenes.word_kinds import KINDS
from magnet_fast.training.study_tables import COLOURS, Runs, markdown, spread

_SIGHTS = {
    "accuracy": "image and mask",
    "without_image": "grey image",
    "without_mask": "empty mask",
    "without_image_and_mask": "neither",
}
_WIDTH, _LEFT, _RIGHT, _LINE = 1000, 300, 30, 15


def hidden_words(runs: Runs, titles: dict[str, str]) -> list[str]:
    """Paragraphs and tables about the runs that hid words; none where none did."""
    runs = {name: found for name, found in runs.items() if all("hidden_words" in run for run in found)}
    if not runs:
        return []
    every = [run["hidden_words"] for found in runs.values() for run in found]
    names = {**_SIGHTS, "most_frequent": "always the most frequent word", "uniform": "uniform guess"}
    columns = [key for key in names if all(key in one for one in every)]
    rows = [
        [titles[name], *(spread([run["hidden_words"][key] for run in found]) for key in columns)]
        for name, found in runs.items()
    ]
    parts = [
        "Hidden words said right, percent, by the last weights given image and mask, a grey image, an empty mask, or "
        "neither. A blind control was trained with neither.",
        markdown(["variant", *(names[key] for key in columns)], rows),
    ]
    runs = by_kind(runs)
    if runs:
        parts += ["The same by kind of word:", _by_kind(runs, titles)]
    return parts


def by_kind(runs: Runs) -> Runs:
    """The rows whose runs all tell words apart by kind."""
    return {
        name: found for name, found in runs.items() if all(run.get("hidden_words", {}).get("kinds") for run in found)
    }


def plot_words(runs: Runs, titles: dict[str, str]) -> Image.Image:
    """A band for each row of `by_kind`; in it, by kind of word, dots for seeds: full with sight, open without.

    A blind control has open ones alone. A tick is the most frequent word's share.
    """
    kinds = _kinds(runs)
    band = _LINE * len(kinds) + 14
    picture = Image.new("RGB", (_WIDTH, 70 + band * len(runs)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def place(value: float) -> float:
        return _LEFT + value / 100 * (_WIDTH - _LEFT - _RIGHT)

    heading, x = "hidden words said right, percent; full: with image and mask, open: with neither:", 10.0
    pen.text((x, 8), heading, "black", font)
    x += pen.textlength(heading, font) + 16
    for kind, colour in zip(kinds, COLOURS, strict=False):
        pen.text((x, 8), kind, colour, font)
        x += pen.textlength(kind, font) + 12
    for tick in range(0, 101, 10):
        pen.line((place(tick), 46, place(tick), picture.height - 8), "#dddddd")
        pen.text((place(tick) - 6, 30), str(tick), "black", font)
    for row, (name, found) in enumerate(runs.items()):
        top = 52 + band * row
        pen.text((10, top + _LINE * (len(kinds) - 1) / 2), titles[name], "black", font)
        for number, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
            y = top + _LINE * number + _LINE / 2
            own = [run["hidden_words"]["kinds"][kind] for run in found if kind in run["hidden_words"]["kinds"]]
            tick = place(mean(one["most_frequent"] for one in own)) if own else None
            if tick is not None:
                pen.line((tick, y - 6, tick, y + 6), "#999999")
            for one in own:
                _dot(pen, place(one["without_image_and_mask"]), y, colour, full=False)
                if not _blind(found[0]):
                    _dot(pen, place(one["accuracy"]), y, colour, full=True)
    return picture


def _by_kind(runs: Runs, titles: dict[str, str]) -> str:
    kinds = _kinds(runs)
    first = next(iter(runs.values()))

    def line(title: str, given: str, found: Sequence[dict[str, Any]], key: str) -> list[str]:
        own = [run["hidden_words"]["kinds"] for run in found]
        return [title, given, *(spread([one.get(kind, {}).get(key, float("nan")) for one in own]) for kind in kinds)]

    counts = [first[0]["hidden_words"]["kinds"].get(kind, {}).get("words", 0) for kind in kinds]
    rows = [
        ["words", "", *map(str, counts)],
        line("always the kind's most frequent word", "nothing", first, "most_frequent"),
    ]
    for name, found in runs.items():
        keys = ["without_image_and_mask"] if _blind(found[0]) else list(_SIGHTS)
        rows += [line(titles[name], _SIGHTS[key], found, key) for key in keys]
    return markdown(["variant", "given", *kinds], rows)


def _kinds(runs: Runs) -> list[str]:
    found = {kind for row in runs.values() for run in row for kind in run["hidden_words"]["kinds"]}
    return [kind for kind in KINDS if kind in found]


def _blind(run: dict[str, Any]) -> bool:
    return run["config"]["terms"]["grounding"]["blind"]


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, colour: str, *, full: bool) -> None:
    pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour if full else None, outline=colour, width=1)
