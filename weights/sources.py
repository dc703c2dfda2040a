"""sources: who may draft in the drafter's place. Each remembers answers of the target and costs the GPU nothing.

    class Mine(DraftSource):                                   # one method is enough
        def propose(self, committed, limit):
            return [13, 13, 13][:limit]

Whatever a source proposes, the answer stays the target's. What each of them reaches on recorded answers of the 7B pair:
`python bench.py --sources PAIRS.jsonl`. Ids are whole numbers of the target's vocabulary, answers lists of them."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import itertools
import json
import math
import threading
from pathlib import Path

from weights import UNREADABLE, InputError, describe, replace_file
from weights.adapter import guess
from weights.adapter import load as load_adapter


class DraftSource:
    """Proposes ids from the host, in place of the drafter. Subclass it; `propose` alone is enough.

    Whatever a source returns, the answer stays the target's: a wrong, empty, endless or broken proposal costs time and
    nothing else. One source may serve many requests, one after the other, and remember what it likes between them.
    """
    hears = False                           # True: the drafter runs, its head start or on a device of its own to its
                                            # end, and `hear` is told what it says
    recalls = False                         # True: the target drafts for itself, see Recalled

    def worth_hearing(self) -> bool:
        """Asked before a request, only if `hears`, where the drafter would run on the target's device and the gate is
        on: whether it should."""
        return True

    def begin(self, question: str) -> None:
        """A request starts."""

    def attach(self, model) -> None:
        """The target, told before each request, only if `recalls`."""

    def hear(self, ids: list[int]) -> None:
        """The drafter's own ids so far; before a `propose`, and only if `hears`."""

    def propose(self, committed: list[int], limit: int) -> list[int]:
        """At most `limit` ids that may follow the ids committed so far (never empty)."""
        raise NotImplementedError

    def verdict(self, drafted: int, accepted: int) -> None:
        """How many of the last proposal the target agreed with."""

    def learn(self, answer: list[int]) -> None:
        """The request ended with this answer."""


class Fixed(DraftSource):
    """Drafts a known continuation by position, whatever the target said before: `ids[i]` guesses answer id i."""

    def __init__(self, ids):
        self.ids = list(ids)

    def propose(self, committed, limit):
        return self.ids[len(committed):len(committed) + limit]


class Recalled(DraftSource):
    """The target's own past answers, searched on its device (kernels/recall.py): what followed the longest run of ids
    that ends as the answer does. Search, forward and accept are one queued piece of work, so that no round waits for
    the host. The answers are the engine's, pooled over questions; the latest 65,536 ids are kept, 8,192 on a CPU.
    Without an engine, as for `--sources`, it proposes the same from the host, and keeps all."""
    recalls = True
    ORDER = 16                              # ids of a context that are compared, as in kernels/recall.py

    def __init__(self):
        self.model = None                                    # the target, which a request attaches
        self.ids, self.after = [], {}                        # without one: all ids, the latest place after a context

    def attach(self, model) -> None:
        self.model = model

    def propose(self, committed, limit):
        if self.model is not None:
            return []                                        # it drafts for itself
        own = [-1, *committed]                               # as kernels/recall.py: a beginning fits a beginning
        places = (self.after.get(tuple(own[-n:])) for n in range(min(self.ORDER, len(own)), 0, -1))
        at = next((place for place in places if place is not None), len(self.ids))
        return list(itertools.takewhile(lambda i: i >= 0, self.ids[at:at + limit]))

    def learn(self, answer):
        if self.model is not None:
            return self.model.remember(list(answer))
        own, start = [-1, *answer], len(self.ids)
        self.ids += [*answer, -1]
        for end in range(1, len(own)):
            for n in range(1, min(self.ORDER, end) + 1):
                self.after[tuple(own[end - n:end])] = start + end - 1

    teach = learn


class Previous(DraftSource):
    """The last answer to the same question, by position."""

    def __init__(self):
        self.question, self.last = "", {}

    def begin(self, question):
        self.question = question

    def propose(self, committed, limit):
        return self.last.get(self.question, [])[len(committed):len(committed) + limit]

    def learn(self, answer):
        self.last[self.question] = list(answer)


