"""Imports run downwards only: command line → training, evaluation, inference → models, losses, data → ops → kernels."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "magnet_fast"
LEVELS = [
    {"cli", "__main__"},
    {"training", "evaluation", "inference", "visualize"},
    {"models", "losses", "data", "integrations"},
    {"ops"},
    {"kernels", "_cpu", "_cuda"},
]
# Parts of one level stand beside each other; the second level alone is layered within itself.
BESIDE = {("__main__", "cli"), ("training", "evaluation"), ("training", "inference"), ("visualize", "inference")}


def level(part: str) -> int:
    return next(depth for depth, parts in enumerate(LEVELS) if part in parts)


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, at any depth of the code."""
    found = set()
    folders = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["magnet_fast", *folders][: len(folders) + 2 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names] if len(module) <= 1 else [module]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "magnet_fast" and len(name) > 1}
    return found


def test_imports_run_downwards() -> None:
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        edges |= {(part, other) for other in imports(path) if other not in {part, "__version__"}}
    assert ("models", "ops") in edges and ("cli", "training") in edges  # the walk does see imports
    wrong = [(a, b) for a, b in edges if level(b) <= level(a) and (a, b) not in BESIDE]
    assert wrong == []


def test_files_stay_small() -> None:
    root = PACKAGE.parent
    files = [
        p for folder in ("magnet_fast", "kernels", "csrc", "tests", "benchmarks") for p in (root / folder).rglob("*.*")
    ]
    long = {
        str(p.relative_to(root)): n
        for p in files
        if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"} and (n := len(p.read_text().splitlines())) > 500
    }
    assert long == {}
