"""products: y = x @ w.T for a step's rows, plain or packed weights: the one place that chooses the kernel."""

from kernels.quant import Packed, quant
from kernels.skinny import skinny


def product(x_SD, w, work=None, norm=None, residual=None, gated=False, **override):
    """x @ w.T, [S, O]; arguments as those of `skinny`. A plain weight: 1..32 rows, and a row's bits do not depend on
    their number. A Packed one: 1..16 rows, whose bits may; its products take the sums of a norm themselves."""
    kernel = quant if isinstance(w, Packed) else skinny
    return kernel(x_SD, w, work, norm, residual, gated, **override)
