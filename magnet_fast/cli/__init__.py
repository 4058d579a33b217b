"""The command line: ``magnet-fast``, or ``python -m magnet_fast``.

Commands import what they need when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import errors
from .errors import user_errors
from .study import study_app

if TYPE_CHECKING:
    from PIL import Image

    from magnet_fast.data import ExpressionDataset
    from magnet_fast.inference import LoadedCheckpoint

app = typer.Typer(
    help="Referring image segmentation: MagNet and its family on fused operators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make data, or check what is there.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")


class Resolution(str, Enum):  # noqa: UP042 (StrEnum is younger than Python 3.10)
    """Where predictions are compared with the ground truth."""

    input = "input"
    original = "original"


class Level(str, Enum):  # noqa: UP042
    """How hard embedded scenes are."""

    easy = "easy"
    hard = "hard"


class Precision(str, Enum):  # noqa: UP042
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Checkpoint = Annotated[
    Path | None,
    typer.Option(help="A run's .safetensors, or a released .pth; the shipped weights if left out."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="vocab.txt or its folder; needed for released .pth and for BERT-sized models."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BackendOption = Annotated[str | None, typer.Option(help="Operators' backend: reference, cpu, triton, cuda or auto.")]
DtypeOption = Annotated[
    Precision, typer.Option(help="Of weights and features; float16 on a GPU only. Masks are float32 in any case.")
]
DataRoot = Annotated[Path, typer.Option("--data", help="Folder of the data, in REFER's layout.")]
ImageSizeOption = Annotated[
    int | None, typer.Option(help="Side images are squashed to; the checkpoint's own if left out.", min=8)
]


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Referring image segmentation: MagNet and its family on fused operators."""
    errors.traceback_wanted = traceback


@app.command()
@user_errors
def train(
    config: Annotated[
        str, typer.Option(help="YAML file, or the name of a shipped configuration (magnet_tiny_scenes).")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoints and metrics of this run.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data; data.root of the configuration.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change an entry: optimiser.lr=1e-4."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that OUT holds.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--dry-run", help="Take a few steps; report memory, speed and time; write nothing.")
    ] = False,
    backend: BackendOption = None,
) -> None:
    """Train a model; under torchrun, on several processes. Exit status 75: stopped by SIGTERM, --resume goes on."""
    from magnet_fast.training import TrainingStopped, load_config
    from magnet_fast.training import train as run_training
    from magnet_fast.training.dry_run import dry_run
    from magnet_fast.training.stopping import EXIT_STATUS

    overrides = [*([f"data.root={json.dumps(str(data))}"] if data is not None else []), *(set_ or [])]
    settings = load_config(config, overrides)
    if out is None and not rehearse:
        raise ValueError("--out: no folder given for the run (only a --dry-run needs none)")
    with _backend(backend):
        if rehearse:
            report = dry_run(settings)
            if int(os.environ.get("RANK", "0")) == 0:
                typer.echo(report.text())
            return
        try:
            run_training(settings, out, resume=resume, overwrite=overwrite)
        except TrainingStopped as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(EXIT_STATUS) from None


