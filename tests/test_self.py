"""The target's own 4-bit copy drafts on the target's cache: it may cost time, never an id or a bit of the cache."""

import functools
import json
import random
from pathlib import Path

import common
import pytest
import torch

import engine
import weights.given
from weights.drafting import Gate

TINY = Path(engine.__file__).resolve().parent / "weights" / "tiny"
RECORDS = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())


@pytest.fixture(scope="module")
def target():
    e = engine.load_engine(None, TINY / "target", device="cpu", gate=False, self_draft=True)
    real = weights.given.read_video
    once = functools.lru_cache(real)
    weights.given.read_video = lambda path, count, rule, *_: once(path, count, rule)
    yield e
    weights.given.read_video = real


def asked(i=0, **options):
    return {"video_path": TINY / "clips" / "mp4" / RECORDS[i]["mp4_data"], "max_new_tokens": 40, "ignore_eos": True,
            "query": "What are the key elements in this scene?", "remember": False, **options}


@pytest.fixture
def eager(monkeypatch):
    """Drafts as many as there may be: on a CPU none pays."""
    monkeypatch.setattr(Gate, "next_draft", lambda *_: True)


def rows_of(e, ids):
    rows = e.target.prompt_rows + len(ids) - 1
    d = e.target.decoder
    return torch.stack([cache[:, :, :rows] for cache in (d.k_cache_LNMK, d.v_cache_LNMK)])


@pytest.mark.parametrize("i, sampling", [(0, {}), (1, {"temperature": 1.0, "seed": 3}), (2, {}),
                                         (2, {"temperature": 1.0, "seed": 3})])
def test_the_answer_and_its_cache_rows_are_those_of_plain_decode(target, eager, i, sampling):
    """The rows of wrong drafts, and the approximate rows of right ones, are all written again by the verify."""
    plain = target.generate(mode="target_only", **asked(i, **sampling))
    rows = rows_of(target, plain.output_ids)
    drafted = target.generate(mode="speculative", draft_source="self", **asked(i, **sampling))
    assert drafted.output_ids == plain.output_ids and drafted.drafter_error is None
    assert drafted.drafted > 30 and drafted.accepted_tokens > 0.5 * drafted.drafted
    assert {of.source for of in drafted.round_log if of.drafts} == {"self"}
    # One row at a time and several at once round apart on a CPU; a row of the 4-bit copy is off by far more.
    assert torch.allclose(rows_of(target, plain.output_ids), rows, atol=1e-4)


def test_a_copys_own_rows_are_not_those_of_plain_decode(target):
    """What the test above could not see otherwise: the copy's rows differ by more than it forgives."""
    t = target.target
    target.generate(mode="target_only", **asked(0))
    row = t.prompt_rows + 5
    with torch.inference_mode():
        exact = t.decoder.k_cache_LNMK[:, :, row].clone()
        hidden_1D = t.decoder.embed_VD[t.state_W[engine.STATE + 5:engine.STATE + 6]]
        t.decoder.forward(hidden_1D, torch.tensor([row]), steps=t.copy)
        assert (t.decoder.k_cache_LNMK[:, :, row] - exact).abs().max() > 1e-3
        t.decoder.k_cache_LNMK[:, :, row] = exact


def test_a_round_stops_at_the_first_unsure_draft(target, monkeypatch):
    """Forced drafts, right ones, of which every fourth is unsure."""
    t, V = target.target, target.target.config.V
    ids = [(7 * i + 5) % V for i in range(40)]
    graphs, t.step_graphs = t.step_graphs, {}
    monkeypatch.setattr(target, "gate", Gate())
    try:
        with torch.inference_mode():
            t.replay(ids, ids, [0.3 if i % 4 == 0 else 0.99 for i in range(40)])
        target.gate.timed("step", 1e3)                       # a draft costs next to nothing beside this step
        target.gate.waits["self"] = [0, 1]
        monkeypatch.setattr(target.gate, "right", lambda sure: sure)
        monkeypatch.setattr(target.gate, "next_draft", lambda alive, draft, step: alive > 0.5)
        result = target.generate(mode="speculative", draft_source="self", **asked(0))
    finally:
        t.recorded, t.step_graphs = None, graphs
    assert result.output_ids == ids
    ends = []
    at = 1
    for of in result.round_log:
        at += len(of.drafts)
        if of.drafts and at < 38:
            ends.append((at - 1) % 4)                        # place of the last draft of the round
        at += 1
    assert ends and set(ends) == {0}, "each round's last draft is the unsure one"


def test_a_copy_with_nan_is_left_and_the_answer_stays(target, eager):
    plain = target.generate(mode="target_only", **asked(1))
    scales = target.target.copy.head_VD.scales
    with torch.inference_mode():
        kept = scales.clone()
        scales.fill_(float("nan"))
    try:
        broken = target.generate(mode="speculative", draft_source="self", **asked(1))
    finally:
        with torch.inference_mode():
            scales.copy_(kept)
    assert broken.output_ids == plain.output_ids and broken.accepted_tokens == 0
    assert "4-bit copy's logits hold NaN" in broken.drafter_error and broken.drafter_error.count("\n") == 0


def test_a_source_that_was_not_loaded_is_refused_by_name():
    e = engine.load_engine(None, TINY / "target", device="cpu")
    assert e.target.copy is None, "on a CPU the copy is made only where it is asked for"
    with pytest.raises(engine.InputError, match="self_draft=True"):
        e.generate(mode="speculative", draft_source="self", **asked(0))


