"""Lossless: whatever is drafted, in every mode, the answer is the target's own, id for id. On the embedded pair."""

import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import NEW, QUESTIONS, RECORDS, TINY, asked, guesses, script, truth
from PIL import Image

import engine
import weights.given
from engine import MODES, DraftSource, Fixed, InputError
from kernels.frames import draw_events


@pytest.mark.parametrize("draft_len", [1, 5, 15, 31])
@pytest.mark.parametrize("ignore_eos", [False, True], ids=["stop", "fixed_length"])
def test_any_drafts_give_the_targets_answer(pair, draft_len, ignore_eos):
    """4 lengths x 2 endings x 17 sources = 136 cases, on two samples in turn."""
    question = int((draft_len in (5, 31)) != ignore_eos)
    i = 3 * question
    ids, cases = truth(pair, i, question, ignore_eos), 0
    for name, guess in guesses(ids).items():
        result = pair.generate(mode="speculative", draft_source=Fixed(guess), draft_len=draft_len,
                               ignore_eos=ignore_eos, **asked(i, question))
        assert result.output_ids == ids, f"{name}, sample {i}, draft_len {draft_len}"
        assert sum(a + 1 for a in result.accept_lens) >= len(ids) - 1
        if name == "perfect":
            assert result.rounds == -(-(len(ids) - 1) // (draft_len + 1))
        if name in ("hopeless", "out_of_vocabulary"):
            agreeing = sum(a == b for a, b in zip(guess, ids, strict=False))
            assert result.accepted_tokens == agreeing
        cases += 1
    assert cases == 17


@pytest.mark.parametrize("mode", ["prefill_only", "prefill_then_verify", "speculative"])
@pytest.mark.parametrize("i", range(len(RECORDS)))
def test_every_mode_with_the_real_drafter_gives_the_targets_answer(pair, mode, i):
    result = pair.generate(mode=mode, **asked(i, i % 2))
    assert result.output_ids == truth(pair, i, i % 2)
    assert result.drafter_error is None
    assert result.finish_reason == ("stop" if result.output_ids[-1] == 2 else "length")


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "drafter_only"])
def test_the_limit_is_met_exactly(pair, mode, limit):
    result = pair.generate(mode=mode, ignore_eos=True, **asked(0, max_new_tokens=limit))
    assert result.output_ids == truth(pair, 0, 0, True)[:limit] and result.finish_reason == "length"


@pytest.mark.parametrize("wrong_at", [None, 0, 1, 4, 12])
def test_a_head_start_is_verified_with_its_bonus(pair, monkeypatch, wrong_at):
    """A drafter that gives the target's own ids but for one, all of them before the target's prefill."""
    ids, made, steps = truth(pair, 0), threading.Event(), []
    guess = [i if place != wrong_at else i + 1 for place, i in enumerate(ids[:13])]

    def drafting(kind, number):
        steps.append(kind)
        if steps.count("step") == 13:                        # 13 ids are there, the next one waits
            made.set()
    script(monkeypatch, pair.drafter, guess + [3] * 30, before=drafting)
    prefill = pair.target.prefill
    monkeypatch.setattr(pair.target, "prefill", lambda *given: (made.wait(20), prefill(*given)))
    result = pair.generate(mode="prefill_then_verify", overlap_len=13, **asked(0))
    assert result.output_ids == ids and result.free_tokens_count >= 13 and result.drafter_error is None
    assert result.accept_lens == ([] if wrong_at == 0 else [12 if wrong_at is None else wrong_at - 1])


def drafts_behind(d, ids, G, rows=2):
    """G drafts of the drafter behind a text of which the last `rows` ids are run again."""
    d.resume(ids, rows)
    for _ in range(G - 1):
        d.round()
    return d.written(len(ids), G).tolist()


