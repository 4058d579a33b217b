"""Weights load from whatever they were wrapped in, or what is in the way is named."""

from __future__ import annotations

import logging
import re
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from magnet_fast import checkpoints, models
from magnet_fast.models.encoders.bert import BertConfig
from magnet_fast.models.encoders.swin import SwinConfig
from magnet_fast.models.released import dropped_names
from magnet_fast.models.state import load_strictly
from magnet_fast.models.wrapping import plain_name, unwrap, without_shared_prefix
from magnet_fast.training.building import build_model
from magnet_fast.training.config import TrainConfig
from tests.golden.parameters import released_checkpoint

State = dict[str, Tensor]
A, B = ({"body.weight": torch.full((2,), value), "head.bias": torch.full((1,), value)} for value in (1.0, 2.0))
MOMENTS = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


WRAPPED = {
    "flat": A,
    "model": {"model": A, "optimizer": MOMENTS, "epoch": 3},
    "state_dict": {"state_dict": A, "optimizer_states": [MOMENTS]},
    "model_state_dict": {"model_state_dict": A, "optimizer_state_dict": MOMENTS},
    "one in another": {"checkpoint": {"state_dict": {"model": A}, "optimizer": MOMENTS}},
    "beside tensors": {"model": A, "best": torch.tensor(0.5)},
    "under a name of its own": {"segmenter": A, "optimizer": MOMENTS, "lr_scheduler": {"t": torch.zeros(1)}},
    "before averaged ones": {"model_ema": B, "ema": {"module": B}, "state_dict": A},
    "arguments that are called model": {"model": "lavt_one", "state_dict": A},
    "in parts": {"body": {"weight": A["body.weight"]}, "head": {"bias": A["head.bias"]}, "optimizer": MOMENTS},
    "parameters": {"model": {name: nn.Parameter(value) for name, value in A.items()}},
    "AveragedModel of swa_utils": {"n_averaged": torch.tensor(3), **prefixed(A, "module.")},
    "extra state": {"model": {**A, "head._extra_state": None, "version": 2}},
    **{
        f"prefix {prefix}": {"model": prefixed(A, prefix)}
        for prefix in (
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "_orig_mod.module.module.",
            "_fsdp_wrapped_module.",
        )
    },
    "inner prefixes": {"body._orig_mod.weight": A["body.weight"], "head.module._orig_mod.bias": A["head.bias"]},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found(how: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = unwrap(WRAPPED[how], "the file")
    assert found.keys() == A.keys() and all(torch.equal(found[name], A[name]) for name in A)


@pytest.mark.parametrize("contents", [{"ema": {"decay": 0.9, "shadow": A}}, {"model_ema": A, "model": "a", "epoch": 1}])
def test_averaged_weights_alone_are_taken_and_said(contents: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"the file holds averaged weights alone \('.*ema.*'\): they are taken"):
        assert unwrap(contents, "the file").keys() == A.keys()


def test_two_weights_of_one_name_are_named() -> None:
    with pytest.raises(ValueError, match="the file holds 'body.weight' twice, once as 'module.body.weight'"):
        unwrap({**A, **prefixed(A, "module.")}, "the file")


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"model": {b"a.weight": torch.ones(2)}}, "holds a tensor under 'model' whose name is of type bytes"),
        ({"model": {0: torch.ones(2)}}, "holds a tensor under 'model' whose name is of type int; expected names as"),
        ({"a.weight": torch.ones(2).to_sparse()}, "holds 'a.weight' as a sparse tensor; save it dense"),
    ],
)
def test_tensors_that_are_no_weights_as_they_are(contents: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"the file {said}")):
        unwrap(contents, "the file")


def test_dictionaries_in_each_other_end() -> None:
    """One that holds itself, and many that share what they hold."""
    ring: dict[str, Any] = {"epoch": 1}
    ring["again"] = ring
    deep: dict[str, Any] = {"x": 1}
    for _ in range(40):
        deep = {"a": deep, "b": deep}
    for contents in (ring, deep):
        with pytest.raises(ValueError, match="holds no weights"):
            unwrap(contents, "the file")


