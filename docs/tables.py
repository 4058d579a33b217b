"""Tables of the pages that are made of the registry: `python docs/tables.py` writes them where they are marked.

A mark is a line `<!-- table: NAME -->`; what stands between it and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, get_origin

from magnet_fast import models
from magnet_fast.models.config import ROLES, ModelConfig, PartConfig, part_kinds
from magnet_fast.models.registry import System, systems
from magnet_fast.training.config import load_config, shipped_configs
from magnet_fast.training.terms import TERMS

FOLDER = Path(__file__).resolve().parent
PAGES = {"related-work.md": ("systems", "terms"), "adding-a-model.md": ("parts",)}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ALWAYS = {"mask", "presence"}


@cache
def systems_table() -> str:
    """A row for each system of the package and for each recipe on scenes that is a system of terms alone."""
    rows = [
        [f"{system.model.__name__} `{system.name}`", *_cells(system), "read" if system.released else "–"]
        for system in _systems()
    ]
    own = {system.name for system in _systems()}
    for recipe in shipped_configs():
        name = recipe.removesuffix("_tiny_scenes")
        if name != recipe and _system_of(recipe) is None and name not in own:
            config = load_config(recipe)
            parts = models.preset_config(config.model.name, **config.model.overrides)
            rows.append([f"recipe `{recipe}`", *_parts([parts]), _terms([recipe]), "–", "–"])
    return _table(["system", *ROLES, "terms beside mask and presence", "needs", "released files"], rows)


@cache
def parts_table() -> str:
    """A row for each part: what its file says it is, and the systems that use it."""
    users: dict[tuple[str, str], set[str]] = {}
    for system in _systems():
        for preset in system.presets:
            for part in _inside(system.preset(preset)):
                users.setdefault((part.role, part.kind), set()).add(system.model.__name__)
    rows = []
    for role in ROLES:
        for kind, config in sorted(part_kinds(role).items()):
            if config.__module__.startswith("magnet_fast."):
                used = ", ".join(sorted(users.get((role, kind), ()), key=str.lower)) or "–"
                rows.append([role, f"`{kind}`", _said(config), used])
    return _table(["role", "kind", "what", "systems"], rows)


def terms_table() -> str:
    """A row for each training loss."""
    rows = [[f"`{name}`", _said(term)] for name, term in sorted(TERMS.items()) if term.__module__.startswith("magnet_")]
    return _table(["term", "what"], rows)


TABLES = {"systems": systems_table, "parts": parts_table, "terms": terms_table}


def with_tables(page: str) -> str:
    """A page's text with its tables as they are now."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", page)


def _systems() -> list[System]:
    own = [system for system in systems() if system.model.__module__.startswith("magnet_fast.")]
    return sorted(own, key=lambda system: system.model.__name__.lower())


def _cells(system: System) -> list[str]:
    small = next((name for name in system.presets if name.endswith("_tiny")), next(iter(system.presets)))
    config = system.preset(small)
    reader = models.create(small) if config.fusion is None else config.fusion.build(config.image, config.text)
    needs = ", ".join(f"`{name}`" for name in reader.needs) or "–"
    recipes = [name for name in shipped_configs() if _system_of(name) == system.name]
    return [*_parts([system.preset(name) for name in system.presets]), _terms(recipes), needs]


def _system_of(recipe: str) -> str | None:
    """The system whose name a recipe's begins with; of two the longer one."""
    fitting = [system.name for system in _systems() if recipe.startswith(f"{system.name}_")]
    return max(fitting, key=len, default=None)


def _parts(configs: list[ModelConfig]) -> list[str]:
    """What each role has in any of the configurations."""
    columns = []
    for role in ROLES:
        kinds = dict.fromkeys(_described(part) for config in configs if (part := getattr(config, role)) is not None)
        columns.append(", ".join(kinds) or "–")
    return columns


def _terms(recipes: list[str]) -> str:
    """Those with a weight; a recipe that adds Mask Grounding to any system is not of its own kind."""
    own = (load_config(recipe).terms for recipe in recipes if not recipe.endswith("_grounding"))
    named = {name for terms in own for name, options in terms.items() if options.weight} - _ALWAYS
    return ", ".join(f"`{name}`" for name in sorted(named)) or "–"


def _described(part: PartConfig) -> str:
    """A part by its kind, what it is chosen among, and the parts inside it: `enrich` around `film`."""
    text = f"`{part.kind}`"
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if get_origin(field.annotation) is Literal and name != "kind" and value != field.default:
            text += f" ({name} {value})"
        elif isinstance(value, PartConfig):
            text += f" around {_described(value)}"
    return text


def _inside(config: ModelConfig) -> Iterator[PartConfig]:
    """All parts, those inside others, too."""
    waiting = [getattr(config, role) for role in ROLES]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PartConfig):
            yield part
            waiting += [getattr(part, name) for name in type(part).model_fields]


def _said(thing: type) -> str:
    """The first line of the file that it stands in."""
    return (sys.modules[thing.__module__].__doc__ or "").splitlines()[0].removesuffix(".")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    for name in PAGES:
        page = FOLDER / name
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)
