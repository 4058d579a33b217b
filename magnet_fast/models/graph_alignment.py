"""Which word of a sentence stands in its tree as which node of a scene stands in its graph (DuMoGa).

REGAL (Heimann et al., CIKM 2018) with all nodes as landmarks, which it takes for graphs of up to 58 nodes: its
factorisation is exact there, and the alignment has the closed form below. Checked against the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HOP = 0.01  # weight of a neighbour's degree, and its square that of a neighbour's neighbour's


def graph_alignment(tree: Tensor, edges: Tensor) -> Tensor:
    """How alike the places of words and nodes are: exp(−√(2 − 2s)), s = exp(−‖f − f′‖).

    f counts the degrees of what is 0, 1 and 2 steps away, see `degree_features`.

    Args:
        tree: (B, T, T) bool, which words hang together; symmetric, none with itself.
        edges: (B, N, N) bool, which nodes are related; likewise.

    Returns:
        (B, T, N) float64, 1 where the places are the same.
    """
    bins = (max(tree.shape[1], edges.shape[1]) - 1).bit_length()
    words, nodes = (degree_features(graph, bins) for graph in (tree, edges))
    distance = (words[:, :, None] - nodes[:, None]).square().sum(dim=-1).sqrt()
    return torch.exp(-(-2 * torch.expm1(-distance)).sqrt())


def nearest_nodes(alignment: Tensor, words: Tensor, nodes: Tensor) -> Tensor:
    """The alignment (B, T, N) where a node is a word's nearest, 0 elsewhere.

    Nodes that are as near share it: the released code takes any of them [our choice].

    Args:
        words: (B, T) bool, those that are read; others have no node.
        nodes: (B, N) bool, those that are there.
    """
    found = alignment.masked_fill(~(words[:, :, None] & nodes[:, None]), 0)
    nearest = (found == found.amax(dim=2, keepdim=True)) & (found > 0)
    return found * nearest / nearest.sum(dim=2, keepdim=True).clamp(min=1)


def degree_features(edges: Tensor, bins: int) -> Tensor:
    """Histograms (B, M, bins) float64 of log₂ of the degrees, floored, of what is 0, 1 and 2 steps away from each node;
    a step further counts a hundredth. Nodes without neighbours are not counted.

    Args:
        edges: (B, M, M) bool, symmetric, without loops.
    """
    own = torch.eye(edges.shape[1], device=edges.device, dtype=torch.bool)
    near = edges.double()  # which autocast leaves alone
    further = (near @ near > 0) & ~edges & ~own
    degree = edges.sum(dim=2, keepdim=True)
    least = 2 ** torch.arange(bins, device=edges.device)
    binned = ((degree >= least) & (degree < 2 * least)).double()  # (B, M, bins)
    # Whole numbers first: nodes in the same place have the same features to the last bit.
    return binned + _HOP * (near @ binned) + _HOP**2 * (further.double() @ binned)


def in_a_row(words: Tensor) -> Tensor:
    """The tree (B, T, T) of words (B, T) bool in which each that is read hangs on the one before [our choice, where no
    parser is at hand]."""
    follows = torch.diag_embed(words[:, 1:] & words[:, :-1], offset=1)
    return follows | follows.mT


def touching(proposals: Tensor) -> Tensor:
    """Edges (B, N, N) between nodes whose cells (B, N, h, w) meet or lie side by side [our choice, where the relations
    of a scene are not known]."""
    inside = (proposals > 0).float()
    grown = F.max_pool2d(inside, 3, stride=1, padding=1)
    met = grown.flatten(2) @ inside.flatten(2).mT > 0
    return met & ~torch.eye(met.shape[1], device=met.device, dtype=torch.bool)
