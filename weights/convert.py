"""convert: pickled weights (.bin, .pt) to safetensors, once, without running a line of what they hold; or a drafter in
safetensors to 4 bits.

    python -m weights.convert checkpoints/eventgpt             # pytorch_model*.bin -> model*.safetensors beside them
    python -m weights.convert checkpoints/eventgpt converted/  # the same into another folder, with its small files
    python -m weights.convert best_model.pt adapter.safetensors
    python -m weights.convert --pack int4 checkpoints/eventgpt eventgpt-int4      # a drafter in 4 bits: 4.5 of 14.2 GB

torch's weights-only reader builds tensors and plain containers, and refuses the rest; there is no other reader here.
Tensors are mapped and written from where they lie, so a 10 GB shard needs no 10 GB of memory. Output appears under its
name only when all of it is written, and nothing is overwritten.
"""

import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, TensorSpec, serialize_file

from weights.files import (
    MAX_SMALL,
    InputError,
    Parser,
    Refused,
    brief,
    command,
    insist_whole_zip,
    names_in,
    naming,
    open_regular,
    reason_of,
    refusal,
    say,
)
from weights.load import INDEX, SINGLE, listed, open_checkpoint, pick_device, read_header, reject_impostor, shards_of

PICKLED = re.compile(r"(?i)\.(bin|pt|pth|ckpt)$")
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")      # where training scripts put the tensors
SMALL_FILES = re.compile(r"(?i)\.(json|model|txt)$")     # config and tokenizer, which a converted folder needs too


def convert(source, target=None) -> list:
    """The safetensors files made of `source`, a folder with pytorch_model*.bin or one pickled file: list of Path.

    target: a folder for a folder, a `.safetensors` name for a file; beside the source by default. Tensors that share
    memory are written out under each of their names. What else the file holds becomes metadata, if JSON can say it.
    """
    source = Path(source)
    if os.path.isdir(source):
        return convert_folder(source, Path(target or source))
    if not os.path.exists(source):
        raise refusal(source, "no such file or folder", "check the spelling")
    if not PICKLED.search(source.name):
        raise refusal(source, "wanted a folder or a pickled .bin, .pt, .pth or .ckpt file",
                      "safetensors files need no conversion")
    target = Path(target or source.with_suffix(".safetensors"))
    if os.path.isdir(target):
        target = target / source.with_suffix(".safetensors").name
    if target.suffix != ".safetensors":
        raise refusal(target, "the name of the result must end in .safetensors", "name it so")
    return write_all({source: target})


