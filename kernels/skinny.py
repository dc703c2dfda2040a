"""skinny: y = x @ w.T for 1..32 rows of x, with what stands before and after it in a decoder layer folded in: RMSNorm of
x, SwiGLU of y, the residual sum. Row i's bits do not depend on how many rows there are, so a verify row equals a decode row."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import SplitWork, prefetch
from kernels.check import INTERPRETED
from kernels.rmsnorm import rmsnorm_ref
from kernels.round import RoundWork
from kernels.swiglu import silu_times, swiglu_ref

MAX_ROWS = 32                        # rows of a step
SUM_COLS = 32                        # columns under one partial sum of squares


class Workspace(SplitWork):
    """Scratch of a decoder's steps. One step at a time may use it.

    D: model width; H, K: query heads and their width; cache_rows: M. Programmatic dependent launch (pdl) lets a kernel
    start while the one before it drains; it needs compute capability 9."""

    def __init__(self, device, D, H, K, cache_rows, pdl=None):
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.pdl = pdl if pdl is not None else on_gpu and torch.cuda.get_device_capability(device)[0] >= 9
        super().__init__(device, H, K, cache_rows, self.pdl)
        self.sums_ST = torch.zeros((MAX_ROWS, triton.cdiv(D, SUM_COLS)), dtype=torch.float32, device=device)
        self.sums_of = None                                 # the rows that sums_ST was taken of
        self.round = RoundWork(device, self.pdl)


def skinny_ref(x_SD, w_OD, norm=None, residual=None, gated=False):
    x_SD = x_SD if norm is None else rmsnorm_ref(x_SD, *norm)
    y_SO = torch.nn.functional.linear(x_SD, w_OD)
    y_SO = swiglu_ref(y_SO) if gated else y_SO
    return y_SO if residual is None else residual + y_SO


@triton.jit
def row_sums_kernel(x_ptr, sums_ptr, x_stride, D: tl.constexpr, BLOCK_T: tl.constexpr, T: tl.constexpr,
                    SUM_COLS: tl.constexpr, PDL: tl.constexpr):
    """Sums of squares of one row, one for every SUM_COLS columns."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.arange(0, BLOCK_T)
    col = t[:, None] * SUM_COLS + tl.arange(0, SUM_COLS)[None, :]
    x = tl.load(x_ptr + row * x_stride + col, mask=col < D, other=0.0).to(tl.float32)             # [BLOCK_T, SUM_COLS]
    tl.store(sums_ptr + row * T + t, tl.sum(x * x, 1), mask=t < T)


@triton.jit(do_not_specialize=["S"])
def skinny_kernel(x_ptr, w_ptr, y_ptr, norm_ptr, residual_ptr, sums_ptr, x_stride, residual_stride, S, O, eps,
                  D: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
                  BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr, NORM: tl.constexpr,
                  RESIDUAL: tl.constexpr, SUMS: tl.constexpr, GATED: tl.constexpr, PREFETCH: tl.constexpr,
                  PDL: tl.constexpr):
    """BLOCK_O outputs of all rows. The weights are the tall operand of the product, the rows of x the narrow one.

    With SLICES = 2 the tall operand stacks the two halves of the inner dimension, and the narrow one puts them side by
    side: the two diagonal blocks are the halves of the result. GATED: half of the outputs are gates, half are ups."""
    tile = tl.program_id(0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PER: tl.constexpr = (D + SLICES * BLOCK_D - 1) // (SLICES * BLOCK_D) * BLOCK_D     # inner columns of a slice
    EVEN: tl.constexpr = PER * SLICES == D
    tall, narrow, step = tl.arange(0, BLOCK_O * SLICES), tl.arange(0, BLOCK_S * SLICES), tl.arange(0, BLOCK_D)
    if GATED:
        HALF: tl.constexpr = BLOCK_O // 2
        F = O // 2
        w_row = tl.minimum(tile * HALF + tall % HALF, F - 1) + tall // HALF * F        # past the edge: any row will do
    else:
        w_row = tl.minimum(tile * BLOCK_O + tall % BLOCK_O, O - 1)
    w_col = tall // BLOCK_O * PER                                    # where this slice begins
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * D + w_col[:, None] + step[None, :]
    if PREFETCH > 0:                                                 # weights depend on nobody: fetch before the wait
        line = tl.arange(0, PREFETCH * BLOCK_D // 64)                # of 128 bytes
        prefetch(w_ptr + w_row.to(tl.int64)[:, None] * D + w_col[:, None] + line[None, :] * 64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, x_col = narrow % BLOCK_S, narrow // BLOCK_S * PER
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * x_stride + x_col[None, :] + step[:, None]
    s = tl.arange(0, BLOCK_S)
    if GATED:
        out = tile * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
        width = O // 2
    else:
        out = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        width = O
    held = (out < width)[:, None] & (s < S)[None, :]                 # outputs and rows need not fill their blocks
    if RESIDUAL:
        residual = tl.load(residual_ptr + s.to(tl.int64)[None, :] * residual_stride + out[:, None], mask=held, other=0.0)
    if NORM:
        t = tl.arange(0, BLOCK_T)
        sums = tl.load(sums_ptr + row[:, None] * T + t[None, :], mask=(row < S)[:, None] & (t < T)[None, :], other=0.0)
        scale = tl.rsqrt(tl.sum(sums, 1) / D + eps)                  # [BLOCK_S]
        # Spread over the rows at once, in the layout of x: a vector would go through shared memory on every step.
        norm_ptrs = norm_ptr + x_col[None, :] + step[:, None]
        weight = tl.load(norm_ptrs, mask=x_col[None, :] + step[:, None] < D, other=0.0)           # [BLOCK_D, BLOCK_S]
    acc = tl.zeros((BLOCK_O * SLICES, BLOCK_S * SLICES), dtype=tl.float32)
    for start in range(0, PER, BLOCK_D):
        if EVEN:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")                            # [BLOCK_O, BLOCK_D]
            x = tl.load(x_ptrs + start, mask=(row < S)[None, :], other=0.0)                       # [BLOCK_D, BLOCK_S]
        else:                                                        # the last columns need not fill a step
            w = tl.load(w_ptrs + start, mask=w_col[:, None] + start + step[None, :] < D, other=0.0)
            x = tl.load(x_ptrs + start, mask=(row < S)[None, :] & (x_col[None, :] + start + step[:, None] < D), other=0.0)
        if NORM:
            x = (x.to(tl.float32) * scale[None, :]).to(dtype) * weight
            ahead = start + BLOCK_D
            weight = tl.load(norm_ptrs + ahead, mask=x_col[None, :] + ahead + step[:, None] < D, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if SLICES == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_O, 2, BLOCK_S)), (1, 3, 0, 2)))
        first, _ = tl.split(left)
        _, second = tl.split(right)
        acc = first + second
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_O // 2, BLOCK_S)), (1, 2, 0)))
        y = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    else:
        y = acc.to(dtype)
    if RESIDUAL:
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
    tl.store(y_ptr + s.to(tl.int64)[None, :] * width + out[:, None], y, mask=held)
    if SUMS:
        square = tl.where(held, y.to(tl.float32) * y.to(tl.float32), 0.0)
        tl.store(sums_ptr + s * T + tile, tl.sum(square, 0), mask=s < S)


