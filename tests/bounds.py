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


def assert_as_exact_as(actual, dense, exact, scale=0.0):
    """actual errs at most ROUNDINGS times as much as `dense`, the same function in as many bits.

    For whole models, of which no sum of magnitudes is known; the dense model shows what rounding
    does. exact: in float64; scale: the largest magnitude among what is compared, if not of exact
    """
    errs = (dense.double() - exact).abs().max()
    one = torch.finfo(actual.dtype).eps * max(float(exact.abs().max()), scale)
    error = (actual.double() - exact).abs().max()
    allowed = ROUNDINGS * max(float(errs), one)
    assert error <= allowed, f"off by {error:.3g}, where a dense model is by {errs:.3g}"
