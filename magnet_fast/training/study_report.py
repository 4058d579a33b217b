"""What a study found: a table in Markdown, a summary in JSON, and a picture of means and spreads."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from magnet_fast.atomic import write_atomically, write_text_atomically
from magnet_fast.evaluation import TASKS
from magnet_fast.models.files import read_json
from magnet_fast.training.study_tables import COLOURS, Runs, markdown, spread
from magnet_fast.training.study_words import by_kind, hidden_words, plot_words

_NAMES = {"val": "val (all kinds)", "testA": "testA (attributes)", "testB": "testB (relations)"}


def write_report(out: Path, titles: dict[str, str], against: dict[str, str], result: str) -> Path:
    """Write `table.md`, `results.json` and `plot.png` from all finished runs below `out`.

    Where runs hid words of known kinds, `words.png` as well.

    Args:
        titles: rows of the table, by the name of their folder, in order.
        against: by the name of a row, that of the row it is compared with.
        result: name of a run's file.

    Raises:
        FileNotFoundError: no run is finished.
    """
    runs = {
        name: sorted(
            (read_result(path) for path in (out / name).glob(f"seed-*/{result}")),
            key=lambda run: run["seed"],
        )
        for name in titles
    }
    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        raise FileNotFoundError(f"{out}: no finished run of a study")
    table = _table(runs, titles, against)
    write_text_atomically(out / "results.json", summary(runs))
    write_atomically(out / "plot.png", lambda file: _plot(runs, titles).save(file, format="PNG"))
    worded = by_kind(runs)
    if worded:
        write_atomically(out / "words.png", lambda file: plot_words(worded, titles).save(file, format="PNG"))
    write_text_atomically(out / "table.md", table)
    return out / "table.md"


def read_result(path: Path) -> dict[str, Any]:
    """A finished run's file. Raises ValueError, with the path, for what no run of a study has written."""
    found = read_json(path)
    lacking = [key for key in _RESULT if not isinstance(found.get(key), _RESULT[key])]
    if lacking:
        raise ValueError(
            f"{path}: not the result of a run, for want of {', '.join(lacking)}; remove it, and the study writes it "
            "anew"
        )
    return found


_RESULT = {"seed": int, "config": dict, "scores": dict, "machine": dict}


def summary(runs: Runs) -> str:
    """The file `results.json`: what all runs share said once, then a line for each run.

    "machine" is theirs, its date the first and the last; "config" what is the same in every configuration, "how" in
    every scoring. Under "rows", by name: what of the configuration is the row's own, and its runs with their scores,
    to four significant digits; null where a kind of sentence has no such score. All of it is in the runs' own files.
    """
    every = [run for found in runs.values() for run in found]
    machine = dict(every[0]["machine"])
    for key in machine:
        values = sorted({str(run["machine"][key]) for run in every})
        machine[key] = machine[key] if len(values) == 1 else [values[0], values[-1]] if key == "date" else values
    configs = [run["config"] for run in every]
    shared = {key: value for key, value in configs[0].items() if all(one.get(key) == value for one in configs)}
    scored = next(iter(every[0]["scores"].values()))
    head = {
        "machine": machine,
        "config": shared,
        "how": {key: value for key, value in scored.items() if isinstance(value, str)},
    }
    rows = []
    for name, found in runs.items():
        config = {key: value for key, value in found[0]["config"].items() if key not in (*shared, "seed")}
        apart = ("variant", "config", "machine")
        lines = [_short({key: run[key] for key in run if key not in apart}, _score_names(runs)) for run in found]
        body = ",\n".join("    " + json.dumps(line, separators=(",", ":")) for line in lines)
        rows.append(f'  {json.dumps(name)}: {{"config": {json.dumps(config)}, "runs": [\n{body}\n  ]}}')
    return json.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + ",\n".join(rows) + "\n }\n}\n"


def _short(value: Any, by_kind: tuple[str, ...]) -> Any:
    """Without texts, rounded; of kinds of sentences the scores `by_kind` and their number alone."""
    if isinstance(value, dict):
        kept = {
            key: _short(one, by_kind) for key, one in value.items() if not isinstance(one, str) and key != "by_kind"
        }
        kinds = value.get("by_kind", {})
        if kinds:
            wanted = (*by_kind, "sentences")
            kept["by_kind"] = {
                kind: {key: _short(one, by_kind) for key, one in scores.items() if key in wanted}
                for kind, scores in kinds.items()
            }
        return kept
    if isinstance(value, float):
        return None if isnan(value) else float(f"{value:.4g}")
    return value


