"""Index arithmetic of window attention, shared by the CPU and CUDA kernels (csrc/common/window_index.h)."""

import ctypes

import pytest
import torch


@pytest.mark.parametrize("window", range(2, 13))
def test_every_map_up_to_40_with_every_shift_in_both_orders(built, window):
    count = ctypes.c_int64()
    found = built.device.check_maps(ctypes.c_int64(40), ctypes.c_int64(window), ctypes.byref(count))
    assert found == b""
    assert count.value == 40 * 40 * window * 2


@pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
@pytest.mark.parametrize("window", [2, 7, 12])
def test_as_torch_rolls_and_pads(built, window, pad_first):
    for extent in range(1, 30):
        padded = -(-extent // window) * window
        for shift in range(window):
            source = torch.arange(extent)
            padding = torch.full((padded - extent,), -1)
            if pad_first:
                moved = torch.cat([source, padding]).roll(-shift)
            else:
                moved = torch.cat([source.roll(-shift), padding])
            found = [built.device.source_coordinate(i, extent, padded, shift, pad_first) for i in range(padded)]
            assert found == moved.tolist()


def test_bias_rows(built):
    window = (3, 5)
    y, x = (axis.flatten().tolist() for axis in torch.meshgrid(*map(torch.arange, window), indexing="ij"))
    # Swin's own index: relative coordinates, moved to begin at 0, the first one times the number of columns.
    for i in range(15):
        for j in range(15):
            row = (y[i] - y[j] + window[0] - 1) * (2 * window[1] - 1) + x[i] - x[j] + window[1] - 1
            assert built.device.bias_row(y[i], x[i], y[j], x[j], *window) == row
