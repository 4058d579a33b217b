"""The house: imports run downwards only, nobody above the models knows one by name, files stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "magnet_fast"
# From the top to the bottom; a part imports those below it.
LEVELS = [
    {"cli", "__main__"},
    {"app"},
    {"training", "batch"},
    {"inference"},
    {"evaluation", "editing", "exporting", "shrinking"},
    {"checkpoints"},
    {"data"},
    {"fast", "compat"},
    {"models"},
    {"ops"},
    {"kernels", "_cpu", "_cuda"},
    {"atomic", "cores", "devices", "inert", "visualize"},
    {"showing"},
]
# Functions of `torch` that allocate on the default device, `torch.set_default_device`'s, unless told otherwise.
CONSTRUCTORS = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided",
    "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "sparse_csr_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# What these hold follows the default device, as the parameters of PyTorch's own modules do.
HOLDERS = {"Parameter", "register_buffer"}
# `python -m magnet_fast` starts the command line.
BESIDE = {("__main__", "cli")}
SYSTEMS = re.compile(r"\b(magnet|lavt)\b", re.IGNORECASE)


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


def code(path: Path) -> str:
    """A file's code without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(getattr(node, "body", None), list) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value.value = ""
    return ast.unparse(tree)


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


def test_nobody_above_the_models_knows_a_system() -> None:
    known = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] in ("models", "fast")]
    others = set(PACKAGE.rglob("*.py")) - set(known)
    assert any(SYSTEMS.search(code(path)) for path in known)  # the pattern does find names
    asking = [str(path) for path in others if "isinstance(model" in code(path)]
    assert asking == []
    blind = [path for path in others if path.relative_to(PACKAGE).parts[0] in ("training", "evaluation", "data")]
    named = {str(path): found.group() for path in blind if (found := SYSTEMS.search(code(path)))}
    assert named == {}


def test_models_of_ours_are_imported_by_fasts_own_files_alone() -> None:
    importing = [path.name for path in (PACKAGE / "fast").glob("*.py") if "models" in imports(path)]
    assert importing and all(name.startswith("own") for name in importing)


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


def named(node: ast.AST) -> str:
    """`zeros` of `torch.zeros`, `Parameter` of `nn.Parameter` or `Parameter`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def without_device(code: str, *, holds: bool = False) -> list[int]:
    """Lines that name one of `CONSTRUCTORS` otherwise than to call it with `device=`.

    Args:
        code: of a file.
        holds: it makes modules: what is inside a call of `HOLDERS` is theirs.
    """
    tree, settled = ast.parse(code), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if any(keyword.arg == "device" for keyword in node.keywords):
            settled.add(node.func)
        elif holds and named(node.func) in HOLDERS:
            settled.update(ast.walk(node))
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            lines += [node.lineno for alias in node.names if alias.name in CONSTRUCTORS]
        of_torch = isinstance(node, ast.Attribute) and named(node.value) == "torch"
        if of_torch and node.attr in CONSTRUCTORS and node not in settled:
            lines.append(node.lineno)
    return sorted(lines)


def test_tensors_are_made_on_a_device_that_is_named() -> None:
    """Not on the default one, which is the user's: a kernel on a CPU would get an address of a GPU."""
    assert without_device("x = torch.zeros(2)\ny = torch.zeros(2, device=x.device)") == [1]
    assert without_device("make = torch.empty if a else x.new_zeros\nfrom torch import ones, nn") == [1, 2]
    parameter = "self.x = nn.Parameter(0.02 * torch.randn(2))\nself.register_buffer('y', torch.ones(2))"
    assert without_device(parameter, holds=True) == [] and without_device(parameter) == [1, 2]
    found = {}
    for folder in (PACKAGE, PACKAGE.parent / "kernels"):
        for path in folder.rglob("*.py"):
            place = path.relative_to(folder.parent)
            holds = place.parts[1] == "models" or place.parts[1:3] == ("training", "terms")
            if lines := without_device(path.read_text(), holds=holds):
                found[str(place)] = lines
    assert found == {}


def test_loaders_are_ours() -> None:
    """PyTorch's fails under a default device that is not its generator's."""
    making = [
        path for path in PACKAGE.rglob("*.py") if re.search(r"import [\w, ]*\bDataLoader\b|\.DataLoader\b", code(path))
    ]
    assert [path.relative_to(PACKAGE).as_posix() for path in making] == ["data/loader.py"]
