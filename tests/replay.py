"""replay: 7B compute that says recorded ids: real speed at a true acceptance, without the checkpoints.

    python -m tests.replay PAIRS.jsonl --weights random-7b --max-answers 300 --out tests/results/replay.txt
    python -m tests.replay PAIRS.jsonl --weights random-7b --accept 0.4,0.6,0.8 --only "drafter right" \\
        --drafter-device cuda:1 --drafter-dtype int4
    python -m tests.replay --random-ids 200 --weights random-7b --self 0.91,0.95,0.97,0.2 --only self --max-answers 20
    python -m tests.replay PAIRS.jsonl --shard 0/2 --rows a.json; python -m tests.replay --merge a.json b.json

Both models compute as ever and say the ids that were recorded elsewhere; every setting is timed end to end against
target_only of the same answer. A stream is one recorded sequence; sequences in order of length until there are enough
answers, the last one cut. The recorded clips are not here: those of a data set take their place. Settings:

    drafter, raw                    EventGPT's recorded text, verified once
    lookup, cold                    knows the sequence's earlier answers
    lookup, other sequences         knows the other sequences
    lookup, both
    drafter right with P            says each id of the answer, wrong with 1 - P (--accept)
    lookup, right with P            the same behind `lookup, both`
    self right with P               the target's 4-bit copy drafts, an id of its being right with P (--self); how sure
                                    it is of each is drawn from the published calibration (Gate.SURE)
    lookup, both + self P           the same behind `lookup, both`, and `lookup, cold + self P`

Ratios above 1 are faster. Exit 1 if an answer differs from what was recorded."""

import collections
import json
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure  # first: it settles Ctrl-C

# isort: split
import torch
from pairs import read_pairs

import bench
import engine
from kernels.check import quantiles
from weights import UNREADABLE, InputError, describe, replace_file, show
from weights.drafting import Gate
from weights.files import read_json
from weights.rows import estimate, forwards, median, per_forward
from weights.sources import Lookup

WARM_UP = 3                                                  # answers of the first stream


@dataclass
class Setting:
    """Who drafts in one row of the table."""
    mode: str
    source: object                                           # as generate's draft_source
    right: float | None = None                               # P; None: the drafter says what was recorded
    learns: Lookup | None = None                             # told the answers of this stream

    def drafts(self, row: dict, chance, V: int) -> tuple[list[int], list[float]]:
        """What the drafter, or the copy, says of an answer, and how sure the copy is of each id."""
        if self.right is None:
            return row["drafter"], []
        sures = [sure_of(self.right, chance) for _ in row["target"]]
        return [i if chance.random() < share else (i + 1) % V
                for i, (_, share) in zip(row["target"], sures, strict=True)], [sure for sure, _ in sures]

    @property
    def sources(self) -> list:
        return self.source if isinstance(self.source, list) else [self.source]


def sure_of(right: float, chance) -> tuple[float, float]:
    """(probability that the copy gives to a draft, P(it is right)), so that drafts are right with `right` in all: a
    mixture of the surest class and the others, in the published calibration."""
    *others, (_, surest) = Gate.SURE
    mean = sum(share for _, share in others) / len(others)
    if right < mean:                                         # worse than any published copy: unsure of all it says
        return 0.3, right
    if chance.random() < (right - mean) / (surest - mean):
        return 0.97, surest
    end, share = chance.choice(others)
    return end - 0.05, share


def read_rates(text: str, flag: str) -> list[float]:
    try:
        rates = [float(P) for P in text.split(",") if P]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= P <= 1 for P in rates):
        raise InputError(f"--{flag}: wanted probabilities from 0 to 1 with commas between, got {text!r}; change it")
    return rates


