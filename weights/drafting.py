"""drafting: who drafts in a request, whether that pays, and what a drafter on a device of its own expects. Nothing here
imports torch: models are asked by their methods, so policy is tested with plain numbers and scripted models.

`Tenant` is the interface that the engine's loop knows: `propose` before each forward of the target, `saw` behind it.

    Found           earlier answers, and the line of a drafter elsewhere: found on the target's device
    HeadStart       what the drafter wrote before the target's prefill ended
    DrafterRounds   rounds with the drafter on the target's device
    SelfRounds      the target's own 4-bit copy
    HostSource      a DraftSource of weights/sources.py, or yours
    Cascade         several of them, the cheapest ids first
    OwnText         a drafter's own loop, for its preview and its head start

Gate decides by prices in seconds and counts of drafts; Line is the run-ahead of a drafter. Times of any one clock."""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import threading
from typing import NamedTuple

from weights.files import InputError, describe
from weights.sources import Lookup, Own, agreeing

WIDTHS = (3, 7, 15, 31)                 # numbers of drafts that a captured verify has rows for


class NonFinite(InputError):
    """A model computed NaN. Ends the request for the target; only ends the drafting for a drafter."""


# ---- tenants ----------------------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """Drafts for one forward; they are in the request's state, or will be when it runs."""
    source: str = ""                        # who drafted; none: a plain step
    rows: int = 0                           # drafts that the forward has rows for
    tenant: Tenant | None = None
    behind: int = 0                         # the last so many drafts are from earlier answers, behind `source`'s own


class Tenant:
    """Who drafts, bound to one request. `Engine._rounds` asks it before each forward and tells it what came of it."""
    needs_host = False                      # False: the next forward is queued before the last one was looked at

    def propose(self, state) -> Proposal | None:
        """Drafts behind `state`, None for a plain step. state: as the last forward left it; None where the host has not
        seen that yet, which only happens if not needs_host."""

    def cost(self, state) -> float | None:
        """Expected seconds an id; None where there is no record."""

    def saw(self, proposal: Proposal | None, before, state) -> None:
        """The host sees the state behind a forward with this proposal (None: the prefill); before it was `before`."""


PLAIN = Tenant()                            # drafts nothing: the target alone


class OwnText(Tenant):
    """A drafter's own loop, for a preview or a head start: goes on until it is stopped or the gate says that one more
    draft would cost the target more than it brings."""

    def __init__(self, req, gate: Gate | None):
        self.req, self.gate, self.n_out = req, gate, 0

    @property
    def needs_host(self):
        return not self.n_out

    def propose(self, state):
        req = self.req
        req.host_free.wait()
        if req.stop_drafting.is_set() or self.gate and req.frames_ready.is_set() and not self.gate.another(
                req.question, self.n_out):
            return ENOUGH
        return None

    def saw(self, proposal, before, state):
        self.n_out = state.n_out


ENOUGH = Proposal("enough")                 # of a drafter's own loop: it ends here


