import pytest
import torch

from sparse_lth import SparseLinear


@pytest.mark.parametrize("op", ["linear_grad_input", "sddmm"])
@pytest.mark.parametrize("blocksize", [(8, 4), (4, 8)])
def test_gradient_ops_pass_torchs_own_checks(op, blocksize):
    layer = SparseLinear(33, 20, density=0.3, blocksize=blocksize).requires_grad_(False)
    grad, x, pattern = torch.randn(5, 20), torch.randn(5, 33), list(layer.pattern)
    args = {
        "linear_grad_input": (grad, layer.values, pattern, 33),
        "sddmm": (grad, x, pattern, *blocksize[::-1]),
    }
    torch.library.opcheck(getattr(torch.ops.sparse_lth, op).default, args[op])
