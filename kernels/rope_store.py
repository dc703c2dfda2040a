"""rope_store: turns queries and new keys by their position and puts keys and values into the cache. One program per row
and HEADS heads. qkv_SE rows are the H query heads, then N key heads, then N value heads, each K wide. Half-split
rotary: x * cos + rot(x) * sin with rot(x) = (-x[K/2:], x[:K/2]); cos and sin come rounded to the dtype, both
products and their sum are rounded, as LLaMA does (one rounding at the end changes 27 % of the elements in bf16; so
the launch forbids fusing: LLVM narrows the products to bf16 and fuses the sum, which changes 16 %).
Bytes: (2*S*(H+2N)*K + 2*S*K) * 2 in bf16: a prefill of 2,076 rows moves 103 MB a layer, in 39
microseconds on an H100, 2.62 TB/s. A step of 1..32 rows has it folded into kernels/attention.py."""

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED

HEADS = 16                       # heads a program turns


def rotate_ref(x_SHK, cos_SK, sin_SK):
    low, high = x_SHK.chunk(2, dim=-1)
    return x_SHK * cos_SK[:, None] + torch.cat((-high, low), dim=-1) * sin_SK[:, None]


def rope_store_ref(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_cache_NMK, v_cache_NMK):
    (N, M, K), S = k_cache_NMK.shape, len(qkv_SE)
    qkv = qkv_SE.reshape(S, -1, K)
    H = qkv.shape[1] - 2 * N
    at = pos_ids_S.clamp(max=M - 1)
    turned = rotate_ref(qkv[:, :H + N], cos_MK[at], sin_MK[at])
    k, v, keep = turned[:, H:], qkv[:, H + N:], pos_ids_S < M
    if not keep.all():                                               # rows past the cache are not stored
        at, k, v = at[keep], k[keep], v[keep]
    k_cache_NMK[:, at] = k.transpose(0, 1)
    v_cache_NMK[:, at] = v.transpose(0, 1)
    return turned[:, :H]


@triton.jit
def rotate(x, turned, cos, sin, dtype: tl.constexpr):
    """x * cos + turned * sin, every step rounded to `dtype`. `turned` is rot(x) before its sign, which sin carries."""
    a = (x.to(tl.float32) * cos).to(dtype).to(tl.float32)
    b = (turned.to(tl.float32) * sin).to(dtype).to(tl.float32)
    return (a + b).to(dtype)


@triton.jit
def rope_store_kernel(qkv_ptr, pos_ids_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, qkv_stride, M,
                      k_head_stride, v_head_stride,
                      H: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Handles HEADS neighbouring heads of one row, whichever of query, key and value they are."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    at = tl.load(pos_ids_ptr + row).to(tl.int64)
    angle = tl.minimum(at, M - 1) * K                                # a row past the cache still needs some angle
    inside = (head < H + 2 * N) & (col < K)                          # heads and width need not fill their blocks
    turned_col = tl.where(col < K // 2, col + K // 2, col - K // 2)
    x = tl.load(qkv_ptr + row * qkv_stride + head * K + col, mask=inside, other=0.0)               # [HEADS, BLOCK_K]
    turned = tl.load(qkv_ptr + row * qkv_stride + head * K + turned_col, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + angle + col, mask=col < K, other=0.0).to(tl.float32)                   # [1, BLOCK_K]
    sin = tl.load(sin_ptr + angle + col, mask=col < K, other=0.0).to(tl.float32)
    y = rotate(x, turned, cos, tl.where(col < K // 2, -sin, sin), dtype)
    tl.store(q_ptr + row * (H * K) + head * K + col, y, mask=inside & (head < H))
    fits = inside & (at < M)                                         # never write past the cache
    key = (head - H).to(tl.int64)
    tl.store(k_ptr + key * k_head_stride + at * K + col, y, mask=fits & (head >= H) & (head < H + N))
    tl.store(v_ptr + (key - N) * v_head_stride + at * K + col, x, mask=fits & (head >= H + N))


def rope_store(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_cache_NMK, v_cache_NMK):
    """Turned queries [S, H, K]; writes cache rows pos_ids_S of both caches, and none past their end."""
    (S, E), (N, M, K) = qkv_SE.shape, k_cache_NMK.shape
    H = E // K - 2 * N
    assert E == (H + 2 * N) * K and K % 2 == 0, f"rope_store: rows of {E} do not hold H + 2 * {N} heads of {K}"
    assert k_cache_NMK.stride()[1:] == (K, 1) and v_cache_NMK.stride()[1:] == (K, 1) and qkv_SE.stride(1) == 1, \
        f"rope_store: strides qkv {qkv_SE.stride()}, k {k_cache_NMK.stride()}, v {v_cache_NMK.stride()}"
    assert cos_MK.shape[0] >= M and cos_MK.is_contiguous() and sin_MK.is_contiguous(), f"rope_store: cos {cos_MK.shape}"
    if qkv_SE.device.type == "cpu" and not INTERPRETED:
        return rope_store_ref(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_cache_NMK, v_cache_NMK)
    q_SHK = torch.empty((S, H, K), dtype=qkv_SE.dtype, device=qkv_SE.device)
    rope_store_kernel[(S, triton.cdiv(H + 2 * N, HEADS))](
        qkv_SE, pos_ids_S, cos_MK, sin_MK, q_SHK, k_cache_NMK, v_cache_NMK, qkv_SE.stride(0), M,
        k_cache_NMK.stride(0), v_cache_NMK.stride(0),
        H=H, N=N, K=K, HEADS=HEADS, BLOCK_K=triton.next_power_of_2(K), num_warps=4, enable_fp_fusion=False)
    return q_SHK
