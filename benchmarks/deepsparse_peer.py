"""DeepSparse 1.8, run by an interpreter of its own: PYTHON deepsparse_peer.py ONNX CORES SHAPE...

It was closed in 2025 and needs Python 3.11, numpy < 2 and onnx < 1.16, so it cannot share an
environment with the rest: SPARSE_LTH_DEEPSPARSE_PYTHON names one that has it. Prints the median
seconds of a call.
"""

import sys
import time
from statistics import median

SECONDS = 2.0  # of measuring


def main(path: str, cores: int, shape: list[int]) -> float:
    import deepsparse
    import numpy as np

    engine = deepsparse.Engine(model=path, batch_size=shape[0], num_cores=cores)
    inputs = [np.random.default_rng(0).random(shape, dtype=np.float32)]
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        engine.run(inputs)
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), [*map(int, sys.argv[3:])]))