@torch.inference_mode()
def test_drafts_are_the_drafters_greedy_continuation(pair):
    """Drafts after any committed prefix equal a recomputation from scratch, also right after a full acceptance."""
    d, text = pair.drafter, pair.drafter.text
    pixels = torch.randn(5, 3, d.vision.image, d.vision.image, generator=torch.Generator().manual_seed(0))
    prompt = d.prompt(QUESTIONS[0])
    prompt_SD = d.splice(prompt, d.encode(pixels))
    d.begin(None, False)

    def scratch(committed, G):
        out = []
        for _ in range(G):
            hidden_SD = torch.cat([prompt_SD, d.decoder.embed_VD[torch.tensor(committed + out)]])
            out.append(int(d.decoder.forward(hidden_SD, torch.arange(len(hidden_SD)))[-1].argmax()))
        return out

    committed = text.ids("A red")[:1]
    for agreed in (5, 0, 2, 5, 5, 1):
        want = scratch(committed, 5)
        if len(committed) == 1:
            d.prefill(prompt_SD, 3, (), prompt.after[-1])
        # scratch() overwrote the cache: write the committed rows again as rounds would have left them
        rows_SD = torch.cat([prompt_SD, d.decoder.embed_VD[torch.tensor(committed[:-1], dtype=torch.long)]])
        d.decoder.forward(rows_SD, torch.arange(len(rows_SD)))
        d.decoder.k_cache_LNMK[:, :, len(rows_SD) - (len(committed) > 1):] = 7.0     # the row a full round lacks, too
        assert drafts_behind(d, committed, 5) == want
        committed = committed + want[:agreed] + [want[agreed] if agreed < 5 else 9]


@torch.inference_mode()
def test_the_target_may_know_more_ids_than_the_drafter(pair):
    """Video-LLaVA has 64 rows of vocabulary that EventGPT lacks; with random weights they occur."""
    drafter = pair.drafter
    pair.generate(mode="drafter_only", **asked(0))
    drafts = drafts_behind(drafter, [drafter.config.V + 63], 3)
    assert len(drafts) == 3 and all(0 <= i < drafter.config.V for i in drafts)


@pytest.mark.parametrize("behind", [2, 5, 30])
@torch.inference_mode()
def test_a_drafter_left_behind_catches_up_by_running_the_missing_rows(pair, behind):
    """The target went on alone for some ids: their rows are run together, and the drafts are as if one by one."""
    drafter, ids = pair.drafter, truth(pair, 2, 0, True)[:behind + 1]
    pair.generate(mode="drafter_only", **asked(2, max_new_tokens=1))
    for n_out in range(1, len(ids) + 1):                     # id by id, as rounds would
        one_by_one = drafts_behind(drafter, ids[:n_out], 1)
    rows = drafter.decoder.k_cache_LNMK[:, :, :drafter.prompt_rows + behind + 1].clone()
    drafter.decoder.k_cache_LNMK[:, :, drafter.prompt_rows:].normal_()
    assert drafts_behind(drafter, ids, 1, rows=len(ids)) == one_by_one
    caught_up = drafter.decoder.k_cache_LNMK[:, :, :drafter.prompt_rows + behind + 1]
    assert torch.allclose(caught_up, rows, atol=1e-5)


@torch.inference_mode()
def test_stale_rows_of_the_previous_request_change_nothing(pair):
    ids = truth(pair, 1)
    for model in pair.models:
        for cache in (model.decoder.k_cache_LNMK, model.decoder.v_cache_LNMK):
            cache.copy_(torch.randn_like(cache) * 100)
    assert pair.generate(mode="speculative", **asked(1)).output_ids == ids


# ---- a source in the drafter's place


class Scripted(DraftSource):
    """Drafts of an answer, place by place; keeps what it is told, and breaks where it is asked to."""

    def __init__(self, ids=(), breaks="", error=RuntimeError):
        self.ids, self.breaks, self.error, self.told = list(ids), breaks, error, []

    def _told(self, what, *values):
        self.told.append((what, *values))
        if what == self.breaks:
            raise self.error("out of ideas")

    def begin(self, question):
        self._told("begin", question)

    def propose(self, committed, limit):
        self._told("propose", list(committed), limit)
        return self.ids[len(committed):len(committed) + limit]

    def verdict(self, drafted, accepted):
        self._told("verdict", drafted, accepted)

    def learn(self, answer):
        self._told("learn", list(answer))

    def read(self, preview_ids):
        self._told("read", list(preview_ids))


