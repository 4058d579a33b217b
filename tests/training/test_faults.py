"""What a machine does to a run: a full disk, dead processes, signals, folders taken away, a clock that jumps.

Each time nothing is lost, one line says what happened and what to go on from, and the run that goes on ends with the
weights of an unbroken one.
"""

from __future__ import annotations

import ast
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from magnet_fast.data.scenes import writing
from magnet_fast.evaluation import evaluate
from magnet_fast.training import Trainer, TrainingStopped
from magnet_fast.training import run as run_module
from magnet_fast.training import trainer as trainer_module
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.distributed import World
from magnet_fast.training.folder import held_folder
from magnet_fast.training.progress import MetricsFile

from .fakes import FakeDataset, FakeModel, fake_config, same_weights, trainer_of

ALONE = World(0, 1, torch.device("cpu"))


def make_trainer(out: Path, items: FakeDataset | None = None, **changes: object) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(11)
    return trainer_of(fake_config(**changes), FakeModel(dropout=0.1), items or FakeDataset(), FakeDataset(7), out)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that every run ends with."""
    out = tmp_path_factory.mktemp("unbroken")
    make_trainer(out).run()
    return load_checkpoint(out / CHECKPOINT)["model"]


def goes_on(out: Path, unbroken: dict[str, torch.Tensor], **changes: object) -> None:
    """Resumed, the run in the folder ends as the unbroken one."""
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    trainer = make_trainer(out, **changes)
    trainer.load_state(load_checkpoint(out / CHECKPOINT))
    trainer.run()
    assert same_weights(load_checkpoint(out / CHECKPOINT)["model"], unbroken)
    rows = MetricsFile(out / "metrics.jsonl").rows()
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8, 9]


def at_step(trainer: Trainer, step: int, do: Callable[[], object]) -> Trainer:
    """The trainer, which does so before what comes after that step."""
    after = trainer._after_step

    def watched() -> None:
        if trainer.step == step:
            do()
        after()

    trainer._after_step = watched
    return trainer


# ---- a disk without room ----


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_in_mid_run(unbroken, tmp_path) -> None:
    out, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"

    def fill() -> None:
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with small_disk(out):
        with pytest.raises(OSError) as caught:
            at_step(make_trainer(out), 3, fill).run()
        assert caught.value.errno == errno.ENOSPC
        assert Path(caught.value.filename).parent == out
        assert caught.value.strerror == f"No space left on device; {out / CHECKPOINT} holds step 2, --resume goes on"
        ballast.unlink()
        goes_on(out, unbroken)


@pytest.mark.parametrize("name", [CHECKPOINT, "best.safetensors", "last.safetensors"])
def test_no_room_for_a_file_of_the_run(unbroken, tmp_path, monkeypatch, name: str) -> None:
    """Without a disk to fill, as no one but root can have: the file's bytes do not reach it."""
    fsync, full = os.fsync, False

    def refuse(descriptor: int) -> None:
        if full and f".{name}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def fill() -> None:
        nonlocal full
        full = True

    monkeypatch.setattr(os, "fsync", refuse)
    step = {CHECKPOINT: 2, "best.safetensors": 2, "last.safetensors": 9}[name]
    trainer = at_step(make_trainer(tmp_path), 3, fill)
    trainer.best = -1.0  # the first validation is the best one
    with pytest.raises(OSError, match=f"No space left on device; .* holds step {step}, --resume goes on") as caught:
        trainer.run()
    assert caught.value.filename == str(tmp_path / name)
    full = False
    goes_on(tmp_path, unbroken)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_room_for_a_row_of_metrics() -> None:
    with pytest.raises(OSError) as caught:
        MetricsFile(Path("/dev/full")).append({"kind": "train", "step": 1})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


# ---- processes that read ----


def test_a_data_worker_that_is_killed(unbroken, tmp_path) -> None:
    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(60)  # ended by torch's error, in the handler of SIGCHLD

    options = {"data": {"workers": 1}}
    with pytest.raises(ChildProcessError, match=r"was killed by signal: Killed.*fewer workers; .* holds step 4, --res"):
        at_step(make_trainer(tmp_path, **options), 5, kill).run()
    goes_on(tmp_path, unbroken, **options)


