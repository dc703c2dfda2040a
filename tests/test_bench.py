"""The benchmark: figures one can recompute, a screen one can read, runs that resume and merge, refusals in one line."""

import copy
import fcntl
import json
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import bench
import engine
import weights.given
import weights.load
from bench import AGAIN, TINY
from engine import MODES, InputError
from weights import show
from weights.rows import estimate, forwards, judged, mode_figures, per_forward, per_question, why_not

ROOT = Path(__file__).resolve().parents[1]
CLIPS = TINY / "clips"
QUICK = ["--gate", "off", "--max-samples", "2", "--repeats", "2", "--warmup", "0", "--max-new-tokens", "24",
         "--device", "cpu"]
SHORT = [*QUICK, "--modes", "target_only", "--max-samples", "1", "--repeats", "1", "--max-new-tokens", "2"]


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda device: {"read_bw": 1e10, "gemm_flops": 1e11})


@pytest.fixture(scope="module")
def run(tmp_path_factory, user_env):
    """(exit code, printed lines, report) of one short run."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    done = subprocess.run([sys.executable, "bench.py", *QUICK, "--details", "--json", str(path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=200, env=user_env)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines(), json.loads(path.read_text())


def report_of(*flags, code=0) -> dict:
    """The report of a run in this process."""
    path = Path(os.environ["PYTEST_TMP"]) / "report.json"
    assert bench.main([*flags, "--json", str(path)]) == code
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("report")))


# ---- figures, from rows made by hand


def made(ids, e2e, ttft=(10.0,), accept_lens=(), drafted=0, **more):
    """One sample's row for one mode; e2e and ttft are the repeats' milliseconds."""
    raw = {"e2e_ms": list(e2e), "ttft_ms": list(ttft), "ttfp_ms": [None] * len(e2e),
           "tpot_ms": [(a - b) / (len(ids) - 1) for a, b in zip(e2e, ttft, strict=False)] if len(ids) > 1 else []}
    return {"ids": list(ids), "text": "some words", "preview": "", "finish_reason": "stop", "raw": raw,
            **{name: statistics.median(of) if of and of[0] is not None else None for name, of in raw.items()},
            "stages_ms": {}, "drafted": drafted, "accepted": sum(accept_lens), "rounds": len(accept_lens),
            "accept_lens": list(accept_lens), "pieces": [], "overlap_drafts": 3, "window_drafts": 1,
            "forwards": forwards(ids, sum(accept_lens), len(accept_lens)), "differs_at": None, "identical": True,
            "prompt_rows": {"target": 50}, "peak_memory": 1, "drafter_error": None, **more}


def rows_of(*samples, question="q"):
    return [{"id": f"s{at}", "at": at, "seq": "a", "clip": str(at), "question": question, "truth": None, "modes": modes}
            for at, modes in enumerate(samples)]


CONFIG = {"modes": ["target_only", "speculative"], "draft_len": 2, "overlap_len": 3, "draft_source": "drafter",
          "gate": "off", "samples": 3, "repeats": 1, "warmup": 0, "max_new_tokens": 9, "ignore_eos": False,
          "frame_rule": "uniform", "devices": {"target": "cpu", "drafter": "cpu"}}
WORK = {"weight_bytes": 1000, "kv_bytes_per_row": 2, "flop_per_row": 10, "flop_per_row_pair": 1, "flop_head": 5}
HEAD = {"schema": bench.SCHEMA, "commit": "abc", "dirty": False, "kind": "tiny", "command": "python bench.py",
        "time": "2026-01-01", "seed": 0, "skipped": [], "config": CONFIG,
        "machine": {"gpu": None, "driver": None, "torch": "t", "triton": "t", "python": "p", "threads": 1, "cores": 4,
                    "others_on_gpu": 0, "load": 0.0, "clocks": None},
        "weights": {"target": {"path": "t", "dtype": "d", "bytes": 1, "hash": "h", "revision": None}},
        "ceilings": {"read_bw": 1e6, "gemm_flops": 1e6, "target": WORK}}


def three_samples():
    """Ratios 2.0, 1.0 and 0.5; first ids 1, 2 and 3 ms later; 12 of 18 drafts accepted in 9 rounds."""
    ids, lens = list(range(8)), ([2, 2, 0], [1, 2, 1], [1, 2, 1])
    base = [made(ids, (100.0,), (10.0,)), made(ids, (100.0,), (20.0,)), made(ids, (100.0,), (30.0,))]
    fast = [made(ids, (e2e,), (ttft,), of, 6) for e2e, ttft, of in zip((50.0, 100.0, 200.0), (11.0, 22.0, 33.0), lens,
                                                                       strict=True)]
    return rows_of(*({"target_only": a, "speculative": b} for a, b in zip(base, fast, strict=True)))


def test_ratio_and_later_are_paired_and_above_1_is_faster():
    figures = mode_figures(three_samples(), CONFIG, True)["speculative"]
    assert figures["ratio"]["p50"] == 1.0
    assert (figures["ratio"]["low"], figures["ratio"]["high"]) == (0.5, 2.0)
    assert figures["later_ms"]["p50"] == 2.0
    withheld = mode_figures(three_samples(), CONFIG, False)["speculative"]
    assert all(withheld[name] is None for name in ("ratio", "later_ms"))


def test_an_interval_is_given_from_three_samples_on():
    few = mode_figures(three_samples()[:2], CONFIG, True)["speculative"]["ratio"]
    assert few == {"p50": 1.5, "low": None, "high": None} and bench.shown(few) == "1.50"
    assert bench.shown({"p50": 1.5, "low": 1.25, "high": 2.0}) == "1.50 [1.25, 2.00]" and estimate([]) is None


def test_acceptance_tokens_per_round_and_ids_a_forward_are_counted_from_the_rounds():
    figures = mode_figures(three_samples(), CONFIG, True)
    of = figures["speculative"]
    assert of["accepted"] == 12 and of["drafted"] == 18 and of["accept_rate"] == pytest.approx(12 / 18)
    assert of["tokens_per_round"] == pytest.approx(12 / 9 + 1) and of["histogram"] == {0: 1, 1: 4, 2: 4}
    assert of["forwards"] == 9 and of["ids_a_forward"] == pytest.approx(21 / 9) and of["tokens"] == 24
    assert figures["target_only"]["forwards"] == 21 and figures["target_only"]["ids_a_forward"] == 1.0
    assert of["overlap_drafts"] == 3 and of["window_drafts"] == 1
    assert forwards(list(range(10)), 4, 1) == 1 + 4            # one verify of 4, then 4 steps
    assert forwards([7], 0, 0) == 0 and per_forward(0, 0) is None
    assert forwards([1, 2, 3], 2, 1) == 1                      # it ended inside the drafts


def test_quantiles_are_taken_over_all_repeats():
    row = rows_of({"target_only": made([1, 2], [float(v) for v in range(10, 110, 10)], [1.0] * 10)})
    of = mode_figures(row, CONFIG, True)["target_only"]
    assert of["e2e_ms"] == {"p20": 30.0, "p50": 60.0, "p80": 90.0} and of["ttfp_ms"] is None
    assert of["tpot_ms"]["p50"] == 59.0


def test_one_id_answers_divide_by_nothing():
    rows = rows_of(*({"target_only": made([5], (10.0,)), "speculative": made([5], (10.0,))} for _ in range(3)))
    report = bench.assemble(HEAD, rows)
    assert report["modes"]["speculative"]["ids_a_forward"] is None and report["modes"]["speculative"]["why_not"]
    assert bench.screen(report) and bench.details(report)


def test_first_ids_of_a_clips_first_and_further_questions_are_told_apart():
    rows = rows_of(*({"target_only": made([1, 2], (9.0,), (ttft,))} for ttft in (7.0, 4.0, 5.0, 9.0, 6.0)))
    assert per_question(rows) is None                        # a question a clip
    for row, open_ms in zip(rows, (100.0, None, None, 300.0, None), strict=True):
        row.update({"several": True} | ({"open_ms": open_ms} if open_ms else {}))
    assert per_question(rows) == {"open": 200.0, "first": 208.0, "further": 5.0}
    lines = "\n".join(bench.screen(bench.assemble(HEAD, rows)))
    assert "first question after 208.0 ms (200.0 to read and prefill it), of a further one after 5.0 ms" in " ".join(
        lines.split())
    assert not any("TFLOP" in str(row) for row in bench.stage_rows(bench.assemble(HEAD, rows)))


def test_several_questions_of_a_clip_read_it_once_and_are_held_to_the_target(tmp_path, monkeypatch, capsys,
                                                                            quick_ceilings):
    (tmp_path / "q.txt").write_text("What are the key elements in this scene?\n\nDescribe the following scene.\n")
    opened, real = [], engine.Engine.open
    monkeypatch.setattr(engine.Engine, "open", lambda *of, **how: opened.append(how["video_path"]) or real(*of, **how))
    report = report_of("--questions", str(tmp_path / "q.txt"), *"--max-samples 2 --device cpu --max-new-tokens 6 "
                       "--repeats 2 --warmup 0 --modes target_only,speculative,lookup_again".split())
    assert report["identical"]["equal"] == report["identical"]["compared"] == 8 and len(set(opened)) == len(opened) == 2
    rows = report["samples"]
    assert ["open_ms" in row for row in rows] == [True, False] * 2 and rows[1]["id"] == rows[0]["id"] + "#2"
    first = rows[0]["open_ms"] + rows[0]["modes"]["target_only"]["ttft_ms"]
    assert "of a further one after" in " ".join(capsys.readouterr().out.split())
    assert first > rows[1]["modes"]["target_only"]["ttft_ms"]
    for text, words in (("\n \n", "holds no question"), ("Why?", "cannot stand beside"),
                        ('["Why?", "How?"]', "is JSON"), ('[\n  "Why?"]', "is JSON"), ('{"q": "Why?"}\n', "is JSON")):
        (tmp_path / "q.txt").write_text(text)
        flags = ["--questions", str(tmp_path / "q.txt")] + ["--question", "Why?"] * (words[:2] == "ca")
        assert bench.main(flags) == 2 and words in capsys.readouterr().err


def test_controls_of_the_report_are_those_of_the_targets_answers():
    rows = rows_of(*({"target_only": made(ids, (10.0,))} for ids in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 8, 4])))
    report = bench.assemble(HEAD, rows)
    assert report["controls"]["previous"] == {"accepted": pytest.approx((0 + 3 + 1) / 3), "ids_a_forward": 9 / 6}
    rows[2]["question"] = "another"                                  # then nothing came before it
    assert bench.assemble(HEAD, rows)["controls"]["previous"]["accepted"] == 1.0


def test_stages_are_beside_the_ceiling():
    rows = three_samples()
    for row in rows:
        row["modes"]["target_only"]["stages_ms"] = {"target": {"decode": [2.0, 4.0, 6.0], "prefill": [1.0]}}
        row["modes"]["speculative"]["stages_ms"] = {"target": {"verify": [8.0]}}
    table = {of[:2]: of[2:] for of in bench.stage_rows(bench.assemble(HEAD, rows))}
    assert table["target", "decode"][:3] == (2.0, 4.0, 6.0)
    assert table["target", "decode"][4:] == (1100 / 1e9, "GB", pytest.approx(1100 / 4.0 * 1e3 / 1e6))
    assert table["target", "prefill"][4] == (10 * 50 + 50 * 51 + 5) / 1e12 and ("target", "verify") in table


@pytest.mark.parametrize("of,words", [((1.2, 1.1, 1.3), "faster"), ((0.8, 0.7, 0.9), "slower"),
                                      ((1.2, 0.9, 1.3), "no difference shown"), ((1.005, 1.001, 1.02), "no difference"),
                                      ((0.995, 0.98, 0.999), "no difference"), ((1.2, None, None), "too few")])
def test_what_differs_by_less_than_1_percent_or_might_be_chance_is_nothing(of, words):
    assert judged(dict(zip(("p50", "low", "high"), of, strict=True))).startswith(words)


@pytest.mark.parametrize("mode,change,words", [
    ("speculative", {}, "no draft in time"), ("speculative", {"drafter_error": "broke"}, "drafter gave up"),
    ("prefill_then_verify", {"preview": "x"}, "first id was wrong"), (AGAIN, {}, "nothing proposed"),
    ("drafter_only", {}, "another answer"), ("target_only", {}, "")])
def test_a_row_without_drafts_says_why(mode, change, words):
    of = made([1, 2], (10.0,), **change)
    assert why_not(mode, of, CONFIG) == words
    if words == "no draft in time":
        assert why_not(mode, of, {**CONFIG, "gate": "on"}) == "gate shut"
        assert why_not(mode, of, {**CONFIG, "draft_source": "lookup"}) == "nothing proposed"


class Words:
    """A tokenizer whose ids are numbers in words."""

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


def test_pieces_are_the_answer_with_what_was_accepted_and_rejected():
    log = [engine.Round("head start", [2, 3, 9, 9], 2), engine.Round("", [], 0), engine.Round("drafter", [6, 7], 2)]
    result = {"output_ids": [1, 2, 3, 4, 5, 6, 7], "round_log": log}
    found = show.pieces(result, Words())
    assert found == [["own", "w1"], ["accepted", " w2 w3"], ["rejected", " w9 w9"], ["own", " w4"], ["own", " w5"],
                     ["accepted", " w6 w7"]]
    text = show.marked(*found)
    assert text.translate(show.PLAIN) == "w1 [w2 w3] ~w9 w9~ w4 w5 [w6 w7]"
    assert "".join(of for kind, of in found if kind != "rejected") == "w1 w2 w3 w4 w5 w6 w7"
    result["round_log"] = log[:1]                                       # prefill_then_verify: then steps alone
    assert show.pieces(result, Words())[-1] == ["own", " w5 w6 w7"]


def result_of(ids, start=0.0, **more):
    """A Result as the engine gives it, of one request that took a second."""
    lens = more.pop("accept_lens", [])
    return engine.Result(output_ids=ids, output_text="x", mode=more.pop("mode", "speculative"), wall_clock_time=1.0,
                         ttft=0.25, ttfp=0.125, tpot=0.05, accept_lens=lens, accepted_tokens=sum(lens),
                         rounds=len(lens), prompt_rows={"target": 9}, **more)


def test_a_summary_holds_every_repeat_and_an_entry_for_each_forward():
    e = SimpleNamespace(target=SimpleNamespace(text=Words()))
    line = [("target", "prefill", 0.0, 0.2, ""), ("target", "draft", 0.2, 0.3, ""),
            ("target", "verify", 0.3, 0.31, ""), ("target", "decode", 0.31, 0.32, "")]
    results = [result_of([1, 2, 3], accept_lens=[1], drafted=5, free_tokens_count=free, window_drafts=free + 1,
                         round_log=[engine.Round("self", [2, 9, 9, 9, 9], 1)], timeline=line,
                         stages={"target": {"prefill": 0.2, "verify": 0.01, "decode": 0.01, "draft": 0.1}})
               for free in (1, 2, 9)]
    of = bench.summary(e, results, [result_of([1, 2, 3])])
    assert of["e2e_ms"] == 1000 and of["raw"]["ttft_ms"] == [250.0] * 3 and of["tpot_ms"] == 50
    assert of["overlap_drafts"] == 2 and of["window_drafts"] == 3
    assert of["stages_ms"]["target"]["draft"] == pytest.approx([20.0] * 3)             # five drafts in 100 ms
    assert of["stages_ms"]["target"]["prefill"] == pytest.approx([200.0] * 3)
    assert of["stages_ms"]["target"]["verify"] == pytest.approx([10.0] * 3) and of["identical"]
    assert (of["drafted"], of["accepted"], of["rounds"], of["forwards"]) == (5, 1, 1, 1)
    other = bench.summary(e, [results[0], result_of([1, 7, 3])], [result_of([1, 2, 3])])
    assert other["differs_at"] == 1 and other["identical"] is False


def test_who_drafted_is_shown_with_ids_a_round_ms_an_id_its_share_and_from_where_it_pays():
    """Two samples of steps of 4 ms; 300 rounds of 700 drafts take 2,376 ms, 1,176 more than as many steps."""
    own = dict(rounds=300, drafts=700, accepted=640, ids=940, ms=2376.0, judged=620, right=583)
    none = dict(rounds=5, drafts=0, accepted=0, ids=5, ms=20.0, judged=0, right=0)
    base = made(range(8), (38.0,), (10.0,))
    rows = rows_of(*[{"target_only": base, "speculative": made(range(8), (30.0,), (10.0,), [1], 2, by_source={
        "self": own, "none": none})}] * 2)
    report = bench.assemble(HEAD, rows)
    assert "4-bit     self right with 0.94 of 1,240 drafts; pays from 0.42" in bench.screen(report)
    table = [line.split() for line in bench.details(report) if line.startswith("speculative: ")]
    assert table == [["speculative:", "self", "600", "1400", "0.94", "3.13", "2.53", "0.42"],
                     ["speculative:", "none", "10", "0", "-", "1.00", "4.00", "-"]]
    assert bench.pays_from(own, None) is None and bench.pays_from({**own, "ms": 1.0}, 4.0) == 0.0
    del rows[0]["modes"]["speculative"]["by_source"]["self"]
    assert not [line for line in bench.screen(bench.assemble(HEAD, rows)) if line.startswith("4-bit")]
    stays = "the copy stays on cuda:0 .. times as fast as the target"
    assert f"4-bit     {stays}" in bench.screen(bench.assemble({**HEAD, "copy_stays": stays}, rows))


# ---- the screen


def fits(lines):
    return len(lines) <= 25 and max(map(len, lines)) <= 100


def test_the_screen_fits_whatever_there_is_to_say():
    rows = three_samples()
    rows[0]["question"], rows[0]["modes"]["target_only"]["text"] = "why " * 90, "because\x1b[2J\n" * 90
    rows[0]["modes"]["speculative"]["pieces"] = [["accepted", " word" * 300], ["rejected", " wrong" * 300]]
    rows += [{"id": f"{i}" * 99, "at": 9 + i, "seq": "", "clip": "", "question": "q", "modes": {},
              "error": "broken " * 99} for i in range(9)]
    rows[1]["modes"]["speculative"].update(identical=False, differs_at=3)
    head = {**HEAD, "skipped": ["record 1: missing " * 20] * 20, "config": {**CONFIG, "modes": [*MODES, AGAIN]}}
    lines = bench.screen(bench.assemble(head, rows))
    assert fits(lines) and not any("\x1b" in line for line in lines)
    text = "\n".join(lines)
    assert "2 of 3 identical to the video model alone: NO RATIO IS GIVEN" in text and "withheld" in text
    assert "nothing is said about speed" in text and "failed" in text and "--details" in lines[-1]


def test_drafts_are_told_apart_by_colour_on_a_terminal_and_by_marks_in_a_pipe(monkeypatch):
    rows = three_samples()
    rows[0]["modes"]["speculative"]["pieces"] = [["own", "a"], ["accepted", " b c"], ["rejected", " d"], ["own", " e"]]
    report = bench.assemble(HEAD, rows)
    assert "events    a [b c] ~d~ e" in bench.screen(report)
    assert "events    a \x1b[32mb c\x1b[0m \x1b[31md\x1b[0m e" in bench.screen(report, colour=True)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert show.colourful()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not show.colourful()


@pytest.mark.parametrize("e2e,words", [((50, 51, 52), "the same answers 1.96 times as fast"),
                                       ((200, 210, 190), "no gain on this machine: a draft costs 0.5 of a target step"),
                                       ((99, 101, 100), "no gain shown on this machine: a draft costs 0.5")])
def test_the_verdict_is_one_sentence_in_words(e2e, words):
    rows = three_samples()
    for row, ms in zip(rows, e2e, strict=True):
        row["modes"]["speculative"]["e2e_ms"] = float(ms)
        row["modes"]["target_only"]["stages_ms"] = {"target": {"decode": [4.0]}}
        row["modes"]["drafter_only"] = made([1], (9.0,), identical=None, forwards=None,
                                            stages_ms={"drafter": {"draft": [2.0]}}, prompt_rows={"drafter": 9})
    head = {**HEAD, "ceilings": {**HEAD["ceilings"], "drafter": WORK}}
    assert bench.verdict(bench.assemble(head, rows)).startswith(words)
    if "draft costs" in words:
        other = bench.verdict(bench.assemble({**head, "config": {**CONFIG, "draft_source": "lookup"}}, rows))
        assert other == words.partition(":")[0] + ": 67% of the drafts are right"
    for row in rows:
        row["modes"]["speculative"].update(drafted=0, accept_lens=[], accepted=0, rounds=0)
    shut = bench.assemble({**head, "config": {**CONFIG, "gate": "on"}}, rows)
    assert bench.verdict(shut).endswith(": nothing was drafted, gate shut")
    assert any(line.startswith("speculative ") and line.endswith("gate shut") for line in bench.screen(shut))


def test_the_default_demo_drafts_and_looks_up_on_one_screen(capsys):
    """Without flags, but for sizes: the gate is off and says so, accepted drafts are seen, and nothing is JSON."""
    assert bench.main(["--max-samples", "3", "--repeats", "1", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert fits(lines) and err == "" and "{" not in out
    assert [line.split()[0] for line in lines[:2]] == ["question", "video"]
    events = "\n".join(lines[lines.index(next(of for of in lines if of.startswith("events"))):])
    assert re.search(r"\[\w", events) and any(line.startswith("answers   12 of 12 identical") for line in lines)
    assert any(line.startswith("gate      off") for line in lines)
    again = next(line for line in lines if line.startswith(AGAIN)).split()
    assert float(again[5]) > 3                                       # ids a forward
    assert any(line.startswith("verdict") for line in lines) and any(line.startswith("controls") for line in lines)


# ---- a run


def test_every_repeat_runs_the_modes_in_an_order_of_its_own(monkeypatch, capsys, quick_ceilings):
    ran, real = [], bench.run_sample
    monkeypatch.setattr(bench, "run_sample", lambda *args: ran.append(args[2]) or real(*args))
    modes = f"target_only,prefill_then_verify,speculative,{AGAIN}"
    assert bench.main([*QUICK, "--modes", modes, "--repeats", "6", "--max-new-tokens", "4"]) == 0
    assert ran[18:24] == [AGAIN] * 6 and len(ran) == 48               # asked again when its repeats are done
    ran = [mode for mode in ran if mode != AGAIN]
    repeats = [tuple(ran[i:i + 3]) for i in range(0, len(ran), 3)]
    assert len(repeats) == 12 and all(len(set(of)) == 3 for of in repeats) and len(set(repeats)) > 3


def test_json_goes_where_it_was_asked_for_alone(run, capfd, quick_ceilings):
    code, lines, report = run
    assert code == 0 and report["schema"] == bench.SCHEMA and not any(line.startswith("{") for line in lines)
    assert bench.main([*SHORT, "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["schema"] == bench.SCHEMA and err == ""


def test_json_may_go_to_a_device(capsys, quick_ceilings):
    assert bench.main([*SHORT, "--json", "/dev/null"]) == 0
    assert capsys.readouterr().err == "" and Path("/dev/null").is_char_device()


def test_a_sampled_run_compares_under_one_seed_and_says_so(run, tmp_path, capsys, quick_ceilings):
    flags = [*QUICK, "--temperature", "4", "--top-p", "0.95", "--seed", "3", "--rows", str(tmp_path / "rows.jsonl")]
    report = report_of(*flags, "--details")
    assert report["config"]["sampling"] == {"temperature": 4.0, "top_p": 0.95, "seed": 3}
    assert "sampling" not in run[2]["config"] and "temperature 4.0, top_p 0.95, seed 3" in capsys.readouterr().out
    assert report["identical"] == {"compared": 8, "equal": 8, "differing": []}
    for ours, greedy in zip(report["samples"], run[2]["samples"], strict=True):
        assert ours["modes"]["target_only"]["ids"] != greedy["modes"]["target_only"]["ids"]
    flags[flags.index("3")] = "4"
    assert bench.main([*flags, "--resume"]) == 2 and "another sampling seed (3, here 4)" in capsys.readouterr().err


def test_the_report_has_the_fields_of_the_contract(run):
    report = run[2]
    assert set(report) >= {"commit", "dirty", "command", "time", "seed", "machine", "weights", "ceilings", "config",
                           "samples", "modes", "controls", "identical", "warnings"}
    assert set(report["machine"]) >= {"gpu", "driver", "cuda", "torch", "triton", "cpu", "cores"}
    assert report["kind"] == "tiny" and set(report["modes"]) == {*MODES, AGAIN}
    assert report["command"] == f"python bench.py {' '.join(QUICK)} --details --json " + report["command"].split()[-1]
    for row in report["samples"]:
        for mode, of in row["modes"].items():
            assert set(of) >= {"ids", "text", "finish_reason", "e2e_ms", "ttft_ms", "ttfp_ms", "tpot_ms", "stages_ms",
                               "drafted", "accepted", "rounds", "accept_lens", "overlap_drafts", "window_drafts",
                               "identical"}, mode
            assert of["identical"] is (None if mode == "drafter_only" else True)


def quantile(values, q):
    """The value that a share q of all values lies below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


