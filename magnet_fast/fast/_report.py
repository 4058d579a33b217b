"""What `accelerate` found in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

_OURS = "magnet_fast"


@dataclass(frozen=True)
class ModuleReport:
    """One module whose class is known.

    Attributes:
        name: its name in the model; empty for the model itself.
        path: its class before anything was replaced, `package.module.Class`.
        operator: the operator of `magnet_fast.ops` that it runs on now; "rearranged" for a part of our own models that
            runs on PyTorch's, in another order; None where it was left alone.
        remark: why it was left alone, or, of a replaced one, when the original runs nevertheless; or None.
    """

    name: str
    path: str
    operator: str | None
    remark: str | None


@dataclass(frozen=True)
class Report:
    """What `magnet_fast.accelerate` did. `str()` of it is meant for people.

    Attributes:
        modules: every module of a known class, in the order of `named_modules`.
    """

    modules: tuple[ModuleReport, ...]

    @property
    def replaced(self) -> tuple[ModuleReport, ...]:
        """Those that run on a fused operator now."""
        return tuple(module for module in self.modules if module.operator is not None)

    @property
    def left_alone(self) -> tuple[ModuleReport, ...]:
        """Those that run as before; `remark` says why."""
        return tuple(module for module in self.modules if module.operator is None)

    def __str__(self) -> str:
        if not self.modules:
            return "magnet_fast: no attention found that has a fused operator; the model is as it was"
        lines = [f"magnet_fast: {len(self.replaced)} modules replaced, {len(self.left_alone)} left alone"]
        for title, modules in (("replaced", self.replaced), ("left alone", self.left_alone)):
            lines.extend(self._lines(title, modules))
        return "\n".join(lines)

    def _lines(self, title: str, modules: Iterable[ModuleReport]) -> Iterator[str]:
        """Modules that are alike on one line; parts of our own models that run on one operator as well."""
        for (pattern, path, operator, remark), group in groupby(sorted(modules, key=_alike), key=_alike):
            found = list(group)
            package, _, kind = path.rpartition(".")
            if pattern == _OURS:
                kinds = Counter(module.path.rpartition(".")[2] for module in found)
                where = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + " of magnet_fast"
            else:
                where = f"{pattern or 'the model itself'} ({len(found)} x {package.split('.')[0]} {kind})"
            means = f" -> {operator}" if operator else ""
            yield f"  {title}: {where}{means}" + (f"; {remark}" if remark else "")


def _alike(module: ModuleReport) -> tuple[str, str, str, str]:
    """Modules that differ in the numbers of their names alone are one line, and all Linears are."""
    if module.path.startswith("magnet_fast.models.") and module.operator is not None:
        return _OURS, "", module.operator, ""
    pattern = "*" if module.operator == "linear" else re.sub(r"(?<![^.])\d+(?![^.])", "*", module.name)
    return pattern, module.path, module.operator or "", module.remark or ""