def test_a_source_is_told_question_verdicts_and_answer(pair):
    ids = truth(pair, 0)
    source = Scripted([*ids[:3], ids[3] + 1, *ids[4:]])
    result = pair.generate(mode="speculative", draft_source=source, draft_len=5, **asked(0))
    assert result.output_ids == ids and result.drafter_error is None
    assert source.told[0] == ("begin", QUESTIONS[0]) and source.told[-1] == ("learn", ids)
    assert source.told[1:4] == [("propose", ids[:1], 5), ("verdict", 5, 2), ("propose", ids[:4], 5)]
    verdicts = [of[1:] for of in source.told if of[0] == "verdict"]
    assert [accepted for _, accepted in verdicts] == result.accept_lens


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["begin", "propose", "verdict", "learn", "read"])
def test_a_source_that_breaks_costs_nothing_but_its_drafts(pair, monkeypatch, where, error):
    source, drafted = Scripted([3] * 64, where, error), threading.Event()
    source.needs_drafter = where == "read"
    if source.needs_drafter:                                 # so that there is something to read
        script(monkeypatch, pair.drafter, [5] * 40, before=lambda kind, _: kind == "step" and drafted.set())
        prefill = pair.target.prefill
        monkeypatch.setattr(pair.target, "prefill", lambda *given: (drafted.wait(20), prefill(*given)))
    result = pair.generate(mode="speculative", draft_source=source, **asked(0))
    assert result.output_ids == truth(pair, 0) and "out of ideas" in result.drafter_error


def test_a_source_that_needs_the_drafter_reads_its_ids_and_no_other_does(pair, monkeypatch):
    drafted, steps, prefill = threading.Event(), [], pair.target.prefill

    def drafting(kind, number):
        steps.append(kind)
        if steps.count("step") == 4:
            drafted.set()
    forwards = script(monkeypatch, pair.drafter, [5, 6, 7, 8, 9, 10], before=drafting)
    monkeypatch.setattr(pair.target, "prefill", lambda *given: (drafted.wait(20), prefill(*given)))
    source = Scripted()
    source.needs_drafter = True
    result = pair.generate(mode="speculative", draft_source=source, **asked(0))
    assert result.output_ids == truth(pair, 0) and result.drafter_error is None
    read = [of[1] for of in source.told if of[0] == "read"]
    assert read and read[-1][:4] == [5, 6, 7, 8] and result.preview_ids[:len(read[-1])] == read[-1]
    forwards.clear()
    source = Scripted()
    result = pair.generate(mode="speculative", draft_source=source, **asked(0))
    assert not forwards and result.preview_ids == [] and not [of for of in source.told if of[0] == "read"]


def test_drafts_that_are_right_beyond_the_end_of_an_answer_are_not_counted(pair):
    """Drafts that go on as the target would behind its end-of-sequence are counted up to there."""
    ids, on = truth(pair, 0), truth(pair, 0, 0, True)
    assert on[:len(ids)] == ids and len(on) > len(ids) + 3
    for n, source, G in ((len(ids), Fixed(on), 15), (len(ids), Fixed(on), 31), (7, Fixed(on), 15)):
        given = asked(0) | dict(max_new_tokens=n)
        result = pair.generate(mode="speculative", draft_source=source, draft_len=G, **given)
        assert result.output_ids == ids[:n] and result.rejected_at == -1
        assert result.accepted_tokens <= len(ids[:n]) - 1 < result.accepted_tokens + result.rounds + 1
        assert result.drafted >= result.accepted_tokens > 0
    given = asked(0) | dict(max_new_tokens=7)
    result = pair.generate(mode="speculative", draft_source=Fixed(on), draft_len=15, **given)
    assert result.accept_lens == [6] and result.drafted - result.accepted_tokens <= 15 - 6