class Constant(DraftSource):
    """The most frequent way on among past answers to the same question that begin as this one does."""

    def __init__(self, most: int = 2000):
        self.question, self.most, self.answers = "", most, {}

    def begin(self, question):
        self.question = question

    def propose(self, committed, limit):
        alive, path = [a for a in self.answers.get(self.question, []) if a[:len(committed)] == committed], []
        at = len(committed)
        while len(path) < limit:
            counts = collections.Counter(a[at] for a in alive if len(a) > at)
            if not counts:
                break
            path.append(counts.most_common(1)[0][0])
            alive, at = [a for a in alive if len(a) > at and a[at] == path[-1]], at + 1
        return path

    def learn(self, answer):
        self.answers.setdefault(self.question, collections.deque(maxlen=self.most)).append(list(answer))


class Memory(DraftSource):
    """n-gram memory over the target's past answers: the id seen most often after the longest known context.

    order: longest context in ids; most: answers kept, the oldest is forgotten; weight: of an answer of this stream,
    against 1 for those taught from elsewhere. Pooled over questions; threads may share one. `save` and `load` keep the
    answers as JSON, under the name of the model that gave them.
    placed, for Blend: contexts of 1..placed ids are also counted by their place, under (place, context), and an id that
    its answer held before apart from one that was new there, as ~id.
    """

    def __init__(self, order: int = 8, most: int = 5000, weight: int = 20, placed: int = 0, model: str = ""):
        assert order >= 0 and most >= 1, f"order {order}, most {most}: wanted 0 or more and 1 or more"
        self.order, self.most, self.weight, self.placed, self.model = order, most, weight, placed, model
        self.after, self.kept, self.lock = {}, collections.deque(), threading.Lock()

    def propose(self, committed, limit):
        ids = committed[-self.order:] if self.order else []
        with self.lock:
            for _ in range(limit):
                tail = ids[-self.order:]
                known = next((self.after[key] for n in range(len(tail) + 1) if (key := tuple(tail[n:])) in self.after),
                             None)
                if not known:
                    break
                counted = max(known, key=known.get)
                ids = ids + [max(counted, ~counted)]
        return ids[len(committed[-self.order:]):]

    def learn(self, answer):
        self.teach(answer, self.weight)

    def teach(self, answer, weight: int = 1) -> None:
        """Adds an answer; `weight` says how much more it counts than one."""
        with self.lock:
            self._count(answer, weight)
            self.kept.append((list(answer), weight))
            if len(self.kept) > self.most:
                self._count(*((oldest := self.kept.popleft())[0], -oldest[1]))

    def _count(self, answer, weight: int) -> None:
        had = set()
        for i, fresh in enumerate(answer):
            counted = ~fresh if self.placed and fresh in had else fresh
            had.add(fresh)
            keys = [tuple(answer[start:i]) for start in range(max(0, i - self.order), i + 1)]
            keys += [(i, tuple(answer[i - n:i])) for n in range(1, min(self.placed, i) + 1)]
            for key in keys:
                counts = self.after.setdefault(key, {})
                counts[counted] = counts.get(counted, 0) + weight
                if counts[counted] <= 0:                     # forgotten: leave no trace, so that the bound holds
                    del counts[counted]
                    if not counts:
                        del self.after[key]

    def save(self, path) -> None:
        with self.lock:
            text = json.dumps({"kind": "memory", "model": self.model, "order": self.order, "most": self.most,
                               "answers": list(self.kept)})
        replace_file(path, text.encode())

    @classmethod
    def load(cls, path, model: str = "") -> Memory:
        """What `save` wrote; InputError if it is none, is cut short, or was saved for another model."""
        with saved(path, "memory", model) as raw:
            memory = cls(int(raw["order"]), int(raw["most"]), model=model)
            for ids, weight in raw["answers"]:
                memory.teach(as_ids(ids), as_ids([weight])[0])
            return memory


