"""The loss of presence against the cross-entropy of the pair of logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.terms import PresenceTerm
from magnet_fast.training.terms.presence import PresenceTermConfig

from ..fakes import FakeModel


def test_is_the_sum_of_the_pairs_cross_entropies() -> None:
    torch.manual_seed(0)
    pairs = torch.randn(3, 4, 2)
    exists = torch.tensor([True, False, True, True])
    final, *earlier = (Prediction(torch.zeros(4, 2, 2), pair[:, 1] - pair[:, 0]) for pair in pairs)
    without = Prediction(torch.zeros(4, 2, 2))
    prediction = final._replace(earlier=(*earlier, without))
    loss, values = PresenceTerm(PresenceTermConfig())(prediction, {"exists": exists}, None)
    expected = [F.cross_entropy(pair, exists.long()) for pair in pairs]
    torch.testing.assert_close(loss, sum(expected))
    torch.testing.assert_close(values["presence"], sum(expected) / 3)


def test_refusals() -> None:
    model = FakeModel()
    assert isinstance(PresenceTerm.build(PresenceTermConfig(), model, None), PresenceTerm)
    model.head.says_presence = False
    with pytest.raises(ValueError, match=r"terms\.presence: the model cannot say.*set terms\.presence\.weight to 0"):
        PresenceTerm.build(PresenceTermConfig(), model, None)
    term = PresenceTerm(PresenceTermConfig())
    with pytest.raises(ValueError, match=r"exists: .*presence \(2,\), got \(3,\)"):
        term(Prediction(torch.zeros(2, 4, 4), torch.zeros(2)), {"exists": torch.ones(3, dtype=torch.bool)}, None)
    with pytest.raises(ValueError, match="exists: .*no presence"):
        term(Prediction(torch.zeros(2, 4, 4)), {"exists": torch.ones(2, dtype=torch.bool)}, None)
