"""Memory: the budget is arithmetic, and here is what is really allocated. On a CPU every tensor that torch makes is
counted; in place of kernels stands what their launchers allocate. tests/test_gpu.py asks the GPU's allocator."""

import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from common import asked, script
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import engine
import weights.memory
from engine import Drafter, InputError, Target
from kernels import quant
from weights.asking import Asked
from weights.load import DRAFTER_7B, TARGET_7B, random_tensors
from weights.packed import packing
from weights.timeline import OutOfMemory

TEXT = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024, "vocab_size": 2048}
CLIP = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4,
        "patch_size": 14}
CONFIGS = {
    "target": (Target, {"model_type": "video_llava", "text_config": TEXT, "video_seq_length": 8 * 65,
                        "vision_config": {**CLIP, "image_size": 112}}),
    "target, wide tower": (Target, {"model_type": "video_llava", "text_config": {**TEXT, "intermediate_size": 512},
                                    "vision_config": {**CLIP, "hidden_size": 768, "intermediate_size": 3072,
                                                      "image_size": 112}, "video_seq_length": 8 * 65}),
    "target, shared keys": (Target, {"model_type": "video_llava", "text_config": {**TEXT, "num_key_value_heads": 2},
                                     "vision_config": {**CLIP, "image_size": 112}, "video_seq_length": 8 * 65}),
    "drafter": (Drafter, {**TEXT, "model_type": "EventChat_llama", "mm_visual_tower": "openai/clip",
                          "event_feature_adaptor": True, "mm_use_im_patch_token": False,
                          "vision_config": {**CLIP, "image_size": 168}}),
}


