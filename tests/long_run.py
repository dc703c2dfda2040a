"""long_run: what only shows after hours. Each line it prints is a figure and its verdict; exit 1 if one is broken.

    python tests/long_run.py rows --count 2000 --kills 10    kill -9 at random, resume, merge: equal to one run
    python tests/long_run.py requests --count 10000          latency drift, memory growth, distinct outputs
    python tests/long_run.py repeat --count 1000             one input, also in ten processes: one distinct output
    python tests/long_run.py generations --count 10000       every draft source, odd ids and a source that raises among
                                                             them, greedy and sampled: ids equal target_only's

All on the embedded pair, on the CPU; small forms of the four run with the tests."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from common import QUESTIONS, TINY, save_adapter  # noqa: E402  after the paths

from weights.files import Parser, command, insist_whole  # noqa: E402


def make_dataset(folder: Path, rows: int) -> Path:
    """The embedded clips under as many ids as wanted, each with one of three questions."""
    for kind in ("mp4", "event_npy"):
        shutil.copytree(TINY / "clips" / kind, folder / kind)
    records = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())
    listed = [{**records[i % len(records)], "id": f"row {i}",
               "conversations": [{"from": "human", "value": QUESTIONS[i // len(records) % 3]}]} for i in range(rows)]
    (folder / "EventGPT_Instruction_Subset.json").write_text(json.dumps(listed))
    return folder


# ---- rows that survive kill -9 ---------------------------------------------------------------------------------


def flags(clips: Path, rows: Path, shard: str, *more) -> list[str]:
    return ["--dataset-dir", str(clips), "--rows", str(rows), "--device", "cpu", "--shard", shard, "--modes",
            "target_only,speculative", "--repeats", "1", "--warmup", "0", "--max-new-tokens", "6", "--json", "-", *more]


def start(*of) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "bench.py"), *flags(*of)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env=env)


def finish(here: bool, *of) -> None:
    """A run to its end, in this process or in one of its own."""
    if here:
        import bench
        with contextlib.redirect_stdout(io.StringIO()):
            code, err = bench.main(flags(*of)), "see above"
    else:
        process = start(*of)
        err = process.communicate(timeout=3600)[1].decode()
        code = process.returncode
    if code:
        raise SystemExit(f"long_run: a run ended with {code}: {err[-300:]}")


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_rows(folder: Path, rows: int, shards: int, kills: int, seed: int, here: bool = False) -> dict:
    """A run in shards, each killed at random moments `kills` times in all and resumed, against one run left alone.
    here: what is not killed runs in this process."""
    import bench
    chance, clips = random.Random(seed), make_dataset(folder / "clips", rows)
    began = time.monotonic()
    finish(here, clips, folder / "whole.jsonl", "0/1")
    alone = time.monotonic() - began
    names = [f"rows.{i:05}-of-{shards:05}.jsonl" if shards > 1 else "rows.jsonl" for i in range(shards)]
    # When to strike: after so many of a shard's lines, and a little later; 0 lines is during the start or the header.
    strikes = sorted((k % shards, chance.randrange(0, rows // shards), chance.random() * 0.3) for k in range(kills))
    done = cut = 0
    for shard in range(shards):
        own = [(line, pause) for at, line, pause in strikes if at == shard]
        for line, pause in own:
            process = start(clips, folder / "rows.jsonl", f"{shard}/{shards}", "--resume")
            while lines_in(folder / names[shard]) <= line and process.poll() is None:
                time.sleep(0.002)
            time.sleep(pause)
            done += process.poll() is None                   # it was alive: this kill counts
            process.kill()
            process.wait()
            cut += (folder / names[shard]).exists() and not (folder / names[shard]).read_bytes().endswith(b"\n")
        finish(here, clips, folder / "rows.jsonl", f"{shard}/{shards}", "--resume")
    ours = bench.merged([folder / name for name in names])["samples"]
    theirs = bench.merged([folder / "whole.jsonl"])["samples"]

    def answers(found):
        return [(row["id"], row["question"], {mode: of["ids"] for mode, of in row["modes"].items()}) for row in found]
    return {"rows": len(ours), "shards": shards, "kills": done, "cut lines": cut,
            "equal": answers(ours) == answers(theirs), "seconds alone": alone}


# ---- requests and generations ----------------------------------------------------------------------------------


@functools.cache
def tiny_engine(gate: bool = True):
    """The embedded pair on the CPU, one a process."""
    import engine
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=gate)


def asked(i: int) -> dict:
    """One of three requests."""
    record = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())[i % 3]
    return {"event_path": TINY / "clips/event_npy" / record["event_data"], "query": QUESTIONS[i % 3],
            "video_path": TINY / "clips/mp4" / record["mp4_data"], "max_new_tokens": 12}


def timed(i: int) -> tuple[float, float, tuple]:
    """(seconds by the clock, seconds of processor time, ids) of request i to this process's engine."""
    e, given, began = tiny_engine(gate=False), asked(i), time.process_time()
    result = e.generate(**given)
    return result.wall_clock_time, time.process_time() - began, tuple(result.output_ids)


