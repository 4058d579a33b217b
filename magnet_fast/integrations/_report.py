"""What `accelerate` found in a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class ModuleReport:
    """One module whose class is known.

    Attributes:
        name: its name in the model; empty for the model itself.
        path: its class before anything was replaced, ``package.module.Class``.
        operator: the operator of :mod:`magnet_fast.ops` that it runs on now, None where it was left alone.
        remark: why it was left alone, or, of a replaced one, when the original runs nevertheless; or None.
    """

    name: str
    path: str
    operator: str | None
    remark: str | None


@dataclass(frozen=True)
class Report:
    """What :func:`magnet_fast.accelerate` did. ``str()`` of it is meant for people.

    Attributes:
        modules: every module of a known class, in the order of ``named_modules``.
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
            for (pattern, path, operator, remark), group in groupby(sorted(modules, key=_alike), key=_alike):
                package, _, kind = path.rpartition(".")
                where = f"{pattern or 'the model itself'} ({len(list(group))} x {package.split('.')[0]} {kind})"
                means = f" -> {operator}" if operator else ""
                lines.append(f"  {title}: {where}{means}" + (f"; {remark}" if remark else ""))
        return "\n".join(lines)


def _alike(module: ModuleReport) -> tuple[str, str, str, str]:
    """Modules that differ in the numbers of their names alone are one line, and all frozen Linears are."""
    pattern = "*" if module.operator == "linear" else re.sub(r"(?<![^.])\d+(?![^.])", "*", module.name)
    return pattern, module.path, module.operator or "", module.remark or ""
