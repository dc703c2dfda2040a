"""swiglu: silu(gate) * up, gate and up side by side in one product's rows. One program per piece of a row.
gate_up_SE is [S, 2F], gate first; silu in fp32, rounded to the dtype before the product with up, as LLaMA does.
Bytes: 3*S*F * 2 in bf16: a prefill of 2,076 rows x 11,008 moves 137 MB a layer, in 51 microseconds on an
H100, 2.68 TB/s. A step of 1..32 rows has it folded into kernels/skinny.py."""

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED

BLOCK_F = 1024


def swiglu_ref(gate_up_SE):
    gate_SF, up_SF = gate_up_SE.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_SF) * up_SF


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """round(round(silu(gate)) * up) of values that hold numbers of `dtype`; any shape, in fp32."""
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up).to(dtype)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, stride, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Combines BLOCK_F columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = col < F                                                         # the last piece may hang over
    gate = tl.load(gate_up_ptr + row * stride + col, mask=inside, other=0.0).to(tl.float32)         # [BLOCK_F]
    up = tl.load(gate_up_ptr + row * stride + F + col, mask=inside, other=0.0).to(tl.float32)       # [BLOCK_F]
    tl.store(out_ptr + row * F + col, silu_times(gate, up, out_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up_SE):
    """silu(gate) * up, [S, F] of [S, 2F]."""
    S, E = gate_up_SE.shape
    assert E % 2 == 0 and gate_up_SE.stride(1) == 1, f"swiglu: {tuple(gate_up_SE.shape)}, strides {gate_up_SE.stride()}"
    if gate_up_SE.device.type == "cpu" and not INTERPRETED:
        return swiglu_ref(gate_up_SE)
    out_SF = torch.empty((S, E // 2), dtype=gate_up_SE.dtype, device=gate_up_SE.device)
    swiglu_kernel[(S, triton.cdiv(E // 2, BLOCK_F))](gate_up_SE, out_SF, gate_up_SE.stride(0), F=E // 2,
                                                     BLOCK_F=BLOCK_F, num_warps=4)
    return out_SF