def cells_of(lines, header: str) -> dict:
    """{first word: the other words} of a table's lines below its header, brackets and commas left out."""
    at = next(i for i, line in enumerate(lines) if line.startswith(header))
    found = {}
    for line in lines[at + 1:]:
        name, *rest = re.sub(r"[\[\],]", " ", line).split()
        if name not in (*MODES, AGAIN):
            break
        found[name] = rest
    return found


def test_every_printed_number_can_be_recomputed_from_the_raw_values(run):
    """From samples, ceilings and config alone: the aggregates in the report are not looked at."""
    _, lines, report = run
    rows, limits, found = report["samples"], report["ceilings"], 0
    stages = {tuple(words[:2]): words[2:] for words in map(str.split, lines)
              if words[:1] in (["target"], ["drafter"]) and words[1] in bench.STAGES[words[0]]}
    for (side, stage), words in stages.items():
        alone = "target_only" if side == "target" else "drafter_only"
        raw = [v for row in rows for mode, of in row["modes"].items() if mode == alone or stage == "verify"
               for v in of["stages_ms"].get(side, {}).get(stage, [])]
        beside = [v for row in rows for v in row["modes"]["prefill_only"]["stages_ms"].get(side, {}).get(stage, [])]
        wanted = [f"{quantile(raw, q):.3f}" for q in (0.2, 0.5, 0.8)]
        wanted += [f"{statistics.median(beside):.3f}" if beside else "-"]
        assert words[:4] == wanted, (side, stage)
        prompts = [of["prompt_rows"][side] for row in rows for of in row["modes"].values() if side in of["prompt_rows"]]
        work, S = limits[side], round(statistics.median(prompts))
        if stage in ("draft", "decode", "verify"):
            nbytes = work["weight_bytes"] + work["kv_bytes_per_row"] * S
            share = nbytes / quantile(raw, 0.5) * 1e3 / limits["read_bw"]
            assert words[4:] == [f"{nbytes / 1e9:.3f}", "GB", f"{share:.0%}"]
        elif stage == "prefill":
            flop = work["flop_per_row"] * S + work["flop_per_row_pair"] * S * (S + 1) + work["flop_head"]
            share = flop / quantile(raw, 0.5) * 1e3 / limits["gemm_flops"]
            assert words[4:] == [f"{flop / 1e12:.3f}", "TFLOP", f"{share:.0%}"]
        found += 1
    assert found >= 10
    times, drafts, short = (cells_of(lines, name) for name in ("mode, ms ", "drafts ", "mode  "))
    for mode in report["config"]["modes"]:
        of = [row["modes"][mode] for row in rows]

        def p50(name, of=of):
            values = [v for sample in of for v in sample["raw"][name] if v is not None]
            return f"{quantile(values, 0.5):.1f}" if values else "-"
        e2e = [v for sample in of for v in sample["raw"]["e2e_ms"]]
        want = [f"{quantile(e2e, q):.1f}" for q in (0.5, 0.2, 0.8)] + [p50("ttft_ms"), p50("ttfp_ms"), p50("tpot_ms")]
        ratios = [statistics.median(row["modes"]["target_only"]["raw"]["e2e_ms"])
                  / statistics.median(row["modes"][mode]["raw"]["e2e_ms"]) for row in rows]
        want.append(f"{statistics.median(ratios):.2f}")      # two samples: no interval
        waits = [ours - theirs for row in rows for ours, theirs in zip(
            *(row["modes"][m]["raw"]["ttft_ms"] for m in (mode, "target_only")), strict=True)]
        rng = random.Random(0)                               # the bootstrap, as the report describes it
        medians = sorted(statistics.median(rng.choices(waits, k=len(waits))) for _ in range(1000))
        want += ["-"] if mode == "target_only" else [f"{v:+.1f}" for v in (statistics.median(waits), medians[25],
                                                                            medians[975])]
        assert [cell.replace("-0.0", "0.0") for cell in times[mode]] == [cell.replace("-0.0", "0.0") for cell in want]
        lens, drafted = [n for sample in of for n in sample["accept_lens"]], sum(sample["drafted"] for sample in of)
        ids, taken = sum(len(sample["ids"]) for sample in of), sum(sample["forwards"] or 0 for sample in of)
        want = [str(ids), str(taken) if taken else "-", f"{(ids - len(of)) / taken:.2f}" if taken else "-",
                str(drafted), f"{sum(lens) / drafted:.2f}" if drafted else "-",
                f"{sum(lens) / len(lens) + 1:.2f}" if drafted else "-",
                *(f"{statistics.median(sample[name] for sample in of):.0f}"
                  for name in ("window_drafts", "overlap_drafts"))]
        assert drafts[mode][:8] == want, mode
        pairs = [f"{n}: {lens.count(n)}" for n in sorted(set(lens))] if drafted else []
        assert not pairs or " ".join(drafts[mode][8:]) == " ".join(pairs)
        assert short[mode][0] == f"{quantile(e2e, 0.5):.1f}" and f"{statistics.median(ratios):.2f}" in short[mode]
        assert not taken or short[mode][1:4] == [str(ids - len(of)), "in", str(taken)]


