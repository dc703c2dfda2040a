"""packed: a drafter in 4 bits is the same read packed or packed while it is read; what is no such folder is refused."""

import itertools
import json
import os
import shutil

import pytest
import torch
from common import ROOT, TINY, asked
from safetensors.torch import load_file, save_file

import engine
import weights.load
import weights.packed
from engine import InputError
from weights import convert
from weights.load import open_checkpoint
from weights.names import plan
from weights.packed import save
from weights.shapes import DecoderConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "drafter"
    assert convert.main(["--pack", "int4", str(TINY / "drafter"), str(out)]) == 0
    return out


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "own")


def test_a_saved_drafter_holds_the_bits_of_one_packed_while_it_is_read(folder):
    ours = engine.load_model(engine.Drafter, folder, "cpu")          # whatever --drafter-dtype says
    theirs = engine.load_model(engine.Drafter, TINY / "drafter", "cpu", packed=True)
    assert ours.config == theirs.config and ours.stops == theirs.stops and ours.vision == theirs.vision
    assert ours.decoder.w.keys() == theirs.decoder.w.keys() and ours.decoder.steps.packed
    for name, a in ours.decoder.w.items():
        b = theirs.decoder.w[name]
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        else:
            assert torch.equal(a.words, b.words) and torch.equal(a.scales, b.scales), name
            assert (a.O, a.bits, a.group, a.normed) == (b.O, b.bits, b.group, b.normed)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.7 * (TINY / "drafter" / "model.safetensors").stat().st_size
    assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json", "model.safetensors",
                                          "tokenizer.json"]


def test_it_drafts_beside_the_target(folder):
    e = engine.load_engine(folder, TINY / "target", device="cpu", gate=False)
    result = e.generate(mode="speculative", draft_source="drafter", **asked(0))
    assert result.accepted_tokens > 0
    assert result.output_ids == e.generate(mode="target_only", **asked(0)).output_ids


# ---- what is refused, in one line


def one_line(call, *parts):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


def drafter(path):
    return lambda: engine.load_model(engine.Drafter, path, "cpu")


def test_it_is_no_target(folder):
    one_line(lambda: engine.load_model(engine.Target, folder, "cpu"), str(folder), "never packed", "Video-LLaVA")


@pytest.mark.parametrize("name,damage,parts", [
    ("truncated", lambda own: os.truncate(own / "model.safetensors", 100_000), ["truncated: wanted"]),
    ("of another version", lambda own: edit(own, packed={"form": "int4", "version": 2, "turned": False}),
     ["packed is", "pack the original again"]),
    ("in a form that is gone", lambda own: edit(own, packed={"form": "fp8+int4", "version": 1, "turned": False}),
     ["packed is", "fp8+int4", "wanted a drafter's form 'int4'", "pack the original again"]),
    ("of another kind", lambda own: edit(own, packed="nf4"), ["packed is nf4", "pack the original again"]),
    ("without its section", lambda own: edit(own, packed=None), ["a drafter packed by weights.convert"]),
    ("under another config", lambda own: edit(own, intermediate_size=192), ["misshapen", "config.json wants"]),
    ("with full weights", lambda own: shutil.copy(TINY / "drafter" / "model.safetensors", own), ["missing"]),
    ("with a weight less", lambda own: rewrite(own, lambda t: t.pop("text.layers.1.o.words")),
     ["1 tensor missing: text.layers.1.o.words"]),
    ("with scales of NaN", lambda own: rewrite(own, lambda t: t["text.layers.0.qkv.scales"].fill_(float("nan"))),
     ["NaN or infinity in 1 tensor: text.layers.0.qkv.scales"]),
    ("with words of 64 bits", lambda own: rewrite(own, lambda t: t.update({"text.layers.1.o.words": t[
        "text.layers.1.o.words"].long()})), ["text.layers.1.o.words is I64"])], ids=lambda of: of if isinstance(
            of, str) else "")
def test_a_damaged_or_foreign_folder_is_refused(own, name, damage, parts):
    damage(own)
    one_line(drafter(own), str(own), *parts)


def edit(folder, **change):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- what packing leaves behind


@pytest.mark.parametrize("source,parts", [
    (TINY / "target", ["holds a video_llava model", "give the drafter's folder"]), (ROOT, ["config.json"])], ids=str)
def test_what_is_no_drafter_is_not_packed(source, parts, tmp_path, capsys):
    assert convert.main(["--pack", "int4", str(source), str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts) and not any(tmp_path.iterdir())


def test_packing_twice_over_a_folder_or_to_nowhere_is_refused(folder, own, capsys):
    for words, part in (([str(folder), str(own / "x")], "is packed already"), ([str(TINY / "drafter")], "name it"),
                        ([str(TINY / "drafter"), str(own)], "exists already")):
        assert convert.main(["--pack", "int4", *words]) == 2
        assert part in capsys.readouterr().err
    assert sorted(os.listdir(own)) == sorted(os.listdir(folder))


def test_a_disk_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    def fails(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(weights.packed.os, "fsync", fails)
    one_line(lambda: save(open_checkpoint(TINY / "drafter"), tmp_path / "out"), "No space left on device")
    assert not any(tmp_path.iterdir())


def test_a_source_with_nan_leaves_nothing(tmp_path):
    source = shutil.copytree(TINY / "drafter", tmp_path / "source")
    rewrite(source, lambda t: t["lm_head.weight"].view(-1)[7:8].fill_(float("nan")))
    one_line(lambda: save(open_checkpoint(source), tmp_path / "out"), "NaN or infinity in 1 tensor")
    assert os.listdir(tmp_path) == ["source"]


# ---- what loading relies on


@pytest.mark.parametrize("F,N", [(128, 4), (512, 4), (128, 1), (300, 2)])
def test_the_room_that_prefill_unpacks_into_holds_any_weight_of_a_layer(F, N):
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": F, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": N, "vocab_size": 64}
    sizes = [wanted.numel for wanted in plan(config).wanted if weights.packed.is_product(wanted.name)
             and wanted.name != "text.head"]
    assert DecoderConfig.read(config).largest == max(sizes) and len(sizes) == 4


def test_a_checkpoint_is_read_one_matrix_after_the_other(monkeypatch):
    """The drafter's file has o between k and q; vectors come first, for they are folded into what follows them."""
    read, checkpoint = [], open_checkpoint(TINY / "drafter")
    real = weights.load.Buffer.read
    monkeypatch.setattr(weights.load, "READERS", 1)          # one thread reads in the order of the jobs
    monkeypatch.setattr(weights.load.Buffer, "read", lambda self, file, data, stored, *more: (
        read.append(stored.key), real(self, file, data, stored, *more))[1])
    seen = [(name, tensor.dim()) for name, tensor in checkpoint.tensors("cpu", torch.float32)]
    owner = {checkpoint.stored[part.name].key: wanted.name for wanted in checkpoint.plan.wanted
             for part in wanted.parts}
    order = [owner[key] for key in read]
    assert len(set(order)) == 1 + sum(a != b for a, b in itertools.pairwise(order)), "a tensor is taken up again"
    dims = [dim for _, dim in seen]
    assert dims == sorted(dims, key=lambda dim: dim > 1) and len(seen) == len(checkpoint.plan.wanted)
