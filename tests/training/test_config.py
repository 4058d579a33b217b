"""Configurations: defaults, files, overrides, and errors that name the key."""

from __future__ import annotations

import pytest

from magnet_fast import models
from magnet_fast.training.config import dump_config, find_config, load_config, parse_config, shipped_configs


def test_file_overrides_and_round_trip(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: lavt_tiny}\nepochs: 3\noptimiser: {lr: 1.0e-3}\n")
    config = load_config(path, ["optimiser.lr=2e-4", "data.cache=true", "model.overrides.dropout=0.1"])
    assert (config.model.name, config.epochs, config.optimiser.lr) == ("lavt_tiny", 3, 2e-4)
    assert config.data.cache is True
    assert config.model.overrides == {"dropout": 0.1}
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_a_length_on_the_command_line_replaces_the_files(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_minutes: 5\n")
    config = load_config(path, ["max_steps=7"])
    assert (config.max_steps, config.max_minutes) == (7, None)


@pytest.mark.parametrize(
    ("override", "path", "nearest"),
    [
        ("optimiser.lrr=1", "optimiser.lrr", "optimiser.lr"),
        ("optimizer.lr=1", "optimizer", "optimiser"),
        ("data.imagesize=64", "data.imagesize", "data.image_size"),
        ("batchsize=4", "batchsize", "batch_size"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(override: str, path: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{path}'; the nearest known one is '{nearest}'"):
        load_config(None, ["epochs=1", override])


def test_unknown_key_in_a_file_names_the_file(tmp_path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("epochs: 1\nschedule: {warm_up: 3}\n")
    with pytest.raises(ValueError, match=r"typo\.yaml: unknown key 'schedule.warm_up'.*'schedule.warmup'"):
        load_config(path)


def test_unknown_key_of_an_option_names_the_option(tmp_path) -> None:
    path = tmp_path / "right.yaml"
    path.write_text("epochs: 1\n")
    with pytest.raises(ValueError, match=r"right\.yaml, --set seeed=3: unknown key 'seeed'.*'seed'"):
        load_config(path, ["seeed=3"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of epochs, max_steps, max_minutes"),
        ({"epochs": 1, "max_steps": 2}, "found epochs and max_steps"),
        ({"epochs": 1, "batch_size": 10, "accumulation": 3}, "batch_size=10 is not a multiple of accumulation=3"),
        ({"epochs": 0}, "epochs: .*greater than 0, got 0"),
        ({"epochs": 1, "optimiser": {"lr": "fast"}}, r"optimiser\.lr: .*got 'fast'"),
        ({"epochs": 1, "optimiser": {"lr": float("nan")}}, r"optimiser\.lr: .*finite"),
        ({"epochs": 1, "task": "multiple"}, "task: expected one of single, .*got 'multiple'"),
        ({"epochs": 1, "protocol": "mine"}, "protocol: expected one of family"),
        ({"epochs": 1, "best_metric": "gIoU"}, "best_metric: expected a score of task 'single' .oIoU, mIoU.*'gIoU'"),
        ({"epochs": 1, "precision": "fp8"}, "precision: "),
        ({"epochs": 1, "validate_every": "2 weeks"}, "validate_every: expected '<n> epochs'"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(values)


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "mapping of sections"), ("a: [", "not a YAML file")])
def test_files_that_are_no_configuration(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["optimiser.lr", "=3", "epochs.a=3", "seed=[1"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(ValueError, match="--set") as caught:
        load_config(None, ["epochs=1", override])
    assert "\n" not in str(caught.value)


def test_the_task_says_which_score_is_best() -> None:
    def best(**values: str) -> str:
        return parse_config({"epochs": 1, **values}).best

    assert [best(), best(task="generalized"), best(best_metric="mIoU")] == ["oIoU", "gIoU", "mIoU"]
    assert best(task="robust", best_metric="mRR") == "mRR"


def test_intervals() -> None:
    def interval(value: object) -> int | None:
        return parse_config({"epochs": 1, "validate_every": value}).interval(10)

    assert [interval(value) for value in (2, "1 epoch", "7 steps", "never")] == [20, 10, 7, None]


def test_shipped_configurations_load_and_name_known_models() -> None:
    assert {"magnet_tiny_scenes", "magnet_tiny_scenes_hard", "magnet_swin_b_refcoco", "lavt_swin_b_refcoco"} <= set(
        shipped_configs()
    )
    for name in shipped_configs():
        assert load_config(name).model.name in models.list_models()


def test_a_missing_configuration_lists_the_shipped_ones(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="magnet_tiny_scenes"):
        find_config("magnet_tiny_scene")
    with pytest.raises(FileNotFoundError):
        find_config(tmp_path / "magnet_tiny_scenes.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2001-99-99",
        "seed: !!timestamp x",
        "seed: 0x_",
        "seed: !!float x",
        "a: " + "[" * 3000,
        "a: &a [*a]",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in ("ab", "bc", "cd", "de", "ef")),
    ],
)
def test_values_that_yaml_cannot_read_name_the_file(tmp_path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml: not a YAML file"):
        load_config(path)


@pytest.mark.parametrize("base", ["missing", "a/" * 3000, ".", "''"])
def test_a_base_that_does_not_exist_names_the_file(tmp_path, base: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {base}")
    with pytest.raises(FileNotFoundError, match=r"run\.yaml: base: expected a configuration that exists, got"):
        load_config(path)