def test_a_report_made_again_from_its_rows_or_its_file_is_the_same(run, tmp_path, capsys):
    report = run[2]
    made = {"interrupted", "modes", "controls", "identical", "warnings", "ceilings", "samples"}
    head = {k: v for k, v in report.items() if k not in made} | {"ceilings": report["ceilings"]}
    again = bench.assemble(head, report["samples"])
    assert bench.screen(again) + bench.details(again) == run[1]
    path, out = tmp_path / "saved.json", tmp_path / "out.txt"
    path.write_text(json.dumps(report))
    assert bench.main(["--from-json", str(path), "--details", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == run[1] == out.read_text().splitlines()


def test_details_name_commit_and_checkpoints(run, tmp_path):
    _, lines, report = run
    assert any(line.startswith(f"commit   {report['commit']}") for line in lines)
    for side in ("target", "drafter"):
        line = next(line for line in lines if line.startswith(f"         {side} "))
        assert f"hash {report['weights'][side]['hash']}" in line
    shutil.copytree(TINY / "target", tmp_path / "target")
    assert weights.load.open_checkpoint(tmp_path / "target").fingerprint() == report["weights"]["target"]["hash"]
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, tmp_path / "target" / "model.safetensors")
    assert weights.load.open_checkpoint(tmp_path / "target").fingerprint() != report["weights"]["target"]["hash"]


def test_a_snapshot_of_the_hub_tells_its_revision(tmp_path):
    folder = tmp_path / "snapshots" / ("4cf9d8c" + "0" * 33)
    shutil.copytree(TINY / "target", folder)
    assert weights.load.open_checkpoint(folder).revision == folder.name
    assert weights.load.open_checkpoint(TINY / "target").revision is None


def test_warnings_name_what_spoils_a_figure():
    rows, head = three_samples(), copy.deepcopy(HEAD)
    rows[0]["modes"]["speculative"]["drafter_error"] = "it broke"
    head["machine"].update(load=9.0, cores=4, others_on_gpu=2, clocks="1980 MHz, 2619 MHz, 300.00 W, 700.00 W")
    head["clocks_after"] = "1410 MHz, 2619 MHz, 700.00 W, 700.00 W"
    found = "\n".join(bench.assemble(head, rows)["warnings"])
    for words in ("2 other processes", "9.0 of 4 cores", "from 1980 to 1410 MHz", "s0, speculative: the "
                  "drafter gave up (it broke)"):
        assert words in found, words


def test_a_reader_that_leaves_early_causes_no_traceback(user_env):
    command = f"{sys.executable} bench.py {' '.join(SHORT)} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, env=user_env)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def tampered(monkeypatch, change):
    """Requests whose results `change(result, mode, calls of that mode so far)` may spoil."""
    real, calls = engine.Engine.generate, []

    def generate(self, **options):
        result = real(self, **options)
        calls.append(options["mode"])
        change(result, options["mode"], calls.count(options["mode"]))
        return result
    monkeypatch.setattr(engine.Engine, "generate", generate)


def test_ratios_are_withheld_and_the_exit_code_says_so_when_outputs_differ(monkeypatch, capsys, quick_ceilings):
    def change(result, mode, _):
        if mode == "speculative":
            result.output_ids = result.output_ids[:5] + [7] + result.output_ids[6:]
    tampered(monkeypatch, change)
    report = report_of(*QUICK, "--repeats", "1", "--modes", ",".join(MODES), "--details", code=1)
    out = capsys.readouterr().out
    assert all(of["ratio"] is None for of in report["modes"].values()) and "NO RATIO IS GIVEN" in out
    assert [d["position"] for d in report["identical"]["differing"]] == [5, 5]
    assert "first at answer id 5" in out


def test_a_difference_in_any_repeat_is_placed_and_counts_for_target_only_too(monkeypatch, capsys, quick_ceilings):
    def change(result, mode, turn):
        if (mode, turn) == ("speculative", 1):               # of three repeats, not the last
            result.output_ids = result.output_ids[:3] + [7] + result.output_ids[4:]
        if (mode, turn) == ("target_only", 2):
            result.output_ids = result.output_ids[:6]
    tampered(monkeypatch, change)
    report = report_of(*QUICK, "--modes", "target_only,speculative", "--max-samples", "1", "--repeats", "3", code=1)
    assert {d["mode"]: d["position"] for d in report["identical"]["differing"]} == {"target_only": 6, "speculative": 3}


def test_without_a_baseline_nothing_is_called_identical_or_withheld(capsys, quick_ceilings):
    assert bench.main([*QUICK, "--modes", "drafter_only", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "nothing was compared" in out and "withheld" not in out and "nothing to judge" in out


def clips_in(tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(CLIPS, folder)
    index = folder / "EventGPT_Instruction_Subset.json"
    return folder, index, json.loads(index.read_text())


SMALL = ["--repeats", "1", "--warmup", "0", "--max-new-tokens", "8", "--modes", "target_only", "--device", "cpu"]


def test_a_listed_file_that_is_missing_is_counted_and_a_broken_one_fails_its_row(tmp_path, capsys, quick_ceilings):
    folder, _, records = clips_in(tmp_path)
    (folder / "mp4" / records[0]["mp4_data"]).unlink()
    (folder / "mp4" / records[1]["mp4_data"]).write_bytes(b"not a video")
    report = report_of("--dataset-dir", str(folder), "--max-samples", "3", *SMALL, code=1)
    assert len(report["skipped"]) == 1 and records[0]["mp4_data"] in report["skipped"][0]
    assert [("error" in row) for row in report["samples"]] == [True, False]
    out = capsys.readouterr().out
    assert f"failed    {records[1]['id']}" in out and "skipped   record 0" in out


def test_a_broken_first_sample_fails_its_row_and_not_the_run(tmp_path, quick_ceilings):
    folder, index, records = clips_in(tmp_path)
    (folder / "mp4" / records[0]["mp4_data"]).write_bytes(b"not a video")
    index.write_text(json.dumps([*records[:2], records[1]]))
    report = report_of("--dataset-dir", str(folder), *SMALL, "--warmup", "1", code=1)
    assert [("error" in row) for row in report["samples"]] == [True, False]
    assert len(report["skipped"]) == 1 and "twice" in report["skipped"][0]


def test_a_source_never_drafts_a_sample_from_that_samples_own_answer(quick_ceilings):
    """Questions differ, so nothing is known beforehand: more repeats and a warm-up must not raise the acceptance."""
    for repeats, warmup in (("1", "0"), ("3", "1")):
        report = report_of(*QUICK, "--modes", "target_only,speculative", "--draft-source", "lookup", "--repeats",
                           repeats, "--warmup", warmup, "--max-samples", "1")
        assert report["samples"][0]["modes"]["speculative"]["accepted"] == 0


def test_a_source_learns_the_sample_before(quick_ceilings):
    report = report_of(*QUICK, "--modes", "target_only,speculative", "--draft-source", "lookup", "--repeats", "2",
                       "--question", "What are the key elements in this scene?")
    first, second = (row["modes"]["speculative"]["accepted"] for row in report["samples"])
    assert first == 0 and second >= report["controls"]["previous"]["accepted"] > 0


def test_a_file_of_lookup_goes_on_from_the_answers_that_the_last_run_kept(tmp_path, quick_ceilings):
    """Same clip twice: the second run drafts the first one's answer from its first round on."""
    file, found = tmp_path / "kept.json", []
    for _ in range(2):
        report = report_of("--draft-source", f"lookup:{file}", "--device", "cpu", "--modes", "target_only,speculative",
                           "--max-samples", "1", "--repeats", "1", "--warmup", "0", "--max-new-tokens", "20")
        found.append(report["samples"][0]["modes"]["speculative"]["accepted"])
    assert found[0] < found[1]


# ---- long runs


ROWS = ["--modes", "target_only,speculative", "--repeats", "1", "--warmup", "0", "--max-new-tokens", "12", "--device",
        "cpu", "--max-samples", "6", "--question", "What are the key elements in this scene?"]


def ids_of(report):
    return {row["id"]: {mode: of["ids"] for mode, of in row["modes"].items()} for row in report["samples"]}


def test_a_killed_run_resumed_and_three_shards_merged_equal_one_run(tmp_path, capsys, quick_ceilings):
    whole = report_of(*ROWS)
    for i in range(3):
        assert bench.main([*ROWS, "--shard", f"{i}/3", "--rows", str(tmp_path / "r.jsonl")]) == 0
    given, first = str(tmp_path / "r.jsonl"), tmp_path / "r.00000-of-00003.jsonl"
    lines = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(lines[:2]) + lines[2][:100])               # died while writing its second row
    assert bench.main([*ROWS, "--shard", "0/3", "--rows", given]) == 2                # never overwritten silently
    assert "--resume" in capsys.readouterr().err
    shards = sorted(map(str, tmp_path.glob("r.*-of-00003.jsonl")))
    assert bench.main(["--merge", *shards]) == 2 and "1 of 6 samples are missing" in capsys.readouterr().err
    assert bench.main([*ROWS, "--shard", "0/3", "--rows", given, "--resume"]) == 0
    assert "nothing was left" not in capsys.readouterr().out
    assert bench.main([*ROWS, "--shard", "0/3", "--rows", given, "--resume"]) == 0
    assert "resume    nothing was left to do" in capsys.readouterr().out
    merged = report_of("--merge", *shards)
    assert list(ids_of(merged).items()) == list(ids_of(whole).items())                         # in the same order
    assert merged["controls"] == whole["controls"]               # `previous` needs the order of the data set
    assert bench.main(["--merge", *shards, shards[0]]) == 2 and "twice" in capsys.readouterr().err
    assert bench.main([*ROWS, "--max-new-tokens", "13", "--shard", "0/3", "--rows", given, "--resume"]) == 2
    assert "another max_new_tokens (12, here 13)" in capsys.readouterr().err


def test_rows_of_another_data_set_question_or_tokenizer_are_refused_by_name(tmp_path, capsys, quick_ceilings):
    folder, index, records = clips_in(tmp_path)
    rows, other = tmp_path / "r.jsonl", tmp_path / "tokenizer.json"
    other.write_text((TINY / "target" / "tokenizer.json").read_text() + "\n")
    flags = ["--max-samples", "2", *SMALL, "--rows", str(rows)]
    assert bench.main([*flags, "--dataset-dir", str(folder)]) == 0
    index.write_text(json.dumps([{**of, "id": f"other {i}"} for i, of in enumerate(records)]))
    for more, name in ((["--dataset-dir", str(folder)], "dataset"), (["--question", "What?"], "question"),
                       (["--tokenizer", str(other)], "tokenizer")):
        capsys.readouterr()
        assert bench.main([*flags, "--resume", *more]) == 2
        assert f"was written with another {name} (" in capsys.readouterr().err
        assert bench.main(["--max-samples", "2", *SMALL, "--rows", str(tmp_path / f"{name}.jsonl"), *more]) == 0
        assert bench.main(["--merge", str(rows), str(tmp_path / f"{name}.jsonl")]) == 2
        assert f"was written with another {name} (" in capsys.readouterr().err
    assert bench.main([*flags, "--resume"]) == 0                     # the embedded clips are the same list


def test_a_sample_that_failed_is_tried_again_when_its_file_was_mended(tmp_path, capsys, quick_ceilings):
    folder, _, records = clips_in(tmp_path)
    video, rows = folder / "mp4" / records[0]["mp4_data"], tmp_path / "r.jsonl"
    sound = video.read_bytes()
    video.write_bytes(b"not a video")
    flags = ["--dataset-dir", str(folder), "--max-samples", "2", *SMALL, "--rows", str(rows)]
    assert bench.main(flags) == 1
    video.write_bytes(sound)
    report = report_of(*flags, "--resume")
    assert [row["id"] for row in report["samples"]] == [of["id"] for of in records[:2]]
    assert not any("error" in row for row in report["samples"])
    assert ids_of(report_of("--merge", str(rows))) == ids_of(report)
    assert len(rows.read_text().splitlines()) == 4                   # a header, two tries of one sample, the other


@pytest.mark.parametrize("environ,want", [
    ({}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (1, 3)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
    ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, (0, 8)),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8",
      "SLURM_ARRAY_TASK_MAX": "7"}, (3, 8)),                         # srun in a task of an array
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, (1, 4)),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2))], ids=str)
def test_the_shard_comes_from_the_flag_or_the_launchers_variables(environ, want):
    assert bench.read_shard(None, environ) == want and bench.read_shard("1/2", environ) == (1, 2)
    for text in ("2/2", "a/b", "1", "-1/2", ""):
        with pytest.raises(InputError, match="--shard"):
            bench.read_shard(text, environ)


