"""The benchmarks' counts of bytes and operations name the kernels that a call launches, and hold its floor."""

from __future__ import annotations

import pytest
import torch
from magnet_fast.kernels import (
    cross_modal_attention,
    deformable_attention,
    pixel_contrastive_loss,
    relative_attention,
    report,
)

from benchmarks import bench_cross_modal_attention, kernel_counts

FORMS = {"both": "shared", "image": "pixels only", "text": "words only"}


def launched(module, dtype, quick=True):
    """Names of the kernels of each of the module's calls, by label and pass."""
    found = {}
    for label, call in module.launches(dtype, quick):
        with report._recording(90) as launches:
            call()
        names = list(dict.fromkeys(launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launches))
        found[label, (label, False) in found] = names
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_modal_attention(dtype):
    for (label, backward), names in launched(cross_modal_attention, dtype, quick=False).items():
        form, words, d = label.replace(", T", "").replace(", d", "").split()
        heads, pixels = 1 if int(d) > 32 else 8, 900 if int(d) > 256 else 14400
        counts = kernel_counts.cross_modal(form, 2, pixels, int(words), heads, int(d), dtype, backward)
        assert list(counts) == names, (label, backward)


@pytest.mark.parametrize("form", FORMS)
def test_cross_modal_floor(form):
    """Of 8 heads of 32, where no products go through memory; 20 words."""
    stage, width = "Swin-B stage 2", 256
    for backward in (False, True):
        counts = kernel_counts.cross_modal(form, 1, 3600, 20, 8, width // 8, torch.bfloat16, backward)
        floor = bench_cross_modal_attention.floor(FORMS[form], stage, torch.bfloat16, backward)
        if backward:  # there, of both passes
            forward = bench_cross_modal_attention.floor(FORMS[form], stage, torch.bfloat16, False)
            floor = {name: floor[name] - forward[name] for name in floor}
        for name in floor:
            total = sum(count[name] for count in counts.values())
            assert floor[name] <= total <= 2.2 * floor[name], (name, backward)


def test_deformable_attention():
    for (_, backward), names in launched(deformable_attention, torch.bfloat16).items():
        counts = kernel_counts.deformable(2, 4725, 4725, 8, 12, 32, torch.bfloat16, backward)
        assert list(counts) == names


def test_pixel_contrastive_loss():
    for (_, backward), names in launched(pixel_contrastive_loss, torch.bfloat16).items():
        assert list(kernel_counts.pixel_contrastive(2, 14400, 256, torch.bfloat16, backward)) == names


def test_relative_attention():
    for (_, backward), names in launched(relative_attention, torch.bfloat16).items():
        counts = kernel_counts.relative(1, 4096, (64, 64), 12, 64, torch.bfloat16, backward)
        assert list(counts) == names
