"""sources: who drafts, and whether that pays. Nothing here imports torch or knows a model, so all of it is tested with
plain numbers. A source of your own needs one method:

    class Mine:
        def propose(self, committed, limit):
            return [13, 13, 13][:limit]

Whatever a source proposes, the answer stays the target's. Ids are whole numbers of the target's vocabulary, answers
lists of them, times seconds of any one clock."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import threading
from pathlib import Path

from weights import UNREADABLE, InputError, describe, replace_file


class DraftSource:
    """Proposes ids from the host. Any object with `propose` will do; this class has the other methods' defaults.

    A wrong, empty, endless or broken proposal costs time and nothing else. One source may serve many requests, one
    after the other, and keep what it likes between them.
    """
    name = "source"                         # of its rounds in a Result
    needs_drafter = False                   # True: the drafter runs, and `read` gets its ids

    def begin(self, question: str) -> None:
        """A request starts."""

    def read(self, preview: list[int]) -> None:
        """The drafter's ids so far; before a `propose`, and only if needs_drafter."""

    def propose(self, committed: list[int], limit: int) -> list[int]:
        """At most `limit` ids that may follow the ids committed so far (never empty)."""
        raise NotImplementedError

    def verdict(self, drafted: int, accepted: int) -> None:
        """How many of the last proposal the target agreed with."""

    def learn(self, answer: list[int]) -> None:
        """The request ended with this answer."""


class Fixed(DraftSource):
    """Drafts a known continuation by position, whatever the target said before: `ids[i]` guesses answer id i."""
    name = "fixed"

    def __init__(self, ids):
        self.ids = list(ids)

    def propose(self, committed, limit):
        return self.ids[len(committed):len(committed) + limit]


class Lookup(DraftSource):
    """Earlier answers, pooled over questions: what followed the longest suffix of the answer so far, the latest one if
    several are as long. The newest answers stay, ROWS ids of them. An engine searches them on the target's device
    (kernels/lookup.py), where no round waits for the host; `propose` is the same on the host.
    `save` and `load` keep the answers as JSON, under the name of the model that gave them."""
    name = "lookup"
    ORDER = 16                              # ids of a context that are compared
    ROWS = 1 << 16

    def __init__(self, model: str = ""):
        self.model, self.answers, self.size, self.learnt = model, collections.deque(), 0, 0
        self.ids, self.after, self.indexed = [], {}, 0       # of `propose`: all ids, the latest place after a context

    def learn(self, answer):
        answer = list(answer)[:self.ROWS - 1]
        self.answers.append(answer)
        self.size, self.learnt = self.size + len(answer) + 1, self.learnt + 1
        while self.size > self.ROWS:
            self.size -= len(self.answers.popleft()) + 1

    def newest(self, count: int) -> list[list[int]]:
        """The last `count` answers, the oldest first; fewer where fewer are kept."""
        return list(itertools.islice(self.answers, max(0, len(self.answers) - count), None))

    def propose(self, committed, limit):
        for answer in self.newest(self.learnt - self.indexed):
            self._index(answer)
        self.indexed = self.learnt
        own = [-1, *committed]                               # a beginning fits a beginning
        places = (self.after.get(tuple(own[-n:])) for n in range(min(self.ORDER, len(own)), 0, -1))
        at = next((place for place in places if place is not None), len(self.ids))
        return list(itertools.takewhile(lambda i: i >= 0, self.ids[at:at + limit]))

    def _index(self, answer):
        own, start = [-1, *answer], len(self.ids)
        self.ids += [*answer, -1]
        for end in range(1, len(own)):
            for n in range(1, min(self.ORDER, end) + 1):
                self.after[tuple(own[end - n:end])] = start + end - 1

    def save(self, path) -> None:
        raw = {"kind": "lookup", "model": self.model, "answers": list(self.answers)}
        replace_file(path, json.dumps(raw).encode())

    @classmethod
    def load(cls, path, model: str = "") -> Lookup:
        """What `save` wrote; InputError if it is none, is cut short, or was saved for another model."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if (raw["kind"], raw["model"]) != ("lookup", model):
                raise ValueError(f"a {str(raw['kind'])[:20]!r} of model {str(raw['model'])[:40]!r}, wanted a lookup "
                                 f"of {model!r}")
            lookup = cls(model)
            for answer in raw["answers"]:
                if not all(type(i) is int and 0 <= i < 2 ** 31 for i in answer):
                    raise ValueError("ids that are no whole numbers below 2**31")
                lookup.learn(answer)
            return lookup
        except UNREADABLE as error:
            raise InputError(f"{path}: no saved lookup of this model ({describe(error)}); name another file, or move "
                             f"it away") from None


class Adapted(DraftSource):
    """What a trained adapter (`python -m weights.adapter train`) makes of the drafter's ids and of the previous answer
    to the same question. Source: `prefill_with_alignment` of the research code."""
    name = "adapter"

    def __init__(self, folder, device="cpu"):
        from weights import adapter
        self.guess, (self.network, self.config) = adapter.guess, adapter.load(folder, device)
        self.preview, self.question, self.last = [], "", {}
        self.needs_drafter = self.config.kind == "token" or "drafter" in self.config.sees.split(",")

    def begin(self, question):
        self.preview, self.question = [], question

    def read(self, preview):
        self.preview = list(preview)

    def propose(self, committed, limit):
        return self.guess(self.network, self.config, self.preview, self.last.get(self.question, []), committed, limit)

    def learn(self, answer):
        self.last[self.question] = list(answer)


SOURCES = ("drafter", "self", "lookup", "adapter")


def source_named(name: str, model: str = ""):
    """A source by its name: `drafter` and `self` stay names, since their models are the engine's; `lookup` and
    `lookup:FILE` (what such a source of this model saved there, if it did) are a Lookup, `adapter:DIR` an Adapted."""
    kind, colon, path = name.partition(":")
    if kind not in SOURCES or (kind in ("drafter", "self") and colon) or bool(path) != bool(colon) or (
            kind == "adapter" and not path):
        old = "; files of `memory` are no longer read, lookup:FILE makes a new one" * (kind in ("memory", "blend"))
        raise InputError(f"draft_source {name!r}: not one of drafter, self, lookup[:FILE], adapter:DIR; pick from "
                         f"these{old}")
    if kind == "lookup":
        return Lookup.load(path, model) if path and Path(path).exists() else Lookup(model)
    return Adapted(path) if kind == "adapter" else kind


def agreeing(ours, theirs) -> int:
    """How many ids two lists share from their start."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


