"""Faults: whatever breaks midway, the answer or the rows are those of a run in which nothing broke, or one line says
why not; and the next request is answered as if nothing had happened. `tests/long_run.py` has the long forms."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import common
import long_run
import pytest
import torch
from common import RECORDS, ROOT, TINY, script, truth

import bench
import engine
import weights.given
import weights.load
import weights.packed
from engine import InputError

QUICK = ["--repeats", "1", "--warmup", "0", "--max-new-tokens", "6", "--device", "cpu", "--modes", "target_only"]


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda device: {"read_bw": 1e10, "gemm_flops": 1e11})


def asked(i=0, **change):
    return common.asked(i, **change)


@pytest.fixture
def report(tmp_path_factory):
    """(flags that save a run's report, what reads it again)."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    return ["--json", str(path)], lambda: json.loads(path.read_text())


# ---- a model that breaks midway


class Breaks:
    """Calls through `count` times, then does something else every time."""

    def __init__(self, real, count, then):
        self.real, self.count, self.then = real, count, then

    def __call__(self, *args, **kwargs):
        self.count -= 1
        return self.real(*args, **kwargs) if self.count >= 0 else self.then(*args, **kwargs)


def dies(*_, **__):
    raise RuntimeError("the device fell off the bus")


@pytest.mark.parametrize("kind,count", [("encode", 0), ("prefill", 0), ("step", 0), ("step", 2), ("step", 9)])
@pytest.mark.parametrize("mode", ["prefill_only", "prefill_then_verify", "speculative", "apart"])
def test_a_drafter_that_dies_midway_costs_nothing_but_its_drafts(pair, monkeypatch, mode, kind, count):
    """In its towers, its prefill, and in its first, third and tenth forward after that; on a device of its own, too."""
    ids, mode, apart = truth(pair, 0), "speculative" if mode == "apart" else mode, mode == "apart"
    died = threading.Event()

    def dying(of, number):
        if (of, number) == (kind, count):
            died.set()
            raise RuntimeError("the device fell off the bus")
    with monkeypatch.context() as patch:
        script(patch, pair.drafter, [*ids[:7], 3, 3, *ids[9:]], before=dying)
        read = weights.given.read_video
        patch.setattr("weights.given.read_video", lambda *given: (died.wait(20), read(*given))[1])
        patch.setattr(pair, "apart", apart)
        result = pair.generate(mode=mode, **asked())
    assert result.output_ids == ids and "fell off the bus" in result.drafter_error
    again = pair.generate(mode=mode, **asked())
    assert again.output_ids == ids and again.drafter_error is None


@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_drafter_that_computes_nan_midway_costs_nothing_but_its_drafts(pair, monkeypatch, count):
    ids = truth(pair, 0)
    for mode in ("prefill_only", "prefill_then_verify", "speculative"):
        with monkeypatch.context() as patch:
            script(patch, pair.drafter, ids, before=lambda kind, number: float("nan") if number >= count else None)
            assert pair.generate(mode=mode, **asked()).output_ids == ids


@pytest.mark.parametrize("stage,kind,count", [("prefill", "prefill", 0), ("decode", "step", 3),
                                              ("verify", "verify", 1)])
def test_nan_in_the_target_names_the_stage_and_stops(pair, monkeypatch, stage, kind, count):
    ids, mode = truth(pair, 0), "speculative" if stage == "verify" else "target_only"
    source = engine.Fixed(ids[:9]) if stage == "verify" else None
    with monkeypatch.context() as patch:
        script(patch, pair.target, ids, before=lambda *at: float("nan") if at == (kind, count) else None)
        with pytest.raises(InputError, match=f"target's logits hold NaN or infinity after {stage}; check"):
            pair.generate(mode=mode, draft_source=source, draft_len=3, **asked())
    assert pair.generate(mode=mode, **asked()).output_ids == ids


def test_after_any_error_the_answer_is_what_it_was(pair, monkeypatch):
    ids = truth(pair, 0)
    for change in ({"video_path": __file__}, {"event_path": __file__}, {"query": None}, {"max_new_tokens": 10 ** 6}):
        with pytest.raises(InputError):
            pair.generate(mode="speculative", **asked(**change))
        assert pair.generate(mode="speculative", **asked()).output_ids == ids
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), RuntimeError("lost"),
                  MemoryError()):
        def fails(*_, error=error, **__):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(pair.target, "encode", fails)
            with pytest.raises(RuntimeError if error.args == ("lost",) else InputError):
                pair.generate(mode="speculative", **asked())
        assert pair.generate(mode="speculative", **asked()).output_ids == ids


