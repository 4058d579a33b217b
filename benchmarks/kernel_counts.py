"""What one run of each Triton kernel moves and computes, so that a measured time becomes a share of a ceiling.

Every function returns, kernel by kernel in the order of the launches, "bytes" of the tensors that a kernel reads or
writes, each counted once however often its tiles are read again, and "flops" of its products, 2 for a multiplication
and an addition. Small tensors of the words are left out. What an operator cannot do without, whatever its kernels, is
`floor` in its benchmark.
"""

from __future__ import annotations

import torch

Counts = dict[str, dict[str, int]]

_FLOAT32 = 4


def cross_modal(
    form: str, batch: int, pixels: int, words: int, heads: int, d: int, dtype: torch.dtype, backward: bool
) -> Counts:
    """Cross-modal attention from one similarity: `form` is both, image (pixels read) or text (words read).

    Separate similarities are one run of "image" and one of "text". `backward`: the backward pass alone.
    """
    from magnet_fast.kernels._cross_modal_launch import Similarity

    def meta(rows: int) -> torch.Tensor:
        return torch.empty(batch, rows, heads * d, dtype=dtype, device="meta")

    image, text = form != "text", form != "image"
    values = meta(words) if image else None, meta(pixels) if text else None
    cut = Similarity(meta(pixels), meta(words), *values, None, heads, 1.0, backward)
    tensor = batch * pixels * heads * d * dtype.itemsize
    scores = batch * heads * pixels * cut.block_t
    product = 2 * batch * pixels * words * heads * d
    # What the runs leave for the words, to be merged.
    parts = batch * heads * cut.runs * cut.block_t * d * _FLOAT32

    def counts(tensors: int, arrays: int, products: int, kept: int = 0, narrow: int = 0) -> dict[str, int]:
        moved = tensors * tensor + arrays * scores * _FLOAT32 + narrow * scores * dtype.itemsize + kept * parts
        return {"bytes": moved, "flops": products * product}

    if not backward:
        if not cut.wide:
            found = {"forward": counts(1 + image + text, 0, 1 + image + text, text)}
        else:
            found = {"product": counts(1 + image, int(text), 1 + image)}
            if text:
                found["forward"] = counts(1, 1, 1, 1)
        return found | ({"merge": counts(0, 0, 0, 1)} if text else {})
    found = {}
    if not cut.wide:
        if text:
            found["statistics"] = counts(2, 0, 2)
        found["backward"] = counts(2 + image + 2 * text, 0, 3 + 2 * image + 2 * text, 1 + image)
    else:
        found["product"] = counts(1 + image + text, 1 + image + text, 1 + image + text)
        if text:
            found["statistics"] = counts(0, 2, 0)
        found["weights"] = counts(0, 1 + image + text, 0, narrow=1 + image + text)
        found["apply"] = counts(2 + image + text, 0, 2 + image + text, 1 + image, narrow=1 + image + text)
    return found | {"merge": counts(0, 0, 0, 1 + image)}


def deformable(
    batch: int, positions: int, queries: int, heads: int, points: int, d: int, dtype: torch.dtype, backward: bool
) -> Counts:
    """Deformable attention with all gradients but the reference points'; offsets in float32, `points` of one query.

    Reads of corners, 4 * points * d numbers a query and head, come from the L2 where the maps fit into it: "corners"
    are their bytes, beside "bytes".
    """
    rows, values = batch * queries * heads, batch * positions * heads * d * dtype.itemsize
    out, placed = rows * d * dtype.itemsize, rows * points * (2 * _FLOAT32 + dtype.itemsize)
    corners, flops = rows * points * 4 * d * dtype.itemsize, rows * points * 8 * d
    if not backward:
        return {"forward": {"bytes": values + placed + out, "corners": corners, "flops": flops}}
    number = rows * points * 4  # an int32 of each point
    return {
        "count": {"bytes": rows * points * 2 * _FLOAT32 + 2 * number, "flops": 0},
        "list": {"bytes": 3 * number, "flops": 0},
        "sort": {"bytes": placed + 2 * number + 5 * number, "flops": 0},
        "gather": {"bytes": 5 * number + out + values, "corners": corners, "flops": flops},
        "backward": {"bytes": values + 2 * placed + out, "corners": corners, "flops": flops},
    }


def pixel_contrastive(batch: int, pixels: int, channels: int, dtype: torch.dtype, backward: bool) -> Counts:
    """The pixel contrastive loss. The backward pass makes the similarities again, once for each block of the gradient's
    channels."""
    from magnet_fast.kernels import pixel_contrastive_loss as kernels

    features, product = batch * pixels * channels * dtype.itemsize, 2 * batch * pixels * pixels * channels
    if not backward:
        return {"norm": {"bytes": features, "flops": 0}, "forward": {"bytes": features, "flops": product}}
    blocks = -(-channels // kernels._GRADIENT_CHANNELS)
    pieces = 2 if dtype == torch.bfloat16 else 1
    return {"backward": {"bytes": 2 * features, "flops": (blocks + pieces) * product}}


def relative(
    batch: int, tokens: int, window: tuple[int, int], heads: int, d: int, dtype: torch.dtype, backward: bool
) -> Counts:
    """Relative attention with all gradients. Partial sums of the tables' and of the padding token's are left out."""
    numbers = batch * tokens * heads
    tensor, wide = numbers * d * dtype.itemsize, numbers * d * _FLOAT32
    products, statistics = numbers * sum(window) * _FLOAT32, numbers * 2 * _FLOAT32
    pairs, positions = 2 * numbers * window[0] * window[1] * d, 2 * numbers * sum(window) * d
    found = {"positions": {"bytes": tensor + products, "flops": positions}}
    if not backward:
        return found | {"forward": {"bytes": 4 * tensor + products, "flops": 2 * pairs}}
    return found | {
        "statistics": {"bytes": 4 * tensor + products + statistics, "flops": 2 * pairs},
        "backward_queries": {"bytes": 4 * tensor + wide + 2 * products + statistics, "flops": 3 * pairs},
        "backward_keys": {"bytes": 6 * tensor + products + statistics, "flops": 4 * pairs},
        "positions_queries": {"bytes": tensor + 3 * wide + products, "flops": positions},
        "positions_tables": {"bytes": tensor + products, "flops": positions},
    }
