"""What is written to packed weights behind PyTorch's back: seen, and packed again."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magnet_fast
from magnet_fast.ops import _linear, _packed
from tests.onednn import needs_onednn

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_FEWEST_MULTIPLICATIONS", 0)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def other() -> Tensor:
    return values(48, 40, seed=5)


def numpy_write(weight: Tensor) -> None:
    weight.detach().numpy()[...] *= 2


def swapped(weight: nn.Parameter) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(other()))


def optimised(weight: nn.Parameter) -> None:
    for held in (weight, weight.data):
        held.grad = torch.ones_like(held)
        torch.optim.AdamW([held], lr=0.1, foreach=True).step()


def shared(weight: Tensor) -> None:
    torch.from_dlpack(weight.detach()).mul_(3)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "added to data": lambda weight: weight.data.add_(0.1 * other()),
    "data assigned in place": lambda weight: weight.data.__iadd__(0.1 * other()),
    "data copied": lambda weight: weight.data.copy_(other()),
    "data scaled": lambda weight: weight.data.mul_(0.5),
    "other data": lambda weight: setattr(weight, "data", other()),
    "average": lambda weight: weight.data.lerp_(other(), 0.01),
    "rows": lambda weight: weight.data[16:32].neg_(),
    "columns": lambda weight: weight.data[:, 10:20].zero_(),
    "numpy": numpy_write,
    "shared memory": shared,
    "swapped": swapped,
    "detached": lambda weight: weight.detach().add_(1),
    "optimiser": optimised,
    "inference mode": lambda weight: torch.inference_mode()(weight.add_)(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    layer = nn.Sequential(nn.Linear(40, 48))
    x = values(30, 40)
    magnet_fast.accelerate(layer, pack=True)
    with torch.no_grad():
        before = layer(x)
        for _ in range(2):  # twice: what is packed again is compared with what it is now
            CHANGES[change](layer[0].weight)
            after = layer(x)
            torch.testing.assert_close(after, F.linear(x, layer[0].weight, layer[0].bias), rtol=1e-4, atol=1e-4)
    assert _packed.keeps(layer[0].weight) and change != "none" and before.shape == after.shape


def test_what_one_call_does_not_compare_the_next_ones_do() -> None:
    layer = nn.Linear(40, 64).requires_grad_(False)
    magnet_fast.accelerate(layer, pack=True)
    x = values(3, 40)
    with torch.no_grad():
        layer(x)
        layer.weight.data[8:16].neg_()
        found = [torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5) for _ in range(9)]
    assert found[-1] and found == sorted(found)


def test_a_layer_changed_back_and_forth_and_a_weight_that_two_share() -> None:
    one, two = nn.Linear(40, 40), nn.Linear(40, 40)
    two.weight = one.weight
    both = nn.Sequential(one, two)
    magnet_fast.accelerate(both, pack=True)
    x = values(30, 40)
    with torch.no_grad():
        for factor in (2.0, 0.5, -1.0, -1.0):
            one.weight.data.mul_(factor)
            expected = F.linear(F.linear(x, one.weight, one.bias), one.weight, two.bias)
            torch.testing.assert_close(both(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (300, 1), (96, 96), (96, 384), (3 * 128, 128), (1000, 7), (4, 1024)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compared_values_stand_in_many_rows_and_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.zeros(shape, dtype=dtype)
    view = _packed._compared(weight)
    assert len(view) <= 5 * _packed._COMPARED and not view.flags.writeable and view.itemsize == weight.element_size()
    numbers = torch.arange(weight.numel(), dtype=torch.int32 if dtype == torch.float32 else torch.int16)
    weight.view(numbers.dtype).view(-1).copy_(numbers)
    flat = np.array([int(number) for number in view]) % (1 << 8 * view.itemsize)
    rows, columns = flat // shape[1], flat % shape[1]
    if dtype == torch.float32 or weight.numel() < 1 << 15:
        assert len(set(rows)) >= min(shape[0], _packed._COMPARED) * 0.9
        assert len(set(columns)) >= min(shape[1], len(view)) * 0.5
        assert flat.max() >= weight.numel() - math.ceil(weight.numel() / len(view)) - 1


def test_swapping_a_packed_weight_is_allowed_and_the_old_copies_go() -> None:
    layer = nn.Linear(40, 48)
    magnet_fast.accelerate(layer, pack=True)
    with torch.no_grad():
        layer(values(30, 40))
        layer.load_state_dict({"weight": other(), "bias": layer.bias.detach()}, assign=True)
        torch.testing.assert_close(layer(values(30, 40)), F.linear(values(30, 40), other(), layer.bias))
        assert not _packed.keeps(layer.weight)  # another parameter: read where it lies,
        magnet_fast.accelerate(layer, pack=True)
        assert _packed.keeps(layer.weight) and _packed._copies[layer] == {}  # until it is packed itself


# ---- Adapters ----------------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)).eval()


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 24)).eval()


@pytest.mark.parametrize("when", ["packed first", "adapted first"])
def test_merged_unmerged_and_unloaded_adapters(when: str) -> None:
    """With the adapter added after packing, its base layers are packed ones."""
    x = values(30, 40)
    with torch.no_grad():
        truth = adapted(small())(x)
        plain = small()(x)
        model = small()
        if when == "packed first":
            magnet_fast.accelerate(model, pack=True)
            model(x)
        model = adapted(model)
        if when == "adapted first":
            magnet_fast.accelerate(model, pack=True)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(model(x), truth, **close)
        for _ in range(2):
            model.merge_adapter()
            torch.testing.assert_close(model(x), truth, **close)
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), truth, **close)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain, **close)
        model.merge_adapter()
        with model.disable_adapter():  # unmerges
            torch.testing.assert_close(model(x), plain, **close)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), truth, **close)
        assert not torch.allclose(truth, plain, atol=1e-2)


def test_merged_into_frozen_weights_of_a_whole_model() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import SwinForImageClassification

    from . import zoo

    torch.manual_seed(0)
    model = SwinForImageClassification(zoo.swin_config(num_labels=3)).eval()
    magnet_fast.accelerate(model, pack=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
        names = ["q_proj", "v_proj", "fc1", "fc2"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
        before = model(x).logits
        model.merge_adapter()
        torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-4)