class Allocations(TorchDispatchMode):
    """Bytes of all storages that live, and the most that ever did, of what is made while the mode is on."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: of for key, of in self.live.items() if not of[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return out


def launchers(monkeypatch):
    """In place of the kernels of encode and prefill, what their launchers allocate: results, and nothing else. Zeros:
    products of what memory happens to hold may be slow."""
    def made(*shape, like):
        return torch.zeros(shape, dtype=like.dtype)

    def rope_store(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_NMK, v_NMK):
        return made(len(qkv_SE), qkv_SE.shape[1] // k_NMK.shape[2] - 2 * len(k_NMK), k_NMK.shape[2], like=qkv_SE)
    monkeypatch.setattr(engine, "rope_store", rope_store)
    monkeypatch.setattr(engine, "attention", lambda q, k, v, at: torch.zeros_like(q))
    monkeypatch.setattr(engine, "rmsnorm", lambda x, w, eps: torch.zeros_like(x))
    monkeypatch.setattr(engine, "add_rmsnorm", lambda x, residual, w, eps: (torch.zeros_like(x), torch.zeros_like(x)))
    monkeypatch.setattr(engine, "layernorm", lambda x, w, b, eps: torch.zeros_like(x))
    monkeypatch.setattr(engine, "add_layernorm", lambda x, residual, w, b, eps: (torch.zeros_like(x),
                                                                                 torch.zeros_like(x)))
    monkeypatch.setattr(engine, "quick_gelu", torch.zeros_like)
    monkeypatch.setattr(engine, "swiglu", lambda x: made(len(x), x.shape[1] // 2, like=x))
    plain = engine.product

    def skinny(x, w, *args, gated=False, **options):
        if isinstance(w, quant.Packed):
            return made(len(x), w.shape[0] // (2 if gated else 1), like=x)
        return plain(x, w, *args, gated=gated, **options)
    monkeypatch.setattr(engine, "product", skinny)
    monkeypatch.setattr(engine, "unpack", lambda w, dtype, room: room[:w.shape.numel()].view(w.shape))


def one_request(model, frames, text):
    """All that a request runs, one after the other in this thread, on the longest prompt that the budget foresees."""
    with torch.inference_mode():
        pixels = torch.zeros(frames, 3, model.vision.image, model.vision.image)
        visual_AD = model.visual_rows(pixels)
        text = min(text, model.decoder.cache_rows - len(visual_AD))
        prompt = engine.Prompt([5] * 32, [5] * (text - 32))
        model.prefill(model.splice(prompt, visual_AD), 8, (), 5)
        for G in (0, 5, 15):
            model.put([3] * G)
            model.round(G)
        if model.copy:
            for first in (True, False):
                model.draft(first)


@pytest.mark.parametrize("kernels,name,packed", [
    *((kernels, *of) for kernels in ("as on a CPU", "as on a GPU")
      for of in (*((name, False) for name in CONFIGS), ("drafter", True))), ("as on a CPU", "target", True)])
def test_the_budget_is_within_5_percent_of_what_is_allocated(name, packed, kernels, monkeypatch):
    cls, config = CONFIGS[name]
    monkeypatch.setattr(weights.memory, "TARGET_7B" if cls is Target else "DRAFTER_7B", config)
    device, dtype = torch.device("cpu"), torch.float32
    needs = weights.memory.needs_of(cls.side, config, device, dtype, None, packed)
    if kernels == "as on a GPU":
        launchers(monkeypatch)
        needs = weights.memory.needs_of(cls.side, config, torch.device("cuda"), dtype, None, packed)
        needs["scratch"] -= (3 << 25) + (2 << 26)            # a library's and the resized pictures, which are not here
    with Allocations() as counted:
        model = engine.load_model(cls, "random-7b", device, dtype, packed=packed)
        if packed and kernels == "as on a GPU":
            model.decoder.room = torch.empty(model.config.largest)
        one_request(model, 8 if cls is Target else 5, 64 if kernels == "as on a CPU" else 512)
    d, steps = model.decoder, model.copy or model.decoder.steps
    assert needs["weights"] == sum(t.nbytes for t in d.w.values() if isinstance(t, torch.Tensor))
    if packed:
        copies = [t for layer in steps.layers for t in layer.values() if hasattr(t, "bits")] + [steps.head_VD]
        assert needs["packed"] == sum(t.nbytes for t in copies)
    assert counted.peak == pytest.approx(sum(needs.values()), rel=0.05), needs


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("rows", [320, 300])                 # turned are 64 rows with each other, or 4
def test_packing_by_and_by_gives_the_same_bits(rows, turn, monkeypatch):
    w_OD = torch.randint(-64, 65, (rows, 256)).float()       # a turn of whole numbers is exact
    whole = quant.quantise(w_OD, 4, turn=turn)
    monkeypatch.setattr(quant, "PACK_ROWS", 128)
    parts = quant.quantise(w_OD, 4, turn=turn)
    assert torch.equal(whole.words, parts.words) and torch.equal(whole.scales, parts.scales)


def test_while_packing_no_more_than_a_layer_is_held_beside_what_stays(monkeypatch):
    """Rows are packed 64 at a time here; at 7B sizes PACK_ROWS bounds it in the same way."""
    monkeypatch.setattr(quant, "PACK_ROWS", 64)
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 256}
    layer = 4 * (4 * 256 * 256 + 3 * 256 * 256)
    with Allocations() as counted:
        made = dict(packing(random_tensors(config, torch.device("cpu"), torch.float32, 0), False))
        held = sum(nbytes for of, nbytes in counted.live.values() if not of.expired())
    assert len(made) > 12 and counted.peak <= held + layer, f"{counted.peak - held} of {layer}"


# ---- what does not fit


SMI = """#!/bin/sh
case "$*" in
    *compute-apps*) printf '4711, python, 61440 MiB\n4712, /opt/render, 2048 MiB\n' ;;