def settings(others: list[list[int]], rates=(), selves=(), only: str | None = None) -> dict[str, Setting]:
    """Fresh ones for a stream; `others` are the answers of the other sequences. target_only first; of the rest those
    whose names hold one of the comma-separated words in `only`."""
    def known() -> Lookup:
        lookup = Lookup()
        for answer in others:
            lookup.learn(answer)
        return lookup

    cold, both = Lookup(), known()
    made = {"target_only": Setting("target_only", None), "drafter, raw": Setting("prefill_then_verify", "drafter"),
            "lookup, cold": Setting("speculative", cold, learns=cold),
            "lookup, other sequences": Setting("speculative", known()),
            "lookup, both": Setting("speculative", both, learns=both)}
    for P in rates:
        both = known()
        made[f"drafter right with {P}"] = Setting("speculative", "drafter", P)
        made[f"lookup, right with {P}"] = Setting("speculative", [both, "drafter"], P, both)
    for P in selves:
        cold, both = Lookup(), known()
        made[f"self right with {P}"] = Setting("speculative", "self", P)
        made[f"lookup, cold + self {P}"] = Setting("speculative", [cold, "self"], P, cold)
        made[f"lookup, both + self {P}"] = Setting("speculative", [both, "self"], P, both)
    return {name: of for name, of in made.items()
            if name == "target_only" or only is None or any(word in name for word in only.split(","))}


def choose(pairs: list[dict], most: int, shard: tuple[int, int]) -> dict[str, list[dict]]:
    """{sequence: its answers}, short ones first, `most` answers in all; of these sequences every N-th from the I-th."""
    streams, left = collections.defaultdict(list), most
    for row in pairs:
        streams[row["seq"]].append(row)
    chosen = {}
    for seq in sorted(streams, key=lambda seq: (len(streams[seq]), seq)):
        if left > 0:
            chosen[seq] = streams[seq][:left]
            left -= len(chosen[seq])
    if shard[1] > len(chosen):
        raise InputError(f"--shard: {shard[1]} shards of {len(chosen)} sequences; take at most as many")
    return {seq: chosen[seq] for seq in list(chosen)[shard[0]::shard[1]]}


def measured(result, base) -> dict:
    """What the table needs of a request, ms, beside target_only's of the same answer."""
    return {"e2e": result.wall_clock_time * 1e3, "ttft": result.ttft * 1e3, "ids": len(result.output_ids),
            "forwards": forwards(result.output_ids, result.accepted_tokens, result.rounds),
            "overlap": result.free_tokens_count, "window": result.window_drafts,
            "preview": result.preview_end and result.preview_end * 1e3,
            "base_e2e": base.wall_clock_time * 1e3, "base_ttft": base.ttft * 1e3}