def test_nan_in_the_drafter_is_noted_and_nan_in_the_target_is_an_error(pair):
    ids = truth(pair, 0)
    for model, name in ((pair.drafter, "drafter"), (pair.target, "target")):
        weight = model.decoder.w["text.norm"]
        kept = weight.clone()
        weight.fill_(float("nan"))
        try:
            if name == "drafter":
                result = pair.generate(mode="prefill_only", **asked(0))
                assert result.output_ids == ids and "NaN" in result.drafter_error
            else:
                with pytest.raises(InputError, match="target's logits hold NaN"):
                    pair.generate(mode="target_only", **asked(0))
        finally:
            weight.copy_(kept)
    assert pair.generate(mode="speculative", **asked(0)).output_ids == ids


# ---- other ways in


def test_event_images_give_the_same_drafts_as_the_recording_they_were_drawn_from(pair, tmp_path):
    given, paths = asked(0), []
    for i, frame_HW3 in enumerate(draw_events(weights.given.read_events(given["event_path"]))):
        paths.append(tmp_path / f"{i}.png")
        height, width, _ = frame_HW3.shape
        Image.frombytes("RGB", (width, height), bytes(frame_HW3.flatten().tolist())).save(paths[-1])
    drawn = pair.generate(mode="drafter_only", **given)
    loaded = pair.generate(mode="drafter_only", **{**given, "event_path": None, "event_image_path": paths})
    assert drawn.output_ids == loaded.output_ids
    one = pair.generate(mode="drafter_only", **{**given, "event_path": None, "event_image_path": str(paths[0])})
    assert one.prompt_rows["drafter"] == drawn.prompt_rows["drafter"] - 4     # one temporal row a frame


def test_a_picture_in_place_of_a_video_goes_through_the_image_tower(pair, tmp_path):
    path, given = tmp_path / "p.png", asked(0)
    Image.new("RGB", (120, 96), (200, 40, 30)).save(path)
    still = {**given, "video_path": None, "image_path": path}
    alone = pair.generate(mode="target_only", **still)
    assert alone.prompt_rows["target"] == len(pair.target.prompt(given["query"]).before) + pair.target.vision.P + len(
        pair.target.prompt(given["query"]).after)
    assert pair.generate(mode="speculative", **still).output_ids == alone.output_ids


# ---- streaming and results


def test_stream_is_append_only_and_ends_as_generate_does(pair):
    for mode in MODES:
        text, ids, events = "", [], list(pair.stream(mode=mode, **asked(2)))
        for event in events:
            if event.kind == "final":
                assert event.text.startswith(text) and event.ids[:len(ids)] == ids
                text, ids = event.text, event.ids
        assert [e.result is not None for e in events] == [False] * (len(events) - 1) + [True]
        assert text == events[-1].result.output_text and events[-1].finish_reason in ("stop", "length")
        assert ("preview" in {e.kind for e in events}) == (mode in ("drafter_only", "prefill_only")) or mode in (
            "prefill_then_verify", "speculative")
        assert [e.t_ms for e in events[:-1]] == sorted(e.t_ms for e in events[:-1])


def test_a_stream_closed_early_leaves_the_engine_usable(pair):
    for count in (0, 1, 3):
        stream = pair.stream(mode="prefill_only", **asked(0))
        for _ in range(count):
            next(stream)
        stream.close()
    assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)


def test_the_preview_stops_when_the_answer_is_there(pair, monkeypatch):
    """A drafter that would go on for 100 ids, and gets no further until the target has its answer."""
    answered, never = threading.Event(), threading.Event()

    def drafting(kind, number):
        if kind == "step":
            answered.wait(20)
            never.wait(0.1)                                  # a forward of 100 ms: 100 of them would take 10 seconds
    script(monkeypatch, pair.drafter, [3] * 100, before=drafting)
    script(monkeypatch, pair.target, [5, 6, 7])
    stream = pair.stream(mode="prefill_only", **asked(0, max_new_tokens=100))
    for event in stream:
        if event.kind == "final" and event.ids[-1:] == [2]:
            answered.set()
    assert event.result.output_ids == [5, 6, 7, 2] and len(event.result.preview_ids) < 40


