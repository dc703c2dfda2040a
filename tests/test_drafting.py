"""Who drafts, at the level of a request: a drafter on a device of its own, earlier answers, the target's 4-bit copy,
several at once, with and without the gate. Whoever it is, the answer stays the target's."""

import random
import threading
import time

import pytest
import torch
from common import EOS, asked, script, truth

import engine
from engine import DraftSource, Fixed, InputError, Lookup
from weights import adapter

ANSWER = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, EOS]


def sources_of(result):
    """The sources of a result's rounds, each once, in order."""
    return list(dict.fromkeys(of.source for of in result.round_log))


# ---- a drafter on a device of its own


@pytest.fixture
def apart(pair, monkeypatch):
    """The pair on two pretended devices."""
    monkeypatch.setattr(pair, "apart", True)
    return pair


def in_step(monkeypatch, e, ids, drafter_ids, lead=6, most=5.0):
    """Scripts both models; the target's forwards wait until the drafter is `lead` ids ahead, or has no more to say,
    or for `most` seconds."""
    made = threading.Condition()

    def drafting(kind, number):
        with made:
            made.notify_all()

    def answering(kind, number):
        if kind in ("step", "verify"):
            wanted = min(len(drafter_ids) - 1, target[-1][2] + lead)
            with made:
                made.wait_for(lambda: drafter and drafter[-1][1] + drafter[-1][2] > wanted, most)
    target = script(monkeypatch, e.target, ids, before=answering)
    drafter = script(monkeypatch, e.drafter, drafter_ids, before=drafting)


@pytest.mark.parametrize("slow", ["neither", "drafter", "target", "both"])
@pytest.mark.parametrize("seed", range(2))
def test_every_interleaving_gives_the_targets_ids(apart, monkeypatch, slow, seed):
    chance = random.Random(seed)
    for model in apart.models:
        if slow in (model.side, "both"):
            script(monkeypatch, model, None, before=lambda *_: time.sleep(chance.random() * 0.01))
    i = seed + 3 * (slow in ("drafter", "both"))
    result = apart.generate(mode="speculative", ignore_eos=True, **asked(i))
    assert result.output_ids == truth(apart, i, 0, True) and result.drafter_error is None
    assert sum(a + 1 for a in result.accept_lens) >= len(result.output_ids) - 1


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.6, 1.0])
def test_wrong_drafts_ahead_cost_no_id(apart, monkeypatch, wrong):
    """A drafter that gives the target's answer with a share of ids replaced."""
    chance, ids = random.Random(1), [20 + i % 90 for i in range(60)]
    in_step(monkeypatch, apart, ids, [i + 1 if chance.random() < wrong else i for i in ids])
    result = apart.generate(mode="speculative", ignore_eos=True, **asked(1, max_new_tokens=60))
    assert result.output_ids == ids and result.drafter_error is None
    if wrong == 0.0:
        assert result.accepted_tokens > len(ids) // 2 and set(sources_of(result)) <= {"", "drafter", "head start"}
    if wrong == 1.0:
        assert result.accepted_tokens == 0


def test_a_preview_is_the_drafters_own_text(apart, monkeypatch):
    """Up to where the target went another way; what the drafter wrote behind the target's ids is no part of it."""
    own = [*ANSWER[:5], 99, *ANSWER[6:]]
    in_step(monkeypatch, apart, ANSWER, own, lead=2)
    result = apart.generate(mode="speculative", **asked(1))
    assert result.output_ids == ANSWER and result.drafter_error is None
    assert len(result.preview_ids) > 1 and result.preview_ids == own[:len(result.preview_ids)]


def test_a_drafter_that_ends_too_early_goes_on_where_the_target_does(apart, monkeypatch):
    """It takes the answer for ended after two ids; once the target has gone on, so does the drafter."""
    in_step(monkeypatch, apart, ANSWER, [*ANSWER[:2], EOS, *ANSWER[3:]], lead=1, most=0.5)
    result = apart.generate(mode="speculative", **asked(1))
    assert result.output_ids == ANSWER and result.drafter_error is None and result.accepted_tokens > 3