def fresh_process() -> ProcessPoolExecutor:
    """A new Python that takes calls one by one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compiled)


def compiled() -> None:
    """What tests set to interpret Triton's kernels is not for here."""
    os.environ.pop("TRITON_INTERPRET", None)


def requests(count: int, say=lambda line: None) -> dict:
    """The same three requests again and again: latency, memory and answers in the first and in the last tenth.

    Other processes stretch the clock and, through caches and memory, processor time too. So in both tenths every
    request has a partner: the same request, right before or after it, in a process that has just started. What the
    machine does hits both and divides out; what age does to a process hits one. `drift` is judged: the median of
    own over partner's time by the clock, last tenth over first, with a bootstrap interval of 95 %. The gate is off: how
    much is drafted would follow the clock too."""
    warm, tenth = min(100, count // 10), count // 10
    early, late = range(warm, warm + tenth), range(count - tenth, count)
    own, partner, sizes, outputs, fresh = {}, {}, [], {}, None
    for i in range(count):
        if i in (early.start, late.start):
            fresh = fresh_process()
            for k in range(max(3, warm)):
                fresh.submit(timed, k).result()
        paired = i in early or i in late
        if paired and i % 2:
            partner[i] = fresh.submit(timed, i).result()
        own[i] = timed(i)
        if paired and not i % 2:
            partner[i] = fresh.submit(timed, i).result()
        for _, _, ids in (own[i], partner.get(i, own[i])):
            outputs.setdefault(i % 3, set()).add(ids)
        sizes.append(resident_mb())
        if i in (early[-1], late[-1]):
            fresh.shutdown()
        if (i + 1) % max(1, tenth) == 0:
            part = [own[k] for k in range(i + 1 - tenth, i + 1)]
            say(f"{i + 1} of {count}: p50 {statistics.median(of[0] for of in part) * 1e3:.2f} ms, processor "
                f"{statistics.median(of[1] for of in part) * 1e3:.2f} ms, memory {sizes[-1]:.1f} MB")

    def drift(which):
        first, last = ([own[i][which] / partner[i][which] for i in part] for part in (early, late))
        chance, median = random.Random(0), statistics.median
        again = sorted(median(chance.choices(last, k=tenth)) / median(chance.choices(first, k=tenth)) - 1
                       for _ in range(1000))
        return median(last) / median(first) - 1, again[25], again[975]

    def raw(which):
        return statistics.median(own[i][which] for i in late) / statistics.median(own[i][which] for i in early) - 1
    return {"requests": count, "p50 ms early": statistics.median(own[i][0] for i in early) * 1e3,
            "p50 ms late": statistics.median(own[i][0] for i in late) * 1e3,
            "drift": drift(0), "processor drift": drift(1),
            "raw drift": raw(0), "raw processor drift": raw(1),
            "growth MB": statistics.median(sizes[i] for i in late) - statistics.median(sizes[i] for i in early),
            "distinct outputs": max(len(found) for found in outputs.values())}


def repeated(count: int) -> dict:
    """{what: distinct outputs} of one input asked `count` times in each of five ways.

    Everywhere ids, text and reason of the end; where no clock has a say also drafted, accepted, rounds, the accepted
    length of every round and the first rejected draft: a drafter's head start is as long as the time it had."""
    import engine
    e, given = tiny_engine(gate=False), {**asked(1), "max_new_tokens": 24}
    truth = e.generate(mode="target_only", **given).output_ids
    right = [i if at % 4 else i + 1 for at, i in enumerate(truth)]              # every fourth draft is wrong
    ways = {"target_only": {}, "drafter_only": {}, "speculative": {},
            "forced drafts": {"mode": "speculative", "draft_source": engine.Fixed(right)},
            "sampled": {"mode": "speculative", "temperature": 4.0, "top_p": 0.95, "seed": 11}}
    found: dict = {name: set() for name in ways}
    for _ in range(count):
        for name, options in ways.items():
            of = e.generate(**{"mode": name, **given, **options})
            counted = () if name in ("speculative", "sampled") else (of.drafted, of.accepted_tokens, of.rounds,
                                                        tuple(of.accept_lens), of.rejected_at)
            found[name].add((tuple(of.output_ids), of.output_text, of.finish_reason, *counted))
    return found


def repeat(count: int, processes: int) -> dict:
    """`repeated` in one process, and once in each of `processes` new ones: {what: distinct outputs of all}."""
    found = repeated(count)
    for _ in range(processes):
        with fresh_process() as fresh:
            for name, outputs in fresh.submit(repeated, 1).result().items():
                found[name] |= outputs
    return {name: len(outputs) for name, outputs in found.items()}


def wide(drift) -> str:
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*drift)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def late(model, chance: random.Random) -> list[float]:
    """Makes the model's forwards begin and end late. Returns [the most seconds of either], to be changed."""
    most, forward = [0.0], model.decoder.forward

    def delayed(*given, **options):
        time.sleep(chance.random() * most[0])
        logits_SV = forward(*given, **options)
        time.sleep(chance.random() * most[0])
        return logits_SV
    model.decoder.forward = delayed
    return most


