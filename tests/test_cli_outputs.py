"""What commands write: never over what they read, told before they compute, and nothing half-written."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from magnet_fast import checkpoints, exporting, models
from magnet_fast.cli import app
from magnet_fast.data import Tokenizer
from magnet_fast.data.scenes import write_scenes
from magnet_fast.ops import _proof
from magnet_fast.training import TrainConfig, load_config
from magnet_fast.training.run import train


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that commands read: pictures, tables, a checkpoint, data. Not to be written to."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    model = models.create("magnet_tiny", input={"size": 32, "max_tokens": 16})
    models.save(model, folder / "tiny.safetensors", {"tokenizer_vocab": Tokenizer().digest()})
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(noise).save(folder / name)
    (folder / "rows.csv").write_text("image,sentence\na.png,the circle\nb.png,the square\n")
    (folder / "own.csv").write_text('image,sentence,box\na.png,the circle,"[1, 2, 30, 30]"\n')
    write_scenes(folder / "scenes", 12, 0, image_size=64)
    return folder


SMALL = [
    word
    for entry in ("data.image_size=32", "batch_size=2", "max_steps=1", "schedule.warmup=1", "data.workers=0")
    for word in ("--set", entry)
]


def command(given: Path, name: str, out: Path, *more: object) -> list[str]:
    """A command with all that it needs, as small as may be."""
    tiny = ["--checkpoint", given / "tiny.safetensors"]
    data = ["--data", given / "scenes"]
    words = {
        "segment": ["segment", given / "a.png", "the circle", *tiny],
        "batch": ["segment", "--input", given / "rows.csv", *tiny],
        "edit": ["edit", given / "a.png", "the circle", "--operation", "blur", *tiny],
        "evaluate": ["evaluate", *data, *tiny, "--limit", 2],
        "contact-sheet": ["contact-sheet", *data, *tiny, "--rows", 1],
        "merge": ["merge", *tiny],
        "export": ["export", *tiny],
        "train": ["train", "--config", "magnet_tiny_scenes", *data, *SMALL],
        "study": ["study", "ablation", *data],
        "import": ["data", "import", given / "own.csv", "--val", 0, "--test", 0],
        "scenes": ["data", "scenes", "--images", 4, "--image-size", 64],
        "retrieve": ["data", "retrieve", "--config", "tvnet_tiny_scenes", *data, "--set", "data.image_size=32"],
        "shrink": ["shrink", *tiny, "--words", 400],
        "doctor": ["doctor"],
    }
    return [str(word) for word in (*words[name], "--out", out, *more)]


FILES = {
    "segment": "m.png",
    "edit": "e.jpg",
    "evaluate": "s.json",
    "contact-sheet": "c.png",
    "merge": "w.safetensors",
    "retrieve": "r.json",
    "doctor": "d.json",
}
FOLDERS = ("batch", "export", "train", "study", "import", "scenes", "shrink")


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.output.startswith("error: ") and result.output.count("\n") == 1, result.output
    return result.output


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded, a run that begins or a kernel that is checked fails."""
    for name in (
        "magnet_fast.checkpoints.load",
        "magnet_fast.training.train",
        "magnet_fast.training.study.run_study",
        "magnet_fast.training.building.build_model",
        "magnet_fast.ops._proof.check",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something was computed"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_that_writes_is_here() -> None:
    group = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["data"].commands}
    writing = {name for name, one in commands.items() if any(option.name == "out" for option in one.params)}
    assert writing == {*FILES, *FOLDERS} - {"batch"}


