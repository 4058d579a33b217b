"""What a file's metadata ask for is built only where it is of the size of the file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from magnet_fast import checkpoints, models
from magnet_fast.models.bounded import build_for
from magnet_fast.models.registry import list_models, preset_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    models.save(models.create("lavt_tiny", image__depths=(1, 1, 1, 1), text__num_layers=1), path)
    return path


def with_metadata(whole: Path, path: Path, **changed: str | None) -> Path:
    with safe_open(whole, framework="pt") as file:
        metadata = {**file.metadata(), **changed}
        save_file(
            {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            path,
            {key: value for key, value in metadata.items() if value is not None},
        )
    return path


def changed_config(whole: Path, part: str, **settings: Any) -> str:
    with safe_open(whole, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    config[part] |= settings
    return json.dumps(config)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("text", {"vocab_size": 10**9}),
        ("text", {"num_layers": 10**9}),
        ("text", {"hidden_size": 64 * 10**4, "intermediate_size": 10**9}),
        ("image", {"depths": [1, 1, 10**8, 1]}),
        ("image", {"depths": [600, 1, 1, 1]}),  # of few numbers: a hundred thousand of them take minutes
    ],
)
def test_a_model_far_larger_than_its_file_is_not_built(
    whole: Path, tmp_path: Path, part: str, settings: dict[str, Any]
) -> None:
    path = with_metadata(whole, tmp_path / "other.safetensors", config=changed_config(whole, part, **settings))
    of_what = "tensors" if settings.get("depths", [0])[0] == 600 else ""
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"other\.safetensors'?: its configuration asks for .* over \d+ {of_what}"
        ):
            checkpoints.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26  # nor a list of something for each layer
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": "{"}, "'config' in its metadata is no JSON"),
        ({"config": "[" * 100_000}, "'config' in its metadata is no JSON"),
        ({"config": "[1]"}, "'config' in its metadata is a list, expected a dictionary in JSON"),
        ({"config": '{"image": {}}'}, "its configuration is no model's"),
        ({"config": '{"image": {}, "architecture": "lavt", "fusion": 3}'}, "fusion"),
        ({"bases": '{"image": 3}'}, "expected bases of 'image' or 'text' with sha256, source, tensors, got 'image', 3"),
        ({"bases": '{"x": {"source": "a", "tensors": 1, "sha256": "b"}}'}, "expected bases of 'image' or 'text'"),
        ({"bases": "[]"}, "'bases' in its metadata is a list"),
        ({"format": "magnet_fast.training/3"}, "its state lacks the model's configuration or metadata"),
        (
            {"format": "magnet_fast.training/3", "state": '{"model_config": {}, "metadata": {"a": 1}}'},
            "that are no text",
        ),
    ],
)
def test_metadata_of_another_form_are_named(whole: Path, tmp_path: Path, changed: dict[str, str], message: str) -> None:
    path = with_metadata(whole, tmp_path / "other.safetensors", **changed)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.load(path)
    assert "other.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_every_system_is_built_for_its_own_weights(name: str) -> None:
    config = preset_config(name)
    state = {key: torch.empty(0) for key in ("a",)}  # the slack is enough for a tiny one
    assert build_for(config.model_dump(), state, "it").config == config


def test_threads_do_not_count_each_others_models(whole: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(checkpoints.load, [whole] * 8))
    assert len({one.model.config.model_dump_json() for one in found}) == 1
