"""bench: a pair of models measured on clips, beside what the machine allows.

    python bench.py                                      the embedded trained pair on its held-out clips
    python bench.py --weights random-7b --device cuda    real 7B shapes, random numbers: speed only
    python bench.py --eventgpt DIR --videollava DIR --dataset-dir DIR --max-samples 10 --json out.json

Shows one question with its answer and its drafts, whether all answers are the target's own, and what drafting gained
on this machine; --details shows the rest. Every mode runs on every sample, in an order of its own each time, and its
ids are compared with target_only's: one difference and no ratio is printed. Then the clip is asked again, with lookup
of its answer (lookup_again). Ratios above 1 are faster. Exit codes: 0 all well, 1 outputs differ or a sample failed,
2 bad input, 130 interrupted."""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import engine  # first: it keeps torch quiet where numpy is absent

# isort: split
import torch
import triton
from tqdm import tqdm

import weights.rows
from engine import MODES
from kernels.check import ceilings, quantiles
from weights import InputError, controls, describe, replace_file, show
from weights.dataset import LIST, Sample, read_dataset
from weights.files import (
    OUTPUTS,
    Parser,
    becomes_file,
    command,
    in_flags,
    insist_apart,
    insist_whole,
    insist_writable,
    printable,
    quoted,
    rank,
    read_text,
    say,
    trusting,
)
from weights.memory import DRAFTER_DTYPES, PARTS, TINY, nvidia_smi
from weights.rows import RowFile, estimate, forwards, insist_sound, judged, median, merge, mode_figures, parting
from weights.shapes import PROMPT_ROWS
from weights.show import WIDTH, block, columns, fmt, shown
from weights.text import check_sampling

HERE = Path(__file__).resolve().parent
SCHEMA = 2
AGAIN = "lookup_again"               # a run like a mode: the clip asked again in `speculative`, with lookup
LABELS = {"tiny": "embedded trained toy pair", "random-7b": "RANDOM 7B WEIGHTS"}      # of weights, in every header
STAGES = {"drafter": ("load", "preprocess", "encode", "prefill", "draft"),
          "target": ("load", "preprocess", "encode", "prefill", "decode", "draft", "verify")}
CLOCKS = "gpu=clocks.sm,clocks.mem,power.draw,power.limit"           # of nvidia-smi
SAVED = {"json", "out", "record", "details", "debug"}        # flags that the report of saved runs knows
INSTEAD = {"from_json": SAVED, "merge": SAVED, "compare": {"debug"}, "explain": None}        # of measuring
UNEXPLAINED = {"rows", "resume", "record"}                   # flags that mean nothing where one answer is explained
PER_FORWARD = {"draft", "decode", "verify"}                  # stages with an entry for each forward
SHARED = {("target", "verify"), ("target", "draft")}         # those that a side's own mode does not have


# ---- the machine -----------------------------------------------------------------------------------------------


def git(*words) -> str:
    """What git says, or nothing if it is not there."""
    try:
        command = "git", "--no-optional-locks", *words       # a full disk must not leave its index locked
        return subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=HERE).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit() -> str | None:
    """The commit this runs from; GIT_COMMIT says it where there is no repository, or not the right one."""
    return os.environ.get("GIT_COMMIT") or git("rev-parse", "--short", "HEAD") or None


def dirty() -> bool | None:
    """Whether the tree differs from its commit; None where there is no git."""
    return bool(git("status", "--porcelain")) if git("rev-parse", "--git-dir") else None


def asked(device, what: str) -> str | None:
    """A line of nvidia-smi, such as "1980 MHz, 2619 MHz, 310.00 W" for its clocks; None without a GPU."""
    rows = nvidia_smi(device, f"--query-{what}") if device.type == "cuda" else []
    return ", ".join(rows[0]) if rows else None


def machine(device) -> dict:
    gpu = device.type == "cuda"
    users = nvidia_smi(device, "--query-compute-apps=pid") if gpu else []
    return {"gpu": torch.cuda.get_device_name(device) if gpu else None, "driver": asked(device, "gpu=driver_version"),
            "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
            "clocks": asked(device, CLOCKS), "others_on_gpu": sum(pid != str(os.getpid()) for pid, *_ in users)}


def work_of(model) -> dict:
    """What a step moves and a prefill computes, as factors of the prompt's rows (`at_rows` puts them in).

    Multiply and add count as two: every row through every layer, causal attention, the head for one row."""
    c, d = model.config, model.decoder
    products = [math.prod(layer[name].shape) for layer in d.steps.layers for name in ("qkv", "o", "gate_up", "down")]
    return {"weight_bytes": weight_bytes(model), "kv_bytes_per_row": kv_bytes(model),
            "flop_per_row": 2 * sum(products),
            "flop_per_row_pair": 2 * c.H * c.K * c.L, "flop_head": 2 * math.prod(d.head_VD.shape)}


def at_rows(work: dict, rows: int) -> dict:
    return work | {"prompt_rows": rows, "step_bytes": work["weight_bytes"] + work["kv_bytes_per_row"] * rows,
                   "prefill_flop": work["flop_per_row"] * rows + work["flop_per_row_pair"] * rows * (rows + 1)
                   + work["flop_head"]}


def weight_bytes(model) -> int:
    """Of the matrices that one decode step reads: every layer's and the head, not the embedding table."""
    steps = model.decoder.steps
    return sum(t.nbytes for t in [*(t for layer in steps.layers for t in layer.values()), steps.head_VD])


def kv_bytes(model) -> int:
    """Keys and values of one cache row."""
    c = model.config
    return 2 * c.L * c.N * c.K * model.decoder.k_cache_LNMK.element_size()


def dtype_of(decoder) -> str:
    full = str(decoder.dtype).removeprefix("torch.")
    return f"{full} with int4 weights" if decoder.steps.packed else full


def all_bytes(decoder) -> int:
    """Weights a model holds, towers included, packed or not; not the target's 4-bit copy."""
    return sum(t.nbytes for t in decoder.w.values())


# ---- the measured run ------------------------------------------------------------------------------------------


