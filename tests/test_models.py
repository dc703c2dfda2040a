"""Both models against numbers recorded from the original code, stage by stage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import Decoder, DecoderConfig, Drafter, Prompt, Target
from kernels.rmsnorm import rmsnorm_ref
from kernels.rope_store import rope_store_ref
from kernels.round import State
from kernels.swiglu import swiglu_ref
from weights.load import open_checkpoint
from weights.text import Text

SHARED = Path(__file__).resolve().parents[2] / "shared"
LLAVA, EVENTS = SHARED / "fixtures" / "video_llava_tiny", SHARED / "fixtures" / "eventgpt_tiny"
LLAVA = LLAVA if LLAVA.exists() else Path(__file__).parent / "golden" / "video_llava_tiny"
needs_events = pytest.mark.skipif(not EVENTS.exists(), reason=f"{EVENTS} is not here: no recorded numbers to compare")
CPU = torch.device("cpu")


def model(cls, folder, dtype=torch.float32, cache_rows=128):
    if not folder.exists():
        pytest.skip(f"{folder} is not here: no recorded numbers to compare")
    checkpoint = open_checkpoint(folder)
    with torch.inference_mode():
        return cls(checkpoint.config, checkpoint.load(CPU, dtype), None, str(folder), (), cache_rows)


def split(ids, placeholder):
    """A Prompt from recorded ids with one run of placeholders."""
    ids = ids.flatten().tolist()
    at = ids.index(placeholder)
    return Prompt(ids[:at], ids[at + ids.count(placeholder):])


@torch.inference_mode()
def greedy(m, hidden_SD, count, stops=()):
    m.prefill(hidden_SD, count, stops, 0)
    for _ in range(count - 1):
        m.round()
    return State(m.state_W.tolist()).ids


def close(ours, theirs, tolerance):
    """Within `tolerance` of the largest value, or of 1 where all are smaller: fp32 rounds relative to magnitude."""
    error, scale = (ours.float() - theirs.float()).abs().max().item(), max(1.0, theirs.float().abs().max().item())
    assert ours.shape == theirs.shape and error <= tolerance * scale, f"off by {error:.2e} at a scale of {scale:.1f}"


def close_logits(ours, theirs, atol):
    error = (ours.float() - theirs.float()).abs().max().item()
    assert ours.shape == theirs.shape and error <= atol, f"off by {error:.2e}"


@pytest.mark.parametrize("folder,expected", [("mha", "mha"), ("gqa", "gqa"), ("mha_hubnames", "mha")])
@torch.inference_mode()
def test_video_llava_equals_transformers(folder, expected):
    m = model(Target, LLAVA / folder)
    want = load_file(LLAVA / f"expected_{expected}.safetensors")
    given = load_file(LLAVA / "inputs.safetensors")
    pixels, prompt = given["pixel_values_videos"][0], split(given["input_ids"], 381)
    for layers in range(3):                                  # the model reads state 2 of 0..3
        close(m.video_tower(pixels, layers), want[f"video_tower_hidden_{layers}"], 1e-5)
    visual_AD = m.encode(pixels)
    close(visual_AD, want["video_features"].flatten(0, 1), 1e-5)
    hidden_SD = m.splice(prompt, visual_AD)
    close(hidden_SD, want["inputs_embeds"][0], 1e-5)
    close_logits(m.decoder.forward(hidden_SD, torch.arange(len(hidden_SD))), want["prefill_logits"][0], 1e-4)
    assert greedy(m, hidden_SD, 32) == want["greedy_tokens"][0].tolist()
    logits = []
    m.prefill(hidden_SD, 32, (), 0)
    for _ in range(31):
        logits.append(m.round_graph(0)().clone())
    close_logits(torch.cat(logits), want["step_logits"][0, 1:], 1e-4)


@pytest.mark.parametrize("folder", ["mha", "gqa"])
@torch.inference_mode()
def test_video_llava_image_path_and_text_only_equal_transformers(folder):
    m = model(Target, LLAVA / folder)
    want = load_file(LLAVA / f"expected_{folder}.safetensors")
    given = load_file(LLAVA / "inputs.safetensors")
    visual_AD = m.encode(given["pixel_values_images"], image=True)
    close(visual_AD, want["image_features"].flatten(0, 1), 1e-5)
    hidden_SD = m.splice(split(given["image_input_ids"], 380), visual_AD)
    close(hidden_SD, want["image_inputs_embeds"][0], 1e-5)
    assert greedy(m, hidden_SD, 16) == want["image_greedy_tokens"][0].tolist()
    text_SD = m.decoder.embed_VD[given["text_input_ids"][0]]
    assert greedy(m, text_SD, 16) == want["text_greedy_tokens"][0].tolist()


@pytest.mark.parametrize("folder", ["mha", "gqa"])
@torch.inference_mode()
def test_video_llava_in_bf16_stays_within_the_recorded_distance(folder):
    """Eager and SDPA transformers differ by 0.27 here, bf16 and fp32 by 0.47: 0.5 tells a wrong model apart."""
    m = model(Target, LLAVA / folder, torch.bfloat16)
    want = load_file(LLAVA / f"bf16_{folder}.safetensors")
    given = load_file(LLAVA / "inputs.safetensors")
    hidden_SD = m.splice(split(given["input_ids"], 381), m.encode(given["pixel_values_videos"][0]))
    close(hidden_SD, want["sdpa_inputs_embeds"].reshape(hidden_SD.shape), 0.1)
    logits = m.decoder.forward(hidden_SD, torch.arange(len(hidden_SD)))
    close_logits(logits, want["sdpa_prefill_logits"].reshape(logits.shape), 0.5)


# ---- single operations, bit for bit in bf16, as upstream rounds them


def ops():
    return load_file(LLAVA / "ops.safetensors")


def test_rmsnorm_rounds_before_the_weight():
    o = ops()
    assert torch.equal(rmsnorm_ref(o["rms_x"], o["rms_w"], 1e-5), o["rms_y"])
    fused = (torch.nn.functional.rms_norm(o["rms_x"].float(), (64,), o["rms_w"].float(), 1e-5)).bfloat16()
    assert not torch.equal(fused, o["rms_y"])                # the order shows: one rounding is not two


def test_activations_round_after_each_step():
    o = ops()
    assert torch.equal(swiglu_ref(torch.cat([o["act_x"], o["swiglu_up"]], -1)), o["swiglu_y"])
    assert torch.equal(o["act_x"] * torch.sigmoid(1.702 * o["act_x"]), o["quick_gelu_y"])
    assert torch.equal(torch.nn.functional.gelu(o["act_x"]), o["gelu_y"])


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_rotary_rounds_each_product_and_angles_stay_fp32(kind):
    o, dtype = ops(), torch.bfloat16 if kind == "bf16" else torch.float32
    positions, M = o["rope_positions"][0], int(o["rope_positions"].max()) + 1
    config = DecoderConfig(D=256, L=1, H=2, N=2, K=128, F=8, V=4)
    weights = {"text.embed": torch.zeros(4, 256, dtype=dtype), **{f"text.layers.0.{name}": None for name in (
        "attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down")}}
    decoder = Decoder(config, weights, M)
    q_SHK = o[f"rope_q_{kind}"][0].transpose(0, 1)
    k_SNK = o["rope_k_bf16"][0].transpose(0, 1).to(dtype)
    qkv_SE = torch.cat([q_SHK.flatten(1), k_SNK.flatten(1), torch.zeros(len(positions), 256, dtype=dtype)], 1)
    cache = torch.zeros(2, M, 128, dtype=dtype), torch.zeros(2, M, 128, dtype=dtype)
    turned_SHK = rope_store_ref(qkv_SE, positions, decoder.cos_MK, decoder.sin_MK, *cache)
    want = o[f"rope_q_out_{kind}"][0].transpose(0, 1)
    if kind == "bf16":
        assert torch.equal(turned_SHK, want)
        assert torch.equal(cache[0][:, positions], o["rope_k_out_bf16"][0])
    else:
        assert (turned_SHK - want).abs().max() <= 1e-5       # cos of fp32 angles differs in the last place by library


@needs_events
@pytest.mark.parametrize("case,count", [("case_a", 16), ("case_b", 16)])
@torch.inference_mode()
def test_eventgpt_equals_the_original(case, count):
    m, want = model(Drafter, EVENTS / "checkpoint"), load_file(EVENTS / "expected_fp32.safetensors")
    given, meta = load_file(EVENTS / "inputs.safetensors"), json.loads((EVENTS / "meta.json").read_text())
    pixels = given[f"{case}.pixel_values"]
    close(m.tower(pixels, 0), want[f"{case}.clip_pre_layrnorm_out"].reshape(len(pixels), 17, 32), 1e-5)
    for layers in (1, 2, 3):
        close(m.tower(pixels, layers), want[f"{case}.clip_hidden_{layers}"].reshape(len(pixels), 17, 32), 1e-4)
    visual_AD = m.encode(pixels)
    close(visual_AD, want[f"{case}.event_features"].reshape(visual_AD.shape), 1e-4)
    prompt = split(given[f"{case}.input_ids"], -200)
    hidden_SD = m.splice(prompt, visual_AD)
    assert len(hidden_SD) == meta[case]["prefill_length"]
    close(hidden_SD, want[f"{case}.merged_embeds"][0], 1e-4)
    close_logits(m.decoder.forward(hidden_SD, torch.arange(len(hidden_SD))), want[f"{case}.prefill_logits"][0], 1e-4)
    rows = len(hidden_SD)
    close(m.decoder.k_cache_LNMK[0, :, :rows], want[f"{case}.kcache_layer0"][0], 1e-4)
    close(m.decoder.k_cache_LNMK[2, :, :rows], want[f"{case}.kcache_layer2"][0], 1e-4)
    close(m.decoder.v_cache_LNMK[0, :, :rows], want[f"{case}.vcache_layer0"][0], 1e-4)
    assert greedy(m, hidden_SD, count) == meta[case]["generated_without_bos"]
    m.prefill(hidden_SD, count, (), 0)
    logits = torch.cat([m.round_graph(0)().clone() for _ in range(count - 1)])
    close_logits(logits, want[f"{case}.step_logits"][1:], 1e-4)


@needs_events
@torch.inference_mode()
def test_eventgpt_stops_at_its_end_of_sequence_and_keeps_it():
    m, meta = model(Drafter, EVENTS / "checkpoint"), json.loads((EVENTS / "meta.json").read_text())
    given = load_file(EVENTS / "inputs.safetensors")
    hidden_SD = m.splice(split(given["case_a.input_ids"], -200), m.encode(given["case_a.pixel_values"]))
    assert greedy(m, hidden_SD, 16, (meta["case_e"]["eos_token_id"],)) == meta["case_e"]["generated_without_bos"]


@needs_events
@torch.inference_mode()
def test_eventgpt_in_bf16_gives_the_originals_ids():
    m, want = model(Drafter, EVENTS / "checkpoint", torch.bfloat16), load_file(EVENTS / "expected_bf16.safetensors")
    given = load_file(EVENTS / "inputs.safetensors")
    hidden_SD = m.splice(split(given["case_a.input_ids"], -200), m.encode(given["case_a.pixel_values"]))
    close(hidden_SD, want["case_a.merged_embeds"][0], 0.1)
    logits = m.decoder.forward(hidden_SD, torch.arange(len(hidden_SD)))
    close_logits(logits[-1], want["case_a.step_logits"][0], 0.5)


@needs_events
@torch.inference_mode()
def test_pooling_first_equals_the_literal_order():
    m, given = model(Drafter, EVENTS / "checkpoint"), load_file(EVENTS / "inputs.safetensors")
    w0, b0, w1, b1 = m.projector
    linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
    rows_RSD = linear(linear(gelu(linear(m.tower(given["case_a.pixel_values"], 3), w0, b0)), w1, b1), *m.adaptor)
    literal = torch.cat([rows_RSD.mean(1), rows_RSD.mean(0)])
    close(m.encode(given["case_a.pixel_values"]), literal, 2e-5)


@needs_events
@torch.inference_mode()
def test_reversing_event_frames_permutes_temporal_rows_and_keeps_spatial_ones():
    m, given = model(Drafter, EVENTS / "checkpoint"), load_file(EVENTS / "inputs.safetensors")
    pixels = given["case_a.pixel_values"]
    forward, backward = m.encode(pixels), m.encode(pixels.flip(0))
    close(forward[:5], backward[:5].flip(0), 1e-4)
    close(forward[5:], backward[5:], 1e-4)
    assert (forward[:5] - backward[:5]).abs().max() > 1e-2


# ---- prompts


TOKENIZER = SHARED / "data" / "tokenizer"
needs_llama = pytest.mark.skipif(not TOKENIZER.exists(), reason=f"{TOKENIZER} is not here: no recorded ids to compare")


class Only:
    """Just enough of a model to build prompts with."""
    def __init__(self, text, marker_ids=None):
        self.text, self.marker_ids = text, marker_ids
        self.config = type("C", (), {"bos_id": 1})


@needs_llama
def test_target_prompt_equals_transformers():
    prompt = Target.prompt(Only(Text(TOKENIZER / "tokenizer.json")), "Why is this video funny?")
    assert prompt.before == [1, 3148, 1001, 29901, 29871]
    assert prompt.after == [13, 11008, 338, 445, 4863, 2090, 1460, 29973, 319, 1799, 9047, 13566, 29901]
    assert prompt.rows(2056) == 2074


@needs_llama
@pytest.mark.parametrize("markers", [None, (32000, 32001)], ids=["plain", "special"])
def test_drafter_prompt_equals_the_original(markers):
    cases = json.loads((EVENTS / "prompt_tokens.json").read_text())["cases"]
    only = Only(Text(TOKENIZER / "tokenizer.json"), markers)
    for case in cases:
        prompt, want = Drafter.prompt(only, case["query"]), case["special" if markers else "plain"]
        assert prompt.before + [-200] + prompt.after == want, case["query"]
        if not markers:
            assert prompt.rows(582) == case["prefill_length_5_frames"]
