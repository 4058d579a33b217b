"""Superpixels of a picture: regions of like pixels, one beside the other, by scikit-image's SLIC."""

from __future__ import annotations

import numpy as np

MOST = 64
"""Superpixels of a picture [our choice]."""
NONE = 255
"""The label of what belongs to none."""


def superpixels(pixels: np.ndarray, count: int = MOST) -> np.ndarray:
    """Cut a picture into superpixels.

    SLIC (Achanta et al., PAMI 2012) in CIELAB, with scikit-image's compactness of 10. Of more than `count` the smallest
    ones each join the large one whose centre is nearest.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        count: the most labels, 1 to 255.

    Returns:
        uint8 (H, W), labels from 0 on, each of which occurs.

    Raises:
        ImportError: scikit-image is not installed.
        TypeError, ValueError: `pixels` is no such picture, or `count` out of bounds.
    """
    if not 1 <= count <= NONE:
        raise ValueError(f"count is {count}; expected 1 to {NONE}")
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels: expected uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected (H, W, 3) with no empty dimension, got {pixels.shape}")
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError("superpixels need scikit-image: pip install 'magnet_fast[superpixels]'") from error
    labels = slic(pixels, n_segments=count, start_label=0, channel_axis=-1)
    return at_most(np.unique(labels, return_inverse=True)[1].reshape(labels.shape), count)


def at_most(labels: np.ndarray, count: int) -> np.ndarray:
    """Labels int (H, W), 0 to n - 1, each of which occurs, to uint8 of at most `count`: small ones join large ones."""
    areas = np.bincount(labels.ravel())
    rows, columns = np.indices(labels.shape)
    centres = np.stack([np.bincount(labels.ravel(), place.ravel()) for place in (rows, columns)], axis=1)
    centres = centres / areas[:, None]
    order = np.argsort(-areas, kind="stable")
    kept = np.sort(order[:count])
    distances = np.square(centres[:, None] - centres[kept]).sum(axis=2)
    new = distances.argmin(axis=1)
    new[kept] = np.arange(len(kept))  # itself, though another may have the same centre
    return new.astype(np.uint8)[labels]
