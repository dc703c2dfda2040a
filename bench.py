"""bench: what the engine does on this machine, measured, beside what the machine allows.

    python bench.py                                      the embedded trained pair on its held-out clips
    python bench.py --weights random-7b --device cuda    real 7B shapes, random numbers: speed only
    python bench.py --eventgpt DIR --videollava DIR --dataset-dir DIR --max-samples -1 --json out.json

Prints a header, the ceilings of this run, a stage table, a row per mode, acceptance beside its controls, sample answers
and a verdict; the last line is one JSON object with every raw value. Every mode runs on every sample, interleaved,
and its ids are compared with target_only's: one difference and no ratio is printed. Exit codes: 0 all well, 1 outputs
differ or a sample failed, 2 bad input, 130 interrupted."""

import argparse
import collections
import collections.abc
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import engine  # first: it keeps torch quiet where numpy is absent

# isort: split
import torch
import triton

from engine import MODES
from kernels.check import differing, gemm_tflops, quantiles, read_tbps
from kernels.frames import to_device
from kernels.quant import BITS
from weights import UNREADABLE, InputError, describe, replace_file
from weights.adapter import read_pairs
from weights.load import nvidia_smi

HERE = Path(__file__).resolve().parent
TINY = HERE / "weights" / "tiny"
SCHEMA = 1
WHITE = re.compile(r"[ \t\r\n]*")
MAX_RECORD = 1 << 26                 # characters of one record of a data set
RESAMPLES = 1000                     # of the bootstrap behind a ratio's interval
LABELS = {"tiny": "embedded trained toy pair", "random-7b": "RANDOM 7B WEIGHTS"}      # of weights, in every header
STAGES = {"drafter": ("load", "preprocess", "encode", "prefill", "draft", "recall"),
          "target": ("load", "preprocess", "encode", "prefill", "decode", "verify")}
PER_FORWARD = {"draft", "recall", "decode", "verify"}        # stages with an entry for each forward
APPROACHES = {"target_only": "Video-LLaVA only", "drafter_only": "EventGPT only, another answer",
              "speculative": "full speculation", "prefill_only": "prefill only, a preview",
              "prefill_then_verify": "prefill + priming"}        # the research repository's names for the modes
LEGEND = """legend  ttft: request in, files on disk, to the first answer id on the host; ttfp: the same for the preview
        tpot: (e2e - ttft) / (ids - 1); ratio: target_only's e2e over the mode's, paired by sample, median [95 %]
        accept_rate: accepted / drafted, bonus not counted; tokens_per_round: mean of accept_len + 1
        overlap drafts: ids the host had before the target's prefill ended; window: before the last frame was decoded
        both at once: while prefill_only runs
        saved: target_only's ms less the mode's, paired by sample, median"""


# ---- what to run on --------------------------------------------------------------------------------------------


@dataclass
class Sample:
    id: str
    question: str
    video: Path
    events: Path | list             # one recording, or a list of event images
    truth: str | None = None
    seq: str = ""                   # folder and number of the clip, as the data set names them
    clip: str = ""
    at: int = 0                     # place in the data set: `previous` means the sample before this one


def read_dataset(folder: Path, question: str | None, limit: int):
    """([Sample], [reason a listed record cannot be run]) of a data set in the layout of EventGPT's instruction data."""
    index = folder / "EventGPT_Instruction_Subset.json"
    samples, problems, ids = [], [], set()
    for i, record in enumerate(itertools.islice(records_of(index), None if limit < 0 else limit)):
        try:
            sample = read_record(folder, record, question)
            if sample.id in ids:                             # --resume and --merge go by id
                raise InputError(f"id {sample.id} is there twice; give each record its own")
            ids.add(sample.id)
            sample.at = i
            samples.append(sample)
        except InputError as error:
            problems.append(f"record {i}: {error}")
    if not samples:
        raise InputError(f"{index}: none of {len(problems)} records can be run ({problems[0]}); check the folder")
    return samples, problems


@functools.cache
def home_of(folder: str) -> str:
    """The folder that links in a data set may lead to: the one around it, and never the whole disk."""
    home = Path(os.path.realpath(folder))
    return str(home.parent if home.parent.parent != home.parent else home)


def records_of(index: Path) -> collections.abc.Iterator:
    """The records of a JSON list, one by one: of a long list no more is read than is wanted, a mebibyte at a time.
    InputError if it is no list, or no JSON as far as it was read."""
    text, at, more, empty = "", 0, True, True

    def ahead() -> str:
        """The next character that is no white space; none at the end."""
        nonlocal at
        while (at := WHITE.match(text, at).end()) == len(text) and more:
            read()
        return text[at:at + 1]

    def read() -> None:
        nonlocal text, at, more
        piece = file.read(1 << 20)
        text, at, more = text[at:] + piece, 0, bool(piece)
        if len(text) > MAX_RECORD:
            raise ValueError(f"a record of more than {MAX_RECORD} characters")

    try:
        with open(index, encoding="utf-8") as file:
            if ahead() != "[":
                kind = type(json.loads(text + file.read())).__name__
                raise InputError(f"{index}: wanted a list of records, got {kind}; see the layout in the README")
            at += 1
            while (then := ahead()) != "]" or not empty:
                while True:
                    try:
                        record, end = json.JSONDecoder().raw_decode(text, at)
                        if not more or text[end:end + 1] in set(",] \t\r\n"):      # else a number may go on
                            break
                    except ValueError:
                        if not more:
                            raise
                    read()
                at, empty = end, False
                yield record
                then, at = ahead(), at + 1
                if then == "]":
                    break
                if then != ",":
                    raise ValueError(f"{then!r} after a record, wanted a comma or the end of the list")
            at += empty
            if ahead():
                raise ValueError("there is more behind the end of the list")
    except FileNotFoundError:
        raise InputError(f"{index}: no such file; --dataset-dir wants the folder that holds it") from None
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{index}: cannot be read as JSON ({describe(error)}); fetch it again") from None
    if empty:
        raise InputError(f"{index}: wanted a list of records, got an empty one; see the layout in the README")


