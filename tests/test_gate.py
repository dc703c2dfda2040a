"""The gate prices drafts and never touches an id; drafting ahead gives the same ids whatever arrives late or wrong."""

import random
import time

import pytest
import torch
from test_request import RECORDS, TINY, asked, pair, saying, truth  # noqa: F401  the fixture

import engine
from engine import ORDER, STATE, Ahead, Fixed, Gate, Node


def priced(step=5.0, draft=5.0, verify=5.3, front=20.0):
    gate = Gate()
    for what, ms in (("step", step), ("draft", draft), ("verify", verify), ("front", front)):
        gate.timed(what, ms / 1e3)
    return gate


def taught(gate, kind, agreed, drafted=15, times=20):
    for _ in range(times):
        gate.accepted(kind, "q", drafted, agreed)
    return gate


class Asked:
    """As much of a request as the gate looks at."""
    question, overlap_len, draft_len, max_new_tokens, mode, size = "q", 15, 5, 50, "prefill_then_verify", 0

    def __init__(self, ready_ms):
        self.frames_ready, self.ready_ms = engine.threading.Event(), ready_ms

    def ready(self, now):
        return None if self.ready_ms is None else max(self.ready_ms / 1e3, now)


def test_acceptance_is_counted_per_depth_and_stops_at_the_first_rejection():
    gate = taught(Gate(), "span", agreed=3)
    alive = gate.alive("span", "q", 6)
    assert alive[:3] == pytest.approx([1, 1, 1]) and alive[3] < 0.05 and alive == sorted(alive, reverse=True)
    assert gate.alive("span", "another question", 6) == alive and gate.alive("round", "q", 3) == [1, 1, 1]


def test_half_the_tries_is_half_the_probability():
    gate = Gate(decay=1.0)
    for i in range(400):
        gate.accepted("span", "q", 5, 5 if i % 2 else 0)
    assert gate.alive("span", "q", 5) == pytest.approx([0.5] * 5, abs=0.01)


@pytest.mark.parametrize("draft, agreed, wanted", [(5.0, 5, 0), (1.7, 5, 5), (1.7, 0, 0), (1.7, 2, 2)])
def test_rounds_are_as_long_as_pays(draft, agreed, wanted):
    """A drafter that steps as slowly as its target never pays on one device, however right it is."""
    gate = taught(priced(draft=draft), "round", agreed, drafted=5)
    assert gate.best_len("q", 5)[0] == wanted


@pytest.mark.parametrize("ready, agreed, wanted", [
    (100, 0, True),                                          # the window is free: who asks whether it helps
    (10, 0, False), (10, 12, True),                          # 10 ms late: only if drafts are accepted
    (None, 0, True)])                                        # nothing known
def test_a_head_start_is_made_where_it_is_free_or_pays(ready, agreed, wanted):
    gate = taught(priced(draft=1.7), "span", agreed)
    assert gate.head_start(Asked(ready), now=0.0) is wanted


def test_what_reading_events_costs_the_video_is_part_of_the_price():
    gate = taught(priced(draft=1.7), "span", 0)
    for _ in range(5):
        gate.timed(("frames", 0, True), 0.053)
        gate.timed(("frames", 0, False), 0.050)
    assert not gate.head_start(Asked(100), now=0.0)
    assert taught(gate, "span", 12, times=50).head_start(Asked(100), now=0.0)


def test_a_refused_head_start_is_probed_now_and_then():
    gate = taught(priced(), "span", 0)
    said = [gate.head_start(Asked(10), 0.0) for _ in range(2 * gate.probe)]
    assert sum(said) == 2


def test_drafts_stop_before_the_target_needs_the_gpu():
    gate = taught(priced(), "span", 0)
    assert gate.another(Asked(100), 3, now=0.05) and not gate.another(Asked(100), 3, now=0.095)
    assert taught(priced(draft=1.7), "span", 15).another(Asked(100), 3, now=0.2)     # these pay even then


def test_a_source_pays_by_its_own_acceptance_alone():
    gate = taught(priced(), "memory", 0)
    gate.timed(("round", "memory"), 5.6e-3)
    gate.timed(("round", "other"), 5.6e-3)
    assert not gate.pays("memory", "q", 15) and gate.pays("other", "q", 15)


