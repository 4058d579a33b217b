"""Every supported family as a tiny model with random weights, and inputs of even and odd sizes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .zoo_sam import PP_FORMULANET, SQUARE, seggpt, segment_anything, timm_sam, transformers_sam, vitdet

EVEN, ODD = (64, 64), (75, 53)


@dataclass(frozen=True)
class Family:
    """A model and how it is called.

    Attributes:
        build: makes the model for images of a size.
        inputs: makes the keyword arguments, or the one positional argument, of a call.
        replaced: upstream class -> how many of it `accelerate` replaces.
        left_alone: upstream class -> how many it leaves alone.
        odd: an image size that makes maps of odd sizes.
    """

    build: Callable[[tuple[int, int]], nn.Module]
    inputs: Callable[[tuple[int, int]], dict[str, Tensor] | Tensor]
    replaced: dict[str, int]
    left_alone: dict[str, int] = field(default_factory=dict)
    odd: tuple[int, int] = ODD

    def model(self, size: tuple[int, int] = EVEN) -> nn.Module:
        """The same random weights every time, none of them zero: a bias or a gate of zero hides what is behind it."""
        torch.manual_seed(0)
        model = self.build(size)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (1.0 if "sampling_offsets.bias" in name else 0.05) * noise
        return model


def call(model: nn.Module, inputs: dict[str, Tensor] | Tensor, **more: Any) -> list[Tensor]:
    """Every floating tensor among the results."""
    dtype = next(model.parameters()).dtype
    if isinstance(inputs, Tensor):
        return flat(model(inputs.to(dtype), **more))
    return flat(model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}, **more))


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, dict):
        result = list(result.values())
    return [tensor for item in result for tensor in flat(item)] if isinstance(result, (list, tuple)) else []


def image(size: tuple[int, int], batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(2))


def pixels(size: tuple[int, int]) -> dict[str, Tensor]:
    return {"pixel_values": image(size)}


def masked_pixels(size: tuple[int, int]) -> dict[str, Tensor]:
    """The second image is smaller than the first: part of it is padding."""
    mask = torch.ones(2, *size, dtype=torch.long)
    mask[1, -size[0] // 4 :] = 0
    return {"pixel_values": image(size), "pixel_mask": mask}


# ---- Swin ---------------------------------------------------------------------------------------------------


def swin_config(**changes: Any) -> Any:
    from transformers import SwinConfig

    settings = {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return SwinConfig(**{**settings, "drop_path_rate": 0.0, **changes})


def backbone_config(**changes: Any) -> Any:
    return swin_config(depths=[2, 1, 1, 1], num_heads=[1, 2, 4, 4], embed_dim=8, **changes)


def timm_swin(size: tuple[int, int], **changes: Any) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    settings = {"patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return SwinTransformer(img_size=size, num_classes=5, **{**settings, "drop_path_rate": 0.0, **changes})


def torchvision_swin(size: tuple[int, int]) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5)


def swin(size: tuple[int, int]) -> nn.Module:
    from transformers import SwinForImageClassification

    return SwinForImageClassification(swin_config(image_size=size))


def swin_backbone(size: tuple[int, int]) -> nn.Module:
    from transformers import SwinBackbone

    return SwinBackbone(swin_config(out_features=["stage1", "stage2"]))


def maskformer(size: tuple[int, int]) -> nn.Module:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerModel, MaskFormerSwinConfig

    swin_of = MaskFormerSwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[2, 1, 1, 1],
        num_heads=[1, 2, 4, 4],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = DetrConfig(
        d_model=32,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        num_queries=5,
        dropout=0.0,
    )
    config = MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=swin_of, decoder_config=decoder
    )
    return MaskFormerModel(config)


def donut_swin(size: tuple[int, int]) -> nn.Module:
    from transformers import DonutSwinConfig, DonutSwinModel

    config = DonutSwinConfig(
        image_size=size, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
    )
    return DonutSwinModel(config)


def clap_audio(size: tuple[int, int]) -> nn.Module:
    from transformers import ClapAudioConfig, ClapAudioModel

    return ClapAudioModel(
        ClapAudioConfig(
            spec_size=64,
            num_mel_bins=16,
            window_size=4,
            patch_embeds_hidden_size=8,
            hidden_size=16,
            depths=[2, 2],
            num_attention_heads=[2, 2],
            drop_path_rate=0.0,
            attention_probs_dropout_prob=0.0,
            projection_dim=16,
        )
    )


def spectrogram(size: tuple[int, int]) -> dict[str, Tensor]:
    """What an image is to the others: time by mel bins, folded to a square map inside."""
    return {"input_features": image((64 if size == EVEN else 53, 16), channels=1)}


# ---- Deformable attention -------------------------------------------------------------------------------------


def mask2former(size: tuple[int, int]) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerModel

    config = Mask2FormerConfig(
        backbone_config=backbone_config(out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
    )
    return Mask2FormerModel(config)


def oneformer(size: tuple[int, int]) -> nn.Module:
    from transformers import OneFormerConfig, OneFormerModel

    config = OneFormerConfig(
        backbone_config=backbone_config(out_features=["stage1", "stage2", "stage3", "stage4"]),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        query_dec_layers=1,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=50,
        text_encoder_context_length=7,
        task_seq_len=7,
        use_task_norm=True,
        is_training=False,
    )
    return OneFormerModel(config)


def with_task(size: tuple[int, int]) -> dict[str, Tensor]:
    return {"pixel_values": image(size), "task_inputs": torch.arange(14).view(2, 7)}


def resnet_config() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def deformable_detr(size: tuple[int, int]) -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        backbone_config=resnet_config(),
        use_timm_backbone=False,
        d_model=64,  # 2 channels a group: the last map has one pixel, and the norm of one number is noise
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=6,
        dropout=0.0,
        with_box_refine=True,
        num_labels=3,
    )
    return DeformableDetrForObjectDetection(config)


def rt_detr_settings() -> dict[str, Any]:
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        "backbone_config": backbone,
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [8, 16, 16],
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "num_queries": 6,
        "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "num_denoising": 0,
        "num_labels": 3,
        "anchor_image_size": None,
    }


def rt_detr(size: tuple[int, int]) -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig(**rt_detr_settings()))


def rt_detr_v2(size: tuple[int, int], **changes: Any) -> nn.Module:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(**{**rt_detr_settings(), "decoder_offset_scale": 0.7, **changes}))


def grounding_dino_settings() -> dict[str, Any]:
    from transformers import BertConfig

    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=60)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(text, name, 0.0)
    return {
        "backbone_config": backbone_config(out_features=["stage2", "stage3", "stage4"]),
        "text_config": text,
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2,
        "num_queries": 6,
        "fusion_droppath": 0.0,
        "dropout": 0.0,
        "text_enhancer_dropout": 0.0,
        "max_text_len": 8,
    }


def grounding_dino(size: tuple[int, int]) -> nn.Module:
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    return GroundingDinoForObjectDetection(GroundingDinoConfig(**grounding_dino_settings()))


def mm_grounding_dino(size: tuple[int, int]) -> nn.Module:
    from transformers import MMGroundingDinoConfig, MMGroundingDinoForObjectDetection

    return MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**grounding_dino_settings()))


def with_text(size: tuple[int, int]) -> dict[str, Tensor]:
    words = torch.tensor([[3, 7, 9, 11, 4, 5], [3, 8, 4, 0, 0, 0]])
    return {**masked_pixels(size), "input_ids": words, "attention_mask": (words > 0).long()}


def with_prompt(size: tuple[int, int]) -> dict[str, Tensor]:
    return {"pixel_values": image(size), "prompt_pixel_values": image(size) + 1, "prompt_masks": image(size) - 1}


LAYERS = {"SwinLayer": 5}
BIDIRECTIONAL = "BiMultiHeadAttention"

FAMILIES = {
    "timm": Family(timm_swin, image, {"SwinTransformerBlock": 4}),
    "timm, any size": Family(
        lambda size: timm_swin(EVEN, strict_img_size=False, always_partition=True, window_size=(3, 5)),
        image,
        {"SwinTransformerBlock": 4},
        odd=(76, 52),
    ),
    "timm, one window": Family(
        lambda size: timm_swin(size, window_size=16, head_dim=4, qkv_bias=False), image, {"SwinTransformerBlock": 4}
    ),
    "torchvision": Family(torchvision_swin, image, {"ShiftedWindowAttention": 4}),
    "Swin": Family(swin, pixels, {"SwinLayer": 4}),
    "Swin backbone": Family(swin_backbone, pixels, {"SwinLayer": 4}),
    "MaskFormer": Family(maskformer, pixels, {"MaskFormerSwinLayer": 5}),
    "Donut": Family(donut_swin, pixels, {"DonutSwinLayer": 4}),
    "CLAP": Family(clap_audio, spectrogram, {"ClapAudioLayer": 4}),
    "Mask2Former": Family(
        mask2former, masked_pixels, {**LAYERS, "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention": 1}
    ),
    "OneFormer": Family(
        oneformer, with_task, {**LAYERS, "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention": 1}
    ),
    "Deformable DETR": Family(deformable_detr, masked_pixels, {"DeformableDetrMultiscaleDeformableAttention": 3}),
    "RT-DETR": Family(rt_detr, pixels, {"RTDetrMultiscaleDeformableAttention": 2}, odd=(96, 160)),
    "RT-DETR v2": Family(rt_detr_v2, pixels, {"RTDetrV2MultiscaleDeformableAttention": 2}, odd=(96, 160)),
    "Grounding DINO": Family(
        grounding_dino,
        with_text,
        {**LAYERS, "GroundingDinoMultiscaleDeformableAttention": 3},
        {"GroundingDino" + BIDIRECTIONAL: 1},
    ),
    "MM Grounding DINO": Family(
        mm_grounding_dino,
        with_text,
        {**LAYERS, "MMGroundingDinoMultiscaleDeformableAttention": 3},
        {"MMGroundingDino" + BIDIRECTIONAL: 1},
    ),
    "SAM": Family(transformers_sam("sam", "Sam"), pixels, {"SamVisionLayer": 2}, odd=SQUARE),
    "SAM, eager": Family(
        transformers_sam("sam", "Sam", attn_implementation="eager"), pixels, {"SamVisionLayer": 2}, odd=SQUARE
    ),
    "SAM-HQ": Family(transformers_sam("sam_hq", "SamHQ"), pixels, {"SamHQVisionLayer": 2}, odd=SQUARE),
    "GOT-OCR2": Family(transformers_sam("got_ocr2", "GotOcr2"), pixels, {"GotOcr2VisionLayer": 2}, odd=SQUARE),
    "PP-FormulaNet": Family(
        transformers_sam("pp_formulanet", "PPFormulaNet", "VisionModel", **PP_FORMULANET),
        pixels,
        {"PPFormulaNetVisionLayer": 2},
        odd=SQUARE,
    ),
    "DeepSeek-OCR2": Family(
        transformers_sam("deepseek_ocr2", "DeepseekOcr2Sam", downsample_channels=[8, 8]),
        pixels,
        {"DeepseekOcr2SamVisionLayer": 2},
        odd=SQUARE,
    ),
    "Unlimited-OCR": Family(
        transformers_sam("unlimited_ocr", "UnlimitedOcrSam", downsample_channels=[8, 8]),
        pixels,
        {"UnlimitedOcrSamVisionLayer": 2},
        odd=SQUARE,
    ),
    "SLANeXt": Family(transformers_sam("slanext", "SLANeXt"), pixels, {"SLANeXtVisionLayer": 2}, odd=SQUARE),
    "timm SAM": Family(timm_sam, image, {"Block": 2}, odd=(72, 56)),
    "segment_anything": Family(segment_anything, image, {"Block": 2}, odd=SQUARE),
    "ViTDet": Family(vitdet, pixels, {"VitDetLayer": 2}, odd=(72, 56)),
    "SegGPT": Family(seggpt, with_prompt, {"SegGptAttention": 2}, odd=(40, 56)),
}
