"""RNR: its published code's outputs, and its parts against formulas written the slow way."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.contract import Prediction, Words, probability, resized
from magnet_fast.models.encoders.vectors_lstm import VectorsLSTMConfig
from magnet_fast.models.fusion.joint import JointLayer
from tests.golden.parameters import FOLDER, golden, released_state
from tests.models.cases import batch, build

RULES = [
    (r"image_encoder\.(.*)", r"image_encoder.backbone.\1"),
    (r"joint_model\.text_encoder\.lstm\.(.*)", r"text_encoder.lstm.\1"),
    (r"joint_model\.conv_3x3\.layer([234])\.(.*)", lambda found: f"fusion.pool.{int(found[1]) - 2}.{found[2]}"),
    (r"joint_model\.transformer_encoder\.norm\.(.*)", r"fusion.norm.\1"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.self_attn\.out_proj\.(.*)", r"fusion.\1.attention.output.\2"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.linear1\.(.*)", r"fusion.\1.feedforward.0.\2"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.linear2\.(.*)", r"fusion.\1.feedforward.3.\2"),
    (r"joint_model\.transformer_encoder\.(layers\.\d+)\.(norm\d)\.(.*)", r"fusion.\1.\2.\3"),
    (r"joint_model\.conv_fuse\.(.*)", r"fusion.fuse.\1"),
    (r"joint_model\.aspp_decoder\.convs\.4\.(.*)", r"head.aspp.image.\1"),
    (r"joint_model\.aspp_decoder\.convs\.(.*)", r"head.aspp.branches.\1"),
    (r"joint_model\.aspp_decoder\.project\.(.*)", r"head.aspp.project.\1"),
    (
        r"joint_model\.conv_upsample\.deconv\.([024])\.(.*)",
        lambda found: f"head.enlarge.{int(found[1]) // 2}.{found[2]}",
    ),
    (r"joint_model\.conv_upsample\.deconv\.6\.0\.weight", "head.classify.weight"),
]


def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published code's entries under this package's names; queries, keys and values are one there."""
    renamed = {}
    for name, tensor in state.items():
        packed = re.fullmatch(r"joint_model\.transformer_encoder\.(layers\.\d+)\.self_attn\.in_proj_(.*)", name)
        if packed:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"fusion.{packed[1]}.attention.{part}.{packed[2]}"] = piece
            continue
        pattern, new = next(rule for rule in RULES if re.fullmatch(rule[0], name))
        renamed[re.sub(pattern, new, name)] = tensor
    return renamed


@pytest.mark.slow
def test_golden() -> None:
    """The published network, of one block a stage and three in the last, from a small image on."""
    values, every = golden("rnr"), json.loads((FOLDER / "rnr.json").read_text())["every"]
    config = models.preset_config("rnr_resnet101", text__vocab_size=1).model_dump()
    config["image"]["arguments"]["layers"] = [1, 1, 1, 3]
    model = models.from_config(config).eval()
    missing, unexpected = model.load_state_dict(ours(released_state("rnr")), strict=False)
    assert unexpected == [] and set(missing) == {"text_encoder.vectors.weight", "head.classify.bias"}
    model.head.classify.bias.data.zero_()

    def close(name: str, found: Tensor, tolerance: float = 1e-4) -> None:
        step = every.get(name)
        if step is not None:
            found = found.index_select(step["axis"], torch.arange(0, found.shape[step["axis"]], step["step"]))
        torch.testing.assert_close(found, values[name], rtol=0, atol=tolerance)

    seen: dict[str, list[Tensor]] = {"norm": [], "fuse": [], "aspp": []}
    for name, module in (("norm", model.fusion.norm), ("fuse", model.fusion.fuse[1]), ("aspp", model.head.aspp)):
        module.register_forward_hook(lambda _, __, result, name=name: seen[name].append(result))
    mask = values["phrase_mask"].bool()
    text = Text(torch.zeros_like(values["phrase_mask"]), mask)
    with torch.inference_mode():
        stream = model.image_encoder.start(values["image"])
        for i in range(4):
            stage = model.image_encoder.stage(i, stream)
            stream = stage.permute(0, 3, 1, 2)
            if i:
                close(f"image_layer{i + 1}", stream)
        features = model.encode(values["image"], text, embedded=values["phrase"])
        prediction = model.head(features)
    close("text_features", features.words.features)
    for tap in range(3):
        close(f"joint{tap}", seen["norm"][tap])
        close(f"fused{tap}_before_activation", seen["fuse"][tap])
    close("aspp", seen["aspp"][0])
    close("low_resolution_logits", prediction.mask[:, None])
    close("probability", probability(prediction, (56, 56)), 1e-5)
