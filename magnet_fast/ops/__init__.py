"""The operators that carry the library's speed, each with one public function and several implementations
that agree.

>>> from magnet_fast import ops
>>> with ops.backend("reference"):
...     out = ops.window_attention(qkv, bias_table, num_heads=4, window_size=7, shift=3, pad_qkv=qkv_bias)
>>> print(ops.explain("window_attention", qkv, bias_table, num_heads=4, window_size=7))

Backends are `reference` (PyTorch, everywhere), `cpu`, `triton` and `cuda`; `auto` takes the
fastest that can run. The environment variable `MAGNET_FAST_BACKEND` or the context manager
`backend` force one. The reference can be differentiated any number of times, the others once. A GPU's kernels are
taken by `auto` once they have proved themselves on the machine (`prove`), and the fastest of them by measurement.
"""

from magnet_fast.ops import (
    _linear,  # noqa: F401 - `backend` and `explain` know it by name
    _trial,  # noqa: F401 - `auto` asks it
)
from magnet_fast.ops._cross_modal_attention import cross_modal_attention
from magnet_fast.ops._deformable_attention import deformable_attention
from magnet_fast.ops._fused_deformable_attention import fused_deformable_attention
from magnet_fast.ops._pixel_contrastive_loss import pixel_contrastive_loss
from magnet_fast.ops._proof import prove
from magnet_fast.ops._registry import BackendError, Explanation, available_backends, backend, explain
from magnet_fast.ops._relative_attention import relative_attention
from magnet_fast.ops._window_attention import window_attention

__all__ = [
    "BackendError",
    "Explanation",
    "available_backends",
    "backend",
    "cross_modal_attention",
    "deformable_attention",
    "explain",
    "fused_deformable_attention",
    "pixel_contrastive_loss",
    "prove",
    "relative_attention",
    "window_attention",
]
