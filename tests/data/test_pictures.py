"""Pictures of every mode, orientation and way in, against Pillow and plain formulas; what is refused, by name."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from magnet_fast.data.datasets.base import _opened, picture_size, read_picture
from magnet_fast.data.transforms import as_rgb, as_shown, open_image, orientation
from magnet_fast.data.transforms.pictures import opened

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (11, 17, 3), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (11, 17), dtype=np.uint16)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, name: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=name, **options)
    file.seek(0)
    return file


def test_grey_of_16_bits_is_scaled_by_its_range_whichever_way_it_comes(tmp_path: Path) -> None:
    expected = np.round(SIXTEEN / 65535 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(SIXTEEN).save(tmp_path / name)
    (tmp_path / "grey.pgm").write_bytes(b"P5\n17 11\n65535\n" + SIXTEEN.astype(">u2").tobytes())
    big_endian = Image.frombytes("I;16B", (17, 11), SIXTEEN.astype(">u2").tobytes())
    ways = (*(tmp_path / name for name in ("grey.png", "grey.tif", "grey.pgm")), SIXTEEN, SIXTEEN.astype(">u2"))
    for image in (*ways, Image.fromarray(SIXTEEN), big_endian):
        for read in (as_rgb, as_shown):
            assert np.array_equal(pixels(read(image)), expected)
    assert np.array_equal(pixels(as_rgb(SIXTEEN[:, :15].reshape(11, 5, 3))).ravel(), expected[:, :15, 0].ravel())


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_8_bits_are_what_pillow_makes_of_them(mode: str) -> None:
    """Data sets read these as the field's code does, to the byte."""
    image = Image.fromarray(COLOURS).convert(mode)
    for read in (as_rgb, as_shown):
        assert np.array_equal(pixels(read(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_range_that_nothing_tells_is_refused(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(SIXTEEN.astype(np.float32)).convert(mode)
    image.save(tmp_path / "grey.tif")
    with pytest.raises(ValueError, match=rf"^image has pixels of mode {mode}, whose range is not known; scale"):
        as_rgb(image)
    with pytest.raises(ValueError, match=rf"^image .*grey\.tif has pixels of mode {mode}"):
        as_shown(tmp_path / "grey.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA", "P"])
def test_transparency(mode: str) -> None:
    """Stored: the colour beneath, as the field reads it. Shown: on white. Either is said once."""
    half = Image.new("RGBA", (4, 2), (40, 40, 40, 255))
    half.paste((200, 200, 200, 0), (0, 0, 2, 2))
    if mode == "P":
        image = Image.new("P", (4, 2), 1)
        image.putpalette([40, 40, 40, 200, 200, 200])
        image.paste(0, (2, 0, 4, 2))
        image.info["transparency"] = 1
    else:
        image = half.convert("LA").convert(mode) if mode == "La" else half.convert(mode)
    with pytest.warns(UserWarning, match="transparent parts: they are laid on white") as said:
        shown = pixels(as_shown(image))
    assert len(said) == 1
    assert (shown[:, :2] == 255).all() and (shown[:, 2:] == 40).all()
    with pytest.warns(UserWarning, match="transparent parts: the colours stored under them are read"):
        stored = pixels(as_rgb(image))
    assert (stored[:, 2:] == 40).all()
    assert mode in ("RGBa", "La") or (stored[:, :2] == 200).all()  # multiplied by the opacity, nothing is left of it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(as_shown(Image.new("RGBA", (3, 3), (1, 2, 3, 255)))) == (1, 2, 3)).all()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation(name: str, tag: int, tmp_path: Path) -> None:
    exif, options = Image.Exif(), {"lossless": True} if name == "WEBP" else {}
    exif[0x0112] = tag
    path = tmp_path / "photo"
    path.write_bytes(saved(Image.fromarray(COLOURS), name, exif=exif, **options).getvalue())
    stored = np.asarray(Image.open(saved(Image.fromarray(COLOURS), name, **options)))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert tag == 1 or upright.shape != stored.shape or (upright != stored).any()
    assert orientation(path) == tag
    for image in (path, Image.open(path)):
        assert np.array_equal(pixels(as_shown(image)), upright)
    for image in (path, Image.open(path)):
        assert np.array_equal(pixels(as_rgb(image)), stored)
    # What was read as stored stays so, and what was turned is not turned again.
    assert np.array_equal(pixels(as_shown(open_image(path))), stored)
    assert np.array_equal(pixels(as_shown(as_shown(path))), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0" + junk
        for junk in (b"", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40, b"II*\0\xff\xff\xff\xff")
    ],
)
def test_broken_exif_turns_nothing(block: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(COLOURS).save(path, exif=block)
    assert orientation(path) == 1
    assert np.array_equal(pixels(as_shown(path)), pixels(as_rgb(path)))


@pytest.mark.parametrize(("kind", "value"), [("short", 0), ("short", 9), ("short", 65535), ("text", ord("6"))])
def test_an_orientation_that_is_none_turns_nothing(kind: str, value: int, tmp_path: Path) -> None:
    type_, count = (3, 1) if kind == "short" else (2, 2)
    block = struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 0x0112, type_, count, value, 0)
    path = tmp_path / "photo.png"
    Image.fromarray(COLOURS).save(path, exif=block)
    assert orientation(path) == 1 and np.array_equal(pixels(as_shown(path)), COLOURS)


def test_the_first_frame_is_read(tmp_path: Path) -> None:
    other = Image.new("RGB", (17, 11), "red")
    for name in ("frames.png", "frames.tif"):
        Image.fromarray(COLOURS).save(tmp_path / name, save_all=True, append_images=[other])
        assert np.array_equal(pixels(as_shown(tmp_path / name)), COLOURS)
    Image.new("RGB", (17, 11), "blue").save(tmp_path / "frames.gif", save_all=True, append_images=[other])
    assert (pixels(as_rgb(tmp_path / "frames.gif")) == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), r"shape \(4, 5, 3\) and dtype float32; expected uint8 or uint16.*; scale"),
        (np.zeros((4, 5), bool), "dtype bool; .*give them as uint8"),
        (np.zeros((4, 5), np.int64), "dtype int64"),
        (np.zeros((3, 4, 5), np.uint8), r"put the channels last, image\.transpose\(1, 2, 0\)"),
        (np.zeros((4, 5, 4), np.uint8), r"opacity give PIL\.Image\.fromarray\(image\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), "expected at least 1 x 1 pixels"),
        (Image.new("RGB", (0, 5)), "image is 0 x 5 pixels; expected at least 1 x 1"),
    ],
)
def test_what_is_no_picture(image: object, message: str) -> None:
    for read in (as_rgb, as_shown):
        with pytest.raises(ValueError, match=message):
            read(image)