def run_sample(e, sample: Sample, mode: str, options) -> engine.Result:
    """One request, of which nothing is learnt: else a sample's second repeat would draft from its first. Where a clip
    is asked several questions, it is opened for the first of them."""
    files = {"event_image_path" if isinstance(sample.events, list) else "event_path": sample.events,
             "video_path": sample.video, "frame_rule": options.frame_rule}
    how = dict(mode="speculative" if mode == AGAIN else mode, max_new_tokens=options.max_new_tokens,
               ignore_eos=options.ignore_eos, temperature=options.temperature, top_p=options.top_p, seed=options.seed,
               draft_source="lookup" if mode == AGAIN else options.source if mode == "speculative" else None,
               remember=False)
    if not sample.several:
        return e.generate(query=sample.question, **files, **how)
    if not e.clip or options.clip[0] != files:
        close_clip(options)
        all_see = "prefill_only" if e.drafter and e.target else "target_only" if e.target else "drafter_only"
        options.clip = files, e.open(mode=all_see, **files)
    return options.clip[1].generate(sample.question, **how)


def close_clip(options) -> None:
    if getattr(options, "clip", None):
        options.clip[1].close()
    options.clip = None


def warm_up(e, samples, options) -> None:
    """Every mode on the first sample that can be run. A broken sample fails its own row later; three in a row point to
    the flags or the models, and the first reason is raised."""
    errors = []
    for sample in samples[:3]:
        try:
            for _ in range(options.warmup):
                for mode in options.modes:
                    run_sample(e, sample, mode, options)
            return close_clip(options)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def measure(e, samples, options, rows: list, keep) -> None:
    """Runs every mode on every sample and appends to `rows` as it goes; `keep` is called with each finished row.
    Repeats are interleaved, the modes of each in an order of its own: so what one mode leaves to the next, a clock or a
    cache, favours none. What a sample teaches is learnt when its repeats are done."""
    order, first = random.Random(options.seed), [mode for mode in options.modes if mode != AGAIN]
    warm_up(e, samples, options)
    for sample in progress(samples, "samples"):
        held = e.clip
        row = {"id": sample.id, "at": sample.at, "seq": sample.seq, "clip": sample.clip,
               "question": sample.question, "truth": sample.truth, "several": sample.several, "modes": {}}
        results = collections.defaultdict(list)
        try:
            for _ in range(options.repeats):
                for mode in order.sample(first, len(first)):
                    results[mode].append(run_sample(e, sample, mode, options))
            answer = next((of[-1].output_ids for mode, of in results.items() if mode != "drafter_only"), None)
            for source in learners(e, options) if answer else []:
                source.learn(answer)
            for _ in range(options.repeats if AGAIN in options.modes else 0):
                results[AGAIN].append(run_sample(e, sample, AGAIN, options))
            options.shown = results["speculative" if "speculative" in results else first[-1]][-1]
            if e.clip is not held:                           # opened for this question; another one finds it open
                row["open_ms"] = e.clip.opened.wall_clock_time * 1e3
            row["modes"] = {mode: summary(e, results[mode], results["target_only"]) for mode in options.modes}
        except Exception as error:                           # whatever it is, the other samples are worth having
            if options.debug:
                traceback.print_exception(error)
            row["error"] = told(error) if isinstance(error, InputError) else describe(error)
        rows.append(row)
        keep(row)
    close_clip(options)


def learners(e, options) -> list:
    """The sources that learn from answers."""
    return [of for of in (*options.source, *[e.lookup] * (AGAIN in options.modes)) if hasattr(of, "learn")]


def progress(items, unit: str):
    """The items, with the time left on stderr where somebody watches."""
    return tqdm(items, unit=f" {unit}", disable=None, leave=False)


def loading():
    """Bytes of a checkpoint read, and how fast, then steps of preparation, on stderr where somebody watches."""
    bars = {}

    def read(side: str, done: int, total: int) -> None:
        if side not in bars:
            unit = " steps" if side == "preparation" else "B"
            bars[side] = tqdm(desc=side, total=total, unit=unit, unit_scale=True, disable=None, leave=False)
        bars[side].update(done - bars[side].n)
        if done >= total:
            bars[side].close()
    return read


def summary(e, results, baseline) -> dict:
    """One sample's row for one mode: ids and text, medians, and every repeat's raw times."""
    last = results[-1]
    ms = {name: [None if r[field] is None else r[field] * 1e3 for r in results] for name, field in
          (("e2e_ms", "wall_clock_time"), ("ttft_ms", "ttft"), ("ttfp_ms", "ttfp"), ("tpot_ms", "tpot"))}
    each = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in results:
        per_request = {(side, stage): s * 1e3 for side, of in result.stages.items() for stage, s in of.items()}
        for row, stage, start, end, _, drafts in show.bars(result):
            if stage in PER_FORWARD:                                       # one entry a forward
                each[row][stage].append((end - start) * 1e3 / (max(1, len(drafts)) if stage == "draft" else 1))
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
            "accept_lens": last.accept_lens, "pieces": show.pieces(last, e.target.text) if decided else [],
            "forwards": forwards(last.output_ids, last.accepted_tokens, last.rounds) if decided else None,
            "by_source": last.by_source,
            "overlap_drafts": median([r.free_tokens_count for r in results]),
            "window_drafts": median([r.window_drafts for r in results]), "differs_at": differs_at,
            "identical": differs_at is None if apart else None,
            "prompt_rows": last.prompt_rows, "peak_memory": last.peak_memory, "drafter_error": last.drafter_error}


# ---- figures: all from the rows and the header alone -------------------------------------------------------------


def stage_rows(report) -> list:
    """(model, stage, p20, p50, p80, p50 with both at once, amount, unit, % of ceiling). A side's own mode measures it
    undisturbed, `prefill_only` beside the other, with nothing that holds either back."""
    def times(side, stage, modes):
        return [ms for row in report["samples"] for mode, of in row["modes"].items() if mode in modes
                for ms in of["stages_ms"].get(side, {}).get(stage, [])]

    table, limits = [], report["ceilings"]
    for side in [s for s in ("target", "drafter") if s in limits]:
        alone, work = "target_only" if side == "target" else "drafter_only", limits[side]
        for stage in STAGES[side]:
            values = times(side, stage, report["config"]["modes"] if (side, stage) in SHARED else [alone])
            if not values:
                continue
            low, mid, high = quantiles(values)
            amount = unit = share = None
            if stage in PER_FORWARD and (side, stage) != ("target", "draft"):
                amount, unit, share = work["step_bytes"] / 1e9, "GB", work["step_bytes"] / mid * 1e3 / limits["read_bw"]
            elif stage == "prefill" and not any(row.get("several") for row in report["samples"]):
                amount, unit = work["prefill_flop"] / 1e12, "TFLOP"
                share = work["prefill_flop"] / mid * 1e3 / limits["gemm_flops"]
            together = median(times(side, stage, ["prefill_only"]))
            table.append((side, stage, low, mid, high, together, amount, unit, share))
    return table


