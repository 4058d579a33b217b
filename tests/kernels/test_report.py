"""The kernels compile for GPUs that are not here, and take no more of them than there is."""

import pytest
import torch

pytest.importorskip("triton")

from magnet_fast.kernels import report  # noqa: E402


def program(**changes) -> report.Program:
    given = {"registers": 128, "spills": 0, "shared": 20 << 10, "warps": 4, "arch": 90}
    return report.Program(**{"kernel": "k", "label": "", "dtype": "bfloat16", "options": "", **given, **changes})


@pytest.mark.parametrize("arch", [80, 90])
def test_window_attention_fits(arch):
    found = list(report.programs(quick=True, kernel="window_attention.", archs=[arch], dtypes=[torch.bfloat16]))
    assert {p.kernel for p in found} >= {"forward_kernel", "backward_kernel"}
    assert [p for p in found if not p.fits] == []
    assert all(0 < p.registers <= 255 and p.occupancy >= 0.1 for p in found)


def test_every_configuration_of_every_launch_is_seen():
    labels, kernels = set(), set()
    for label, found in report.launches(torch.bfloat16):
        labels.add(label)
        kernels |= {launch.kernel.__name__ for launch in found}
    assert {"w 7, d 32", "w 12, d 32", "w 16, d 32"} <= labels
    assert {"_forward_kernel", "backward_kernel", "backward_queries_kernel", "backward_keys_kernel"} <= kernels


def test_occupancy():
    assert program().occupancy == 16 / 64  # 65536 registers / (128 * 128)
    assert program(registers=32).occupancy == 10 * 4 / 64  # 228 KB / 21 KB
    assert program(registers=32, shared=0).occupancy == 1.0


def test_what_does_not_fit():
    assert program().fits
    assert not program(spills=1).fits
    assert program(shared=200 << 10).fits and not program(shared=200 << 10, arch=80).fits


def test_the_document_counts_what_does_not_fit():
    text = report.markdown([program(), program(spills=3)], ["--arch", "90"])
    assert "magnet_fast.kernels.report --arch 90`" in text
    assert "2 programs, 1 of them spill or do not fit." in text and text.count("| k |") == 2