def main(argv=None) -> int:
    options = parse(argv)
    if options.merge:
        measure.publish(report(*merged(options.merge)), options.out)
        return 0
    if (options.pairs is None) == (options.random_ids is None):
        raise InputError("PAIRS: wanted recorded answers, or --random-ids, or --merge; pass one of them")
    rates, selves = (read_rates(getattr(options, name), name) for name in ("accept", "self"))
    place = options.weights if options.weights != "tiny" else None
    drafter = any("drafter" in of.sources for of in settings([], rates, selves, options.only).values())
    e = engine.load_engine((place or bench.TINY / "drafter") if drafter else None, place or bench.TINY / "target",
                           device=options.device, drafter_device=options.drafter_device, cache_rows=options.cache_rows,
                           draft_len=15, tokenizer=options.tokenizer, gate=options.gate == "on",
                           drafter_dtype=options.drafter_dtype, self_draft=bool(selves))
    V = min(model.config.V for model in e.models)
    chance = random.Random(options.shard[0])
    pairs = read_pairs(options.pairs, options.src, V) if options.pairs else [
        {"seq": "random", "clip": n, "question": "What are the key elements in this scene?", "src": "random ids",
         "drafter": [], "target": [chance.randrange(3, V) for _ in range(options.random_ids)]}
        for n in range(options.max_answers)]
    options.max_new_tokens = options.random_ids or options.max_new_tokens
    for model in e.models:
        with torch.inference_mode():
            measure.replay(model, [])
    clips, _ = bench.read_dataset(options.dataset_dir, None, -1)
    streams = choose(pairs, options.max_answers, options.shard)
    first = next(iter(streams))
    work = [(first, row, False) for row in streams[first][:WARM_UP]]
    work += [(seq, row, True) for seq, rows in streams.items() for row in rows]
    beside = f"drafter {bench.dtype_of(e.drafter.decoder)}{' on a device of its own' * e.apart}, " if drafter else ""
    head = {"what": f"{bench.LABELS[options.weights]} {bench.dtype_of(e.target.decoder)}, {beside}"
                    f"{measure.devices(e.models)}, {measure.versions()}",
            "pairs": options.pairs.name if options.pairs else "none",
            "src": pairs[0]["src"], "new": options.max_new_tokens, "gate": options.gate}
    order = random.Random(options.shard[0])
    gates, taken, rows, result = collections.defaultdict(engine.Gate), collections.defaultdict(list), {}, None
    rights = collections.defaultdict(lambda: 0.5)            # how right a drafter's line was; see the engine's Line
    for number, (seq, row, timed) in enumerate(bench.progress(work, "answers")):
        if not number or work[number - 1][::2] != (seq, timed):           # a stream begins
            rows = settings([of["target"] for of in pairs if of["seq"] != seq], rates, selves, options.only)
        clip, ids, cell = clips[number % len(clips)], row["target"][:options.max_new_tokens], {}
        for name in order.sample(list(rows), len(rows)):     # what one leaves behind favours none
            of = rows[name]
            e.gate = gates[name] if options.gate == "on" else None        # each is priced by its own acceptance
            e.right, (drafts, sures) = rights[name], of.drafts(row, chance, V)
            with torch.inference_mode():
                measure.replay(e.target, ids, *((drafts, sures) if "self" in of.sources else ()))
                if drafter:
                    measure.replay(e.drafter, drafts)
            cell[name] = result = e.generate(
                event_path=clip.events, video_path=clip.video, query=row["question"], mode=of.mode,
                draft_source=of.source, max_new_tokens=len(ids), ignore_eos=True, remember=False,
                overlap_len=options.overlap_len)
            rights[name] = e.right
            if result.output_ids != ids:
                print(f"{name}, {seq} {row['clip']}: other ids than recorded", file=sys.stderr)
                return 1
            if of.learns:
                of.learns.learn(ids)
        if timed:
            for name, of in cell.items():
                taken[name].append(measured(of, cell["target_only"]))
            if options.rows:                                 # what is measured is kept
                replace_file(options.rows, json.dumps([{**head, "sequences": len(streams)},
                                                       {name: taken[name] for name in rows}]).encode())
    if options.timeline:
        show.draw(result, options.timeline)
    measure.publish(report({**head, "sequences": len(streams)}, {name: taken[name] for name in rows}), options.out)
    return 0


def merged(paths: list[Path]) -> tuple[dict, dict]:
    """(header, measured) of several shards of one replay."""
    heads, taken = [], collections.defaultdict(list)
    for path in paths:
        try:
            head, found = read_json(path, "a shard of a replay, as --rows writes it", 1 << 32, list)
            for name, rows in found.items():
                taken[name] += [{key: value if value is None else float(value) for key, value in row.items()}
                                for row in rows]
            heads.append({**head, "sequences": int(head["sequences"])})
            report(heads[-1], found)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{path}: not a shard of a replay ({describe(error)}); wants what --rows wrote") from None
        if {**heads[0], "sequences": 0} != {**heads[-1], "sequences": 0}:
            raise InputError(f"{path}: was replayed otherwise than {paths[0]}; merge shards of one run")
    return {**heads[0], "sequences": sum(head["sequences"] for head in heads)}, taken