class Found(Tenant):
    """Drafts that the target finds on its own device, at the end of each forward: in earlier answers (`lookup`), and in
    the line of a drafter on another device (`drafter`)."""

    def __init__(self, req, target, earlier: Lookup | None, line: Line | None):
        self.req, self.target, self.earlier, self.line = req, target, earlier, line

    def propose(self, state):
        if state is None:
            rows = max(self._lookup_len(), self._line_len())
        else:                                                # the host knows what was found
            rows, pace = self._best(state)
            if pace and pace >= self.req.gate.step and not self.req.gate.trial("lookup"):
                return None
        if not rows:
            return None
        return Proposal("drafter" if self.line and not self.earlier else "lookup", self.target.rows_for(rows), self)

    def _lookup_len(self) -> int:
        if not self.earlier or not self.earlier.learnt:
            return 0
        return self.req.gate.best_len("lookup", self.req.question, WIDTHS) if self.req.gate else WIDTHS[-1]

    def _line_len(self) -> int:
        """Rows for what the line holds now, and a few more: it may grow before the forward runs."""
        if not self.line or (self.req.drafter_done.is_set() and not self.line.tail()[1]) or self.line.right < 0.1:
            return 0
        return min(self.req.asked.overlap_len, max(WIDTHS[1], self.line.tail()[1]) if self.line.spoke else WIDTHS[-1])

    def cost(self, state):
        return self._best(state)[1]

    def _best(self, state) -> tuple[int, float | None]:
        """(drafts of those found that are best looked at, seconds an id then; None where nobody knows)."""
        gate, found = self.req.gate, len(state.slots)
        if not gate or not found or state.ahead or gate.step is None:
            return found, None
        alive = gate.alive(kind_of(state), self.req.question, found)
        return min(((G, gate.verify(G) / (1 + sum(alive[:G]))) for G in {min(of, found) for of in WIDTHS}),
                   key=lambda best: best[1])

    def saw(self, proposal, before, state):
        if self.line:
            self.line.commit(state.ids, self.req.timeline.now())
        gate = self.req.gate
        if not proposal or not gate or before.ahead:
            return
        if proposal.tenant is self:
            gate.accepted("lookup", self.req.question, proposal.rows, state.accept_len)
        if before.slots:                                     # judged also where another source drafted in its place
            fresh = state.ids[before.n_out:]
            found = before.slots[:len(fresh)]
            gate.accepted(kind_of(before), self.req.question, len(found), agreeing(found, fresh))


def kind_of(state) -> str:
    """The gate's name for what was found behind a state's ids, by how long a context fitted: what follows a long one is
    right more often."""
    fit = state.fit
    return f"lookup behind {'1' if fit < 2 else '2 to 3' if fit < 4 else '4 to 7' if fit < 8 else '8 or more'}"


class HostTenant(Tenant):
    """A tenant that has to see each state. While the gate refuses it, the host is left out of the rounds. name: what
    the gate calls its rounds."""

    def __init__(self, req, target, name: str = ""):
        self.req, self.target, self.name, self.gate = req, target, name, req.gate
        self.ended, self.resting, self.granted, self.began = False, False, 0, 0.0

    @property
    def needs_host(self):
        return not (self.ended or self.resting)

    def propose(self, state):
        if not self.ended and not self.granted:
            self.granted = self.allowed()
        if self.ended or not self.granted or state is None:
            self.resting = not self.granted
            return None
        granted, self.granted, self.began, drafts = self.granted, 0, self.req.timeline.now(), None
        with noting(self.req.errors):
            drafts = self.drafted(state, granted)
        return drafts

    def allowed(self) -> int:
        """Drafts that the gate allows now."""
        raise NotImplementedError

    def drafted(self, state, limit: int) -> Proposal | None:
        raise NotImplementedError

    def cost(self, state):
        return self.gate.pace(self.name) if self.gate and not self.ended else None

    def saw(self, proposal, before, state):
        if proposal and proposal.tenant is self:
            if self.gate:
                self.gate.round(self.name, self.req.timeline.now() - self.began, state.accept_len + 1)
            self.judged(state)

    def judged(self, state) -> None:
        """What the target said of the last drafts."""


class HeadStart(HostTenant):
    """What the drafter wrote before the target's prefill ended, for as long as the answer is the same."""

    @property
    def needs_host(self):
        return super().needs_host and not (self.req.drafter_done.is_set() and not self.req.preview)

    def allowed(self):
        return self.req.asked.overlap_len

    def drafted(self, state, limit):
        preview = [i for i, _ in list(self.req.preview)]
        span = preview[state.n_out:state.n_out + limit] if preview[:state.n_out] == state.ids else []
        self.ended = not span
        if not span:
            return None
        self.target.put(span)
        return Proposal("head start", self.target.rows_for(len(span)), self)

    def cost(self, state):
        gate, left = self.req.gate, len(self.req.preview) - state.n_out
        if not gate or self.ended or gate.step is None or left < 1:
            return None
        alive = gate.alive("head start", self.req.question, state.n_out + left)[state.n_out:]
        return gate.verify(left) / (1 + sum(alive))

    def saw(self, proposal, before, state):
        self.req.stop_drafting.set()                         # the target's prefill has ended


