"""early: a step's products and attention for 1..16 rows, with weights and cached rows on their way into shared memory
before the kernel ahead has ended. The same arithmetic in the same order as skinny.py and attention.py:
not a bit differs, so a step may take these kernels and a verify of more rows those.

Why: a 7B step is 161 kernels that each wait for the one before. From the last weight that one kernel asks for to the
first that the next asks for pass 3 to 4 microseconds: last product, store, end of the kernel, rows through L2, first
product. Triton's pipelined loop puts its loads behind the wait; asking into L2 instead (PREFETCH in skinny.py) helps
little on an H200, whose L2 gives only a third more than its memory. Gluon, Triton's lower level, lets a program fill
its shared memory by hand: STAGES tiles before `griddepcontrol.wait`, the rows behind it. Two neighbouring kernels have
to fit on a processor side by side, so each takes at most half of its shared memory.

Measured on an H200, random LLaMA-7B in bf16, context 2,100, ms of a whole step of 1 row in `python -m tests.chain`;
skinny.py and attention.py 3.83 to 3.87, what its bytes take 3.20 to 3.25. In the engine 3.898 before, 3.520 now:
- products alone 3.776, attention too 3.565; 2 rows 3.60, 8 rows 3.72; contexts 3,072 and 4,000 3.83 and 3.88 (4.20 and
  4.25 before). With 4-bit products this attention makes a step of 1, 2, 8 and 16 rows 1.460, 1.690, 1.854 and 2.257
  (a kernel that held 64 cache rows in registers 1.538; splits of 128 rows 1.817, 1.990, 2.307);
- microseconds that a step gains by leaving a kernel of each layer out, beside bytes: qkv 23.0 (22.9), o 7.6 (7.6),
  gate-up 41.3 (41.0), down 22.7 (20.5), attention with its combine 11.2 (7.8). Before: 27.2, 9.9, 45, 22.5, 15.6;
- the norm's weight from global memory one round ahead: qkv 27.3 in place of 25.9, for every round waited for L2; now
  three rounds ahead. Rows normalised once a program, through shared memory; by every warp in registers, 16 rows 4.58;
- when the next kernel may start (LATE): too late, and it has asked for nothing when its turn comes; too early, and its
  bytes delay the last programs of this one. With down at 4 stages gate-up 2 rounds before its end 3.830, 4: 3.904, 8:
  3.968; with down at 6, which fits beside fewer of its programs, 3: 3.532, 4: 3.505, 5: 3.481;
- programs of one warp and 64 columns that combine 3.545, of four warps and 128 columns 3.581 (16 rows 3.94, 4.09);
- o with 4 stages 3.68, 6 stages 3.565: it starts while attention runs, whose bytes are few;
- 16 rows 3.77, by skinny.py 3.98. By the matrix instruction of 1..8 rows, whose warps each read all rows, 3.87 to 4.03;
  by that of four warps, which reads shared memory (wgmma), 3.98 with 2 stages of gate-up and 3.82 with 3, qkv with 3
  in place of 4 stages 3.79. What a kernel gains if it works on 1 of the 16 rows, of 0.18 ms that they cost: qkv 0.01,
  o 0.02, gate-up 0.02, down 0.05, head 0.01, combining 0.02, attention 0.05 (queries to turn, results to store).
Slower: the last program of a head combining it, a launch less (3.644 for 3.577); splits of 256 rows 3.68 to 3.72, 384
3.59, 512 3.62 to 3.68; 2 or 4 stages of attention 3.64 and 3.75; tiles of 128 rows with 8 warps 3.81; 128 outputs a
program 3.99; 64 inner columns 4.08; both halves of o's and down's inner dimension as two products of 2 warps 3.62.
With more than 8 rows: rows in registers three rounds ahead and not in shared memory 4.33 (1 row 3.93); 1 row by wgmma
3.55. 32 rows, each product tuned, 4.25, and skinny.py 4.19: a stage takes half as much room again. Where each kernel of
32 rows is the quicker of both, 4.16 for 4.20: down 0.04, o, gate-up and attention 0.01 or less."""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.check import stages_that_fit
from kernels.rmsnorm import SUM_COLS

BLOCK_D, BLOCK_M = 128, 64           # inner columns of a product's tile, cache rows of an attention tile
ROOM = 166_000                       # bytes of shared memory that a kernel's programs may fill on one processor
NEVER = gl.constexpr(-1e30)          # as in attention.py