def warnings_of(rows, head) -> list:
    found, facts = [], head["machine"]
    if facts["others_on_gpu"]:
        found.append(f"{facts['others_on_gpu']} other processes use this GPU")
    if facts.get("load", 0) > 0.5 * facts["cores"]:
        found.append(f"the machine was busy before this run: {facts['load']:.1f} of {facts['cores']} cores")
    mhz = [int(text.split()[0]) for text in (facts.get("clocks"), head.get("clocks_after"))
           if text and text.split()[0].isdecimal()]
    if len(mhz) == 2 and abs(mhz[1] / mhz[0] - 1) > 0.05:
        found.append(f"the GPU's clock went from {mhz[0]} to {mhz[1]} MHz between start and end")
    return found + [f"{row['id']}, {mode}: the drafter gave up ({of['drafter_error']})" for row in rows
                    for mode, of in row["modes"].items() if of["drafter_error"]]


def assemble(head: dict, rows: list, interrupted: bool = False) -> dict:
    """The report of these rows."""
    rows = sorted(rows, key=lambda row: (row["at"], len(row["id"]), row["id"]))          # ID, ID#2, .. ID#10
    limits, config = dict(head["ceilings"]), head["config"]
    for side in [side for side in STAGES if side in limits]:
        prompts = [of["prompt_rows"][side] for row in rows for of in row["modes"].values() if side in of["prompt_rows"]]
        if prompts:
            limits[side] = at_rows(limits[side], round(statistics.median(prompts)))
        else:
            del limits[side]
    identical, answers = weights.rows.compare(rows), collections.defaultdict(list)
    for row in rows:
        if "target_only" in row["modes"]:
            answers[row["question"]].append(row["modes"]["target_only"]["ids"])
    figures = mode_figures(rows, config, identical["equal"] == identical["compared"])
    return {**head, "interrupted": interrupted, "ceilings": limits, "samples": rows, "modes": figures,
            "controls": controls.beside(answers.values(), config["overlap_len"], config["draft_len"]),
            "identical": identical, "warnings": warnings_of(rows, head)}


# ---- the report as text, from the JSON object alone --------------------------------------------------------------

MOST_LINES = 25                                              # of the screen
LEGEND = """legend   ttft: request in, files on disk, to the first answer id on the host; ttfp: the same for the preview
         tpot: (e2e - ttft) / (ids - 1); x target_only: its e2e over the mode's, paired by sample, median [95 %]
         later: first id after target_only's first id, paired by repeat
         forwards: the target's behind its prefill; a forward: ids that one makes, the first id left out
         accept: accepted / drafted, bonus not counted; window, overlap: ids the host had before the last frame was
         decoded, and before the target's prefill ended; both at once: while prefill_only runs"""


def screen(report, colour: bool = False) -> list[str]:
    """What a person wants to see first: one question, its answer and its drafts; are the answers the same; what did
    drafting gain."""
    config, kind, same, modes = (report[name] for name in ("config", "kind", "identical", "modes"))
    lines, rows = [], [row for row in report["samples"] if row["modes"]]
    if kind == "random-7b":
        lines.append(f"{LABELS[kind]}: times are real, texts and acceptance mean nothing")
    elif rows:
        row = next((row for row in rows if row["modes"].get("speculative", {}).get("drafted")), rows[0])
        of = row["modes"].get("speculative") or next(iter(row["modes"].values()))
        clips = "" if row.get("several") else f" of {config['samples']}"
        lines += block("question", f"{row['question']}   (clip {row['at'] + 1}{clips}, {row['id'][:8]})", 2)
        who = "events" if set(modes) == {"drafter_only"} else "video"
        lines += block(who, row["modes"].get("target_only", of)["text"], 3)
        if of["drafted"]:
            lines += block("events" if config["draft_source"] == "drafter" else "drafts", show.marked(*of["pieces"]), 4)
            lines.append(" " * 10 + show.marked(("accepted", "accepted"), ("rejected", " rejected"))
                         + ", the rest is the video model's own")
        elif "speculative" in modes:
            lines.append(f"events    no draft was looked at: {modes['speculative']['why_not']}")
    differ = same["equal"] < same["compared"]
    if of := weights.rows.per_question(rows):
        lines += block("questions", f"first id of a clip's first question after {fmt(of['first'])} ms "
                       f"({fmt(of['open'])} to read and prefill it), of a further one after {fmt(of['further'])} ms; "
                       f"times below begin with the question", 2)
    lines.append(f"answers   {same['equal']} of {same['compared']} identical to the video model alone"
                 + ": NO RATIO IS GIVEN" * differ if same["compared"] else
                 "answers   nothing was compared: it takes target_only and another mode that the target decides")
    lines += [f"differs   {d['id'][:40]}, {d['mode']}, at answer id {d['position']}" for d in same["differing"][:3]]
    table = [["mode", "ms", "ids in forwards", "a forward", "x target_only [95 %]", ""]]
    for mode, of in modes.items():
        taken = "-" if of["forwards"] is None else f"{of['tokens'] - len(rows)} in {of['forwards']}"
        table.append([mode, f"{of['e2e_ms']['p50']:.1f}", taken, fmt(of["ids_a_forward"], 2),
                      "withheld" if differ else shown(of["ratio"]), of["why_not"]])
    lines += [line[:WIDTH] for line in columns(table)] if modes else []
    if found := [f"{name} {of['ids_a_forward']:.2f}" for name, of in report["controls"].items() if of["ids_a_forward"]]:
        lines.append(f"controls  {', '.join(found)} ids a forward, and see no clip")
    if (own := modes.get("speculative", {}).get("by_source", {}).get("self")) and own["judged"]:
        pays = pays_from(own, modes_p50(report, "target_only", "tpot_ms"))
        lines.append(f"4-bit     self right with {own['right'] / own['judged']:.2f} of {own['judged']:,} drafts"
                     + (f"; pays from {pays:.2f}" if pays is not None else ""))
    lines += block("4-bit", report["copy_stays"], 2) if report.get("copy_stays") else []
    lines += block("verdict", verdict(report), 2)
    failed = [("failed", f"{row['id']}: {row['error']}") for row in report["samples"] if "error" in row]
    failed += [("skipped", problem) for problem in report["skipped"]]
    lines += [line for name, reason in failed[:2] for line in block(name, reason, 4)]
    lines += [f"          and {len(failed) - 2} more: --details shows all"] * (len(failed) > 2)
    if config["gate"] == "off":
        lines.append("gate      off: drafts are made whatever they cost; --gate on makes those that should pay")
    last = ["more      --details: stages, ceilings, warnings; --json FILE: raw values; --explain ID: one answer"]
    if kind == "tiny" and report["machine"]["gpu"]:
        last.append("next      the same at 7B shapes: python bench.py --weights random-7b")
    return show.painted(lines[:MOST_LINES - len(last)] + last, show.PAINT if colour else show.PLAIN)


