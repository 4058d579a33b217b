"""Which backend runs: the context manager, the environment variable, explain, and that torch.compile follows them."""

import threading

import pytest
import torch

from magnet_fast import ops
from magnet_fast.ops import _cuda_backend, _registry, _triton_backend

from .cases import all_cases, window_case

NAMES = "reference, cpu, triton, cuda, auto"
WHY_NOT_CUDA = _cuda_backend.missing or "device {} is not supported, CUDA tensors only"
WHY_NOT_TRITON = _triton_backend.missing or "device {} is not supported, CUDA tensors only"


def chosen(case=None) -> str:
    case = case or window_case(dtype=torch.float32)
    return explain(case).chosen


def explain(case):
    args, kwargs = case.arguments(*case.leaves)
    return ops.explain(case.operator, *args, **kwargs)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("MAGNET_FAST_BACKEND", raising=False)


@pytest.fixture
def only_window_attention(monkeypatch):
    """The registry as if window_attention were the only operator that the extension has."""
    for operator, name in list(_registry._implementations):
        if name == "cpu" and operator != "window_attention":
            monkeypatch.delitem(_registry._implementations, (operator, name))


@pytest.fixture
def spy(monkeypatch):
    """Backends that really ran window_attention's registered forward, and 'reference' for the plain one."""
    from magnet_fast.ops import _window_attention as module

    ran = []
    plain, run = module.window_attention_reference, module._run
    monkeypatch.setattr(module, "window_attention_reference", lambda *a: ran.append("reference") or plain(*a))
    monkeypatch.setattr(module, "_run", lambda *a: ran.append(a[-1]) or run(*a))
    return ran


def test_auto_prefers_the_extension(spy, only_window_attention):
    window_case(dtype=torch.float32)()
    assert spy == ["cpu"]
    assert chosen() == "cpu"
    assert ops.available_backends() == ("cpu", "reference")
    assert ops.available_backends("window_attention") == ("cpu", "reference")
    assert ops.available_backends("deformable_attention") == ("reference",)


def test_context_manager_nests(spy):
    case = window_case(dtype=torch.float32)
    with ops.backend("reference"):
        case()
        with ops.backend("cpu"):
            case()
            with ops.backend("auto"):
                case()
        case()
    case()
    assert spy == ["reference", "cpu", "cpu", "reference", "cpu"]


def test_context_manager_is_left_after_an_error():
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_one_backend_for_some_operators(only_window_attention):
    cases = all_cases(torch.float32)
    with ops.backend("reference"), ops.backend("cpu", "window_attention"):
        assert chosen(cases["window"]) == "cpu"
        assert chosen(cases["deformable"]) == "reference"
        cases["deformable"]()
    with ops.backend("cpu", "window_attention", "deformable_attention"), pytest.raises(RuntimeError):
        cases["deformable"]()