def read_record(folder: Path, record: dict, question: str | None) -> Sample:
    """One listed record as a Sample. InputError says which key is wrong, or which file is not there."""
    def wanted(of, key, kinds=(str,)):
        value = of.get(key) if isinstance(of, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool) or value in ("", []):
            raise InputError(f"{key} is {json.dumps(value)[:60]}, wanted {' or '.join(k.__name__ for k in kinds)}; "
                             f"mend the record")
        return value

    def inside(*parts):
        path = folder.joinpath(*parts)
        try:
            # Links are the user's own, as far as the folder beside the data set; what the list says stays inside.
            named = os.path.normpath(path).startswith(os.path.join(os.path.normpath(folder), ""))
            if not named or not os.path.realpath(path).startswith(os.path.join(home_of(os.path.abspath(folder)), "")):
                raise InputError(f"{path}: leads out of the data set; use relative paths")
            os.stat(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; complete the data set") from None
        except (OSError, ValueError) as error:               # too long, no right to look, NUL
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be looked up ({describe(error)}); check the path") from None
        return path

    if not isinstance(record, dict):
        raise InputError(f"is a {type(record).__name__}, wanted an object; mend the list")
    turns = wanted(record, "conversations", (list,)) if record.get("conversations") else []
    turns = [turn for turn in turns if isinstance(turn, dict)]
    human, truth = (next((turn for turn in turns if turn.get("from") == who), None) for who in ("human", "gpt"))
    asked = question or (wanted(human, "value").replace("<event>", "").strip() if human else "")
    if not asked:
        raise InputError("conversations hold no question; pass --question")
    try:
        events = inside("event_npy", wanted(record, "event_data"))
    except InputError:                                       # pictures may stand in for a recording that is not there
        if not record.get("event_image"):
            raise
        names = wanted(record, "event_image", (list,))
        events = [inside("event_image", wanted({"event_image": name}, "event_image")) for name in names]
    name = Path(wanted(record, "mp4_data") if record.get("mp4_data") else wanted(record, "video_data") + ".mp4")
    return Sample(str(wanted(record, "id", (str, int))), asked, inside("mp4", name), events,
                  wanted(truth, "value") if truth and truth.get("value") else None, str(name.parent), name.stem)


# ---- the machine -----------------------------------------------------------------------------------------------


def output_of(*command) -> str:
    """Standard output of a command, or nothing if it is not there or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=HERE).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit() -> str | None:
    """The commit this runs from; GIT_COMMIT says it where there is no repository, or not the right one."""
    return os.environ.get("GIT_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD") or None


def dirty() -> bool | None:
    """Whether the tree differs from its commit; None where there is no git."""
    return bool(output_of("git", "status", "--porcelain")) if output_of("git", "rev-parse", "--git-dir") else None


def machine(device) -> dict:
    import av
    facts = {"gpu": None, "driver": None, "cuda": torch.version.cuda, "torch": torch.__version__,
             "triton": triton.__version__, "av": av.__version__, "python": platform.python_version(),
             "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
             "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "clocks": None, "others_on_gpu": None}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver"] = first_line(nvidia_smi(device, "--query-gpu=driver_version"))
        facts["clocks"] = clocks(device)
        pids = [row[0] for row in nvidia_smi(device, "--query-compute-apps=pid")]
        facts["others_on_gpu"] = len([p for p in pids if p != str(os.getpid())])
    return facts


def clocks(device) -> str | None:
    """Clocks and power of a GPU, now: "1980 MHz, 2619 MHz, 310.00 W, 700.00 W"; None without one."""
    if device.type != "cuda":
        return None
    return first_line(nvidia_smi(device, "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit"))


def first_line(rows: list[list[str]]) -> str | None:
    return ", ".join(rows[0]) if rows else None


def ceilings(device) -> dict:
    """Read bandwidth (bytes/s) and matrix rate (FLOP/s) of this machine, now."""
    if device.type == "cuda":
        bandwidth, flops = read_tbps() * 1e12, gemm_tflops() * 1e12
    else:
        x, a = torch.randn(1 << 25), torch.randn(1024, 1024)
        bandwidth = x.nbytes / best_of(lambda: x.sum())
        flops = 2 * 1024 ** 3 / best_of(lambda: a @ a)
    return {"read_bw": bandwidth, "gemm_flops": flops}


def work_of(model) -> dict:
    """What a step moves and a prefill computes, as factors of the prompt's rows (`at_rows` puts them in).

    Multiply and add count as two: every row through every layer, causal attention, the head for one row. matrix_rate:
    of prefill's products, in units of the measured one: tensor cores take e4m3 twice as fast."""
    c, d = model.config, model.decoder
    products = [math.prod(layer[name].shape) for layer in d.step_layers for name in ("qkv", "o", "gate_up", "down")]
    return {"weight_bytes": weight_bytes(model), "kv_bytes_per_row": kv_bytes(model),
            "flop_per_row": 2 * sum(products), "matrix_rate": 2 if d.fp8 and model.on_gpu else 1,
            "flop_per_row_pair": 2 * c.H * c.K * c.L, "flop_head": 2 * d.head_VD.numel()}


def at_rows(work: dict, rows: int) -> dict:
    return work | {"prompt_rows": rows, "step_bytes": work["weight_bytes"] + work["kv_bytes_per_row"] * rows,
                   "prefill_flop": work["flop_per_row"] * rows + work["flop_per_row_pair"] * rows * (rows + 1)
                   + work["flop_head"]}


def best_of(fn, runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


def step_weights(model) -> list:
    """The matrices that one decode step reads: every layer's and the head, not the embedding table."""
    d = model.decoder
    return [t for layer in d.step_layers for t in layer.values()] + [d.step_head_VD]


def dtype_of(decoder) -> str:
    full = str(decoder.dtype).removeprefix("torch.")
    return f"{full} with {decoder.packed} steps" if decoder.packed else full


def all_bytes(decoder) -> int:
    """Weights a model holds, towers included, and packed copies."""
    packed = [t for layer in (*decoder.step_layers, *decoder.layers) for t in layer.values()]
    held = {id(t): t for t in [*decoder.w.values(), *packed, decoder.step_head_VD]}      # most are the model's own
    return sum(getattr(t, "held_bytes", t.nbytes) for t in held.values())


def weight_bytes(model) -> int:
    return sum(t.nbytes for t in step_weights(model))


def kv_bytes(model) -> int:
    c = model.config
    return 2 * c.L * c.N * c.K * model.decoder.k_cache_LNMK.element_size()


# ---- the measured run ------------------------------------------------------------------------------------------


def run_sample(e, sample: Sample, mode: str, options, explain: bool = False) -> engine.Result:
    drafted = {"event_image_path": sample.events} if isinstance(sample.events, list) else {"event_path": sample.events}
    return e.generate(video_path=sample.video if mode != "drafter_only" else None, query=sample.question, mode=mode,
                      max_new_tokens=options.max_new_tokens, ignore_eos=options.ignore_eos,
                      frame_rule=options.frame_rule, **drafted, temperature=options.temperature, top_p=options.top_p,
                      seed=options.seed, draft_source=options.source if mode == "speculative" else None,
                      explain=explain)


class LearnsOnce(engine.DraftSource):
    """A source whose `learn` waits for `settle`: else a sample's second repeat drafts from the answer of its first."""

    def __init__(self, source: engine.DraftSource):
        self.source, self.answer, self.name = source, None, type(source).__name__
        for name in ("attach", "begin", "hear", "hears", "propose", "recalls", "verdict", "worth_hearing"):
            setattr(self, name, getattr(source, name))

    def learn(self, answer):
        self.answer = answer

    def settle(self) -> None:
        """The sample is done: its answer may be remembered."""
        if self.answer is not None:
            self.source.learn(self.answer)
        self.answer = None


def warm_up(e, samples, options) -> None:
    """Every mode on the first sample that can be run. A broken sample fails its own row later; three in a row point to
    the flags or the models, and the first reason is raised."""
    errors = []
    for sample in samples[:3]:
        try:
            for _ in range(options.warmup):
                for mode in options.modes:
                    run_sample(e, sample, mode, options)
        except Exception as error:
            show(error, options)
            errors.append(error)
        else:
            break
    else:
        if errors:
            raise errors[0]
    if options.source is not None:
        options.source.answer = None                         # what the warm-up said is not remembered


def measure(e, samples, options, rows: list, keep=None) -> None:
    """Runs every mode on every sample and appends to `rows` as it goes; `keep` is called with each finished row.
    Repeats are interleaved, the modes of each in an order of its own: so what one mode leaves to the next, a clock or a
    cache, favours none."""
    progress, order = Progress(len(samples)), random.Random(options.seed)
    e.remembers = False                                      # else a sample's second repeat recalls its first
    warm_up(e, samples, options)
    if options.profile:
        torch.cuda.profiler.start()
    for sample in samples:
        row = {"id": sample.id, "at": sample.at, "seq": sample.seq, "clip": sample.clip,
               "question": sample.question, "modes": {}}
        for model in e.models:
            model.seen = None
        results, began = collections.defaultdict(list), time.perf_counter()
        try:
            for _ in range(options.repeats):
                for mode in order.sample(options.modes, len(options.modes)):
                    results[mode].append(run_sample(e, sample, mode, options))
            options.shown = results[options.modes[-1]][-1]
        except Exception as error:                           # whatever it is, the other samples are worth having
            show(error, options)
            row["error"] = str(error) if isinstance(error, InputError) else describe(error)
        else:
            row["truth"] = sample.truth
            row["modes"] = {mode: summary(results[mode], results.get("target_only")) for mode in options.modes}
            row["pixels"] = {m.side: pixel_hash(m.seen) for m in e.models if m.seen is not None}
            if any(of["differs_at"] is not None for of in row["modes"].values()):
                try:
                    add_margins(row["modes"], run_sample(e, sample, "target_only", options, explain=True))
                except Exception as error:                   # the difference counts without its margin
                    show(error, options)
        row["took_s"] = time.perf_counter() - began
        if options.source is not None:
            options.source.settle()
        if e.drafter is not None:                            # the sample is done: what was said may be recalled
            said = [of[-1].preview_ids for of in results.values() if of]
            answered = row["modes"].get("target_only", {}).get("ids", []) if e.apart else []
            e.remember(max(said, key=len, default=[]), answered)
        rows.append(row)
        if keep:
            keep(row)
        progress.step(sample.id)
    if options.profile:
        torch.cuda.profiler.stop()


def pixel_hash(pixels_R3XX) -> str:
    """16 hex digits of SHA-256 over the float32 bits that a model saw: equal where decoding, drawing and resizing were.
    """
    there = pixels_R3XX.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(there.data_ptr(), there.nbytes)).hexdigest()[:16]


def show(error: Exception, options) -> None:
    """The traceback of a failed sample, under --debug."""
    if options.debug:
        traceback.print_exception(error)


class Progress:
    """Samples done and time left on stderr; silent where nobody watches."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def step(self, name: str) -> None:
        self.done += 1
        if sys.stderr.isatty():
            left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
            print(f"\r{self.done}/{self.total} samples, {left:.0f} s left, {name[:40]:40}", end="", file=sys.stderr)
            if self.done == self.total:
                print(file=sys.stderr)


class Loading:
    """Bytes of a checkpoint read, and how fast, on stderr."""

    def __init__(self):
        self.began, self.side = 0.0, ""

    def __call__(self, side: str, done: int, total: int) -> None:
        if side != self.side:
            self.side, self.began = side, time.monotonic()
        speed = done / max(time.monotonic() - self.began, 1e-3)
        print(f"\r{side}: {done / 1e9:.2f} of {total / 1e9:.2f} GB read, {speed / 1e9:.2f} GB/s",
              end="\n" if done == total else "", file=sys.stderr, flush=True)


def summary(results, baseline) -> dict:
    """One sample's row for one mode: ids and text, medians, and every repeat's raw times."""
    last = results[-1]
    ms = {name: [None if r[field] is None else r[field] * 1e3 for r in results] for name, field in
          (("e2e_ms", "wall_clock_time"), ("ttft_ms", "ttft"), ("ttfp_ms", "ttfp"), ("tpot_ms", "tpot"))}
    each = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in results:
        per_request = {(side, stage): s * 1e3 for side, of in result.stages.items() for stage, s in of.items()}
        for row, stage, start, end, note in result.timeline:
            if stage in PER_FORWARD:                                       # one entry a forward
                forwards = int(note.split()[0]) if note.endswith(" ids") else 1
                each[row][stage].append((end - start) * 1e3 / forwards)
                per_request.pop((row, stage), None)
        for (side, stage), value in per_request.items():
            each[side][stage].append(value)
    decided = last.mode != "drafter_only"
    apart = [parting(r.output_ids, baseline[0].output_ids) for r in results] if decided and baseline else []
    differs_at = min((at for at in apart if at is not None), default=None)
    return {"ids": last.output_ids, "text": last.output_text, "preview": last.preview_text,
            "finish_reason": last.finish_reason,
            **{name: median(values) for name, values in ms.items()}, "raw": ms, "stages_ms": each,
            "drafted": last.drafted, "accepted": last.accepted_tokens, "rounds": last.rounds,
            "accept_lens": last.accept_lens, "overlap_drafts": median([r.free_tokens_count for r in results]),
            "window_drafts": median([r.window_drafts for r in results]), "differs_at": differs_at,
            "identical": differs_at is None if apart else None,
            "prompt_rows": last.prompt_rows, "peak_memory": last.peak_memory, "drafter_error": last.drafter_error}


def add_margins(modes: dict, again: engine.Result) -> None:
    """Where outputs part, by how much the target preferred its own id: rounding apart, or a fault?"""
    margins = [margin for verdict in again.verdicts for margin in verdict.margins]
    for of in modes.values():
        if of["differs_at"] is not None and of["differs_at"] < len(margins):
            of["margin"] = margins[of["differs_at"]]


def parting(ours, theirs) -> int | None:
    """Where two lists of ids part for the first time, None if they are equal."""
    return None if ours == theirs else prefix(ours, theirs, len(ours))


def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


# ---- figures from the rows -------------------------------------------------------------------------------------


def compare(rows) -> dict:
    """How many (sample, mode) pairs were compared with target_only, how many are equal, where the others part.
    target_only itself is listed only where its own repeats differ."""
    compared, equal, differing = 0, 0, []
    for row in rows:
        for mode, of in row["modes"].items():
            if of["identical"] is None or (mode == "target_only" and of["identical"]):
                continue
            compared, equal = compared + 1, equal + of["identical"]
            if not of["identical"]:
                differing.append({"id": row["id"], "mode": mode, "position": of["differs_at"],
                                  "margin": of.get("margin")})
    return {"compared": compared, "equal": equal, "differing": differing}


def ratio_of(rows, mode: str):
    """{p50, low, high}: target_only's e2e over the mode's, paired by sample, with a bootstrap interval of 95 %."""
    ratios = [row["modes"]["target_only"]["e2e_ms"] / row["modes"][mode]["e2e_ms"] for row in rows
              if mode in row["modes"] and "target_only" in row["modes"]]
    return interval(ratios)


def worst_of(rows, mode: str) -> float | None:
    """The mode's e2e over target_only's on the sample where that is largest; both are medians of repeats."""
    return max((row["modes"][mode]["e2e_ms"] / row["modes"]["target_only"]["e2e_ms"] for row in rows
                if mode in row["modes"] and "target_only" in row["modes"]), default=None)


def saved_of(rows, mode: str):
    """{first, rest}: milliseconds the mode saves before the answer's first id, and from there to its end."""
    first, rest = [], []
    for row in rows:
        of, base = row["modes"].get(mode), row["modes"].get("target_only")
        if of and base and None not in (of["ttft_ms"], base["ttft_ms"]):
            first.append(base["ttft_ms"] - of["ttft_ms"])
            rest.append(base["e2e_ms"] - base["ttft_ms"] - of["e2e_ms"] + of["ttft_ms"])
    return {"first": statistics.median(first), "rest": statistics.median(rest)} if first else None


def later_of(rows, mode: str, from_frames: bool = False):
    """{p50, low, high}: by how many ms the mode's first id comes later than target_only's, paired by repeat; or, where
    the host's decoding of the video is left out, by how many after the frames. None where that was not kept."""
    waits = []
    for row in [row["modes"] for row in rows if mode in row["modes"] and "target_only" in row["modes"]]:
        both = [[row[m]["raw"]["ttft_ms"]] for m in (mode, "target_only")]
        if from_frames:
            for of, m in zip(both, (mode, "target_only"), strict=True):
                of.append(row[m]["stages_ms"].get("target", {}).get("load", ()))
        if len({len(values) for of in both for values in of}) == 1:
            firsts = [[None if None in at else at[0] - sum(at[1:]) for at in zip(*of, strict=True)] for of in both]
            waits += [of - base for of, base in zip(*firsts, strict=True) if None not in (of, base)]
    return interval(waits)


def interval(values: list[float]):
    """{p50, low, high}: the median and its bootstrap interval of 95 %; None without values."""
    if not values:
        return None
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return {"p50": statistics.median(values), "low": medians[int(0.025 * RESAMPLES)],
            "high": medians[int(0.975 * RESAMPLES)]}


def mode_figures(rows, modes, identical: bool) -> dict:
    figures = {}
    for mode in modes:
        have = [row["modes"][mode] for row in rows if mode in row["modes"]]
        if not have:
            continue
        accept_lens = [a for of in have for a in of["accept_lens"]]
        drafted = sum(of["drafted"] for of in have)
        figures[mode] = {
            **{name: dict(zip(("p20", "p50", "p80"), quantiles(values), strict=True)) if values else None
               for name in ("e2e_ms", "ttft_ms", "ttfp_ms", "tpot_ms")
               for values in [[v for of in have for v in of["raw"][name] if v is not None]]},
            "tokens": sum(len(of["ids"]) for of in have), "ratio": ratio_of(rows, mode) if identical else None,
            "worst": worst_of(rows, mode) if identical else None,
            "later_ms": later_of(rows, mode) if identical and mode != "target_only" else None,
            "saved_ms": saved_of(rows, mode) if identical else None,
            "drafted": drafted, "accepted": sum(accept_lens),
            "overlap_drafts": median([of["overlap_drafts"] for of in have]),
            "window_drafts": median([of.get("window_drafts") for of in have]),
            "accept_rate": sum(accept_lens) / drafted if drafted else None,
            "tokens_per_round": statistics.mean(accept_lens) + 1 if accept_lens else None,
            "histogram": dict(sorted(collections.Counter(accept_lens).items()))}
    return figures


def controls(rows, limit: int) -> dict:
    """Accepted prefix of one-shot drafts that need no drafter, after the target's own first id, at most `limit` ids:
    the previous sample's answer to the same question, the most frequent path through all other samples' answers, and
    the n-grams of the answers before."""
    by_question = collections.defaultdict(list)
    for row in rows:
        if "target_only" in row["modes"]:
            by_question[row["question"]].append(row["modes"]["target_only"]["ids"])
    previous, constant, ngram = [], [], []
    for answers in by_question.values():
        memory = engine.Memory()
        for i, ids in enumerate(answers):
            ngram.append(prefix(memory.propose(ids[:1], limit), ids[1:], limit))
            memory.learn(ids)
            previous.append(prefix(answers[i - 1][1:], ids[1:], limit) if i else 0)
            others = answers[:i] + answers[i + 1:]
            path = []
            while len(path) < limit + 1:
                after = [o[len(path)] for o in others if o[:len(path)] == path and len(o) > len(path)]
                if not after:
                    break
                path.append(collections.Counter(after).most_common(1)[0][0])
            constant.append(prefix(path[1:], ids[1:], limit))
    mean = lambda values: statistics.mean(values) if values else None        # noqa: E731
    return {"draft_limit": limit, "previous": mean(previous), "constant": mean(constant), "memory": mean(ngram),
            "samples": len(previous)}


def prefix(drafts, ids, limit: int) -> int:
    """How many of at most `limit` drafts agree with the ids from the first on."""
    return min(engine.agreeing(drafts, ids), limit)


def stage_times(report, side: str, stage: str, modes) -> list[float]:
    return [ms for row in report["samples"] for mode, of in row["modes"].items() if mode in modes
            for ms in of["stages_ms"].get(side, {}).get(stage, [])]


def stage_rows(report) -> list:
    """(model, stage, p20, p50, p80, p50 with both at once, amount, unit, % of ceiling). A side's own mode measures it
    undisturbed, `prefill_only` beside the other, with nothing that holds either back."""
    table, limits = [], report["ceilings"]
    for side in [s for s in ("target", "drafter") if s in limits]:
        alone, work = "target_only" if side == "target" else "drafter_only", limits[side]
        for stage in STAGES[side]:
            values = stage_times(report, side, stage, MODES if stage in ("verify", "recall") else [alone])
            if not values:
                continue
            low, mid, high = quantiles(values)
            amount = unit = share = None
            if stage in PER_FORWARD:
                amount, unit, share = work["step_bytes"] / 1e9, "GB", work["step_bytes"] / mid * 1e3 / limits["read_bw"]
            elif stage == "prefill":
                amount, unit = work["prefill_flop"] / 1e12, "TFLOP"
                share = work["prefill_flop"] / mid * 1e3 / limits["gemm_flops"] / work.get("matrix_rate", 1)
            together = median(stage_times(report, side, stage, ["prefill_only"]))
            table.append((side, stage, low, mid, high, together, amount, unit, share))
    return table


def break_even(report) -> list[str]:
    """At these stage times, from how many accepted drafts on a head start pays: the gate's sum, with p50 of each."""
    p50 = {(side, stage): mid for side, stage, _, mid, *_ in stage_rows(report)}
    apart = len(set(report["config"]["devices"].values())) > 1
    begin = ("preprocess", "encode", "prefill")
    wanted = [("target", "load"), ("drafter", "load"), ("target", "decode"), *(("drafter", stage) for stage in begin)]
    if apart or not all(key in p50 for key in wanted):
        return []
    front, step = sum(p50["drafter", stage] for stage in begin), p50["target", "decode"]
    window = p50["target", "load"] - p50["drafter", "load"]
    late = max(0.0, front - window) + max(0.0, p50.get(("target", "verify"), step) - step)
    pays_from = max(1, math.ceil(late / step))
    return [f"gate     {report['config']['gate']}; the drafter needs {front:.1f} ms before its first id, the "
            f"target waits {window:.1f} ms longer for its frames: a head start pays from {pays_from} accepted drafts"]


def warnings_of(figures, rows, head) -> list:
    found, facts = [], head["machine"]
    if head["weights"]["kind"] == "random-7b":
        found.append("RANDOM WEIGHTS: times are real, texts and acceptance mean nothing")
    for mode, of in figures.items():
        if of["e2e_ms"]["p80"] > 1.1 * of["e2e_ms"]["p20"]:
            found.append(f"{mode}: e2e p80 is {of['e2e_ms']['p80'] / of['e2e_ms']['p20']:.2f}x p20")
    if len(rows) < 10:
        found.append(f"{len(rows)} samples: the intervals of the ratios are rough below 10")
    if facts["others_on_gpu"]:
        found.append(f"{facts['others_on_gpu']} other processes use this GPU")
    if facts.get("load", 0) > 0.5 * facts["cores"]:
        found.append(f"the machine was busy before this run: {facts['load']:.1f} of {facts['cores']} cores")
    clocks = [int(text.split()[0]) for text in (facts.get("clocks"), head.get("clocks_after"))
              if text and text.split()[0].isdecimal()]
    if len(clocks) == 2 and abs(clocks[1] / clocks[0] - 1) > 0.05:
        found.append(f"the GPU's clock went from {clocks[0]} to {clocks[1]} MHz between start and end")
    for mode in figures:
        raw = [row["modes"][mode]["raw"]["e2e_ms"] for row in rows if mode in row["modes"]]
        firsts = [of[0] / statistics.median(of[1:]) for of in raw if len(of) > 2]
        if firsts and statistics.median(firsts) > 1.1:
            found.append(f"{mode}: a sample's first run takes {statistics.median(firsts):.2f}x its later ones; raise "
                         f"--warmup")
    if facts["gpu"] is None:
        found.append("on a CPU this shows that it works, not how fast it can be")
    for row in rows:
        for mode, of in row["modes"].items():
            if of["drafter_error"]:
                found.append(f"{row['id']}, {mode}: the drafter gave up ({of['drafter_error']})")
    return found


# ---- the report ------------------------------------------------------------------------------------------------


def fmt(value, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def memory_line(memory: dict) -> str:
    """What both sides allocate at most, beside what each device had free before they were loaded."""
    parts = ("weights", "cache", "packed", "scratch")
    sides = [f"{side} " + " + ".join(f"{of[part] / 1e9:.3f} GB {part}" for part in parts if part in of)
             for side, of in memory.items()]
    rooms = []
    for where in dict.fromkeys(of["device"] for of in memory.values()):
        here = [of for of in memory.values() if of["device"] == where]
        need = sum(of.get(part, 0) for of in here for part in parts)
        rooms.append(f"{where} needs {need / 1e9:.3f} of {here[0]['free'] / 1e9:.1f} GB free")
    return f"memory   {' | '.join([*sides, *rooms])}; fewer --cache-rows need less"


def pixels_of(report, side: str) -> str | None:
    """One hash of the pixels that a side saw in all samples, in the order of the data set."""
    found = [row["pixels"][side] for row in report["samples"] if side in row.get("pixels", {})]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16] if found else None


def header(report) -> list[str]:
    w, m, c = report["weights"], report["machine"], report["config"]
    label = LABELS.get(w["kind"], "checkpoints")
    models = " | ".join(f"{side} {w[side]['path']} {w[side]['dtype']} {w[side]['bytes'] / 1e9:.3f} GB"
                        for side in ("target", "drafter") if side in w)
    where = m["gpu"] or f"CPU, {m['threads']} of {m['cores']} cores"
    driver = f", driver {m['driver']}" if m["driver"] else ""
    command = " ".join(Path(word).name if word.startswith("/") else word for word in report["command"].split())
    hashes = " | ".join(f"{side} {w[side].get('hash')}" + f", revision {w[side].get('revision')}" * bool(
        w[side].get("revision")) + f", pixels {pixels_of(report, side)}" for side in ("target", "drafter") if side in w)
    sampling = "".join(f", {name} {value}" for name, value in c.get("sampling", {}).items())
    return [f"weights  {label} | {models}",
            f"hashes   {hashes}",
            f"machine  {where}{driver} | torch {m['torch']}, triton {m['triton']}, python {m['python']} | commit "
            f"{report['commit']}{', dirty' if report['dirty'] else ''} | {report['time']}",
            f"run      {command} | {c['samples']} samples x {c['repeats']} after {c['warmup']} warm-up | "
            f"{c['max_new_tokens']} new ids{', fixed length' if c['ignore_eos'] else ''}, draft_len {c['draft_len']}"
            f"{sampling}"]


def render(report) -> list[str]:
    """The report as lines of text. It is made from the JSON object alone, so every printed number can be recomputed."""
    f, target = report["ceilings"], report["ceilings"].get("target")
    lines = ([memory_line(report["memory"])] if "memory" in report else []) + header(report)
    step = target["step_bytes"] / f["read_bw"] * 1e3 if target else None
    prefill = target["prefill_flop"] / f["gemm_flops"] * 1e3 if target else None
    lines.append(f"ceiling  read {f['read_bw'] / 1e12:.3f} TB/s, matrix {f['gemm_flops'] / 1e12:.2f} TFLOP/s, measured "
                 f"now | target step >= {fmt(step, 3)} ms, prefill >= {fmt(prefill, 2)} ms")
    lines.append(f"{'model':8} {'stage':10} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'both at once':>12} "
                 f"{'moved':>12} {'of ceiling':>10}")
    for side, stage, low, mid, high, together, amount, unit, share in stage_rows(report):
        moved = f"{amount:.3f} {unit}" if amount else ""
        part = f"{share:.0%}" if share else ""
        lines.append(f"{side:8} {stage:10} {low:9.3f} {mid:9.3f} {high:9.3f} {fmt(together, 3):>12} {moved:>12} "
                     f"{part:>10}")
    lines += break_even(report)
    lines.append(f"{'mode':20} {'e2e p50 ms':>10} {'[p20, p80]':>18} {'ttft':>8} {'ttfp':>8} {'tpot':>7} {'ids':>5} "
                 f"{'ratio to target_only':>22} {'accept':>7} {'tok/round':>9} {'window':>6} {'overlap':>7}")
    same = report["identical"]
    differ = same["equal"] < same["compared"]
    for mode, of in report["modes"].items():
        e2e, r = of["e2e_ms"], of["ratio"]
        spread = f"[{e2e['p20']:.1f}, {e2e['p80']:.1f}]"
        ratio = f"{r['p50']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "withheld" if differ else "-"
        p50 = {k: fmt(of[k]["p50"] if of[k] else None) for k in ("ttft_ms", "ttfp_ms", "tpot_ms")}
        lines.append(f"{mode:20} {e2e['p50']:10.1f} {spread:>18} {p50['ttft_ms']:>8} {p50['ttfp_ms']:>8} "
                     f"{p50['tpot_ms']:>7} {of['tokens']:5} {ratio:>22} {fmt(of['accept_rate'], 2):>7} "
                     f"{fmt(of['tokens_per_round'], 2):>9} {fmt(of.get('window_drafts'), 0):>6} "
                     f"{fmt(of['overlap_drafts'], 0):>7}")
    worst = [f"{mode} {of['worst']:.3f}" for mode, of in report["modes"].items()
             if of.get("worst") and mode in ("prefill_then_verify", "speculative")]
    if worst:
        lines.append(f"worst    of {len(report['samples'])} samples: {', '.join(worst)} of target_only's e2e")
    later = [mode for mode, of in report["modes"].items() if of.get("later_ms") and mode != "drafter_only"]
    for what, values in (("first id than target_only's, ms, paired by repeat, median",
                          [report["modes"][mode]["later_ms"] for mode in later]),
                         ("from the last frame on alone", [later_of(report["samples"], mode, True) for mode in later])):
        found = [f"{mode} {of['p50']:+.2f} [{of['low']:+.2f}, {of['high']:+.2f}]"
                 for mode, of in zip(later, values, strict=True) if of]
        if found:
            lines.append(f"later    {what}: {', '.join(found)}")
    if any(of.get("saved_ms") for of in report["modes"].values()):
        lines.append(f"{'approach':30} {'preview, ms':>11} {'saved to first id':>17} {'saved after it':>14} "
                     f"{'total':>6}")
        for mode in [mode for mode in APPROACHES if report["modes"].get(mode, {}).get("saved_ms")]:
            of = report["modes"][mode]
            lines.append(f"{APPROACHES[mode]:30} {fmt(of['ttfp_ms'] and of['ttfp_ms']['p50']):>11} "
                         f"{of['saved_ms']['first']:17.1f} {of['saved_ms']['rest']:14.1f} {of['ratio']['p50']:5.2f}x")
    for mode, of in report["modes"].items():
        if of["histogram"]:
            lines.append(f"accept_len {mode}: " + "  ".join(f"{k}: {v}" for k, v in of["histogram"].items()))
    c = report["controls"]
    if c["samples"]:
        lines.append(f"controls accepted of {c['draft_limit']} one-shot drafts that need no drafter, {c['samples']} "
                     f"samples: previous answer {fmt(c['previous'], 2)}, constant {fmt(c['constant'], 2)}, n-grams "
                     f"{fmt(c.get('memory'), 2)}")
    for row in [r for r in report["samples"] if r["modes"] and report["weights"]["kind"] != "random-7b"][:3]:
        said = row["modes"].get("speculative") or next(iter(row["modes"].values()))
        lines += [f"sample   {row['id']}  {row['question']}"]
        lines += [f"  preview  {said['preview']}"] if said["preview"] else []
        lines += [f"  answer   {said['text']}"] + ([f"  truth    {row['truth']}"] if row.get("truth") else [])
    lines += [f"failed   {row['id']}: {row['error']}" for row in report["samples"] if "error" in row]
    lines += [f"skipped  {problem}" for problem in report["skipped"]]
    lines += [f"warning  {warning}" for warning in report["warnings"]]
    lines += [f"differs  {d['id']}, {d['mode']}: first at answer id {d['position']}, top-two margin of target_only "
              f"there {fmt(d.get('margin'), 4)}" for d in same["differing"]]
    lines.append(f"verdict  outputs identical to target_only in {same['equal']} of {same['compared']} comparisons"
                 + (": ratios withheld" if differ else "") if same["compared"] else
                 "verdict  nothing was compared: it takes target_only and another mode that the target decides")
    return lines + [LEGEND]


def around_block(block: str) -> tuple[str, str]:
    """The README up to and from a block's markers, both included."""
    path = HERE / "README.md"
    text, begin, end = path.read_text(encoding="utf-8"), f"<!-- bench {block} -->", f"<!-- /bench {block} -->"
    if begin not in text or end not in text:
        raise InputError(f"{path}: has no block {block!r}; add the two markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    return head + begin, end + rest.split(end, 1)[1]


def update_readme(block: str, lines) -> None:
    """Puts this run's report between the README's `bench BLOCK` markers."""
    head, rest = around_block(block)
    body = "\n".join(lines)
    replace_file(HERE / "README.md", f"{head}\n```\n{body}\n```\n{rest}".encode())


def insist_writable(path, flag: str) -> None:
    folder = Path(path or ".").resolve().parent
    if path and str(path) != "-" and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{path}: cannot be written ({folder} is not a folder one may write to); choose another "
                         f"--{flag}")
    if path and Path(path).is_dir():
        raise InputError(f"{path}: cannot be written (is a folder); choose another --{flag}")


def check_outputs(options) -> None:
    """Whatever is to be written can be: a long run must not end in a path that was wrong from the start."""
    for flag in ("json", "rows", "record", "timeline", "trace"):
        insist_writable(getattr(options, flag), flag)
    if options.update_readme is not None:
        around_block(options.update_readme)
    elif options.from_text:
        raise InputError("--from-text: goes into a block of the README; pass --update-readme BLOCK as well")


# ---- long runs: rows on disk, shards, merging, comparing ---------------------------------------------------------

STAGE_ORDER = {"eventgpt": ("drafter_only", "drafter", STAGES["drafter"][:5]),
               "videollava": ("target_only", "target", STAGES["target"][:5])}


def write_pairs(path: str, report: dict) -> None:
    """Both models' own answers of every sample, one JSON object a line, in the schema of the recorded pairs that
    `--sources` reads. `ms` holds load, preprocess, encode, prefill and the whole of draft or decode."""
    config, lines = report["config"], []
    for row in report["samples"]:
        if not {"target_only", "drafter_only"} <= row["modes"].keys():
            continue
        pair = {"src": "headstart", "seq": row["seq"], "clip": row["clip"], "uuid": row["id"],
                "question": row["question"], "target_input": f"video8_{config['frame_rule']}",
                "max_new_tokens": config["max_new_tokens"], "commit": report["commit"], "ms": {}}
        for name, (mode, side, stages) in STAGE_ORDER.items():
            of = row["modes"][mode]
            pair |= {f"{name}_text": of["text"], f"{name}_ids": of["ids"]}
            pair["ms"][name] = [sum(of["stages_ms"].get(side, {}).get(stage, [])) / config["repeats"]
                                for stage in stages]
        lines.append(json.dumps(pair))
    replace_file(path, "".join(line + "\n" for line in lines).encode())


SAME = ("schema", "commit", "weights", "config")     # of a header: rows under different ones never share a table


def insist_new(path: Path, resume: bool) -> None:
    if path.exists() and not resume:
        raise InputError(f"{path}: is already there; pass --resume to go on with it, or choose another --rows")


class RowFile:
    """Finished rows, one JSON object a line under a header line, so that a run that dies loses nothing but the sample
    it was in. Without a path it keeps nothing. `rows` are those found on resuming."""

    def __init__(self, path: Path | None, head: dict, resume: bool):
        self.path, self.rows, self.file = path, [], None
        if path is None:
            return
        try:
            self.file = open(path, "ab", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # goes with the process, however it ends
        except BlockingIOError:
            raise InputError(f"{path}: another run is writing to it; wait for it, or choose another --rows") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --rows") from None
        start = path.read_bytes()[:1 << 20]
        if start.startswith(b'{"schema": ') and b"\n" not in start:
            self.file.truncate(0)                            # it died over its first line
        elif start:
            found, self.rows, whole = read_rows(path)
            differing = [name for name in SAME if found.get(name) != head[name]]
            if differing:
                raise InputError(f"{path}: was written under another {', '.join(differing)}; choose another --rows")
            self.file.truncate(whole)                        # a line that was cut off is written again
        if not path.stat().st_size:
            self._line(head)

    def append(self, row: dict) -> None:
        if self.file:
            self._line(row)

    def _line(self, value: dict) -> None:
        line = json.dumps(value).encode() + b"\n"
        try:
            while line:                                      # a nearly full disk takes a part of it first
                line = line[self.file.write(line):]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); free some room and go on with "
                             f"--resume, finished samples are kept") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()


