"""The products of a Linear in training: against float64, when they are taken, and what is kept of the measurement."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magnet_fast
from magnet_fast import ops
from magnet_fast.fast import accelerated
from magnet_fast.ops import _kept, _linear, _proof, _training_products, _trial
from magnet_fast.ops._linear import MeasuredLinear, PackedLinear, linear
from magnet_fast.ops._training_products import Products
from tests.onednn import needs_onednn

pytestmark = needs_onednn

SLOW = {name: (2e-3, 1e-3) for name in ("forward", "input_gradient", "weight_gradient")}  # MKL, that is
FAST = {name: (1e-3, 1e-3) for name in SLOW}


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path) -> None:
    """Nothing is known yet, and what is found is kept for this test."""
    monkeypatch.setenv(_trial.MODE_VARIABLE, "measure")
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(_training_products, "_found", {})


@pytest.fixture
def faster(monkeypatch) -> None:
    """oneDNN is faster at everything, and nothing is too small for it."""
    monkeypatch.setattr(_training_products, "_times", lambda: SLOW)
    monkeypatch.setattr(_training_products, "_FEWEST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(_linear, "_FEWEST_MULTIPLICATIONS", 1)
    _training_products.measured()


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that were computed so."""
    found = []
    compute = _training_products.linear
    monkeypatch.setattr(
        _training_products, "linear", lambda x, *rest: found.append(tuple(x.shape)) or compute(x, *rest)
    )
    return found


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(run: Callable[..., Tensor], leaves: list[Tensor | None], weights: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    out = run(*leaves)
    found = torch.autograd.grad((out * weights.to(out.dtype)).sum(), [leaf for leaf in leaves if leaf is not None])
    return [out.detach(), *found]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if activation is None else getattr(F, activation)(out)


def agree(ours: list[Tensor], plainly: list[Tensor], truth: list[Tensor]) -> None:
    for one, by_torch, exact in zip(ours, plainly, truth, strict=True):
        assert one.shape == by_torch.shape and one.dtype == by_torch.dtype
        assert _proof.share(one, by_torch, exact, torch.float32) <= 1


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(37, 48), (3, 700, 40), (2, 2, 1100, 33), (1, 16)])
def test_as_in_float64(shape: tuple[int, ...], with_bias: bool, activation: str | None, faster, taken) -> None:
    """Few rows, and so many that the weight's gradient is a convolution's."""
    outputs = 56
    leaves = [values(*shape), values(outputs, shape[-1], seed=1), values(outputs, seed=2) if with_bias else None]
    weights = values(*shape[:-1], outputs, seed=3)

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias, activation=activation)

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(x, weight, bias, activation)

    exact = results(by_torch, [leaf if leaf is None else leaf.double() for leaf in leaves], weights)
    agree(results(ours, leaves, weights), results(by_torch, leaves, weights), exact)
    assert taken == [shape]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 17, 2048, 5000])
