"""How far a result may be from the exact one, derived and not tuned."""

import torch

ROUNDINGS = 4  # of the sums of magnitudes: each product, the sum in any order, the final cast


def assert_close(actual, exact, magnitude):
    """|actual - exact| <= ROUNDINGS * eps * magnitude, for sums of products.

    exact: the same sums in float64; magnitude: in float64, the sums of the products' magnitudes
    """
    eps = torch.finfo(actual.dtype).eps
    tiny = torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - exact).abs()
    worst = (error - ROUNDINGS * (eps * magnitude + tiny)).max() if error.numel() else -1
    assert worst <= 0, f"off by {error.max():.3g}, {worst:.3g} more than rounding explains"
