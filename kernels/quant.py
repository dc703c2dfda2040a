"""quant: y = x @ w.T with weights packed to 4 or 8 bits, for steps of 1 to 16 rows that only drafts hang on; the same
call and the same folds (norm, SwiGLU, residual) as kernels/skinny.py. kernels/products.py chooses between them.

A weight is scale * (u - 2^(bits-1)), u unsigned; one fp16 scale stands over 128 inner columns of one output. The tensor
cores' instruction of 16 outputs and 8 rows of x (the weights its tall operand, as Marlin does) is written in PTX:
weights are packed in the order in which threads want them in registers, so that a warp loads 512 contiguous bytes at a
time. Each thread copies its words to shared memory ahead of time (cp.async) and reads only what it has copied itself: a
queue without barriers, filled before the wait on the kernel ahead. A program's warps have inner columns of their own,
and their sums meet once, at the end. A norm's weight is folded into the packed one. A row's bits may depend on the row
count, and on nothing else.

- 2 to 16 rows (m16n8k16): a 4-bit value becomes half a register by a shift, an and-or and a subtraction: its bits land
  in a mantissa, as u + 128 in bf16, u + 1024 in fp16. A norm's sums of squares are the diagonal of x @ x.T.
- A single row is a draft, and is limited by those instructions, so it is rounded to 8 bits first, with a scale for each
  group of columns (`rounded`): m16n8k32 multiplies the values as they are, two operands of a word by one shift and two
  ands, and a group's sum is whole. Beside the weights' error, a tenth, that of x is a hundredth: of SmolLM2-135M's
  1,380 ids a turned copy drafts 0.829 right without it, 0.830 with it (KL 0.152 and 0.155 nats).

Bytes: O*D*bits/8 + O*D/64 of scales. LLaMA-7B, a layer at 4 bits: qkv 26.0 MB, o 8.7, gate-up 46.5, down 23.2; with an
8-bit head of 133 MB 3.47 GB a step, 0.79 ms at the 4.4 TB/s that an H200 reads.

One H200, bf16 x, target shapes, context 2,100, ms a step of 1 / 2 / 8 / 16 rows: 1.46 / 1.70 / 1.81 / 2.13
(`python -m tests.figures`); 1.57 / 1.87 / 2.01 / 2.33 before the attention of kernels/early.py.
What brought what, in one run each:
- all row counts by one kernel of tensor cores, in place of multiply-add and Triton's dot: 1.92 / 3.04 / 3.39 / 3.43 to
  1.91 / 1.94 / 2.09 / 2.71;
- u's excess taken from each weight and not by one more product: 16 rows 2.69 to 2.36, 1 row 1.90 to 1.89;
- a single row in 8 bits: 1.76 to 1.65, its tiles tuned again 1.60, fewer instructions to round it 1.56; the same row
  in 16 bits from shared memory, without a round trip a block: 1.80 to 1.76;
- tiles and warps tuned for up to 4, 8 and 16 rows apart, in a chain: 2 rows 1.74 to 1.70, 8 rows 1.81 to 1.79, 16 rows
  2.20 to 2.10, of which down's two tiles a program of 16 warps 0.07;
- two tiles of outputs a program, so that all programs of a product are resident at once: qkv 8.6 us, with one 13.3;
- words on their way in shared memory in place of registers: gate-up 15.5 of 19.5;
- plain loads and not `ld.global.nc`, which ptxas moves behind the wait on the kernel ahead.
Microseconds that a step of 1 row gains by leaving a kernel of each layer out, beside bytes at 4.4 TB/s: qkv 6.4 (5.9),
attention with its combine 11.4 (7.8), o 4.3 (2.0), gate-up 9.8 (10.6), down 7.3 (5.3): down rounds 11,008 columns in
every program.
Tried and dropped: a head of 4 bits (24 us in place of 36: 0.6 % of a step, for worse drafts); releasing the next kernel
before the wait (0.6 % slower at 1 row, no faster at 16 since its tiles are tuned) or near the end, as kernels/skinny.py
does (13 % slower); x of several rows fetched two rounds ahead (5 % slower: registers); the next product's weights asked
into L2 by whatever ends before it, 4 to 20 MB (2 to 9 % slower; a plain step 3 to 5 %); two warps a program (gate-up 20
to 26, qkv 15.8); all rounds unrolled (no faster, ten times the compile time); weights of bf16 by this kernel (a step of
4.27 ms, skinny 3.98); one split of L1 and shared memory for all kernels of a step (no difference)."""

# mypy: disable-error-code="assignment, misc"
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.rmsnorm import rmsnorm_ref
from kernels.swiglu import silu_times, swiglu_ref

