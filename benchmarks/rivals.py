"""What a model is measured against: other ways of running the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from magnet_fast import ops

OPENVINO = "OpenVINO"


def openvino(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor] | None:
    """The exported model, compiled once for these inputs' sizes; None where OpenVINO is not installed."""
    try:
        import openvino as runtime
    except ImportError:
        return None
    dtype = inputs[0].dtype
    with torch.no_grad(), ops.backend("reference"):
        exported = torch.export.export(model.float(), tuple(t.float() if t.is_floating_point() else t for t in inputs))
    precision = "f32" if dtype == torch.float32 else "bf16"
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = runtime.compile_model(runtime.convert_model(exported), "CPU", options).create_infer_request()
    model.to(dtype)
    arrays = [tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for tensor in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0].copy())
