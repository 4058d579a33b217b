"""`magnet-fast push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import TokenizerOption
from magnet_fast.cli.errors import user_errors


@user_errors
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A run's .safetensors, or another that --checkpoint takes.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A private repository.")] = False,
    scores: Annotated[
        list[Path] | None, typer.Option(help="For the model card: what evaluate --out wrote. Repeat it for several.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the model card, as the hub names it: apache-2.0, ….")] = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Publish a checkpoint's model on the hub, with its tokenizer and a model card; base weights go into it."""
    from magnet_fast import checkpoints
    from magnet_fast.models import hub
    from magnet_fast.models.files import read_json

    hub.checked_name(repository)
    results = [read_json(path) for path in scores or ()]
    loaded = checkpoints.load(checkpoint)
    address = hub.push_to_hub(
        loaded.model,
        repository,
        private=private,
        tokenizer=loaded.tokenizer(tokenizer),
        metadata=loaded.metadata,
        scores=results,
        license=license,
    )
    typer.echo(address)
