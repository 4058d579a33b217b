"""`magnet-fast segment` and `magnet-fast contact-sheet`: masks to look at."""

from __future__ import annotations

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


@user_errors
def segment(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    expression: Annotated[str, typer.Argument(help="What to segment, in words.")],
    out: Annotated[Path, typer.Option(help="The mask, white on black, at the image's size.")] = Path("mask.png"),
    overlay: Annotated[Path | None, typer.Option(help="Also the image with the mask laid over it.")] = None,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Precision.float32,
    fast: FastOption = True,
    stored_pixels: Annotated[
        bool,
        typer.Option("--stored-pixels", help="Pixels as stored: not turned upright, transparent parts not on white."),
    ] = False,
    keep_mask: Annotated[
        bool, typer.Option("--keep-mask", help="The mask as drawn, also where the model says that nothing is named.")
    ] = False,
    backend: BackendOption = None,
) -> None:
    """Segment what a sentence names in a picture, turned upright as viewers show it."""
    from PIL import Image

    from magnet_fast import visualize
    from magnet_fast.data.transforms import as_rgb, as_shown, orientation
    from magnet_fast.inference import Segmenter
    from magnet_fast.training.distributed import pick_device

    check_picture_name(out)
    check_picture_name(overlay)
    turned = 1 if stored_pixels else orientation(image)
    picture = as_rgb(image) if stored_pixels else as_shown(image)
    segmenter = Segmenter.from_checkpoint(
        checkpoint, pick_device(device), tokenizer, image_size, dtype.value, fast=fast, pack=False, keep_masks=keep_mask
    )
    with chosen_backend(backend):
        found = segmenter(picture, expression)
    save_picture(Image.fromarray(found.mask.astype("uint8") * 255), out)
    if overlay is not None:
        save_picture(visualize.overlay(picture, found.mask), overlay)
    share, highest = 100 * found.mask.mean(), found.probability.max()
    typer.echo(f"{out}: {share:.1f} % of the image, highest probability {highest:.2f}")
    if turned != 1:
        typer.echo(f"turned upright by its EXIF orientation, {turned}; --stored-pixels leaves it as stored")
    if found.present is False:
        typer.echo(f"nothing of that kind is in the picture ({1 - found.presence:.2f})")
    elif not found.mask.any():
        typer.echo(f"nothing found: no pixel's probability exceeds {segmenter.spec.threshold:g}")


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
    loaded = checkpoints.load(checkpoint)
    sentences = open_dataset(
        loaded, data, dataset, split_by, split, tokenizer, image_size, images, format=format, original=True
    )
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