def test_the_callers_thread_is_left_as_it_was_between_events(pair):
    stream = pair.stream(mode="prefill_only", **asked(0))
    next(stream)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    with pytest.raises(InputError, match="still open"):
        pair.generate(mode="target_only", **asked(0))        # it would wait for itself for ever
    stream.close()
    assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)


def test_a_stream_that_nobody_holds_gives_its_turn_back(pair):
    """It may be in a cycle, as of an error that was kept."""
    def begin():
        stream = pair.stream(mode="target_only", **asked(0))
        next(stream)
        cycle = [stream]
        cycle.append(cycle)

    with paused_collector():
        begin()
        assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)
        begin()
        with ThreadPoolExecutor(1) as other:
            answer = other.submit(lambda: pair.generate(mode="target_only", timeout=0.01, **asked(0)))
            assert answer.result().output_ids == truth(pair, 0)


@contextlib.contextmanager
def paused_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_two_threads_on_one_engine_are_served_in_turn(pair):
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: pair.generate(mode="speculative", **asked(i))}))
               for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {i: r.output_ids for i, r in results.items()} == {i: truth(pair, i) for i in range(3)}


def test_the_result_is_a_mapping_with_the_seeds_fields(pair):
    result = pair.generate(mode="prefill_then_verify", **asked(0))
    for name in ("output_text", "wall_clock_time", "free_tokens_count", "accepted_tokens", "rejected_at", "stages",
                 "acceptance_rate", "preview_text", "timeline", "ttft", "ttfp"):
        assert result[name] == getattr(result, name)
    assert 0 < result["ttft"] <= result["wall_clock_time"]
    assert set(result.stages["target"]) >= {"load", "preprocess", "encode", "prefill"}
    assert all(end >= start for _, _, start, end, _ in result.timeline)
    with pytest.raises(KeyError):
        result["no_such_field"]


def test_the_seeds_api_answers(pair, monkeypatch):
    api = engine.PrefillOnlyInference(eventgpt_path=TINY / "drafter", videollava_model_id=TINY / "target", device="cpu")
    given = asked(0)
    result = api.generate(event_path=given["event_path"], video_path=str(given["video_path"]), query=given["query"],
                          max_new_tokens=NEW)
    assert result["output_text"] == pair.target.text.decode(truth(pair, 0)) and result["wall_clock_time"] > 0


# ---- what the user can get wrong


@pytest.mark.parametrize("change,words", [
    ({"mode": "fast"}, "mode: 'fast'"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"draft_len": 32}, "draft_len"),
    ({"max_new_tokens": 10 ** 6}, "raise `cache_rows`, lower `max_new_tokens`"),
    ({"video_path": None}, "video: wanted one"),
    ({"video_path": "no/such.mp4"}, "no/such.mp4"), ({"event_path": "no/such.npy"}, "no/such.npy"),
    ({"event_path": None}, "events: wanted one"), ({"event_path": None, "event_image_path": []}, "event_image_path"),
    ({"query": None}, "query: "), ({"query": "\ud800"}, "query: "),
    ({"query": "x" * 200_000}, "query: "), ({"video_path": __file__}, "test_request.py"),
    ({"event_path": __file__}, "test_request.py"), ({"frame_rule": "random"}, "rule"),
    ({"event_path": None, "event_image_path": [None]},
     "event_image_path: is a NoneType, wanted the path of a PNG or JPEG"),
    ({"event_path": None, "event_image_path": [b""]}, "no such file"),
], ids=str)
def test_bad_input_is_one_line_and_the_engine_goes_on(pair, change, words):
    with pytest.raises(InputError) as error:
        pair.generate(**{"mode": "speculative", **asked(0), **change})
    assert words in str(error.value) and "\n" not in str(error.value)
    assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)


@pytest.mark.parametrize("mode", ["speculative", "drafter_only", "target_only"])
@pytest.mark.parametrize("canvas", [(260.0, 346.0), "260x346", (260,), 640, (-1, -1), (0, 5), (10 ** 6, 5), (5, 5, 2),
                                    {1: 2}, [None, 5], (1, 4097), {260, 346}, (True, 346)], ids=str)