def linked(path: Path, link: str, folder: Path) -> Path:
    """The file under another name."""
    other = folder / f"other{path.suffix}"
    if link == "hard":
        os.link(path, other)
    elif link == "symbolic":
        os.symlink(path, other)
    else:
        return path.parent / ".." / path.parent.name / path.name
    return other


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("link", ["hard", "symbolic", "none"])
@pytest.mark.parametrize(
    ("name", "source", "more", "told"),
    [
        ("segment", "a.png", [], "--out: {} is what IMAGE names, and would be overwritten"),
        ("segment", "b.png", ["--tokenizer", "FOLDER"], "--out: {} is what --tokenizer names"),  # a file in it
        ("edit", "a.png", [], "--out: {} is what IMAGE names"),
        ("edit", "b.png", ["--operation", "background=FOLDER/b.png"], "--out: {} is what --operation names"),
        (
            "contact-sheet",
            "weights.png",
            ["--checkpoint", "FOLDER/weights.png"],
            "--out: {} is what --checkpoint names",
        ),
        ("evaluate", "tiny.safetensors", [], "--out: {} is what --checkpoint names"),
        ("merge", "tiny.safetensors", [], "--out: {} is what --checkpoint names"),
    ],
)
def test_no_command_writes_over_what_it_reads(
    link: str, name: str, source: str, more: list[str], told: str, given: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in given.glob("*.*"):
        shutil.copy(file, copy)
    shutil.copy(copy / "tiny.safetensors", copy / "weights.png")  # whatever it is called
    before = contents(copy)
    out = linked(copy / source, link, tmp_path)
    said = refused(*command(copy, name, out, *(word.replace("FOLDER", str(copy)) for word in more)))
    assert told.format(out) in said
    assert contents(copy) == before


@pytest.mark.usefixtures("nothing_computed")
def test_two_outputs_are_two_files(given: Path, tmp_path: Path) -> None:
    os.symlink(tmp_path / "m.png", tmp_path / "link.png")
    said = refused(*command(given, "segment", tmp_path / "m.png", "--overlay", tmp_path / "link.png"))
    assert "--out and --overlay: " in said and "is named twice" in said
    said = refused(*command(given, "segment", tmp_path / "m.png", "--overlay", given / "a.png"))
    assert "--overlay: " in said and "is what IMAGE names" in said


@pytest.mark.usefixtures("nothing_computed")
def test_a_batch_reads_nothing_that_it_writes(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    shutil.copy(given / "a.png", out / "masks")
    for name in ("errors.csv", "results.jsonl"):
        (out / name).write_text(
            '{"image": "masks/a.png", "sentence": "x"}' if name[0] == "r" else "image,sentence\na,x"
        )
        batch = ["segment", "--input", out / name, "--out", out, "--resume"]
        assert f"{out / name} is what --input names" in refused(*batch)
    (tmp_path / "rows.csv").write_text("image,sentence\nout/masks/a.png,the circle\n")
    said = refused("segment", "--input", tmp_path / "rows.csv", "--out", out, "--resume")
    assert "lie in " in said and "where masks are written; name another folder" in said


def test_files_of_the_data_are_not_written_over(given: Path, tmp_path: Path) -> None:
    data = shutil.copytree(given / "scenes", tmp_path / "data")
    picture = sorted(data.rglob("*.jpg"))
    annotations = next(data.rglob("instances.json"))
    before = contents(data)
    tiny = ["--checkpoint", given / "tiny.safetensors", "--data", data, "--split", "train"]
    for words in (["evaluate", "--out", annotations], *(["contact-sheet", "--out", one] for one in picture[:1])):
        if words[0] == "contact-sheet":
            words[2] = next(one for one in picture if one.name in annotations_of(data, "train"))
        assert "among the files of the data; name another file" in refused(*words, *tiny)
    assert contents(data) == before


def annotations_of(data: Path, split: str) -> set[str]:
    """Names of a split's pictures."""
    from magnet_fast.data.datasets import open_reader

    reader = open_reader(data, "refcoco")
    return {reader.image_path(ref.image_id).name for ref in reader.refs(split)}


def test_a_run_does_not_delete_the_weights_it_starts_from(given: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("best.safetensors", "config.yaml"):
        shutil.copy(given / "tiny.safetensors", run / name)
    os.symlink(run / "best.safetensors", tmp_path / "start.safetensors")
    config = load_config("magnet_tiny_scenes", [f"data.root={given / 'scenes'}", "device=cpu"])
    for start in (run / "best.safetensors", tmp_path / "start.safetensors"):
        own = TrainConfig.model_validate(config.model_dump() | {"model": {"weights": str(start)}})
        with pytest.raises(ValueError, match="the run starts from this file, and --overwrite would delete it"):
            train(own, run, overwrite=True)
    assert sorted(contents(run)) == ["best.safetensors", "config.yaml"]


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_where_nothing_can_be_written_is_told_first(name: str, given: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    last = FILES.get(name, "new")
    for below in ("file", "file/deeper"):
        assert f"--out: {tmp_path / 'file'} is no folder" in refused(*command(given, name, tmp_path / below / last))
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    assert "is no folder" in refused(*command(given, name, tmp_path / "dangling" / last))
    if name in FILES:
        (tmp_path / "folders" / last).mkdir(parents=True)
        assert "is a folder; expected the name of a file" in refused(*command(given, name, tmp_path / "folders" / last))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    said = refused(*command(given, name, tmp_path / "a" / "b" / last))
    assert f"--out: the folder {tmp_path} may not be written to" in said
    assert sorted(one.name for one in tmp_path.iterdir() if one.name != "folders") == ["dangling", "file"]


@contextmanager
def small_files(size: int = 20) -> Iterator[None]:
    """No file may become larger: to every writer, in any language, the same as a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", [*FILES, "batch", "import", "scenes", "shrink", "train"])
def test_a_full_disk_leaves_nothing_half_written(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_proof, "OPERATORS", ())  # seconds each
    out = tmp_path / "new" / FILES.get(name, "folder")
    with small_files():
        result = CliRunner().invoke(app, command(given, name, out))
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert f"error: {out}" in result.output and "Traceback" not in result.output
    # Of a batch what is done stays: here nothing.
    assert {key for key, value in contents(tmp_path).items() if value or name != "batch"} == set()


class Three(torch.nn.Module):
    """A graph with the inputs of an export, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(image) * (ids * mask)


@pytest.mark.parametrize(
    "format", ["torch", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_a_full_disk_leaves_no_export(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = checkpoints.load()
    inputs = torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.bool)
    program = torch.export.export(Three(), inputs)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: program)  # seconds
    with small_files(), pytest.raises(OSError, match=f"{tmp_path / 'new'}"):
        exporting.export(loaded.model.eval(), loaded.tokenizer(), tmp_path / "new", format)
    assert list(tmp_path.iterdir()) == []


def test_what_pillow_notes_of_a_picture_is_no_second_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "odd.tif"
    Image.new("RGB", (4, 4)).save(picture)
    content = bytearray(picture.read_bytes())
    content[content.index(b"\x15\x01\x03\x00\x01\x00\x00\x00") + 8] = 8  # samples a pixel
    picture.write_bytes(content)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as outside of pytest
    assert f"image {picture} cannot be read" in refused("segment", picture, "the circle", "--out", tmp_path / "m.png")


def test_a_missing_package_is_one_line(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporting.FORMATS, "onnx", (("a_package_that_is_not_there",), lambda *_: None))
    assert "pip install 'magnet_fast[export]'" in refused(*command(given, "export", tmp_path / "x"))