@app.command()
@user_errors
def evaluate(
    data: DataRoot,
    checkpoint: Checkpoint = None,
    dataset: Annotated[str, typer.Option(help="Folder below the root: refcoco, refcoco+, refcocog.")] = "refcoco",
    split_by: Annotated[str, typer.Option(help="Whose split: unc, umd, google.")] = "unc",
    split: Annotated[str, typer.Option(help="val, testA, testB, test, train.")] = "val",
    resolution: Annotated[
        Resolution,
        typer.Option(help="Compare at the model's square (the family's protocol) or the image's own size."),
    ] = Resolution.input,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    shuffle_expressions: Annotated[
        bool, typer.Option("--shuffle-expressions", help="Control: sentences swapped between images.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the swap.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Score the first N sentences only.", min=1)] = None,
    workers: Annotated[int, typer.Option(help="Loader processes.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the scores as JSON.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Precision.float32,
    backend: BackendOption = None,
) -> None:
    """Score a checkpoint: oIoU, mIoU, P@0.5 ... P@0.9; under torchrun, on several processes."""
    from magnet_fast import evaluation
    from magnet_fast.inference import frozen_on_cpu, in_precision, load_checkpoint_model
    from magnet_fast.training.distributed import distributed_world

    loaded = load_checkpoint_model(checkpoint)
    sentences = _open_dataset(loaded, data, dataset, split_by, split, tokenizer, image_size)
    if shuffle_expressions:
        sentences.shuffle_expressions(seed)
    with _backend(backend), distributed_world(device) as world:
        with _progress("evaluating", enabled=world.is_main) as advance:
            scores = evaluation.evaluate(
                frozen_on_cpu(in_precision(loaded.model.to(world.device), dtype.value)),
                sentences,
                batch_size,
                resolution.value,
                workers=workers,
                limit=limit,
                progress=advance,
            )
        if not world.is_main:
            return
        results = {
            "checkpoint": loaded.source,
            "data": str(data),
            "dataset": dataset,
            "split_by": split_by,
            "split": split,
            "expressions": "shuffled between images (control)" if shuffle_expressions else "as annotated",
            "dtype": dtype.value,
            **scores,
        }
        _print_scores(results)
        if out is not None:
            _write(
                out,
                lambda temporary: temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8"),
            )


@app.command()
@user_errors
def segment(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    expression: Annotated[str, typer.Argument(help="What to segment, in words.")],
    out: Annotated[Path, typer.Option(help="The mask, white on black, at the image's size.")] = Path("mask.png"),
    overlay: Annotated[Path | None, typer.Option(help="Also the image with the mask laid over it.")] = None,
    checkpoint: Checkpoint = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Precision.float32,
    backend: BackendOption = None,
) -> None:
    """Segment what a sentence names in a picture."""
    from PIL import Image

    from magnet_fast import visualize
    from magnet_fast.data.transforms import open_image
    from magnet_fast.inference import Segmenter
    from magnet_fast.training.distributed import pick_device

    _check_picture_name(out)
    _check_picture_name(overlay)
    picture = open_image(image)
    segmenter = Segmenter.from_checkpoint(
        checkpoint, pick_device(device), tokenizer, image_size, dtype.value, freeze=False
    )
    with _backend(backend):
        found = segmenter(picture, expression)
    _save_picture(Image.fromarray(found.mask.astype("uint8") * 255), out)
    if overlay is not None:
        _save_picture(visualize.overlay(picture, found.mask), overlay)
    share, highest = 100 * found.mask.mean(), found.probability.max()
    typer.echo(f"{out}: {share:.1f} % of the image, highest probability {highest:.2f}")
    if not found.mask.any():
        typer.echo("nothing found: no pixel's probability exceeds 0.5")


@app.command("contact-sheet")
@user_errors
def contact_sheet(
    data: DataRoot,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("contact-sheet.png"),
    checkpoint: Checkpoint = None,
    dataset: Annotated[str, typer.Option()] = "refcoco",
    split_by: Annotated[str, typer.Option()] = "unc",
    split: Annotated[str, typer.Option()] = "val",
    rows: Annotated[int, typer.Option(help="Sentences shown.", min=1)] = 8,
    columns: Annotated[int, typer.Option(help="Rows beside each other.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Which sentences are drawn.")] = 0,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = None,
) -> None:
    """Draw image / expression / truth / prediction of some sentences of a split."""
    import random

    from magnet_fast import visualize
    from magnet_fast.inference import Segmenter, load_checkpoint_model
    from magnet_fast.training.distributed import pick_device

    _check_picture_name(out)
    loaded = load_checkpoint_model(checkpoint)
    sentences = _open_dataset(loaded, data, dataset, split_by, split, tokenizer, image_size)
    segmenter = Segmenter(loaded.model, sentences.tokenizer, image_size or loaded.image_size, pick_device(device))
    chosen = sorted(random.Random(seed).sample(range(len(sentences)), min(rows, len(sentences))))
    examples = []
    with _backend(backend):
        for index in chosen:
            record, picture = sentences.record(index), sentences.load_image(index)
            truth = sentences.original_mask(index).astype(bool)
            mask = segmenter(picture, record["expression"]).mask
            union = (mask | truth).sum()
            note = f"IoU {100 * (mask & truth).sum() / union if union else 0:.0f} %"
            examples.append(visualize.Example(picture, record["expression"], truth, mask, note))
    title = f"{loaded.metadata.get('model_name', 'model')} on {dataset} {split}"
    _save_picture(visualize.contact_sheet(examples, columns, title=title), out)
    typer.echo(str(out))


@data_app.command()
@user_errors
def scenes(
    out: Annotated[Path, typer.Option(help="Folder of the data, in REFER's layout.")],
    images: Annotated[int, typer.Option(help="Pictures over all splits.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    level: Annotated[Level, typer.Option(help="easy: 2-4 objects; hard: 5-10, all kinds of sentences.")] = Level.easy,
    image_size: Annotated[int, typer.Option(help="Side of the pictures.")] = 128,
    negatives: Annotated[int, typer.Option(help="Sentences a ref that name nothing, at most.", min=0)] = 0,
    several: Annotated[int, typer.Option(help="Sentences a picture that name several objects, at most.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes; the files do not depend on it.", min=1)] = 1,
) -> None:
    """Draw embedded scenes with unambiguous expressions."""
    from magnet_fast.data.scenes import write_scenes

    more = {"negatives": negatives, "several": several}
    write_scenes(out, images, seed, level=level.value, image_size=image_size, workers=workers, **more)
    typer.echo(str(out))


@data_app.command()
@user_errors
def check(
    data: Annotated[Path, typer.Option(help="Root of the data, in REFER's layout.")],
    dataset: Annotated[
        str, typer.Option(help="refcoco, refcoco+, refcocog, or any folder of that layout.")
    ] = "refcoco",
    split_by: Annotated[str, typer.Option(help="unc; umd or google for refcocog.")] = "unc",
    masks: Annotated[bool, typer.Option(help="Decode every mask, too.")] = True,
) -> None:
    """Verify a data folder: files, counts against the published ones, images, masks."""
    from magnet_fast.data.check import check_data

    with _progress("checking images", enabled=True) as progress:
        report = check_data(data, dataset, split_by, masks=masks, progress=progress)
    for split, (refs, sentences, images) in report.counts.items():
        typer.echo(f"{split}: {refs} refs, {sentences} sentences, {images} images")
    for problem in report.problems:
        typer.echo(f"problem: {problem}", err=True)
    if report.problems:
        raise typer.Exit(1)
    typer.echo(f"{report.where}: complete")


@app.command()
@user_errors
def info() -> None:
    """Say what is installed, and which backends the operators can run on here."""
    import platform

    import torch

    import magnet_fast
    from magnet_fast import models, ops
    from magnet_fast.training.config import shipped_configs

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines = {
        "magnet_fast": magnet_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "GPUs": ", ".join(devices) or "none",
        "models": ", ".join(models.presets()),
        "configurations": ", ".join(shipped_configs()),
    }
    for name, value in lines.items():
        typer.echo(f"{name:15} {value}")
    for operator in (
        "window_attention",
        "cross_modal_attention",
        "deformable_attention",
        "fused_deformable_attention",
        "pixel_contrastive_loss",
    ):
        typer.echo(f"{operator}: {', '.join(ops.available_backends(operator))}")


def _open_dataset(
    loaded: LoadedCheckpoint,
    root: Path,
    dataset: str,
    split_by: str,
    split: str,
    tokenizer: str | None,
    image_size: int | None,
) -> ExpressionDataset:
    from magnet_fast.data import ExpressionDataset, Refer

    refer = Refer(root, dataset=dataset, split_by=split_by)
    if split not in refer.splits:
        raise ValueError(f"--split: {root} has no split {split!r}; it has {', '.join(refer.splits)}")
    return ExpressionDataset(refer, split, loaded.tokenizer(tokenizer), image_size or loaded.image_size)


def _print_scores(results: dict[str, Any]) -> None:
    """The scores as a table, each under its name, in all and by kind of sentence."""
    from rich.console import Console
    from rich.table import Table

    names = [name for name in results if name in ("oIoU", "mIoU") or name.startswith("P@")]
    title = f"{results['dataset']} {results['split']} ({results['split_by']}), {results['sentences']} sentences"
    size = f" {results['image_size']}x{results['image_size']}" if results["resolution"] == "input" else ""
    table = Table(
        title=title,
        caption=f"{results['resolution']} resolution{size}; expressions {results['expressions']}; percent. "
        "oIoU = sum of intersections / sum of unions; mIoU = mean of the sentences' IoU",
    )
    table.add_column("sentences")
    table.add_column("count", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for label, scores in [("all", results), *results["by_kind"].items()]:
        table.add_row(label, str(scores["sentences"]), *(f"{scores[name]:.2f}" for name in names))
    console = Console()
    # Off a terminal rich would fold the table into 80 columns.
    console.print(table) if console.is_terminal else Console(width=120).print(table)


@contextmanager
def _progress(title: str, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with rate and time left on a terminal, nothing elsewhere; yields what evaluation calls."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name with the same suffix, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_picture(picture: Image.Image, path: Path) -> None:
    _write(path, picture.save)


def _check_picture_name(path: Path | None) -> None:
    """ValueError, before anything is computed, for a name whose ending is no picture format."""
    from PIL import Image as PillowImage

    PillowImage.init()
    if path is not None and path.suffix.lower() not in PillowImage.EXTENSION:
        raise ValueError(f"{path}: not the name of a picture; end it in .png or .jpg")


def _backend(name: str | None) -> Any:
    from magnet_fast import ops

    if name is None:
        return nullcontext()
    chosen = ops.backend(name)
    if name != "auto" and name not in ops.available_backends():
        raise ValueError(f"--backend: {name!r} cannot run here; {', '.join(ops.available_backends())} can")
    return chosen
