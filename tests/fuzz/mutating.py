"""Mutations: of bytes, which keep some of a format's structure by chance, and of trees of lists and dicts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

ODD = [
    None, True, False, "", "x", "64", 0, -1, 1.5, -0.0, 5e-324, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**32,
    2**53 + 1, 2**63, 2**64, -(2**63), 10**400, [], {}, [[]], [None], {"counts": []}, {"size": [18, 24], "counts": ""},
    "\ud800", "\x00", "0" * 500, "o" * 500, [0] * 500, [[1, 2]] * 50,
]  # fmt: skip
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)


def mutated_bytes(draw: random.Random, content: bytes, others: Sequence[bytes] = (), most: int = 6) -> bytes:
    """A content with up to `most` changes; now and then a part of another one in it."""
    found = bytearray(content)
    for _ in range(draw.randint(1, most)):
        place = draw.randint(0, len(found))
        end = min(len(found), place + draw.choice([1, 1, 2, 4, 8, 16, 64, 1000]))
        change = draw.randrange(10)
        if change == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif change == 1 and place < len(found):
            found[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        elif change == 2:
            del found[place:end]
        elif change == 3:
            found[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 2, 4, 9])))
        elif change == 4:
            found[place:place] = found[place:end] * draw.choice([1, 2, 30])
        elif change == 5:
            del found[place:]
        elif change in (6, 7):  # a length, an offset or a count
            width = draw.choice([1, 2, 4, 8])
            number = draw.choice([*_NUMBERS, draw.getrandbits(8 * width)]) & ((1 << 8 * width) - 1)
            found[place : place + width] = number.to_bytes(width, draw.choice(["little", "big"]))
        elif change == 8 and others:
            other = draw.choice(others)
            start = draw.randint(0, len(other))
            found[place:end] = other[start : start + draw.choice([4, 30, 300, 10_000])]
        else:
            target = draw.randint(0, len(found))
            found[target:target] = found[place:end]
    return bytes(found[: 4 * len(content) + 4096])


def mutated_tree(draw: random.Random, node: Any, odd: Sequence[Any] = ODD) -> Any:
    """A nested value with one change somewhere in it; what is given stays as it is."""
    inner = list(range(len(node))) if isinstance(node, list) else list(node) if isinstance(node, dict) else []
    if inner and draw.random() < 0.75:  # further down
        key = draw.choice(inner)
        node = node.copy()
        node[key] = mutated_tree(draw, node[key], odd)
        return node
    change = draw.randrange(7)
    if change == 0:
        return draw.choice(odd)
    if change == 1:
        return [node]
    if isinstance(node, list) and node:
        place = draw.randrange(len(node))
        return [
            node[:place],
            node[:place] + node[place + 1 :],
            node * draw.choice([2, 3, 50]),
            node[:place] + [draw.choice(odd)] + node[place:],
            draw.sample(node, len(node)),
        ][change - 2]
    if isinstance(node, dict) and node:
        key = draw.choice(list(node))
        left = {name: value for name, value in node.items() if name != key}
        also = {**node, draw.choice([*node, "size", "counts", "x"]): node[key]}
        return [left, {**left, key: draw.choice(odd)}, also][change % 3]
    if isinstance(node, str):
        place = draw.randint(0, len(node))
        one = chr(draw.choice([draw.randrange(48, 112), draw.randrange(0x2000)]))
        return [node[:place], node[:place] + one + node[place:], node[:place] + one + node[place + 1 :], node * 3][
            change % 4
        ]
    if isinstance(node, (int, float)) and abs(node) < 1e300:
        return [node + 1, node - 1, node + 0.5, -node, node * 10 ** draw.randint(1, 20), float(node), str(node)][change]
    return draw.choice(odd)


def nested(draw: random.Random, depth: int) -> str:
    """JSON of lists or dicts in one another."""
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    return opening * depth + "1" + closing * depth