def test_what_one_request_expected_is_nothing_to_the_next(apart, monkeypatch):
    """The same earlier answers in both, and none of them fits."""
    source = Lookup()
    source.learn([300, 301, 302])
    in_step(monkeypatch, apart, ANSWER, ANSWER)
    result = apart.generate(draft_source=[source, "drafter"], remember=False, **asked(1))
    assert result.output_ids == ANSWER and result.accepted_tokens > 0
    result = apart.generate(draft_source=source, draft_len=15, **asked(1))
    assert result.output_ids == ANSWER and result.drafted == 0


# ---- earlier answers


def test_a_second_time_every_id_is_looked_up(pair):
    """However few drafts a round of the drafter has: a lookup fills the widest forward."""
    source = Lookup()
    for i in range(3):
        first, again = (pair.generate(mode="speculative", draft_source=source, draft_len=5, **asked(i))
                        for _ in range(2))
        ids = truth(pair, i)
        assert first.output_ids == again.output_ids == ids and again.drafter_error is None
        assert again.rounds == -(-(len(ids) - 1) // 32) == len(again.accept_lens)
        assert len(ids) - again.accepted_tokens - again.rounds <= 1
        assert sources_of(again) == ["lookup"] and "drafter" not in again.prompt_rows
    assert [list(answer) for answer in source.newest(9)] == [truth(pair, i) for i in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("draft_len", [1, 31])
@pytest.mark.parametrize("options", [dict(ignore_eos=True), dict(temperature=3.0, seed=4)], ids=str)
def test_answers_that_are_looked_up_stay_the_targets(pair, draft_len, options):
    source = Lookup()
    wanted = [pair.generate(mode="target_only", **asked(i), **options).output_ids for i in range(2)]
    for i in (0, 1, 0):
        result = pair.generate(mode="speculative", draft_source=source, draft_len=draft_len, **asked(i), **options)
        assert result.output_ids == wanted[i]
    assert result.accepted_tokens > 0


@pytest.mark.parametrize("mode", ["prefill_then_verify", "prefill_only", "target_only"])
def test_answers_are_looked_up_in_rounds_alone(pair, mode):
    source = Lookup()
    source.learn(truth(pair, 3))
    result = pair.generate(mode=mode, draft_source=source, **asked(3))
    assert result.output_ids == truth(pair, 3) and result.rounds <= 1


def test_one_request_looks_up_and_the_next_has_a_source_of_its_own(pair):
    source = Lookup()
    source.learn(truth(pair, 0))
    assert pair.generate(mode="speculative", draft_source=source, draft_len=15, **asked(0)).accepted_tokens > 10
    result = pair.generate(mode="speculative", draft_source=Fixed([3] * 40), draft_len=15, **asked(0))
    assert result.output_ids == truth(pair, 0) and result.accepted_tokens == 0


def test_two_lookups_on_one_engine_keep_their_answers_apart(pair):
    knows, empty = Lookup(), Lookup()
    knows.learn(truth(pair, 0))
    for source, accepted in ((knows, True), (empty, False), (knows, True)):
        result = pair.generate(mode="speculative", draft_source=source, draft_len=15, remember=False, **asked(0))
        assert result.output_ids == truth(pair, 0) and (result.accepted_tokens > 10) is accepted


def test_nothing_is_learnt_where_a_request_says_so(pair):
    source = Lookup()
    result = pair.generate(mode="speculative", draft_source=source, remember=False, **asked(0))
    assert source.newest(9) == []
    pair.remember(result)
    assert [list(answer) for answer in source.newest(9)] == [result.output_ids]


def test_without_a_4_bit_copy_self_is_refused_in_one_line(pair):
    with pytest.raises(InputError, match="self") as error:
        pair.generate(mode="speculative", draft_source="self", **asked(0))
    assert "\n" not in str(error.value) and "; " in str(error.value)


# ---- several sources, and the gate


class Named(DraftSource):
    """Known ids by position, under a name."""

    def __init__(self, name, ids):
        self.name, self.ids = name, ids

    def propose(self, committed, limit):
        return self.ids[len(committed):len(committed) + limit]


def test_sources_are_asked_in_turn_and_each_round_says_whose_it_was(pair, monkeypatch):
    script(monkeypatch, pair.target, ANSWER)
    first, second = Named("first", ANSWER[:4]), Named("second", ANSWER)
    result = pair.generate(mode="speculative", draft_source=[first, second], draft_len=3, **asked(0))
    assert result.output_ids == ANSWER and set(sources_of(result)) == {"first", "second"}
    assert result.round_log[0] == engine.Round("first", ANSWER[1:4], 3)


@pytest.mark.parametrize("mode", ["prefill_then_verify", "speculative"])
def test_with_the_gate_the_answer_stays(pair, monkeypatch, mode):
    monkeypatch.setattr(pair, "gate", engine.Gate())
    for i in (0, 1, 2, 0, 1, 2):
        assert pair.generate(mode=mode, **asked(i)).output_ids == truth(pair, i), i


@pytest.mark.parametrize("mode", ["prefill_then_verify", "speculative"])
def test_a_drafter_that_never_pays_is_left_alone(pair, clock, monkeypatch, mode):
    """As slow as the target, never right, and frames that are there at once: after a few requests it rests."""
    monkeypatch.setattr(pair, "gate", engine.Gate())
    script(monkeypatch, pair.drafter, [99] * 40, clock, encode=1.0, prefill=4.0, step=1.0)
    script(monkeypatch, pair.target, ANSWER, clock, encode=1.0, prefill=4.0, step=1.0)
    for _ in range(6):
        clock.restart()
        result = pair.generate(mode=mode, draft_source="drafter", **asked(0))
        assert result.output_ids == ANSWER
    assert result.drafted == 0 and result.preview_ids == [] and result.drafter_error is None
    assert "draft" not in result.stages.get("drafter", {})


def test_the_first_answer_of_all_leaves_a_drafter_that_does_not_pay(pair, clock, monkeypatch):
    """Loading has told the gate what a step takes; a draft is taken to cost as much until one was seen, and where it
    does, no draft pays however right it is."""
    ids = [20 + i % 90 for i in range(60)]
    monkeypatch.setattr(pair, "gate", engine.Gate())
    pair.gate.timed("step", 1.0)
    script(monkeypatch, pair.drafter, [99] * 99, clock, encode=1.0, prefill=4.0, step=1.0)
    script(monkeypatch, pair.target, ids, clock, encode=1.0, prefill=4.0, step=1.0, verify=1.1)
    clock.restart()
    result = pair.generate(mode="speculative", draft_source="drafter", ignore_eos=True, **asked(0, max_new_tokens=60))
    assert result.output_ids == ids and result.drafter_error is None
    assert not [of for of in result.round_log if of.source == "drafter"]


def test_a_hopeless_source_rests_and_one_that_got_better_is_noticed(pair, clock, monkeypatch):
    ids = [20 + i % 90 for i in range(120)]
    monkeypatch.setattr(pair, "gate", engine.Gate())
    script(monkeypatch, pair.target, ids, clock, step=1.0, verify=1.1)
    accepted, drafted = [], []
    for guess in [[3] * 500] * 3 + [ids] * 3:
        clock.restart()
        result = pair.generate(mode="speculative", draft_source=Named("mine", guess), draft_len=7, ignore_eos=True,
                               **asked(0, max_new_tokens=120))
        assert result.output_ids == ids
        accepted.append(result.accepted_tokens)
        drafted.append(result.drafted)
    assert drafted[2] <= 3 * 7 and accepted[2] == 0, "it was asked now and then"
    assert accepted[-1] > 90, "it was noticed"


# ---- the token adapter's places


class Places(torch.nn.Module):
    """A network whose entry i says 100 + i."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids_BS):
        return torch.nn.functional.one_hot(100 + torch.arange(ids_BS.shape[1]), 200)[None].float()


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_entry_i_of_the_token_adapter_drafts_the_id_at_i_plus_shift(shift):
    config = adapter.AdapterConfig(vocab=200, rows=32, width=8, layers=1, heads=2, hidden=8, shift=shift)
    drafts = adapter.guess(Places(), config, [5] * 6, [7] * 3, 2)
    assert drafts == [100 + 3 - shift, 101 + 3 - shift][:6 - 3 + shift]


@pytest.mark.parametrize("mode", ["prefill_only", "drafter_only"])
def test_a_source_that_does_not_pay_takes_no_preview_away(pair, monkeypatch, mode):
    class Reader(DraftSource):
        name, needs_drafter = "reader", True

    gate = engine.Gate()
    gate.timed("step", 1.0)
    gate.round("reader", 9.0, 1)
    monkeypatch.setattr(pair, "gate", gate)
    result = pair.generate(mode=mode, draft_source=Reader(), **asked(0))
    assert gate.refuses("reader") and result.preview_ids and result.output_ids