def source_names() -> list[str]:
    """What `generations` takes in turn: the engine's sources, and those that only a test would use. `forced` drafts are
    right up to a random place, `ahead` is a drafter on a pretended device of its own, `odd` proposes what is no id."""
    import engine
    return ["forced", "ahead", "odd", "raises", *engine.SOURCES]


def generations(count: int, seed: int, adapter=None) -> dict:
    """Every draft source in turn, with lengths at random, greedy or sampled, remembering or not: are the ids
    target_only's? adapter: a folder; without one an untrained adapter drafts."""
    import torch

    import engine
    from weights import adapter as adapters
    from weights import given

    def breaking(name):
        def method(self, *given):
            if chance.random() < 0.2:
                raise RuntimeError("out of ideas")
            return [chance.choice([2, -1, 10 ** 9, 5])] * chance.randrange(40) if name == "propose" else None
        return method
    Raises = type("Raises", (), {name: breaking(name) for name in ("begin", "propose", "verdict", "learn")})
    e = engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False, self_draft=True)
    chance, truths, equal, accepted = random.Random(seed), {}, 0, dict.fromkeys(source_names(), 0)
    config = adapters.AdapterConfig(vocab=576, rows=64, width=32, layers=1, heads=2, hidden=64)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        if adapter is None:
            save_adapter(folder, adapters.TokenAdapter(config), config)
        sources = {name: engine.source_named(f"adapter:{adapter or folder}" if name == "adapter" else name)
                   for name in engine.SOURCES} | {"ahead": None, "raises": Raises(), "odd": engine.Fixed(
                       [chance.choice([2, -1, 10 ** 9, -2 ** 70, chance.randrange(576)]) for _ in range(64)])}
    records = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())
    reads = given.read_video, given.read_events              # these are about ids: every clip is read once
    once, given.read_events = map(functools.cache, reads)
    given.read_video = lambda path, count, rule, *_: once(path, count, rule)
    delays = [late(model, random.Random(seed)) for model in e.models]
    try:
        for turn in range(count):
            name = source_names()[turn % len(source_names())]
            e.apart = name == "ahead"
            i, question, stop = chance.randrange(len(records)), chance.randrange(3), chance.random() < 0.5
            sampling = chance.choice([{}, {}, {"temperature": 3.0, "top_p": 0.9, "seed": chance.randrange(3)}])
            ask = dict(video_path=TINY / "clips/mp4" / records[i]["mp4_data"], query=QUESTIONS[question],
                       event_path=TINY / "clips/event_npy" / records[i]["event_data"],
                       max_new_tokens=24, ignore_eos=not stop, **sampling)
            key = i, question, stop, *sampling.values()
            if key not in truths:
                truths[key] = e.generate(mode="target_only", **ask).output_ids
            if name == "forced":
                sources[name] = engine.Fixed([
                    token if chance.random() < 0.85 else chance.choice([2, -1, 10 ** 9, chance.randrange(576)])
                    for token in truths[key]])
            for delay in delays:
                delay[0] = chance.choice([0.0, 0.003, 0.01]) if e.apart else 0.0
            result = e.generate(mode="speculative", draft_source=sources[name], draft_len=chance.randrange(0, 32),
                                overlap_len=chance.randrange(0, 32), remember=chance.random() < 0.8, **ask)
            for delay in delays:
                delay[0] = 0.0
            equal += result.output_ids == truths[key]
            accepted[name] += result.accepted_tokens
    finally:
        given.read_video, given.read_events = reads
    return {"generations": count, "equal": equal, "accepted": accepted}


