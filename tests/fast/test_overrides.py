"""What was put on a module, or around it, from outside runs as in the plain model: called as often, same results.

Every part of every replaced module, in every family, one kind of part at a time.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import magnet_fast
from magnet_fast.fast._replacement import upstream_class
from magnet_fast.ops import _observed

from ..models.cases import SMALL
from . import own, zoo

pytestmark = pytest.mark.slow

# Others choose queries by their scores, and the last bit of one makes another choice.
FAMILIES = ("timm", "torchvision", "Swin", "MaskFormer", "Donut", "CLAP", "Deformable DETR", "SAM", "timm SAM")
OWN = {
    "magnet_tiny": SMALL["magnet"][1],
    "magnet_tiny xmha": SMALL["magnet-xmha"][1],
    "lavt_tiny": SMALL["lavt"][1],
}
NAMES = (*FAMILIES, *OWN)


@dataclass(frozen=True)
class Subject:
    """A model, and one call of it."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], list[Tensor]]

    def accelerated(self, pack: bool = False) -> nn.Module:
        model = self.build()
        assert magnet_fast.accelerate(model, pack=pack).replaced
        return model


@functools.cache
def subject(name: str) -> Subject:
    if name in FAMILIES:
        family = zoo.FAMILIES[name]
        inputs = family.inputs(family.odd)
        return Subject(lambda: family.model(family.odd).eval(), lambda model: zoo.call(model, inputs))
    image = own.values(2, 3, 36, 44).float()
    kind = name.split()[0]
    return Subject(lambda: own.model(kind, **OWN[name]), lambda model: own.outputs(model, image))


@functools.cache
def parts(name: str) -> dict[str, tuple[str, ...]]:
    """Of every replaced module and of what is inside: the last part of its name, and the names of all that share it."""
    found: dict[str, list[str]] = {}
    model = subject(name).accelerated()
    for root, module in model.named_modules():
        if upstream_class(module) is None:
            continue
        for path, _ in module.named_modules(prefix=root):
            last = path.rpartition(".")[2]
            names = found.setdefault("*" if last.isdigit() else last, [])
            if path not in names:
                names.append(path)
    return {kind: tuple(names) for kind, names in found.items()}


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Plain, and accelerated and packed: changed by a test, and changed back."""
    return subject(name).build(), subject(name).accelerated(pack=True)


Change = Callable[[nn.Module, Counter], Callable[[], None]]
"""Changes a model so that calls are counted; returns what changes it back."""


def compare(name: str, change: Change, what: str = "", recorded: bool = False) -> int:
    """The plain and the accelerated model after the same change; returns how many calls it counted."""
    seen = []
    for model in pair(name):
        counted: Counter = Counter()
        undo = change(model, counted)
        try:
            with torch.set_grad_enabled(recorded):
                seen.append(([out.detach() for out in subject(name).call(model)], dict(counted)))
        finally:
            undo()
    (expected, times), (found, ours) = seen
    assert ours == times, what
    close(found, expected, what)
    return sum(times.values())


def close(found: list[Tensor], expected: list[Tensor], what: str = "") -> None:
    for ours, theirs in zip(found, expected, strict=True):
        atol = 2e-3 * float(theirs.abs().max()) + 1e-5
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=atol, msg=lambda text: f"{what}: {text}")


def put(modules: list[nn.Module], way: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Do something to these modules; returns what undoes it."""
    before = [set(vars(module)) for module in modules]
    for module in modules:
        way(module)

    def undo() -> None:
        for module, names in zip(modules, before, strict=True):
            for name in set(vars(module)) - names:
                delattr(module, name)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    return undo


