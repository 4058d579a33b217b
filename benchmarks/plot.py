"""Draw a results file: python -m benchmarks.plot benchmarks/results/FILE.json docs/benchmarks.png [--suite NAME]

Bars of ratios by group, one section a suite; a thin line under a bar shows how near the run came to the machine's
ceilings (the copy of a large tensor, a 2048³ matrix product), whichever of the two is nearer.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks import COMPILED, PACKED

WIDTH, LABELS, VALUES, ROW, GAP, SECTION = 1100, 175, 300, 22, 34, 34
COLOURS = {
    "plain": "#9aa5b1",
    "plain SDPA": "#7b8794",
    "SDPA": "#7b8794",
    "reference": "#e0a030",
    "torch.compile": "#a05cc0",
    COMPILED: "#7040a0",
    PACKED: "#184f90",
    "cpu window attention": "#6aaee8",
    "cpu": "#2878c8",
    "auto": "#2878c8",
    "triton": "#2878c8",
    "FlexAttention": "#50b090",
    "OpenVINO": "#50b090",
    "ONNX Runtime": "#2f7f66",
}
_CEILING = "#c03030"


def draw(results: dict) -> Image.Image:
    """Bars by suite and group; a bar's length is how many times as fast as the group's baseline the path is."""
    suites = [(name, list(rows)) for name, rows in groupby(results["rows"], key=lambda row: row.get("suite", ""))]
    height = 62 + sum(_section_height(rows) for _, rows in suites)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen, font, bold = ImageDraw.Draw(picture), ImageFont.load_default(13), ImageFont.load_default(15)
    pen.text((10, 8), _caption(results["machine"]), "black", font)
    pen.text((10, 26), _legend(results.get("ceilings")), "black", font)
    y = 46
    for suite, rows in suites:
        y += SECTION // 2
        pen.text((10, y), suite.replace("_", " "), "black", ImageFont.load_default(18))
        y += SECTION // 2
        scale = (WIDTH - LABELS - VALUES) / max(row["ratio"] or 1.0 for row in rows)
        for name, members in groupby(rows, key=lambda row: row["group"]):
            pen.text((10, y + 10), name, "black", bold)
            y += GAP
            for row in members:
                _row(pen, font, row, y, scale)
                y += ROW
    return picture


def _row(pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, row: dict, y: int, scale: float) -> None:
    pen.text((20, y + 2), row["path"], "black", font)
    end = LABELS + scale * (row["ratio"] or 0.0)
    pen.rectangle((LABELS, y + 3, max(LABELS, end), y + ROW - 6), fill=COLOURS.get(row["path"], "#555555"))
    text = (f"{row['ratio']:.2f}x   " if row["ratio"] else "") + _time(row["median_seconds"])
    share = nearest_ceiling(row)
    if share is not None:
        name, value = share
        full = WIDTH - LABELS - VALUES
        pen.rectangle((LABELS, y + ROW - 5, LABELS + full * min(1.0, value), y + ROW - 4), fill=_CEILING)
        text += f"   {100 * value:.0f} % of {name}"
    if row.get("peak_bytes"):
        text += f"   {row['peak_bytes'] / 2**20:.0f} MiB"
    pen.text((end + 6, y + 2), text, "black", font)


def nearest_ceiling(row: dict) -> tuple[str, float] | None:
    """("copy" or "product", share) of the ceiling that the run came nearest to; None where neither was measured."""
    shares = {name: row[f"{name}_share"] for name in ("copy", "product") if f"{name}_share" in row}
    return max(shares.items(), key=lambda item: item[1]) if shares else None


def _section_height(rows: list[dict]) -> int:
    return SECTION + GAP * len(list(groupby(rows, key=lambda row: row["group"]))) + ROW * len(rows)


def _caption(machine: dict) -> str:
    if machine.get("driver"):  # measured on a GPU
        where = f"{machine['gpu']}, driver {machine['driver']}, Triton {machine['triton']}"
    else:
        where = f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}"
    head = "Times as fast as the baseline (longer is better)."
    return f"{head} {where}, torch {machine['torch']}, {machine['date']}"


def _legend(ceilings: dict | None) -> str:
    if not ceilings:
        return ""
    products = ", ".join(f"{ceilings[name] / 1e9:.0f} {name}" for name in ("float32", "bfloat16"))
    return (
        f"Red line: share of the nearer ceiling, full width = 100 %: copy {ceilings['copy'] / 1e9:.1f} GB/s, "
        f"matrix product GFLOP/s {products}"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a file that pytest benchmarks --results wrote")
    parser.add_argument("target", type=Path, help="the picture")
    parser.add_argument("--suite", help="only this one: magnet, window_attention, ...")
    arguments = parser.parse_args()
    results = json.loads(arguments.source.read_text())
    if arguments.suite:
        results["rows"] = [row for row in results["rows"] if row.get("suite") == arguments.suite]
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    draw(results).save(arguments.target)


if __name__ == "__main__":
    main()
