"""attention: softmax(q k' / sqrt(K)) v over a static cache, masked by position alone: row s sees rows 0..pos_ids[s],
and lengths are read on the device. Keys are cached after rotary. Query head h reads key/value head h // (H // N).

Many rows (prefill, or a later chunk over a filled prefix): one program per 64 rows of a head, tiles of 64 cache
rows, unmasked where every row sees all of them. 4*S*visible*H*K operations, halved by the mask: 2,076 rows of
LLaMA-7B are 35 GFLOP a layer. H200, 2,077 rows: 87.7 microseconds (403 TFLOP/s), 641 rows 18.1; torch's SDPA with its
causal flag, which knows no positions: cuDNN 91.4 and 24.2, flash 184 and 41.5. Tiles come through a descriptor, by the
card's copy engine: by addresses, which every thread has to add up, 104 and 20.4. Slower: 2 stages 106, 4 stages 126;
tiles of 64 x 128 139, 64 x 32 with 4 stages 111; 128 rows a program with 4 warps 98 (641 rows: 28.3), with 8 warps 108
to 135; queries turned here and not by rope_store.py 95.2, as much as that saves.

Few rows (a step): one program per 320 cache rows of a head at fixed positions, then one per row and head that
combines them in a fixed order. The cache is the tall operand of both products and the step's rows the narrow one,
always 32 wide.
Bytes: 4*visible*N*K in bf16: 34 MB a layer at context 2,100, 11.1 microseconds at 3.11 TB/s. H100, both launches,
alone in a row with 512 rows a program: 18.1 microseconds for 1 row, 20.0 for 16, 22.5 for 32; inside a step about 15
and 17.5. H200, ms of a whole step of 1 row (32 rows) at contexts 2,100, 2,300, 3,072 and 4,000:
    256 rows a program    3.94 (4.39)    -              4.12 (4.49)    4.22 (4.59)
    320                   3.86 (4.24)    3.88 (4.25)    4.16 (4.51)    4.22 (4.61)
    384                   3.89 (4.27)    3.92 (4.27)    4.08 (4.48)    4.26 (4.64)
    512                   3.98 (4.35)    3.98 (4.35)    3.99 (4.36)    4.07 (4.46)
Two programs fit on a processor, and 264 on the card: 320 keeps a prompt of one video and its answer within them, up to
2,560 rows. Two stages in place of three, which let in a third program, are 2 % slower.
Dropped: rows as the tall operand, 16 at a time (16.9, 20.7, 25 to 33: 0.5 % of a step faster at 1 row, 1.4 % slower
at 32, and two code paths); splits of 128 or 256 rows without a pipelined loop (18.6 to 24, 23.5, 29); tiles of 128
rows (21 to 23); the last split to arrive combining its head (a launch less, but serial: 20 to 23, 49 to 74 for 16
rows).

A step of 1 to 16 rows in 16 bits goes to kernels/early.py, whose bits are the same. The combining kernel is released
before the work, not behind it: a product follows, which may ask for its weights while the splits still run.

Towers without positions stay with torch: 8 x 257 rows of width 64 took 18.8 microseconds in SDPA and 15.8 here, 1 x
577 11.7 and 11.9, 5 x 577 32.9 and 31.8, at most 0.07 ms of a request."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.check import INTERPRETED, stages_that_fit
from kernels.rope_store import rope_store_ref, rotate

LOG2E = 1.4426950408889634
NEVER = tl.constexpr(-1e30)          # a masked score: finite, so that a row which sees nothing keeps a finite pivot
MAX_ROWS = 32                        # rows of a step
EARLY_ROWS = 16                      # of a step that may go to kernels/early.py
COMBINE_COLS = 64                    # of a head's width, in a program of one warp that combines splits
SPLIT = 320                          # cache rows a program of a step looks at; part of the order of addition


class SplitWork:
    """Scratch of a step's attention: what every split of the cache found for every row."""

    def __init__(self, device, H, K, cache_rows, pdl=False):
        room = self.room(cache_rows)
        self.mixed = torch.empty(H * room * K, dtype=torch.float32, device=device)       # [H, splits, rows, K], dense
        self.top, self.total = (torch.empty(H * room, dtype=torch.float32, device=device) for _ in range(2))
        self.cache_rows, self.pdl = cache_rows, pdl

    @staticmethod
    def room(cache_rows) -> int:
        """Rows of splits."""
        return triton.cdiv(cache_rows, SPLIT) * MAX_ROWS


def attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S, upcast=True):
    """Plain torch. upcast: scores, softmax and mixing in fp32 with one rounding at the end; else in the dtype."""
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    on_host = q_SHK.device.type == "cpu"
    M = min(M, int(pos_ids_S.max()) + 1) if on_host else M
    q, k, v = (t.float() if upcast and t.dtype != torch.float64 else t for t in (q_SHK, k_NMK[:, :M], v_NMK[:, :M]))
    k, v = (t[:, None].expand(N, H // N, M, K).reshape(H, M, K) if H != N else t for t in (k, v))
    score_HSM = (q.transpose(0, 1) @ k.transpose(1, 2)).mul_(K ** -0.5)
    if S > 1 or not on_host:                                 # on the host a single row sees all M
        score_HSM.masked_fill_(torch.arange(M, device=q.device) > pos_ids_S[:, None], float("-inf"))
    return (score_HSM.softmax(-1) @ v).transpose(0, 1).to(q_SHK.dtype)


def step_attention_ref(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK):
    q_SHK = rope_store_ref(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_NMK, v_NMK)
    return attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S)


@triton.jit
def prefetch(ptr):
    """Asks for the cache lines that hold these addresses to be brought into L2. Changes nothing else."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def launch_dependents_if(now, then):
    """Lets the next kernel start once `now` equals `then`. A predicate: a branch would break the pipelined loop."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.eq.s32 p, $1, $2; @p griddepcontrol.launch_dependents; mov.u32 $0, 0;}", "=r,r,r",
        [now, then], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefill_tiles(acc, top, total, q, k_rows, v_rows, head_row, pos, begin, end, M, scale, BLOCK_M: tl.constexpr,
                  MASKED: tl.constexpr):
    """Folds the cache rows begin..end into (acc, top, total). Unmasked, every row of q must see all of them."""
    for start in range(begin, end, BLOCK_M):
        k = k_rows.load([head_row + start, 0])                                                     # [BLOCK_M, BLOCK_K]
        score = tl.dot(q, tl.trans(k), input_precision="ieee")                                     # [BLOCK_S, BLOCK_M]
        if MASKED:
            at = start + tl.arange(0, BLOCK_M)
            score = tl.where((at[None, :] <= pos[:, None]) & (at < M)[None, :], score, NEVER)
        new_top = tl.maximum(top, tl.max(score, 1))
        prob = tl.exp2(score * scale - (new_top * scale)[:, None])
        if MASKED:                                       # a row that has seen nothing yet has NEVER as its pivot
            prob = tl.where(score == NEVER, 0.0, prob)
        shrink = tl.exp2((top - new_top) * scale)
        total = total * shrink + tl.sum(prob, 1)
        v = v_rows.load([head_row + start, 0])
        acc = tl.dot(prob.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["S"])
def prefill_kernel(q_ptr, k_rows, v_rows, pos_ids_ptr, out_ptr, q_stride, head_rows, S, M, scale, H: tl.constexpr,
                   GROUP: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_K: tl.constexpr):
    """BLOCK_S rows of one query head against every cache row that any of them sees. The longest blocks start first.
    k_rows, v_rows: descriptors of the caches, a head's rows below those of the head before it."""
    head = tl.program_id(0)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_S + tl.arange(0, BLOCK_S)
    col = tl.arange(0, BLOCK_K)[None, :]
    pos = tl.load(pos_ids_ptr + row, mask=row < S, other=-1).to(tl.int32)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * q_stride + head * K + col, mask=(row < S)[:, None] & (col < K),
                other=0.0)                                                                         # [BLOCK_S, BLOCK_K]
    head_row = head // GROUP * head_rows
    acc = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.float32)
    top = tl.full((BLOCK_S,), NEVER, dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    all_see = tl.minimum(tl.min(tl.where(row < S, pos, M - 1)) + 1, M) // BLOCK_M * BLOCK_M
    any_sees = tl.minimum(tl.max(pos) + 1, M)
    acc, top, total = prefill_tiles(acc, top, total, q, k_rows, v_rows, head_row, pos, 0, all_see, M, scale, BLOCK_M,
                                    False)
    acc, top, total = prefill_tiles(acc, top, total, q, k_rows, v_rows, head_row, pos, all_see, any_sees, M, scale,
                                    BLOCK_M, True)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + (row[:, None].to(tl.int64) * H + head) * K + col, acc.to(out_ptr.dtype.element_ty),
             mask=(row < S)[:, None] & (col < K))


