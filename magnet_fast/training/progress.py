"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, and the metrics file."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from magnet_fast.atomic import naming, write_text_atomically


class RunDisplay:
    """Progress of a run: steps or minutes done, losses, images per second, time left.

    Args:
        title: what is going on.
        enabled: False makes every method silent (processes other than the first).
    """

    def __init__(self, title: str, enabled: bool = True) -> None:
        self._console = Console(file=sys.stdout)
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=1.0, state="")

    def __enter__(self) -> RunDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, share: float, state: str) -> None:
        """`share` of the run is done, in [0, 1]; `state` says the rest in words."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, state=state)
        elif self._enabled:
            print(f"{100 * share:5.1f} %  {state}", flush=True)

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(text, flush=True)


class MetricsFile:
    """Rows of numbers, one JSON object a line, appended as they come.

    Each row has `kind` ("train" or "validation") and `step`; within a kind no step appears twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. NaN and infinities are written as null: they are not JSON."""
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a line that a kill cut short, or that is no row, is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
                rows.append(row)
        return rows

    def drop_after(self, step: int, unfinished: bool = False) -> None:
        """Forget the rows of later steps, which a resumed run will write again.

        Args:
            step: where the run goes on.
            unfinished: its own training row is still to come: the end of a run writes one after the checkpoint.
        """
        kept = [row for row in self.rows() if row["step"] <= step]
        if unfinished:
            kept = [row for row in kept if (row["kind"], row["step"]) != ("train", step)]
        write_text_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))


class TensorBoard:
    """The numbers of the metrics rows as TensorBoard's curves: "train/loss", "validation/by_kind/place/mIoU".

    Args:
        folder: of the event files.
        step: where the run goes on; what an earlier process wrote beyond is hidden.

    Raises:
        ValueError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of the metrics file."""
        kind, step = row["kind"], row["step"]
        for name, value in _numbers({key: row[key] for key in row if key not in ("kind", "step")}):
            self._writer.add_scalar(f"{kind}/{name}", value, step)


def check_tensorboard() -> None:
    """ValueError where TensorBoard cannot be written."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard: the package is not installed: pip install 'magnet_fast[logging]'")


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", value


def time_left(elapsed: float, share: float) -> float | None:
    """Seconds to go where `share` of a run took `elapsed`; None before anything is done, 0 beyond the end.

    A run by the clock ends with the step that its time runs out in: its share ends a little above 1.
    """
    return elapsed * max(0.0, 1 - share) / share if share > 0 else None


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 12 s."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