def scaled(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result * 0.8 if result.is_floating_point() else result
    return (scaled(result[0]), *result[1:]) if isinstance(result, tuple) and type(result) is tuple else result


def by_lambda(module: nn.Module, count: Callable[[], None]) -> None:
    old = module.forward
    module.forward = lambda *a, **k: (count(), scaled(old(*a, **k)))[1]


def by_method(module: nn.Module, count: Callable[[], None]) -> None:
    """Bound to the module, as notebooks do it."""
    old = type(module).forward

    def forward(self: nn.Module, *a: Any, **k: Any) -> Any:
        count()
        return scaled(old(self, *a, **k))

    module.forward = types.MethodType(forward, module)


def by_partial(module: nn.Module, count: Callable[[], None]) -> None:
    def forward(old: Callable, *a: Any, **k: Any) -> Any:
        count()
        return scaled(old(*a, **k))

    module.forward = functools.partial(forward, module.forward)


def by_hook(module: nn.Module, count: Callable[[], None]) -> None:
    module.register_forward_hook(lambda _, given, result: (count(), scaled(result))[1])


def by_hook_before(module: nn.Module, count: Callable[[], None]) -> None:
    module.register_forward_pre_hook(lambda _, given: count())


WAYS = {
    "forward": by_lambda,
    "method": by_method,
    "partial": by_partial,
    "hook": by_hook,
    "hook before": by_hook_before,
}


def each_part(name: str, way: Callable[[nn.Module, Callable[[], None]], None], recorded: bool = False) -> int:
    calls = 0
    for kind, paths in parts(name).items():

        def change(model: nn.Module, counted: Counter, paths: tuple[str, ...] = paths) -> Callable[[], None]:
            modules = {model.get_submodule(path): path for path in paths}
            return put(list(modules), lambda module: way(module, lambda: counted.update([modules[module]])))

        calls += compare(name, change, kind, recorded)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_forward_replaced_on_each_part(name: str) -> None:
    assert each_part(name, by_lambda) >= 4


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_replaced_on_each_part_while_gradients_are_recorded(name: str) -> None:
    assert each_part(name, by_lambda, recorded=True) >= 4


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("name", ["timm", "Donut"])
def test_other_ways_to_replace_it(name: str, way: str) -> None:
    assert each_part(name, WAYS[way]) > 20


def methods_of(name: str) -> dict[str, tuple[str, ...]]:
    """Every other method of every replaced module and of its parts: its name, and the modules that have it."""
    model, found = pair(name)[0], {}
    for path in (path for paths in parts(name).values() for path in paths):
        module = model.get_submodule(path)
        if type(module).__module__.partition(".")[0] != "torch":
            for method in _observed._methods(type(module))[0]:
                found.setdefault(f"{type(module).__name__}.{method}", {})[path] = None
    return {key: tuple(paths) for key, paths in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_other_methods_replaced_on_each_part(name: str) -> None:
    calls = 0
    for key, paths in methods_of(name).items():
        method = key.rpartition(".")[2]

        def way(module: nn.Module, counted: Counter, method: str = method) -> None:
            old = getattr(module, method)
            setattr(module, method, lambda *a, **k: (counted.update([method]), old(*a, **k))[1])

        def change(model: nn.Module, counted: Counter, paths=paths, way=way) -> Callable[[], None]:
            return put([model.get_submodule(path) for path in paths], lambda module: way(module, counted))

        calls += compare(name, change, key)
    assert calls > 0 or name in ("Deformable DETR", "timm SAM")  # whose modules call no other of their methods


@pytest.mark.parametrize("name", NAMES)
def test_forward_replaced_in_a_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package, or a notebook, patches `WindowAttention.forward` for all modules there are."""
    model = pair(name)[0]
    classes = {type(model.get_submodule(path)) for paths in parts(name).values() for path in paths}
    classes = {cls for cls in classes if "forward" in vars(cls) and cls.__module__.partition(".")[0] != "torch"}
    for cls in sorted(classes | {nn.Linear, nn.LayerNorm}, key=lambda cls: cls.__name__):
        old = cls.forward

        def change(model: nn.Module, counted: Counter, cls: type = cls, old: Any = old) -> Callable[[], None]:
            def forward(self: nn.Module, *a: Any, **k: Any) -> Any:
                counted.update(["calls"])
                return scaled(old(self, *a, **k))

            monkeypatch.setattr(cls, "forward", forward)
            return monkeypatch.undo

        compare(name, change, cls.__name__)


def _scaling(old: Callable) -> Callable:
    if len(inspect.signature(old).parameters) == 2:
        return lambda self, x: old(self, x) * 0.8
    return lambda self, x, mask=None: old(self, x, mask) * 0.8


def test_a_class_that_is_changed_already(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention

    for cls, replaced in ((SwinTransformerBlock, 0), (WindowAttention, 4)):
        model, fast = subject("timm").build(), subject("timm").build()
        _observed._methods.cache_clear()  # as if it had never been seen otherwise
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(cls, "forward", _scaling(cls.forward))
            report = magnet_fast.accelerate(fast)
            close(subject("timm").call(fast), subject("timm").call(model))
        assert len(report.replaced) == replaced
        remarks = {module.remark for module in report.left_alone}
        assert remarks == (set() if replaced else {"a method was replaced, on the module itself or in its class"})


@pytest.mark.parametrize("name", [*zoo.FAMILIES, *OWN])
def test_nothing_plain_counts_as_replaced(name: str) -> None:
    """Or the fast forms would never run, and nobody would notice."""
    model = zoo.FAMILIES[name].model() if name in zoo.FAMILIES else subject(name).build()
    assert not any(_observed._overridden(module) for module in model.modules())
    magnet_fast.accelerate(model, pack=True)
    assert not any(_observed._overridden(module) for module in model.modules())


# ---- Around the model ---------------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    """How often each function of PyTorch's is called."""

    def __init__(self, counted: Counter) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name not in ("__get__", "dim", "stride"):  # looking at a tensor computes nothing
            self.counted.update([name])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_modes_and_hooks_for_all_modules_see_the_plain_model(name: str) -> None:
    def functions(model: nn.Module, counted: Counter) -> Callable[[], None]:
        mode = Functions(counted)
        mode.__enter__()
        return lambda: mode.__exit__(None, None, None)

    def hooks(model: nn.Module, counted: Counter) -> Callable[[], None]:
        register = nn.modules.module.register_module_forward_hook
        return register(lambda module, *_: counted.update([_plain_name(module)])).remove

    assert compare(name, functions) > 50
    assert compare(name, hooks) > 20


def _plain_name(module: nn.Module) -> str:
    return (upstream_class(module) or type(module)).__name__


@pytest.mark.parametrize("name", NAMES)
def test_counted_operations(name: str) -> None:
    counts = []
    for model in pair(name):
        model.requires_grad_(False)  # else PyTorch's counter wants gradients to be recorded
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            subject(name).call(model)
        model.requires_grad_(True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_default_device_is_no_reason_to_run_the_original() -> None:
    with torch.device("cpu"):
        assert not _observed.watched()
    with Functions(Counter()):
        assert _observed.watched()


# ---- Offloaded weights ---------------------------------------------------------------------------------------------


def offloaded(model: nn.Module, way: str, folder: str) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook

    if way == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif way == "disk":
        disk_offload(model, folder, execution_device="cpu")
    elif way == "dispatched":
        dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    elif way == "aligned":
        attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=dict(model.state_dict()))
    else:
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))


