"""Values, names and places that nobody expects: each test stands for a kind that one mechanism answers everywhere."""

import argparse
import ast
import concurrent.futures
import contextlib
import decimal
import enum
import errno
import fractions
import gzip
import io
import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import measure
import numpy
import pytest
import replay
import sources
import torch
from common import save_adapter
from test_bench import HEAD, three_samples
from test_load import TEXT, tensors_of, write

import bench
import engine
from weights import InputError, adapter, files, load
from weights.asking import Told, takes
from weights.convert import convert
from weights.events import read_events
from weights.given import events_given, video_given
from weights.rows import merge
from weights.sources import Lookup
from weights.text import PROBE, Text, check_question, check_turns

ROOT = Path(files.__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"


def refused(call, *words):
    """The call ends in InputError: one printable line with these words and a way out."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and "; " in message and len(message) < 1300, message
    for word in words:
        assert word in message, message


# ---- names and places ------------------------------------------------------------------------------------------


def test_whether_a_path_is_there_is_asked_of_os():
    """pathlib raises for a name that is too long, and where a link leads to itself."""
    asks = {"exists", "is_file", "is_dir", "is_symlink", "samefile", "resolve"}
    known = {"os.path", "Path(__file__)", "req.timeline", "self.timeline", "folder", "options.videollava"}
    for path in [ROOT / "engine.py", ROOT / "bench.py", *(ROOT / "weights").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in asks:
                assert ast.unparse(node.func.value) in known, (path.name, ast.unparse(node))


def test_a_name_may_be_as_long_as_names_can_be_and_threads_may_write_one_file(tmp_path):
    path = tmp_path / ("n" * 255)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: files.replace_file(path, bytes([i]) * 9000), range(40)))
    assert os.listdir(tmp_path) == [path.name] and len({*path.read_bytes()}) == 1


@pytest.mark.parametrize("path, words", [
    ("{0}/" + "n" * 256, "File name too long"), ("{0}/loop", "symbolic links"), ("{0}", "is a folder"),
    ("{0}/none/x", "is a folder, or in none"), ("/dev/null/x", "Not a directory"), ("{0}/new/", "is a folder"),
    ("{0}/a\0b", "embedded null byte")])
def test_an_output_that_cannot_be_written_is_refused_before_the_run(path, words, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for flag in bench.OUTPUTS:
        refused(lambda flag=flag: bench.insist_writable(path.format(tmp_path), flag), words, f"choose another --{flag}")


@pytest.mark.parametrize("name", ["n" * 300, "loop", "a/" * 3000])
def test_a_name_that_cannot_be_looked_up_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for call in (lambda: engine.source_named(f"adapter:{name}"), lambda: load.open_checkpoint(name),
                 lambda: files.insist_file(name, "a recording")):
        refused(call)
    assert isinstance(engine.source_named(f"lookup:{name}"), Lookup)
    assert bench.main(["--rows", name]) == 2


def test_where_the_current_folder_was_removed_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    refused(lambda: files.insist_file("x.npy", "a recording"), "x.npy: no such file, wanted a recording; its folder .")
    refused(lambda: bench.insist_writable("x.json", "json"), "x.json: cannot be written", "choose another --json")


def test_torch_is_not_started_where_the_current_folder_was_removed(user_env, tmp_path):
    done = subprocess.run(["bash", "-c", f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} {ROOT}/bench.py"],
                          cwd=tmp_path, capture_output=True, text=True, env=user_env)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        "current folder: was removed, and torch cannot start there; change to another"), done


@pytest.mark.parametrize("command, ours", [
    (f"{ROOT}/bench.py", True), ("-m weights.convert", True), ("-m own.convert", False), (f"{ROOT}/own.py", False),
    ("/elsewhere/engine.py", False), ("", False)])
def test_ctrl_c_while_torch_is_imported_is_a_word(command, ours, user_env):
    """Whatever is imported just then: some modules take any exception for a part that is not there."""
    script = (f"import os, signal, sys\nsys.orig_argv = {command.split()}\nsys.argv[:] = sys.orig_argv[:1]\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\nimport weights\n"      # a shell's & ignores it
              "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    print('swallowed')")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=user_env)
    told = (130, "", "interrupted\n") if ours else (0, "swallowed\n", "")
    assert (done.returncode, done.stdout, done.stderr) == told


def test_an_empty_path_is_named():
    refused(lambda: files.insist_file("", "a recording"), "'': no such file, wanted a recording; check the name")
    refused(lambda: load.resolve(""), "'': no such folder")


class Named:
    def __fspath__(self):
        return os.fsencode(ROOT / "weights/tiny/clips/event_npy/scenes/000000.npz")


def test_a_path_like_may_give_bytes():
    assert len(events_given(Named()).read().x)


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["--json", ""], "--json"), (["--json="], "--json"), (["--rows", "a", "--record", "", "--details"], "--record")])
def test_an_empty_value_is_no_flag_left_out(words, said, capsys):
    assert bench.main(words) == 2
    assert capsys.readouterr().err == f"{said}: is empty; give a value, or leave it out\n"
    assert engine.main(["--query", "q", "--video", ""]) == 2 and "--video: is empty" in capsys.readouterr().err


class Closed:
    def keys(self):
        raise RuntimeError("the file is closed")


class Shapeless:
    @property
    def shape(self):
        raise RuntimeError("doesn't support sizes")


class Broken:
    def __repr__(self):
        raise RuntimeError("no words")


class Numberless(float):
    def __index__(self):
        raise KeyError("no number")

    __float__ = __index__


@pytest.mark.parametrize("value", [
    10 ** 400, 10 ** 5000, Broken(), "1", b"5", None, [1], float("nan"), torch.ones(3), torch.ones(1).long() * 5, 5j,
    torch.tensor(True), torch.tensor(5j), numpy.array([5]), numpy.array("5"), numpy.timedelta64(5, "s"),
    Numberless(5), memoryview(b"5")], ids=lambda of: type(of).__name__)
def test_an_argument_of_any_value_is_refused_in_one_line(value):
    for check in (lambda: files.insist_whole("n", value, 2, 9), lambda: files.insist_number("n", value, 2, 9),
                  lambda: files.insist_one_of("n", value, ("a", "b")), lambda: files.insist_flag("n", value)):
        refused(check, "n: ")
    refused(lambda: files.insist_number("n", 10 ** 400, 0), "n: wanted a number 0 or more, got")
    for five in (5, torch.tensor(5), numpy.array(5, ">i4"), numpy.uint64(5)):
        assert files.insist_whole("n", five, 2, 9) == files.insist_number("n", five, 2, 9) == 5
    for half in (0.5, torch.tensor(0.5), numpy.array(0.5), decimal.Decimal("0.5"), fractions.Fraction(1, 2)):
        assert files.insist_number("n", half, 0) == 0.5


@pytest.mark.parametrize("options, words", [
    ({"gate": "on"}, "gate: wanted True or False"), ({"graphs": 1}, "graphs: wanted"),
    ({"self_draft": "no"}, "self_draft: wanted"), ({"seed": 2 ** 64}, "seed: wanted a whole number"),
    ({"seed": "x"}, "seed: "), ({"progress": 5}, "progress: wanted")])
def test_an_option_of_loading_is_checked_before_anything_is_read(options, words):
    refused(lambda: engine.load_engine("nowhere", device="cpu", **options), words)


@pytest.mark.parametrize("options, words", [
    ({"ignore_eos": "no"}, "ignore_eos: wanted True or False"), ({"remember": 0}, "remember: wanted"),
    ({"mode": ["speculative"]}, "mode: ['speculative'] is not one of"), ({"on_event": 5}, "on_event: wanted"),
    ({"timeout": 10 ** 400}, "timeout: "), ({"max_new_tokens": 10 ** 5000}, "max_new_tokens: wanted a whole number")])
def test_a_flag_a_word_or_a_function_of_a_request_is_checked(pair, options, words):
    refused(lambda: pair.generate("e.npz", "v.mp4", "What?", **options), words)


@pytest.mark.parametrize("digits", ["9" * 5000, "\u0663", "\u00b2", "-1", "1.0", ""])
def test_a_rank_is_a_short_number(digits, monkeypatch):
    assert files.rank(digits) is None and files.rank("07") == 7
    refused(lambda: bench.read_shard(f"0/{digits}", {}), "--shard: wanted I/N")
    monkeypatch.setenv("RANK", digits)
    assert bench.speaks()


def test_a_compressed_file_that_ends_early_is_one_line(tmp_path):
    (tmp_path / "v.gz").write_bytes(gzip.compress(bytes(range(256)) * 99)[:-40])
    with gzip.open(tmp_path / "v.gz") as file:
        refused(lambda: video_given(file), "video: a file object that cannot be read (Compressed file ended")


class Lost:
    """A path whose text is none."""

    def __fspath__(self):
        return 5


def test_a_path_like_may_fail_to_say_its_path():
    for call in (lambda: events_given(Lost()), lambda: video_given(Lost()), lambda: video_given([Lost()] * 8),
                 lambda: video_given(image=Lost()), lambda: events_given(event_image_path=[Lost()])):
        refused(call, "is a Lost")
    for call in (load.open_checkpoint, files.read_text, engine.Adapted, read_events):
        refused(lambda call=call: call(Lost(), *["a text"] * (call is files.read_text)), "is a Lost, wanted")


@pytest.mark.parametrize("value", [dict, torch.Tensor, Closed(), Shapeless()],
                         ids=lambda of: type(of).__name__)
def test_what_cannot_be_read_in_memory_is_one_line(value):
    for events in (value, {"x": value, "y": [1], "t": [1], "p": [1]}):
        refused(lambda events=events: events_given(events).read(), "events: ")


def test_a_mapped_file_is_a_file_object():
    with open(ROOT / "weights/tiny/clips/event_npy/scenes/000000.npz", "rb") as file:
        assert len(events_given(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)).read().x)


def test_a_source_may_propose_without_an_end(pair):
    class Endless(engine.DraftSource):
        def propose(self, committed, limit):
            return itertools.count(5)
    clips = ROOT / "weights/tiny/clips"
    asked = dict(events=clips / "event_npy/scenes/000000.npz", video=clips / "mp4/scenes/000000.mp4", query="What?",
                 max_new_tokens=4)
    ids = pair.generate(mode="target_only", **asked).output_ids
    assert pair.generate(draft_source=Endless(), **asked).output_ids == ids


def test_what_a_config_may_leave_out_is_left_out():
    """The budget of memory took it for granted."""
    from weights.shapes import visual_rows
    assert visual_rows("target", {"video_seq_length": None}) == 8 * 257


def test_a_long_text_from_outside_keeps_the_line_short():
    line = str(InputError(f"{'x' * 5000}: no such file; check the name"))
    assert len(line) < 1200 and line.startswith("xxx") and line.endswith("no such file; check the name")


def deep(levels: int) -> str:
    return '{"size": ' * levels + "1" + "}" * levels


def test_a_setting_may_be_a_number_of_any_size():
    for found in (10 ** 400, -10 ** 400, float("inf"), float("nan")):
        assert not load.same_setting([found] * 3, [0.5] * 3) and not load.same_setting(found, 224)
    assert load.same_setting(224.0, 224) and load.same_setting([0.5000001], [0.5])


@pytest.mark.parametrize("device", ["hpu", "privateuseone", "mps", "cuda:99", "meta", "x"])
def test_a_device_that_is_not_there_is_named(device):
    """hpu and privateuseone end in an ImportError of torch's where they are used."""
    refused(lambda: load.pick_device(device), "device ", device)
    refused(lambda: engine.memory_budget(TINY / "drafter", device="cpu", drafter_device=device), "drafter_device ")


def test_a_way_out_can_be_gone(tmp_path):
    """A pickled file under another name was sent to the converter, which sent it back; a path that the library cannot
    open was to be downloaded again."""
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(lambda: load.read_header(tmp_path / "model.safetensors"), "rename it to .bin, then turn it")
    write(tmp_path / "\udcff", TEXT, tensors_of(TEXT))
    refused(lambda: load.open_checkpoint(tmp_path / "\udcff"), "; rename it: the library opens no path that")


def test_text_that_is_not_utf8_is_not_converted(tmp_path):
    for content in ({"a\ud800": torch.ones(2)}, {"a": torch.ones(2), "note": "\ud800"}):
        torch.save(content, tmp_path / "w.bin")
        refused(lambda: convert(tmp_path / "w.bin"), "w.bin: ", "utf-8")
        assert os.listdir(tmp_path) == ["w.bin"]


def test_a_tokenizer_never_marks_where_words_go_on(tmp_path):
    """LLaMA's does not; the library panics over marks that its pieces lack, and prints twenty lines."""
    raw = json.loads((TINY / "target" / "tokenizer.json").read_text())
    raw["model"] |= {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}
    (tmp_path / "t.json").write_text(json.dumps(raw))
    assert Text(tmp_path / "t.json").ids(PROBE) == Text(TINY / "target" / "tokenizer.json").ids(PROBE)


def test_only_as_many_questions_and_rounds_as_a_run_can_take(tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("What?\n" + "x" * 100_001)
    refused(lambda: bench.check(bench.parse(["--questions", str(tmp_path / "q.txt")])), "q.txt: the question has")
    refused(lambda: bench.check(bench.parse(["--draft-source", "lookup:a,lookup:b"])), "names 2 files")
    for flag in ("--warmup", "--repeats"):                   # a list of so many was made first
        refused(lambda flag=flag: bench.check(bench.parse([flag, "9" * 30, "--device", "cpu"])), flag[2:])
    options = bench.parse(["--warmup", "1000000", "--modes", "target_only,target_only", "--device", "cpu"])
    bench.check(options)
    assert options.modes == ["target_only"]

    class Enough(BaseException):
        pass

    def run(*_):
        raise Enough
    monkeypatch.setattr(bench, "run_sample", run)
    with pytest.raises(Enough):
        bench.warm_up(None, [1], options)


def test_a_small_file_may_be_as_deep_as_json_reads(tmp_path):
    """What walks it goes no deeper than it needs, or names the file."""
    write(tmp_path, TEXT, tensors_of(TEXT))
    assert load.same_setting(json.loads(deep(2)), 224) is False and load.same_setting(224, {"height": 224})
    (tmp_path / "r.jsonl").write_text('{"config": {"samples": 1, "modes": []}, "weights": ' + deep(900) + "}\n")
    refused(lambda: merge([tmp_path / "r.jsonl"]), "r.jsonl: not a file of rows (RecursionError")


@pytest.mark.parametrize("name", ["o" * 243 + ".safetensors", "o" * 290 + ".safetensors"])
def test_a_converted_file_may_have_a_long_name(name, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.bin")
    if len(name) < 256:
        assert convert(tmp_path / "w.bin", tmp_path / name) == [tmp_path / name]
    else:
        refused(lambda: convert(tmp_path / "w.bin", tmp_path / name), "cannot be written or read (File name too long)")
    assert len(os.listdir(tmp_path)) == 1 + (len(name) < 256)


class Endless(list):
    """A list that has a length, and no end."""

    def __iter__(self):
        return itertools.repeat(("Q", [5]))


class Failing(list):
    def __iter__(self):
        raise KeyError("no items")

    __len__ = __iter__


async def waits(event):
    """Nobody awaits it."""


@pytest.mark.parametrize("options, words", [
    ({"stop": Endless()}, "stop: wanted a string"), ({"stop": Failing(["a"])}, "stop: wanted a string"),
    ({"draft_source": Endless()}, "draft_source: holds more than 1000"),
    ({"draft_source": Failing()}, "draft_source: a Failing that cannot be read ('no items')"),
    ({"on_event": waits}, "on_event: wanted a function that is not async")], ids=lambda of: "".join(of))
def test_a_list_or_function_of_a_callers_class_is_refused(pair, options, words):
    refused(lambda: pair.generate("e.npz", "v.mp4", "Q", **options), words)
    for turns in (Endless(), Failing(), [("Q", Endless())], [("Q", Failing())]):
        refused(lambda turns=turns: check_turns(turns, 9), "turns: wanted pairs")
    keys = type("Keys", (), {"keys": lambda _: itertools.repeat("x"), "__getitem__": lambda *_: [1]})()
    refused(lambda: events_given(keys), "events: wanted the keys x, y, t, p, found 'x'")


class Strange(numpy.ndarray):
    def __eq__(self, other):
        raise RuntimeError("not comparable")


@pytest.mark.parametrize("value", [Strange(3), numpy.dtype("f4"), Failing()], ids=lambda of: type(of).__name__)
def test_a_dtype_is_compared_with_nothing_that_is_none(value):
    refused(lambda: engine.load_engine("nowhere", device="cpu", dtype=value), "dtype: ", "bf16, fp16, fp32; pick")


@pytest.mark.parametrize("ids", [[2 ** 40], [-5], "hello", [1.5], [None], [2 ** 70], [True]], ids=str)
def test_a_lookup_learns_ids_alone(ids):
    """Others broke the request that was to draft from them."""
    refused(lambda: Lookup().learn(ids), "answer: wanted a whole number 0..2147483647")
    for wrong in (None, 5):
        refused(lambda wrong=wrong: Lookup().learn(wrong), "answer: wanted a list of ids")
        refused(lambda wrong=wrong: engine.Fixed(wrong), "answer: wanted a list of ids")
        refused(lambda wrong=wrong: engine.source_named(wrong), "draft_source ")
        refused(lambda wrong=wrong: engine.Adapted(wrong), "wanted an adapter's folder")
    for path in (None, 5, Lost()):
        refused(lambda path=path: Lookup().save(path), "wanted the path of a file to write")
    own = Lookup()
    own.learn(torch.tensor([5, 6]))
    assert list(own.answers) == [[5, 6]] and type(own.answers[0][0]) is int


@pytest.mark.parametrize("named", [{"needs_drafter": torch.ones(2)}, {"needs_drafter": "no"},
                                   {"name": property(lambda self: 1 / 0)}], ids=lambda of: "".join(of))
def test_a_source_whose_own_words_cannot_be_read_is_refused(pair, named):
    source = type("Mine", (), {"propose": lambda self, committed, limit: []} | named)()
    refused(lambda: pair.generate("e.npz", "v.mp4", "Q", draft_source=source), "draft_source: a Mine whose")


@pytest.mark.parametrize("named", [
    {"__eq__": lambda *_: 1 / 0}, {"__eq__": lambda *_: True}, {"__bool__": lambda _: 1 / 0}, {"__len__": lambda _: 0},
    {"__class__": property(lambda _: 1 / 0)}, {"__class__": Lookup}], ids=lambda of: "".join(of))
def test_a_source_is_looked_into_once_and_compared_with_nothing(pair, named):
    clips = ROOT / "weights/tiny/clips"
    asked = dict(events=clips / "event_npy/scenes/000000.npz", video=clips / "mp4/scenes/000000.mp4", query="What?",
                 max_new_tokens=4)
    source = type("Mine", (), {"propose": lambda self, committed, limit: [5], "__hash__": object.__hash__} | named)()
    result = pair.generate(draft_source=["lookup", source, "drafter"], **asked)
    assert result.output_ids == pair.generate(mode="target_only", **asked).output_ids and not result.drafter_error


def test_a_question_may_be_any_kind_of_text(pair):
    """An Enum's text spells itself otherwise in an f-string."""
    class Asked(str, enum.Enum):  # noqa: UP042
        KEY = "What is there?"
    assert check_question(Asked.KEY) == f"{check_question(Asked.KEY)}" == "What is there?"
    for call in (pair.remember, lambda of: engine.explain(pair.target, of)):
        refused(lambda call=call: call(5), "result: is a int, wanted a Result")
    refused(lambda: engine.explain(None, engine.Result()), "model: is a NoneType, wanted a Model")
    refused(lambda: pair.prepare(progress=5), "progress: wanted a function")


def test_an_embedded_interpreter_may_have_no_words(user_env):
    done = subprocess.run([sys.executable, "-c", "import sys\nsys.argv = []\nimport kernels"], cwd=ROOT, env=user_env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_callers_thread_has_set_in_torch_changes_nothing(pair, read_once):
    """A default device, autocast, gradients: requests, loading and `explain` begin in that thread."""
    clips = ROOT / "weights/tiny/clips"
    files = dict(events=clips / "event_npy/scenes/000000.npz", video=clips / "mp4/scenes/000000.mp4")
    asked, video = dict(query="What?", max_new_tokens=6), read_once(files["video"], 8)
    events = events_given(files["events"]).read()._asdict()

    def said(e, **given):
        result = e.generate(**asked, **given)
        return result.output_ids, engine.explain(e.target, result)
    plain = [of.margins for of in said(pair, mode="target_only", **files)[1]]
    ids = said(pair, **files)[0]
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        assert [of.margins for of in said(pair, mode="target_only", **files)[1]] == plain
        assert said(pair, **files)[0] == said(pair, events=events, video=video)[0] == ids
        with engine.load_engine(None, ROOT / "weights/tiny/target", device="cpu", several=2) as own:
            with own.open(video=video) as one, own.open(video=video) as two:
                assert one.generate(**asked).output_ids == two.generate(**asked).output_ids == ids


# ---- text from outside -----------------------------------------------------------------------------------------


def test_text_from_outside_reaches_no_terminal_raw(tmp_path, capsys, monkeypatch):
    """Names of files and of tensors, and what a saved run says of itself."""
    folder = tmp_path / "a\x1b[2Jb"
    write(folder, TEXT, tensors_of(TEXT) | {"x\x1b[31m.rotary_emb.inv_freq": torch.ones(2)})
    assert load.main([str(folder)]) == 0
    (tmp_path / "r.json").write_text(json.dumps(bench.assemble(HEAD | {"commit": "a\x1b[2J"}, three_samples())))
    assert bench.main(["--compare", *[str(tmp_path / "r.json")] * 2]) == 0
    measure.publish(["of src \x1b[2J"], None)             # of the commands under tests/
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\\x1b[") >= 4


def test_nothing_needs_assertions_docstrings_or_a_wide_encoding():
    """`python -OO` has neither assertions nor docstrings: only our own mistakes are asserted."""
    asserting = {function.name for path in [ROOT / "engine.py", ROOT / "bench.py", *(ROOT / "weights").glob("*.py")]
                 for function in ast.walk(ast.parse(path.read_text())) if isinstance(function, ast.FunctionDef)
                 and any(isinstance(node, ast.Assert) for node in ast.walk(function))}
    assert asserting <= {"tensors", "write"}, asserting

    @takes(Told)
    def bare(self, told):
        return told.on_event
    assert bare(None, on_event=5) == 5 and "on_event: called" in bare.__doc__
    narrow = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(narrow):
        assert files.command(lambda: print("caf\u00e9 \u6f22"))() == 0
    assert raw.getvalue() == b"caf\\xe9 \\u6f22\n"


# ---- runs and their files --------------------------------------------------------------------------------------


def test_a_question_ends_at_a_line_feed_alone(tmp_path):
    (tmp_path / "q.txt").write_bytes("What is\u2028there?\r\n\r\nAnd\u0085now?\x0c\n".encode())
    options = bench.parse(["--questions", str(tmp_path / "q.txt"), "--device", "cpu"])
    bench.check(options)
    assert options.question == ["What is\u2028there?", "And\u0085now?"]


@pytest.mark.parametrize("change", [{"ids": None}, {"e2e_ms": 0}, {"e2e_ms": "x"}, {"accept_lens": [10 ** 400]},
                                    {"overlap_drafts": 10 ** 400}, {}], ids=lambda of: str(of)[:40])
def test_two_saved_runs_that_hold_odd_values_are_one_line(change, tmp_path, capsys):
    run = bench.assemble(HEAD, three_samples())
    (tmp_path / "a.json").write_text(json.dumps(run))
    run["samples"][0]["modes"]["target_only"].update(change)
    if not change:
        del run["samples"][0]["modes"]["target_only"]["e2e_ms"]
    (tmp_path / "b.json").write_text(json.dumps(run))
    code = bench.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "no" in said or (change, code) == ({"ids": None}, 1)


def test_a_number_in_a_saved_run_takes_no_memory(tmp_path):
    run = bench.assemble(HEAD, three_samples())
    run["config"]["ignore_eos"] = 1 << 40
    assert len("\n".join(bench.details(run))) < 10_000


RUN = ["--videollava", str(TINY / "target"), "--dataset-dir", str(TINY / "clips"), "--device", "cpu", "--repeats", "1",
       "--warmup", "0", "--max-new-tokens", "3", "--max-samples", "2", "--modes", "target_only"]


@pytest.fixture
def ceilings_known(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda device: {"read_bw": 1e10, "gemm_flops": 1e11})


def test_two_runs_at_once_keep_their_answers_and_shards_their_files(tmp_path, monkeypatch, ceilings_known):
    """The other run saves while this one measures; and of two shards each writes files of its own."""
    path, real = tmp_path / "l.json", bench.measure
    model = engine.model_name(ROOT / "weights/tiny/target")

    def measure(*given):
        other = engine.source_named(f"lookup:{path}", model)
        other.learn([7, 8, 9])
        other.save(path)
        return real(*given)
    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main([*RUN, "--draft-source", f"lookup:{path}"]) == 0
    assert [7, 8, 9] in (there := Lookup.load(path, model)).answers and there.learnt == 3
    assert bench.main([*RUN, "--draft-source", f"lookup:{path}"]) == 0 and Lookup.load(path, model).learnt == 6
    monkeypatch.setattr(bench, "measure", real)
    outputs = {"json": "r.json", "out": "r.txt", "rows": "r.jsonl"}
    words = [word for flag, name in outputs.items() for word in (f"--{flag}", str(tmp_path / name))]
    assert bench.main([*RUN, *words, "--shard", "1/2", "--json", "/dev/null"]) == 0
    assert bench.main([*RUN, *words, "--shard", "1/2", "--resume"]) == 0
    assert {of.name for of in tmp_path.glob("r.*")} == {f"r.00001-of-00002{Path(of).suffix}" for of in outputs.values()}


def test_what_a_run_reads_is_never_written_over(tmp_path, capsys, monkeypatch):
    """A file named twice by mistake, also by a link, was replaced by the report."""
    monkeypatch.setattr(bench, "load_pair", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "target", "target")
    shutil.copytree(TINY / "clips", "clips")
    save_adapter("ad", adapter.TokenAdapter(small := adapter.AdapterConfig(40, 16, 8, 1, 2, 8)), small)
    for name in ("q", "r", "t", "m", "q.00000-of-00002"):
        Path(name).write_text("kept")
    Lookup(engine.model_name(TINY / "target")).save("m")
    Path("link").symlink_to("q")
    listed, clip = "clips/EventGPT_Instruction_Subset.json", "scenes/000000"
    for words, written in ((["--questions", "q"], "q"), (["--questions", "q"], "link"), (["--tokenizer", "t"], "t"),
                           (["--merge", "r"], "r"), (["--from-json", "r"], "r"),
                           (["--draft-source", "drafter,lookup:m"], "m"), (["--dataset-dir", "clips"], listed),
                           (["--dataset-dir", "clips"], f"clips/mp4/{clip}.mp4"),
                           (["--dataset-dir", "clips"], f"clips/event_npy/{clip}.npz"),
                           (["--dataset-dir", "clips"], "clips/mp4/scenes/000003.mp4"),
                           (["--draft-source", "adapter:ad"], "ad/adapter.safetensors"),
                           (["--videollava", "target/", "--dataset-dir", "clips"], "target/config.json")):
        for flag in ("--json", "--out"):
            assert bench.main([*words, flag, written, *["--max-samples", "1"] * (words[0] == "--dataset-dir")]) == 2
            said = capsys.readouterr().err
            assert said == f"{written}: is read by {words[0]}, and {flag} would replace it; name another file\n"


def test_rows_on_a_device_are_not_to_be_resumed(capsys, monkeypatch):
    """The way out led into the next refusal."""
    monkeypatch.setattr(bench, "set_up", lambda *_: ({}, None))
    assert bench.main(["--device", "cpu", "--rows", "/dev/null"]) == 2
    assert capsys.readouterr().err == ("/dev/null: is not a regular file, and rows are read back; choose another "
                                       "--rows\n")


def test_a_shards_own_names_are_checked_like_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_pair", lambda *_: pytest.fail("it ran"))
    (tmp_path / "q.00000-of-00002.txt").write_text("kept")
    for name, words in (("q.txt", "is read by --questions"), ("n" * 250 + ".txt", "File name too long")):
        assert bench.main(["--questions", str(tmp_path / "q.00000-of-00002.txt"), "--shard", "0/2", "--out",
                           str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_recorded_pairs_are_not_written_over_by_what_replays_them(tmp_path, capsys):
    """One check for the outputs of all commands, before anything runs."""
    path = tmp_path / "p.jsonl"
    path.write_text("kept")
    for main, flag, name, words in (
            (sources.main, "--out", path, "is read by `pairs`"), (replay.main, "--rows", path, "by `"),
            (replay.main, "--out", tmp_path / "no" / "o", "choose another --out"),
            (replay.main, "--timeline", tmp_path / "t.jpg", "--timeline: ")):
        assert measure.run(main, [str(path), flag, str(name)]) == 2 and words in capsys.readouterr().err
    assert measure.run(replay.main, ["--merge", str(path), "--out", str(path)]) == 2 and path.read_text() == "kept"


def test_a_report_is_not_written_to_where_stdout_goes(tmp_path):
    """The report that was printed there was lost."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        kept = os.dup(fd)
        try:
            os.dup2((file := os.open(tmp_path / "o", os.O_CREAT | os.O_WRONLY)), fd)
            os.close(file)
            for path in (tmp_path / "o", f"/dev/{name}", f"/proc/self/fd/{fd}"):
                refused(lambda path=path: files.insist_apart(argparse.Namespace(json=str(path))), f"where {name} goes")
        finally:
            os.dup2(kept, fd)
            os.close(kept)
    for flag in bench.OUTPUTS[1:]:
        refused(lambda flag=flag: files.insist_apart(argparse.Namespace(**{flag: "-"})), f"choose another --{flag}")
    files.insist_apart(argparse.Namespace(json="-", out=tmp_path / "o", draft_source="drafter,lookup"))


def test_an_output_that_cannot_be_had_costs_none_of_the_others(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("builtins.print", full)
    options = bench.parse(["--json", str(tmp_path / "gone" / "j"), "--out", str(tmp_path / "o"), "--record",
                           str(tmp_path / "r")])
    with pytest.raises(InputError, match="gone/j: cannot be written"):
        bench.hand_over(["a line"], bench.assemble(HEAD, three_samples()), options)
    assert (tmp_path / "o").read_text() == "a line\n" and (tmp_path / "r").exists()
    monkeypatch.setattr(bench, "publish", full)
    saved = []
    monkeypatch.setattr(bench, "save_answers", saved.append)
    monkeypatch.setattr(bench, "set_up", lambda *_: (dict(HEAD), argparse.Namespace(copy_stays=None)))
    monkeypatch.setattr(bench, "measure", lambda *_: None)
    with pytest.raises(OSError, match="No space"):
        bench.run(bench.parse(["--device", "cpu"]), "")
    assert len(saved) == 1


@pytest.mark.parametrize("words, said", [
    (["--from-json", "r", "--timeline", "t.png"], "--timeline: does nothing beside --from-json"),
    (["--merge", "r", "--max-samples", "3"], "--max-samples: does nothing beside --merge"),
    (["--compare", "r", "r", "--json", "j"], "--json: does nothing beside --compare"),
    (["--compare", "r", "r", "--merge", "r"], "--compare: does nothing beside --merge"),
    (["--explain", "x", "--rows", "r"], "--rows: does nothing beside --explain")])
def test_a_flag_that_would_do_nothing_is_refused(words, said, capsys):
    assert bench.main(words) == 2 and capsys.readouterr().err == f"{said}; leave it out\n"


def test_a_saved_report_says_what_its_samples_say(tmp_path, capsys):
    """Its figures are computed anew; another schema is refused."""
    report = bench.assemble(HEAD, three_samples())
    (tmp_path / "r.json").write_text(json.dumps(report | {"modes": {}, "identical": {}}, indent=1))
    read = bench.read_report(tmp_path / "r.json")
    assert bench.screen(read) == bench.screen(report) and bench.details(read) == bench.details(report)
    for change, words in (({"schema": 99}, "schema 99, wanted"), ({"skipped": "no"}, "a list of what was skipped")):
        (tmp_path / "r.json").write_text(json.dumps(report | change))
        refused(lambda: bench.read_report(tmp_path / "r.json"), words)


def test_the_reason_of_a_failed_sample_is_shown_with_its_way_out():
    row = {"id": "x", "at": 9, "modes": {}, "question": "q", "error": "a/" * 60 + "v.mp4: damaged; copy it again"}
    assert "copy it again" in " ".join(bench.screen(bench.assemble(HEAD, [*three_samples(), row])))


def test_a_row_that_no_report_can_be_made_of_is_refused_before_the_run(tmp_path, capsys, monkeypatch, ceilings_known):
    assert bench.main([*RUN, "--rows", str(tmp_path / "r.jsonl")]) == 0
    assert bench.main(["--from-json", str(tmp_path / "r.jsonl")]) == 2 and "--merge shows" in capsys.readouterr().err
    head, row, _ = (tmp_path / "r.jsonl").read_text().splitlines()
    (tmp_path / "r.jsonl").write_text("\n".join([head, json.dumps(json.loads(row) | {"question": {}}), ""]))
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it ran"))
    assert bench.main([*RUN, "--rows", str(tmp_path / "r.jsonl"), "--resume"]) == 2
    assert "r.jsonl: not a saved run (TypeError" in capsys.readouterr().err
