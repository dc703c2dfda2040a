"""weights.files, weights.dataset: one reader that takes regular files alone, one writer that replaces no device."""

import ast
import contextlib
import errno
import gzip
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from common import save_adapter
from pairs import json_lines, read_pairs

import bench
from weights import InputError, adapter, convert, dataset, files, load, replace_file
from weights.adapter import AdapterConfig
from weights.convert import read_pickled
from weights.dataset import bare, read_dataset
from weights.files import MAX_SMALL, describe, read_json, read_text
from weights.load import open_checkpoint, read_header, weight_files
from weights.rows import RowFile, read_rows
from weights.sources import Lookup
from weights.text import Text

CLIPS = Path(__file__).resolve().parents[1] / "weights" / "tiny" / "clips"
LIST = "EventGPT_Instruction_Subset.json"
SMALL = AdapterConfig(vocab=40, rows=16, width=8, layers=1, heads=2, hidden=8)


def refused(call, path, *words):
    """The message of the InputError that `call()` raises: one line that names the path, within two seconds of
    this process: others may keep the machine busy."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert time.process_time() - began < 2 and message.startswith(f"{path}: ") and message.isprintable(), message
    assert len(message) < 400 + len(str(path)) and "; " in message, message
    for word in words:
        assert word in message, message


# ---- reading ---------------------------------------------------------------------------------------------------


SMALL_FILES = {     # what -> (name in its folder, how it is read)
    "config": ("config.json", lambda path: open_checkpoint(path.parent)),
    "index": ("model.safetensors.index.json", lambda path: weight_files(path.parent)),
    "shard": ("model.safetensors", read_header),
    "tokenizer": ("tokenizer.json", Text),
    "list": (LIST, lambda path: read_dataset(path.parent, None, -1)),
    "pairs": ("pairs.jsonl", lambda path: read_pairs(path, "a")),
    "lookup": ("answers.json", Lookup.load),
    "rows": ("rows.jsonl", read_rows),
    "pickle": ("weights.bin", read_pickled),
}
BINARY = ("shard", "pickle")


@pytest.mark.parametrize("what", SMALL_FILES)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, what):
    """A pipe or a terminal would be waited for, a device has no end."""
    name, read = SMALL_FILES[what]
    path = tmp_path / name
    os.mkfifo(path)
    refused(lambda: read(path), path, "not a regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(lambda: read(path), path, "not a regular file")
    path.unlink()
    path.mkdir()
    refused(lambda: read(path), path, "is a folder")
    path.rmdir()
    path.touch()
    refused(lambda: read(path), path, "0 bytes")


@pytest.mark.parametrize("what", [what for what in SMALL_FILES if what not in BINARY])
@pytest.mark.parametrize("content, words", [
    (b"<!DOCTYPE html><html>", ["web page", "fetch"]), (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS"]),
    (b"\xff\xfe{\0}\0", ["not UTF-8", "byte 0"]), (b'{\n  "a": 1,\n  oops}', ["not JSON", "line 3 column 3"]),
    (gzip.compress(b"{}", mtime=0), ["a gzip file", "gunzip"]),          # else its test has a name of the second
    (b"[" * 100_000, ["not JSON"]), (b"9" * 5000, ["not JSON"])])
def test_what_is_no_json_is_refused_by_its_place(tmp_path, what, content, words):
    if what in ("pairs", "rows") and b"oops" in content:
        content = b'{"src": "b"}\n\n  oops\n' if what == "pairs" else b'{"src": "b"}\n{}\n  oops\n'
    elif what == "rows":
        content += b"\n"                                     # a last line without its end is left out
    path = tmp_path / SMALL_FILES[what][0]
    path.write_bytes(content)
    refused(lambda: SMALL_FILES[what][1](path), path, *words)


@pytest.mark.parametrize("what", [what for what in SMALL_FILES if what not in BINARY])
def test_a_file_far_too_large_is_refused_unread(tmp_path, what):
    path = tmp_path / SMALL_FILES[what][0]
    with open(path, "wb") as file:
        file.truncate(20 << 30)                              # sparse: it takes no room
    refused(lambda: SMALL_FILES[what][1](path), path, f"{20 << 30} bytes")


def test_every_small_file_may_begin_with_a_byte_order_mark(tmp_path):
    saved = Lookup("m")
    saved.learn([1, 2])
    saved.save(tmp_path / "l.json")
    head = {"config": {"samples": 1, "modes": []}}
    (tmp_path / "r.jsonl").write_text(json.dumps(head) + '\n{"id": "a\u2028b", "at": 0, "modes": {}}\n{"id')
    before = read_rows(tmp_path / "r.jsonl")
    assert before[2] == 4 and before[1][0]["id"] == "a\u2028b"
    for name in ("l.json", "r.jsonl"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert list(Lookup.load(tmp_path / "l.json", "m").answers) == [[1, 2]] and read_rows(tmp_path / "r.jsonl") == before


def test_rows_are_kept_in_a_regular_file_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        refused(lambda path=path: RowFile(path, {"schema": 1}), path, "choose another --rows")


ROOT = Path(files.__file__).resolve().parents[1]
OPENERS = {     # who opens a file, and what for; everything else goes through weights/files.py
    "weights/files.py": {"open_regular", "replace_file", "command", "run"}, "weights/rows.py": {"__init__"},
    "weights/load.py": {"open_weights", "some_rows", "fingerprint", "stored_values", "read_header"},
    "weights/video.py": {"open_video", "read_image"}, "weights/events.py": {"columns_of_npz"},
    "weights/memory.py": {"free_bytes", "holders", "model_name"},
    "weights/convert.py": {"write_all", "read_pickled"}, "weights/packed.py": {"save", "write"},
    "bench.py": {"set_up"}}


def test_nothing_else_opens_a_file():
    """One way in and one way out: whoever opens a file elsewhere meets pipes, full disks and half files anew."""
    names = {"open", "fdopen", "write_text", "write_bytes", "read_text", "read_bytes", "safe_open", "save_file",
             "memmap", "ZipFile", "from_file"}
    folders = [of for name in ("weights", "kernels") for of in (ROOT / name).glob("*.py")]
    for path in [ROOT / "engine.py", ROOT / "bench.py", *folders]:
        found = set()
        for function in ast.walk(ast.parse(path.read_text())):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                called = node.func if isinstance(node, ast.Call) else None
                name = getattr(called, "id", getattr(called, "attr", ""))
                owner = getattr(getattr(called, "value", None), "id", "")
                if isinstance(called, ast.Name) and name.startswith("read_") or (owner, name) == ("e", "open"):
                    continue                                 # the guarded reader itself, an engine's clip
                if name in names or (owner, name) in (("torch", "save"), ("torch", "load")):
                    found.add(function.name)
        allowed = OPENERS.get(path.relative_to(ROOT).as_posix(), set())
        assert found <= allowed, (path, found - allowed)


@pytest.mark.parametrize("behind, code, words", [
    ("> /dev/full", 2, ["stdout: cannot be written (No space left on device)"]), (">&-", 0, []), (">&- 2>&-", 0, []),
    ("> /dev/full 2> /dev/full", 2, []),
    ("| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 1, [])])
def test_a_stdout_that_is_full_closed_or_no_longer_read_ends_quietly(behind, code, words, user_env):
    script = ("from weights.files import command\n"
              "@command\ndef main(argv=None):\n    print('x' * 300000)\n    return 0\nraise SystemExit(main())")
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{script}" {behind}'], cwd=ROOT, capture_output=True,
                          text=True, env=user_env)
    assert done.returncode == code and done.stderr.count("\n") == len(words), done
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize("main", [bench.main, convert.main, load.main])
def test_every_command_takes_its_words_alike(main, capsys, monkeypatch):
    """A wrong or an empty one is a line, and a help that cannot be written is told."""
    for words in (["--no-such-flag"], [""]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "; " in said and "usage" not in said, said
    full = open("/dev/full", "w")
    monkeypatch.setattr("sys.stdout", full)
    with pytest.raises(OSError, match="No space left"):      # `command` says so
        main.__wrapped__(["--help"])
    with contextlib.suppress(OSError):
        full.close()


def test_a_request_to_end_is_like_ctrl_c(monkeypatch, capsys):
    """`timeout` and batch systems send SIGTERM, a closed terminal SIGHUP: the report of what is done is still written.
    In a program of somebody else's, which calls a command's main, signals stay as they are."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)        # under nohup
    main = files.command(lambda argv=None: handlers and handlers[signal.SIGTERM](signal.SIGTERM, None))
    assert main([]) == 0 and not handlers
    assert main() == 130 and capsys.readouterr().err == "interrupted\n"
    assert [*handlers] == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("error, code, told", [
    (InputError("a; b"), 2, "a; b\n"), (KeyboardInterrupt(), 130, "interrupted\n"), (OSError("disk"), None, ""),
    (MemoryError(), 2, "memory: ran out (MemoryError); free some, or ask for less\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "memory: ran out (DefaultCPUAllocator: can't "
     "allocate memory); free some, or ask for less\n"), (RuntimeError("ours"), None, ""),
    (NotADirectoryError(20, "No folder", "a\x1b"), 2, "a\\x1b: cannot be used (No folder); check the path\n")])
def test_a_command_ends_as_its_error_says(error, code, told, capsys):
    @files.command
    def main(argv=None):
        raise error
    if code is None:                                         # no fault of stdout's
        with pytest.raises(type(error)):
            main()
    else:
        assert main() == code
    assert capsys.readouterr().err == told


def test_a_byte_order_mark_and_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a":\r\n "\xe2\x80\xa8"}\r\n')
    assert read_json(path, "an object") == {"a": "\u2028"} and read_text(path, "text").endswith("\r\n")
    path.write_text("[1]")
    assert read_json(path, "a list", MAX_SMALL, list) == [1]
    refused(lambda: read_json(path, "a thing"), path, "JSON list", "a thing: object")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_a_line_feed_alone(tmp_path, end):
    path, rows = tmp_path / "rows.jsonl", [{"a": "x\u2028y\u0085z\x0b\x0c\x1c"}, {"b": 2}, 3]
    text = end.join([json.dumps(rows[0], ensure_ascii=False), "", *map(json.dumps, rows[1:]), ""])
    for start in ("", "\ufeff"):
        path.write_bytes((start + text).encode())
        assert json_lines(path, "rows") == [(1, rows[0]), (3, rows[1]), (4, rows[2])]
    path.write_bytes((text + "{").encode())
    refused(lambda: json_lines(path, "rows"), path, "line 5 column 2")


def test_recorded_pairs_of_other_writers_are_read(tmp_path):
    row = {"src": "a", "seq": "s", "clip": 0, "question": "What is\u0085there?", "videollava_text": "a\u2028b",
           "videollava_ids": [450, 2], "eventgpt_ids": [450, 2]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row | {"clip": 1}), newline="")
    assert [r["clip"] for r in read_pairs(path, "a")] == [0, 1]