def report(head: dict, taken: dict[str, list[dict]]) -> list[str]:
    """The table, from what was measured alone."""
    lines = [f"replay, {head['what']}",
             f"{len(taken['target_only'])} recorded answers of {head['sequences']} sequences ({head['pairs']}, "
             f"{head['src']}), at most {head['new']} ids, gate {head['gate']}; from files to the last id, ms",
             f"{'drafts':26} {'answers':>7} {'p20':>7} {'p50':>7} {'p80':>7} {'ttft':>7} {'later':>22} "
             f"{'ratio to target_only':>22} {'p5':>6} {'ids/forward':>11} {'window':>6} {'overlap':>7} {'preview':>7}"]
    for name, rows in taken.items():
        column = {key: [row[key] for row in rows] for key in rows[0]}
        low, mid, high = quantiles(column["e2e"])
        ratios = [base / e2e for base, e2e in zip(column["base_e2e"], column["e2e"], strict=True)]
        later = [ttft - base for ttft, base in zip(column["ttft"], column["base_ttft"], strict=True)]
        per = per_forward(sum(column["ids"]) - len(rows), sum(column["forwards"]))
        lines.append(f"{name:26} {len(rows):7} {low:7.1f} {mid:7.1f} {high:7.1f} "
                     f"{statistics.median(column['ttft']):7.1f} {bench.shown(estimate(later), '+.2f'):>22} "
                     f"{bench.shown(estimate(ratios), '.3f'):>22} {sorted(ratios)[int(0.05 * len(ratios))]:6.3f} "
                     f"{bench.fmt(per, 2):>11} {statistics.median(column['window']):6.0f} "
                     f"{statistics.median(column['overlap']):7.0f} {bench.fmt(median(column['preview'])):>7}")
    return lines + [f"verdict  the recorded ids came out of all {sum(map(len, taken.values()))} requests",
                    "legend   ratio: above 1 is faster, paired by answer, median [95 %]; p5: 5 % of them are below",
                    "         ttft: files on disk to the first id on the host; later: less target_only's, paired",
                    "         window, overlap: drafts before the last frame, the prefill's end; preview: its end"]


def parse(argv):
    parser = measure.flags(__doc__, dataset_dir=bench.TINY / "clips")
    add = parser.add_argument
    add("pairs", type=Path, nargs="?", help="recorded answers, as bench.py --record writes them")
    add("--random-ids", type=int, metavar="N", help="in place of PAIRS: answers of N random ids")
    add("--src", help="which rows of PAIRS (default: the only kind there)")
    add("--weights", choices=("tiny", "random-7b"), default="tiny", help="default %(default)s: the embedded pair")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json for random weights")
    add("--drafter-device", metavar="DEVICE", help="another device for the drafter")
    add("--drafter-dtype", default="bf16", metavar="NAME", help="default %(default)s")
    add("--cache-rows", type=bench.cache_rows, metavar="T[,D]", help="cache positions of target and drafter")
    add("--dataset-dir", type=Path, metavar="DIR", help="clips in place of the recorded ones (default: the embedded)")
    add("--max-answers", type=int, default=300, metavar="N", help="default %(default)s")
    add("--max-new-tokens", type=int, default=50, metavar="N", help="ids of an answer that count (default %(default)s)")
    add("--overlap-len", type=int, default=15, metavar="G", help="drafts of the head start (default %(default)s)")
    add("--accept", default="", metavar="LIST", help="drafters that are right with these probabilities")
    add("--self", default="", metavar="LIST", help="4-bit copies of the target that are right with these")
    add("--gate", default="on", choices=("on", "off"), help="draft only where it should pay (default %(default)s)")
    add("--only", metavar="WORDS", help="settings whose names hold one of these comma-separated words")
    add("--shard", metavar="I/N", help="every N-th sequence from the I-th")
    add("--rows", type=Path, metavar="JSON", help="keep what was measured, for --merge")
    add("--merge", nargs="+", type=Path, metavar="JSON", help="the table of several shards")
    add("--timeline", metavar="PNG", help="draw the last request")
    options = parser.parse_args(argv)
    options.shard = bench.read_shard(options.shard, {})
    for name in ("max_answers", "max_new_tokens", "random_ids"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: wanted at least 1, got {getattr(options, name)}; change it")
    return options


if __name__ == "__main__":
    sys.exit(measure.run(main))
