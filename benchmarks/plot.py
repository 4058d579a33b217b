"""Draw a results file as bars of ratios: python -m benchmarks.plot benchmarks/results/FILE.json docs/benchmarks.png"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, LABELS, ROW, GAP = 1000, 175, 20, 34
COLOURS = {
    "plain": "#9aa5b1",
    "plain SDPA": "#7b8794",
    "reference": "#e0a030",
    "cpu window attention": "#6aaee8",
    "cpu": "#2878c8",
    "auto": "#2878c8",
}


def draw(results: dict) -> Image.Image:
    """Bars by group; a bar's length is how many times as fast as the group's baseline the path is."""
    groups = [(name, list(rows)) for name, rows in groupby(results["rows"], key=lambda row: row["group"])]
    height = 60 + sum(GAP + ROW * len(rows) for _, rows in groups)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen, font, bold = ImageDraw.Draw(picture), ImageFont.load_default(13), ImageFont.load_default(15)
    machine = results["machine"]
    caption = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}, torch {machine['torch']}"
    )
    pen.text((10, 10), f"Times as fast as the plain PyTorch path (longer is better). {caption}", "black", font)
    longest = max(row["ratio"] for row in results["rows"])
    scale = (WIDTH - LABELS - 190) / longest
    y = 32
    for name, rows in groups:
        pen.text((10, y + 10), name, "black", bold)
        y += GAP
        for row in rows:
            pen.text((20, y + 2), row["path"], "black", font)
            end = LABELS + scale * row["ratio"]
            pen.rectangle((LABELS, y + 3, end, y + ROW - 3), fill=COLOURS.get(row["path"], "#555555"))
            text = f"{row['ratio']:.2f}x   {1e3 * row['median_seconds']:.1f} ms"
            pen.text((end + 6, y + 2), text, "black", font)
            y += ROW
    return picture


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    target.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(source.read_text())).save(target)


if __name__ == "__main__":
    main()
