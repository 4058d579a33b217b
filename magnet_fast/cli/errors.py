"""What a user can mend, and what a user should know, as one clean line."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import typer

traceback_wanted = False  # --traceback

# What Pillow notes of a broken picture before it raises an error would be a line beside the clean one.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what a user can mend as one clean message, exit status 2; other errors show their traceback.

    Warnings are lines, too.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show
                command(*args, **kwargs)
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            mendable = not isinstance(error, RuntimeError) or type(error).__name__ in ("TrainingError", "BackendError")
            if isinstance(error, ImportError):  # Python's own name a module; ours say what to install
                mendable = error.name is None
            if traceback_wanted or not mendable:
                raise
            _fail(error)

    return wrapped


def _show(message: Warning | str, *_: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _fail(error: BaseException) -> None:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in message.splitlines()]  # a reason each, of backends
    typer.echo(f"error: {'; '.join(line for line in lines if line)}", err=True)
    raise typer.Exit(2)
