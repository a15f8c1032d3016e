"""The C sources: under the sanitizers, with clang, and for AArch64."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CALLS = Path(__file__).with_name("native_calls.py")
SOURCE = Path(__file__).parents[2] / "kernels" / "native.c"
INCLUDE = f"-I{sysconfig.get_path('include')}"
FLAGS = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", INCLUDE, str(SOURCE)]
SANITIZERS = {
    "libasan.so": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "libtsan.so": ["-fsanitize=thread"],
}


def need(compiler):
    return shutil.which(compiler) or pytest.skip(f"no {compiler}")


@pytest.mark.parametrize("compiler", ["gcc", "clang", "aarch64-linux-gnu-gcc"])
def test_compiles_without_warnings(compiler, tmp_path):
    command = [need(compiler), "-O1", *FLAGS, "-o", tmp_path / "_native.so"]
    subprocess.run(command, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", SANITIZERS)
def test_sanitizers_find_nothing(runtime, tmp_path):
    find = [need("gcc"), f"-print-file-name={runtime}"]
    preload = subprocess.check_output(find, text=True).strip()
    if preload == runtime:
        pytest.skip(f"no {runtime}")
    library = tmp_path / "_native.so"
    subprocess.run(["gcc", "-O1", "-g", *SANITIZERS[runtime], *FLAGS, "-o", library], check=True)
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [sys.executable, "-I", "-S", CALLS, library]  # nobody else's code
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel maps memory where libtsan does not expect it")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("called ")
    assert run.stdout.endswith(" baseline\n")
