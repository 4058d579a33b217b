"""Settings that know all of their keys, and sentences for what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A section of a configuration: immutable, without unknown keys, without NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def explain(entry: Any, model: type[BaseModel], prefix: str = "") -> str:
    """One of pydantic's errors as a sentence with the key's path.

    Args:
        entry: of `ValidationError.errors()`.
        model: what was validated.
        prefix: path of the model itself, with a dot at its end.
    """
    if entry["type"] == "explained":
        return entry["msg"]
    location = [str(part) for part in entry["loc"]]
    path = prefix + ".".join(location)
    if entry["type"] != "extra_forbidden":
        message = entry["msg"].removeprefix("Value error, ")
        given = f", got {entry['input']!r}" if location and not isinstance(entry["input"], dict) else ""
        return f"{path}: {message}{given}" if path else message
    section = model
    for part in location[:-1]:
        section = _model_of(section.model_fields[part].annotation) or section
    return unknown_key(location[-1], list(section.model_fields), prefix + "".join(f"{part}." for part in location[:-1]))


def unknown_key(key: str, known: Sequence[str], prefix: str = "") -> str:
    """A sentence that names the nearest known key, and all others."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    nearest = prefix + near[0] if near else ""
    return f"unknown key {prefix + key!r}; the nearest known one is {nearest!r} (known here: {', '.join(known)})"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _model_of(part))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