def verdict(report) -> str:
    """One sentence on drafting, and one on lookup if the clips were asked again."""
    modes, p50 = report["modes"], {(side, stage): mid for side, stage, _, mid, *_ in stage_rows(report)}
    mode = next((m for m in ("speculative", "prefill_then_verify") if modes.get(m, {}).get("ratio")), None)
    if report["identical"]["equal"] < report["identical"]["compared"]:
        return "answers differ from those of the video model alone: nothing is said about speed"
    if mode is None:
        return "nothing to judge: it takes target_only and speculative"
    of, draft, step = modes[mode], p50.get(("drafter", "draft")), p50.get(("target", "decode"))
    found = judged(of["ratio"])
    said = {"faster": f"the same answers {of['ratio']['p50']:.2f} times as fast", "slower": "no gain on this machine",
            "no difference shown": "no gain shown on this machine"}.get(found, found)
    if not of["drafted"]:
        said += f": nothing was drafted, {of['why_not']}"
    elif found in ("slower", "no difference shown"):
        said += (f": a draft costs {draft / step:.1f} of a target step" if draft and step and report["config"][
            "draft_source"] == "drafter" else f": {of['accept_rate']:.0%} of the drafts are right")
    again = modes.get(AGAIN, {}).get("ratio")
    return said + (f"; asked again, with lookup: {again['p50']:.2f} times as fast" if again else "")


def memory_line(memory: dict) -> str:
    """What both sides allocate at most, beside what each device had free before they were loaded."""
    said = []
    for side, of in memory.items():
        held = {part: of[part] / 1e9 for part in PARTS if part in of}
        said.append(f"{side} {sum(held.values()):.3f} GB (" + ", ".join(f"{part} {gb:.3f}" for part, gb in held.items())
                    + f") of {of['free'] / 1e9:.1f} free on {of['device']}")
    rows = ",".join(str(of["rows"]) for of in memory.values() if "rows" in of)
    return f"memory   {' | '.join(said)}; --cache-rows {rows or 'as given'}, fewer need less"


def details(report) -> list[str]:
    """Everything else: header, ceilings, stages, times and drafts of every mode, controls, warnings, legend."""
    w, m, c = report["weights"], report["machine"], report["config"]
    f, target = report["ceilings"], report["ceilings"].get("target")
    floor = [target and target[name] / f[rate] * 1e3 for name, rate in (("step_bytes", "read_bw"),
                                                                        ("prefill_flop", "gemm_flops"))]
    sampling = "".join(f", {name} {value}" for name, value in c.get("sampling", {}).items())
    lines = [memory_line(report["memory"])] if "memory" in report else []
    lines += [f"weights  {LABELS.get(report['kind'], 'checkpoints')}"] + [
        f"         {side} {of['path']} {of['dtype']} {of['bytes'] / 1e9:.3f} GB, hash {of['hash']}, revision "
        f"{of['revision'] or '-'}" for side, of in w.items()]
    lines += [f"machine  {m['gpu'] or 'CPU, {threads} of {cores} cores'.format(**m)}, driver {m['driver'] or '-'}, "
              f"torch {m['torch']}, triton {m['triton']}, python {m['python']}",
              f"commit   {report['commit']}{', dirty' if report['dirty'] else ''}, {report['time']}",
              f"run      {report['command']}",
              f"         {c['samples']} samples x {c['repeats']} after {c['warmup']} warm-up, {c['max_new_tokens']} "
              f"new ids{', fixed length' if c['ignore_eos'] else ''}, draft_len {c['draft_len']}, gate {c['gate']}"
              f"{sampling}",
              f"ceiling  read {f['read_bw'] / 1e12:.3f} TB/s, matrix {f['gemm_flops'] / 1e12:.2f} TFLOP/s, measured "
              f"now; target step >= {fmt(floor[0], 3)} ms, prefill >= {fmt(floor[1], 2)} ms"]
    lines += columns([["stage, ms", "p20", "p50", "p80", "both at once", "moved", "of ceiling", ""], *(
        [f"{side} {stage}", *(f"{value:.3f}" for value in around), fmt(together, 3), f"{amount:.3f} {unit}" if amount
         else "", f"{share:.0%}" if share else "", ""]
        for side, stage, *around, together, amount, unit, share in stage_rows(report))])
    times = [["mode, ms", "e2e [p20, p80]", "ttft", "ttfp", "tpot", "x target_only", "later", ""]]
    drafts = [["drafts", "ids", "forwards", "a forward", "drafted", "accept", "a round", "window", "overlap",
               "accept_len: times"]]
    for mode, of in report["modes"].items():
        e2e = of["e2e_ms"]
        times.append([mode, f"{e2e['p50']:.1f} [{e2e['p20']:.1f}, {e2e['p80']:.1f}]",
                      *(fmt(of[name] and of[name]["p50"]) for name in ("ttft_ms", "ttfp_ms", "tpot_ms")),
                      shown(of["ratio"]), shown(of["later_ms"], "+.1f"), ""])
        drafts.append([mode, str(of["tokens"]), fmt(of["forwards"], 0), fmt(of["ids_a_forward"], 2), str(of["drafted"]),
                       fmt(of["accept_rate"], 2), fmt(of["tokens_per_round"], 2), fmt(of["window_drafts"], 0),
                       fmt(of["overlap_drafts"], 0),
                       of["why_not"] or "  ".join(f"{k}: {v}" for k, v in of["histogram"].items())])
    sources = [["who drafted", "rounds", "drafts", "right", "ids a round", "ms an id", "pays from", ""]]
    step = modes_p50(report, "target_only", "tpot_ms")
    for mode, of in report["modes"].items():
        for source, n in of["by_source"].items():
            sources.append([f"{mode}: {source}", str(n["rounds"]), str(n["drafts"]),
                            fmt(n["right"] / n["judged"] if n["judged"] else None, 2), fmt(n["ids"] / n["rounds"], 2),
                            fmt(n["ms"] / n["ids"], 2), fmt(pays_from(n, step), 2), ""])
    lines += columns(times) + columns(drafts) + columns(sources)
    lines += [f"differs  {d['id']}, {d['mode']}: first at answer id {d['position']}" for d in
              report["identical"]["differing"]]
    lines += [f"failed   {row['id']}: {row['error']}" for row in report["samples"] if "error" in row]
    lines += [f"skipped  {problem}" for problem in report["skipped"]]
    return lines + [f"warning  {warning}" for warning in report["warnings"]] + LEGEND.splitlines()


