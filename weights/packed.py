"""packed: a drafter whose decoder exists in 4 bits alone: packed weight by weight as it is read, saved, read again.

    weights = dict(packing(checkpoint.tensors(device, dtype), turn))      # no two full products at a time
    save(checkpoint, "eventgpt-int4")                        # python -m weights.convert --pack int4

A saved folder holds the checkpoint's small files, a config.json with a section `packed`, and a model.safetensors whose
tensors have the engine's names: NAME.words and NAME.scales of each product (kernels/quant.py), all others as they were.
"""

import ctypes
import json
import os
import shutil
import statistics
import tempfile
from math import prod
from pathlib import Path

import torch

from kernels.quant import BLOCK, HEAD_BITS, LAYER_BITS, TILE, NotPackable, Packed, group_of, quantise, uneven
from weights.files import brief, reason_of, refusal
from weights.names import Part, Plan, Wanted, plan
from weights.shapes import text_config

PRODUCTS = {"qkv": "attn_norm", "o": None, "gate_up": "mlp_norm", "down": None}  # a layer's, and the norm in front
FORM, VERSION = "int4", 1                                    # what can be saved, and how it is laid out
SOME = 128                                                   # rows of a weight that show whether it is uneven
DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def is_product(name: str) -> bool:
    return name == "text.head" or name.startswith("text.layers.") and name.rpartition(".")[2] in PRODUCTS


def norm_before(name: str) -> str | None:
    """The norm in front of one of the decoder's products."""
    layer, _, kind = name.rpartition(".")
    return "text.norm" if name == "text.head" else PRODUCTS[kind] and f"{layer}.{PRODUCTS[kind]}"


def bits_of(name: str) -> int:
    """Of a product's packed weight."""
    return HEAD_BITS if name == "text.head" else LAYER_BITS


def gains_by_turning(rows_of, L: int) -> bool:
    """Whether a model loses less if its stream is turned (`kernels.quant.turned`). rows_of: name -> some rows."""
    pairs = [(f"text.layers.{i}.{of}", f"text.layers.{i}.{norm}") for i in range(L) for of, norm in PRODUCTS.items()
             if norm]
    return statistics.mean(uneven(rows_of(of), rows_of(norm)) for of, norm in pairs) > 3.5


def packing(tensors, turn: bool):
    """(name, tensor) pairs, a norm before what reads it, to the same with a Packed in place of each product of the
    decoder. What is folded in, a norm's weight, comes as ones. A tied head is packed."""
    norms, embed, head = {}, None, False
    for name, tensor in tensors:
        if is_product(name):
            norm, head = norm_before(name), head or name == "text.head"
            yield name, quantise(tensor, bits_of(name), norms[norm] if norm else None, turn)
        elif name.startswith("text.") and name.endswith("norm"):
            norms[name] = tensor
            yield name, torch.ones_like(tensor)
        else:
            embed = tensor if name == "text.embed" else embed
            yield name, tensor
        del tensor                                           # else it would stay while the next one is read
    if not head:
        yield "text.head", quantise(embed, HEAD_BITS, norms["text.norm"], turn)


def replaced_bytes(config: dict, itemsize: int) -> int:
    """Bytes of full weights that a packed model does without."""
    return itemsize * sum(of.numel for of in plan(config).wanted if is_product(of.name))


# ---- saved -------------------------------------------------------------------------------------------------------