def test_two_engines_in_one_process_answer_at_the_same_time_as_each_alone(pair):
    other = engine.load_engine(TINY / "drafter", TINY / "target", device="cpu")
    want, results = [truth(pair, i) for i in range(3)], {}

    def work(name, e):
        results[name] = [e.generate(mode="speculative", **asked(i)).output_ids for i in range(3)]
    threads = [threading.Thread(target=work, args=(i, e)) for i, e in enumerate((pair, other, pair))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: want, 1: want, 2: want}


class Panic(BaseException):
    """What a library in Rust raises when it panics."""


@pytest.mark.parametrize("side,kind", [("target", "encode"), ("target", "step"), ("drafter", "encode")])
def test_a_panic_in_the_target_is_raised_and_never_an_empty_answer(pair, monkeypatch, side, kind):
    ids = truth(pair, 0)

    def panics(of, number):
        if of == kind:
            raise Panic("index out of bounds")
    script(monkeypatch, getattr(pair, side), None, before=panics)
    if side == "target":
        with pytest.raises(RuntimeError, match="Panic: index out of bounds"):
            pair.generate(mode="target_only", **asked())
    else:
        result = pair.generate(mode="prefill_then_verify", **asked())
        assert result.output_ids == ids and "index out of bounds" in result.drafter_error


