"""Cross-entropy over nodes, and which node the truth is."""

from __future__ import annotations

import math

import pytest
import torch

from magnet_fast.models import Prediction
from magnet_fast.training.terms import NodeChoiceTerm, TermConfig
from magnet_fast.training.terms.node_choice import best_node


def test_the_best_node_is_the_one_of_the_largest_iou() -> None:
    proposals = torch.zeros(3, 3, 4, 4)
    proposals[:, 0] = 1  # holds the truth, and much else
    proposals[:, 1, :2, :2] = 0.75
    proposals[:, 2, 2:, 2:] = 1
    mask = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask[0, :4, :4] = 1  # the second's four cells
    mask[1, 5:, 4:] = 1  # three quarters of the third's
    place, known = best_node(proposals, mask)
    assert place[:2].tolist() == [1, 2] and known.tolist() == [True, True, False]


def test_loss_and_accuracy() -> None:
    proposals = torch.eye(3).reshape(1, 3, 1, 3).repeat(3, 1, 1, 1)
    mask = torch.zeros(3, 2, 6)
    mask[0, :, :2] = mask[1, :, 4:] = 1  # the first node, the third; the last sentence names nothing
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [9.0, 0.0, 0.0]], requires_grad=True)
    prediction = Prediction(torch.zeros(3, 1, 3), extra={"nodes": scores})
    batch = {"mask": mask, "extra": {"proposals": proposals}}
    loss, values = NodeChoiceTerm(TermConfig())(prediction, batch, None)
    rows = [(scores[0].tolist(), 0), (scores[1].tolist(), 2)]
    expected = sum(math.log(sum(map(math.exp, row))) - row[n] for row, n in rows) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6) and values["node_accuracy"] == 0.5
    loss.backward()
    assert scores.grad[:2].all() and not scores.grad[2].any()
    nothing, _ = NodeChoiceTerm(TermConfig())(prediction, {**batch, "mask": torch.zeros(3, 2, 6)}, None)
    assert nothing.item() == 0
