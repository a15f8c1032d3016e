"""The C sources: under the sanitizers, with clang, and for AArch64."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "kernels" / "native.c"
INCLUDE = f"-I{sysconfig.get_path('include')}"
FLAGS = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", INCLUDE, str(SOURCE)]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

GRID = """
import importlib.util, sys, torch
name = "sparse_lth.kernels._native"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = importlib.util.module_from_spec(spec)  # before the package looks for it
spec.loader.exec_module(sys.modules[name])
from sparse_lth import SparseLinear
from sparse_lth.kernels import Chain, ChainLayer, linear_native, use_backend

torch.set_num_threads(2)
for instruction_set in linear_native.INSTRUCTION_SETS:
    with use_backend("native", instruction_set):
        for blocksize in [(1, 1), (16, 16), (16, 3), (8, 8), (24, 1), (4, 4), (1, 9), (3, 5)]:
            for out, inputs in [(1, 1), (13, 30), (65, 39)]:
                for density in (0, 0.4):
                    layer = SparseLinear(inputs, out, True, blocksize, density, "relu")
                    last = torch.nn.Linear(out, 10)
                    chain = Chain([
                        ChainLayer(layer.weight_values, layer.pattern, layer.bias, inputs, out, "relu"),
                        ChainLayer(last.weight, None, last.bias, out, 10),
                    ])
                    for batch in (1, 15, 67, 130):
                        x = torch.randn(batch, inputs, requires_grad=True)
                        layer(x).sum().backward()
                        chain(x)
print("checked", linear_native._native.__file__)
"""


def need(compiler):
    return shutil.which(compiler) or pytest.skip(f"no {compiler}")


@pytest.mark.parametrize("compiler", ["gcc", "clang", "aarch64-linux-gnu-gcc"])
def test_compiles_without_warnings(compiler, tmp_path):
    command = [need(compiler), "-O1", *FLAGS, "-o", tmp_path / "_native.so"]
    subprocess.run(command, check=True)


def test_sanitizers_find_nothing(tmp_path):
    library = tmp_path / "_native.so"
    subprocess.run([need("gcc"), *SANITIZE, *FLAGS, "-o", library], check=True)
    runtime = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-W", "ignore", "-c", GRID, library]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"checked {library}\n"
