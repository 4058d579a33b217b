"""The study of parts: every row is built with its terms, and differs from what it is compared with in what it names."""

from __future__ import annotations

import pytest

from magnet_fast.models.registry import preset_config
from magnet_fast.training.building import build_model, build_tokenizer
from magnet_fast.training.terms import build_terms
from magnet_fast.training.variants import load_study, row_config

STUDY = load_study("parts")
CONFIGS = {name: row_config(STUDY, name, 0) for name in STUDY.rows}


def model_of(name: str):
    return preset_config(CONFIGS[name].model.name, **CONFIGS[name].model.overrides)


@pytest.mark.parametrize("name", STUDY.rows)
def test_a_row_builds_with_its_terms(name: str) -> None:
    config = CONFIGS[name]
    model = build_model(config)
    assert not model.needs  # scenes carry nothing beside image and sentence
    terms = build_terms(config.terms, model, build_tokenizer(config, model))
    assert terms.keys() == config.terms.keys() and "mask" in terms


def test_rows_differ_in_what_they_name() -> None:
    found = {}
    for name, row in STUDY.rows.items():
        if row.against is None:
            continue
        own, other = CONFIGS[name], CONFIGS[row.against]
        changed = {key.split(".")[0] for key, _, _ in model_of(row.against).differences(model_of(name))}
        found[name] = (changed, set(own.terms) - set(other.terms))
        size = {"image_size": other.data.image_size} if name == "bridge" else {}  # its grid is too coarse at 64
        same = {"model": other.model, "terms": other.terms, "data": own.data.model_copy(update=size)}
        assert own.model_copy(update=same) == other
    fusion, head, slices = {"fusion"}, {"head"}, {"fusion", "text"}
    assert found == {
        "lavt": (fusion, set()), "exchange": (slices, set()), "lda": (fusion, set()), "word_film": (fusion, set()),
        "funnel": (fusion, set()), "bridge": (slices | head, set()), "joint": (fusion | head, set()),
        "global_gate": (head, set()), "language_query": (head, set()), "relation": (head, set()),
        "maed": (head, set()), "aspp": (head, set()), "sentence_context": (head, set()), "amf": (head, set()),
        "alignment": (set(), {"alignment"}), "adversarial": (set(), {"adversarial"}),
        "category": (set(), {"category"}), "global_alignment": (set(), {"global_alignment"}),
    }  # fmt: skip
    assert {config.max_steps for config in CONFIGS.values()} == {600}
