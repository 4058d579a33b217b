"""SAM's image encoder and those made after it, tiny and with random weights: see zoo.py."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

# Maps of 8 x 8 tokens, whole windows, and of 9 x 9, padded ones. Layer 1 reads the whole map.
SQUARE = (72, 72)
# What follows the image encoder, millions of weights else.
PP_FORMULANET = {
    "post_conv_in_channels": 8,
    "post_conv_mid_channels": 8,
    "post_conv_out_channels": 8,
    "decoder_hidden_size": 8,
}


def sam_settings(size: tuple[int, int]) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size[0],
        "patch_size": 8,
        "mlp_dim": 32,
        "window_size": 4,
        "global_attn_indexes": [1],
        "output_channels": 8,
    }


def transformers_sam(
    name: str, prefix: str, encoder: str = "VisionEncoder", **changes: Any
) -> Callable[..., nn.Module]:
    """A builder of the image encoder in `transformers.models.<name>`."""

    def build(size: tuple[int, int]) -> nn.Module:
        package = f"transformers.models.{name}"
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not in this version of transformers")
        config = getattr(importlib.import_module(f"{package}.configuration_{name}"), f"{prefix}VisionConfig")
        cls = getattr(importlib.import_module(f"{package}.modeling_{name}"), f"{prefix}{encoder}")
        return cls(config(**{**sam_settings(size), **changes}))

    return build


def timm_sam(size: tuple[int, int]) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        img_size=size,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        neck_chans=8,
        num_classes=0,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )


def segment_anything(size: tuple[int, int]) -> nn.Module:
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=size[0],
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        out_chans=8,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )


def vitdet(size: tuple[int, int]) -> nn.Module:
    """Of the even size always: for other maps it resizes its tables."""
    from transformers import VitDetConfig, VitDetModel

    return VitDetModel(
        VitDetConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=64,
            pretrain_image_size=64,
            patch_size=8,
            window_size=4,
            window_block_indices=[0],
            residual_block_indices=[0],
            use_relative_position_embeddings=True,
        )
    )


def seggpt(size: tuple[int, int]) -> nn.Module:
    from transformers import SegGptConfig, SegGptModel

    return SegGptModel(
        SegGptConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_dim=32,
            image_size=[2 * size[0], size[1]],
            patch_size=8,
            pretrain_image_size=32,
            decoder_hidden_size=8,
            merge_index=0,
            intermediate_hidden_state_indices=[0, 1],
        )
    )