def test_names() -> None:
    assert plain_name("module.a._orig_mod.module.b.weight") == "a.b.weight"
    assert plain_name("submodule.modules.weight") == "submodule.modules.weight"
    assert without_shared_prefix(prefixed(A, "net.model.")).keys() == A.keys()
    assert without_shared_prefix(A).keys() == A.keys()
    one = {"layer.weight": A["body.weight"], "layer.bias": A["head.bias"]}
    assert without_shared_prefix(one).keys() == one.keys()


def test_differences_are_named_with_their_likely_reason() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({**state, "head.weight": torch.zeros(1)}, r"1 unexpected \(head.weight\)$"),
        ({k: v for k, v in state.items() if k != "0.bias"}, r"1 missing \(0.bias\)$"),
        ({**state, "0.weight": torch.zeros(3, 4)}, r"1 of another shape \(0.weight: \(3, 4\), .*of another size$"),
        ({**state, "0.weight": torch.zeros(3, 2, dtype=torch.int8)}, r"1 of another kind .*torch.int8; quantised\?\)$"),
        (
            {f"x{i}.y": torch.zeros(1) for i in range(9)},
            r"6 missing .* and 3 more\); 9 unexpected \(x0.y, .* and 6 more\)",
        ),
        ({**prefixed(state, "a.b."), "c": torch.zeros(1)}, r"begin with 'a.b.', take that off$"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            load_strictly(model, wrong, "the file")


def test_what_follows_from_sizes_may_be_absent_or_too_many() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {name: value + 1 for name, value in model.state_dict().items() if "num_batches" not in name}
    extra = {f"0.{name}": torch.zeros(3) for name in ("attn_mask", "relative_position_index", "position_ids")}
    load_strictly(model, {**state, **extra}, "the file")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    # Compiled and wrapped, the model's own names have prefixes.
    for prefix in ("module", "_orig_mod"):
        wrapped = nn.Sequential(OrderedDict([(prefix, model)]))
        load_strictly(wrapped, {name: value + 1 for name, value in state.items()}, "the file")
        assert all(torch.equal(model.state_dict()[name], value + 1) for name, value in state.items())


# ---- whole models ----


@pytest.fixture(scope="module")
def lavt() -> dict[str, State]:
    return released_checkpoint("lavt")


@pytest.fixture(scope="module")
def expected(lavt: dict[str, State]) -> State:
    return models.from_released(lavt).state_dict()


def in_one(lavt: dict[str, State]) -> State:
    """BERT within the model and without its pooler: what LAVT's authors call lavt_one."""
    bert = {name: value for name, value in lavt["bert_model"].items() if not name.startswith("pooler.")}
    return {**lavt["model"], **prefixed(bert, "text_encoder.")}


RELEASED: dict[str, Callable[[dict[str, State]], dict[str, Any]]] = {
    "in one": lambda lavt: {"model": in_one(lavt), "args": Namespace(model="lavt_one")},
    "Lightning's, compiled": lambda lavt: {"state_dict": prefixed(in_one(lavt), "model._orig_mod.")},
    "each with its prefix": lambda lavt: {
        "model": prefixed(lavt["model"], "module.model."),
        "bert_model": prefixed(lavt["bert_model"], "module.bert."),
    },
    "compiled blocks": lambda lavt: {
        "model": {name.replace(".blocks.", ".blocks._orig_mod."): value for name, value in in_one(lavt).items()}
    },
    "the model's prefix alone": lambda lavt: {
        **prefixed(lavt["model"], "net."),
        **prefixed(lavt["bert_model"], "bert_model."),
    },
    "buffers of other versions": lambda lavt: {
        **in_one(lavt),
        "backbone.layers.0.attn_mask": torch.zeros(1),
        "text_encoder.embeddings.token_type_ids": torch.zeros(1, 3, dtype=torch.long),
    },
}


@pytest.mark.parametrize("how", RELEASED)
def test_released_weights_in_other_wrappings(lavt: dict[str, State], expected: State, how: str) -> None:
    found = models.from_released(RELEASED[how](lavt)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_released_safetensors_in_half_precision(lavt: dict[str, State], expected: State, tmp_path: Path) -> None:
    flat = {**lavt["model"], **prefixed(lavt["bert_model"], "bert_model.")}
    flat = {name: value.bfloat16() if value.is_floating_point() else value for name, value in flat.items()}
    save_file(flat, tmp_path / "lavt.pth")
    found = checkpoints.load(tmp_path / "lavt.pth")
    assert found.vocabulary is None
    for name, value in found.model.state_dict().items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name].to(flat["classifier.conv1_1.bias"].dtype).to(value.dtype))


