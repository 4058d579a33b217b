"""The side of the square that images are brought to is bounded wherever it can be given, before anything is loaded."""

from __future__ import annotations

import pytest
import typer

from magnet_fast import Segmenter, checkpoints, models
from magnet_fast.cli import app
from magnet_fast.models.contract import MAX_INPUT_SIDE
from magnet_fast.training import load_config


def test_every_command_line_option_has_the_bound() -> None:
    group = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["data"].commands}
    options = {
        name: option for name, command in commands.items() for option in command.params if option.name == "image_size"
    }
    assert {"segment", "edit", "evaluate", "export", "contact-sheet", "scenes"} <= options.keys()
    assert {getattr(option, "type", option).max for option in options.values()} == {MAX_INPUT_SIDE}


@pytest.mark.parametrize("size", [7, MAX_INPUT_SIDE + 1, 100_000, True, 48.0])
def test_a_segmenter_refuses_it_before_the_file_is_opened(size: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"image_size is {size}; expected"):
        Segmenter.from_checkpoint("none.safetensors", image_size=size)
    with pytest.raises(FileNotFoundError):
        Segmenter.from_checkpoint("none.safetensors", image_size=MAX_INPUT_SIDE)


def test_configurations_refuse_it() -> None:
    with pytest.raises(ValueError, match="image_size.*4096"):
        load_config("magnet_tiny_scenes", ["data.image_size=100000"])
    with pytest.raises(ValueError, match="size.*4096"):
        models.create("magnet_tiny", input={"size": 100_000})
    with pytest.raises(ValueError, match="image_size.*4096"):
        models.create("risam_tiny", image={"image_size": 160_000})


def test_a_loaded_model_refuses_it() -> None:
    """So an export, an evaluation and the page cannot meet it."""
    model = checkpoints.load().model
    with pytest.raises(ValueError, match="size\n.*4096"):
        model.spec = model.spec._replace(size=100_000)