@contextlib.contextmanager
def saved(path, kind: str, model: str):
    """The JSON object that a source of this kind and model saved; one InputError for whatever is wrong with it."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if (raw["kind"], raw["model"]) != (kind, model):
            raise ValueError(f"a {str(raw['kind'])[:20]!r} of model {str(raw['model'])[:40]!r}, wanted a {kind} of "
                             f"{model!r}")
        yield raw
    except UNREADABLE as error:
        raise InputError(f"{path}: not a saved {kind} of this model ({describe(error)}); name another file, or move it "
                         f"away") from None


def ladder(most: int, *steps) -> list[float]:
    """exp of the last (from, log weight) at or below each of 0..most."""
    return [math.exp(next((w for start, w in reversed(steps) if start <= n), -math.inf)) for n in range(most + 1)]


def products(ours, rows) -> list[list[float]]:
    """Each row times `ours`, entry by entry."""
    return [[a * b for a, b in zip(ours, row, strict=True)] for row in rows]


class Blend(DraftSource):
    """What came next wherever the ids so far occurred before, weighed: previous answer, memory and constant in one.

    Every place in the last `recent` answers to this question, and in this answer itself, votes for the id that followed
    there. Its weight is a product: how many ids before it fit (FIT), how many answers ago (AGE; WHOLE if the answer
    fits from its first id on), how many positions off (PLACE). A Memory of all answers adds its back-off, by its
    longest known context (POOL); contexts of one and two ids count once more where they stood at the same place.
    In the memory an id that was new to its answer and one that the answer held before are counted apart, and only the
    count that applies here votes: a text names a thing once and says "the" often. On the other target's answers at
    K = 15 that made 5.07 tokens a forward of 4.94, and cold 3.53 of 3.42.
    `teach` it answers from elsewhere; `save` and `load` keep it under the model's name.

    The tables are what `python -m weights.fit_blend` makes of 1,100 recorded answers of another target (LLaVA-1.5-7B):
    no answer of the target they are judged on went into them.
    Tried and dropped, tokens a forward at K = 15: a beam of 2 to 4 by expected accepted length (5.83 for 5.93 on five
    sequences, at three times the time), weights by how alike the drafter's texts are (6.02 for 6.06), a network of 39
    features (6.07 for 6.09), tables of fit by age (6.09 for 6.10), summed n-gram counts of faded weight (5.92).
    One shot of 21, where the previous answer has 13.45: the heaviest path through a trie of the last 16 answers at the
    best of 16 recency weights (13.45); of those 16 the answer most like the rest (13.21), the one whose clip's drafter
    text is most alike (10.89), the one that a linear map or a small network of 22 such features picks, learnt from the
    other sequences (13.47, 13.45). An oracle that picks of the last two answers has 14.36, of the last 16 16.28.
    Later, whole sequences held out: a transformer over the last 8 answers that may copy from each (13.51), with blend's
    votes, by expected accepted length (13.56); a model of 32 features for each place, trained on the accepted length
    itself (13.58, and 13.69 on the rows it was trained on). Where the last two answers part, the target stays with the
    last one 369 times, goes back 132, and says something else 75; no feature tells which (AUC 0.47 to 0.51), and the
    drafter's text least. What blend adds to the previous answer here it adds on the 12 first clips alone.
    Cold at K = 15, on the other target's answers (3.37 before, 3.41 with contexts by place): Kneser-Ney discounts 3.38,
    answers that share words with this one weighing more 3.43 at four times the time, words of the drafter's text 3.37.
    Places of the stream's own answers under the rule of new and held ids: 5.13 there, 6.17 for 6.22 on this target.
    """
    FIT = ladder(64, (1, -2.66), (2, -1.13), (3, -1.38), (4, -0.38), (5, -0.32), (6, -0.05), (7, -0.03), (10, -0.22),
                 (12, -0.03), (16, -0.38), (24, 0.17), (32, 0.23))
    AGE = ladder(32, (0, -1.13), (1, 0.28), (2, -0.36), (3, -0.73), (4, -1.08), (6, -1.25), (9, -1.67), (17, -2.19))
    WHOLE = ladder(32, (1, 3.63), (2, 1.41), (3, 0.75), (4, 0.55), (6, -0.26), (9, -0.88), (17, -1.84))
    PLACE = [ladder(64, (0, near), (3, middle), (8, far)) for near, middle, far in
             ((0.35, 0.15, 0.08), (0.34, 0.15, 1.15), (-0.02, 0.1, 0.29), (-0.83, -0.48, -0.19),
              (-1.59, -1.45, -0.58), (-2.03, -1.43, -0.16))]
    OFF = (0, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5)        # positions off to a row of PLACE
    BY_PLACE = products(FIT, map(PLACE.__getitem__, OFF + OFF[:0:-1]))     # FIT * PLACE by places off, -17..17
    POOL = ladder(16, (0, -0.32), (2, -0.08), (3, 0.6), (4, 0.56), (5, 0.57), (6, 0.73), (8, 0.65), (10, 0.91),
                  (13, 0.94), (16, 1.62))
    PLACED = 2                                               # ids of the contexts that the pool counts by place too
    POOL_MOST = list(itertools.accumulate(POOL, max))        # a context no longer than this begins with at most

    def __init__(self, recent: int = 32, most: int = 5000, questions: int = 64, model: str = ""):
        assert 1 <= recent < len(self.AGE), f"recent {recent}: weights are known for 1..{len(self.AGE) - 1} answers"
        self.recent, self.questions, self.model = recent, questions, model
        self.pool, self.lock = Memory(16, most, weight=1, placed=self.PLACED), threading.Lock()
        self.answers, self.question = {}, ""                 # question -> what `laid_out` makes of its answers
        self.path, self.trail = [], [({}, {})]               # the ids looked at last, and what fits after 0, 1, ... ids

    def begin(self, question):
        self.question, self.path, self.trail = question, [], [({}, {})]

    def propose(self, committed, limit):
        with self.lock, self.pool.lock:
            places, spots = self.answers.get(self.question, ([], {}, []))[1:]
            known = agreeing(self.path, committed)
            ids, trail = list(committed[:known]), self.trail[:known + 1]
            while len(ids) < len(committed) + limit:
                fresh = committed[len(ids)] if len(ids) < len(committed) else self._likeliest(ids, trail[-1], spots)
                if fresh is None:
                    break
                fits, own = trail[-1]
                trail.append(({at: fits.get(at - 1, 0) + 1 for at in places.get(fresh, ())},
                              {at: own.get(at - 1, 0) + 1 for at, past in enumerate(ids, 1) if past == fresh}
                              if fresh in ids else {}))
                ids.append(fresh)
            self.path, self.trail = ids, trail
        return ids[len(committed):]

    @classmethod
    def laid_out(cls, answers) -> tuple[list, dict, list]:
        """(answers newest first, {id: spots after it, newest answer first}, [spot]). A spot is a place with an id to
        come; a list of all of them has its age's weight, that of a whole fit, its place and the id that came."""
        places, spots = {}, []
        for age, ids in enumerate(answers, 1):
            for at, fresh in enumerate(ids):
                if at:
                    places.setdefault(ids[at - 1], []).append(len(spots))
                spots.append((cls.AGE[age], cls.WHOLE[age], at, fresh))
        return answers, places, spots

    def _likeliest(self, ids, fitting, spots):
        """The id with most votes, or None. `fitting`: {spot: ids before it which equal the last of `ids`}, and the same
        for places of `ids` itself. What can no longer overturn the vote is not counted."""
        votes, n, by_place, have = self._heard(ids), len(ids), self.BY_PLACE, set(ids)
        fits, own = fitting
        for spot, fit in fits.items():
            weight, whole, at, fresh = spots[spot]
            votes[fresh] = votes.get(fresh, 0.0) + (whole if fit == n else weight) \
                * by_place[at - n if -17 < at - n < 17 else 17][fit if fit < 64 else 64]
        for at, fit in own.items():
            votes[ids[at]] = votes.get(ids[at], 0.0) + self.AGE[0] \
                * by_place[at - n if -17 < at - n else 17][fit if fit < 64 else 64]
        tail, after, mass, lead = tuple(ids[-self.pool.order:]), self.pool.after, None, ahead_by(votes)
        for length in range(len(tail), -1, -1):              # Witten and Bell's back-off, longest first
            if lead > (1 + self.PLACED) * (mass or self.POOL_MOST[length]):
                break
            key = tail[len(tail) - length:]
            if counts := after.get(key):
                if mass is None:
                    mass = self.POOL[length]
                    floor = 0.03 * mass
                total = sum(counts.values()) + len(counts)
                for counted, count in counts.items():
                    fresh = max(counted, ~counted)
                    if (counted < 0) == (fresh in have):
                        votes[fresh] = votes.get(fresh, 0.0) + mass * count / total
                if 0 < length <= self.PLACED and (counts_here := after.get((n, key))):
                    here = sum(counts_here.values()) + len(counts_here)
                    for counted, count in counts_here.items():
                        fresh = max(counted, ~counted)
                        if (counted < 0) == (fresh in have):
                            votes[fresh] += mass * count / here
                mass *= len(counts) / total
                if mass < floor:
                    break
                lead = ahead_by(votes)
        return max(votes, key=votes.get, default=None)

    def _heard(self, ids) -> dict[int, float]:
        """Votes of who is no memory; see BlendText."""
        return {}

    def learn(self, answer):
        with self.lock:
            past, self.path, self.trail = self.answers.pop(self.question, ([],))[0], [], [({}, {})]
            self.answers[self.question] = self.laid_out([list(answer), *past][:self.recent])
            if len(self.answers) > self.questions:           # asked last, forgotten last
                del self.answers[next(iter(self.answers))]
        self.pool.teach(answer)

    def teach(self, answer) -> None:
        """An answer of another stream."""
        self.pool.teach(answer)

    def save(self, path) -> None:
        with self.lock, self.pool.lock:
            text = json.dumps({"kind": "blend", "model": self.model, "recent": self.recent, "most": self.pool.most,
                               "answers": {q: past for q, (past, *_) in self.answers.items()},
                               "pool": list(self.pool.kept)})
        replace_file(path, text.encode())

    @classmethod
    def load(cls, path, model: str = "") -> Blend:
        """What `save` wrote; InputError if it is none, is cut short, or was saved for another model."""
        with saved(path, "blend", model) as raw:
            blend = cls(int(raw["recent"]), int(raw["most"]), model=model)
            answers = {str(question): [as_ids(ids) for ids in past] for question, past in raw["answers"].items()}
            for blend.question, past in answers.items():
                for ids in reversed(past):
                    blend.learn(ids)
            blend.pool = Memory(16, int(raw["most"]), weight=1, placed=cls.PLACED)
            for ids, weight in raw["pool"]:
                blend.pool.teach(as_ids(ids), as_ids([weight])[0])
            return blend