def test_a_weights_gradient_of_any_number_of_rows(rows: int, threads: int) -> None:
    gradient, x = values(rows, 24), values(rows, 40, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = _training_products.weight_gradient(gradient, x)
        again = _training_products.weight_gradient(gradient, x)
    finally:
        torch.set_num_threads(before)
    agree([found], [gradient.t() @ x], [gradient.double().t() @ x.double()])
    assert torch.equal(found, again)


@pytest.mark.parametrize("some", list(itertools.product([False, True], repeat=3)))
def test_each_product_by_its_own_measurement(some: tuple[bool, ...], monkeypatch) -> None:
    """As many calls of oneDNN as there are products that it computes faster."""
    monkeypatch.setattr(_training_products, "_found", {torch.get_num_threads(): Products(*some, {})})
    monkeypatch.setattr(_training_products, "_FEWEST_MULTIPLICATIONS", 1)
    calls = []
    compute = _training_products._onednn
    monkeypatch.setattr(_training_products, "_onednn", lambda *given: calls.append(1) or compute(*given))
    convolve = _training_products.weight_gradient
    monkeypatch.setattr(_training_products, "weight_gradient", lambda *given: calls.append(1) or convolve(*given))
    leaves, weights = [values(2048, 24), values(16, 24, seed=1)], values(2048, 16, seed=2)
    exact = results(F.linear, [leaf.double() for leaf in leaves], weights)
    agree(results(linear, leaves, weights), results(F.linear, leaves, weights), exact)
    assert len(calls) == sum(some)


def test_views_and_slices(faster, taken) -> None:
    """A slice of a weight, rows that do not lie one after the other, a gradient that is one number."""
    wide, tall = values(20, 64, seed=1), values(24, 60)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x.t(), weight[:, 40:])

    def by_torch(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.t(), weight[:, 40:])

    weights = torch.ones(()).expand(60, 20)
    exact = results(by_torch, [tall.double(), wide.double()], weights)
    agree(results(ours, [tall, wide], weights), results(by_torch, [tall, wide], weights), exact)
    assert taken == [(60, 24)]


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_gradients_and_of_many_outputs(relu: bool, faster) -> None:
    x, weight = values(6, 5).requires_grad_(), values(4, 5, seed=1).requires_grad_()

    def twice(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad((run(x, weight, relu) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), [x, weight])

    def by_torch(x: Tensor, weight: Tensor, relu: bool) -> Tensor:
        return plain(x, weight, None, "relu" if relu else None)

    def ours(x: Tensor, weight: Tensor, relu: bool) -> Tensor:
        return _training_products.linear(x, weight, None, relu)

    torch.testing.assert_close(twice(ours), twice(by_torch))
    of_each = torch.eye(24).view(24, 6, 4)
    both = [
        torch.autograd.grad(run(x, weight, relu), [x, weight], of_each, is_grads_batched=True)
        for run in (ours, by_torch)
    ]
    torch.testing.assert_close(*both)


def test_only_what_is_asked_for_is_computed(faster, monkeypatch) -> None:
    monkeypatch.setattr(_training_products, "weight_gradient", None)
    x, weight, bias = values(30, 24).requires_grad_(), values(16, 24, seed=1), values(16, seed=2).requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(30, -1))
    torch.testing.assert_close(bias.grad, torch.full((16,), 30.0))


@pytest.mark.parametrize(
    "elsewhere", ["unmeasured", "guess", "deterministic", "autocast", "reference", "off", "float64", "small", "threads"]
)
def test_anywhere_else_pytorch_computes(elsewhere: str, faster, taken, monkeypatch) -> None:
    layer, x = MeasuredLinear(24, 16), values(30, 24)
    layer(x)
    assert taken == [(30, 24)]
    if elsewhere == "unmeasured":
        _training_products._found.clear()
    elif elsewhere == "guess":
        monkeypatch.setenv(_trial.MODE_VARIABLE, "guess")
    elif elsewhere == "off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    elif elsewhere == "float64":
        layer, x = layer.double(), x.double()
    elif elsewhere == "small":
        monkeypatch.undo()  # the sizes
    before = torch.get_num_threads()
    try:
        torch.use_deterministic_algorithms(elsewhere == "deterministic")
        torch.set_num_threads(before + (elsewhere == "threads"))
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=elsewhere == "autocast"),
            ops.backend("reference" if elsewhere == "reference" else "auto"),
        ):
            found, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert torch.equal(found, expected) and taken == [(30, 24)]


def test_transforms_and_compiled_graphs_have_pytorchs_own(faster, taken) -> None:
    layer, x = MeasuredLinear(24, 16), values(30, 24)
    torch.func.vmap(layer)(x[None])
    torch.func.grad(lambda x: layer(x).sum())(x)
    assert "aten.linear" in str(torch.export.export(layer, (x,)).graph)
    assert taken == []


def test_explain_says_so(faster) -> None:
    x, weight = values(30, 24), values(16, 24)
    assert ops.explain("linear", x, weight).chosen == "cpu"
    _training_products._found.clear()
    assert ops.explain("linear", x, weight).chosen == "reference"


# ---- The measurement ------------------------------------------------------------------------------------------------


def test_the_measurement_itself() -> None:
    """Of this machine: whatever it finds."""
    found = _training_products.measured()
    assert found is not None and found.seconds.keys() == SLOW.keys()
    assert all(0 < one < 10 for pair in found.seconds.values() for one in pair)
    for name, (mkl, onednn) in found.seconds.items():
        assert getattr(found, name) == (onednn < 0.85 * mkl)