def read_rows(path: Path) -> tuple[dict, list, int]:
    """(header, rows, bytes of whole lines) of a row file. A last line without its end is left out."""
    try:
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        head, *rows = [json.loads(line) for line in raw[:whole].splitlines()]
        assert isinstance(head["config"], dict) and type(head["config"]["samples"]) is int
        assert all(type(row["id"]) is str and type(row["at"]) is int and row["modes"].keys() <= set(MODES)
                   for row in rows), "a line that is no finished sample"
    except UNREADABLE as error:
        raise InputError(f"{path}: not a file of rows ({describe(error)}); wants what --rows wrote") from None
    return head, rows, whole


def merged(paths: list[Path]) -> dict:
    """One report of several row files, by id: differing headers, duplicates and holes are refused."""
    heads, rows, took = [], {}, []
    for path in paths:
        head, found, _ = read_rows(path)
        differing = [name for name in SAME if heads and head.get(name) != heads[0].get(name)]
        if differing:
            raise InputError(f"{path}: was written under another {', '.join(differing)} than {paths[0]}; merge runs of "
                             f"one commit and one set of flags")
        heads.append(head)
        took.append(sum(row.get("took_s", 0.0) for row in found))
        for row in found:
            if row["id"] in rows:
                raise InputError(f"{path}: sample {row['id']} is there twice; give every row file once")
            rows[row["id"]] = row
    missing = heads[0]["config"]["samples"] - len(rows)
    if missing:
        raise InputError(f"{paths[0]}: {missing} of {heads[0]['config']['samples']} samples are missing; give the row "
                         f"files of all shards, finished")
    try:
        report = assemble({**heads[0], "command": f"bench.py --merge of {len(paths)} row files", "shards_s": took},
                          sorted(rows.values(), key=lambda row: row["at"]))
        render(report)
    except UNREADABLE as error:
        raise InputError(f"{paths[0]}: cannot be made a report ({describe(error)}); wants what --rows "
                         f"wrote") from None
    return report


