"""How processes are started: torchrun, `python -m torch.distributed.launch` (by `test_run`), and an environment set in
part."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from magnet_fast import cli
from magnet_fast.training.distributed import distributed_world, take_local_rank

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("flag", [["--local-rank=0"], ["--local-rank", "0"], ["--local_rank=0"], ["--local_rank", "0"]])
@pytest.mark.parametrize("command", [["train", "--config", "magnet_tiny_scenes", "--dry-run"], ["evaluate"]])
def test_commands_take_what_the_old_launcher_adds(command: list[str], flag: list[str], tmp_path) -> None:
    done = CliRunner().invoke(cli.app, [*command, "--data", str(tmp_path / "none"), *flag])
    assert done.exit_code == 2 and str(tmp_path / "none") in done.output  # what is wrong is the data
    first = CliRunner().invoke(cli.app, [*flag, *command, "--data", str(tmp_path / "none")])
    assert first.output == done.output
    assert "local" not in CliRunner().invoke(cli.app, [command[0], "--help"]).output


def test_local_rank_becomes_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    take_local_rank(None)
    take_local_rank(0)
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(ValueError, match=r"--local-rank: 1 was given, but RANK and WORLD_SIZE are not set .* torchrun"):
        take_local_rank(1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that it is unset again at the end
    take_local_rank(1)
    assert os.environ["LOCAL_RANK"] == "0"  # torchrun's own stays
    del os.environ["LOCAL_RANK"]
    take_local_rank(1)
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"LOCAL_RANK": "0"},
            r"LOCAL_RANK: set in the environment, where RANK and WORLD_SIZE is missing; .* unset it$",
        ),
        ({"RANK": "0"}, r"RANK: set in the environment, where WORLD_SIZE is missing; start with torchrun"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, r"RANK, LOCAL_RANK: set .* unset them$"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, r"WORLD_SIZE: expected a whole number in the environment, got 'two'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_environment_set_in_part(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed_world("cpu"):
        pass
