"""NaN is no answer: which layer, parameter or input it begins with; infinite logits are one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

from magnet_fast import models
from magnet_fast.data import Tokenizer
from magnet_fast.evaluation import evaluate
from magnet_fast.evaluation.finite import nan_answers, where_nan_begins
from magnet_fast.fast import accelerate
from magnet_fast.models.contract import Prediction, Text, probability

from .fakes import FakeDataset, FakeModel

NAN, INF = torch.nan, torch.inf


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.create("lavt_tiny", input={"size": 32}).eval()


def asked() -> tuple:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), Tokenizer()("the red circle")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("layer", ["image_encoder.stages.1.blocks.0.mlp.fc1", "fusion.stages.0.gate.last"])
def test_the_first_layer_is_named(model, layer: str, autocast, value: float, fast: bool) -> None:
    if fast:
        accelerate(model)
    hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: output * value)
    found = where_nan_begins(model, *asked(), autocast=autocast)
    assert f"first layer whose output is not finite is {layer} (Linear); its weights are finite" in found
    hook.remove()
    assert "its answer is a number" in where_nan_begins(model, *asked(), autocast=autocast)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_and_inputs_are_looked_at_first(model) -> None:
    name = "image_encoder.stages.0.blocks.0.mlp.fc2"
    image, text = asked()
    with torch.no_grad():
        model.get_submodule(name).bias[3] = INF
        assert f"{name} (Linear); its bias is infinite" in where_nan_begins(model, image, text)
        model.get_submodule(name).bias[3] = NAN
    assert f"a layer has NaN in its weights, {name}.bias;" in where_nan_begins(model, image, text)
    image[0, 0, 0, 0] = NAN
    assert "the image that the model was given holds NaN" in where_nan_begins(model, image, text)


def test_a_sum_between_the_layers() -> None:
    class Between(FakeModel):
        def forward(self, image, text, context=None):
            answer = super().forward(image, text, context)
            return answer._replace(mask=(answer.mask + INF) - INF)

    sample = FakeDataset()[0]
    text = Text(*(part[None] for part in sample["text"]))
    found = where_nan_begins(Between(), sample["image"][None], text)
    assert "first layer whose output is not finite is the model (Between)" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_which_sentences(dtype: torch.dtype) -> None:
    mask, presence = torch.zeros(4, 3, 3, dtype=dtype), torch.zeros(4, dtype=dtype)
    mask[0], mask[1, 2, 2], presence[3] = INF, NAN, NAN
    assert nan_answers(Prediction(mask)).tolist() == [False, True, False, False]
    assert nan_answers(Prediction(mask, presence)).tolist() == [False, True, False, True]


@pytest.mark.parametrize("sure", [INF, -INF])
@pytest.mark.parametrize("weighs", [False, True])
def test_infinite_logits_are_answers(sure: float, weighs: bool) -> None:
    """Resized, where weights of 0 and differences of infinities would make NaN of them."""
    mask = torch.full((1, 4, 4), sure)
    mask[0, :2] = -sure
    found = probability(Prediction(mask, torch.tensor([INF]), presence_weighs=weighs), (9, 9))[0]
    assert (found[0] == float(sure < 0)).all() and (found[-1] == float(sure > 0)).all() and found.isfinite().all()
    assert (probability(Prediction(mask, torch.tensor([-INF]), presence_weighs=weighs), (9, 9)) == 0).all()


class Named(FakeDataset):
    """With a record of each sentence."""

    def record(self, index: int) -> dict:
        return {"ref_id": 100 + index, "sent_id": 7, "expression": "the\u200b man", "image_path": Path("a/b.jpg")}


class Overflows(FakeModel):
    """Its flag's layer gives NaN from the fifth sentence on."""

    def __init__(self) -> None:
        super().__init__(presence=True)
        self.count = nn.Identity()

    def forward(self, image, text, context=None):
        answer = super().forward(image, text, context)
        late = self.count(torch.where(text.ids[:, 0] >= 5, NAN, 0.0))
        return answer._replace(presence=answer.presence + late)


def test_evaluate_names_sentence_and_layer() -> None:
    with pytest.raises(ValueError) as found:
        evaluate(Overflows(), Named(8), 3, autocast=torch.bfloat16, fast=False)
    assert str(found.value).startswith(
        "prediction: NaN in that of sentence 5, and of 2 others (ref_id 105, sent_id 7: 'the\\u200b man' in a/b.jpg): "
        "the first layer whose output is not finite is count (Identity)"
    )


def _fails_as_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        evaluate(Overflows(), Named(7), 2, limit=6, fast=False)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_every_process_fails_and_none_waits(tmp_path: Path) -> None:
    """The sentence is one process's; both say the same."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fails_as_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1] and said[0].startswith("prediction: NaN in that of sentence 5 (ref_id 105")
