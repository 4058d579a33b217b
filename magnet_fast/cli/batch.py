"""`magnet-fast segment --input`: many pictures into a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from magnet_fast.cli.common import progress_bar
from magnet_fast.cli.outputs import Inputs, check_files, check_folder

if TYPE_CHECKING:
    from magnet_fast.inference import Segmenter

_LISTED = 20
_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended


def segment_many(
    inputs: Inputs,
    expression: str | None,
    out: Path,
    format: str,
    resume: bool,
    workers: int,
    load: Callable[[], Segmenter],
) -> None:
    """Segment the rows of a table, or the pictures of a folder, `--input` of the inputs, by what `load` loads once the
    rows are read.

    Exit status 1 where some rows failed, 130 after Ctrl-C.
    """
    from magnet_fast.batch import COCO, ERRORS, LINES, MASKS, Results, read_rows, segment_rows

    source = Path(inputs["--input"])
    # What lies in a folder of pictures and is no picture may be called as a file of results is.
    read = {name: path for name, path in inputs.items() if not (path == source and source.is_dir())}
    check_folder("--out", out)
    for name in (LINES, COCO, ERRORS):
        check_files({"--out": out / name}, read)
    rows = read_rows(source, expression)
    masks = (out / MASKS).resolve()
    if any(folder.resolve() == masks for folder in {row.path.parent for row in rows}):
        raise ValueError(
            f"--out: pictures of {source} lie in {out / MASKS}, where masks are written; name another folder"
        )
    segmenter = load()
    if segmenter.lacking:
        needed = ", ".join(segmenter.lacking)
        raise ValueError(f"--checkpoint: its model needs {needed} beside a picture, which --input does not give")
    with Results(out, rows, format, resume) as results:
        before = len(results.done)
        try:
            with progress_bar("segmenting") as advance:
                failed = segment_rows(segmenter, rows, results, workers, advance)
        except KeyboardInterrupt:
            done = f"{len(results.done)} of {len(rows)} rows are done"
            typer.echo(f"stopped: {done}; the same command with --resume goes on", err=True)
            raise typer.Exit(_INTERRUPTED) from None
    for one in failed[:_LISTED]:
        typer.echo(f"problem: row {one.row.number}, {one.row.image}: {one.error}", err=True)
    earlier = f", {before} of them before" if before else ""
    typer.echo(f"{out}: {len(results.done)} of {len(rows)} rows{earlier}")
    if failed:
        typer.echo(f"{len(failed)} failed, listed in {out / ERRORS}; --resume tries them again", err=True)
        raise typer.Exit(1)