@triton.jit(do_not_specialize=["S"])
def combine_kernel(pos_ids_ptr, mixed_ptr, top_ptr, total_ptr, out_ptr, S, M, H: tl.constexpr, K: tl.constexpr,
                   T: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
                   MAX_ROWS: tl.constexpr, PDL: tl.constexpr):
    """One row of one head: merges what the splits found, always in the same order.

    A split that shows a row nothing adds exact zeros, so it does not matter whether it took part."""
    if PDL:
        gdc_launch_dependents()              # a product follows: it may fetch weights while the splits still run
    s = tl.arange(0, MAX_ROWS)
    pos = tl.load(pos_ids_ptr + s, mask=s < S, other=-1).to(tl.int32)
    splits = (tl.minimum(tl.max(pos) + 1, M) + SPLIT - 1) // SPLIT
    head, row = tl.program_id(0), tl.program_id(1)
    col = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
    best, total, acc = tl.full((), NEVER, tl.float32), tl.zeros((), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, splits, CHUNK):
        t = start + tl.arange(0, CHUNK)
        at = (head * T + t) * MAX_ROWS + row
        top = tl.load(top_ptr + at, mask=t < splits, other=NEVER)                                  # [CHUNK]
        part = tl.load(total_ptr + at, mask=t < splits, other=0.0)
        mixed = tl.load(mixed_ptr + at.to(tl.int64)[:, None] * K + col[None, :],
                        mask=(t < splits)[:, None] & (col < K)[None, :], other=0.0)                # [CHUNK, BLOCK_K]
        new_best = tl.maximum(best, tl.max(top, 0))
        weight = tl.exp2(top - new_best)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(part * weight, 0)
        acc = acc * shrink + tl.sum(mixed * weight[:, None], 0)
        best = new_best
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (row * H + head) * K + col, acc.to(out_ptr.dtype.element_ty), mask=col < K)


