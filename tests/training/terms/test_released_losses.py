"""Losses of released code, by our terms: ReLA's and CRIS's golden values, RefSegformer's formula spelled out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.terms import CrossEntropyTerm, MaskTerm, MinimapTerm, PresenceTerm
from magnet_fast.training.terms.cross_entropy import CrossEntropyConfig
from magnet_fast.training.terms.mask import MaskConfig
from magnet_fast.training.terms.minimap import MinimapConfig
from magnet_fast.training.terms.presence import PresenceTermConfig
from tests.golden.parameters import golden


def test_rela() -> None:
    values = golden("rela_window7")
    mask, cells, absent = values["mask_logits"], values["minimap_logits"], values["no_target_logits"]
    prediction = Prediction(
        mask[:, 1] - mask[:, 0],
        absent[:, 0] - absent[:, 1],
        extra={"minimap": (cells[..., 1] - cells[..., 0]).unflatten(1, (10, 10))},
        aligned_corners=False,
    )
    batch = {"mask": values["target"][:, 0], "exists": ~values["empty"].bool()}
    terms = {
        1.0: CrossEntropyTerm(CrossEntropyConfig()),
        0.1: MinimapTerm(MinimapConfig()),
        0.1 + 1e-12: PresenceTerm(PresenceTermConfig(present=0.9, absent=1.1)),
    }
    total = sum(weight * term(prediction, batch, None)[0] for weight, term in terms.items())
    torch.testing.assert_close(total, values["loss"][0], rtol=1e-5, atol=1e-4)


def test_cris() -> None:
    values = golden("cris")
    term = MaskTerm(MaskConfig(bce=1, dice=0, at="logits"))
    batch = {"mask": values["target"][:, 0]}
    loss, _ = term(Prediction(values["mask_logits"][:, 0]), batch, None)
    torch.testing.assert_close(loss, values["loss"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exists", [[True, False, True], [True] * 3, [False] * 3])
def test_refsegformer(exists: list[bool]) -> None:
    """CE of the sentences that name something, 0.4 CE of the others, and the earlier predictions with 0.4."""
    torch.manual_seed(0)
    pairs = [torch.randn(3, 2, side, side) for side in (8, 4, 2)]
    named = torch.tensor(exists)
    mask = (torch.rand(3, 32, 32) > 0.5) & named[:, None, None]

    def entropy(pair: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(pair, size=(32, 32), mode="bilinear", align_corners=True)
        each = F.cross_entropy(resized, mask.long(), reduction="none").mean(dim=(1, 2))
        return sum(f * each[of].mean() for f, of in ((1.0, named), (0.4, ~named)) if of.any())

    final, *earlier = (Prediction(pair[:, 1] - pair[:, 0]) for pair in pairs)
    term = CrossEntropyTerm(CrossEntropyConfig(background=1, target=1, absent=0.4, earlier=0.4))
    loss, values = term(final._replace(earlier=tuple(earlier)), {"mask": mask, "exists": named}, None)
    torch.testing.assert_close(loss, entropy(pairs[0]) + 0.4 * (entropy(pairs[1]) + entropy(pairs[2])))
    torch.testing.assert_close(values["cross_entropy"], entropy(pairs[0]))


def test_a_model_without_minimap_is_refused() -> None:
    with pytest.raises(ValueError, match="terms.minimap: the model's predictions have no minimap; set terms.minimap"):
        MinimapTerm(MinimapConfig())(Prediction(torch.zeros(1, 2, 2)), {"mask": torch.zeros(1, 4, 4)}, None)
