"""attention: softmax(q k' / sqrt(K)) v over a static cache, masked by position alone: row s sees rows 0..pos_ids[s]."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.check import INTERPRETED
from kernels.rope_store import rope_store_ref, rotate

LOG2E = 1.4426950408889634
NEVER = tl.constexpr(-1e30)          # finite, so that a row which sees nothing keeps a finite pivot
MAX_ROWS = 32                        # rows of a step
SPLIT = 128                          # cache rows a program of a step looks at; fixed positions, whatever the length


class SplitWork:
    """Scratch of a step's attention: what every split found, and how many splits of a head have arrived (0 at rest)."""

    def __init__(self, device, H, K, cache_rows, pdl=False):
        splits = triton.cdiv(cache_rows, SPLIT)
        self.mixed_HTSK = torch.empty((H, splits, MAX_ROWS, K), dtype=torch.float32, device=device)
        self.top_HTS, self.total_HTS = (torch.empty((H, splits, MAX_ROWS), dtype=torch.float32, device=device)
                                        for _ in range(2))
        self.arrived_H = torch.zeros(H, dtype=torch.int32, device=device)
        self.pdl = pdl


def attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S, upcast=True):
    """Plain torch. upcast: scores, softmax and mixing in fp32 with one rounding at the end; else in the dtype."""
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    M = min(M, int(pos_ids_S.max()) + 1) if q_SHK.device.type == "cpu" else M
    q, k, v = (t.float() if upcast and t.dtype != torch.float64 else t for t in (q_SHK, k_NMK[:, :M], v_NMK[:, :M]))
    k, v = (t.repeat_interleave(H // N, dim=0) if H != N else t for t in (k, v))
    score_HSM = (q.transpose(0, 1) @ k.transpose(1, 2)) * K ** -0.5
    seen_SM = torch.arange(M, device=q.device)[None, :] <= pos_ids_S[:, None]
    prob_HSM = score_HSM.masked_fill(~seen_SM, float("-inf")).softmax(-1)
    return (prob_HSM @ v).transpose(0, 1).to(q_SHK.dtype)


def step_attention_ref(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK):
    q_SHK = rope_store_ref(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_NMK, v_NMK)
    return attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S)


@triton.jit
def prefetch(ptr):
    """Asks for the cache lines that hold these addresses to be brought into L2. Changes nothing else."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def prefill_tiles(acc, top, total, q, k_ptr, v_ptr, pos, begin, end, M, scale, K: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):
    """Folds the cache rows begin..end into (acc, top, total). Unmasked, every row of q must see all of them."""
    col = tl.arange(0, BLOCK_K)[None, :]
    for start in range(begin, end, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        held = (at < M)[:, None] & (col < K) if MASKED or BLOCK_K != K else None
        k = tl.load(k_ptr + at[:, None] * K + col, mask=held, other=0.0 if MASKED or BLOCK_K != K else None)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")                                 # [BLOCK_S, BLOCK_M]
        if MASKED:
            score = tl.where((at[None, :] <= pos[:, None]) & (at < M)[None, :], score, NEVER)
        new_top = tl.maximum(top, tl.max(score, 1))
        prob = tl.exp2((score - new_top[:, None]) * scale)
        if MASKED:                                       # a row that has seen nothing yet has NEVER as its pivot
            prob = tl.where(score == NEVER, 0.0, prob)
        shrink = tl.exp2((top - new_top) * scale)
        total = total * shrink + tl.sum(prob, 1)
        v = tl.load(v_ptr + at[:, None] * K + col, mask=held, other=0.0 if MASKED or BLOCK_K != K else None)
        acc = tl.dot(prob.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["S"])
def prefill_kernel(q_ptr, k_ptr, v_ptr, pos_ids_ptr, out_ptr, q_stride, k_head_stride, v_head_stride, S, M, scale,
                   H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
                   BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_S rows of one query head against every cache row that any of them sees. The longest blocks start first."""
    head = tl.program_id(0)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_S + tl.arange(0, BLOCK_S)
    col = tl.arange(0, BLOCK_K)[None, :]
    pos = tl.load(pos_ids_ptr + row, mask=row < S, other=-1).to(tl.int32)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * q_stride + head * K + col, mask=(row < S)[:, None] & (col < K),
                other=0.0)                                                                         # [BLOCK_S, BLOCK_K]
    k_ptr += (head // GROUP).to(tl.int64) * k_head_stride
    v_ptr += (head // GROUP).to(tl.int64) * v_head_stride
    acc = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.float32)
    top = tl.full((BLOCK_S,), NEVER, dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    all_see = tl.minimum(tl.min(tl.where(row < S, pos, M - 1)) + 1, M) // BLOCK_M * BLOCK_M
    any_sees = tl.minimum(tl.max(pos) + 1, M)
    acc, top, total = prefill_tiles(acc, top, total, q, k_ptr, v_ptr, pos, 0, all_see, M, scale, K, BLOCK_M, BLOCK_K,
                                    False)
    acc, top, total = prefill_tiles(acc, top, total, q, k_ptr, v_ptr, pos, all_see, any_sees, M, scale, K, BLOCK_M,
                                    BLOCK_K, True)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + (row[:, None].to(tl.int64) * H + head) * K + col, acc.to(out_ptr.dtype.element_ty),
             mask=(row < S)[:, None] & (col < K))


@triton.jit
def combine(mixed_ptr, top_ptr, total_ptr, out_ptr, head, row, splits, H: tl.constexpr, K: tl.constexpr,
            T: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, MAX_ROWS: tl.constexpr):
    """Merges what the first `splits` splits found for one row of one head, always in the same order.

    A split that shows a row nothing adds exact zeros, so it does not matter whether it took part."""
    col = tl.arange(0, BLOCK_K)
    best, total, acc = tl.full((), -1e30, tl.float32), tl.zeros((), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, splits, CHUNK):
        t = start + tl.arange(0, CHUNK)
        at = (head * T + t) * MAX_ROWS + row
        top = tl.load(top_ptr + at, mask=t < splits, other=-1e30, cache_modifier=".cg")            # [CHUNK]
        part = tl.load(total_ptr + at, mask=t < splits, other=0.0, cache_modifier=".cg")
        mixed = tl.load(mixed_ptr + at.to(tl.int64)[:, None] * K + col[None, :],
                        mask=(t < splits)[:, None] & (col < K)[None, :], other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(top, 0))
        weight = tl.exp2(top - new_best)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(part * weight, 0)
        acc = acc * shrink + tl.sum(mixed * weight[:, None], 0)
        best = new_best
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (row * H + head) * K + col, acc.to(out_ptr.dtype.element_ty), mask=col < K)


