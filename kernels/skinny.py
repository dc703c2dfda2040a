"""skinny: y = x @ w.T for 1..32 rows of x, with what stands before and after it in a decoder layer folded in: RMSNorm
of x, SwiGLU of y, the residual sum. Row i's bits do not depend on how many rows there are: the weights are the tall
operand of the tensor cores' product, the rows the narrow one, a column each, and every column adds the inner
dimension in the same order. So a verify row equals a decode row. One program makes 64 outputs (32 where a residual
is added) of all rows. On Hopper 1 to 16 rows go to kernels/early.py, whose bits are the same.

Bytes: 2*O*D of weights, everything else is small. LLaMA-7B in bf16, a layer: qkv 101 MB, o 34, gate-up 180, down 90.

Measured, one H100 80GB, read-only stream 3.11 TB/s; microseconds that a step at context 2,100 gains by leaving one
kernel of every layer out, beside bytes / stream: qkv 35.6 (32.4), attention 15 to 17 (11.1), o 11.5 (10.8), gate-up
61.9 (58.0), down 30.5 (29.0). Whole step 5.14 ms for 1 row, 5.35 for 16, 5.61 for 32; the stream alone 4.60.
What made a difference there, ms of the whole step:
- programmatic dependent launch with the next kernel released near the end of the loop (LATE): 5.13 to 5.15; released
  at the start of qkv, gate-up or down 5.24, 5.18, 5.18 (what is fetched that early seems to leave L2 before it is
  used; with all at the start nothing was left of the gain); without it 5.41;
- both halves of the inner dimension in one program (SLICES), 128 programs for o and down on 132 processors: alone,
  o 11.9 and down 30.3 microseconds, 13.5 and 32.0 without an early start;
- weight lines asked into L2 before the wait (PREFETCH) for o and down: 0.8 to 1.1 microseconds each;
- gate-up at 3 stages, where its 344 programs are all resident: 5.13; at 4, 5.24 to 5.28.
Tried and dropped: x loaded by hand one or two rounds ahead, so that the pipelined weight loads stand before the
wait: qkv and gate-up 0.6 % of the step faster at 1 row, 1 to 2 % slower at 32, o and down slower by 1 to 14
microseconds; tiles of 64 or 256 inner columns (qkv 44 and 38.9 against 37.5 microseconds); 128 outputs a program
(0.4 to 2 % of the step slower); interleaved halves (0.5 to 1 %); 5 stages; always 32 columns (1.8 % slower at 1
row)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import EARLY_ROWS, SplitWork, launch_dependents_if, prefetch
from kernels.check import INTERPRETED, stages_that_fit
from kernels.rmsnorm import SUM_COLS, rmsnorm_ref, row_sums
from kernels.round import MAX_CHUNKS, RoundWork
from kernels.swiglu import silu_times, swiglu_ref

MAX_ROWS = 32                        # rows of a step


class Workspace(SplitWork):
    """Scratch of a decoder's steps; one step at a time may use it. D: model width; H, K: query heads and their width;
    cache_rows: M.

    pdl: programmatic dependent launch, where a kernel starts while the one before it drains. It needs compute
    capability 9 or more and is on by default there. The rule that keeps it safe: every kernel waits for the one before
    it before it touches anything a step writes, except that attention reads pos_ids and the cached rows of earlier
    steps before; so whatever runs before attention releases it only after its own wait. late: release from inside a
    product's loop, which Triton cannot pipeline on Blackwell."""

    def __init__(self, device, D, H, K, cache_rows, pdl=None, late=None):
        device = torch.device(device)
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        super().__init__(device, H, K, cache_rows, major >= 9 if pdl is None else pdl)
        self.late = major == 9 if late is None else late
        # Sums of squares of the rows that the next product with a norm is given; see `skinny`.
        self.sums_ST = torch.zeros((MAX_ROWS, triton.cdiv(D, SUM_COLS)), dtype=torch.float32, device=device)
        self.round = RoundWork(device, self.pdl)

    @staticmethod
    def nbytes(D: int, H: int, K: int, cache_rows: int) -> int:
        """Bytes of one, before it is made."""
        room = SplitWork.room(cache_rows)
        return 4 * H * room * (K + 2) + 4 * MAX_ROWS * (triton.cdiv(D, SUM_COLS) + 2 * MAX_CHUNKS) + 4


