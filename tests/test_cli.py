"""The command line: every command once, and errors as one clean line with exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from magnet_fast import checkpoints, cli, fast, models
from magnet_fast.cli import app
from magnet_fast.ops import _kept, _linear, _proof, _registry, _trial
from magnet_fast.ops._training_products import Products

pytestmark = pytest.mark.slow

SMALL = [
    "data.image_size=32",
    "batch_size=4",
    "log_every=2",
    "schedule.warmup=1",
    "eval_batch_size=8",
    "data.workers=0",
]


def run(*arguments: object, status: int = 0) -> str:
    """Run a command; its output and errors."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def refused(*arguments: object) -> str:
    """Run a command that must fail cleanly; its message."""
    output = run(*arguments, status=2)
    assert output.startswith("error: ") and "Traceback" not in output
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "easy"
    output = run("data", "scenes", "--out", root, "--images", 24, "--seed", 1, "--image-size", 64)
    assert str(root) in output
    return root


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "demo"
    settings = [argument for setting in SMALL for argument in ("--set", setting)]
    output = run(
        "train", "--config", "magnet_tiny_scenes", "--data", root, "--out", out, *settings, "--set", "max_steps=3"
    )
    assert "images/s" in output and "oIoU" in output and "mIoU" in output
    return out


@pytest.fixture(scope="module")
def picture(root) -> Path:
    return sorted(root.rglob("*.jpg"))[0]


def test_help_is_quick_to_import() -> None:
    """Help loads neither torch nor transformers."""
    code = "import sys, magnet_fast.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    output = run("--help")
    for command in (
        "train",
        "evaluate",
        "segment",
        "edit",
        "contact-sheet",
        "merge",
        "push",
        "export",
        "info",
        "data",
        "app",
    ):
        assert command in output


@pytest.mark.parametrize(
    ("given", "loaded", "cores", "expected"),
    [
        ({}, [], 64, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, [], 64, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "9"}, [], 64, {"GOMP_SPINCOUNT": "9"}),
        ({}, [], 2, {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}),
        ({"OMP_NUM_THREADS": "5"}, [], 2, {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "5"}),
        ({}, ["torch"], 2, {}),
    ],
)
def test_threads_wait_asleep_and_are_as_many_as_the_container_allows_unless_told_otherwise(
    given, loaded, cores, expected, monkeypatch
) -> None:
    monkeypatch.setattr(cli, "sys", SimpleNamespace(modules=dict.fromkeys(loaded)))
    monkeypatch.setattr(cli, "os", SimpleNamespace(environ=dict(given), cpu_count=lambda: 64))
    monkeypatch.setattr(cli, "allowed_cores", lambda: cores)
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(dict(cli.os.environ)))
    cli.main()
    assert seen == [expected]


