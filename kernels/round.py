"""round: the two ends of a round, on the device: open_round makes the rows of a forward out of the request's state,
close_round turns the logits into ids and advances the state. The host only ever looks at copies.

state_W, int64: n_out, done, accept_len of the last round, prompt_len, eos_id, limit (most ids to produce), nonfinite,
drafts that kernels/recall.py found for it; then the ids. n_out counts ids, the eos included. eos_id -1 never matches.
Bytes: open 4*S*D in bf16, close 2*S*V: 32 rows of 32,064 logits are 2.1 MB. Both are launch-bound: one launch each."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.check import INTERPRETED, self_check

STATE = 8                            # words before the ids
N_OUT, DONE, ACCEPT_LEN, PROMPT_LEN, EOS_ID, LIMIT, NONFINITE, RECALLED = (tl.constexpr(i) for i in range(8))
MAX_ROWS = 32
CHUNK = 2048                         # logits a program looks at
MAX_CHUNKS = 64


class RoundWork:
    """Scratch of close_round: the best key of each chunk of logits, and how many programs have arrived (0 at rest)."""

    def __init__(self, device, pdl=False):
        self.key_SC = torch.zeros((MAX_ROWS, MAX_CHUNKS), dtype=torch.int64, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.pdl = pdl               # programmatic dependent launch, see kernels/skinny.py


def open_round_ref(state_W, draft_ids_G, embed_VD):
    V, n_out = embed_VD.shape[0], state_W[0]
    pending = state_W.gather(0, (STATE + n_out - 1).clamp(min=STATE)[None])
    verify_ids_S = torch.cat((pending, draft_ids_G))
    pos_ids_S = state_W[3] + n_out - 1 + torch.arange(len(verify_ids_S), device=state_W.device)
    return verify_ids_S, pos_ids_S, embed_VD[verify_ids_S.clamp(0, V - 1)]


def close_round_ref(logits_SV, draft_ids_G, state_W):
    S, (n_out, done, _, _, eos, limit, _, _) = len(logits_SV), state_W[:STATE].tolist()
    if done:
        return
    target_ids = [int(i) for i in logits_SV.float().argmax(-1)]     # CPU: lowest id wins ties, and NaN beats numbers
    accept_len = 0
    while accept_len < S - 1 and int(draft_ids_G[accept_len]) == target_ids[accept_len]:
        accept_len += 1
    fresh = target_ids[:accept_len + 1][:max(0, min(limit, len(state_W) - STATE) - n_out)]
    if eos in fresh:
        fresh = fresh[:fresh.index(eos) + 1]
    state_W[STATE + n_out:STATE + n_out + len(fresh)] = torch.tensor(fresh, dtype=torch.int64, device=state_W.device)
    n_out += len(fresh)
    state_W[0], state_W[2] = n_out, accept_len
    state_W[1] = int(n_out >= min(limit, len(state_W) - STATE) or eos in fresh)
    state_W[6] |= int(logits_SV.isnan().any())


@triton.jit
def open_round_kernel(state_ptr, draft_ids_ptr, embed_ptr, verify_ids_ptr, pos_ids_ptr, hidden_ptr, V,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, STATE: tl.constexpr, PDL: tl.constexpr):
    """One row: its id, its position, its embedding."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_out = tl.load(state_ptr + N_OUT)
    pending = tl.load(state_ptr + STATE + tl.maximum(n_out - 1, 0))
    draft = tl.load(draft_ids_ptr + row - 1, mask=row > 0, other=0)          # row 0 is the pending id
    verify_id = tl.where(row == 0, pending, draft)
    tl.store(verify_ids_ptr + row, verify_id)
    tl.store(pos_ids_ptr + row, tl.load(state_ptr + PROMPT_LEN) + n_out - 1 + row)
    known = tl.minimum(tl.maximum(verify_id, 0), V - 1)                      # a draft may be no id at all
    col = tl.arange(0, BLOCK_D)
    tl.store(hidden_ptr + row * D + col, tl.load(embed_ptr + known * D + col, mask=col < D, other=0.0), mask=col < D)


