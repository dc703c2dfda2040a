"""sample: the logits of a step become scores whose largest is a draw from softmax(logits / temperature) cut at top_p.

score = logit / temperature - log(E), E from the unit exponential: the Gumbel-max draw. E depends on the seed, the id
and its place in the answer alone (Philox4x32-10 keyed by the seed, counting ids and places), so a draw is the same
whatever was drafted, in whatever forward its row stood, however many rows that had. Small E decide: they have 24
significant bits down to 2^-40 and some to 2^-65. With uniforms of 24 bits an id of probability below 6e-8 would never
be drawn. The largest of a row is taken off first: any temperature keeps scores finite, and ids at +inf share the draw.
top_p keeps the fewest most likely ids whose mass reaches it, the crossing id included, as TopPLogitsWarper of
transformers, and ids equal to the crossing one, which that cuts by their place in a sort. Masses are added as whole
numbers of 2^-40 of the largest id's: no order of adding can change them. Ids cut off get -inf; NaN stays NaN, for
close_round to report.
Bytes: S*V * (2 + 2 + 4) in bf16, 32 more reads of a row for top_p < 1, from L2: 32 rows of 32,064 logits are 8.2 MB."""

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED
from kernels.round import N_OUT

ROW_CHUNK, CHUNK = 8192, 1024        # logits that a program looks at in one go: of a whole row, and of its one chunk
BELOW_ONE = tl.constexpr(1 - 2 ** -24)
INFINITE = tl.constexpr(0x7F800000)  # the bits of +inf: as whole numbers, bits order floats that are not negative


def sampling_words(temperature: float, top_p: float, seed: int):
    """int64 [3] for `sample`: the seed, and 1 / temperature and top_p as the bits of float64. temperature > 0."""
    floats_2 = torch.tensor([1 / max(temperature, 1e-30), top_p], dtype=torch.float64)
    return torch.cat((torch.tensor([seed]), floats_2.view(torch.int64)))


def philox_ref(seed: int, at_S, V: int):
    """The first two words of Philox4x32-10, int64 [S, V]. Source: Salmon et al. 2011, Random123."""
    low = 0xFFFFFFFF
    c0, c1 = torch.broadcast_tensors(torch.arange(V, device=at_S.device)[None], at_S[:, None])
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2              # beyond int64 they wrap, and every bit is kept
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1


def sample_ref(logits_SV, state_W, sampling_3):
    (S, V), (inv_t, top_p) = logits_SV.shape, sampling_3[1:].view(torch.float64).tolist()
    x_SV = logits_SV.float()
    best_S1 = x_SV.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1, keepdim=True)
    z_SV = torch.where(x_SV == best_S1, 0.0, x_SV - best_S1) * inv_t
    if top_p < 1:
        ordered_SV, _ = z_SV.nan_to_num(-torch.inf, 0.0, -torch.inf).sort(1, descending=True)
        mass_SV = (ordered_SV.exp() * 2.0 ** 40).long().cumsum(1)
        crossing_S1 = (mass_SV < top_p * mass_SV[:, -1:].double()).sum(1, keepdim=True)
        z_SV = torch.where(z_SV < ordered_SV.gather(1, crossing_S1), -torch.inf, z_SV)
    high, low = philox_ref(int(sampling_3[0]), state_W[0] + torch.arange(S, device=state_W.device), V)
    v_SV = ((high.float() + (low.float() + 0.5) * 2.0 ** -32) * 2.0 ** -32).clamp(max=BELOW_ONE.value)
    return z_SV - (-torch.log1p(-v_SV)).log()


@triton.jit
def scaled(logits_ptr, col, best, inv_t, V):
    """(logit - best of its row) / temperature, at most 0 or NaN; -inf beyond the row."""
    x = tl.load(logits_ptr + col, mask=col < V, other=float("-inf")).to(tl.float32)
    return tl.where(x == best, 0.0, x - best) * inv_t


@triton.jit
def mass_within(logits_ptr, best, inv_t, bound, V, CHUNK: tl.constexpr):
    """Mass of a row's ids whose |scaled logit| has bits of at most `bound`, in 2^-40 of the best id's."""
    mass = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, V, CHUNK):
        z = scaled(logits_ptr, start + tl.arange(0, CHUNK), best, inv_t, V)
        kept = tl.abs(z).to(tl.int32, bitcast=True) <= bound                 # never NaN
        mass += tl.where(kept, tl.exp(tl.where(kept, z, 0.0)) * 1099511627776.0, 0.0).to(tl.int64)
    return tl.sum(mass)