class DrafterRounds(HostTenant):
    """draft -> verify -> accept with both models on one device. Ends with the drafter, or if it breaks."""

    def __init__(self, req, target, drafter):
        super().__init__(req, target, "drafter")
        self.drafter = drafter

    @property
    def needs_host(self):
        return super().needs_host and not (self.req.drafter_done.is_set() and "drafter" not in self.req.prompt_rows)

    def allowed(self):
        req = self.req
        if not req.gate or not req.asked.draft_len:
            return req.asked.draft_len
        return req.gate.best_len("drafter", req.question, range(1, req.asked.draft_len + 1), req.gate.draft)

    def drafted(self, state, limit):
        req, drafter, target = self.req, self.drafter, self.target
        req.drafter_done.wait()
        self.began, self.ended = req.timeline.now(), True    # unless all goes well
        if "drafter" not in req.prompt_rows or req.errors:
            return None
        with drafter.on_stream():
            drafter.wait_for(target)
            for i in range(limit):
                with req.timeline.stage("draft", drafter):
                    drafter.round() if i else drafter.resume(state.ids, min(2, state.n_out + 1))
            drafts_G = drafter.written(state.n_out, limit)
        target.wait_for(drafter)
        target.put(drafts_G.to(target.device))
        self.ended = False
        return Proposal("drafter", target.rows_for(limit), self)

    def judged(self, state):
        if self.gate:
            self.gate.accepted("drafter", self.req.question, state.drafted, state.accept_len)


class SelfRounds(HostTenant):
    """The target's own 4-bit copy drafts on the target's cache, an id at a time, until a draft is so unsure that the
    next one is not expected to pay, or until earlier answers go on behind its drafts: for the price of a few rows of
    the verify their ids go along, which saves 1 to 3 % of an answer's time (simulated on recorded answers). The host
    reads each draft's probability before it queues the next draft: that takes some 2 % of a draft."""
    ENOUGH = 3.0                            # ids that earlier answers are expected to have right

    def __init__(self, req, target):
        super().__init__(req, target, "self")
        self.gate, self.sures, self.found = req.gate or Gate(), [], ("", 0)
        self.resting = self.gate.refuses("self")

    def allowed(self):
        most = WIDTHS[-2] if self.target.on_gpu else WIDTHS[1]
        return most if not self.req.gate or self.gate.pays("self") else 0

    def drafted(self, state, limit):
        req, target, gate, clock = self.req, self.target, self.gate, self.req.timeline.now
        self.sures, alive, behind = [], 1.0, 0
        limit = min(limit, req.asked.max_new_tokens - state.n_out - 1)
        if limit < 1:
            return None
        now = clock()
        with req.timeline.stage("draft", target) as entry:
            while len(self.sures) < limit:
                target.draft(first=not self.sures)
                req.tell_now()                               # with the GPU at work
                ahead = target.drafted(state.n_out + limit)
                sure = ahead.sure / 1e6
                if sure < 0:
                    self.ended = True
                    raise NonFinite(f"{target.path}: the 4-bit copy's logits hold NaN; drafting without it")
                began, now = now, clock()
                gate.timed("self draft", now - began)
                self.sures.append(sure)
                alive *= gate.right(sure)
                draft = gate.seconds("self draft")
                behind, right = self.going_on(ahead, alive)
                if right >= self.ENOUGH or not gate.next_draft(alive, draft, gate.step or 2 * draft):
                    break
            entry["drafts"] = len(self.sures)
        self.found = kind_of(ahead), behind
        drafts = ahead.ids[state.n_out:] + ahead.slots[:behind]
        target.put(drafts)
        return Proposal("self", target.rows_for(len(drafts)), self, behind)

    def going_on(self, ahead, alive: float) -> tuple[int, float]:
        """(how many ids of earlier answers behind the drafts are worth their rows in the verify, how many should
        be right where the drafts are). alive: P(the drafts are)."""
        gate, own = self.gate, len(self.sures)
        most = 0 if ahead.ahead else min(len(ahead.slots), WIDTHS[-1] - own)
        if not most:
            return 0, 0.0
        right = gate.alive(kind_of(ahead), self.req.question, most)
        id_worth = gate.pace("self") or 0.0
        worth = {min(most, width - own): alive * sum(right[:width - own]) * id_worth - (gate.verify(width) or 0.0)
                 for width in reversed(WIDTHS) if width >= own}
        count = max(worth, key=worth.get)
        return count, sum(right[:count])

    def judged(self, state):
        own, (kind, behind) = len(self.sures), self.found
        self.gate.judged(self.sures, state.accept_len)
        if behind and state.accept_len >= own:
            self.gate.accepted(kind, self.req.question, behind, state.accept_len - own)