esac
"""


def test_the_refusal_says_who_holds_the_memory_of_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(weights.memory, "free_bytes", lambda device: (6 * 10 ** 9, 80 * 10 ** 9))
    with pytest.raises(InputError) as error:
        raise weights.memory.no_room("DIR", torch.device("cuda:0"), {"weights": 13 * 10 ** 9, "cache": 2 * 10 ** 9})
    assert str(error.value) == (
        "DIR: needs 15.000 GB (weights 13.000, cache 2.000), cuda:0 has 6.000 of 80.000 GB free, most is held by "
        "python (pid 4711, 64.4 GB), /opt/render (pid 4712, 2.1 GB); lower `cache_rows`, free memory, or choose "
        "another `device`")


def test_the_refusal_says_who_holds_the_memory_of_the_host():
    named = weights.memory.holders(torch.device("cpu"))
    assert 1 <= len(named) <= 3 and all(re.fullmatch(r".+ \(pid \d+, \d+\.\d GB\)", name) for name in named)


def test_without_nvidia_smi_the_refusal_names_nobody(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert weights.memory.holders(torch.device("cuda:0")) == []


# ---- what fits


@pytest.fixture
def cards(monkeypatch):
    """cards(GB, ...): as many GPUs, all free."""
    def put_in(*gigabytes):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gigabytes))
        monkeypatch.setattr(weights.memory, "pick_device", lambda name, *_: torch.device(name or "cuda:0"))
        monkeypatch.setattr(weights.memory, "free_bytes", lambda at: (int(gigabytes[at.index] * 1e9),) * 2)
        monkeypatch.setattr(weights.memory, "holders", lambda device: [])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (8, 0))
    return put_in


def refused(*args, **options) -> str:
    with pytest.raises(InputError) as error:
        engine.memory_budget(*args, **options)
    assert "\n" not in str(error.value) and "GiB" not in str(error.value)
    return str(error.value)


PAIR = ("random-7b", "random-7b")
LOOKUP = "`--videollava random-7b --modes target_only,speculative --draft-source lookup`"
SELF = LOOKUP[:-1] + ",self`"
INT4 = "`--eventgpt random-7b --videollava random-7b --drafter-dtype int4`"
TWO = "`--eventgpt random-7b --videollava random-7b --drafter-device cuda:1`"


@pytest.mark.parametrize("gigabytes,fits", [
    ([24], [LOOKUP, SELF, INT4]), ([18], [LOOKUP]), ([21], [LOOKUP, SELF]), ([24, 24], [LOOKUP, SELF, INT4, TWO]),
    ([24, 8], [LOOKUP, SELF, INT4])], ids=str)
def test_a_pair_that_does_not_fit_is_told_what_does_cheapest_first(gigabytes, fits, cards):
    cards(*gigabytes)
    line = refused(*PAIR, text_rows=210)
    told = re.findall(r"(\d+\.\d) GB (`--[^`]*`)", line)
    assert [flags for _, flags in told] == fits
    for needed, flags in told:                               # each is a command that fits, and the figure its sum
        given = bench.parse(flags.strip("`").split())
        budget = engine.memory_budget(
            given.eventgpt, given.videollava, None, given.drafter_device, cache_rows=given.cache_rows,
            drafter_dtype=given.drafter_dtype, self_draft="self" in (given.draft_source or ""), text_rows=210)
        assert f"{weights.memory.bytes_of(budget) / 1e9:.1f}" == needed
        assert set(given.modes.split(",")) <= {"target_only", "speculative"} or given.eventgpt


@pytest.mark.parametrize("gigabytes", [16, 12])
def test_a_card_below_the_target_is_told_so_and_what_is_left(gigabytes, cards):
    cards(gigabytes)
    line = refused(*PAIR, text_rows=210)
    assert "the bfloat16 target needs 14.7 GB for its weights, 16.5 in all, and is never packed: take 5.4 GB" in line
    assert "--modes drafter_only --drafter-dtype int4`" in line and "another `device`, cpu" in line
    assert "--draft-source" not in line, "nothing with the target fits"
    assert "drafter_only" not in refused(None, "random-7b"), "no drafter was named"
    assert engine.memory_budget("random-7b", None, drafter_dtype="int4", text_rows=210)


def test_what_a_process_may_not_take_is_not_free(monkeypatch):
    """A card of 80 GB, 70 free; torch holds 4, of which 1 is in use, and may hold 24."""
    for name, value in (("mem_get_info", (70, 80)), ("memory_reserved", 4), ("memory_allocated", 1),
                        ("get_per_process_memory_fraction", 0.3)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert weights.memory.free_bytes(torch.device("cuda:0")) == (23, 24)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert weights.memory.free_bytes(torch.device("cuda:0")) == (73, 80)


@pytest.mark.parametrize("rows,sides", [(None, (2304, 832)), (4000, (4000, 4000)), ((2560, 700), (2560, 700))], ids=str)
def test_caches_are_sized_to_a_clip_its_text_and_the_answer_or_as_told(rows, sides, cards):
    """2,056 rows of pictures, or 582; 160 of template and question, 50 new ids, 34 for drafts."""
    cards(99)
    budget = engine.memory_budget(*PAIR, cache_rows=rows, text_rows=210)
    assert tuple(budget[side]["rows"] for side in ("target", "drafter")) == sides
    assert "no_copy" not in budget["target"]
    for side, config, packed in (("target", TARGET_7B, True), ("drafter", DRAFTER_7B, False)):
        needs = weights.memory.needs_of(side, config, torch.device("cuda"), torch.bfloat16, budget[side]["rows"],
                                        packed)
        assert {part: budget[side][part] for part in needs} == needs


def test_a_copy_is_left_out_where_it_does_not_fit_and_it_is_said_how_much_is_missing(cards):
    cards(18)
    target = engine.memory_budget(None, "random-7b", text_rows=210)["target"]
    needs = weights.memory.needs_of("target", TARGET_7B, torch.device("cuda"), torch.bfloat16, target["rows"], True)
    assert "packed" not in target and needs["packed"] == pytest.approx(3.6e9, rel=0.05)
    assert target["no_copy"] == (f"{sum(needs.values()) / 1e9 - 18:.1f} GB of the {needs['packed'] / 1e9:.1f} that it "
                                 f"takes are missing on cuda:0")


def test_a_request_of_the_size_that_caches_were_made_for_fits(pair, monkeypatch):
    """As `rows_for` counts it: any question of 100 ids, any answer of so many, here a whole number of 64 rows."""
    longer = {"max_position_embeddings": 4096}
    for model, visual in ((pair.target, 8 * (pair.target.vision.P + 1)), (pair.drafter, 5 + pair.drafter.vision.P + 1)):
        config = weights.memory.open_model(model.side, engine.TINY / model.side)[0]
        config = config | longer | {"text_config": config.get("text_config", {}) | longer}
        new = 600 + -(visual + 160 + 600) % 64
        rows = engine.rows_for(model.side, config, 160 + new)
        monkeypatch.setattr(engine.Decoder, "cache_rows", property(lambda self, rows=rows: rows))
        prompt = engine.Prompt([1] * 60, [1] * 100)
        request = SimpleNamespace(
            asked=Asked(draft_len=5, overlap_len=31, max_new_tokens=new), clip=None, goes_on=False, image=False,
            prompts={model.side: prompt}, pictures=lambda model: 8 if model is pair.target else 5)
        assert pair._check_rows(model, request) == visual + 160
        assert rows <= visual + 160 + new + 34 + 64


# ---- memory that runs out in a request


@pytest.mark.parametrize("side,kind,stage", [
    ("target", "encode", "encode"), ("target", "prefill", "prefill"), ("target", "step", "decode"),
    ("target", "prefill_graph", "preparation"), ("drafter", "prefill_graph", "preparation"),
    ("drafter", "encode", "encode"), ("drafter", "step", "draft")])
def test_memory_that_runs_out_names_the_stage_and_the_flag_and_the_next_request_works(pair, side, kind, stage,
                                                                                      monkeypatch):
    def short(*_):
        torch.empty(1 << 60, dtype=torch.uint8)              # a real refusal of the CPU's allocator

    given, mode = asked(0, max_new_tokens=8), "target_only" if side == "target" else "speculative"
    ids = pair.generate(mode="target_only", remember=False, **given).output_ids
    with monkeypatch.context() as patch:
        if stage == "preparation":
            patch.setattr(getattr(pair, side), kind, short)
        else:
            script(patch, getattr(pair, side), None, before=lambda of, number: of == kind and short())
        if side == "target" or stage == "preparation":
            with pytest.raises(InputError) as error:
                pair.generate(mode=mode, **given)
            line = str(error.value)
        else:                                                # a drafter without memory costs its drafts alone
            result = pair.generate(mode=mode, **given)
            line = result.drafter_error
            assert result.output_ids == ids
    assert f"ran out in the {side}'s {stage}" in line and "lower `cache_rows`" in line and "\n" not in line
    assert pair.generate(mode="speculative", **given).output_ids == ids


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler. Please specify via CC environment"),
                                   subprocess.CalledProcessError(1, ["gcc", "main.c"])], ids=["missing", "fails"])
def test_a_compiler_that_triton_misses_is_named_in_one_line(pair, error, monkeypatch):
    """As on a machine with a GPU, an empty Triton cache and no gcc on the path."""
    def failing(*_):
        raise error

    monkeypatch.setattr(pair.target, "prefill_graph", failing)
    with pytest.raises(InputError, match="install gcc or clang") as told:
        pair.generate(mode="target_only", **asked(0))
    assert "\n" not in str(told.value) and not isinstance(told.value, OutOfMemory)