def test_a_transparent_colour_that_is_none_is_told_with_the_file(tmp_path: Path) -> None:
    Image.new("P", (2, 2)).save(tmp_path / "p.gif", transparency=1)
    with Image.open(tmp_path / "p.gif") as image:
        image.load()
        image.info["transparency"] = 999
        for read in (as_rgb, as_shown):
            with pytest.raises(ValueError, match="has mode P, which Pillow cannot make RGB"):
                read(image)


def test_tensors_are_no_pictures() -> None:
    with pytest.raises(TypeError, match=r"image is a Tensor; expected a path, a PIL image, or an array \(H, W, 3\)"):
        as_rgb(torch.zeros(3, 4, 5))


def test_unreadable_files(tmp_path: Path, monkeypatch) -> None:
    def refused(error: type[Exception], message: str, content: bytes | None = None) -> None:
        path = tmp_path / "picture.png"
        if content is not None:
            path.write_bytes(content)
        for read in (open_image, as_shown):
            with pytest.raises(error, match=message) as found:
                read(path)
            assert str(path) in str(found.value) and "\n" not in str(found.value)

    refused(FileNotFoundError, "does not exist")
    whole = saved(Image.fromarray(COLOURS), "PNG").getvalue()
    refused(ValueError, r"is empty \(0 bytes\)", b"")
    refused(ValueError, "cannot be read: .*; is the file whole", whole[: len(whole) // 2])
    refused(ValueError, r"no format that Pillow knows \(HEIC is none\); convert it", b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    refused(ValueError, r"has \d+ pixels; expected at most 100, .* raise PIL\.Image\.MAX_IMAGE_PIXELS", whole)
    with pytest.raises(ValueError, match="is a folder"):
        open_image(tmp_path)


def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """Bytes changed at random: nothing but ValueError with the path comes out, whatever Pillow's readers raise."""
    path, draw, refused = tmp_path / "picture", np.random.default_rng(1), 0
    whole = [saved(Image.fromarray(COLOURS), name).getvalue() for name in ("PNG", "JPEG", "GIF", "BMP", "PPM", "TGA")]
    for _ in range(300):
        content = bytearray(whole[draw.integers(len(whole))])
        for place in draw.integers(0, min(len(content), 300), 4):
            content[place] = draw.integers(256)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                as_shown(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"image {path} ")
    assert 0 < refused < 300


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def denied(path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)  # root may read everything
    with pytest.raises(ValueError, match=r"^image .*a\.png cannot be read: permission denied$"):
        open_image(tmp_path / "a.png")


GREYS = COLOURS.mean(axis=2).astype(np.uint8).repeat(500, axis=0).repeat(500, axis=1)  # more than a reader's buffer


@pytest.fixture(params=["grey.pgm", "grey.tif", "grey.png"])
def grey(request, tmp_path: Path) -> Path:
    Image.fromarray(GREYS).save(tmp_path / request.param)
    return tmp_path / request.param


def mapped(path: Path) -> bool:
    """Whether this process has the file in its memory, where it ends once the file is cut short."""
    return str(path) in Path("/proc/self/maps").read_text()


def test_one_that_is_cut_short_once_it_is_read(grey: Path) -> None:
    with Image.open(grey) as plain:
        plain.load()
        assert mapped(grey) == (grey.suffix != ".png")  # so Pillow has it by itself
    plain.close()
    del plain
    for read in (opened, _opened):
        with read(grey) as picture:
            picture.load()
            assert not mapped(grey)
            assert np.array_equal(np.asarray(picture), GREYS)


def test_one_that_is_cut_short_while_it_is_read(grey: Path, monkeypatch) -> None:
    plain, content = Image.open, grey.read_bytes()

    def cut(path):
        picture = plain(path)
        os.truncate(path, len(content) // 2)
        return picture

    monkeypatch.setattr(Image, "open", cut)
    for read in (as_rgb, as_shown, lambda path: read_picture(path, "RGB")):
        grey.write_bytes(content)
        with pytest.raises(ValueError, match=f"{grey}( cannot be read|: not a readable picture)"):
            read(grey)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    """Pillow would start Ghostscript."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (as_rgb, as_shown, orientation, picture_size, lambda path: read_picture(path, "RGB")):
        with pytest.raises(ValueError, match=r"a\.png is PostScript \(EPS\), a program, which is not run"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [b"P6 65\xf3k\xc4 4 255\n", b"P5 1 1 255*_" + b"x" * 30 + b"\n", b"DDS " + bytes([124]) + bytes(200)],
)
def test_data_sets_name_a_picture_whatever_pillow_raises(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (picture_size, lambda path: read_picture(path, "RGB")):
        with pytest.raises(ValueError, match=r"a\.png: not a readable picture"):
            read(path)


def test_data_sets_refuse_a_picture_that_is_too_large_by_its_size(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for read in (picture_size, lambda path: read_picture(path, "RGB")):
        with pytest.raises(ValueError, match=r"a\.png has 187 pixels; expected at most 100, .*; scale it down"):
            read(path)


def test_a_size_that_shows_only_when_it_is_decoded(monkeypatch) -> None:
    image = Image.new("RGB", (11, 17))

    def load() -> None:
        raise Image.DecompressionBombError("Image size (187 pixels) exceeds limit of 100 pixels")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr(image, "load", load)
    with pytest.raises(ValueError, match="^image has 187 pixels; expected at most 100"):
        as_rgb(image)