class BlendText(Blend):
    """Blend, and the drafter's own text votes too: drafts that see the scene, for the price of the head start alone.

    The place in the text that fits the ids so far best votes for what follows there, the nearest one among equals. Its
    weight is TRUST times the odds that such places were right of late, times those of its fit and of how far off it is:
    a text that helps nobody soon counts for nothing. TRUST was chosen on 500 held-out scenes of the tiny pair: 2, 4, 8,
    16 and 40 give 6.28, 6.43, 6.80, 6.69 and 6.39 tokens a forward of 15 drafts where 32 ids are heard. Where texts are
    of no use, on EventGPT's beside LLaVA-1.5's, 1 to 16 differ by 0.1 %."""
    hears = True
    TRUST = 8.0
    DECAY = 0.998                                            # of a place's word in these odds
    WORTH = 0.3                                              # right of all; EventGPT's raw text has 0.1 to 0.2
    PROBE = 64                                               # requests; to notice texts that got better

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.text, self.places, self.right, self.tried, self.asked = [], {}, 1.0, 2.0, 0

    def worth_hearing(self):
        self.asked += 1
        return self.right > self.WORTH * self.tried or self.asked % self.PROBE == 0

    def begin(self, question):
        super().begin(question)
        self.hear([])

    def hear(self, ids):
        with self.lock:
            if ids != self.text:
                self.text, self.places = list(ids), {}
                for at in range(1, len(ids)):
                    self.places.setdefault(ids[at - 1], []).append(at)

    def _place(self, ids) -> tuple[int, int] | None:
        """(ids before it that fit, the place in the text) of the best way on, None without any."""
        n, best = len(ids), None
        for at in self.places.get(ids[-1], ()):
            fit = next((i for i in range(1, min(at, n)) if self.text[at - 1 - i] != ids[n - 1 - i]), min(at, n))
            best = max(best or (0, 0, 0), (fit, -abs(at - n), at))
        return best and (best[0], best[2])

    def _heard(self, ids):
        if (found := self._place(ids)) is None:
            return {}
        (fit, at), share = found, min(self.right / self.tried, 0.98)
        weight = self.TRUST * share / (1 - share)
        return {self.text[at]: weight * self.BY_PLACE[at - len(ids) if -17 < at - len(ids) < 17 else 17][min(fit, 64)]}

    def learn(self, answer):
        with self.lock:
            for n in range(1, len(answer)):
                if (found := self._place(answer[:n])) is not None:
                    self.right = self.DECAY * self.right + (self.text[found[1]] == answer[n])
                    self.tried = self.DECAY * self.tried + 1
        super().learn(answer)


