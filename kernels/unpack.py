"""unpack: a weight packed in 4 bits (kernels/quant.py) as plain rows, for products of many rows by cuBLAS: the prefill
of a drafter whose weights exist in 4 bits alone.

A thread loads the four words that it would have in a step, 32 weights: of outputs g and g + 8 of a tile, columns 8 t ..
8 t + 7 of each half of a block. A word's values are eight neighbours in the result, 16 bytes; four threads fill 64
bytes of a row. The value is scale * (u - 8) in fp32, rounded once.
Bytes: O*D/2 + O*D/64 read, 2*O*D written. LLaMA-7B's layers: 3.3 GB and 13.0, 4.1 ms at 4 TB/s, beside the 13.0 that a
prefill reads anyway."""

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED
from kernels.quant import BLOCK, TILE, Packed, dequantise


@triton.jit
def pair(low, high, DTYPE: tl.constexpr):
    """Two fp32 as 16-bit floats in one word."""
    low = low.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def steps_of(words, shift: tl.constexpr):
    """u - 8 in fp32 of the values of four bits there: as bits of a mantissa, since a conversion takes four times as
    long as an addition."""
    return ((words >> shift) & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def unpack_kernel(w_ptr, scale_ptr, y_ptr, O, D: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr,
                  DTYPE: tl.constexpr):
    """One tile of 16 outputs, WARPS blocks of 64 columns; a thread's row of each vector is what it loads and stores."""
    tile = tl.program_id(0).to(tl.int64)
    thread = tl.arange(0, 32 * WARPS)
    block = tl.program_id(1) * WARPS + thread // 32
    there = block < D // 64
    g, t = thread % 32 // 4, thread % 4
    part = tl.arange(0, 2)[None, :]                                  # halves of the block
    at = scale_ptr + tile * (D // GROUP * 16) + block * 64 // GROUP * 16 + g * 2
    k = tl.arange(0, 8)                                              # of a thread's words of one row
    out = (block * 32 + t * 4)[:, None] + (k // 4 * 16 + k % 4)[None, :]
    for row in tl.static_range(2):
        words = tl.load(w_ptr + tile * (D // 64 * 128) + (block * 128 + thread % 32 * 4)[:, None] + 2 * part + row,
                        mask=there[:, None], other=0)                # [THREADS, 2]
        scale = tl.load(at + row, mask=there, other=0.0).to(tl.float32)[:, None]
        first = pair(steps_of(words, 0) * scale, steps_of(words, 16) * scale, DTYPE)     # columns 0 and 1, and so on
        second = pair(steps_of(words, 8) * scale, steps_of(words, 24) * scale, DTYPE)
        third = pair(steps_of(words, 4) * scale, steps_of(words, 20) * scale, DTYPE)
        fourth = pair(steps_of(words, 12) * scale, steps_of(words, 28) * scale, DTYPE)
        output = tile * 16 + g + 8 * row
        four = tl.join(tl.join(first, third), tl.join(second, fourth))
        tl.store(y_ptr + output[:, None] * (D // 2) + out, four.reshape(32 * WARPS, 8),
                 mask=(there & (output < O))[:, None])


def unpack(w: Packed, dtype, room=None):
    """[O, D] of `dtype`, in `room`, a flat tensor of that dtype, if one is given. 16-bit floats of 4-bit weights go
    through the kernel, others through plain torch."""
    O, D = w.shape
    if w.bits != 4 or dtype.itemsize != 2 or w.words.device.type == "cpu" and not INTERPRETED:
        return dequantise(w).to(dtype)
    y_OD = torch.empty(O, D, dtype=dtype, device=w.words.device) if room is None else room[:O * D].view(O, D)
    kind, warps = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype], 8 if D >= 8 * BLOCK else 2
    unpack_kernel[(triton.cdiv(O, TILE), triton.cdiv(D // BLOCK, warps))](
        w.words, w.scales, y_OD.view(torch.int32), O, D=D, GROUP=w.group, WARPS=warps, DTYPE=kind, num_warps=warps)
    return y_OD
