"""--drafter-dtype: a drafter on packed weights drafts a little differently; no answer depends on it."""

import dataclasses
import json
import re

import pytest
import torch

import engine
from bench import TINY, all_bytes, dtype_of
from kernels.quant import HEAD_BITS, LAYER_BITS, MAX_PACKED_ROWS, Packed, dequantise
from weights.load import InputError
from weights.packed import gains_by_turning, packing

CLIPS = TINY / "clips"
RECORDS = json.loads((CLIPS / "EventGPT_Instruction_Subset.json").read_text())[:3]


def asked(record):
    return dict(event_path=CLIPS / "event_npy" / record["event_data"], video_path=CLIPS / "mp4" / record["mp4_data"],
                query=record["conversations"][0]["value"].removeprefix("<event>\n"), max_new_tokens=40)


@pytest.fixture(scope="module")
def pair():
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False, drafter_dtype="int4")


@pytest.mark.parametrize("mode", ["prefill_then_verify", "speculative"])
def test_ids_equal_target_only(pair, mode):
    accepted = 0
    for record in RECORDS:
        result = pair.generate(mode=mode, **asked(record))
        assert result.output_ids == pair.generate(mode="target_only", **asked(record)).output_ids
        accepted += result.accepted_tokens
    if mode == "speculative":                                # a head start may find no time on a busy machine
        assert accepted > 0, "a packed drafter that is never right shows nothing"


def plain():
    return engine.load_model(engine.Drafter, TINY / "drafter", "cpu").decoder


def test_the_drafters_steps_read_packed_weights_and_nothing_else_does(pair):
    drafter, target = pair.drafter.decoder, pair.target.decoder
    for layer, full in zip(drafter.steps.layers, plain().steps.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            assert isinstance(layer[name], Packed) and layer[name].bits == LAYER_BITS
            meant = full[name] * {"qkv": full["attn_norm"], "gate_up": full["mlp_norm"]}.get(name, 1.0)
            off = (dequantise(layer[name]) - meant).norm() / meant.norm()
            assert 0 < off <= 0.2, "0.1 for normal weights at 4 bits; trained ones have longer tails"
    assert drafter.steps.packed and drafter.steps.head_VD.bits == HEAD_BITS
    assert not target.steps.packed and target.steps.layers[0]["qkv"] is target.w["text.layers.0.qkv"]
    assert target.steps.head_VD is target.head_VD


def test_no_full_weight_of_the_decoder_is_held(pair):
    held = [name for name, t in pair.drafter.decoder.w.items() if isinstance(t, torch.Tensor) and t.dim() > 1]
    assert [name for name in held if name.startswith("text.")] == ["text.embed"]


def test_a_step_is_off_by_packing_and_more_rows_by_about_as_much(pair):
    drafter, full = pair.drafter.decoder, plain()
    with torch.inference_mode():
        for rows in (1, 2, 3, MAX_PACKED_ROWS, MAX_PACKED_ROWS + 1, engine.STEP_ROWS + 1):
            hidden_SD, pos_ids_S = drafter.embed_VD[torch.arange(rows) + 5], torch.arange(rows)
            packed, exact = (d.forward(hidden_SD, pos_ids_S) for d in (drafter, full))
            off = ((packed - exact).norm() / exact.norm()).item()
            assert 0.001 < off < 0.3, f"{rows} rows: {off}"
            for ours, theirs in ((drafter.k_cache_LNMK, full.k_cache_LNMK), (drafter.v_cache_LNMK, full.v_cache_LNMK)):
                away = (ours[:, :, :rows] - theirs[:, :, :rows]).norm() / theirs[:, :, :rows].norm()
                assert away < 0.3, f"{rows} rows: {away}"


def test_a_prefill_on_4_bits_gives_the_rows_that_steps_would(pair):
    """Both read the same packed weights: their rows differ by rounding."""
    drafter, rows = pair.drafter.decoder, 40
    with torch.inference_mode():
        hidden_SD, pos_ids_S = drafter.embed_VD[torch.arange(rows) + 5], torch.arange(rows)
        whole = drafter.forward(hidden_SD, pos_ids_S)
        steps = torch.cat([drafter.forward(hidden_SD[at:at + 10], pos_ids_S[at:at + 10]) for at in range(0, rows, 10)])
    assert (whole - steps).norm() <= 1e-4 * steps.norm()


def test_the_last_row_alone_gives_the_same_logits(pair):
    """`only`, as a prefill asks, against all rows. What goes into a product of a single row is rounded to 8 bits."""
    drafter = pair.drafter.decoder
    with torch.inference_mode():
        hidden_SD, pos_ids_S = drafter.embed_VD[torch.arange(50) + 5], torch.arange(50)
        every, two, last = (drafter.forward(hidden_SD, pos_ids_S, only)
                            for only in (None, torch.tensor([48, 49]), torch.tensor([49])))
    assert torch.allclose(every[48:], two, atol=1e-3)
    assert (every[49:] - last).norm() <= 0.03 * last.norm()


def test_the_header_names_the_dtype_and_counts_the_copies(pair):
    drafter, full = pair.drafter.decoder, sum(t.nbytes for t in plain().w.values())
    assert dtype_of(drafter) == "float32 with int4 weights"
    assert 0.3 * full < all_bytes(drafter) < 0.8 * full
    assert dtype_of(pair.target.decoder) == "float32"
    assert all_bytes(pair.target.decoder) == sum(t.nbytes for t in pair.target.decoder.w.values())


@pytest.mark.parametrize("dtype", ["int3", "fp8+int4", None])
def test_an_unknown_dtype_is_an_input_error(dtype):
    with pytest.raises(InputError, match=re.escape(f"drafter_dtype: {dtype!r} is not one of bf16, int4; pick from")):
        engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", drafter_dtype=dtype)


def test_uneven_weights_are_packed_with_a_turned_stream():
    """Norms of 6 in a column of 64: every group of 128 holds two columns that stick out. A packed step is then half as
    far off as without the turn, and so is a prefill; even weights are packed as they are."""
    c = engine.DecoderConfig(D=256, L=2, H=4, N=2, K=64, F=256, V=320)

    def off(outlier, turn=None):
        torch.manual_seed(0)
        rows = {"qkv": 512, "o": 256, "gate_up": 512, "down": 256}
        full = {"text.norm": torch.ones(c.D)} | {f"text.{name}": torch.randn(c.V, c.D) for name in ("embed", "head")}
        for i in range(c.L):
            for norm in ("attn_norm", "mlp_norm"):
                full[f"text.layers.{i}.{norm}"] = torch.ones(c.D).index_fill_(0, torch.arange(5, c.D, 64), outlier)
            full |= {f"text.layers.{i}.{name}": torch.randn(O, 256) / 16 for name, O in rows.items()}
        turn = gains_by_turning(full.get, c.L) if turn is None else turn
        hidden_SD, pos_ids_S = full["text.embed"][:40], torch.arange(40)
        exact = engine.Decoder(c, full, 64).forward(hidden_SD, pos_ids_S)
        packed = engine.Decoder(dataclasses.replace(c, packed=True, turned=turn),
                                dict(packing(full.items(), turn)), 64)
        steps = packed.forward(hidden_SD[:12], pos_ids_S[:12])
        whole = packed.forward(hidden_SD, pos_ids_S)
        assert (whole[:12] - steps).norm() <= 1e-4 * steps.norm()
        return turn, ((whole - exact).norm() / exact.norm()).item()

    assert not off(1.0)[0]
    turned, here = off(6.0)
    assert turned and here < 0.6 * off(6.0, turn=False)[1]
