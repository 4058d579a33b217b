"""Pictures of every common format, their bytes mutated: through `magnet-fast segment`, and the readers of data sets."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import typer
from PIL import Image

from magnet_fast import inference, models
from magnet_fast.cli import app
from magnet_fast.data import Tokenizer
from magnet_fast.data.check import picture_header
from magnet_fast.data.datasets.base import picture_size, read_picture
from magnet_fast.data.importing.drawings import mask_file
from magnet_fast.data.transforms import as_rgb, as_shown, orientation
from tests.fuzz.mutating import mutated_bytes
from tests.fuzz.target import READ, Finding, Target, outcome_of

_PROGRAM = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(canary) (w) file closefile\nshowpage\n%%EOF\n"
)
_FORMATS = (
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "TGA",
    "ICO",
    "PCX",
    "JPEG2000",
    "DDS",
    "SGI",
    "IM",
    "MSP",
    "XBM",
    "AVIF",
    "QOI",
)


class FuzzTarget(Target):
    """A picture of RGB in 8 bits and the size that the header says, or an error that names the file."""

    quick: ClassVar[int] = 150
    batch: ClassVar[int] = 2000
    long: ClassVar[int] = 100_000
    memory: ClassVar[int] = 4 << 30  # Pillow opens 179 million pixels

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        Image.init()
        self.seeds = [_PROGRAM]
        noise = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
        picture = Image.fromarray(noise, "RGBA")
        for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "LA"):
            for format in _FORMATS:
                if format not in Image.SAVE:
                    continue
                exif = Image.Exif()
                exif[0x0112] = 6
                file = io.BytesIO()
                try:
                    picture.convert(mode if mode != "I;16" else "I").convert(mode).save(file, format, exif=exif)
                except (OSError, ValueError, KeyError, TypeError, SystemError):  # a mode that the format lacks
                    continue
                self.seeds.append(file.getvalue())
        frames = io.BytesIO()
        picture.convert("RGB").save(frames, "GIF", save_all=True, append_images=[picture.convert("RGB")])
        self.seeds.append(frames.getvalue())
        self.path, self.canary, self.out = folder / "picture", folder / "canary", folder / "out"
        self.out.mkdir()
        torch.manual_seed(0)
        model = models.create("magnet_tiny", input={"size": 32, "max_tokens": 16})
        segmenter = inference.Segmenter(model, Tokenizer())
        self.command = typer.main.get_command(app)
        # A tenth of a second for each picture else.
        inference.Segmenter.from_checkpoint = lambda *_, **__: segmenter
        picture.convert("RGB").save(self.path, "PNG")
        self._segment(self.path)  # everything is imported
        self._look(READ)

    def try_one(self, draw: random.Random) -> str:
        content = draw.choice(self.seeds)
        if content.startswith(b"\x89PNG") and draw.random() < 0.5:
            content = _chunks(draw, content)
        elif draw.random() < 0.95:
            content = mutated_bytes(draw, content, self.seeds, most=4)
        self.path.write_bytes(content)
        readers = [as_shown, as_shown, as_rgb, orientation, picture_size, picture_header, self._as_rgb, self._as_mask]
        whole = draw.random() < 0.05 and _pixels(self.path) < 1 << 22
        reader = self._segment if whole else draw.choice(readers)

        def read() -> None:
            found = reader(self.path)
            if isinstance(found, Image.Image):
                if found.mode != "RGB" or min(found.size) < 1:
                    raise Finding(f"a picture of mode {found.mode} and size {found.size}")
                found.load()

        outcome = outcome_of(read, self.path, named=str(self.path), writes=self.out)
        if reader == self._segment:
            self._look(outcome)
        if self.canary.exists():
            raise Finding("code of the picture was run")
        return outcome

    def _segment(self, path: Path) -> None:
        """By the command line: a mask, or one line that says what is wrong with the picture."""
        mask, overlay = self.out / "mask.png", self.out / "overlay.png"
        words = ["segment", path, "the red one", "--out", mask, "--overlay", overlay, "--device", "cpu"]
        said, status = io.StringIO(), 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                self.command.main([str(word) for word in words], prog_name="magnet-fast")
            except SystemExit as end:
                status = end.code
        told = said.getvalue()
        if status == 2 and told.startswith("error: ") and told.count("\n") == 1:
            raise ValueError(told)
        if status:
            raise Finding(f"status {status}: {told[-300:]}")

    def _look(self, outcome: str) -> None:
        """What the command has written, which is taken away."""
        left = sorted(path.name for path in self.out.iterdir())
        if left != (["mask.png", "overlay.png"] if outcome == READ else []):
            raise Finding(f"{outcome}, and {left} was written")
        if outcome == READ:
            with Image.open(self.out / "mask.png") as mask, Image.open(self.out / "overlay.png") as overlay:
                if mask.size != overlay.size or mask.size != as_shown(self.path).size:
                    raise Finding(f"a mask of {mask.size} and an overlay of {overlay.size}")
            for name in left:
                (self.out / name).unlink()

    def _as_rgb(self, path: Path) -> np.ndarray:
        return read_picture(path, "RGB")

    def _as_mask(self, path: Path) -> object:
        return mask_file(path)(9, 14)


def _pixels(path: Path) -> int:
    """Of a picture that opens."""
    try:
        with Image.open(path) as picture:
            return picture.width * picture.height
    except Exception:  # what becomes of it is seen by the reader
        return 0


def _chunks(draw: random.Random, content: bytes) -> bytes:
    """A PNG with a chunk changed, left out, repeated or moved, and its checks right."""
    place, chunks = 8, []
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    number = draw.randrange(len(chunks))
    kind, data = chunks[number]
    change = draw.randrange(5)
    if change == 0:
        del chunks[number]
    elif change == 1:
        chunks.insert(draw.randrange(len(chunks)), chunks[number])
    elif change == 2:
        chunks[number] = (
            draw.choice([b"IHDR", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fdAT", b"eXIf", b"iTXt"]),
            data,
        )
    elif kind == b"IDAT" and draw.random() < 0.7:
        try:
            data = zlib.decompress(data)
        except zlib.error:
            return content
        chunks[number] = (kind, zlib.compress(mutated_bytes(draw, data, most=2)))
    else:
        chunks[number] = (kind, mutated_bytes(draw, data, most=2))
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
