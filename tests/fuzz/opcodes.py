"""Pickles taken to pieces, opcode by opcode, and put together with other ones: programs that ask for anything."""

from __future__ import annotations

import pickle
import pickletools
import random
import struct
from pathlib import Path

from tests.fuzz.mutating import mutated_bytes


def program(draw: random.Random, pickles: list[bytes], canary: Path) -> bytes:
    """One of the pickles, with up to five opcodes changed, or bytes of it."""
    content = draw.choice(pickles)
    if draw.random() < 0.4:
        return mutated_bytes(draw, content, pickles)
    pieces = split(content)
    for _ in range(draw.randint(1, 5)):
        place = draw.randrange(len(pieces) + 1)
        change = draw.randrange(6)
        if change == 0 and place < len(pieces):
            del pieces[place]
        elif change == 1 and place < len(pieces):
            pieces.insert(draw.randrange(len(pieces)), pieces[place])
        elif change == 2 and place < len(pieces):
            other = draw.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], pieces[place]
        elif change == 3:
            pieces[place:place] = split(draw.choice(pickles))[: draw.choice([1, 3, 20])]
        elif change == 4:
            pieces.insert(place, draw.choice(attacks(draw, canary)))
        else:
            pieces.insert(place, draw.choice(_single(draw)))
    return b"".join(pieces)


def split(content: bytes) -> list[bytes]:
    """The opcodes, each with its argument; one piece where it is no whole pickle."""
    try:
        places = [place for _, _, place in pickletools.genops(content)]
    except ValueError:
        return [content]
    return [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]


def attacks(draw: random.Random, canary: Path) -> list[bytes]:
    """Snippets that a reader which runs them is told by: a file comes into being, or the audit hook sees the call."""
    touch = f"touch {canary}".encode()
    code = f"open({str(canary)!r}, 'w')".encode()
    depth = draw.choice([10, 1000, 30_000, 300_000])
    huge = struct.pack("<I", draw.choice([1 << 20, (1 << 28) - 1, 0xFFFFFFFF]))
    return [
        b"cos\nsystem\n(S'" + touch + b"'\ntR0",
        b"cposix\nsystem\n(S'" + touch + b"'\ntR",
        b'cbuiltins\nexec\n(S"' + code + b'"\ntR',
        b'c__builtin__\neval\n(S"' + code + b'"\ntR',
        b"(S'" + touch + b"'\nios\nsystem\n",
        b"(cos\nsystem\nS'" + touch + b"'\no",
        b"\x8c\x02os\x8c\x06system\x93S'" + touch + b"'\n\x85R",
        b"csubprocess\nPopen\n(S'" + touch + b"'\ntR",
        b'cbuiltins\ngetattr\n(cos\nenviron\nS"clear"\ntR(tR',
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1000000000\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntRI00\nS''\ntb",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(I1000000000\nt(I0\ntI00\nNtR",
        b"cmagnet_fast.inert\nStandIn\n)\x81}S'x'\nI1\nsb",
        b"ctorch.nn.modules.linear\nLinear\n)\x81}S'weight'\nNsb",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR",
        b"(" + b"l(" * min(depth, 30_000),
        b"}(" + b")" + b"\x85" * depth + b"K\x01u",
        b"(" + b")" + b"\x85" * depth + b"\x91" + b"0",
        b"r" + huge,
        b"j" + huge,
        b"T" + huge,
        b"\x8e" + struct.pack("<Q", draw.choice([1 << 31, 1 << 40, (1 << 63) - 1])) + b"x",
        b"\x95" + struct.pack("<Q", draw.choice([0, 5, 1 << 40, (1 << 64) - 1])),
        b"\x8b" + huge + b"\x01",
        b"I" + b"9" * 5000 + b"\n",
        b"\x82\x01",
        b"Pnumber\n",
        b"K\x01Q",
    ]


def _single(draw: random.Random) -> list[bytes]:
    return [
        bytes([draw.randrange(256)]),
        b"(",
        b"t",
        b"l",
        b"d",
        b".",
        b"0",
        b"2",
        b"N",
        b"R",
        b"b",
        b"\x81",
        b"}",
        b"]",
        b"e",
        b"u",
        b"s",
        b"a",
        b"\x94",
        b"h\x00",
        b"q\x00",
    ]


def dumped(contents: list[object]) -> list[bytes]:
    """Pickles of every protocol."""
    return [pickle.dumps(one, protocol) for one in contents for protocol in (0, 1, 2, 4, 5)]
