"""Files that are complete at every moment, whoever else writes them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from magnet_fast.atomic import write_atomically, write_text_atomically

WRITER = """
import sys
from magnet_fast.atomic import write_atomically
number = sys.argv[2]
for round in range(60):
    content = (number * 2000 + str(round)).encode()
    write_atomically(sys.argv[1], lambda file: [file.write(content[i : i + 500]) for i in range(0, len(content), 500)])
"""


def test_a_failing_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "before")

    def fail(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_errors_name_the_file_that_was_asked_for(tmp_path) -> None:
    def full(file) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def other(file) -> None:
        open(tmp_path / "other")  # noqa: SIM115 (there is none)

    def no_format(file) -> None:
        raise OSError("cannot write mode L as XBM")

    (tmp_path / "folder").mkdir()
    for name, write, kind, named in (
        ("file", full, OSError, "file"),
        ("file", other, FileNotFoundError, "other"),
        ("folder", lambda file: None, IsADirectoryError, "folder"),
        ("n" * 250, lambda file: None, OSError, "n" * 250),
    ):
        with pytest.raises(kind) as caught:
            write_atomically(tmp_path / name, write)
        assert caught.value.filename == str(tmp_path / named) or caught.value.filename == tmp_path / named
    with pytest.raises(OSError, match="^cannot write mode L as XBM$"):
        write_atomically(tmp_path / "file", no_format)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_file_system_that_brings_no_folder_to_the_disk(tmp_path, monkeypatch) -> None:
    """As some shared and network ones; an error of the disk is one."""
    fsync, number = os.fsync, errno.EINVAL

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    for number in (errno.EINVAL, errno.ENOTSUP):
        write_text_atomically(tmp_path / "file", str(number))
        assert (tmp_path / "file").read_text() == str(number)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_text_atomically(tmp_path / "file", "after")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user for a while")
def test_a_folder_that_may_be_written_to_and_not_listed() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is below a private one
        os.chown(folder, 65534, 65534)
        os.chmod(folder, 0o300)
        os.setresuid(65534, 65534, 0)
        try:
            for text in ("before", "after"):
                write_text_atomically(Path(folder, "file"), text)
        finally:
            os.setresuid(0, 0, 0)
        assert Path(folder, "file").read_text() == "after" and os.listdir(folder) == ["file"]


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "before")

    def write(file) -> None:
        file.write(b"after")
        file.flush()
        assert path.read_text() == "before"

    write_atomically(path, write)
    assert path.read_text() == "after"


def test_what_a_kill_left_is_removed_and_what_another_writes_is_not(tmp_path) -> None:
    path = tmp_path / "file[1].json"  # a name with signs that patterns read
    left = tmp_path / f".{path.name}.0123.tmp"
    left.write_bytes(b"left by a kill")
    others = tmp_path / ".other.0123.tmp"
    others.write_bytes(b"of another file")

    def write(file) -> None:
        file.write(b"outer")
        write_text_atomically(path, "inner")  # while the first write is under way

    write_atomically(path, write)
    assert path.read_text() == "outer"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [others.name, path.name]


def test_many_writers_at_once(tmp_path) -> None:
    """Processes and threads on one path: no write fails, no reader ever sees half of one."""
    path = tmp_path / "file"
    write_text_atomically(path, "9" * 2000 + "0")
    repository = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    commands = [[sys.executable, "-c", WRITER, str(path), str(number)] for number in range(3)]
    writers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for command in commands]
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(write_text_atomically, path, str(number) * 2000 + "0") for number in (3, 4, 5, 6) * 20]
        while any(writer.poll() is None for writer in writers):
            content = path.read_text()
            assert content[:2000] == content[0] * 2000 and content[2000:].isdigit()
        for future in done:
            future.result()
    for writer in writers:
        assert writer.wait() == 0, writer.stderr.read()
        writer.stderr.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path) -> None:
    write_text_atomically(tmp_path / "file", "")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "plain")]
    assert modes[0] == modes[1]


def test_an_absent_folder_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_atomically(tmp_path / "none" / "file", "")
