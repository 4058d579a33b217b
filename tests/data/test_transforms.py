"""Image and mask preparation against torchvision's transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from magnet_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, open_image, prepare_image, prepare_mask


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", [16, 37, 50, 96])
def test_image_equals_torchvision(picture, size):
    expected = vision.to_tensor(vision.resize(picture, [size, size]))
    expected = vision.normalize(expected, IMAGENET_MEAN, IMAGENET_STD)
    prepared = prepare_image(picture, size)
    assert prepared.shape == (3, size, size) and prepared.dtype == torch.float32 and prepared.is_contiguous()
    torch.testing.assert_close(prepared, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [16, 37, 96])
def test_mask_equals_torchvision(size):
    mask = np.random.default_rng(1).random((37, 61)) < 0.4
    expected = vision.resize(Image.fromarray(mask.astype(np.uint8)), [size, size], InterpolationMode.NEAREST)
    for given in (mask, mask.astype(np.uint8), mask.astype(np.int64), mask.astype(np.uint8) * 255):
        prepared = prepare_mask(given, size)
        assert prepared.dtype == torch.uint8
        assert np.array_equal(prepared.numpy(), np.asarray(expected))


def test_array_path_and_image_agree(picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    expected = prepare_image(picture, 24)
    for given in (np.asarray(picture), tmp_path / "picture.png", str(tmp_path / "picture.png")):
        assert torch.equal(prepare_image(given, 24), expected)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")]
)
def test_every_colour_mode_becomes_rgb(picture, tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    picture.convert(mode).save(path)
    assert open_image(path).mode == "RGB"
    assert prepare_image(path, 16).shape == (3, 16, 16)
    assert torch.equal(prepare_image(path, 16), prepare_image(open_image(path), 16))


def test_grey_array(picture):
    grey = np.asarray(picture.convert("L"))
    assert torch.equal(prepare_image(grey, 16), prepare_image(np.stack([grey] * 3, axis=2), 16))


def test_exif_orientation_is_ignored(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.asarray(picture))


def test_unreadable_files_are_named(picture, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg does not exist"):
        prepare_image(tmp_path / "absent.jpg", 8)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty\.jpg is empty \(0 bytes\)"):
        prepare_image(tmp_path / "empty.jpg", 8)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.jpg cannot be read"):
        prepare_image(tmp_path / "text.jpg", 8)
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read.*truncated"):
        prepare_image(tmp_path / "cut.jpg", 8)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (3, TypeError, "image is a int"),
        (np.zeros((4, 4, 3), dtype=np.float32), ValueError, "dtype float32; expected uint8"),
        (np.zeros((3, 4, 4), dtype=np.uint8), ValueError, r"shape \(3, 4, 4\)"),
        (torch.zeros(3, 4, 4), TypeError, "image is a Tensor"),
    ],
)
def test_other_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        prepare_image(image, 8)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-3, ValueError), (8.0, TypeError), (True, TypeError)])
def test_size_is_checked(picture, size, error):
    with pytest.raises(error, match="size is"):
        prepare_image(picture, size)
    with pytest.raises(error, match="size is"):
        prepare_mask(np.zeros((4, 4), dtype=bool), size)


def test_other_masks_are_refused():
    with pytest.raises(TypeError, match="mask is a Tensor"):
        prepare_mask(torch.zeros(4, 4), 8)
    with pytest.raises(ValueError, match="dtype float32"):
        prepare_mask(np.zeros((4, 4), dtype=np.float32), 8)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\)"):
        prepare_mask(np.zeros((1, 4, 4), dtype=bool), 8)