class HostSource(HostTenant):
    """A source of the caller's, see `Own`."""

    def __init__(self, req, target, source: Own):
        super().__init__(req, target, source.name)
        self.source, self.resting = source, req.gate is not None and req.gate.refuses(source.name)

    def allowed(self):
        limit = self.req.asked.draft_len if self.req.asked.mode == "speculative" else self.req.asked.overlap_len
        return limit if not self.req.gate or self.req.gate.pays(self.name) else 0

    def drafted(self, state, limit):
        if self.req.preview:
            self.source.read([i for i, _ in list(self.req.preview)])
        limit = min(limit, self.req.asked.max_new_tokens - state.n_out)
        drafts = [int(i) for i in itertools.islice(self.source.propose(list(state.ids), limit), limit)]
        if not drafts:
            return None
        self.target.put(drafts)
        return Proposal(self.name, self.target.rows_for(len(drafts)), self)

    def judged(self, state):
        with noting(self.req.errors):
            self.source.verdict(state.drafted, state.accept_len)


class Cascade(Tenant):
    """Several tenants, asked in this order; one whose ids are expected to cost more than what comes after is skipped.
    once: only for the first forward."""

    def __init__(self, tenants: list[Tenant], once: bool = False):
        self.tenants, self.once, self.over = tenants, once, False

    @property
    def needs_host(self):
        return not self.over and any(tenant.needs_host for tenant in self.tenants)

    def propose(self, state):
        if self.over:
            return None
        self.over = self.once
        costs = [tenant.cost(state) if state is not None else None for tenant in self.tenants]
        for i, tenant in enumerate(self.tenants):
            later = [cost for cost in costs[i + 1:] if cost is not None]
            if costs[i] is not None and later and costs[i] > min(later):
                continue
            if proposal := tenant.propose(state):
                return proposal
        return None

    def saw(self, proposal, before, state):
        for tenant in self.tenants:
            tenant.saw(proposal, before, state)


def tenant_of(req, sources: list, target, drafter) -> Tenant:
    """Who drafts for the target, from the sources that were asked for."""
    if req.asked.mode not in ("prefill_then_verify", "speculative"):
        return PLAIN
    tenants: list[Tenant] = []
    if req.earlier or req.line:
        tenants.append(Found(req, target, req.earlier, req.line))
    for source in sources:
        if source == "self":
            tenants.append(SelfRounds(req, target))
        elif source == "drafter" and not req.line:
            tenants.append(HeadStart(req, target))
            if req.asked.mode == "speculative":
                tenants.append(DrafterRounds(req, target, drafter))
        elif isinstance(source, Own):
            tenants.append(HostSource(req, target, source))
    return Cascade(tenants, once=req.asked.mode == "prefill_then_verify")


def asking_drafter(sources: list) -> list:
    """The sources that read what the drafter writes."""
    return [of for of in sources if isinstance(of, Own) and of.needs_drafter]


# ---- whether it pays -------------------------------------------------------------------------------------------


