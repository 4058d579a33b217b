"""Docstrings name functions as Sphinx does, :func:`name`; here a name is code and nothing else."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **kwargs: Any) -> str:
    """Drop the role before a name in code."""
    return re.sub(r":(?:func|class|mod|meth):(?=<code>|<a|<autoref)", "", html).replace("::</p>", ":</p>")
