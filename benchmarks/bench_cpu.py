"""Native kernels against dense and sparse peers on a CPU:
`pytest benchmarks/bench_cpu.py --benchmark-only`.

Each turn of a row runs the dense torch network too, so `speedup` is side by side. Peers that are
not installed are skipped.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks import peers
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


def name_of(blocksize):
    return "x".join(map(str, blocksize))


def compare(benchmark, run, dense, **context):
    """A row for run(), timed in turn with dense(); context goes to extra_info; the speedup.

    The row has the times of the turns; what pytest-benchmark itself shows are some calls more.
    """
    times = in_turn({"ours": run, "dense": dense}, TURNS)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
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


@needs_native
@pytest.mark.parametrize("batch", BATCHES, ids="batch:{}".format)
@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_lenet(benchmark, tabulate, dtype, ticket, batch):
    density, blocksize = TICKETS[ticket]
    network = SparseSequential(*ticket_layers(density, blocksize))
    dense, x = dense_lenet(), torch.rand(batch, 784)
    inputs = x
    if dtype == "int8":
        quantize_(network)
    elif dtype == "bfloat16":
        network, inputs = network.bfloat16(), x.bfloat16()
    with torch.inference_mode():
        speedup = compare(
            benchmark,
            lambda: network(inputs),
            lambda: dense(x),
            backend="native",
            shape=[batch, *LENET],
            dtype=dtype,
            density=density,
            blocksize=blocksize,
        )
    row = ticket if dtype == "float32" else f"{ticket}, {dtype}"
    tabulate(LENET_TABLE, row, speedup, batch=batch)


PEERS = {  # run, dtype, density
    **{name: (*peer, 1.0) for name, peer in peers.DENSE.items() if name != "torch"},
    **{name: (run, "float32", 0.1) for name, run in peers.SPARSE.items()},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("batch", BATCHES, ids="batch:{}".format)
@pytest.mark.parametrize("peer", PEERS)
def test_lenet_peer(benchmark, tabulate, tmp_path, peer, batch):
    make, dtype, density = PEERS[peer]
    dense, x = dense_lenet(), torch.rand(batch, 784)
    model = dense if density == 1 else dense_twin(ticket_layers(density, (1, 1)))
    with torch.inference_mode():
        run = make(model.eval(), x, tmp_path)
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
@pytest.mark.parametrize("batch", [1, 16, 128, 1024], ids="batch:{}".format)
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)], ids=name_of)
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


def deepsparse(benchmark, pruned, x, folder):
    """The speedup of DeepSparse on the pruned model over torch, measured one after the other."""
    seconds, _ = peers.deepsparse(pruned.eval(), x, folder)
    with torch.inference_mode():
        dense = in_turn({"dense": lambda: pruned(x)}, TURNS)["dense"].p50
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(backend="deepsparse", shape=[*x.shape], speedup=dense / seconds)
    return dense / seconds


SHAPES = {"LeNet": LENET, "784x300": (784, 300)}
SHAPES |= {f"{a}x{b}": (a, b) for a, b in ((1024, 1024), (4096, 4096), (4096, 11008))}


@needs_native
@peers.needs_deepsparse
@pytest.mark.parametrize("batch", [1, 16, 64, 128, 1024, 8192], ids="batch:{}".format)
@pytest.mark.parametrize("density", [0.2, 0.1, 0.05], ids="density:{}".format)
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1), (16, 4), (16, 16)], ids=name_of)
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
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)], ids=name_of)
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
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (8, 8), (16, 16)], ids=name_of)
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


def relative_time(run, dense):
    """Median of run's times over dense's, the two in turn."""
    times = in_turn({"ours": run, "dense": dense}, TURNS)
    return times["ours"].p50 / times["dense"].p50