# ---- main ------------------------------------------------------------------------------------------------------


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=("rows", "requests", "repeat", "generations"))
    parser.add_argument("--count", type=int, help="how many (default: 2000 rows, 10000 requests, 1000, 10000)")
    parser.add_argument("--shards", type=int, default=3, help="of rows (default %(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="of rows (default %(default)s)")
    parser.add_argument("--processes", type=int, default=10, help="of repeat (default %(default)s)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="of generations (default: an untrained one)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    options = parser.parse_args(argv)
    insist_whole("--shards", options.shards, 1), insist_whole("--processes", options.processes, 1)
    insist_whole("--kills", options.kills, 0)
    count = options.count if options.count is not None else {"rows": 2000, "repeat": 1000}.get(options.what, 10000)
    if count < 30:
        parser.error(f"--count: wanted 30 or more, got {count}")
    if options.what == "rows":
        with tempfile.TemporaryDirectory() as folder:
            found = killed_rows(Path(folder), count, options.shards, options.kills, options.seed)
        broken = not found["equal"] or found["rows"] != count
        print(f"rows         {found['rows']} of {count} in {options.shards} shards, killed {found['kills']} "
              f"times, {found['cut lines']} lines cut off: {'equal to' if found['equal'] else 'DIFFERENT FROM'} one "
              f"run of {found['seconds alone']:.0f} s")
    elif options.what == "requests":
        found = requests(count, say=lambda line: print(line, file=sys.stderr, flush=True))
        broken = found["distinct outputs"] != 1 or found["growth MB"] > 50 or found["drift"][1] > 0.03
        print(f"requests     {found['requests']}: p50 {found['p50 ms early']:.1f} ms early, "
              f"{found['p50 ms late']:.1f} ms late; drift beside a new process {wide(found['drift'])}, processor time "
              f"{wide(found['processor drift'])} (by the clock alone {found['raw drift']:+.1%}, processor time "
              f"{found['raw processor drift']:+.1%}); memory {found['growth MB']:+.1f} MB; "
              f"{found['distinct outputs']} distinct output a request")
    elif options.what == "repeat":
        found = repeat(count, options.processes)
        broken = set(found.values()) != {1}
        print(f"repeat       {count} times in one process and in {options.processes} new ones, distinct outputs: "
              + ", ".join(f"{name} {n}" for name, n in found.items()))
    else:
        found = generations(count, options.seed, options.adapter)
        broken = found["equal"] != found["generations"]
        accepted = ", ".join(f"{n} {name}" for name, n in found["accepted"].items())
        print(f"generations  {found['equal']} of {found['generations']} equal to target_only, fp32, greedy and "
              f"sampled, every draft source in turn; drafts accepted: {accepted}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