def test_a_hopeless_source_is_dropped_and_a_better_one_is_noticed_without_a_single_draft(pair, monkeypatch):  # noqa: F811
    """While the gate is closed the source is judged against the ids that the target says anyway."""
    ids = truth(pair, 0, 0, True)
    pair.gate = priced()
    pair.gate.timed(("round", "Fixed"), 5.4e-3)
    monkeypatch.setattr(pair.gate, "timed", lambda what, seconds: None)          # the prices stay
    try:
        for _ in range(3):
            closed = pair.generate(mode="speculative", draft_source=Fixed([3] * 64), ignore_eos=True, **asked(0))
            assert closed.output_ids == ids
        assert closed.drafted == 0 and closed.rounds == 0
        for _ in range(4):
            opened = pair.generate(mode="speculative", draft_source=Fixed(ids), ignore_eos=True, **asked(0))
            assert opened.output_ids == ids
        assert opened.accepted_tokens > 20
    finally:
        pair.gate = None


@pytest.mark.parametrize("mode", ["prefill_then_verify", "speculative"])
def test_a_closed_gate_leaves_the_drafter_alone(pair, mode):  # noqa: F811
    pair.gate = taught(taught(priced(), "span", 0), "round", 0)
    request = asked(0)
    size = request["video_path"].stat().st_size.bit_length()
    pair.gate.timed(("frames", size), 1e-3)
    try:
        result = pair.generate(mode=mode, ignore_eos=True, **request)
    finally:
        pair.gate = None
    assert result.output_ids == truth(pair, 0, 0, True)
    assert "drafter" not in result.stages and result.preview_ids == [] and result.drafter_error is None


def test_with_the_gate_every_mode_still_gives_the_targets_answer(pair):  # noqa: F811
    pair.gate = Gate()
    try:
        for i in range(len(RECORDS)):
            for mode in ("prefill_then_verify", "speculative"):
                assert pair.generate(mode=mode, **asked(i)).output_ids == truth(pair, i, 0), (i, mode)
    finally:
        pair.gate = None


# -- drafting ahead on another device


def said(ahead, committed, now=0.0):
    """The target commits these ids; what may follow the last of them, the likeliest first."""
    ahead.commit(committed, now)
    return [text[min(len(committed), ORDER):] for text in ahead.texts()[0]]


def test_ahead_drops_what_was_drafted_on_a_wrong_guess():
    ahead = Ahead([0.9, 0.05], -1, 50)
    tip = ahead.tell(ahead.root, [1, 2, 3, 4])
    assert ahead.likeliest() is tip and ahead.text() == [1, 2, 3, 4]
    assert said(ahead, [1, 2]) == [[3, 4]] and said(ahead, [1, 2, 3, 4]) == [[]]
    assert said(ahead, [1, 2, 3, 4, 9]) == [[]] and ahead.text() == [1, 2, 3, 4, 9]
    ahead.tell(tip, [5, 6])                              # was on its way when the target spoke
    assert said(ahead, [1, 2, 3, 4, 9]) == [[]] and ahead.likeliest() is tip.then(9)
    ahead.tell(ahead.likeliest(), [10])
    assert said(ahead, [1, 2, 3, 4, 9]) == [[10]]
    assert said(ahead, [1, 2, 3, 4, 9, 7, 7, 7]) == [[]]     # left far behind
    assert [of.id for of in ahead.likeliest().path()] == [1, 2, 3, 4, 9, 7, 7, 7]


def test_ahead_tells_the_last_ids_and_what_may_follow_them():
    ahead, ids = Ahead([0.5, 0.3], -1, 100), list(range(100, 140))
    tip = ahead.tell(ahead.root, ids)
    ahead.commit(ids, 0.0)
    tell(ahead, tell(ahead, tip, [7], [8]), [9], [])
    tell(ahead, tip.then(8), [6], [])
    assert ahead.texts() == ([[*ids[-ORDER:], 7, 9], [*ids[-ORDER:], 8, 6]], ahead.shares[0], 2)


