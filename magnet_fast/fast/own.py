"""Our own models: which part has which fast form. Imported when a part of them is found, never before."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from magnet_fast.fast import own_convolutional, own_fusion, own_heads, own_sam, own_swin
from magnet_fast.fast._replacement import Replacement, names


def _part(path: str, mixin: type, operator: str, *methods: str, remark: str | None = None) -> Replacement:
    """One class below `magnet_fast.models`; methods as "name: parameter parameter"."""
    note: Callable[[nn.Module], str | None] = lambda module: remark  # noqa: E731
    signatures = (method.partition(":")[::2] for method in methods)
    return Replacement(
        path=f"magnet_fast.models.{path}",
        mixin=mixin,
        operator=operator,
        parameters={name: (names(given), names()) for name, given in signatures},
        attributes=(),
        bypassed={},
        note=note,
    )


_EXCHANGE = "forward: feature words word_mask"
_CLOSED = "in inference a closed text gate is not computed"

REPLACEMENTS = (
    _part("encoders.swin.SwinEncoder", own_swin.SwinEncoder, "rearranged", "start: image", "stage: i stream",
          remark="one image for several expressions runs through the first stage once"),
    _part("encoders.swin.SwinBlock", own_swin.SwinBlock, "linear", "forward: x"),
    _part("encoders.swin.WindowAttention", own_swin.WindowAttention, "window_attention", "forward: x"),
    _part("encoders.swin.Mlp", own_swin.Mlp, "linear", "forward: x"),
    _part("encoders.swin.PatchEmbed", own_swin.PatchEmbed, "rearranged", "position: x"),
    _part("encoders.swin.PatchMerging", own_swin.PatchMerging, "linear", "neighbours: x", "forward: x"),
    _part("encoders.sam_vit.SamLayer", own_sam.SamLayer, "linear", "forward: x"),
    _part("encoders.sam_vit.SamAttention", own_sam.SamAttention, "relative_attention", "forward: x"),
    _part("encoders.clip_resnet.Bottleneck", own_convolutional.Bottleneck, "convolution", "forward: x"),
    _part("heads.topdown.ConvBlock", own_convolutional.ConvBlock, "convolution"),
    _part("heads.text_kernel.Projector", own_convolutional.Projector, "rearranged", "forward: x sentence size",
          remark="the sentence's kernel is a product"),
    _part("fusion.exchange.PooledLevel", own_fusion.PooledLevel, "linear", "forward: feature"),
    _part("fusion.exchange.Mixer", own_fusion.Mixer, "linear", "forward: levels full size",
          remark="pooled levels are mixed before they are upsampled"),
    _part("fusion.exchange.PWAMExchange", own_fusion.PWAMExchange, "rearranged", _EXCHANGE, remark=_CLOSED),
    _part("fusion.exchange.XMHAExchange", own_fusion.XMHAExchange, "rearranged", _EXCHANGE, remark=_CLOSED),
    _part("fusion.pixel_word.PWAM", own_fusion.PWAM, "cross_modal_attention", "forward: pixels words word_mask",
          remark="words are projected, not pixels"),
    _part("fusion.pixel_word.TextPWAM", own_fusion.TextPWAM, "cross_modal_attention", "read: query pixels word_mask",
          remark="words are projected, not pixels"),
    _part("fusion.pixel_word.Gate", own_fusion.Gate, "linear", "forward: stream residual"),
    _part("heads.pixel_decoder.PixelDecoder", own_heads.PixelDecoder, "linear", "mix: maps", "forward: maps"),
    _part("heads.pixel_decoder.PyramidPixelDecoder", own_heads.PyramidPixelDecoder, "linear",
          "mix: maps", "forward: maps"),
    _part("heads.pixel_decoder.DeformableLayer", own_heads.DeformableLayer, "linear",
          "forward: tokens position reference shapes"),
    _part("heads.pixel_decoder.DeformableAttention", own_heads.DeformableAttention, "fused_deformable_attention",
          "forward: tokens position reference shapes"),
    _part("heads.mask_decoder.MaskDecoder", own_heads.MaskDecoder, "rearranged", "forward: levels mask_features",
          remark="all predictions in one product"),
    _part("heads.mask_decoder.QueryAttention", own_heads.QueryAttention, "rearranged",
          "forward: x query key value allowed", remark="the query is projected, not pixels"),
)  # fmt: skip

LEFT_ALONE: dict[str, str] = {}
