"""Chains of packed Linears: against float64 and PyTorch's own layers, and when they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from magnet_fast import accelerate, models, ops
from magnet_fast.ops import _cpu_backend, _linear_chain, _packed, _proof
from magnet_fast.ops._linear import pack_linear
from magnet_fast.ops._linear_chain import Step

_cpu = _cpu_backend.extension
DTYPES = [torch.float32, torch.bfloat16]


def needs(dtype: torch.dtype) -> None:
    if not _linear_chain._worthwhile(dtype):
        pytest.skip(f"no chains of {dtype} at level {_cpu.simd_level()}")


def make(dtype: torch.dtype, *widths: int, bias: bool = True, affine: bool = True) -> tuple[list, list]:
    """Packed Linears from width to width, and a LayerNorm for every width."""
    linears = [nn.Linear(c, d, bias=bias, dtype=dtype) for c, d in zip(widths, widths[1:], strict=False)]
    norms = [nn.LayerNorm(width, elementwise_affine=affine, dtype=dtype) for width in widths]
    for norm in norms if affine else []:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    for layer in linears:
        pack_linear(layer.requires_grad_(False))
    return linears, norms


def plainly(x: Tensor, steps: list[Step], residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """PyTorch's functions one after the other, in `dtype`."""
    outputs, y = [], x.to(dtype)

    def norm(layer: nn.LayerNorm, y: Tensor) -> Tensor:
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (layer.weight, layer.bias))
        return F.layer_norm(y, layer.normalized_shape, weight, bias, layer.eps)

    for step in steps:
        y = norm(step.before, y) if step.before else y
        bias = None if step.linear.bias is None else step.linear.bias.to(dtype)
        y = F.linear(y, step.linear.weight.to(dtype), bias)
        y = getattr(F, step.activation)(y) if step.activation else y
        if step.residual is not None:
            y = y + (residual.to(dtype) if step.residual == "given" else outputs[step.residual])
        y = norm(step.after, y) if step.after else y
        outputs.append(y)
    return y


def assert_agree(x: Tensor, steps: list[Step], residual: Tensor | None = None) -> None:
    with torch.no_grad():
        assert _linear_chain.runs(x, steps, residual)
        found = _linear_chain.run(x, steps, residual)
        truth, eager = (plainly(x, steps, residual, dtype) for dtype in (torch.float64, x.dtype))
    assert found.shape == truth.shape and found.dtype == x.dtype
    if found.numel():
        error, baseline = (found - truth).abs().max(), (eager - truth).abs().max()
        assert error <= 2 * baseline + 4e-6 * truth.abs().max()


def block(dtype: torch.dtype, channels: int, hidden: int, **options: bool) -> list[Step]:
    """What follows attention in a pre-norm block."""
    linears, norms = make(dtype, channels, channels, hidden, channels, **options)
    return [
        Step(linears[0], residual="given"),
        Step(linears[1], activation="gelu", before=norms[1]),
        Step(linears[2], residual=0),
    ]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}], ids=["all", "no bias", "no affine"])