# ---- whether it pays -------------------------------------------------------------------------------------------


class Gate:
    """Decides from prices (seconds) and counts (drafted, accepted) whether drafts are expected to end an answer sooner.

    Acceptance is the share of tries that agreed, per kind of draft, question and depth, recent ones counting more; a
    question without a record takes the pool's. Whatever has no record is tried. What is refused is tried again after
    `probe` refusals, then after twice as many, and so on, so that drafts that got better are noticed.
    """
    MOST_REFUSALS = 4096
    # P(right) of a 4-bit copy's draft by its probability, until there is experience; SubSpec's raw traces.
    SURE = ((0.5, 0.66), (0.6, 0.79), (0.7, 0.85), (0.8, 0.90), (0.9, 0.95), (1.01, 0.999))

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
        """Seconds an id of late in rounds of this kind; None where there was none."""
        return self.paces[kind][0] / self.paces[kind][1] if kind in self.paces else None

    # -- decisions

    def trial(self, kind: str) -> bool:
        """Whether something refused should be tried all the same."""
        count, every = self.waits.setdefault(kind, [0, self.probe])
        tried = count + 1 >= every
        self.waits[kind] = [0, min(2 * every, self.MOST_REFUSALS)] if tried else [count + 1, every]
        return tried

    def best_len(self, kind: str, question: str, lens, draft: float | None = 0.0) -> int:
        """Drafts of the round that is expected to end an answer soonest, one of `lens`; 0: a plain step. draft: seconds
        that each draft costs besides the verify; None: not known, try as many as possible."""
        step = self.step
        if step is None or draft is None:
            return max(lens)
        alive = self.alive(kind, question, max(lens))
        best = min((0, *lens), key=lambda G: (G * draft + self.verify(G)) / (1 + sum(alive[:G])) if G else step)
        if best:
            self.waits.pop(kind, None)
            return best
        return max(lens) if self.trial(kind) else 0

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
        tried, right = self.rights[next(i for i, (end, _) in enumerate(self.SURE) if sure < end)]
        return right / tried

    def judged(self, sures: list[float], accepted: int) -> None:
        """Drafts of these probabilities, of which so many were right; nothing is learnt behind the first wrong one."""
        for k, sure in enumerate(sures[:accepted + 1]):
            counts = self.rights[next(i for i, (end, _) in enumerate(self.SURE) if sure < end)]
            counts[:] = 0.99 * counts[0] + 1, 0.99 * counts[1] + (k < accepted)

    def next_draft(self, alive: float, draft: float, step: float) -> bool:
        """Whether one more draft pays. alive: P(all drafts so far are right); draft: its seconds. It brings an id with
        the chance that it and all before it are right, and an id is worth what it costs now."""
        tried, right = map(sum, zip(*self.rights, strict=True))
        return alive * right / tried * (self.pace("self") or 0.6 * step) > draft


class Line:
    """What a drafter on a device of its own expects the answer to become: one line of ids. Everything in it is assumed
    to be accepted; what the target rejects is dropped, and the drafter's cache rows with it, by length.

    Each side looks when it likes and the target never waits. stops: ids behind which nothing follows; limit: most ids.

    What this can bring: a run of right drafts ends with a wrong one, which costs a target's forward; each draft costs
    one of the drafter's, since what follows a wrong draft is not known before. If drafts are right with p and one takes
    c of a target's forward, no order of the two makes more than 1 / (1 - p + p c) ids a forward.
    Tried and dropped: second guesses with their cache rows put aside, so that what follows them is ready when the
    target says one of them: 1.380 against 1.382 of target_only.
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
    """Runs what a source or a drafter does; if it breaks, says so in `errors`: that must not cost the answer."""
    try:
        yield
    except (Exception, SystemExit) as error:
        errors.append(describe(error))