@triton.jit(do_not_specialize=["S"])
def close_round_kernel(logits_ptr, draft_ids_ptr, state_ptr, key_ptr, arrived_ptr, stride, S, V, room,
                       CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MAX_CHUNKS: tl.constexpr, MAX_ROWS: tl.constexpr,
                       STATE: tl.constexpr, PDL: tl.constexpr):
    """Best key of one chunk of one row; the program that arrives last compares drafts and advances the state.

    A key orders by value, then by lowest id: the float's bits made monotonous above, the id's complement below."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    col = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + col, mask=col < V, other=float("-inf")).to(tl.float32)
    x = x + 0.0                                                              # -0.0 ties with 0.0
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))        # NaN, of either sign, beats every number
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(col < V, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - col).to(tl.int64), -0x7FFFFFFFFFFFFFFF)
    tl.store(key_ptr + row * MAX_CHUNKS + chunk, tl.max(key))
    tl.debug_barrier()                                                       # all of this program's stores, then arrive
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if arrived == S * CHUNKS - 1:
        tl.store(arrived_ptr, 0)
        s = tl.arange(0, MAX_ROWS)
        c = tl.arange(0, MAX_CHUNKS)
        keys = tl.load(key_ptr + s[:, None] * MAX_CHUNKS + c[None, :], mask=(s < S)[:, None] & (c < CHUNKS)[None, :],
                      other=-0x7FFFFFFFFFFFFFFF, cache_modifier=".cg")       # [MAX_ROWS, MAX_CHUNKS]
        best = tl.max(keys, 1)
        target = 0x7FFFFFFF - (best & 0x7FFFFFFF)                             # [MAX_ROWS]
        nonfinite = tl.max(tl.where((s < S) & ((best >> 32) >= 0x7FC00000), 1, 0))
        n_out, done = tl.load(state_ptr + N_OUT), tl.load(state_ptr + DONE)
        eos, limit = tl.load(state_ptr + EOS_ID), tl.minimum(tl.load(state_ptr + LIMIT), room)
        draft = tl.load(draft_ids_ptr + s, mask=s < S - 1, other=-1)
        accept_len = tl.min(tl.where((s < S - 1) & (draft == target), S - 1, tl.minimum(s, S - 1)))
        count = tl.minimum(accept_len + 1, tl.maximum(limit - n_out, 0))
        first_eos = tl.min(tl.where((s < count) & (target == eos), s, MAX_ROWS))
        count = tl.minimum(count, first_eos + 1)
        if done == 0:
            tl.store(state_ptr + STATE + n_out + s, target, mask=s < count)
            tl.store(state_ptr + N_OUT, n_out + count)
            tl.store(state_ptr + DONE, ((first_eos < MAX_ROWS) | (n_out + count >= limit)).to(tl.int64))
            tl.store(state_ptr + ACCEPT_LEN, accept_len.to(tl.int64))
            tl.store(state_ptr + NONFINITE, tl.load(state_ptr + NONFINITE) | nonfinite)


def open_round(state_W, draft_ids_G, embed_VD, work=None):
    """(verify_ids_S, pos_ids_S, hidden_SD) of the forward over [pending_id, drafts]; S = G + 1.

    Drafts outside 0..V-1 are embedded as the nearest id and never match."""
    S, (V, D) = len(draft_ids_G) + 1, embed_VD.shape
    assert S <= MAX_ROWS and state_W.dtype == draft_ids_G.dtype == torch.int64, \
        f"open_round: {S} rows, {draft_ids_G.dtype}"
    if state_W.device.type == "cpu" and not INTERPRETED:
        return open_round_ref(state_W, draft_ids_G, embed_VD)
    verify_ids_S, pos_ids_S = (torch.empty(S, dtype=torch.int64, device=state_W.device) for _ in range(2))
    hidden_SD = torch.empty((S, D), dtype=embed_VD.dtype, device=state_W.device)
    pdl = work is not None and work.pdl
    open_round_kernel[(S,)](state_W, draft_ids_G if S > 1 else state_W, embed_VD, verify_ids_S, pos_ids_S, hidden_SD, V,
                            D=D, BLOCK_D=triton.next_power_of_2(D), STATE=STATE, PDL=pdl, launch_pdl=pdl, num_warps=4)
    return verify_ids_S, pos_ids_S, hidden_SD


def close_round(logits_SV, draft_ids_G, state_W, work=None):
    """Advances the state by the accepted drafts and the target's own next id; returns nothing.

    The target's id of a row is its largest logit, lowest id first among equals; NaN sets the nonfinite word. The ids
    stop at the first eos, at the limit and at the end of the buffer, and done is set. A state that is done stays as
    it is. work: a RoundWork; without one, scratch is made and cleared for this call."""
    S, V = logits_SV.shape
    chunks = triton.cdiv(V, CHUNK)
    assert len(draft_ids_G) == S - 1 and 1 <= S <= MAX_ROWS and chunks <= MAX_CHUNKS and logits_SV.stride(1) == 1, \
        f"close_round: logits {tuple(logits_SV.shape)}, {len(draft_ids_G)} drafts"
    if state_W.device.type == "cpu" and not INTERPRETED:
        return close_round_ref(logits_SV, draft_ids_G, state_W)
    work = work or RoundWork(state_W.device)
    close_round_kernel[(S, chunks)](logits_SV, draft_ids_G if S > 1 else state_W, state_W, work.key_SC, work.arrived,
                                    logits_SV.stride(0), S, V, len(state_W) - STATE,
                                    CHUNK=CHUNK, CHUNKS=chunks, MAX_CHUNKS=MAX_CHUNKS, MAX_ROWS=MAX_ROWS,
                                    STATE=STATE, PDL=work.pdl, launch_pdl=work.pdl, num_warps=4)


def main():
    """Agreement with the plain loop, then microseconds: both ends are launch-bound."""
    from kernels.check import table, time_ms

    V, D, work, rows = 32_064, 4096, RoundWork("cuda"), []
    embed_VD = torch.randn(V, D, device="cuda").bfloat16()
    for S in (1, 16, 32):
        logits_SV = torch.randn(S, V, device="cuda").bfloat16()
        drafts_G = logits_SV.argmax(-1)[:-1]
        ours = torch.tensor([1, 0, 0, 10, -1, 100, 0, 0] + [5] * 200)
        plain, ours = ours.clone(), ours.cuda()
        close_round(logits_SV, drafts_G, ours, work)
        close_round_ref(logits_SV.cpu(), drafts_G.cpu(), plain)
        assert ours.tolist() == plain.tolist(), f"close_round: {S} rows differ from the plain loop"
        rows.append((f"{S} rows", 1e3 * time_ms(lambda d=drafts_G, s=ours: open_round(s, d, embed_VD), 8)[1],
                     1e3 * time_ms(lambda x=logits_SV, d=drafts_G, s=ours: close_round(x, d, s, work), 8)[1]))
    table("both ends of a round, p50 us", ("", "open", "close"), rows)


if __name__ == "__main__":
    self_check(main, __file__)
