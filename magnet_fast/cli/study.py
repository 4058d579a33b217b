"""``magnet-fast study``: what the parts of the method do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.errors import user_errors

study_app = typer.Typer(help="Find out what the parts of the method do.", no_args_is_help=True)


@study_app.callback()
def study() -> None:
    """Find out what the parts of the method do."""


@study_app.command()
@user_errors
def ablation(
    data: Annotated[Path, typer.Option(help="Embedded scenes, in REFER's layout.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the picture.")],
    config: Annotated[str, typer.Option(help="The full method: a YAML file or a shipped name.")] = (
        "magnet_tiny_scenes_study"
    ),
    seeds: Annotated[int, typer.Option(help="Runs of each variant, with seeds 0, 1, ….", min=1)] = 3,
    variants: Annotated[str | None, typer.Option(help="Some of them only, with commas between.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change an entry: max_steps=1000.")
    ] = None,
) -> None:
    """Train and score MagNet and LAVT with parts on and off. Finished runs are kept; start it again to go on.

    The same command may run several times at once (one for each core): the processes share the work.
    """
    from magnet_fast.training import load_config
    from magnet_fast.training.study import run_study
    from magnet_fast.training.variants import load_study

    settings = load_config(config, [f"data.root={json.dumps(str(data))}", *(set_ or [])])
    chosen = [name.strip() for name in variants.split(",")] if variants else None
    table = run_study(settings, load_study("ablation"), out, rows=chosen, seeds=range(seeds), say=typer.echo)
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(str(table))
