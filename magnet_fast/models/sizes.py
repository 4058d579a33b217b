"""Sizes of encoders that the presets of several systems share."""

from __future__ import annotations

from typing import Any

SWIN_SIZES: dict[str, dict[str, Any]] = {
    "swin_t": {
        "kind": "swin",
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 7,
        "drop_path": 0.2,
    },
    "swin_s": {"kind": "swin", "embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "window_size": 7},
    "swin_b": {
        "kind": "swin",
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "window_size": 12,
    },
}

TINY_SWIN: dict[str, Any] = {
    "kind": "swin",
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": 8,
    "drop_path": 0.0,
    "absolute_position": True,
}

# The shipped vocabulary has fewer entries; room is left so that it can grow without a new preset.
TINY_BERT: dict[str, Any] = {
    "kind": "bert",
    "vocab_size": 1280,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 128,
    "max_positions": 64,
    "dropout": 0.0,
}

RESNET101: dict[str, Any] = {"kind": "resnet", "name": "resnet101", "frozen_norms": True}

# Strides 4, 8, 16 and 16, as DeepLab's.
DILATED_RESNET101: dict[str, Any] = {**RESNET101, "arguments": {"output_stride": 16}}

# A block a stage; for pictures of 128 pixels.
TINY_RESNET: dict[str, Any] = {
    "kind": "resnet",
    "name": "resnet10t",
    "arguments": {"channels": [16, 32, 64, 128], "stem_width": 16},
}

TINY_DILATED_RESNET: dict[str, Any] = {
    **TINY_RESNET,
    "arguments": {**TINY_RESNET["arguments"], "output_stride": 16},
}

TINY_VECTORS_LSTM: dict[str, Any] = {
    "kind": "vectors_lstm",
    "vocab_size": 1280,
    "vector_width": 64,
    "hidden_size": 64,
    "max_positions": 64,
}
