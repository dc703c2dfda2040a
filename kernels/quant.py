"""quant: y = x @ w.T with weights packed to 8 or 4 bits, for a drafter's steps of one or two rows; the same call and
the same folds (norm, SwiGLU, residual) as kernels/skinny.py; kernels/products.py chooses between them.

A weight is scale * (u - 2^(bits-1)), u unsigned. One fp16 scale stands over a group of 128 inner columns of one output.
A group fills 128 * bits / 32 words: value i of word j is column i * words + j, so that value i of consecutive words
meets consecutive columns of x. Unpacking costs an and-or and a subtraction: the bits land in the mantissa of
2^(23 - place), which makes that float the integer plus a constant.

One program sums BLOCK_O outputs by plain multiply-add, its threads along the inner columns,
16 bytes of words each, the next words on their way while these are used; the first are asked for before the wait on
the kernel ahead. The scale meets the sum of 4 words, never a weight. The norm's weight is folded into the packed one,
its factor meets the result, its sum of squares is taken along the way. HALF: two 4-bit weights at a time in fp16, 4
products a chain, fp32 from there on.
A row's bits may depend on the row count; only drafts hang on them, never an answer. Steps of 3 to 16 rows go to
kernels/quant_rows.py, by tensor cores.

Bytes: O*D*bits/8 + O*D/64 of scales. LLaMA-7B, a layer at 4 bits: qkv 26.0 MB, o 8.7, gate-up 46.5, down 23.2; with an
8-bit head of 133 MB 3.47 GB a step, 1.12 ms at 3.1 TB/s; all at 8 bits 6.71 GB, 2.16 ms."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import FEW, PAIR, loads_before
from kernels.check import INTERPRETED, self_check
from kernels.rmsnorm import rmsnorm_ref
from kernels.swiglu import silu_times, swiglu_ref

BITS = {"int4": (4, 8), "fp8+int4": (4, 8)}                  # bits of a packed model's layers, and of its head
MAX_PACKED_ROWS = FEW                # rows of a step with packed weights
PACK_ROWS = 1024                     # packed at a time
RATIOS = {8: (1.0,), 4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)}  # of the widest scale, tried for the least squared error


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [O, D] in few bits."""
    words_OW: torch.Tensor      # int32, W = D * bits / 32
    scale_OG: torch.Tensor      # fp16, G = D / group
    scale_GO: torch.Tensor      # the same once more, as kernels/quant_rows.py reads it
    bits: int                   # 4 or 8
    group: int                  # inner columns under one scale
    normed: bool = False        # the weight of the norm in front is folded in

    @property
    def shape(self):
        return torch.Size((self.words_OW.shape[0], self.words_OW.shape[1] * 32 // self.bits))

    @property
    def nbytes(self) -> int:
        """Of what one product reads."""
        return self.words_OW.nbytes + self.scale_OG.nbytes

    @property
    def held_bytes(self) -> int:
        return self.nbytes + self.scale_GO.nbytes


class NotPackable(ValueError):
    """A weight whose inner dimension makes no whole groups."""


def group_of(D: int) -> int:
    """Inner columns under one scale: 128, or the largest power of two below it that divides them."""
    return min(128, D & -D)


def packed_bytes(O: int, D: int, bits: int, group: int | None = None) -> int:
    """Bytes of a Packed weight [O, D]."""
    return O * D * bits // 8 + 4 * O * D // (group or group_of(D))


def quantise(w_OD, bits, group=None, norm_D=None) -> Packed:
    """Rounds to the nearest of 2^bits steps. The largest weight of a group, with its sign, is the lowest step, which
    has no counterpart above; at 4 bits narrower scales are tried too: a few clipped weights can pay for finer steps.
    norm_D: the weight of an RMSNorm in front, folded in: programs would read it as often as x. Rows are independent,
    and go PACK_ROWS at a time: one takes a dozen times its own size meanwhile."""
    if len(w_OD) > PACK_ROWS:
        parts = [quantise(part, bits, group, norm_D) for part in w_OD.split(PACK_ROWS)]
        return Packed(torch.cat([p.words_OW for p in parts]), torch.cat([p.scale_OG for p in parts]),
                      torch.cat([p.scale_GO for p in parts], 1), bits, parts[0].group, parts[0].normed)
    (O, D), half, per = w_OD.shape, 1 << bits - 1, 32 // bits
    group = group or group_of(D)
    span = group // per                                      # words of a group
    if D % group or span < 4 or span & (span - 1):
        raise NotPackable(f"{D} inner columns in groups of {group}; wants whole groups, a power of two from "
                         f"{4 * per} up")
    w = (w_OD.float() if norm_D is None else w_OD.float() * norm_D.float()).reshape(O, D // group, group)
    widest = w.gather(2, w.abs().argmax(2, keepdim=True)) / -half
    best = scale = q = None
    for ratio in RATIOS[bits]:
        s = (widest * ratio).half()
        steps = (w / s.float().masked_fill(s == 0, 1)).round_().clamp_(-half, half - 1)
        err = (steps * s.float() - w).square_().sum(2, keepdim=True)
        if best is None:
            best, scale, q = err, s, steps
        else:
            better = err < best
            best, scale, q = err.minimum(best), torch.where(better, s, scale), torch.where(better, steps, q)
    u = (q + half).to(torch.int32).view(O, D // group, per, span)
    words = u[:, :, 0].clone()
    for i in range(1, per):
        words |= u[:, :, i] << bits * i
    scale_OG = scale.view(O, D // group)
    return Packed(words.view(O, D // per), scale_OG, scale_OG.t().contiguous(), bits, group, norm_D is not None)


def dequantise(w: Packed, dtype=torch.float32):
    """[O, D]; exact in fp32."""
    (O, D), per = w.shape, 32 // w.bits
    words = w.words_OW.view(O, D // w.group, 1, w.group // per)
    shift = torch.arange(0, 32, w.bits, dtype=torch.int32, device=words.device).view(1, 1, per, 1)
    u = (words >> shift) & (1 << w.bits) - 1
    scaled = (u - (1 << w.bits - 1)).to(dtype).flatten(2) * w.scale_OG.to(dtype)[:, :, None]
    return scaled.view(O, D)


def quant_ref(x_SD, w: Packed, norm=None, residual=None, gated=False):
    x_SD = x_SD if norm is None else rmsnorm_ref(x_SD, torch.ones_like(x_SD[0]), norm[1])
    y_SO = torch.nn.functional.linear(x_SD, dequantise(w, x_SD.dtype))
    y_SO = swiglu_ref(y_SO) if gated else y_SO
    return y_SO if residual is None else residual + y_SO


@triton.jit
def unpack(words, I: tl.constexpr, BITS: tl.constexpr):
    """Value I of each word as fp32, exact, in -2^(BITS-1) .. 2^(BITS-1) - 1."""
    FIT: tl.constexpr = 23 // BITS                           # values whose place lies inside a mantissa
    PLACE: tl.constexpr = I % FIT * BITS
    moved = words if I < FIT else words >> I // FIT * FIT * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    MAGIC: tl.constexpr = (150 - PLACE) << 23                # 2^(23 - PLACE): its last place is worth 2^-PLACE
    OFFSET: tl.constexpr = (1 << 23 - PLACE) + (1 << BITS - 1)
    return ((moved & MASK) | MAGIC).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def half_pair(low, high):
    """Two fp32 as fp16 in one word."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def dot_of_nibbles(words, x04, x15, x26, x37):
    """A sixteenth of the sum of a word's eight weights times eight x, fp32. Values n and n + 4 share an instruction:
    0x6400 + u is 1024 + u in fp16, 0x6400 + 16 u is 1024 + 16 u; (u - 8) / 16 is exact, and a chain of four products
    fits fp16 up to |x| = 32,000. Adding the last two in fp16, one instruction less, was no faster (qkv 12.8 against
    12.3 microseconds, down 11.5 against 11.0)."""
    return tl.inline_asm_elementwise("""{
        .reg .b32 w, a, b, c, d, s, by16, by256, less64, less4; .reg .f16 low, high; .reg .f32 f, g;
        mov.b32 by16, 0x2c002c00;
        mov.b32 by256, 0x1c001c00;
        mov.b32 less64, 0xd408d408;
        mov.b32 less4, 0xc480c480;
        shr.u32 w, $1, 8;
        lop3.b32 a, $1, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 b, $1, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 c, w, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 d, w, 0x00f000f0, 0x64006400, 0xea;
        fma.rn.f16x2 a, a, by16, less64;
        fma.rn.f16x2 b, b, by256, less4;
        fma.rn.f16x2 c, c, by16, less64;
        fma.rn.f16x2 d, d, by256, less4;
        mul.rn.f16x2 s, a, $2;
        fma.rn.f16x2 s, b, $3, s;
        fma.rn.f16x2 s, c, $4, s;
        fma.rn.f16x2 s, d, $5, s;
        mov.b32 {low, high}, s;
        cvt.f32.f16 f, low;
        cvt.f32.f16 g, high;
        add.f32 $0, f, g;
        }""", "=f,r,r,r,r,r", [words, x04, x15, x26, x37], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def scales(ptrs, BY_HAND: tl.constexpr):
    """The fp16 at these addresses as fp32. BY_HAND: in whatever layout the sums have. tl.load would choose one of its
    own, and Triton 3.6 then sends the sums through shared memory in every round."""
    if BY_HAND:
        return tl.inline_asm_elementwise("{.reg .f16 h; ld.global.nc.b16 h, [$1]; cvt.f32.f16 $0, h;}", "=f,l", [ptrs],
                                         dtype=tl.float32, is_pure=False, pack=1)
    return tl.load(ptrs).to(tl.float32)


@triton.jit
def held_columns(x_ptrs, held):
    """x at the columns of one value of each word, fp32 [BLOCK_W]."""
    return tl.load(x_ptrs, mask=held, other=0.0).to(tl.float32)


@triton.jit
def row_times_words(acc, square, w, scale, x_ptrs, held, BITS: tl.constexpr, SPAN: tl.constexpr, HALF: tl.constexpr,
                    NORM: tl.constexpr):
    """(acc, square) with a round of words [BLOCK_O, BLOCK_W] times one row of x added; acc [BLOCK_O, BLOCK_W / 4]."""
    if HALF:
        x0, x4 = held_columns(x_ptrs, held), held_columns(x_ptrs + 4 * SPAN, held)
        x1, x5 = held_columns(x_ptrs + SPAN, held), held_columns(x_ptrs + 5 * SPAN, held)
        x2, x6 = held_columns(x_ptrs + 2 * SPAN, held), held_columns(x_ptrs + 6 * SPAN, held)
        x3, x7 = held_columns(x_ptrs + 3 * SPAN, held), held_columns(x_ptrs + 7 * SPAN, held)
        if NORM:
            square += x0 * x0
            square += x1 * x1
            square += x2 * x2
            square += x3 * x3
            square += x4 * x4
            square += x5 * x5
            square += x6 * x6
            square += x7 * x7
        part = dot_of_nibbles(w, half_pair(x0, x4)[None, :], half_pair(x1, x5)[None, :], half_pair(x2, x6)[None, :],
                              half_pair(x3, x7)[None, :])
    else:
        part = tl.zeros(w.shape, dtype=tl.float32)
        for i in tl.static_range(32 // BITS):
            x = held_columns(x_ptrs + i * SPAN, held)
            if NORM:
                square += x * x
            part += unpack(w, i, BITS) * x[None, :]
    four = tl.sum(tl.reshape(part, (w.shape[0], w.shape[1] // 4, 4)), 2)
    return acc + four * scale, square


@triton.jit
def gemv_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, residual_ptr, x_stride, residual_stride, O, eps,
                D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, UNROLL: tl.constexpr, HALF: tl.constexpr,
                BY_HAND: tl.constexpr, LATE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
                GATED: tl.constexpr, PDL: tl.constexpr):
    """BLOCK_O outputs of one row or two; GATED, half of them are gates and half are ups.

    BLOCK_W is 128 words a warp: then words and x, each loaded in its own best layout, meet in one layout, and nothing
    passes through shared memory before the last sum. UNROLL: rounds a loop; more of them keep more words on their way
    and take more registers."""
    tile = tl.program_id(0)
    PER: tl.constexpr = 32 // BITS                                   # values of a word
    WORDS: tl.constexpr = D // PER
    SPAN: tl.constexpr = GROUP // PER                                # words of a group
    WIDE: tl.constexpr = BLOCK_O // 2 if GATED else BLOCK_O          # outputs that are stored
    width = O // 2 if GATED else O
    local, word, quad = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_W // 4) * 4
    w_row = tl.minimum(tile * WIDE + local % WIDE, width - 1) + local // WIDE * width   # past the edge any row will do
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * WORDS + word[None, :]
    scale_ptrs = scale_ptr + w_row[:, None] * (D // GROUP)
    LAST: tl.constexpr = D // GROUP - 1                              # past the edge x is 0, and any scale will do
    w = tl.load(w_ptrs, mask=(word < WORDS)[None, :], other=0, eviction_policy="evict_first")      # [BLOCK_O, BLOCK_W]
    scale = scales(scale_ptrs + tl.minimum(quad // SPAN, LAST)[None, :], BY_HAND)              # [BLOCK_O, BLOCK_W / 4]
    if PDL:                                                          # weights depend on nobody: on their way already
        gdc_wait()
        if LATE == 0:
            gdc_launch_dependents()
    col = word // SPAN * GROUP + word % SPAN
    acc0 = tl.zeros((BLOCK_O, BLOCK_W // 4), dtype=tl.float32)
    acc1 = acc0
    square0 = tl.zeros((BLOCK_W,), dtype=tl.float32)
    square1 = square0
    for start in tl.range(0, WORDS, BLOCK_W, loop_unroll_factor=UNROLL):
        ahead = start + BLOCK_W
        next_w = tl.load(w_ptrs + ahead, mask=(ahead + word < WORDS)[None, :], other=0, eviction_policy="evict_first")
        next_scale = scales(scale_ptrs + tl.minimum((ahead + quad) // SPAN, LAST)[None, :], BY_HAND)
        if BY_HAND:
            loads_before()                                           # ptxas would put them last, to save registers
        held = start + word < WORDS                                  # the last words need not fill a round
        at = start * PER + col
        acc0, square0 = row_times_words(acc0, square0, w, scale, x_ptr + at, held, BITS, SPAN, HALF, NORM)
        if ROWS == 2:
            acc1, square1 = row_times_words(acc1, square1, w, scale, x_ptr + x_stride + at, held, BITS, SPAN, HALF,
                                            NORM)
        w, scale = next_w, next_scale
    if PDL and LATE == 1:
        gdc_launch_dependents()
    out = tile * WIDE + tl.arange(0, WIDE)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for row in tl.static_range(ROWS):
        y = tl.sum(acc0 if row == 0 else acc1, 1)                                                           # [BLOCK_O]
        if HALF:
            y *= 16.0
        if NORM:
            y *= tl.rsqrt(tl.sum(square0 if row == 0 else square1) / D + eps)
        if GATED:                                                    # gates stand before ups
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, WIDE)), (1, 0)))
            rounded = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
        else:
            rounded = y.to(dtype)
        if RESIDUAL:
            kept = tl.load(residual_ptr + row * residual_stride + out, mask=out < width, other=0.0)
            rounded = (kept.to(tl.float32) + rounded.to(tl.float32)).to(dtype)
        tl.store(y_ptr + row * width + out, rounded, mask=out < width)


def launch_config(O, D, bits):
    """Tile and warps: the best of `--tune` on an H100, one row, bf16 x, at the shapes of LLaMA-7B.

    Microseconds and TB/s at 4 bits: qkv 12.3 and 2.10, o 5.2 and 1.66, gate-up 19.6 and 2.38, down 11.0 and 2.11. One
    warp and 4 outputs, the first guess, took 14.1, 6.4, 24.5 and 12.4; without HALF gate-up takes 25.9. At 8 bits: qkv
    20.1 and 2.54, o 7.6 and 2.25, gate-up 32.9 and 2.78, down 17.6 and 2.60, head 46.5 and 2.87. A second row costs a
    third to a half more at 4 bits: the instructions are the limit, not the bytes. Released late (LATE) a step is 3 to
    4 % slower."""
    wide, long = O > 4096, D > 4096
    if bits == 4:
        outputs, warps = (8, 4) if wide else (4, 2) if long else (4, 4)
    else:
        outputs, warps = (2, 1) if O >= 20000 else (4, 2) if long else (2, 2)
    return dict(BLOCK_O=outputs, BLOCK_W=128 * warps, num_warps=warps, UNROLL=1 if bits == 4 and not wide | long else 2,
                HALF=bits == 4 and not INTERPRETED, BY_HAND=not INTERPRETED, LATE=0)


def quant_skinny(x_SD, w: Packed, work=None, norm=None, residual=None, gated=False, **override):
    """x @ dequantise(w).T, [S, O] for one or two rows. Arguments as those of `skinny`; work says whether to start
    early and is otherwise not used; of `norm` only the epsilon is, for w holds its weight."""
    (S, D), O = x_SD.shape, w.shape[0]
    assert 1 <= S <= PAIR, f"quant_skinny: {S} rows, wanted 1..{PAIR}"
    assert w.shape[1] == D and x_SD.stride(1) == 1, \
        f"quant_skinny: weight {tuple(w.shape)} for rows of {D}, strides {x_SD.stride()}"
    assert w.normed == (norm is not None), f"quant_skinny: norm {norm is not None}, folded into the weight {w.normed}"
    width = O // 2 if gated else O
    assert residual is None or residual.shape == (S, width) and residual.stride(1) == 1, \
        f"quant_skinny: residual {tuple(residual.shape)} beside a result of {(S, width)}"
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return quant_ref(x_SD, w, norm, residual, gated)
    y_SO = torch.empty((S, width), dtype=x_SD.dtype, device=x_SD.device)
    pdl, config = work is not None and work.pdl, {**launch_config(O, D, w.bits), **override}
    gemv_kernel[(triton.cdiv(O, config["BLOCK_O"]),)](
        x_SD, w.words_OW, w.scale_OG, y_SO, residual if residual is not None else x_SD, x_SD.stride(0),
        residual.stride(0) if residual is not None else 0, O=O, eps=norm[1] if norm else 0.0, D=D, BITS=w.bits,
        GROUP=w.group, ROWS=S, NORM=norm is not None, RESIDUAL=residual is not None, GATED=gated, PDL=pdl,
        launch_pdl=pdl, **config)
    return y_SO


def main():
    """Agreement with fp64, each product, then a step."""
    from kernels.chain import report

    report("int4")


if __name__ == "__main__":
    self_check(main, __file__)
