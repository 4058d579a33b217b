"""The page "When something is wrong" against the source: every row is a message, and every message has its row.

Messages are gathered from the syntax trees: what goes into an error or a warning, what readers count by its kind, and
every other text of several words, of which messages are put together. Variable parts are "…".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "magnet_fast"
PAGE = ROOT / "docs" / "when-something-is-wrong.md"

USER_FACING = (
    "checkpoints.py", "editing.py", "exporting.py", "inference.py", "showing.py", "shrinking.py", "visualize.py",
    "fast/__init__.py", "batch/*.py",
    "data/*.py", "data/datasets/*.py", "data/importing/*.py", "data/tokenizers/*.py", "data/transforms/*.py",
    "data/phrases/reading.py", "data/scenes/writing.py",
    "models/base_weights.py", "models/compact.py", "models/files.py", "models/hub.py", "models/released.py",
    "models/state.py", "models/tensor_file.py",
    "models/weights.py", "models/wrapping.py",
    "cli/*.py", "evaluation/evaluate.py", "evaluation/finite.py", "evaluation/metrics.py", "evaluation/protocol.py",
    "evaluation/table.py", "evaluation/tasks.py", "app/answer.py", "app/segmenters.py", "app/serving.py",
    "training/building.py", "training/checkpoint.py", "training/config.py", "training/datasets.py",
    "training/distributed.py", "training/disturbance.py", "training/failure.py", "training/folder.py",
    "training/progress.py", "training/run.py", "training/sampling.py", "training/sections.py", "training/state.py",
    "training/stopping.py", "training/strict.py",
)  # fmt: skip

ALWAYS = ("data/tokenizers/base.py", "data/transforms/pictures.py")
"""Of these even what explains itself has a row: any user meets them."""

SELF_EXPLAINING = re.compile(
    r"(--)?[a-z][\w.]*( (is|has) )?[^;]*[:;] (.*: )?expected "  # an argument, and what it takes
    r"|…: expected .*, got |… is …; expected (an int|at least …)$"  # the same, its name being variable
    r"|expected "  # the same, its name being put before
    r"|index is …; "  # an IndexError, of Python's own kind
)
"""The form that the page explains once: which argument, what was expected, what came."""

INTERNAL = {
    # Where something stands: a message with a row of its own follows, or stands before.
    "…: ref_id …, sent_id …", "…: ref_id …, sent_id …: …", "ref_id …, sent_id …: …", "ref_id … of …: …",
    "…: Polygons: …", "…: … id …", "…, sent_id …", "…: annotation … (…)", "…: command … of …: …", "model.weights: … …",
    "…: ref_id (record …)", "… names image …, see above", "… names … …, see above", "…: … …", "… has …",
    # Parts of messages.
    "nothing of the kind", "the model itself", "the released checkpoint", "none of them", "a list of … tokens",
    "the published weights of its size",
    # Shown where nothing is wrong.
    "expressions shuffled between images (control)", "packed weight in inference on a CPU",
    "packed weight in int8 in inference on a CPU",
    "in training on a CPU by the products that were measured to be the faster here",
    "packed weight in inference on a CPU, not in int8: sizes are no multiples of …",
    "in inference on a CPU BatchNorms are folded into convolutions",
    # The message of a commit on the hub.
    "Model of magnet_fast",
    # Sentences that exported graphs are tried with.
    "the large red circle", "the blue triangle left of the small ring", "the one at the top",
    # Of the library whose class it is; what a user meets names the file and has a row.
    "File does not contain tensor …",
    # Asked for by Python, not by a user.
    "module … has no attribute …",
}  # fmt: skip
"""What needs no row, word for word."""

SILENT = {
    "Field", "Option", "Argument", "Typer", "Format", "Protocol", "echo", "say", "debug", "info", "print", "add_task",
    "compile", "search", "sub", "fullmatch",
}  # fmt: skip
"""Calls whose texts are no messages of something wrong: help, descriptions, progress, patterns."""


class Message(NamedTuple):
    """A text of the source, in all its wordings, and where it stands."""

    where: str
    wordings: tuple[str, ...]


# ---- the source ----


def wordings(node: ast.AST, names: dict[str, ast.AST]) -> list[str] | None:
    """What a string expression can say, variable parts as "…"; None for another expression."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [wordings(one.value if isinstance(one, ast.FormattedValue) else one, names) for one in node.values]
        return ["".join(chosen) for chosen in product(*(part or ["…"] for part in parts))][:64]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        both = wordings(node.left, names), wordings(node.right, names)
        return ["".join(chosen) for chosen in product(*(part or ["…"] for part in both))] if any(both) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        text = wordings(node.left, {})
        return ["", *text] if text else None
    if isinstance(node, ast.IfExp):
        both = wordings(node.body, names), wordings(node.orelse, names)
        return [*(both[0] or ["…"]), *(both[1] or ["…"])] if any(both) else None
    if isinstance(node, ast.Name) and node.id in names:
        return wordings(names[node.id], {})
    return None


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def assigned(nodes: Iterable[ast.AST]) -> dict[str, ast.AST]:
    """Names that get a text, and nothing else."""
    found: dict[str, list[ast.AST]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1 and wordings(values[0], {})}


