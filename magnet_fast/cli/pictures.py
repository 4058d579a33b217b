"""`magnet-fast segment`, `edit` and `contact-sheet`: masks, and what is made of them, to look at."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magnet_fast.cli.batch import segment_many
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
    Precision,
    SplitByOption,
    SplitOption,
    TokenizerOption,
    check_picture_name,
    chosen_backend,
    open_dataset,
    save_picture,
)
from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_files, check_not_of_the_data

if TYPE_CHECKING:
    from magnet_fast.inference import Segmentation, Segmenter


class MaskFormat(str, Enum):  # noqa: UP042 (StrEnum is younger than Python 3.10)
    """How masks of many pictures are written."""

    png = "png"
    rle = "rle"
    coco = "coco"
    jsonl = "jsonl"


StoredPixelsOption = Annotated[
    bool,
    typer.Option("--stored-pixels", help="Pixels as stored: not turned upright, transparent parts not on white."),
]
KeepMaskOption = Annotated[
    bool, typer.Option("--keep-mask", help="The mask as drawn, also where the model says that nothing is named.")
]
_TRANSPARENT = (".png", ".webp", ".tif", ".tiff")


@user_errors
def segment(
    context: typer.Context,
    image: Annotated[Path | None, typer.Argument(help="The picture.")] = None,
    expression: Annotated[str | None, typer.Argument(help="What to segment, in words.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The mask, white on black, at the image's size: mask.png if left out; with --input a folder, results."
        ),
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Also the image with the mask laid over it.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="Many pictures: a .csv, .tsv or .jsonl with the columns image and sentence, or a folder."),
    ] = None,
    for_all: Annotated[
        str | None, typer.Option("--expression", help="With a folder: what to segment in all its pictures.")
    ] = None,
    format: Annotated[
        MaskFormat | None,
        typer.Option(help="With --input; png if left out. rle: lines of COCO RLE; coco: one file of results."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --input: skip the rows that are done.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="With --input: rows in one forward pass, 16 if left out.", min=1)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="With --input: threads that read pictures, 2 if left out.", min=1)
    ] = None,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Precision.float32,
    fast: FastOption = True,
    stored_pixels: StoredPixelsOption = False,
    keep_mask: KeepMaskOption = False,
    backend: BackendOption = None,
) -> None:
    """Segment what a sentence names in a picture, turned upright as viewers show it; or in many, with --input."""
    from PIL import Image

    from magnet_fast import visualize
    from magnet_fast.data.transforms import as_rgb, as_shown, orientation
    from magnet_fast.inference import BATCH_SIZE, Segmenter
    from magnet_fast.training.distributed import pick_device

    def load(pack: bool) -> Segmenter:
        return Segmenter.from_checkpoint(
            checkpoint,
            pick_device(device),
            tokenizer,
            image_size,
            dtype.value,
            fast=fast,
            pack=pack,
            stored_pixels=stored_pixels,
            keep_masks=keep_mask,
            batch_size=batch_size or BATCH_SIZE,
        )

    _check_quoted(expression, context.args)
    single = {"IMAGE": image, "EXPRESSION": expression, "--overlay": overlay}
    many = {"--expression": for_all, "--format": format, "--resume": resume or None}
    many |= {"--batch-size": batch_size, "--workers": workers}
    other = {name for name, value in (single if input is not None else many).items() if value is not None}
    if other:
        raise ValueError(f"{min(other)}: expected {'without' if input is not None else 'with'} --input only")
    if input is not None:
        chosen = (MaskFormat.png if format is None else format).value
        with chosen_backend(backend):
            read = {"--input": input, "--checkpoint": checkpoint, "--tokenizer": tokenizer}
            segment_many(read, for_all, out or Path("results"), chosen, resume, workers or 2, lambda: load(pack=True))
        return
    if image is None or expression is None:
        raise ValueError("expected IMAGE and EXPRESSION, or --input")
    _check_order(image, expression)
    out = out or Path("mask.png")
    check_picture_name(out)
    check_picture_name(overlay)
    check_files(
        {"--out": out, "--overlay": overlay}, {"IMAGE": image, "--checkpoint": checkpoint, "--tokenizer": tokenizer}
    )
    turned = 1 if stored_pixels else orientation(image)
    picture = as_rgb(image) if stored_pixels else as_shown(image)
    segmenter = load(pack=False)
    with chosen_backend(backend):
        found = segmenter(picture, expression)
    save_picture(Image.fromarray(found.mask.astype("uint8") * 255), out)
    if overlay is not None:
        save_picture(visualize.overlay(picture, found.mask), overlay)
    share, highest = 100 * found.mask.mean(), found.probability.max()
    typer.echo(f"{out}: {share:.1f} % of the image, highest probability {highest:.2f}")
    _say(found, turned, segmenter)


@user_errors
def edit(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="The picture.")],
    expression: Annotated[str, typer.Argument(help="What to edit, in words.")],
    operation: Annotated[
        str, typer.Option(help="colour=#ff0000, blur, grey, brightness=1.4, cut-out or background=FILE.")
    ],
    feather: Annotated[int, typer.Option(help="Pixels over which it sets in, inside the mask.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The edited picture.")] = Path("edited.png"),
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Precision.float32,
    fast: FastOption = True,
    stored_pixels: StoredPixelsOption = False,
    keep_mask: KeepMaskOption = False,
    backend: BackendOption = None,
) -> None:
    """Edit what a sentence names in a picture, and nothing else in it."""
    import numpy as np
    from PIL import Image

    from magnet_fast import editing
    from magnet_fast.data.transforms import as_rgb, as_shown, orientation
    from magnet_fast.inference import Segmenter
    from magnet_fast.training.distributed import pick_device

    _check_quoted(expression, context.args)
    check_picture_name(out)
    _check_order(image, expression)
    name, _, value = operation.partition("=")
    background = value if name == "background" else None
    read = {"IMAGE": image, "--operation": background, "--checkpoint": checkpoint, "--tokenizer": tokenizer}
    check_files({"--out": out}, read)
    change = editing.find(operation)
    tried = editing.edited(Image.new("RGB", (1, 1)), np.ones((1, 1), bool), change, feather)
    if tried.mode == "RGBA" and out.suffix.lower() not in _TRANSPARENT:
        raise ValueError(f"{out}: {operation} needs a format with transparency; end it in .png")
    turned = 1 if stored_pixels else orientation(image)
    picture = as_rgb(image) if stored_pixels else as_shown(image)
    segmenter = Segmenter.from_checkpoint(
        checkpoint, pick_device(device), tokenizer, image_size, dtype.value, fast=fast, pack=False, keep_masks=keep_mask
    )
    with chosen_backend(backend):
        found = segmenter(picture, expression)
    save_picture(editing.edited(picture, found.mask, change, feather), out)
    typer.echo(f"{out}: {100 * found.mask.mean():.1f} % of the image")
    _say(found, turned, segmenter)


@user_errors
def contact_sheet(
    data: DataRoot,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("contact-sheet.png"),
    checkpoint: CheckpointOption = None,
    dataset: DatasetOption = "refcoco",
    split_by: SplitByOption = "unc",
    split: SplitOption = "val",
    format: FormatOption = None,
    images: ImagesOption = None,
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

    from magnet_fast import checkpoints, visualize
    from magnet_fast.inference import Segmenter
    from magnet_fast.training.distributed import pick_device

    check_picture_name(out)
    check_files({"--out": out}, {"--checkpoint": checkpoint, "--tokenizer": tokenizer})
    loaded = checkpoints.load(checkpoint)
    sentences = open_dataset(
        loaded, data, dataset, split_by, split, tokenizer, image_size, images, format=format, original=True
    )
    check_not_of_the_data(out, sentences, split)
    segmenter = Segmenter(loaded.model, sentences.tokenizer, device=pick_device(device), stored_pixels=True)
    chosen = sorted(random.Random(seed).sample(range(len(sentences)), min(rows, len(sentences))))
    examples = []
    with chosen_backend(backend):
        for index in chosen:
            record, picture = sentences.record(index), sentences.load_image(index)
            expression, truth = record["expression"], sentences[index]["original_mask"].numpy().astype(bool)
            try:
                mask = segmenter(picture, expression).mask
            except ValueError as error:
                raise ValueError(f"{data}: ref_id {record['ref_id']}, sent_id {record['sent_id']}: {error}") from error
            union = (mask | truth).sum()
            note = f"IoU {100 * (mask & truth).sum() / union if union else 0:.0f} %"
            examples.append(visualize.Example(picture, expression, truth, mask, note))
    title = f"{loaded.metadata.get('model_name', 'model')} on {dataset} {split}"
    save_picture(visualize.contact_sheet(examples, columns, title=title), out)
    typer.echo(str(out))


def _check_quoted(expression: str | None, more: list[str]) -> None:
    """ValueError where words follow the sentence, as they do without quotes."""
    if more:
        raise ValueError(
            f"EXPRESSION is {expression!r}, and more follows: {' '.join(more)!r}; expected one sentence, in quotes"
        )


def _check_order(image: Path, expression: str) -> None:
    """ValueError where the sentence stands in the picture's place, and the picture in its, or a folder there."""
    if os.path.isdir(image):
        raise ValueError(
            f"IMAGE is {str(image)!r}, a folder; expected a picture's file; for all in it: magnet-fast segment --input "
            "FOLDER --expression SENTENCE"
        )
    if not os.path.exists(image) and os.path.isfile(expression):  # of names too long for a Path, too
        raise ValueError(
            f"IMAGE is {str(image)!r}, which is no file, and EXPRESSION is {expression!r}, which is one; expected the "
            "picture first, then the sentence"
        )


def _say(found: Segmentation, turned: int, segmenter: Segmenter) -> None:
    """What else is to be known of a mask; `turned` is the picture's EXIF orientation."""
    if turned != 1:
        typer.echo(f"turned upright by its EXIF orientation, {turned}; --stored-pixels leaves it as stored")
    if found.present is False:
        typer.echo(f"nothing of that kind is in the picture ({1 - found.presence:.2f})")
    elif not found.mask.any():
        typer.echo(f"nothing found: no pixel's probability exceeds {segmenter.spec.threshold:g}")
