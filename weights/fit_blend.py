"""fit_blend: the tables of Blend out of recorded answers.

    python -m weights.fit_blend PAIRS.jsonl [--src SRC] [--most 50]

Every id of every answer is an event: the places that vote there, as Blend finds them, each vote a product of table
entries, and which of them vote for the id that came. Maximum likelihood of votes for that id over all votes; whole
sequences held out of the pool, answers of the sequence in order, as `bench.py --sources` replays them. Likelihood
counts votes of older answers as if each were news, which they are not: how much more the last answer weighs while it
fits whole (BOOSTS) is chosen afterwards, by accepted drafts of one shot on the same answers.

The shipped tables: `python -m weights.fit_blend seed_pairs_llava15.jsonl --src 4bit_200508`, 1,100 answers of another
target than those they are judged on: 0.4872 nats an id, one shot of 21 accepts 11.060 with the boost 1, 11.165 with 2
and 11.177 with 4 and 8. Prints them as they stand in weights/sources.py; about a minute on one core.
"""

import argparse
import bisect
import collections
import itertools
import math
import sys

import torch

from weights import InputError
from weights.adapter import LIMIT, read_pairs
from weights.sources import Blend, agreeing, ladder, products

# Where the steps of the ladders begin, NEAR: those of PLACE's rows, by fit. SIZES: what the ladders run to.
STARTS = {"FIT": (1, 2, 3, 4, 5, 6, 7, 10, 12, 16, 24, 32), "AGE": (0, 1, 2, 3, 4, 6, 9, 17),
          "WHOLE": (1, 2, 3, 4, 6, 9, 17), "POOL": (0, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
NEAR = (0, 3, 8)
SIZES = {"FIT": 64, "AGE": 32, "WHOLE": 32, "POOL": 16}
BOOSTS = (1, 2, 4, 8)


def step_of(starts, n: int) -> int:
    return sum(start <= n for start in starts) - 1


def streams(rows, blend=Blend):
    """(a fresh source that was taught all other sequences, the rows of one sequence in order), sequence by sequence."""
    for seq in sorted({row["seq"] for row in rows}):
        source = blend(most=2 * len(rows))
        for row in rows:
            if row["seq"] != seq:
                source.teach(row["target"])
        yield source, [row for row in rows if row["seq"] == seq]


def pool_share(pool, ids, fresh: int) -> tuple[int, float, float]:
    """(longest known context, votes for `fresh`, all votes) of the pool's back-off, which begins with the mass 1."""
    longest, right, all_votes, mass, n, have = -1, 0.0, 0.0, 1.0, len(ids), set(ids)
    for length in range(min(pool.order, n), -1, -1):
        key = tuple(ids[n - length:])
        if counts := pool.after.get(key):
            longest = max(longest, length)
            here = pool.after.get((n, key), {}) if 0 < length <= pool.placed else {}
            for found in (counts, here):
                total = sum(found.values()) + len(found)
                right += mass * found.get(~fresh if fresh in have else fresh, 0) / max(total, 1)
                all_votes += mass / max(total, 1) * sum(
                    count for counted, count in found.items() if (counted < 0) == (max(counted, ~counted) in have))
            mass *= len(counts) / (sum(counts.values()) + len(counts))
            if mass < 0.03:
                break
    return longest, right, all_votes


def events(rows) -> tuple[torch.Tensor, ...]:
    """(which entries of the tables multiply to a vote [N, 3], its event [N], how many such votes [N], how many of them
    right [N]); N distinct votes of all events. Entry 0 is the constant 0, then FIT, AGE, WHOLE, POOL, PLACE."""
    base = dict(zip((*STARTS, "PLACE"), itertools.accumulate((1, *map(len, STARTS.values()))), strict=True))
    entries, at_event, counts, rights, event = [], [], [], [], 0
    for source, stream in streams(rows):
        for row in stream:
            ids = row["target"]
            source.begin(row["question"])
            past, _, spots = source.answers.get(source.question, ([], {}, []))
            ends = [*itertools.accumulate(map(len, past))]               # of each answer among the spots
            for n in range(1, len(ids)):
                source.propose(ids[:n], 0)                   # brings the walk up to date
                fits, own = source.trail[n]
                found = collections.defaultdict(lambda: [0.0, 0.0])
                votes = [(1 + bisect.bisect_right(ends, spot), *spots[spot][2:], fit) for spot, fit in fits.items()]
                votes += [(0, at, ids[at], fit) for at, fit in own.items()]
                for age, at, fresh, fit in votes:
                    table = "WHOLE" if age and fit == n else "AGE"
                    place = 3 * Blend.OFF[min(abs(at - n), 17)] + step_of(NEAR, fit)
                    key = (base["FIT"] + step_of(STARTS["FIT"], fit), base[table] + step_of(STARTS[table], age),
                           base["PLACE"] + place)
                    found[key][0] += 1
                    found[key][1] += fresh == ids[n]
                longest, right, total = pool_share(source.pool, ids[:n], ids[n])
                if total:
                    found[base["POOL"] + step_of(STARTS["POOL"], longest), 0, 0] = [total, right]
                if any(right for _, right in found.values()):
                    for key, (total, right) in found.items():
                        entries.append(key)
                        at_event.append(event)
                        counts.append(total)
                        rights.append(right)
                    event += 1
            source.learn(ids)
    return torch.tensor(entries), torch.tensor(at_event), torch.tensor(counts), torch.tensor(rights)


def fit(rows) -> tuple[dict, float]:
    """({table: [log weight of each step], "PLACE": rows of three}, nats an id) for recorded answers."""
    entries, at_event, counts, rights = events(rows)
    n_events, sizes = int(at_event[-1]) + 1, [*map(len, STARTS.values()), 3 * len(Blend.PLACE)]
    theta = torch.zeros(sum(sizes), dtype=torch.float64, requires_grad=True)

    def loss():
        weights = torch.cat([theta.new_zeros(1), theta])[entries].sum(1).exp()
        totals = [theta.new_zeros(n_events).index_add(0, at_event, weights * of) for of in (counts, rights)]
        return (totals[0].log() - totals[1].log()).mean() + 1e-5 * theta.square().sum()    # the last fixes the scale

    solver = torch.optim.LBFGS([theta], max_iter=400, tolerance_grad=1e-7, tolerance_change=1e-10,
                               line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        found = loss()
        found.backward()
        return found

    solver.step(closure)
    *tables, places = theta.detach().split(sizes)
    return {**{name: [round(x, 2) for x in of.tolist()] for name, of in zip(STARTS, tables, strict=True)},
            "PLACE": [[round(x, 2) for x in row] for row in places.reshape(-1, 3).tolist()]}, loss().item()


def with_tables(tables: dict):
    """Blend with these tables, as a class."""
    made: dict = {name: ladder(SIZES[name], *zip(STARTS[name], tables[name], strict=True)) for name in STARTS}
    made["PLACE"] = [ladder(64, *zip(NEAR, row, strict=True)) for row in tables["PLACE"]]
    rows = [made["PLACE"][off] for off in Blend.OFF + Blend.OFF[:0:-1]]
    return type("Blend", (Blend,), made | {"BY_PLACE": products(made["FIT"], rows), "POOL_MOST": list(
        itertools.accumulate(made["POOL"], max))})


def one_shot(rows, blend) -> float:
    """Mean accepted of LIMIT drafts after the target's own first id."""
    accepted = []
    for source, stream in streams(rows, blend):
        for row in stream:
            source.begin(row["question"])
            accepted.append(agreeing(source.propose(row["target"][:1], LIMIT), row["target"][1:]))
            source.learn(row["target"])
    return sum(accepted) / len(accepted)


def boosted(tables: dict, boost: float) -> dict:
    return {**tables, "WHOLE": [round(tables["WHOLE"][0] + math.log(boost), 2), *tables["WHOLE"][1:]]}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="recorded answers, one JSON object a line")
    parser.add_argument("--src", default="headstart", help="which rows of it (default %(default)s)")
    parser.add_argument("--most", type=int, default=50, help="ids of an answer that count (default %(default)s)")
    options = parser.parse_args(argv)
    try:
        rows = [{**row, "target": row["target"][:options.most]} for row in read_pairs(options.pairs, options.src)]
    except InputError as error:
        print(f"fit_blend: {error}", file=sys.stderr)
        return 2
    tables, nats = fit(rows)
    shots = {boost: one_shot(rows, with_tables(boosted(tables, boost))) for boost in BOOSTS}
    best = max(shots, key=shots.get)
    print(f"{len(rows)} answers of {len({row['seq'] for row in rows})} sequences, {nats:.4f} nats an id; one shot of "
          f"{LIMIT} with the last whole answer x " + ", ".join(f"{b}: {of:.3f}" for b, of in shots.items()))
    for name, values in boosted(tables, best).items():
        steps = values if name == "PLACE" else zip(STARTS[name], values, strict=True)
        steps = ", ".join(str(tuple(step)) for step in steps)
        print(f"{name} = " + (f"ladder({SIZES[name]}, {steps})" if name in SIZES else f"({steps})"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