def test_what_other_processes_take_does_not_decide(monkeypatch) -> None:
    """Of nine turns eight were interrupted, MKL's for the longer: the one that was not says which is the faster."""
    # A product's turns, MKL's and oneDNN's; before them is one that is not timed.
    clock, durations = [0.0], itertools.cycle([0.0, *[9.0, 6.0] * 8, 1.0, 2.0])
    reads = itertools.count()

    def now() -> float:
        clock[0] += next(durations) if next(reads) % 2 else 0.0
        return clock[0]

    monkeypatch.setattr(_training_products, "perf_counter", now)
    assert _training_products._times() == dict.fromkeys(SLOW, (1.0, 2.0))


def test_an_answer_is_kept_and_asked_again_when_the_machine_is_another(monkeypatch) -> None:
    times = [SLOW, FAST]
    monkeypatch.setattr(_training_products, "_times", lambda: times.pop(0))
    first = _training_products.measured()
    assert first.any and _training_products.measured() is first
    _training_products._found.clear()  # another process
    assert _training_products.measured() == first
    _training_products._found.clear()
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert not _training_products.measured().any and times == []


@pytest.mark.parametrize(
    "broken", [None, {}, {"forward": [1.0, 2.0]}, {**SLOW, "forward": [0.0, 1.0]}, {**SLOW, "forward": 3}]
)
def test_a_damaged_answer_is_none(broken, monkeypatch) -> None:
    monkeypatch.setattr(_training_products, "_times", lambda: SLOW)
    _training_products.measured()
    (file,) = (_kept.cache_folder() / _training_products.FOLDER).glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": broken}))
    _training_products._found.clear()
    monkeypatch.setattr(_training_products, "_times", lambda: FAST)
    assert not _training_products.measured().any
    assert json.loads(file.read_text())["seconds"] == {name: list(pair) for name, pair in FAST.items()}


def test_without_a_place_to_keep_it_an_answer_holds_for_its_process(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "file"))
    times = [SLOW]
    monkeypatch.setattr(_training_products, "_times", lambda: times.pop(0))
    assert _training_products.measured().any and _training_products.measured().any


# ---- accelerate -----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.few = nn.Linear(96, 64), nn.Linear(64, 96), nn.Linear(96, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.few(self.last(self.first(x).relu()))


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.children()]


def test_accelerate_and_the_way_back(faster, taken) -> None:
    model, x = Network(), values(50, 96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = magnet_fast.accelerate(model)
    assert kinds(model) == [MeasuredLinear, MeasuredLinear, nn.Linear]
    assert "measured to be the faster" in str(report) and len(report.replaced) == 2
    assert model.state_dict().keys() == before.keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(other) == kinds(model)
    model(x).sum().backward()
    assert taken == [(50, 96), (50, 64)]

    with accelerated(model, pack=True):
        assert kinds(model) == [PackedLinear] * 3
    assert kinds(model) == [MeasuredLinear, MeasuredLinear, nn.Linear]
    assert len(magnet_fast.accelerate(model).replaced) == 2
    magnet_fast.restore(model)
    assert kinds(model) == [nn.Linear] * 3


def test_where_pytorch_is_as_fast_nothing_is_replaced(monkeypatch) -> None:
    monkeypatch.setattr(_training_products, "_times", lambda: FAST)
    model = Network()
    assert magnet_fast.accelerate(model).modules == () and kinds(model) == [nn.Linear] * 3


def test_other_dtypes_devices_and_changed_layers_are_left_alone(faster) -> None:
    low, elsewhere, changed = Network().bfloat16(), Network().to("meta"), Network()
    changed.first.forward = lambda x: x
    for model in (low, elsewhere, changed):
        magnet_fast.accelerate(model)
    assert kinds(low) == kinds(elsewhere) == [nn.Linear] * 3 and kinds(changed)[0] is nn.Linear


def test_training_goes_as_it_did_and_repeats_its_bits(faster) -> None:
    def trained(accelerate: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Network()
        if accelerate:
            magnet_fast.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(5):
            loss = (model(values(700, 96, seed=step)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    first, again, plainly = trained(True), trained(True), trained(False)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    torch.testing.assert_close(first, plainly, rtol=1e-4, atol=1e-5)