LAYER_BITS, HEAD_BITS = 4, 8         # of a packed model
MAX_PACKED_ROWS = 16                 # rows of a step with packed weights
PACK_ROWS = 1024                     # packed at a time; whole tiles
TURNED = 64                          # columns of a stream that are turned into each other
RATIOS = {8: (1.0,), 4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)}  # of the widest scale, tried for the least squared error
SHARED = 48 * 1024                   # bytes that a program may declare
TILE = 16                            # outputs of one matrix instruction; 16 in the kernel's code
BLOCK = 64                           # inner columns of a tile, four such instructions; 64 there


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [O, D] in few bits, in tiles of 16 outputs by 64 inner columns."""
    words: torch.Tensor         # int32 [tiles, D / 64, bits / 4, 32 threads, 4]; see `places`
    scales: torch.Tensor        # fp16 [tiles, D / group, 8, 2]: outputs g and g + 8
    O: int
    bits: int                   # 4 or 8
    group: int                  # inner columns under one scale: 128, or 64
    normed: bool = False        # the weight of the norm in front is folded in

    @property
    def shape(self):
        return torch.Size((self.O, self.words.shape[1] * BLOCK))

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


class NotPackable(ValueError):
    """A weight whose inner dimension makes no whole groups."""


def group_of(D: int) -> int:
    if D % BLOCK:
        raise NotPackable(f"{D} inner columns; wants a multiple of {BLOCK}")
    return 128 if D % 128 == 0 else 64


def packed_bytes(O: int, D: int, bits: int) -> int:
    """Bytes of a Packed weight [O, D]."""
    rows = triton.cdiv(O, TILE) * TILE
    return rows * D * bits // 8 + 2 * rows * D // group_of(D)


@functools.cache
def places(bits, device="cpu"):
    """int64 [16 * 64]: which weight of a tile, counted by output and column, stands at [quad of words, thread, word,
    value]. Thread 4 g + t of a warp has outputs g and g + 8 and columns 8 t .. 8 t + 7 of every 32, so that it loads 16
    bytes of x at a time; any order of the columns does, if x has the same. Here it is one in which the values half a
    word apart are neighbours, for 16-bit products, and a byte's values belong to operands of their own, for 8-bit
    ones."""
    per = 32 // bits
    quad, thread, word, value = torch.meshgrid(*map(torch.arange, (bits // 4, 32, 4, per)), indexing="ij")
    if bits == 4:
        part, row, column = word // 2, 8 * (word % 2), torch.tensor([0, 4, 2, 6, 1, 5, 3, 7])[value]
    else:
        part, row, column = quad, 8 * (word // 2), torch.tensor([0, 2, 1, 3])[value] + 4 * (word % 2)
    return ((thread // 4 + row) * BLOCK + 32 * part + 8 * (thread % 4) + column).flatten().to(device)


@functools.cache
def hadamard(B: int, dtype, device):
    """[B, B] of 1 and -1 over the root of B, a power of two: symmetric, and its own inverse."""
    H = torch.ones(1, 1)
    while len(H) < B:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H * B ** -0.5).to(device, dtype)


def turned(x_SD):
    """Rows with every 64 columns (fewer if D asks for it) turned into each other; twice turned is as it was.

    A model whose stream is turned computes the same: `quantise` turns what reads the stream and what writes it, and a
    norm without a weight sees no difference. But what sticks out in a column, of weights or of their inputs, is shared
    by 64, and 4 bits lose less. Drafts that are right, of SmolLM2-135M's own text: 0.767 -> 0.830 of 1,380 ids
    (tests/agreement.py). Source of the idea: QuaRot, arXiv 2404.00456."""
    D = x_SD.shape[1]
    B = min(TURNED, D & -D)
    return (x_SD.unflatten(1, (-1, B)) @ hadamard(B, x_SD.dtype, x_SD.device)).flatten(1)


def uneven(w_OD, norm_D) -> float:
    """Whether a weight behind a norm gains by `turned`: its fourth moment over the second squared. Turned weights have
    3, as normal ones, whose groups are even. SmolLM2-135M: 28 (qkv) and 7 (gate-up); stories260K: 12; the embedded
    pair: 2.7, and turned it would lose more."""
    square = (w_OD.float() * norm_D.float()).square_()
    return (square.square().mean() / square.mean().square()).item()


def quantise(w_OD, bits, norm_D=None, turn=False) -> Packed:
    """Rounds to the nearest of 2^bits steps. The largest weight of a group, with its sign, is the lowest step, which
    has no counterpart above; at 4 bits narrower scales are tried too: a few clipped weights can pay for finer steps.
    norm_D: the weight of an RMSNorm in front, folded in: programs would read it as often as x. turn: for a stream that
    is `turned`, which a weight behind a norm reads and any other writes. Rows are independent, and go PACK_ROWS at a
    time: one takes a dozen times its own size meanwhile.
    Tried and dropped, share of right drafts of SmolLM2-135M beside 0.833 (turned densely, groups of 64): zero points
    0.830, half-quadratic fitting 0.840 (both one more fp16 a group), a finer search of scales 0.836, groups of 32
    0.849 (twice the scales), a 4-bit head 0.776."""
    rows = PACK_ROWS if w_OD.shape[1] <= 4096 else PACK_ROWS // 4
    if len(w_OD) > rows and not (turn and norm_D is None and len(w_OD) % TURNED):
        parts = [quantise(part, bits, norm_D, turn) for part in w_OD.split(rows)]
        return Packed(torch.cat([p.words for p in parts]), torch.cat([p.scales for p in parts]), len(w_OD), bits,
                      parts[0].group, parts[0].normed)
    if turn and norm_D is None:
        return quantise(turned(w_OD.float().T).T, bits)
    (O, D), half, per = w_OD.shape, 1 << bits - 1, 32 // bits
    group, tiles = group_of(D), triton.cdiv(O, TILE)
    w = w_OD.float() if norm_D is None else w_OD.float() * norm_D.float()
    w = turned(w) if turn else w
    w = torch.nn.functional.pad(w, (0, 0, 0, tiles * TILE - O)).view(-1, D // group, group)
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
    u = (q + half).to(torch.int32).view(tiles, TILE, D // BLOCK, BLOCK).transpose(1, 2).flatten(2)
    u = u[:, :, places(bits, u.device)].view(tiles, D // BLOCK, bits // 4, 32, 4, per)
    words = u[..., 0].clone()
    for i in range(1, per):
        words |= u[..., i] << bits * i
    scales = scale.view(tiles, 2, 8, D // group).permute(0, 3, 2, 1).contiguous()
    return Packed(words, scales, O, bits, group, norm_D is not None)


def dequantise(w: Packed, dtype=torch.float32):
    """[O, D]; exact in fp32."""
    (O, D), tiles = w.shape, len(w.words)
    shift = torch.arange(0, 32, w.bits, dtype=torch.int32, device=w.words.device)
    u = ((w.words[..., None] >> shift) & (1 << w.bits) - 1).view(tiles, D // BLOCK, -1)
    u = u[:, :, places(w.bits, u.device).argsort()].view(tiles, -1, TILE, BLOCK).transpose(1, 2)
    scale = w.scales.to(dtype).permute(0, 3, 2, 1).reshape(tiles * TILE, -1, 1)
    return ((u - (1 << w.bits - 1)).to(dtype).reshape(len(scale), -1, w.group) * scale).reshape(-1, D)[:O]


def rounded(x_SD, group):
    """Rows whose groups of columns are whole numbers of -127 to 127 times a scale, as a single row is multiplied."""
    x = x_SD.unflatten(1, (-1, group))
    x = x if x.dtype == torch.float64 else x.float()
    scale = x.abs().amax(2, keepdim=True) / 127
    return ((x / scale.masked_fill(scale == 0, 1)).round() * scale).flatten(1).to(x_SD.dtype)


def quant_ref(x_SD, w: Packed, norm=None, residual=None, gated=False):
    x_SD = x_SD if norm is None else rmsnorm_ref(x_SD, torch.ones_like(x_SD[0]), norm[1])
    x_SD = rounded(x_SD, w.group) if len(x_SD) == 1 else x_SD
    y_SO = torch.nn.functional.linear(x_SD, dequantise(w, x_SD.dtype))
    y_SO = swiglu_ref(y_SO) if gated else y_SO
    return y_SO if residual is None else residual + y_SO


@triton.constexpr_function
def unpacking(bits, bf16, half):
    """PTX that turns two words of a thread, of outputs g and g + 8, into the four registers of a matrix instruction,
    pairs of 16-bit floats, exactly; half: the first or the second instruction of a word of 4-bit weights. 4 bits: u +
    128 (fp16: 1024), less 136 (1032); 8 bits: 128 + the low 7 bits, less 128 or 256 (fp16: u + 1024, less 1152)."""
    one, fma, magic = (0x3f803f80, "fma.rn.bf16x2", 0x43004300) if bf16 else (0x3c003c00, "fma.rn.f16x2", 0x64006400)
    mask = 0x000f000f if bits == 4 else 0x007f007f if bf16 else 0x00ff00ff
    less = (0xc308c308 if bf16 else 0xe408e408) if bits == 4 else 0xe480e480
    code = f"{{.reg .b32 v, one, less; mov.b32 one, {one}; mov.b32 less, {less};"
    for i in range(4):
        code += f"shr.u32 v, ${4 + i % 2}, {i // 2 * 8 + 4 * half * (bits == 4)};"
        if bits == 8 and bf16:
            code += "lop3.b32 less, v, 0x00800080, 0xc380c380, 0x6a;"
        code += f"lop3.b32 v, v, {mask}, {magic}, 0xea; {fma} ${i}, v, one, less;"
    return code + "}"


@triton.constexpr_function
def squaring(bf16):
    kind = "bf16" if bf16 else "f16"
    return (f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5}}, {{$6}}, "
            "{$7, $8, $9, $10};")


@triton.constexpr_function
def multiplying(bf16):
    kind = "bf16" if bf16 else "f16"
    return (f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};")


@triton.jit
def loads_before():
    """Keeps loads above this line above it. Nobody waits for their data."""
    tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def multiplied8(a, b0, b1, c0, c1, c2, c3):
    """c + a @ b of a warp, [16, 8], over 32 columns: a in 8 bits from 0 up, b in 8 bits with a sign."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};", "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c0, c1, c2, c3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def multiplied(a, b0, b1, c0, c1, c2, c3, BF16: tl.constexpr):
    """c + a @ b of a warp, [16, 8], in the registers of its threads."""
    return tl.inline_asm_elementwise(
        multiplying(BF16), "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)


@triton.constexpr_function
def queue_of(size):
    return f"{{.shared .align 16 .b8 queue[{size}]; mov.u32 $0, queue; add.u32 $0, $0, $1;}}"


@triton.constexpr_function
def copying(size):
    how = "cg" if size == 16 else "ca"
    return f"cp.async.{how}.shared.global [$1], [$2], {size}, $3; mov.u32 $0, 0;"


@triton.constexpr_function
def waiting(left):
    return f"cp.async.wait_group {left}; mov.u32 $0, 0;"


@triton.jit
def enqueue(queue, w_ptrs, scale_ptrs, group, thread, G: tl.constexpr, TILES: tl.constexpr, QUADS: tl.constexpr,
            THREADS: tl.constexpr):
    """Starts to copy one group's words and scales, zeros where it is none, to a thread's own places of shared memory,
    from `queue` on: nobody else reads them, so nobody has to be waited for."""
    there = (group < G).to(tl.int32)
    group = tl.minimum(group, G - 1)
    for i in tl.static_range(TILES):
        for quad in tl.static_range(QUADS):
            tl.inline_asm_elementwise(copying(16), "=r,r,l,r", [queue + ((i * QUADS + quad) * THREADS + thread) * 16,
                                                                w_ptrs[i] + (group * QUADS + quad) * 128, there * 16],
                                      dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(copying(4), "=r,r,l,r", [queue + (TILES * QUADS * 4 + i) * THREADS * 4 + thread * 4,
                                                         scale_ptrs[i] + group * 8, there * 4],
                                  dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def dequeued(queue, block, thread, TILES: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, THREADS: tl.constexpr):
    """The words of a block of each tile."""
    words = ()
    for i in tl.static_range(TILES):
        for quad in tl.static_range(BITS // 4):
            place = (i * QUADS + block * (BITS // 4) + quad) * THREADS + thread
            words = words + tl.inline_asm_elementwise(
                "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [queue + place * 16],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1)
    return words


@triton.jit
def rows_at(ptrs):
    """Eight 16-bit floats in four words."""
    return tl.inline_asm_elementwise("ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [ptrs],
                                     dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1)


@triton.jit
def fetch_rows(x_ptrs, block, there, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """x at a block of 64 inner columns, 0 where it is not there: 8 words of a thread for every eight rows."""
    x = ()
    for part in tl.static_range(2):
        for j in tl.static_range(COLUMNS):
            x = x + rows_at(x_ptrs[j] + block * 64 + part * 32)
    if MASKED:
        kept = ()
        for k in tl.static_range(8 * COLUMNS):
            kept = kept + (tl.where(there, x[k], 0),)
        x = kept
    return x


@triton.jit
def columns_of(x, m: tl.constexpr, COLUMNS: tl.constexpr):
    """x as the narrow operand of instruction m: two words of each eight rows."""
    b = ()
    for j in tl.static_range(COLUMNS):
        b = b + (x[(m // 2 * COLUMNS + j) * 4 + m % 2 * 2], x[(m // 2 * COLUMNS + j) * 4 + m % 2 * 2 + 1])
    return b


@triton.jit
def squares(gram, b, COLUMNS: tl.constexpr, BF16: tl.constexpr):
    """gram + x @ x.T, whose diagonal are sums of squares. The tall operand is two neighbouring words of x, as they are:
    of eight registers for every eight rows the first two have the one's sums, the last two the other's."""
    total = ()
    for j in tl.static_range(COLUMNS):
        for i in tl.static_range(2):
            total = total + tl.inline_asm_elementwise(
                squaring(BF16), "=f,=f,=f,=f,r,r,r,f,f,f,f",
                [b[2 * j], b[2 * j + 1], b[2 * j + i], gram[j * 8 + i * 4], gram[j * 8 + i * 4 + 1],
                 gram[j * 8 + i * 4 + 2], gram[j * 8 + i * 4 + 3]],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)
    return total


@triton.jit
def products_of(part, words, b, m: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
                BF16: tl.constexpr):
    """part + the products of instruction m of a block."""
    AT: tl.constexpr = m // 2 * (BITS // 2) + (m % 2 if BITS == 8 else 0)
    made = ()
    for i in tl.static_range(TILES):
        a = tl.inline_asm_elementwise(unpacking(BITS, BF16, m % 2), "=&r,=&r,=&r,=&r,r,r",
                                      [words[i * BITS + AT], words[i * BITS + AT + BITS // 4]],
                                      dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)
        for j in tl.static_range(COLUMNS):
            made = made + multiplied(a, b[2 * j], b[2 * j + 1], part[(i * COLUMNS + j) * 4],
                                     part[(i * COLUMNS + j) * 4 + 1], part[(i * COLUMNS + j) * 4 + 2],
                                     part[(i * COLUMNS + j) * 4 + 3], BF16)
    return made


@triton.jit
def products8(part, words, b, TILES: tl.constexpr, BITS: tl.constexpr):
    """part + the products of a block with a single row in 8 bits."""
    made = ()
    for i in tl.static_range(TILES):
        c0, c1, c2, c3 = part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]
        for m in tl.static_range(2):
            if BITS == 4:
                low, high = words[4 * i + 2 * m], words[4 * i + 2 * m + 1]
                a = (low & 0x0f0f0f0f, high & 0x0f0f0f0f, (low >> 4) & 0x0f0f0f0f, (high >> 4) & 0x0f0f0f0f)
            else:
                a = (words[8 * i + 4 * m], words[8 * i + 4 * m + 2], words[8 * i + 4 * m + 1], words[8 * i + 4 * m + 3])
            c0, c1, c2, c3 = multiplied8(a, b[2 * m], b[2 * m + 1], c0, c1, c2, c3)
        made = made + (c0, c1, c2, c3)
    return made


@triton.jit
def scales_at(place):
    """A group's scales of outputs g and g + 8."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 v; .reg .f16 l, h; ld.shared.u32 v, [$2]; mov.b32 {l, h}, v; cvt.f32.f16 $0, l; "
        "cvt.f32.f16 $1, h;}", "=&f,=&f,r", [place], dtype=(tl.float32, tl.float32), is_pure=False, pack=1)


@triton.jit
def scaled(acc, part, place, times, TILES: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
           ONE: tl.constexpr):
    """acc + part * scales. ONE: part holds whole numbers, and `times` is the row's own scale."""
    total = ()
    for i in tl.static_range(TILES):
        low, high = scales_at(place + i * THREADS * 4)
        if ONE:
            low, high = low * times, high * times
        for k in tl.static_range(COLUMNS * 4):
            made = part[i * COLUMNS * 4 + k]
            if ONE:
                made = made.to(tl.float32, bitcast=True) - 12582912.0
            total = total + (acc[i * COLUMNS * 4 + k] + made * (low if k % 4 < 2 else high),)
    return total


@triton.jit
def of_lane(x, lane):
    """x of another thread of the warp."""
    return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, lane],
                                     dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def floats_of(word, BF16: tl.constexpr):
    """The two 16-bit floats of a word."""
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise("{.reg .f16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
                                         "=&f,=&f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def bytes_of(a, b, c, d):
    """The low bytes of four words, in one."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 l, h; prmt.b32 l, $1, $2, 0x0040; prmt.b32 h, $3, $4, 0x0040; prmt.b32 $0, l, h, 0x5410;}",
        "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def units(word, more):
    """The sum of a word's four signed bytes, and `more`."""
    return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, 0x01010101, $2;", "=r,r,r", [word, more], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def keep_row(place, x_ptr, warp, lane, G: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr,
             HALF: tl.constexpr, NORM: tl.constexpr, BF16: tl.constexpr):
    """Puts a single row's columns of this warp into shared memory, in 8 bits, round by round, and behind them for each
    round its scale and where its sums begin: 1.5 * 2^23 in the bits of a float, less HALF for every unit of x. So whole
    numbers come out of `multiplied8` as floats. NORM: returns the sum of the squares, too. The row is fetched at once:
    a round trip to L2 takes longer than the products of a round."""
    PIECES: tl.constexpr = GROUP // 8                                # of 8 columns, a thread's
    LEVELS: tl.constexpr = 3 if PIECES == 8 else 4
    words, sums, none = (), (lane * 0).to(tl.float32), lane * 0
    for i in tl.static_range(STEPS):
        at = i * 32 + lane
        group = warp + at // PIECES * WARPS
        found = rows_at(x_ptr + tl.minimum(group, G - 1) * GROUP + at % PIECES * 8)
        for k in tl.static_range(4):
            words = words + (tl.where(group < G, found[k], 0),)
    for i in tl.static_range(STEPS):
        x, q = (), ()
        for k in tl.static_range(4):
            x = x + floats_of(words[4 * i + k], BF16)
        widest = tl.abs(x[0])
        for k in tl.static_range(8):
            widest = tl.maximum(widest, tl.abs(x[k]), propagate_nan=tl.PropagateNan.ALL)
            if NORM:
                sums += x[k] * x[k]
        for k in tl.static_range(LEVELS):
            widest = tl.maximum(widest, of_lane(widest, lane ^ (1 << k)), propagate_nan=tl.PropagateNan.ALL)
        inverse = tl.div_rn((none + 127).to(tl.float32), tl.where(widest == 0, 1.0, widest))
        for k in tl.static_range(8):
            whole = tl.fma(x[k], inverse, none.to(tl.float32) + 12582912.0)
            q = q + (whole.to(tl.int32, bitcast=True),)
        low, high = bytes_of(q[0], q[2], q[1], q[3]), bytes_of(q[4], q[6], q[5], q[7])
        total = units(low, units(high, none)).to(tl.float32)
        for k in tl.static_range(LEVELS):
            total += of_lane(total, lane ^ (1 << k))
        at = i * 32 + lane
        column, turn = at % PIECES, at // PIECES
        put(place + turn * GROUP + column // 8 * 64 + column % 4 * 16 + column // 4 % 2 * 8, low, high)
        put(place + STEPS * 256 + turn * 8, (widest * (1 / 127)).to(tl.int32, bitcast=True),
            0x4b400000 - HALF * total.to(tl.int32))
    if NORM:
        for k in tl.static_range(5):
            sums += of_lane(sums, lane ^ (1 << k))
    return sums


@triton.jit
def put(place, a, b):
    """Two words into shared memory."""
    tl.inline_asm_elementwise("st.shared.v2.u32 [$1], {$2, $3}; mov.u32 $0, 0;", "=r,r,r,r", [place, a, b],
                              dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def leave(queue, c, thread, CELLS: tl.constexpr, THREADS: tl.constexpr):
    """Puts four values of this thread into each of its cells of shared memory."""
    for k in tl.static_range(CELLS):
        tl.inline_asm_elementwise("st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;", "=r,r,f,f,f,f",
                                  [queue + (k * THREADS + thread) * 16, c[4 * k], c[4 * k + 1], c[4 * k + 2],
                                   c[4 * k + 3]], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def over_warps(queue, cell, lane, WARPS: tl.constexpr):
    """The sums over the warps of what their threads in this lane left in a cell, always in the same order."""
    total = ((lane * 0).to(tl.float32),) * 4
    for warp in tl.static_range(WARPS):
        place = queue + ((cell * WARPS + warp) * 32 + lane) * 16
        c = tl.inline_asm_elementwise("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", [place],
                                      dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1)
        total = (total[0] + c[0], total[1] + c[1], total[2] + c[2], total[3] + c[3])
    return total


@triton.jit
def result_of(cell, lane, k: tl.constexpr, first, S, width, STORED: tl.constexpr, COLUMNS: tl.constexpr):
    """(row, output, whether there is such a one) of a thread's k-th value of four in a cell, a tile and eight rows."""
    row = lane % 4 * 2 + k % 2 + cell % COLUMNS * 8
    out = first + cell // COLUMNS * 16 + lane // 4 + k // 2 * 8
    return row, out, (row < S) & (out < width) & (cell < STORED * COLUMNS)


@triton.jit(do_not_specialize=["S"])
def quant_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, residual_ptr, x_stride, residual_stride, S, O, eps,
                 D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
                 WARPS: tl.constexpr, AHEAD: tl.constexpr, ONE: tl.constexpr, NORM: tl.constexpr,
                 RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr):
    """TILES * 16 outputs of all rows, at most COLUMNS * 8; GATED, half of the tiles are gates and half are ups. Each
    warp has groups of inner columns of its own.

    A vector has one element for every thread: what a thread holds in registers is known, and written down in PTX."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    BF16: tl.constexpr = dtype == tl.bfloat16
    THREADS: tl.constexpr = 32 * WARPS
    G: tl.constexpr = D // GROUP
    BLOCKS: tl.constexpr = GROUP // 64
    QUADS: tl.constexpr = BLOCKS * (BITS // 4)                       # of words, of a thread, a tile and a group
    ROUNDS: tl.constexpr = (G + WARPS - 1) // WARPS
    DEPTH: tl.constexpr = AHEAD if AHEAD < ROUNDS else ROUNDS
    SLOT: tl.constexpr = TILES * (QUADS * 16 + 4) * THREADS          # bytes of a round's words and scales
    STORED: tl.constexpr = TILES // 2 if GATED else TILES            # tiles of results
    pid = tl.program_id(0)
    thread = tl.arange(0, THREADS)
    warp, lane = thread // 32, thread % 32
    width = O // 2 if GATED else O
    TURNS: tl.constexpr = (STORED * COLUMNS + WARPS - 1) // WARPS    # a warp's share of them
    CELLS: tl.constexpr = (TILES + NORM) * COLUMNS * THREADS * 16    # bytes of what the warps leave each other
    STEPS: tl.constexpr = (ROUNDS * (GROUP // 8) + 31) // 32         # a thread's shares of a single row
    KEPT: tl.constexpr = STEPS * (256 + 8 * 256 // GROUP) if ONE else 0      # bytes of that row, of a warp
    queue = tl.inline_asm_elementwise(queue_of(max(DEPTH * SLOT + WARPS * KEPT, CELLS)), "=r,r", [thread * 0],
                                      dtype=tl.int32, is_pure=False, pack=1)
    w_ptrs, scale_ptrs, x_ptrs = (), (), ()
    for i in tl.static_range(TILES):
        at = tl.minimum(pid * STORED + i % STORED, (width - 1) // 16) + i // STORED * (width // 16)
        w_ptrs = w_ptrs + (w_ptr + at.to(tl.int64) * (D // 64 * (BITS // 4) * 128) + lane * 4,)
        scale_ptrs = scale_ptrs + (scale_ptr + at.to(tl.int64) * (G * 8) + lane // 4,)
    for r in tl.static_range(DEPTH):
        enqueue(queue + r * SLOT, w_ptrs, scale_ptrs, warp + r * WARPS, thread, G, TILES, QUADS, THREADS)
    if PDL:                                                          # weights depend on nobody: on their way already
        gdc_wait()
        gdc_launch_dependents()
    zero = tl.zeros((THREADS,), dtype=tl.float32)
    x, square, row_place = (), zero, queue + DEPTH * SLOT + warp * KEPT
    if ONE:
        square = keep_row(row_place, x_ptr, warp, lane, G, GROUP, WARPS, STEPS, 1 << BITS - 1, NORM, BF16)
    else:
        for j in tl.static_range(COLUMNS):
            row = tl.minimum(lane // 4 + j * 8, S - 1)               # a column that is not there may hold any row
            x_ptrs = x_ptrs + (x_ptr + row.to(tl.int64) * x_stride + lane % 4 * 8,)
        x = fetch_rows(x_ptrs, tl.minimum(warp, G - 1) * BLOCKS, warp < G, COLUMNS, NORM and G % WARPS > 0)
    kept = ()
    if RESIDUAL:
        for turn in tl.static_range(TURNS):
            for k in tl.static_range(4):
                row, out, held = result_of(warp + turn * WARPS, lane, k, pid * STORED * 16, S, width, STORED, COLUMNS)
                kept = kept + (tl.load(residual_ptr + row.to(tl.int64) * residual_stride + out, mask=held, other=0.0),)
    acc, gram = (zero,) * (TILES * COLUMNS * 4), (zero,) * (COLUMNS * 8)
    if ONE:
        loads_before()                                               # a warp's threads read what others of it have put
    for r in range(ROUNDS):
        slot, group = queue + r % DEPTH * SLOT, warp + r * WARPS
        tl.inline_asm_elementwise(waiting(DEPTH - 1), "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        if ONE:
            times, begin = tl.inline_asm_elementwise("ld.shared.v2.u32 {$0, $1}, [$2];", "=r,=r,r",
                                                     [row_place + STEPS * 256 + r * 8], dtype=(tl.int32, tl.int32),
                                                     is_pure=False, pack=1)
            part, times = (begin,) * (TILES * 4), times.to(tl.float32, bitcast=True)
        else:
            part, times = (zero,) * (TILES * COLUMNS * 4), 1.0
        for block in tl.static_range(BLOCKS):
            words, now = dequeued(slot, block, thread, TILES, QUADS, BITS, THREADS), x
            if ONE:
                b = tl.inline_asm_elementwise("ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r",
                                              [row_place + r * GROUP + block * 64 + lane % 4 * 16],
                                              dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1)
                part = products8(part, words, b, TILES, BITS)
            else:
                next_group = group + (block + 1) // BLOCKS * WARPS   # the last round's last are fetched in vain
                x = fetch_rows(x_ptrs, tl.minimum(next_group, G - 1) * BLOCKS + (block + 1) % BLOCKS, next_group < G,
                               COLUMNS, NORM and G % WARPS > 0)
                loads_before()                                       # ptxas would put them last, to save registers
                for m in tl.static_range(4):
                    b = columns_of(now, m, COLUMNS)
                    if NORM:
                        gram = squares(gram, b, COLUMNS, BF16)
                    part = products_of(part, words, b, m, TILES, COLUMNS, BITS, BF16)
        acc = scaled(acc, part, slot + (TILES * QUADS * 4 * THREADS + thread) * 4, times, TILES, COLUMNS, THREADS, ONE)
        enqueue(slot, w_ptrs, scale_ptrs, group + DEPTH * WARPS, thread, G, TILES, QUADS, THREADS)
    tl.inline_asm_elementwise(waiting(0), "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()                                               # nobody reads the queue any more
    leave(queue, acc, thread, TILES * COLUMNS, THREADS)
    if NORM and ONE:
        leave(queue + TILES * THREADS * 16, (square, zero, zero, zero), thread, 1, THREADS)
    elif NORM:
        for j in tl.static_range(COLUMNS):
            leave(queue + (TILES * COLUMNS + j) * THREADS * 16, (gram[j * 8], gram[j * 8 + 1], gram[j * 8 + 6],
                                                                 gram[j * 8 + 7]), thread, 1, THREADS)
    tl.debug_barrier()
    t = lane % 4
    for turn in tl.static_range(TURNS):
        cell = warp + turn * WARPS
        mine = tl.minimum(cell, STORED * COLUMNS - 1)
        y = over_warps(queue, mine, lane, WARPS)
        if GATED:
            up = over_warps(queue, mine + STORED * COLUMNS, lane, WARPS)
        if NORM:                                                     # on the diagonal of x @ x.T
            s0, s1, s2, s3 = over_warps(queue, TILES * COLUMNS + mine % COLUMNS, lane, WARPS)
            even, odd = s0, s0
            if not ONE:
                even, odd = of_lane(s0 + s2, 9 * t), of_lane(s1 + s3, 9 * t + 4)
            even, odd = tl.rsqrt(even / D + eps), tl.rsqrt(odd / D + eps)
        for k in tl.static_range(4):
            factor = (even if k % 2 == 0 else odd) if NORM else 1.0
            value = (y[k] * factor).to(dtype)
            if GATED:
                value = silu_times(value.to(tl.float32), (up[k] * factor).to(dtype).to(tl.float32), dtype)
            if RESIDUAL:
                value = (kept[turn * 4 + k].to(tl.float32) + value.to(tl.float32)).to(dtype)
            row, out, held = result_of(cell, lane, k, pid * STORED * 16, S, width, STORED, COLUMNS)
            tl.store(y_ptr + row.to(tl.int64) * width + out, value, mask=held)


def launch_config(S, O, D, gated):
    """Tiles and warps of a program, and rounds of words on their way."""
    few = S <= 8
    if gated:
        tiles, warps, ahead = (2, 4, 4) if S == 1 else (2, 4, 3) if few else (4, 4, 2)
    elif O <= 4096 and D > O:
        tiles, warps, ahead = (1, 8, 2) if S == 1 else (1, 16, 2 if S <= 4 else 1) if few else (2, 16, 1)
    elif O <= 4096:
        tiles, warps, ahead = (1, 4, 8) if S == 1 else (1, 8, 4 if 4 < S <= 8 else 2)
    else:
        tiles, warps, ahead = (2, 4, 2) if O > 16384 else (2, 8, 2) if few else (2, 4, 4)
    return dict(TILES=tiles, num_warps=warps, AHEAD=ahead, ONE=S == 1)


def quant(x_SD, w: Packed, work=None, norm=None, residual=None, gated=False, **override):
    """x @ dequantise(w).T, [S, O] for 1 to 16 rows. Arguments as those of `skinny`; of work only whether to start early
    is used, and of `norm` only the epsilon, for w holds its weight. Rows of bf16 or fp16 that begin at multiples of 16
    bytes go through the kernel, others through plain torch."""
    (S, D), O = x_SD.shape, w.O
    assert 1 <= S <= MAX_PACKED_ROWS, f"quant: {S} rows, wanted 1..{MAX_PACKED_ROWS}"
    assert w.shape[1] == D and x_SD.stride(1) == 1, \
        f"quant: weight {tuple(w.shape)} for rows of {D}, strides {x_SD.stride()}"
    assert w.normed == (norm is not None), f"quant: norm {norm is not None}, folded into the weight {w.normed}"
    width = O // 2 if gated else O
    assert residual is None or residual.shape == (S, width) and residual.stride(1) == 1, \
        f"quant: residual {tuple(residual.shape)} beside a result of {(S, width)}"
    assert not gated or width % TILE == 0, f"quant: {width} gates, wanted a multiple of {TILE}"
    if not by_hand(x_SD):
        return quant_ref(x_SD, w, norm, residual, gated)
    y_SO = torch.empty((S, width), dtype=x_SD.dtype, device=x_SD.device)
    pdl, config = work is not None and work.pdl, {**launch_config(S, O, D, gated), **override}
    share = config["TILES"] * (w.group * 2 * w.bits + 128)   # bytes of a warp's round
    config["num_warps"] = min(config["num_warps"], 1 << (SHARED // share).bit_length() - 1)
    slot = share * config["num_warps"]
    steps = triton.cdiv(triton.cdiv(D // w.group, config["num_warps"]) * w.group, 256)
    kept = config["ONE"] * config["num_warps"] * steps * (256 + 2048 // w.group)     # bytes of a single row
    config["AHEAD"] = max(1, min(config["AHEAD"], (SHARED - kept) // slot))
    quant_kernel[(triton.cdiv(width, config["TILES"] * TILE // (2 if gated else 1)),)](
        x_SD, w.words, w.scales.view(torch.int32), y_SO, residual if residual is not None else x_SD, x_SD.stride(0),
        residual.stride(0) if residual is not None else 0, S, O, norm[1] if norm else 0.0, D=D, BITS=w.bits,
        GROUP=w.group, COLUMNS=1 if S <= 8 else 2, WARPS=config["num_warps"], NORM=norm is not None,
        RESIDUAL=residual is not None, GATED=gated, PDL=pdl, launch_pdl=pdl, **config)
    return y_SO


def by_hand(x_SD):
    """Whether the kernel takes these rows."""
    return x_SD.device.type != "cpu" and x_SD.element_size() == 2 and x_SD.stride(0) % 8 == 0 and \
        x_SD.data_ptr() % 16 == 0