@triton.jit
def top_p_kernel(logits_ptr, sampling_ptr, best_ptr, bound_ptr, V, CHUNK: tl.constexpr):
    """One row: its best logit, and the least bound within which lies a mass of top_p, found bit by bit."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    inv_t = tl.load(sampling_ptr + 1).to(tl.float64, bitcast=True).to(tl.float32)
    top_p = tl.load(sampling_ptr + 2).to(tl.float64, bitcast=True)
    top = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in range(0, V, CHUNK):
        col = start + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + col, mask=col < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.where(x == x, x, float("-inf")))
    best = tl.max(top)
    low, high = tl.full((), -1, tl.int32), tl.full((), INFINITE, tl.int32)   # low holds too few ids, high enough
    if top_p < 1:
        wanted = top_p * mass_within(logits_ptr, best, inv_t, high, V, CHUNK).to(tl.float64)
        for _ in range(31):
            middle = low + (high - low) // 2
            enough = mass_within(logits_ptr, best, inv_t, middle, V, CHUNK).to(tl.float64) >= wanted
            low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    tl.store(best_ptr + row, best)
    tl.store(bound_ptr + row, high)


@triton.jit
def exponential(seed, at, col):
    """A draw of the unit exponential for each id in `col` at answer place `at`."""
    zero = col * 0
    high, low, _, _ = tl.philox(seed, col, zero + at, zero, zero)
    v = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10
    v = tl.minimum(v, BELOW_ONE)
    w = 1.0 - v                                                              # Kahan's log1p: w's rounding cancels
    return tl.where(w == 1.0, v, -tl.log(w) * (v / tl.where(w == 1.0, 1.0, 1.0 - w)))


@triton.jit
def scores_kernel(logits_ptr, state_ptr, sampling_ptr, best_ptr, bound_ptr, scores_ptr, V, CHUNK: tl.constexpr):
    """The scores of one chunk of one row."""
    row = tl.program_id(0)
    col = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inv_t = tl.load(sampling_ptr + 1).to(tl.float64, bitcast=True).to(tl.float32)
    z = scaled(logits_ptr + row.to(tl.int64) * V, col, tl.load(best_ptr + row), inv_t, V)
    cut = (z == z) & (tl.abs(z).to(tl.int32, bitcast=True) > tl.load(bound_ptr + row))
    at = (tl.load(state_ptr + N_OUT) + row).to(tl.int32)
    score = tl.where(cut, float("-inf"), z - tl.log(exponential(tl.load(sampling_ptr), at, col)))
    tl.store(scores_ptr + row.to(tl.int64) * V + col, score, mask=col < V)


def sample(logits_SV, state_W, sampling_3):
    """Scores [S, V] in fp32: row i's largest is the draw for place n_out + i of the answer (`state_W[0]` is n_out).

    logits_SV: contiguous, any float dtype. sampling_3: `sampling_words` on the device. Takes one program a row to find
    the top_p bound, then one a chunk; both see their own row only."""
    S, V = logits_SV.shape
    assert logits_SV.is_contiguous() and len(sampling_3) == 3 and sampling_3.dtype == state_W.dtype == torch.int64, \
        f"sample: logits {tuple(logits_SV.shape)} of strides {logits_SV.stride()}, words {sampling_3.dtype}"
    if state_W.device.type == "cpu" and not INTERPRETED:
        return sample_ref(logits_SV, state_W, sampling_3)
    best_S, scores_SV = (torch.empty(shape, dtype=torch.float32, device=state_W.device) for shape in (S, (S, V)))
    bound_S = torch.empty(S, dtype=torch.int32, device=state_W.device)
    top_p_kernel[(S,)](logits_SV, sampling_3, best_S, bound_S, V, CHUNK=ROW_CHUNK, num_warps=16)
    scores_kernel[(S, triton.cdiv(V, CHUNK))](logits_SV, state_W, sampling_3, best_S, bound_S, scores_SV, V,
                                              CHUNK=CHUNK, num_warps=4)
    return scores_SV
