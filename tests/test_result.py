"""Every figure of a Result, on models and a clock of the test's own: each would be another number if it were counted
otherwise."""

import threading

import pytest
from common import EOS, asked, script

import engine
import weights.given
from engine import Fixed, Round

ANSWER = [11, 12, 13, 14, 15, 16, 17, 18, EOS]


def timed_reads(monkeypatch, clock, video=0.0, events=0.0, wait=lambda: None):
    """Reading a clip takes `video` seconds after `wait()`, reading events `events`."""
    real = weights.given.read_video, weights.given.read_events

    def read_video(*given):
        wait()
        frames = real[0](*given)
        clock.spend(video)
        return frames

    def read_events(path):
        found = real[1](path)
        clock.spend(events)
        return found
    monkeypatch.setattr("weights.given.read_video", read_video)
    monkeypatch.setattr("weights.given.read_events", read_events)


def ask(e, clock, **options):
    clock.restart()
    return e.generate(**{**asked(0), **options})


# ---- times


def test_the_times_of_a_plain_answer(pair, clock, monkeypatch):
    """load 1, encode 2, prefill 4, then 8 steps of 0.5 seconds for an answer of 9 ids."""
    script(monkeypatch, pair.target, ANSWER, clock, encode=2.0, prefill=4.0, step=0.5)
    timed_reads(monkeypatch, clock, video=1.0)
    result = ask(pair, clock, mode="target_only")
    assert result.output_ids == ANSWER and result.finish_reason == "stop"
    assert result.ttft == pytest.approx(7.0) and result.wall_clock_time == pytest.approx(11.0)
    assert result.tpot == pytest.approx(0.5), "(end - first id) / (ids - 1)"
    assert result.stages == {"target": pytest.approx(
        {"load": 1.0, "preprocess": 0.0, "encode": 2.0, "prefill": 4.0, "decode": 8 * 0.5})}
    rows = [(row, stage, start, end) for row, stage, start, end, _ in result.timeline if end > start]
    assert rows == [("host", "load", 0.0, 1.0), ("target", "encode", 1.0, 3.0), ("target", "prefill", 3.0, 7.0),
                    *(("target", "decode", 7 + k / 2, 7.5 + k / 2) for k in range(8))]
    assert (result.ttfp, result.preview_end, result.preview_ids) == (None, None, [])
    assert (result.rounds, result.drafted, result.acceptance_rate, result.tokens_per_round) == (0, 0, 0.0, 0.0)


def test_one_id_has_no_time_per_further_id(pair, clock, monkeypatch):
    script(monkeypatch, pair.target, ANSWER, clock, encode=2.0, prefill=4.0, step=0.5)
    result = ask(pair, clock, mode="target_only", max_new_tokens=1)
    assert result.output_ids == ANSWER[:1] and result.finish_reason == "length"
    assert result.tpot is None and result.ttft == result.wall_clock_time == pytest.approx(6.0)


def test_the_times_of_a_drafter_alone(pair, clock, monkeypatch):
    script(monkeypatch, pair.drafter, ANSWER, clock, encode=2.0, prefill=1.0, step=0.25)
    timed_reads(monkeypatch, clock, events=0.5)
    result = ask(pair, clock, mode="drafter_only")
    assert result.output_ids == result.preview_ids == ANSWER
    assert result.ttfp == result.ttft == pytest.approx(3.5)
    assert result.preview_end == result.wall_clock_time == pytest.approx(5.5) and result.tpot == pytest.approx(0.25)
    assert result.stages == {"drafter": pytest.approx(
        {"load": 0.5, "preprocess": 0.0, "encode": 2.0, "prefill": 1.0, "draft": 8 * 0.25})}


@pytest.mark.parametrize("mode", ["prefill_then_verify", "speculative"])
def test_drafts_are_counted_up_to_the_last_frame_and_up_to_the_end_of_prefill(pair, clock, monkeypatch, mode):
    """The drafter has three ids when the last frame is decoded, and seven when the target's prefill ends."""
    three, seven, frames, prefilled = (threading.Event() for _ in range(4))

    def drafting(kind, number):
        if kind == "step" and number == 2:
            three.set()
            assert frames.wait(20)
        if kind == "step" and number == 6:
            seven.set()
            assert prefilled.wait(20)

    def answering(kind, number):
        if kind == "prefill":
            frames.set()
            assert seven.wait(20)
        elif kind in ("step", "verify"):
            prefilled.set()
    script(monkeypatch, pair.drafter, ANSWER, clock, drafting, step=1.0)
    script(monkeypatch, pair.target, ANSWER, clock, answering, prefill=4.0, step=1.0)
    timed_reads(monkeypatch, clock, video=2.5, wait=lambda: three.wait(20))
    result = ask(pair, clock, mode=mode, overlap_len=7)
    assert result.output_ids == ANSWER and result.drafter_error is None
    assert result.window_drafts == 3 and result.free_tokens_count == 7
    assert result.accept_lens[0] == 6 and result.rejected_at == -1


# ---- what was drafted and accepted


def test_drafts_and_accepted_drafts_are_counted_round_by_round(pair, monkeypatch):
    """Rounds of three drafts, the third wrong in the first two; the last one proposes two, the end of the answer."""
    script(monkeypatch, pair.target, ANSWER)
    wrong = [i if place not in (3, 6) else 99 for place, i in enumerate(ANSWER)]
    result = pair.generate(mode="speculative", draft_source=Fixed(wrong), draft_len=3, **asked(0))
    assert result.output_ids == ANSWER and result.accept_lens == [2, 2, 2] and result.rounds == 3
    assert result.drafted == 3 + 3 + 2 and result.accepted_tokens == 6
    assert result.acceptance_rate == 6 / 8 and result.tokens_per_round == 3.0
    assert result.round_log == [Round("fixed", [12, 13, 99], 2), Round("fixed", [15, 16, 99], 2),
                                Round("fixed", [18, EOS], 2)]


