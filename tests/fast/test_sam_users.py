"""What is built of SAM's encoder elsewhere: cellpose 4's way to use its blocks, and SAM-HQ's package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import magnet_fast

from . import zoo_sam

ROOT = Path(__file__).parents[2]


def test_windows_opened_after_the_blocks_were_built() -> None:
    """As cellpose 4: tables made for windows, blocks that read the whole map, and positions cut out of larger ones."""
    torch.manual_seed(0)
    encoder = zoo_sam.segment_anything((64, 64)).eval()
    for block in encoder.blocks:
        block.window_size = 0
        for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
            torch.nn.init.normal_(table)
    assert {len(block.attn.rel_pos_h) for block in encoder.blocks} == {7, 15}
    tokens = torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        expected = tokens
        for block in encoder.blocks:
            expected = block(expected)
        assert len(magnet_fast.accelerate(encoder).replaced) == 2
        for block in encoder.blocks:
            tokens = block(tokens)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


HQ = """
import torch, magnet_fast
from segment_anything_hq.modeling import ImageEncoderViT

torch.manual_seed(0)
encoder = ImageEncoderViT(
    img_size=72, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, out_chans=8, use_rel_pos=True,
    window_size=4, global_attn_indexes=(1,),
).eval()
for parameter in encoder.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
image = torch.randn(2, 3, 72, 72)
with torch.no_grad():
    (before, kept), report = encoder(image), magnet_fast.accelerate(encoder)
    after, found = encoder(image)
assert [module.path for module in report.replaced] == ["segment_anything_hq.modeling.image_encoder.Block"] * 2, report
for one, other in zip((after, *found), (before, *kept), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
print("agreed")
"""


def test_segment_anything_hq() -> None:
    """In a process of its own: when it is imported, it puts models of its own in the place of timm's."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore", "-c", HQ]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if "cannot import name 'RotaryEmbedding' from 'timm.layers" in done.stderr:  # timm 1.0.23's own fault
        pytest.skip("segment-anything-hq needs timm.models.layers, which this timm itself cannot import")
    assert done.stdout == "agreed\n", done.stderr
