"""A small SAM of transformers with random weights, and ours of its sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import SamConfig, SamModel

WIDTH, LAYERS, HEADS, WINDOW, GLOBAL, SIDE = 48, 4, 3, 7, (1, 3), 128
COMMON, DECODER_HEADS = 64, 4

IMAGE: dict[str, Any] = {
    "kind": "sam_vit", "embed_dim": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "window_size": WINDOW,
    "global_layers": GLOBAL, "taps": (1, 2, 3), "image_size": SIDE,
}  # fmt: skip


def their_sam() -> SamModel:
    """With values in every table: SAM's positions start at 0."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH, "output_channels": COMMON, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "image_size": SIDE, "window_size": WINDOW, "global_attn_indexes": GLOBAL, "num_pos_feats": COMMON // 2,
        "initializer_range": 0.02,
    }  # fmt: skip
    prompt = {"hidden_size": COMMON, "image_size": SIDE}
    decoder = {"hidden_size": COMMON, "mlp_dim": 96, "num_attention_heads": DECODER_HEADS, "iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model = SamModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        small = 0.15 if parameter.ndim > 1 else 0.05
        noise = small * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    model.shared_image_embedding.positional_embedding.data *= 5
    return model


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as SAM's own code names them."""
    pairs = [
        ("vision_encoder.layers.", "image_encoder.blocks."), ("vision_encoder.", "image_encoder."),
        ("patch_embed.projection", "patch_embed.proj"), ("neck.conv1", "neck.0"), ("neck.layer_norm1", "neck.1"),
        ("neck.conv2", "neck.2"), ("neck.layer_norm2", "neck.3"), ("upscale_layer_norm", "output_upscaling.1"),
        ("upscale_conv1", "output_upscaling.0"), ("upscale_conv2", "output_upscaling.3"), ("layer_norm", "norm"),
        ("norm_final_attn", "norm_final_attn"), (".layers.0.weight", ".layers.1.weight"),
        (".layers.0.bias", ".layers.1.bias"), ("proj_in", "layers.0"), ("proj_out", "layers.2"),
        ("shared_image_embedding.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ]  # fmt: skip
    found = {}
    for name, value in state.items():
        if name.startswith("prompt_encoder.shared_embedding"):
            continue
        for theirs, own in pairs:
            name = name.replace(theirs, own)
        found[name] = value
    return found