def test_a_forward_without_drafts_is_a_round_that_nobody_drafted(pair, monkeypatch):
    script(monkeypatch, pair.target, ANSWER)
    result = pair.generate(mode="speculative", draft_source=Fixed(ANSWER[:3]), draft_len=5, **asked(0))
    assert result.output_ids == ANSWER and result.rounds == 6
    assert result.round_log == [Round("fixed", [12, 13], 2), *[Round("", [], 0)] * 5]
    assert (result.drafted, result.accepted_tokens, result.tokens_per_round) == (2, 2, 2 / 6 + 1)


def test_the_first_rejected_draft_is_named(pair, monkeypatch):
    script(monkeypatch, pair.target, ANSWER)
    for wrong_at, rejected_at in ((1, 0), (3, 2), (5, 4), (6, -1)):          # of five drafts, places 1 to 5
        drafts = [i if place != wrong_at else 99 for place, i in enumerate(ANSWER)]
        result = pair.generate(mode="prefill_then_verify", draft_source=Fixed(drafts), overlap_len=5, **asked(0))
        accepted = 5 if rejected_at < 0 else rejected_at
        assert result.output_ids == ANSWER and result.rejected_at == rejected_at
        assert (result.drafted, result.accepted_tokens, result.accept_lens) == (5, accepted, [accepted])


def test_drafts_behind_the_last_id_are_not_counted(pair, monkeypatch):
    """Behind its end-of-sequence the scripted target would go on just as these drafts do."""
    script(monkeypatch, pair.target, ANSWER)
    result = pair.generate(mode="speculative", draft_source=Fixed([*ANSWER, EOS, EOS]), draft_len=15, **asked(0))
    assert result.output_ids == ANSWER and (result.drafted, result.accepted_tokens, result.accept_lens) == (8, 8, [8])
    assert result.round_log == [Round("fixed", ANSWER[1:], 8)]
    result = pair.generate(mode="speculative", draft_source=Fixed(ANSWER), draft_len=7,
                           **asked(0, max_new_tokens=4))
    assert result.output_ids == ANSWER[:4] and result.finish_reason == "length"
    assert (result.drafted, result.accepted_tokens, result.accept_lens) == (3, 3, [3])
    assert result.acceptance_rate == 1.0 and result.rejected_at == -1


@pytest.mark.parametrize("when", [0, 3])
def test_nan_in_a_drafter_on_its_own_device_is_named_and_costs_its_drafts(pair, monkeypatch, when):
    """In its prefill, and in its fourth forward after that."""
    seen, kind = threading.Event(), "step" if when else "prefill"

    def drafting(of, number):
        if of == kind and number == max(0, when - 1):
            seen.set()
            return float("nan")

    script(monkeypatch, pair.drafter, ANSWER, before=drafting)
    script(monkeypatch, pair.target, ANSWER, before=lambda of, number: of == "step" and seen.wait(20))
    monkeypatch.setattr(pair, "apart", True)
    result = pair.generate(mode="speculative", **asked(0))
    assert result.output_ids == ANSWER and "drafter's logits hold NaN" in result.drafter_error
    assert result.preview_ids == ANSWER[:when], "nothing that NaN chose is shown"


# ---- the gate's prices, as far as its decisions show them


def gated(pair, monkeypatch):
    monkeypatch.setattr(pair, "gate", engine.Gate())
    return pair


def test_a_draft_is_priced_by_the_id(pair, clock, monkeypatch):
    """Five drafts for 1.0 seconds beside steps of 1.0: each costs 0.2, and right ones pay."""
    e = gated(pair, monkeypatch)
    script(monkeypatch, e.drafter, ANSWER, clock, step=0.2)
    script(monkeypatch, e.target, ANSWER, clock, step=1.0)
    results = [ask(e, clock, draft_source="drafter", overlap_len=0, draft_len=5) for _ in range(4)]
    assert all(result.output_ids == ANSWER and result.drafter_error is None for result in results)
    assert [result.rounds for result in results] == [2] * 4 and results[-1].accepted_tokens == 7


@pytest.mark.parametrize("delay, runs", [(30.0, False), (1.0, True)])
def test_a_head_start_is_priced_by_how_much_later_the_first_id_comes(pair, clock, monkeypatch, delay, runs):
    """Three right drafts save three seconds. The drafter makes the target's prefill take `delay` seconds more."""
    e, encoded = gated(pair, monkeypatch), threading.Event()
    beside = dict(now=False)

    def answering(kind, number):
        if kind == "prefill" and beside["now"]:
            assert encoded.wait(20)
            clock.spend(delay)
    script(monkeypatch, e.drafter, [*ANSWER[:4], *[99] * 20], clock, lambda *_: encoded.set(), step=0.3)
    script(monkeypatch, e.target, ANSWER, clock, answering, prefill=10.0, step=1.0)
    assert ask(e, clock, mode="target_only").ttft == pytest.approx(10.0)
    beside["now"] = True
    for _ in range(2):
        assert ask(e, clock, mode="prefill_then_verify").ttft == pytest.approx(10.0 + delay)
    beside["now"] = runs
    result = ask(e, clock, mode="prefill_then_verify")
    assert result.output_ids == ANSWER and ("drafter" in result.prompt_rows) is runs
