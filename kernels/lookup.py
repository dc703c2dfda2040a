"""lookup: drafts from earlier answers, on the model's device. It finds the longest suffix of the answer so far that
occurs in an earlier answer, the latest place where there are several, and drafts what followed it there. The search
ends a forward's work, so that the next one has its drafts without asking the host.

Behind the answers lies the line: what a drafter on another device expects this answer to become. `set_line` replaces
it at any time, from any thread and while forwards run, which never wait for it. The line drafts only where the last
ORDER ids are all its own, or as many as there are, and of such places at the first: what the drafter wrote behind an
id that the target then rejected fits nowhere. A search that meets a copy under way finds fewer or worse drafts, never
another answer.

ids_M, int32: answers one after the other, each closed by -1, the oldest overwritten first; an answer never wraps.
Before an answer and before the first id of the state stands -1 too, so two beginnings count as one id more that fits.
The last PLACES words are the line's, behind a word that ranks it: AFTER what is remembered, FIRST, or it ONLY.
One program compares 1,024 places with the last ORDER ids; the one that arrives last takes the best and copies its
drafts. Bytes: 4*ORDER*M, from caches but the first 4*M: 65,536 ids are 0.26 MB and some 1,300 answers. An H200 takes
5.1 microseconds for them, 4.5 for 4,096 and 6.4 for 262,144.
Ids a forward on recorded answers: `python -m tests.sources`. Tried on EventGPT's as one stream, with 15 and 7 drafts:
8.67 and 5.96; order 8: 8.55 and 5.86; order 4: 8.05 and 5.57; the id seen most often after that context: 8.14 and 5.90.
Dropped on the target's, with 15 and 31 drafts beside 5.63 and 6.27 in the same trial: the id that most of the last 8
such contexts were followed by, faded by 0.7 (5.67, 6.33); contexts over 8 ids counted as 8 (5.61, 6.25); a search after
each draft (5.63, 6.22); id by id the votes of the best 4 or 64 places, weighted by fit, age and place (5.78, 6.44 and
5.72, 6.32), which on the host took longer than it saved (3.354 against 3.305 of target_only, intervals overlapping)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.check import INTERPRETED
from kernels.round import AHEAD, DONE, DRAFTS, FIT, FOUND, SLOTS, STATE, State

ORDER = 16                           # ids of a context that are compared
PLACES = 1024                        # of a program
MOST = tl.constexpr(DRAFTS - 1)      # drafts of a search: a forward has 32 rows, one of them the pending id's
NOTHING = tl.constexpr(-1)           # no draft; between answers
BEFORE = tl.constexpr(-2)            # what no answer holds
AFTER, FIRST, ONLY = tl.constexpr(-1), tl.constexpr(-3), tl.constexpr(-4)    # where the line ranks


class Ring:
    """The answers and the line on a device, and the scratch of their search. rows: ids that are kept, a multiple of
    1,024."""

    def __init__(self, device, rows: int = 1 << 16, pdl: bool = False):
        assert rows % PLACES == 0, f"lookup: {rows} rows, wanted a multiple of {PLACES}"
        self.ids_M = torch.full((rows + PLACES,), -1, dtype=torch.int32, device=device)
        self.end = torch.zeros(1, dtype=torch.int64, device=device)          # where the next answer goes
        self.key_C = torch.zeros(rows // PLACES + 1, dtype=torch.int64, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.mail = torch.cuda.Stream(device) if self.ids_M.is_cuda else None        # the line waits for no forward
        self.rows, self.at, self.pdl = rows, 0, pdl

    @staticmethod
    def nbytes(rows: int = 1 << 16) -> int:
        """Bytes of one, before it is made."""
        return 4 * (rows + PLACES) + 8 * (rows // PLACES + 1) + 12

    @torch.inference_mode()
    def add(self, ids) -> None:
        """Keeps an answer, on the current stream. What does not fit at all is cut."""
        ids = [int(i) for i in ids][:self.rows - 1] + [-1]
        if self.at + len(ids) > self.rows:
            self.at = 0                                      # what is left at the end stays known until it is reached
        fresh = torch.tensor(ids, dtype=torch.int32)
        if self.ids_M.is_cuda:
            fresh = fresh.pin_memory()
        self.ids_M[self.at:self.at + len(ids)].copy_(fresh, non_blocking=True)
        self.at += len(ids)
        self.end.fill_(self.at)

    def add_all(self, answers) -> None:
        """Keeps these answers in turn; those that fit together in one copy."""
        joined = [i for ids in answers for i in (*ids, -1)][:-1]
        for ids in [joined] if self.at + len(joined) < self.rows else answers:
            self.add(ids)

    @torch.inference_mode()
    def set_line(self, ids, rank: int = AFTER.value) -> None:
        """The ids that may come, from the last ORDER of those that are there on; as many as fit."""
        ids = ids[:PLACES - 3]
        fresh = torch.empty(PLACES, dtype=torch.int32, pin_memory=self.mail is not None).fill_(-1)
        fresh[:2 + len(ids)].copy_(torch.tensor([rank, -1, *ids], dtype=torch.int32))
        with torch.cuda.stream(self.mail):                   # one copy: a search sees all of it, or hardly ever half
            self.ids_M[self.rows:].copy_(fresh, non_blocking=True)

    @torch.inference_mode()
    def clear(self) -> None:
        self.ids_M.fill_(-1)
        self.end.zero_()
        self.at = 0


def lookup_ref(ring: Ring, state_W):
    """(drafts, whether they are the line's, ids that fitted): the definition."""
    ids_M, rows, state = ring.ids_M.clone(), ring.rows, State(state_W.tolist())      # the line may change meanwhile
    M, rank = len(ids_M), int(ids_M[rows])
    own = [-1, *state.ids][:-ORDER - 1:-1]                                   # the last id first
    before = torch.nn.functional.pad(ids_M, (ORDER, 0), value=-1)
    fits_M, fit_M = ids_M >= 0, torch.zeros(M, dtype=torch.int64)
    for n, mine in enumerate(own):
        fits_M = fits_M & (before[ORDER - 1 - n:ORDER - 1 - n + M] == mine)
        fit_M += fits_M
    place_M = torch.arange(M)
    key_M = torch.where(fit_M > 0, (fit_M << 32) + (place_M - ring.at) % rows, 0) * (rank != ONLY.value)
    full_M = torch.where(fit_M == len(own), 2 * rows + PLACES - place_M, 0)      # the first that fits
    if rank in (FIRST.value, ONLY.value):
        full_M += (full_M > 0) * ((ORDER + 1) << 32)
    key_M[rows:] = full_M[rows:]
    best = int(key_M.argmax())
    drafts = ids_M[best:best + MOST.value].tolist() if key_M[best] else []
    return drafts[:drafts.index(-1)] if -1 in drafts else drafts, best >= rows, int(fit_M[best]) if drafts else 0


@triton.jit
def lookup_kernel(ids_ptr, end_ptr, state_ptr, key_ptr, arrived_ptr,
                  ROWS: tl.constexpr, PLACES: tl.constexpr, CHUNKS: tl.constexpr, ORDER: tl.constexpr,
                  STATE: tl.constexpr, PDL: tl.constexpr):
    """Best key of PLACES places: ids that fit above, ids since the oldest below, less than ROWS. Of a line that fits in
    full the lower part is more, and most at the first place. The last program writes the drafts."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_out, end = tl.load(state_ptr), tl.load(end_ptr).to(tl.int32)
    fits = tl.load(ids_ptr + place) >= 0                                                               # [PLACES]
    fit = tl.zeros((PLACES,), dtype=tl.int32)
    for n in tl.static_range(ORDER):
        at = n_out - 1 - n
        mine = tl.load(state_ptr + STATE + tl.maximum(at, 0)).to(tl.int32)
        mine = tl.where(at >= 0, mine, tl.where(at == -1, NOTHING, BEFORE))
        before = place - 1 - n
        fits = fits & (tl.load(ids_ptr + before, mask=before >= 0, other=NOTHING) == mine)
        fit += fits.to(tl.int32)
    rank = tl.load(ids_ptr + ROWS)
    since = (place - end + ROWS) % ROWS
    key = tl.where((fit > 0) & (rank != ONLY), (fit.to(tl.int64) << 32) | since.to(tl.int64), 0)
    above = tl.where((rank == FIRST) | (rank == ONLY), ORDER + 1, 0).to(tl.int64) << 32
    full = tl.where(fit == tl.minimum(ORDER, n_out + 1), above | (2 * ROWS + PLACES - place).to(tl.int64), 0)
    key = tl.where(place < ROWS, key, full)
    tl.store(key_ptr + tl.program_id(0), tl.max(key))
    tl.debug_barrier()                                                       # this program's store, then arrive
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(arrived_ptr, 0)
        chunk = tl.arange(0, CHUNKS)
        best = tl.max(tl.load(key_ptr + chunk, mask=chunk < tl.num_programs(0), other=0, cache_modifier=".cg"))
        low = (best & 0xFFFFFFFF).to(tl.int32)
        found = tl.where(low < ROWS, (low + end) % ROWS, 2 * ROWS + PLACES - low)
        g = tl.arange(0, MOST + 1)
        there = (best > 0) & (g < MOST) & (found + g < ROWS + PLACES)
        draft = tl.load(ids_ptr + found + g, mask=there, other=NOTHING)                                # [MOST + 1]
        closed = tl.min(tl.where(draft < 0, g, MOST))                        # the answer ends here
        fitted = tl.minimum(tl.where(low < ROWS, best >> 32, n_out + 1), ORDER)
        if tl.load(state_ptr + DONE) == 0:
            tl.store(state_ptr + SLOTS + g, draft.to(tl.int64), mask=g < closed)
            tl.store(state_ptr + FOUND, closed.to(tl.int64))
            tl.store(state_ptr + AHEAD, (low >= ROWS).to(tl.int64))
            tl.store(state_ptr + FIT, tl.where(closed > 0, fitted, 0).to(tl.int64))


def lookup(ring: Ring, state_W) -> None:
    """Puts what may follow the ids of a request's state (kernels/round.py) into its draft slots, and their number
    into FOUND; AHEAD: they are the line's; FIT: ids of the context that fitted. A state that is done stays as it is."""
    assert state_W.dtype == torch.int64, f"lookup: state of {state_W.dtype}"
    if state_W.device.type == "cpu" and not INTERPRETED:
        drafts, ahead, fit = lookup_ref(ring, state_W)
        if not state_W[DONE.value]:
            state_W[SLOTS.value:SLOTS.value + len(drafts)] = torch.tensor(drafts, dtype=torch.int64)
            for field, value in ((FOUND, len(drafts)), (AHEAD, ahead), (FIT, fit)):
                state_W[field.value] = int(value)
        return
    chunks = ring.rows // PLACES + 1
    lookup_kernel[(chunks,)](ring.ids_M, ring.end, state_W, ring.key_C, ring.arrived, ROWS=ring.rows, PLACES=PLACES,
                             CHUNKS=triton.next_power_of_2(chunks), ORDER=ORDER, STATE=STATE, PDL=ring.pdl,
                             launch_pdl=ring.pdl, num_warps=4)
