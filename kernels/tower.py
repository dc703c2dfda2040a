"""tower: what stands between the products of a CLIP tower: layer norm, alone or after a residual sum, one program per
row; and quick-GELU, x * sigmoid(1.702 x), one program per piece of memory. Math in fp32; what upstream rounds to the
dtype on the way, the sum and each factor of the GELU, is rounded here too.
Bytes in bf16, an element of R*(P + 1) rows: layer norm 4, with the sum 8, GELU 4. Five event frames of 577 rows move 24
MB a sum and norm (C = 1024), 47 MB a GELU (F = 4096): 48 and 24 of each an encode.
Measured at these shapes, H100, read-only stream 3.11 TB/s: layer norm 6.6 microseconds, torch 10.4; with the sum 8.5,
torch 15.5; GELU 18.1, torch 53.6 in three launches. Encoding five event frames took 5.93 ms and takes 4.70, eight video
frames 3.99 and 3.25; what is left is cuBLAS (2.7 and 2.1 ms) and cuDNN's attention (0.75 and 0.39)."""

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED

GELU = 1.702                         # steepness of the sigmoid
BLOCK = 2048                         # elements of a GELU's program


def layernorm_ref(x_RSC, w_C, b_C, eps):
    return torch.nn.functional.layer_norm(x_RSC, x_RSC.shape[-1:], w_C, b_C, eps)


def add_layernorm_ref(x_RSC, residual_RSC, w_C, b_C, eps):
    sum_RSC = residual_RSC + x_RSC
    return layernorm_ref(sum_RSC, w_C, b_C, eps), sum_RSC


def quick_gelu_ref(x):
    return x * torch.sigmoid(GELU * x)


@triton.jit
def layernorm_kernel(x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, sum_ptr, eps, C: tl.constexpr, BLOCK_C: tl.constexpr,
                     ADD: tl.constexpr):
    """Normalises one row; with ADD the row is x + residual, which is stored as well."""
    at = tl.program_id(0).to(tl.int64) * C
    col = tl.arange(0, BLOCK_C)
    inside = col < C                                                         # C need not be a power of two
    x = tl.load(x_ptr + at + col, mask=inside, other=0.0).to(tl.float32)                               # [BLOCK_C]
    if ADD:
        x += tl.load(residual_ptr + at + col, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at + col, x, mask=inside)
        x = x.to(tl.float32)
    apart = tl.where(inside, x - tl.sum(x) / C, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart) / C + eps)
    w = tl.load(w_ptr + col, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at + col, (apart * scale * w + b).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quick_gelu_kernel(x_ptr, y_ptr, N, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    steeper = (x * GELU).to(dtype).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-steeper))).to(dtype).to(tl.float32)
    tl.store(y_ptr + at, (x * gate).to(dtype), mask=at < N)


def launch(x_RSC, residual_RSC, w_C, b_C, eps):
    C = x_RSC.shape[-1]
    assert w_C.shape == b_C.shape == (C,), f"layernorm: weights {tuple(w_C.shape)}, {tuple(b_C.shape)} for rows of {C}"
    assert x_RSC.is_contiguous() and residual_RSC.is_contiguous() and residual_RSC.shape == x_RSC.shape, \
        f"layernorm: {tuple(x_RSC.shape)} {x_RSC.stride()} on {tuple(residual_RSC.shape)} {residual_RSC.stride()}"
    add = residual_RSC is not x_RSC
    y_RSC = torch.empty_like(x_RSC)
    sum_RSC = torch.empty_like(x_RSC) if add else x_RSC
    layernorm_kernel[(x_RSC.numel() // C,)](x_RSC, residual_RSC, w_C, b_C, y_RSC, sum_RSC, eps, C=C,
                                            BLOCK_C=triton.next_power_of_2(C), ADD=add, num_warps=4)
    return y_RSC, sum_RSC


def layernorm(x_RSC, w_C, b_C, eps=1e-5):
    """(x - mean) / deviation * w + b along the last axis, rounded once; shape and dtype of x, contiguous."""
    if x_RSC.device.type == "cpu" and not INTERPRETED:
        return layernorm_ref(x_RSC, w_C, b_C, eps)
    return launch(x_RSC, x_RSC, w_C, b_C, eps)[0]


def add_layernorm(x_RSC, residual_RSC, w_C, b_C, eps=1e-5):
    """(norm of the sum, the sum residual + x rounded to the dtype), both shaped as x. The sum is the next residual."""
    if x_RSC.device.type == "cpu" and not INTERPRETED:
        return add_layernorm_ref(x_RSC, residual_RSC, w_C, b_C, eps)
    return launch(x_RSC, residual_RSC, w_C, b_C, eps)


def quick_gelu(x):
    """x * sigmoid(1.702 x) of a contiguous tensor, element by element."""
    if x.device.type == "cpu" and not INTERPRETED:
        return quick_gelu_ref(x)
    assert x.is_contiguous(), f"quick_gelu: {tuple(x.shape)}, strides {x.stride()}"
    y = torch.empty_like(x)
    quick_gelu_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), GELU=GELU, BLOCK=BLOCK, num_warps=8)
    return y