@pytest.mark.parametrize("task, count, last", [
    ("1", "3", "3"), ("0", "5", "8"), ("2", "5", "8"), ("0", "2", "7"), ("3", "1", "3")])
def test_every_task_of_an_array_with_gaps_is_refused(task, count, last):
    """Of --array=1-3 two tasks ran alone, and the first sample was in none."""
    with pytest.raises(InputError, match=f"got '{last}/{count}'; number the shards from 0"):
        bench.read_shard(None, {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": count,
                                "SLURM_ARRAY_TASK_MAX": last})


def test_blanks_beside_commas_say_nothing_and_a_pair_of_rows_its_form(capsys):
    options = bench.parse(["--modes", "target_only, speculative", "--draft-source", "lookup, drafter", "--cache-rows",
                           "2304, 832", "--device", "cpu"])
    bench.check(options)
    assert (options.modes, options.draft_source) == (["target_only", "speculative"], "lookup,drafter")
    assert options.cache_rows == (2304, 832)
    for text in ("2304,", "2304x832", "1,2,3"):
        assert bench.main(["--cache-rows", text]) == 2 and "as 2304 or 2304,832, got" in capsys.readouterr().err


def test_of_torchruns_processes_one_speaks(monkeypatch, capsys, quick_ceilings):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.main([*SMALL, "--max-samples", "2"]) == 0 and bench.main(["--modes", "fast"]) == 2
    assert capsys.readouterr() == ("", "")
    for nonsense in ("first", "2", "-1"):                    # nobody would say that there is no such shard
        monkeypatch.setenv("RANK", nonsense)
        assert bench.main(SMALL) == 2 and "RANK, WORLD_SIZE: wanted I/N" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--json", "a", "--out", "a"], ["--rows", "a", "--json", "./a"],
                                   ["--record", "a", "--out", "b/../a", "--modes", "target_only,drafter_only"]])
