"""The C++ pixel contrastive loss for the CPU against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import _cpu, ops
from magnet_fast.ops import _pixel_contrastive_loss as implementation

from .cases import Case, assert_low_precision, contrastive_case, weighted_sum

LEVELS = _cpu.supported_simd_levels()
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture
def simd_level():
    """A function that forces a level for the rest of the test."""
    before = _cpu.simd_level()
    yield _cpu.set_simd_level
    _cpu.set_simd_level(before)


def random_case(
    *, batch=2, pixels=130, channels=24, dtype=torch.float32, fraction=0.4, scale=1.0, planes=False, seed=0, **kwargs
) -> Case:
    """130 pixels are two blocks of each side for some masks, one for others."""
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(batch, pixels, channels, generator=generator, dtype=torch.float64)
    inside = torch.rand(batch, pixels, generator=generator) < fraction
    if planes:
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    leaf = features.to(dtype).requires_grad_()
    return Case("pixel_contrastive_loss", [leaf], lambda given: ((given, inside), kwargs))


def run(case, name):
    """The losses and the gradient."""
    with ops.backend(name):
        return (*case(), *case.gradients())


def exactly(case):
    return Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)


def assert_agree(case, small=2e-6):
    """Both against the reference in float64: the kernel's error is that of the dtype it computes in."""
    dtype = case.leaves[0].dtype
    small = 1e-12 if dtype == torch.float64 else small
    results = run(case, "cpu"), run(case, "reference"), run(exactly(case), "reference")
    for name, ours, theirs, truth in zip(("loss", "gradient"), *results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if dtype in LOW and name == "gradient":
            assert_low_precision(ours, theirs, truth, dtype, name)
            continue
        error, baseline = (ours - truth).abs().max(), (theirs - truth).abs().max()
        # Losses are differences of logarithms of sums: the reference's error is one of numbers of size 1 or more.
        size = truth.abs().max().clamp_min(1.0 if name == "loss" else 1e-9)
        assert error <= 2 * baseline + small * size, f"{name}: {error:.2g}, reference {baseline:.2g}"
        assert error <= 1e3 * small * size, f"{name}: {error:.2g}"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    pixels=st.integers(1, 230),
    channels=st.integers(1, 70),
    temperature=st.floats(0.02, 2.0),
    normalize=st.booleans(),
    planes=st.booleans(),
    fraction=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, *LOW]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(normalize, channels, **given):
    scale = 1.0 if normalize else channels**-0.5
    assert_agree(random_case(channels=channels, normalize=normalize, scale=scale, **given), small=2e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level(level, simd_level):
    simd_level(level)
    for channels in (2, 5, 16, 48, 67):
        for dtype in (torch.float32, *LOW):
            assert_agree(random_case(channels=channels, dtype=dtype, planes=channels == 5))
    assert_agree(random_case(channels=1))
    assert_agree(random_case(normalize=False))
    assert_agree(random_case(pixels=1100, batch=1))  # groups of several blocks


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 5.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_any_size_of_similarity(level, temperature, scale, simd_level):
    """Similarities up to a million, whose exponentials all are beyond any format."""
    simd_level(level)
    assert_agree(random_case(temperature=temperature, scale=scale, normalize=False), small=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("temperature", [1e-3, 0.1])
def test_zero_and_tiny_features(level, temperature, simd_level):
    """Under the norm of 1e-6 a pixel is no longer of length 1, and its gradient is bounded."""
    simd_level(level)
    case = random_case(pixels=40, temperature=temperature)
    with torch.no_grad():
        case.leaves[0][:, 3:6] = 0
        case.leaves[0][:, 7] *= 1e-8
    loss, grad = run(case, "cpu")
    assert loss.isfinite().all() and grad.isfinite().all() and grad[:, 4].any()
    assert_agree(case, small=1e-5)


def test_gradcheck():
    """Forced, so that finite differences and gradients are both the kernel's."""
    for kwargs in ({}, {"normalize": False, "temperature": 1.0}, {"normalize": False, "temperature": 0.02}):
        case = random_case(pixels=9, channels=3, dtype=torch.float64, **{"temperature": 0.3, **kwargs})
        with ops.backend("cpu"):
            assert torch.autograd.gradcheck(lambda features, case=case: case(features), case.leaves)


def test_one_similar_stranger():
    """The loss of a pixel whose only likeness is on the other side: its own sum is far below the other."""
    features = torch.tensor([[[1.0, 0.0], [0.1, 0.0], [-9.0, 0.0], [9.0, 1.0]]]).requires_grad_()
    inside = torch.tensor([[False, True, True, True]])
    case = Case("pixel_contrastive_loss", [features], lambda f: ((f, inside), {"normalize": False}))
    assert run(case, "cpu")[0] > 50
    assert_agree(case)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_one_side_alone_is_zero(inside, dtype):
    features = torch.randn(3, 120, 8).to(dtype).requires_grad_()
    mask = torch.full((3, 120), inside)
    mask[1, :7] ^= True
    with ops.backend("cpu"):
        loss = ops.pixel_contrastive_loss(features, mask)
        (grad,) = torch.autograd.grad((loss * torch.tensor([-1.0, 1.0, 2.0])).sum(), features)
    assert loss[0] == loss[2] == 0 and loss[1] > 0
    assert not grad[0].any() and not grad[2].any() and grad[1].isfinite().all() and grad[1].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_undefined_features_are_undefined_losses(value, normalize, dtype):
    case = random_case(batch=3, pixels=20, channels=4, dtype=dtype, normalize=normalize, temperature=1.0)
    args, _ = case.arguments(case.leaves[0])
    args[1][2] = True  # a full mask gives no zero out of NaN
    with torch.no_grad():
        case.leaves[0][1:, 7, 2] = value
    for ours, theirs in zip(run(case, "cpu"), run(case, "reference"), strict=True):
        # Products of infinity are not all NaN in the reference's gradient; ours does not tell them apart.
        assert torch.equal(ours.isnan(), theirs.isnan() | (ours.dim() == 3) & ours.isnan())
        assert ours[1:].isnan().all() and ours[0].isfinite().all()


def test_views():
    """Any strides, and a gradient of the loss that is a view as well."""
    maps = torch.randn(4, 9, 8, 7)
    views = [maps[1::2, 1::3, :, 1:5], maps.permute(0, 3, 2, 1), maps[:1].expand(3, -1, -1, -1), maps[:, :, ::2, ::2]]
    views.append(maps[:, :, :1, :1].expand(-1, -1, 6, 6))
    for view in views:
        mask = torch.rand(view.shape[0], view.shape[3], view.shape[2]).transpose(1, 2) < 0.5
        assert not view.is_contiguous() and not mask.is_contiguous()
        results = []
        for features, inside in ((view, mask), (view.contiguous(), mask.contiguous())):
            leaf = features.detach().requires_grad_()
            with ops.backend("cpu"):
                loss = ops.pixel_contrastive_loss(leaf, inside)
                results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rows_and_planes_give_the_same_bits():
    for dtype in (torch.float32, torch.float64, *LOW):
        for channels in (3, 16, 21):
            rows, planes = (random_case(channels=channels, planes=p, dtype=dtype) for p in (False, True))
            for ours, theirs in zip(run(rows, "cpu"), run(planes, "cpu"), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("normalize", [True, False])
def test_same_bits_twice_and_whatever_the_threads(normalize):
    before = torch.get_num_threads()
    try:
        for batch, pixels in ((1, 1300), (5, 110)):  # one image on all threads; an image on each
            case = random_case(batch=batch, pixels=pixels, channels=9, normalize=normalize)
            torch.set_num_threads(1)
            expected = run(case, "cpu")
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for ours, theirs in zip(run(case, "cpu"), expected, strict=True):
                    assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_an_image_does_not_depend_on_the_others():
    case = random_case(batch=4, pixels=110)
    with ops.backend("cpu"):
        (together,) = case()
        (features, inside), kwargs = case.arguments(case.leaves[0])
        for index in range(4):
            image = slice(index, index + 1)
            assert ops.pixel_contrastive_loss(features[image], inside[image], **kwargs) == together[index]


def test_low_precision_is_computed_in_float32():
    for dtype in LOW:
        low = random_case(dtype=dtype)
        full = Case(low.operator, [low.leaves[0].detach().float().requires_grad_()], low.arguments)
        (loss, grad), (exact, exact_grad) = run(low, "cpu"), run(full, "cpu")
        assert torch.equal(loss, exact) and torch.equal(grad, exact_grad.to(dtype))


def test_registration_and_compile():
    case = contrastive_case(dtype=torch.bfloat16)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    forward = torch.ops.magnet_fast.pixel_contrastive_loss.default
    torch.library.opcheck(forward, (*arguments, "cpu"))
    _, kept = forward(*arguments, "cpu")
    backward = torch.ops.magnet_fast.pixel_contrastive_loss_backward.default
    for grad, wanted in ((torch.ones(3), True), (None, True), (torch.ones(3), False)):
        torch.library.opcheck(backward, (grad, *arguments[:2], kept, *arguments[2:], [wanted], "cpu"))
    torch.compiler.reset()
    compiled = torch.compile(lambda *leaves: case(*leaves), fullgraph=True, backend="aot_eager")
    with ops.backend("cpu"):
        for ours, theirs in zip(case.gradients(compiled), case.gradients(), strict=True):
            assert torch.equal(ours, theirs)


def test_runs_by_itself_and_without_the_reference(monkeypatch):
    """`auto` takes the kernel for what is trained in, in both passes."""
    ops.prove("cpu", (torch.float32, *LOW))  # by the reference, where tiles have to
    monkeypatch.setattr(implementation, "pixel_contrastive_loss_reference", None)
    for dtype in (torch.float32, *LOW):
        case = contrastive_case(dtype=dtype)
        assert ops.explain("pixel_contrastive_loss", *case.arguments(*case.leaves)[0]).chosen == "cpu"
        (grad,) = torch.autograd.grad(weighted_sum(case(*case.leaves)), case.leaves)
        assert grad.dtype == dtype and grad.isfinite().all()
