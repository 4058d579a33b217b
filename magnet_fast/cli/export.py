"""`magnet-fast export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import CheckpointOption, ImageSizeOption, TokenizerOption
from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_folder


class GraphFormat(str, Enum):  # noqa: UP042 (StrEnum is younger than Python 3.10)
    """What runs the exported model."""

    torch = "torch"
    onnx = "onnx"
    openvino = "openvino"


@user_errors
def export(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    format: Annotated[GraphFormat, typer.Option(help="What is to run it.")] = GraphFormat.onnx,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
) -> None:
    """Write a model for another runtime: picture and sentence in, probability of each pixel out, any batch."""
    from magnet_fast import checkpoints, exporting

    check_folder("--out", out)
    loaded = checkpoints.load(checkpoint)
    if image_size is not None:
        loaded.model.spec = loaded.model.spec._replace(size=image_size)
    difference = exporting.export(loaded.model, loaded.tokenizer(tokenizer), out, format.value)
    typer.echo(f"{out}: agrees with the model to {difference:.1e} in every probability")