class Wordless(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("thrown", [SystemExit(3), GeneratorExit(), asyncio.CancelledError(), Panic(), Wordless()],
                         ids=lambda of: type(of).__name__)
def test_whatever_a_source_raises_costs_its_drafts(pair, thrown):
    class Leaves(engine.DraftSource):
        def propose(self, committed, limit):
            raise thrown

        begin = learn = lambda self, _: self.propose([], 0)
    result = pair.generate(mode="speculative", draft_source=Leaves(), **asked())
    assert result.output_ids == truth(pair, 0) and type(thrown).__name__ in result.drafter_error


def test_a_source_neither_waits_for_the_engine_that_asks_it_nor_ends_the_program(pair):
    """Waiting for the request that waits for it would have no end."""
    with pair.open(**{name: path for name, path in asked().items() if name.endswith("path")}) as clip:
        calls = [lambda: pair.generate(timeout=None, **asked()), lambda: clip.generate("Q", timeout=None), clip.close]
        for call, words in [*((call, "waits for the source that asks it") for call in calls), (interrupt, "Interrupt")]:
            source = type("Mine", (), {"propose": lambda _, committed, limit, call=call: call()})()
            result = clip.generate(asked()["query"], 4, draft_source=source)
            assert words in result.drafter_error and len(result.output_ids) == 4


def interrupt():
    raise KeyboardInterrupt


class Lost:
    """A path that cannot be had."""

    def __fspath__(self):
        raise RuntimeError("no path")


@pytest.mark.parametrize("options, words", [
    ({"device": ["cpu"]}, "device"), ({"drafter_device": ""}, "drafter_device '': not a device"),
    ({"tokenizer": 5}, "tokenizer: is a int"), ({"eventgpt": 5}, "eventgpt: is a int, wanted"),
    ({"videollava": b"x\xff"}, "no such folder"), ({"videollava": object}, "videollava: is a type"),
    ({"eventgpt": Lost()}, "eventgpt: is a Lost, wanted the path of a checkpoint; give it as text"),
    ({"tokenizer": Lost()}, "tokenizer: is a Lost")], ids=lambda of: "".join(of))
def test_an_argument_of_another_type_is_one_line(options, words):
    models = {"eventgpt": TINY / "drafter", "videollava": TINY / "target", "device": "cpu"}
    with pytest.raises(InputError) as error:
        engine.load_engine(**models | options)
    assert words in str(error.value) and str(error.value).isprintable() and "; " in str(error.value)


@pytest.mark.parametrize("source", ["no such source", object(), 5, engine.DraftSource, ["drafter", None], "self"],
                         ids=lambda of: type(of).__name__)
def test_a_source_that_is_none_is_refused(pair, source):
    with pytest.raises(InputError, match="draft_source[^\n]*; ") as error:
        pair.generate(**asked(draft_source=source))
    assert "\n" not in str(error.value)


def test_a_path_may_be_bytes(pair):
    given = {name: os.fsencode(value) if isinstance(value, Path) else value for name, value in asked().items()}
    assert pair.generate(mode="speculative", **given).output_ids == truth(pair, 0)


@pytest.mark.parametrize("options", [{"cache_rows": 0}, {"cache_rows": -1}, {"cache_rows": "many"}, {"cache_rows": 1.5},
                                     {"draft_len": 32}, {"draft_len": -1}, {"overlap_len": None, "draft_len": "five"}],
                         ids=str)
def test_sizes_of_an_engine_are_checked_before_anything_is_read(options, monkeypatch):
    monkeypatch.setattr("weights.memory.open_model", dies)
    with pytest.raises(InputError, match="wanted a whole number"):
        engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", **options)


def test_weights_that_cannot_be_packed_are_refused_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise engine.NotPackable("96 inner columns in groups of 96")
    monkeypatch.setattr(weights.packed, "quantise", fails)
    with pytest.raises(InputError, match="drafter: cannot be packed .96 inner columns"):
        engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", drafter_dtype="int4")


def on_a_card(monkeypatch, capability=(9, 0)):
    """Budgets as on a machine with a GPU."""
    monkeypatch.setattr("weights.memory.pick_device", lambda name, *_: torch.device("cuda:0"))
    monkeypatch.setattr("weights.memory.free_bytes", lambda device: (10 ** 9, 10 ** 9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_on_a_gpu_older_than_its_products_there_is_no_copy(monkeypatch):
    on_a_card(monkeypatch, (7, 5))
    budget = engine.memory_budget(None, TINY / "target")["target"]
    assert "packed" not in budget and budget["no_copy"] == "its products need compute capability 8.0, cuda:0 is older"
    with pytest.raises(InputError, match="self_draft: its products need compute capability 8.0, cuda:0 is older"):
        engine.memory_budget(None, TINY / "target", self_draft=True)
    on_a_card(monkeypatch, (8, 0))
    budget = engine.memory_budget(None, TINY / "target")["target"]
    assert budget["packed"] > 0 and "no_copy" not in budget


@pytest.mark.parametrize("fault, why", [
    ("large", "packing it failed (NotPackable: values too large for scales in fp16)"),
    ("memory", "packing it failed (OutOfMemoryError: CUDA out of memory)"), ("budget", "told by the budget")])
def test_an_engine_whose_copy_cannot_be_made_runs_without_and_one_line_says_so(monkeypatch, caplog, fault, why):
    real, quantise = engine.memory_budget, weights.packed.quantise

    def budgeted(*args):                                     # as on a GPU, where a copy is made if it can be
        budget = real(*args[:7], fault != "budget", *args[8:])
        return budget if fault != "budget" else {**budget, "target": {**budget["target"], "no_copy": why}}

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(engine, "memory_budget", budgeted)
    if fault == "large":
        monkeypatch.setattr(weights.packed, "quantise", lambda w, *how: quantise(w * 1e8, *how))
    elif fault == "memory":
        monkeypatch.setattr(engine.Decoder, "packed", short)
    with engine.load_engine(None, TINY / "target", device="cpu") as e:
        assert e.target.copy is None
        assert [of.getMessage() for of in caplog.records] == [
            f"{TINY / 'target'}: has no 4-bit copy that drafts (`self`): {why}"]
    if fault == "large":
        with pytest.raises(InputError, match="target: cannot be packed .values too large .*; leave out self_draft"):
            engine.load_engine(None, TINY / "target", device="cpu", self_draft=True)


def test_a_target_that_cannot_be_packed_does_without_its_copy_unless_told(monkeypatch):
    """As on a GPU, where a copy is made if it fits; and what fits in its place names no packed form."""
    def fails(*_):
        raise engine.NotPackable("96 inner columns")
    monkeypatch.setattr("weights.memory.packed_bytes", fails)
    on_a_card(monkeypatch)
    for free in (10 ** 9, 10 ** 6):
        monkeypatch.setattr("weights.memory.free_bytes", lambda device, free=free: (free, free))
        if free > 10 ** 8:
            budget = engine.memory_budget(None, TINY / "target")["target"]
            assert "packed" not in budget and budget["no_copy"] == "cannot be packed (96 inner columns)"
            with pytest.raises(InputError, match="target: cannot be packed .96 inner columns.; leave out self_draft"):
                engine.memory_budget(None, TINY / "target", self_draft=True)
        else:
            with pytest.raises(InputError, match="and is never packed: free memory"):
                engine.memory_budget(TINY / "drafter", TINY / "target")


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_launchers_variable_that_is_no_number_is_named(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "first")
    assert bench.main(QUICK) == 2
    err = capsys.readouterr().err
    assert name in err and "wanted whole numbers in the environment" in err and err.count("\n") == 1


def test_two_threads_that_ask_first_load_one_engine(monkeypatch):
    loaded, real = [], engine.load_engine

    def slow(**options):
        loaded.append(options)
        time.sleep(0.2)
        return real(**options)
    monkeypatch.setattr(engine, "load_engine", slow)
    inference = engine.PrefillOnlyInference(TINY / "drafter", TINY / "target", device="cpu")
    threads = [threading.Thread(target=inference.load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1 and inference.engine is not None


def test_what_an_engine_remembers_of_questions_and_numbers_of_pictures_is_bounded():
    gate = engine.Gate()
    for i in range(3000):
        gate.accepted("round", f"question {i}", 3, 2)
    assert len(gate.tries) <= 1000 and gate.alive("round", "question 2999", 1)[0] > 0.9
    assert gate.alive("round", "never asked", 1)[0] > 0.9                     # the pool's share is still there
    drafter = engine.load_model(engine.Drafter, TINY / "drafter", "cpu")
    side = drafter.vision.image
    with torch.inference_mode():
        first = drafter.visual_rows(torch.ones(1, 3, side, side)).clone()
        for frames in range(2, 14):
            drafter.visual_rows(torch.ones(frames, 3, side, side))
        assert len(drafter.pixels) == sum(key[0] == "encode" for key in drafter.step_graphs) == 8
        assert torch.equal(drafter.visual_rows(torch.ones(1, 3, side, side)), first)


def test_a_full_disk_at_the_end_costs_the_picture_and_not_the_run(tmp_path, capsys, quick_ceilings):
    with limited(300):
        code = bench.main([*QUICK, "--max-samples", "2", "--timeline", str(tmp_path / "t.png")])
    out, err = capsys.readouterr()
    assert code == 2 and "t.png: cannot be written" in err and "target_only" in out


# ---- memory


def test_the_printed_budget_is_what_is_allocated(pair):
    budget = engine.memory_budget(TINY / "drafter", TINY / "target", device="cpu")
    for model in pair.models:
        d = model.decoder
        held = [d.k_cache_LNMK, d.v_cache_LNMK, d.cos_MK, d.sin_MK, model.hidden_MD]
        assert budget[model.side]["cache"] == sum(t.nbytes for t in held)
        assert budget[model.side]["weights"] == sum(t.nbytes for t in d.w.values())
    line = bench.memory_line(budget)
    for side, of in budget.items():
        needs = sum(of[part] for part in ("weights", "cache", "scratch")) / 1e9
        assert f"{side} {needs:.3f} GB (weights " in line
    assert f"(weights {budget['target']['weights'] / 1e9:.3f}, cache 0.002, scratch " in line
    assert " free on cpu" in line and line.endswith("; --cache-rows 512,512, fewer need less")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")])
@pytest.mark.parametrize("where", ["load", "cache"])
def test_memory_that_runs_out_while_loading_is_one_line_with_figures_and_flag(error, where, monkeypatch, capsys):
    def fails(*_, **__):
        raise error
    with monkeypatch.context() as patch:
        if where == "load":
            patch.setattr(weights.load.Checkpoint, "load", fails)
        else:
            patch.setattr(engine.Workspace, "__init__", fails)
        assert bench.main(QUICK) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "GB (weights 0.009, cache 0.002, scratch 0." in err
    assert "GB free" in err and "lower --cache-rows" in err
    engine.load_engine(TINY / "drafter", TINY / "target", device="cpu")


# ---- the bench: samples that fail, Ctrl-C, kill -9, a full disk


def test_a_sample_that_fails_in_an_unforeseen_way_is_counted_and_the_others_run(monkeypatch, capsys, quick_ceilings,
                                                                               report):
    real = weights.given.read_video

    def fails(path, *args):
        if Path(path).name == "000002.mp4":
            raise ZeroDivisionError("unforeseen")
        return real(path, *args)
    monkeypatch.setattr("weights.given.read_video", fails)
    flags, read = report
    assert bench.main([*QUICK, "--max-samples", "4", *flags]) == 1
    out, err = capsys.readouterr()
    failed = [row for row in read()["samples"] if "error" in row]
    assert err == "" and [row["error"] for row in failed] == ["ZeroDivisionError: unforeseen"]
    assert f"failed    {failed[0]['id']}: ZeroDivisionError: unforeseen" in out
    assert bench.main([*QUICK, "--max-samples", "4", "--debug"]) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "in fails" in err


@pytest.mark.parametrize("where", ["load", "warm-up", "sample"])
def test_ctrl_c_at_any_time_leaves_a_table_or_one_word(where, monkeypatch, capsys, quick_ceilings, report):
    def stop(*_, **__):
        raise KeyboardInterrupt
    if where == "load":
        monkeypatch.setattr(engine, "load_engine", stop)
    else:
        monkeypatch.setattr(bench, "run_sample", Breaks(bench.run_sample, {"warm-up": 1, "sample": 5}[where], stop))
    flags, read = report
    assert bench.main([*QUICK, "--warmup", "3", *flags]) == 130
    out, err = capsys.readouterr()
    if where == "load":
        assert (out, err) == ("", "interrupted\n")
    else:
        done = {"warm-up": 0, "sample": 2}[where]
        assert err == "" and f"interrupted after {done} of 9 samples" in out
        assert len(read()["samples"]) == done


def test_sigint_from_outside_ends_in_the_table_of_what_is_done(tmp_path, user_env, report):
    rows, (flags, read) = tmp_path / "rows.jsonl", report
    command = [sys.executable, "bench.py", *QUICK, "--repeats", "8", "--rows", str(rows), *flags]

    def listen():                                            # a job in the background of a shell ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=user_env,
                          preexec_fn=listen) as process:
        began = time.monotonic()
        while not (rows.exists() and rows.read_bytes().count(b"\n") > 2) and time.monotonic() - began < 60:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == ""
    found = read()
    assert found["interrupted"] and 2 <= len(found["samples"]) < 9
    assert f"interrupted after {len(found['samples'])} of 9 samples" in out
    assert len(rows.read_bytes().splitlines()) == 1 + len(found["samples"])


def test_rows_of_runs_that_were_killed_and_resumed_are_those_of_one_run(tmp_path, quick_ceilings):
    """The short form of `python tests/long_run.py rows --count 2000 --shards 3 --kills 10`."""
    figures = long_run.killed_rows(tmp_path, rows=6, shards=1, kills=1, seed=6, here=True)
    assert figures["kills"] == 1 and figures["equal"] and figures["rows"] == 6, figures


def limited(nbytes):
    """No file may grow beyond this: writing fails with EFBIG, as it fails with ENOSPC on a full disk."""
    class Limit:
        def __enter__(self):
            self.was = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, self.was[1]))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.was)
    return Limit()


def test_a_disk_that_fills_up_during_a_run_keeps_the_finished_rows(tmp_path, capsys, quick_ceilings, report):
    rows, (flags, read) = tmp_path / "rows.jsonl", report
    with limited(9_000):
        code = bench.main([*QUICK, "--rows", str(rows)])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1
    assert str(rows) in err and "File too large" in err and "--resume" in err
    kept = rows.read_bytes().rsplit(b"\n", 1)[0].splitlines()
    assert 2 <= len(kept) < 10
    assert bench.main([*QUICK, "--rows", str(rows), "--resume", *flags]) == 0
    lines = rows.read_bytes().splitlines()
    assert lines[:len(kept)] == kept and [json.loads(line)["id"] for line in lines[1:]] == [r["id"] for r in RECORDS]
    assert [row["id"] for row in read()["samples"]] == [r["id"] for r in RECORDS]


@pytest.mark.parametrize("flag", ["--json", "--record", "--timeline"])
def test_a_full_disk_leaves_the_old_report_untouched(flag, tmp_path, capsys, quick_ceilings):
    path = tmp_path / ("out.png" if flag == "--timeline" else "out")
    modes = ["--modes", "target_only,drafter_only", "--max-samples", "2"]
    path.write_text("the old one")
    with limited(300):
        code = bench.main([*QUICK, *modes, flag, str(path)])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and str(path) in err and "cannot be written" in err
    assert path.read_text() == "the old one" and os.listdir(tmp_path) == [path.name]
    assert bench.main([*QUICK, *modes, flag, str(path)]) == 0 and path.stat().st_size > 300


def test_answers_that_cannot_be_saved_keep_the_old_file(tmp_path):
    source, path = engine.Lookup(), tmp_path / "answers.json"
    source.learn(list(range(300)))
    source.save(path)
    before = path.read_bytes()
    source.learn(list(range(300)))
    with limited(100), pytest.raises(InputError, match="answers.json: cannot be written"):
        source.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["answers.json"]


# ---- the short forms of tests/long_run.py


@pytest.fixture(scope="module")
def another_process():
    """Another Python, started once: what runs for hours starts one each time."""
    with long_run.fresh_process() as process:
        yield process


@pytest.fixture
def one_start(another_process, monkeypatch):
    """`fresh_process` gives that one again, and ending it is left to the fixture."""
    class Kept(contextlib.AbstractContextManager):
        submit, shutdown = another_process.submit, staticmethod(lambda: None)

        def __exit__(self, *_):
            pass
    monkeypatch.setattr(long_run, "fresh_process", Kept)


def test_twenty_requests_answer_alike_and_leave_nothing_behind(one_start):
    found = long_run.requests(20)
    assert found["distinct outputs"] == 1 and found["growth MB"] < 20, found
    for drift, low, high in (found["drift"], found["processor drift"]):      # of two pairs: that both sides ran
        assert low <= drift <= high, found
    assert abs(drift) < 1, found                             # of processor time; the clock goes on while others run


def test_one_input_gives_one_output_however_often_and_in_another_process(one_start):
    """The short form of `python tests/long_run.py repeat`."""
    found = long_run.repeat(3, 1)
    assert set(found.values()) == {1} and {"target_only", "speculative", "forced drafts", "sampled"} <= set(found)
    of_forced = next(iter(long_run.repeated(1)["forced drafts"]))
    drafted, accepted, rounds, accept_lens, _ = of_forced[3:]
    assert drafted > accepted > 0 and rounds == len(accept_lens) > 2          # the counters count something


def test_drafts_of_every_source_and_length_never_change_an_answer():
    """The short form of `python tests/long_run.py generations`: each source twice."""
    names = long_run.source_names()
    found = long_run.generations(2 * len(names), seed=3)
    assert found["equal"] == found["generations"] == 2 * len(names) and set(found["accepted"]) == set(names), found
    assert min(found["accepted"][name] for name in ("forced", "drafter", "ahead", "lookup")) > 5, found
