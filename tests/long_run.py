"""long_run: what only shows after hours. Each line it prints is a figure and its verdict; exit 1 if one is broken.

    python tests/long_run.py --rows 2000 --shards 3 --kills 10      kill -9 at random, resume, merge: equal to one run
    python tests/long_run.py --requests 10000                       latency drift, memory growth, distinct outputs
    python tests/long_run.py --generations 10000                    every draft source in fp32: ids equal target_only's

All on the embedded pair, on the CPU; small forms of the three run with the tests."""

import argparse
import functools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
QUESTIONS = ["What are the key elements in this scene?", "Describe the following scene.", "What do you see happening?"]


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


def start(clips: Path, rows: Path, shard: str, *more) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "bench.py"), "--dataset-dir", str(clips), "--rows", str(rows), "--device",
               "cpu", "--shard", shard, "--modes", "target_only,speculative", "--repeats", "1", "--warmup", "0",
               "--max-new-tokens", "6", "--json", "-", *more]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)


def finished(process) -> None:
    _, err = process.communicate(timeout=3600)
    if process.returncode:
        raise SystemExit(f"long_run: a run ended with {process.returncode}: {err.decode()[-300:]}")


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_rows(folder: Path, rows: int, shards: int, kills: int, seed: int) -> dict:
    """A run in shards, each killed at random moments `kills` times in all and resumed, against one run left alone."""
    import bench
    chance, clips = random.Random(seed), make_dataset(folder / "clips", rows)
    whole, began = start(clips, folder / "whole.jsonl", "0/1"), time.monotonic()
    finished(whole)
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
        finished(start(clips, folder / "rows.jsonl", f"{shard}/{shards}", "--resume"))
    ours = bench.merged([folder / name for name in names])["samples"]
    theirs = bench.merged([folder / "whole.jsonl"])["samples"]

    def answers(found):
        return [(row["id"], row["question"], {mode: of["ids"] for mode, of in row["modes"].items()}) for row in found]
    return {"rows": len(ours), "shards": shards, "kills": done, "cut lines": cut,
            "equal": answers(ours) == answers(theirs), "seconds alone": alone}


# ---- requests and generations ----------------------------------------------------------------------------------


def requests(count: int) -> dict:
    """The same three requests again and again: latency, memory and answers at the start and at the end. Processor time
    stands beside the clock's, which other processes on the machine stretch."""
    import engine
    e = engine.load_engine(TINY / "drafter", TINY / "target", device="cpu")
    records = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())[:3]
    seconds, busy, outputs, sizes = [], [], {}, []
    for i in range(count):
        record, began = records[i % 3], time.process_time()
        result = e.generate(event_path=TINY / "clips/event_npy" / record["event_data"], query=QUESTIONS[i % 3],
                            video_path=TINY / "clips/mp4" / record["mp4_data"], max_new_tokens=12)
        seconds.append(result.wall_clock_time)
        busy.append(time.process_time() - began)
        outputs.setdefault(i % 3, set()).add(tuple(result.output_ids))
        sizes.append(resident_mb())
    early, late = slice(min(100, count // 10), count // 3), slice(-count // 3, None)
    return {"requests": count, "p50 ms early": statistics.median(seconds[early]) * 1e3,
            "p50 ms late": statistics.median(seconds[late]) * 1e3,
            "drift": statistics.median(seconds[late]) / statistics.median(seconds[early]) - 1,
            "processor drift": statistics.median(busy[late]) / statistics.median(busy[early]) - 1,
            "growth MB": statistics.median(sizes[late]) - statistics.median(sizes[early]),
            "distinct outputs": max(len(found) for found in outputs.values())}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def generations(count: int, seed: int) -> dict:
    """Every draft source in turn, with lengths at random: are the ids target_only's? `forced` drafts are right up to a
    random place and wrong behind it; the adapter is an untrained one."""
    import torch

    import engine
    from weights import adapter
    e = engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False)
    chance, truths, equal, accepted = random.Random(seed), {}, 0, {}
    config = adapter.AdapterConfig("follower", vocab=576, rows=64, width=32, layers=1, heads=2, hidden=64)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder), adapter.NETWORKS["follower"](config), config)
        sources = {"forced": None, "drafter": None, **{
            name: engine.source_named(name if name != "adapter" else f"adapter:{folder}") for name in engine.SOURCES}}
    records = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())
    reads = engine.read_video, engine.read_events            # these are about ids: every clip is read once
    engine.read_video, engine.read_events = map(functools.cache, reads)
    try:
        for turn in range(count):
            name = list(sources)[turn % len(sources)]
            i, question, stop = chance.randrange(len(records)), chance.randrange(3), chance.random() < 0.5
            given = dict(video_path=TINY / "clips/mp4" / records[i]["mp4_data"], query=QUESTIONS[question],
                         event_path=TINY / "clips/event_npy" / records[i]["event_data"],
                         max_new_tokens=24, ignore_eos=not stop)
            if (i, question, stop) not in truths:
                truths[i, question, stop] = e.generate(mode="target_only", **given).output_ids
            ids = truths[i, question, stop]
            if name == "forced":
                sources[name] = engine.Fixed([
                    token if chance.random() < 0.85 else chance.choice([2, -1, 10 ** 9, chance.randrange(576)])
                    for token in ids])
            result = e.generate(mode="speculative", draft_source=sources[name], draft_len=chance.randrange(0, 32),
                                **given)
            equal += result.output_ids == ids
            accepted[name] = accepted.get(name, 0) + result.accepted_tokens
    finally:
        engine.read_video, engine.read_events = reads
    return {"generations": count, "equal": equal, "accepted": accepted}


# ---- main ------------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="samples of the data set that is killed and resumed")
    parser.add_argument("--shards", type=int, default=3, help="default %(default)s")
    parser.add_argument("--kills", type=int, default=10, help="default %(default)s")
    parser.add_argument("--requests", type=int, help="requests to one engine")
    parser.add_argument("--generations", type=int, help="generations, every draft source in turn")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    options = parser.parse_args(argv)
    broken = False
    if options.rows:
        with tempfile.TemporaryDirectory() as folder:
            found = killed_rows(Path(folder), options.rows, options.shards, options.kills, options.seed)
        broken |= not found["equal"] or found["rows"] != options.rows
        print(f"rows         {found['rows']} of {options.rows} in {options.shards} shards, killed {found['kills']} "
              f"times, {found['cut lines']} lines cut off: {'equal to' if found['equal'] else 'DIFFERENT FROM'} one "
              f"run of {found['seconds alone']:.0f} s", flush=True)
    if options.requests:
        found = requests(options.requests)
        broken |= found["distinct outputs"] != 1 or found["growth MB"] > 50
        print(f"requests     {found['requests']}: p50 {found['p50 ms early']:.1f} ms early, "
              f"{found['p50 ms late']:.1f} ms late ({found['drift']:+.1%}, "
              f"processor time {found['processor drift']:+.1%}), memory {found['growth MB']:+.1f} MB, "
              f"{found['distinct outputs']} distinct output a request", flush=True)
    if options.generations:
        found = generations(options.generations, options.seed)
        broken |= found["equal"] != found["generations"]
        accepted = ", ".join(f"{n} {name}" for name, n in found["accepted"].items())
        print(f"generations  {found['equal']} of {found['generations']} equal to target_only, fp32, every draft source "
              f"in turn; drafts accepted: {accepted}", flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
