"""DeepSparse 1.8, run by an interpreter of its own: PYTHON deepsparse_peer.py ONNX CORES X Y

It was closed in 2025 and needs Python 3.11, numpy < 2 and onnx < 1.16, so it cannot share an
environment with the rest: SPARSE_LTH_DEEPSPARSE_PYTHON names one that has it. Prints the median
seconds of a call on the array in X, an .npy file, and saves its output as Y.
"""

import sys
import time
from statistics import median

SECONDS = 2.0  # of measuring


def main(path: str, cores: int, x: str, y: str) -> float:
    import deepsparse
    import numpy as np

    inputs = [np.load(x)]
    engine = deepsparse.Engine(model=path, batch_size=len(inputs[0]), num_cores=cores)
    np.save(y, engine.run(inputs)[0])
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        engine.run(inputs)
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
