"""What colour a region is: shares of eleven basic colours, told from hue, saturation and value."""

from __future__ import annotations

import numpy as np

NAMES = ("black", "white", "gray", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
_MOST = 600  # pixels that are looked at


def colour_shares(pixels: np.ndarray) -> dict[str, float]:
    """Shares of the basic colours that people have words for; their borders are our choice.

    Args:
        pixels: uint8 (N, 3), RGB; at least one. Of many, evenly spaced ones are taken.
    """
    rgb = pixels[:: max(1, len(pixels) // _MOST)].astype(np.float64) / 255
    value, low = rgb.max(axis=1), rgb.min(axis=1)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-9)
    red, green, blue = rgb.T
    safe = np.maximum(chroma, 1e-9)
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    hue = hue * 60
    dull = saturation < 0.18
    reddish = (hue < 16) | (hue >= 340)
    found = np.select(
        [
            value < 0.2,
            dull & (value > 0.75),
            dull,
            reddish & (saturation < 0.5) & (value > 0.7),
            reddish,
            (hue < 42) & ((value < 0.62) | (saturation < 0.5)),
            hue < 42,
            hue < 68,
            hue < 165,
            hue < 262,
            hue < 300,
        ],
        [NAMES.index(n) for n in ("black", "white", "gray", "pink", "red", "brown", "orange", "yellow", "green", "blue",
                                  "purple")],
        NAMES.index("pink"),
    )  # fmt: skip
    counts = np.bincount(found, minlength=len(NAMES)) / len(found)
    return dict(zip(NAMES, counts.tolist(), strict=True))