def packed_plan(config: dict, full: Plan, where) -> Plan:
    """What a saved folder holds. InputError if its config's section `packed` is not one that `save` wrote."""
    section = config["packed"]
    if not isinstance(section, dict) or (section.get("form"), section.get("version"), type(section.get("turned"))) != (
            FORM, VERSION, bool) or full.kind != "EventChat_llama":
        raise refusal(where, f"packed is {brief(section)} for {full.kind}, wanted a drafter's form {FORM!r}, version "
                      f"{VERSION}", "pack the original again with `python -m weights.convert --pack int4 DIR OUT`")
    shapes = {wanted.name: wanted.shape for wanted in full.wanted}
    shapes.setdefault("text.head", shapes["text.embed"])
    found = []
    for name, shape in shapes.items():
        if is_product(name):
            O, D = shape
            try:
                parts = {"words": ((-(-O // TILE), D // BLOCK, bits_of(name) // 4, 32, 4), "I32"),
                         "scales": ((-(-O // TILE), D // group_of(D), 8, 2), "F16")}
            except NotPackable as error:
                raise refusal(where, f"names a packed model, and {name} cannot be one ({error})",
                              "copy config.json from the packed folder again") from None
            found += [Wanted(f"{name}.{part}", size, (Part(f"{name}.{part}", size, 0),), dtype)
                      for part, (size, dtype) in parts.items()]
        else:
            found.append(Wanted(name, shape, (Part(name, shape, 0),)))
    return Plan("packed", tuple(found), frozenset())


def assembled(tensors, config: dict):
    """The pairs of a saved folder, with a Packed for each two."""
    shapes = {wanted.name: wanted.shape for wanted in plan(config).wanted}
    shapes.setdefault("text.head", shapes["text.embed"])
    halves: dict = {}
    for name, tensor in tensors:
        base, _, part = name.rpartition(".")
        if not is_product(base):
            yield name, tensor
            continue
        halves.setdefault(base, {})[part] = tensor
        if len(halves[base]) == 2:
            (O, D), of = shapes[base], halves.pop(base)
            yield base, Packed(of["words"], of["scales"], O, bits_of(base), group_of(D), norm_before(base) is not None)


def save(checkpoint, out, device="cpu") -> list:
    """Packs a drafter's checkpoint into the new folder `out`: list of Path. It appears when all of it is written; in
    memory is one tensor at a time. InputError if it cannot be done."""
    config, out = checkpoint.config, Path(out)
    if config["model_type"] != "EventChat_llama" or config.get("packed"):
        what = "is packed already" if config.get("packed") else f"holds a {config['model_type']} model"
        raise refusal(checkpoint.folder, f"{what}, wanted EventGPT, the drafter: a packed target's answers would be "
                      "another model's", "give the drafter's folder")
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise refusal(out, "exists already", "remove it first or give another target")
    turn = gains_by_turning(checkpoint.some_rows, text_config(config).L)
    config = config | {"packed": {"form": FORM, "version": VERSION, "turned": turn, "of": checkpoint.fingerprint()}}
    try:
        wanted = packed_plan(config, plan(config), checkpoint.folder)
        kept = {stored.dtype for stored in checkpoint.stored.values()}
        dtype = kept.pop() if len(kept) == 1 and kept <= DTYPES.keys() else "F32"
        tensors = packing(checkpoint.tensors(device, DTYPES[dtype]), turn)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{os.getpid()}.", suffix=".partial", dir=out.parent) as name:
            folder = Path(name) / out.name
            folder.mkdir()
            for small in ("tokenizer.json", "generation_config.json"):
                if os.path.isfile(checkpoint.folder / small):
                    shutil.copyfile(checkpoint.folder / small, folder / small)
            write(folder / "model.safetensors", wanted, dtype, tensors)
            (folder / "config.json").write_text(json.dumps(config, indent=1))
            os.replace(folder, out)
    except OSError as error:
        raise refusal(error.filename or out, f"cannot be written or read ({reason_of(error)})",
                      "check the path, its permissions and the disk") from None
    except NotPackable as error:
        raise refusal(checkpoint.folder, f"cannot be packed ({error})", "use it as it is") from None
    return [out / name for name in sorted(os.listdir(out))]


def write(path, wanted: Plan, dtype: str, tensors) -> None:
    """A safetensors file of the plan's tensors, each written as it comes: the library wants all of them at once."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt", "packed": FORM, "version": str(VERSION)}}
    end = 0
    for of in wanted.wanted:
        begin, end = end, end + prod(of.shape) * DTYPES[of.dtype or dtype].itemsize
        header[of.name] = {"dtype": of.dtype or dtype, "shape": list(of.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    free = shutil.disk_usage(Path(path).parent).free
    if end > free:
        raise refusal(path, f"needs {end / 1e9:.3f} GB, the disk has {free / 1e9:.3f} free", "choose another disk")
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in tensors:
            parts = {f"{name}.words": tensor.words, f"{name}.scales": tensor.scales} if isinstance(
                tensor, Packed) else {name: tensor}
            for key, part in parts.items():
                part = part.cpu().contiguous()
                assert header[key]["dtype"] == {v: k for k, v in DTYPES.items()}[part.dtype], key
                assert tuple(header[key]["shape"]) == part.shape, key
                file.seek(8 + len(head) + header[key]["data_offsets"][0])
                file.write((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
            del tensor, part, parts
        file.flush()
        os.fsync(file.fileno())
