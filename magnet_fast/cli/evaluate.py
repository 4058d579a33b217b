"""`magnet-fast evaluate`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import (
    BackendOption,
    CheckpointOption,
    DataRoot,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    FastOption,
    FormatOption,
    ImageSizeOption,
    ImagesOption,
    LocalRankOption,
    Precision,
    ReferencesOption,
    SplitByOption,
    SplitOption,
    TokenizerOption,
    chosen_backend,
    open_dataset,
    progress_bar,
    save_text,
)
from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_files, check_not_of_the_data


class Resolution(str, Enum):  # noqa: UP042 (StrEnum is younger than Python 3.10)
    """Where predictions are compared with the ground truth."""

    input = "input"
    original = "original"


class Truth(str, Enum):  # noqa: UP042
    """How the ground truth comes to the model's square."""

    resized = "resized"
    polygons = "polygons"


@user_errors
def evaluate(
    data: DataRoot,
    checkpoint: CheckpointOption = None,
    dataset: DatasetOption = "refcoco",
    split_by: SplitByOption = "unc",
    split: SplitOption = "val",
    format: FormatOption = None,
    images: ImagesOption = None,
    task: Annotated[
        str, typer.Option(help="Which scores: single, generalized (none or several), robust (negatives), region.")
    ] = "single",
    protocol: Annotated[
        str, typer.Option(help="How masks are made and IoUs read: family (LAVT, MagNet), gres (ReLA), cris.")
    ] = "family",
    resolution: Annotated[
        Resolution, typer.Option(help="Compare at the model's square, or at the image's own size.")
    ] = Resolution.input,
    truth: Annotated[
        Truth | None,
        typer.Option(help="Masks at the square: resized, or drawn there from polygons. None: the protocol's."),
    ] = None,
    references: ReferencesOption = None,
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
    fast: FastOption = True,
    backend: BackendOption = None,
    local_rank: LocalRankOption = None,
) -> None:
    """Score a checkpoint by a task's own scores and protocol; under torchrun, on several processes."""
    from rich.console import Console

    from magnet_fast import checkpoints, evaluation
    from magnet_fast.evaluation.machine import measured_on
    from magnet_fast.inference import prepared_model
    from magnet_fast.training.distributed import distributed_world, take_local_rank

    take_local_rank(local_rank)
    check_files({"--out": out}, {"--checkpoint": checkpoint, "--tokenizer": tokenizer, "--references": references})
    loaded = checkpoints.load(checkpoint)
    sentences = open_dataset(
        loaded,
        data,
        dataset,
        split_by,
        split,
        tokenizer,
        image_size,
        images,
        format=format,
        original=resolution.value == "original",
        truth=truth and truth.value,
        protocol=protocol,
        references=references,
    )
    check_not_of_the_data(out, sentences, split)
    if shuffle_expressions:
        sentences.shuffle_expressions(seed)
    with chosen_backend(backend), distributed_world(device) as world:
        # Packed: many images, and the weights stay.
        model = prepared_model(loaded.model.to(world.device), dtype.value, fast=fast, pack=True)
        with progress_bar("evaluating", enabled=world.is_main) as advance:
            scores = evaluation.evaluate(
                model,
                sentences,
                batch_size,
                task=task,
                protocol=protocol,
                resolution=resolution.value,
                workers=workers,
                limit=limit,
                progress=advance,
                fast=fast,
            )
        if not world.is_main:
            return
        expressions = "shuffled between images (control)" if shuffle_expressions else "as annotated"
        results = {
            "checkpoint": loaded.source,
            "data": str(data),
            "dataset": dataset,
            "split_by": split_by,
            "split": split,
            "expressions": expressions,
            "dtype": dtype.value,
            **scores,
            "machine": measured_on(),
        }
        table = evaluation.score_table(results, f"{dataset} {split} ({split_by})", f"expressions {expressions}")
        console = Console()
        # Off a terminal rich would fold the table into 80 columns.
        console.print(table) if console.is_terminal else Console(width=120).print(table)
        if out is not None:
            save_text(json.dumps(results, indent=2) + "\n", out)
