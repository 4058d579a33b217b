"""What a model is measured against: other ways of running the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from magnet_fast import ops

OPENVINO = "OpenVINO"
OPENVINO_INT8 = "OpenVINO int8"
ONNX_RUNTIME = "ONNX Runtime"


def openvino(
    model: nn.Module, inputs: tuple[Tensor, ...], calibration: Sequence[tuple[Tensor, ...]] = ()
) -> Callable[[], Tensor] | None:
    """The exported model, compiled once for these inputs' sizes; None where OpenVINO is not installed.

    Args:
        model: of one output.
        inputs: of that model.
        calibration: more of them, to bring it to int8 by nncf's post-training quantisation; None without nncf.
    """
    try:
        import openvino as runtime

        if calibration:
            import nncf
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
    converted = runtime.convert_model(exported)
    model.to(dtype)
    if calibration:
        samples = nncf.Dataset([_arrays(sample) for sample in calibration])
        kind = nncf.ModelType.TRANSFORMER
        converted = nncf.quantize(converted, samples, model_type=kind, subset_size=len(calibration))
    request = runtime.compile_model(converted, "CPU", options).create_infer_request()
    arrays = _arrays(inputs)
    return lambda: torch.from_numpy(request.infer(arrays)[0].copy())


def onnx_runtime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor] | None:
    """The model as ONNX, float32, every graph optimisation on; None where it or the exporter is not installed.

    Args:
        model: of one output.
        inputs: of that model.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (what torch exports by)
    except ImportError:
        return None
    with torch.no_grad(), ops.backend("reference"):
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    serialised = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])
    # A graph leaves out what does not change its result.
    given = dict(zip((node.name for node in program.model_proto.graph.input), _arrays(inputs), strict=False))
    return lambda: torch.from_numpy(session.run(None, given)[0])


def _arrays(tensors: tuple[Tensor, ...]) -> list[np.ndarray]:
    return [tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for tensor in tensors]
