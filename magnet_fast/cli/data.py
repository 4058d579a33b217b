"""`magnet-fast data`: make data, or check what is there."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import FormatOption, ImagesOption, progress_bar
from magnet_fast.cli.errors import user_errors

data_app = typer.Typer(help="Make data, or check what is there.", no_args_is_help=True)


class Level(str, Enum):  # noqa: UP042 (StrEnum is younger than Python 3.10)
    """How hard embedded scenes are."""

    easy = "easy"
    hard = "hard"


@data_app.command()
@user_errors
def scenes(
    out: Annotated[Path, typer.Option(help="Folder of the data, in REFER's layout.")],
    images: Annotated[int, typer.Option(help="Pictures over all splits.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    level: Annotated[Level, typer.Option(help="easy: 2-4 objects; hard: 5-10, all kinds of sentences.")] = Level.easy,
    image_size: Annotated[int, typer.Option(help="Side of the pictures.")] = 128,
    negatives: Annotated[int, typer.Option(help="At most so many sentences a referent that fit nothing.", min=0)] = 0,
    several: Annotated[int, typer.Option(help="At most so many sentences a picture that name several.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes; the files do not depend on it.", min=1)] = 1,
) -> None:
    """Draw embedded scenes with unambiguous expressions."""
    from magnet_fast.data.scenes import write_scenes

    write_scenes(
        out,
        images,
        seed,
        level=level.value,
        image_size=image_size,
        negatives=negatives,
        several=several,
        workers=workers,
    )
    typer.echo(str(out))


@data_app.command()
@user_errors
def check(
    data: Annotated[Path, typer.Option(help="Root of the data.")],
    dataset: Annotated[
        str, typer.Option(help="refcoco, refcoco+, refcocog, or any folder of a known layout.")
    ] = "refcoco",
    split_by: Annotated[str, typer.Option(help="unc; umd or google for refcocog.")] = "unc",
    format: FormatOption = None,
    images: ImagesOption = None,
    masks: Annotated[bool, typer.Option(help="Decode every mask, too.")] = True,
) -> None:
    """Verify a data folder: files, counts against the published ones, images, masks."""
    from magnet_fast.data.check import check_data

    with progress_bar("checking images") as progress:
        report = check_data(data, dataset, split_by, format=format, images=images, masks=masks, progress=progress)
    for split, (refs, sentences, pictures) in report.counts.items():
        typer.echo(f"{split}: {refs} refs, {sentences} sentences, {pictures} images")
    for note in report.notes:
        typer.echo(f"note: {note}")
    for problem in report.problems:
        typer.echo(f"problem: {problem}", err=True)
    if report.problems:
        raise typer.Exit(1)
    typer.echo(f"{report.where}: complete")