def test_every_message_is_one_printable_line():
    assert str(InputError("a\nb\x1b[31m\ud800")) == "a\\nb\\x1b[31m\\ud800"
    assert describe(ValueError("one\ntwo")) == "ValueError: one" and describe(KeyError()) == "KeyError: "
    assert files.brief(10 ** 5000) == "a huge int" and len(files.brief("x" * 1000)) < 90


@pytest.mark.parametrize("change", [{"kind": []}, {"layers": 1_000_000}, {"layers": "4"}, {"heads": 0},
                                    {"hidden": 0}, {"vocab": 0}, {"shift": -1},
                                    {"width": None}, {"no_such_size": 1}])
def test_an_adapters_config_that_fits_no_network_is_refused(tmp_path, change):
    save_adapter(tmp_path, adapter.TokenAdapter(SMALL), SMALL)
    assert adapter.load(tmp_path)[1] == SMALL
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="config.json: "):
        adapter.load(tmp_path)


# ---- writing ---------------------------------------------------------------------------------------------------


def test_a_device_and_a_pipe_are_written_to_and_never_replaced(tmp_path):
    null, pipe, heard = os.stat("/dev/null"), tmp_path / "pipe", []
    replace_file("/dev/null", b"gone")
    replace_file(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_ino == null.st_ino
    (tmp_path / "link").symlink_to("/dev/null")
    replace_file(tmp_path / "link", b"gone")
    assert (tmp_path / "link").is_symlink() and stat.S_ISCHR(os.stat(tmp_path / "link").st_mode)
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    replace_file(pipe, b"x" * 100_000)
    reader.join(5)
    assert heard == [b"x" * 100_000] and stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_links_are_followed_and_mode_and_owner_stay(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    replace_file(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and stat.S_IMODE(real.stat().st_mode) == 0o640
    if os.geteuid() == 0:
        os.chown(real, 12345, 54321)
        replace_file(real, b"newer")
        assert (real.stat().st_uid, real.stat().st_gid) == (12345, 54321)
    (tmp_path / "dangling").symlink_to(tmp_path / "there" / "late")
    replace_file(tmp_path / "dangling", b"made")
    assert (tmp_path / "there" / "late").read_bytes() == b"made"
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "fresh", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["dangling", "fresh", "late", "link", "real", "there"]


def test_what_cannot_be_written_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    refused(lambda: replace_file(tmp_path / "none" / "a", b""), tmp_path / "none" / "a", "No such file")
    refused(lambda: replace_file(tmp_path, b""), tmp_path, "directory")
    refused(lambda: replace_file("nul\0inside", b""), r"nul\x00inside", "cannot be written")
    refused(lambda: replace_file("/dev/full", b"x"), "/dev/full", "No space left on device")

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for old in (path, shm := Path(f"/dev/shm/{os.getpid()}.old")):       # a disk, for all its name
        old.write_bytes(b"old")
        refused(lambda old=old: replace_file(old, b"new"), old, "No space left on device", "free some room")
        assert old.read_bytes() == b"old"
    shm.unlink()
    assert os.listdir(tmp_path) == ["a"]


# ---- data sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, question", [
    ("<event>\nWhat?", "What?"), ("<video>\nWhat?", "What?"), ("<image>\nWhat?", "What?"), ("What?\n<video>", "What?"),
    ("<image>\n<image> <video>What?\n<image>", "What?"), ("What <event>is it?", "What is it?"),
    ("What is <image> here?", "What is <image> here?"), ("<video>", ""), ("<videos> of?", "<videos> of?")])
def test_placeholders_at_either_end_of_a_question_are_no_text(text, question):
    assert bare(text) == question


def test_a_list_gives_its_samples_in_order_as_far_as_they_are_wanted():
    records = json.loads((CLIPS / LIST).read_text())
    samples, problems = read_dataset(CLIPS, None, -1)
    assert len(samples) == len(records) and not problems and [s.at for s in samples] == list(range(len(records)))
    assert samples[0].question == records[0]["conversations"][0]["value"].removeprefix("<event>\n")
    assert [s.id for s in read_dataset(CLIPS, None, 2)[0]] == [r["id"] for r in records[:2]]
    assert {s.question for s in read_dataset(CLIPS, "Why?", -1)[0]} == {"Why?"}


def test_a_record_of_several_questions_is_a_sample_for_each(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(CLIPS, folder)
    records = json.loads((CLIPS / LIST).read_text())[:2]
    records[1]["conversations"] = [
        {"from": "human", "value": "<event>\nWhat?"}, {"from": "gpt", "value": "A car."},
        {"from": "human", "value": "Who?"}, {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
    (folder / LIST).write_text(json.dumps(records))
    one, *three = read_dataset(folder, None, -1)[0]
    a, b = (record["id"] for record in records)
    assert [(s.id, s.question, s.truth, s.at, s.several) for s in three] == [
        (b, "What?", "A car.", 1, True), (f"{b}#2", "Who?", None, 1, True), (f"{b}#3", "Where?", "There.", 1, True)]
    assert one.id == a and not one.several and one.truth == records[0]["conversations"][1]["value"]
    asked, _ = read_dataset(folder, ["Why?", "How?"], 1)
    assert [(s.id, s.question, s.truth) for s in asked] == [(a, "Why?", None), (f"{a}#2", "How?", None)]


@pytest.mark.parametrize("records, words", [
    ({"a": 1}, ["JSON object", "list of records"]), ([], ["the list is empty"]), ([3], ["record 0", "is a int"]),
    ([{"id": "a"}], ["no question"]), ([{"id": "a", "conversations": [{"role": "user", "content": "q"}]}], ["human"]),
    ([{"id": "a", "event_data": "../../x.npy", "video_data": "b", "conversations": [
        {"from": "human", "value": "q"}]}], ["leads out of the data set"])])
def test_a_list_that_cannot_be_run_is_one_line(tmp_path, records, words):
    (tmp_path / LIST).write_text(json.dumps(records))
    refused(lambda: read_dataset(tmp_path, None, -1), tmp_path / LIST, *words)


def test_a_list_with_a_record_a_line_is_told_as_such(tmp_path):
    (tmp_path / LIST).write_text('{"id": "a"}\n{"id": "b"}\n')
    refused(lambda: read_dataset(tmp_path, None, -1), tmp_path / LIST, "as in JSONL, a value a line")


@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_spelt_either_way_in_a_list_and_on_disk(tmp_path, listed, stored):
    shutil.copytree(CLIPS, tmp_path, dirs_exist_ok=True)
    record, name = json.loads((CLIPS / LIST).read_text())[0], "caf\u00e9.npz"
    kept = tmp_path / "event_npy" / unicodedata.normalize(stored, name)
    (tmp_path / "event_npy" / record["event_data"]).rename(kept)
    record["event_data"] = unicodedata.normalize(listed, name)
    (tmp_path / LIST).write_text(json.dumps([record]))
    assert read_dataset(tmp_path, None, -1)[0][0].events == kept
    kept.unlink()
    refused(lambda: read_dataset(tmp_path, None, -1), tmp_path / LIST, record["event_data"], "no such file")


def test_a_link_that_leads_out_of_a_data_set_is_told_with_where_it_may_lead(tmp_path):
    (tmp_path / "a" / "set").mkdir(parents=True)
    (tmp_path / "a" / "set" / "event_npy").symlink_to(CLIPS / "event_npy")
    (tmp_path / "a" / "set" / LIST).write_text((CLIPS / LIST).read_text())
    with pytest.raises(InputError) as caught:
        read_dataset(tmp_path / "a" / "set", None, 1)
    for words in (f"to {CLIPS / 'event_npy'}/", f"or link inside {tmp_path / 'a'} only"):
        assert words in str(caught.value)


@pytest.mark.parametrize("named, at", [(".", ""), ("./.", ""), ("mp4/..", ""), ("..", "mp4"), ("../data", "")])
def test_a_data_set_may_be_named_from_within(tmp_path, monkeypatch, named, at):
    shutil.copytree(CLIPS, tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data" / at)
    assert len(read_dataset(Path(named), None, 2)[0]) == 2


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Root may list all: the error comes from the system's call."""
    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(os, "listdir", closed)
    for call in (lambda: convert.convert(tmp_path, tmp_path / "to"), lambda: adapter.load(tmp_path),
                 lambda: weight_files(tmp_path)):
        refused(call, tmp_path, "cannot be read (Permission denied)")
    refused(lambda: convert.convert(tmp_path / "none"), tmp_path / "none", "cannot be read (Permission denied)")


def test_no_two_samples_have_one_id(tmp_path):
    """Also where an id is that of another record's second question: rows go by them."""
    for kind in ("event_npy", "mp4"):
        (tmp_path / kind).symlink_to(CLIPS / kind)
    first, second = json.loads((CLIPS / LIST).read_text())[:2]
    turn = {"from": "human", "value": "Q?"}
    (tmp_path / LIST).write_text(json.dumps([first | {"id": "a#2"}, second | {"id": "a", "conversations": [turn] * 2}]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "home_of", lambda folder: str(CLIPS.parents[2]))
        samples, problems = read_dataset(tmp_path, None, -1)
    assert [of.id for of in samples] == ["a#2"] and "id a#2 is there twice" in problems[0]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    """It was taken for a file that is not there: "did you mean" it, or left out in silence."""
    for name, read in (("config.json", open_checkpoint), ("model.safetensors.index.json", weight_files),
                       ("model.safetensors", lambda folder: read_header(weight_files(folder)[0][0]))):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).symlink_to("../blobs/abc")
        refused(lambda read=read, folder=folder: read(folder), folder / name, "it is a link to ../blobs/abc, which")
    save_adapter(tmp_path / "ad", adapter.TokenAdapter(SMALL), SMALL)
    (tmp_path / "ad" / "config.json").unlink()
    (tmp_path / "ad" / "config.json").symlink_to("none")
    refused(lambda: adapter.load(tmp_path / "ad"), tmp_path / "ad" / "config.json", "a link to none")


def test_a_bad_record_is_named_and_the_others_run(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(CLIPS, folder)
    records = json.loads((CLIPS / LIST).read_text())[:3]
    records[1]["mp4_data"] = "none.mp4"
    records.append(records[0])
    (folder / LIST).write_text(json.dumps(records))
    samples, problems = read_dataset(folder, None, -1)
    assert [s.at for s in samples] == [0, 2] and len(problems) == 2
    assert problems[0].startswith("record 1: ") and "no such file" in problems[0] and "there twice" in problems[1]
