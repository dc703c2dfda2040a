"""sources: what drafts without a drafter reach on recorded answers: lookup beside the controls.

    python -m tests.sources PAIRS.jsonl --out tests/results/sources.txt

Acceptance only: no model runs and nothing is timed. Clips of a sequence overlap by half, so whole sequences are held
out: the answers of the other sequences (to the same question) are known beforehand, those of the sequence itself once
they are complete, in order; `cold`: the others only. Intervals of 95 % over resampled sequences, from three of them up.
PAIRS is what `bench.py --record` writes; some minutes for a thousand answers."""

import collections
import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
from pairs import read_pairs

from weights import controls
from weights.sources import Lookup, agreeing

LENGTHS, SHOTS = (8, 15, 31), (15, 21, 31)         # drafts of a round, drafts of one shot
COLD = ("most frequent", "n-grams", "lookup")      # who knows anything of other sequences


class Searched(Lookup):
    """A Lookup that is searched on the host: the same drafts as kernels/lookup.py finds."""

    def __init__(self):
        super().__init__()
        self.ids, self.after = [], {}                  # all ids, the latest place after a context

    def learn(self, answer):
        super().learn(answer)
        own, start = [-1, *answer], len(self.ids)
        self.ids += [*answer, -1]
        for end in range(1, len(own)):
            for n in range(1, min(self.ORDER, end) + 1):
                self.after[tuple(own[end - n:end])] = start + end - 1

    def propose(self, committed, limit):
        own = [-1, *committed]                         # a beginning fits a beginning
        places = (self.after.get(tuple(own[-n:])) for n in range(min(self.ORDER, len(own)), 0, -1))
        at = next((place for place in places if place is not None), len(self.ids))
        return list(itertools.takewhile(lambda i: i >= 0, self.ids[at:at + limit]))


class Run:
    """One held-out sequence: ids behind the first, target forwards by drafts a round, accepted by drafts of a shot."""

    def __init__(self):
        self.ids, self.forwards, self.shots = 0, collections.Counter(), collections.defaultdict(list)


def replay(rows: list[dict], own: bool = True, lengths=LENGTHS, shots=SHOTS, only=None) -> dict[str, list[Run]]:
    """{name: [Run of each sequence]} of the controls and of lookup. own: a sequence's earlier answers are known too."""
    runs = collections.defaultdict(list)
    for seq in only or sorted({row["seq"] for row in rows}):
        here = collections.defaultdict(Run)
        for question in sorted({row["question"] for row in rows if row["seq"] == seq}):
            asked = [row for row in rows if row["question"] == question]
            others = [row["target"] for row in asked if row["seq"] != seq]
            answers, lookup = [row["target"] for row in asked if row["seq"] == seq], Searched()
            for answer in others:
                lookup.learn(answer)
            for answer, proposes in controls.stream(answers, others, own):
                for name, propose in {**proposes, "lookup": lookup.propose}.items():
                    run = here[name]
                    run.ids += len(answer) - 1
                    for limit in shots:
                        run.shots[limit].append(controls.one_shot(propose, answer, limit))
                    for limit in lengths:
                        run.forwards[limit] += controls.forwards(propose, answer, limit)
                if own:
                    lookup.learn(answer)
        for name, run in here.items():
            runs[name].append(run)
    return runs


def per_forward(runs: list[Run], K: int) -> float:
    """Ids a target forward in rounds of K drafts; 0 if no answer has a second id."""
    return sum(run.ids for run in runs) / max(1, sum(run.forwards[K] for run in runs))


def accepted(runs: list[Run], limit: int) -> float:
    """Mean accepted of one shot of `limit` drafts."""
    return statistics.mean(shot for run in runs for shot in run.shots[limit])


def cell(figure, runs: list, at: int) -> str:
    """A figure of some runs and its interval over resampled sequences."""
    around = controls.interval(runs, lambda some: figure(some, at))
    return f"{figure(runs, at):6.2f}" + (f" [{around[0]:5.2f},{around[1]:6.2f}]" if around else "")


def table(title: str, figure, columns, runs: dict[str, list[Run]], rival: str) -> list[str]:
    """A row for each source, then lookup over its rival, paired by sequence."""
    def over(pairs, at):
        return figure([a for a, _ in pairs], at) / max(figure([b for _, b in pairs], at), 1e-9)

    lines = [title, f"{'':15}" + "".join(f"{column:>22}" for column in columns)]
    lines += [f"  {name:13}" + "".join(f"{cell(figure, of, column):>22}" for column in columns)
              for name, of in runs.items()]
    if figure(runs[rival], columns[0]) > 0:
        pairs = list(zip(runs["lookup"], runs[rival], strict=True))
        lines.append(f"  {'ratio':13}" + "".join(f"{cell(over, pairs, column):>22}" for column in columns)
                     + f"  lookup over {rival}, paired")
    return lines


def main(argv=None) -> int:
    parser = measure.flags(__doc__)
    parser.add_argument("pairs", type=Path, help="recorded answers")
    parser.add_argument("--src", help="which rows of PAIRS (default: the only kind there)")
    options = parser.parse_args(argv)
    rows = read_pairs(options.pairs, options.src)
    seqs = {row["seq"] for row in rows}
    warm, cold = replay(rows), replay(rows, own=False)
    drafter = statistics.mean(agreeing(row["drafter"][:21], row["target"]) for row in rows)
    lines = [f"sources, {len(rows)} recorded answers of {len(seqs)} sequences ({options.pairs.name}, "
             f"{rows[0]['src']}), whole sequences held out, "
             + ("[95 % over sequences]" if len(seqs) > 2 else "too few of them for intervals")]
    lines += table("one shot after the target's own first id, mean accepted of", accepted, SHOTS, warm, "previous")
    lines += [f"  drafter's own text, from its first id on: {drafter:.3f} of 21"]
    lines += table("rounds of K drafts, ids per target forward, earlier answers of the sequence too, K =", per_forward,
                   LENGTHS, warm, "n-grams")
    lines += table("rounds of K drafts, cold: other sequences only, K =", per_forward, LENGTHS,
                   {name: cold[name] for name in COLD}, "n-grams")
    measure.publish(lines, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(measure.run(main))
