"""Pictures and masks on the canvas, and back: against torchvision, the released letterbox and plain formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from magnet_fast.data.transforms import Fit, open_fit, open_image, prepare_image, prepare_mask
from magnet_fast.models.contract import InputSpec, Prediction, probability

IMAGENET_MEAN, IMAGENET_STD = InputSpec().mean, InputSpec().std
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GOLDEN = Path(__file__).parent.parent / "golden"


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


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cris_data.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def letterbox() -> Fit:
    side = json.loads((GOLDEN / "cris_data.json").read_text())["side"]
    return open_fit(InputSpec(size=side, fit="letterbox", mean=CLIP_MEAN, std=CLIP_STD))


def test_letterbox_equals_the_released_code(letterbox, golden):
    pixels = letterbox.pixels(golden["image"])
    difference = np.abs(pixels.astype(int) - golden["warped"])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.002  # OpenCV weighs uint8 in fixed point
    expected = torch.from_numpy(golden["input"])
    torch.testing.assert_close(letterbox.normalise(golden["warped"]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(letterbox.image(golden["image"]), expected, rtol=0, atol=1.01 / 255 / min(CLIP_STD))
    soft = letterbox.soft_mask(golden["mask"])
    assert torch.equal(soft, torch.from_numpy(golden["target"]))
    assert torch.equal(letterbox.mask(golden["mask"]), (torch.from_numpy(golden["target"]) > 0.5).to(torch.uint8))


def test_letterbox_goes_back_as_the_released_code(letterbox, golden):
    canvas = torch.from_numpy(golden["probability"])
    size = golden["original"].shape
    back = letterbox.back(canvas, size)
    torch.testing.assert_close(back, torch.from_numpy(golden["original"]), rtol=0, atol=1e-6)
    assert torch.equal(back > 0.35, torch.from_numpy(golden["prediction"]))
    batch = letterbox.back(torch.stack([canvas, 1 - canvas])[:, None], size)
    assert batch.shape == (2, 1, *size) and torch.equal(batch[0, 0], back)


@pytest.mark.parametrize("size", [(60, 97), (97, 60), (64, 64), (7, 200)])
def test_letterbox_is_grid_sample_at_its_coordinates(letterbox, size):
    """The plain formula, in float64 and without OpenCV's rounding of coordinates to 1/32 pixel."""
    height, width = size
    mask = np.zeros(size, dtype=np.uint8)
    mask[height // 4 : height // 2 + 2, width // 3 :] = 1
    scale = min(64 / height, 64 / width)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    x, y = (x - (64 - width * scale) / 2) / scale, (y - (64 - height * scale) / 2) / scale
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)[None].double()
    source = torch.from_numpy(mask)[None, None].double()
    expected = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0]
    assert (letterbox.soft_mask(mask) - expected).abs().max() < 0.04


@pytest.mark.parametrize("fit", ["squash", "letterbox", "longest"])
@pytest.mark.parametrize("size", [(60, 97), (97, 60), (64, 64)])
def test_there_and_back_is_where_it_was(fit, size):
    """A smooth mask comes back to its place: the way back is the inverse of the way there, not shifted or turned."""
    prepare = open_fit(InputSpec(size=128, fit=fit))
    y, x = np.mgrid[: size[0], : size[1]]
    mask = ((y - size[0] * 0.4) ** 2 / 200 + (x - size[1] * 0.6) ** 2 / 300 < 1).astype(np.uint8)
    canvas = prepare.mask(mask)
    assert canvas.shape == (128, 128) and canvas.dtype == torch.uint8 and set(canvas.unique().tolist()) == {0, 1}
    back = (prepare.back(canvas.float(), size) > 0.5).numpy()
    assert back.shape == size
    assert (back & (mask > 0)).sum() / (back | (mask > 0)).sum() > 0.93
    # The image lies where its mask lies.
    picture = np.stack([mask * 255] * 3, axis=2)
    bright = prepare.image(picture)[0] > 0.1
    assert (bright & (canvas > 0)).sum() / (bright | (canvas > 0)).sum() > 0.9


@pytest.mark.parametrize(("size", "extent"), [((37, 61), (29, 48)), ((61, 37), (48, 29)), ((5, 5), (48, 48))])
def test_longest(size, extent):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    fit = open_fit(InputSpec(size=48, fit="longest"))
    prepared = fit.image(noise)
    assert fit.extent(size) == extent and prepared.shape == (3, 48, 48)
    height, width = extent
    inside = vision.resize(Image.fromarray(noise), list(extent))
    inside = vision.normalize(vision.to_tensor(inside), IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(prepared[:, :height, :width], inside, rtol=0, atol=2e-6)
    assert prepared[:, height:].eq(0).all() and prepared[:, :, width:].eq(0).all()
    mask = np.ones(size, dtype=bool)
    assert int(fit.mask(mask).sum()) == height * width
    canvas = torch.rand(2, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(canvas[:, None, :height, :width], size=size, mode="bilinear", align_corners=False)
    assert torch.equal(fit.back(canvas, size), expected[:, 0])


def test_probability_at_the_size_of_the_picture():
    logits = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(logits, presence=torch.tensor([1.0, -1.0]))
    squash = open_fit(InputSpec(size=48))
    assert torch.equal(squash.probability(prediction, (37, 61)), probability(prediction, (37, 61)))
    for name in ("letterbox", "longest"):
        fit = open_fit(InputSpec(size=48, fit=name))
        found = fit.probability(prediction, (37, 61))
        assert torch.equal(found, fit.back(probability(prediction, (48, 48)), (37, 61)))
        assert found.shape == (2, 37, 61) and not found[1].any()


@pytest.mark.parametrize("fit", ["squash", "letterbox", "longest"])
def test_back_needs_a_map_on_the_canvas(fit):
    with pytest.raises(ValueError, match=r"canvas has shape \(2, 24, 24\); expected \(\.\.\., 48, 48\)"):
        open_fit(InputSpec(size=48, fit=fit)).back(torch.zeros(2, 24, 24), (37, 61))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": "crop"}, "fit is 'crop'; expected one of squash, letterbox, longest"),
        ({"mean": (0.5, 0.5)}, "expected three numbers each"),
        ({"std": (0.5, 0.0, 0.5)}, "expected three numbers each, std above 0"),
        ({"size": 0}, "size is 0"),
        ({"size": 100_000}, "size is 100000; expected 1 to 4096 pixels"),
    ],
)
def test_specification_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        open_fit(InputSpec(**change))


def test_mean_and_deviation_are_the_specifications(picture):
    other = open_fit(InputSpec(size=16, mean=CLIP_MEAN, std=CLIP_STD)).image(picture)
    expected = vision.normalize(vision.to_tensor(vision.resize(picture, [16, 16])), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(other, expected, rtol=0, atol=2e-6)
