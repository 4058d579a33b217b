"""`python tests/fuzz/atheris_entry.py TARGET [libFuzzer's options]`: the same targets, led by coverage.

Atheris is no requirement of the tests. Its bytes stand in the place of random numbers, so that a target makes its input
of them.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["magnet_fast"]):
    from tests.fuzz import target_class
from tests.fuzz.target import watch_for_code


class Given(random.Random):
    """Draws that follow from bytes; zeros behind their end."""

    def __new__(cls, content: bytes) -> Given:
        return super().__new__(cls)

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0
        super().__init__(0)

    def getrandbits(self, count: int) -> int:
        """So many of the bytes' bits."""
        end = self.place + (count + 7) // 8
        taken, self.place = self.content[self.place : end].ljust(end - self.place, b"\0"), end
        return int.from_bytes(taken, "little") & ((1 << count) - 1)

    def random(self) -> float:
        """From 0 to below 1."""
        return self.getrandbits(24) / (1 << 24)


def main() -> None:
    """Fuzz until a finding."""
    name = sys.argv.pop(1)
    target = target_class(name)(Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")))
    watch_for_code()
    atheris.Setup(sys.argv, lambda content: target.try_one(Given(content)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
