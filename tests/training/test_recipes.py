"""Shipped configurations: what they build on, that all of them are whole, and training on several data sets at once."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

from magnet_fast import models
from magnet_fast.data.scenes import write_scenes
from magnet_fast.data.tokenizers import open_tokenizer
from magnet_fast.models import InputSpec
from magnet_fast.training.config import load_config, shipped_configs
from magnet_fast.training.datasets import build_datasets, open_readers
from magnet_fast.training.schedule import rate_factor
from magnet_fast.training.terms import build_terms


@pytest.mark.parametrize("name", shipped_configs())
def test_every_recipe_is_whole(name: str) -> None:
    config = load_config(name)
    model = models.preset_config(config.model.name, **config.model.overrides)
    system = "lavt" if name.startswith("asgn") else name.split("_")[0]  # ASGN is terms alone, here on LAVT
    assert config.model.name.startswith(system)
    weighed = {term for term, options in config.terms.items() if options.weight}
    if "grounding" in weighed:
        assert model.text.width % config.terms["grounding"].heads == 0
    full = "tiny" not in name
    if not full:  # small enough to be built here
        build_terms(config.terms, models.create(config.model.name), open_tokenizer())
    if name.startswith("lavt_swin_b"):  # the published loss, and nothing beside it but what the recipe's name says
        assert weighed - {"grounding"} == {"cross_entropy"} and config.terms["mask"].weight == 0
        assert (config.terms["cross_entropy"].background, config.terms["cross_entropy"].target) == (0.9, 1.1)
    if name.startswith(("magnet", "lavt")) and full:
        assert (config.data.image_size or model.spec.size, config.batch_size, config.epochs, config.precision) == (
            480,
            32,
            40,
            "bf16",
        )
        assert config.model.pretrained is True and len(config.optimiser.freeze) == 3


def test_what_the_papers_say() -> None:
    refsegformer, rela, cris = (
        load_config(name) for name in ("refsegformer_swin_b_rrefcoco", "rela_swin_b_grefcoco", "cris_r50_refcoco")
    )
    assert (refsegformer.optimiser.lr, refsegformer.epochs, refsegformer.batch_size) == (3e-5, 50, 48)
    assert (refsegformer.task, refsegformer.best) == ("robust", "rIoU")
    assert (rela.optimiser.lr, rela.optimiser.weight_decay, rela.max_steps, rela.clip_norm) == (
        1e-5,
        0.05,
        150000,
        0.01,
    )
    at = [rate_factor(step / 150000, step, **rela.schedule.model_dump()) for step in (0, 109999, 110000, 140000)]
    assert at == pytest.approx([1, 1, 0.1, 0.01])
    assert (rela.task, rela.protocol, rela.data.truth) == ("generalized", "gres", None)
    at = [rate_factor(epoch / 50, epoch, **cris.schedule.model_dump()) for epoch in (0, 34, 35, 49)]
    assert at == pytest.approx([1, 1, 0.1, 0.1])
    model = models.preset_config("cris_r50")
    assert (model.spec.size, model.spec.fit, model.spec.max_tokens, model.spec.tokenizer) == (
        416,
        "letterbox",
        17,
        "clip",
    )
    assert load_config("cris_r50_refcocog_umd").data.max_tokens == 22
    assert load_config("cris_r50_refcoco_released").optimiser.multiply_from == 1 / 50
    names = {name for name, _ in models.create("cris_tiny").named_parameters()}
    assert set(cris.optimiser.multipliers) <= names


def test_recipes_differ_from_their_base_in_what_they_say() -> None:
    def flat(name: str) -> dict:
        found: dict = {}
        for part, value in load_config(name).model_dump().items():
            found |= (
                {f"{part}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {part: value}
            )
        return found

    def changes(name: str, base: str) -> dict:
        before = flat(base)
        return {key: value for key, value in flat(name).items() if before.get(key) != value}

    base = "magnet_swin_b_refcoco"
    assert changes("magnet_swin_b_refcoco_plus", base) == {"data.dataset": "refcoco+"}
    assert changes("magnet_swin_b_refcocog_umd", base) == {"data.dataset": "refcocog", "data.split_by": "umd"}
    assert changes("magnet_swin_b_refcocog_google", base) == {"data.dataset": "refcocog", "data.split_by": "google"}
    assert changes("magnet_swin_b_mixed", base) == {"data.also": ["refcoco+/unc", "refcocog/umd"]}
    base = "risam_vit_b_refcoco"
    assert changes("risam_vit_b_refcoco_plus", base) == {"data.dataset": "refcoco+"}
    assert changes("risam_vit_b_refcocog_umd", base) == {"data.dataset": "refcocog", "data.split_by": "umd"}
    assert changes("risam_vit_b_grefcoco", base).keys() == {"data.dataset", "data.mode", "task", "protocol"}
    assert changes("lavt_swin_b_refcoco_grounding", "lavt_swin_b_refcoco").keys() == {"terms.grounding"}
    assert changes("lavt_tiny_scenes", "magnet_tiny_scenes") == {"model.name": "lavt_tiny"}
    study = changes("magnet_tiny_scenes_study", "magnet_tiny_scenes_grounding")
    assert study["max_minutes"] is None and study["max_steps"] > 0  # its length replaces the base's


def test_a_base_beside_the_file_and_a_chain_of_them(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 3\noptimiser: {lr: 1.0e-3, freeze: [x.*, y.*]}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmax_steps: 7\noptimiser: {freeze: [z.*]}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\nseed: 4\n")
    config = load_config(tmp_path / "c.yaml", ["optimiser.weight_decay=0.5"])
    assert (config.epochs, config.max_steps, config.seed) == (None, 7, 4)
    assert (config.optimiser.lr, config.optimiser.freeze, config.optimiser.weight_decay) == (1e-3, ["z.*"], 0.5)
    (tmp_path / "d.yaml").write_text("base: magnet_tiny_scenes\nbatch_size: 8\n")
    assert load_config(tmp_path / "d.yaml").model_dump() == {
        **load_config("magnet_tiny_scenes").model_dump(), "batch_size": 8,
    }  # fmt: skip


def test_a_terms_options_are_laid_over_the_bases(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 3\nterms: {mask: {dice: 5}, grounding: {layers: 2, heads: 4}}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nterms: {grounding: {weight: 0.5}, alignment: {weight: 0}}\n")
    terms = load_config(tmp_path / "b.yaml", ["terms.mask.bce=1"]).terms
    assert (terms["grounding"].weight, terms["grounding"].layers, terms["grounding"].heads) == (0.5, 2, 4)
    assert (terms["mask"].bce, terms["mask"].dice, terms["alignment"].weight) == (1, 5, 0)


@pytest.mark.parametrize(
    ("base", "own", "message"),
    [
        ("epochs: 1\noptimiser: {lrr: 1}\n", "seed: 1\n", r"base\.yaml: unknown key 'optimiser.lrr'.*'optimiser.lr'"),
        ("epochs: 1\n", "sed: 1\n", r"own\.yaml: unknown key 'sed'.*'seed'"),
        ("base: own.yaml\n", "seed: 1\n", r"base\.yaml: base: own.yaml builds on this file itself"),
        ("- 1\n", "seed: 1\n", r"base\.yaml: expected a mapping"),
    ],
)
def test_mistakes_are_told_of_the_file_that_holds_them(tmp_path, base: str, own: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "own.yaml").write_text(f"base: base.yaml\n{own}")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "own.yaml")


def test_a_base_that_is_not_there(tmp_path) -> None:
    (tmp_path / "own.yaml").write_text("base: nowhere\nepochs: 1\n")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_config(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("base: [a]\nepochs: 1\n")
    with pytest.raises(ValueError, match="base: expected the name or path"):
        load_config(tmp_path / "own.yaml")


def test_mixed_data_leave_out_what_any_set_is_tested_on(tmp_path) -> None:
    """Two data sets over the same pictures with other splits, as RefCOCO and G-Ref are."""
    root = write_scenes(tmp_path / "scenes", 24, 3, level="easy", image_size=64)
    other = root / "refcocog"
    (root / "refcoco").rename(root / "keep")
    shutil.copytree(root / "keep", root / "refcoco")
    shutil.copytree(root / "keep", other)
    refs = pickle.loads((root / "keep" / "refs(unc).p").read_bytes())
    trained = sorted({ref["image_id"] for ref in refs if ref["split"] == "train"})
    moved = set(trained[:5])
    for ref in refs:
        ref["split"] = "val" if ref["image_id"] in moved else "train" if ref["split"] == "train" else "test"
    (other / "refs(unc).p").unlink()
    (other / "refs(umd).json").write_text(json.dumps(refs))

    def sets(*changes: str) -> tuple:
        config = load_config("magnet_tiny_scenes", [f"data.root={root}", *changes])
        return build_datasets(config, open_readers(config), open_tokenizer(), InputSpec(size=32))

    mixed, validation = sets("data.also=[refcocog/umd]")
    alone = sets()[0]
    images = {mixed.record(index)["image_id"] for index in range(len(mixed))}
    assert images == set(trained) - moved
    kept = sum(alone.record(index)["image_id"] not in moved for index in range(len(alone)))
    assert len(mixed) == 2 * kept  # both sets have the same sentences here
    held_out = {validation.record(index)["image_id"] for index in range(len(validation))}
    assert not held_out & images
    item, twin = mixed[3], mixed[3 + kept]
    assert (item["index"], twin["index"], mixed[-1]["index"]) == (3, 3 + kept, len(mixed) - 1)
    assert (item["image"] == twin["image"]).all()
    with pytest.raises(IndexError, match=f"has {len(mixed)}|have {len(mixed)}"):
        mixed[len(mixed)]