def as_ids(ids) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 32_000 for i in ids):
        raise ValueError("ids that are no whole numbers from 0 to 31999")
    return ids


def ahead_by(votes: dict) -> float:
    """How far the leader is ahead of the second, less what rounding may do; 0 without votes."""
    if len(votes) < 2:
        return sum(votes.values())
    *_, second, first = sorted(votes.values())
    return 0.999 * (first - second)


class DrafterText(DraftSource):
    """The drafter's own text, looked up: what follows there after the longest run of 2 to `order` ids that ends the
    answer so far. For drafters that say the target's words in another order."""
    hears = True

    def __init__(self, order: int = 8):
        self.order, self.text = order, []

    def begin(self, question):
        self.text = []

    def hear(self, ids):
        self.text = list(ids)

    def propose(self, committed, limit):
        for n in range(min(self.order, len(committed)), 1, -1):
            for at in range(n, len(self.text)):
                if self.text[at - n:at] == committed[-n:]:
                    return self.text[at:at + limit]
        return []


class Adapted(DraftSource):
    """What a trained adapter (`python -m weights.adapter train`) makes of the drafter's ids and the previous answer."""
    hears = True

    def __init__(self, folder, device="cpu"):
        self.network, self.config = load_adapter(folder, device)
        self.heard, self.previous = [], Previous()
        self.hears = self.config.kind == "token" or "drafter" in self.config.sees.split(",")

    def begin(self, question):
        self.heard = []
        self.previous.begin(question)

    def hear(self, ids):
        self.heard = list(ids)

    def propose(self, committed, limit):
        previous = self.previous.last.get(self.previous.question, [])
        return guess(self.network, self.config, self.heard, previous, committed, limit)

    def learn(self, answer):
        self.previous.learn(answer)


