"""Native kernels against dense and sparse peers on a CPU: `pytest benchmarks --benchmark-only`.

Each turn of a row runs the dense torch network too, so `speedup` is side by side. Peers that are
not installed are skipped.
"""

import os
import subprocess
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_lth import SparseLinear, SparseSequential, kernels, quantize_
from sparse_lth.kernels import linear_native
from sparse_lth.timing import in_turn

BATCHES = [1, 16, 128, 1024, 8192]
TURNS = 15
LENET_TABLE = "LeNet-300-100: speedup over dense float32 torch"
LENET = (784, 300, 100, 10)
TICKETS = {  # (density, blocksize)
    "unstructured 10%": (0.1, (1, 1)),
    "unstructured 2%": (0.02, (1, 1)),
    "16x16 10%": (0.1, (16, 16)),
}
needs_native = pytest.mark.skipif(
    linear_native.WHY_NOT is not None, reason=f"native kernels are {linear_native.WHY_NOT}"
)


def compare(benchmark, run, dense, **context):
    """A row for run(), timed in turn with dense(); context goes to extra_info; the speedup.

    The row has the times of the turns; what pytest-benchmark itself shows is one call.
    """
    times = in_turn({"ours": run, "dense": dense}, TURNS)
    benchmark.pedantic(run)
    ours, speedup = times["ours"], times["dense"].p50 / times["ours"].p50
    benchmark.extra_info.update(
        device=f"cpu, {torch.get_num_threads()} threads",
        **{"dtype": "float32", "blocksize": None, "density": 1.0, **context},
        **{"p20 us": ours.p20 * 1e6, "p50 us": ours.p50 * 1e6, "p80 us": ours.p80 * 1e6},
        speedup=speedup,
    )
    return speedup


def dense_lenet():
    torch.manual_seed(0)
    a, b, c, d = LENET
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))


def ticket_layers(density, blocksize):
    """LeNet's layers with random kept blocks; next to blocks, the output layer stays dense."""
    *hidden, last = pairwise(LENET)
    layers = [SparseLinear(*shape, True, blocksize, density, "relu") for shape in hidden]
    dense_last = blocksize != (1, 1)
    layers += [nn.Linear(*last) if dense_last else SparseLinear(*last, True, blocksize, density)]
    return layers


def weights_of(layers):
    """[(weight, bias)] as dense tensors"""
    dense = [x.to_dense() if isinstance(x, SparseLinear) else x for x in layers]
    return [(x.weight.detach(), x.bias.detach()) for x in dense]


@needs_native
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ticket", TICKETS)
def test_lenet(benchmark, tabulate, ticket, batch):
    density, blocksize = TICKETS[ticket]
    network = SparseSequential(*ticket_layers(density, blocksize))
    dense, x = dense_lenet(), torch.rand(batch, 784)
    with torch.inference_mode():
        speedup = compare(
            benchmark,
            lambda: network(x),
            lambda: dense(x),
            backend="native",
            shape=[batch, *LENET],
            density=density,
            blocksize=blocksize,
        )
    tabulate(LENET_TABLE, ticket, speedup, batch=batch)


@needs_native
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_lenet_in_fewer_bits(benchmark, tabulate, dtype, ticket, batch):
    density, blocksize = TICKETS[ticket]
    network, x = SparseSequential(*ticket_layers(density, blocksize)), torch.rand(batch, 784)
    dense, inputs = dense_lenet(), x.clone()
    if dtype == "int8":
        quantize_(network)
    else:
        network, x = network.bfloat16(), x.bfloat16()
    with torch.inference_mode():
        speedup = compare(
            benchmark,
            lambda: network(x),
            lambda: dense(inputs),
            backend="native",
            shape=[batch, *LENET],
            dtype=dtype,
            density=density,
            blocksize=blocksize,
        )
    tabulate(LENET_TABLE, f"{ticket}, {dtype}", speedup, batch=batch)


