"""What commands share: options, a progress bar, files that are whole at every moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image

    from magnet_fast.checkpoints import Checkpoint
    from magnet_fast.data import ExpressionDataset


class Precision(str, Enum):  # noqa: UP042 (StrEnum is younger than Python 3.10)
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="A run's .safetensors, a released .pth, a folder of save_pretrained, hub:owner/name; photos, which ships; "
        "the shipped model of drawn scenes if left out.",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="vocab.txt or its folder; needed for released .pth and for BERT-sized models."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BackendOption = Annotated[str | None, typer.Option(help="Operators' backend: reference, cpu, triton, cuda or auto.")]
DtypeOption = Annotated[
    Precision,
    typer.Option(
        help="Of weights and features; float16 on a GPU only, int8 on a CPU only. Masks are float32 in any case."
    ),
]
LocalRankOption = Annotated[
    int | None,
    typer.Option("--local-rank", "--local_rank", hidden=True, help="Added by python -m torch.distributed.launch."),
]
FastOption = Annotated[bool, typer.Option(help="Accelerate the model; --no-fast runs it as its paper writes it.")]
DataRoot = Annotated[Path, typer.Option("--data", help="Folder of the data.")]
DatasetOption = Annotated[str, typer.Option(help="Folder below the root: refcoco, refcoco+, refcocog, grefcoco, ….")]
SplitByOption = Annotated[str, typer.Option(help="Whose split: unc, umd, google.")]
SplitOption = Annotated[str, typer.Option(help="val, testA, testB, test, train, or another that the data name.")]
FormatOption = Annotated[
    str | None, typer.Option(help="refer, phrasecut, complex_queries or regions; told from the files if left out.")
]
ImagesOption = Annotated[
    list[str] | None, typer.Option(help="Folder of the images, below the root or absolute; the field's if left out.")
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Side of the square that images are brought to; the checkpoint's own if left out.", min=8, max=4096
    ),
]
ReferencesOption = Annotated[
    Path | None, typer.Option(help="File of `data retrieve`, for models that read the picture found for a sentence.")
]


def open_dataset(
    loaded: Checkpoint,
    root: Path,
    dataset: str,
    split_by: str,
    split: str,
    tokenizer: str | None,
    image_size: int | None,
    images: list[str] | None,
    *,
    format: str | None = None,
    original: bool = False,
    truth: str | None = None,
    protocol: str = "family",
    references: Path | None = None,
) -> ExpressionDataset:
    """A split, prepared as the checkpoint's model asks for, with the protocol's ground truth unless `truth` says which;
    `image_size` changes the model's specification."""
    from magnet_fast.data import ExpressionDataset
    from magnet_fast.data.datasets import open_reader
    from magnet_fast.data.retrieval import RetrievalDataset
    from magnet_fast.evaluation.protocol import choose_truth

    reader = open_reader(root, dataset, split_by, format=format, images=images)
    if split not in reader.splits:
        raise ValueError(f"--split: {root} has no split {split!r}; it has {', '.join(reader.splits)}")
    if image_size is not None:
        loaded.model.spec = loaded.model.spec._replace(size=image_size)
    chosen = loaded.tokenizer(tokenizer)
    spec = loaded.model.spec
    truth = choose_truth(truth, protocol, reader, spec.fit)
    options = {"original": original, "truth": truth, "needs": loaded.model.needs}
    if references is not None:
        return RetrievalDataset(reader, split, chosen, spec, references=references, **options)
    return ExpressionDataset(reader, split, chosen, spec, **options)


@contextmanager
def progress_bar(title: str, enabled: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with rate and time left on a terminal, nothing elsewhere; yields what is called with (done, in all)."""
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


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format that its name says, making its folder."""
    import io

    from PIL import Image as PillowImage

    from magnet_fast.atomic import write_atomically

    # In memory first: some of Pillow's encoders write by themselves, and do not say why that fails.
    encoded = io.BytesIO()
    picture.save(encoded, format=PillowImage.EXTENSION[path.suffix.lower()])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(encoded.getbuffer()))


def save_text(text: str, path: Path) -> None:
    """Write text as UTF-8, making its folder."""
    from magnet_fast.atomic import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def check_picture_name(path: Path | None) -> None:
    """ValueError, before anything is computed, for a name whose ending is no picture format that can be written."""
    from PIL import Image as PillowImage

    PillowImage.init()
    if path is None:
        return
    if PillowImage.EXTENSION.get(path.suffix.lower()) not in PillowImage.SAVE:
        raise ValueError(f"{path}: not the name of a picture; end it in .png or .jpg")


def chosen_backend(name: str | None) -> AbstractContextManager:
    """Force the operators' backend for a block; None forces none."""
    from magnet_fast import ops

    if name is None:
        return nullcontext()
    chosen = ops.backend(name)
    if name != "auto" and name not in ops.available_backends():
        raise ValueError(f"--backend: {name!r} cannot run here; {', '.join(ops.available_backends())} can")
    return chosen