def test_ahead_waits_for_the_target_rather_than_be_late_for_what_it_may_say():
    """The target speaks every 4 seconds, a forward takes 1.5: the third in a row is known half a second late."""
    ahead = Ahead([0.5, 0.2], -1, 50)
    node = ahead.tell(ahead.root, [1, 2])
    ahead.commit([1], 0.0)
    ahead.commit([1, 2], 4.0)
    ahead.forward = 1.5
    assert ahead.step == 4.0 and ahead.likeliest(5.5) is node
    node = ahead.tell(node, [3])
    assert ahead.likeliest(6.5) is node and ahead.likeliest(7.0) is node         # with 0.5: half a second is worth it
    assert ahead.likeliest(7.5) is None and ahead.likeliest(9.0) is None
    assert ahead.likeliest(12.1) is node, "a target that is overdue is not waited for"
    ahead.commit([1, 2, 3], 7.6)
    assert ahead.likeliest(7.6) is node
    ahead.shares[0] = 0.9
    node = ahead.tell(node, [4])
    assert ahead.likeliest(10.5) is node                     # by a third of a second late, and mostly right


def tell(ahead, node, ids, guesses):
    end = ahead.tell(node, ids)
    ahead.guess(node, [*ids[:1], *guesses])
    return end


def test_ahead_asks_about_the_likeliest_text():
    """First guesses are right with 0.4, second ones with 0.3: second guesses come before the end of a long chain."""
    ahead, asked_about = Ahead([0.4, 0.3, 0.1], 2, 6), []
    node = tell(ahead, ahead.root, [10], [11, 12])
    assert ahead.likeliest() is node                         # its own text, before the target has spoken
    assert tell(ahead, tell(ahead, node, [20], [21, 22]), [30], [31, 32]).place == 3
    assert ahead.likeliest().place == 3
    assert said(ahead, [10]) == [[20, 30]]
    for guess in range(40, 46):
        node = ahead.likeliest()
        asked_about.append([of.id for of in node.path()][1:])
        ahead.tell(node, [guess])
    # 10 was a first guess: the shares are 0.412, 0.294, 0.098, and two chances are equal, of which the older is first
    assert asked_about == [[21], [20, 30], [20, 31], [21, 40], [22], [20, 30, 41]]
    assert ahead.shares[:2] == pytest.approx([0.412, 0.294])
    assert ahead.texts()[1:] == (ahead.shares[0], 4)
    assert said(ahead, [10, 21]) == [[40, 43]] and ahead.shares[1] == pytest.approx(0.98 * 0.294 + 0.02)


def test_ahead_stops_at_the_end_of_an_answer():
    ahead = Ahead([0.5, 0.4], 2, 4)
    tell(ahead, ahead.root, [2], [9])                        # 2 ends a sequence: the other guess is all there is
    ahead.commit([], 0.0)
    ahead.tell(ahead.likeliest(), [7, 8])
    assert [of.id for of in ahead.likeliest().path()] == [9, 7, 8]
    tell(ahead, ahead.likeliest(), [5], [2])
    assert ahead.likeliest() is None                         # four ids are as many as were asked for
    ahead.commit([2], 0.0)
    assert ahead.likeliest() is None                         # the target has ended


@pytest.fixture
def apart(pair):  # noqa: F811
    """The pair on two pretend devices."""
    pair.apart = True
    yield pair
    pair.apart = False


def delayed(model, monkeypatch, seed, most, least=0.0):
    """Every forward of the model ends `least` to `most` seconds late."""
    rng, step, step_recalled = random.Random(seed), model.step, model.step_recalled
    monkeypatch.setattr(model, "step", lambda G=0: (step(G), time.sleep(rng.uniform(least, most))))
    monkeypatch.setattr(model, "step_recalled", lambda G: (step_recalled(G), time.sleep(rng.uniform(least, most))))