class Gone(FakeDataset):
    """An item's picture can be read no more."""

    def __init__(self, gone: int, error: type[Exception]) -> None:
        super().__init__()
        self.gone, self.error = gone, error

    def __getitem__(self, index: int):
        if index == self.gone:
            raise self.error("ref_id 5: image 5.jpg cannot be read\nsecond line")
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # torch waits 5 s for its worker
def test_a_picture_that_is_lost_is_told_in_its_own_words(tmp_path, workers: int, error: type[Exception]) -> None:
    trainer = make_trainer(tmp_path, Gone(5, error), checkpoint_every=1, data={"workers": workers})
    with pytest.raises(error) as caught:
        trainer.run()
    step = trainer.saved_at
    told = f"; {tmp_path / CHECKPOINT} holds step {step}, --resume goes on" if step > 0 else ""
    assert str(caught.value) == f"ref_id 5: image 5.jpg cannot be read\nsecond line{told}"
    with pytest.raises(error, match="^ref_id 5: image 5.jpg cannot be read\nsecond line$"):
        evaluate(FakeModel().eval(), Gone(5, error), 4, workers=workers)


def test_a_signal_to_the_processes_of_a_validation_is_left_to_the_run(tmp_path) -> None:
    others = multiprocessing.active_children()  # of tests before this one

    def signal_all(done: int, total: int) -> None:
        for worker in set(multiprocessing.active_children()) - set(others):
            subprocess.run(["kill", str(worker.pid)])

    model = FakeModel().eval()
    expected = evaluate(model, FakeDataset(24), 4)
    assert evaluate(model, FakeDataset(24), 4, workers=1, progress=signal_all) == expected


def die(job: tuple) -> list[dict]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_a_process_that_draws_scenes_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "_write_images", die)
    with pytest.raises(ChildProcessError, match="^workers: a process that reads or draws data died.*fewer workers$"):
        writing.write_scenes(tmp_path / "scenes", 70, 3, image_size=64, workers=2)
    assert list(tmp_path.iterdir()) == []


# ---- SIGTERM in each phase ----