@cache
def shared_names() -> dict[str, ast.AST]:
    """Texts that modules have under a name, and may share."""
    return {name: value for path in PACKAGE.rglob("*.py") for name, value in assigned(parsed(path).body).items()}


@cache
def messages_of(path: Path, silent: frozenset[str] = frozenset(SILENT)) -> list[Message]:
    """Every message of a module, and every other text of three words and more that is no docstring."""
    tree = parsed(path)
    nodes = list(ast.walk(tree))
    own = assigned(nodes)
    names = shared_names() | own
    placed = [one for node in nodes if isinstance(node, ast.FormattedValue) for one in ast.walk(node)]
    parts = own.keys() & {
        one.id for one in placed if isinstance(one, ast.Name)
    }  # told in the texts that they are put in
    found: list[Message] = []

    def visit(node: ast.AST, sure: bool = False) -> None:
        """`sure`: it goes into an error, a warning or a count."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in parts:
            return visit_all(inner_values(node.value))
        texts = wordings(node, names) if sure or not isinstance(node, ast.Name) else None
        if texts and isinstance(node, ast.IfExp):
            return visit_all([node.body, node.orelse], sure)
        if texts:
            words = [word for word in max(texts, key=len).split() if letters(word)]
            if len(words) >= (1 if sure else 3):
                found.append(Message(f"{path.relative_to(ROOT)}:{node.lineno}", tuple(texts)))
            return visit_all(inner_values(node))
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in silent:
                return
            sure = called.endswith("Error") or called == "warn" or (called == "add" and len(node.args) == 2)
            visit_all([*node.args, *(one.value for one in node.keywords)], sure)
            return visit(node.func)
        visit_all(ast.iter_child_nodes(node))

    def visit_all(nodes: Iterable[ast.AST], sure: bool = False) -> None:
        for one in nodes:
            visit(one, sure)

    visit(tree)
    return found


def inner_values(node: ast.AST) -> list[ast.AST]:
    return [one.value for one in ast.walk(node) if isinstance(one, ast.FormattedValue)]


def user_facing() -> list[Path]:
    return sorted({path for pattern in USER_FACING for path in PACKAGE.glob(pattern)})


# ---- the page ----


def rows() -> list[tuple[int, list[str], str]]:
    """Line, messages and cure of every row."""
    found = []
    for number, line in enumerate(PAGE.read_text().splitlines(), start=1):
        if line.startswith("|") and not re.match(r"\|( message |-)", line):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 2, f"{PAGE.name}:{number}: a row has a message and a cure, not {len(cells)} cells"
            told = [one or two for one, two in re.findall(r"``\s?(.+?)\s?``|`(.+?)`", cells[0])]
            found.append((number, told, cells[1]))
    return found


def fragments(message: str) -> list[str]:
    """What a message says in any case."""
    return [part for part in (one.strip() for one in message.split("…")) if part]


def says(row: str, wording: str) -> bool:
    """Whether a row's fragments stand in a wording, in order; for a "…" at its beginning the row may have words."""
    if wording.startswith("…") and (first := next(iter(fragments(wording)), None)) and first in row:
        row = row[row.index(first) :]
    place = 0
    for part in fragments(row):
        place = wording.find(part, place) + len(part)
        if place < len(part):
            return False
    return True


