"""Relation alignment's head against its formulas, slow and in float64, and the structure of roles and instances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.models.config import Shapes
from magnet_fast.models.contract import Features, Words
from magnet_fast.models.heads.relation import Relation, RelationConfig, SemanticComponentParser
from tests.models import slow
from tests.models.cases import batch, build

HEADS, INSTANCES, WIDTH = 2, 3, 8
SHAPES = Shapes((4, 5, 6, 7), (4, 8, 16, 32), 10, 10, (None,) * 4)


def made() -> Relation:
    torch.manual_seed(0)
    head = RelationConfig(width=WIDTH, instances=INSTANCES, num_heads=HEADS).build(SHAPES).double().eval()
    for parameter in head.parameters():
        if parameter.dim() > 1:  # apart from one another: at the start all instances are nearly the same
            parameter.data *= 1.6
    return head


def inputs() -> Features:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = [noise(2, *size, c) for size, c in zip(((8, 12), (4, 6), (2, 3), (1, 2)), SHAPES.channels, strict=True)]
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    return Features(maps, Words(noise(2, 5, 10), mask), [None] * 4, (32, 48))


def expected(head: Relation, features: Features, item: int) -> tuple[Tensor, Tensor, Tensor]:
    """Roles (3, T), instances (N, h, w) and the share Y (h, w) of one item."""
    words, mask = features.words.features[item], features.words.mask[item].tolist()
    roles, parts = torch.zeros(3, len(words), dtype=torch.float64), []
    for k in range(3):
        scores = [
            (head.parser.queries[k] @ slow.linear(head.parser.key, words[t]) / math.sqrt(10)).exp() if mask[t] else 0.0
            for t in range(len(words))
        ]
        for t, score in enumerate(scores):
            roles[k, t] = score / sum(scores)
        parts.append(sum(roles[k, t] * words[t] for t in range(len(words))))
    subject, object_, relation = parts

    x = slow.linear(head.pixels, features.maps[2][item])
    height, width = x.shape[:2]
    iam, pixels = head.instances, [(i, j) for i in range(height) for j in range(width)]
    query = iam.instances + slow.linear(iam.subject, subject) + slow.linear(iam.object, object_)
    instances = torch.zeros(INSTANCES, height, width, dtype=torch.float64)
    for i, j in pixels:
        scores = [(query[n] @ slow.linear(iam.key, x[i, j]) / math.sqrt(WIDTH)).exp() for n in range(INSTANCES)]
        for n in range(INSTANCES):
            instances[n, i, j] = scores[n] / sum(scores)
    z, boxes = [], []
    for n in range(INSTANCES):
        total = sum(instances[n, i, j] for i, j in pixels)
        z.append(sum(instances[n, i, j] * x[i, j] for i, j in pixels) / total)
        box = []
        for side, which in ((height, 0), (width, 1)):
            mean = sum(instances[n, p[0], p[1]] * (p[which] + 0.5) / side for p in pixels) / total
            variance = sum(instances[n, p[0], p[1]] * ((p[which] + 0.5) / side - mean) ** 2 for p in pixels) / total
            box += [mean, (variance + 1e-6).sqrt()]
        boxes.append(torch.stack(box))

    rbvl = head.localization
    z = slow.pre_norm_layer(rbvl.layer, HEADS, torch.stack(z))
    first, _, last = rbvl.pair
    scores = []
    for n in range(INSTANCES):
        answers = []
        for m in range(INSTANCES):
            hidden = slow.linear(first, torch.cat([z[n], z[m], boxes[n] - boxes[m]]))
            pair = slow.linear(last, 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
            answers.append(pair @ slow.linear(rbvl.relation, relation) + z[m] @ slow.linear(rbvl.object, object_))
        best = sum((answer / math.sqrt(WIDTH)).exp() for answer in answers).log()
        scores.append(z[n] @ slow.linear(rbvl.subject, subject) / math.sqrt(WIDTH) + best)
    weights = torch.stack(scores).exp()
    return roles, instances, sum(weights[n] / weights.sum() * instances[n] for n in range(INSTANCES))


def test_formulas() -> None:
    head, features = made(), inputs()
    with torch.no_grad():
        prediction = head(features)
        found = [expected(head, features, item) for item in range(2)]
        roles, instances, share = (torch.stack(part) for part in zip(*found, strict=True))
        weighed = features.maps[2] * (1 + share[..., None])
        mask = head.decoder(features._replace(maps=[*features.maps[:2], weighed, features.maps[3]])).mask
    torch.testing.assert_close(prediction.extra["roles"], roles)
    torch.testing.assert_close(prediction.extra["instances"], instances)
    assert share.min() > 1e-4 and share.max() < 1 - 1e-4 and share.std() > 0.01
    torch.testing.assert_close(prediction.earlier[0].mask, (share / (1 - share)).log())
    torch.testing.assert_close(prediction.mask, mask)


@pytest.mark.parametrize("words", [1, 7, 60])
def test_roles_are_shares_of_words_and_instances_of_pixels(words: int) -> None:
    model = build(("relation_alignment_tiny", {}))
    image, (ids, mask) = batch((45, 67), words=max(words, 4))
    ids, mask = ids[:, :words], mask[:, :words].clone()
    mask[:, 0] = True
    with torch.inference_mode():
        extra = model(image, Text(ids, mask)).extra
    torch.testing.assert_close(extra["roles"].sum(dim=2), torch.ones(2, 3))
    assert not extra["roles"].masked_select(~mask[:, None]).any() and (extra["roles"] >= 0).all()
    torch.testing.assert_close(extra["instances"].sum(dim=1), torch.ones(2, 3, 5))
    assert (extra["instances"] >= 0).all()


def test_a_sentence_without_words_and_an_instance_without_pixels_are_no_nan() -> None:
    words = torch.randn(1, 4, 6)
    assert all(part.isfinite().all() for part in SemanticComponentParser(6)(words, torch.zeros(1, 4).bool()))
    head = made()
    head.instances.instances.data[0] = 0
    head.instances.key.weight.data = 1e4 * torch.eye(WIDTH, dtype=torch.float64)
    features = inputs()
    prediction = head(features)
    assert prediction.extra["instances"].flatten(2).sum(dim=2).min() == 0  # the test tests something
    (prediction.mask.sum() + prediction.earlier[0].mask.sum()).backward()
    assert prediction.mask.isfinite().all() and prediction.earlier[0].mask.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_learns_what_a_pair_of_instances_tells() -> None:
    """Scores depend on where the other instance is: without places, left and right of it were the same."""
    head = made().localization
    parts, same = torch.randn(1, 3, 10).double(), torch.randn(1, INSTANCES, WIDTH).double()
    boxes = torch.tensor([[[0.5, 0.1, 0.2, 0.1], [0.5, 0.1, 0.8, 0.1], [0.5, 0.1, 0.5, 0.1]]]).double()
    with torch.no_grad():
        one, other = head(same, boxes, parts), head(same, boxes[:, [1, 0, 2]], parts)
        moved = head(same, boxes + 0.1, parts)
    assert (one - other).abs().max() > 1e-4
    torch.testing.assert_close(one, moved)  # only differences of places are read


def test_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=3 does not divide width=64"):
        models.preset_config("relation_alignment_tiny", head__num_heads=3)
    with pytest.raises(ValueError, match="relation reads a map of stride 16 or more, and finer ones"):
        models.preset_config("cris_tiny", head={"kind": "relation"})
