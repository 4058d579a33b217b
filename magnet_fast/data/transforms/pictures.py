"""Pictures from files, arrays and Pillow, always as RGB of 8 bits: as stored, or as a viewer shows them."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Picture = Image.Image | np.ndarray | str | os.PathLike[str]
"""A path, a PIL image, or an array (H, W, 3) RGB or (H, W) grey, uint8 or uint16.

One rule for all of them. Pixels of 16 bits are divided by 257, the mode's range, and rounded, be most of the range
unused. Pixels whose range nothing tells (float; 32-bit integers, but of PNG and PPM files) are refused. Of a file with
several frames it is the first, of a PIL image the current one. Colour profiles are not applied.
"""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = _TURNS | {6: _TURNS[8], 8: _TURNS[6]}
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_CONVERT = "scale its pixels to 0 … 255 and give them as uint8"


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as stored, as data sets do; `as_rgb` of a path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated or otherwise unreadable, or has pixels of a range that nothing tells. All
            name the path.
    """
    return as_rgb(path)


def as_rgb(image: Picture) -> Image.Image:
    """A picture's pixels as stored, RGB.

    EXIF orientation is ignored: COCO's masks are drawn on the pixels as stored. Transparency is dropped, as the field's
    code drops it: what is seen is the colour that is stored under it, and a warning says so once. The result says
    nothing of either any more, so that `as_shown` leaves it as it is.

    Raises:
        TypeError: it is neither a PIL image nor an array nor a path.
        ValueError: an array of another shape or dtype, pixels of a range that nothing tells, or a file that cannot be
            read.
        FileNotFoundError: there is no such file.
    """
    stored, _, name = _stored(image)
    if _is_transparent(stored, name):
        warnings.warn("a picture has transparent parts: the colours stored under them are read", stacklevel=2)
    return _rgb(stored, name)


def as_shown(image: Picture) -> Image.Image:
    """A picture as a viewer shows it, RGB: turned upright by its EXIF orientation, its transparent parts on white.

    A broken EXIF block, or an orientation that is none, turns nothing. A PIL image that was turned by hand and still
    carries the orientation of its file is turned again. A warning says once that something was laid on white.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `as_rgb`.
    """
    stored, turn, name = _stored(image)
    if _is_transparent(stored, name):
        warnings.warn("a picture has transparent parts: they are laid on white", stacklevel=2)
        white = Image.new("RGBA", stored.size, "white")
        white.alpha_composite(_plain_alpha(stored).convert("RGBA"))
        stored = white
    shown = _rgb(stored, name)
    return shown if turn == 1 else shown.transpose(_TURNS[turn])


def orientation(image: Image.Image | str | os.PathLike[str]) -> int:
    """The EXIF orientation of a file or a PIL image, 1 to 8; 1, upright, where there is none or a broken one.

    Of a TIFF that Pillow has decoded it is 1: Pillow turns it upright as it decodes it.

    Raises:
        FileNotFoundError, ValueError: a file that is absent or no picture.
    """
    if not isinstance(image, Image.Image):
        with opened(Path(image)) as file:
            return orientation(file)
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of a broken block, many kinds
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def as_mask(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W), bool or integer, as uint8 of 0 and 1.

    Raises:
        TypeError: it is no NumPy array.
        ValueError: it has another shape, or a dtype of neither kind.
    """
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"mask is a {type(mask).__name__}; expected a NumPy array (H, W)")
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise ValueError(f"mask has shape {mask.shape} and dtype {mask.dtype}; expected (H, W), bool or integer")
    return (mask != 0).astype(np.uint8)


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask uint8 (H, W) at another size (height, width), by Pillow's nearest neighbour."""
    if mask.shape == size:
        return mask
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _stored(image: Picture) -> tuple[Image.Image, int, str]:
    """Pixels as stored, decoded, in whatever mode; the EXIF orientation; what messages call the picture."""
    if isinstance(image, (str, os.PathLike)):
        name = f"image {image}"
        with opened(Path(image)) as file:
            return *_decoded(file, name), name
    if isinstance(image, np.ndarray):
        return _from_array(image), 1, "image"
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image is a {type(image).__name__}; expected a path, a PIL image, or an array (H, W, 3) or (H, W), "
            "uint8 or uint16"
        )
    if 0 in image.size:
        raise ValueError(f"image is {image.width} x {image.height} pixels; expected at least 1 x 1")
    return *_decoded(image, "image"), "image"


