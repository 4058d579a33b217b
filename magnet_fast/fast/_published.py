"""Fingerprints of published classes: what `_source.fingerprints` finds in them. A hash of a text, not the text.

Of a package ("PyPI") they were computed from its file, of a repository from the functions that count, as they stand in
the version named; several places were read and have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """One form of a class, as it was published.

    Attributes:
        kind: what `copies` makes of it.
        title: whose it is.
        name: of the class.
        units: fingerprints of what a call runs; several where a function was written in several ways that mean the
            same.
        places: where it stands, "repository: path @ commit" or "PyPI package version: path".
        unread: names outside the class that may be anything: the fused way makes sure that a call does not reach them,
            or reaches the same whatever they are.
    """

    kind: str
    title: str
    name: str
    units: Mapping[str, str | tuple[str, ...]]
    places: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def differences(self, found: Mapping[str, str]) -> list[str]:
        """Names of what is not as published: changed, missing or more."""
        read = {name: value for name, value in found.items() if name.partition(".")[0] not in self.unread}
        wrong = [name for name, value in self.units.items() if read.get(name) not in _either(value)]
        return wrong + sorted(read.keys() - self.units.keys())


def _either(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,)


_SAM = (
    "facebookresearch/segment-anything: segment_anything/modeling/image_encoder.py @ 07b97cb77161",
    "SysCV/sam-hq: segment_anything/modeling/image_encoder.py @ 221aa3122810",
    "ChaoningZhang/MobileSAM: mobile_sam/modeling/image_encoder.py @ d6c907322a46",
    "bowang-lab/MedSAM: segment_anything/modeling/image_encoder.py @ 2a4f61fad640",
    "hitachinsk/SAMed: segment_anything/modeling/image_encoder.py @ f3c4b4440854",
    "tianrun-chen/SAM-Adapter-PyTorch: models/mmseg/models/sam/image_encoder.py @ ea368fe87cc8",
    "PyPI segment-anything 1.0: segment_anything/modeling/image_encoder.py",
    "PyPI segment-anything-hq 0.3: segment_anything_hq/modeling/image_encoder.py",
    "PyPI controlnet-aux 0.0.10: controlnet_aux/segment_anything/modeling/image_encoder.py",
    "PyPI IOPaint 1.6.0: iopaint/plugins/segment_anything/modeling/image_encoder.py",
)
_BACKBONES = (
    "facebookresearch/Mask2Former: mask2former/modeling/backbone/swin.py @ 161be514814e",
    "yz93/LAVT-RIS: lib/backbone.py @ 066bcf26cb07",
    "yxchng/mask-grounding: lib/backbone.py @ 58a6757df426",
    "henghuiding/ReLA: gres_model/modeling/backbone/swin.py @ a389648e8054",
    "IDEA-Research/GroundingDINO: groundingdino/models/GroundingDINO/backbone/swin_transformer.py @ 97857ad7748b",
)
_MICROSOFT = (
    "microsoft/Swin-Transformer: models/swin_transformer.py @ 9cd3dbd4a60f",
    "microsoft/Swin-Transformer: models/swin_transformer.py @ 055c506510dd",
)
_UNET = ("HuCaoFighting/Swin-Unet: networks/swin_transformer_unet_skip_expand_decoder_sys.py @ 1c8b3e860dfa",)
_SWINIR = (
    "JingyunLiang/SwinIR: models/network_swinir.py @ 33f616625268",
    "PyPI spandrel 0.4.2: spandrel/architectures/SwinIR/__arch/SwinIR.py",
)
_BIREFNET = ("ZhengPeng7/BiRefNet: models/backbones/swin_v1.py @ 2cddd796a3be",)
_OPENMMLAB = (
    "PyPI mmdet 3.3.0: mmdet/models/backbones/swin.py",
    "PyPI mmsegmentation 1.2.2: mmseg/models/backbones/swin.py",
)

PUBLISHED: tuple[Published, ...] = (
    Published(
        "sam block",
        "segment_anything's Block",
        "Block",
        {
            "forward": "b981dab8630532f1",
            "window_partition": "2408a3f7f4323d17",
            "window_unpartition": "dab0c9336c923872",
        },
        _SAM,
    ),
    Published(
        "sam attention",
        "segment_anything's Attention",
        "Attention",
        {
            "forward": "1272bbcaa6d0dfa2",
            "add_decomposed_rel_pos": ("2b725b9305ee0c85", "966e7dbd8d47b8d8"),
            "get_rel_pos": "e328e14ddbe26f98",
        },
        _SAM,
    ),
    Published(
        "sam mlp",
        "segment_anything's MLPBlock",
        "MLPBlock",
        {"forward": "bb888bb113b40dd6"},
        (
            "PyPI segment-anything 1.0: segment_anything/modeling/image_encoder.py",
            "PyPI segment-anything-hq 0.3: segment_anything_hq/modeling/image_encoder.py",
        ),
    ),
    Published(
        "swin backbone block",
        "Swin's block for backbones",
        "SwinTransformerBlock",
        {
            "forward": "78a3d69d84096a5d",
            "window_partition": "2a89745e1df6d400",
            "window_reverse": ("8321ef2743394a47", "a8d56e7a8cc32f73"),
        },
        _BACKBONES,
    ),
    Published(
        "swin backbone block",
        "BiRefNet's Swin block",
        "SwinTransformerBlock",
        {
            "forward": "b5a295db54629289",
            "window_partition": "2a89745e1df6d400",
            "window_reverse": ("8321ef2743394a47", "a8d56e7a8cc32f73"),
        },
        _BIREFNET,
        ("config",),
    ),
    Published(
        "swin block",
        "Swin's block",
        "SwinTransformerBlock",
        {
            "forward": "55d7ebe3a056f3c4",
            "window_partition": "2a89745e1df6d400",
            "window_reverse": ("8321ef2743394a47", "a8d56e7a8cc32f73"),
        },
        _UNET,
    ),
    Published(
        "swin block",
        "Swin's block with its own window kernel",
        "SwinTransformerBlock",
        {
            "forward": "8cf68dde42048d4e",
            "window_partition": "2a89745e1df6d400",
            "window_reverse": ("8321ef2743394a47", "a8d56e7a8cc32f73"),
        },
        _MICROSOFT,
        ("WindowProcess", "WindowProcessReverse"),
    ),
    Published(
        "swinir block",
        "SwinIR's block",
        "SwinTransformerBlock",
        {
            "forward": "8dd30aa2de02a3a3",
            "window_partition": "2a89745e1df6d400",
            "window_reverse": "8321ef2743394a47",
            "calculate_mask": ("a43bda2058156eb9", "13c46691878a21a3"),
        },
        _SWINIR,
    ),
    Published(
        "swin attention",
        "Swin's WindowAttention",
        "WindowAttention",
        {"forward": ("fb0b6a21c9d5bcbb", "8c28017df794b8a0")},
        (*_BACKBONES, *_MICROSOFT, *_UNET, *_SWINIR),
    ),
    Published(
        "swin attention",
        "BiRefNet's WindowAttention",
        "WindowAttention",
        {"forward": "767f6bfdd74d218c"},
        _BIREFNET,
        ("config",),
    ),
    Published(
        "swin attention",
        "OpenMMLab's WindowMSA",
        "WindowMSA",
        {
            "bases": "mmengine.model.base_module.BaseModule, torch.nn.modules.module.Module",
            "metaclass": "abc.ABCMeta",
            "forward": "ac17d52353d0cafa",
        },
        _OPENMMLAB,
    ),
    Published(
        "swin map attention",
        "OpenMMLab's ShiftWindowMSA",
        "ShiftWindowMSA",
        {
            "bases": "mmengine.model.base_module.BaseModule, torch.nn.modules.module.Module",
            "metaclass": "abc.ABCMeta",
            "forward": "29f21a820a260be6",
            "window_partition": "56b96d311300737b",
            "window_reverse": "1bf61b08fc512417",
        },
        _OPENMMLAB,
    ),
    Published(
        "swin mlp",
        "Swin's Mlp",
        "Mlp",
        {"forward": "957fc4734de15d7f"},
        (*_BACKBONES, *_MICROSOFT, *_UNET, *_SWINIR, *_BIREFNET),
    ),
    Published(
        "deformable attention",
        "Deformable DETR's MSDeformAttn",
        "MSDeformAttn",
        {
            "forward": "ba3584b943969583",
            "MSDeformAttnFunction": "class of torch.autograd.function.Function",
            "MSDeformAttnFunction.forward": "27f6914f45940fe3",
            "MSDeformAttnFunction.MSDA": ("module MultiScaleDeformableAttention", "missing"),
            "MSDeformAttnFunction.backward": "6a237a3f00baaf89",
        },
        (
            "fundamentalvision/Deformable-DETR: models/ops/modules/ms_deform_attn.py @ 11169a60c333",
            (
                "facebookresearch/Mask2Former: "
                "mask2former/modeling/pixel_decoder/ops/modules/ms_deform_attn.py @ 161be514814e"
            ),
            ("henghuiding/ReLA: gres_model/modeling/pixel_decoder/ops/functions/ms_deform_attn_func.py @ a389648e8054"),
        ),
    ),
    Published(
        "deformable attention",
        "Mask2Former's MSDeformAttn",
        "MSDeformAttn",
        {
            "forward": "d283ddf851506822",
            "MSDeformAttnFunction": "class of torch.autograd.function.Function",
            "MSDeformAttnFunction.forward": "27f6914f45940fe3",
            "MSDeformAttnFunction.MSDA": ("module MultiScaleDeformableAttention", "missing"),
            "MSDeformAttnFunction.backward": "6a237a3f00baaf89",
            "ms_deform_attn_core_pytorch": "7fe7078f0da3a0c3",
        },
        (
            (
                "facebookresearch/GuidedDistillation: "
                "mask2former/modeling/pixel_decoder/ops/modules/ms_deform_attn.py @ f775b48028ee"
            ),
            (
                "facebookresearch/GuidedDistillation: "
                "mask2former/modeling/pixel_decoder/ops/functions/ms_deform_attn_func.py @ f775b48028ee"
            ),
            "SysCV/MaskFreeVIS: mask2former/modeling/pixel_decoder/ops/modules/ms_deform_attn.py @ 7f87410d62a1",
        ),
    ),
    Published(
        "deformable attention",
        "DINO's MSDeformAttn",
        "MSDeformAttn",
        {
            "forward": "e6aa138a41584d44",
            "MSDeformAttnFunction": "class of torch.autograd.function.Function",
            "MSDeformAttnFunction.forward": "27f6914f45940fe3",
            "MSDeformAttnFunction.MSDA": ("module MultiScaleDeformableAttention", "missing"),
            "MSDeformAttnFunction.backward": "6a237a3f00baaf89",
        },
        (
            "IDEA-Research/DINO: models/dino/ops/modules/ms_deform_attn.py @ 67bbcd97ef30",
            "gupta1912/DINO: models/dino/ops/functions/ms_deform_attn_func.py @ 28037bb8fc25",
        ),
    ),
    Published(
        "deformable attention, batch second",
        "Grounding DINO's MultiScaleDeformableAttention",
        "MultiScaleDeformableAttention",
        {
            "forward": "6cd590d6fae74cd2",
            "MultiScaleDeformableAttnFunction": "class of torch.autograd.function.Function",
            "MultiScaleDeformableAttnFunction.forward": "ccfef1899c1bd8b4",
            "MultiScaleDeformableAttnFunction._C": ("module groundingdino._C", "missing"),
            "MultiScaleDeformableAttnFunction.backward": "c5398a24dbcd93a0",
            "multi_scale_deformable_attn_pytorch": "ca37d55ac7a34fbc",
        },
        (
            "IDEA-Research/GroundingDINO: groundingdino/models/GroundingDINO/ms_deform_attn.py @ 08bd3c2e9be3",
            "IDEA-Research/GroundingDINO: groundingdino/models/GroundingDINO/ms_deform_attn.py @ 19d44393bcee",
        ),
    ),
)