def _table(runs: Runs, titles: dict[str, str], against: dict[str, str]) -> str:
    every = [run for found in runs.values() for run in found]
    splits, best = _shared_splits(runs), _score_names(runs)[0]
    parts = [_introduction(every), _by_split(runs, titles)]
    again = "The same weights on the split of validation, "
    if any("without_presence" in run for run in every):
        parts += [f"{again}what they say of presence ignored:", _again(runs, titles, "without_presence")]
    if all("shuffled" in run for run in every):
        parts += [f"{again}its sentences swapped between pictures (a control):", _again(runs, titles, "shuffled")]
    if splits and any(run["scores"][splits[0]]["by_kind"] for run in every):
        parts += [f"By kind of sentence, {splits[0]}:", _by_kind(runs, titles, splits[0])]
    parts += hidden_words(runs, titles)
    pairs = [(name, against[name]) for name in runs if against.get(name) in runs]
    for split in splits[1:] or splits if pairs else ():
        parts.append(
            f"Each row against the one it changes, {split} {best}, means of the differences of runs of one seed:"
        )
        lines = [(titles[name], titles[base], _differences(runs, base, name, split, best)) for name, base in pairs]
        parts.append("\n".join(f"- {row}, against {other}: {text}" for row, other, text in lines))
    seconds = [run["training_seconds"] for run in every]
    parts.append(f"A run took {min(seconds):.0f} to {max(seconds):.0f} s of training.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _by_split(runs: Runs, titles: dict[str, str]) -> str:
    columns = [(split, score) for split in _shared_splits(runs) for score in _score_names(runs)]

    def scores(found: list[dict[str, Any]]) -> list[str]:
        return [spread([run["scores"][split][score] for run in found]) for split, score in columns]

    head = ["variant", "seeds", *(f"{_label(split)} {score}" for split, score in columns)]
    return markdown(head, [[titles[name], str(len(found)), *scores(found)] for name, found in runs.items()])


def _again(runs: Runs, titles: dict[str, str], key: str) -> str:
    """Scores of one split by runs that have them under `key`."""
    names = _score_names(runs)
    rows = [
        [titles[row], *(spread([run[key][name] for run in found]) for name in names)]
        for row, found in runs.items()
        if all(key in run for run in found)
    ]
    return markdown(["variant", *names], rows)


def _by_kind(runs: Runs, titles: dict[str, str], split: str) -> str:
    def scores(run: dict[str, Any]) -> dict[str, Any]:
        return run["scores"][split]["by_kind"]

    every = [scores(run) for found in runs.values() for run in found]
    columns = []  # a kind may have no such score as the task's: sentences that name nothing have no overlap
    for kind in sorted({kind for found in every for kind in found}):
        for score in _score_names(runs):
            if not any(isnan(found[kind][score]) for found in every):
                columns.append((kind, score))
                break
    rows = [
        [titles[name], *(spread([scores(run)[kind][score] for run in found]) for kind, score in columns)]
        for name, found in runs.items()
    ]
    return markdown(["variant", *(f"{kind} {score}" for kind, score in columns)], rows)


def _shared_splits(runs: Runs) -> list[str]:
    every = [run["scores"] for found in runs.values() for run in found]
    return [split for split in every[0] if all(split in scores for scores in every)]


def _score_names(runs: Runs) -> tuple[str, ...]:
    """The scores of the table: the one that decides in the runs' task, and the others that say what it is about."""
    task = TASKS[next(iter(runs.values()))[0]["config"]["task"]]
    return (task.best, *(name for name in task.scores if name != task.best and "@" not in name))


def _label(split: str) -> str:
    return _NAMES.get(split, split)


def _introduction(every: list[dict[str, Any]]) -> str:
    config, machine = every[0]["config"], every[0]["machine"]
    machines = sorted({run["machine"]["gpu"] or run["machine"]["processor"] for run in every})
    dates = sorted(run["machine"]["date"] for run in every)
    side = config["data"]["image_size"]
    size = f"{side}×{side} pixels" if side else "the model's own size"
    return (
        f"{len(every)} runs of {every[0]['steps']} steps, batch {config['batch_size']}, {size}; the last "
        "weights of each, at the input's resolution; mean ± standard deviation over seeds. "
        f"{'; '.join(machines)}, {machine['threads']} thread(s), torch {machine['torch']}, {dates[0]} to {dates[-1]}."
    )


def _differences(runs: Runs, base: str, row: str, split: str, score: str) -> str:
    before, now = ({run["seed"]: run["scores"][split][score] for run in runs[name]} for name in (base, row))
    pairs = [now[seed] - before[seed] for seed in now if seed in before]
    if not pairs:
        return "no seed in common"
    if min(len(before), len(now)) < 2:
        return f"{mean(pairs):+.2f}"
    largest = max(stdev(before.values()), stdev(now.values()))
    verdict = "more" if abs(mean(pairs)) > largest else "not more"
    return f"{mean(pairs):+.2f}, {verdict} than the spread over seeds ({largest:.2f})"


def _plot(runs: Runs, titles: dict[str, str]) -> Image.Image:
    """A band for each variant; in it, by split, a dot for every seed and a bar at the mean."""
    splits, best = _shared_splits(runs), _score_names(runs)[0]
    colours = {split: COLOURS[number % len(COLOURS)] for number, split in enumerate(splits)}
    values = [run["scores"][split][best] for found in runs.values() for run in found for split in splits]
    low, high = min(values), max(values)
    margin = max(1.0, 0.05 * (high - low))
    low, high = max(0.0, low - margin), high + margin
    width, left, right, line = 1000, 300, 30, 18
    band = line * len(splits) + 14
    picture = Image.new("RGB", (width, 70 + band * len(runs)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    heading, x = f"{best}, percent; a dot for each seed, a bar at the mean:", 10.0
    pen.text((x, 8), heading, "black", font)
    x += pen.textlength(heading, font) + 16
    for split in splits:
        pen.text((x, 8), _label(split), colours[split], font)
        x += pen.textlength(_label(split), font) + 16
    for tick in range(int(low) + 1, int(high) + 1):
        if tick % 5 == 0:
            pen.line((place(tick), 46, place(tick), picture.height - 8), "#dddddd")
            pen.text((place(tick) - 6, 30), str(tick), "black", font)
    for row, (name, found) in enumerate(runs.items()):
        top = 52 + band * row
        pen.text((10, top + line * (len(splits) - 1) / 2), titles[name], "black", font)
        for number, split in enumerate(splits):
            scores = [run["scores"][split][best] for run in found]
            y = top + line * number + line / 2
            middle = place(mean(scores))
            pen.rectangle((middle - 2, y - 7, middle + 1, y + 7), fill=colours[split])
            for score in scores:
                pen.ellipse((place(score) - 3, y - 3, place(score) + 3, y + 3), fill=colours[split])
    return picture
