"""controls: drafts made of earlier answers alone. They see neither the clip nor a drafter.

Whatever a drafter reaches belongs beside what these reach for nothing. They are computed from lists of answers after
the run, and are no draft sources. An answer is a list of the target's ids, whose first comes with its prefill.

    previous        the answer before, by position
    most frequent   the most frequent way on among answers that begin alike
    n-grams         what followed the longest known run of the last ids most often
"""

import collections
import random
import statistics
from collections.abc import Callable, Iterable, Iterator

from weights.sources import agreeing

ORDER = 16              # ids of an n-gram's context
OWN = 20                # an answer of the same stream counts as much as this many from elsewhere
RESAMPLES = 1000        # of the bootstrap


def count(table: dict, answer: list[int], order: int | None = None, weight: int = 1) -> None:
    """Adds to {context: {id: how often it followed}}. Contexts are the last 0..order ids, or all before (None)."""
    for at, fresh in enumerate(answer):
        for n in (at,) if order is None else range(min(order, at) + 1):
            counts = table.setdefault(tuple(answer[at - n:at]), {})
            counts[fresh] = counts.get(fresh, 0) + weight


def follow(table: dict, committed: list[int], limit: int, order: int | None = None) -> list[int]:
    """At most `limit` ids, each the one that followed the longest known context of those before it most often."""
    ids = list(committed)
    while len(ids) < len(committed) + limit:
        lengths = (len(ids),) if order is None else range(min(order, len(ids)), -1, -1)
        known = (table.get(tuple(ids[len(ids) - n:]), {}) for n in lengths)
        counts = next((c for c in known if any(times > 0 for times in c.values())), None)
        if counts is None:
            break
        ids.append(max(counts, key=counts.get))
    return ids[len(committed):]


def stream(answers: list[list[int]], others: Iterable[list[int]] = (), own: bool = True) -> Iterator[tuple]:
    """(answer, {name: propose(committed, limit) -> drafts}) for each answer to one question, in order. The functions
    know `others` and, with `own`, the answers before; the most frequent way is that of `others`, or if there are none
    of all other answers of the stream. Use them before the next answer is taken."""
    ways, grams, others, last = {}, {}, list(others), []
    for answer in others or answers:
        count(ways, answer)
    for answer in others:
        count(grams, answer, ORDER)
    for answer in answers:
        if not others:
            count(ways, answer, weight=-1)
        yield answer, {"previous": lambda ids, limit, last=last: last[len(ids):len(ids) + limit],
                       "most frequent": lambda ids, limit: follow(ways, ids, limit),
                       "n-grams": lambda ids, limit: follow(grams, ids, limit, ORDER)}
        if not others:
            count(ways, answer)
        if own:
            count(grams, answer, ORDER, OWN)
            last = answer


def one_shot(propose: Callable, answer: list[int], limit: int) -> int:
    """How many of at most `limit` drafts behind the answer's first id are right, up to the first that is not."""
    limit = min(limit, len(answer) - 1)                      # no draft behind the end is right
    return agreeing(propose(answer[:1], limit)[:limit], answer[1:])


def forwards(propose: Callable, answer: list[int], limit: int) -> int:
    """Target forwards after the prefill that make the answer in rounds of at most `limit` drafts."""
    at, taken = 1, 0
    while at < len(answer):
        most = min(limit, len(answer) - at)
        at += agreeing(propose(answer[:at], most)[:most], answer[at:]) + 1
        taken += 1
    return taken


def beside(streams: Iterable[list[list[int]]], shot: int, drafts: int) -> dict[str, dict[str, float | None]]:
    """{name: {"accepted": mean of one shot of `shot` drafts, "ids_a_forward": in rounds of `drafts`, the first id left
    out, None if there are no others}} over the answers of some streams, each to one question; {} without an answer."""
    accepted, taken, ids = collections.defaultdict(list), collections.Counter(), 0
    for answers in streams:
        for answer, controls in stream(answers):
            ids += len(answer) - 1
            for name, propose in controls.items():
                accepted[name].append(one_shot(propose, answer, shot))
                taken[name] += forwards(propose, answer, drafts)
    return {name: {"accepted": statistics.mean(shots), "ids_a_forward": ids / taken[name] if ids else None}
            for name, shots in accepted.items()}


def interval(values: list, figure: Callable = statistics.median) -> tuple[float, float] | None:
    """Bootstrap interval of 95 % of `figure` of the values (low, high); None below three of them: one value resampled
    is itself, and a width of nothing proves nothing."""
    if len(values) < 3:
        return None
    chance = random.Random(0)
    found = sorted(figure(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