def test_other_threads_keep_their_own_choice():
    seen = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        seen.append(chosen())
    assert seen == ["cpu", "reference"]


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("MAGNET_FAST_BACKEND", "reference")
    assert chosen() == "reference"
    with ops.backend("cpu"):
        assert chosen() == "cpu"
    with ops.backend("auto"):
        assert chosen() == "cpu"
    monkeypatch.setenv("MAGNET_FAST_BACKEND", "")
    assert chosen() == "cpu"
    monkeypatch.setenv("MAGNET_FAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"MAGNET_FAST_BACKEND: unknown name 'gpu'; expected one of {NAMES}"):
        window_case()()


def test_unknown_names():
    with pytest.raises(ValueError, match=f"backend: unknown name 'fast'; expected one of {NAMES}"):
        ops.backend("fast")
    known = "cross_modal_attention, deformable_attention, fused_deformable_attention, linear, pixel_contrastive_loss"
    for call in (
        lambda: ops.explain("attention"),
        lambda: ops.available_backends("attention"),
        lambda: ops.backend("cpu", "attention"),
    ):
        with pytest.raises(ValueError, match=f"operator: unknown name 'attention'; expected one of {known}"):
            call()


def test_explain_auto():
    explanation = explain(window_case(dtype=torch.float32))
    assert explanation.chosen == "cpu"
    assert explanation.reasons == {
        "cuda": WHY_NOT_CUDA.format("cpu"),
        "triton": WHY_NOT_TRITON.format("cpu"),
        "reference": "can run, but cpu is preferred",
    }
    assert str(explanation) == repr(explanation)
    assert str(explanation).splitlines() == [
        "window_attention: cpu would run (the fastest that can)",
        f"  cuda: {WHY_NOT_CUDA.format('cpu')}",
        f"  triton: {WHY_NOT_TRITON.format('cpu')}",
        "  reference: can run, but cpu is preferred",
    ]


def test_explain_says_why_not():
    case = window_case(dtype=torch.float32)
    case.leaves = [leaf.to("meta") for leaf in case.leaves]
    elsewhere = explain(case)
    assert elsewhere.chosen == "reference"
    assert elsewhere.reasons["cpu"] == "device meta is not supported, CPU tensors only"


@pytest.mark.parametrize("name", sorted(all_cases()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_operator_takes_the_extension(name, dtype):
    assert explain(all_cases(dtype)[name]).chosen == "cpu"


@pytest.mark.parametrize("name", sorted(all_cases()))
def test_auto_passes_over_what_is_slower(name):
    """Scalar float64 code is there to be forced, for gradient checks."""
    case = all_cases(torch.float64)[name]
    explanation = explain(case)
    assert explanation.chosen == "reference"
    assert explanation.reasons["cpu"] == "can run, but float64 runs in scalar code, meant for gradient checks"
    with ops.backend("cpu"):
        assert explain(case).chosen == "cpu"


def test_auto_passes_over_few_queries_on_large_maps():
    value, shapes = torch.randn(1, 4000, 1, 4), [(50, 80)]

    def call(queries):
        return ops.explain(
            "deformable_attention", value, shapes, torch.rand(1, queries, 1, 1, 4, 2), torch.rand(1, queries, 1, 1, 4)
        )

    assert call(4000).chosen == "cpu"
    few = call(2)
    assert few.chosen == "reference"
    assert few.reasons["cpu"].startswith("can run, but 2 queries read so little of 4000 positions")


def test_explain_checks_its_arguments():
    with pytest.raises(TypeError, match="qkv"):
        ops.explain("window_attention", None, None, num_heads=1, window_size=1)


def test_explain_forced():
    with ops.backend("reference"):
        forced = explain(window_case(dtype=torch.float32))
    assert (forced.requested, forced.chosen) == ("reference", "reference")
    assert forced.reasons["cpu"] == "can run, but reference is forced"
    assert "reference would run (forced)" in str(forced)


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_forced_backend_that_cannot_run(name):
    case = window_case()
    case.leaves = [leaf.to("meta") for leaf in case.leaves]
    with ops.backend(name):
        assert explain(case).chosen == "none"
        with pytest.raises(RuntimeError) as error:
            case()
        assert str(error.value) == str(explain(case))
    reasons = {
        "cpu": "device meta is not supported, CPU tensors only",
        "triton": WHY_NOT_TRITON.format("meta"),
        "cuda": WHY_NOT_CUDA.format("meta"),
    }
    assert f"backend {name!r} is forced and cannot run" in str(error.value)
    assert f"  {name}: {reasons[name]}" in str(error.value)


def test_extension_that_is_not_built(monkeypatch, only_window_attention):
    reason = "extension magnet_fast._cpu is not built"
    item = _registry.implementation("window_attention", "cpu")
    missing = _registry.Implementation(item.forward, item.backward, item.supports, reason)
    monkeypatch.setitem(_registry._implementations, ("window_attention", "cpu"), missing)
    explanation = explain(window_case(dtype=torch.float32))
    assert explanation.chosen == "reference" and explanation.reasons["cpu"] == reason
    assert ops.available_backends() == ("reference",)
    window_case(dtype=torch.float32)()
    with ops.backend("cpu"), pytest.raises(RuntimeError, match=reason):
        window_case(dtype=torch.float32)()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'magnet_fast._cpu'"), "extension magnet_fast._cpu is not built"),
        (ImportError("libgomp.so.1: missing"), "extension magnet_fast._cpu cannot be loaded: libgomp.so.1: missing"),
    ],
)
def test_import_failure_becomes_a_reason(monkeypatch, error, reason):
    import importlib.util
    import sys

    import magnet_fast
    from magnet_fast.ops import _cpu_backend

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "magnet_fast._cpu":
                raise error

    monkeypatch.delitem(sys.modules, "magnet_fast._cpu", raising=False)
    monkeypatch.delattr(magnet_fast, "_cpu", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    spec = importlib.util.spec_from_file_location("magnet_fast.ops._cpu_backend_again", _cpu_backend.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.missing == reason and again.extension is None


def test_compiled_functions_follow_the_choice():
    """Dynamo guards on the stack: the same compiled function takes another graph when the choice changes."""
    torch.compiler.reset()
    case = window_case(dtype=torch.float32)
    graphs = []

    def keep(graph, inputs):
        graphs.append("window_attention" in graph.code)
        return graph

    compiled = torch.compile(lambda *leaves: case(*leaves), fullgraph=True, backend=keep)
    leaves = [leaf.detach() for leaf in case.leaves]
    compiled(*leaves)
    with ops.backend("reference"):
        compiled(*leaves)
    compiled(*leaves)
    assert graphs == [True, False]


def test_context_manager_inside_a_compiled_function():
    torch.compiler.reset()
    case = window_case(dtype=torch.float32)

    def function(*leaves):
        with ops.backend("reference"):
            first = case(*leaves)[0]
        return first, case(*leaves)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.leaves), function(*case.leaves))
    assert chosen() == "cpu"