def pays_from(of: dict, step: float | None) -> float | None:
    """The share of right drafts from which one a round pays: what a source's round takes beyond a step of so many ms,
    over a step, for each draft."""
    return max(0.0, of["ms"] - of["rounds"] * step) / step / of["drafts"] if step and of["drafts"] else None


def modes_p50(report, mode: str, name: str) -> float | None:
    of = report["modes"].get(mode, {}).get(name)
    return of and of["p50"]


def read_report(path: Path, flag: str = "json", rows: list | None = None) -> dict:
    """What --json wrote, or these rows under the header at the path; InputError if they are no report."""
    other = "; --merge shows what --rows wrote" * (flag == "json")
    with trusting(path, "not a saved run", f"wants what --{flag} wrote{other}"):
        text = read_text(path, f"what --{flag} wrote", 1 << 32)
        report = json.loads(text if rows is None else text.split("\n", 1)[0])
        if (report["schema"], type(report["skipped"])) != (SCHEMA, list):
            raise ValueError(f"schema {quoted(report['schema'])}, wanted {SCHEMA} and a list of what was skipped")
        insist_sound(rows := report["samples"] if rows is None else rows, report["config"])
        report = assemble(report, rows, bool(report.get("interrupted")))         # figures follow from rows alone
        screen(report), details(report)
    return report


def merged(paths: list[Path]) -> dict:
    """One report of the row files of several shards."""
    command = f"python bench.py --merge of {len(paths)} row files"
    return {**read_report(paths[0], "rows", merge(paths)), "command": command}


def compare_runs(old_path: Path, new_path: Path) -> int:
    """Each mode's end-to-end time in two saved runs, paired by sample, with an interval and a verdict in words. Exit
    code 1: a sample is answered differently."""
    with trusting(f"{old_path}, {new_path}", "no two saved runs", "want what --json wrote"):
        old, new = read_report(old_path), read_report(new_path)
        before, after = ({row["id"]: row for row in run["samples"]} for run in (old, new))
        shared, changed = [i for i in before if i in after], set()
        lines = [f"compare  {old_path.name} with {new_path.name}, commits {old['commit']} with {new['commit']}, "
                 f"{len(shared)} shared samples; above 1 the new run is faster",
                 f"weights  {LABELS.get(new['kind'], 'checkpoints')} | {new['machine']['gpu'] or 'CPU'}"]
        if old["machine"]["gpu"] != new["machine"]["gpu"] or old["config"] != new["config"]:
            lines.append("warning  the two runs differ in machine or flags: a ratio across them says little")
        for mode in [m for m in old["modes"] if m in new["modes"]]:
            both = {i: (before[i]["modes"][mode], after[i]["modes"][mode]) for i in shared
                    if mode in before[i]["modes"] and mode in after[i]["modes"]}
            if ratio := estimate([one["e2e_ms"] / two["e2e_ms"] for one, two in both.values()]):
                lines.append(f"{mode:20} {shown(ratio, '.3f')}  {judged(ratio)}")
            changed |= {i for i, (one, two) in both.items() if mode != "drafter_only" and one["ids"] != two["ids"]}
    say("\n".join([*lines, f"outputs  {f'{len(changed)} samples answer differently' if changed else 'the same'}"]))
    return int(bool(changed))


# ---- one answer, id by id ----------------------------------------------------------------------------------------


def explain_page(options, samples) -> int:
    """One answer id by id, in the last of --modes: what was drafted, what the target said there, by which margin over
    which runner-up. The sample is named by its id or by how that begins."""
    found = [s for s in samples if s.id == options.explain] or [s for s in samples if s.id.startswith(options.explain)]
    if len(found) != 1:
        raise InputError(f"--explain: {options.explain!r} names {len(found)} of the {len(samples)} samples in "
                         f"{options.dataset_dir}; pass one id, such as {samples[0].id}")
    sample, (_, e), mode = found[0], load_pair(options, found), [mode for mode in options.modes if mode != AGAIN][-1]
    for _ in range(options.warmup):
        run_sample(e, sample, mode, options)
    alone, result = (run_sample(e, sample, name, options) for name in ("target_only", mode))
    model = e.drafter if mode == "drafter_only" else e.target
    verdicts = engine.explain(model, result)
    differs_at = None if model is e.drafter else parting(result.output_ids, alone.output_ids)
    lines = [f"explain  {LABELS.get(options.kind, 'checkpoints')} | {sample.id} | {sample.question}",
             *show.explained(result, verdicts, model.text.token)]
    if result.drafter_error:
        lines.append(f"warning  the drafter gave up ({result.drafter_error})")
    if model is e.target:
        lines.append("verdict  the ids are target_only's" if differs_at is None else
                     f"verdict  DIFFERENT from target_only, first at answer id {differs_at}")
    options.shown = result
    hand_over(show.painted(lines, show.PAINT if show.colourful() else dict.fromkeys(range(1, 5))),
              {"schema": SCHEMA, "commit": commit(), "weights": options.kind, "id": sample.id, "mode": mode,
               "question": sample.question, "ids": result.output_ids, "target_only_ids": alone.output_ids,
               "verdicts": [of._asdict() for of in verdicts]}, options)
    return int(differs_at is not None)


# ---- main ------------------------------------------------------------------------------------------------------


def cache_rows(text: str):
    """A type of argparse: rows of both caches, or of the target's and the drafter's."""
    if not re.fullmatch(" *[0-9]{1,18} *(, *[0-9]{1,18} *)?", text):
        raise argparse.ArgumentTypeError(f"wanted one number or two, as 2304 or 2304,832, got {text!r}; change it")
    found = tuple(map(int, text.split(",")))
    return found[0] if len(found) == 1 else found


