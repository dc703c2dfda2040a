"""steady: many requests in a row on one engine: is memory flat, is every answer one, does the GPU wait for the host?

    python tests/steady.py                                              the embedded pair, 200 requests
    python tests/steady.py --weights random-7b --dataset-dir DIR        7B shapes on a GPU

Latency: the medians of the first and the last tenth. Memory: resident set, and torch's peak on the GPU beside the
printed budget. Waits: the gaps between two stages on the target's row from the end of its prefill on, by GPU events,
over the last tenth of the requests. Exit 1 if an answer changed, memory grew by 50 MB, latency by 3 %, the peak is off
the budget by 5 %, or the GPU waited for more than 100 us in `target_only`."""

import argparse
import collections
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
import engine
from engine import MODES
from weights.dataset import read_dataset
from weights.files import Parser, command
from weights.memory import bytes_of


def resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def waits(result) -> list[float]:
    """Microseconds between consecutive stages of the target, from its prefill on."""
    stages = sorted((start, end, name) for row, name, start, end, _ in result.timeline if row == "target")
    first = next(i for i, stage in enumerate(stages) if stage[2] == "prefill")
    return [1e6 * (after[0] - before[1]) for before, after in zip(stages[first:], stages[first + 1:], strict=False)]


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="default %(default)s")
    parser.add_argument("--modes", default="target_only,prefill_then_verify,speculative", help="default %(default)s")
    parser.add_argument("--weights", choices=("random-7b",), help="in place of the embedded pair")
    parser.add_argument("--tokenizer", help="a tokenizer.json for random weights")
    parser.add_argument("--dataset-dir", type=Path, default=bench.TINY / "clips", help="default: the embedded clips")
    parser.add_argument("--cache-rows", type=bench.cache_rows, help="of both caches, or of target,drafter")
    parser.add_argument("--drafter-dtype", default="bf16")
    options = parser.parse_args(argv)
    modes = options.modes.split(",")
    if options.requests < 30 or set(modes) - set(MODES):
        parser.error(f"wanted 30 requests or more and modes of {', '.join(MODES)}")
    pair = (options.weights, options.weights) if options.weights else (bench.TINY / "drafter", bench.TINY / "target")
    given = dict(cache_rows=options.cache_rows, drafter_dtype=options.drafter_dtype)
    budget = engine.memory_budget(*pair, **given)
    e = engine.load_engine(*pair, tokenizer=options.tokenizer, **given)
    device = e.target.device
    samples, _ = read_dataset(options.dataset_dir, None, 8)
    cases = [(sample, mode) for sample in samples for mode in modes]
    run = argparse.Namespace(max_new_tokens=50, ignore_eos=bool(options.weights), frame_rule="uniform", source=None,
                             temperature=0.0, top_p=1.0, seed=0)
    answers, taken, gaps = collections.defaultdict(set), collections.defaultdict(list), collections.defaultdict(list)
    for sample, mode in cases:                               # graphs, and what the allocator keeps
        bench.run_sample(e, sample, mode, run)
    before = memory = resident()
    peak = torch.cuda.max_memory_allocated(device) if e.target.on_gpu else 0
    reserved = torch.cuda.memory_reserved(device) if e.target.on_gpu else 0
    tenth = max(len(cases), options.requests // 10)
    for i in range(options.requests):
        sample, mode = cases[i % len(cases)]
        result = bench.run_sample(e, sample, mode, run)
        answers[sample.id].add(tuple(result.output_ids))
        taken[sample.id, mode].append(result.wall_clock_time)
        memory, peak = resident(), max(peak, result.peak_memory if e.target.on_gpu else 0)
        if i >= options.requests - tenth:
            gaps[mode] += waits(result)
    share = max(1, min(len(v) for v in taken.values()) // 10)
    drift = statistics.median(statistics.median(v[-share:]) / statistics.median(v[:share]) for v in taken.values()) - 1
    distinct = max(len(of) for of in answers.values())
    kind = "RANDOM 7B WEIGHTS" if options.weights else "embedded trained toy pair"
    where = torch.cuda.get_device_name(device) if e.target.on_gpu else "CPU"
    print(f"steady, {kind}, {where}, torch {torch.__version__}, commit {bench.commit()}")
    print(f"requests     {options.requests} over {len(cases)} cases, {distinct} distinct answer a sample")
    print(f"latency      p50 of the last tenth over the first {drift:+.1%}")
    print(f"resident     {before:.0f} -> {memory:.0f} MB")
    broken = distinct > 1 or memory - before > 50 or abs(drift) > 0.03
    if e.target.on_gpu:
        needed = bytes_of(budget)
        grown = torch.cuda.memory_reserved(device) - reserved
        print(f"GPU          peak {peak / 1e9:.2f} GB allocated, budget {needed / 1e9:.2f} GB "
              f"({peak / needed - 1:+.1%}); reserved {reserved / 1e9:.2f} GB, {grown / 1e6:+.0f} MB since")
        broken |= abs(peak / needed - 1) > 0.05 or grown > 50e6
        for mode, values in gaps.items():
            values = sorted(values)
            p50, p99 = (values[int(len(values) * q)] for q in (0.5, 0.99))
            print(f"waits        {mode}: {len(values)} gaps between stages of the target, p50 {p50:.0f}, p99 "
                  f"{p99:.0f}, most {values[-1]:.0f} us")
            broken |= mode == "target_only" and values[-1] > 100
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
