"""What only a GPU can show: graphs equal eager, no waiting inside a round, bf16 answers equal in every mode."""

import gc
import json
import time
from pathlib import Path

import pytest
import torch

import bench
import engine
from engine import MODES, STATE, Fixed
from kernels.check import differing

TINY = Path(engine.__file__).resolve().parent / "weights" / "tiny"
CLIPS = TINY / "clips"
pytestmark = pytest.mark.gpu


def load(dtype=torch.bfloat16, graphs=True, **options):
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cuda", dtype=dtype, graphs=graphs, gate=False,
                              **options)


def asked(i, **options):
    record = json.loads((CLIPS / "EventGPT_Instruction_Subset.json").read_text())[i]
    return {"event_path": CLIPS / "event_npy" / record["event_data"], "video_path": CLIPS / "mp4" / record["mp4_data"],
            "query": "What are the key elements in this scene?", "max_new_tokens": 40, **options}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_graph_equals_eager(dtype):
    graph, eager = load(dtype), load(dtype, graphs=False)
    for mode in MODES:
        a, b = (e.generate(mode=mode, **asked(0)) for e in (graph, eager))
        assert a.output_ids == b.output_ids, mode
    with torch.inference_mode():
        for G in (0, 5, 15):
            for e in (graph, eager):
                e.target.prepare(G)
                e.target.draft_ids[G].fill_(7)               # what the last request left there depends on timing
                e.target.prefill(torch.ones(40, e.target.config.D, dtype=dtype, device="cuda"), 20, -1, 3)
                e.target.step(G)
            torch.cuda.synchronize()
            assert torch.equal(graph.target.steps[G].out, eager.target.steps[G].out)
            assert torch.equal(graph.target.state_W, eager.target.state_W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sampled_graph_equals_eager_and_serves_every_value(dtype):
    graph, eager = load(dtype), load(dtype, graphs=False)
    answers, held = set(), []
    for sampling in (dict(), dict(temperature=4.0, seed=1), dict(temperature=3.0, top_p=0.9, seed=2 ** 40)):
        for mode in MODES:
            a, b = (e.generate(mode=mode, **sampling, **asked(0)) for e in (graph, eager))
            assert a.output_ids == b.output_ids and a.drafter_error is None, mode
        answers.add(tuple(a.output_ids))
        held.append(set(graph.target.steps))
    assert len(answers) == 3 and held[0] < held[1] == held[2]            # other values, the same graphs
    with torch.inference_mode():
        for G in (0, 15):
            for e in (graph, eager):
                e.target.sampling = (3.0, 0.9, 5)
                e.target.prepare(G)
                e.target.prepare_prefill(40)
                e.target.draft_ids[G].fill_(7)
                e.target.prefill(torch.ones(40, e.target.config.D, dtype=dtype, device="cuda"), 20, -1, 3)
                e.target.step(G)
            torch.cuda.synchronize()
            a, b = (e.target.steps["sampled", G].out for e in (graph, eager))
            assert a.dtype == torch.float32 and differing(a, b) == 0
            assert torch.equal(graph.target.state_W, eager.target.state_W)


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
        target = engine.load_engine(None, "random-7b", device="cuda", cache_rows=512, graphs=graphs).target
        with torch.inference_mode(), target.on_stream():
            hidden_SD = target.decoder.embed_VD[:200].clone()
            for G in (0, 15):
                target.prepare(G)
                target.draft_ids[G].fill_(7)
                target.prefill(hidden_SD, 40, -1, 3)
                for _ in range(4):
                    target.step(G)
                states.append((target.state_W[:STATE + 40].tolist(), target.steps[G].out.clone()))
        del target
        torch.cuda.empty_cache()
    for (graph, logits), (eager, again) in zip(states[:2], states[2:], strict=True):
        assert graph == eager and torch.equal(logits, again)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("weights", ["embedded", "random-7b"])
def test_rounds_never_wait_for_the_gpu(weights, temperature):
    e = load() if weights == "embedded" else engine.load_engine("random-7b", "random-7b", device="cuda", cache_rows=512)
    e.target.sampling = (temperature, 0.9, 1) if temperature else None
    with torch.inference_mode():
        for model in e.models:
            model.prepare(0, 5)
            model.prefill(model.decoder.embed_VD[:200].clone(), 100, -1, 3)
        for G in (0, 5):                                     # captures, warms up
            e.target.step(G)
        e.drafter.follow(e.target.state_W, 5)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                e.target.step(0)
                drafts_G = e.drafter.follow(e.target.state_W, 5)
                e.target.draft_ids[5].copy_(drafts_G)
                e.target.step(5)
                e.target.snapshot(64)
            with pytest.raises(RuntimeError, match="synchroniz"):
                e.target.state_W[0].item()                   # the guard itself is on
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert e.target.state_W[0].item() >= 11              # ids were made: 3 before the loop, 2 in each turn


@pytest.mark.parametrize("drafter_device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("drafter_dtype", ["bf16", "int4"])
def test_a_drafter_on_a_gpu_of_its_own_gives_the_targets_ids(drafter_dtype, drafter_device):
    """cuda:0: the same code, both models on one GPU. Second guesses count as likely, so that branches are drafted."""
    if torch.cuda.device_count() <= int(drafter_device[-1]):
        pytest.skip("needs two GPUs")
    e = load(drafter_device=drafter_device, drafter_dtype=drafter_dtype, recall_len=0)     # else answers are recalled
    e.apart, step, step_recalled, notes = True, e.target.step, e.target.step_recalled, []
    e.target.step = lambda G=0: (time.sleep(0.01), step(G))  # a target this small is done before a drafter begins
    e.target.step_recalled = lambda G: (time.sleep(0.01), step_recalled(G))
    for i in range(4):
        ids = e.generate(mode="target_only", ignore_eos=True, **asked(i)).output_ids
        for mode in ("prefill_only", "prefill_then_verify", "speculative"):
            e.shares = [0.4, 0.3, 0.2, 0.1]
            result = e.generate(mode=mode, ignore_eos=True, **asked(i))
            assert result.output_ids == ids and result.drafter_error is None, mode
        assert result.drafts and result.stages["drafter"]["draft"] > 0
        notes += [note for *_, note in result.timeline]
    assert notes.count("resume") > 10 and notes.count("ahead") > 10


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
    text = engine.TARGET_7B["text_config"]
    monkeypatch.setattr(engine, "TARGET_7B", {**engine.TARGET_7B, "text_config": {**text, "num_hidden_layers": MID}})
    monkeypatch.setattr(engine, "DRAFTER_7B", {**engine.DRAFTER_7B, "num_hidden_layers": MID})
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
    longer = {**asked(0), "query": "why " * 60}              # a prompt that has no graph yet
    with pytest.raises(engine.InputError) as error:
        e.generate(mode="speculative", ignore_eos=True, **longer)
    assert "ran out in the target's preparation" in str(error.value) and "--cache-rows" in str(error.value)
    assert "\n" not in str(error.value)
    del taken                                                # a request without new graphs needs some memory as well
    forget()
    assert e.generate(mode="speculative", ignore_eos=True, **asked(0)).output_ids == ids
    assert len(e.generate(mode="speculative", ignore_eos=True, **longer).output_ids) == 40


@pytest.mark.parametrize("packed", ["bf16", "int4", "fp8+int4"])
def test_a_drafter_recalls_its_text_in_fewer_forwards(packed):
    """What it writes of a clip, first one id after the other, then with that text in mind. After a prompt of noise the
    two part: near-ties, which rows that are added up in another order break the other way."""
    e = load(drafter_dtype=packed)
    drafter, texts, forwards = e.drafter, [], []
    alone = e.generate(mode="drafter_only", **asked(0)).output_ids
    drafter.forget()
    rows = drafter.prompt_rows
    with torch.inference_mode(), drafter.on_stream():
        hidden_SD = drafter.hidden_MD[:rows].clone()         # the prompt of that request
        drafter.recalls = True
        drafter.prepare(0)
        drafter.prepare(drafter.recall_len, recalled=True)
        for G in (0, drafter.recall_len):
            drafter.prepare_prefill(rows, G)
        for _ in range(2):
            drafter.prefill(hidden_SD, 40, drafter.config.eos_id, drafter.prompt("").after[-1])
            state, count = drafter.snapshot(STATE + 60).read(), 0
            while not state[1]:
                G = drafter.next_len()
                drafter.step_recalled(G) if G else drafter.step(0)
                state, count = drafter.snapshot(STATE + 60).read(), count + 1
            texts.append(state[STATE:STATE + state[0]])
            forwards.append(count)
            drafter.remember(texts[0])
    assert texts == [alone, alone] and forwards[0] == len(alone) - 1 > 10 and forwards[1] <= 2
    truth = e.generate(mode="target_only", **asked(0)).output_ids
    for mode in ("prefill_only", "prefill_then_verify", "speculative") * 2:
        result = e.generate(mode=mode, **asked(0))
        assert result.output_ids == truth and result.drafter_error is None


@pytest.mark.parametrize("draft_len", [7, 15, 31])
def test_a_target_that_recalls_its_answers_says_the_same(draft_len):
    e, source = load(), engine.Recalled()
    for i in (0, 1, 0, 1):
        for options in (dict(), dict(temperature=3.0, seed=2)):
            given = asked(i, ignore_eos=True, **options)
            truth = e.generate(mode="target_only", **given).output_ids
            result = e.generate(mode="speculative", draft_source=source, draft_len=draft_len, **given)
            assert result.output_ids == truth
    assert result.accepted_tokens > 20