@pytest.mark.parametrize("slow", ["neither", "drafter", "target", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_every_interleaving_gives_the_targets_ids(apart, monkeypatch, slow, seed):
    for model in apart.models:
        if slow in (model.side, "both"):
            delayed(model, monkeypatch, seed, 0.02)
    for i in (seed, seed + 3):
        result = apart.generate(mode="speculative", ignore_eos=True, **asked(i))
        assert result.output_ids == truth(apart, i, 0, True) and result.drafter_error is None
        assert sum(a + 1 for a in result.accept_lens) >= len(result.output_ids) - 1


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.6, 1.0])
def test_wrong_drafts_ahead_cost_no_id(apart, monkeypatch, wrong):
    """The drafter says the target's answer with a share of ids replaced, as in a replay."""
    rng, ids = random.Random(1), truth(apart, 1, 0, True)
    delayed(apart.target, monkeypatch, 0, 0.02)              # so that the drafter gets ahead
    with saying(apart, [(i + 1) % 100 if rng.random() < wrong else i for i in ids]):
        result = apart.generate(mode="speculative", ignore_eos=True, **asked(1))
    assert result.output_ids == ids
    if wrong == 0.0:
        assert result.accepted_tokens > len(ids) // 2
    if wrong == 1.0:
        assert result.accepted_tokens == 0


def test_what_follows_a_second_guess_is_ready_when_the_target_says_it(apart, monkeypatch):
    """A drafter whose first guess is wrong at every other place: where its second one is right there, what follows is
    drafted before the target says it, and no forward goes without a draft."""
    ids, found = truth(apart, 1, 0, True), {}
    first = [(i + 1) % 100 if place % 2 else i for place, i in enumerate(ids)]
    monkeypatch.setattr(engine, "GUESSES", 2)                # a trained drafter's third is no replay's
    delayed(apart.target, monkeypatch, 0, 0.06)
    for name, second in (("other", [(i + 2) % 100 for i in ids]), ("right", ids)):
        monkeypatch.setattr(apart, "shares", [0.5, 0.4])
        with saying(apart, first, second):
            found[name] = apart.generate(mode="speculative", ignore_eos=True, explain=True, **asked(1))
    for result in found.values():
        assert result.output_ids == ids and result.drafter_error is None
    drafted = {name: [len(of.drafts) > 0 for of in result.verdicts[3:]] for name, result in found.items()}
    rounds = {name: result.rounds for name, result in found.items()}
    assert rounds["right"] < 0.7 * len(ids) and rounds["right"] + 6 < rounds["other"], rounds
    assert sum(drafted["right"]) > 0.9 * len(drafted["right"]), drafted


def test_a_preview_goes_on_after_the_drafter_looked_at_other_texts(apart, monkeypatch):
    """It is the drafter's own text, as far as its first guesses are asked about: here all of them are right."""
    ids = truth(apart, 1, 0, True)
    monkeypatch.setattr(apart, "shares", [0.4, 0.3, 0.2, 0.1])
    delayed(apart.target, monkeypatch, 0, 0.04)
    with saying(apart, ids):
        result = apart.generate(mode="speculative", ignore_eos=True, overlap_len=2, **asked(1))
    notes = [note for row, *_, note in result.timeline if row == "drafter"]
    assert result.output_ids == ids and result.preview_ids == ids[:len(result.preview_ids)]
    assert notes.index("resume") + 5 < len(result.preview_ids) <= len(ids), "ids after the first other text"


def test_a_drafter_that_would_end_goes_on_behind_its_other_guess(apart, monkeypatch):
    """It takes the text for ended after one id, and the target's second id for next likely: what follows that is ready
    when the target has rejected the end."""
    ids = truth(apart, 1, 0)
    monkeypatch.setattr(apart, "shares", [0.5, 0.4, 0.01, 0.01])
    delayed(apart.target, monkeypatch, 0, 0.15, 0.15)
    with saying(apart, [ids[0], apart.drafter.config.eos_id, *ids[2:]], ids):
        result = apart.generate(mode="speculative", **asked(1) | dict(max_new_tokens=4))
    rounds = [stage for row, stage, *_ in result.timeline if row == "target"][2:]        # after encode and prefill
    assert result.output_ids == ids[:4] and rounds[:2] in (["verify", "verify"], ["decode", "verify"]), rounds
    assert result.accepted_tokens > 0