class Gate:
    """Decides from prices (seconds) and counts (drafted, accepted) whether drafts are expected to end an answer sooner.

    Acceptance is the share of tries that agreed, per kind of draft, question and depth, recent ones counting more; a
    question without a record takes the pool's. Whatever has no record is tried. What is refused is tried again after
    `probe` refusals, then after twice as many, and so on, so that drafts that got better are noticed.
    """
    MOST_REFUSALS = 4096
    PRIOR = 8                               # ids, see `pace`
    # P(right) of a 4-bit copy's draft by its probability, until there is experience; SubSpec's raw traces.
    SURE = ((0.5, 0.66), (0.6, 0.79), (0.7, 0.85), (0.8, 0.90), (0.9, 0.95), (1.01, 0.999))
    ENDS = [end for end, _ in SURE]

    def __init__(self, decay: float = 0.95, probe: int = 40):
        self.decay, self.probe = decay, probe
        self.times = {}                     # what -> its last few durations, seconds
        self.tries = {}                     # (kind, question) -> [tried, agreed] for depth 1, 2, ...
        self.waits = {}                     # kind -> [refusals so far, refusals before the next trial]
        self.paces = {}                     # kind -> seconds and ids of a round, recent ones counting more
        self.rights = [[8.0, 8.0 * share] for _, share in self.SURE]        # tried and right, by sureness

    # -- records

    def timed(self, what, seconds: float) -> None:
        self.times.setdefault(what, collections.deque(maxlen=9)).append(seconds)

    def seconds(self, what):
        """The undisturbed duration of `what`, None if it was never seen."""
        return min(self.times[what]) if what in self.times else None

    @property
    def step(self):
        """Seconds of a plain step, or of the cheapest verify where none was ever seen: that costs about the same."""
        return self.seconds("step") or min((min(of) for what, of in self.times.items() if what[0] == "verify"),
                                           default=None)

    def verify(self, drafts: int):
        """Seconds of a forward that looks at so many drafts: of the width seen that is nearest."""
        seen = [what[1] for what in self.times if what[0] == "verify"]
        return self.seconds(("verify", min(seen, key=lambda width: abs(width - drafts)))) if seen else self.step

    @property
    def draft(self):
        """Seconds of a drafter's draft in a round, or in a head start; the target's step where none was seen."""
        return self.seconds("draft") or self.seconds("head draft") or self.step

    def accepted(self, kind: str, question: str, drafted: int, agreed: int) -> None:
        for key in ((kind, question), (kind, None)):
            depths = self.tries[key] = self.tries.pop(key, [])            # asked last, forgotten last
            for k in range(min(drafted, agreed + 1)):        # nothing is learnt behind the first rejection
                if k == len(depths):
                    depths.append([0.0, 0.0])
                depths[k] = [self.decay * depths[k][0] + 1, self.decay * depths[k][1] + (k < agreed)]
        while len(self.tries) > 1000:
            del self.tries[next(iter(self.tries))]

    def alive(self, kind: str, question: str, depth: int) -> list[float]:
        """P(accepted >= k) for k = 1..depth. A depth never reached takes the share of the one before."""
        depths = self.tries.get((kind, question)) or self.tries.get((kind, None)) or []
        share, product_of_shares, found = 1.0, 1.0, []
        for k in range(depth):
            if k < len(depths):
                share = (depths[k][1] + 0.2 * share) / (depths[k][0] + 0.2)
            product_of_shares *= share
            found.append(product_of_shares)
        return found

    def round(self, kind: str, seconds: float, ids: int) -> None:
        """A round of this kind took so long, drafts and verify together, and gave so many ids."""
        old = self.paces.setdefault(kind, [0.0, 0.0])
        self.paces[kind] = [self.decay * old[0] + seconds, self.decay * old[1] + ids]

    def pace(self, kind: str):
        """Seconds an id of late in rounds of this kind; None where there was none. The 4-bit copy, whose rounds are
        long, begins with PRIOR ids at 0.6 of a step each: one bad round must not shut it out."""
        seconds, ids = self.paces.get(kind, (0.0, 0.0))
        if kind == "self" and self.step:
            seconds, ids = seconds + self.PRIOR * 0.6 * self.step, ids + self.PRIOR
        return seconds / ids if ids else None

    # -- decisions

    def trial(self, kind: str) -> bool:
        """Whether something refused should be tried all the same."""
        count, every = self.waits.setdefault(kind, [0, self.probe])
        tried = count + 1 >= every
        self.waits[kind] = [0, min(2 * every, self.MOST_REFUSALS)] if tried else [count + 1, every]
        return tried

    def best_len(self, kind: str, question: str, lens, draft: float | None = 0.0) -> int:
        """Drafts of the round that is expected to end an answer soonest, one of `lens`; 0: a plain step. draft: seconds
        that each draft costs besides the verify; None: not known, try as many as possible. What would not pay if it
        were always right is not tried again."""
        step = self.step
        if step is None or draft is None:
            return max(lens)
        alive = self.alive(kind, question, max(lens))
        prices = {G: G * draft + self.verify(G) for G in lens}
        best = min((0, *lens), key=lambda G: prices[G] / (1 + sum(alive[:G])) if G else step)
        if best:
            self.waits.pop(kind, None)
            return best
        return max(lens) if any(prices[G] < (1 + G) * step for G in lens) and self.trial(kind) else 0

    def refuses(self, kind: str) -> bool:
        """Whether rounds of a source that waits for the host gave ids later than plain steps, of late."""
        pace, step = self.pace(kind), self.step
        return pace is not None and step is not None and pace >= step

    def pays(self, kind: str) -> bool:
        """Whether to ask it: it is not refused, or it is tried again."""
        if self.refuses(kind):
            return self.trial(kind)
        self.waits.pop(kind, None)
        return True

    def head_start(self, question: str, most: int, size, rest: int = 0, draft_len: int = 0) -> bool:
        """Whether the drafter should run on the target's device before the target needs it: whether the ids that are
        expected to be accepted are worth more than the time by which it makes the target's first id later.

        most: drafts of a head start; size: of the clip, whose first ids are `timed` as ("first id", size, whether the
        drafter ran); rest: ids that rounds of draft_len drafts may bring then."""
        step, draft = self.step, self.draft
        if step is None or draft is None or ("head start", None) not in self.tries:
            return True
        beside, alone = (self.seconds(("first id", size, ran)) for ran in (True, False))
        late = beside - alone if beside and alone else 0.0
        gain = sum(self.alive("head start", question, most + 1)[1:]) * step           # the first id comes for free
        if rest and draft_len:
            alive = self.alive("drafter", question, draft_len)
            paces = [(G * draft + self.verify(G)) / (1 + sum(alive[:G])) for G in range(1, draft_len + 1)]
            gain += max(0.0, step - min(paces)) * rest
        if gain > max(late, 0.1 * step):
            self.waits.pop("head start", None)
            return True
        return self.trial("head start")

    def another(self, question: str, drafted: int) -> bool:
        """Whether a head start of `drafted` ids should grow although the target is ready for the device."""
        step, draft = self.step, self.draft
        return bool(step and draft) and self.alive("head start", question, drafted + 1)[-1] * step > draft

    # -- drafts of the target's 4-bit copy, which says how sure it is

    def right(self, sure: float) -> float:
        """P(a draft of this probability is right)."""
        tried, right = self.rights[bisect.bisect(self.ENDS, sure)]
        return right / tried

    def judged(self, sures: list[float], accepted: int) -> None:
        """Drafts of these probabilities, of which so many were right; nothing is learnt behind the first wrong one."""
        for k, sure in enumerate(sures[:accepted + 1]):
            counts = self.rights[bisect.bisect(self.ENDS, sure)]
            counts[:] = 0.99 * counts[0] + 1, 0.99 * counts[1] + (k < accepted)

    def next_draft(self, alive: float, draft: float, step: float) -> bool:
        """Whether one more draft pays. alive: P(all drafts so far are right); draft: its seconds. It brings an id with
        the chance that it and all before it are right, and an id is worth what it costs now."""
        tried, right = map(sum, zip(*self.rights, strict=True))
        return alive * right / tried * (self.pace("self") or 0.6 * step) > draft


