"""The layer on 1 and 16 rows, as a decoder calls it."""

import pytest

from benchmarks import gpu


def gpu_cases(full: bool) -> list[gpu.Case]:
    if full:
        return gpu.grid((1, 16), dtypes=gpu.DTYPES, backends=("sparse_lth", *gpu.PEERS))
    return [
        *gpu.grid((1, 16), densities=(0.5, 0.1, 0.05)),
        *gpu.grid((1, 16), ((4096, 4096),), densities=(0.3, 0.2, 0.02)),
        *gpu.grid((1, 16), blocksizes=((64, 64),), densities=(0.5, 0.1), backends=gpu.PEERS),
    ]


@pytest.mark.gpu
def test_small_batch(gpu_row, case):
    gpu_row(gpu.compared, case, gpu.forward, gpu.dense_forward, "linear")