def test_a_copy_that_does_not_fit_is_left_out_unless_it_was_asked_for(monkeypatch):
    """By arithmetic alone: room for all but the copy."""
    monkeypatch.setattr("weights.memory.pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr("weights.memory.default_dtype", lambda _: torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("weights.memory.no_room", lambda path, *_: engine.InputError("no room"))
    monkeypatch.setattr("weights.memory.free_bytes", lambda _: (10 ** 9, 10 ** 9))
    need = engine.memory_budget(None, TINY / "target", "cuda", self_draft=True)["target"]
    most = sum(need[part] for part in ("weights", "cache", "scratch")) + need["packed"] // 2
    monkeypatch.setattr("weights.memory.free_bytes", lambda _: (most, most))
    with pytest.raises(engine.InputError, match="no room"):
        engine.memory_budget(None, TINY / "target", "cuda", self_draft=True)
    assert "packed" not in engine.memory_budget(None, TINY / "target", "cuda")["target"]


def test_it_is_said_why_the_copy_stays_beside_the_target(pair, target, monkeypatch):
    monkeypatch.setattr(pair.target, "copy", target.target.copy)
    assert pair.copy_stays is None, "one device"
    monkeypatch.setattr(pair, "apart", True)
    monkeypatch.setattr(pair.drafter, "device", torch.device("cuda:1"))
    line = ("the copy stays on cpu and drafts on the target's own cache; on cuda:1 it would need a cache and a prefill "
            "of its own, to be at most {} times as fast as the target")
    assert pair.copy_stays == line.format("step / draft"), "no gate"
    monkeypatch.setattr(pair, "gate", Gate())
    pair.gate.timed("step", 3.9e-3)
    assert pair.copy_stays == line.format("step / draft"), "no draft was seen"
    pair.gate.timed("self draft", 1.56e-3)
    assert pair.copy_stays == line.format("2.50 (step 3.90 / draft 1.56 ms)")
    monkeypatch.setattr(pair.target, "copy", None)
    assert pair.copy_stays is None, "no copy"


def test_the_default_costs_half_a_percent_at_most_where_nothing_pays(pair, target, clock, monkeypatch):
    """A drafter and a copy that are never right, answers that never come back, 61 requests of a new engine's gate."""
    monkeypatch.setattr(pair.target, "copy", target.target.copy)
    monkeypatch.setattr(pair.target, "recorded", None)
    monkeypatch.setattr(pair.target, "step_graphs", {})
    monkeypatch.setattr(pair, "gate", Gate())
    pair.gate.timed("step", 1.0)                             # as loading tells it
    costs = dict(encode=1.0, prefill=12.0, step=1.0)
    common.script(monkeypatch, pair.drafter, [99] * 99, clock, **costs)
    common.script(monkeypatch, pair.target, list(range(20, 90)), clock, **costs, verify=1.03, copy=0.4)
    taken, chance = [], random.Random(0)
    for _ in range(61):
        ids = [chance.randrange(100, pair.target.config.V) for _ in range(60)]
        with torch.inference_mode():
            pair.target.replay(ids, [99] * 60, [0.3] * 60)
        clock.restart()
        result = pair.generate(mode="speculative", ignore_eos=True, **{**common.asked(0), "max_new_tokens": 60})
        assert result.output_ids == ids and result.drafter_error is None
        taken.append(result.wall_clock_time)
    clock.restart()
    alone = pair.generate(mode="target_only", ignore_eos=True, **{**common.asked(0), "max_new_tokens": 60})
    assert alone.wall_clock_time == pytest.approx(1.0 + 12.0 + 59)
    assert sum(taken) <= 1.005 * 61 * alone.wall_clock_time


def test_earlier_answers_go_before_the_copy_where_their_ids_are_cheaper(target, eager, monkeypatch):
    """A second request finds its whole answer; a first one finds nothing and the copy drafts."""
    monkeypatch.setattr(target, "lookup", engine.Lookup())
    first = target.generate(mode="speculative", **asked(2, remember=True))
    again = target.generate(mode="speculative", **asked(2))
    assert first.output_ids == again.output_ids
    assert {of.source for of in first.round_log if of.drafts} >= {"self"}
    assert {of.source for of in again.round_log if of.drafts} == {"lookup"} and again.rounds < 4


def test_earlier_answers_go_on_behind_a_draft_of_the_copy(target, monkeypatch):
    """An earlier answer holds all but this one's ninth id, behind which it is found no more. The copy drafts the tenth,
    behind that it is found again, and 30 ids of it go along in the same forward."""
    t, V, gate = target.target, target.target.config.V, Gate()
    ids = [(7 * i + 5) % V for i in range(40)]
    known = engine.Lookup()
    known.learn([i + (place == 8) for place, i in enumerate(ids)])
    graphs, t.step_graphs = t.step_graphs, {}
    monkeypatch.setattr(target, "gate", gate)
    gate.timed("step", 1e3)                                  # a draft, or a row more, costs next to nothing beside it
    try:
        with torch.inference_mode():
            t.replay(ids, ids)
        result = target.generate(mode="speculative", draft_source=[known, "self"], **asked(0))
    finally:
        t.recorded, t.step_graphs = None, graphs
    assert result.output_ids == ids and result.drafter_error is None
    assert [(of.source, len(of.drafts), of.accepted, of.behind) for of in result.round_log] == [
        ("lookup", 31, 7, 0), ("self", 31, 31, 30)]
    assert result.by_source["self"]["judged"] == result.by_source["self"]["right"] == 1
    assert ("lookup behind 1", None) in gate.tries, "what was found behind the draft was judged"