def onnx_lenet(path):
    onnx = pytest.importorskip("onnx")
    helper, names, nodes, weights = onnx.helper, "x", [], []
    for j, (weight, bias) in enumerate(weights_of(dense_lenet()[::2])):
        weights += [
            onnx.numpy_helper.from_array(weight.numpy(), f"w{j}"),
            onnx.numpy_helper.from_array(bias.numpy(), f"b{j}"),
        ]
        nodes.append(helper.make_node("Gemm", [names, f"w{j}", f"b{j}"], [f"z{j}"], transB=1))
        names = f"z{j}"
        if j < 2:
            nodes.append(helper.make_node("Relu", [f"z{j}"], [f"y{j}"]))
            names = f"y{j}"
    kind = onnx.TensorProto.FLOAT
    ends = [
        [helper.make_tensor_value_info(name, kind, ["batch", size])]
        for name, size in (("x", LENET[0]), (names, LENET[-1]))
    ]
    graph = helper.make_graph(nodes, "lenet", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


def onnxruntime_lenet(batch, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    onnx_lenet(tmp_path / "lenet.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(tmp_path / "lenet.onnx", options)
    x = torch.rand(batch, 784).numpy()
    return lambda: session.run(None, {"x": x})


def onnxruntime_int8_lenet(batch, tmp_path):
    """Its own dynamic quantisation."""
    ort = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    onnx_lenet(tmp_path / "lenet.onnx")
    quantization.quantize_dynamic(tmp_path / "lenet.onnx", tmp_path / "int8.onnx", per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(tmp_path / "int8.onnx", options)
    x = torch.rand(batch, 784).numpy()
    return lambda: session.run(None, {"x": x})


def openvino_int8_lenet(batch, tmp_path):
    """Weights and activations, by NNCF on random inputs: the time does not depend on them."""
    ov, nncf = pytest.importorskip("openvino"), pytest.importorskip("nncf")
    onnx_lenet(tmp_path / "lenet.onnx")
    samples = nncf.Dataset([torch.rand(1, 784).numpy() for _ in range(32)])
    model = nncf.quantize(ov.Core().read_model(str(tmp_path / "lenet.onnx")), samples)
    compiled = ov.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    request, x = compiled.create_infer_request(), torch.rand(batch, 784).numpy()
    return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)


def torchao_int8_lenet(batch, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    dense, x = dense_lenet(), torch.rand(batch, 784)
    quantization.quantize_(dense, quantization.Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(dense)
    return lambda: compiled(x)


def openvino_lenet(batch, tmp_path, precision):
    ov = pytest.importorskip("openvino")
    onnx_lenet(tmp_path / "lenet.onnx")
    config = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = ov.Core().compile_model(str(tmp_path / "lenet.onnx"), "CPU", config)
    request, x = model.create_infer_request(), torch.rand(batch, 784).numpy()
    return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)


def torch_lenet(batch, tmp_path, dtype, compiled=False):
    dense, x = dense_lenet().to(dtype), torch.rand(batch, 784, dtype=dtype)
    if compiled:
        dense = torch.compile(dense)
    return lambda: dense(x)


def csr_lenet(batch, tmp_path):
    weights = [(w.to_sparse_csr(), b) for w, b in weights_of(ticket_layers(0.1, (1, 1)))]
    x = torch.rand(batch, 784)

    def run():
        y = x
        for j, (weight, bias) in enumerate(weights):
            y = (weight @ y.t()).t() + bias
            y = y.relu() if j < 2 else y

    return run


def scipy_lenet(batch, tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    layers = ticket_layers(0.1, (1, 1))
    weights = [(sparse.csr_matrix(w.numpy()), b.numpy()) for w, b in weights_of(layers)]
    x = torch.rand(batch, 784).numpy()

    def run():
        y = x.T
        for j, (weight, bias) in enumerate(weights):
            y = weight @ y + bias[:, None]
            y = y.clip(0) if j < 2 else y

    return run


PEERS = {  # run, dtype, density
    "torch bf16": (lambda *a: torch_lenet(*a, torch.bfloat16), "bfloat16", 1.0),
    "torch compiled": (lambda *a: torch_lenet(*a, torch.float32, True), "float32", 1.0),
    "torch bf16 compiled": (lambda *a: torch_lenet(*a, torch.bfloat16, True), "bfloat16", 1.0),
    "torch csr": (csr_lenet, "float32", 0.1),
    "scipy csr": (scipy_lenet, "float32", 0.1),
    "onnxruntime": (onnxruntime_lenet, "float32", 1.0),
    "onnxruntime int8": (onnxruntime_int8_lenet, "int8", 1.0),
    "openvino int8": (openvino_int8_lenet, "int8", 1.0),
    "torchao int8 compiled": (torchao_int8_lenet, "int8", 1.0),
    "openvino f32": (lambda *a: openvino_lenet(*a, "f32"), "float32", 1.0),
    "openvino bf16": (lambda *a: openvino_lenet(*a, "bf16"), "bfloat16", 1.0),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("peer", PEERS)
def test_lenet_peer(benchmark, tabulate, tmp_path, peer, batch):
    make, dtype, density = PEERS[peer]
    dense, x = dense_lenet(), torch.rand(batch, 784)
    with torch.inference_mode():
        run = make(batch, tmp_path)
        speedup = compare(
            benchmark,
            run,
            lambda: dense(x),
            backend=peer,
            shape=[batch, *LENET],
            dtype=dtype,
            density=density,
        )
    tabulate(LENET_TABLE, peer, speedup, batch=batch)


@needs_native
@pytest.mark.parametrize("batch", [1, 16, 128, 1024])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)])
def test_large_layer(benchmark, tabulate, blocksize, batch):
    dense, sparse = nn.Linear(4096, 4096), SparseLinear(4096, 4096, True, blocksize, 0.1)
    x = torch.rand(batch, 4096)
    with torch.inference_mode():
        speedup = compare(
            benchmark,
            lambda: sparse(x),
            lambda: dense(x),
            backend="native",
            shape=[batch, 4096, 4096],
            density=0.1,
            blocksize=blocksize,
        )
    tabulate("a 4096 x 4096 layer at 10%", name_of(blocksize), speedup, batch=batch)


DEEPSPARSE = "SPARSE_LTH_DEEPSPARSE_PYTHON"
needs_deepsparse = pytest.mark.skipif(
    DEEPSPARSE not in os.environ,
    reason=f"{DEEPSPARSE} names no interpreter that has DeepSparse 1.8",
)


def deepsparse(benchmark, pruned, x, tmp_path):
    """The speedup of DeepSparse on the pruned model over torch, measured one after the other."""
    path, threads = tmp_path / "pruned.onnx", torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that DeepSparse can read is an old one
        torch.onnx.export(pruned.eval(), (x,), path, opset_version=13, dynamo=False)
    script = Path(__file__).with_name("deepsparse_peer.py")
    command = [os.environ[DEEPSPARSE], script, path, threads, *x.shape]
    options = {"env": os.environ | {"NM_DISABLE_ANALYTICS": "1"}, "text": True}
    with torch.inference_mode():
        dense = in_turn({"dense": lambda: pruned(x)}, 15)["dense"].p50
    seconds = float(subprocess.check_output([*map(str, command)], **options).split()[-1])
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(backend="deepsparse", shape=[*x.shape], speedup=dense / seconds)
    return dense / seconds


SHAPES = {"LeNet": LENET, "784x300": (784, 300)}
SHAPES |= {f"{a}x{b}": (a, b) for a, b in ((1024, 1024), (4096, 4096), (4096, 11008))}


@needs_native
@needs_deepsparse
@pytest.mark.parametrize("batch", [1, 16, 64, 128, 1024, 8192])
@pytest.mark.parametrize("density", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1), (16, 4), (16, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_deepsparse(benchmark, tabulate, tmp_path, shape, blocksize, density, batch):
    """DeepSparse's time over ours, on the same weights."""
    sizes = SHAPES[shape]
    layers = [SparseLinear(*sizes[:2], True, blocksize, density)]
    if shape == "LeNet":
        layers = ticket_layers(density, blocksize)
    sparse, dense, x = SparseSequential(*layers), dense_twin(layers), torch.rand(batch, sizes[0])
    theirs = deepsparse(benchmark, dense, x, tmp_path)
    with torch.inference_mode():
        ours = 1 / relative_time(lambda: sparse(x), lambda: dense(x))
    title = f"DeepSparse's time over ours: blocks {name_of(blocksize)}, density {density}"
    tabulate(title, shape, ours / theirs, batch=batch)


def dense_twin(layers):
    """The same network of dense layers, in which activations are modules."""
    modules = []
    for layer in layers:
        modules.append(layer.to_dense() if isinstance(layer, SparseLinear) else layer)
        if getattr(layer, "activation", "none") == "relu":
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def training_step(layers, x):
    model, target = nn.Sequential(*layers), torch.randint(layers[-1].out_features, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)])
@pytest.mark.parametrize("network", ["lenet", "1024^2 x 3"])
def test_training_step(benchmark, tabulate, network, blocksize, backend):
    if backend == "native" and linear_native.WHY_NOT:
        pytest.skip(f"native kernels are {linear_native.WHY_NOT}")
    if network == "lenet":
        dense, sparse = dense_lenet(), ticket_layers(0.1, blocksize)
    else:
        dense = [nn.Linear(1024, 1024) for _ in range(3)]
        sparse = [SparseLinear(1024, 1024, True, blocksize, 0.1) for _ in range(3)]
    x = torch.rand(128, dense[0].in_features)
    with kernels.use_backend(backend):
        speedup = compare(
            benchmark,
            training_step(sparse, x),
            training_step(dense, x),
            backend=backend,
            shape=[128, network],
            density=0.1,
            blocksize=blocksize,
        )
    row = f"{network}, {backend}"
    tabulate("a training step at 10%, batch 128", row, speedup, blocks=name_of(blocksize))


@needs_native
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (8, 8), (16, 16)])
@pytest.mark.parametrize("step", ["forward", "training"])
def test_crossover(benchmark, tabulate, step, blocksize):
    """The density where a 1024 x 1024 layer costs what the dense one does, at batch 128."""
    x = torch.rand(128, 1024)

    def call(layer):
        if step == "training":
            return training_step([layer], x)

        def forward():
            with torch.inference_mode():
                layer(x)

        return forward

    dense, crossover, before = call(nn.Linear(1024, 1024)), 1.0, None
    for density in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        sparse = call(SparseLinear(1024, 1024, True, blocksize, density))
        ratio = relative_time(sparse, dense)
        if ratio >= 1:
            crossover = density
            if before is not None:  # between the two, times are about linear in the density
                crossover -= 0.1 * (ratio - 1) / (ratio - before)
            break
        before = ratio
    benchmark.pedantic(sparse)
    benchmark.extra_info.update(
        device=f"cpu, {torch.get_num_threads()} threads",
        dtype="float32",
        shape=[128, 1024, 1024],
        blocksize=blocksize,
        backend="native",
        step=step,
        crossover=crossover,
    )
    title = "density where a 1024 x 1024 layer costs what the dense one does, batch 128"
    tabulate(title, step, crossover, blocks=name_of(blocksize))


def name_of(blocksize):
    return "x".join(map(str, blocksize))


def relative_time(run, dense):
    """Median of run's times over dense's, the two in turn."""
    times = in_turn({"ours": run, "dense": dense}, TURNS)
    return times["ours"].p50 / times["dense"].p50
