"""One clip, many questions: an answer is what a fresh clip gives, whatever was asked before, in any mode."""

import contextlib
import copy
import gc
import itertools
import pickle
import random

import pytest
import torch
from common import QUESTIONS, TINY, asked, truth
from safetensors.torch import load_file
from test_models import model as golden
from test_models import split

import engine
from engine import Fixed, InputError, Prompt
from kernels.round import State
from weights.drafting import NonFinite

GOLDEN = TINY.parents[1] / "tests" / "golden" / "video_llava_tiny"
SHORT = dict(max_new_tokens=12)      # ids of an answer


def files(i, **options):
    """Arguments of `Engine.open` for the embedded clip i."""
    given = asked(i, **options)
    del given["query"]
    return given


@pytest.fixture(scope="module")
def own():
    """The embedded pair with its target's 4-bit copy; these tests leave no clip open."""
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", dtype="fp32", gate=False,
                              self_draft=True)


@pytest.fixture
def e(own, read_once, monkeypatch):
    monkeypatch.setattr("weights.given.read_video", read_once)
    monkeypatch.setattr(own, "lookup", engine.Lookup())
    yield own
    assert own.clip is None


def behind(model, clip):
    """Key rows of the last question's prompt and answer."""
    held = clip.sides[model.side]
    return model.decoder.k_cache_LNMK[:, :, held:model.prompt_rows + 10].clone()


def test_an_answer_is_the_same_after_0_1_and_9_earlier_questions(e):
    """To the bit: the keys behind the clip are equal. And it is what `generate` gives."""
    expected = truth(e, 3, 1)[:12]
    with e.open(**files(3, **SHORT)) as clip:
        first = clip.generate(QUESTIONS[1], mode="target_only")
        rows = behind(e.target, clip)
    assert first.output_ids == expected and first.prompt_rows == {"target": 304 + 26}
    order = random.Random(0)
    with e.open(**files(3, **SHORT)) as clip:
        kept = e.target.decoder.k_cache_LNMK[:, :, :304].clone()
        for earlier in (1, 9):
            for _ in range(earlier):
                q, temperature = order.choice([*QUESTIONS, "why " * order.randint(1, 30)]), order.choice([0.0, 2.0])
                clip.generate(q, mode=order.choice(engine.MODES), temperature=temperature,
                              max_new_tokens=order.randint(1, 6))
            again = clip.generate(QUESTIONS[1], mode="target_only")
            assert again.output_ids == first.output_ids and torch.equal(behind(e.target, clip), rows)
        assert torch.equal(e.target.decoder.k_cache_LNMK[:, :, :304], kept)


SOURCES = [None, "lookup", "drafter", "self", ["lookup", "self"], "fixed"]


@pytest.mark.parametrize("sampling", [{}, dict(temperature=3.0, top_p=0.9, seed=5)], ids=["greedy", "sampled"])
def test_every_mode_and_source_gives_target_only_of_the_same_clip(e, sampling):
    order = random.Random(1)
    with e.open(**files(0, **SHORT)) as clip:
        alone = {q: clip.generate(q, mode="target_only", **sampling).output_ids for q in QUESTIONS[:2]}
        tries = [("speculative", source) for source in SOURCES]
        tries += [("prefill_then_verify", None), ("prefill_only", None)]
        order.shuffle(tries)
        drafted = 0
        for mode, source in tries:
            q = order.choice(QUESTIONS[:2])
            source = Fixed([*alone[q][:5], 3, 3]) if source == "fixed" else source
            result = clip.generate(q, mode=mode, draft_source=source, **sampling)
            assert result.output_ids == alone[q] and result.drafter_error is None, (mode, source)
            drafted += result.accepted_tokens
        assert drafted > 10
    if not sampling:
        assert list(alone.values()) == [truth(e, 0, q)[:12] for q in (0, 1)]