def launch_config(O, D, rows, residual, gated):
    return dict(BLOCK_S=32, BLOCK_O=SUM_COLS if residual else 64, BLOCK_D=128, SLICES=2 if residual else 1,
                PREFETCH=4, num_warps=4, num_stages=4)


def skinny(x_SD, w_OD, work=None, norm=None, residual=None, gated=False, **override):
    """x @ w.T, [S, O] for S in 1..32 rows; row i's bits do not depend on S.

    norm: (w_D, eps), RMSNorm of x first. residual: [S, O], added last. gated: w is gate over up, the result
    silu(gate) * up, [S, O/2]. Every step rounds as the plain chain does. work: a Workspace; with it, the sums of squares
    that a norm needs are those left by the product with a residual that made x."""
    (S, D), O = x_SD.shape, w_OD.shape[0]
    assert 1 <= S <= MAX_ROWS, f"skinny: {S} rows, wanted 1..{MAX_ROWS}"
    assert w_OD.shape == (O, D) and w_OD.is_contiguous() and x_SD.stride(1) == 1 and x_SD.dtype == w_OD.dtype, \
        f"skinny: weight {tuple(w_OD.shape)}, strides {w_OD.stride()}, does not fit rows of {D}, strides {x_SD.stride()}"
    assert norm is None or residual is None, "skinny: a norm before and a residual after would share their sums"
    width = O // 2 if gated else O
    assert residual is None or residual.shape == (S, width) and residual.stride(1) == 1, \
        f"skinny: residual {tuple(residual.shape)} beside a result of {(S, width)}"
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return skinny_ref(x_SD, w_OD, norm, residual, gated)
    y_SO = torch.empty((S, width), dtype=x_SD.dtype, device=x_SD.device)
    if norm is not None:
        work = work or Workspace(x_SD.device, D, 1, 1, 1)
        if work.sums_of is not x_SD:
            row_sums(x_SD, work)
    pdl = work is not None and work.pdl
    config = {**launch_config(O, D, S, residual is not None, gated), **override}
    if INTERPRETED:
        config["PREFETCH"] = 0
    T = triton.cdiv(D, SUM_COLS) if norm is not None else triton.cdiv(O, config["BLOCK_O"])
    sums = work is not None and residual is not None
    skinny_kernel[(triton.cdiv(O, config["BLOCK_O"]),)](
        x_SD, w_OD, y_SO, norm[0] if norm else x_SD, residual if residual is not None else x_SD,
        work.sums_ST if work else x_SD, x_SD.stride(0), residual.stride(0) if residual is not None else 0, S, O,
        norm[1] if norm else 0.0, D=D, T=T, BLOCK_T=triton.next_power_of_2(T),
        NORM=norm is not None, RESIDUAL=residual is not None, SUMS=sums, GATED=gated, PDL=pdl,
        enable_fp_fusion=False, launch_pdl=pdl, **config)
    if sums:
        work.sums_of = y_SO
    return y_SO


def row_sums(x_SD, work):
    """Leaves the sums of squares of x's rows in `work`, for the next norm."""
    S, D = x_SD.shape
    T = triton.cdiv(D, SUM_COLS)
    row_sums_kernel[(S,)](x_SD, work.sums_ST, x_SD.stride(0), D=D, BLOCK_T=triton.next_power_of_2(T), T=T,
                          SUM_COLS=SUM_COLS, PDL=work.pdl, launch_pdl=work.pdl, enable_fp_fusion=False, num_warps=4)
    work.sums_of = x_SD
