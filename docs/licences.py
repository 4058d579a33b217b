"""Writes docs/licences.md from the metadata of the installed packages: python docs/licences.py."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).with_name("licences.md")
EXTRAS = ("app", "export", "superpixels")
HEAD = """# Licences of the dependencies

magnet_fast is under Apache-2.0. What it installs has the licences below, as the packages' own metadata name them;
`make licences` writes this page. NVIDIA's libraries (`nvidia-*`, `cuda-toolkit`) come with builds of torch for GPUs
alone, and are not free software. Weights that a model downloads have licences of their own.

"""


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def closure(name: str, extras: tuple[str, ...] = ()) -> dict[str, Distribution]:
    """What an installation of a package brings, by name, as far as it is installed here."""
    found: dict[str, Distribution] = {}
    waiting = [(name, frozenset(extras))]
    seen = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            package = distribution(one[0])
        except PackageNotFoundError:  # of another system or Python
            continue
        found[name_of(one[0])] = package
        for line in package.requires or ():
            needed = Requirement(line)
            wanted = {"", *one[1]}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in wanted):
                waiting.append((name_of(needed.name), frozenset(needed.extras)))
    return found


def licence(package: Distribution) -> str:
    """As the metadata say it: an expression, else classifiers, else the first words of the text."""
    about = package.metadata
    if about.get("License-Expression"):
        return about["License-Expression"]
    classes = [one.rpartition(" :: ")[2] for one in about.get_all("Classifier", []) if one.startswith("License ::")]
    classes = [one for one in classes if one != "OSI Approved"]
    if classes:
        return ", ".join(sorted(set(classes)))
    lines = [line for line in (about.get("License") or "").splitlines() if line.strip()]
    return lines[0].strip()[:60] if lines else "not named in its metadata"


def page() -> str:
    text = HEAD
    seen = {"magnet-fast"}
    for title, extras in (("Always", ()), *((f"With the extra `{extra}`", (extra,)) for extra in EXTRAS)):
        packages = {name: one for name, one in sorted(closure("magnet_fast", extras).items()) if name not in seen}
        seen |= packages.keys()
        text += f"## {title}\n\n| package | licence |\n|---|---|\n"
        text += "".join(f"| {name} | {licence(one)} |\n" for name, one in packages.items()) + "\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