@gluon.jit
def launch_dependents_if(now, then):
    """`launch_dependents_if` of attention.py, which is written for Triton's upper level."""
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.eq.s32 p, $1, $2; @p griddepcontrol.launch_dependents; mov.u32 $0, 0;}", "=r,r,r",
        [now, then], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet():
    """Every thread of the program has come here, and sees what the others have stored."""
    gl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit(do_not_specialize=["S"])
def early_product_kernel(x_ptr, w_ptr, y_ptr, norm_ptr, residual_ptr, sums_ptr, x_stride, residual_stride, S, O, eps,
                         D: gl.constexpr, T: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_S: gl.constexpr,
                         BLOCK_O: gl.constexpr, BLOCK_D: gl.constexpr, SLICES: gl.constexpr, STAGES: gl.constexpr,
                         NORM: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr, LATE: gl.constexpr):
    """skinny_kernel: its arguments, its tiles, its order. Blocks of 8 rows go through each warp's registers, larger
    ones through the instruction of four warps that reads shared memory."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    TALL: gl.constexpr = BLOCK_O * SLICES
    NARROW: gl.constexpr = BLOCK_S * SLICES
    PER: gl.constexpr = D // SLICES                                  # inner columns of a slice
    ROUNDS: gl.constexpr = PER // BLOCK_D
    WIDE: gl.constexpr = BLOCK_O // 2 if GATED else BLOCK_O          # outputs that are stored
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])    # 16 bytes
    FEW: gl.constexpr = BLOCK_S <= 8
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0]) if FEW else gl.NVMMASharedLayout(128, 16, 2)
    product: gl.constexpr = (gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]) if FEW else
                             gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, NARROW, 16]))
    if FEW:
        tall_of: gl.constexpr = gl.DotOperandLayout(0, product, 2)
        narrow_of: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    stored: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])     # a row's outputs side by side
    width = O // 2 if GATED else O
    tile = gl.program_id(0)

    w_smem = gl.allocate_shared_memory(dtype, [STAGES, TALL, BLOCK_D], swizzled)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, NARROW, BLOCK_D], swizzled)
    tall, step = gl.arange(0, TALL, gl.SliceLayout(1, copied)), gl.arange(0, BLOCK_D, gl.SliceLayout(0, copied))
    local = tall % BLOCK_O
    w_row = gl.minimum(tile * WIDE + local % WIDE, width - 1) + local // WIDE * width    # past the edge any will do
    w_ptrs = w_ptr + w_row.to(gl.int64)[:, None] * D + (tall // BLOCK_O * PER)[:, None] + step[None, :]
    for i in gl.static_range(STAGES):
        async_copy.async_copy_global_to_shared(w_smem.index(i), w_ptrs + i * BLOCK_D)
        async_copy.commit_group()
    if NORM:
        normed_smem = gl.allocate_shared_memory(dtype, [NARROW, BLOCK_D], swizzled)
        weight, weight_1, weight_2 = (gl.load(norm_ptr + step), gl.load(norm_ptr + BLOCK_D + step),
                                      gl.load(norm_ptr + 2 * BLOCK_D + step))
    narrow = gl.arange(0, NARROW, gl.SliceLayout(1, copied))
    real = (narrow % BLOCK_S < S)[:, None] & (step >= 0)[None, :]    # rows need not fill their block
    x_ptrs = (x_ptr + (narrow % BLOCK_S).to(gl.int64)[:, None] * x_stride + (narrow // BLOCK_S * PER)[:, None]
              + step[None, :])
    gdc_wait()

    for i in gl.static_range(STAGES):
        async_copy.async_copy_global_to_shared(x_smem.index(i), x_ptrs + i * BLOCK_D, mask=real)
        async_copy.commit_group()
    s, out = gl.arange(0, BLOCK_S, gl.SliceLayout(1, stored)), gl.arange(0, WIDE, gl.SliceLayout(0, stored))
    out += tile * WIDE
    held = (s < S)[:, None] & (out < width)[None, :]
    if RESIDUAL:
        residual_ptrs = residual_ptr + s.to(gl.int64)[:, None] * residual_stride + out[None, :]
        residual = gl.load(residual_ptrs, mask=held, other=0.0)
    if NORM:
        summed: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
        row, t = gl.arange(0, BLOCK_S, gl.SliceLayout(1, summed)), gl.arange(0, BLOCK_T, gl.SliceLayout(0, summed))
        sums = gl.load(sums_ptr + row[:, None] * T + t[None, :], mask=(row < S)[:, None] & (t < T)[None, :], other=0.0)
        scale = gl.convert_layout(gl.rsqrt(gl.sum(sums, 1) / D + eps), gl.SliceLayout(1, copied))
    acc = gl.zeros([TALL, NARROW], gl.float32, product)
    slot = 0
    for i in range(ROUNDS):
        async_copy.wait_group(STAGES - 1)
        narrow_smem = x_smem.index(slot)
        if NORM:
            x = narrow_smem.load(copied)
            normed_smem.store((x.to(gl.float32) * scale[:, None]).to(dtype) * weight[None, :])
            narrow_smem = normed_smem
            weight, weight_1 = weight_1, weight_2
            weight_2 = gl.load(norm_ptr + (i + 3) * BLOCK_D + step, mask=(step >= 0) & (i + 3 < ROUNDS), other=0.0)
        if FEW:
            x, w = narrow_smem.permute([1, 0]).load(narrow_of), w_smem.index(slot).load(tall_of)
        else:
            fence_async_shared()
            acc = warpgroup_mma(w_smem.index(slot), narrow_smem.permute([1, 0]), acc)
        ahead, more = (i + STAGES) * BLOCK_D, i + STAGES < ROUNDS
        async_copy.async_copy_global_to_shared(w_smem.index(slot), w_ptrs + ahead, mask=(tall >= 0)[:, None] & more)
        async_copy.async_copy_global_to_shared(x_smem.index(slot), x_ptrs + ahead, mask=real & more)
        async_copy.commit_group()
        if FEW:
            acc = mma_v2(w, x, acc)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        launch_dependents_if(i, ROUNDS - LATE)

    acc_smem = gl.allocate_shared_memory(gl.float32, [TALL, NARROW], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]), acc)
    upper = acc_smem.slice(0, WIDE, 0).slice(0, BLOCK_S, 1).permute([1, 0]).load(stored)
    if GATED:
        gate = upper.to(dtype).to(gl.float32)
        up = acc_smem.slice(WIDE, WIDE, 0).permute([1, 0]).load(stored).to(dtype).to(gl.float32)
        y = ((gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32) * up).to(dtype)
    elif SLICES == 2:
        lower = acc_smem.slice(BLOCK_O, BLOCK_O, 0).slice(BLOCK_S, BLOCK_S, 1).permute([1, 0]).load(stored)
        y = (upper + lower).to(dtype)
    else:
        y = upper.to(dtype)
    if RESIDUAL:
        y = (residual.to(gl.float32) + y.to(gl.float32)).to(dtype)
    gl.store(y_ptr + s.to(gl.int64)[:, None] * width + out[None, :], y, mask=held)
    if RESIDUAL:
        square = gl.where(held, y.to(gl.float32) * y.to(gl.float32), 0.0)
        gl.store(sums_ptr + s * T + tile, gl.sum(square, 1), mask=s < S)


def product_config(S, O, D, residual, gated, device):
    """Pipeline; one H200, tuned inside a whole step (tests/chain.py). Programs of one processor share its room, without
    the rows beyond 8: fewer stages would cost more than fewer programs of the next kernel. A short product may let that
    start at once, since its bytes are asked for early too."""
    BLOCK_O, SLICES = (SUM_COLS, 2) if residual else (64, 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    beside = triton.cdiv(triton.cdiv(O, BLOCK_O), processors)
    rounds, stage = D // (SLICES * BLOCK_D), (BLOCK_O + 8) * SLICES * BLOCK_D * 2
    if residual:
        late = rounds if rounds <= 16 else 3
    else:
        late = 5 if gated else 8 if beside <= 2 else 3
    stages = max(2, min(6 if residual or S <= 8 else 3, ROOM // (beside * stage)))
    return dict(BLOCK_S=8 if S <= 8 else 16, BLOCK_O=BLOCK_O, SLICES=SLICES, STAGES=stages, LATE=late, num_warps=4)


def early_product(x_SD, w_OD, y_SO, work, norm, residual, gated, **override):
    """Fills y_SO as `skinny` does."""
    (S, D), O = x_SD.shape, w_OD.shape[0]
    config = {**product_config(S, O, D, residual is not None, gated, x_SD.device), **override}
    T = triton.cdiv(D if norm else O, SUM_COLS)
    early_product_kernel[(triton.cdiv(O, config["BLOCK_O"]),)](
        x_SD, w_OD, y_SO, norm[0] if norm else x_SD, x_SD if residual is None else residual, work.sums_ST,
        x_SD.stride(0), 0 if residual is None else residual.stride(0), S, O, norm[1] if norm else 0.0, D=D, T=T,
        BLOCK_T=triton.next_power_of_2(T), BLOCK_D=BLOCK_D, NORM=norm is not None,
        RESIDUAL=residual is not None, GATED=gated, launch_pdl=True, enable_fp_fusion=False, **config)


@gluon.jit
def turn(x, turned, cos, sin, dtype: gl.constexpr):
    """`rotate` of kernels/rope_store.py."""
    a = (x.to(gl.float32) * cos).to(dtype).to(gl.float32)
    b = (turned.to(gl.float32) * sin).to(dtype).to(gl.float32)
    return (a + b).to(dtype)


@gluon.jit(do_not_specialize=["S"])
def early_attention_kernel(qkv_ptr, k_ptr, v_ptr, pos_ids_ptr, cos_ptr, sin_ptr, mixed_ptr, top_ptr, total_ptr,
                           qkv_stride, k_head_stride, v_head_stride, S, M, scale,
                           H: gl.constexpr, GROUP: gl.constexpr, K: gl.constexpr, T: gl.constexpr, SPLIT: gl.constexpr,
                           BLOCK_M: gl.constexpr, BLOCK_S: gl.constexpr, MAX_ROWS: gl.constexpr, STAGES: gl.constexpr,
                           PDL: gl.constexpr):
    """step_kernel of attention.py, FUSED: its arguments, its tiles, its order; positions are consecutive.

    Tiles of rows that earlier steps have written are copied before the wait. A tile that holds a row of this step is
    copied once more when the row has been written; older tiles are worked on meanwhile."""
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    product: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    tall_of: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    narrow_of: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    head = gl.program_id(0)
    s = gl.arange(0, BLOCK_S, gl.SliceLayout(0, product))
    pos = gl.load(pos_ids_ptr + s, mask=s < S, other=-1).to(gl.int32)
    first = gl.load(pos_ids_ptr).to(gl.int32)
    visible = gl.minimum(first + S, M)
    split = (visible + SPLIT - 1) // SPLIT - 1 - gl.program_id(1)            # the new rows, most work, come first
    if split < 0:
        return
    begin, old = split * SPLIT, gl.minimum(first, M)                         # rows below `old` wait for nobody
    end = gl.minimum(begin + SPLIT, visible)
    k_ptr += (head // GROUP).to(gl.int64) * k_head_stride
    v_ptr += (head // GROUP).to(gl.int64) * v_head_stride
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, K], swizzled)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, K], swizzled)
    m, col = gl.arange(0, BLOCK_M, gl.SliceLayout(1, copied)), gl.arange(0, K, gl.SliceLayout(0, copied))
    inside = (col >= 0)[None, :]
    tile = m[:, None] * K + col[None, :]
    for i in gl.static_range(STAGES):
        start = begin + i * BLOCK_M
        if start < old:                                                      # else the copy would write zeros
            held = (start + m < old)[:, None] & inside
            async_copy.async_copy_global_to_shared(k_smem.index(i), k_ptr + start * K + tile, mask=held)
            async_copy.async_copy_global_to_shared(v_smem.index(i), v_ptr + start * K + tile, mask=held)
        async_copy.commit_group()
    row = gl.arange(0, BLOCK_S, gl.SliceLayout(1, copied))
    at = gl.load(pos_ids_ptr + row, mask=row < S, other=-1).to(gl.int32)
    real = (row < S)[:, None] & inside
    turned_col = gl.where(col < K // 2, col + K // 2, col - K // 2)
    angle = gl.minimum(gl.maximum(at, 0), M - 1)[:, None] * K + col[None, :]     # a row past the cache needs some angle
    cos = gl.load(cos_ptr + angle, mask=real, other=0.0).to(gl.float32)
    sin = gl.load(sin_ptr + angle, mask=real, other=0.0).to(gl.float32)
    sin = gl.where((col < K // 2)[None, :], -sin, sin)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    q_ptrs = qkv_ptr + row.to(gl.int64)[:, None] * qkv_stride + head * K
    key_ptrs = q_ptrs + (H + head // GROUP - head) * K
    q = gl.load(q_ptrs + col[None, :], mask=real, other=0.0)
    q_turned = gl.load(q_ptrs + turned_col[None, :], mask=real, other=0.0)
    mine = real & ((at // SPLIT == split) & (at < M))[:, None]
    key = gl.load(key_ptrs + col[None, :], mask=mine, other=0.0)
    key_turned = gl.load(key_ptrs + turned_col[None, :], mask=mine, other=0.0)
    value = gl.load(key_ptrs + H // GROUP * K + col[None, :], mask=mine, other=0.0)
    if end > old:                                        # heads that share a key head write the same bits
        gl.store(k_ptr + at[:, None] * K + col[None, :], turn(key, key_turned, cos, sin, dtype), mask=mine)
        gl.store(v_ptr + at[:, None] * K + col[None, :], value, mask=mine)
        async_copy.wait_group(0)                         # two copies into one place must not overtake each other
        meet()
        for i in gl.static_range(STAGES):
            start = begin + i * BLOCK_M
            if start + BLOCK_M > old:
                held = (start + m < visible)[:, None] & inside
                async_copy.async_copy_global_to_shared(k_smem.index(i), k_ptr + start * K + tile, mask=held)
                async_copy.async_copy_global_to_shared(v_smem.index(i), v_ptr + start * K + tile, mask=held)
    async_copy.commit_group()
    q_smem = gl.allocate_shared_memory(dtype, [BLOCK_S, K], swizzled, turn(q, q_turned, cos, sin, dtype))
    q = q_smem.permute([1, 0]).load(narrow_of)                                                     # [K, BLOCK_S]
    acc = gl.zeros([K, BLOCK_S], gl.float32, product)
    top = gl.full([BLOCK_S], NEVER, gl.float32, gl.SliceLayout(0, product))
    total = gl.zeros([BLOCK_M, BLOCK_S], gl.float32, product)                # summed over the tile only at the end
    none = gl.zeros([BLOCK_M, BLOCK_S], gl.float32, product)
    slot = 0
    for start in range(begin, end, BLOCK_M):
        if start + BLOCK_M > old:
            async_copy.wait_group(0)
        async_copy.wait_group(STAGES - 1)
        place = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, product))
        seen = (place[:, None] <= pos[None, :]) & (place < M)[:, None]
        score = gl.where(seen, mma_v2(k_smem.index(slot).load(tall_of), q, none) * scale, NEVER)   # [BLOCK_M, BLOCK_S]
        new_top = gl.maximum(top, gl.max(score, 0))
        prob = gl.where(seen, gl.exp2(score - new_top[None, :]), 0.0)
        shrink = gl.exp2(top - new_top)[None, :]
        total = total * shrink + prob
        v = v_smem.index(slot).permute([1, 0]).load(tall_of)
        acc = mma_v2(v, gl.convert_layout(prob.to(dtype), narrow_of), acc * shrink)
        top = new_top
        ahead = start + STAGES * BLOCK_M
        held = (ahead + m < end)[:, None] & inside
        async_copy.async_copy_global_to_shared(k_smem.index(slot), k_ptr + ahead * K + tile, mask=held)
        async_copy.async_copy_global_to_shared(v_smem.index(slot), v_ptr + ahead * K + tile, mask=held)
        async_copy.commit_group()
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    found = (head * T + split) * MAX_ROWS + s
    gl.store(top_ptr + found, top, mask=s < S)
    gl.store(total_ptr + found, gl.sum(total, 0), mask=s < S)
    depth = gl.arange(0, K, gl.SliceLayout(1, product))
    gl.store(mixed_ptr + found.to(gl.int64)[None, :] * K + depth[:, None], acc,
             mask=(s < S)[None, :] & (depth >= 0)[:, None])


def early_attention(given, scratch, strides, S, M, scale, H, T, K, device, **shape):
    """Leaves in `scratch` what every split found; arguments as attention.py has them for step_kernel."""
    stages = stages_that_fit(3, 4 * BLOCK_M * K, device)
    early_attention_kernel[(H, T)](
        *given, *scratch, *strides, S, M, scale, H=H, T=T, K=K, BLOCK_M=BLOCK_M, BLOCK_S=8 if S <= 8 else 16,
        **dict(STAGES=stages, num_warps=4, enable_fp_fusion=False) | shape)