def compare_runs(old_path: Path, new_path: Path) -> int:
    """Each mode's end-to-end time in two saved runs, paired by sample, with an interval and a verdict in words."""
    runs = []
    for path in (old_path, new_path):
        try:
            report = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            runs.append((report, {row["id"]: row["modes"] for row in report["samples"]}))
        except UNREADABLE as error:
            raise InputError(f"{path}: not a saved run ({describe(error)}); wants what --json wrote") from None
    try:
        lines, changed = compared(*runs[0], *runs[1])
    except UNREADABLE as error:
        raise InputError(f"{old_path}, {new_path}: no two saved runs ({describe(error)}); want what --json "
                         f"wrote") from None
    print("\n".join([f"compare  {old_path.name} with {new_path.name}, commits {lines[0]}", *lines[1:]]))
    return int(bool(changed))


def compared(old: dict, before: dict, new: dict, after: dict) -> tuple[list, set]:
    """(lines, ids of samples that answer differently) of two reports and their samples by id."""
    shared = [i for i in before if i in after]
    lines = [f"{old['commit']} with {new['commit']}, {len(shared)} shared samples; above 1 the new run is faster",
             f"weights  {LABELS.get(new['weights']['kind'], 'checkpoints')} | {new['machine']['gpu'] or 'CPU'}"]
    if old["machine"]["gpu"] != new["machine"]["gpu"] or old["config"] != new["config"]:
        lines.append("warning  the two runs differ in machine or flags: a ratio across them says little")
    for mode in [m for m in old["modes"] if m in new["modes"]]:
        ratio = interval([before[i][mode]["e2e_ms"] / after[i][mode]["e2e_ms"] for i in shared
                          if mode in before[i] and mode in after[i]])
        if ratio is None:
            continue
        verdict = "faster" if ratio["low"] > 1 else "slower" if ratio["high"] < 1 else "no difference shown"
        lines.append(f"{mode:20} {ratio['p50']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]  {verdict}")
    pixels = [{row["id"]: row.get("pixels") for row in run["samples"]} for run in (old, new)]
    apart = [i for i in shared if pixels[0][i] and pixels[1][i] and pixels[0][i] != pixels[1][i]]
    if apart:
        lines.append(f"warning  in {len(apart)} samples the models saw other pixels: files, versions or modes differ")
    changed = {i for i in shared for m in before[i] if m in after[i] and m != "drafter_only"
               and before[i][m]["ids"] != after[i][m]["ids"]}
    wall = [max(run.get("shards_s") or [sum(row.get("took_s", 0.0) for row in run["samples"])]) for run in (old, new)]
    if all(wall):
        lines.append(f"wall     {wall[0]:.1f} s -> {wall[1]:.1f} s for all samples, {wall[0] / wall[1]:.2f}x"
                     + (f", over {len(new['shards_s'])} shards, the slowest counts" if new.get("shards_s") else ""))
    lines.append(f"outputs  {'the same' if not changed else f'{len(changed)} samples answer differently'}")
    return lines, changed


# ---- the request as a picture ----------------------------------------------------------------------------------

COLOURS = {"load": "#9aa5b1", "preprocess": "#c3cad2", "encode": "#6aa9d8", "prefill": "#2f6fa7", "draft": "#e39b3b",
           "recall": "#b8791f", "verify": "#4d9a57", "decode": "#a9cf9f"}
ROWS = ("host", "drafter", "target")


def draft_cells(result) -> list[tuple]:
    """(start_s, end_s, accepted) of every draft on the timeline, those of the head start first."""
    lens = list(result.accept_lens)
    head = lens.pop(0) if result.span_len else 0
    bars = [(start, end, note) for row, stage, start, end, note in result.timeline
            if row == "drafter" and stage in ("draft", "recall")]
    single = [bar for bar in bars if not bar[2].endswith(" ids")]
    wrote, cells = {forward: (at, ids) for forward, at, ids in result.drafts}, []
    for forward, (start, end, note) in enumerate(single, 1):                    # the prefill, 0, has a bar of its own
        at, ids = wrote.get(forward, (0, []))
        right = [result.output_ids[n:n + 1] == [i] and (note in ("ahead", "resume") or n <= head)
                 for n, i in enumerate(ids, at)]
        cells += split(start, end, right or [False])
    for start, end, note in bars:
        if note.endswith(" ids"):
            count, accepted = int(note.split()[0]), lens.pop(0) if lens else 0
            cells += split(start, end, [i < accepted for i in range(count)])
    return cells


def split(start: float, end: float, right: list[bool]) -> list[tuple]:
    """A bar in as many cells as it brought ids."""
    width = (end - start) / len(right)
    return [(start + i * width, start + (i + 1) * width, of) for i, of in enumerate(right)]


