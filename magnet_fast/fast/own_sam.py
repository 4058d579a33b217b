"""SAM's image encoder of ours, faster: a bias in place of padding, blocks in chains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.fast._replacement import must_run_original, upstream_class
from magnet_fast.fast.own_parts import project, tokenwise
from magnet_fast.models.encoders import sam_vit, swin
from magnet_fast.models.encoders.sam_weights import resized_table
from magnet_fast.models.tuning import LowRank
from magnet_fast.ops import _linear_chain
from magnet_fast.ops._linear import plain_linear
from magnet_fast.ops._linear_chain import Step


class SamLayer:
    """In inference: layers before and after the attention as chains of packed weights, or a few tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._whole():
            return super().forward(x)
        before = [Step(self.attention.qkv, before=self.norm1)]
        after = [
            Step(self.attention.proj, residual="given"),
            Step(self.mlp.fc1, activation="gelu", before=self.norm2),
            Step(self.mlp.fc2, residual=0),
        ]
        if _linear_chain.runs(x, [*before, *after]):
            attended = self.attention.attend(_linear_chain.run(x, before))
            return _linear_chain.run(attended, after, residual=x)
        attended = self.attention(self.norm1(x))
        return tokenwise(self, self._after_attention, x, attended, width=self.mlp.fc1.out_features)

    def _whole(self) -> bool:
        """Whether nobody watches a part or put another module in its place, and nothing stands beside a part."""
        attention, mlp = self.attention, self.mlp
        return (
            self.adapter is None
            and upstream_class(attention) is sam_vit.SamAttention
            and attention.lora is None
            and upstream_class(mlp) is swin.Mlp
            and type(self.norm1) is type(self.norm2) is nn.LayerNorm
            and plain_linear(attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
            and not must_run_original(
                self,
                *(self.norm1, attention, attention.qkv, attention.proj),
                *(self.norm2, mlp, mlp.fc1, mlp.fc2),
            )
        )

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return self.mlp.run(self.norm2(x), x)


class SamAttention:
    """The map is not padded: a token of padding has exactly the projection's bias as query, key and value.

    LoRA adds nothing to a token of zeros.
    """

    def forward(self, x: Tensor) -> Tensor:
        beside = () if self.lora is None else tuple(self.lora.modules())
        if (
            not plain_linear(self.qkv, *(part for part in beside if isinstance(part, nn.Linear)))
            or type(self.lora) not in (LowRank, type(None))
            or must_run_original(self, self.qkv, *beside)
        ):
            return super().forward(x)
        qkv = project(self.qkv, x)
        if self.lora is not None:
            qkv = self.lora(x, qkv)
        return project(self.proj, self.attend(qkv))

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C) to (B, H, W, C): what lies between the projections."""
        rows, columns = qkv.shape[1:3] if self.window_size is None else (self.window_size, self.window_size)
        return ops.relative_attention(
            qkv,
            resized_table(self.rel_height, 2 * rows - 1),
            resized_table(self.rel_width, 2 * columns - 1),
            num_heads=self.num_heads,
            window_size=self.window_size,
            pad_qkv=self.qkv.bias,
        )