def test_a_drafter_on_its_own_device_has_its_own_clip(e, monkeypatch):
    expected = [truth(e, 1, q)[:20] for q in (0, 1)]
    monkeypatch.setattr(e, "apart", True)
    with e.open(**files(1, max_new_tokens=20)) as clip:
        for q in (1, 0, 1):
            result = clip.generate(QUESTIONS[q], draft_source="drafter")
            assert result.output_ids == expected[q] and result.drafter_error is None and result.draft_log
            assert set(result.stages["drafter"]) == {"prefill", "draft"}


@pytest.mark.parametrize("mode, sampling", [("speculative", {}), ("target_only", dict(temperature=2.0, seed=3))])
def test_a_chat_of_three_turns_equals_one_built_at_once(e, mode, sampling):
    turns = [*QUESTIONS[:2], QUESTIONS[0]]
    with e.open(**files(2, mode=mode, **SHORT, **sampling)) as clip:
        step_by_step = [clip.chat(q) for q in turns[:2]]
        clip.generate(QUESTIONS[2])                          # what is asked between the turns is no part of them
        step_by_step.append(clip.chat(turns[2]))
        known = clip.turns
        assert known == [(q, r.output_ids) for q, r in zip(turns, step_by_step, strict=True)]
        del clip.turns[-1]                                   # one turn taken back, and asked again
        assert clip.chat(turns[2]).output_ids == step_by_step[2].output_ids
    with e.open(**files(2, mode=mode, **SHORT, **sampling)) as fresh:
        for n in (2, 1):
            fresh.turns = known[:n]
            at_once = fresh.chat(turns[n])
            assert at_once.output_ids == step_by_step[n].output_ids
            assert at_once.prompt_rows == step_by_step[n].prompt_rows


def test_a_turn_runs_only_the_rows_that_are_not_there(e, monkeypatch):
    sent, ask = [], e.target.ask
    monkeypatch.setattr(e.target, "ask", lambda ids, limit, stops, known: sent.append((len(ids), known)) or ask(
        ids, limit, stops, known))
    with e.open(**files(2, mode="target_only", ignore_eos=True, **SHORT)) as clip:
        clip.chat(QUESTIONS[0])
        clip.chat(QUESTIONS[1])
        clip.generate(QUESTIONS[1])
    turn, asks = len(e.target.prompt(QUESTIONS[0]).after), len(e.target.prompt(QUESTIONS[1]).after)
    assert sent[0] == (turn, 0) and sent[1][1] == turn + 11 and sent[2] == (asks, 0)     # its last id has no row yet


def test_turns_stand_in_the_template_of_both_models(e):
    """`USER: .. ASSISTANT: ..</s>USER: ..`; the visual rows are spliced in before the first question."""
    said = e.target.text.ids("A red car.")
    for model, opening in ((e.target, ""), (e.drafter, "<ev_end>")):
        for answer in (said, [*said, 2]):                    # cut by the limit, ended by itself
            prompt = model.talk("Where?", [("What?", answer), ("Who?", answer)])
            text = model.text.head.decode(prompt.after, skip_special_tokens=False)
            assert text.strip() == (f"{opening}\nWhat? ASSISTANT: A red car.</s>USER: Who? ASSISTANT: A red car.</s>"
                                    f"USER: Where? ASSISTANT:").strip()
        assert model.talk("What?") == model.prompt("What?") and prompt.before == model.prompt("What?").before