def test_python_dash_m(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-m", "magnet_fast", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--resume" in done.stdout
    command = [sys.executable, "-m", "magnet_fast", "segment", str(tmp_path / "none.png"), "a", "--out", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "none.png" in done.stderr
    assert not (tmp_path / "x.png").exists()


def test_evaluate(root, trained, tmp_path) -> None:
    out = tmp_path / "new" / "metrics.json"
    output = run("evaluate", "--checkpoint", trained / "best.safetensors", "--data", root, "--out", out)
    scores = json.loads(out.read_text())
    for name in ("oIoU", "mIoU", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9"):
        assert name in output
        assert 0 <= scores[name] <= 100
    assert f"{scores['sentences']} sentences" in output
    assert "input resolution 32x32" in " ".join(output.split())
    assert scores["resolution"] == "input" and scores["image_size"] == 32
    assert {"attribute", "place"} <= set(scores["by_kind"])

    # All kinds of our checkpoints, at the pictures' own size, and the control.
    original = ["--resolution", "original", "--batch-size", 3, "--limit", 5, "--out", out]
    whole_run = trained / "checkpoint.safetensors"
    assert "original resolution" in run("evaluate", "--checkpoint", whole_run, "--data", root, *original)
    assert json.loads(out.read_text())["sentences"] == 5
    shuffled = ["--shuffle-expressions", "--split", "train", "--limit", 20, "--out", out, "--backend", "reference"]
    output = run("evaluate", "--checkpoint", trained / "last.safetensors", "--data", root, *shuffled)
    assert "shuffled" in output
    assert json.loads(out.read_text())["expressions"].startswith("shuffled")


def test_models_are_accelerated_and_packed_for_many_images(root, trained, picture, tmp_path, monkeypatch) -> None:
    calls, accelerate = [], fast.accelerate

    def noted(model, *, pack=False, weights="same"):
        calls.append((pack, weights))
        return accelerate(model, pack=pack, weights=weights)

    monkeypatch.setattr("magnet_fast.inference.accelerate", noted)
    checkpoint = ["--checkpoint", trained / "best.safetensors", "--device", "cpu"]
    run("segment", picture, "circle", *checkpoint, "--out", tmp_path / "mask.png")
    assert calls == [(False, "same")]
    run("evaluate", *checkpoint, "--data", root, "--limit", 2)
    assert calls[1] == (True, "same")
    calls.clear()
    run("segment", picture, "circle", *checkpoint, "--out", tmp_path / "mask.png", "--no-fast")
    run("evaluate", *checkpoint, "--data", root, "--limit", 2, "--no-fast")
    assert calls == []


@pytest.mark.parametrize(("task", "scores"), [("generalized", ["gIoU", "N-acc"]), ("robust", ["mRR", "rIoU"])])
def test_evaluate_by_other_tasks(root, trained, tmp_path, task: str, scores: list[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "metrics.json"
    more = ["--negatives", 1, "--several", 1]
    run("data", "scenes", "--out", data, "--images", 24, "--seed", 1, "--image-size", 64, *more)
    checkpoint = trained / "best.safetensors"
    output = run("evaluate", "--checkpoint", checkpoint, "--data", data, "--task", task, "--out", out)
    found = json.loads(out.read_text())
    assert found["task"] == task
    for name in scores:
        assert name in output and 0 <= found[name] <= 100
    assert any(kind.startswith("absent/") for kind in found["by_kind"])
    message = refused("evaluate", "--checkpoint", checkpoint, "--data", data, "--task", "everything")
    assert "single" in message and "everything" in message
    message = refused("evaluate", "--checkpoint", checkpoint, "--data", data, "--protocol", "cris")
    assert "cris" in message


def test_segment(trained, picture, tmp_path) -> None:
    mask, overlay = tmp_path / "mask.png", tmp_path / "overlay.jpg"
    run(
        "segment", picture, "the red circle", "--checkpoint", trained / "best.safetensors",
        "--out", mask, "--overlay", overlay,
    )  # fmt: skip
    with Image.open(mask) as found, Image.open(overlay) as laid, Image.open(picture) as given:
        assert found.size == laid.size == given.size
        assert found.mode == "L"
        assert set(np.unique(np.asarray(found))) <= {0, 255}


def test_low_precision(root, trained, picture, tmp_path) -> None:
    out, mask = tmp_path / "metrics.json", tmp_path / "mask.png"
    checkpoint = ["--checkpoint", trained / "best.safetensors"]
    run("evaluate", *checkpoint, "--data", root, "--limit", 8, "--dtype", "bfloat16", "--device", "cpu", "--out", out)
    assert json.loads(out.read_text())["dtype"] == "bfloat16"
    run("segment", picture, "circle", *checkpoint, "--dtype", "bfloat16", "--device", "cpu", "--out", mask)
    assert mask.exists()
    for command in (["evaluate", "--data", root], ["segment", picture, "circle", "--out", mask]):
        message = refused(*command, *checkpoint, "--dtype", "float16", "--device", "cpu")
        assert message == "error: dtype: float16 is for GPUs (a CPU computes it slower than float32); take bfloat16\n"


def test_contact_sheet(root, trained, tmp_path) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["--checkpoint", trained / "best.safetensors", "--data", root, "--out", out]
    assert str(out) in run("contact-sheet", *arguments, "--rows", 3, "--columns", 2)
    with Image.open(out) as sheet:
        assert sheet.width > 900


def test_info() -> None:
    output = run("info")
    assert torch.__version__ in output
    assert "window_attention" in output and "reference" in output


def test_doctor(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_proof, "DTYPES", (torch.float32,))
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "cache"))
    calls = {"operator": "window_attention", "class": "float32 2x8", "device": "some GPU"}
    found = {"winner": "triton", "seconds": {"reference": 2e-3, "triton": 1e-3}, "failed": {}}
    for version in (torch.__version__, "0.1"):
        _kept.write(_trial.FOLDER, {**calls, "torch": version}, found)
    times = {"forward": (2e-3, 1e-3), "input_gradient": (2e-3, 2e-3)}
    monkeypatch.setattr(_linear, "training_products", lambda: Products(True, False, False, times))
    output = run("doctor", "--out", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    (choice,) = report["choices"]
    assert choice["calls"] == "window_attention float32 2x8 on some GPU" and choice["winner"] == "triton"
    assert "float32 Linears in training, forward: oneDNN (MKL 2 ms, oneDNN 1 ms)" in output
    assert "in training, input gradient: PyTorch's (MKL 2 ms, oneDNN 2 ms)" in output
    assert report["training_products"] == {name: list(pair) for name, pair in times.items()}
    assert f"choice  {choice['calls']}: triton (triton 1 ms, reference 2 ms, measured 2" in output
    assert report["machine"]["torch"] == torch.__version__ and str(tmp_path / "report.json") in output
    kernels = {(one["backend"], one["operator"]): one for one in report["kernels"]}
    assert len(kernels) == 19 and kernels["cpu", "window_attention"]["passed"] is True
    assert kernels["cpu", "linear_chain"]["passed"] in (True, None)  # None below AVX-512
    if not torch.cuda.is_available():
        assert kernels["triton", "window_attention"]["passed"] is None
        assert "there is no GPU" in kernels["triton", "window_attention"]["detail"]
    monkeypatch.setattr(_proof, "check", lambda *place: _proof.Verdict(False, "largest error 7"))
    assert "WRONG: largest error 7" in run("doctor", status=1)


def test_resume_and_refusals(root, trained, tmp_path) -> None:
    settings = [argument for setting in SMALL for argument in ("--set", setting)]
    train = ["train", "--config", "magnet_tiny_scenes", "--data", root, "--out"]
    assert "already holds a run" in refused(*train, trained, *settings, "--set", "max_steps=3")
    assert "resumed at step 3" in run(*train, trained, *settings, "--set", "max_steps=3", "--resume")
    other = refused(*train, trained, *settings, "--set", "max_steps=3", "--set", "model.name=lavt_tiny", "--resume")
    assert "another model" in other
    message = refused(*train, tmp_path / "x", "--set", "optimiser.learning_rate=1")
    assert "unknown key 'optimiser.learning_rate'" in message and "optimiser." in message
    assert not (tmp_path / "x").exists()
    assert "magnet_tiny_scenes" in refused("train", "--config", "nowhere", "--data", root, "--out", tmp_path / "x")


def test_bad_inputs(root, trained, picture, tmp_path) -> None:
    checkpoint = trained / "best.safetensors"
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    mask = tmp_path / "mask.png"
    segment = ["--checkpoint", checkpoint, "--out", mask]
    assert "0 bytes" in refused("segment", empty, "circle", *segment)
    assert "empty" in refused("segment", picture, " ", *segment)
    assert "does not exist" in refused("segment", tmp_path / "none.png", "circle", *segment)
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("mask.txt", "not the name of a picture"),
        ("mask.psd", "not the name of a picture"),  # Pillow reads it, and cannot write it
        ("folder.png", "a folder; expected the name of a file"),
    ):
        to = tmp_path / name
        assert message in refused("segment", picture, "circle", "--checkpoint", checkpoint, "--out", to)
    assert not mask.exists()
    run("segment", picture, "circle " * 200, *segment)
    assert mask.exists()

    evaluate = ["evaluate", "--checkpoint", checkpoint]
    assert "no split 'test'" in refused(*evaluate, "--data", root, "--split", "test")
    refused(*evaluate, "--data", tmp_path)
    assert "none.pt' does not exist" in refused("evaluate", "--checkpoint", tmp_path / "none.pt", "--data", root)
    assert "backend" in refused(*evaluate, "--data", root, "--backend", "abacus")
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    refused("evaluate", "--checkpoint", tmp_path / "other.pth", "--data", root)


def test_an_option_shows_the_traceback(tmp_path) -> None:
    result = CliRunner().invoke(app, ["--traceback", "train", "--config", "nowhere", "--out", str(tmp_path / "x")])
    assert isinstance(result.exception, FileNotFoundError)
    refused("train", "--config", "nowhere", "--out", tmp_path / "x")


def test_a_backend_without_all_kernels_is_refused_in_one_line(root, trained, monkeypatch) -> None:
    monkeypatch.delitem(_registry._implementations, ("cross_modal_attention", "cpu"))
    checkpoint = trained / "last.safetensors"
    image = next((root / "images").rglob("*.jpg"))
    message = refused("segment", image, "the red circle", "--checkpoint", checkpoint, "--backend", "cpu")
    assert "cross_modal_attention" in message and "no kernel for this operator yet" in message
    assert len(message.splitlines()) == 1


def test_segment_turns_a_phones_picture_upright_and_says_so(trained, picture, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(picture).resize((40, 24))
    stored.save(tmp_path / "photo.png", exif=exif)
    stored.rotate(-90, expand=True).save(tmp_path / "upright.png")
    stored.save(tmp_path / "stored.png")

    def masked(name: str, *more: str) -> tuple[np.ndarray, np.ndarray, str]:
        drawn = ["--out", tmp_path / "mask.png", "--overlay", tmp_path / "overlay.png"]
        output = run("segment", tmp_path / name, "circle", *drawn, "--checkpoint", trained / "best.safetensors", *more)
        return (*(np.asarray(Image.open(tmp_path / part)) for part in ("mask.png", "overlay.png")), output)

    for name, more, same in (("photo.png", (), "upright.png"), ("photo.png", ("--stored-pixels",), "stored.png")):
        mask, overlay, output = masked(name, *more)
        expected = masked(same)
        assert np.array_equal(mask, expected[0]) and np.array_equal(overlay, expected[1])
        assert ("turned upright by its EXIF orientation, 6; --stored-pixels" in output) is (more == ())
        assert "EXIF" not in expected[2]


def test_what_is_not_read_is_a_line(trained, picture, tmp_path) -> None:
    more = ["--checkpoint", trained / "best.safetensors", "--out", tmp_path / "mask.png"]
    output = run("segment", picture, "the 東京 \ud800 circle", *more)
    lines = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and "UserWarning" not in output
    assert "the vocabulary lacks '東京'; characters are left out: '\\ud800'" in lines[0]
    assert "leaves no word to read" in refused("segment", picture, "\u200b", *more)


def test_a_model_that_answers_nan_is_refused(root, trained, picture, tmp_path) -> None:
    loaded = checkpoints.load(trained / "best.safetensors")
    with torch.no_grad():
        loaded.model.get_submodule("image_encoder.stages.0.blocks.0.attention.qkv").weight[0, 0] = torch.nan
    path = tmp_path / "nan.safetensors"
    models.save(loaded.model, path, loaded.metadata)
    more = ["--checkpoint", path, "--out", tmp_path / "out.png"]
    layer = "a layer has NaN in its weights, image_encoder.stages.0.blocks.0.attention.qkv.weight"
    sheet = refused("contact-sheet", "--data", root, "--rows", 2, *more)
    assert ": ref_id " in sheet and ", sent_id " in sheet and layer in sheet
    assert layer in refused("segment", picture, "circle", *more)
    for dtype in ("float32", "bfloat16"):
        said = refused("evaluate", "--data", root, "--checkpoint", path, "--limit", 3, "--dtype", dtype)
        assert "NaN in that of sentence 0, and of 2 others (ref_id " in said and layer in said
    assert not (tmp_path / "out.png").exists()
