"""Memory: the budget is arithmetic, and here is what is really allocated. On a CPU every tensor that torch makes is
counted; in place of kernels stands what their launchers allocate. tests/test_gpu.py asks the GPU's allocator."""

import os
import re
import subprocess

import pytest
import torch
from common import asked, script
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import weights.memory
from engine import Drafter, InputError, Target
from kernels import quant

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
    """In place of the kernels of encode and prefill, what their launchers allocate: results, and nothing else."""
    def made(*shape, like):
        return torch.empty(shape, dtype=like.dtype)

    def rope_store(qkv_SE, pos_ids_S, cos_MK, sin_MK, k_NMK, v_NMK):
        return made(len(qkv_SE), qkv_SE.shape[1] // k_NMK.shape[2] - 2 * len(k_NMK), k_NMK.shape[2], like=qkv_SE)
    monkeypatch.setattr(engine, "rope_store", rope_store)
    monkeypatch.setattr(engine, "attention", lambda q, k, v, at: torch.empty_like(q))
    monkeypatch.setattr(engine, "rmsnorm", lambda x, w, eps: torch.empty_like(x))
    monkeypatch.setattr(engine, "add_rmsnorm", lambda x, residual, w, eps: (torch.empty_like(x), torch.empty_like(x)))
    monkeypatch.setattr(engine, "layernorm", lambda x, w, b, eps: torch.empty_like(x))
    monkeypatch.setattr(engine, "add_layernorm", lambda x, residual, w, b, eps: (torch.empty_like(x),
                                                                                 torch.empty_like(x)))
    monkeypatch.setattr(engine, "quick_gelu", torch.empty_like)
    monkeypatch.setattr(engine, "swiglu", lambda x: made(len(x), x.shape[1] // 2, like=x))
    plain = engine.product

    def skinny(x, w, *args, gated=False, **options):
        if isinstance(w, quant.Packed):
            return made(len(x), w.shape[0] // (2 if gated else 1), like=x)
        return plain(x, w, *args, gated=gated, **options)
    monkeypatch.setattr(engine, "product", skinny)


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
      for of in (*((name, None) for name in CONFIGS), ("drafter", "int4"))), ("as on a CPU", "target", "int4")])
def test_the_budget_is_within_5_percent_of_what_is_allocated(name, packed, kernels, monkeypatch):
    cls, config = CONFIGS[name]
    monkeypatch.setattr(engine, "TARGET_7B" if cls is Target else "DRAFTER_7B", config)
    device, dtype = torch.device("cpu"), torch.float32
    needs = engine.needs_of(cls, config, device, dtype, None, packed)
    if kernels == "as on a GPU":
        launchers(monkeypatch)
        needs = engine.needs_of(cls, config, torch.device("cuda"), dtype, None, packed)
        needs["scratch"] -= (2 << 25) + (2 << 26)            # a library's and the resized pictures, which are not here
    with Allocations() as counted:
        model = engine.load_model(cls, "random-7b", device, dtype, packed=packed)
        one_request(model, 8 if cls is Target else 5, 64 if kernels == "as on a CPU" else 256)
    d, steps = model.decoder, model.copy or model.decoder.steps
    assert needs["weights"] == sum(t.nbytes for t in d.w.values())
    if packed:
        copies = [t for layer in steps.layers for t in layer.values() if hasattr(t, "bits")] + [steps.head_VD]
        assert needs["packed"] == sum(t.nbytes for t in copies)
    assert counted.peak == pytest.approx(sum(needs.values()), rel=0.05), needs


def test_packing_by_and_by_gives_the_same_bits(monkeypatch):
    w_OD = torch.randn(300, 256)
    whole = quant.quantise(w_OD, 4)
    monkeypatch.setattr(quant, "PACK_ROWS", 128)
    parts = quant.quantise(w_OD, 4)
    assert torch.equal(whole.words, parts.words) and torch.equal(whole.scales, parts.scales)


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
        weights.memory.insist_on_room("DIR", torch.device("cuda:0"), {"weights": 13 * 10 ** 9, "cache": 2 * 10 ** 9})
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
    assert "\n" not in str(told.value) and not isinstance(told.value, engine.OutOfMemory)