def skinny_ref(x_SD, w_OD, norm=None, residual=None, gated=False):
    x_SD = x_SD if norm is None else rmsnorm_ref(x_SD, *norm)
    y_SO = torch.nn.functional.linear(x_SD, w_OD)
    y_SO = swiglu_ref(y_SO) if gated else y_SO
    return y_SO if residual is None else residual + y_SO


@triton.jit
def pair_sum(x, S: tl.constexpr):
    """[S]: the sum over the rows of x [a power of two up to 256, S], halves first, as the lanes of a warp add. The
    order stands in the program; tl.sum takes it from the layout, which follows S: 16 and 32 columns then differed in
    the last bit."""
    for _ in tl.static_range(8):
        if x.shape[0] > 1:
            upper, lower = tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, S)), (1, 2, 0)))
            x = upper + lower
    return tl.reshape(x, (S,))


@triton.jit(do_not_specialize=["S"])
def skinny_kernel(x_ptr, w_ptr, y_ptr, norm_ptr, residual_ptr, sums_ptr, x_stride, residual_stride, S, O, eps,
                  D: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
                  BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr, NORM: tl.constexpr,
                  RESIDUAL: tl.constexpr, SUMS: tl.constexpr, GATED: tl.constexpr, PREFETCH: tl.constexpr,
                  LATE: tl.constexpr, PDL: tl.constexpr):
    """BLOCK_O outputs of all rows; GATED, half of them are gates and half are ups.

    With SLICES = 2 the tall operand stacks the two halves of the inner dimension and the narrow one puts them side by
    side: the two diagonal blocks of the product are the halves of the result. Twice the programs share the weights."""
    tile = tl.program_id(0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PER: tl.constexpr = (D + SLICES * BLOCK_D - 1) // (SLICES * BLOCK_D) * BLOCK_D     # inner columns of a slice
    EVEN: tl.constexpr = PER * SLICES == D
    WIDE: tl.constexpr = BLOCK_O // 2 if GATED else BLOCK_O          # outputs that are stored
    width = O // 2 if GATED else O
    tall, narrow, step = tl.arange(0, BLOCK_O * SLICES), tl.arange(0, BLOCK_S * SLICES), tl.arange(0, BLOCK_D)
    local = tall % BLOCK_O
    w_row = tl.minimum(tile * WIDE + local % WIDE, width - 1) + local // WIDE * width   # past the edge any row will do
    w_col = tall // BLOCK_O * PER                                    # where this slice begins
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * D + w_col[:, None] + step[None, :]
    if PREFETCH > 0:                                                 # weights depend on nobody: ask before the wait
        line = tl.arange(0, PREFETCH * BLOCK_D // 64)                # of 128 bytes
        prefetch(w_ptr + w_row.to(tl.int64)[:, None] * D + w_col[:, None] + line[None, :] * 64)
    if PDL:
        gdc_wait()
        if LATE == 0:
            gdc_launch_dependents()
    row = narrow % BLOCK_S
    place = (narrow // BLOCK_S * PER)[None, :] + step[:, None]       # [BLOCK_D, BLOCK_S], columns of x
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * x_stride + place
    real = (row < S)[None, :]                                        # rows need not fill their block
    s, out = tl.arange(0, BLOCK_S), tile * WIDE + tl.arange(0, WIDE)
    held = (out < width)[:, None] & (s < S)[None, :]                 # nor outputs theirs
    if RESIDUAL:
        residual_ptrs = residual_ptr + s.to(tl.int64)[None, :] * residual_stride + out[:, None]
        residual = tl.load(residual_ptrs, mask=held, other=0.0)
    if NORM:
        # Spread over the rows at once, in the layout of x: a vector would go through shared memory on every round.
        weight = tl.load(norm_ptr + place, mask=place < D, other=0.0)                              # [BLOCK_D, BLOCK_S]
        scale = tl.zeros((BLOCK_S * SLICES,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_O * SLICES, BLOCK_S * SLICES), dtype=tl.float32)
    for start in range(0, PER, BLOCK_D):
        if EVEN:
            w = tl.load(w_ptrs + start)                                                            # [BLOCK_O, BLOCK_D]
            x = tl.load(x_ptrs + start, mask=real, other=0.0)                                      # [BLOCK_D, BLOCK_S]
        else:                                                        # the last columns need not fill a round
            w = tl.load(w_ptrs + start, mask=w_col[:, None] + start + step[None, :] < D, other=0.0)
            x = tl.load(x_ptrs + start, mask=real & (place + start < D), other=0.0)
        if NORM:
            if start == 0:                                           # here, with the first weights already on their way
                t = tl.arange(0, BLOCK_T)
                # Of 32 sums or more a thread has four neighbours at either width of the block, so tl.sum adds in one
                # order, as tests confirm; of fewer it has as many as the width lets it.
                sums = tl.load(sums_ptr + row[:, None] * T + t[None, :], mask=(row < S)[:, None] & (t < T)[None, :],
                               other=0.0)
                total = tl.sum(sums, 1) if BLOCK_T >= 32 else pair_sum(tl.trans(sums), BLOCK_S * SLICES)
                scale = tl.rsqrt(total / D + eps)
            x = (x.to(tl.float32) * scale[None, :]).to(dtype) * weight
            ahead = place + start + BLOCK_D
            weight = tl.load(norm_ptr + ahead, mask=ahead < D, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if PDL and LATE > 0:
            launch_dependents_if(start, PER - LATE * BLOCK_D)
    if SLICES == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_O, 2, BLOCK_S)), (1, 3, 0, 2)))
        first, _ = tl.split(left)
        _, second = tl.split(right)
        acc = first + second
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, WIDE, BLOCK_S)), (1, 2, 0)))
        y = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    else:
        y = acc.to(dtype)
    if RESIDUAL:
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
    tl.store(y_ptr + s.to(tl.int64)[None, :] * width + out[:, None], y, mask=held)
    if SUMS:
        square = tl.where(held, y.to(tl.float32) * y.to(tl.float32), 0.0)
        tl.store(sums_ptr + s * T + tile, pair_sum(square, BLOCK_S), mask=s < S)


