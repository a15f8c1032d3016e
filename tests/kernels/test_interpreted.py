import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["test_linear_triton.py", "test_sddmm_triton.py", "test_conv2d_triton.py"]
)
def test_kernels_in_the_interpreter(module):
    """In a process of its own: Triton reads the variable as it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", f"tests/kernels/interpreted/{module}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