@pytest.mark.parametrize("form", ["norm and projection", "pre-norm", "post-norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_models_use_it(dtype: torch.dtype, form: str, options: dict[str, bool]) -> None:
    needs(dtype)
    torch.manual_seed(0)
    linears, norms = make(dtype, 96, 96, 352, 96, **options)
    steps = {
        "norm and projection": [Step(linears[1], before=norms[1])],
        "pre-norm": block(dtype, 96, 352, **options),
        "post-norm": [
            Step(linears[0], residual="given", after=norms[0]),
            Step(linears[1], activation="relu"),
            Step(linears[2], residual=0, after=norms[3]),
        ],
    }[form]
    x, residual = (torch.randn(2, 11, 13, 96, dtype=dtype) for _ in range(2))
    assert_agree(3 * x + 1, steps, residual)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    check_any_sizes(data, data.draw(st.sampled_from(DTYPES), "dtype"))


def check_any_sizes(data: st.DataObject, dtype: torch.dtype) -> None:
    needs(dtype)
    torch.manual_seed(data.draw(st.integers(0, 9), "seed"))
    width = st.integers(1, 12).map(lambda n: 16 * n)
    steps, last = [], data.draw(width, "inputs")
    inputs, outputs = last, []
    for _ in range(data.draw(st.integers(1, 4), "layers")):
        wide = data.draw(width, "outputs")
        (linear,), norms = make(dtype, last, wide, bias=data.draw(st.booleans(), "bias"))
        sources = [None, *(index for index, other in enumerate(outputs) if other == wide)]
        source = data.draw(st.sampled_from(sources), "residual")
        activation = data.draw(st.sampled_from([None, "gelu", "relu"]), "activation") if source is None else None
        before, after = (norm if data.draw(st.booleans(), "norm") else None for norm in norms)
        steps.append(Step(linear, activation, source, before, after))
        outputs.append(wide)
        last = wide
    assert_agree(torch.randn(data.draw(st.integers(0, 230), "rows"), inputs, dtype=dtype), steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 700])
def test_thread_counts_agree_in_every_bit(dtype: torch.dtype, rows: int) -> None:
    needs(dtype)
    torch.manual_seed(0)
    (single,), _ = make(dtype, 64, 400)
    steps = block(dtype, 64, 256)
    x, residual = torch.randn(rows, 64, dtype=dtype), torch.randn(rows, 64, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append((_linear_chain.run(x, steps, residual), _linear_chain.run(x, [Step(single)])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    needs(dtype)
    torch.manual_seed(0)
    steps = block(dtype, 32, 64)
    wide = torch.randn(9, 101, dtype=dtype)
    for x in (wide[:, :32], wide[:, 1:33], wide[:1, :32].expand(9, -1), wide[:, :64:2], wide[:, :32].T.contiguous().T):
        assert_agree(x, steps, wide[:, 50:82])


@pytest.fixture
def level() -> Iterator[None]:
    before = _cpu.simd_level()
    yield
    _cpu.set_simd_level(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("name", _cpu.supported_simd_levels())
def test_every_level_and_element(name: str, dtype: torch.dtype, level: None) -> None:
    """Also those that no model takes: there oneDNN is faster."""
    _cpu.set_simd_level(name)
    torch.manual_seed(0)
    steps = block(dtype, 48, 176)
    x, residual = torch.randn(103, 48, dtype=dtype), torch.randn(103, 48, dtype=dtype)
    with torch.no_grad():
        found = _linear_chain.run(x, steps, residual)
        truth, eager = (plainly(x, steps, residual, kind) for kind in (torch.float64, dtype))
    error, baseline = (found - truth).abs().max(), (eager - truth).abs().max()
    assert error <= 2 * baseline + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _cpu.supported_simd_levels())
def test_gelu_far_out_and_not_a_number(name: str, dtype: torch.dtype, level: None) -> None:
    _cpu.set_simd_level(name)
    (linear,), _ = make(dtype, 16, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(16))
    x = torch.linspace(-12, 12, 20000).view(-1, 16).to(dtype)
    with torch.no_grad():
        found = _linear_chain.run(x, [Step(linear, activation="gelu")])
        truth = F.gelu(x.double())
        relative = 2e-6 if dtype == torch.float32 else 2**-8
        apart = (found - truth).abs() - relative * truth.abs()
        assert apart[x >= -3].max() <= (1e-7 if dtype == torch.float32 else 1e-6)
        assert apart.max() <= (5e-7 if dtype == torch.float32 else 2e-5)
        linear.weight.zero_()  # the bias alone: a row of infinities has no products
        linear.bias = nn.Parameter(torch.zeros(16, dtype=dtype), requires_grad=False)
        linear.bias[:5] = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, -100.0])
        edges = _linear_chain.run(torch.zeros(1, 16, dtype=dtype), [Step(linear, activation="gelu")])[0, :5]
    assert edges[0].isnan() and edges[1] == float("inf") and edges[2] == linear.bias[2]
    assert edges[3] == 0 and edges[4] == 0


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_not_a_number_stays_one(activation: str) -> None:
    needs(torch.float32)
    (linear,), norms = make(torch.float32, 16, 16)
    x = torch.zeros(3, 16)
    x[1, 4] = float("nan")
    for step in (Step(linear, activation=activation), Step(linear, before=norms[0]), Step(linear, after=norms[1])):
        with torch.no_grad():
            assert _linear_chain.run(x, [step]).isnan().all(1).tolist() == [False, True, False]


def test_changed_weights_are_seen() -> None:
    needs(torch.float32)
    torch.manual_seed(0)
    steps, x = block(torch.float32, 32, 64), torch.randn(5, 32)
    assert_agree(x, steps, x)
    copies = [_packed.in_chains(step.linear.weight) for step in steps]
    assert_agree(x, steps, x)
    assert all(_packed.in_chains(step.linear.weight) is copy for step, copy in zip(steps, copies, strict=True))
    with torch.no_grad():
        for step in steps:
            step.linear.weight.mul_(3)
            step.linear.bias.data.add_(1)  # read as it lies
    assert_agree(x, steps, x)


def a_hook(*_: object) -> None:
    return None


class Adapter(nn.Module):
    """A packed Linear and something added to it, with the attributes that adapters pass on."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.weight, self.bias = base, base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 1


def with_norm(steps: list[Step], norm: nn.Module) -> list[Step]:
    return [steps[0], steps[1]._replace(before=norm), steps[2]]


REFUSED = {
    "gradients": lambda x, steps: (x, steps),
    "a plain Linear": lambda x, steps: (x, [*steps, Step(nn.Linear(32, 32))]),
    "an adapter": lambda x, steps: (x, [Step(Adapter(steps[0].linear), residual="given"), *steps[1:]]),
    "a hook": lambda x, steps: (steps[1].linear.register_forward_hook(a_hook), (x, steps))[1],
    "a hook on a norm": lambda x, steps: (steps[1].before.register_forward_hook(a_hook), (x, steps))[1],
    "another dtype": lambda x, steps: (x.bfloat16(), steps),
    "another norm's dtype": lambda x, steps: (x, with_norm(steps, nn.LayerNorm(32, dtype=torch.bfloat16))),
    "a norm of two dimensions": lambda x, steps: (x, with_norm(steps, nn.LayerNorm((4, 32)))),
    "another norm": lambda x, steps: (x, with_norm(steps, type("Other", (nn.LayerNorm,), {})(32))),
    "no LayerNorm": lambda x, steps: (x, with_norm(steps, nn.Identity())),
    "odd width": lambda x, steps: (x, [*steps, Step(make(torch.float32, 32, 24)[0][0])]),
    "float64": lambda x, steps: (x.double(), [step for step in steps if step.linear.double()]),
    "meta": lambda x, steps: (x.to("meta"), steps),
    "the reference": lambda x, steps: (x, steps),
    "autocast": lambda x, steps: (x, steps),
}


@pytest.mark.parametrize("case", REFUSED)
def test_left_to_pytorch(case: str) -> None:
    needs(torch.float32)
    steps, given = block(torch.float32, 32, 64), torch.randn(5, 32)
    with torch.no_grad():
        assert _linear_chain.runs(given, steps, given) and not _linear_chain.runs(given, steps, given.bfloat16())
    x, taken = REFUSED[case](torch.randn(5, 32), steps)
    context = torch.autocast("cpu") if case == "autocast" else ops.backend("reference" if "ref" in case else "auto")
    with torch.set_grad_enabled(case == "gradients"), context:
        assert not _linear_chain.runs(x, taken)


def test_an_adapter_in_a_block_is_called() -> None:
    """Around each of a block's Linears, and of a pixel decoder layer's: its answer is not lost."""
    needs(torch.float32)
    from magnet_fast.models.encoders.swin import SwinBlock
    from magnet_fast.models.heads.pixel_decoder import DeformableLayer

    torch.manual_seed(0)
    swin, layer = SwinBlock(32, 2, 4, 0, 0.0), DeformableLayer(32, 2, 1, 4, 64)
    inputs = {
        swin: (torch.randn(1, 8, 8, 32),),
        layer: (torch.randn(1, 64, 32), torch.randn(1, 64, 32), torch.rand(64, 2), [(8, 8)]),
    }
    places = [(swin.attention, "qkv"), (swin.attention, "proj"), (swin.mlp, "fc1"), (swin.mlp, "fc2")]
    places += [(layer.attention, "output_proj"), (layer, "linear1"), (layer, "linear2")]
    for model in (swin, layer):
        accelerate(model.eval().requires_grad_(False), pack=True)
    for parent, name in places:
        model, plain = (layer if parent in (layer, layer.attention) else swin), getattr(parent, name)
        setattr(parent, name, Adapter(plain))
        with torch.no_grad():
            found = model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs[model]))
            with ops.backend("reference"):
                expected = model(*inputs[model])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        setattr(parent, name, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    check_nan_stays_in_its_row(dtype)


def check_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    needs(dtype)
    torch.manual_seed(0)
    steps, x, residual = block(dtype, 64, 144), torch.randn(50, 64, dtype=dtype), torch.randn(50, 64, dtype=dtype)
    x[3, 5], x[40, 0] = torch.nan, torch.inf
    with torch.no_grad():
        bad = ~_linear_chain.run(x, steps, residual).isfinite().all(dim=1)
    assert bad.nonzero().flatten().tolist() == [3, 40]


def test_bfloat16_is_left_to_tiles(monkeypatch) -> None:
    """Where the processor has them: oneDNN uses them whatever our own level is."""

    class Stub:
        level = "avx512_bf16"

        def simd_level(self) -> str:
            return self.level

        def supported_simd_levels(self) -> list[str]:
            return ["amx", "avx512_bf16"]

    stub = Stub()
    monkeypatch.setattr(_cpu_backend, "extension", stub)
    monkeypatch.setattr(_cpu_backend, "missing", None)
    assert not _linear_chain._worthwhile(torch.bfloat16) and _linear_chain._worthwhile(torch.float32)
    stub.level = "amx"
    assert _linear_chain._worthwhile(torch.bfloat16)


@pytest.mark.skipif(_cpu is None or _cpu.simd_level() != "amx", reason="no tiles here")
def test_tiles_prove_themselves_first(monkeypatch, tmp_path) -> None:
    """A chain that is wrong on this machine is not taken, and one warning says so."""
    (linear,), _ = make(torch.bfloat16, 32, 32)
    x, steps = torch.randn(3, 32, dtype=torch.bfloat16), [Step(linear)]
    monkeypatch.setenv("MAGNET_FAST_PROOF", "again")
    monkeypatch.setenv("MAGNET_FAST_CACHE", str(tmp_path))
    with torch.no_grad():
        monkeypatch.setattr(_proof, "_verdicts", {})
        assert _linear_chain.runs(x, steps)
        monkeypatch.setattr(_proof, "_verdicts", {})
        right = _linear_chain.run
        monkeypatch.setattr(_linear_chain, "run", lambda *args: right(*args) * 1.1)
        with pytest.warns(UserWarning, match="cpu kernel of linear_chain gives wrong results in bfloat16"):
            assert not _linear_chain.runs(x, steps)
        assert not _linear_chain.runs(x, steps)
        monkeypatch.setenv("MAGNET_FAST_PROOF", "skip")
        assert _linear_chain.runs(x, steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_take_it(dtype: torch.dtype, monkeypatch) -> None:
    """Every Swin block twice, every layer of the pixel decoder once; and the outputs stay what they were."""
    needs(dtype)
    torch.manual_seed(0)
    model = models.create("magnet_tiny").eval().requires_grad_(False).to(dtype)
    inputs = (torch.randn(1, 3, 96, 96), torch.randint(5, 100, (1, 7)), torch.ones(1, 7, dtype=torch.long))
    assert _proof.proved(_linear_chain.OPERATOR, dtype, lambda: _linear_chain.check(dtype))  # by calls of its own
    ran, original = [], _linear_chain.run
    monkeypatch.setattr(_linear_chain, "run", lambda *given, **named: ran.append(given) or original(*given, **named))
    with torch.no_grad():
        expected = model.predict(*inputs)
        assert ran == []
        accelerate(model, pack=True)
        found = model.predict(*inputs)
        blocks, layers = sum(model.config.image.depths), model.config.head.pixel_layers
        assert len(ran) == 2 * blocks + layers
    apart = (found.float() - expected.float()).abs().max() / expected.abs().max()
    assert apart <= (1e-4 if dtype == torch.float32 else 5e-2)


def test_a_block_that_is_watched_calls_its_parts() -> None:
    needs(torch.float32)
    from magnet_fast.models.encoders.swin import SwinBlock

    block_, seen = SwinBlock(32, 2, 4, 0, 0.0).eval().requires_grad_(False), []
    accelerate(block_, pack=True)
    x = torch.randn(1, 8, 8, 32)
    with torch.no_grad():
        expected = block_(x)
        for part in (block_.attention, block_.mlp, block_.norm2, block_.mlp.fc1):
            handle = part.register_forward_hook(lambda module, *_: seen.append(module))
            torch.testing.assert_close(block_(x), expected)
            handle.remove()
    assert seen == [block_.attention, block_.mlp, block_.norm2, block_.mlp.fc1]


def test_sizes_that_do_not_fit() -> None:
    steps = block(torch.float32, 32, 64)
    x = torch.randn(5, 32)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"x: expected \(5, 32\) of torch.float32, got \(5, 16\) of"):
            _linear_chain.run(x[:, :16], steps, x)
        for wrong in (x[:, :16], x[:3], x.bfloat16(), None):
            with pytest.raises(ValueError, match=r"residual: expected \(5, 32\) of torch.float32, got"):
                _linear_chain.run(x, steps, wrong)
        with pytest.raises(ValueError, match=r"layers\[1\].in: expected the outputs of the layer before it"):
            _linear_chain.run(x, [steps[0], steps[2]], x)
        with pytest.raises(ValueError, match="before: expected a norm of 64 channels"):
            _linear_chain.run(x, [steps[0], steps[1], steps[2]._replace(before=steps[1].before)], x)
        with pytest.raises(ValueError, match=r"layers\[0\].activation: expected 0 where there is a residual"):
            _linear_chain.run(x, [steps[0]._replace(activation="gelu")], x)
        with pytest.raises(ValueError, match=r"layers\[0\].residual"):
            _linear_chain.run(x, [steps[0]._replace(residual=0)])
        with pytest.raises(ValueError, match=r"layers\[2\].residual: expected a layer of as many outputs"):
            _linear_chain.run(x, [*steps[:2], steps[2]._replace(residual=1)], x)


WRONG = {
    "x": ({"x": (0, (1, 16), (16, 1), 0)}, "x: expected the address of a tensor"),
    "x misaligned": ({"x": (65, (1, 16), (16, 1), 0)}, "x: expected an address aligned for its dtype"),
    "x missing": ({"x": None}, "x: expected a tensor of 2 dimensions"),
    "y": ({"y": (0, (1, 16), (16, 1), 0)}, "y: expected the address of a tensor"),
    "y sizes": ({"y": (64, (1, 24), (24, 1), 0)}, "y: expected size 16 in dimension 1, got 24"),
    "rows": ({"x": (64, (-1, 16), (16, 1), 0)}, "x: expected sizes of at least 0"),
    "threads": ({"threads": 0}, "threads: expected 1 .. 4096"),
    "layers": ({"layers": []}, "layers: expected at least one"),
    "apart": ({"x": (64, (2, 16), (-16, 1), 0), "y": (64, (2, 16), (16, 1), 0)}, "x: expected strides of at least 0"),
    "strided": ({"x": (64, (1, 16), (16, 2), 0)}, "x: expected stride 1 in dimension 1, got 2"),
    # 17 is a multiple of no level's step: with 24, which AVX2 takes, the call would go on to the addresses.
    "width": (
        {"layers": [(16, 17, 64, 0, 0, -2, (0, 0, -1.0), (0, 0, -1.0))], "y": (64, (1, 17), (17, 1), 0)},
        "out: expected a multiple of",
    ),
    "weight": ({"layers": [(16, 16, 0, 0, 0, -2, (0, 0, -1.0), (0, 0, -1.0))]}, r"layers\[0\].weight: expected the"),
    "weight misaligned": ({"layers": [(16, 16, 80, 0, 0, -2, (0, 0, -1.0), (0, 0, -1.0))]}, "aligned to 64 bytes"),
    "activation": ({"layers": [(16, 16, 64, 0, 3, -2, (0, 0, -1.0), (0, 0, -1.0))]}, r"layers\[0\].activation"),
    "norm": ({"layers": [(16, 16, 64, 0, 0, -2, (0, 0, float("nan")), (0, 0, -1.0))]}, r"layers\[0\].before"),
    "residual": (
        {"layers": [(16, 16, 64, 0, 0, -1, (0, 0, -1.0), (0, 0, -1.0))]},
        "residual: expected a",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_extension_checks_again(case: str) -> None:
    changes, message = WRONG[case]
    layer = (16, 16, 64, 0, 0, -2, (0, 0, -1.0), (0, 0, -1.0))
    row = (64, (1, 16), (16, 1), 0)
    arguments = {"x": row, "residual": None, "y": row}
    with pytest.raises(ValueError, match=message):
        _cpu.linear_chain_forward(**({**arguments, "threads": 1, "layers": [layer]} | changes))


def test_packing_checks_its_arguments() -> None:
    assert _cpu.linear_chain_packed_bytes(dtype=0, inputs=32, outputs=48) == 32 * 48 * 4
    with pytest.raises(ValueError, match="in: expected a multiple of"):
        _cpu.linear_chain_packed_bytes(dtype=0, inputs=33, outputs=48)
    with pytest.raises(ValueError, match="out: expected 1 .."):
        _cpu.linear_chain_packed_bytes(dtype=0, inputs=32, outputs=0)
    with pytest.raises(ValueError, match="packed: expected an address aligned to 64 bytes"):
        _cpu.linear_chain_pack(weight_ptr=64, dtype=0, inputs=32, outputs=32, packed_ptr=80)