def make_parser() -> Parser:
    parser = Parser(prog="bench.py", description=__doc__, usage="python bench.py [FLAGS]", allow_abbrev=False,
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                        prog, max_help_position=30, width=110))
    add = parser.add_argument_group("model").add_argument
    add("--eventgpt", metavar="DIR|ID", help="drafter (default: the embedded pair's)")
    add("--videollava", metavar="DIR|ID", help="target (default: the embedded pair's)")
    add("--weights", choices=("tiny", "random-7b"), help="both models at once; random-7b is for speed only")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json in place of the checkpoints'")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there)")
    add("--drafter-device", metavar="DEVICE", help="another device for the drafter")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--drafter-dtype", default="bf16", choices=DRAFTER_DTYPES, metavar="NAME",
        help="the drafter's weights: bf16 (default), or int4, packed at load")
    add("--cache-rows", type=cache_rows, metavar="T[,D]", help="cache positions of target and drafter (default: a "
        "clip's, the longest question's and --max-new-tokens)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset-dir", type=Path, metavar="DIR", help="clips (default: the embedded ones)")
    add("--question", metavar="TEXT", help="ask this of every clip")
    add("--questions", type=Path, metavar="FILE", help="ask each line of this file, of each clip, read once")
    add("--max-samples", type=int, default=-1, metavar="N", help="the first N, -1 all (default)")
    add("--frame-rule", default="uniform", choices=("uniform", "first"), help="which 8 video frames")
    add("--shard", metavar="I/N", help="every N-th sample from the I-th (default: torchrun's, SLURM's or MPI's rank); "
        "its number goes into the names of all files that it writes")
    add = parser.add_argument_group("run").add_argument
    add("--modes", default=",".join((*MODES, AGAIN)), metavar="A,B", help="default: %(default)s")
    add("--max-new-tokens", type=int, default=50, metavar="N", help="default %(default)s")
    add("--draft-len", type=int, default=5, metavar="G", help="drafts a round (default %(default)s)")
    add("--overlap-len", type=int, default=15, metavar="G", help="drafts of the head start (%(default)s)")
    add("--draft-source", metavar="NAME,..", help="who drafts in `speculative`, asked in this order: drafter, "
        "self, lookup[:FILE], adapter:DIR (default: on a GPU lookup, drafter and self, as far as they are there and "
        "fit; on a CPU and for the embedded pair drafter)")
    add("--gate", choices=("on", "off"), help="draft only where it should pay (default: on; off for the embedded pair)")
    add("--temperature", type=float, default=0.0, metavar="T", help="draw ids (default %(default)s: greedy)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest ids of this mass (default all)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws, for every sample (default %(default)s)")
    add("--warmup", type=int, default=1, metavar="N", help="rounds before measuring (default %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="of each mode and sample (default %(default)s)")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, help="fixed length (default with random weights)")
    add("--rows", type=Path, metavar="JSONL", help="append each finished sample")
    add("--resume", action="store_true", help="go on with --rows: skip the samples that it holds, but for failed ones")
    add("--debug", action="store_true", help="show tracebacks")
    add = parser.add_argument_group("report").add_argument
    add("--details", action="store_true", help="stages, ceilings, all modes, controls, warnings, legend")
    add("--json", metavar="PATH", help="write every raw value there; -: to stdout, and nothing else")
    add("--out", metavar="FILE", help="write what is printed there too, when all is done")
    add("--record", metavar="JSONL", help="write both models' answers, for tests/sources.py and tests/replay.py")
    add("--timeline", metavar="PNG", help="draw the last request in `speculative`, or in the last of --modes")
    add = parser.add_argument_group("instead of measuring").add_argument
    add("--explain", metavar="ID", help="one sample id by id: drafts, the target's ids and margins, last of --modes")
    add("--merge", nargs="+", type=Path, metavar="JSONL", help="one report of the row files of all shards")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two saved runs, paired, with a verdict")
    add("--from-json", type=Path, metavar="PATH", help="print the report of a saved run")
    return parser


def parse(argv):
    return make_parser().parse_args(argv)


def told(error: InputError) -> str:
    """Its line in the words of this command."""
    return in_flags(error, make_parser(), query="--question", mode="--modes")


def check(options) -> None:
    """Turns flags into values, or names the first that cannot be one."""
    def insist(holds, line: str) -> None:
        if not holds:
            raise InputError(line)

    most = engine.STEP_ROWS - 1
    for name, low, high in (("max_samples", -1, math.inf), ("max_new_tokens", 1, 1_000_000), ("draft_len", 0, most),
                            ("overlap_len", 0, most), ("warmup", 0, 1_000_000), ("repeats", 1, 1_000_000)):
        insist_whole(name, getattr(options, name), low, high)
    insist(options.max_samples, "--max-samples: wanted 1 or more, or -1 for all, got 0; change it")
    insist(options.question is None or options.question.strip(),
           "--question: is empty; leave it out to ask what the data set asks")
    if options.questions:
        insist(options.question is None, "--questions: cannot stand beside --question; pass one of them")
        text = read_text(options.questions, "a question a line", 1 << 20)
        insist(not re.match(r'\s*[\[{]\s*["{]', text), f"{options.questions}: is JSON; write a bare question a line")
        options.question = [line.strip() for line in text.split("\n") if line.strip()]
        insist(options.question, f"{options.questions}: holds no question; write one a line")
    for question in options.question if options.questions else [options.question or ""]:
        try:
            engine.check_question(question)
        except InputError as error:
            raise InputError(f"{options.questions or 'query'}: {str(error).partition(': ')[2]}") from None
    options.modes = list(dict.fromkeys(m.strip() for m in options.modes.split(",") if m.strip()))
    insist(set(options.modes) <= {*MODES, AGAIN} and set(options.modes) & set(MODES),
           f"--modes: {','.join(options.modes)!r} is none of {', '.join(MODES)} (and {AGAIN}); pick from these")
    check_sampling(options.temperature, options.top_p, options.seed, ("--temperature", "--top-p", "--seed"))
    insist(options.temperature or options.top_p == 1 and not options.seed,
           "--top-p, --seed: do nothing at temperature 0, which is greedy; pass --temperature as well")
    local, processes = (os.environ.get(*of) for of in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    insist(rank(local) is not None and rank(processes) is not None,
           "LOCAL_RANK, LOCAL_WORLD_SIZE: wanted whole numbers in the environment; unset them")
    if options.device is None and int(local) < torch.cuda.device_count():
        options.device = f"cuda:{local}"                     # torchrun: a GPU for each process
    if int(processes) > 1:                                   # which it starts with one CPU thread each
        torch.set_num_threads(max(1, os.cpu_count() // int(processes)))
    options.device, options.dtype = engine.pick_device(options.device), engine.as_dtype(options.dtype)
    insist(not options.weights or not (options.eventgpt or options.videollava),
           "--weights: names both models; leave out --eventgpt and --videollava, or --weights")
    options.kind = options.weights or ("checkpoint" if options.eventgpt or options.videollava else "tiny")
    if options.kind == "tiny":
        options.eventgpt, options.videollava = TINY / "drafter", TINY / "target"
        insist(options.videollava.is_dir(), f"{TINY}: the embedded pair is not here; clone the repository again, or "
                                            f"pass --eventgpt and --videollava, or --weights random-7b")
    elif options.kind == "random-7b":
        options.eventgpt = options.videollava = options.kind
    options.gate = options.gate or ("off" if options.kind == "tiny" else "on")
    options.shard = read_shard(options.shard, os.environ)
    insist(not options.record or {"target_only", "drafter_only"} <= set(options.modes),
           "--record: needs target_only and drafter_only among --modes; add them")
    insist(options.rows or not options.resume, "--resume: has nothing to go on with; pass --rows as well")
    named = [name.strip() for name in (options.draft_source or sources_there(options)).split(",")]
    options.self_draft = "self" in named and (True if options.draft_source else None)        # None: if it can be
    options.draft_source = ",".join(named)
    kept = [name.partition(":")[2] for name in named if name.startswith("lookup:")]
    insist(len(kept) < 2, f"--draft-source: names {len(kept)} files of earlier answers, one is kept; take one")
    options.kept = "".join(kept)
    insist(not options.kept or options.shard[1] == 1 and options.videollava,
           f"{options.kept}: belongs to one run of one target; leave :FILE out of --draft-source, or --shard, and pass "
           f"--videollava")
    insist_writable(options.kept, "draft-source")
    options.model = engine.model_name(options.videollava, options.tokenizer) if options.kept else ""
    options.source = [engine.source_named(name, options.model) for name in named]
    options.known = sum(of.learnt for of in options.source if isinstance(of, engine.Lookup))
    options.dataset_dir = options.dataset_dir or TINY / "clips"
    options.ignore_eos = options.kind == "random-7b" if options.ignore_eos is None else options.ignore_eos


def sources_there(options) -> str:
    """Who drafts if nobody says: all there is, since the gate leaves what does not pay; on a CPU and in the embedded
    pair a 4-bit copy never does."""
    if options.kind == "tiny" or options.device.type == "cpu" or not options.videollava:
        return "drafter"
    return "lookup,drafter,self" if options.eventgpt else "lookup,self"


def insist_used(options) -> str | None:
    """What is done instead of measuring. InputError for another flag that would then do nothing."""
    default = make_parser().get_default
    given = [name for name, value in vars(options).items() if value != default(name)]
    asked = next((name for name in INSTEAD if name in given), None)
    for name in given if asked else ():
        if name != asked and name not in (INSTEAD[asked] or vars(options).keys() - UNEXPLAINED):
            raise InputError(f"`{name}`: does nothing beside `{asked}`; leave it out")
    return asked


def read_shard(text: str | None, environ) -> tuple[int, int]:
    """(I, N) from a flag, or from a launcher's variables; (0, 1) without either. Shards never talk. A plain process of
    a batch script is no task of SLURM's, however many the script asked for. An array counts from 0 without gaps, or
    all its tasks are refused: some that run would leave out samples."""
    where, ranks = "--shard", [
        ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("PMI_RANK", "PMI_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")]
    if text is None:
        found = [("", "0/1"), *((f"{i}, {n}", f"{environ[i]}/{environ[n]}") for i, n in ranks if i in environ
                                and n in environ)]
        where, text = next((of for of in found if not of[1].endswith("/1")), found[-1])      # srun in an array's task
    index, _, count = text.partition("/")
    for of in (index, environ.get("SLURM_ARRAY_TASK_MAX", index) if "ARRAY" in where else index):
        if rank(of) is None or rank(count) is None or rank(of) >= rank(count):
            raise InputError(f"{where}: wanted I/N with I from 0 to N - 1, got {quoted(text.replace(index, of, 1))}; "
                             "number the shards from 0" + ", or unset these variables" * (where != "--shard"))
    return rank(index), rank(count)


def speaks() -> bool:
    """Of torchrun's processes one does; where the environment says nonsense, all."""
    mine, count = (rank(os.environ.get(*of)) for of in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return not (mine and count and mine < count)


@command
def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        return run(parse(argv), shlex.join(["python", "bench.py", *words]))
    except InputError as error:
        if not speaks():
            return 2
        raise InputError(told(error)) from None


def run(options, command: str) -> int:
    listed, skipped, instead = [], [], insist_used(options)
    if instead in (None, "explain"):
        check(options)
        listed, skipped = read_dataset(options.dataset_dir, options.question, options.max_samples)
        shard, shards = options.shard
        if shards > len(listed):
            raise InputError(f"--shard: {shards} shards of {len(listed)} samples; take at most as many")
        for flag in OUTPUTS if shards > 1 else ():           # each shard its own files, whoever started it
            if becomes_file(getattr(options, flag)):
                path = Path(getattr(options, flag))
                setattr(options, flag, path.with_suffix(f".{shard:05}-of-{shards:05}{path.suffix}"))
    own = [options.dataset_dir / name for name in (LIST, "event_npy", "event_image", "mp4")] if listed else []
    insist_apart(options, dataset_dir=own)
    if options.from_json:
        return publish(read_report(options.from_json), options)
    if options.merge:
        return publish(merged(options.merge), options)
    if options.compare:
        return compare_runs(*options.compare)
    if instead:
        return explain_page(options, listed)
    if options.rows and os.path.isfile(options.rows) and not options.resume:
        raise InputError(f"{options.rows}: is already there; pass --resume to go on with it, or choose another --rows")
    head, e = set_up(options, command, listed, skipped)
    interrupted = False
    with RowFile(options.rows, head) as kept:
        if kept.rows:                                        # a damaged one must not cost the report at the end
            read_report(options.rows, "rows", kept.rows)
        rows, done = list(kept.rows), {row["id"] for row in kept.rows}
        left = [sample for sample in listed[shard::shards] if sample.id not in done]
        for row, source in ((row, source) for row in rows for source in learners(e, options)):
            answer = next((of["ids"] for mode, of in row["modes"].items() if mode != "drafter_only"), None)
            source.begin(row["question"])                    # as if it had just run
            source.learn(answer or [])
        try:
            measure(e, left, options, rows, kept.append)
        except KeyboardInterrupt:
            interrupted = True
    head |= {"clocks_after": asked(options.device, CLOCKS), "copy_stays": e.copy_stays}
    with contextlib.ExitStack() as last:                     # a full disk must not cost the report, nor the other way
        last.callback(save_answers, options)
        return publish(assemble(head, rows, interrupted), options,
                       f"resume    nothing was left to do: {options.rows} holds all {len(rows)} samples" * (not left))


def save_answers(options) -> None:
    """What the run has learnt, beside what another run put there meanwhile."""
    if options.kept:
        own = next(of for of in options.source if isinstance(of, engine.Lookup))
        there = engine.source_named(f"lookup:{options.kept}", options.model)
        for answer in own.newest(own.learnt - options.known):
            there.learn(answer)
        there.save(options.kept)


def set_up(options, command: str, listed, skipped) -> tuple[dict, engine.Engine]:
    """The part of the report that is known before the first sample, and the engine."""
    def digest(*parts) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    memory, e = load_pair(options, listed)
    drawn = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    config = {name: getattr(options, name) for name in (
        "modes", "max_new_tokens", "draft_len", "overlap_len", "draft_source", "gate", "ignore_eos", "frame_rule",
        "warmup", "repeats")} | ({"sampling": drawn} if options.temperature else {})
    config |= {"samples": len(listed), "dataset": digest(*((sample.id, sample.seq, sample.clip) for sample in listed)),
               "question": options.question or f"the data set's, {digest(*(sample.question for sample in listed))}",
               "tokenizer": digest(*(Path(m.text.path).read_text(encoding="utf-8") for m in e.models)),
               # without a device's number: shards of one run are alike wherever they ran
               "devices": {m.side: m.device.type + ", its own" * (e.apart and m is e.drafter) for m in e.models}}
    return {"schema": SCHEMA, "commit": commit(), "dirty": dirty(), "memory": memory, "kind": options.kind,
            "command": command, "time": time.strftime("%Y-%m-%d"), "seed": 0, "machine": machine(options.device),
            "weights": {m.side: {"path": Path(m.path).name, "dtype": dtype_of(m.decoder), "bytes": all_bytes(m.decoder),
                                 "stops": list(m.stops), **m.origin} for m in e.models},
            "ceilings": {**ceilings(options.device), **{m.side: work_of(m) for m in e.models}},
            "config": config, "skipped": skipped}, e


def load_pair(options, samples) -> tuple[dict, engine.Engine]:
    """The memory that both models need, by headers alone, and the engine, whose caches have room for the samples."""
    asked = max((len(sample.question.encode(errors="replace")) for sample in samples), default=0)    # an id: 1 byte up
    shown = max((len(sample.events) for sample in samples if isinstance(sample.events, list)), default=0)
    place = dict(device=options.device, drafter_device=options.drafter_device, dtype=options.dtype,
                 cache_rows=options.cache_rows, drafter_dtype=options.drafter_dtype,
                 self_draft=options.self_draft, text_rows=PROMPT_ROWS + max(0, asked - 100) + max(
                     0, shown - 5) + options.max_new_tokens)
    memory = engine.memory_budget(options.eventgpt, options.videollava, **place)
    e = engine.load_engine(
        options.eventgpt, options.videollava, draft_len=options.draft_len, overlap_len=options.overlap_len,
        tokenizer=options.tokenizer, gate=options.gate == "on", progress=loading(), **place)
    if "self" in options.source and e.target and not e.target.copy:          # the log has said why
        options.source.remove("self")
        options.draft_source = options.draft_source.removesuffix(",self")
    return memory, e


def publish(report, options, remark: str = "") -> int:
    """Shows the report, writes what was asked for, and returns the exit code."""
    rows, identical, interrupted = report["samples"], report["identical"], report["interrupted"]
    lines = [*screen(report, show.colourful()), *[remark] * bool(remark)]
    lines += map(printable, details(report)) if options.details else []
    if interrupted:
        lines.append(f"interrupted after {len(rows)} of {report['config']['samples']} samples")
    if options.timeline and not getattr(options, "shown", None):
        lines.append(f"timeline  no request was finished here: {options.timeline} is not drawn")
    hand_over(lines, report, options)
    failed = identical["equal"] < identical["compared"] or report["skipped"] or any("error" in row for row in rows)
    return 130 if interrupted else int(bool(failed))


def write_pairs(path: str, report: dict) -> None:
    """Both models' own answers of every sample, one JSON object a line, in the schema of the recorded pairs that
    tests/sources.py and tests/replay.py read."""
    sides = ("eventgpt", "drafter", "drafter_only"), ("videollava", "target", "target_only")
    lines = [json.dumps({
        "src": "headstart", "seq": row["seq"], "clip": row["clip"], "uuid": row["id"], "question": row["question"],
        "target_input": f"video8_{report['config']['frame_rule']}", "commit": report["commit"],
        "max_new_tokens": report["config"]["max_new_tokens"],
        **{f"{name}_{key}": row["modes"][mode][key] for name, _, mode in sides for key in ("text", "ids")},
        **{f"{name}_stops": report["weights"].get(side, {}).get("stops", [2]) for name, side, _ in sides}})
        for row in report["samples"] if {"target_only", "drafter_only"} <= row["modes"].keys()]
    replace_file(path, "".join(line + "\n" for line in lines).encode())


def hand_over(lines, report, options) -> None:
    """Prints the lines, or the JSON object alone, then writes what else was asked for. One that cannot be had, by a
    full disk or a closed pipe, costs none of the others."""
    with contextlib.ExitStack() as left:                     # the last one first, each whatever became of those before
        if options.timeline and getattr(options, "shown", None):
            left.callback(show.draw, options.shown, options.timeline)
        if options.record:
            left.callback(write_pairs, options.record, report)
        if options.out:
            left.callback(replace_file, options.out, ("\n".join(lines) + "\n").encode())
        if options.json and options.json != "-":
            left.callback(replace_file, options.json, json.dumps(report).encode() + b"\n")
        if options.json == "-" or speaks():
            left.callback(print, json.dumps(report) if options.json == "-" else "\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
