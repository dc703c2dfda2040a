"""round: the two ends of a forward, on the device. open_round makes a forward's rows out of the request's state,
close_round turns its logits into ids and moves the state on. The host only ever looks at copies.

A request's state is int64 [STATE + room for ids], one definition for kernels, engine and tests:
    FIELDS    one word each, see `State`
    STOPS     ids that end the answer; -1, which no id is, where there are fewer
    FOUND     how many drafts lie in the next words
    SLOTS     the drafts of the next forward, whoever made them: the host, a drafter, a lookup, the model's 4-bit copy
    SEEN      the drafts that the last forward looked at
    ids       the answer so far
A forward of G + 1 rows looks at the first min(FOUND, G) drafts, so a wider one than needed gives the same ids.
close_draft ends a forward of the 4-bit copy, which drafts on a state of its own: its best id is one id more there, and
how sure it is goes beside it.
Bytes: open 4*S*D in bf16, close 2*S*V: 32 rows of 32,064 logits are 2.1 MB. All are launch-bound: one launch each."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.check import INTERPRETED

FIELDS = ("n_out", "done", "accept_len", "drafted", "prompt_len", "limit", "nonfinite", "ahead", "fit", "sure")
STOPS, DRAFTS = 16, 32
(N_OUT, DONE, ACCEPT_LEN, DRAFTED, PROMPT_LEN, LIMIT, NONFINITE, AHEAD, FIT, SURE) = map(tl.constexpr, range(10))
STOP, FOUND = tl.constexpr(len(FIELDS)), tl.constexpr(len(FIELDS) + STOPS)
SLOTS = tl.constexpr(FOUND.value + 1)                # where the drafts begin
SEEN = tl.constexpr(SLOTS.value + DRAFTS)
STATE = SEEN.value + DRAFTS                          # words before the ids
N_STOPS = tl.constexpr(STOPS)
MAX_ROWS = 32
CHUNK = 2048                         # logits a program looks at
MAX_CHUNKS = 64


class State:
    """The host's view of a state that was copied, in whole or from its beginning.

    n_out: ids so far, a stop id included. done: the answer has ended. accept_len, drafted: of the last forward.
    prompt_len: rows of the prompt. limit: most ids. nonfinite: a logit was NaN. ahead: the last drafts that
    were looked up came from another model's line. fit: ids of the context that fitted there. sure: the probability
    of the last draft of the 4-bit copy, in millionths. drafts: what the last forward looked at. slots: the drafts of
    the next one. ids: the answer."""
    n_out: int
    done: int
    accept_len: int
    drafted: int
    prompt_len: int
    limit: int
    nonfinite: int
    ahead: int
    fit: int
    sure: int

    def __init__(self, words: list[int]):
        self.__dict__.update(zip(FIELDS, words, strict=False))
        self.slots = words[SLOTS.value:SLOTS.value + words[FOUND.value]]
        self.drafts = words[SEEN.value:SEEN.value + self.drafted]
        self.ids = words[STATE:STATE + self.n_out]


def new_state(room: int, stops=(), ids=(), **fields):
    """int64 [STATE + room]: a state of these fields (others are 0) and ids, on the CPU."""
    assert set(fields) <= set(FIELDS) and len(stops) <= STOPS, f"new_state: {sorted(fields)}, {len(stops)} stops"
    words = [fields.get(name, 0) for name in FIELDS] + (list(stops) + [-1] * STOPS)[:STOPS] + [0] + [-1] * 2 * DRAFTS
    return torch.tensor(words + list(ids) + [0] * (room - len(ids)))


class RoundWork:
    """Scratch of both closes: the best key and the mass of each chunk of logits, and how many programs have arrived (0
    at rest)."""

    def __init__(self, device, pdl=False):
        self.key_SC = torch.zeros((MAX_ROWS, MAX_CHUNKS), dtype=torch.int64, device=device)
        self.mass_C = torch.zeros(MAX_CHUNKS, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.pdl = pdl               # programmatic dependent launch, see kernels/skinny.py

    @staticmethod
    def nbytes() -> int:
        return MAX_CHUNKS * (8 * MAX_ROWS + 4) + 4


def open_round_ref(state_W, G, embed_VD):
    S, state = G + 1, State(state_W.tolist())
    slots = state_W[SLOTS.value:SEEN.value].tolist()
    ids = [state.ids[-1] if state.ids else int(state_W[STATE]), *slots][:S]
    pos_ids_S = state.prompt_len + state.n_out - 1 + torch.arange(S, device=state_W.device)
    return pos_ids_S, embed_VD[torch.tensor(ids, device=state_W.device).clamp(0, embed_VD.shape[0] - 1)]


def close_round_ref(logits_SV, state_W):
    S, state = len(logits_SV), State(state_W.tolist())
    if state.done:
        return
    stops = set(state_W[STOP.value:FOUND.value].tolist())
    target_ids = [int(i) for i in logits_SV.float().argmax(-1)]     # CPU: lowest id wins ties, and NaN beats numbers
    drafted, accept_len = min(len(state.slots), S - 1), 0
    while accept_len < drafted and state.slots[accept_len] == target_ids[accept_len]:
        accept_len += 1
    most = min(state.limit, len(state_W) - STATE)
    fresh = target_ids[:accept_len + 1][:max(0, most - state.n_out)]
    end = next((i for i, id in enumerate(fresh) if id in stops), None)
    fresh = fresh if end is None else fresh[:end + 1]
    state_W[STATE + state.n_out:STATE + state.n_out + len(fresh)] = torch.tensor(fresh, dtype=torch.int64)
    n_out = state.n_out + len(fresh)
    for field, value in ((N_OUT, n_out), (DONE, end is not None or n_out >= most), (ACCEPT_LEN, accept_len),
                         (DRAFTED, drafted), (NONFINITE, state.nonfinite | int(logits_SV.isnan().any())), (FOUND, 0)):
        state_W[field.value] = int(value)
    state_W[SEEN.value:STATE] = state_W[SLOTS.value:SEEN.value]


def close_draft_ref(logits_1V, state_W):
    n_out = int(state_W[N_OUT.value])
    if STATE + n_out < len(state_W):
        state_W[STATE + n_out], state_W[N_OUT.value] = int(logits_1V[0].float().argmax()), n_out + 1
    state_W[FOUND.value] = 0
    share = (logits_1V[0].float() - logits_1V[0].float().max()).exp().sum().reciprocal()
    state_W[SURE.value] = -1 if logits_1V.isnan().any() else int(share * 1e6)


@triton.jit
def open_round_kernel(state_ptr, embed_ptr, pos_ids_ptr, hidden_ptr, V, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      STATE: tl.constexpr, PDL: tl.constexpr):
    """One row: its position, and the embedding of its id."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_out = tl.load(state_ptr + N_OUT)
    pending = tl.load(state_ptr + STATE + tl.maximum(n_out - 1, 0))
    draft = tl.load(state_ptr + SLOTS + row - 1, mask=row > 0, other=0)      # row 0 is the pending id
    verify_id = tl.where(row == 0, pending, draft)
    tl.store(pos_ids_ptr + row, tl.load(state_ptr + PROMPT_LEN) + n_out - 1 + row)
    known = tl.minimum(tl.maximum(verify_id, 0), V - 1)                      # a draft may be no id at all
    col = tl.arange(0, BLOCK_D)
    tl.store(hidden_ptr + row * D + col, tl.load(embed_ptr + known * D + col, mask=col < D, other=0.0), mask=col < D)


