"""What only a GPU can show: graphs equal eager, no waiting inside a round, bf16 answers equal in every mode."""

import gc
import time

import pytest
import torch
from common import QUESTIONS, TINY, asked
from compare import differing

import bench
import engine
from engine import MODES, Fixed
from kernels.round import STATE, State
from weights.events import read_events
from weights.given import events_given, video_given
from weights.load import DRAFTER_7B, TARGET_7B
from weights.video import read_video

pytestmark = pytest.mark.gpu


def load(dtype=torch.bfloat16, graphs=True, **options):
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cuda", dtype=dtype, graphs=graphs, gate=False,
                              **options)


@torch.inference_mode()
def one_round(target, G, sampling=None, searches=False):
    """(logits of a round of G drafts behind a prompt of ones, the state after it)."""
    target.begin(sampling, searches)
    with target.on_stream():
        round_graph = target.round_graph(G)
        target.prefill_graph(40)
        target.prefill(torch.ones(40, target.config.D, dtype=target.decoder.dtype, device="cuda"), 20, (), 3)
        target.put([7] * G)
        round_graph()
    torch.cuda.synchronize()
    return round_graph.out, target.state_W.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_graph_equals_eager(dtype):
    graph, eager = load(dtype), load(dtype, graphs=False)
    for mode in MODES:
        a, b = (e.generate(mode=mode, **asked(0)) for e in (graph, eager))
        assert a.output_ids == b.output_ids, mode
    for G in (0, 5, 15):
        (ours, state), (plain, again) = (one_round(e.target, G, searches=True) for e in (graph, eager))
        assert torch.equal(ours, plain) and torch.equal(state, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sampled_graph_equals_eager_and_serves_every_value(dtype):
    graph, eager = load(dtype), load(dtype, graphs=False)
    answers, held = set(), []
    for sampling in (dict(), dict(temperature=4.0, seed=1), dict(temperature=3.0, top_p=0.9, seed=2 ** 40)):
        for mode in MODES:
            a, b = (e.generate(mode=mode, **sampling, **asked(0)) for e in (graph, eager))
            assert a.output_ids == b.output_ids and a.drafter_error is None, mode
        answers.add(tuple(a.output_ids))
        held.append(set(graph.target.step_graphs))
    assert len(answers) == 3 and held[0] < held[1] == held[2]            # other values, the same graphs
    for G in (0, 15):
        (ours, state), (plain, again) = (one_round(e.target, G, (3.0, 0.9, 5)) for e in (graph, eager))
        assert differing(ours, plain) == 0 and torch.equal(state, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sampled_answers_equal_target_only_under_forced_drafts_of_every_accepted_length(dtype):
    e, lens = load(dtype), set()
    for i, top_p in ((0, 1.0), (1, 0.9), (2, 1.0)):
        options = asked(i, ignore_eos=True, temperature=4.0, top_p=top_p, seed=i)
        ids = e.generate(mode="target_only", **options).output_ids
        for accepted in range(16):
            guess = [x if (k % (accepted + 1)) else x + 1 for k, x in enumerate(ids)]
            result = e.generate(mode="speculative", draft_source=Fixed(guess), draft_len=15, **options)
            assert result.output_ids == ids, f"sample {i}, accepted {accepted}"
            lens |= set(result.accept_lens)
        for mode in ("prefill_only", "prefill_then_verify", "speculative"):
            assert e.generate(mode=mode, **options).output_ids == ids, mode
    assert set(range(15)) <= lens


def test_graph_equals_eager_at_7b_shapes():
    states = []
    for graphs in (True, False):
        target = engine.load_engine(None, "random-7b", device="cuda", cache_rows=512, graphs=graphs,
                                    self_draft=False).target
        with torch.inference_mode(), target.on_stream():
            hidden_SD = target.decoder.embed_VD[:200].clone()
            for G in (0, 15):
                round_graph = target.round_graph(G)
                target.prefill(hidden_SD, 40, (), 3)
                for _ in range(4):
                    target.put([7] * G)
                    target.round(G)
                torch.cuda.synchronize()
                states.append((State(target.state_W.tolist()).ids, round_graph.out.clone()))
        del target
        torch.cuda.empty_cache()
    for (graph, logits), (eager, again) in zip(states[:2], states[2:], strict=True):
        assert graph == eager and torch.equal(logits, again)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("weights", ["embedded", "random-7b"])
def test_rounds_never_wait_for_the_gpu(weights, temperature):
    e = (load(self_draft=True) if weights == "embedded" else
         engine.load_engine("random-7b", "random-7b", device="cuda", cache_rows=512, self_draft=True))
    target, drafter = e.target, e.drafter

    def rounds():
        target.round(0)
        target.draft(first=True)
        target.draft(first=False)
        target.round(3)
        drafter.resume([5, 6, 7], 2)
        drafter.round()
        target.put(drafter.written(3, 2))
        target.round(3)
        target.put([5, 6, 7])
        target.round(3)
        target.snapshot(STATE + 20)

    with torch.inference_mode():
        for model in e.models:
            model.begin((temperature, 0.9, 1) if temperature and model is target else None, model is target)
            for G in (0, 3):
                model.round_graph(G)
        drafter.graph("resume", 2)
        target.graph("draft", True, bool(temperature))
        for model in e.models:
            model.prefill(model.decoder.embed_VD[:200].clone(), 200, (), 3)
        rounds()                                             # warms up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                rounds()
            with pytest.raises(RuntimeError, match="synchroniz"):
                target.state_W[0].item()                     # the guard itself is on
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert State(target.state_W.tolist()).n_out >= 20    # ids were made: four or more in each turn


@pytest.mark.parametrize("drafter_device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("drafter_dtype", ["bf16", "int4"])
def test_a_drafter_on_a_gpu_of_its_own_gives_the_targets_ids(drafter_dtype, drafter_device):
    """cuda:0: the same code, both models on one GPU."""
    if torch.cuda.device_count() <= int(drafter_device[-1]):
        pytest.skip("needs two GPUs")
    e, accepted = load(drafter_device=drafter_device, drafter_dtype=drafter_dtype), 0
    e.apart, plain = True, e.target.round
    e.target.round = lambda G=0: (time.sleep(0.01), plain(G))        # one this small is done before a drafter begins
    for i in range(4):
        ids = e.generate(mode="target_only", ignore_eos=True, **asked(i)).output_ids
        for mode in ("prefill_only", "prefill_then_verify", "speculative"):
            source = "drafter" if mode != "prefill_only" else None
            result = e.generate(mode=mode, ignore_eos=True, draft_source=source, **asked(i))
            assert result.output_ids == ids and result.drafter_error is None, mode
        assert result.draft_log and result.stages["drafter"]["draft"] > 0
        accepted += sum(of.accepted for of in result.round_log if of.source == "drafter")
    assert accepted > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forced_drafts_of_every_accepted_length_give_target_only(dtype):
    e = load(dtype)
    for i in range(3):
        ids = e.generate(mode="target_only", ignore_eos=True, **asked(i)).output_ids
        for accepted in range(16):
            guess = [x if (k % (accepted + 1)) else x + 1 for k, x in enumerate(ids)]
            result = e.generate(mode="speculative", draft_source=Fixed(guess), draft_len=15, ignore_eos=True,
                                **asked(i))
            assert result.output_ids == ids, f"sample {i}, accepted {accepted}"
        for mode in ("prefill_only", "prefill_then_verify", "speculative"):
            assert e.generate(mode=mode, ignore_eos=True, **asked(i)).output_ids == ids, mode


# ---- memory: the budget is what torch allocates at most, from loading to the last request


MID = 16                                                     # layers of the two 7B decoders that are kept


def mid_size(monkeypatch, cache_rows=2560, **options):
    """An engine of 7B widths and half the layers, random weights, and its budget."""
    text = TARGET_7B["text_config"]
    monkeypatch.setattr("weights.memory.TARGET_7B", {**TARGET_7B, "text_config": {**text, "num_hidden_layers": MID}})
    monkeypatch.setattr("weights.memory.DRAFTER_7B", {**DRAFTER_7B, "num_hidden_layers": MID})
    given = dict(device="cuda", cache_rows=cache_rows, **options)
    return engine.load_engine("random-7b", "random-7b", gate=False, **given), engine.memory_budget(
        "random-7b", "random-7b", **given)


def forget():
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("drafter_dtype", ["bf16", "int4"])
def test_what_is_allocated_is_within_5_percent_of_the_printed_budget(monkeypatch, drafter_dtype):
    forget()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)    # requests start a count anew
    e, budget = mid_size(monkeypatch, drafter_dtype=drafter_dtype)
    for i in range(3):
        for mode in MODES:
            e.generate(mode=mode, ignore_eos=True, **asked(i))
    needed = sum(of.get(part, 0) for of in budget.values() for part in ("weights", "cache", "packed", "scratch"))
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(needed, rel=0.05), budget
    held = torch.cuda.memory_reserved()
    for i in range(20):
        e.generate(mode="speculative", **asked(i % 9))
    assert torch.cuda.memory_reserved() - held < 256 << 20, "requests of the same kind go on taking memory"


def test_what_does_not_fit_is_refused_before_anything_is_allocated(capsys):
    before = torch.cuda.memory_allocated()
    assert bench.main(["--weights", "random-7b", "--device", "cuda", "--cache-rows", str(10 ** 6)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "GB free" in err and "lower --cache-rows" in err
    assert torch.cuda.memory_allocated() == before


def test_memory_that_really_runs_out_in_a_request_is_one_line_and_the_next_request_works(monkeypatch):
    e, _ = mid_size(monkeypatch)
    ids = e.generate(mode="speculative", ignore_eos=True, **asked(0)).output_ids
    forget()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
    longer = {**asked(0), "query": "why " * 120}             # 373 rows, for which there is no graph
    with pytest.raises(engine.InputError) as error:
        e.generate(mode="speculative", ignore_eos=True, **longer)
    assert "ran out in the target's prefill" in str(error.value) and "`cache_rows`" in str(error.value)
    assert "\n" not in str(error.value)
    del taken                                                # a request without new graphs needs some memory as well
    forget()
    assert e.generate(mode="speculative", ignore_eos=True, **asked(0)).output_ids == ids
    assert len(e.generate(mode="speculative", ignore_eos=True, **longer).output_ids) == 40


@pytest.mark.parametrize("drafter_dtype", ["bf16", "int4"])
def test_every_source_gives_the_targets_ids(drafter_dtype):
    """Asked twice: the second time earlier answers draft too."""
    e = load(drafter_dtype=drafter_dtype, self_draft=True)
    for i in (0, 1, 0, 1):
        for options in (dict(), dict(temperature=3.0, seed=2)):
            given, drafted = asked(i, ignore_eos=True, **options), 0
            truth = e.generate(mode="target_only", remember=False, **given).output_ids
            for source in ("lookup", "drafter", "self", ["lookup", "drafter", "self"], None):
                result = e.generate(mode="speculative", draft_source=source, **given)
                assert result.output_ids == truth and result.drafter_error is None, source
                drafted += result.accepted_tokens
            assert drafted > 20


# ---- a clip


@pytest.mark.parametrize("sampling", [{}, dict(temperature=3.0, top_p=0.9, seed=4)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter_dtype", ["bf16", "int4"])
def test_a_clips_answers_are_those_of_a_fresh_one_to_the_bit(drafter_dtype, sampling):
    """After 0, 1 and 9 earlier questions, by every source; and a chat of three turns is one that is built at once."""
    e, given = load(drafter_dtype=drafter_dtype, self_draft=True), asked(0, ignore_eos=True, **sampling)
    del given["query"]

    def keys(clip):
        rows = clip.engine.target.prompt_rows + given["max_new_tokens"] - 1
        return e.target.decoder.k_cache_LNMK[:, :, clip.sides["target"]:rows].clone()

    with e.open(**given) as clip:
        first = clip.generate(QUESTIONS[1], mode="target_only")
        kept = keys(clip)
    with e.open(**given) as clip:
        for earlier in (1, 9):
            for k in range(earlier):
                clip.generate("why " * (5 * k + 1), mode=MODES[k % len(MODES)], max_new_tokens=k + 1)
            assert clip.generate(QUESTIONS[1], mode="target_only").output_ids == first.output_ids
            assert differing(keys(clip), kept) == 0
        for source in ("lookup", "drafter", "self", ["lookup", "drafter", "self"], None):
            result = clip.generate(QUESTIONS[1], draft_source=source)
            assert result.output_ids == first.output_ids and result.drafter_error is None, source
            assert differing(keys(clip), kept) == 0, source
        short = dict(max_new_tokens=24)
        turns = [clip.chat(q, **short).output_ids for q in QUESTIONS]
        known, rows = clip.turns, keys(clip)[:, :, :-16]
    with e.open(**given) as clip:
        clip.turns = known[:2]
        assert clip.chat(QUESTIONS[2], mode="target_only", **short).output_ids == turns[2]
        assert differing(keys(clip)[:, :, :-16], rows) == 0


def test_clips_asked_in_turn_answer_as_each_asked_alone_to_the_bit():
    """By every source, chats and single questions; and graphs that are captured meanwhile leave the chats alone."""
    e, short = load(self_draft=True, several=2, cache_rows=1024), dict(max_new_tokens=24, ignore_eos=True)
    script = [("chat", 0, dict(mode="target_only")), ("chat", 1, dict(draft_source="self")),
              ("generate", 2, dict(draft_source="drafter")), ("chat", 2, dict(draft_source="lookup", temperature=2.0)),
              ("generate", 0, dict(mode="target_only")), ("chat", 1, dict(draft_source=["drafter", "self"]))]
    media = [{name: of for name, of in asked(i).items() if name.endswith("path")} for i in (0, 1)]

    def step(clip, kind, number, given):
        result = getattr(clip, kind)(QUESTIONS[number], **given)
        rows = e.target.prompt_rows + short["max_new_tokens"] - 1
        caches = e.target.decoder.k_cache_LNMK, e.target.decoder.v_cache_LNMK
        return result.output_ids, torch.stack([cache[:, :, :rows] for cache in caches])

    alone = []
    for of in media:
        with e.open(**of, **short) as clip:
            alone.append([step(clip, *line) for line in script])
    e.target.step_graphs = {key: of for key, of in e.target.step_graphs.items() if key[-1] is not True}      # sampled
    with e.open(**media[0], **short) as first, e.open(**media[1], **short) as second:
        for number, line in enumerate(script):
            for clip, (ids, rows) in ((first, alone[0][number]), (second, alone[1][number])):
                found = step(clip, *line)
                assert found[0] == ids and differing(found[1], rows) == 0, line


def test_no_question_of_a_new_length_captures_anything():
    e = load(self_draft=True)
    made = [set(m.step_graphs) for m in e.models]
    for words in (1, 9, 30, 40):
        for mode in ("target_only", "speculative"):
            e.generate(mode=mode, **{**asked(0), "query": "why " * words})
    given = asked(0)
    del given["query"]
    with e.open(**given) as clip:
        for words in (2, 40):
            clip.generate("why " * words)
    assert [set(m.step_graphs) for m in e.models] == made


# ---- what lies on the GPU, and what is given back


def test_events_and_frames_on_the_gpu_stay_there_and_give_the_answer_of_the_files():
    e, files = load(), asked(0)
    recording, frames = read_events(files["event_path"]), read_video(files["video_path"])
    columns = {name: getattr(recording, name).cuda() for name in "xytp"}
    stacked = torch.stack(frames).cuda()

    class Foreign:                                           # as Numba's arrays, which have no DLPack
        def __init__(self, tensor):
            self.__cuda_array_interface__, self.owner = tensor.__cuda_array_interface__, tensor

    table = torch.stack([getattr(recording, name).double() for name in "txyp"], 1).cuda()
    for events, options in ((columns, {}), ({name: Foreign(of) for name, of in columns.items()}, {}),
                            (table, {"columns": "txyp", "time_unit": "us"})):
        held = events_given(events, **options).read()
        assert all(of.is_cuda and torch.equal(of.cpu(), kept) for of, kept in zip(held, recording, strict=True))
    for video in (stacked, stacked.permute(0, 3, 1, 2).contiguous(), list(stacked), Foreign(stacked)):
        held = video_given(video).read()
        assert all(of.is_cuda and torch.equal(of.cpu(), kept) for of, kept in zip(held, frames, strict=True))
    asking = dict(query=files["query"], max_new_tokens=files["max_new_tokens"])
    for mode in MODES:
        ids = e.generate(mode=mode, **files).output_ids
        assert e.generate(mode=mode, events=columns, video=stacked, **asking).output_ids == ids, mode
    on_cpu = engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False)
    ids = on_cpu.generate(mode="drafter_only", **files).output_ids
    assert on_cpu.generate(mode="drafter_only", events=columns, **asking).output_ids == ids


def test_a_closed_engine_gives_the_gpus_memory_back():
    """But for what cuBLAS keeps for each stream that it has met."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    e = load(cache_rows=200_000)
    e.generate(mode="speculative", **asked(0))
    taken = torch.cuda.memory_allocated() - before
    e.close()
    assert torch.cuda.memory_allocated() - before <= taken / 4 and taken > 5e8
    assert torch.cuda.memory_reserved() - before <= taken / 2
    with pytest.raises(engine.InputError, match="is closed"):
        e.generate(**asked(0))
