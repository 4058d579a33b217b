"""`magnet-fast data`: make data, import one's own, or check what is there."""

from __future__ import annotations

import json
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import FormatOption, ImagesOption, progress_bar
from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_files, check_folder

_RECIPE = "magnet_tiny_scenes"  # needs no download

data_app = typer.Typer(help="Make data, import your own, or check what is there.", no_args_is_help=True)


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
    image_size: Annotated[int, typer.Option(help="Side of the pictures.", min=64, max=4096)] = 128,
    negatives: Annotated[int, typer.Option(help="At most so many sentences a referent that fit nothing.", min=0)] = 0,
    several: Annotated[int, typer.Option(help="At most so many sentences a picture that name several.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes; the files do not depend on it.", min=1)] = 1,
) -> None:
    """Draw embedded scenes with unambiguous expressions."""
    from magnet_fast.data.scenes import write_scenes

    check_folder("--out", out)
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


@data_app.command("import")
@user_errors
def import_(
    source: Annotated[
        Path, typer.Argument(help="Table (.csv, .tsv, .jsonl), COCO's or Label Studio's .json, CVAT's .xml, or folder.")
    ],
    out: Annotated[Path, typer.Option(help="Root of the data, for --data; pictures are not copied to it.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; the source's own, or images in it, if left out.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Name of the new folder below OUT.")] = "own",
    val: Annotated[float, typer.Option(help="Share of the pictures for the split val.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the pictures for the split test.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what is wrong, and list it.")] = False,
) -> None:
    """Make a data set of your own pictures, masks and sentences; all is checked before anything is written."""
    from magnet_fast.data.importing import ImportProblemsError, import_data

    check_folder("--out", out)
    try:
        with progress_bar("checking rows") as progress:
            report = import_data(
                source, out, images=images, dataset=dataset, val=val, test=test, seed=seed, skip_bad=skip_bad,
                progress=progress,
            )  # fmt: skip
    except ImportProblemsError as error:
        for problem in error.problems:
            typer.echo(f"problem: {problem}", err=True)
        raise ValueError(
            f"{source}: expected data without a problem, got {len(error.problems)}, listed above; nothing is written; "
            "--skip-bad goes on without them"
        ) from error
    for problem in report.left_out:
        typer.echo(f"left out: {problem}", err=True)
    for split, (pictures, objects, sentences) in report.counts.items():
        typer.echo(f"{split}: {pictures} images, {objects} objects, {sentences} sentences")
    if report.several:
        typer.echo(f"{report.several} sentences name several objects of their image")
    typer.echo(f"{report.folder}: written; the images stay in {report.image_root}")
    typer.echo(f"to train on it: {_training(report.folder, report.counts)}")


def _training(folder: Path, counts: dict[str, tuple[int, int, int]]) -> str:
    """The command that trains the demo's model on imported data, for a shell."""
    from magnet_fast.training import load_config

    words = ["magnet-fast", "train", "--config", _RECIPE, "--data", str(folder.parent)]
    words += ["--set", f"data.dataset={folder.name}"]
    sentences = counts["train"][2]
    if sentences < load_config(_RECIPE).batch_size:
        words += ["--set", f"batch_size={sentences}"]
    if "val" not in counts:
        words += ["--set", "validate_every=never"]
    return shlex.join([*words, "--out", f"runs/{folder.name}"])


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


@data_app.command()
@user_errors
def retrieve(
    config: Annotated[str, typer.Option(help="As of train: whose model compares, over which data.")],
    out: Annotated[Path, typer.Option(help="The file to write, .json; name it in training by data.references.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data; data.root of the configuration.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change an entry, as of train.")
    ] = None,
) -> None:
    """Find a picture of the training split for every sentence, by its words and its image."""
    from magnet_fast.data.references import find_references, write_references
    from magnet_fast.training import load_config
    from magnet_fast.training.building import build_model, build_tokenizer
    from magnet_fast.training.datasets import open_readers
    from magnet_fast.training.distributed import pick_device
    from magnet_fast.training.randomness import seed_everything

    overrides = [f"data.root={json.dumps(str(data))}"] if data is not None else []
    settings = load_config(config, [*overrides, *(set_ or [])])
    check_files({"--out": out}, {})
    reader, *_ = open_readers(settings)
    seed_everything(settings.seed)
    model = build_model(settings)
    tokenizer = build_tokenizer(settings, model)
    pool = settings.data.train_split
    with progress_bar("comparing images") as progress:
        found = find_references(model.to(pick_device(settings.device)), tokenizer, reader, pool, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_references(out, found, pool)
    for split, references in found.items():
        typer.echo(f"{split}: {len(references)} sentences, {len(set(references.values()))} pictures of {pool}")
    typer.echo(f"to train with it: --set data.references={shlex.quote(str(out))}")