def test_what_is_left_out_of_a_released_file_is_logged(lavt: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "magnet_fast"):
        models.from_released(lavt)
    told, named = (record.getMessage() for record in caplog.records)
    assert f"left out {len(dropped_names(lavt))} of {len(lavt['model']) + len(lavt['bert_model'])} entries" in told
    assert all(name in named for name in dropped_names(lavt)) and "backbone.layers.3.res_gate" in named


def test_what_a_released_file_lacks_is_named_with_the_file(lavt: dict[str, State], tmp_path: Path) -> None:
    state = {name: value for name, value in in_one(lavt).items() if name != "backbone.patch_embed.proj.weight"}
    torch.save({"model": state}, tmp_path / "half.bin")
    with pytest.raises(ValueError, match=r"half\.bin' lacks 'backbone\.patch_embed\.proj\.weight', which the released"):
        checkpoints.load(tmp_path / "half.bin")


def test_blocks_that_a_file_counts_but_lacks(lavt: dict[str, State]) -> None:
    """A name with a large number does not make a model of that many blocks."""
    with pytest.raises(ValueError, match=r"1 unexpected \(image_encoder.stages.0.blocks.999999999.norm1.weight\)"):
        models.from_released({**in_one(lavt), "backbone.layers.0.blocks.999999999.norm1.weight": torch.zeros(32)})


def test_own_files(tmp_path: Path) -> None:
    model = models.create("lavt_tiny")
    models.save(torch.compile(model), tmp_path / "compiled.safetensors")
    assert models.load(tmp_path / "compiled.safetensors").state_dict().keys() == model.state_dict().keys()

    wrapped = {name.replace("image_encoder.", "image_encoder.module."): x for name, x in model.state_dict().items()}
    metadata = {"format": "magnet_fast.model/2", "config": model.config.model_dump_json()}
    save_file(prefixed(wrapped, "_orig_mod."), tmp_path / "wrapped.bin", metadata)
    found = checkpoints.load(tmp_path / "wrapped.bin").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())

    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own.pth' holds weights of a model of this package without its conf"):
        checkpoints.load(tmp_path / "own.pth")


def test_each_reader_names_the_other(lavt: dict[str, State], tmp_path: Path) -> None:
    models.save(models.create("lavt_tiny"), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"own.safetensors' was written by magnet_fast: checkpoints.load reads it"):
        models.from_released(tmp_path / "own.safetensors")
    torch.save(lavt, tmp_path / "released.pth")
    with pytest.raises(ValueError, match=r"released.pth' was not written by magnet_fast.*models.from_released reads"):
        models.load(tmp_path / "released.pth")


