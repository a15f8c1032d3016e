"""The layer on 1 to 16 rows, as CUDA-graph replays: what a decoder does."""

import pytest
import torch

from benchmarks import gpu

DTYPE = torch.bfloat16


@gpu.needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls its sparse layouts beta
@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu.contenders(0.5, (16, 16)))
@pytest.mark.parametrize("blocksize", [(16, 16), (64, 64), (128, 16)])
@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("shape", [(300, 784), (1024, 1024), (4096, 4096), (4096, 11008)])
def test_small_batch(benchmark, shape, batch, density, blocksize, name):
    if name not in gpu.contenders(density, blocksize):
        pytest.skip("2:4 is half of the weights")
    weight = gpu.sparse_weight(*shape, density, blocksize, DTYPE)
    x = torch.randn(batch, shape[1], device="cuda", dtype=DTYPE)
    times = {}
    for contender in {"dense": 0, name: 0}:
        make = gpu.contenders(density, blocksize)[contender]
        touched = weight.nbytes * (1 if contender == "dense" else density)
        try:
            layers = [make(weight.clone()) for _ in range(gpu.copies(int(touched)))]
            y = layers[0](x)
            calls = [lambda layer=layer: layer(x) for layer in layers]
            times[contender] = gpu.device_times(calls, graph=True)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
            if contender in ("dense", "sparse_lth"):
                raise
            pytest.skip(f"{contender} cannot: {str(error).splitlines()[0]}")
        if contender != "2:4":  # which prunes further
            gpu.check(y, x, weight)
    benchmark.pedantic(calls[0])
    gpu.record(
        benchmark,
        times[name],
        times["dense"],
        flop=2 * batch * weight.count_nonzero().item(),
        op="linear, graph replay",
        backend=name,
        dtype=str(DTYPE),
        shape=shape,
        batch=batch,
        density=density,
        blocksize=blocksize,
    )
