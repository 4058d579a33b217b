"""The built extension `magnet_fast._cuda`: without a driver, and what the compiler made of its kernels."""

import subprocess
import sys

import pytest
import torch

from benchmarks import cuda_report
from magnet_fast import ops
from magnet_fast.ops import _cuda_backend, _cuda_cross_modal, _cuda_deformable, _cuda_window, _registry

from ..ops.cases import cross_modal_case, random_deformable_case, window_case

pytestmark = pytest.mark.slow

BUILT = cuda_report.extension() is not None
needs_extension = pytest.mark.skipif(not BUILT, reason="magnet_fast._cuda is not built: no nvcc where it was installed")
OPERATORS = ("window_attention", "cross_modal_attention", "deformable_attention", "fused_deformable_attention")
CALL = """
import sys
import magnet_fast._cuda as extension
assert "torch" not in sys.modules
print(extension.device_status(0))
try:
    row = (64, (1, 9, 8), (72, 8, 1), 0)
    absent = dict.fromkeys(("text_query", "image_key", "image_value", "text_mask"))
    extension.cross_modal_attention_workspace(
        image_query=row, text_key=row, text_value=row, heads=1, scale=1.0, tf32=False, device=0, stream=0, **absent)
except RuntimeError as error:
    print(error)
"""


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_it_imports_and_a_call_says_what_is_missing():
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    status, error = done.stdout.splitlines()
    assert status == error
    assert error.startswith("CUDA: ") and "NVIDIA GPU and its driver" in error


@needs_extension
def test_the_runtime_is_inside():
    done = subprocess.run(["ldd", str(cuda_report.extension())], capture_output=True, text=True, check=True)
    assert "libstdc++" in done.stdout and "cudart" not in done.stdout and "libcuda" not in done.stdout


@needs_extension
@pytest.mark.skipif(cuda_report.cuobjdump() is None, reason="cuobjdump was not found: no CUDA toolkit, no Triton")
def test_what_the_compiler_made():
    """Nothing in local memory on any architecture, and the instructions of one.

    They come from the same lines for all, and to disassemble takes half a minute for each.
    """
    stacks = cuda_report.stacks(cuda_report.extension(), cuda_report.cuobjdump())
    assert stacks and not any(stacks.values()), stacks
    one = min(architecture for architecture, _ in stacks)
    found = cuda_report.kernels(cuda_report.extension(), cuda_report.cuobjdump(), one)
    assert {kernel.name for kernel in found} == {name for _, name in stacks}
    expected = {"window_forward", "window_backward", "scores", "merge", "deformable_forward", "deformable_points"}
    assert {kernel.name.split("<")[0] for kernel in found} >= expected | {"deformable_value", "deformable_sort"}
    for kernel in found:
        what = f"{kernel.name} on {kernel.architecture}"
        assert kernel.stack == 0 and kernel.local == 0, what
        if kernel.multiplies:
            assert kernel.matrix > 0 and kernel.copies > 0, what
            assert kernel.stores > 0 or kernel.name.startswith(("scores", "gather")), what
        if kernel.reads_vectors:
            assert kernel.loads >= 8 and (kernel.stores > 0 or kernel.name.startswith("deformable_points")), what
    assert sum(kernel.reads_vectors for kernel in found) == 9


def test_registered():
    for operator in OPERATORS:
        item = _registry.implementation(operator, "cuda")
        assert item.missing == _cuda_backend.missing
        assert item.passed_over() == "not yet measured on this GPU"
    explanation = ops.explain("window_attention", *window_case().leaves[:2], num_heads=2, window_size=(2, 3))
    assert explanation.reasons["cuda"] == (_cuda_backend.missing or "device cpu is not supported, CUDA tensors only")


def test_forced_and_missing():
    if _cuda_backend.missing is None:
        pytest.skip("the backend can run here")
    with ops.backend("cuda"), pytest.raises(RuntimeError, match=_cuda_backend.missing):
        window_case()()


def test_why_not():
    tokens = window_case(size=(4, 4), window=(17, 16), shift=(0, 0), dtype=torch.bfloat16).normalised()
    assert _cuda_window.supports(*tokens) == "windows of 272 tokens are not supported, at most 256"
    wide = window_case(d=65, dtype=torch.bfloat16).normalised()
    assert _cuda_window.supports(*wide) == "heads of 65 channels are not supported, at most 64"
    words = cross_modal_case("shared", mask=torch.ones(2, 65, dtype=torch.bool), dtype=torch.float32).normalised()
    assert _cuda_cross_modal.supports(*words) == "65 words are not supported, at most 64"
    maps = random_deformable_case(maps=[(1, 1)] * 17, points=1).normalised()
    assert _cuda_deformable.supports(*maps) == "17 maps are not supported, at most 16"
    points = random_deformable_case(maps=[(1, 1)] * 3, points=86, form="fused").normalised()
    assert _cuda_deformable.supports(*points) == "258 points of a query are not supported, at most 256"
    for case in (
        window_case(),
        cross_modal_case("separate"),
        random_deformable_case(),
        random_deformable_case(form="boxes"),
    ):
        supports = _registry.implementation(case.operator, "cuda").supports
        assert supports(*case.normalised()) == "device cpu is not supported, CUDA tensors only"