@pytest.mark.parametrize(
    ("owner", "name", "number", "step"),
    [
        (Trainer, "_announce", 1, 1),
        (Trainer, "train_step", 4, 4),
        (Trainer, "_write_row", 2, 4),
        (Trainer, "_validate", 2, 6),
        (trainer_module, "save_checkpoint", 2, 3),
        (Trainer, "_export", 1, 3),
    ],
)
def test_sigterm_in_each_phase(unbroken, tmp_path, monkeypatch, owner, name: str, number: int, step: int) -> None:
    """In the `number`th such call; the step that is under way is finished and kept."""
    calls, given = 0, getattr(owner, name)

    def signalled(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return given(*arguments, **named)

    monkeypatch.setattr(owner, name, signalled)
    with pytest.raises(TrainingStopped, match=f"stopped by SIGTERM after step {step}; .* holds it, --resume goes on"):
        make_trainer(tmp_path).run()
    assert load_checkpoint(tmp_path / CHECKPOINT)["step"] == step
    goes_on(tmp_path, unbroken)


def test_sigterm_at_the_end_does_not_undo_it(unbroken, tmp_path, monkeypatch) -> None:
    given = Trainer._finish

    def signalled(self: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        given(self)

    monkeypatch.setattr(Trainer, "_finish", signalled)
    make_trainer(tmp_path).run()
    assert same_weights(load_checkpoint(tmp_path / CHECKPOINT)["model"], unbroken)
    assert (tmp_path / "last.safetensors").exists()


def test_sigterm_before_the_first_step(tmp_path, monkeypatch) -> None:
    def build(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the run was built to its end")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_module, "build_trainer", build)
    with pytest.raises(TrainingStopped, match="outside the steps of training; the same command with --resume goes on"):
        run_module.train(fake_config(), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


# ---- the run's folder ----


def test_one_run_at_a_time_has_a_folder(tmp_path, monkeypatch) -> None:
    def second(*_: object) -> Trainer:
        with pytest.raises(ValueError, match=f"^{tmp_path}/run: another run writes to this folder; wait for its end"):
            run_module.train(fake_config(), tmp_path / "run", resume=True)
        return make_trainer(tmp_path / "run")

    monkeypatch.setattr(run_module, "build_trainer", second)
    run_module.train(fake_config(), tmp_path / "run")
    monkeypatch.setattr(run_module, "build_trainer", lambda *_: make_trainer(tmp_path / "run"))
    run_module.train(fake_config(), tmp_path / "run", resume=True)


def test_a_killed_run_gives_its_folder_up_at_once(tmp_path) -> None:
    """Though processes of its loaders live on for some seconds."""
    reading, writing_end = os.pipe()
    child = os.fork()
    if child == 0:
        with held_folder(tmp_path / "run", ALONE):
            worker = os.fork()
            if worker == 0:
                os.write(writing_end, b".")
                time.sleep(60)
                os._exit(0)
            os.write(writing_end, str(worker).encode())
            time.sleep(60)
        os._exit(0)
    said = b""
    while b"." not in said or len(said) < 2:
        said += os.read(reading, 100)
    worker = int(said.replace(b".", b""))
    with pytest.raises(ValueError, match="another run writes"), held_folder(tmp_path / "run", ALONE):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with held_folder(tmp_path / "run", ALONE):
        os.kill(worker, signal.SIGKILL)
    for end in (reading, writing_end):
        os.close(end)


def test_a_folder_that_was_made_for_nothing_is_taken_away(tmp_path) -> None:
    (tmp_path / "there").mkdir()
    with held_folder(tmp_path / "there", ALONE), held_folder(tmp_path / "a" / "b", ALONE):
        pass
    with held_folder(tmp_path / "c" / "d", ALONE):
        (tmp_path / "c" / "other").touch()
    with held_folder(tmp_path / "e", ALONE):
        (tmp_path / "e" / "kept").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "c", "c/other", "e", "e/kept", "there",
    ]  # fmt: skip


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder of an ordinary user's, who the process is meanwhile: root may write anywhere."""
    root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp())  # pytest's own is below a private one
    if root:
        os.chown(folder, 65534, 65534)
        os.setresuid(65534, 65534, 0)
    try:
        yield folder
    finally:
        if root:
            os.setresuid(0, 0, 0)
        shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_to_is_told_first(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "build_trainer", lambda *_: pytest.fail("something was built"))
    with ordinary_user() as folder:
        (folder / "run").mkdir(mode=0o555)
        for out in (folder / "run", folder / "run" / "below"):
            with pytest.raises(PermissionError) as caught:
                run_module.train(fake_config(), out)
            assert caught.value.filename == str(out)
        assert [path.name for path in folder.rglob("*")] == ["run"]


def test_a_folder_that_becomes_read_only(unbroken) -> None:
    with ordinary_user() as folder:
        out = folder / "run"
        with pytest.raises(PermissionError, match="Permission denied; .* holds step 2, --resume goes on") as caught:
            at_step(make_trainer(out), 3, lambda: out.chmod(0o555)).run()
        assert Path(caught.value.filename).parent == out
        out.chmod(0o755)
        goes_on(out, unbroken)


# ---- clocks ----


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch) -> None:
    hours = [0]

    def jumping() -> float:
        hours[0] += 1
        return 1.8e9 + (-1) ** hours[0] * 3600 * hours[0]

    # Of the right clock every look is 10 ms later: how fast the machine is does not matter.
    ticks = itertools.count()
    monkeypatch.setattr(time, "time", jumping)
    clock = SimpleNamespace(time=jumping, monotonic=lambda: next(ticks) / 100)
    monkeypatch.setattr(trainer_module, "time", clock)
    trainer = make_trainer(tmp_path, epochs=None, max_minutes=0.5 / 60, log_every=1, validate_every="1 epoch")
    trainer.run()
    time.time()
    assert hours[0] >= 1  # it does jump
    rows = trainer.log.metrics.rows()
    assert trainer.step > 1 and all(row["images_per_second"] > 0 for row in rows if row["kind"] == "train")
    assert 0 < load_checkpoint(tmp_path / CHECKPOINT)["trained_seconds"] < 1


def test_nothing_is_measured_by_the_clock_on_the_wall() -> None:
    package = Path(run_module.__file__).parents[1]
    called = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("time", "now", "utcnow"):
                called.setdefault(path.name, set()).add(ast.unparse(node))
    assert called == {"_kept.py": {"datetime.now"}}  # the day, for people