@torch.inference_mode()
def test_two_turns_equal_transformers():
    """Recorded with transformers: a clip, a question, its answer of 12 ids, </s>, and a question more."""
    m, want = golden(engine.Target, GOLDEN / "gqa", cache_rows=192), load_file(GOLDEN / "two_turns.safetensors")
    given = load_file(GOLDEN / "inputs.safetensors")
    prompt, ids = split(given["input_ids"], 381), want["input_ids"][0].tolist()
    after = ids[ids.index(381) + 40:]
    m.prefill(m.splice(Prompt(prompt.before, []), m.encode(given["pixel_values_videos"][0])), 1, (), prompt.before[-1])
    m.held = m.prompt_rows

    def answer(text, count, known=0):
        m.ask(text, count, (), known)
        for _ in range(count - 1):
            m.round()
        return State(m.state_W.tolist()).ids

    first = answer(prompt.after, 12)
    assert first == after[len(prompt.after):len(prompt.after) + 12] and after[:len(prompt.after)] == prompt.after
    assert after[len(prompt.after) + 12] == 2
    for known in (len(prompt.after) + 11, 0, len(after) - 1):
        assert answer(after, 24, known) == want["greedy_tokens"][0].tolist()
        assert answer(prompt.after, 12) == first
        m.ask(after, 2, (), 0)                               # the rows that the next one takes as known


@torch.inference_mode()
def test_what_a_capture_runs_lies_behind_the_rows_of_the_clip(e):
    """A graph may be captured while a clip is open, for a mode that was not asked before."""
    with e.open(**files(0, **SHORT)) as clip:
        first = clip.generate(QUESTIONS[0], mode="speculative", draft_source=["drafter", "self"])
        for model in e.models:
            held, kinds = clip.sides[model.side], set()
            kept = model.decoder.k_cache_LNMK[:, :, :held].clone()
            for (kind, *_), graph in list(model.step_graphs.items()):
                if kind not in ("encode", "prefill"):        # no question of a clip needs these
                    model.rest()
                    graph.fn()
                    kinds.add(kind)
            assert torch.equal(model.decoder.k_cache_LNMK[:, :, :held], kept)
            assert kinds == {"ask", "round"} | ({"draft"} if model is e.target else {"resume"})
        assert clip.generate(QUESTIONS[0]).output_ids == first.output_ids


@torch.inference_mode()
def test_a_warm_up_meets_every_kind_of_layer_and_leaves_all_of_them(e):
    """A prefill's first layer has another norm than the second, and its last fewer rows."""
    d, ran = e.target.decoder, {}
    for kind, rows in (("step", 3), ("prefill", 40)):
        def forward(rows=rows):
            d.k_cache_LNMK.zero_()
            d.forward(torch.ones(rows, d.config.D), torch.arange(rows), only=torch.tensor([2]))
            return [i for i in range(d.config.L) if d.k_cache_LNMK[i].any()]

        with pytest.raises(KeyError), d.shortened():
            ran[kind] = forward()
            raise KeyError
        assert ran[kind] == sorted({0, 1, d.config.L - 1}) and forward() == [*range(d.config.L)]


