"""The engine as a program holds it: it waits, closes and survives a fork in one line, and its results go anywhere."""

import dataclasses
import enum
import inspect
import json
import os
import pydoc
import signal
import threading
import time
import traceback
import typing
import weakref

import numpy
import pytest
from common import TINY, asked, script, truth
from PIL import Image

import engine
from engine import InputError, PrefillOnlyInference
from kernels.frames import draw_events
from weights.asking import Asking, Media
from weights.events import read_events


@pytest.fixture
def mine():
    """An engine that a test may close: both sides, loaded in some 50 ms."""
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False)


def one_line(call, *words):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value) and "; " in str(error.value) and all(word in str(error.value) for word in words)


# ---- close


def test_a_closed_engine_has_no_threads_no_memory_and_refuses_in_one_line(mine):
    mine.generate(mode="speculative", **asked(0))
    clip = mine.open(**{name: value for name, value in asked(0).items() if name != "query"})
    kept = [weakref.ref(of) for model in mine.models for of in (model, model.decoder.k_cache_LNMK, model.state_W)]
    threads = [thread for pool in mine.threads.values() for thread in pool._threads]
    assert len(threads) == 2 and all(thread.is_alive() for thread in threads)
    mine.close()
    mine.close()
    assert not any(thread.is_alive() for thread in threads)
    assert [of() for of in kept] == [None] * len(kept)
    for call in (lambda: mine.generate(**asked(0)), lambda: clip.generate("?"), lambda: next(mine.stream(**asked(0))),
                 lambda: mine.open(video=asked(0)["video_path"]), mine.prepare):
        one_line(call, "closed")
    clip.close()


def test_with_closes_also_behind_a_stream_that_is_left_open(mine):
    with pytest.raises(ZeroDivisionError), mine:
        for _ in mine.stream(mode="speculative", **asked(0)):
            raise ZeroDivisionError                          # its traceback holds the stream
    one_line(lambda: mine.generate(**asked(0)), "closed")
    with PrefillOnlyInference(TINY / "drafter", TINY / "target", "cpu") as api:
        held = api.load()
        stream = held.stream(**asked(0))
        next(stream)
    assert held.closed
    one_line(lambda: list(stream), "closed")


def test_a_source_that_closes_its_engine_as_it_begins_is_answered_in_one_line(mine):
    source = type("Mine", (), {"propose": lambda *_: [], "begin": lambda *_: mine.close()})()
    one_line(lambda: mine.generate(draft_source=source, **asked(0)), "engine: is closed; ")


def test_closing_ends_a_request_of_another_thread(mine, monkeypatch):
    said, started = [], threading.Event()

    def closing(kind, number):                               # the fourth step waits for it
        end = time.monotonic() + 20
        while kind == "step" and number == 3 and not mine.closed and time.monotonic() < end:
            time.sleep(0.002)
    script(monkeypatch, mine.target, [5] * 60, before=closing)

    def ask():
        try:
            for _ in mine.stream(mode="target_only", **asked(0)):
                started.set()
        except InputError as error:
            said.append(str(error))
    thread = threading.Thread(target=ask)
    thread.start()
    assert started.wait(20)
    mine.close()
    thread.join(20)
    assert not thread.is_alive() and said == ["engine: is closed; load another one"]


# ---- other threads, other processes


def test_a_second_thread_waits_so_long_and_is_told_why(pair):
    ids, said, stream = truth(pair, 0), {}, pair.stream(mode="target_only", **asked(0))
    next(stream)

    def ask(name, timeout):
        began = time.monotonic()
        try:
            said[name] = pair.generate(mode="target_only", timeout=timeout, **asked(0)).output_ids
        except InputError as error:
            said[name] = str(error), time.monotonic() - began
    waits = {"short": 0.1, "now": 0, "long": 30, "ever": None}
    threads = [threading.Thread(target=ask, args=of, daemon=True) for of in waits.items()]
    for thread in threads:
        thread.start()
    for thread in threads[:2]:
        thread.join(25)
    for name, least in (("short", 0.1), ("now", 0)):
        line, waited = said[name]
        assert line.startswith("engine: a request of MainThread has kept it busy for ") and "`timeout`" in line
        assert least <= waited < 25                          # on a busy machine; "long" would have waited for 30
    stream.close()
    for thread in threads:
        thread.join(20)
    assert said["long"] == said["ever"] == ids
    for wrong in (-1, "1", float("nan"), True):
        one_line(lambda wrong=wrong: pair.generate(timeout=wrong, **asked(0)), "timeout: wanted a number 0 or more")


