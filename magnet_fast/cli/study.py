"""`magnet-fast study`: what parts of the methods do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_folder

_SHIPPED = sorted(file.stem for file in (Path(__file__).parents[1] / "configs" / "studies").glob("*.yaml"))


@user_errors
def study(
    name: Annotated[str, typer.Argument(help=f"A YAML file or a shipped name: {', '.join(_SHIPPED)}.")],
    data: Annotated[Path, typer.Option(help="Embedded scenes, in REFER's layout.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the picture.")],
    config: Annotated[
        str | None, typer.Option(help="What rows change, in place of the study's: a YAML file or a shipped name.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant, with seeds 0, 1, ….", min=1)] = 3,
    variants: Annotated[str | None, typer.Option(help="Some of them only, with commas between.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change an entry: max_steps=1000.")
    ] = None,
) -> None:
    """Train and score models with parts on and off. Finished runs are kept; start it again to go on.

    The same command may run several times at once (one for each core): the processes share the work.
    """
    from magnet_fast.training.study import run_study
    from magnet_fast.training.variants import load_study

    check_folder("--out", out)
    chosen = load_study(name)
    if config is not None:
        chosen = chosen.model_copy(update={"config": config})
    rows = [row.strip() for row in variants.split(",")] if variants else None
    overrides = [f"data.root={json.dumps(str(data))}", *(set_ or [])]
    table = run_study(chosen, out, overrides, rows=rows, seeds=range(seeds), say=typer.echo)
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(str(table))