@pytest.mark.parametrize("way", ["cpu", "disk", "dispatched", "aligned", "each"])
@pytest.mark.parametrize("name", ["timm", "Swin", "magnet_tiny", "lavt_tiny"])
def test_offloaded_by_hugging_face(name: str, way: str, tmp_path) -> None:
    pytest.importorskip("accelerate")
    made = subject(name)
    with torch.no_grad():
        expected = made.call(made.build())
        for first in ("accelerated", "offloaded"):
            model = made.build()
            steps = [lambda model=model: magnet_fast.accelerate(model, pack=True)]
            steps.insert(
                first == "accelerated", lambda model=model, first=first: offloaded(model, way, tmp_path / first)
            )
            for step in steps:
                step()
            close(made.call(model), expected)


# ---- Other modules and other weights in the place of parts -----------------------------------------------------------


class Wrapped(nn.Module):
    """Another module in the place of a part, without any of its attributes."""

    def __init__(self, part: nn.Module, count: Callable[[], None]) -> None:
        super().__init__()
        self.part, self.count = part, count

    def forward(self, *a: Any, **k: Any) -> Any:
        self.count()
        return scaled(self.part(*a, **k))


@pytest.mark.parametrize("name", ["timm", "Swin", "Donut", "Deformable DETR", *OWN])
def test_other_modules_in_the_place_of_parts(name: str) -> None:
    """Of those whose attributes nobody else reads: the plain model says which."""
    calls = 0
    for kind, paths in parts(name).items():

        def change(model: nn.Module, counted: Counter, paths: tuple[str, ...] = paths) -> Callable[[], None]:
            old = {path: model.get_submodule(path) for path in paths}
            parents = {path: model.get_submodule(path.rpartition(".")[0]) for path in paths}

            def place(of: Callable[[str], nn.Module]) -> None:
                for path, parent in parents.items():
                    setattr(parent, path.rpartition(".")[2], of(path))

            place(lambda path: Wrapped(old[path], lambda: counted.update([path])))
            model.train().eval()  # both reach every part
            return lambda: place(old.__getitem__)

        undo = change(pair(name)[0], Counter())
        try:
            with torch.no_grad():
                subject(name).call(pair(name)[0])
        except (AttributeError, TypeError):
            continue
        finally:
            undo()
        calls += compare(name, change, kind)
    assert calls > 10


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["pruned", "weight norm", "spectral norm", "parametrised"])
@pytest.mark.parametrize("name", ["timm", "Swin", "magnet_tiny"])
def test_weights_that_are_computed(name: str, way: str) -> None:
    from torch.nn.utils import parametrizations, prune
    from torch.nn.utils import weight_norm as old_weight_norm

    made = subject(name)
    model = made.build()
    for path in {path: None for paths in parts(name).values() for path in paths}:
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear):
            continue
        if way == "pruned":
            prune.l1_unstructured(layer, "weight", amount=0.5)
        elif way == "weight norm":
            old_weight_norm(layer)
            layer.weight_g.data.mul_(0.5)
        elif way == "spectral norm":
            parametrizations.spectral_norm(layer)
        else:
            nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with torch.no_grad():
        expected = made.call(model)
        magnet_fast.accelerate(model, pack=True)
        close(made.call(model), expected)
