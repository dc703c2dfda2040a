"""Checkpoints: every fixture loads whole, every spelling gives the same tensors, every bad file is one clear line."""

import json
import os
import random
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights.load
from weights import InputError
from weights.load import (
    DRAFTER_7B,
    INDEX,
    TARGET_7B,
    main,
    open_checkpoint,
    random_tensors,
    read_config,
    read_header,
    resolve,
    stop_ids,
)
from weights.names import on_disk, plan

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
golden = pytest.mark.skipif(not FIXTURES.exists(), reason=f"{FIXTURES} is not here: golden checkpoints cannot be read")
EVERY = ["stories260k", "video_llava_tiny/mha", "video_llava_tiny/gqa", "video_llava_tiny/mha_hubnames",
         "eventgpt_tiny/checkpoint"]
CPU, F32 = torch.device("cpu"), torch.float32

TEXT = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
CONFIGS = {
    "llama": TEXT,
    "video_llava": {"model_type": "video_llava", "text_config": TEXT, "vision_config": CLIP},
    "EventChat_llama": {**TEXT, "model_type": "EventChat_llama", "mm_visual_tower": "clip", "vision_config": CLIP,
                        "event_feature_adaptor": True, "mm_use_im_patch_token": False},
}
SPELLINGS = {                                           # specification: hub, 4.52 in memory, 5.23 on disk, in memory
    "A": {},
    "B": {r"^((video|image)_tower|multi_modal_projector)\.": r"model.\1.", r"^language_model\.lm_head": "lm_head",
          r"^language_model\.model\.": "model.language_model."},
    "C": {r"_tower\.vision_model\.": "_tower."},
    "D": {r"_tower\.vision_model\.": "_tower.", r"^((video|image)_tower|multi_modal_projector)\.": r"model.\1.",
          r"^language_model\.lm_head": "lm_head", r"^language_model\.model\.": "model.language_model."},
}


def tensors_of(config, seed=0):
    """Random tensors under the published names of a config's checkpoint, unused ones left out."""
    generator, wanted = torch.Generator().manual_seed(seed), plan(config)
    return {on_disk(part.name, wanted.kind): torch.randn(part.shape, generator=generator)
            for tensor in wanted.wanted for part in tensor.parts}


def write(folder, config, tensors, shards=0):
    """A checkpoint folder; with `shards`, an index and that many files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def make(folder, kind="llama", shards=0):
    return write(folder, CONFIGS[kind], tensors_of(CONFIGS[kind]), shards)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def python(code, *args, **env):
    """A fresh interpreter, so that what one test imports or allocates is no part of another."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=300)


# ---- what loads --------------------------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize("name", EVERY)
def test_every_checkpoint_tensor_is_used_once_or_declared_unused(name):
    checkpoint = open_checkpoint(FIXTURES / name)
    used = [checkpoint.stored[part.name].key for tensor in checkpoint.plan.wanted for part in tensor.parts]
    unread = [stored.key for stored in checkpoint.unread]
    on_file = [key for file in sorted((FIXTURES / name).glob("model*.safetensors")) for key in load_file(file)]
    assert sorted(used + unread) == sorted(on_file)
    assert all("post_layernorm" in key or "layers.2." in key for key in unread)


@golden
@pytest.mark.parametrize("name", EVERY)
def test_every_row_of_every_engine_tensor_is_filled(name, nan_empty):
    checkpoint = open_checkpoint(FIXTURES / name)
    loaded = checkpoint.load(CPU, F32)
    assert {tensor.name: tensor.shape for tensor in checkpoint.plan.wanted} == {
        name: tuple(tensor.shape) for name, tensor in loaded.items()}
    assert all(torch.isfinite(tensor).all() for tensor in loaded.values())


@golden
def test_sharded_hub_names_equal_the_single_file():
    one, three = (open_checkpoint(FIXTURES / "video_llava_tiny" / name) for name in ("mha", "mha_hubnames"))
    assert len(three.files) == 3 and same(one.load(CPU, F32), three.load(CPU, F32))


