"""attention: softmax(q k' / sqrt(K)) v over a static cache, masked by position alone."""

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1e30)          # finite, so that a row which sees nothing keeps a finite pivot
SPLIT = 128


def attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S, upcast=True):
    """Plain torch. upcast: scores, softmax and mixing in fp32 with one rounding at the end; else in the dtype."""
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    M = min(M, int(pos_ids_S.max()) + 1) if q_SHK.device.type == "cpu" else M
    q, k, v = (t.float() if upcast else t for t in (q_SHK, k_NMK[:, :M], v_NMK[:, :M]))
    k, v = (t.repeat_interleave(H // N, dim=0) if H != N else t for t in (k, v))
    score_HSM = (q.transpose(0, 1) @ k.transpose(1, 2)) * K ** -0.5
    seen_SM = torch.arange(M, device=q.device)[None, :] <= pos_ids_S[:, None]
    prob_HSM = score_HSM.masked_fill(~seen_SM, float("-inf")).softmax(-1)
    return (prob_HSM @ v).transpose(0, 1).to(q_SHK.dtype)


@triton.jit
def fold(acc, top, total, q, k, v, seen, scale):
    """One tile of keys and values folded into (acc, top, total). q [S, K], k [T, K], v [T, K], seen [S, T]."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                         # [S, T], in powers of two
    score = tl.where(seen, score, NEVER)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.where(seen, tl.exp2(score - new_top[:, None]), 0.0)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(prob, 1)
    acc = tl.dot(prob.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def prefill_kernel(q_ptr, k_ptr, v_ptr, pos_ids_ptr, out_ptr, q_stride, k_head_stride, v_head_stride, S, M, scale,
                   H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
                   BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_S rows of one query head against every cache row that any of them sees."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    col = tl.arange(0, BLOCK_K)[None, :]
    pos = tl.load(pos_ids_ptr + row, mask=row < S, other=-1)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * q_stride + head * K + col, mask=(row < S)[:, None] & (col < K),
                other=0.0)
    k_ptr += (head // GROUP).to(tl.int64) * k_head_stride
    v_ptr += (head // GROUP).to(tl.int64) * v_head_stride
    acc = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.float32)
    top = tl.full((BLOCK_S,), NEVER, dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    end = tl.minimum(tl.max(pos) + 1, M)
    for start in range(0, end, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        held = (at < M)[:, None] & (col < K)
        k = tl.load(k_ptr + at[:, None] * K + col, mask=held, other=0.0)
        v = tl.load(v_ptr + at[:, None] * K + col, mask=held, other=0.0)
        acc, top, total = fold(acc, top, total, q, k, v, at[None, :] <= pos[:, None], scale)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + (row[:, None].to(tl.int64) * H + head) * K + col, acc.to(out_ptr.dtype.element_ty),
             mask=(row < S)[:, None] & (col < K))


def attention(q_SHK, k_NMK, v_NMK, pos_ids_S):
    """[S, H, K]: row s attends to the cache rows 0..pos_ids[s]. Query head h reads key/value head h // (H // N)."""
    (S, H, K), (N, M, _) = q_SHK.shape, k_NMK.shape
    assert H % N == 0 and k_NMK.shape == v_NMK.shape == (N, M, K), \
        f"attention: q {tuple(q_SHK.shape)}, k {tuple(k_NMK.shape)}, v {tuple(v_NMK.shape)}"
    if q_SHK.device.type == "cpu" and not INTERPRETED:
        return attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S)
    assert q_SHK.stride()[1:] == (K, 1) and k_NMK.stride()[1:] == (K, 1) and v_NMK.stride()[1:] == (K, 1), \
        f"attention: strides q {q_SHK.stride()}, k {k_NMK.stride()}, v {v_NMK.stride()}"
    out_SHK = torch.empty((S, H, K), dtype=q_SHK.dtype, device=q_SHK.device)
    few = S <= 32
    prefill_kernel[(triton.cdiv(S, 16 if few else 64), H)](
        q_SHK, k_NMK, v_NMK, pos_ids_S, out_SHK, q_SHK.stride(0), k_NMK.stride(0), v_NMK.stride(0), S, M,
        K ** -0.5 * LOG2E.value, H=H, GROUP=H // N, K=K, BLOCK_S=16 if few else 64, BLOCK_M=64,
        BLOCK_K=triton.next_power_of_2(K), num_warps=4, num_stages=2)
    return out_SHK
