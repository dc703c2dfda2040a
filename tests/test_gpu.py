"""What only a GPU can show: graphs equal eager, no waiting inside a round, bf16 answers equal in every mode."""

import json
from pathlib import Path

import pytest
import torch

import engine
from engine import MODES, STATE, Fixed

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


@pytest.mark.parametrize("weights", ["embedded", "random-7b"])
def test_rounds_never_wait_for_the_gpu(weights):
    e = load() if weights == "embedded" else engine.load_engine("random-7b", "random-7b", device="cuda", cache_rows=512)
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


@pytest.mark.parametrize("drafter_dtype", ["bf16", "int4"])
def test_a_drafter_on_a_gpu_of_its_own_gives_the_targets_ids(drafter_dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    e = load(drafter_device="cuda:1", drafter_dtype=drafter_dtype)
    for i in range(4):
        ids = e.generate(mode="target_only", ignore_eos=True, **asked(i)).output_ids
        for mode in ("prefill_only", "prefill_then_verify", "speculative"):
            result = e.generate(mode=mode, ignore_eos=True, **asked(i))
            assert result.output_ids == ids and result.drafter_error is None, mode
        assert result.ahead and result.stages["drafter"]["draft"] > 0


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
