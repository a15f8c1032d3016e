"""What else runs a network on a CPU: each function takes (model, x, folder) and gives a call().

model: in eval mode; x: its input, float32; folder: for files. A call gives the output as a tensor.
Peers that are not installed skip the test, in one line.
"""

import copy
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

DEEPSPARSE = "SPARSE_LTH_DEEPSPARSE_PYTHON"
needs_deepsparse = pytest.mark.skipif(
    DEEPSPARSE not in os.environ,
    reason=f"{DEEPSPARSE} names no interpreter that has DeepSparse 1.8",
)
Call = Callable[[], Tensor]


def dense_torch(model, x, folder, dtype=torch.float32, compiled=False) -> Call:
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    model = torch.compile(model) if compiled else model
    return lambda: model(x)


def torchao_int8(model, x, folder) -> Call:
    """Weights in int8 by output channel, activations quantised in each call, compiled."""
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(model)
    config = quantization.Int8DynamicActivationInt8WeightConfig(version=2)
    quantization.quantize_(model, config)
    model = torch.compile(model)
    return lambda: model(x)


def onnxruntime(model, x, folder, int8=False) -> Call:
    ort = pytest.importorskip("onnxruntime")
    path = export(model, x, folder)
    if int8:
        quantization = pytest.importorskip("onnxruntime.quantization")
        quantized = folder / "int8.onnx"
        quantization.quantize_dynamic(path, quantized, per_channel=True)
        path = quantized
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session, inputs = ort.InferenceSession(path, options), {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(model, x, folder, precision="f32", int8=False) -> Call:
    """precision: "f32" or "bf16"; int8: quantised by NNCF, for a transformer, on random inputs"""
    ov = pytest.importorskip("openvino")
    network = ov.Core().read_model(str(export(model, x, folder)))
    if int8:
        nncf = pytest.importorskip("nncf")
        inputs = nncf.Dataset([torch.randn_like(x).numpy() for _ in range(8)])
        network = nncf.quantize(network, inputs, model_type=nncf.ModelType.TRANSFORMER)
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(network, "CPU", config).create_infer_request()
    values = x.numpy()

    def call() -> Tensor:
        results = request.infer({0: values}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return call


def torch_csr(model, x, folder) -> Call:
    """model: an nn.Sequential of pruned linear layers and ReLUs"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        weights = [getattr(m, "weight", None) for m in model]
        weights = [None if w is None else w.detach().to_sparse_csr() for w in weights]

    def call() -> Tensor:
        y = x
        for module, weight in zip(model, weights, strict=True):
            y = y.relu() if weight is None else (weight @ y.t()).t() + module.bias
        return y

    return call


def scipy_csr(model, x, folder) -> Call:
    """model: as that of `torch_csr`"""
    layers = [
        (csr_matrix(m.weight.detach().numpy()), m.bias.detach().numpy()[:, None])
        if isinstance(m, nn.Linear)
        else None
        for m in model
    ]
    values = x.numpy().T

    def call() -> Tensor:
        y = values
        for layer in layers:
            y = y.clip(0) if layer is None else layer[0] @ y + layer[1]
        return torch.from_numpy(y.T)

    return call


def deepsparse(model, x, folder) -> tuple[float, Tensor]:
    """The median seconds of a call, which another interpreter measures, and the output."""
    path, inputs, outputs = export(model, x, folder), folder / "x.npy", folder / "y.npy"
    np.save(inputs, x.numpy())
    script = Path(__file__).with_name("deepsparse_peer.py")
    command = [os.environ[DEEPSPARSE], script, path, torch.get_num_threads(), inputs, outputs]
    environment = os.environ | {"NM_DISABLE_ANALYTICS": "1"}
    printed = subprocess.check_output([*map(str, command)], env=environment, text=True)
    return float(printed.split()[-1]), torch.from_numpy(np.load(outputs))


def export(model: nn.Module, x: Tensor, folder: Path) -> Path:
    """As ONNX of opset 13 with an input "x", which all of them read; once for a folder."""
    path = folder / "model.onnx"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter of such opsets is the old one
            names = {"input_names": ["x"], "output_names": ["y"]}
            torch.onnx.export(model, (x,), path, opset_version=13, dynamo=False, **names)
    return path


DENSE = {  # name: (function, dtype of its arithmetic)
    "torch": (dense_torch, "float32"),
    "torch compiled": (lambda *a: dense_torch(*a, compiled=True), "float32"),
    "torch bf16": (lambda *a: dense_torch(*a, torch.bfloat16), "bfloat16"),
    "torch bf16 compiled": (lambda *a: dense_torch(*a, torch.bfloat16, True), "bfloat16"),
    "torchao int8": (torchao_int8, "int8"),
    "ONNX Runtime": (onnxruntime, "float32"),
    "ONNX Runtime int8": (lambda *a: onnxruntime(*a, int8=True), "int8"),
    "OpenVINO": (openvino, "float32"),
    "OpenVINO bf16": (lambda *a: openvino(*a, "bf16"), "bfloat16"),
    "OpenVINO int8": (lambda *a: openvino(*a, int8=True), "int8"),
}
SPARSE = {"torch CSR": torch_csr, "scipy CSR": scipy_csr}  # of pruned networks, in float32