@triton.jit(do_not_specialize=["S"])
def step_kernel(qkv_ptr, k_ptr, v_ptr, pos_ids_ptr, cos_ptr, sin_ptr, mixed_ptr, top_ptr, total_ptr, qkv_stride,
                k_head_stride, v_head_stride, S, M, scale,
                H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr,
                SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, MAX_ROWS: tl.constexpr, FUSED: tl.constexpr,
                PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """All rows of one query head against SPLIT cache rows. FUSED: queries and the step's own keys and values come from
    qkv, are turned here, and the new cache rows are written.

    The cache is the tall operand of both products and the step's rows, always MAX_ROWS wide, the narrow one: one
    program serves every number of rows, so a row's bits do not depend on it, and 32 rows cost little more than one."""
    head = tl.program_id(0)
    s = tl.arange(0, MAX_ROWS)
    # Written before the kernel that runs ahead of this one, so it may be read before the wait.
    pos = tl.load(pos_ids_ptr + s, mask=s < S, other=-1).to(tl.int32)
    first = tl.load(pos_ids_ptr).to(tl.int32)
    visible = tl.minimum(tl.max(pos) + 1, M)
    split = (visible + SPLIT - 1) // SPLIT - 1 - tl.program_id(1)            # the new rows, most work, come first
    if split < 0:
        return
    begin = split * SPLIT
    k_ptr += (head // GROUP).to(tl.int64) * k_head_stride
    v_ptr += (head // GROUP).to(tl.int64) * v_head_stride
    col = tl.arange(0, BLOCK_K)[None, :]
    turned_col = tl.where(col < K // 2, col + K // 2, col - K // 2)
    if PREFETCH > 0:                                                         # old rows wait for nobody
        line = (begin + tl.arange(0, PREFETCH))[:, None] * K + tl.arange(0, BLOCK_K // 64)[None, :] * 64
        prefetch(k_ptr + line)
        prefetch(v_ptr + line)
    real = (s < S)[:, None] & (col < K)
    row_ptr = qkv_ptr + s.to(tl.int64)[:, None] * qkv_stride
    if FUSED:
        angle = tl.minimum(pos, M - 1)[:, None] * K + col                    # a row past the cache needs some angle
        cos = tl.load(cos_ptr + angle, mask=real, other=0.0).to(tl.float32)                        # [MAX_ROWS, BLOCK_K]
        sin = tl.load(sin_ptr + angle, mask=real, other=0.0).to(tl.float32)
        sin = tl.where(col < K // 2, -sin, sin)
    if PDL:
        gdc_wait()
    q = tl.load(row_ptr + head * K + col, mask=real, other=0.0)                                    # [MAX_ROWS, BLOCK_K]
    if FUSED:
        q = rotate(q, tl.load(row_ptr + head * K + turned_col, mask=real, other=0.0), cos, sin, q.dtype)
        if begin + SPLIT > first:
            # Through the cache and back: one source for all rows of a tile, so old and new ones meet the same code.
            # Heads that share a key head write the same bits.
            mine = real & ((pos // SPLIT == split) & (pos < M))[:, None]
            key = H + head // GROUP
            fresh = tl.load(row_ptr + key * K + col, mask=mine, other=0.0)
            turned = tl.load(row_ptr + key * K + turned_col, mask=mine, other=0.0)
            tl.store(k_ptr + pos[:, None] * K + col, rotate(fresh, turned, cos, sin, fresh.dtype), mask=mine)
            fresh = tl.load(row_ptr + (key + H // GROUP) * K + col, mask=mine, other=0.0)
            tl.store(v_ptr + pos[:, None] * K + col, fresh, mask=mine)
            tl.debug_barrier()
    q = tl.trans(q)                                                                                # [BLOCK_K, MAX_ROWS]
    acc = tl.zeros((BLOCK_K, MAX_ROWS), dtype=tl.float32)
    top = tl.full((MAX_ROWS,), NEVER, dtype=tl.float32)
    total = tl.zeros((BLOCK_M, MAX_ROWS), dtype=tl.float32)                  # summed over the tile only at the end
    for start in range(begin, tl.minimum(begin + SPLIT, visible), BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        held = (at < visible)[:, None] & (col < K)
        k = tl.load(k_ptr + at[:, None] * K + col, mask=held, other=0.0)                           # [BLOCK_M, BLOCK_K]
        v = tl.load(v_ptr + at[:, None] * K + col, mask=held, other=0.0)
        seen = (at[:, None] <= pos[None, :]) & (at < M)[:, None]
        score = tl.where(seen, tl.dot(k, q, input_precision="ieee") * scale, NEVER)                # [BLOCK_M, MAX_ROWS]
        new_top = tl.maximum(top, tl.max(score, 0))
        prob = tl.where(seen, tl.exp2(score - new_top[None, :]), 0.0)
        shrink = tl.exp2(top - new_top)[None, :]
        total = total * shrink + prob
        acc = tl.dot(tl.trans(v), prob.to(v.dtype), acc * shrink, input_precision="ieee")
        top = new_top
    if PDL:
        gdc_launch_dependents()
    place = (head * T + split) * MAX_ROWS + s
    tl.store(top_ptr + place, top, mask=s < S)
    tl.store(total_ptr + place, tl.sum(total, 0), mask=s < S)
    depth = tl.arange(0, BLOCK_K)[:, None]
    tl.store(mixed_ptr + place.to(tl.int64)[None, :] * K + depth, acc, mask=(s < S)[None, :] & (depth < K))


def check_shapes(q_SHK, k_NMK, v_NMK):
    (_, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    assert H % N == 0 and k_NMK.shape == v_NMK.shape == (N, M, K), \
        f"attention: q {tuple(q_SHK.shape)}, k {tuple(k_NMK.shape)}, v {tuple(v_NMK.shape)}"
    assert q_SHK.stride()[1:] == (K, 1) and k_NMK.stride()[1:] == (K, 1) and v_NMK.stride()[1:] == (K, 1), \
        f"attention: strides q {q_SHK.stride()}, k {k_NMK.stride()}, v {v_NMK.stride()}"


def prefill_config(K, itemsize, device):
    """64 x 64 tiles, three in flight: the best on an H100 and an H200 in bf16; others stand above."""
    BLOCK_M = 64 if itemsize == 2 else 32
    stages = stages_that_fit(3 if itemsize == 2 else 1, (2 * BLOCK_M + 64) * K * itemsize, device)
    return dict(BLOCK_S=64, BLOCK_M=BLOCK_M, num_warps=4, num_stages=stages)


def step_config(K, itemsize, pdl, device):
    """Tiles of 64 cache rows, three in flight; the first rows are asked into L2 before the wait (H100, bf16)."""
    BLOCK_M = 64 if itemsize == 2 else 32
    stages = stages_that_fit(3 if itemsize == 2 else 1, 2 * BLOCK_M * K * itemsize, device)
    return dict(BLOCK_M=BLOCK_M, num_warps=4, num_stages=stages, PREFETCH=64 if pdl and K % 64 == 0 else 0)


def attention(q_SHK, k_NMK, v_NMK, pos_ids_S, **override):
    """[S, H, K]: row s attends to the cache rows 0..pos_ids[s], in any order of positions. Row i's bits do not depend
    on the number of rows up to 32, nor beyond. override: launch choices, for tuning; so below."""
    check_shapes(q_SHK, k_NMK, v_NMK)
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    if q_SHK.device.type == "cpu" and not INTERPRETED:
        return attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S)
    if S <= MAX_ROWS:
        return split_attention(q_SHK, k_NMK, v_NMK, pos_ids_S, None, SplitWork(q_SHK.device, H, K, M))
    if K * q_SHK.element_size() % 16:                        # no descriptor takes such rows, nor has a known model them
        return attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S)
    out_SHK = torch.empty((S, H, K), dtype=q_SHK.dtype, device=q_SHK.device)
    config = {**prefill_config(K, q_SHK.element_size(), q_SHK.device), **override}
    BLOCK_K, head_rows = max(16, triton.next_power_of_2(K)), k_NMK.stride(0) // K
    # A tile that hangs over a head's rows holds others', or zeros behind the last: no position sees them.
    k_rows, v_rows = (TensorDescriptor(cache, [(N - 1) * head_rows + M, K], [K, 1], [config["BLOCK_M"], BLOCK_K])
                      for cache in (k_NMK, v_NMK))
    prefill_kernel[(H, triton.cdiv(S, config["BLOCK_S"]))](
        q_SHK, k_rows, v_rows, pos_ids_S, out_SHK, q_SHK.stride(0), head_rows, S, M, K ** -0.5 * LOG2E, H=H,
        GROUP=H // N, K=K, BLOCK_K=BLOCK_K, **config)
    return out_SHK


def takes_attention(qkv_SE, K) -> bool:
    """Whether a step is for kernels/early.py: on a GPU, in 16 bits, heads of 64, 128 or 256."""
    return (qkv_SE.device.type != "cpu" and not INTERPRETED and len(qkv_SE) <= EARLY_ROWS
            and qkv_SE.element_size() == 2 and K in (64, 128, 256) and qkv_SE.stride(0) % 8 == 0)


def split_attention(q_SHK, k_NMK, v_NMK, pos_ids_S, cos_sin, work, **override):
    """One launch over splits of the cache, one that combines them. q_SHK may be rows of qkv."""
    (S, E, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    H = E if cos_sin is None else E - 2 * N
    assert work.cache_rows >= M, f"attention: scratch for {work.cache_rows} cache rows, the cache has {M}"
    T, fused = triton.cdiv(M, SPLIT), cos_sin is not None
    out_SHK = torch.empty((S, H, K), dtype=q_SHK.dtype, device=q_SHK.device)
    cos_MK, sin_MK = cos_sin or (q_SHK, q_SHK)
    shape = dict(H=H, K=K, T=T, SPLIT=SPLIT, MAX_ROWS=MAX_ROWS, PDL=work.pdl, launch_pdl=work.pdl)
    given, scratch = (q_SHK, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK), (work.mixed, work.top, work.total)
    strides, scale = (q_SHK.stride(0), k_NMK.stride(0), v_NMK.stride(0)), K ** -0.5 * LOG2E
    BLOCK_K = max(16, triton.next_power_of_2(K))
    if fused and takes_attention(q_SHK, K):
        from kernels.early import early_attention  # a GPU's alone, and Gluon takes 50 ms to import

        early_attention(given, scratch, strides, S, M, scale, GROUP=H // N, device=q_SHK.device, **shape | override)
    else:
        config = {**step_config(K, q_SHK.element_size(), work.pdl, q_SHK.device), **override}
        assert SPLIT % config["BLOCK_M"] == 0, f"attention: tiles of {config['BLOCK_M']} rows overlap splits of {SPLIT}"
        step_kernel[(H, T)](*given, *scratch, *strides, S, M, scale, GROUP=H // N, FUSED=fused, BLOCK_K=BLOCK_K,
                            enable_fp_fusion=False, **shape, **config)
    width = min(COMBINE_COLS, BLOCK_K)           # the same for any number of rows, as the order of addition hangs on it
    combine_kernel[(H, S, triton.cdiv(K, width))](
        pos_ids_S, *scratch, out_SHK, S, M, CHUNK=min(32, triton.next_power_of_2(T)), BLOCK_K=width,
        enable_fp_fusion=False, num_warps=1, **shape)
    return out_SHK


def step_attention(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK, work, **override):
    """[S, H, K] of a step of 1..32 rows at consecutive positions: turns queries and keys, writes the S new cache rows,
    attends. Row i's bits do not depend on S. Rows past the cache are not written. work: a Workspace for this cache."""
    (S, E), (N, _, K) = qkv_SE.shape, k_NMK.shape
    H = E // K - 2 * N
    assert 1 <= S <= MAX_ROWS and E == (H + 2 * N) * K and K % 2 == 0, f"step_attention: qkv {tuple(qkv_SE.shape)}"
    qkv_SHK = qkv_SE.view(S, H + 2 * N, K)
    assert k_NMK.shape == v_NMK.shape and k_NMK.stride()[1:] == v_NMK.stride()[1:] == (K, 1), \
        f"step_attention: k {tuple(k_NMK.shape)} {k_NMK.stride()}, v {tuple(v_NMK.shape)} {v_NMK.stride()}"
    if qkv_SE.device.type == "cpu" and not INTERPRETED:
        return step_attention_ref(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK)
    return split_attention(qkv_SHK, k_NMK, v_NMK, pos_ids_S, (cos_MK, sin_MK), work, **override)

