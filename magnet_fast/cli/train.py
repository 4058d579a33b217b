"""`magnet-fast train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import BackendOption, LocalRankOption, chosen_backend
from magnet_fast.cli.errors import user_errors
from magnet_fast.cli.outputs import check_folder


@user_errors
def train(
    config: Annotated[
        str, typer.Option(help="YAML file, or the name of a shipped configuration (magnet_tiny_scenes).")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoints and metrics of this run.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data; data.root of the configuration.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change an entry: optimiser.lr=1e-4."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that OUT holds.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--dry-run", help="Take a few steps; report memory, speed and time; write nothing.")
    ] = False,
    backend: BackendOption = None,
    local_rank: LocalRankOption = None,
) -> None:
    """Train a model; under torchrun, on several processes. Exit status 75: stopped by SIGTERM, --resume goes on."""
    from magnet_fast.training import TrainingStopped, load_config
    from magnet_fast.training import train as run_training
    from magnet_fast.training.distributed import take_local_rank
    from magnet_fast.training.dry_run import dry_run
    from magnet_fast.training.stopping import EXIT_STATUS

    take_local_rank(local_rank)
    overrides = [*([f"data.root={json.dumps(str(data))}"] if data is not None else []), *(set_ or [])]
    settings = load_config(config, overrides)
    if out is None and not rehearse:
        raise ValueError("--out: no folder given for the run (only a --dry-run needs none)")
    if out is not None and not rehearse:
        check_folder("--out", out)
    with chosen_backend(backend):
        if rehearse:
            report = dry_run(settings)
            if int(os.environ.get("RANK", "0")) == 0:
                typer.echo(report.text())
            return
        try:
            run_training(settings, out, resume=resume, overwrite=overwrite)
        except TrainingStopped as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(EXIT_STATUS) from None