def draw_timeline(result, path: str) -> None:
    """A PNG of one request: three rows, stages as bars with their milliseconds, accepted drafts filled and rejected
    ones hollow, the time before the target's first id shaded."""
    from PIL import Image, ImageDraw
    left, wide, high, top = 90, 1100, 46, 40
    total = max(end for *_, end, _ in result.timeline) * 1e3
    image = Image.new("RGB", (left + wide + 20, top + 3 * (high + 14) + 60), "white")
    draw, x = ImageDraw.Draw(image), lambda seconds: left + seconds * 1e3 / total * wide
    if result.ttft:
        draw.rectangle([left, top - 8, x(result.ttft), top + 3 * (high + 14)], fill="#f3f1ea")
    draw.text((left, 8), f"{result.mode}: {len(result.output_ids)} ids in {result.wall_clock_time * 1e3:.0f} ms, first "
              f"after {(result.ttft or 0) * 1e3:.0f} ms; {result.accepted_tokens} of {result.drafted} verified drafts "
              f"accepted", fill="black")
    for i, name in enumerate(ROWS):
        y = top + i * (high + 14)
        draw.text((8, y + high // 2 - 6), name, fill="black")
        lanes = {}
        for row, stage, start, end, note in result.timeline:
            if row != name or stage in ("draft", "recall"):
                continue
            lane = lanes.setdefault(note, len(lanes)) if row == "host" else 0           # the two loads overlap
            y0, y1 = (y + lane * high // 2, y + (lane + 1) * high // 2 - 2) if row == "host" else (y, y + high)
            draw.rectangle([x(start), y0, max(x(end), x(start) + 1), y1], fill=COLOURS[stage], outline="white")
            label = f"{stage} {(end - start) * 1e3:.1f}"
            if x(end) - x(start) > draw.textlength(label) + 4:
                draw.text((x(start) + 3, (y0 + y1) // 2 - 6), label, fill="black")
        if name == "drafter":
            for start, end, accepted in draft_cells(result):
                draw.rectangle([x(start), y, max(x(end) - 1, x(start) + 1), y + high], outline=COLOURS["draft"],
                               fill=COLOURS["draft"] if accepted else "white")
    y, steps = top + 3 * (high + 14), [m * 10 ** e for e in range(7) for m in (1, 2, 5)]
    step = next((s for s in steps if total / s < 14), 10 ** 7)
    for ms in range(0, int(total) + 1, step):
        draw.line([x(ms / 1e3), y, x(ms / 1e3), y + 5], fill="black")
        draw.text((x(ms / 1e3) - 8, y + 8), f"{ms}", fill="black")
    at = float(left)
    for stage, colour in COLOURS.items():
        draw.rectangle([at, y + 34, at + 10, y + 44], fill=colour)
        draw.text((at + 14, y + 32), stage, fill="black")
        at += 26 + draw.textlength(stage)
    draw.text((at + 8, y + 32), "ms; filled drafts accepted, hollow rejected; shaded: before the first answer id",
              fill="black")
    content = io.BytesIO()
    image.save(content, "PNG")
    replace_file(path, content.getvalue())


def write_trace(result, path: str) -> None:
    """The same bars as a Chrome trace, for ui.perfetto.dev."""
    events = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": name}}
              for i, name in enumerate(ROWS)]
    events += [{"name": stage, "ph": "X", "ts": start * 1e6, "dur": (end - start) * 1e6, "pid": 0,
                "tid": ROWS.index(row), "args": {"note": note}} for row, stage, start, end, note in result.timeline]
    replace_file(path, json.dumps({"traceEvents": events}).encode())


# ---- one answer, id by id ---------------------------------------------------------------------------------------

PAINT = {"accepted": "32", "rejected": "31", "behind": "2", "own": "1"}          # green, red, faint, bold


def explain_page(options) -> int:
    """One answer id by id, in the last of --modes: what was drafted, what the target said there, by which margin over
    which runner-up. The sample is named by its id or by how that begins."""
    samples, _ = read_dataset(options.dataset_dir, options.question, options.max_samples)
    found = [s for s in samples if s.id == options.explain] or [s for s in samples if s.id.startswith(options.explain)]
    if len(found) != 1:
        raise InputError(f"--explain: {options.explain!r} names {len(found)} of the {len(samples)} samples in "
                         f"{options.dataset_dir}; pass one id, such as {samples[0].id}")
    sample, mode, (_, e) = found[0], options.modes[-1], load_pair(options)
    drafter_only = mode == "drafter_only"
    for _ in range(options.warmup):
        run_sample(e, sample, mode, options)
    alone, result = (run_sample(e, sample, name, options, explain=True) for name in ("target_only", mode))
    differs_at = None if drafter_only else parting(result.output_ids, alone.output_ids)
    colour = "NO_COLOR" not in os.environ and ("FORCE_COLOR" in os.environ or sys.stdout.isatty())
    lines = [f"explain  {LABELS.get(options.kind, 'checkpoints')} | {sample.id} | {sample.question}",
             *explained(result, (e.drafter if drafter_only else e.target).text.token, colour)]
    if result.drafter_error:
        lines.append(f"warning  the drafter gave up ({result.drafter_error})")
    if not drafter_only:
        lines.append("verdict  the ids are target_only's" if differs_at is None else
                     f"verdict  DIFFERENT from target_only, first at answer id {differs_at}")
    report = {"schema": SCHEMA, "commit": commit(), "weights": options.kind, "id": sample.id, "mode": mode,
              "question": sample.question, "ids": result.output_ids, "target_only_ids": alone.output_ids,
              "verdicts": [dataclasses.asdict(of) for of in result.verdicts]}
    options.shown = result
    hand_over(lines, report, options)
    return int(differs_at is not None)


def explained(result, token, colour: bool = False) -> list[str]:
    """A line an id of the answer, one for the drafts behind a wrong one, and the answer; `token` names an id."""
    def paint(kind, text):
        return f"\x1b[{PAINT[kind]}m{text}\x1b[0m" if colour and kind in PAINT else text

    lines, answer = [f"{'at':>4} {'forward':>7}  {'draft':16} {'':8}  {'said':16} {'margin':>8}  runner-up"], []
    for number, of in enumerate(result.verdicts):
        drafts = [token(i) for i in of.drafts]
        for i, (own, second, margin) in enumerate(zip(of.ids, of.second, of.margins, strict=True)):
            kind = "" if i >= len(drafts) else "accepted" if of.drafts[i] == own else "rejected"
            said = "accepted" if kind == "accepted" else "own"
            shown = paint(kind, f"{drafts[i] if kind else '':16} {kind:8}")
            lines.append(f"{of.first + i:4} {number:7}  {shown}  {paint(said, f'{token(own):16}')} {margin:8.3f}  "
                         f"{token(second)}")
            answer.append(paint(said, token(own).replace("\u2581", " ")))
        if len(drafts) > len(of.ids):
            lines.append(f"{'':13} {paint('behind', 'behind it: ' + ' '.join(drafts[len(of.ids):]))}")
    margins = [margin for of in result.verdicts for margin in of.margins]
    return [f"mode     {result.mode}: {len(result.output_ids)} ids in {len(result.verdicts)} forwards, "
            f"{result.accepted_tokens} of {result.drafted} drafts accepted; smallest margin "
            f"{min(margins):.3f} at {margins.index(min(margins))}", *lines,
            "answer  " + "".join(answer)]


# ---- draft sources on recorded answers -------------------------------------------------------------------------


def one_shot_controls(rows, limit: int) -> dict:
    """Mean accepted prefix of at most `limit` drafts after the target's own first id, whole sequences held out:
    `drafter` is EventGPT's own text from its first id on, the others are `CONTROLS`."""
    shots = {name: statistics.mean(shot[limit] for of in replay(rows, name, (), (limit,)).values() for shot in of.shots)
             for name in ("previous", "constant")}
    return shots | {"drafter": statistics.mean(prefix(row["drafter"], row["target"], limit) for row in rows)}


def memory_controls(rows, order: int, lengths, only=None) -> dict:
    """{K: {"other sequences", "with own stream"}}: tokens per target forward of rounds with K drafts from a Memory."""
    runs = {name: replay(rows, f"memory {order}", lengths, (), own, only)
            for name, own in (("other sequences", False), ("with own stream", True))}
    return {K: {name: per_forward(of.values(), K) for name, of in runs.items()} for K in lengths}


CONTROLS = {"previous": lambda most: engine.Previous(), "constant": lambda most: engine.Constant(most=most),
            "memory 8": lambda most: engine.Memory(8, most=most),
            "memory 16": lambda most: engine.Memory(16, most=most), "recall": lambda most: engine.Recalled(),
            "blend": lambda most: engine.Blend(most=most),
            "blend-text": lambda most: engine.BlendText(most=most), "drafter-text": lambda most: engine.DrafterText()}
LENGTHS, SHOTS = (8, 15, 31), (15, 21, 31)


class Replay:
    """One held-out sequence replayed: tokens and forwards of its rounds by K, what one shot had accepted by answer."""

    def __init__(self):
        self.tokens, self.forwards, self.shots = collections.Counter(), collections.Counter(), []


def replay(rows, name: str, lengths=LENGTHS, shots=SHOTS, own: bool = True, only=None) -> dict:
    """{sequence: Replay} of a source. Clips overlap by half, so a source is taught the other sequences only; answers of
    the sequence itself reach it after they are complete (`own`), in order. What it learns counts as it does in use."""
    runs = {}
    for seq in only or sorted({r["seq"] for r in rows}):
        source, of = CONTROLS[name](2 * len(rows)), runs.setdefault(seq, Replay())
        for row in [r for r in rows if r["seq"] != seq]:
            source.begin(row["question"])
            if hasattr(source, "teach"):
                source.teach(row["target"])
            elif name != "previous":                         # the last answer of another sequence is nobody's previous
                source.learn(row["target"])
        for row in [r for r in rows if r["seq"] == seq]:
            ids = row["target"]
            source.begin(row["question"])
            if source.hears:
                source.hear(row["drafter"])                  # all of it, as if it were early enough
            of.shots.append({limit: prefix(source.propose(ids[:1], limit), ids[1:], limit) for limit in shots})
            for K in lengths:
                at = 1
                while at < len(ids):
                    step = min(prefix(source.propose(ids[:at], K), ids[at:], K) + 1, len(ids) - at)
                    at += step
                    of.tokens[K] += step
                    of.forwards[K] += 1
            if own and name != "constant":
                source.learn(ids)
    return runs


def per_forward(replays, K: int) -> float:
    return sum(of.tokens[K] for of in replays) / sum(of.forwards[K] for of in replays)


def accepted(replays, limit: int) -> float:
    return statistics.mean(shot[limit] for of in replays for shot in of.shots)


def with_interval(figure, replays, at: int) -> str:
    """A figure of some replays and its 95 % interval over resampled whole sequences; none below three of them."""
    replays, rng = list(replays), random.Random(0)
    if len(replays) < 3:                                     # one sequence resampled is itself: no width is no proof
        return f"{figure(replays, at):6.2f}"
    resampled = sorted(figure(rng.choices(replays, k=len(replays)), at) for _ in range(RESAMPLES))
    return (f"{figure(replays, at):6.2f} [{resampled[int(0.025 * RESAMPLES)]:5.2f},"
            f"{resampled[int(0.975 * RESAMPLES)]:6.2f}]")


def sources_page(options) -> int:
    """What drafts without a drafter reach on recorded answers of the 7B pair: acceptance only, no time."""
    rows = read_pairs(options.sources, options.sources_src)
    seqs, questions = sorted({r["seq"] for r in rows}), sorted({r["question"] for r in rows})
    lines = [f"sources, {len(rows)} recorded answers of {len(seqs)} sequences ({options.sources.name}, "
             f"{options.sources_src}), whole sequences held out, "
             + ("[95 % over sequences]" if len(seqs) > 2 else "too few of them for intervals")]
    runs = {}
    for own, names in ((True, list(CONTROLS)), (False, [n for n in CONTROLS if not n.endswith(("previous", "text"))])):
        for name in names:
            print(f"{name}, {'own stream too' if own else 'other sequences only'} ...", file=sys.stderr, flush=True)
            runs[name, own] = replay(rows, name, own=own) if own or name != "constant" else runs[name, True]
    drafter = statistics.mean(prefix(r["drafter"], r["target"], 21) for r in rows)
    for title, figure, columns, own in (
            ("one shot after the target's own first id, mean accepted of", accepted, SHOTS, True),
            ("rounds of K drafts, tokens per target forward, own stream too, K =", per_forward, LENGTHS, True),
            ("rounds of K drafts, cold: other sequences only, K =", per_forward, LENGTHS, False)):
        lines += [title, f"{'':14}" + "".join(f"{K:>22}" for K in columns)]
        lines += [f"  {name:12}" + "".join(f"{with_interval(figure, runs[name, own].values(), K):>22}" for K in columns)
                  for name in CONTROLS if (name, own) in runs]
        over = lambda pairs, K, of=figure: of([b for b, _ in pairs], K) / max(of([m for _, m in pairs], K), 1e-9)  # noqa: E731
        rival = "previous" if figure is accepted else "memory 16"            # the best control of each table
        for ours, theirs in (("blend", rival), ("blend-text", "blend")):
            if (ours, own) in runs:
                paired = list(zip(runs[ours, own].values(), runs[theirs, own].values(), strict=True))
                lines.append(f"  {'ratio':12}" + "".join(f"{with_interval(over, paired, K):>22}" for K in columns)
                             + f"  {ours} over {theirs}, paired")
        if figure is accepted:
            lines.append(f"  drafter's own text {drafter:.3f} of 21")
    own_texts = replay([{**r, "target": r["drafter"]} for r in rows if r["drafter"]], "recall").values()
    lines += ["the drafter's own texts, ids per drafter forward, own stream too, K =",
              f"{'':14}" + "".join(f"{K:>22}" for K in LENGTHS),
              f"  {'recall':12}" + "".join(f"{with_interval(per_forward, own_texts, K):>22}" for K in LENGTHS)]
    if len(questions) > 1:
        lines.append("by question: blend, tokens per forward at K = 15, one shot of 21; previous, constant of 21")
        for question in questions:
            of = {name: replay([r for r in rows if r["question"] == question], name, (15,), (21,)).values()
                  for name in ("blend", "previous", "constant")}
            lines.append(f"  {per_forward(of['blend'], 15):5.2f} {accepted(of['blend'], 21):6.2f}; "
                         f"{accepted(of['previous'], 21):6.2f} {accepted(of['constant'], 21):6.2f}  {question}")
    print("\n".join(lines))
    if options.update_readme:
        update_readme(options.update_readme, lines)
    return 0


# ---- replay: real speed at recorded acceptance -------------------------------------------------------------------


def replay_page(options) -> int:
    """7B compute that says recorded ids: every draft source at its true acceptance, end to end, against target_only of
    the same run, paired. A stream is one recorded sequence; sequences in order of length until there are enough
    answers, the last one cut. The recorded clips are not here: files of the embedded data set take their place. A shard
    takes every N-th stream; --rows keeps what it measured, and --replay with --merge prints the table of all."""
    if options.merge:
        return replay_print(options, *merged_replays(options.merge))
    if not 0 <= options.second <= 1:
        raise InputError(f"--second: wanted a probability from 0 to 1, got {options.second}; change it")
    rates, pairs = read_rates(options.accept), read_pairs(options.replay, options.sources_src)
    if options.second and not rates:
        raise InputError("--second: says how often the drafters of --accept have the right runner-up; add --accept 0.6")
    clips, _ = read_dataset(options.dataset_dir, None, -1)
    e = engine.load_engine(options.eventgpt, options.videollava, device=options.device, dtype=options.dtype,
                           drafter_device=options.drafter_device, cache_rows=options.cache_rows, draft_len=15,
                           tokenizer=options.tokenizer, graphs=not options.eager, gate=options.gate == "on",
                           drafter_dtype=options.drafter_dtype, recall_len=options.recall_len)
    e.remembers = False                                      # settings share a drafter, and say the same answer
    most = max(i for row in pairs for name in ("target", "drafter") for i in row[name])
    for model in e.models:
        if most >= model.config.V:
            raise InputError(f"{options.replay}: holds id {most}, the {model.side} knows {model.config.V}; pass models "
                             f"of the same vocabulary, such as --weights random-7b")
        with torch.inference_mode():
            model.replay([])
    streams = collections.defaultdict(list)
    for row in pairs:
        streams[row["seq"]].append(row)
    chosen, left = [], options.max_samples if options.max_samples > 0 else 300
    for seq in sorted(streams, key=lambda seq: (len(streams[seq]), seq)):
        streams[seq] = streams[seq][:left]
        chosen, left = [*chosen, *([seq] if left else [])], left - len(streams[seq])
    (shard, shards), taken = options.shard, collections.defaultdict(list)
    chosen = chosen[shard::shards]
    progress = Progress(sum(len(streams[seq]) for seq in chosen))
    rng, order = random.Random(shard), random.Random(shard)
    gates = collections.defaultdict(engine.Gate)             # each setting is priced by its own acceptance,
    learnt = collections.defaultdict(lambda: (list(engine.SHARES), [1.0] * 2))   # and its guesses and recalled ids too
    for stream, seq in enumerate([chosen[0], *chosen]):      # three answers of the first to warm up
        others = [row for row in pairs if row["seq"] != seq]
        settings = replay_settings(others, rates, options.second, e, options.only)
        for number, row in enumerate(streams[seq] if stream else streams[seq][:3]):
            clip, cell, heard = clips[number % len(clips)], {}, []
            ids = row["target"][:options.max_new_tokens]
            for name in order.sample(list(settings), len(settings)):     # what one leaves behind favours none
                mode, source, said = settings[name]
                if mode == "prefill_then_verify" and number % options.every:
                    if source is not None:                   # not timed, but its stream goes on
                        source.begin(row["question"])
                        source.learn(ids)
                    continue
                e.gate = gates[name] if options.gate == "on" else None
                e.shares, recalled = learnt[name]
                for m, model in enumerate(e.models):
                    model.recalled = recalled[m]
                drafter_ids, second = said(row, rng)
                heard += [drafter_ids] * (drafter_ids not in heard)
                with torch.inference_mode():
                    e.target.replay(ids)
                    e.drafter.replay(drafter_ids, second)
                cell[name] = e.generate(
                    event_path=clip.events, video_path=clip.video, query=row["question"], mode=mode,
                    draft_source=source, max_new_tokens=len(ids), ignore_eos=True,
                    overlap_len=31 if name.startswith("one shot") else options.overlap_len,
                    draft_len=31 if name.startswith("recall") else 5 if e.apart and source is None else 15)
                recalled[:] = [model.recalled for model in e.models]
                if cell[name].output_ids != ids:
                    print(f"{name}, {seq} {row['clip']}: other ids than recorded", file=sys.stderr)
                    return 1
            for said_ids in heard:
                e.drafter.remember(said_ids)
            if rates and e.apart:
                e.target.remember(ids)
            if not stream:
                continue
            cell = {name: cell[name] for name in settings if name in cell}
            for name, result in cell.items():
                forwards = sum(row == "target" and stage in ("verify", "decode") for row, stage, *_ in result.timeline)
                taken[name].append((result.wall_clock_time * 1e3, result.ttft * 1e3, forwards,
                                    result.free_tokens_count, len(result.output_ids),
                                    cell["target_only"].wall_clock_time * 1e3, cell["target_only"].ttft * 1e3,
                                    result.window_drafts, result.preview_end and result.preview_end * 1e3))
            options.shown = cell[list(cell)[-1]]
            progress.step(f"{seq} {row['clip']}")
        head = replay_head(e, options, stream)
        if options.rows and stream:                          # after every stream: what is measured is kept
            replace_file(options.rows, (json.dumps([head, taken]) + "\n").encode())
    for path, write in ((options.timeline, draw_timeline), (options.trace, write_trace)):
        if path:
            write(options.shown, path)
    return replay_print(options, head, taken)


def read_rates(text: str) -> list[float]:
    try:
        rates = [float(p) for p in text.split(",") if p]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= p <= 1 for p in rates):
        raise InputError(f"--accept: wanted probabilities from 0 to 1 with commas between, got {text!r}; change it")
    return rates


def merged_replays(paths: list[Path]) -> tuple[dict, dict]:
    """(header, measured) of several shards of one replay."""
    whole, taken = None, collections.defaultdict(list)
    for path in paths:
        try:
            head, found = json.loads(path.read_text(encoding="utf-8"))
            for name, rows in found.items():
                for *numbers, preview_end in rows:
                    e2e, ttft, forwards, overlap, ids, base_e2e, base_ttft, window = map(float, numbers)
                    taken[name].append((e2e, ttft, forwards, overlap, ids, base_e2e, base_ttft, window,
                                        None if preview_end is None else float(preview_end)))
            sequences = head.pop("sequences")
        except UNREADABLE as error:
            raise InputError(f"{path}: not a shard of a replay ({describe(error)}); wants what --rows "
                             f"wrote") from None
        if whole is not None and {**whole, "sequences": 0} != {**head, "sequences": 0}:
            raise InputError(f"{path}: was replayed otherwise than {paths[0]}; merge shards of one run")
        whole = {**head, "sequences": sequences + (whole["sequences"] if whole else 0)}
    return whole, taken


def replay_print(options, head, taken) -> int:
    lines = replay_report(head, taken)
    print("\n".join(lines))
    if options.update_readme:
        update_readme(options.update_readme, lines)
    return 0


def replay_settings(others, rates, second: float, e, only: str | None) -> dict:
    """{name: (mode, source, row -> (ids, runners-up) that the drafter says)}, target_only first. Sources live as long
    as a stream. second: the share of a forced drafter's wrong ids whose runner-up is right, in their own settings."""
    apart = e.apart

    def taught(name, learns=True, made=None):
        source = made or engine.Memory(16)
        if source.recalls:
            source.attach(e.target)
            e.target.forget()
        source.name = name                                   # the gate judges each for itself
        for row in others:
            source.teach(row["target"])
        if not learns:
            source.learn = lambda answer: None
        return source

    def says(p, second=0.0):
        def of(row, rng):
            first = [i if rng.random() < p else (i + 1) % 32000 for i in row["target"]]
            return first, [i if rng.random() < second else (i + 2) % 32000 for i in row["target"]]
        return of

    made: dict[str, collections.abc.Callable[[], tuple]] = {"target_only": lambda: ("target_only", None, raw)}
    if not rates:
        made |= {"one shot, previous answer": lambda: ("prefill_then_verify", engine.Previous(), raw),
                 "memory, cold stream": lambda: ("speculative", engine.Memory(16), raw),
                 "memory, other sequences": lambda: ("speculative", taught("other sequences", learns=False), raw),
                 "memory, both": lambda: ("speculative", taught("both"), raw),
                 "blend, both": lambda: ("speculative", taught("blend", made=engine.Blend()), raw),
                 "recall, both": lambda: ("speculative", taught("recall", made=engine.Recalled()), raw)}
        if apart:                                            # there the drafter costs nothing, and is heard to its end
            made["blend-text, both"] = lambda: ("speculative", taught("blend-text", made=engine.BlendText()), raw)
    for p in rates:
        made[f"drafter right with {p}"] = functools.partial(lambda p: ("speculative", None, says(p)), p)
        if second:
            made[f"right with {p}, second {second}"] = functools.partial(
                lambda p: ("speculative", None, says(p, second)), p)
        if apart:                                            # blend alone, below, is what the drafter is worth beside
            made[f"blend-text, right with {p}"] = functools.partial(
                lambda p: ("speculative", taught("blend-text", made=engine.BlendText()), says(p)), p)
    if rates and apart:                                      # what stands behind the drafters above, without them
        e.target.forget()
        for row in others:
            e.target.remember(row["target"])
        made["recall, both"] = lambda: ("speculative", ToldLater(), raw)
        made["blend, both"] = lambda: ("speculative", taught("blend", made=engine.Blend()), raw)
    if not apart:
        made["drafter, raw"] = lambda: ("prefill_then_verify", None, raw)
        made["preview, raw"] = lambda: ("prefill_only", None, raw)
    return {name: make() for name, make in made.items()
            if name == "target_only" or only is None or any(word in name for word in only.split(","))}


class ToldLater(engine.Recalled):
    """Recalls what its target is told once all settings have given an answer."""

    def learn(self, answer):
        pass


def raw(row, rng) -> tuple[list[int], list[int]]:
    """What EventGPT said of this clip; its runners-up were not recorded."""
    return row["drafter"], []


def replay_head(e, options, sequences: int) -> dict:
    where = " and ".join(dict.fromkeys(torch.cuda.get_device_name(m.device) if m.on_gpu else "CPU" for m in e.models))
    kind = LABELS.get(options.kind, "checkpoints")
    return {"what": f"{kind} {dtype_of(e.target.decoder)}, drafter {dtype_of(e.drafter.decoder)}"
                    f"{' on a device of its own' if e.apart else ''}, {where}, torch {torch.__version__}, triton "
                    f"{triton.__version__}, commit {commit()}{', dirty' if dirty() else ''}, "
                    f"{time.strftime('%Y-%m-%d')}",
            "pairs": options.replay.name, "src": options.sources_src, "new": options.max_new_tokens,
            "gate": options.gate, "sequences": sequences}


def replay_report(head: dict, taken: dict) -> list[str]:
    """The table, from what was measured alone: (e2e ms, ttft ms, target forwards, overlap drafts, ids, e2e and ttft
    of target_only's run of the same answer, the drafts of the window, the preview's last id in ms) by setting."""
    lines = [f"replay, {head['what']}",
             f"{len(taken['target_only'])} recorded answers of {head['sequences']} sequences ({head['pairs']}, "
             f"{head['src']}), at most {head['new']} ids, gate {head['gate']}; from files to the last id, ms",
             f"{'drafts':26} {'answers':>7} {'p20':>7} {'p50':>7} {'p80':>7} {'ttft':>7} {'later':>20} "
             f"{'ratio to target_only':>24} {'p5':>6} {'ids/forward':>11} {'window':>6} {'overlap':>7} "
             f"{'preview':>7}"]
    for name, rows in taken.items():
        low, mid, high = quantiles([row[0] for row in rows])
        ratios = [row[5] / row[0] for row in rows]
        r, worst, later = interval(ratios), sorted(ratios)[int(0.05 * len(ratios))], interval(
            [row[1] - row[6] for row in rows])
        wait = f"{later['p50']:+.2f} [{later['low']:+.2f}, {later['high']:+.2f}]"
        per = sum(row[4] - 1 for row in rows) / sum(row[2] for row in rows)      # the first id comes with the prefill
        lines.append(f"{name:26} {len(rows):7} {low:7.1f} {mid:7.1f} {high:7.1f} "
                     f"{statistics.median(row[1] for row in rows):7.1f} {wait:>20} "
                     f"{r['p50']:7.3f} [{r['low']:.3f}, {r['high']:.3f}] {worst:6.3f} {per:11.2f} "
                     f"{statistics.median(row[7] for row in rows):6.0f} "
                     f"{statistics.median(row[3] for row in rows):7.0f} {fmt(median([row[8] for row in rows])):>7}")
    total = sum(map(len, taken.values()))
    return lines + [f"verdict  the recorded ids came out of all {total} requests; p5: 5 % of the ratios are below",
                    LEGEND.splitlines()[0],
                    "        later: ttft less target_only's, ms, paired by answer, median; preview: its last id;",
                    "        window, overlap: drafts before the last frame, before the prefill's end"]


# ---- peers -----------------------------------------------------------------------------------------------------


def peers_page(options) -> int:
    """transformers' Video-LLaVA beside ours, 7B shapes, one process, pixels and ids on the GPU, runs interleaved."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"--peers: transformers cannot be imported ({describe(error)}); pip install "
                         f"transformers into an environment of its own") from None
    if options.device.type != "cuda":
        raise InputError("--peers: compares 7B models on a GPU; run it where torch sees one")
    from weights.load import TARGET_7B
    e = engine.load_engine(None, "random-7b", device=options.device, cache_rows=2560)
    lines = [f"peers, RANDOM 7B WEIGHTS bf16, {torch.cuda.get_device_name(options.device)}, torch {torch.__version__}, "
             f"triton {triton.__version__}, transformers {transformers.__version__}, commit {commit()}, "
             f"{time.strftime('%Y-%m-%d')}",
             f"prompt of 2,076 rows with 8 frames, pixels on the GPU, {options.max_new_tokens} ids, milliseconds "
             f"[p20, p80]; x ours: paired by run",
             f"{'engine':38} {'vision + prefill':>24} {'x ours':>6} {'per id':>22} {'x ours':>6} {'all ids':>24} "
             f"{'x ours':>6}"]
    lines += peer_rows(e.target, peer_model(TARGET_7B, options.device), options.max_new_tokens)
    print("\n".join(lines))
    if options.update_readme:
        update_readme(options.update_readme, lines)
    return 0


def peer_model(config: dict, device):
    """transformers' model of our config's shapes, random weights in bf16 on the device (fp32 on a CPU)."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration
    text, vision = ({"model_type": kind, **config[part]} for part, kind in
                    (("text_config", "llama"), ("vision_config", "clip_vision_model")))
    kept = {k: v for k, v in config.items() if k not in ("text_config", "vision_config", "model_type", "pad_token_id")}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return VideoLlavaForConditionalGeneration(
                VideoLlavaConfig(text_config=text, vision_config=vision, **kept)).eval()
    finally:
        torch.set_default_dtype(previous)


def peer_rows(target, model, new: int, runs: int = 7) -> list[str]:
    """The table's rows: ours, then transformers with a dynamic and with a static, compiled cache."""
    device, visual = target.device, target.num_frames * (target.vision.P + 1)
    pixels = torch.randn(target.num_frames, 3, target.vision.image, target.vision.image, device=device)
    prompt = engine.Prompt([5] * 5, [5] * 15)
    ids = torch.tensor([[5] * 5 + [model.config.video_token_index] * visual + [5] * 15], device=device)
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                 pixel_values_videos=pixels[None].to(target.decoder.dtype))

    def ours(count):
        with torch.inference_mode(), target.on_stream():
            return whole(target, prompt, pixels, count)

    def theirs(count, **cache):
        with torch.inference_mode():
            out = model.generate(**given, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
                                 **cache)
            assert out.shape[1] == ids.shape[1] + count, f"peers: {out.shape[1] - ids.shape[1]} ids, wanted {count}"

    engines = {"headstart target_only": ours, "transformers, dynamic cache": theirs,
               "transformers, static cache, compiled": lambda count: theirs(count, cache_implementation="static")}
    taken = {name: [] for name in engines}
    for run in range(-2, runs):                              # two rounds to compile and warm up
        for name, call in engines.items():
            first, both = host_time(target, lambda c=call: c(1)), host_time(target, lambda c=call: c(new))
            if run >= 0:
                taken[name].append((first, (both - first) / (new - 1), both))
    rows, mine = [], taken["headstart target_only"]
    for name, times in taken.items():
        cells = []
        for column, own in zip(zip(*times, strict=True), zip(*mine, strict=True), strict=True):
            low, mid, high = quantiles(list(column))
            ratio = statistics.median(t / o for t, o in zip(column, own, strict=True))
            cells.append(f"{mid:8.2f} [{low:.2f}, {high:.2f}]".rjust(24 if len(cells) != 1 else 22) + f" {ratio:6.2f}")
        rows.append(f"{name:38} " + " ".join(cells))
    return rows


# ---- the step and the verify, at real shapes ------------------------------------------------------------------


def figures_page(options) -> int:
    """What one step, one verify and one prefill cost at 7B shapes, and whether their bits agree: one table."""
    if options.device.type != "cuda":
        raise InputError("--figures: measures 7B models on a GPU; run it where torch sees one")
    e = engine.load_engine("random-7b", "random-7b", device=options.device, cache_rows=4352, seed=0)
    target, drafter = e.target, e.drafter
    bandwidth, flops = read_tbps() * 1e12, gemm_tflops() * 1e12
    lines = [f"figures, RANDOM 7B WEIGHTS bf16, {torch.cuda.get_device_name(options.device)}, torch "
             f"{torch.__version__}, triton {triton.__version__}, commit {commit()}, {time.strftime('%Y-%m-%d')}",
             f"read {bandwidth / 1e12:.3f} TB/s, matrix {flops / 1e12:.0f} TFLOP/s, measured in this run",
             f"{'figure':58} {'p20':>8} {'p50':>8} {'p80':>8}"]

    def line(name, values, note=""):
        low, mid, high = quantiles(values)
        lines.append(f"{name:58} {low:8.3f} {mid:8.3f} {high:8.3f}  {note}")
        return mid

    with torch.inference_mode(), target.on_stream():
        fill_with_noise(target)
        target.prepare(0, 15, 31)
        one = {}
        for context in (256, 1024, 2100, 3072, 4000):
            moved = weight_bytes(target) + kv_bytes(target) * context
            mid = one[context] = line(f"step at context {context}, ms", step_times(target, 0, context))
            lines[-1] += (f"{moved / 1e9:.2f} GB, floor {moved / bandwidth * 1e3:.2f} ms, "
                          f"{moved / bandwidth * 1e3 / mid:.0%} of the bandwidth")
        for G in (15, 31):
            mid = line(f"verify of {G + 1} rows at context 2100, ms", step_times(target, G, 2100))
            lines[-1] += f"{mid / one[2100]:.3f} of a step"
        slope, floor = (one[4000] - one[256]) / 3744 * 1e6, kv_bytes(target) / bandwidth * 1e9
        lines.append(f"slope of the step over cache rows 256..4000: {slope:.1f} ns a row, keys and values at the "
                     f"measured bandwidth {floor:.1f} ns ({slope / floor - 1:+.0%})")
        prompt, pixels = engine.Prompt([5] * 5, [5] * 15), torch.randn(8, 3, 224, 224, device=options.device)
        line("vision + projector + prefill of 2,076 rows, ms", front_times(target, prompt, pixels))
        line("50 ids target_only, pixels on the GPU to ids on the host, ms",
             [host_time(target, lambda: whole(target, prompt, pixels, 50)) for _ in range(10)][2:])
    with torch.inference_mode(), drafter.on_stream():
        prompt, pixels = engine.Prompt([5] * 39, [5] * 20), torch.randn(5, 3, 336, 336, device=options.device)
        line("drafter, five event frames to the first draft id (641 rows), ms",
             front_times(drafter, prompt, pixels))
    with torch.inference_mode(), target.on_stream():
        for seed in range(3):
            worst = max(bits_differing(target, context, seed) for context in (1, 700, 2100, 4000))
            lines.append(f"bits that differ, logits and cache rows, 1..32 rows, contexts 1, 700, 2100, 4000, "
                         f"seed {seed}: {worst}")
        equal, total = forced_drafts(target, options.generations)
        lines.append(f"speculative = target_only, forced drafts of every accepted length 0..15, 128 ids: {equal} of "
                     f"{total} generations")
    print("\n".join(lines))
    if options.update_readme:
        update_readme(options.update_readme, lines)
    return int(equal < total)


def fill_with_noise(model) -> None:
    d = model.decoder
    for cache in (d.k_cache_LNMK, d.v_cache_LNMK):
        cache.normal_()


def at_context(model, context: int) -> None:
    """Puts the state where one id follows a prompt of `context` rows."""
    head = torch.tensor([1, 0, 0, context, -1, 10 ** 6, 0, 0, 7])
    model.state_W[:len(head)].copy_(head)


def step_times(model, G: int, context: int, runs: int = 30) -> list[float]:
    """Milliseconds of single replays with G drafts that never match, so each advances one row."""
    if G:
        model.draft_ids[G].fill_(-1)
    at_context(model, context)
    return device_times(model, lambda: model.step(G), runs)


def device_times(model, fn, runs: int = 20, between=None) -> list[float]:
    """Milliseconds of each call on the model's stream, by events, after three calls; each starts on an idle GPU.
    between: what the GPU does from one call to the next, untimed."""
    for _ in range(3):
        fn()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        if between:
            between()
        torch.cuda.synchronize(model.device)
        start.record(model.stream)
        fn()
        end.record(model.stream)
    torch.cuda.synchronize(model.device)
    return [start.elapsed_time(end) for start, end in events]


def front_times(model, prompt, pixels, decode: int = 49) -> list[float]:
    """Milliseconds of pixels to the first id in the rhythm of requests: `decode` steps lie between one and the next.

    One prefill right after another meets the card's power cap. With `nvidia-smi -lms 50` beside it on an H100: 51.8 ms
    at 700 W and 1,600 MHz (drafter 20.1), 46.3 after 49 steps at 1,965 MHz (18.8), 46.5 after 0.2 s of rest (18.9).
    """
    return device_times(model, lambda: front(model, prompt, pixels, decode + 1),
                        between=lambda: [model.step(0) for _ in range(decode)])


def host_time(model, fn) -> float:
    """Milliseconds from an idle device to an idle device."""
    wait = torch.cuda.synchronize if model.on_gpu else lambda device: None
    wait(model.device)
    start = time.perf_counter()
    fn()
    wait(model.device)
    return (time.perf_counter() - start) * 1e3


def front(model, prompt, pixels, new: int) -> None:
    model.prefill(model.splice(prompt, model.visual_rows(pixels)), new, -1, 5)


def whole(model, prompt, pixels, new: int) -> list[int]:
    front(model, prompt, pixels, new)
    for _ in range(new - 1):
        model.step(0)
    return model.snapshot(engine.STATE + new).read()


def bits_differing(model, context: int, seed: int) -> int:
    """Elements whose bits differ between 32 single rows and every forward of 1..32 of them: logits, keys, values."""
    d = model.decoder
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.randint(d.config.V, (32,), generator=generator, device=model.device)
    for cache in (d.k_cache_LNMK, d.v_cache_LNMK):
        cache.normal_(generator=generator)
    pos_ids = context + torch.arange(32, device=model.device)
    spans = [cache[:, :, context:context + 32] for cache in (d.k_cache_LNMK, d.v_cache_LNMK)]
    logits = torch.cat([d.forward(d.embed_VD[ids[i:i + 1]], pos_ids[i:i + 1]) for i in range(32)])
    kept, worst = [span.clone() for span in spans], 0
    for S in range(1, 33):
        for span in spans:
            span.fill_(1e4)                                  # loud, and seen if a row is not written before it is read
        again = d.forward(d.embed_VD[ids[:S]], pos_ids[:S])
        worst = max(worst, differing(again, logits[:S]),
                    *(differing(span[:, :, :S], one[:, :, :S]) for span, one in zip(spans, kept, strict=True)))
    return worst


def forced_drafts(model, generations: int, new: int = 128, rows: int = 700) -> tuple[int, int]:
    """(equal, total): answers from drafts that are right for 0..15 ids a round, against plain decode of the prompt."""
    equal = total = 0
    while total < generations:
        generator = torch.Generator(model.device).manual_seed(1000 + total)
        prompt_ids = torch.randint(model.config.V, (rows,), generator=generator, device=model.device)
        hidden_SD = model.decoder.embed_VD[prompt_ids]
        model.prefill(hidden_SD, new, -1, 5)
        for _ in range(new - 1):
            model.step(0)
        ids = model.snapshot(engine.STATE + new).read()[engine.STATE:]
        for right in range(16):
            model.prefill(hidden_SD, new, -1, 5)
            state = model.snapshot(engine.STATE + new).read()
            while not state[engine.DONE]:
                n = state[engine.N_OUT]
                drafts = (ids[n:n + 15] + [-1] * 15)[:15]
                if right < 15:
                    drafts[right] = -1
                model.draft_ids[15].copy_(to_device(torch.tensor(drafts), model.device))
                model.step(15)
                state = model.snapshot(engine.STATE + new).read()
            equal, total = equal + (state[engine.STATE:] == ids), total + 1
    return equal, total


# ---- main ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A wrong flag is one line, like every other bad input."""

    def error(self, message):
        raise InputError(f"{message}; python bench.py --help-all lists all flags")


SHORT = ("--eventgpt --videollava --weights --device --drafter-dtype --dataset-dir --max-samples --modes --repeats "
         "--draft-source --gate --rows --json --timeline --explain --merge --compare --sources --figures "
         "--replay").split()             # what --help shows


class ShortHelp(argparse.Action):
    """--help on one screen: the flags of SHORT."""

    def __call__(self, parser, namespace, values, option_string=None):
        for action in parser._actions:
            if not set(action.option_strings) & set(SHORT):
                action.help = argparse.SUPPRESS
        parser.description, parser.epilog = __doc__.split("\n\nPrints")[0], "--help-all names every flag."
        parser.print_help()
        parser.exit()


def parse(argv):
    return flags().parse_args(argv)


def flags() -> Parser:
    parser = Parser(prog="bench.py", description=__doc__, usage="python bench.py [FLAGS]", allow_abbrev=False,
                    add_help=False,
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                        prog, max_help_position=32, width=120))
    parser.add_argument("-h", "--help", action=ShortHelp, nargs=0, help="the flags needed most")
    parser.add_argument("--help-all", action="help", help="every flag")
    add = parser.add_argument_group("model").add_argument
    add("--eventgpt", metavar="DIR|ID", help="drafter (default: the embedded pair's)")
    add("--videollava", metavar="DIR|ID", help="target (default: the embedded pair's)")
    add("--weights", choices=("tiny", "random-7b"), help="both models at once; random-7b is for speed only")
    add("--tiny", action="store_true", help="the embedded pair on the CPU, also where there is a GPU")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json in place of the checkpoints'")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there)")
    add("--drafter-device", metavar="DEVICE", help="another device for the drafter")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--drafter-dtype", default="bf16", choices=("bf16", *BITS), metavar="NAME",
        help=f"the drafter's weights, packed at load: bf16 (default), {', '.join(BITS)}")
    add("--cache-rows", type=int, metavar="M", help="cache positions (default: what the model was trained for)")
    add("--eager", action="store_true", help="no CUDA graphs")
    add = parser.add_argument_group("data").add_argument
    add("--dataset-dir", type=Path, metavar="DIR", help="clips (default: the embedded ones)")
    add("--question", metavar="TEXT", help="ask this of every clip")
    add("--max-samples", type=int, default=-1, metavar="N", help="the first N, -1 all (default)")
    add("--frame-rule", default="uniform", choices=("uniform", "first"), help="which 8 video frames")
    add("--shard", metavar="I/N", help="every N-th sample from the I-th (default: torchrun's or SLURM's rank)")
    add = parser.add_argument_group("run").add_argument
    add("--modes", default=",".join(MODES), metavar="A,B", help="default: all five, see the README")
    add("--max-new-tokens", type=int, default=50, metavar="N", help="default %(default)s")
    add("--draft-len", type=int, default=5, metavar="G", help="drafts a round (default %(default)s)")
    add("--overlap-len", type=int, default=15, metavar="G", help="drafts of the head start (default %(default)s)")
    add("--draft-source", default="drafter", metavar="NAME",
        help=f"who drafts in speculative mode: drafter, {', '.join(engine.SOURCES)}:DIR; memory, blend and "
             f"blend-text keep a :FILE")
    add("--recall-len", type=int, metavar="N",
        help=f"ids of its earlier texts that the drafter checks a forward (default: {engine.RECALL_MOST} on a GPU, "
             f"else 0); 0: nor does the target beside a drafter on another device")
    add("--gate", default="on", choices=("on", "off"), help="draft only where it should pay (default %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="draw ids (default %(default)s: greedy)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest ids of this mass (default all)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws, for every sample (default %(default)s)")
    add("--warmup", type=int, default=1, metavar="N", help="rounds before measuring (default %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="of each mode and sample (default %(default)s)")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, help="fixed length (default with random weights)")
    add("--rows", type=Path, metavar="JSONL", help="append each finished sample; a shard puts its number in")
    add("--resume", action="store_true", help="go on with --rows: skip the samples it already holds")
    add("--profile", action="store_true", help="mark the measured runs for nsys with NVTX names")
    add("--debug", action="store_true", help="show tracebacks")
    add = parser.add_argument_group("report").add_argument
    add("--json", metavar="PATH", help="also write the JSON object there; - prints nothing else on stdout")
    add("--record", metavar="JSONL", help="write both models' answers and stage times, for --sources")
    add("--timeline", metavar="PNG", help="draw the last request measured (the last of --modes)")
    add("--trace", metavar="JSON", help="the same as a trace for ui.perfetto.dev")
    add("--update-readme", metavar="BLOCK", help="put this run's report into README.md")
    add = parser.add_argument_group("instead of measuring a pair").add_argument
    add("--merge", nargs="+", type=Path, metavar="JSONL", help="one report of the row files of all shards")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two saved runs, paired, with a verdict")
    add("--from-json", type=Path, metavar="PATH", help="print the report of a saved run")
    add("--from-text", type=Path, metavar="PATH", help="with --update-readme: take the block's text from a file")
    add("--explain", metavar="ID", help="one sample: drafts beside the target's verdicts and margins, last of --modes")
    add("--sources", type=Path, metavar="PAIRS", help="acceptance of draft sources on recorded answers; no models")
    add("--sources-src", default="test_tokens_1q", metavar="SRC",
        help="which rows of PAIRS (default %(default)s; headstart for what --record wrote)")
    add("--figures", action="store_true", help="step, verify, prefill and bit equality at 7B shapes (needs a GPU)")
    add("--peers", action="store_true", help="transformers' Video-LLaVA beside ours (needs transformers and a GPU)")
    add("--generations", type=int, default=208, metavar="N", help="of --figures' forced drafts (default %(default)s)")
    add("--replay", type=Path, metavar="PAIRS", help="7B compute that says recorded ids: speed at true acceptance")
    add("--accept", default="", metavar="LIST", help="of --replay: drafters that are right with these probabilities")
    add("--second", type=float, default=0.0, metavar="P", help="of --accept: where wrong, their runner-up is right so")
    add("--every", type=int, default=1, metavar="N", help="of --replay: time one-shot settings on every N-th answer")
    add("--only", metavar="WORDS", help="of --replay: settings whose names hold one of these comma-separated words")
    for name, kind in (("dataset_dir", Path), ("max_samples", int), ("max_new_tokens", int)):    # the research code's
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def check(options) -> None:
    """Turns flags into values, or names the first that cannot be one."""
    if options.question is not None and not engine.check_question(options.question).strip():
        raise InputError("--question: is empty; leave it out to ask what the data set asks")
    options.modes = [m for m in options.modes.split(",") if m]
    for mode in options.modes:
        if mode not in MODES:
            raise InputError(f"--modes: {mode!r} is not one of {', '.join(MODES)}; pick from these")
    if not options.modes:
        raise InputError(f"--modes: empty; pick from {', '.join(MODES)}")
    most = engine.STEP_ROWS - 1
    for name, low, high in (("max_new_tokens", 1, 1_000_000), ("repeats", 1, None), ("warmup", 0, None),
                            ("cache_rows", 1, None), ("max_samples", 1, None), ("every", 1, None),
                            ("draft_len", 0, most), ("overlap_len", 0, most),
                            ("recall_len", 0, engine.RECALL_MOST)):
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is None or (name == "max_samples" and value == -1):
            continue
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"{low}..{high}"
            either = " or -1 for all" if name == "max_samples" else ""
            raise InputError(f"{flag}: wanted {wanted}{either}, got {value}; change it")
    engine.check_sampling(options.temperature, options.top_p, options.seed, ("--temperature", "--top-p", "--seed"))
    if not options.temperature and (options.top_p < 1 or options.seed):
        raise InputError("--top-p, --seed: do nothing at temperature 0, which is greedy; pass --temperature as well")
    local, processes = (whole_number(os.environ.get(name, default), name) for name, default in
                        (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if options.device is None and local < torch.cuda.device_count():
        options.device = f"cuda:{local}"                     # torchrun: a GPU for each process
    if processes > 1:                                        # which it starts with one CPU thread each
        torch.set_num_threads(max(1, os.cpu_count() // processes))
    options.device = engine.pick_device(options.device)
    options.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[options.dtype]
    if options.tiny:
        options.weights, options.device = options.weights or "tiny", torch.device("cpu")
        if options.weights != "tiny":
            raise InputError("--tiny: is the embedded pair on the CPU; leave out --weights or --tiny")
    if options.weights and (options.eventgpt or options.videollava):
        raise InputError("--weights: names both models; leave out --eventgpt and --videollava, or --weights")
    kind = options.weights or ("checkpoint" if options.eventgpt or options.videollava else "tiny")
    if kind == "tiny" and not (TINY / "target").is_dir():
        raise InputError(f"{TINY}: the embedded pair is not here; clone the repository again, or pass --eventgpt "
                         f"and --videollava, or --weights random-7b")
    if kind != "checkpoint":
        options.eventgpt, options.videollava = (TINY / "drafter", TINY / "target") if kind == "tiny" else (kind, kind)
    if options.profile and options.device.type != "cuda":
        raise InputError("--profile: marks GPU work for nsys; run it on a GPU, or use --trace")
    options.kind = kind
    options.shard = read_shard(options.shard, os.environ)
    if options.record and not {"target_only", "drafter_only"} <= set(options.modes):
        raise InputError("--record: needs target_only and drafter_only among --modes; add them")
    if options.resume and not options.rows:
        raise InputError("--resume: has nothing to go on with; pass --rows as well")
    named = options.draft_source
    source, _, options.kept = named.partition(":")           # the file that --draft-source memory:FILE keeps
    if source == "adapter" or not options.kept:
        options.kept = None
    elif options.shard[1] > 1:
        raise InputError(f"{options.kept}: shards cannot share it; leave :FILE out of --draft-source, or --shard")
    elif options.videollava is None:
        raise InputError(f"{options.kept}: belongs to a target; pass --videollava")
    insist_writable(options.kept, "draft-source")
    options.source = None if named == "drafter" else LearnsOnce(engine.source_named(
        named, engine.model_name(options.videollava, options.tokenizer) if options.kept else ""))
    options.dataset_dir = options.dataset_dir or TINY / "clips"
    options.ignore_eos = kind == "random-7b" if options.ignore_eos is None else options.ignore_eos


def whole_number(text: str, name: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name}: wanted a whole number in the environment, got {text!r}; unset it")
    return int(text)


def read_shard(text: str | None, environ) -> tuple[int, int]:
    """(I, N) from a flag, or from torchrun's or SLURM's variables; (0, 1) without either. Shards never talk."""
    ranks = [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"),
             ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")]
    if text is None:
        text = next((f"{environ[i]}/{environ[n]}" for i, n in ranks if i in environ and n in environ), "0/1")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard: wanted I/N with I from 0 to N - 1, got {text!r}; number the shards from 0")
    return int(index), int(count)


def main(argv=None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")    # an answer may hold what the terminal cannot show
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        return run(parse(argv), ["bench.py", *(sys.argv[1:] if argv is None else argv)])
    except InputError as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:                                # before the first sample: nothing to show
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                                  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except torch.OutOfMemoryError as error:
        if debug:
            raise
        print(f"out of GPU memory: {str(error).splitlines()[0]}; lower --cache-rows, or use another --drafter-device",
              file=sys.stderr)
        return 2


def run(options, command) -> int:
    check_outputs(options)
    if options.from_json:
        try:
            report = json.loads(options.from_json.read_text(encoding="utf-8").splitlines()[-1])
            render(report)
        except UNREADABLE as error:
            raise InputError(f"{options.from_json}: not a saved run ({type(error).__name__}: {error}); wants what "
                             f"--json wrote") from None
        return publish(report, options)
    if options.from_text:
        try:
            lines = options.from_text.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{options.from_text}: cannot be read as text ({describe(error)}); pass what a run "
                             f"printed") from None
        update_readme(options.update_readme, lines)
        return 0
    if options.sources:
        return sources_page(options)
    check(options)
    if options.figures:
        return figures_page(options)
    if options.peers:
        return peers_page(options)
    if options.replay:
        return replay_page(options)
    if options.merge:
        return publish(merged(options.merge), options)
    if options.compare:
        return compare_runs(*options.compare)
    if options.explain:
        return explain_page(options)
    samples, skipped = read_dataset(options.dataset_dir, options.question, options.max_samples)
    listed, (shard, shards) = len(samples), options.shard
    samples = samples[shard::shards]
    if options.rows and shards > 1:                          # each shard its own file, whoever started it
        options.rows = options.rows.with_suffix(f".{shard:05}-of-{shards:05}{options.rows.suffix}")
    if options.rows:
        insist_new(options.rows, options.resume)
    memory, e = load_pair(options)
    drawn = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    drawn = {"sampling": drawn} if options.temperature else {}
    head = {"schema": SCHEMA, "commit": commit(), "dirty": dirty(), "memory": memory,
            "command": " ".join(map(str, command)), "time": time.strftime("%Y-%m-%d"), "seed": 0,
            "machine": machine(options.device), "weights": {"kind": options.kind, **{m.side: {
                "path": Path(m.path).name, "dtype": dtype_of(m.decoder), "bytes": all_bytes(m.decoder), **m.origin}
                for m in e.models}},
            "ceilings": {**ceilings(options.device), **{m.side: work_of(m) for m in e.models}},
            "config": {"modes": options.modes, "max_new_tokens": options.max_new_tokens,
                       "draft_len": options.draft_len, "overlap_len": options.overlap_len,
                       "draft_source": options.draft_source, "recall_len": e.drafter.recall_len if e.drafter else None,
                       "gate": options.gate, "ignore_eos": options.ignore_eos,
                       "frame_rule": options.frame_rule, "graphs": not options.eager, "warmup": options.warmup,
                       "repeats": options.repeats, "samples": listed,
                       "devices": places(e), **drawn}, "skipped": skipped}
    rows, interrupted = [], False
    with RowFile(options.rows, head, options.resume) as kept:
        rows += kept.rows
        if options.source is not None and options.source.recalls:
            options.source.attach(e.target)
        for row in rows if options.source is not None else []:              # remember them as if they had just run
            if "speculative" in row["modes"]:
                options.source.begin(row["question"])
                options.source.learn(row["modes"]["speculative"]["ids"])
                options.source.settle()
        done = {row["id"] for row in rows}
        try:
            measure(e, [sample for sample in samples if sample.id not in done], options, rows, kept.append)
        except KeyboardInterrupt:
            interrupted = True
    head["clocks_after"] = clocks(options.device)
    code = publish(assemble(head, rows, interrupted), options)
    if options.kept:                                         # last: a full disk must not cost the report
        options.source.source.save(options.kept)
    return code


def load_pair(options) -> tuple[dict, engine.Engine]:
    """The memory that both models need, shown before loading, which may take long or fail; and the engine."""
    place = dict(device=options.device, dtype=options.dtype, drafter_device=options.drafter_device,
                 cache_rows=options.cache_rows)
    memory = engine.memory_budget(options.eventgpt, options.videollava, drafter_dtype=options.drafter_dtype, **place)
    if sys.stderr.isatty():
        print(memory_line(memory), file=sys.stderr)
    return memory, engine.load_engine(
        options.eventgpt, options.videollava, draft_len=options.draft_len, overlap_len=options.overlap_len,
        tokenizer=options.tokenizer, graphs=not options.eager, gate=options.gate == "on",
        drafter_dtype=options.drafter_dtype, recall_len=options.recall_len,
        progress=Loading() if sys.stderr.isatty() else None, **place)


def places(e) -> dict:
    """{side: device}, without its number: shards of one run are alike wherever they ran."""
    return {m.side: m.device.type + (", its own" if e.apart and m is e.drafter else "") for m in e.models}


def assemble(head: dict, rows: list, interrupted: bool = False) -> dict:
    """The report of these rows: every figure is computed here, from the rows and the header alone."""
    identical, limits = compare(rows), dict(head["ceilings"])
    for side in [side for side in STAGES if side in limits]:
        prompts = [of["prompt_rows"][side] for row in rows for of in row["modes"].values() if side in of["prompt_rows"]]
        if prompts:
            limits[side] = at_rows(limits[side], round(statistics.median(prompts)))
        else:
            del limits[side]
    config = head["config"]
    figures = mode_figures(rows, config["modes"], identical["equal"] == identical["compared"])
    return {**head, "interrupted": interrupted, "ceilings": limits, "samples": rows, "modes": figures,
            "controls": controls(rows, config["overlap_len"]), "identical": identical,
            "warnings": warnings_of(figures, rows, head)}


def hand_over(lines, report, options) -> None:
    """Prints the lines and the JSON object, then writes what else was asked for."""
    if options.json != "-":
        print("\n".join(lines))
    print(json.dumps(report), flush=True)                    # first: what was measured is worth more than any file
    if options.json and options.json != "-":
        replace_file(options.json, json.dumps(report).encode() + b"\n")
    for path, write in ((options.timeline, draw_timeline), (options.trace, write_trace)):
        if path and getattr(options, "shown", None):
            write(options.shown, path)
    if options.update_readme:
        update_readme(options.update_readme, lines)


def publish(report, options) -> int:
    """Prints the report, writes what was asked for, and returns the exit code."""
    rows, identical, interrupted = report["samples"], report["identical"], report["interrupted"]
    lines = render(report)
    if interrupted:
        lines.append(f"interrupted after {len(rows)} of {report['config']['samples']} samples")
    hand_over(lines, report, options)
    if options.record:
        write_pairs(options.record, report)
    failed = identical["equal"] < identical["compared"] or report["skipped"] or any("error" in row for row in rows)
    return 130 if interrupted else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