def takes_product(x_SD, residual, work) -> bool:
    """Whether these rows are for kernels/early.py: on Hopper, in 16 bits, with full tiles of 128 inner columns."""
    S, D = x_SD.shape
    return (work is not None and work.pdl and work.late and not INTERPRETED and S <= EARLY_ROWS
            and x_SD.element_size() == 2 and x_SD.stride(0) % 8 == 0
            and D % (128 if residual is None else 256) == 0 and D >= 2048)


def launch_config(S, D, itemsize, residual, gated, device):
    """Tile and pipeline. One H100, bf16, tuned inside a whole step (`step_ms` of tests/chain.py). Neither
    the tile of the narrow operand nor the depth of the pipeline touches the order of addition; SLICES and BLOCK_D do,
    so they follow the product and never the number of rows."""
    BLOCK_S, BLOCK_O, SLICES = 16 if S <= 16 else 32, SUM_COLS if residual else 64, 2 if residual else 1
    BLOCK_D = 128 if itemsize == 2 else 32
    wanted = 3 if gated else 4 if not residual else 6 if S <= 16 else 5
    stages = stages_that_fit(wanted, (BLOCK_O + BLOCK_S) * SLICES * BLOCK_D * itemsize, device)
    rounds = triton.cdiv(D, SLICES * BLOCK_D)
    return dict(BLOCK_S=BLOCK_S, BLOCK_O=BLOCK_O, BLOCK_D=BLOCK_D, SLICES=SLICES, num_warps=4, num_stages=stages,
                PREFETCH=(4 if residual else 2) if rounds >= 8 and itemsize == 2 else 0, LATE=min(4, rounds))