def test_guesses_are_asked_about_as_soon_as_they_are_known(apart, monkeypatch):
    """The target has spoken and is slow; the drafter takes the text for ended, and has another guess."""
    ids, drafter, prefill = truth(apart, 1, 0), apart.drafter, apart.drafter.prefill
    monkeypatch.setattr(apart, "shares", [0.5, 0.4, 0.01, 0.01])
    delayed(apart.target, monkeypatch, 0, 0.4, 0.4)
    monkeypatch.setattr(drafter, "prefill", lambda *given: (time.sleep(0.2), prefill(*given)))
    with saying(apart, [ids[0], drafter.config.eos_id, *ids[2:]], ids):
        result = apart.generate(mode="speculative", **asked(1) | dict(max_new_tokens=3))
    spoken = min(end for row, stage, _, end, _ in result.timeline if row == "target" and stage in ("decode", "verify"))
    drafted = [start for row, stage, start, *_ in result.timeline if row == "drafter" and stage == "draft"]
    assert result.output_ids == ids[:3] and sum(start < spoken for start in drafted) >= 2, result.timeline


def test_a_preview_is_the_drafters_own_text_whatever_else_it_was_asked_about(apart, monkeypatch):
    """A drafter in earnest, unlike a replay's, says other ids behind other texts: none of them may show."""
    monkeypatch.setattr(apart, "shares", [0.3, 0.3, 0.3, 0.1])
    delayed(apart.target, monkeypatch, 0, 0.05)
    for i in range(3):
        own = apart.generate(mode="drafter_only", ignore_eos=True, **asked(i)).output_ids
        result = apart.generate(mode="speculative", ignore_eos=True, overlap_len=2, **asked(i))
        assert result.preview_ids == own[:len(result.preview_ids)] and len(result.preview_ids) > 1
        assert sum(note == "resume" for *_, note in result.timeline) > 5


def test_rows_that_are_put_aside_come_back_with_the_same_bits(pair):  # noqa: F811
    """Turns between the branches of a tree, then all rows of one text against a cache that knew no other."""
    drafter, rng = pair.drafter, random.Random(3)
    hidden_SD = torch.randn(20, drafter.config.D, generator=torch.Generator().manual_seed(0))

    def ask(node, at):
        """Looks at a text and says how many of its ids were run."""
        ids, ready = [of.id for of in node.path()], drafter.lay(node, at)
        drafter.resume(torch.tensor([len(ids), 0, 0, 0, 0, 0, 0, 0, *ids]), max(1, len(ids) - ready))
        drafter.laid = node.path()
        return len(ids) - ready

    def rows_of(node, turns):
        """Cache rows of a text that was looked at id by id, after `turns` looks at others."""
        drafter.prefill(hidden_SD, 40, -1, 3)
        drafter.laid, drafter.kept = [], {}
        for of in node.path():
            assert ask(of, trunk) == 1
        assert [ask(of, trunk) for of in turns] == [1] * len(turns), "no row is ever run again"
        assert ask(node, trunk) <= 1
        caches = drafter.decoder.k_cache_LNMK, drafter.decoder.v_cache_LNMK
        return torch.stack([cache[:, :, :20 + node.place] for cache in caches])

    with torch.inference_mode():
        trunk = Node().then(5)
        node, other = trunk.then(7).then(9).then(1), trunk.then(8)
        others = [trunk, trunk.then(7), trunk.then(7).then(9), other, other.then(9), other.then(4), trunk.then(6)]
        plain = rows_of(node, [])
        ours = rows_of(node, others + [rng.choice(others) for _ in range(10)])
    assert torch.equal(ours, plain) and len(drafter.kept) > 3
    assert all(not torch.equal(plain[:, :, :, i], plain[:, :, :, i + 1]) for i in range(20, 23))
    for turn in range(50):                                   # the answer goes on: what it left behind makes room
        with torch.inference_mode():
            assert ask(node.then(turn), node) <= 1 and ask(node.then(99), node) == 1
            node = node.then(turn)
            assert ask(node.then(98), node) == 1, "its row came back"