def test_one_file_is_not_written_by_two_flags(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    assert bench.main([*SMALL, *flags]) == 2
    assert "name another file" in capsys.readouterr().err and [of.name for of in tmp_path.iterdir()] == ["b"]


def test_compare_pairs_by_sample_and_says_what_it_shows(tmp_path, capsys):
    report = bench.assemble(HEAD, three_samples())
    old, new, other = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "other.json"
    old.write_text(json.dumps(report))
    for row in report["samples"]:
        row["modes"]["speculative"]["e2e_ms"] /= 2
        row["modes"]["target_only"]["e2e_ms"] /= 1.009
    new.write_text(json.dumps(report))
    assert bench.main(["--compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "speculative          2.000 [2.000, 2.000]  faster" in out and "outputs  the same" in out
    assert "target_only          1.009 [1.009, 1.009]  no difference shown" in out
    report["samples"] = report["samples"][:2]
    report["samples"][0]["modes"]["speculative"]["ids"][0] += 1
    other.write_text(json.dumps(report))
    assert bench.main(["--compare", str(old), str(other)]) == 1
    out = capsys.readouterr().out
    assert "1 samples answer" in out and "speculative          2.000  too few samples to tell" in out


# ---- refusals


def test_wrong_outputs_and_flags_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(engine, "load_engine", never)
    gone = str(tmp_path / "no" / "x.png")
    cases = [([flag, gone], gone) for flag in ("--json", "--rows", "--record", "--timeline", "--out")]
    cases += [([flag, value], flag) for flag, value in (
        ("--draft-len", "32"), ("--draft-len", "-1"), ("--overlap-len", "32"), ("--cache-rows", "0"),
        ("--max-samples", "0"), ("--max-samples", "-2"), ("--repeats", "0"), ("--warmup", "-1"), ("--repeats", "x"),
        ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "hot"), ("--top-p", "0"), ("--top-p", "2"),
        ("--top-p", "0.9"), ("--seed", "-1"), ("--seed", "7"), ("--seed", str(2 ** 63)), ("--max_new_tokens", "0"),
        ("--modes", ""), ("--modes", AGAIN), ("--timeline", str(tmp_path / "t.jpg")), ("--question", " "))
        if flag != "--max_new_tokens"]
    cases += [(["--max_new_tokens", "0"], "--max-new-tokens"), (["--weights", "tiny", "--eventgpt", gone], "--weights"),
              (["--resume"], "--rows"), (["--no-such-flag"], "--help lists all flags"),
              (["--shard", "0/12"], "12 shards of 9 samples"), (["--explain", ""], "--explain"),
              (["--draft-source", "nobody"], "nobody"), (["--record", str(tmp_path / "p"), "--modes", "target_only"],
                                                         "--record")]
    for flags, words in cases:
        assert bench.main(["--device", "cpu", *flags]) == 2, flags
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and out == "", (flags, err)


@pytest.mark.parametrize("device, flags, sources, self_draft", [
    ("cuda:0", ["--eventgpt", "E", "--videollava", "V"], "lookup,drafter,self", None),
    ("cuda:0", ["--weights", "random-7b"], "lookup,drafter,self", None),
    ("cuda:0", ["--videollava", "V"], "lookup,self", None), ("cuda:0", ["--eventgpt", "E"], "drafter", False),
    ("cuda:0", [], "drafter", False), ("cpu", ["--eventgpt", "E", "--videollava", "V"], "drafter", False),
    ("cuda:0", ["--videollava", "V", "--draft-source", "self"], "self", True),
    ("cpu", ["--draft-source", "lookup"], "lookup", False)])
def test_all_there_is_drafts_on_a_gpu_unless_told(monkeypatch, device, flags, sources, self_draft):
    monkeypatch.setattr(engine, "pick_device", lambda name, *_: torch.device(device))
    options = bench.parse(flags)
    bench.check(options)
    assert (options.draft_source, options.self_draft, len(options.source)) == (
        sources, self_draft, sources.count(",") + 1)


def test_without_room_for_a_copy_all_else_drafts(monkeypatch):
    """A CPU stands for a GPU whose engine comes without the copy."""
    options = bench.parse(["--videollava", str(TINY / "target"), "--device", "cpu"])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "pick_device", lambda name, *_: torch.device("cuda:0"))
        bench.check(options)
    options.device = torch.device("cpu")
    _, e = bench.load_pair(options, [])
    assert options.draft_source == "lookup" and [of.name for of in options.source] == ["lookup"]
    e.close()


def bad(tmp_path):
    empty, outside = tmp_path / "empty", tmp_path / "outside"
    empty.mkdir()
    outside.mkdir()
    (outside / "EventGPT_Instruction_Subset.json").write_text(json.dumps([
        {"id": 1, "event_data": "../../x.npz", "mp4_data": "../../../etc/passwd",
         "conversations": [{"from": "human", "value": "q"}]}]))
    (tmp_path / "broken.json").write_text("{")
    return {
        "no such data set": (["--dataset-dir", str(tmp_path / "nowhere")], "nowhere"),
        "a folder without the list": (["--dataset-dir", str(empty)], "EventGPT_Instruction_Subset.json"),
        "paths that lead out": (["--dataset-dir", str(outside)], "leads out"),
        "unknown mode": (["--modes", "fast"], "fast"),
        "absent device": (["--device", "cuda:9"], "cuda:9"),
        "not a device": (["--device", "tpu"], "tpu"),
        "not a checkpoint": (["--eventgpt", str(empty), "--videollava", str(empty)], str(empty)),
        "swapped checkpoints": (["--eventgpt", str(TINY / "target"), "--videollava", str(TINY / "drafter")], "swap"),
        "a hub id that is not in the cache": (["--videollava", "nobody/nothing", "--eventgpt", str(empty)], "nobody"),
        "too many new tokens": (["--max-new-tokens", "100000"], "--cache-rows"),
        "a saved run that is none": (["--from-json", str(tmp_path / "broken.json")], "broken.json"),
        "no two saved runs": (["--compare", str(tmp_path / "broken.json"), str(tmp_path / "none.json")], "broken.json"),
        "no file of rows": (["--merge", str(tmp_path / "broken.json")], "broken.json"),
    }


@pytest.mark.parametrize("name", [
    "no such data set", "a folder without the list", "paths that lead out", "unknown mode", "absent device",
    "not a device", "not a checkpoint", "swapped checkpoints", "a hub id that is not in the cache",
    "too many new tokens", "a saved run that is none", "no two saved runs", "no file of rows"])
def test_bad_input_is_one_line_on_stderr_and_exit_2(name, tmp_path, capsys, quick_ceilings):
    flags, words = bad(tmp_path)[name]
    assert bench.main(flags) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert not list(tmp_path.glob("**/*.partial"))


def test_help_is_quick_and_names_every_flag_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: pytest.fail("a CUDA context for a help text"))
    with pytest.raises(SystemExit) as end:
        bench.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(lines) <= 75 and max(map(len, lines)) <= 120
    assert sum(line.lstrip().startswith("-") for line in lines) >= 35


@pytest.mark.parametrize("words, fixed, gate", [
    ("--weights random-7b", True, "on"), ("", False, "off"), ("--gate on", False, "on"),
    ("--weights random-7b --no-ignore-eos", False, "on"), ("--weights tiny --ignore_eos", True, "off")])
def test_random_weights_answer_at_a_fixed_length_and_the_embedded_pair_drafts_unless_told(words, fixed, gate):
    options = bench.parse([*words.split(), "--device", "cpu"])
    bench.check(options)
    assert options.ignore_eos is fixed and options.gate == gate


def test_on_a_terminal_progress_tells_the_time_left(user_env):
    """In a pipe nothing of it is printed: every other test of this file insists on that."""
    parent, child = os.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    done = subprocess.run([sys.executable, "bench.py", *SHORT, "--max-samples", "2"], cwd=ROOT, stderr=child,
                          stdout=subprocess.PIPE, text=True, timeout=120, env=user_env)
    os.close(child)
    shown = os.read(parent, 1 << 16).decode()
    assert "0/2" in shown and "samples" in shown and re.search(r"\d\d:\d\d<", shown)
    assert done.returncode == 0 and "\x1b" not in done.stdout and done.stdout.startswith("question")