@pytest.mark.parametrize("kept, given_back", [(80, ["memory"]), (8, [])], ids=["little", "plenty"])
@torch.inference_mode()
def test_a_capture_records_all_layers_after_a_short_run_and_leaves_the_state(e, monkeypatch, kept, given_back):
    """In order, on a machine without a GPU; memory is given back to the driver only where little of it is left."""
    m, done = e.target, []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            done.append((pool, capture_error_mode))

        def capture_end(self):
            done.append("end")

    fake = {"CUDAGraph": Graph, "memory_reserved": lambda device: kept, "memory_allocated": lambda device: 0,
            "synchronize": lambda device: None,
            "empty_cache": lambda: done.append("memory"), "device": contextlib.nullcontext,
            "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda device: None}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(engine.memory, "free_bytes", lambda device: (90, 100))       # what torch keeps counts as free
    monkeypatch.setattr(m, "stream", type("Stream", (), {"wait_stream": lambda self, other: None})())
    for name, value in {"graphs": True, "pool": "pool", "capture": "stream"}.items():
        monkeypatch.setattr(m, name, value)
    m.state_W.copy_(torch.arange(len(m.state_W)))
    graph = engine.StepGraph(lambda: done.append([*m.decoder.depths]) or m.state_W.zero_(), m)
    assert done == [[0, 1, m.config.L - 1], *given_back, ("pool", "thread_local"), [*range(m.config.L)], "end"]
    assert torch.equal(m.state_W, torch.arange(len(m.state_W))) and graph.graph and graph.out is not None


def test_questions_of_a_length_share_a_prefill_that_is_there_from_loading_on():
    """On a GPU: no capture for a new length, and none of a length that is rare."""
    class OnGpu(engine.Model):
        def __init__(self):
            self.on_gpu, self.graphs, self.made = True, False, []
            self.decoder = type("Cache", (), {"cache_rows": 2500})()

        def graph(self, name, size):
            self.made.append(size)

    m = OnGpu()
    for question in (1, 16, 17, 32, 33, 64, 65, 256):
        m.prefill_graph(2061 + question, question)
    assert [size - 2061 for size in m.made] == [16, 16, 32, 32, 64, 64, 128, 256]
    assert m.prefill_graph(2061 + 257, 257).graph is None and len(m.made) == 8
    m.prefill_graph(2061, 0)                                 # up to the visual rows, for a clip
    m.prefill_graph(2490, 40)                                # no more rows than the cache has
    assert m.made[8:] == [2077, 2500]


def test_loading_prepares_both_modes_with_progress_and_learns_the_price_of_a_step(e, monkeypatch):
    told, answered = [], e._answer
    asked_for = []
    monkeypatch.setattr(engine, "QUESTION_ROWS", (8, 40))    # the caches of these have no room for more than 256
    monkeypatch.setattr(e, "_answer", lambda asked: asked_for.append(asked) or answered(asked))
    gate = e.gate = engine.Gate()
    try:
        e.prepare(lambda *of: told.append(of))
        assert e.gate is gate and not gate.tries and not e.lookup.learnt and not e.learners
        assert list(gate.times) == ["step"] and 0 < gate.step < 1                # its price is known at once
    finally:
        e.gate = None
    assert [of.mode for of in asked_for] == ["target_only", "speculative"] and asked_for[0].query == "?"
    for model in e.models:                                   # it makes ready what questions without a graph need, too
        assert 40 < len(model.prompt(asked_for[1].query).after) <= 80
    assert told == [("preparation", i + 1, len(told)) for i in range(len(told))] and len(told) == 4


def test_a_turn_runs_rows_again_that_a_capture_may_have_overwritten(e, monkeypatch):
    """A graph for another kind of turn is captured behind the clip's rows, where those of its chat stand."""
    known, ask = [], e.target.ask
    monkeypatch.setattr(e.target, "ask", lambda *given: known.append(given[3]) or ask(*given))
    with e.open(**files(2, mode="target_only", **SHORT)) as clip:
        clip.chat(QUESTIONS[0])
        expected = clip.chat(QUESTIONS[1]).output_ids
        del clip.turns[-1]
        with torch.inference_mode():
            e.target.rest()
            e.target.decoder.k_cache_LNMK[:, :, clip.sides["target"]:].zero_()
        assert clip.chat(QUESTIONS[1]).output_ids == expected and known[1] > known[0] == known[2] == 0


# ---- several clips


def written(model, clip):
    """Keys and values of the clip and of the last prompt behind it."""
    caches = model.decoder.k_cache_LNMK, model.decoder.v_cache_LNMK
    return torch.stack([cache[:, :, :model.prompt_rows] for cache in caches]).clone()


def test_clips_asked_in_turn_answer_as_each_asked_alone(e, monkeypatch):
    """To the bit where nobody drafts: then the rows do not depend on who was quicker."""
    script = [("chat", QUESTIONS[0], dict(mode="target_only")), ("chat", QUESTIONS[1], dict(draft_source="self")),
              ("generate", QUESTIONS[1], dict(draft_source="drafter")), ("chat", "Why?", dict(mode="target_only")),
              ("chat", QUESTIONS[2], dict(draft_source=["lookup", "drafter"], temperature=2.0)),
              ("generate", QUESTIONS[0], dict(mode="drafter_only")), ("generate", "Where?", dict(mode="target_only"))]
    monkeypatch.setattr(e, "several", 2)
    known, ask = [None], e.target.ask                        # rows that the last question found written
    monkeypatch.setattr(e.target, "ask", lambda *given: known.append(given[3]) or ask(*given))

    def step(clip, kind, query, given):
        result = getattr(clip, kind)(query, **given)
        assert result.drafter_error is None
        model = e.drafter if given.get("mode") == "drafter_only" else e.target
        alone = given.get("mode") is not None
        return (result.output_ids, known[-1]), written(model, clip) if alone else None

    alone, held = {}, {}
    for i in (0, 3):
        with e.open(**files(i, max_new_tokens=6)) as clip:
            alone[i] = [step(clip, *of) for of in script]
            assert alone[i][1][0][1] > 20 and alone[i][4][0][1] > 20         # turns behind the first
            held[i] = clip.turns
    with e.open(**files(0, max_new_tokens=6)) as first, e.open(**files(3, max_new_tokens=6)) as second:
        for number, of in enumerate(script):
            for i, clip in ((0, first), (3, second)):
                found, rows = step(clip, *of)
                assert found == alone[i][number][0] and e.clip is clip, (i, of)
                assert rows is None or torch.equal(rows, alone[i][number][1]), (i, of)
        assert [first.turns, second.turns] == [held[0], held[3]]


def test_a_parked_clip_is_closed_or_dropped_and_takes_its_place_along(e, monkeypatch):
    monkeypatch.setattr(e, "several", 2)
    expected = [truth(e, i)[:12] for i in (0, 1, 3)]
    first, second = (e.open(**files(i, mode="target_only", **SHORT)) for i in (0, 1))
    refused(lambda: e.open(**files(2)), "2 clips are open", "close one", "`several`")
    refused(lambda: e.generate(**asked(2)), "open clip", "close it first")
    first.close()                                            # its rows are not in the caches
    refused(lambda: first.generate(QUESTIONS[0]), "closed", "open it again")
    third = e.open(**files(3, mode="target_only", **SHORT))
    for clip, ids in ((second, expected[1]), (third, expected[2]), (second, expected[1])):
        assert clip.generate(QUESTIONS[0]).output_ids == ids
    second.close()                                           # and here they are
    refused(lambda: e.generate(**asked(2)), "open clip")
    assert third.generate(QUESTIONS[0]).output_ids == expected[2]
    with monkeypatch.context() as patch:                     # what cannot be opened costs nothing
        patch.setattr(engine.torch, "empty_like", lambda t: torch.empty(1 << 62, dtype=torch.uint8))
        refused(lambda: e.open(**files(0)), "no 0.0", "GB for another clip's rows, 1 are open", "close one")
    refused(lambda: e.open(video_path=__file__, mode="target_only"), "test_clip.py")
    assert third.generate(QUESTIONS[0]).output_ids == expected[2] and len(e.clips) == 1
    del third
    gc.collect()
    assert e.generate(mode="target_only", **asked(0)).output_ids[:12] == expected[0] and not e.clips


def test_the_budget_has_room_for_each_of_several_clips(e):
    pair = dict(eventgpt=TINY / "drafter", videollava=TINY / "target", device="cpu", dtype=torch.float32)
    one, three = (engine.memory_budget(**pair, several=n) for n in (1, 3))
    for model in e.models:
        room = sum(t.nbytes for _, t in engine.Parked(model, 0).pairs)
        assert three[model.side]["parked"] == 3 * room > 0 and "parked" not in one[model.side]
    added = sum(three[side]["parked"] for side in three)
    assert engine.memory.bytes_of(three) == engine.memory.bytes_of(one) + added
    refused(lambda: engine.load_engine(**pair, several=1000, cache_rows=100_000), "GB free", "target parked", "lower")
    for several in (0, True, "two", 2.5):
        refused(lambda several=several: engine.load_engine(**pair, several=several), "several")


# ---- what cannot be done is said in one line, and the next question is answered


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_an_open_clip_keeps_the_caches_until_it_is_closed(e):
    expected = truth(e, 0), truth(e, 1)[:12]
    clip = e.open(**files(0, **SHORT))
    ids = clip.generate(QUESTIONS[0]).output_ids
    refused(lambda: e.generate(**asked(0)), "open clip", "close it first")
    refused(lambda: e.open(**files(1)), "open clip", "close it first")
    assert clip.generate(QUESTIONS[0]).output_ids == ids
    stream = clip.stream(QUESTIONS[0])
    next(stream)
    refused(lambda: clip.generate(QUESTIONS[0]), "stream of this thread")
    stream.close()
    assert clip.generate(QUESTIONS[0]).output_ids == ids and clip.turns == []
    clip.close()
    clip.close()
    refused(lambda: clip.generate(QUESTIONS[0]), "closed", "open it again")
    with e.open(**files(1, **SHORT)) as other:
        refused(lambda: clip.generate(QUESTIONS[0]), "closed")
        assert other.generate(QUESTIONS[0]).output_ids == expected[1]
    gc.collect()
    e.open(**files(0)).generate(QUESTIONS[0], 3)             # nobody holds it any more
    assert e.generate(mode="target_only", **asked(0)).output_ids == expected[0]


class Words(str):
    """A text that spells itself otherwise."""

    def __len__(self):
        raise RuntimeError("no length")

    __str__ = __format__ = encode = __len__


def test_a_chat_is_told_in_plain_words_and_may_be_dropped(e):
    with e.open(**files(0, **SHORT)) as clip:
        ids = clip.chat(Words(QUESTIONS[0])).output_ids
        assert clip.turns == [(QUESTIONS[0], ids)] and type(clip.turns[0][0]) is str
        del clip.turns
        assert clip.chat(QUESTIONS[0]).output_ids == ids
        last = [*clip.stream(QUESTIONS[0])][-1]
        last.ids.clear()                                     # the caller's own
        assert last.result.output_ids == ids
        for copied in (copy.deepcopy, copy.copy, pickle.dumps):
            refused(lambda copied=copied: copied(clip), "Clip: cannot be copied or sent to another process")
            refused(lambda copied=copied: copied(e), "Engine: cannot be copied")


def test_bad_questions_cost_nothing(e):
    with e.open(video_path=files(0)["video_path"], mode="target_only", max_new_tokens=12) as clip:
        ids = clip.chat(QUESTIONS[0]).output_ids
        for options, words in ((dict(query=7), ["question"]), (dict(query="why " * 4000), ["cache holds", "shorten"]),
                               (dict(query="?", max_new_tokens=4000), ["cache holds", "begin a new chat"]),
                               (dict(query="?", mode="guess"), ["mode"]), (dict(query="?", seed=-1), ["seed"]),
                               (dict(query="?", mode="drafter_only"), ["drafter does not see"]),
                               (dict(query="?", mode="speculative", draft_source="drafter"), ["drafter does not see"])):
            refused(lambda options=options: clip.chat(**options), *words)
        assert clip.turns == [(QUESTIONS[0], ids)]
        assert clip.generate(QUESTIONS[0], mode="speculative").output_ids == ids     # what there is drafts: no drafter
    refused(lambda: e.open(event_path=files(0)["event_path"]), "video: wanted one")
    refused(lambda: e.open(video_path=__file__, mode="target_only"), "test_clip.py")
    assert truth(e, 0)[:12] == ids


TURNS = [[("Q", [576])], [("Q", [-1])], [("Q", [2 ** 70])], [("Q", [1.5])], [("Q", "text")], [("Q", None)],
         [(None, [5])], [5], [{"role": "user", "content": "a"}], [("Q", [5], 1)], "abc", [("\ud800", [5])], 5]


def test_a_chat_that_was_kept_elsewhere_is_checked(e):
    """`turns` may be put back, as JSON or arrays hold them too; ids that the table lacks would pick other rows."""
    with e.open(**(files(0) | {"max_new_tokens": 2})) as clip:
        clip.turns = [("Q", [5, 6])]
        wanted = clip.chat("And?").output_ids
        for turns in ([["Q", [5, 6]]], (("Q", torch.tensor([5, 6])),)):
            clip.turns = turns
            assert clip.chat("And?").output_ids == wanted
        for turns in (*TURNS, iter([("Q", [5])]), [("Q", itertools.repeat(5))]):
            clip.turns = turns
            with pytest.raises(InputError, match="^turns: wanted pairs .*; put back what"):
                clip.chat("And?")
        for wrong, words in ((lambda: clip.generate(None), "^query: "),
                             (lambda: next(clip.stream("?", chat="no")), "^chat: ")):
            with pytest.raises(InputError, match=words):
                wrong()


def test_a_clip_belongs_to_its_engine(e, loaded_pair):
    expected = truth(e, 0, 1)[:12], truth(loaded_pair, 1, 1)[:12]
    with e.open(**files(0, **SHORT)) as clip, loaded_pair.open(**files(1, **SHORT)) as other:
        for _ in range(2):
            assert clip.generate(QUESTIONS[1]).output_ids == expected[0]
            assert other.generate(QUESTIONS[1]).output_ids == expected[1]
        assert clip.engine is e and e.clip is clip and loaded_pair.clip is other


def test_a_drafter_that_fails_at_a_clip_costs_its_drafts_alone(e, monkeypatch):
    def broken(*_):
        raise NonFinite("the events are too bright")

    expected = truth(e, 0)[:12]
    with monkeypatch.context() as patch:
        patch.setattr(e.drafter, "encode", broken)
        clip = e.open(draft_source=["drafter", "lookup"], **files(0, **SHORT))
    with clip:
        result = clip.generate(QUESTIONS[0])
        assert result.output_ids == expected and "too bright" in result.drafter_error
        refused(lambda: clip.generate(QUESTIONS[0], mode="drafter_only"), "drafter does not see")


def test_nan_in_a_question_is_named_and_the_next_is_answered(e, monkeypatch):
    with e.open(**files(0, mode="target_only", **SHORT)) as clip:
        clip.chat(QUESTIONS[0])
        with monkeypatch.context() as patch:
            patch.setattr(e.target.decoder, "embed_VD", torch.full_like(e.target.decoder.embed_VD, float("nan")))
            refused(lambda: clip.chat(QUESTIONS[1]), "NaN")
        for cache in (e.target.decoder.k_cache_LNMK, e.target.decoder.v_cache_LNMK):
            assert cache.isfinite().all()                    # what it left behind would reach into the next question
        turn = clip.chat(QUESTIONS[1])
        assert len(clip.turns) == 2
    with e.open(**files(0, mode="target_only", **SHORT)) as clip:
        clip.chat(QUESTIONS[0])
        assert clip.chat(QUESTIONS[1]).output_ids == turn.output_ids


def test_an_answer_of_a_clip_can_be_explained(e):
    guess = truth(e, 0)[:6]
    with e.open(**files(0, **SHORT)) as clip:
        result = clip.generate(QUESTIONS[0], draft_source=Fixed(guess))
        for ask in (lambda: result, lambda: clip.generate(QUESTIONS[0], mode="target_only")):
            of = ask()
            verdicts = engine.explain(e.target, of)
            assert [i for v in verdicts for i in v.ids] == of.output_ids
            assert min(m for v in verdicts for m in v.margins) > 0
        assert clip.generate(QUESTIONS[0]).output_ids == result.output_ids
