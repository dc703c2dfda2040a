"""A drafter that recalls its earlier texts writes what it would have written, in fewer forwards, and answers stay the
target's. On the embedded pair; the search itself is tests/test_recall.py."""

import time

import pytest
import torch
from test_request import MODES, TINY, asked, pair, saying, truth  # noqa: F401

import engine
from engine import RECALL_MOST, RECALL_PAYS, Expected, Fixed, InputError, Recalled


@pytest.fixture
def recalling(pair):  # noqa: F811
    """The pair, its drafter allowed to recall and with nothing in mind."""
    drafter = pair.drafter
    drafter.recall_len = RECALL_MOST
    for model in pair.models:                                # a longer text of another test would go on past an end
        model.recalled = 1.0
        model.forget()
    yield pair
    drafter.recall_len, drafter.recalls = 0, False
    pair.remembers = True


def forwards(result):
    return sum(row == "drafter" and stage in ("draft", "recall") for row, stage, *_ in result.timeline)


def test_a_preview_is_the_same_text_in_fewer_forwards(recalling, monkeypatch):
    target = recalling.target                                # a drafter stops with the target, done or not: be later
    monkeypatch.setattr(target, "step", lambda G=0, step=target.step: (time.sleep(0.02), step(G)))
    first = recalling.generate(mode="prefill_only", **asked(0))
    again = recalling.generate(mode="prefill_only", **asked(0))
    assert first.preview_ids == again.preview_ids and len(first.preview_ids) > 10
    assert "recall" not in first.stages["drafter"] and again.stages["drafter"]["recall"] > 0
    assert forwards(first) >= len(first.preview_ids) - 1
    assert forwards(again) <= -(-len(first.preview_ids) // (RECALL_MOST + 1)) + 1
    assert [i for _, _, ids in again.drafts for i in ids] == again.preview_ids
    assert len(first.drafts[0][2]) == 1 < len(again.drafts[0][2]), "its prefill checks the text's beginning"
    assert first.output_ids == again.output_ids == truth(recalling, 0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_answers_and_previews_of_every_mode_stay(recalling, mode):
    """Six clips twice over: what was written for others is recalled, and what fits only a while is dropped."""
    alone = {}
    for _ in range(2):
        for i in range(6):
            result = recalling.generate(mode=mode, **asked(i))
            if mode != "drafter_only":
                assert result.output_ids == truth(recalling, i, 0)
            before = alone.setdefault(i, result.preview_ids)
            n = min(len(before), len(result.preview_ids))
            assert before[:n] == result.preview_ids[:n]
            assert ("recall" in result.stages.get("drafter", {})) <= (mode not in ("target_only", "drafter_only"))


def test_drafter_only_is_measured_without(recalling):
    for _ in range(2):
        result = recalling.generate(mode="drafter_only", **asked(1))
        assert forwards(result) >= len(result.output_ids) - 1 and "recall" not in result.stages["drafter"]


@pytest.mark.parametrize("turn", range(3))
def test_on_a_device_of_its_own(recalling, turn):
    recalling.apart = True
    try:
        for i in range(4):
            result = recalling.generate(mode="speculative", ignore_eos=True, **asked(i + turn))
            assert result.output_ids == truth(recalling, i + turn, 0, True) and result.drafter_error is None
    finally:
        recalling.apart = False
    places = [n + k for _, n, ids in result.drafts for k in range(len(ids))]
    assert places and 4 <= recalling.drafter.texts.texts <= 8


def test_on_a_device_of_its_own_a_drafter_recalls_its_head_start(recalling, monkeypatch):
    """Not the answer, which is the target's: this drafter begins with other words."""
    recalling.apart, target = True, recalling.target
    monkeypatch.setattr(target, "prefill", lambda *given, prefill=target.prefill: (time.sleep(0.2), prefill(*given)))
    try:
        first, again = (recalling.generate(mode="speculative", **asked(3)) for _ in range(2))
    finally:
        recalling.apart = False
    own, alike = first.preview_ids, engine.agreeing(first.preview_ids, first.output_ids)
    assert len(first.drafts[0][2]) == 1 and alike + 1 < len(again.drafts[0][2]) == RECALL_MOST + 1
    assert again.preview_ids[:len(own)] == own[:len(again.preview_ids)] and again.output_ids == truth(recalling, 3, 0)


def test_where_a_drafter_apart_is_expected_to_bring_less_the_target_recalls(recalling, monkeypatch):
    """A drafter that is late, and held to be right one time in ten: alone the target steps id by id; with its answer in
    mind it is done in a few."""
    recalling.apart = True
    monkeypatch.setattr(recalling, "shares", [0.1] * 4)
    target, drafter = recalling.target, recalling.drafter
    monkeypatch.setattr(drafter, "step", lambda G=0, step=drafter.step: (time.sleep(0.3), step(G)))
    monkeypatch.setattr(drafter, "step_recalled", lambda G, step=drafter.step_recalled: (time.sleep(0.3), step(G)))
    target.forget()
    try:
        first, again = (recalling.generate(mode="speculative", **asked(0)) for _ in range(2))
        right, other = target.recalled, recalling.generate(mode="speculative", **asked(3))
    finally:
        recalling.apart = False
    ids = truth(recalling, 0, 0)
    assert first.output_ids == again.output_ids == ids and other.output_ids == truth(recalling, 3, 0)
    assert first.rounds > 10 and again.rounds <= -(-len(ids) // 16) + 1 and target.texts.texts == 3
    assert again.drafted >= again.accepted_tokens >= len(ids) - again.rounds - 1
    stages = [(stage, note) for row, stage, *_, note in again.timeline if row == "target"]
    assert stages.count(("verify", "")) >= again.rounds - 2 and ("decode", "") not in stages
    assert right > 3, "what is recalled is judged"


@pytest.mark.parametrize("shares, recalled, verified", [(0.95, 1.0, True), (0.1, 6.0, False)])
def test_a_target_looks_at_what_is_expected_to_bring_more(recalling, monkeypatch, shares, recalled, verified):
    """Drafts are ready and its answer is known: the first round is whichever was right more often."""
    recalling.apart, target, drafter = True, recalling.target, recalling.drafter
    monkeypatch.setattr(recalling, "shares", [shares, 0.01, 0.01, 0.01])
    monkeypatch.setattr(target, "prefill", lambda *given, prefill=target.prefill: (time.sleep(0.3), prefill(*given)))
    ids = truth(recalling, 0, 0)
    target.remember(ids)
    drafter.remember(ids)
    target.recalled, drafter.recalled, found = recalled, 0.0, []
    judge = target.judge
    monkeypatch.setattr(target, "judge", lambda G, state: (found.append(state[engine.RECALLED]), judge(G, state)))
    try:
        result = recalling.generate(mode="speculative", **asked(0))
    finally:
        recalling.apart = False
    assert result.output_ids == ids and result.drafter_error is None and len(result.preview_ids) > 5
    assert found[0] < -5 if verified else found[0] > 5       # the drafter's, or its own
    assert result.span_len == abs(found[0])
    assert verified or target.recalled != recalled, "what is recalled is judged"


@pytest.fixture
def drafted(recalling):
    """The pair on two pretend devices, where only what its drafter expects counts."""
    recalling.drafter.recall_len, recalling.apart = 0, True
    yield recalling
    recalling.apart = False


def test_what_one_request_expects_is_nothing_to_the_next(drafted):
    target, ids = drafted.target, truth(drafted, 0, 0)
    target.remember(ids)
    drafted.generate(mode="speculative", **asked(1))
    assert (target.texts.ids_M[target.texts.rows:] >= 0).any()
    result = drafted.generate(mode="speculative", draft_source=Recalled(), draft_len=15, **asked(0))
    assert result.output_ids == ids and result.rounds == -(-(len(ids) - 1) // 16)


def test_where_memory_does_not_count_it_is_not_looked_at_and_not_judged(drafted, monkeypatch):
    target, found = drafted.target, []
    for i in range(3):
        target.remember(truth(drafted, i, 0))
    judge = target.judge
    monkeypatch.setattr(target, "judge", lambda G, state: (G and found.append(state[engine.RECALLED]), judge(G, state)))
    for i in range(3):
        assert drafted.generate(mode="speculative", **asked(i)).output_ids == truth(drafted, i, 0)
    assert len(found) > 5 and max(found) <= 0 and target.recalled == 1.0


def test_steps_without_recalled_ids_do_not_make_them_look_better(recalling):
    target = recalling.target
    for recalled, expected in ((1.0, 1.0), (3.0, 3.0), (0.0999, 0.101), (0.0, 0.101)):
        target.recalled = recalled
        for _ in range(200):
            target.judge(0, None)
        assert target.recalled == pytest.approx(expected)


def test_a_drafter_that_died_widens_no_step(drafted, monkeypatch):
    target, calls, step = drafted.target, [], drafted.drafter.step

    def dying(G=0):
        calls.append(G)
        if len(calls) > 8:
            raise RuntimeError("gone")
        step(G)

    monkeypatch.setattr(drafted.drafter, "step", dying)
    monkeypatch.setattr(target, "prefill", lambda *given, prefill=target.prefill: (time.sleep(0.3), prefill(*given)))
    result = drafted.generate(mode="speculative", ignore_eos=True, **asked(1))
    assert "gone" in result.drafter_error and result.output_ids == truth(drafted, 1, 0, True)
    assert "verify" not in result.stages["target"] and target.expected.share == 0.0


def test_a_text_longer_than_its_room_is_followed_to_its_end(drafted, monkeypatch):
    """A drafter that has said all it has to, of which the target's memory holds four ids at a time."""
    target, ids, expect = drafted.target, truth(drafted, 1, 0, True), drafted.target.texts.expect
    monkeypatch.setattr(engine, "GUESSES", 1)
    monkeypatch.setattr(drafted, "shares", [0.9, 0.01, 0.01, 0.01])
    monkeypatch.setattr(target.texts, "expect", lambda texts, rank: expect(
        [text[:engine.ORDER + 4] for text in texts], rank))
    step, prefill = target.step_recalled, target.prefill
    monkeypatch.setattr(target, "step_recalled", lambda G: (time.sleep(0.05), step(G)))
    monkeypatch.setattr(target, "prefill", lambda *given: (time.sleep(1.0), prefill(*given)))
    with saying(drafted, ids):
        result = drafted.generate(mode="speculative", ignore_eos=True, **asked(1))
    assert result.output_ids == result.preview_ids == ids and min(result.accept_lens) > 0, result.accept_lens


def test_rounds_recall_as_well(recalling, monkeypatch):
    """In `follow` one wide step stands in for G - 1 narrow ones: fewer of the drafter's forwards for an accepted draft,
    though fewer drafts where the target's ids are no text of the drafter."""
    drafter, steps = recalling.drafter, []
    for name in ("step", "step_recalled"):
        step = getattr(drafter, name)
        monkeypatch.setattr(drafter, name, lambda G=0, name=name, step=step: (steps.append(name), step(G)))
    results, taken = [], []
    for recall_len in (0, RECALL_MOST):
        drafter.recall_len = recall_len
        recalling.generate(mode="prefill_only", **asked(2))                      # with 0 nothing is kept
        steps.clear()
        results.append(recalling.generate(mode="speculative", draft_len=7, overlap_len=0, **asked(2)))
        taken.append(list(steps))
    plain, wide = results
    assert plain.output_ids == wide.output_ids == truth(recalling, 2, 0)
    assert set(taken[0]) == {"step"} and len(taken[0]) >= 6 * plain.rounds
    assert taken[1].count("step_recalled") >= wide.rounds and taken[1].count("step") <= 1
    forwards = [len(of) + result.rounds for of, result in zip(taken, results, strict=True)]      # a resume each round
    assert forwards[0] / plain.accepted_tokens > 2 * forwards[1] / wide.accepted_tokens > 0


def test_what_is_not_right_is_not_recalled_for_long(recalling):
    drafter = recalling.drafter
    drafter.recalls = True

    def judge(G, right, recalled=1):
        drafter.judge(G, [0, 0, right, 0, 0, 0, 0, recalled])

    assert drafter.next_len() == 0                           # nothing in mind
    drafter.remember([1, 2, 3])
    wide = 0
    while drafter.next_len():
        judge(RECALL_MOST, 0, wide % 2)
        wide += 1
    assert 2 <= wide <= 9 and drafter.recalled <= RECALL_PAYS[None]
    plain = 0
    while not drafter.next_len():
        judge(0, 0)
        plain += 1
    assert 20 <= plain <= 45                                 # noticed when it gets better
    for _ in range(10):
        judge(RECALL_MOST, 8)
    assert drafter.recalled > 5
    for _ in range(10):
        judge(RECALL_MOST, 0, -3)
    assert drafter.recalled > 5                              # what somebody else expected


@pytest.fixture
def free(recalling):
    """The target, allowed to recall up to 31 ids, with nothing in mind."""
    target = recalling.target
    before = target.recalls, target.recall_len
    target.recalls, target.recall_len, target.expected = True, 31, Expected()
    yield target
    (target.recalls, target.recall_len), target.expected = before, Expected()


def test_more_is_recalled_where_more_is_right(free):
    assert free.next_len() == 0
    free.remember([1, 2, 3])
    for recalled, G in ((0.1, 0), (0.11, 15), (1.0, 15), (1.1, 31)):
        free.recalled = recalled
        assert free.next_len() == G
    free.recall_len = 7
    assert free.next_len() == 7


def test_a_step_is_as_wide_as_what_is_expected(free):
    """Nobody's memory counts here: the head start at once, then rounds of the few drafts that are ready."""
    free.expected = Expected(alone=True, lens=(5, 15))
    free.remember([1, 2, 3])
    free.recalled = 9.0
    for drafts, G in ((1, 5), (5, 5), (6, 15), (40, 15)):
        free.expect([[1] * (drafts + 1)], 0.5, drafts)
        assert free.next_len() == G
    free.expect([[1, 2]], 0.05, 1)
    assert free.next_len() == 0                              # too seldom right to pay for the rows
    free.expect([], 0.5, 0)
    assert free.next_len() == (5 if free.on_gpu else 0)      # a GPU's step is queued before its drafts are there
    free.expected.alone = False
    assert free.next_len() == 31


# -- the target's own answers, as a draft source


def test_the_targets_own_answers_make_its_rounds(recalling):
    """A second time every answer is known: nothing but the end of a text keeps a forward from 16 ids."""
    target, source = recalling.target, Recalled()
    target.forget()
    for i in range(4):
        first, again = (recalling.generate(mode="speculative", draft_source=source, draft_len=15, **asked(i))
                        for _ in range(2))
        ids = truth(recalling, i, 0)
        assert first.output_ids == again.output_ids == ids and again.drafter_error is None
        assert again.rounds == -(-(len(ids) - 1) // 16) and len(ids) - again.accepted_tokens - again.rounds <= 1
        assert again.accepted_tokens <= again.drafted <= 15 * again.rounds and again.rounds == len(again.accept_lens)
        assert "drafter" not in again.prompt_rows
    assert target.texts.texts == 8


@pytest.mark.parametrize("draft_len", [0, 1, 7, 31])
@pytest.mark.parametrize("options", [dict(ignore_eos=True), dict(temperature=3.0, seed=4), dict(explain=True)], ids=str)
def test_recalled_answers_change_none(recalling, draft_len, options):
    source = Recalled()
    for i in (0, 1, 2, 0, 1):
        given = {**asked(i), **options}
        result = recalling.generate(mode="speculative", draft_source=source, draft_len=draft_len, **given)
        assert result.output_ids == recalling.generate(mode="target_only", **given).output_ids
        if "explain" in options:
            assert [i for verdict in result.verdicts for i in verdict.ids] == result.output_ids
            kept = sum(len(verdict.ids) - 1 for verdict in result.verdicts)          # an id behind the end is not
            assert kept <= result.accepted_tokens <= kept + 1


@pytest.mark.parametrize("mode", ["prefill_then_verify", "prefill_only", "target_only"])
def test_it_drafts_in_speculative_mode_alone(recalling, mode):
    result = recalling.generate(mode=mode, draft_source=Recalled(), **asked(3))
    assert result.output_ids == truth(recalling, 3, 0) and result.rounds == result.drafted == 0


def test_a_target_that_recalled_does_not_go_on_with_it(recalling):
    recalling.generate(mode="speculative", draft_source=Recalled(), draft_len=15, **asked(0))
    result = recalling.generate(mode="speculative", draft_source=Fixed([3] * 40), draft_len=15, **asked(0))
    assert result.output_ids == truth(recalling, 0, 0) and result.accepted_tokens == 0


def test_a_drafter_that_dies_recalling_costs_no_answer(recalling, monkeypatch):
    recalling.generate(mode="prefill_only", **asked(0))
    monkeypatch.setattr(engine, "recall", lambda *_: 1 / 0)
    for mode in ("prefill_only", "prefill_then_verify", "speculative"):
        result = recalling.generate(mode=mode, **asked(0))
        assert result.output_ids == truth(recalling, 0, 0) and "division" in result.drafter_error


def test_a_cache_that_is_too_small_for_recalling_is_named(recalling):
    most = recalling.drafter.decoder.cache_rows - 198 - 17
    with pytest.raises(InputError, match="drafter cache holds"):
        recalling.generate(mode="drafter_only", **asked(0) | dict(max_new_tokens=most + 17))
    with pytest.raises(InputError, match="drafts 33"):
        recalling.generate(mode="speculative", draft_source=Recalled(), draft_len=31, **asked(0) | dict(
            max_new_tokens=recalling.target.decoder.cache_rows - 328 - 32))


def test_a_source_that_cannot_be_attached_costs_no_answer(recalling):
    class Broken(Recalled):
        def attach(self, model):
            raise RuntimeError("loose")

    result = recalling.generate(mode="speculative", draft_source=Broken(), draft_len=7, **asked(0))
    assert result.output_ids == truth(recalling, 0, 0) and "loose" in result.drafter_error


def test_nothing_is_remembered_where_an_engine_is_told_so(recalling):
    recalling.remembers = False
    recalling.generate(mode="prefill_only", **asked(0))
    assert recalling.drafter.texts.texts == 0


@pytest.mark.parametrize("wrong", [-1, 16, 1.5, True, "15"])
def test_a_length_that_cannot_be_is_one_line(wrong):
    with pytest.raises(InputError, match="recall_len: wanted a whole number 0..15"):
        engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", recall_len=wrong)


def test_the_default_follows_the_device():
    e = engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", dtype=torch.float32)
    assert e.drafter.recall_len == (RECALL_MOST if e.drafter.on_gpu else 0)
    assert engine.load_engine(TINY / "drafter", None, device="cpu", recall_len=3).drafter.recall_len == 3
