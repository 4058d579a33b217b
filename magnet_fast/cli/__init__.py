"""The command line: `magnet-fast`, or `python -m magnet_fast`.

Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from magnet_fast.cli import errors
from magnet_fast.cli.common import LocalRankOption
from magnet_fast.cli.data import data_app
from magnet_fast.cli.doctor import doctor
from magnet_fast.cli.evaluate import evaluate
from magnet_fast.cli.export import export
from magnet_fast.cli.info import info
from magnet_fast.cli.merge import merge
from magnet_fast.cli.pictures import contact_sheet, edit, segment
from magnet_fast.cli.push import push
from magnet_fast.cli.shrink import shrink
from magnet_fast.cli.study import study
from magnet_fast.cli.train import train
from magnet_fast.cli.web import web_page
from magnet_fast.cores import allowed_cores

app = typer.Typer(
    help="Referring image segmentation on fused operators: train, evaluate, segment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (train, evaluate, merge, push, shrink, export, info, doctor, study):
    app.command()(command)
for command in (segment, edit):
    app.command(context_settings={"allow_extra_args": True})(command)  # words of a sentence, refused with what helps
app.command("contact-sheet")(contact_sheet)
app.command("app")(web_page)
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line."""
    if "torch" not in sys.modules:  # which reads these when it is loaded
        _wait_asleep()
        _stay_within_the_limit()
    app()


def _wait_asleep() -> None:
    """Threads that wait for each other give their core away, unless the environment says how they wait.

    OpenMP else lets them wait busily for some milliseconds: where other processes want the cores, at every meeting of
    threads. Beside eight of them a small model took seconds instead of a tenth of one.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _stay_within_the_limit() -> None:
    """As many threads as a container has cores' time, unless the environment says how many; see `cores`."""
    if "OMP_NUM_THREADS" not in os.environ and (cores := allowed_cores()) < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(cores)


@app.callback()
@errors.user_errors
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    local_rank: LocalRankOption = None,
) -> None:
    """Referring image segmentation on fused operators: train, evaluate, segment."""
    errors.traceback_wanted = traceback
    if local_rank is not None:  # the launcher puts it before the command
        from magnet_fast.training.distributed import take_local_rank

        take_local_rank(local_rank)
