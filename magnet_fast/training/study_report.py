"""What a study found: a table in Markdown, all numbers in JSON, and a picture of means and spreads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from magnet_fast.training.checkpoint import write_atomically

Runs = dict[str, list[dict[str, Any]]]  # by variant, in the order of their seeds

_COLOURS = {"val": "#7b8794", "testA": "#2878c8", "testB": "#c05020"}
_NAMES = {"val": "val (all kinds)", "testA": "testA (attributes)", "testB": "testB (relations)"}


def write_report(out: Path, titles: dict[str, str], against: dict[str, str], result: str) -> Path:
    """Write ``table.md``, ``results.json`` and ``plot.png`` from all finished runs below ``out``.

    Args:
        titles: rows of the table, by the name of their folder, in order.
        against: by the name of a row, that of the row it is compared with.
        result: name of a run's file.

    Raises:
        FileNotFoundError: no run is finished.
    """
    runs = {
        name: sorted(
            (json.loads(path.read_text()) for path in (out / name).glob(f"seed-*/{result}")),
            key=lambda run: run["seed"],
        )
        for name in titles
    }
    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        raise FileNotFoundError(f"{out}: no finished run of a study")
    table = _table(runs, titles, against)
    write_atomically(out / "results.json", lambda file: file.write((json.dumps(runs, indent=1) + "\n").encode()))
    write_atomically(out / "plot.png", lambda file: _plot(runs, titles).save(file, format="PNG"))
    write_atomically(out / "table.md", lambda file: file.write(table.encode()))
    return out / "table.md"


def _table(runs: Runs, titles: dict[str, str], against: dict[str, str]) -> str:
    every = [run for found in runs.values() for run in found]
    parts = [_introduction(every), _by_split(runs, titles)]
    if all("val" in run["scores"] for run in every):
        parts += ["By kind of sentence, val, oIoU:", _by_kind(runs, titles)]
    worded = {name: found for name, found in runs.items() if "hidden_words" in found[0]}
    if worded:
        parts += [
            "Hidden words said right, val, percent. Without image and mask: the same weights, given a grey image and "
            "no mask; the blind control was trained so, too.",
            _hidden_words(worded, titles),
        ]
    pairs = [(name, against[name]) for name in runs if against.get(name) in runs]
    if pairs and all("testB" in run["scores"] for run in every):
        parts.append("Each row against the one it changes, testB oIoU, means of the differences of runs of one seed:")
        parts.append(
            "\n".join(
                f"- {titles[name]}, against {titles[base]}: {_difference(runs[base], runs[name])}"
                for name, base in pairs
            )
        )
    seconds = [run["training_seconds"] for run in every]
    parts.append(f"A run took {min(seconds):.0f} to {max(seconds):.0f} s of training.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _by_split(runs: Runs, titles: dict[str, str]) -> str:
    columns = [(split, score) for split in _shared_splits(runs) for score in ("oIoU", "mIoU")]

    def scores(found: list[dict[str, Any]]) -> list[str]:
        return [spread([run["scores"][split][score] for run in found]) for split, score in columns]

    head = ["variant", "seeds", *(f"{_NAMES[split]} {score}" for split, score in columns)]
    return _markdown(head, [[titles[name], str(len(found)), *scores(found)] for name, found in runs.items()])


def _by_kind(runs: Runs, titles: dict[str, str]) -> str:
    def scores(run: dict[str, Any]) -> dict[str, Any]:
        return run["scores"]["val"]["by_kind"]

    kinds = sorted({kind for found in runs.values() for run in found for kind in scores(run)})
    rows = [
        [titles[name], *(spread([scores(run)[kind]["oIoU"] for run in found]) for kind in kinds)]
        for name, found in runs.items()
    ]
    return _markdown(["variant", *kinds], rows)


def _hidden_words(runs: Runs, titles: dict[str, str]) -> str:
    columns = ("accuracy", "without_image_and_mask", "most_frequent", "uniform")
    rows = [
        [titles[name], *(spread([run["hidden_words"][column] for run in found]) for column in columns)]
        for name, found in runs.items()
    ]
    names = ["as trained", "without image and mask", "most frequent word", "uniform guess"]
    return _markdown(["variant", *names], rows)


def _shared_splits(runs: Runs) -> list[str]:
    return [split for split in _NAMES if all(split in run["scores"] for found in runs.values() for run in found)]


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    return f"{mean(values):.2f}" if len(values) == 1 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def _introduction(every: list[dict[str, Any]]) -> str:
    config, machine = every[0]["config"], every[0]["machine"]
    machines = sorted({run["machine"]["gpu"] or run["machine"]["processor"] for run in every})
    dates = sorted(run["machine"]["date"] for run in every)
    side = config["data"]["image_size"]
    return (
        f"{len(every)} runs of {every[0]['steps']} steps, batch {config['batch_size']}, {side}×{side} pixels; the last "
        "weights of each, at the input's resolution; mean ± standard deviation over seeds. "
        f"{'; '.join(machines)}, {machine['threads']} thread(s), torch {machine['torch']}, {dates[0]} to {dates[-1]}."
    )


def _difference(base: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    before, now = ({run["seed"]: run["scores"]["testB"]["oIoU"] for run in group} for group in (base, found))
    pairs = [now[seed] - before[seed] for seed in now if seed in before]
    if not pairs:
        return "no seed in common"
    if min(len(before), len(now)) < 2:
        return f"{mean(pairs):+.2f}"
    largest = max(stdev(before.values()), stdev(now.values()))
    verdict = "more" if abs(mean(pairs)) > largest else "not more"
    return f"{mean(pairs):+.2f}, {verdict} than the spread over seeds ({largest:.2f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = "|".join(["---", *("---:" for _ in head[1:])])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _plot(runs: Runs, titles: dict[str, str]) -> Image.Image:
    """A band for each variant; in it, by split, a dot for every seed and a bar at the mean."""
    splits = _shared_splits(runs)
    values = [run["scores"][split]["oIoU"] for found in runs.values() for run in found for split in splits]
    low, high = min(values), max(values)
    margin = max(1.0, 0.05 * (high - low))
    low, high = max(0.0, low - margin), high + margin
    width, left, right, line = 1000, 300, 30, 18
    band = line * len(splits) + 14
    picture = Image.new("RGB", (width, 70 + band * len(runs)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    x = 10.0
    pen.text((x, 8), "oIoU, percent; a dot for each seed, a bar at the mean:", "black", font)
    x += pen.textlength("oIoU, percent; a dot for each seed, a bar at the mean:", font) + 16
    for split in splits:
        pen.text((x, 8), _NAMES[split], _COLOURS[split], font)
        x += pen.textlength(_NAMES[split], font) + 16
    for tick in range(int(low) + 1, int(high) + 1):
        if tick % 5 == 0:
            pen.line((place(tick), 46, place(tick), picture.height - 8), "#dddddd")
            pen.text((place(tick) - 6, 30), str(tick), "black", font)
    for row, (name, found) in enumerate(runs.items()):
        top = 52 + band * row
        pen.text((10, top + line * (len(splits) - 1) / 2), titles[name], "black", font)
        for number, split in enumerate(splits):
            scores = [run["scores"][split]["oIoU"] for run in found]
            y = top + line * number + line / 2
            middle = place(mean(scores))
            pen.rectangle((middle - 2, y - 7, middle + 1, y + 7), fill=_COLOURS[split])
            for score in scores:
                pen.ellipse((place(score) - 3, y - 3, place(score) + 3, y + 3), fill=_COLOURS[split])
    return picture