@golden
def test_values_are_stacked_in_the_order_the_engine_reads():
    loaded = open_checkpoint(FIXTURES / "video_llava_tiny/gqa").load(CPU, F32)
    raw = load_file(FIXTURES / "video_llava_tiny/gqa/model.safetensors")
    text, tower = "model.language_model.layers.1.", "model.video_tower.encoder.layers.1.self_attn."
    q, k, v = (raw[f"{text}self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(loaded["text.layers.1.qkv"], torch.cat([q, k, v])) and q.shape != k.shape
    gate_up = torch.cat([raw[f"{text}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(loaded["text.layers.1.gate_up"], gate_up)
    assert torch.equal(loaded["video.layers.1.qkv.b"], torch.cat([raw[f"{tower}{x}_proj.bias"] for x in "qkv"]))
    assert torch.equal(loaded["image.patch"], raw["model.image_tower.embeddings.patch_embedding.weight"])
    assert torch.equal(loaded["projector.1.b"], raw["model.multi_modal_projector.linear_2.bias"])


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_give_identical_engine_tensors(tmp_path, spelling, shards):
    hub = tensors_of(CONFIGS["video_llava"])
    respelt = {}
    for name, tensor in hub.items():
        for pattern, replacement in SPELLINGS[spelling].items():
            name = re.sub(pattern, replacement, name)
        respelt[name] = tensor
    assert (set(respelt) == set(hub)) == (spelling == "A")
    wanted = open_checkpoint(write(tmp_path / "hub", CONFIGS["video_llava"], hub)).load(CPU, F32)
    given = open_checkpoint(write(tmp_path / "other", CONFIGS["video_llava"], respelt, shards)).load(CPU, F32)
    assert same(wanted, given)


def test_constants_of_older_libraries_are_not_read(tmp_path):
    tensors = tensors_of(CONFIGS["video_llava"])
    tensors["video_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    checkpoint = open_checkpoint(write(tmp_path / "c", CONFIGS["video_llava"], tensors))
    assert len(checkpoint.unread) == 2 and len(checkpoint.load(CPU, F32)) == len(checkpoint.plan.wanted)


@pytest.mark.parametrize("nested", [{}, {"vision_config": CLIP}, {"vision_config": None, "vision_config_dict": CLIP}])
def test_eventgpt_takes_a_missing_tower_from_the_clip_folder(tmp_path, nested):
    config = {key: value for key, value in CONFIGS["EventChat_llama"].items() if key != "vision_config"}
    whole = tensors_of(CONFIGS["EventChat_llama"])
    prefix = "model.visual_tower.visual_tower."
    clip = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    clip |= {"text_model.final_layer_norm.bias": torch.ones(4), "logit_scale": torch.ones(())} if nested else {}
    write(tmp_path / "egpt", config, {name: t for name, t in whole.items() if not name.startswith(prefix)})
    write(tmp_path / "egpt/clip", {"model_type": "clip", **nested} if nested else CLIP, clip)
    own = write(tmp_path / "whole", CONFIGS["EventChat_llama"], whole)
    assert same(open_checkpoint(tmp_path / "egpt").load(CPU, F32), open_checkpoint(own).load(CPU, F32))


def test_eventgpt_prefers_its_own_tower_to_the_clip_folder(tmp_path):
    folder = make(tmp_path / "egpt", "EventChat_llama")
    write(folder / "clip", CLIP, {"vision_model.embeddings.class_embedding": torch.zeros(8)})
    assert open_checkpoint(folder).load(CPU, F32)["events.cls"].abs().max() > 0


@pytest.mark.parametrize("tower", ["clip", "/nowhere/of/the/author/clip", "./clip/", r"C:\me\clip"])
def test_eventgpt_finds_its_clip_config(tmp_path, tower):
    config = {**CONFIGS["EventChat_llama"], "mm_visual_tower": tower}
    del config["vision_config"]
    write(tmp_path / "egpt", config, tensors_of(CONFIGS["EventChat_llama"]))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text(json.dumps(CLIP))
    if tower.startswith("."):
        (tmp_path / "clip").rename(tmp_path / "egpt/clip")
    assert read_config(tmp_path / "egpt")["vision_config"] == CLIP
    assert open_checkpoint(tmp_path / "egpt").load(CPU, F32)["events.pos"].shape == (5, 8)


def test_marker_flags_explain_extra_rows(tmp_path):
    config = {**CONFIGS["EventChat_llama"], "vocab_size": 32000, "mm_use_im_start_end": True,
              "mm_use_im_patch_token": True}
    tensors = tensors_of({**config, "vocab_size": 32003})
    checkpoint = open_checkpoint(write(tmp_path / "c", config, tensors))
    assert checkpoint.config["vocab_size"] == 32003 and checkpoint.load(CPU, F32)["text.head"].shape == (32003, 16)
    write(tmp_path / "c", {**config, "mm_use_im_start_end": False}, tensors)        # one row explained, three came
    with pytest.raises(InputError, match=r"embed_tokens.weight is \[32003, 16\], config.json wants \[32000, 16\]"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("top, text", [(True, None), (None, True), (True, False), (False, False), (None, None)])
def test_a_tied_head_needs_no_tensor_and_one_that_is_there_is_the_head(tmp_path, kind, top, text):
    """As transformers 5: `tie_word_embeddings` of either section; "both are present, so we will NOT tie them"."""
    config, tensors = json.loads(json.dumps(CONFIGS[kind])), tensors_of(CONFIGS[kind])
    config |= {"tie_word_embeddings": top}
    if kind == "video_llava":
        config["text_config"]["tie_word_embeddings"] = text
    with_head = open_checkpoint(write(tmp_path / "a", config, tensors))
    name = "language_model.lm_head.weight" if kind == "video_llava" else "lm_head.weight"
    assert torch.equal(with_head.load(CPU, F32)["text.head"], tensors.pop(name))
    write(tmp_path / "b", config, tensors)
    if True in (top, text if kind == "video_llava" else None):
        without = open_checkpoint(tmp_path / "b")
        assert "text.head" not in without.load(CPU, F32) and plan(without.config) == without.plan
    else:
        with pytest.raises(InputError, match="1 tensor missing: .*lm_head"):
            open_checkpoint(tmp_path / "b")


def test_a_list_of_one_layer_is_that_layer(tmp_path):
    folder = make(tmp_path / "checkpoint", "video_llava")
    edit_config(folder, vision_feature_layer=[-2])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["vision_feature_layer"] == -2 and checkpoint.plan == plan(CONFIGS["video_llava"])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_rounded_once_to_the_dtype_asked_for(tmp_path, stored, wanted):
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(TEXT).items()}
    loaded = open_checkpoint(write(tmp_path / "c", TEXT, tensors)).load(CPU, wanted)
    assert torch.equal(loaded["text.layers.0.down"], tensors["model.layers.0.mlp.down_proj.weight"].to(wanted))


def test_progress_ends_at_the_bytes_read(tmp_path):
    seen, folder = [], make(tmp_path / "c", shards=2)
    open_checkpoint(folder).load(CPU, F32, progress=lambda done, total: seen.append((done, total)))
    nbytes = sum(tensor.nbytes for tensor in tensors_of(TEXT).values())
    assert seen[-1] == (nbytes, nbytes) and [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("text", ['{"model_type": "llama",\r\n "vocab_size": 40}\r\n', '\ufeff{"model_type": "llama"}'])
def test_config_may_have_any_line_ends_and_a_byte_order_mark(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode())
    assert read_config(tmp_path)["model_type"] == "llama"


def test_sizes_left_out_of_a_config_are_those_of_the_published_models():
    bare = {"model_type": "video_llava", "text_config": {"vocab_size": 32064},
            "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                              "num_hidden_layers": 24, "patch_size": 14}}
    assert plan(bare) == plan(TARGET_7B)
    newer = json.loads(json.dumps(bare))
    newer["text_config"]["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    assert plan(newer) == plan(TARGET_7B)


@pytest.mark.parametrize("config,tensors,parameters", [(TARGET_7B, 1077, 7_366_279_168),
                                                       (DRAFTER_7B, 688, 7_079_684_096)])
def test_7b_plans_have_the_published_counts(config, tensors, parameters):
    wanted = plan(config)
    assert sum(len(tensor.parts) for tensor in wanted.wanted) + len(wanted.unused) == tensors
    norm, layer = 2 * 1024, 4 * (1024 ** 2 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    unused = 2 * (norm + layer) if config is TARGET_7B else norm        # post_layernorm, and layer 24 of two towers
    assert wanted.nbytes(1) + unused == parameters


@pytest.mark.parametrize("kind", CONFIGS)
def test_random_weights_have_the_plans_shapes_and_repeat(kind):
    config = CONFIGS[kind]
    one, two, other = (dict(random_tensors(config, CPU, F32, seed)) for seed in (1, 1, 2))
    assert {tensor.name: tensor.shape for tensor in plan(config).wanted} == {n: tuple(t.shape) for n, t in one.items()}
    assert same(one, two) and not same(one, other)
    for name, tensor in one.items():
        if "norm" in name and not name.endswith(".b"):
            assert (tensor == 1).all(), name
        else:
            assert (tensor == 0).all() == name.endswith(".b"), name
    assert abs(one["text.layers.0.down"].std() * (24 * 4) ** 0.5 - 1) <= 0.15        # 384 draws: 4 sigma


# ---- what is refused ---------------------------------------------------------------------------------------------


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "gone"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_header(path, edit):
    """Rewrites the JSON in front of the data, as text."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = edit(raw[8:8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length:])


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def replaced(pattern, replacement):
    def edit(text):
        changed = re.sub(pattern, replacement, text, count=1)
        assert changed != text, pattern
        return changed
    return edit


ONE, TWO = "model.safetensors", "model-00002-of-00003.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
LARGE = "model.embed_tokens.weight"
BAD = {     # name: (kind, shards, what goes wrong with the folder, what the line must say)
    "no config": ("llama", 0, lambda d: (d / "config.json").unlink(), ["config.json: no such file"]),
    "config not JSON": ("llama", 0, lambda d: (d / "config.json").write_text("{"), ["config.json: not JSON"]),
    "config a list": ("llama", 0, lambda d: (d / "config.json").write_text("[1]"), ["JSON list", "object"]),
    "config not text": ("llama", 0, lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), ["not UTF-8"]),
    "config nested": ("llama", 0, lambda d: (d / "config.json").write_text("[" * 10 ** 6), ["not JSON"]),
    "config a pointer": ("llama", 0, lambda d: (d / "config.json").write_text("version https://git-lfs.x"),
                         ["config.json: is a Git LFS pointer"]),
    "config a folder": ("llama", 0, lambda d: [(d / "config.json").unlink(), (d / "config.json").mkdir()],
                        ["config.json: is a folder"]),
    "other model": ("llama", 0, lambda d: edit_config(d, model_type="qwen2"), ["'qwen2', wanted one of video_llava"]),
    "no model_type": ("llama", 0, lambda d: edit_config(d, model_type="gone"), ["model_type is 'None', wanted"]),
    "size a string": ("llama", 0, lambda d: edit_config(d, hidden_size="16"), ["hidden_size is '16', wanted a whole"]),
    "size negative": ("llama", 0, lambda d: edit_config(d, vocab_size=-1), ["vocab_size is '-1'"]),
    "size a bool": ("llama", 0, lambda d: edit_config(d, vocab_size=True), ["vocab_size is 'True'"]),
    "a billion layers": ("llama", 0, lambda d: edit_config(d, num_hidden_layers=10 ** 9), ["from 1 to 999"]),
    "head groups": ("llama", 0, lambda d: edit_config(d, num_key_value_heads=3), ["4 is not a multiple"]),
    "biases": ("llama", 0, lambda d: edit_config(d, attention_bias=True), ["attention_bias is 'True'"]),
    "sliding window": ("llama", 0, lambda d: edit_config(d, sliding_window=512), ["sliding_window is '512'"]),
    "two rotary bases": ("llama", 0, lambda d: edit_config(d, rope_theta=1e4, rope_parameters={"rope_theta": 1e6}),
                         ["rope_theta is 10000.0 and elsewhere 1000000.0"]),
    "two homes of the rotary base": ("llama", 0, lambda d: edit_config(
        d, rope_scaling={"rope_theta": 5e5}, rope_parameters={"rope_theta": 1e6}), ["500000.0 and elsewhere 1000"]),
    "rope of layer kinds": ("llama", 0, lambda d: edit_config(d, rope_parameters={"full_attention": {"factor": 2}}),
                            ["rope scaling: full_attention is "]),
    "part of the head turned": ("llama", 0, lambda d: edit_config(d, rope_parameters={"partial_rotary_factor": 0.5}),
                                ["rope scaling: partial_rotary_factor is '0.5'"]),
    "no vision config": ("video_llava", 0, lambda d: edit_config(d, vision_config="gone"),
                         ["config.json has no vision_config: "]),
    "odd head width": ("llama", 0, lambda d: edit_config(d, head_dim=3), ["head_dim is 3"]),
    "rows that fill no frame": ("video_llava", 0, lambda d: edit_config(d, video_seq_length=41),
                                ["video_seq_length is 41, no multiple of the 5 rows"]),
    "rope scaling": ("llama", 0, lambda d: edit_config(d, rope_scaling={"type": "linear", "factor": 2.0}),
                     ["rope scaling: type is 'linear', wanted 'default': this engine computes no other"]),
    "gelu": ("llama", 0, lambda d: edit_config(d, hidden_act="gelu"), ["hidden_act is 'gelu'"]),
    "section a list": ("video_llava", 0, lambda d: edit_config(d, vision_config=[1]), ["vision_config is '[1]'"]),
    "list of layers": ("video_llava", 0, lambda d: edit_config(d, vision_feature_layer=[-2, -1]),
                       ["vision_feature_layer is [-2, -1]"]),
    "layer outside": ("video_llava", 0, lambda d: edit_config(d, vision_feature_layer=-5), ["wanted one of -4..3"]),
    "patches": ("video_llava", 0, lambda d: edit_config(d, vision_config={**CLIP, "patch_size": 13}), ["remainder"]),
    "qformer": ("EventChat_llama", 0, lambda d: edit_config(d, use_event_qformer=True), ["use_event_qformer"]),
    "no tower named": ("EventChat_llama", 0, lambda d: edit_config(d, vision_config="gone", mm_visual_tower="gone"),
                       ["mm_visual_tower is absent"]),
    "markers without rows": ("EventChat_llama", 0, lambda d: edit_config(d, mm_use_im_start_end=True),
                             ["mm_use_im_start_end is true", "set it to false"]),
    "clip folder absent": ("EventChat_llama", 0, lambda d: edit_config(d, vision_config="gone"),
                           ["misshapen", "mm_visual_tower clip is not here"]),
    "clip weights absent": ("EventChat_llama", 0, lambda d: [edit_config(d, vision_config="gone"), edit_tensors(
        d, lambda t: [t.pop(k) for k in list(t) if "visual_tower" in k])], ["no vision tower", "hf download openai/"]),
    "no weights": ("llama", 0, lambda d: (d / ONE).unlink(), ["no weights here"]),
    "weights a folder": ("llama", 0, lambda d: [(d / ONE).unlink(), (d / ONE).mkdir()], [ONE, "is a folder"]),
    "bin only": ("llama", 0, lambda d: (d / ONE).rename(d / "pytorch_model.bin"), ["python -m weights.convert"]),
    "shards without index": ("llama", 3, lambda d: (d / INDEX).unlink(),
                             ["neither", "add the missing model.safetensors.index.json"]),
    "shard missing": ("llama", 3, lambda d: (d / TWO).unlink(), ["1 of 3 shards missing", TWO]),
    "two shards missing": ("llama", 3, lambda d: [(d / TWO).unlink(), (d / TWO.replace("2-", "3-")).unlink()],
                           ["2 of 3 shards missing", TWO, "00003-of"]),
    "index not a table": ("llama", 3, lambda d: (d / INDEX).write_text('{"weight_map": []}'),
                          ["weight_map is not a table"]),
    "index leads outside": ("llama", 3, lambda d: (d / INDEX).write_text(
        '{"weight_map": {"a": "../../etc/passwd"}}'), ["files outside its folder", "../../etc/passwd"]),
    "index too short": ("llama", 3, lambda d: edit_index(d, lambda m: m.pop("lm_head.weight")),
                        ["1 tensor left out by the index: lm_head.weight"]),
    "index wrong": ("llama", 3, lambda d: edit_index(d, lambda m: m.update({NORM: TWO, "more": TWO})),
                    ["2 tensors not in the shard that the index names: ", NORM, "more"]),
    "shard truncated": ("llama", 3, lambda d: os.truncate(d / TWO, (d / TWO).stat().st_size - 100),
                        [TWO, "truncated: wanted", "the file has"]),
    "truncated in the header": ("llama", 0, lambda d: os.truncate(d / ONE, 100), [ONE, "truncated: its header alone"]),
    "empty": ("llama", 0, lambda d: os.truncate(d / ONE, 0), ["0 bytes, wanted a safetensors file"]),
    "too long": ("llama", 0, lambda d: (d / ONE).write_bytes((d / ONE).read_bytes() + b"\0"), ["too long: wanted"]),
    "pointer": ("llama", 0, lambda d: (d / ONE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
                ["is a Git LFS pointer", "git lfs pull"]),
    "web page": ("llama", 0, lambda d: (d / ONE).write_text("\n<!DOCTYPE html><p>Quota exceeded"), ["is a web page"]),
    "pickle renamed": ("llama", 0, lambda d: torch.save({"a": torch.ones(1)}, d / ONE), ["a pickled torch file"]),
    "random bytes": ("llama", 0, lambda d: (d / ONE).write_bytes(random.Random(0).randbytes(5000)), ["starts with"]),
    "header of a terabyte": ("llama", 0, lambda d: (d / ONE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
                             ["starts with"]),
    "header no JSON": ("llama", 0, lambda d: edit_header(d / ONE, replaced("{", "<")), ["damaged header"]),
    "key twice": ("llama", 0, lambda d: edit_header(d / ONE, replaced('"model.norm.weight"', f'"{NORM}"')),
                  [f"names {NORM} twice"]),
    "overlap": ("llama", 0, lambda d: edit_header(d / ONE, replaced(r"\[0,", "[4,")), [ONE, "damaged ("]),
    "unknown dtype": ("llama", 0, lambda d: edit_header(d / ONE, replaced('"F32"', '"F31"')), [ONE, "damaged"]),
    "tensor in two shards": ("llama", 3, lambda d: save_file(
        {**load_file(d / TWO), NORM: torch.ones(16)}, d / TWO), ["1 tensor twice", NORM, TWO, "00003-of-00003"]),
    "two spellings of one": ("video_llava", 0, lambda d: edit_tensors(
        d, lambda t: t.update({"video_tower.pre_layrnorm.bias": torch.ones(8)})), ["1 tensor twice: "]),
    "tensor missing": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.pop(NORM)), ["1 tensor missing: " + NORM]),
    "tensor surplus": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.update({"model.more": torch.ones(1)})),
                       ["1 tensor surplus: model.more"]),
    "tensor renamed": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.update({"model.nrom.weight": t.pop(
        "model.norm.weight")})), ["1 tensor missing: model.norm.weight", "1 tensor surplus: model.nrom.weight"]),
    "tensor misshapen": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.update({NORM: torch.ones(17)})),
                         [f"1 tensor misshapen: {NORM} is [17], config.json wants [16]"]),
    "padded vocabulary": ("llama", 0, lambda d: edit_config(d, vocab_size=32),
                          ["embed_tokens.weight is [40, 16], config.json wants [32, 16]"]),
    "integers": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)})),
                 [f"not plain floating point: {NORM} is I8"]),
    "quantised": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.update({"model.layers.0.mlp.up_proj.weight.absmax":
                  torch.ones(1)})), ["look like a quantised checkpoint"]),
    "fp8": ("llama", 0, lambda d: edit_tensors(d, lambda t: t.update({NORM + "_scale_inv": torch.ones(1)})),
            ["look like a quantised checkpoint"]),
    "quantised on the way": ("video_llava", 0, lambda d: edit_config(d, quantization_config={"load_in_4bit": True}),
                             ["config.json: quantization_config is"]),
    "wrapped": ("llama", 0, lambda d: save_file({f"module.{key}": t for key, t in load_file(d / ONE).items()}, d / ONE),
                ["surplus: module.", "a wrapper of its trainer"]),
    "lora": ("llama", 0, lambda d: save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":
             torch.ones(1)}, d / ONE), ["look like a LoRA adapter"]),
    "adapter folder": ("llama", 0, lambda d: (d / "config.json").rename(d / "adapter_config.json"), ["an adapter"]),
    "adapter beside its model": ("llama", 0, lambda d: write_json(d, "adapter_config.json", {"peft_type": "LORA"}),
                                 ["an adapter"]),
    "folder above": ("llama", 0, lambda d: [(d / "snapshots/12").mkdir(parents=True), (d / ONE).unlink(),
                                            (d / "config.json").rename(d / "snapshots/12/config.json")],
                     ["no config.json, a folder below it has; give", "snapshots/12"]),
    "config of another": ("video_llava", 0, lambda d: (d / "config.json").write_text(json.dumps(TEXT)),
                          ["config.json says llama, the keys look like Video-LLaVA"]),
    "target as drafter": ("EventChat_llama", 0, lambda d: (d / "config.json").write_text(json.dumps(
        CONFIGS["video_llava"])), ["says video_llava, the keys look like EventGPT"]),
}


def test_swish_is_another_name_of_silu(tmp_path):
    folder = make(tmp_path / "checkpoint", "llama")
    edit_config(folder, hidden_act="swish", sliding_window=None, rope_parameters={"rope_theta": 1e4}, rope_theta=1e4)
    open_checkpoint(folder)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_one_line_with_path_reason_and_way_out(case, tmp_path, monkeypatch, capsys):
    kind, shards, spoil, said = BAD[case]
    folder = make(tmp_path / "checkpoint", kind, shards)
    spoil(folder)
    monkeypatch.setattr(torch, "empty", None)           # whatever is wrong is said before memory is taken
    monkeypatch.setattr(weights.load, "open_weights", None)
    assert main([str(folder)]) == 2
    out, line = capsys.readouterr()
    assert out == "" and line.count("\n") == 1 and line.startswith(str(folder)) and "; " in line, line
    assert all(part in line for part in said), line


# ---- the small files beside config.json ------------------------------------------------------------------------


def write_json(folder, name, value):
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize("generation, config, text, stops", [
    (None, {}, {}, (2,)), (None, {}, {"eos_token_id": 5}, (5,)), (None, {"eos_token_id": 7}, {"eos_token_id": 5}, (7,)),
    (None, {}, {"eos_token_id": [2, 7, 2]}, (2, 7)), ({}, {}, {"eos_token_id": 5}, (5,)),
    ({"eos_token_id": 9}, {"eos_token_id": 7}, {"eos_token_id": 5}, (9,)),
    ({"eos_token_id": [2, 39]}, {}, {}, (2, 39)), ({"eos_token_id": None, "num_beams": 1}, {}, {}, (2,)),
    ({"do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096, "repetition_penalty": 1.0,
      "bos_token_id": 1, "pad_token_id": 0, "transformers_version": "4.31.0", "no_such_key": 5}, {}, {}, (2,))])
def test_an_answer_ends_where_transformers_ends_it(tmp_path, generation, config, text, stops):
    folder = make(tmp_path / "checkpoint", "video_llava")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"].update(text)
    write_json(folder, "config.json", raw | config)
    if generation is not None:
        write_json(folder, "generation_config.json", generation)
    assert stop_ids(folder, open_checkpoint(folder).config) == stops


@pytest.mark.parametrize("name, content, said", [
    ("generation_config.json", {"eos_token_id": 40}, "eos_token_id is [40], wanted"),
    ("generation_config.json", {"eos_token_id": []}, "eos_token_id is []"),
    ("generation_config.json", {"eos_token_id": [2, -1]}, "eos_token_id is [2, -1]"),
    ("generation_config.json", {"eos_token_id": True}, "eos_token_id is [True]"),
    ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is ['</s>']"),
    ("generation_config.json", {"repetition_penalty": 1.2}, "repetition_penalty is 1.2, which changes answers"),
    ("generation_config.json", {"num_beams": 4}, "num_beams is 4"),
    ("generation_config.json", {"suppress_tokens": [3]}, "suppress_tokens is [3]"),
    ("generation_config.json", {"forced_eos_token_id": 2}, "forced_eos_token_id is 2"),
    ("generation_config.json", {"cache_implementation": "quantized"}, "cache_implementation is quantized"),
    ("generation_config.json", [], "JSON list"),
    ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token is False"),
    ("tokenizer_config.json", {"add_eos_token": True, "add_bos_token": True}, "add_eos_token is True"),
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5], and this engine"),
    ("preprocessor_config.json", {"image_std": 0.5}, "image_std is 0.5"),
    ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
    ("preprocessor_config.json", {"resample": 2}, "resample is 2"),
    ("preprocessor_config.json", {"size": {"height": 8, "width": 12}}, "size is {"),
    ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "size is {"),         # a squeezed square
    ("preprocessor_config.json", {"size": {"shortest_edge": 28, "longest_edge": 28}}, "size is {"),
    ("preprocessor_config.json", {"crop_size": {"height": 28}}, "crop_size is {"),
    ("video_preprocessor_config.json", {"do_sample_frames": True, "num_frames": 4}, "do_sample_frames is True"),
    ("preprocessor_config.json", {"crop_size": 336}, "crop_size is 336"),
    ("video_preprocessor_config.json", {"rescale_factor": 1}, "rescale_factor is 1"),
    ("processor_config.json", {"image_processor": {"do_resize": False}}, "do_resize is False"),
    ("config.json", {"bos_token_id": 40}, "bos_token_id is 40, the embedding table has 40 rows"),
    ("config.json", {"eos_token_id": 100_000}, "eos_token_id is [100000]")])
@pytest.mark.parametrize("kind", ["video_llava", "EventChat_llama"])
def test_a_small_file_that_asks_for_something_else_is_refused_by_name(tmp_path, kind, name, content, said):
    folder = make(tmp_path / "checkpoint", kind)
    place = folder
    if kind == "EventChat_llama" and "processor" in name:
        place = folder / "clip"
        place.mkdir()
        write_json(place, "config.json", CONFIGS["EventChat_llama"]["vision_config"])
        edit_config(folder, mm_visual_tower="clip")
    if name == "config.json":
        raw = json.loads((folder / name).read_text())
        (raw["text_config"] if kind == "video_llava" else raw).update(content)
        content = raw
    write_json(place, name, content)
    with pytest.raises(InputError) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(f"{place / name}: ") and said in str(error.value), error.value


@pytest.mark.parametrize("content", [
    {"do_resize": True, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True,
     "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
     "image_std": [0.26862954, 0.26130258, 0.27577711], "do_rescale": True, "do_convert_rgb": True,
     "image_processor_type": "VideoLlavaImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor"},
    {"size": 28, "crop_size": 28}, {"size": {"shortest_edge": 28, "longest_edge": None}}, {},
    {"crop_size": None}])
def test_clips_own_processor_is_accepted_in_every_spelling(tmp_path, content):
    folder = make(tmp_path / "checkpoint", "video_llava")
    write_json(folder, "preprocessor_config.json", content)
    write_json(folder, "processor_config.json", {"image_processor": content, "patch_size": 4})
    write_json(folder, "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": False, "legacy": False})
    open_checkpoint(folder)


def test_ten_names_are_listed_and_one_of_each_fault(tmp_path):
    config = {**TEXT, "num_hidden_layers": 4}
    write(tmp_path / "c", config, {**tensors_of(TEXT), **{f"extra.{i}": torch.ones(1) for i in range(30)}})
    with pytest.raises(InputError) as error:
        open_checkpoint(tmp_path / "c")
    line = str(error.value)
    assert "18 tensors missing" in line and "30 tensors surplus" in line
    assert len(re.findall(r"model\.layers\.[23]|extra\.", line)) == 11 and len(line) < 1500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, -1])
def test_nan_and_infinity_are_named_with_their_file(tmp_path, value, at):
    tensors = tensors_of(TEXT)
    tensors["model.layers.1.self_attn.k_proj.weight"].view(-1)[at] = value
    checkpoint = open_checkpoint(write(tmp_path / "c", TEXT, tensors, shards=3))
    with pytest.raises(InputError) as error:
        checkpoint.load(CPU, torch.bfloat16)
    file = next(file for file in checkpoint.files if "model.layers.1.self_attn.k_proj.weight" in load_file(file))
    line = str(error.value)
    assert line.startswith(f"{file}: NaN or infinity in 1 tensor: model.layers.1.self_attn.k_proj.weight; ")


def test_a_matrix_of_zeros_is_a_download_with_holes(tmp_path):
    """As preallocated files have them; a vector may be zeros, as biases are."""
    key = "model.layers.1.mlp.down_proj.weight"
    tensors = tensors_of(TEXT) | {NORM: torch.zeros(16)}
    open_checkpoint(write(tmp_path / "c", TEXT, tensors)).load(CPU, F32)
    tensors[key] = torch.zeros_like(tensors[key])
    with pytest.raises(InputError, match=f"{ONE}: nothing but zeros in 1 tensor: {key}; .*holes"):
        open_checkpoint(write(tmp_path / "c", TEXT, tensors)).load(CPU, torch.float16)


def test_values_too_large_for_the_dtype_are_not_called_damage(tmp_path):
    tensors = tensors_of(TEXT)
    tensors[NORM][3] = 1e5
    checkpoint = open_checkpoint(write(tmp_path / "c", TEXT, tensors))
    assert checkpoint.load(CPU, torch.bfloat16)
    with pytest.raises(InputError, match=f"float16 is too narrow for 1 tensor: {NORM}; load it as bfloat16"):
        checkpoint.load(CPU, torch.float16)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [CPU, pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def test_pieces_read_by_threads_make_the_tensors_that_the_library_reads(stored, device, tmp_path, monkeypatch):
    """Pieces that end inside rows, in files of every type, to every type; the last one of a tensor is short."""
    monkeypatch.setattr(weights.load, "PIECE", 1000)
    values = {name: tensor.to(stored) for name, tensor in tensors_of(TEXT).items()}
    checkpoint = open_checkpoint(write(tmp_path / "c", TEXT, values))
    for dtype in (F32, torch.bfloat16, torch.float16):
        with torch.inference_mode(dtype == F32):             # the readers' threads must be in the caller's mode
            ours = checkpoint.load(device, dtype)
        for wanted in checkpoint.plan.wanted:
            parts = torch.cat([values[checkpoint.stored[part.name].key].to(dtype) for part in wanted.parts])
            assert torch.equal(ours[wanted.name].cpu(), parts), (wanted.name, dtype)


def test_on_a_cpu_the_readers_fill_the_tensors_and_look_for_nan_themselves(tmp_path, monkeypatch):
    """Done by the thread that waits for them it takes 1.5 times as long; NaN is found in any piece."""
    def told(name):
        real = getattr(torch, name)
        return lambda *given: (threads.append(threading.current_thread()), real(*given))[1]
    monkeypatch.setattr(weights.load, "PIECE", 1000)
    monkeypatch.delattr(weights.load.Buffer, "copy_to")
    threads: list = []
    monkeypatch.setattr(torch, "aminmax", told("aminmax"))
    tensors = tensors_of(TEXT)
    assert open_checkpoint(write(tmp_path / "c", TEXT, tensors)).load(CPU, F32)
    assert threads and threading.main_thread() not in threads
    for at in (0, 400, tensors[LARGE].numel() - 1):
        spoilt = tensors[LARGE].clone()
        spoilt.view(-1)[at] = float("nan")
        checkpoint = open_checkpoint(write(tmp_path / f"at {at}", TEXT, tensors | {LARGE: spoilt}))
        with pytest.raises(InputError, match=f"NaN or infinity in 1 tensor: {LARGE};"):
            checkpoint.load(CPU, F32)


def test_a_file_cut_short_after_opening_is_an_error_and_no_crash(tmp_path):
    checkpoint = open_checkpoint(make(tmp_path / "c"))
    os.truncate(checkpoint.files[0], 20_000)
    with pytest.raises(InputError, match=r"model.safetensors: reading .* failed .* after [1-9]\d* of \d+ bytes"):
        checkpoint.load(CPU, F32)


def test_damaged_headers_end_in_input_error(tmp_path):
    """2,000 seeded mutations: each file is accepted or refused by name, and nothing else ever comes out."""
    raw, rng, refused = (make(tmp_path / "c") / ONE).read_bytes(), random.Random(1), 0
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    path = tmp_path / "mutant.safetensors"
    for _ in range(2000):
        mutant = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(8) if rng.random() < 0.1 else rng.randrange(head)
            mutant[at:at + rng.choice([0, 1, 1, 8])] = rng.choice(
                [rng.randbytes(1), b"9", b"[", b'"', b"null", b"-1", b"1e99", b"\\ud800", b"", raw[at:at + 40]])
        path.write_bytes(mutant)
        try:
            read_header(path)
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 1500


@pytest.mark.parametrize("path", ["", "nowhere", "/nowhere/at/all", "a\0b", "x" * 5000, "../x/y", "ORG/NA ME", "a/b/c",
                                  "~nobody/x"])
def test_a_path_that_is_nothing_is_refused(path):
    with pytest.raises(InputError, match="no such folder; check the spelling"):
        resolve(path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    folder = make(tmp_path / "c")
    with pytest.raises(InputError, match=f"is a file, wanted a folder .*; give {folder}"):
        resolve(folder / ONE)


def test_an_import_is_quiet_and_hub_ids_come_from_the_local_cache_without_network(tmp_path):
    digits = "0123456789" * 4
    snapshot = tmp_path / "hub/models--org--name/snapshots" / digits
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub/models--org--name/refs").mkdir()
    (tmp_path / "hub/models--org--name/refs/main").write_text(digits)
    code = """
import weights.load, weights.convert, torch                  # quiet, and the GPU is left alone
assert not torch.cuda.is_initialized()
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from weights import InputError
from weights.load import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(name))
    except InputError as error:
        print(error)
"""
    names = ["org/name", f"org/name@{digits}", "org/name@" + "9" * 40, "org/other", "org/na--me", "org/name@../../x"]
    done = python(code, *names, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="0")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == [str(snapshot)] * 2 and len(lines) == len(names)
    assert "revision " + "9" * 40 in lines[2] and f"`hf download org/name --revision {'9' * 40}`" in lines[2]
    assert lines[3].startswith("org/other: ") and "`hf download org/other --revision main`" in lines[3]
    assert all("hf download" in line for line in lines[4:])


def test_a_cached_revision_without_a_branch_is_taken_if_it_is_the_only_one(tmp_path):
    """As after `hf download --revision`, which leaves no word of what main is."""
    snapshots, code = tmp_path / "hub/models--org--name/snapshots", """
import sys
import threading
from pathlib import Path
from weights import InputError
from weights.load import resolve
for digit in "12":
    folder = Path(sys.argv[1]) / (digit * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    try:
        print(resolve("org/name"))
    except InputError as error:
        print(error)
print(resolve("org/name@2222222"))                           # as git shortens it
try:
    resolve("org/name@222")
except InputError as error:
    print(error)
"""
    done = python(code, snapshots, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stderr.count("\n") == 2 and "1" * 40 in done.stderr
    one, two, short, shorter = done.stdout.splitlines()
    assert short == str(snapshots / ("2" * 40)) and "revision 222 is not in the hub cache; " in shorter
    assert one == str(snapshots / ("1" * 40))
    assert two.startswith("org/name: revision main is not in the") and "org/name@" + "1" * 40 in two


# ---- memory, quiet, command line ---------------------------------------------------------------------------------

PEAK = """
import json, sys, torch
from pathlib import Path
from weights.load import open_checkpoint

def peak():
    # Not ru_maxrss: a child starts with its parent's, which hides its own growth.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
folder = Path(sys.argv[1])
torch.randn(256, 256) @ torch.randn(256, 256)
torch.aminmax(torch.ones(1 << 10, dtype=torch.bfloat16))
start = peak()
checkpoint = open_checkpoint(folder)
opened = peak()
weights = checkpoint.load("cpu", torch.bfloat16)
kept = sum(t.nbytes for t in weights.values())
print(json.dumps([opened - start, peak() - opened, kept, max(s.nbytes for s in checkpoint.stored.values()),
                  (folder / "model.safetensors").stat().st_size]))
"""


def test_loading_holds_one_checkpoint_tensor_beside_the_engines(tmp_path):
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
              "num_attention_heads": 16, "vocab_size": 9216}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({on_disk(p.name, "llama"): torch.ones(p.shape) for w in plan(config).wanted for p in w.parts},
              tmp_path / "model.safetensors")
    done = python(PEAK, tmp_path)
    assert done.returncode == 0, done.stderr
    opened, loaded, kept, largest, on_disk_bytes = json.loads(done.stdout)
    slack = 24 << 20            # allocator and library pages; the file is 8 times that, so a second copy would show
    assert on_disk_bytes >= 200 << 20
    assert opened <= slack, f"opening took {opened:,} bytes"
    assert loaded <= kept + largest + slack, f"{loaded:,} bytes for {kept:,} kept and {largest:,} in the largest tensor"


def test_the_report_lists_every_tensor_and_every_leftover(tmp_path):
    config, tensors = CONFIGS["video_llava"], tensors_of(CONFIGS["video_llava"])
    tensors["video_tower.vision_model.post_layernorm.weight"] = torch.ones(8)
    write(tmp_path / "c", config, tensors)
    done = subprocess.run([sys.executable, "-m", "weights.load", str(tmp_path / "c"), "--check"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in tensors)
    assert all(f"\n{tensor.name} " in done.stdout for tensor in plan(config).wanted)
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) - 32
    assert f"{nbytes:,} bytes; 1 not read, 32 bytes\nevery value is finite; " in done.stdout


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(device, tmp_path, capsys):
    assert main([str(make(tmp_path / "c")), "--check", "--device", device]) == 2
    line = capsys.readouterr().err
    assert line.startswith("device ") and device in line and line.count("\n") == 1 and "use cpu" in line


def test_the_command_line_ends_in_2_and_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"{tmp_path}/config.json: no such file, ")


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
@golden
def test_the_gpu_holds_the_same_bits_as_the_cpu(name):
    checkpoint = open_checkpoint(FIXTURES / name)
    for dtype in (F32, torch.bfloat16):
        loaded = checkpoint.load("cuda", dtype)
        assert all(tensor.is_cuda for tensor in loaded.values())
        assert same({name: tensor.cpu() for name, tensor in loaded.items()}, checkpoint.load(CPU, dtype))