@triton.jit
def key_of(x, col, V):
    """Orders logits by value, then by lowest id: the float's bits made monotonous above, the id's complement below."""
    x = x + 0.0                                                              # -0.0 ties with 0.0
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))        # NaN, of either sign, beats every number
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(col < V, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - col).to(tl.int64), -0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["S"])
def close_round_kernel(logits_ptr, state_ptr, key_ptr, arrived_ptr, stride, S, V, room,
                       CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MAX_CHUNKS: tl.constexpr, MAX_ROWS: tl.constexpr,
                       STATE: tl.constexpr, PDL: tl.constexpr):
    """Best key of one chunk of one row; the program that arrives last compares drafts and moves the state on."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    col = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + col, mask=col < V, other=float("-inf")).to(tl.float32)
    tl.store(key_ptr + row * MAX_CHUNKS + chunk, tl.max(key_of(x, col, V)))
    tl.debug_barrier()                                                       # all of this program's stores, then arrive
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if arrived == S * CHUNKS - 1:
        tl.store(arrived_ptr, 0)
        s = tl.arange(0, MAX_ROWS)
        c = tl.arange(0, MAX_CHUNKS)
        keys = tl.load(key_ptr + s[:, None] * MAX_CHUNKS + c[None, :], mask=(s < S)[:, None] & (c < CHUNKS)[None, :],
                      other=-0x7FFFFFFFFFFFFFFF, cache_modifier=".cg")       # [MAX_ROWS, MAX_CHUNKS]
        best = tl.max(keys, 1)
        target = 0x7FFFFFFF - (best & 0x7FFFFFFF)                            # [MAX_ROWS]
        nonfinite = tl.max(tl.where((s < S) & ((best >> 32) >= 0x7FC00000), 1, 0))
        n_out, done = tl.load(state_ptr + N_OUT), tl.load(state_ptr + DONE)
        limit = tl.minimum(tl.load(state_ptr + LIMIT), room)
        drafted = tl.minimum(tl.load(state_ptr + FOUND), S - 1)
        draft = tl.load(state_ptr + SLOTS + s)
        accept_len = tl.min(tl.where((s < drafted) & (draft == target), drafted, tl.minimum(s, drafted)))
        count = tl.minimum(accept_len + 1, tl.maximum(limit - n_out, 0))
        stops = target < 0
        for i in tl.static_range(N_STOPS):
            stops = stops | (target == tl.load(state_ptr + STOP + i))
        first_stop = tl.min(tl.where((s < count) & stops, s, MAX_ROWS))
        count = tl.minimum(count, first_stop + 1)
        if done == 0:
            tl.store(state_ptr + STATE + n_out + s, target, mask=s < count)
            tl.store(state_ptr + N_OUT, n_out + count)
            tl.store(state_ptr + DONE, ((first_stop < MAX_ROWS) | (n_out + count >= limit)).to(tl.int64))
            tl.store(state_ptr + ACCEPT_LEN, accept_len.to(tl.int64))
            tl.store(state_ptr + DRAFTED, drafted.to(tl.int64))
            tl.store(state_ptr + NONFINITE, tl.load(state_ptr + NONFINITE) | nonfinite)
            tl.store(state_ptr + FOUND, drafted.to(tl.int64) * 0)
            tl.store(state_ptr + SEEN + s, draft)


@triton.jit
def close_draft_kernel(logits_ptr, state_ptr, key_ptr, mass_ptr, arrived_ptr, V, room, CHUNK: tl.constexpr,
                       CHUNKS: tl.constexpr, MAX_CHUNKS: tl.constexpr, STATE: tl.constexpr, PDL: tl.constexpr):
    """Best key of one chunk and the mass of its logits over its own largest; the last program adds one id."""
    chunk = tl.program_id(0)
    col = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits_ptr + col, mask=col < V, other=float("-inf")).to(tl.float32)
    top = tl.max(x)
    tl.store(key_ptr + chunk, tl.max(key_of(x, col, V)))
    tl.store(mass_ptr + chunk, tl.sum(tl.where(x > float("-inf"), tl.exp(x - top), 0.0)))
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if arrived == CHUNKS - 1:
        tl.store(arrived_ptr, 0)
        c = tl.arange(0, MAX_CHUNKS)
        key = tl.load(key_ptr + c, mask=c < CHUNKS, other=-0x7FFFFFFFFFFFFFFF, cache_modifier=".cg")
        mass = tl.load(mass_ptr + c, mask=c < CHUNKS, other=0.0, cache_modifier=".cg")
        best = tl.max(key)
        high = (key >> 32).to(tl.int32)
        value = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)            # of each chunk's largest
        most = tl.max(tl.where(c < CHUNKS, value, float("-inf")))
        mass = tl.sum(tl.where((c < CHUNKS) & (mass > 0), mass * tl.exp(value - most), 0.0))
        sure = tl.where((best >> 32) >= 0x7FC00000, -1, (1e6 / mass).to(tl.int64))
        n_out = tl.load(state_ptr + N_OUT)
        tl.store(state_ptr + STATE + n_out, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=n_out < room)
        tl.store(state_ptr + N_OUT, tl.minimum(n_out + 1, room))
        tl.store(state_ptr + FOUND, n_out * 0)
        tl.store(state_ptr + SURE, sure.to(tl.int64))


def open_round(state_W, G, embed_VD, work=None):
    """(pos_ids_S, hidden_SD) of a forward over [pending_id, drafts], S = G + 1.

    Drafts outside 0..V-1 are embedded as the nearest id and never accepted."""
    S, (V, D) = G + 1, embed_VD.shape
    assert S <= MAX_ROWS and state_W.dtype == torch.int64, f"open_round: {S} rows, {state_W.dtype}"
    if state_W.device.type == "cpu" and not INTERPRETED:
        return open_round_ref(state_W, G, embed_VD)
    pos_ids_S = torch.empty(S, dtype=torch.int64, device=state_W.device)
    hidden_SD = torch.empty((S, D), dtype=embed_VD.dtype, device=state_W.device)
    pdl = work is not None and work.pdl
    open_round_kernel[(S,)](state_W, embed_VD, pos_ids_S, hidden_SD, V, D=D,
                            BLOCK_D=triton.next_power_of_2(D), STATE=STATE, PDL=pdl, launch_pdl=pdl, num_warps=4)
    return pos_ids_S, hidden_SD


def close_round(logits_SV, state_W, work=None):
    """Moves the state on by the accepted drafts and the model's own next id; returns nothing. FOUND becomes 0.

    The id of a row is its largest logit, the lowest id among equals; NaN sets the nonfinite word. The ids
    stop at the first stop id, at the limit and at the end of the buffer, and done is set. A state that is done stays
    as it is. work: a RoundWork; without one, scratch is made and cleared for this call."""
    S, V = logits_SV.shape
    chunks = triton.cdiv(V, CHUNK)
    assert 1 <= S <= MAX_ROWS and chunks <= MAX_CHUNKS and logits_SV.stride(1) == 1, \
        f"close_round: logits {tuple(logits_SV.shape)}, strides {logits_SV.stride()}"
    if state_W.device.type == "cpu" and not INTERPRETED:
        return close_round_ref(logits_SV, state_W)
    work = work or RoundWork(state_W.device)
    close_round_kernel[(S, chunks)](logits_SV, state_W, work.key_SC, work.arrived, logits_SV.stride(0), S, V,
                                    len(state_W) - STATE, CHUNK=CHUNK, CHUNKS=chunks, MAX_CHUNKS=MAX_CHUNKS,
                                    MAX_ROWS=MAX_ROWS, STATE=STATE, PDL=work.pdl, launch_pdl=work.pdl, num_warps=4)


def close_draft(logits_1V, state_W, work=None):
    """The best id of one row of logits goes behind the state's ids, whatever it is, if there is room. FOUND becomes 0;
    SURE: its softmax probability in millionths, -1 where a logit is NaN."""
    chunks = triton.cdiv(logits_1V.shape[1], CHUNK)
    assert len(logits_1V) == 1 and chunks <= MAX_CHUNKS, f"close_draft: {tuple(logits_1V.shape)}"
    if state_W.device.type == "cpu" and not INTERPRETED:
        return close_draft_ref(logits_1V, state_W)
    work = work or RoundWork(state_W.device)
    close_draft_kernel[(chunks,)](logits_1V, state_W, work.key_SC, work.mass_C, work.arrived, logits_1V.shape[1],
                                  len(state_W) - STATE, CHUNK=CHUNK, CHUNKS=chunks, MAX_CHUNKS=MAX_CHUNKS,
                                  STATE=STATE, PDL=work.pdl, launch_pdl=work.pdl, num_warps=4)
