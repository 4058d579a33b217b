"""The autotuner's choice, its memory and its file; precision; whether this process can run Triton kernels."""

import subprocess
import sys

import pytest
import torch

from magnet_fast.ops import _triton_backend

triton = pytest.importorskip("triton")

from magnet_fast.kernels import _runtime  # noqa: E402

CPU = torch.device("cpu")


@triton.jit
def _kernel(out):
    pass


def candidates(*key) -> list:
    return [triton.Config({"ROWS": rows}) for rows in (16, 32, 64)]


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Times by configuration, and the configurations that were timed."""
    times, seen = {16: 3.0, 32: 1.0, 64: 2.0}, []

    def milliseconds(launch, config):
        seen.append(config.kwargs["ROWS"])
        return times[seen[-1]]

    monkeypatch.setattr(_runtime, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return times, seen


def rows(tuner: _runtime.Autotuner, *key) -> int:
    return tuner(lambda config: config.kwargs["ROWS"], CPU, *key)


def test_the_fastest_is_chosen_once_for_each_key(timed):
    _, seen = timed
    tuner = _runtime.Autotuner(candidates, _kernel)
    assert [rows(tuner, 49, "bfloat16") for _ in range(3)] == [32] * 3 and seen == [16, 32, 64]
    rows(tuner, 64, "bfloat16")
    assert len(seen) == 6


def test_the_choice_survives_a_restart(timed):
    times, seen = timed
    rows(_runtime.Autotuner(candidates, _kernel), 49)
    times[64] = 0.5
    assert rows(_runtime.Autotuner(candidates, _kernel), 49) == 32 and len(seen) == 3
    assert rows(_runtime.Autotuner(lambda *key: candidates()[1:], _kernel), 49) == 64  # other candidates: timed again


def test_a_damaged_file_is_timed_again(timed, tmp_path):
    _, seen = timed
    rows(_runtime.Autotuner(candidates, _kernel), 49)
    (path,) = tmp_path.rglob("*.choice.json")
    path.write_text('{"chosen"')
    assert rows(_runtime.Autotuner(candidates, _kernel), 49) == 32 and len(seen) == 6


def test_nothing_is_timed_in_a_capture_or_interpreter(timed, monkeypatch):
    _, seen = timed
    tuner = _runtime.Autotuner(candidates, _kernel)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert rows(tuner, 49) == 16
    assert rows(tuner, 49) == 32  # a capture settles nothing
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    assert rows(tuner, 64) == 16 and len(seen) == 3


def test_a_configuration_that_does_not_fit_is_never_chosen(monkeypatch):
    def out_of_shared_memory(*arguments, **named):
        raise _runtime.OutOfResources(300 << 10, 227 << 10, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", out_of_shared_memory)
    assert _runtime._milliseconds(lambda config: None, candidates()[0]) == float("inf")


def test_tf32_where_torch_allows_it():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _runtime.precision(torch.float32) == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert _runtime.precision(torch.float32) == "tf32"
        assert _runtime.precision(torch.bfloat16) == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)


def test_sizes():
    assert [_runtime.power_of_two(size) for size in (1, 16, 17, 49, 144, 256)] == [16, 16, 32, 64, 256, 256]
    assert _runtime.grid(70_000) == (70_000,)
    with pytest.raises(ValueError, match="^programs: a launch has 1 to 2147483647 programs, got 2147483648"):
        _runtime.grid(2**31)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_why_not_without_a_gpu():
    assert _triton_backend.missing.startswith("there is no GPU")
    assert "CUDA tensors only" in _triton_backend.supports(torch.ones(1))


def test_importing_the_operators_leaves_triton_alone():
    code = "import sys; from magnet_fast import ops; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
