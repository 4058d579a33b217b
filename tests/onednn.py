"""What the tests of Linears on oneDNN share."""

import pytest
import torch

from magnet_fast.ops import _linear

needs_onednn = pytest.mark.skipif(
    not _linear._works(torch.float32), reason="oneDNN's operators are not used on this machine"
)
"""Not x86 with AVX2, or a PyTorch without these operators: every Linear is PyTorch's own there."""
