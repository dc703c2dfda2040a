"""rmsnorm: y = x / rms(x) * w, alone or after a residual sum. One program per row.
x_SD rows contiguous, w_D, y_SD share one float dtype; math in fp32, rounded to the dtype before the weight, as LLaMA
does.
Bytes: (2*S*D + D) * 2 in bf16, (4*S*D + D) * 2 with the residual. A prefill of 2,076 rows x 4096 moves 34 or 68 MB:
14.2 or 25.0 microseconds on an H100, 2.40 or 2.72 TB/s. A step of 1..32 rows has
its norms folded into kernels/skinny.py, which needs no more than `row_sums` of rows that it has not made itself."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.check import INTERPRETED

SUM_COLS = 32                        # columns of a row under one partial sum of squares


def rmsnorm_ref(x_SD, w_D, eps):
    x = x_SD.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_SD.dtype) * w_D


def add_rmsnorm_ref(x_SD, residual_SD, w_D, eps):
    sum_SD = residual_SD + x_SD
    return rmsnorm_ref(sum_SD, w_D, eps), sum_SD


@triton.jit
def rmsnorm_kernel(x_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr, x_stride, residual_stride, eps,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr):
    """Normalises one row; with ADD the row is x + residual, which is stored as well."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    inside = col < D                                                         # D need not be a power of two
    x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)       # [BLOCK_D]
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + col, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + col, x, mask=inside)
        x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / D + eps)
    y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * tl.load(w_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + col, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x_SD, residual_SD, w_D, eps):
    S, D = x_SD.shape
    assert w_D.shape == (D,), f"rmsnorm: weight {tuple(w_D.shape)} does not fit rows of {D}"
    assert x_SD.stride(1) == 1, f"rmsnorm: rows must be contiguous, got strides {x_SD.stride()}"
    y_SD = torch.empty((S, D), dtype=x_SD.dtype, device=x_SD.device)
    add = residual_SD is not None
    sum_SD = torch.empty_like(y_SD) if add else y_SD
    residual_SD = residual_SD if add else x_SD
    assert residual_SD.shape == (S, D) and residual_SD.stride(1) == 1, \
        f"rmsnorm: residual {tuple(residual_SD.shape)} beside rows {(S, D)}"
    rmsnorm_kernel[(S,)](x_SD, residual_SD, w_D, y_SD, sum_SD, x_SD.stride(0), residual_SD.stride(0), eps,
                         D=D, BLOCK_D=triton.next_power_of_2(D), ADD=add, num_warps=8 if D > 1024 else 2)
    return y_SD, sum_SD


def rmsnorm(x_SD, w_D, eps=1e-5):
    """x / rms(x), rounded to x's dtype, times w. Returns [S, D] in x's dtype."""
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return rmsnorm_ref(x_SD, w_D, eps)
    return launch(x_SD, None, w_D, eps)[0]


def add_rmsnorm(x_SD, residual_SD, w_D, eps=1e-5):
    """(norm of the sum, the sum residual + x rounded to the dtype), both [S, D]. The sum is the next residual."""
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return add_rmsnorm_ref(x_SD, residual_SD, w_D, eps)
    return launch(x_SD, residual_SD, w_D, eps)


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
    x = tl.load(x_ptr + row * x_stride + col, mask=col < D, other=0.0).to(tl.float32)    # [BLOCK_T, SUM_COLS]
    tl.store(sums_ptr + row * T + t, tl.sum(x * x, 1), mask=t < T)


def row_sums(x_SD, work):
    """Leaves the sums of squares of x's rows in `work`, a Workspace, for the next product with a norm. Plain torch on
    a CPU needs none."""
    S, D = x_SD.shape
    T = triton.cdiv(D, SUM_COLS)
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return
    assert x_SD.stride(1) == 1, f"row_sums: rows must be contiguous, got strides {x_SD.stride()}"
    assert work.sums_ST.shape[1] == T, f"row_sums: rows of {D}, a Workspace for {work.sums_ST.shape[1] * SUM_COLS}"
    row_sums_kernel[(S,)](x_SD, work.sums_ST, x_SD.stride(0), D=D, BLOCK_T=triton.next_power_of_2(T), T=T,
                          SUM_COLS=SUM_COLS, PDL=work.pdl, launch_pdl=work.pdl, enable_fp_fusion=False, num_warps=4)
