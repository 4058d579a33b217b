"""The operators as torch sees them: gradients, schemas, fake kernels, torch.compile and autocast."""

import pytest
import torch

from magnet_fast import ops

from .cases import all_cases, cross_modal_case, outputs_of, weighted_sum, window_case

pytestmark = pytest.mark.slow

NAMES = sorted(all_cases())


@pytest.fixture(params=NAMES)
def case(request):
    return all_cases()[request.param]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles for itself: without this the recompilations of one function would add up."""
    torch.compiler.reset()


def operators(name):
    namespace = torch.ops.magnet_fast
    return getattr(namespace, name).default, getattr(namespace, f"{name}_backward").default


def test_gradients_of_the_reference(case):
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(case, case.leaves)


def test_gradients_through_the_registered_operators(case):
    function = case.registered("cpu")
    assert torch.autograd.gradcheck(function, case.leaves)
    with ops.backend("reference"):
        torch.testing.assert_close(case.gradients(function), case.gradients())


def test_the_reference_is_no_registered_kernel(case):
    with pytest.raises(RuntimeError, match=f"{case.operator}: backend 'reference' has no kernel"):
        case.registered("reference")(*case.leaves)


def test_second_derivatives_of_the_reference():
    case = window_case(batch=1, size=(2, 3), window=(2, 2), shift=(1, 0), heads=1, d=1)
    with ops.backend("reference"):
        assert torch.autograd.gradgradcheck(case, case.leaves)


def test_schemas_and_fake_kernels(case):
    forward, backward = operators(case.operator)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    torch.library.opcheck(forward, (*arguments, "cpu"))

    results = forward(*arguments, "cpu")
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.randn_like(out) if out.numel() else None for out in results[: outputs(case)]]
    given = [isinstance(argument, torch.Tensor) and argument.is_floating_point() for argument in arguments]
    wanted = [given[index] for index in differentiable(case)]
    arguments = with_kept(case, arguments, results)
    torch.library.opcheck(backward, (*grads, *arguments, wanted, "cpu"))
    # None wanted but the last.
    last = len(wanted) - 1 - wanted[::-1].index(True)
    torch.library.opcheck(backward, (*grads, *arguments, [i == last for i in range(len(wanted))], "cpu"))


def outputs(case):
    return 2 if case.operator == "cross_modal_attention" else 1


def with_kept(case, arguments, results):
    """The backward's arguments: what the forward keeps, if anything, stands after the tensors."""
    kept = results[outputs(case) :]
    tensors = sum(isinstance(argument, torch.Tensor) for argument in arguments) if kept else 0
    return [*arguments[:tensors], *kept, *arguments[tensors:]]


def differentiable(case):
    counts = {"window_attention": 3, "relative_attention": 4, "cross_modal_attention": 6, "deformable_attention": 3}
    counts |= {"fused_deformable_attention": 4, "pixel_contrastive_loss": 1}
    return range(counts[case.operator])


def test_missing_output_gradients_are_zero(case):
    forward, backward = operators(case.operator)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    wanted = [isinstance(arguments[index], torch.Tensor) for index in differentiable(case)]
    results = forward(*arguments, "cpu")
    results = results if isinstance(results, tuple) else (results,)
    grads = backward(*[None] * outputs(case), *with_kept(case, arguments, results), wanted, "cpu")
    for index, want, grad in zip(differentiable(case), wanted, grads, strict=True):
        assert grad.shape == (arguments[index].shape if want else (0,))
        assert not grad.any()


@pytest.mark.parametrize("route", ["public", "registered"])
def test_compile_fullgraph(case, route):
    function = case if route == "public" else case.registered("cpu")
    compiled = torch.compile(lambda *leaves: function(*leaves), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.leaves), function(*case.leaves))
    torch.testing.assert_close(case.gradients(compiled), case.gradients(function))


def test_compile_with_changing_sizes():
    """The registered operator stays one node of the graph, whatever the size of the map."""
    compiled = torch.compile(
        lambda qkv, table, pad: ops.window_attention(qkv, table, num_heads=2, window_size=(2, 3), shift=1, pad_qkv=pad),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for size in ((5, 4), (4, 7), (6, 6)):
        case = window_case(size=size, shift=(1, 1), dtype=torch.float32)
        with ops.backend("cpu"):
            torch.testing.assert_close(outputs_of(compiled(*case.leaves)), case())
            torch.testing.assert_close(case.gradients(lambda *leaves: outputs_of(compiled(*leaves))), case.gradients())


def test_compile_with_inductor():
    window, cross_modal = window_case(dtype=torch.float32), cross_modal_case("shared", dtype=torch.float32)

    def both(*leaves):
        """One opaque node, and one operator whose reference the compiler takes apart."""
        outputs = window(*leaves[:3])
        with ops.backend("reference"):
            return *outputs, *cross_modal(*leaves[3:])

    leaves = [*window.leaves, *cross_modal.leaves]
    outputs, expected = torch.compile(both, fullgraph=True)(*leaves), both(*leaves)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(
        torch.autograd.grad(weighted_sum(outputs), leaves), torch.autograd.grad(weighted_sum(expected), leaves)
    )


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_attention_and_not_the_loss(name):
    case = all_cases(torch.float32)[name]
    plain = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case()
        loss = weighted_sum(tuple(out.float() for out in outputs))
    expected = torch.float32 if case.operator == "pixel_contrastive_loss" else torch.bfloat16
    for out, exact in zip(outputs, plain, strict=True):
        assert out.dtype == expected
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.1)
    for grad, tensor in zip(torch.autograd.grad(loss, case.leaves), case.leaves, strict=True):
        assert grad.dtype == tensor.dtype == torch.float32


def test_autocast_leaves_float64_alone(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case()
    assert {out.dtype for out in outputs} == {torch.float64}
    torch.testing.assert_close(outputs, case(), rtol=0, atol=0)


def test_inference_mode_then_training(case):
    with torch.inference_mode():
        first = case()
    torch.testing.assert_close(first, case())
    assert all(grad.isfinite().all() for grad in case.gradients())


def test_two_runs_give_the_same_bits(case):
    torch.testing.assert_close(case(), case(), rtol=0, atol=0)
    torch.testing.assert_close(case.gradients(), case.gradients(), rtol=0, atol=0)
