"""Stop strings: the text ends before the one that is complete first, in every mode and however the ids come in; nothing
of one is ever shown; the ids are those of the text."""

import random
import threading

import pytest
from common import TINY, asked, script, truth

from engine import Fixed, Gate, InputError
from weights.text import Text, TextStream, check_stop

SAID = "The key elements in this scene are a yellow circle moving quickly upwards, while nothing else is there."


@pytest.fixture(scope="module")
def text():
    return Text(TINY / "target/tokenizer.json")


def cut(whole, stops):
    """The plain definition."""
    found = [(whole.find(of) + len(of), whole.find(of)) for of in stops if of in whole]
    return whole[:min(found)[1]] if found else whole


STOPS = [(" yellow",), ("yell", "low circle"), ("The",), ("T",), (".",), ("there.",), ("nowhere",),
         ("scene are a yellow cube",), (" while nothing else is there. And",), ("circle", "yellow circle"),
         ("yellow circle moving", "circle"), ("e key", "key el", "y e"), ("quickly\n", ",")]


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_text_is_cut_alike_however_its_ids_come_in(text, stops):
    ids, wanted, chance = text.ids(SAID), cut(SAID, stops), random.Random(0)
    for most in (1, 2, 5, len(text.ids(SAID))):
        stream, left, shown = TextStream(text, stops), list(ids), ""
        while left:
            count = most if most == len(ids) else chance.randint(1, most)
            shown += stream.push(left[:count])
            left = left[count:]
            assert wanted.startswith(shown) and shown == stream.out
            assert text.decode(stream.ids).startswith(shown)
            assert not text.decode(stream.ids[:-1]).startswith(shown or " ")
        shown += stream.push([], end=True)
        assert shown == wanted and stream.stopped == (wanted != SAID)
        fewest = next((n for n in range(len(ids)) if len(text.decode(ids[:n])) >= len(wanted)), len(ids))
        assert stream.ids == ids[:fewest if stream.stopped else len(ids)]
        if stream.stopped:
            assert stream.push(ids) == "" and stream.out == wanted


def test_a_stop_string_inside_one_id_and_across_bytes(text):
    ids = text.ids("a \u96ea\u96ea b")
    stream = TextStream(text, ("\u96ea ",))
    assert "".join(stream.push([i]) for i in ids) + stream.push([], end=True) == "a \u96ea"
    assert TextStream(text, ("x",)).push(text.ids("axb"), end=True) == "a"


@pytest.mark.parametrize("stop", ["", [""], 3, ["a", None], "x" * 1001, b"a", {"a": 1}], ids=str)
def test_a_stop_string_that_is_none_is_one_line(stop):
    with pytest.raises(InputError, match="^stop: wanted a string"):
        check_stop(stop)


@pytest.mark.parametrize("mode,options", [
    ("target_only", {}), ("prefill_only", {}), ("prefill_then_verify", {}), ("speculative", {}), ("self", {}),
    ("speculative", {"draft_len": 31}), ("ahead", {})], ids=str)
def test_every_mode_ends_at_the_same_stop_string(pair, monkeypatch, mode, options):
    ids = truth(pair, 0)
    whole, stops = pair.target.text.decode(ids), ["ow circ", "quickly"]
    if "draft_len" in options:
        options = options | {"draft_source": Fixed(ids)}
    monkeypatch.setattr(pair, "apart", mode == "ahead")
    mode = "speculative" if mode in ("self", "ahead") else mode
    shown, events = "", list(pair.stream(mode=mode, stop=stops, **options, **asked(0)))
    for event in events:
        shown += event.delta if event.kind == "final" else ""
        assert not any(of in event.text for of in stops)
    result, wanted = events[-1].result, cut(whole, stops)
    assert wanted != whole and shown == result.output_text == wanted and result.finish_reason == "stop"
    assert result.output_ids == ids[:len(result.output_ids)] and result.drafter_error is None
    assert len(result.output_ids) < len(ids) and result.accepted_tokens <= len(result.output_ids) - 1
    assert pair.target.text.decode(result.output_ids).startswith(wanted)
    assert pair.generate(mode="target_only", **asked(0)).output_ids == ids


def test_a_stop_string_at_the_very_start_leaves_nothing(pair):
    result = pair.generate(mode="speculative", stop="The", **asked(0))
    assert (result.output_text, result.output_ids, result.finish_reason) == ("", [], "stop")
    assert result.rounds >= 0 and result.tpot is None and result.drafted == 0


def test_the_drafters_own_answer_ends_there_too(pair):
    whole = pair.generate(mode="drafter_only", **asked(0))
    events = list(pair.stream(mode="drafter_only", stop=" scene", **asked(0)))
    result = events[-1].result
    assert result.output_text == cut(whole.output_text, [" scene"]) and result.finish_reason == "stop"
    assert result.output_ids == whole.output_ids[:len(result.output_ids)]
    assert not any(" s" in event.text[-2:] for event in events)


def test_a_stop_string_is_learnt_by_no_gate_as_a_wrong_head_start(pair, monkeypatch):
    """The drafter has 13 right ids before the target's prefill, of which the answer is cut to a few."""
    ids, told, gate, made, steps = truth(pair, 0), [], Gate(), threading.Event(), []

    def drafting(kind, number):
        steps.append(kind)
        if steps.count("step") == 13:
            made.set()
    script(monkeypatch, pair.drafter, ids, before=drafting)
    prefill = pair.target.prefill
    monkeypatch.setattr(pair.target, "prefill", lambda *given: (made.wait(20), prefill(*given)))
    monkeypatch.setattr(pair, "gate", gate)
    monkeypatch.setattr(gate, "accepted", lambda name, question, count, right: told.append((name, count, right)))
    monkeypatch.setattr(pair, "apart", True)                 # there no gate ends the head start
    result = pair.generate(mode="prefill_then_verify", stop="elem", overlap_len=13, **asked(0))
    n = len(result.output_ids)
    assert [of for of in told if of[0] == "head start"] == [("head start", n, n)] and 0 < n < 8


def test_a_chat_goes_on_from_what_was_shown(pair):
    files = {name: value for name, value in asked(0).items() if name != "query"}
    with pair.open(**files, mode="target_only") as clip:
        first = clip.chat("What is there?", stop=" ")
        second = clip.chat("And then?").output_ids
        clip.turns = [("What is there?", first.output_ids)]
        assert clip.chat("And then?").output_ids == second and len(first.output_ids) < 3