class Best(DraftSource):
    """Of several sources, the proposal of the one whose drafts were accepted most of late: a merge by source, where
    Blend merges id by id."""

    def __init__(self, *sources: DraftSource, memory: float = 0.9):
        self.sources, self.decay, self.asked = sources, memory, None
        self.expected = [float("inf")] * len(sources)        # nobody is judged before the first try
        self.hears = any(source.hears for source in sources)

    def begin(self, question):
        for source in self.sources:
            source.begin(question)

    def hear(self, ids):
        for source in self.sources:
            source.hear(ids)

    def propose(self, committed, limit):
        for i in sorted(range(len(self.sources)), key=lambda i: -self.expected[i]):
            if drafts := self.sources[i].propose(committed, limit):
                self.asked = i
                return drafts
        return []

    def verdict(self, drafted, accepted):
        self.sources[self.asked].verdict(drafted, accepted)
        old = self.expected[self.asked]
        self.expected[self.asked] = accepted if old == float("inf") else self.decay * old + (1 - self.decay) * accepted

    def learn(self, answer):
        for source in self.sources:
            source.learn(answer)


KEPT: dict[str, type[Memory] | type[Blend]] = {"memory": Memory, "blend": Blend, "blend-text": BlendText}
SOURCES: dict[str, collections.abc.Callable[..., DraftSource]] = {
    "recall": Recalled, "previous": Previous, "constant": Constant, **KEPT,
    "best": lambda: Best(Memory(), Previous(), Constant()), "drafter-text": DrafterText, "adapter": Adapted}


def source_named(name: str, model: str = "") -> DraftSource:
    """A fresh source of SOURCES; `adapter:DIR` says where the adapter lies, `memory:FILE`, `blend:FILE` and
    `blend-text:FILE` begin with what such a source of this model (`model_name`) saved there, if it did; both blends
    save the same."""
    kind, colon, path = name.partition(":")
    kept = kind in KEPT and bool(path)
    if kind not in SOURCES or bool(colon) != (kept or kind == "adapter"):
        names = ", ".join(n + (":DIR" if n == "adapter" else "[:FILE]" if n in KEPT else "") for n in SOURCES)
        raise InputError(f"draft source {name!r}: not one of {names}; pick from these")
    if not kept:
        return SOURCES[kind](path) if colon else SOURCES[kind]()
    cls = KEPT[kind]
    return cls.load(path, model) if Path(path).exists() else cls(model=model)


def agreeing(ours, theirs) -> int:
    """How many ids two lists share from their start."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
