"""DuMoGa: the released choice and alignment by golden values, the corrected form by its properties."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import magnet_fast
from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.dumoga import NodeChoice
from magnet_fast.models.graph_alignment import graph_alignment, in_a_row, nearest_nodes, touching
from magnet_fast.models.heads.node_choice import NodeReader
from tests.golden.parameters import FOLDER, golden, released_state
from tests.models.cases import batch, everything, without_gradient

READER = {
    "linear_hidden": "words", "linear_pic": "nodes", "linear_q": "query", "linear_k": "key", "linear_v": "value",
    "linear_final1": "join",
}  # fmt: skip
"""The released names; its linear_final, linear_merge and linear are called by nothing."""


def released() -> NodeChoice:
    """The released model, small."""
    sizes = json.loads((FOLDER / "dumoga.json").read_text())["bert"]
    text = {
        "vocab_size": sizes["vocab_size"],
        "num_layers": sizes["num_hidden_layers"],
        "intermediate_size": sizes["intermediate_size"],
        "max_positions": sizes["max_position_embeddings"],
    }
    model = models.create("dumoga_bert_base", text=text, layout="released", alignment="given").eval()
    state, renamed = released_state("dumoga"), {}
    for old, tensor in state.items():
        name = old.removeprefix("sentence_encoder.")
        part, _, entry = name.partition(".")
        if part == "bert" and not entry.startswith("pooler"):
            renamed[f"text_encoder.{name}"] = tensor
        elif part in READER:
            renamed[f"head.scores.reader.{READER[part]}.{entry}"] = tensor
        elif part in ("fc", "fc2"):
            renamed[f"head.scores.{'merge' if part == 'fc' else 'slots'}.{entry}"] = tensor
    model.load_state_dict(renamed)
    return model


def test_released_choice() -> None:
    model, values = released(), golden("dumoga")
    context = {
        "proposals": torch.ones(3, 10, 4, 4),
        "node_features": values["roi_features"],
        "alignment": values["alignment"],
    }
    text = Text(values["input_ids"], values["attention_mask"].bool())
    with torch.inference_mode():
        scores = model(torch.zeros(3, 3, 8, 8), text, context).extra["nodes"]
        words = model.encode(torch.zeros(3, 3, 8, 8), text, context).words.features
        reader, scorer = model.head.scores.reader, model.head.scores
        right = reader(words, None, values["roi_features"], values["alignment"].mT).sum(dim=1)
        wrong = reader(words, None, values["roi_features"], values["alignment"].reshape(3, 10, 16)).sum(dim=1)
        corrected = scorer.slots(scorer.merge(right))
    torch.testing.assert_close(scores, values["logits_released"], rtol=0, atol=1e-4)
    torch.testing.assert_close(wrong, values["encoded"], rtol=0, atol=1e-4)
    torch.testing.assert_close(corrected, values["logits_corrected_layout"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("graph", "tolerance"), [(1, 1e-6), (2, 1e-9), (3, 1e-9)])  # nodes repeat in the first
def test_released_alignment(graph: int, tolerance: float) -> None:
    values = golden("dumoga")
    both = values[f"graph{graph}_adjacency"].bool()
    tree, edges = both[None, :-10, :-10], both[None, -10:, -10:]
    found = graph_alignment(tree, edges)
    torch.testing.assert_close(found[0], values[f"graph{graph}_similarity"], rtol=0, atol=tolerance)
    there = torch.ones(1, tree.shape[1], dtype=torch.bool), torch.ones(1, 10, dtype=torch.bool)
    kept = nearest_nodes(found, *there)
    # Nodes that are as near share it; the released code keeps one of them.
    torch.testing.assert_close(kept.sum(dim=2)[0], values[f"graph{graph}_top1_value"], rtol=0, atol=tolerance)
    assert (((kept > 0) | (found < found.amax(dim=2, keepdim=True))).all())