def test_the_least_cache_holds_the_rows_that_are_put_aside(pair, monkeypatch):  # noqa: F811
    """One row less is refused by name; with just enough, branches are taken and left to the end of the answer."""
    rows = pair.drafter.prompt(asked(1)["query"]).rows(5 + pair.drafter.vision.P + 1)
    least = rows + 50 + engine.STEP_ROWS + engine.KEPT_ROWS
    for cache_rows in (least - 1, least):
        drafter = engine.load_model(engine.Drafter, TINY / "drafter", "cpu", cache_rows=cache_rows)
        e = engine.Engine(pair.target, drafter)
        e.apart, e.shares = True, [0.4, 0.3, 0.2, 0.1]
        given = asked(1) | dict(mode="speculative", ignore_eos=True, max_new_tokens=50)
        if cache_rows < least:
            with pytest.raises(engine.InputError, match=f"put aside 32 needs {least}"):
                e.generate(**given)
            continue
        delayed(pair.target, monkeypatch, 0, 0.03)
        result = e.generate(**given)
        assert len(result.output_ids) == 50 and result.drafter_error is None
        assert result.output_ids == pair.generate(**given | dict(mode="target_only")).output_ids
        assert max(place for _, place, _ in result.drafts) > 45 and drafter.kept, "it drafted to the end"


@pytest.mark.parametrize("seed", range(2))
def test_what_a_drafter_ahead_says_of_a_text_is_what_it_says_when_asked_afresh(apart, monkeypatch, seed):
    """Every guess of a request in which branches were taken and left, against one prefill of prompt and text."""
    kept, drafter, rng = [], apart.drafter, random.Random(seed)

    class Kept(Ahead):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(engine, "Ahead", Kept)
    monkeypatch.setattr(apart, "shares", [0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(Kept, "commit", lambda *given: Ahead.commit(*given) if rng.random() < 0.5 else None)
    delayed(apart.target, monkeypatch, seed, 0.05)
    result = apart.generate(mode="speculative", ignore_eos=True, **asked(seed))
    assert result.output_ids == truth(apart, seed, 0, True) and result.drafter_error is None
    hidden_SD, texts, waiting = drafter.hidden_MD[:drafter.prompt_rows].clone(), 0, [kept[0].root]
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        if node.next is None:
            continue
        ids = torch.tensor([of.id for of in node.path()], dtype=torch.long)
        with torch.inference_mode():
            rows_SD = torch.cat([hidden_SD, drafter.decoder.embed_VD[ids]])
            last = torch.tensor([len(rows_SD) - 1])
            logits_V = drafter.decoder.forward(rows_SD, torch.arange(len(rows_SD)), only=last)[0]
        best = logits_V.topk(4)
        assert (best.values[:-1] - best.values[1:]).min() < 1e-3 or node.next == best.indices.tolist()[:len(node.next)]
        texts += len(node.next) == 4                         # of the last forward nobody asks for more than its id
    branches = sum(note == "resume" for *_, note in result.timeline)
    assert texts > 20 and branches > 5, (texts, branches)


@pytest.mark.parametrize("when", [0, 3])
def test_a_drafter_that_dies_ahead_is_noted(apart, monkeypatch, when):
    calls, step = [], apart.drafter.step

    def dying(G=0):
        calls.append(G)
        if len(calls) > when:
            raise RuntimeError("gone")
        step(G)

    monkeypatch.setattr(apart.drafter, "step", dying)
    delayed(apart.target, monkeypatch, 0, 0.02)
    result = apart.generate(mode="speculative", ignore_eos=True, **asked(2))
    assert result.output_ids == truth(apart, 2, 0, True) and "gone" in result.drafter_error


def test_a_replay_says_what_was_recorded(pair):  # noqa: F811
    target = pair.target
    steps, target.steps = target.steps, {}
    try:
        with torch.inference_mode():
            target.replay([7, 8, 9, 10, 11, 12])
        alone = pair.generate(mode="target_only", **asked(0))
        drafted = pair.generate(mode="speculative", draft_source=Fixed([7, 8, 9, 99, 11]), **asked(0))
    finally:
        target.recorded_2W, target.steps = None, steps
    assert alone.output_ids == drafted.output_ids == [7, 8, 9, 10, 11, 12, target.config.eos_id]
    assert drafted.accept_lens[0] == 2 and STATE == 8
