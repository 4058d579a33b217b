"""What `benchmarks.gpu` measures: an operator at one size, the paths that compute it, and what none can do without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks import bench_cross_modal_attention, bench_deformable_attention, gpu_rivals, kernel_counts, window_shapes
from magnet_fast import ops
from magnet_fast.ops._cross_modal_attention import cross_modal_attention_reference
from magnet_fast.ops._fused_deformable_attention import fused_deformable_attention_reference
from magnet_fast.ops._relative_attention import relative_attention_reference

Draw = Callable[..., Tensor]
"""(sizes..., factor=1.0) -> normally distributed numbers, on the device and in the dtype that are measured."""

OURS = ("triton", "cuda")


@dataclass(frozen=True)
class Case(ABC):
    """One operator at one size; a subclass an operator."""

    operator: ClassVar[str]  # of `magnet_fast.ops`
    title: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    baseline: ClassVar[str]

    @abstractmethod
    def floor(self, dtype: torch.dtype, backward: bool, batch: int) -> dict[str, int]:
        """Compulsory "bytes" and "flops" of one run; `backward`: of both passes."""

    @abstractmethod
    def moved(self, dtype: torch.dtype, backward: bool, batch: int) -> int:
        """Bytes that our Triton kernels read and write, each tensor counted once for each kernel."""

    @abstractmethod
    def tensors(self, batch: int, draw: Draw) -> list[Tensor | None]:
        """One set of inputs, of which `differentiable` get gradients."""

    @abstractmethod
    def function(self, path: str) -> Callable[..., Tensor | Sequence[Tensor]]:
        """What the path computes of `tensors`."""

    def differentiable(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [tensor for tensor in tensors if tensor is not None and tensor.is_floating_point()]

    def present(self, path: str) -> bool:
        """Whether the path is there at all: CUDA kernels are not for every operator, nor built everywhere."""
        return path not in OURS or path in ops.available_backends(self.operator)


@dataclass(frozen=True)
class Window(Case):
    shape: window_shapes.Shape

    operator = "window_attention"
    title = "window attention"
    paths = ("reference", "SDPA", "torch.compile", "FlexAttention", *OURS)
    baseline = "torch.compile"

    def __str__(self) -> str:
        return str(self.shape)

    def floor(self, dtype: torch.dtype, backward: bool, batch: int) -> dict[str, int]:
        return window_shapes.traffic(self.shape, dtype, backward, batch)

    def moved(self, dtype: torch.dtype, backward: bool, batch: int) -> int:
        return self.floor(dtype, backward, batch)["bytes"]

    def tensors(self, batch: int, draw: Draw) -> list[Tensor | None]:
        extent, channels = self.shape.extent, self.shape.channels
        table = draw((2 * self.shape.window - 1) ** 2, self.shape.heads, factor=0.1)
        return [draw(batch, extent, extent, 3 * channels), table, draw(3 * channels)]

    def function(self, path: str) -> Callable[..., Tensor]:
        shape = self.shape
        if path in OURS:
            settings = {"num_heads": shape.heads, "window_size": shape.window, "shift": shape.shift}
            return lambda qkv, table, pad: ops.window_attention(qkv, table, pad_qkv=pad, **settings)
        attend = {"SDPA": gpu_rivals.sdpa, "FlexAttention": gpu_rivals.flex}.get(path, gpu_rivals.eager)
        return lambda *tensors: attend(shape, *tensors)


@dataclass(frozen=True)
class Relative(Case):
    side: int  # of the map
    window: int | None  # None: the whole map
    heads: int
    d: int  # channels of a head

    operator = "relative_attention"
    title = "relative attention"
    paths = ("reference", "SDPA", "torch.compile", *OURS)
    baseline = "SDPA"

    def __str__(self) -> str:
        extent = "global" if self.window is None else f"w {self.window}"
        return f"{self.side}x{self.side} {extent}, {self.heads} heads of {self.d}"

    def floor(self, dtype: torch.dtype, backward: bool, batch: int) -> dict[str, int]:
        tokens, window = batch * self.side**2, self.window or self.side
        # A product of similarities, and one of queries with both tables.
        pairs = 2 * tokens * window**2 * self.heads * self.d
        positions = 2 * tokens * 2 * window * self.heads * self.d
        return {
            "bytes": (4 + 7 * backward) * tokens * self.heads * self.d * dtype.itemsize,
            "flops": (2 + 5 * backward) * pairs + (1 + 2 * backward) * positions,
        }

    def moved(self, dtype: torch.dtype, backward: bool, batch: int) -> int:
        size = (batch, self.side**2, (self.window or self.side,) * 2, self.heads, self.d, dtype)
        passes = (False, True) if backward else (False,)
        return sum(_bytes(kernel_counts.relative(*size, each)) for each in passes)

    def tensors(self, batch: int, draw: Draw) -> list[Tensor | None]:
        channels, window = self.heads * self.d, self.window or self.side
        tables = [draw(2 * window - 1, self.d, factor=0.1) for _ in range(2)]
        return [draw(batch, self.side, self.side, 3 * channels), *tables, draw(3 * channels) if self.window else None]

    def function(self, path: str) -> Callable[..., Tensor]:
        heads, window = self.heads, self.window or self.side
        if path in OURS:
            settings = {"num_heads": heads, "window_size": self.window}
            return lambda *tensors: ops.relative_attention(*tensors[:3], pad_qkv=tensors[3], **settings)
        if path == "SDPA":
            return lambda *tensors: gpu_rivals.relative_sdpa(heads, (window, window), *tensors)
        return lambda *tensors: relative_attention_reference(*tensors, heads, window, window, self.d**-0.5)


@dataclass(frozen=True)
class CrossModal(Case):
    form: str  # of bench_cross_modal_attention.FORMS
    stage: str

    operator = "cross_modal_attention"
    title = "cross-modal attention"
    paths = ("reference", "SDPA", "torch.compile", *OURS)
    baseline = "torch.compile"

    def __str__(self) -> str:
        return f"{self.form}, {self.stage}"

    def floor(self, dtype: torch.dtype, backward: bool, batch: int) -> dict[str, int]:
        found = bench_cross_modal_attention.floor(self.form, self.stage, dtype, backward)
        return {name: batch * value for name, value in found.items()}

    def moved(self, dtype: torch.dtype, backward: bool, batch: int) -> int:
        given, mask, heads = bench_cross_modal_attention.inputs(self.form, self.stage, dtype)
        image = next(tensor for tensor in (given[0], given[4]) if tensor is not None)
        size = (batch, image.shape[1], mask.shape[1], heads, image.shape[2] // heads, dtype)
        forms = {"pixels only": ["image"], "words only": ["text"], "separate": ["image", "text"], "shared": ["both"]}
        passes = (False, True) if backward else (False,)
        return sum(_bytes(kernel_counts.cross_modal(form, *size, each)) for form in forms[self.form] for each in passes)

    def tensors(self, batch: int, draw: Draw) -> list[Tensor | None]:
        given, mask, _ = bench_cross_modal_attention.inputs(self.form, self.stage, torch.float32)
        found = [None if tensor is None else draw(batch, *tensor.shape[1:]) for tensor in given]
        device = next(tensor.device for tensor in found if tensor is not None)
        return [*found, mask.expand(batch, -1).contiguous().to(device)]

    def function(self, path: str) -> Callable[..., Sequence[Tensor]]:
        given, _, heads = bench_cross_modal_attention.inputs(self.form, self.stage, torch.float32)
        width = next(tensor.shape[2] for tensor in given if tensor is not None)

        def run(*tensors: Tensor | None) -> Sequence[Tensor]:
            *tensors, mask = tensors
            if path in OURS:
                outs = ops.cross_modal_attention(*tensors, text_mask=mask, num_heads=heads)
            elif path == "SDPA":
                attend = bench_cross_modal_attention.attend_fused
                outs = bench_cross_modal_attention.both_directions(attend, tensors, mask, heads)
            else:
                outs = cross_modal_attention_reference(*tensors, mask, heads, (width // heads) ** -0.5)
            return [out for out in outs if out is not None]

        return run


@dataclass(frozen=True)
class Deformable(Case):
    side: int  # of the picture
    d: int  # channels of a head

    operator = "fused_deformable_attention"
    title = "deformable attention"
    paths = ("reference", "grid_sample", "torch.compile", *OURS)
    baseline = "grid_sample"

    def __str__(self) -> str:
        return f"{self.side}x{self.side}, d {self.d}"

    def floor(self, dtype: torch.dtype, backward: bool, batch: int) -> dict[str, int]:
        found = bench_deformable_attention.floor(self.side, self.d, dtype, backward)
        return {name: batch * value for name, value in found.items()}

    def moved(self, dtype: torch.dtype, backward: bool, batch: int) -> int:
        _, (value, _, offsets, _) = bench_deformable_attention.inputs(self.side, self.d, dtype)
        _, count, heads, d = value.shape
        size = (batch, count, count, heads, offsets.shape[3] * offsets.shape[4], d, dtype)
        passes = (False, True) if backward else (False,)
        return sum(_bytes(kernel_counts.deformable(*size, each)) for each in passes)

    def tensors(self, batch: int, draw: Draw) -> list[Tensor | None]:
        """As the decoder starts: offsets around the circle, and noise. The reference points stay where they are."""
        _, (value, reference, offsets, logits) = bench_deformable_attention.inputs(self.side, self.d, torch.float32)
        like = draw(batch, *value.shape[1:])
        offsets = offsets.to(like).expand(batch, *offsets.shape[1:]).contiguous()
        return [like, reference.to(like), offsets, draw(batch, *logits.shape[1:])]

    def differentiable(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [tensors[0], *tensors[2:]]

    def function(self, path: str) -> Callable[..., Tensor]:
        maps, _ = bench_deformable_attention.inputs(self.side, self.d, torch.float32)
        if path in OURS:
            return lambda value, *rest: ops.fused_deformable_attention(value, maps, *rest)
        if path == "grid_sample":
            return lambda *tensors: bench_deformable_attention.plain(maps, *tensors)
        sizes = [side for pair in maps for side in pair]
        return lambda *tensors: fused_deformable_attention_reference(*tensors, sizes)


def _bytes(counts: kernel_counts.Counts) -> int:
    return sum(kernel["bytes"] for kernel in counts.values())


CASES: tuple[Case, ...] = (
    *(Window(window_shapes.Shape("Swin-B", 480, stage, w, True)) for w in (7, 12) for stage in (1, 2, 3, 4)),
    *(CrossModal(form, f"Swin-B stage {stage}") for form in ("shared", "separate") for stage in (1, 2, 3, 4)),
    *(Deformable(side, 32) for side in (224, 480)),
    *(Relative(64, window, 12, 64) for window in (None, 14)),  # SAM ViT-B
)
TINY: tuple[Case, ...] = (
    Window(window_shapes.Shape("Swin-T", 24, 1, 7, True)),
    CrossModal("shared", "pyramid 6x6"),
    CrossModal("separate", "pyramid 1x1"),
    Deformable(32, 8),
    Relative(5, None, 1, 8),
    Relative(5, 3, 2, 8),
)