@triton.jit(do_not_specialize=["S"])
def combine_kernel(pos_ids_ptr, mixed_ptr, top_ptr, total_ptr, out_ptr, S, M, H: tl.constexpr, K: tl.constexpr,
                   T: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
                   MAX_ROWS: tl.constexpr, PDL: tl.constexpr):
    """One row of one head."""
    s = tl.arange(0, MAX_ROWS)
    pos = tl.load(pos_ids_ptr + s, mask=s < S, other=-1).to(tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    splits = (tl.minimum(tl.max(pos) + 1, M) + SPLIT - 1) // SPLIT
    combine(mixed_ptr, top_ptr, total_ptr, out_ptr, tl.program_id(0), tl.program_id(1), splits, H, K, T, BLOCK_K, CHUNK,
            MAX_ROWS)


@triton.jit(do_not_specialize=["S"])
def step_kernel(qkv_ptr, k_ptr, v_ptr, pos_ids_ptr, cos_ptr, sin_ptr, mixed_ptr, top_ptr, total_ptr, arrived_ptr, out_ptr,
                qkv_stride, k_head_stride, v_head_stride, S, M, scale,
                H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr,
                HALVES: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr, MAX_ROWS: tl.constexpr,
                FUSED: tl.constexpr, INLINE: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """All rows of one query head against SPLIT cache rows. FUSED: queries and the step's own keys and values come from
    qkv, are turned here, and the new cache rows are written. INLINE: the last split of a head to arrive combines them.

    Rows are handled sixteen at a time by the same code, so a row's bits do not depend on how many there are."""
    head = tl.program_id(0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    s = tl.arange(0, MAX_ROWS)
    # Written before the kernel that runs ahead of this one, so it may be read before the wait.
    last = tl.max(tl.load(pos_ids_ptr + s, mask=s < S, other=-1).to(tl.int32))
    visible = tl.minimum(last + 1, M)
    splits = (visible + SPLIT - 1) // SPLIT
    split = splits - 1 - tl.program_id(1)                                    # the new rows, most work, come first
    if split < 0:
        return
    first = tl.load(pos_ids_ptr).to(tl.int32) if FUSED else visible          # first row that is new in this step
    k_ptr += (head // GROUP).to(tl.int64) * k_head_stride
    v_ptr += (head // GROUP).to(tl.int64) * v_head_stride
    col = tl.arange(0, BLOCK_K)[None, :]
    turned_col = tl.where(col < K // 2, col + K // 2, col - K // 2)
    at = split * SPLIT + tl.arange(0, SPLIT)
    spot = at[:, None] * K + col
    if PREFETCH:                                                             # old rows wait for nobody
        line = at[:, None] * K + tl.arange(0, BLOCK_K // 64)[None, :] * 64
        prefetch(k_ptr + line)
        prefetch(v_ptr + line)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if FUSED:
        if (split + 1) * SPLIT > first:
            # Through the cache and back: one source for all rows of the tile, so old and new ones meet the same code.
            # Heads that share a key head write the same bits.
            fresh = first + s
            mine = ((s < S) & (fresh // SPLIT == split) & (fresh < M))[:, None] & (col < K)
            source = qkv_ptr + s.to(tl.int64)[:, None] * qkv_stride + (H + head // GROUP) * K
            place = fresh[:, None] * K + col
            cos = tl.load(cos_ptr + place, mask=mine, other=0.0).to(tl.float32)                    # [MAX_ROWS, BLOCK_K]
            sin = tl.load(sin_ptr + place, mask=mine, other=0.0).to(tl.float32)
            turned = tl.load(source + turned_col, mask=mine, other=0.0)
            fresh_k = rotate(tl.load(source + col, mask=mine, other=0.0), turned, cos, tl.where(col < K // 2, -sin, sin),
                             dtype)
            tl.store(k_ptr + place, fresh_k, mask=mine)
            tl.store(v_ptr + place, tl.load(source + (H // GROUP) * K + col, mask=mine, other=0.0), mask=mine)
            tl.debug_barrier()
    held = (at < visible)[:, None] & (col < K)
    k = tl.load(k_ptr + spot, mask=held, other=0.0, cache_modifier=".cg")                          # [SPLIT, BLOCK_K]
    v = tl.load(v_ptr + spot, mask=held, other=0.0, cache_modifier=".cg")
    for half in tl.static_range(HALVES):
        row = half * 16 + tl.arange(0, 16)
        real = (row < S)[:, None] & (col < K)
        pos = tl.load(pos_ids_ptr + row, mask=row < S, other=-1).to(tl.int32)
        source = qkv_ptr + row.to(tl.int64)[:, None] * qkv_stride + head * K
        q = tl.load(source + col, mask=real, other=0.0)                                            # [16, BLOCK_K]
        if FUSED:
            angle = tl.minimum(pos, M - 1)[:, None] * K + col                # a row past the cache needs some angle
            cos = tl.load(cos_ptr + angle, mask=real, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle, mask=real, other=0.0).to(tl.float32)
            q = rotate(q, tl.load(source + turned_col, mask=real, other=0.0), cos, tl.where(col < K // 2, -sin, sin), dtype)
        seen = (at[None, :] <= pos[:, None]) & (at < M)[None, :]
        score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1e30)      # [16, SPLIT]
        top = tl.max(score, 1)
        prob = tl.where(seen, tl.exp2(score - top[:, None]), 0.0)
        mixed = tl.dot(prob.to(dtype), v, input_precision="ieee")                                  # [16, BLOCK_K]
        place = (head * T + split) * MAX_ROWS + row
        tl.store(top_ptr + place, top, mask=row < S)
        tl.store(total_ptr + place, tl.sum(prob, 1), mask=row < S)
        tl.store(mixed_ptr + place.to(tl.int64)[:, None] * K + col, mixed, mask=real)
    if INLINE:
        tl.debug_barrier()                                                   # all of this program's stores, then arrive
        if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived_ptr + head, 0)
            for r in range(0, S):
                combine(mixed_ptr, top_ptr, total_ptr, out_ptr, head, r, splits, H, K, T, BLOCK_K, CHUNK, MAX_ROWS)


def check_shapes(q_SHK, k_NMK, v_NMK):
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    assert H % N == 0 and k_NMK.shape == v_NMK.shape == (N, M, K), \
        f"attention: q {tuple(q_SHK.shape)}, k {tuple(k_NMK.shape)}, v {tuple(v_NMK.shape)}"
    assert q_SHK.stride()[1:] == (K, 1) and k_NMK.stride()[1:] == (K, 1) and v_NMK.stride()[1:] == (K, 1), \
        f"attention: strides q {q_SHK.stride()}, k {k_NMK.stride()}, v {v_NMK.stride()}"


def prefill_config(S, K):
    return dict(BLOCK_S=128, BLOCK_M=64, num_warps=8, num_stages=3) if S > 64 else \
        dict(BLOCK_S=64, BLOCK_M=64, num_warps=4, num_stages=2)


def attention(q_SHK, k_NMK, v_NMK, pos_ids_S, **override):
    """[S, H, K]: row s attends to the cache rows 0..pos_ids[s]. Query head h reads key/value head h // (H // N)."""
    check_shapes(q_SHK, k_NMK, v_NMK)
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    if q_SHK.device.type == "cpu" and not INTERPRETED:
        return attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S)
    if S <= MAX_ROWS:
        return split_attention(q_SHK, k_NMK, v_NMK, pos_ids_S, None, SplitWork(q_SHK.device, H, K, M), inline=False)
    out_SHK = torch.empty((S, H, K), dtype=q_SHK.dtype, device=q_SHK.device)
    config = {**prefill_config(S, K), **override}
    prefill_kernel[(H, triton.cdiv(S, config["BLOCK_S"]))](
        q_SHK, k_NMK, v_NMK, pos_ids_S, out_SHK, q_SHK.stride(0), k_NMK.stride(0), v_NMK.stride(0), S, M,
        K ** -0.5 * LOG2E, H=H, GROUP=H // N, K=K, BLOCK_K=triton.next_power_of_2(K), **config)
    return out_SHK


def split_attention(q_SHK, k_NMK, v_NMK, pos_ids_S, cos_sin, work, inline, num_warps=8):
    """One launch over splits of the cache, and one that combines them unless `inline`. q_SHK may be rows of qkv."""
    (S, _, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    H, T = work.arrived_H.shape[0], work.top_HTS.shape[1]
    assert T >= triton.cdiv(M, SPLIT), f"attention: scratch for {T * SPLIT} cache rows, the cache has {M}"
    out_SHK = torch.empty((S, H, K), dtype=q_SHK.dtype, device=q_SHK.device)
    cos_MK, sin_MK = cos_sin or (q_SHK, q_SHK)
    shape = dict(H=H, K=K, T=T, BLOCK_K=triton.next_power_of_2(K), SPLIT=SPLIT, CHUNK=32, MAX_ROWS=MAX_ROWS,
                 PDL=work.pdl, launch_pdl=work.pdl, enable_fp_fusion=False)
    step_kernel[(H, triton.cdiv(M, SPLIT))](
        q_SHK, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK, work.mixed_HTSK, work.top_HTS, work.total_HTS, work.arrived_H,
        out_SHK, q_SHK.stride(0), k_NMK.stride(0), v_NMK.stride(0), S, M, K ** -0.5 * LOG2E, GROUP=H // N,
        HALVES=1 if S <= 16 else 2, FUSED=cos_sin is not None, INLINE=inline,
        PREFETCH=work.pdl and K % 64 == 0 and not INTERPRETED, num_warps=num_warps, **shape)
    if not inline:
        combine_kernel[(H, S)](pos_ids_S, work.mixed_HTSK, work.top_HTS, work.total_HTS, out_SHK, S, M, num_warps=4,
                               **shape)
    return out_SHK


def step_attention(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK, work, inline=None, num_warps=8):
    """[S, H, K] of a step of 1..32 rows at consecutive positions: turns queries and keys, writes the S new cache rows,
    attends. Row i's bits do not depend on S. Rows past the cache are not written. work: a Workspace for this cache."""
    (S, E), (N, M, K) = qkv_SE.shape, k_NMK.shape
    H = E // K - 2 * N
    assert 1 <= S <= MAX_ROWS and E == (H + 2 * N) * K and K % 2 == 0, f"step_attention: qkv {tuple(qkv_SE.shape)}"
    qkv_SHK = qkv_SE.view(S, H + 2 * N, K)
    assert k_NMK.shape == v_NMK.shape and k_NMK.stride()[1:] == v_NMK.stride()[1:] == (K, 1), \
        f"step_attention: k {tuple(k_NMK.shape)} {k_NMK.stride()}, v {tuple(v_NMK.shape)} {v_NMK.stride()}"
    if qkv_SE.device.type == "cpu" and not INTERPRETED:
        return step_attention_ref(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK)
    inline = S <= 4 if inline is None else inline
    return split_attention(qkv_SHK, k_NMK, v_NMK, pos_ids_S, (cos_MK, sin_MK), work, inline, num_warps)