def convert_folder(source, target) -> list:
    """The shards in safetensors with their index, and copies of the small files if `target` is another folder."""
    old_index = source / "pytorch_model.bin.index.json"
    if os.path.exists(source / "pytorch_model.bin"):
        return write_all({source / "pytorch_model.bin": target / SINGLE}, copies(source, target))
    if not os.path.exists(old_index):
        found = [name for name in names_in(source) if PICKLED.search(name)]
        raise refusal(source, "no pytorch_model.bin and no pytorch_model.bin.index.json here"
                      + (f", only {listed(found)}" if found else ""), "give one file by its name")
    shards, weight_map = shards_of(old_index, r"pytorch_model[\w.-]*\.bin")
    jobs = {source / name: target / (name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors")
            for name in shards}
    return write_all(jobs, copies(source, target), (old_index, weight_map, target / INDEX))


def copies(source, target) -> dict:
    """{from: to} of config and tokenizer files that the target folder lacks."""
    if os.path.exists(target) and os.path.samefile(target, source):
        return {}
    return {source / name: target / name for name in names_in(source)
            if SMALL_FILES.search(name) and not name.endswith(".index.json") and not os.path.exists(target / name)
            and os.path.isfile(source / name) and os.path.getsize(source / name) <= MAX_SMALL}


def write_all(jobs, small_files=None, index=None) -> list:
    """Converts every file, then renames all results into place. Nothing is left behind if one of them fails."""
    outputs = [*jobs.values(), *([index[2]] if index else [])]
    if old := [path for path in outputs if os.path.lexists(path)]:
        raise refusal(old[0], f"exists already ({len(old)} of {len(outputs)} results do)",
                      "remove it first or give another target")
    folder = outputs[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as made:
            small_files, found, nbytes = small_files or {}, {}, 0
            there = {target: Path(made, str(i)) for i, target in enumerate([*small_files.values(), *outputs])}
            for source, target in jobs.items():
                write(source, there[target])
                for key, stored in read_header(there[target]).items():
                    if key in found:
                        raise refusal(source, f"{brief(key)} is also in {found[key]}", "ask its author for a sound "
                                      "file")
                    found[key], nbytes = target.name, nbytes + stored.nbytes
            if index:
                old_index, weight_map, path = index
                if wrong := sorted(set(found) ^ set(weight_map)):
                    raise refusal(old_index, f"{len(wrong)} names differ between index and shards: {listed(wrong)}",
                                  "copy the checkpoint again")
                there[path].write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": found}, indent=2))
            for source, target in small_files.items():
                shutil.copyfile(source, there[target])
            for target, path in there.items():               # the index last: it makes the folder a checkpoint
                os.rename(path, target)
    except OSError as error:
        raise refusal(error.filename2 or error.filename or folder, f"cannot be written or read ({reason_of(error)})",
                      "check the path, its permissions and the disk") from None
    return outputs


def write(source, target):
    """Writes the tensors of one pickled file as safetensors, from where they are mapped."""
    tensors, metadata = unpack(source, read_pickled(source))
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(target.parent).free
    if needed > free:
        raise refusal(source, f"needs {needed:,} bytes, the disk has {free:,} free", "give a target with more room")
    kept, specs = [], {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        kept.append(tensor)                             # serialize_file sees addresses only
        try:
            specs[name] = TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape),
                                     data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
        except (SafetensorError, ValueError) as error:
            raise refusal(source, f"{brief(name)} cannot be stored ({brief(error)})",
                          "convert a checkpoint in bf16, fp16 or fp32") from None
    try:
        serialize_file(specs, target, metadata=metadata)
    except ValueError as error:                         # UnicodeEncodeError
        raise refusal(source, f"holds text that is not UTF-8 ({brief(error)})", "save it with other names") from None
    except SafetensorError as error:
        raise refusal(target, f"cannot be written ({brief(error)})", "check the disk and its free space") from None
    shutil.copymode(source, target)                     # serialize_file's own choice shuts out everybody else


def read_pickled(path):
    """The tensors and plain containers of a torch file. Anything that would have to be called is refused by name."""
    with naming(path), open_regular(path, "a file of torch.save")[0] as file:
        first = file.read(64)
    if not first.startswith(b"PK"):
        reject_impostor(path, first)
    try:
        # Only torch's zip form can be mapped; the form before torch 1.6 is read by the same weights-only reader.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # about pickle protocols and storages; nothing a user can act on
            if zipped := zipfile.is_zipfile(path):
                with naming(path), zipfile.ZipFile(path) as archive:
                    insist_whole_zip(archive)
                    if any(of.compress_type and "/data/" in of.filename for of in archive.infolist()):   # is mapped
                        raise Refused("is zipped with compression, as torch.save never does", "unzip it, and zip it "
                                      "again with `zip -0 -r`")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:                          # what a damaged pickle does to the reader is open-ended
        refused = isinstance(error, pickle.UnpicklingError)
        # The class or function that was asked for. The reader's advice to switch its check off is not repeated.
        asked = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported class ([\w.]+)", str(error)) if refused else None
        if asked:
            raise refusal(path, f"asks to build {asked[1] or asked[2]}, refused: only tensors and plain containers are "
                          "read", "nothing of it was run; ask its author for safetensors, or for the tensors alone"
                          ) from None
        reason = "" if refused else f" ({reason_of(error)})"
        raise refusal(path, f"not a file of torch.save, or a damaged one{reason}",
                      "copy or download it again") from None


def unpack(path, content) -> tuple:
    """(tensors by name, metadata of strings) of what a torch file held."""
    if not isinstance(content, dict):
        raise refusal(path, f"holds a {type(content).__name__}, wanted a dict of tensors", "save its state_dict")
    rest = {}
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    if wrapper:
        rest = {key: value for key, value in content.items() if key != wrapper}
        content = content[wrapper]
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    rest.update((key, value) for key, value in content.items() if key not in tensors)
    # More values than stored ones (stride 0) would unfold a small file into one of any size.
    strange = [key for key, t in tensors.items() if type(key) is not str or key == "__metadata__"
               or t.layout != torch.strided
               or t.is_quantized or t.is_meta or t.nbytes > t.untyped_storage().nbytes()]
    if strange:
        raise refusal(path, f"{len(strange)} entries are no plain dense tensors with a name: "
                      f"{listed(map(str, strange))}", "convert a checkpoint in bf16, fp16 or fp32")
    if not tensors:
        raise refusal(path, f"holds no tensors, its keys are {listed(map(str, rest)) or 'none'}",
                      "give the file with the model's state_dict")
    metadata, left_out = {"format": "pt"}, []
    for key, value in rest.items():
        try:
            metadata[str(key)] = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            left_out.append(str(key))                   # an optimizer's state, as a rule
    if left_out:
        metadata["left_out"] = json.dumps(left_out)
    return tensors, metadata


@command
def main(argv=None) -> int:
    parser = Parser(prog="python -m weights.convert", description=__doc__)
    parser.add_argument("source", help="a folder with pytorch_model*.bin, or one .bin, .pt, .pth or .ckpt file; with "
                                       "--pack EventGPT's folder in safetensors")
    parser.add_argument("target", nargs="?", help="where to put the result; beside the source unless given")
    parser.add_argument("--pack", choices=("int4",), help="pack a drafter into the new folder TARGET")
    args = parser.parse_args(argv)
    if args.pack and args.target is None:
        raise refusal(args.source, "--pack makes a new folder and was given none", "name it behind the source")
    if args.pack:
        from weights.packed import save  # it brings Triton, a second of start that others need not
        found = save(open_checkpoint(args.source), args.target, pick_device(None))
    else:
        found = convert(args.source, args.target)
    for path in found:
        tensors = read_header(path).values() if path.suffix == ".safetensors" else ()
        say(f"{path}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors):,} bytes" if tensors else str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