def letters(text: str) -> int:
    return len(re.findall(r"\w", text))


def is_row_of(row: str, message: Message) -> bool:
    """Whether a row is of this message, and not only of some words in it."""
    return any(says(row, one) and 2 * letters(row) >= letters(one) for one in message.wordings)


# ---- the tests ----


def test_every_row_of_the_page_is_a_message_of_the_package() -> None:
    found = (one for path in PACKAGE.rglob("*.py") for one in messages_of(path, frozenset(SILENT - {"echo"})))
    everything = {wording for one in found for wording in one.wordings}
    unknown = []
    for number, told, _ in rows():
        for row in told:
            parts = fragments(row)
            longest = max(parts[1:] or parts, key=len)  # the first may go beyond the message's own beginning
            if not any(says(row, one) for one in everything if longest in one):
                unknown.append(f"{PAGE.name}:{number}: `{row}`")
    assert not unknown, "no message of the package reads so: mend the row, or remove it\n" + "\n".join(unknown)


def test_every_message_has_a_row_or_explains_itself() -> None:
    told = [row for _, several, _ in rows() for row in several]
    lacking = []
    for path in user_facing():
        always = str(path.relative_to(PACKAGE)) in ALWAYS
        for message in messages_of(path):
            longest = max(message.wordings, key=letters)
            explained = not always and SELF_EXPLAINING.match(longest)
            continued = longest.startswith((" ", ",", ";"))  # a part that is put behind a message
            if continued or explained or longest in INTERNAL or any(is_row_of(row, message) for row in told):
                continue
            lacking.append(f"{message.where}: {longest}")
    assert not lacking, (
        f"a user can meet these, and {PAGE.relative_to(ROOT)} does not say what helps. Add a row to its section, "
        "| `message` | cure. |, with … for what varies; or write the message as `argument: expected A, got B`; "
        "or, for text that no user meets, add it to INTERNAL in this file\n" + "\n".join(lacking)
    )


def test_rows_are_whole_and_unique() -> None:
    seen: dict[str, int] = {}
    for number, told, cure in rows():
        assert told, f"{PAGE.name}:{number}: no message in backticks"
        assert re.search(r"[.)]$", cure), f"{PAGE.name}:{number}: the cure is no sentence: {cure!r}"
        for row in told:
            assert letters(row) >= 5, f"{PAGE.name}:{number}: `{row}` fits too much"
            assert seen.setdefault(row, number) == number, f"{PAGE.name}:{number}: `{row}` has a row already"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('raise ValueError(f"{a}: no {b!r}")', ["…: no …"]),
        ('raise ValueError("one " f"{a} two")', ["one … two"]),
        ('raise ValueError(f"{a} is " + ("x" if b else "y"))', ["… is x", "… is y"]),
        ('raise ValueError("left one" if a else f"right {b}")', ["left one", "right …"]),
        ('raise Other(kind="unknown thing")', []),
        ('warnings.warn(f"{a}: odd", stacklevel=2)', ["…: odd"]),
        ('self.skipped.add("no sentences", where)', ["no sentences"]),
        ('x = f"three words here {a}"', ["three words here …"]),
        ('"""Three words here."""', []),
        ('CURE = "try again"\nraise ValueError(f"{a}; {CURE}")', ["…; try again"]),
        ('Option(help="three words here")', []),
    ],
)
def test_messages_are_gathered(source: str, expected: list[str], tmp_path, monkeypatch) -> None:
    path = tmp_path / "one.py"
    path.write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [wording for one in messages_of(path) for wording in one.wordings] == expected


def test_a_row_is_found_in_its_message_alone() -> None:
    message = Message("", ("…: image … cannot be read: …; is the file whole?",))
    assert is_row_of("image … cannot be read: …; is the file whole?", message)
    assert not is_row_of("is the file whole? … cannot be read", message)
    assert not is_row_of("cannot", message)
