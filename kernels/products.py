"""products: y = x @ w.T for a step's rows, plain or packed weights: the one place that chooses the kernel."""

from kernels.attention import PAIR
from kernels.quant import Packed, quant_skinny
from kernels.quant_rows import quant_rows
from kernels.skinny import skinny


def product(x_SD, w, work=None, norm=None, residual=None, gated=False, **override):
    """x @ w.T, [S, O]; arguments as those of `skinny`. A plain weight: 1..32 rows, and a row's bits do not depend on
    their number. A Packed one: 1..16 rows, whose bits may; work is then a Workspace made with drafts=True."""
    if not isinstance(w, Packed):
        return skinny(x_SD, w, work, norm, residual, gated, **override)
    return (quant_skinny if len(x_SD) <= PAIR else quant_rows)(x_SD, w, work, norm, residual, gated, **override)
