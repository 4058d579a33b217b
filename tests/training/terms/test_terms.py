"""How a recipe names terms: defaults, weights, errors; and that anyone may register one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magnet_fast.training.config import load_config, parse_config
from magnet_fast.training.objective import Objective
from magnet_fast.training.terms import TERMS, Term, TermConfig, build_terms, register

from ..fakes import FakeModel


def names(terms: object, model: FakeModel | None = None) -> list[str]:
    return list(build_terms(parse_config({"epochs": 1, "terms": terms}).terms, model or FakeModel(), None))


def test_defaults_follow_the_model() -> None:
    silent = FakeModel()
    silent.head.says_presence = False
    assert names({}) == ["mask", "presence"] and names({}, silent) == ["mask"]
    silent.presence = torch.nn.Identity()  # a part of its own says it
    assert names({}, silent) == ["mask", "presence"]


def test_a_weight_of_zero_leaves_out_and_naming_adds() -> None:
    assert names({"alignment": {"weight": 0.5}}) == ["mask", "presence", "alignment"]
    assert names({"mask": {"weight": 0}, "cross_entropy": None}) == ["presence", "cross_entropy"]
    assert names({"alignment": {"weight": 0}, "presence": {"weight": 0}}) == ["mask"]
    one, other = names({"cross_entropy": {}, "alignment": {}}), names({"alignment": {}, "cross_entropy": {}})
    assert one == other
    with pytest.raises(ValueError, match="terms: all weights are 0"):
        names({"mask": {"weight": 0}, "presence": {"weight": 0}})


def test_on_the_command_line() -> None:
    config = load_config(None, ["epochs=1", "terms.alignment.weight=0.5", "terms.alignment.text_temperature=0.2"])
    assert config.terms["alignment"].weight == 0.5 and config.terms["alignment"].text_temperature == 0.2
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"algnment": {}}, r"unknown key 'terms\.algnment'; the nearest known one is 'terms\.alignment'"),
        ({"mask": {"dicee": 1}}, r"unknown key 'terms\.mask\.dicee'; the nearest known one is 'terms\.mask\.dice'"),
        ({"mask": {"dice": -1}}, r"terms\.mask\.dice: .*greater than or equal to 0, got -1"),
        ({"mask": {"weight": "much"}}, r"terms\.mask\.weight: .*got 'much'"),
        ({"grounding": {"scheme": "70/30"}}, r"terms\.grounding\.scheme: .*'90/10' or '80/10/10', got '70/30'"),
        ({"mask": 2}, r"terms\.mask: "),
        ([1], "terms: expected terms by name"),
    ],
)
def test_mistakes_are_named(terms: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"epochs": 1, "terms": terms})


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError) as raised:
        parse_config({"epochs": 1, "terms": {"algnment": {}, "mask": {"bce": -1}}, "batch_size": 0})
    assert all(name in str(raised.value) for name in ("terms.algnment", "terms.mask.bce", "batch_size"))


def test_anyones_term_is_named_in_a_recipe_and_trained() -> None:
    class OwnConfig(TermConfig):
        target: float = 1.0

    @register("own")
    class OwnTerm(Term):
        config_class = OwnConfig
        logged = ("own",)

        def __init__(self, config: OwnConfig) -> None:
            super().__init__(config)
            self.shift = torch.nn.Parameter(torch.tensor(config.target))

        def forward(self, prediction, batch, model) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (prediction.mask.mean() - self.shift) ** 2
            return loss, {"own": loss.detach()}

    try:
        with pytest.raises(ValueError, match="there is a term 'own' already"):
            register("own")(OwnTerm)
        config = parse_config({"epochs": 1, "terms": {"own": {"weight": 3, "target": 2}, "mask": {"weight": 0}}})
        model = FakeModel()
        model.head.says_presence = False
        objective = Objective(model, build_terms(config.terms, model, None), "float32")
        text = model_text(model)
        losses = objective({"image": torch.randn(2, 3, 16, 16), "text": text, "mask": torch.zeros(2, 16, 16)})
        torch.testing.assert_close(losses["total"], 3 * losses["own"])
        losses["total"].backward()
        assert objective.terms["own"].shift.grad != 0 and objective.logged == ("own",)
        with pytest.raises(ValueError, match="more than one of them logs own"):
            Objective(model, {"one": OwnTerm(OwnConfig()), "other": OwnTerm(OwnConfig())}, "float32")
    finally:
        del TERMS["own"]


def model_text(model: FakeModel):
    from magnet_fast.models import Text

    return Text(torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool))