def opened(path: Path) -> Image.Image:
    """A picture's file of which the header alone is read.

    Raises:
        FileNotFoundError, ValueError: it is absent, or no picture that Pillow reads; both name the path.
    """
    if path.is_dir():
        raise ValueError(f"image {path} is a folder; expected a picture's file")
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"image {path} is empty (0 bytes)")
    try:
        return opened_plainly(path)
    except ProgramError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {path} cannot be read: no format that Pillow knows (HEIC is none); convert it to JPEG or PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(too_large(error, f"image {path}")) from error
    except PermissionError as error:
        raise ValueError(f"image {path} cannot be read: permission denied") from error
    except Exception as error:  # of a broken file, many kinds
        raise ValueError(f"image {path} cannot be read: {_reason(error)}; is the file whole?") from error


def too_large(error: Image.DecompressionBombError, name: str) -> str:
    """The message of a picture with more pixels than Pillow opens."""
    pixels = re.search(r"\d+", str(error))  # the size itself is lost with the picture
    count, limit = pixels[0] if pixels else "too many", 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return (
        f"{name} has {count} pixels; expected at most {limit}, beyond which Pillow takes it for an attack on the "
        "memory; scale it down, or, where the file is meant so, raise PIL.Image.MAX_IMAGE_PIXELS in Python"
    )


class ProgramError(ValueError):
    pass


def opened_plainly(path: Path) -> Image.Image:
    """Pillow's own `open`, with its own errors; its pixels are read, not mapped into memory.

    Raises:
        ValueError: PostScript, which Pillow has Ghostscript run.
    """
    image = Image.open(path)
    if image.format == "EPS":
        image.close()
        raise ProgramError(f"image {path} is PostScript (EPS), a program, which is not run; convert it to PNG")
    # Of a file by its name Pillow maps plain pixels, and the system kills a process (SIGBUS) that touches a mapped file
    # which another cuts short.
    image.filename = ""
    return image


def _decoded(image: Image.Image, name: str) -> tuple[Image.Image, int]:
    turn = orientation(image)
    try:
        image.load()
    except Image.DecompressionBombError as error:  # of formats whose size shows only now
        raise ValueError(too_large(error, name)) from error
    except Exception as error:  # of a broken file, many kinds
        raise ValueError(f"{name} cannot be read: {_reason(error)}; is the file whole?") from error
    if turn != orientation(image):  # a TIFF, which Pillow turns upright as it decodes it
        image = image.transpose(_BACK[turn])
    return image, turn


def _from_array(pixels: np.ndarray) -> Image.Image:
    shape, dtype = pixels.shape, pixels.dtype
    expected = "expected uint8 or uint16, (H, W, 3) or (H, W)"
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and shape[2] == 3)
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise ValueError(f"image has shape {shape} and dtype {dtype}; {expected}; {_CONVERT}")
    if not fits:
        cure = ""
        if pixels.ndim == 3 and shape[0] == 3:
            cure = "; put the channels last, image.transpose(1, 2, 0)"
        elif pixels.ndim == 3 and shape[2] == 4:
            cure = "; for red, green, blue and opacity give PIL.Image.fromarray(image)"
        raise ValueError(f"image has shape {shape} and dtype {dtype}; {expected}{cure}")
    if 0 in shape:
        raise ValueError(f"image has shape {shape}; expected at least 1 x 1 pixels")
    return Image.fromarray(pixels if dtype == np.uint8 else _to_8_bits(pixels))


def check_range(image: Image.Image, name: str) -> None:
    """ValueError, with the picture's name, for a mode whose pixels are of a range that nothing tells."""
    of_16_bits = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode.startswith(("I", "F")) and not of_16_bits:
        raise ValueError(f"{name} has pixels of mode {image.mode}, whose range is not known; {_CONVERT}")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    # Pillow's own conversion cuts what exceeds 255 off.
    check_range(image, name)
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    rgb = _converted(image, "RGB", name)
    rgb.info = {}
    return rgb


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """0 … 65535 to the nearest of 0 … 255."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _plain_alpha(image: Image.Image) -> Image.Image:
    return image.convert(_PREMULTIPLIED[image.mode]) if image.mode in _PREMULTIPLIED else image


def _is_transparent(image: Image.Image, name: str) -> bool:
    """Whether any pixel is not opaque."""
    if image.mode in _SIXTEEN_BITS or not image.has_transparency_data:
        return False
    return _converted(image, "RGBA", name).getextrema()[3][0] < 255


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        return _plain_alpha(image).convert(mode)
    except (ValueError, ImportError, OSError) as error:  # such as a palette that is too short for its pixels
        raise ValueError(f"{name} has mode {image.mode}, which Pillow cannot make RGB; convert it to RGB") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
