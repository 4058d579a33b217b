"""DuMoGa's choice among the nodes of a scene: words by attention, and words by their place in the sentence's graph.

Ji et al., "Towards Complex-query Referring Image Segmentation: A Novel Benchmark" (TOMM 2024), after its released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.contract import Words

ABSENT = -1e4
"""The score of a node that is not there; its weight is 0 in every dtype."""


class NodeReader(nn.Module):
    """What each node makes of the sentence: a Linear of [semantic; structural].

    Semantic: the node attends to the words, and a sigmoid. Structural: the sum of the words that are aligned with it.

    Args:
        text_width: channels of a word.
        node_width: features of a node.
        width: of everything inside.
    """

    def __init__(self, text_width: int, node_width: int, width: int) -> None:
        super().__init__()
        self.words, self.nodes = nn.Linear(text_width, width), nn.Linear(node_width, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.join = nn.Linear(2 * width, width)

    def forward(self, words: Tensor, mask: Tensor | None, nodes: Tensor, alignment: Tensor) -> Tensor:
        """To (B, N, width).

        Args:
            words: (B, T, D).
            mask: (B, T) bool, True for a word that is attended to; all where None.
            nodes: (B, N, F).
            alignment: (B, N, T), the part of each word in each node.
        """
        words, nodes = self.words(words), self.nodes(nodes)
        attended, _ = ops.cross_modal_attention(self.query(nodes), self.key(words), self.value(words), text_mask=mask)
        structural = alignment.to(words.dtype) @ words
        return self.join(torch.cat([attended.sigmoid(), structural], dim=-1))


class NodeScores(nn.Module):
    """A score for each node that is there, read off what it makes of the sentence [our choice].

    forward(words, nodes (B, N, F), present (B, N) bool, alignment (B, T, N)) returns logits (B, N).
    """

    def __init__(self, text_width: int, node_width: int, width: int) -> None:
        super().__init__()
        self.reader = NodeReader(text_width, node_width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, words: Words, nodes: Tensor, present: Tensor, alignment: Tensor) -> Tensor:
        found = self.reader(words.features, words.mask, nodes, alignment.mT)
        return self.score(found)[..., 0].masked_fill(~present, ABSENT)


class SlotScores(nn.Module):
    """The released form: nodes are summed, and a logit is read for each of their places.

    Its alignment, (words, nodes) in memory, is taken for (nodes, words), and padding is attended to; no node is left
    out. forward as of `NodeScores`.

    Args:
        slots: N, the number of nodes that every image has.
    """

    def __init__(self, text_width: int, node_width: int, width: int, slots: int) -> None:
        super().__init__()
        self.reader = NodeReader(text_width, node_width, width)
        self.merge = nn.Linear(width, width)
        self.slots = nn.Linear(width, slots)

    def forward(self, words: Words, nodes: Tensor, present: Tensor, alignment: Tensor) -> Tensor:
        misread = alignment.reshape(alignment.shape[0], alignment.shape[2], alignment.shape[1])
        return self.slots(self.merge(self.reader(words.features, None, nodes, misread).sum(dim=1)))
