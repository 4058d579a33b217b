"""Systems by name: what `create` builds and `from_released` recognises. No model is imported here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from magnet_fast.models.config import ModelConfig

if TYPE_CHECKING:
    from magnet_fast.models.base import ReferringModel
    from magnet_fast.models.released import Released


@dataclass(frozen=True)
class System:
    """A registered system.

    Attributes:
        name: as in `ModelConfig.architecture`.
        model: the class, built from a configuration alone.
        config: class of its configurations.
        presets: the parts of each, by name.
        released: how its authors' files are read; None where there are none.
    """

    name: str
    model: type[ReferringModel]
    config: type[ModelConfig]
    presets: dict[str, dict[str, Any]]
    released: Released | None

    def preset(self, name: str) -> ModelConfig:
        """The configuration of a preset."""
        return parse_config({"architecture": self.name, **self.presets[name]})


_systems: dict[str, System] = {}


def register(
    name: str,
    *,
    config: type[ModelConfig] = ModelConfig,
    presets: Mapping[str, Mapping[str, Any]],
    released: Released | None = None,
) -> Callable[[type[ReferringModel]], type[ReferringModel]]:
    """Make a system known; a decorator of its class.

    Args:
        name: of the system, the `architecture` of its configurations.
        config: class of its configurations, for a system with more settings than its parts'.
        presets: name -> parts, each a mapping with its `kind`: what `create` takes.
        released: how files of the system's own authors are read.

    Raises:
        ValueError: another system has this name or one of the presets' names.
    """

    def known(model: type[ReferringModel]) -> type[ReferringModel]:
        taken = {preset for system in _systems.values() if system.name != name for preset in system.presets}
        twice = sorted(taken & presets.keys())
        before = _systems.get(name)
        if twice or (before is not None and before.model.__qualname__ != model.__qualname__):
            raise ValueError(f"name: {twice[0] if twice else name!r} is registered already")
        # Presets are read when they are asked for: by then all parts are known.
        _systems[name] = System(
            name, model, config, {preset: dict(parts) for preset, parts in presets.items()}, released
        )
        return model

    return known


def list_models(pattern: str | None = None) -> list[str]:
    """Names that `create` knows, in order; those that match a shell-style pattern (`"*swin*"`)."""
    names = sorted(preset for system in systems() for preset in system.presets)
    return [name for name in names if pattern is None or fnmatchcase(name, pattern)]


def create(name: str, pretrained: bool | Mapping[str, str | bool] = False, **overrides: Any) -> ReferringModel:
    """Build a model by name, in training mode, with random weights unless `pretrained`.

    Args:
        name: one of `list_models()`.
        pretrained: True loads the encoders' published weights (timm's, transformers'); a mapping such as
            `{"image": …, "text": …}` names others or local paths, or False for an encoder that starts from nothing.
            False builds offline.
        **overrides: settings to change, nested by mapping or by double underscore: `head={"points": 8}`,
            `text__vocab_size=200`. A mapping with another `kind` replaces the whole part:
            `image={"kind": "timm", "name": "resnet50"}`.

    Raises:
        ValueError: an unknown name or setting, parts that do not fit together, or pretrained weights that cannot be
            had or do not fit.
    """
    model = from_config(preset_config(name, **overrides))
    if pretrained:
        model.load_pretrained({} if pretrained is True else pretrained)
    return model


def preset_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration that `create` would use."""
    known = {preset: system for system in systems() for preset in system.presets}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: unknown model {name!r}{hint}; known: {', '.join(sorted(known))}")
    entries = known[name].preset(name).model_dump()
    for key, value in overrides.items():
        _override(entries, key.split("__"), value, key)
    return parse_config(entries)


def parse_config(entries: Mapping[str, Any]) -> ModelConfig:
    """A configuration from its plain dictionary, as `model.config.model_dump()` gives it.

    Raises:
        ValueError: an unknown system, or settings that are wrong or do not fit together; each is named.
    """
    name = entries.get("architecture")
    system = {system.name: system for system in systems()}.get(name)
    if system is None:
        raise ValueError(f"model configuration: unknown architecture {name!r}; known: {', '.join(sorted(_systems))}")
    try:
        return system.config.model_validate(dict(entries))
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        text = "; ".join(f"{place}: {message}" if place else message for place, message in found)
        raise ValueError(f"model configuration: {text}") from error


def from_config(config: Mapping[str, Any] | ModelConfig) -> ReferringModel:
    """The model of a configuration, with random weights."""
    if not isinstance(config, ModelConfig):
        config = parse_config(config)
    return next(system for system in systems() if system.name == config.architecture).model(config)


def systems() -> Iterable[System]:
    """All systems, those of this package included."""
    _import_package()
    return list(_systems.values())


@cache
def _import_package() -> None:
    """Import every module beside this one: parts and systems make themselves known."""
    package = __name__.rpartition(".")[0]
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(found.name)


def _override(entries: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    """Change one setting of nested plain entries; a mapping changes several, or a whole part by its kind."""
    *parents, leaf = path
    for parent in parents:
        entries = entries.get(parent) if isinstance(entries, dict) else None
    if not isinstance(entries, dict) or leaf not in entries:
        near = get_close_matches(leaf, entries, n=1) if isinstance(entries, dict) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model setting {name!r}{hint}")
    before = entries[leaf]
    if not (isinstance(value, Mapping) and isinstance(before, dict) and before):  # an empty one is free, not a part
        entries[leaf] = value
    elif value.get("kind", before.get("kind")) != before.get("kind"):
        entries[leaf] = dict(value)
    else:
        for key, inner in value.items():
            _override(before, [key], inner, f"{name}.{key}")