def in_child(work):
    """What `work` returned in a forked child, as JSON; an alarm ends a child that hangs."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    assert os.waitpid(child, 0)[1] == 0, "the child hung"
    return json.loads(said)


def test_a_request_is_refused_where_the_program_has_ended_its_threads(mine):
    """As of a thread that goes on when the main one ends."""
    mine.threads["target"].shutdown()
    one_line(lambda: mine.generate(**asked(0)), "engine: the program is ending", "ask before the main thread ends")
    assert mine.owner is None and not mine.lock.locked()


def test_a_forked_child_is_told_in_one_line_and_never_hangs(pair):
    api = PrefillOnlyInference()
    api.engine = pair
    clip = pair.open(video=asked(0)["video_path"], mode="target_only")
    stream = clip.stream("What is there?")
    next(stream)                                             # so the lock is held across the fork

    def said(call):
        try:
            return call()
        except InputError as error:
            return str(error)

    def work():
        lines = [said(lambda: pair.generate(**asked(0))), said(lambda: api.generate(**asked(0))),
                 said(lambda: clip.generate("?")), said(lambda: list(stream))]
        clip.close(), stream.close(), pair.close()
        return lines
    for line in in_child(work):
        assert line.startswith("engine: was loaded before os.fork()") and "; load one in the child" in line
    stream.close()
    clip.close()
    assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)


# ---- results and arguments


def test_a_result_goes_through_json(pair):
    result = pair.generate(mode="speculative", **asked(0))
    back = json.loads(json.dumps(result.as_dict()))
    assert all(result.get(key) is None for key in (0, None, "get", "nothing"))       # its methods are no items
    assert set(back) == set(result) and back["output_ids"] == result.output_ids and back["rounds"] == result.rounds
    assert [engine.Round(**of) for of in back["round_log"]] == result.round_log
    old = json.loads(json.dumps(result.in_old_words().as_dict()))
    assert old["output_tokens"] == result.output_ids and "vl_prefill_time" in old


def test_numbers_of_any_library_are_taken(pair):
    ids = truth(pair, 0)
    plain = dict(max_new_tokens=12, draft_len=3, overlap_len=4, event_frames=5, seed=3, temperature=2.0, top_p=0.5)
    kinds = {int: numpy.int64, float: numpy.float32}
    odd = {name: kinds[type(value)](value) for name, value in plain.items()}
    assert pair.generate(**asked(0) | plain).output_ids == pair.generate(**asked(0) | odd).output_ids
    assert pair.generate(mode="target_only", **asked(0, max_new_tokens=numpy.uint8(5))).output_ids == ids[:5]
    for wrong in (numpy.float64(5), numpy.bool_(True), numpy.array([5, 6]), "5", None, 5.0):
        one_line(lambda wrong=wrong: pair.generate(**asked(0, max_new_tokens=wrong)), "max_new_tokens: wanted a whole")
    one_line(lambda: engine.load_engine(None, TINY / "target", device="cpu", cache_rows=2.5), "cache_rows: wanted")
    small = engine.load_engine(None, TINY / "target", "cpu", cache_rows=numpy.int32(300))
    assert small.target.decoder.cache_rows == 300


# ---- what an editor sees


CALLS = {"Engine": ("stream", "generate", "open"), "PrefillOnlyInference": ("stream", "generate"),
         "Clip": ("stream", "generate", "chat")}
OWN = {"self", "on_event", "chat", "max_draft_tokens"}


def parameters(name, call):
    return inspect.signature(getattr(getattr(engine, name), call)).parameters


def test_every_call_has_the_same_arguments_in_the_same_order_with_the_same_defaults():
    named = [of for of in parameters("Engine", "generate") if of not in OWN]
    assert named[:4] == ["events", "video", "query", "max_new_tokens"]
    for name, call in ((name, call) for name, calls in CALLS.items() for call in calls):
        given, function = parameters(name, call), getattr(getattr(engine, name), call)
        of_media = {of.name for of in dataclasses.fields(Media)}
        wanted = [of for of in named if (name, of) != ("Engine", "query") or call != "open"]
        wanted = [of for of in wanted if of not in of_media] if name == "Clip" else wanted
        assert [of for of in given if of not in OWN] == wanted, (name, call)
        assert ("on_event" in given) == (call in ("generate", "chat")) and function.__doc__
        assert all(of.annotation != of.empty for of in given.values() if of.name != "self")
        assert not any(of.kind in (of.VAR_POSITIONAL, of.VAR_KEYWORD) for of in given.values())
        for of in wanted:
            default = parameters("Engine", "generate")[of].default
            changed = name == "Clip" and of != "query" or (name, of) == ("PrefillOnlyInference", "mode")
            assert given[of].default == (None if changed else inspect.Parameter.empty if name == "Clip" else default)
        assert set(typing.get_type_hints(function)) == {*given, "return"} - {"self"}
    for of in (*dataclasses.fields(Media), *dataclasses.fields(Asking)):
        assert of.default == parameters("Engine", "generate")[of.name].default, of.name


def test_an_argument_that_there_is_not_is_refused_before_a_stream_is_read(pair):
    one_line(lambda: pair.stream(max_tokens=5, **asked(0)), "max_tokens: not an argument of Engine.stream; ",
             "did you mean max_new_tokens?")
    one_line(lambda: pair.generate(do_sample=False, **asked(0)), "do_sample: not an argument of Engine.generate; help(")
    one_line(lambda: pair.stream("e.npz", "v.mp4", "Q", 5, 6), "Engine.stream: too many positional arguments; help(")
    one_line(lambda: pair.generate("e.npz", events="e.npz"), "Engine.generate: multiple values for argument 'events'")
    one_line(lambda: engine.Clip.generate(None), "Clip.generate: missing a required argument: 'query'")
    one_line(lambda: engine.load_engine(cache_row=5), "cache_row: not an argument of load_engine; did you")


def test_help_begins_with_what_is_called_first():
    head = pydoc.plaintext.document(engine)[:1200]
    places = [head.index(word) for word in ("load_engine(", "Engine.generate(", "Engine.open(", "Clip", "Result   ")]
    assert places == sorted(places) and places[-1] < 700


class Later:
    """As what an async function gives, but nobody is warned that it was not awaited."""

    def __await__(self):
        return iter([])


def test_a_mode_may_be_an_enum_and_stays_with_the_caller(pair):
    kind = enum.Enum("Mode", {"PLAIN": "target_only"}, type=str)
    result = pair.generate(mode=kind.PLAIN, **asked(0))
    assert type(result.mode) is str and result.mode == "target_only" and result.output_ids == truth(pair, 0)


def test_every_event_is_told_and_what_the_callback_raises_ends_the_request(pair):
    told = []
    result = pair.generate(mode="speculative", on_event=told.append, **asked(0))
    assert "".join(event.delta for event in told if event.kind == "final") == result.output_text
    assert told[-1].result is result
    with pytest.raises(ZeroDivisionError) as held:           # its traceback would hold the stream
        pair.generate(mode="target_only", on_event=lambda event: 1 / 0, **asked(0))
    assert pair.owner is None and held
    for told_later in (lambda event: Later(), type("Told", (), {"__call__": lambda self, event: Later()})()):
        one_line(lambda told=told_later: pair.generate(mode="target_only", on_event=told, **asked(0)),
                 "on_event: gave what nobody awaits")
    with pair.open(video=asked(0)["video_path"], mode="target_only") as clip:
        assert clip.generate(asked(0)["query"], on_event=told.append) is told[-1].result
        assert clip.chat(asked(0)["query"], 3, on_event=told.append) is told[-1].result
        assert len(told[-1].result.output_ids) == 3
    assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)


def test_the_first_arguments_go_by_place_in_the_research_codes_order_too(pair, tmp_path):
    picture, files = tmp_path / "events.png", asked(0)
    frames = draw_events(read_events(files["event_path"]), 1)
    Image.fromarray(numpy.array(frames[0].tolist(), "u1")).save(picture)
    api = PrefillOnlyInference()
    api.engine = pair
    result = api.generate(str(picture), str(files["video_path"]), files["query"], 5, 3)
    assert result.output_ids == truth(pair, 0)[:5] and result.mode == "prefill_then_verify"
    assert result.output_ids == pair.generate(files["event_path"], files["video_path"], files["query"], 5).output_ids
