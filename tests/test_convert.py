"""Pickled weights become safetensors with every value kept, and nothing that a pickle holds is ever run."""

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weights import InputError
from weights.convert import convert, main
from weights.load import INDEX, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
golden = pytest.mark.skipif(not FIXTURES.exists(), reason=f"{FIXTURES} is not here: golden checkpoints cannot be read")
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclasses.dataclass
class AdapterConfig:
    """Some training scripts store their config as an object."""
    width: int = 512


class Canary:
    """Touches a file if anything ever calls what it pickles to."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        call = {os.system: f"touch {self.path}", eval: f"open({str(self.path)!r}, 'w')"}
        return self.function, (call[self.function],)


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def pickle_shards(folder, tensors, count=2):
    """pytorch_model-*.bin and their index, as trainers write them."""
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05}-of-{count:05}.bin"
        torch.save({name: tensors[name] for name in names[i::count]}, folder / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


# ---- what converts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                   torch.uint8, torch.bool])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_every_value_is_kept(tmp_path, dtype, zipped):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 50
    tensors = {"plain": values.abs().to(dtype), "scalar": torch.ones((), dtype=dtype),
               "empty": torch.ones(0, 3, dtype=dtype)}
    torch.save(tensors, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    assert convert(tmp_path / "w.bin") == [tmp_path / "w.safetensors"]
    assert same(load_file(tmp_path / "w.safetensors"), tensors)


def test_tied_tensors_and_views_keep_name_and_value(tmp_path):
    embed = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"embed": embed, "head": embed, "row": embed[2:3], "turned": embed.T, "every_other": embed[:, ::2],
               "parameter": torch.nn.Parameter(embed[1])}
    torch.save(tensors, tmp_path / "w.bin")
    convert(tmp_path / "w.bin")
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_file_zipped_again_without_compression_and_deepspeeds_dict_keep_every_value(tmp_path):
    zipped_again(tmp_path / "w.bin", zipfile.ZIP_STORED)
    torch.save({"module": {"a": torch.ones(2000)}, "optimizer": None}, tmp_path / "mp_rank_00_model_states.pt")
    for path in ("w.bin", "mp_rank_00_model_states.pt"):
        assert same(load_file(convert(tmp_path / path)[0]), {"a": torch.ones(2000)})


def test_an_adapter_keeps_its_settings_as_metadata(tmp_path):
    state = {"embedding.weight": torch.ones(3, 2), "output_proj.1.bias": torch.zeros(3)}
    torch.save({"model_state_dict": state, "epoch": 2, "val_acc": 0.279, "adapter_type": "L4_Attention",
                "config": {"heads": 8}, "optimizer_state_dict": {"state": {0: torch.ones(2)}}},
               tmp_path / "best_model.pt")
    convert(tmp_path / "best_model.pt", tmp_path / "adapter.safetensors")
    assert same(load_file(tmp_path / "adapter.safetensors"), state)
    assert metadata(tmp_path / "adapter.safetensors") == {
        "format": "pt", "epoch": "2", "val_acc": "0.279", "adapter_type": "L4_Attention", "config": '{"heads": 8}',
        "left_out": '["optimizer_state_dict"]'}


@golden
@pytest.mark.parametrize("name", ["stories260k", "video_llava_tiny/mha", "eventgpt_tiny/checkpoint"])
@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_converted_folder_loads_like_the_original(tmp_path, name, shards, elsewhere):
    tensors = load_file(FIXTURES / name / "model.safetensors")
    source, target = tmp_path / "pickled", tmp_path / ("converted" if elsewhere else "pickled")
    source.mkdir()
    (source / "config.json").write_bytes((FIXTURES / name / "config.json").read_bytes())
    for folder in (source, target):
        if (FIXTURES / name / "clip").exists():
            (folder / "clip").mkdir(parents=True, exist_ok=True)
            (folder / "clip/config.json").write_bytes((FIXTURES / name / "clip/config.json").read_bytes())
    if shards:
        pickle_shards(source, tensors, shards)
    else:
        torch.save(tensors, source / BIN)
    torch.save({"a": 1}, source / "training_args.bin")          # never weights, and left alone
    with pytest.raises(InputError, match="python -m weights.convert"):
        open_checkpoint(source)
    outputs = convert(source, target if elsewhere else None)
    assert len(outputs) == (shards + 1 if shards else 1) and all(path.parent == target for path in outputs)
    ours = open_checkpoint(target).load("cpu", torch.float32)
    assert same(ours, open_checkpoint(FIXTURES / name).load("cpu", torch.float32))
    assert not list(tmp_path.rglob("*.partial"))


def test_the_result_can_be_read_by_whoever_could_read_the_source(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.bin")
    (tmp_path / "w.bin").chmod(0o640)
    convert(tmp_path / "w.bin")
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("function,name", [(os.system, "posix.system"), (eval, "eval")])
def test_a_pickled_call_is_named_and_never_made(tmp_path, function, name, zipped, capsys):
    canary = Canary(tmp_path / "canary", function)
    assert pickle.loads(pickle.dumps(canary)) is not None and (tmp_path / "canary").exists()   # it does bite
    (tmp_path / "canary").unlink()
    torch.save({"w": torch.ones(1), "x": canary}, tmp_path / "bad.bin", _use_new_zipfile_serialization=zipped)
    assert main([str(tmp_path / "bad.bin")]) == 2
    out, line = capsys.readouterr()
    assert out == "" and line.startswith(f"{tmp_path}/bad.bin: asks to build {name}, refused") and line.count("\n") == 1
    assert "weights_only" not in line and "trust" not in line           # the unsafe switch is not advertised
    assert sorted(os.listdir(tmp_path)) == ["bad.bin"]


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_never_run(tmp_path, protocol):
    (tmp_path / "bad.bin").write_bytes(pickle.dumps({"x": Canary(tmp_path / "canary")}, protocol=protocol))
    with pytest.raises(InputError, match="asks to build posix.system, refused|not a file of torch.save"):
        convert(tmp_path / "bad.bin")
    assert sorted(os.listdir(tmp_path)) == ["bad.bin"]


def test_an_adapter_with_a_pickled_class_is_refused_by_name(tmp_path):
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "config": AdapterConfig()}, tmp_path / "l1.pt")
    with pytest.raises(InputError, match=r"l1.pt: asks to build .*test_convert.AdapterConfig, refused"):
        convert(tmp_path / "l1.pt")


def test_a_tensor_called_as_the_metadata_is_refused_in_the_name_of_its_file(tmp_path):
    torch.save({"__metadata__": torch.ones(2)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="m.pt: 1 entries .*: __metadata__; "):
        convert(tmp_path / "m.pt")


def test_a_module_in_place_of_its_tensors_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(InputError, match="asks to build torch.nn.modules.linear.Linear, refused"):
        convert(tmp_path / "m.pt")


def saved(content):
    return lambda path: torch.save(content, path)


def zipped_again(path, how=zipfile.ZIP_DEFLATED):
    """What torch saved, unzipped and zipped by somebody else."""
    torch.save({"a": torch.ones(2000)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", how) as new:
        for name, content in entries.items():
            new.writestr(name, content)
        new.writestr("w/code/remark.py", "#" * 999, zipfile.ZIP_DEFLATED)        # as TorchScript has them, not mapped


@pytest.mark.parametrize("spoil,said", [
    (lambda path: path.write_bytes(b""), "0 bytes, wanted a file of torch.save"),
    (lambda path: path.write_text("<!doctype html>"), "is a web page"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer"),
    (lambda path: path.write_text('{"a": 1}'), "not a file of torch.save"),
    (lambda path: path.write_bytes(random.Random(0).randbytes(3000)), "not a file of torch.save"),
    (lambda path: path.write_bytes(b"PK\x03\x04" + random.Random(0).randbytes(3000)), "not a file of torch.save"),
    (lambda path: [saved({"a": torch.ones(9)})(path), os.truncate(path, path.stat().st_size // 2)],
     "not a file of torch.save"),
    (lambda path: [saved({"a": torch.ones(9)})(path), path.write_bytes(2 * path.read_bytes())],
     "holds bytes that are no part of its zip"),
    (zipped_again, "is zipped with compression, .* `zip -0 -r`"),            # its mapped bytes passed for values
    (lambda path: save_file({"a": torch.ones(2000)}, path), "is a safetensors file; let its name end in .safetensors"),
    (saved([torch.ones(1)]), "holds a list, wanted a dict"),
    (saved({"epoch": 3}), "holds no tensors, its keys are epoch"),
    (saved({}), "holds no tensors, its keys are none"),
    (saved({3: torch.ones(1)}), "1 entries are no plain dense tensors with a name: 3"),
    (saved({"a": torch.eye(2).to_sparse()}), "no plain dense tensors with a name: a"),
    (saved({"a": torch.ones(1, dtype=torch.complex128)}), "a cannot be stored"),
    (saved({"a": torch.ones(1).expand(1 << 40)}), "no plain dense tensors with a name: a"),     # 4 TiB of one value
], ids=lambda value: value.split(",")[0] if isinstance(value, str) else None)
def test_a_file_that_holds_no_tensors_is_one_line(tmp_path, spoil, said):
    spoil(tmp_path / "w.bin")
    with pytest.raises(InputError, match=said) as error:
        convert(tmp_path / "w.bin")
    assert str(error.value).startswith(f"{tmp_path}/w.bin: ") and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["w.bin"]


def test_nothing_is_overwritten(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / BIN)
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(InputError, match="model.safetensors: exists already .* remove it first"):
        convert(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine" and len(os.listdir(tmp_path)) == 2


def test_a_bad_last_shard_leaves_nothing_behind(tmp_path):
    pickle_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)})
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"PK")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match="pytorch_model-00002-of-00002.bin: not a file of torch.save"):
        convert(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("spoil,said", [
    (lambda d: (d / "pytorch_model-00001-of-00002.bin").unlink(), "1 of 2 shards missing: pytorch_model-00001"),
    (lambda d: (d / BIN_INDEX).write_text("{}"), "weight_map is not a table"),
    (lambda d: (d / BIN_INDEX).write_text('{"weight_map": {"a": "../../x.bin"}}'), "names files outside its folder"),
    (lambda d: (d / BIN_INDEX).write_text((d / BIN_INDEX).read_text().replace('"a"', '"c"')), "2 names differ.*: a, c"),
    (lambda d: torch.save({"b": torch.ones(3), "a": torch.ones(1)}, d / "pytorch_model-00002-of-00002.bin"),
     "a is also in model-00001-of-00002.safetensors"),
    (lambda d: (d / BIN_INDEX).unlink(), "no pytorch_model.bin and no .*index.json here, only pytorch_model-00001"),
])
def test_a_folder_whose_shards_do_not_fit_is_refused(tmp_path, spoil, said):
    pickle_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)})
    spoil(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=said):
        convert(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before and INDEX not in before


@pytest.mark.parametrize("source,target,said", [
    ("nothing.bin", None, "no such file or folder"),
    ("w.safetensors", None, "need no conversion"),
    ("w.bin", "out.bin", "must end in .safetensors"),
    ("w.bin", "w.bin/out.safetensors", "cannot be written or read"),
])
def test_names_that_make_no_sense_are_refused(tmp_path, source, target, said):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.bin")
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(InputError, match=said):
        convert(tmp_path / source, target and tmp_path / target)


def test_damaged_pickles_end_in_input_error(tmp_path):
    """400 seeded mutations of both formats: converted or refused by name; nothing else comes out, nothing stays."""
    content = {"a": torch.ones(3), "b": {"c": [1, 2.0, "x"]}}
    torch.save(content, tmp_path / "zip.bin")
    torch.save(content, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    rng, path, refused = random.Random(2), tmp_path / "mutant.bin", 0
    for i in range(400):
        mutant = bytearray((tmp_path / ("zip.bin", "old.bin")[i % 2]).read_bytes())
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(len(mutant), 400))           # where both formats keep the pickle
            mutant[at:at + rng.choice([0, 1, 1, 1, 4])] = rng.randbytes(rng.choice([0, 1, 1]))
        path.write_bytes(mutant)
        try:
            for output in convert(path):
                output.unlink()
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert sorted(os.listdir(tmp_path)) == ["mutant.bin", "old.bin", "zip.bin"]
    assert refused > 100


def test_converting_and_loading_need_no_numpy(tmp_path):
    code = """
import sys
sys.modules["numpy"] = None
from pathlib import Path
import weights
import torch
from weights.convert import convert
from weights.load import open_checkpoint, random_tensors
folder = Path(sys.argv[1])
config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "vocab_size": 10}
from weights.names import on_disk, plan
torch.save({on_disk(p.name, "llama"): torch.full(p.shape, 0.5) for w in plan(config).wanted for p in w.parts},
           folder / "pytorch_model.bin")
(folder / "config.json").write_text(__import__("json").dumps(config))
convert(folder)
for dtype in (torch.float32, torch.bfloat16):
    loaded = open_checkpoint(folder).load("cpu", dtype)
    assert all((tensor == 0.5).all() for tensor in loaded.values())
assert dict(random_tensors(config, "cpu", torch.bfloat16, 0)).keys() == loaded.keys()
assert sys.modules["numpy"] is None
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_names_what_it_wrote(tmp_path, capsys):
    torch.save({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / BIN)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/model.safetensors: 2 tensors, 12 bytes\n", "")
