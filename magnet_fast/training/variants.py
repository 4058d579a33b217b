"""The rows of a study: configurations with parts turned off or changed, as a YAML file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from magnet_fast.training.config import (
    CONFIG_FOLDER,
    TrainConfig,
    apply_override,
    load_config,
    parse_config,
    read_yaml,
)
from magnet_fast.training.strict import Strict, explain


class Part(Strict):
    """What goes without a part of the method: entries to set, and parameters held fixed beside those of the recipe."""

    set: list[str] = Field(default_factory=list)
    freeze: list[str] = Field(default_factory=list)


class Row(Part):
    """One row of a study's table.

    Attributes:
        title: of the row.
        against: the row that this one is one change of; None for the first.
        without: parts that are left out.
        config: another configuration than the study's, by name or path.
        model: another model than the configuration's; it keeps the overrides of both encoders alone.
        set, freeze: the row's own changes.
    """

    title: str
    against: str | None = None
    without: list[str] = Field(default_factory=list)
    config: str | None = None
    model: str | None = None


class Study(Strict):
    """What a study compares.

    Attributes:
        config: the configuration that rows change, by name or path.
        set: entries that hold for every row, whatever its configuration says.
        parts: what rows go without, by name.
        rows: in the order of the table.
    """

    config: str
    set: list[str] = Field(default_factory=list)
    parts: dict[str, Part] = Field(default_factory=dict)
    rows: dict[str, Row]

    @model_validator(mode="after")
    def _known_names(self) -> Study:
        for name, row in self.rows.items():
            unknown = [part for part in row.without if part not in self.parts]
            if unknown or row.against not in (None, *self.rows):
                raise ValueError(f"rows.{name}: there is no part or row {(*unknown, row.against)[0]!r}")
        return self


def load_study(source: str | Path) -> Study:
    """Read a study by path, or by the name of one that ships with the package ("ablation").

    Raises:
        FileNotFoundError: there is none.
        ValueError: an unknown key or a bad value, named with the file.
    """
    path = Path(source)
    if not path.is_file():
        path = CONFIG_FOLDER / "studies" / f"{source}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"{source}: no such study, and none of the shipped ones ({shipped})")
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {explain(entry, Study)}" for entry in error.errors())) from None


def row_config(study: Study, name: str, seed: int, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a row's run.

    Args:
        study: its rows.
        name: of the row.
        seed: of the run.
        overrides: entries that replace those of the configuration and the study, `"max_steps=100"`; what the row is
            about replaces them.

    Raises:
        FileNotFoundError: no such configuration.
        ValueError: a change does not fit the configuration.
    """
    row = study.rows[name]
    values: dict[str, Any] = load_config(row.config or study.config, [*study.set, *overrides]).model_dump(mode="json")
    values["seed"] = seed
    if row.model is not None:
        own = values["model"]["overrides"]
        kept = {key: value for key, value in own.items() if key.split("__")[0] in ("image", "text")}
        values["model"] |= {"name": row.model, "overrides": kept}
    for change in (*(study.parts[part] for part in row.without), row):
        for override in change.set:
            apply_override(values, override)
        values["optimiser"]["freeze"] = [*values["optimiser"]["freeze"], *change.freeze]
    return parse_config(values, f"study, {name}")
