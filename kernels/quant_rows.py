"""quant_rows: y = x @ w.T with weights packed to 8 or 4 bits (kernels/quant.py), for a drafter's steps of 3 to 16 rows;
the same call and the same folds (norm, SwiGLU, residual) as kernels/skinny.py.

The tensor cores' product, the weights its tall operand and the rows the narrow one. A product has one member per group
of 128 inner columns and a warp each (a batched dot), so that the sum of a group is complete in its warp's registers
when its scale meets it, no weight is unpacked twice, and every warp fetches only its own columns of x from shared
memory. The members are added up once, at the end. Words go by asynchronous copies to shared memory and from there
straight into the places that the tensor cores want their weights at; value i of all words makes one product, with x at
the columns that meet it. The order of the inner columns in a product is free, so nothing is permuted, and no unpacked
weight leaves its registers: two neighbouring words give a pair of 16-bit floats in four instructions at most.
What feeds a product lies by columns, 16 values each (`columns`): the 16 columns that one value
of each word meets are 512 bytes in one piece. Scales stand by group, so that those of neighbouring outputs do too.
A norm's weight is folded into the packed one, its factor meets the result, from the sums that skinny's rules leave in
the Workspace. Nothing is added atomically: a row's bits may depend on the row count, and on nothing else.

Bytes: the weights as in kernels/quant.py, 3.47 GB a step of LLaMA-7B at 4 bits and an 8-bit head, 1.12 ms at 3.1 TB/s.
Every program reads all of x from L2, 32 bytes a column: qkv 50 MB beside 26 of weights, o 17 beside 9, gate-up 45
beside 47, down 45 beside 23.

One H200, 4 bits, 16 rows, microseconds: qkv 18.0, o 8.7, gate-up 27.8, down 21.6, head 48.4. A step at context 700
takes 3.15 ms for 16 rows and 3.08 for 4, where it takes 1.65 for one row: 16 ids are checked at 0.2 ms each. On an H100
3.25 ms and 1.84; at 8 bits there 4.03 and 2.80 (qkv 26.1, o 11.4, gate-up 45.6, down 27.5). It is not
at the memory's limit: schedulers issue in 15 to 37 % of the cycles (ncu), and wait for words, scales and the round's
barrier.
What made a difference there, ms of the whole step:
- weights unpacked into the dtype and a plain product, before this kernel: 21 (H100);
- this kernel with x by rows, 32 bytes of each at a time, and scales by output: 4.50. The copies of x took four times
  the requests, and filled the queue that the words wait in;
- x by columns, scales by group, attention in splits of 128 cache rows in place of 512: 3.31;
- scales left as they are loaded for a round (turned into fp32 at once, the load was waited for: 205 of 1,965 samples of
  qkv, 747 of 2,728 of down), groups that are not there read again and weighed with 0 instead of masked (a mask cost the
  copies of x their order), tiles by `--tune`, the next kernel released two rounds before the end: 3.15.
Tried and dropped: 8 columns of x for 8 rows or fewer (3.47 then, 16 columns 3.31); 8 or 16 warps for o (12.6 and 23.5
of 10.1 microseconds); 128 outputs a program (gate-up 65 of 45); a scale for every weight instead of every sum, not
built: 128 more instructions a round and a rounding of each weight."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import FEW, PAIR, launch_dependents_if, prefetch
from kernels.check import INTERPRETED, self_check, stages_that_fit
from kernels.quant import MAX_PACKED_ROWS, Packed, quant_ref, unpack
from kernels.rmsnorm import SUM_COLS, row_sums
from kernels.swiglu import silu_times


def columns(S, E, like):
    """An empty [S, E] whose columns lie one after the other, 16 values each: a product meets some columns of all rows
    at a time, and fetches them as one piece."""
    assert S <= FEW, f"columns: {S} rows, at most {FEW}"
    return torch.empty((E, FEW), dtype=like.dtype, device=like.device).t()[:S]


class Sums:
    """What a norm needs of a Workspace, where there is none: sums of squares of each row, [S, D / SUM_COLS]."""

    def __init__(self, x_SD):
        S, D = x_SD.shape
        self.sums_ST = torch.empty((S, triton.cdiv(D, SUM_COLS)), dtype=torch.float32, device=x_SD.device)
        self.pdl = False


@triton.constexpr_function
def unpacking(i, bits, bf16):
    """PTX that turns value i of two neighbouring words, $1 and $2, into a pair of 16-bit floats, exact."""
    if bits == 4:                                            # 128 + u or 1024 + u, less 136 or 1032
        mask, magic, less = 0x000f000f, 0x43004300 if bf16 else 0x64006400, 0xc308c308 if bf16 else 0xe408e408
        pick = f"prmt.b32 v, $1, $2, {0x5410 if i < 4 else 0x7632}; shr.u32 v, v, {i % 4 * 4}; mov.b32 less, {less};"
    else:                                                    # bytes 0 and 2 of v; what else is in there is masked out
        pick = f"prmt.b32 v, $1, $2, {0x0400 + i * 0x0101};"
        if bf16:                                             # 128 + the low 7 bits, less 128 if bit 7 is set, else 256
            mask, magic = 0x007f007f, 0x43004300
            pick += "lop3.b32 less, v, 0x00800080, 0xc380c380, 0x6a;"
        else:                                                # 1024 + u, less 1152
            mask, magic = 0x00ff00ff, 0x64006400
            pick += "mov.b32 less, 0xe480e480;"
    return f"""{{.reg .b32 v, one, less;
        mov.b32 one, {0x3f803f80 if bf16 else 0x3c003c00}; {pick}
        lop3.b32 v, v, {mask}, {magic}, 0xea;
        fma.rn.{"bf16x2" if bf16 else "f16x2"} $0, v, one, less;}}"""


@triton.jit
def values(words, I: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """Value I of each word in `dtype`, exact. BY_HAND: two at a time, for bf16 and fp16."""
    if not BY_HAND:
        found = unpack(words, I, BITS).to(dtype)
    elif dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise(unpacking(I, BITS, True), "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True,
                                          pack=2)
    else:
        found = tl.inline_asm_elementwise(unpacking(I, BITS, False), "=r,r,r", [words], dtype=tl.float16, is_pure=True,
                                          pack=2)
    return found


@triton.jit
def halves(ptrs, BY_HAND: tl.constexpr):
    """The fp16 at these addresses as int32; see `scales` of kernels/quant.py. Nothing is done with them before they are
    needed: to turn them into fp32, or to pack two into a register, would be to wait for them."""
    if BY_HAND:
        return tl.inline_asm_elementwise("ld.global.nc.u16 $0, [$1];", "=r,l", [ptrs], dtype=tl.int32, is_pure=False,
                                         pack=1)
    return tl.load(ptrs).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def rows_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, residual_ptr, sums_ptr, x_stride, residual_stride, residual_step,
                y_stride, y_step, S, O, eps,
                D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr,
                BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, GROUPS: tl.constexpr, BY_HAND: tl.constexpr,
                X_STEP: tl.constexpr,
                EVEN: tl.constexpr, SUM_COLS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
                SUMS: tl.constexpr, GATED: tl.constexpr, PREFETCH: tl.constexpr, LATE: tl.constexpr,
                PDL: tl.constexpr):
    """BLOCK_O outputs of all rows; GATED, half of them are gates and half are ups; EVEN, the last program has as many.
    GROUPS groups a round, one a warp.
    PREFETCH: rounds whose words are asked into L2 before the wait. LATE: rounds before the end at which the next
    kernel may start; 0, at once."""
    tile = tl.program_id(0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // BITS                                   # values of a word
    WORDS: tl.constexpr = D // PER
    SPAN: tl.constexpr = GROUP // PER                                # words of a group
    BLOCK_W: tl.constexpr = SPAN if SPAN > 16 else 16                # no product is shorter
    G: tl.constexpr = D // GROUP
    END: tl.constexpr = (G + GROUPS - 1) // GROUPS * GROUPS
    EXACT: tl.constexpr = END == G                                   # the groups fill every round
    WIDE: tl.constexpr = BLOCK_O // 2 if GATED else BLOCK_O          # outputs that are stored
    width = O // 2 if GATED else O
    local, group = tl.arange(0, BLOCK_O), tl.arange(0, GROUPS)
    word, s = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_S)
    if EVEN:                                                         # one address, and constants from there
        w_row = tile * WIDE + local % WIDE + local // WIDE * width
        w_rows = w_ptr + (tile * WIDE).to(tl.int64) * WORDS + local % WIDE * WORDS
        w_rows += (local // WIDE).to(tl.int64) * width * WORDS
    else:                                                            # past the edge any row will do
        w_row = tl.minimum(tile * WIDE + local % WIDE, width - 1) + local // WIDE * width
        w_rows = w_ptr + w_row.to(tl.int64) * WORDS
    w_ptrs = w_rows[None, :, None] + group[:, None, None] * SPAN + word[None, None, :]
    BY_COLUMNS: tl.constexpr = X_STEP > 1                            # of BLOCK_S values: no row has to be masked
    x_ptrs = x_ptr + (group[:, None, None] * GROUP + word[None, :, None]) * X_STEP
    if BY_COLUMNS:
        x_ptrs += s[None, None, :]
    else:
        x_ptrs += s.to(tl.int64)[None, None, :] * x_stride
    scale_ptrs = scale_ptr + w_row[None, :]
    if PREFETCH > 0:                                                 # weights depend on nobody: ask before the wait
        line = tl.arange(0, PREFETCH * GROUPS * SPAN // 32)          # of 128 bytes
        prefetch(w_rows[:, None] + line[None, :] * 32)
    scale = halves(scale_ptrs + tl.minimum(group, G - 1)[:, None] * O, BY_HAND)                     # [GROUPS, BLOCK_O]
    if PDL:
        gdc_wait()
        if LATE == 0:
            gdc_launch_dependents()
    out = tile * WIDE + tl.arange(0, WIDE)
    held = (out < width)[:, None] & (s < S)[None, :]                 # neither outputs nor rows need fill their block
    if RESIDUAL:
        residual_ptrs = residual_ptr + s.to(tl.int64)[None, :] * residual_stride + out[:, None] * residual_step
        residual = tl.load(residual_ptrs, mask=held, other=0.0)
    factor = tl.zeros((BLOCK_S,), dtype=tl.float32)
    acc = tl.zeros((GROUPS, BLOCK_O, BLOCK_S), dtype=tl.float32)
    for start in range(0, END, GROUPS):
        next_scale = halves(scale_ptrs + tl.minimum(start + GROUPS + group, G - 1)[:, None] * O, BY_HAND)
        real = (s < S)[None, None, :] | BY_COLUMNS
        there = start if EXACT else tl.minimum(start + group, G - 1)[:, None, None] - group[:, None, None]
        if SPAN == BLOCK_W:
            w = tl.load(w_ptrs + there * SPAN)                                             # [GROUPS, BLOCK_O, BLOCK_W]
        else:                                                        # short groups
            w = tl.load(w_ptrs + there * SPAN, mask=(word < SPAN)[None, None, :], other=0)
            real = real & (word < SPAN)[None, :, None]
        if NORM:
            if start == 0:                                           # here, with the first weights already on their way
                t = tl.arange(0, BLOCK_T)
                sums = tl.load(sums_ptr + s[:, None] * T + t[None, :], mask=(s < S)[:, None] & (t < T)[None, :],
                               other=0.0)
                factor = tl.rsqrt(tl.sum(sums, 1) / D + eps)
        part = tl.zeros((GROUPS, BLOCK_O, BLOCK_S), dtype=tl.float32)
        for i in tl.static_range(PER):
            at = x_ptrs + (there * GROUP + i * SPAN) * X_STEP
            if BY_COLUMNS and SPAN == BLOCK_W:
                x = tl.load(at)                                                            # [GROUPS, BLOCK_W, BLOCK_S]
            else:
                x = tl.load(at, mask=real, other=0.0)
            part = tl.dot(values(w, i, BITS, dtype, BY_HAND), x, part, input_precision="ieee")
        weight = scale.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        if not EXACT:                                                # in the last round some groups come once more
            weight = tl.where((start + group < G)[:, None], weight, 0.0)
        acc += part * weight[:, :, None]
        scale = next_scale
        if PDL and LATE > 0:
            launch_dependents_if(start, END - LATE * GROUPS)
    y = tl.sum(acc, 0)                                                                             # [BLOCK_O, BLOCK_S]
    if NORM:
        y *= factor[None, :]
    if BY_COLUMNS:                                                   # what lies behind the rows is not theirs
        y = tl.where((s < S)[None, :], y, 0.0)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, WIDE, BLOCK_S)), (1, 2, 0)))
        rounded = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    else:
        rounded = y.to(dtype)
    if RESIDUAL:
        rounded = (residual.to(tl.float32) + rounded.to(tl.float32)).to(dtype)
    tl.store(y_ptr + s.to(tl.int64)[None, :] * y_stride + out[:, None] * y_step, rounded, mask=held)
    if SUMS:
        square = tl.where(held, rounded.to(tl.float32) * rounded.to(tl.float32), 0.0)
        PARTS: tl.constexpr = BLOCK_O // SUM_COLS
        total = tl.sum(tl.reshape(square, (PARTS, SUM_COLS, BLOCK_S)), 1)                            # [PARTS, BLOCK_S]
        t = tile * PARTS + tl.arange(0, PARTS)
        tl.store(sums_ptr + s[None, :] * T + t[:, None], total, mask=(s < S)[None, :] & (t < T)[:, None])


def launch_config(O, D, bits, group, itemsize, device):
    """Tile, pipeline and warps: the best of `--tune` at 16 rows of bf16, on an H200."""
    BLOCK_S = FEW
    if O <= 4096:                                            # o and down: 128 programs of 32 outputs
        BLOCK_O, GROUPS, stages, maxnreg = (32, 8, 4, 128) if D > 4096 else (32, 4, 3, None)
    elif bits == 8 or O > 16384:                             # gate-up and head
        BLOCK_O, GROUPS, stages, maxnreg = 64, 4, 2, 168 if bits == 4 else None
    else:
        BLOCK_O, GROUPS, stages, maxnreg = 32, 4, 4, None
    stage = GROUPS * (4 * BLOCK_O * max(16, group * bits // 32) + itemsize * group * BLOCK_S)
    return dict(BLOCK_S=BLOCK_S, BLOCK_O=BLOCK_O, GROUPS=GROUPS, num_warps=GROUPS, PREFETCH=1, LATE=2,
                num_stages=stages_that_fit(stages, stage, device), maxnreg=maxnreg if itemsize == 2 else None)


def quant_rows(x_SD, w: Packed, work=None, norm=None, residual=None, gated=False, **override):
    """x @ dequantise(w).T, [S, O] for 3 to 16 rows; fewer work too. Arguments as those of `skinny`; of `norm` only the
    epsilon is used, for w holds its weight. x may lie by rows or, faster, by `columns`. What
    has a residual or is gated feeds another product and is laid out by columns, the rest by rows."""
    (S, D), O = x_SD.shape, w.shape[0]
    assert 1 <= S <= MAX_PACKED_ROWS, f"quant_rows: {S} rows, wanted {PAIR + 1}..{MAX_PACKED_ROWS}"
    step = x_SD.stride(1)
    assert w.shape[1] == D and (step == 1 or x_SD.stride() == (1, FEW)), \
        f"quant_rows: weight {tuple(w.shape)} for rows of {D}, strides {x_SD.stride()}"
    assert w.normed == (norm is not None), f"quant_rows: norm {norm is not None}, folded into the weight {w.normed}"
    assert norm is None or residual is None, "quant_rows: a norm before and a residual after would share their sums"
    width = O // 2 if gated else O
    assert residual is None or residual.shape == (S, width), \
        f"quant_rows: residual {tuple(residual.shape)} beside a result of {(S, width)}"
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return quant_ref(x_SD, w, norm, residual, gated)
    if gated or residual is not None:
        y_SO = columns(S, width, x_SD)
    else:
        y_SO = torch.empty((S, width), dtype=x_SD.dtype, device=x_SD.device)
    kept = y_SO if residual is None else residual
    pdl, sums = work is not None and work.pdl, work is not None and residual is not None
    if norm is not None:
        work = work or Sums(x_SD)
        row_sums(x_SD, work)
    model = D if norm is not None else O if sums else None
    assert model is None or work.sums_ST.shape[1] == triton.cdiv(model, SUM_COLS), \
        f"quant_rows: rows of {model}, a Workspace for {work.sums_ST.shape[1] * SUM_COLS}"
    itemsize, G, span = x_SD.element_size(), D // w.group, w.group * w.bits // 32
    config = {**launch_config(O, D, w.bits, w.group, itemsize, x_SD.device), **override}
    assert not sums or config["BLOCK_O"] % SUM_COLS == 0, f"quant_rows: {config['BLOCK_O']} outputs, sums of {SUM_COLS}"
    if not pdl or config["PREFETCH"] * config["GROUPS"] > G or config["GROUPS"] * span < 32:
        config["PREFETCH"] = 0                               # nothing to bridge, or not as many words as that
    config["LATE"] = min(config["LATE"], triton.cdiv(G, config["GROUPS"])) if pdl and work.late else 0
    T = triton.cdiv(model, SUM_COLS) if model else 1
    rows_kernel[(triton.cdiv(O, config["BLOCK_O"]),)](
        x_SD, w.words_OW, w.scale_GO, y_SO, kept, work.sums_ST if model else x_SD, x_SD.stride(0), *kept.stride(),
        *y_SO.stride(), S=S, O=O, X_STEP=step,
        eps=norm[1] if norm else 0.0, D=D, BITS=w.bits, GROUP=w.group, T=T, BLOCK_T=triton.next_power_of_2(T),
        BY_HAND=itemsize == 2 and not INTERPRETED, EVEN=O % config["BLOCK_O"] == 0, SUM_COLS=SUM_COLS,
        NORM=norm is not None, RESIDUAL=residual is not None, SUMS=sums, GATED=gated, PDL=pdl, launch_pdl=pdl, **config)
    return y_SO


def main():
    """Agreement with fp64, each product, then a step."""
    from kernels.chain import report

    report("int4")


if __name__ == "__main__":
    self_check(main, __file__)