def test_a_canvas_is_checked_before_any_model_runs(pair, monkeypatch, mode, canvas):
    monkeypatch.setattr(pair, "_run", None)
    with pytest.raises(InputError, match="canvas: wanted .height, width.[^\n]*; "):
        pair.generate(mode=mode, canvas=canvas, **asked(0))


@pytest.mark.parametrize("mode", ["speculative", "drafter_only", "target_only"])
@pytest.mark.parametrize("options, words", [
    ({"columns": "xyt"}, "columns: wanted"), ({"columns": 4}, "columns: wanted"),
    ({"frame_rule": "x"}, "frame_rule: 'x'"),
    ({"time_unit": "minutes"}, "time_unit: 'minutes' is not one of s, ms, us, ns")], ids=str)
def test_how_media_are_read_is_checked_in_every_mode(pair, mode, options, words):
    with pytest.raises(InputError, match=f"^{words}"):
        pair.generate(mode=mode, **options, **asked(0))


@pytest.mark.parametrize("content", [b"short", b"\x89HDF\r\n", b"\xff\xd8 a picture"])
def test_an_event_file_is_looked_at_whatever_the_gate_does(pair, monkeypatch, tmp_path, content):
    gate = engine.Gate()
    monkeypatch.setattr(gate, "head_start", lambda *_: False)
    monkeypatch.setattr(pair, "gate", gate)
    monkeypatch.setattr(pair, "_run", None)
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(InputError, match="e.npy: not an .npy or .npz of events but "):
        pair.generate(mode="speculative", **asked(0) | {"event_path": tmp_path / "e.npy"})


def test_events_wait_until_the_videos_packets_are_read_and_no_longer(pair, monkeypatch):
    """Both readers hold the interpreter's lock; the target's goes first. Its frames may come much later."""
    order, drafted, real = [], threading.Event(), (weights.given.read_video, weights.given.read_events)
    answer = truth(pair, 0)

    def video(path, count, rule, for_gpu, decoding):
        assert not drafted.wait(0.05), "events were read beside the packets"
        order.append("packets")
        decoding()
        assert drafted.wait(20), "the drafter waited for frames"
        return real[0](path, count, rule)

    def events(path):
        order.append("events")
        drafted.set()
        return real[1](path)
    monkeypatch.setattr("weights.given.read_video", video)
    monkeypatch.setattr("weights.given.read_events", events)
    monkeypatch.setattr(pair, "target_first", True)          # as beside a GPU
    assert pair.generate(mode="speculative", **asked(0)).output_ids == answer
    assert order == ["packets", "events"]


@pytest.mark.parametrize("mode", MODES)
def test_a_target_that_goes_first_keeps_nobody_waiting_for_good(pair, monkeypatch, mode):
    monkeypatch.setattr(pair, "target_first", True)
    result = pair.generate(mode=mode, **asked(0))
    assert result.drafter_error is None and (mode == "drafter_only" or result.output_ids == truth(pair, 0))


def test_a_video_that_cannot_be_read_keeps_no_drafter_waiting(pair, monkeypatch):
    def video(*_):
        raise engine.InputError("clip.mp4: unreadable; another one")
    monkeypatch.setattr("weights.given.read_video", video)
    monkeypatch.setattr(pair, "target_first", True)
    with pytest.raises(engine.InputError, match="unreadable"):
        pair.generate(mode="speculative", **asked(0))


def test_any_of_several_stop_ids_ends_an_answer(pair, monkeypatch):
    """As generation_config.json may list them: in plain decode and inside a verified span alike."""
    ids = truth(pair, 0, 0)
    monkeypatch.setattr(pair.target, "stops", (2, ids[4]))
    for options in (dict(mode="target_only"), dict(mode="speculative", draft_source=Fixed(ids), draft_len=15)):
        result = pair.generate(**options, **asked(0))
        assert result.output_ids == ids[:5] and result.finish_reason == "stop"
