"""The pages' tables of systems, parts and terms are those of the registry; `python docs/tables.py` writes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from magnet_fast.models.config import ROLES, part_kinds
from magnet_fast.models.registry import systems

DOCS = Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_page_has_the_tables_of_now(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in text for name in tables.PAGES[page])
    assert tables.with_tables(text) == text, "run python docs/tables.py"


def test_every_system_and_part_of_the_package_has_a_row() -> None:
    rows, parts = tables.systems_table(), tables.parts_table()
    own = [system for system in systems() if system.model.__module__.startswith("magnet_fast.")]
    assert own and all(f"`{system.name}` |" in rows for system in own)
    kinds = [
        (role, kind)
        for role in ROLES
        for kind, config in part_kinds(role).items()
        if config.__module__.startswith("magnet_fast.")
    ]
    assert kinds and all(f"| {role} | `{kind}` | " in parts for role, kind in kinds)
    assert (
        "| recipe `asgn_tiny_scenes` | `swin` | `bert` | `pwam` | `topdown` | – | `adversarial`, `category` |" in rows
    )


def test_only_what_is_marked_is_replaced() -> None:
    page = "before\n<!-- table: terms -->\nold\n<!-- end -->\nafter\n"
    assert tables.with_tables(page) == f"before\n<!-- table: terms -->\n\n{tables.terms_table()}\n<!-- end -->\nafter\n"
