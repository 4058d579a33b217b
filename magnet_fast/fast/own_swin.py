"""Our Swin encoder, faster: one image for several expressions once, biases in place of padding, blocks in chains."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.fast._replacement import must_run_original, upstream_class
from magnet_fast.fast.own_parts import kept_sine_position, project, tokenwise
from magnet_fast.models.encoders import swin
from magnet_fast.ops import _linear_chain
from magnet_fast.ops._linear import plain_linear
from magnet_fast.ops._linear_chain import Step


class SwinEncoder:
    """One image that was expanded to a batch, for several expressions, runs through the first stage once."""

    def start(self, image: Tensor) -> Tensor:
        if not self._repeated(image):
            return super().start(image)
        return super().start(image[:1]).expand(image.shape[0], -1, -1, -1)

    def stage(self, i: int, stream: Tensor) -> Tensor:
        if i > 0 or not self._repeated(stream):
            return super().stage(i, stream)
        return super().stage(i, stream[:1]).expand(stream.shape[0], -1, -1, -1)

    def _repeated(self, x: Tensor) -> bool:
        return (
            x.shape[0] > 1
            and x.stride(0) == 0
            and not any(module.training for module in self.modules())  # stochastic depth draws for each item
            and not must_run_original(self, *self.patch_embed.modules(), *self.stages[0].modules())
        )


class SwinBlock:
    """In inference: layers before and after the attention as chains of packed weights, or a few tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._whole():
            return super().forward(x)
        before, after = self._chains()
        if _linear_chain.runs(x, [*before, *after]):
            attended = self.attention.attend(_linear_chain.run(x, before))
            return _linear_chain.run(attended, after, residual=x)
        attended = self.attention(self.norm1(x))
        return tokenwise(self, self._after_attention, x, attended, width=self.mlp.fc1.out_features)

    def _whole(self) -> bool:
        """Whether nobody watches a part or put another module in its place, and no residual is dropped."""
        attention, mlp, drop_path = self.attention, self.mlp, self.drop_path
        return (
            upstream_class(attention) is swin.WindowAttention
            and upstream_class(mlp) is swin.Mlp
            and type(drop_path) in (DropPath, nn.Identity)
            and not drop_path.training
            and type(self.norm1) is type(self.norm2) is nn.LayerNorm
            and plain_linear(attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
            and not must_run_original(
                self,
                *(self.norm1, attention, attention.qkv, attention.proj),
                *(self.norm2, mlp, mlp.fc1, mlp.fc2, drop_path),
            )
        )

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return self.mlp.run(self.norm2(x), x)

    def _chains(self) -> tuple[list[Step], list[Step]]:
        """The layers before attention and those after it."""
        after = [
            Step(self.attention.proj, residual="given"),
            Step(self.mlp.fc1, activation="gelu", before=self.norm2),
            Step(self.mlp.fc2, residual=0),
        ]
        return [Step(self.attention.qkv, before=self.norm1)], after


class WindowAttention:
    """The map is not padded: a token of padding has exactly the projection's bias as query, key and value."""

    def forward(self, x: Tensor) -> Tensor:
        if not plain_linear(self.qkv) or must_run_original(self, self.qkv):
            return super().forward(x)
        return project(self.proj, self.attend(project(self.qkv, x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C) to (B, H, W, C): what lies between the projections."""
        return ops.window_attention(
            qkv,
            self.bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            pad_qkv=self.qkv.bias,
        )


class Mlp:
    """GELU, and a block's residual, in the products."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if must_run_original(self) else self.run(x, None)

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return project(self.fc2, project(self.fc1, x, activation="gelu"), residual=residual)


class PatchEmbed:
    """The encoding of places is kept."""

    def position(self, x: Tensor) -> Tensor:
        if must_run_original(self):
            return super().position(x)
        rows, columns, channels = x.shape[1:]
        return kept_sine_position(rows, columns, channels, x.device, x.dtype).view(1, rows, columns, channels)


class PatchMerging:
    """Its Linear is a product."""

    def forward(self, x: Tensor) -> Tensor:
        if must_run_original(self):
            return super().forward(x)
        return project(self.reduction, self.norm(self.neighbours(x)))
