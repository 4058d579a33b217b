"""`magnet-fast shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_folder


@user_errors
def shrink(
    checkpoint: Annotated[str, typer.Option(help="Weights of a run, a folder, or hub:owner/name.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    words: Annotated[int, typer.Option(min=1, help="Tokens of the vocabulary that are kept.")] = 8000,
    tokenizer: Annotated[str | None, typer.Option(help="As for evaluate.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="A text file: the tokens of its sentences, one a line, are kept.")
    ] = None,
) -> None:
    """Write a smaller copy of a model, to hand out: fewer words, and matrices in int8.

    Words that are left out are read in pieces. Score the copy before it is handed out.
    """
    from magnet_fast import checkpoints
    from magnet_fast.atomic import new_folder
    from magnet_fast.shrinking import shrunk

    check_folder("--out", out)
    if out.exists():
        raise FileExistsError(f"--out: {out} exists; expected a new folder")
    sentences = [line for line in keep.read_text(encoding="utf-8").splitlines() if line.strip()] if keep else []
    loaded = checkpoints.load(checkpoint)
    model, fewer = shrunk(loaded.model, loaded.tokenizer(tokenizer), words, sentences)
    with new_folder(out) as folder:
        model.save_pretrained(folder, tokenizer=fewer, compact=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    typer.echo(f"{out}: {fewer.vocab_size} tokens, {size / 1e6:.1f} MB")