def learn(gate: Gate, req, result, entries, stopped: bool) -> None:
    """Tells a gate the times of a request's stages, and how far its head start agreed with the answer. stopped: what
    would have followed the answer is not known."""
    rounds = []
    for of in entries:
        if of.row == "target" and of.stage in ("decode", "verify"):
            gate.timed("step" if of.stage == "decode" else ("verify", of.drafts), of.end - of.start)
        elif (of.row, of.stage) == ("drafter", "draft") and of.start > req.prefill_end:
            rounds.append(of.end - of.start)
        elif (of.row, of.stage) == ("drafter", "draft"):
            gate.timed("head draft", of.end - of.start)
    if rounds:                                               # the first draft of a round runs two rows
        gate.timed("draft", sum(rounds) / len(rounds))
    gate.timed(("first id", req.size, "drafter" in req.prompt_rows), result.ttft)
    if result.preview_ids:
        judged = result.preview_ids[:len(result.output_ids) if stopped else None]
        gate.accepted("head start", req.question, len(judged), agreeing(judged, result.output_ids))


class Line:
    """What a drafter on a device of its own expects the answer to become: one line of ids. Everything in it is assumed
    to be accepted; what the target rejects is dropped, and the drafter's cache rows with it, by length.

    Each side looks when it likes and the target never waits. stops: ids behind which nothing follows; limit: most ids.

    What this can bring: a run of right drafts ends with a wrong one, which costs a target's forward; each draft costs
    one of the drafter's, since what follows a wrong draft is not known before. If drafts are right with p and one takes
    c of a target's forward, no order of the two makes more than 1 / (1 - p + p c) ids a forward.
    """

    def __init__(self, stops, limit: int):
        self.stops, self.limit = set(stops), limit
        self.ids: list[int] = []                             # the answer so far, and what is expected behind it
        self.committed = 0                                   # of them the target's
        self.rows = 0                                        # of them, how many have a row in the drafter's cache
        self.broken = False                                  # the target has rejected something
        self.right = 0.5                                     # how often the next id was as expected, of late
        self.spoke: float | None = None                      # when the target last committed ids
        self.step: float | None = None                       # seconds from one such moment to the next, of late
        self.forward: float | None = None                    # seconds of a drafter's forward, of late
        self.news, self.taken, self.lock = threading.Event(), threading.Event(), threading.Lock()

    def extend(self, behind: list[int], ids: list[int]) -> None:
        """The drafter: behind the text `behind`, whose rows its cache holds now, comes `ids`."""
        with self.lock:
            kept = agreeing(self.ids, behind)
            if kept == len(behind) == len(self.ids):
                self.ids = [*behind, *ids]
            self.rows = min(kept, len(self.ids))

    def commit(self, ids: list[int], now: float) -> None:
        """The target has committed these ids, the whole answer so far."""
        with self.lock:
            kept = agreeing(self.ids, ids)
            for place in range(self.committed, min(len(ids), len(self.ids))):
                self.right += 0.02 * ((place < kept) - self.right)
                if place >= kept:
                    break                                    # nothing was expected behind a wrong id
            if kept < len(ids):
                self.broken = self.broken or kept < len(self.ids)
                self.ids, self.rows = list(ids), min(self.rows, kept)
            self.committed = len(ids)
            if self.spoke is not None:
                self.step = smoothed(self.step, now - self.spoke)
            self.spoke = now
            self.taken.clear()
            self.news.set()

    def next(self, now: float) -> tuple[list[int], int] | None:
        """The drafter: (the text to go on from, how many of its last ids have no row yet), None for now. A forward that
        would finish after the target's next step is skipped unless it will probably be needed: if that step rejects
        the line, what comes instead has to wait. Nobody waits for a target that is overdue."""
        with self.lock:
            ids, ahead = self.ids, len(self.ids) - self.committed
            if len(ids) >= self.limit or (ids and ids[-1] in self.stops):
                return None
            if self.spoke is not None and self.forward and self.step and not self.overdue(now):
                late = now + self.forward - self.spoke - self.step
                if late > self.right ** ahead * self.forward:
                    return None
            return list(ids), len(ids) - self.rows

    def overdue(self, now: float) -> bool:
        """Whether the target has committed nothing for two of its steps."""
        return self.spoke is not None and self.step is not None and now > self.spoke + 2 * self.step

    def tail(self) -> tuple[list[int], int, float]:
        """(the line from the last ids of the answer on, how many of them are drafts, expected right ones of them)."""
        with self.lock:
            drafts = len(self.ids) - self.committed
            return (self.ids[max(0, self.committed - Lookup.ORDER):], drafts,
                    sum(self.right ** k for k in range(1, drafts + 1)))


def smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + 0.2 * (new - old)


@contextlib.contextmanager
def noting(errors: list):
    """Runs what a source or a drafter does; if it breaks, says so in `errors`: that must not cost the answer. Ctrl-C
    alone goes through, which the main thread gets: asyncio's CancelledError is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        errors.append(describe(error))