def skinny(x_SD, w_OD, work=None, norm=None, residual=None, gated=False, **override):
    """x @ w.T, [S, O] for S in 1..32 rows; row i's bits do not depend on S.

    norm: (w_D, eps), RMSNorm of x first. residual: [S, O], added last. gated: w is gate over up, the result
    silu(gate) * up, [S, O/2]. Every step rounds as the plain chain does. override: launch choices, for tuning.
    work: a Workspace. A product with a norm reads the sums of squares that stand in it: a product with a residual
    leaves those of its result there, `row_sums` of kernels/rmsnorm.py those of other rows, such as a step's first.
    Without one they are taken here."""
    (S, D), O = x_SD.shape, w_OD.shape[0]
    assert 1 <= S <= MAX_ROWS, f"skinny: {S} rows, wanted 1..{MAX_ROWS}"
    assert w_OD.shape == (O, D) and w_OD.is_contiguous() and x_SD.stride(1) == 1 and x_SD.dtype == w_OD.dtype, \
        f"skinny: weight {tuple(w_OD.shape)}, strides {w_OD.stride()}, for rows of {D}, strides {x_SD.stride()}"
    assert norm is None or residual is None, "skinny: a norm before and a residual after would share their sums"
    width = O // 2 if gated else O
    assert residual is None or residual.shape == (S, width) and residual.stride(1) == 1, \
        f"skinny: residual {tuple(residual.shape)} beside a result of {(S, width)}"
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return skinny_ref(x_SD, w_OD, norm, residual, gated)
    y_SO = torch.empty((S, width), dtype=x_SD.dtype, device=x_SD.device)
    if norm is not None and work is None:
        work = Workspace(x_SD.device, D, 1, 1, 1, pdl=False)
        row_sums(x_SD, work)
    pdl, sums = work is not None and work.pdl, work is not None and residual is not None
    model = D if norm is not None else O if sums else None
    assert model is None or work.sums_ST.shape[1] == triton.cdiv(model, SUM_COLS), \
        f"skinny: rows of {model}, a Workspace for {work.sums_ST.shape[1] * SUM_COLS}"
    if takes_product(x_SD, residual, work):
        from kernels.early import early_product  # a GPU's alone, and Gluon takes 50 ms to import

        early_product(x_SD, w_OD, y_SO, work, norm, residual, gated, **override)
        return y_SO
    config = {**launch_config(S, D, x_SD.element_size(), residual is not None, gated, x_SD.device), **override}
    if not pdl:
        config["PREFETCH"] = 0                               # without an early start there is nothing to bridge
    if not (pdl and work.late):
        config["LATE"] = 0
    T = triton.cdiv(D, SUM_COLS) if norm is not None else triton.cdiv(O, config["BLOCK_O"])
    skinny_kernel[(triton.cdiv(O, config["BLOCK_O"]),)](
        x_SD, w_OD, y_SO, norm[0] if norm else x_SD, residual if residual is not None else x_SD,
        work.sums_ST if work else x_SD, x_SD.stride(0), residual.stride(0) if residual is not None else 0, S, O,
        norm[1] if norm else 0.0, D=D, T=T, BLOCK_T=triton.next_power_of_2(T), NORM=norm is not None,
        RESIDUAL=residual is not None, SUMS=sums, GATED=gated, PDL=pdl, launch_pdl=pdl, enable_fp_fusion=False,
        **config)
    return y_SO
