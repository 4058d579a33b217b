"""DuMoGa: the released choice and alignment by golden values, the corrected form by its properties."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.card import model_card
from magnet_fast.models.dumoga import NodeChoice
from magnet_fast.models.graph_alignment import graph_alignment, in_a_row, nearest_nodes, touching
from magnet_fast.models.heads.node_choice import ABSENT
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


@pytest.mark.slow
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
    assert ((kept > 0) | (found < found.amax(dim=2, keepdim=True))).all()


def slow_alignment(tree: Tensor, edges: Tensor) -> Tensor:
    """Of one pair of graphs, node by node, with a breadth-first search."""

    def features(graph: Tensor) -> list[Counter[int]]:
        near = [[j for j in range(len(graph)) if graph[i, j]] for i in range(len(graph))]
        found = []
        for start in range(len(graph)):
            steps, reached = {start: 0}, [start]
            for node in reached:
                for other in near[node]:
                    if other not in steps:
                        steps[other] = steps[node] + 1
                        reached.append(other)
            counts: Counter[int] = Counter()
            for node, step in steps.items():
                if step <= 2 and near[node]:
                    counts[len(near[node]).bit_length() - 1] += 0.01**step
            found.append(counts)
        return found

    words, nodes = features(tree), features(edges)
    found = torch.zeros(len(words), len(nodes), dtype=torch.float64)
    for t, word in enumerate(words):
        for n, node in enumerate(nodes):
            distance = sum((word[k] - node[k]) ** 2 for k in word.keys() | node.keys()) ** 0.5
            found[t, n] = math.exp(-math.sqrt(max(0.0, 2 - 2 * math.exp(-distance))))
    return found


@pytest.mark.parametrize(("words", "nodes"), [(1, 1), (2, 7), (12, 3), (20, 10)])
def test_alignment(words: int, nodes: int) -> None:
    generator = torch.Generator().manual_seed(words)
    there = torch.rand(3, words, generator=generator) > 0.2
    edges = torch.rand(3, nodes, nodes, generator=generator) > 0.6
    edges = (edges | edges.mT) & ~torch.eye(nodes, dtype=torch.bool)
    tree = in_a_row(there)
    found = graph_alignment(tree, edges)
    for item in range(3):
        for t in range(words):
            hangs = [u for u in (t - 1, t + 1) if 0 <= u < words and there[item, t] and there[item, u]]
            assert tree[item, t].nonzero().flatten().tolist() == hangs
        # The root of two minus two times nearly one makes 1e-8 of the last bit.
        torch.testing.assert_close(found[item], slow_alignment(tree[item], edges[item]), rtol=0, atol=1e-7)


def test_nearest_nodes() -> None:
    alignment = torch.tensor([[[0.5, 0.9, 0.3], [0.7, 0.7, 0.9], [0.1, 0.2, 0.3]]], dtype=torch.float64)
    words, nodes = torch.tensor([[True, True, False]]), torch.tensor([[True, True, False]])
    expected = torch.tensor([[[0, 0.9, 0], [0.35, 0.35, 0], [0, 0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(nearest_nodes(alignment, words, nodes), expected)
    assert not nearest_nodes(alignment, words, torch.zeros(1, 3, dtype=torch.bool)).any()


def test_touching() -> None:
    proposals = torch.zeros(1, 4, 6, 6)
    proposals[0, 0, :3, :3] = 1
    proposals[0, 1, 3, 3] = 0.1  # meets the first at a corner
    proposals[0, 2, 5, 5] = 1  # one cell of another lies between
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(touching(proposals)[0], expected)
    proposals[0, 2, 4, 4] = 1
    expected[1, 2] = expected[2, 1] = True
    assert torch.equal(touching(proposals)[0], expected)


def context(nodes: int = 5, count: int = 2, missing: int = 2) -> dict[str, Tensor]:
    """Squares in a row, of which the last are missing in all images but the first."""
    generator = torch.Generator().manual_seed(3)
    proposals = torch.zeros(count, nodes, 8, 4 * nodes)
    for node in range(nodes):
        proposals[:, node, 2:6, 4 * node : 4 * node + 3] = 1
    proposals[1:, nodes - missing :] = 0
    edges = torch.rand(count, nodes, nodes, generator=generator) > 0.5
    return {
        "proposals": proposals,
        "node_features": torch.randn(count, nodes, 16, generator=generator),
        "edges": (edges | edges.mT) & ~torch.eye(nodes, dtype=torch.bool),
    }


def created(**overrides: Any) -> NodeChoice:
    torch.manual_seed(0)
    return models.create("dumoga_tiny", text__num_layers=1, **overrides).eval()


@pytest.mark.parametrize("alignment", ["touching", "edges"])
def test_the_mask_is_the_nodes_mixed_by_their_scores(alignment: str) -> None:
    model, given, (image, text) = created(alignment=alignment), context(), batch()
    assert model.needs == ("proposals", "node_features", "edges")[: 2 + (alignment == "edges")]
    with torch.inference_mode():
        prediction = model(image, text, given)
        weights = prediction.extra["nodes"].double().softmax(dim=1)
        assert (prediction.extra["nodes"][1, -2:] == ABSENT).all() and not weights[1, -2:].any()
        share = sum(weights[:, n, None, None] * given["proposals"][:, n].double() for n in range(5))
        expected = (share.clamp(1e-4, 1 - 1e-4) / (1 - share.clamp(1e-4, 1 - 1e-4))).log()
        torch.testing.assert_close(prediction.mask.double(), expected, rtol=1e-4, atol=1e-4)
        assert model.predict(image, *text, context=given).shape == (2, 64, 96)
    assert not prediction.aligned_corners and model.looks_first is False


@pytest.mark.parametrize("alignment", ["touching", "edges"])
def test_neither_the_order_of_nodes_nor_padding_nor_neighbours_in_a_batch_matter(alignment: str) -> None:
    model, given, (image, (ids, mask)) = created(alignment=alignment), context(), batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {name: tensor[:, order] for name, tensor in given.items()}
    shuffled["edges"] = shuffled["edges"][:, :, order]
    with torch.inference_mode():
        scores = model(image, Text(ids, mask), given).extra["nodes"]
        moved = model(image, Text(ids, mask), shuffled).extra["nodes"]
        longer = Text(F.pad(ids, (0, 6), value=7), F.pad(mask, (0, 6)))
        padded = model(image, longer, given).extra["nodes"]
        alone = model(image[1:], Text(ids[1:, :6], mask[1:, :6]), {name: one[1:] for name, one in given.items()})
    assert scores[0].std() > 0
    torch.testing.assert_close(moved, scores[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.extra["nodes"], scores[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"layout": "released", "slots": 5}, {"alignment": "edges"}], ids=str)
def test_every_parameter_gets_a_gradient(overrides: dict[str, Any]) -> None:
    model = created(**overrides).train()
    everything(model(*batch(), context(missing=0))).backward()
    assert without_gradient(model) == []


def test_in_bfloat16_and_under_autocast() -> None:
    model, given, (image, text) = created(), context(), batch()
    exact = model.predict(image, *text, context=given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.predict(image, *text, context=given)
    whole = model.bfloat16().predict(image, *text, context=given)
    for found in (rough, whole):
        assert found.dtype == torch.float32 and found.isfinite().all() and (found - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proposals": None}, ValueError, "context lacks proposals"),
        (
            {"proposals": torch.zeros(2, 5, 8)},
            ValueError,
            r"context\['proposals'\] must be \(B, N, h, w\).*got \(2, 5, 8\)",
        ),
        ({"proposals": torch.zeros(3, 5, 8, 8)}, ValueError, r"B that of the text, 2; got \(3, 5, 8, 8\)"),
        (
            {"node_features": torch.zeros(2, 5, 7)},
            ValueError,
            r"'node_features'\] must be \(2, 5, 16\); got \(2, 5, 7\)",
        ),
        ({"edges": torch.zeros(2, 5, 4)}, ValueError, r"'edges'\] must be \(2, 5, 5\); got \(2, 5, 4\)"),
        ({"edges": torch.zeros(2, 5, 5)}, TypeError, r"'edges'\] must be bool; got torch.float32"),
    ],
)
def test_a_context_that_does_not_fit(change: dict[str, Tensor | None], error: type[Exception], message: str) -> None:
    model, given = created(alignment="edges"), {**context(), **change}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    for call in (model, model.encode):
        with pytest.raises(error, match=message):
            call(*batch(), given)


def test_refused() -> None:
    with pytest.raises(ValueError, match="context lacks proposals, node_features"):
        created()(*batch())
    with pytest.raises(ValueError, match="has 5 nodes; this model chooses among slots=10"):
        created(layout="released")(*batch(), context())
    for overrides, message in (
        ({"text__schedule": "slices"}, "text.schedule='slices': there are no stages"),
        ({"input__fit": "letterbox"}, "input.fit='letterbox': proposals are of squashed images"),
        ({"image": {"kind": "swin"}}, "image"),
    ):
        with pytest.raises(ValueError, match=message):
            models.preset_config("dumoga_tiny", **overrides)
    with pytest.raises(ValueError, match="no image encoder; got 'resnet50' for one"):
        models.create("dumoga_tiny", pretrained={"image": "resnet50", "text": False})


def test_files_round_trip(tmp_path: Path) -> None:
    model = created(input__size=96)
    models.save(model, tmp_path / "model.safetensors")
    again = models.load(tmp_path / "model.safetensors")
    assert again.config == model.config and again.spec.size == 96 and type(again) is NodeChoice
    assert model.config.differences(again.config) == []
    image, text = batch()
    assert torch.equal(again.predict(image, *text, context=context()), model.predict(image, *text, context=context()))


def test_a_published_model_says_what_it_needs() -> None:
    page = model_card(created(alignment="edges"), "owner/name", tokenizer=True)
    assert "context={…})  # tensors: proposals, node_features, edges\n" in page and "magnet-fast segment" not in page
    assert "| model | dumoga | node_width 16, width 64, layout correct" in page
    assert "magnet-fast segment picture.jpg" in model_card(models.create("lavt_tiny"), "owner/name", tokenizer=True)
