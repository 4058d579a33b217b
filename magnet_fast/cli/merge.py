"""`magnet-fast merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import CheckpointOption
from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_files


@user_errors
def merge(
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    checkpoint: CheckpointOption = None,
) -> None:
    """Write a checkpoint's model as one file that needs no other: base weights in it, LoRA folded into them."""
    from magnet_fast import checkpoints, models
    from magnet_fast.models import tuning

    check_files({"--out": out}, {"--checkpoint": checkpoint})
    loaded = checkpoints.load(checkpoint)
    if getattr(loaded.model.config.image, "tuning", None) == "lora":
        tuning.merge(loaded.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    models.save(loaded.model, out, loaded.metadata)
    typer.echo(f"wrote {out}")
