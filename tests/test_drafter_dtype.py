"""--drafter-dtype: a drafter on packed weights drafts a little differently; no answer depends on it."""

import json

import pytest
import torch

import engine
from bench import TINY, all_bytes, dtype_of
from kernels.quant import BITS, Packed, dequantise
from weights.load import InputError

CLIPS = TINY / "clips"
RECORDS = json.loads((CLIPS / "EventGPT_Instruction_Subset.json").read_text())[:3]


def asked(record):
    return dict(event_path=CLIPS / "event_npy" / record["event_data"], video_path=CLIPS / "mp4" / record["mp4_data"],
                query=record["conversations"][0]["value"].removeprefix("<event>\n"), max_new_tokens=40)


@pytest.fixture(scope="module", params=list(BITS))
def pair(request):
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False,
                              drafter_dtype=request.param)


@pytest.mark.parametrize("mode", ["prefill_then_verify", "speculative"])
def test_ids_equal_target_only(pair, mode):
    accepted = 0
    for record in RECORDS:
        result = pair.generate(mode=mode, **asked(record))
        assert result.output_ids == pair.generate(mode="target_only", **asked(record)).output_ids
        accepted += result.accepted_tokens
    assert accepted > 0, "a packed drafter that is never right shows nothing"


def test_the_drafters_steps_read_packed_weights_and_nothing_else_does(pair):
    drafter, target = pair.drafter.decoder, pair.target.decoder
    of_layers, of_head = BITS[drafter.packed]
    for layer, full in zip(drafter.step_layers, drafter.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            assert isinstance(layer[name], Packed) and layer[name].bits == of_layers
            meant = full[name] * {"qkv": full["attn_norm"], "gate_up": full["mlp_norm"]}.get(name, 1.0)
            off = (dequantise(layer[name]) - meant).norm() / meant.norm()
            assert 0 < off <= 0.2, "0.1 for normal weights at 4 bits; trained ones have longer tails"
    assert drafter.step_head_VD.bits == of_head
    assert target.packed is None and target.step_layers is target.layers and target.step_head_VD is target.head_VD


def test_a_step_is_off_by_packing_and_a_prefill_is_not(pair):
    drafter, full = pair.drafter.decoder, engine.load_model(engine.Drafter, TINY / "drafter", "cpu").decoder
    with torch.inference_mode():
        for rows, equal in ((1, False), (engine.STEP_ROWS, False), (engine.STEP_ROWS + 1, True)):
            hidden_SD, pos_ids_S = drafter.embed_VD[torch.arange(rows) + 5], torch.arange(rows)
            packed, exact = (d.forward(hidden_SD, pos_ids_S) for d in (drafter, full))
            assert torch.equal(packed, exact) == equal


def test_the_header_names_the_dtype_and_counts_the_copies(pair):
    full = sum(t.nbytes for t in pair.drafter.decoder.w.values())
    assert dtype_of(pair.drafter.decoder) == f"float32 with {pair.drafter.decoder.packed} steps"
    assert full < all_bytes(pair.drafter.decoder) < 1.5 * full
    assert dtype_of(pair.target.decoder) == "float32"
    assert all_bytes(pair.target.decoder) == sum(t.nbytes for t in pair.target.decoder.w.values())


def test_an_unknown_dtype_is_an_input_error():
    with pytest.raises(InputError, match="drafter_dtype: 'int3' is not one of bf16, int8, int4"):
        engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", drafter_dtype="int3")