@pytest.fixture(scope="module")
def best(lavt: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("released") / "model_best.pth"
    torch.save({**lavt, "args": Namespace(lr=1.0)}, path)
    return str(path)


@pytest.fixture(scope="module")
def config(lavt: dict[str, State]) -> dict[str, Any]:
    return models.from_released(lavt).config.model_dump(exclude={"architecture", "input"})


def start(weights: str | Path, overrides: dict[str, Any]) -> nn.Module:
    section = {"name": "lavt_tiny", "weights": str(weights), "overrides": overrides}
    return build_model(TrainConfig(model=section, max_steps=1))


def test_training_starts_from_released_weights(
    best: str, config: dict[str, Any], expected: State, tmp_path: Path
) -> None:
    """And from weights that were saved without their vocabulary."""
    model = start(best, config)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    models.save(model, tmp_path / "own.safetensors")
    again = start(tmp_path / "own.safetensors", config).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


def test_training_names_what_differs(best: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        start(best, {})
    message = str(caught.value)
    assert "is no lavt_tiny: image.embed_dim: file 32, here 16; image.window_size: file 7, here 8" in message
    assert len(message) < 500 and "SwinConfig" not in message
    with pytest.raises(ValueError) as caught:
        start(best, {**config, "fusion": {**config["fusion"], "heads": 2}})
    assert "model_best.pth is another lavt_tiny: fusion.heads: file 1, here 2" in str(caught.value)
    assert "--set model.overrides.fusion.heads=1" in str(caught.value)


def test_weights_of_another_system_are_no_matter_of_overrides(tmp_path: Path) -> None:
    models.save(models.create("lavt_tiny"), tmp_path / "lavt.safetensors")
    section = {"name": "magnet_tiny", "weights": str(tmp_path / "lavt.safetensors")}
    with pytest.raises(ValueError, match="is no magnet_tiny: architecture: file 'lavt', here 'magnet'") as caught:
        build_model(TrainConfig(model=section, max_steps=1))
    assert "choose the model.name" in str(caught.value) and "--set" not in str(caught.value)


def test_pretrained_encoders_in_other_wrappings(lavt: dict[str, State], tmp_path: Path) -> None:
    """Swin out of a detector's file, BERT out of a language model's, and a folder that holds neither."""
    released = {name.removeprefix("backbone."): x for name, x in lavt["model"].items() if name.startswith("backbone.")}
    swin = {
        name: x for name, x in released.items() if "fusion" not in name and "gate" not in name and name[:4] != "norm"
    }
    torch.save(
        {"state_dict": {**prefixed(swin, "module.backbone."), "module.neck.x": torch.ones(1)}}, tmp_path / "swin"
    )
    encoder = SwinConfig(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7).build()
    encoder.load_pretrained(str(tmp_path / "swin"))
    assert torch.equal(encoder.patch_embed.proj.weight, swin["patch_embed.proj.weight"])

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_layers": 4, "num_heads": 2, "intermediate_size": 32}
    bert = BertConfig(**sizes, max_positions=16).build()
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x + 1
        for name, x in bert.bert.state_dict().items()
    }
    save_file({**prefixed(state, "bert."), "cls.predictions.bias": torch.ones(40)}, tmp_path / "bert")
    before = bert.word_embedding.detach().clone()
    bert.load_pretrained(str(tmp_path / "bert"))
    assert torch.equal(bert.word_embedding, before + 1)

    transformers.BertModel(bert.bert.config).save_pretrained(tmp_path / "folder")
    save_file(prefixed(state, "module."), tmp_path / "folder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"text weights '.*folder' lack \d+ of the encoder's \(embeddings"):
        bert.load_pretrained(str(tmp_path / "folder"))


@pytest.mark.parametrize("entry", [torch.ones(1), 1])
def test_one_part_under_very_many_names_is_refused(entry: Any) -> None:
    """A file of a few megabytes; written out it would have ten billion weights."""
    part = {f"w{number}": entry for number in range(2_000)}
    content = {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}, **{f"p{number}": part for number in range(2_000)}}
    with pytest.raises(ValueError, match="file holds parts of over 1000000 entries"):
        unwrap(content, "file")
