"""budget: which checkpoint a side is loaded from, in which form, and the memory that the two will take: from their
headers alone, before anything is loaded. A side is "target" or "drafter"."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch

from kernels.lookup import Ring
from kernels.quant import BITS, NotPackable, packed_bytes
from kernels.round import STATE
from kernels.skinny import Workspace
from weights.files import InputError, insist_file
from weights.load import DRAFTER_7B, TARGET_7B, open_checkpoint
from weights.memory import default_dtype, free_bytes, lacking, no_room, pick_device, settings, way_out
from weights.packed import replaced_bytes
from weights.shapes import TEXT_ROWS, memory_needs, rows_for, rows_of_sides, text_config

TINY = Path(__file__).resolve().parent / "tiny"
LOOKUP_ROWS = {True: 1 << 16, False: 1 << 13}    # ids of earlier answers that are searched, on a GPU and on a CPU


class Unpackable(InputError):
    """Weights whose shapes make no whole groups."""


def unpackable(side: str, path, error: NotPackable) -> Unpackable:
    flag = "drafter_dtype" if side == "drafter" else "self_draft"
    return Unpackable(f"{path}: cannot be packed ({error}); leave out {flag}")


def form_of(side: str, path, config: dict, drafter_dtype: str) -> str | None:
    """The packed form of a side's weights, one of BITS: what was asked for, or what a drafter's folder holds."""
    asked = None if side == "target" or drafter_dtype == "bf16" else drafter_dtype
    if config.get("packed") and asked not in (None, config["packed"]["form"]):
        raise InputError(f"{path}: holds 4-bit weights alone, drafter_dtype {asked} needs the original; take int4")
    return config["packed"]["form"] if config.get("packed") else asked


def open_model(side: str, path):
    """(config, Checkpoint) of one side, from its headers alone; the Checkpoint of `random-7b` is None."""
    if str(path) == "random-7b":
        return TARGET_7B if side == "target" else DRAFTER_7B, None
    checkpoint = open_checkpoint(path)
    if side == "target" and checkpoint.config.get("packed"):
        raise InputError(f"{path}: holds a drafter packed in 4 bits; a target is never packed, its answers would be "
                         f"another model's: give Video-LLaVA's folder")
    wanted, kind = "video_llava" if side == "target" else "EventChat_llama", checkpoint.config.get("model_type")
    if kind != wanted:
        raise InputError(f"{path}: holds a {kind} model, the {side} needs {wanted}; swap `eventgpt` and `videollava`?")
    return checkpoint.config, checkpoint


def model_name(target, tokenizer=None) -> str:
    """Names a target and its tokenizer: a hash of the checkpoint's fingerprint and of tokenizer.json. What a source
    saved belongs to one such name. InputError if a file is not there; nothing is loaded."""
    _, checkpoint = open_model("target", target)
    file = Path(tokenizer or (checkpoint.folder if checkpoint else TINY / "target") / "tokenizer.json")
    insist_file(file, "a tokenizer.json")
    name = checkpoint.fingerprint() if checkpoint else "random-7b"
    return hashlib.sha256(name.encode() + file.read_bytes()).hexdigest()[:16]


def kernel_bytes(side: str, config: dict, rows: int, gpu: bool, packed: str | None, itemsize: int) -> dict:
    """What kernels hold for one model: see `memory_needs`."""
    d = text_config(config)
    held = {"scratch": Workspace.nbytes(d.D, d.H, d.K, rows, side == "drafter") + 16 * (rows + STATE)}
    held["scratch"] += Ring.nbytes(LOOKUP_ROWS[gpu]) if side == "target" else 8 * (rows + 1)
    if packed:
        of_layers, of_head = BITS[packed]
        products = ((d.H + 2 * d.N) * d.K, d.D), (d.D, d.H * d.K), (2 * d.F, d.D), (d.D, d.F)
        held["packed"] = packed_bytes(d.V, d.D, of_head) + d.L * sum(packed_bytes(*of, of_layers) for of in products)
        if side == "target":
            held["scratch"] += Workspace.nbytes(d.D, d.H, d.K, rows, True)
        else:
            held["replaced"] = replaced_bytes(config, packed, itemsize)
            held["scratch"] += d.largest * itemsize * (gpu and packed == "int4")
    return held


def needs_of(side: str, config: dict, where: torch.device, dtype: torch.dtype, cache_rows=None, packed=None) -> dict:
    """`memory_needs` of one side on this device."""
    rows, gpu = cache_rows or rows_for(side, config), where.type == "cuda"
    held = kernel_bytes(side, config, rows, gpu, packed, dtype.itemsize)
    return memory_needs(side, config, dtype.itemsize, rows, gpu, held)


def memory_budget(eventgpt=None, videollava=None, device=None, drafter_device=None, dtype=None, cache_rows=None,
                  drafter_dtype="bf16", self_draft=None, text_rows=TEXT_ROWS) -> dict:
    """{side: {"device", "free", "rows" of its cache, and the parts of `memory_needs`}}, bytes, from headers alone.
    "packed" of the target is its 4-bit copy, see `engine.load_engine`. InputError if it cannot fit, with the settings
    that do: nothing is allocated then."""
    def budget_of(eventgpt, videollava, drafter_device, cache_rows, drafter_dtype, copied) -> dict:
        budget, rows = {}, rows_of_sides(cache_rows)
        for side, path, name in (("target", videollava, device), ("drafter", eventgpt, drafter_device or device)):
            if path is not None:
                config, where = open_model(side, path)[0], pick_device(name)
                of = rows[side] or rows_for(side, config, text_rows)
                packed = "int4" if side == "target" and copied else form_of(side, path, config, drafter_dtype)
                try:
                    needs = needs_of(side, config, where, dtype or default_dtype(where), of, packed)
                except NotPackable as error:
                    raise unpackable(side, path, error) from None
                budget[side] = {"device": str(where), "rows": of, **needs, "free": free_bytes(where)[0]}
        return budget

    asked = (eventgpt, videollava, drafter_device, cache_rows, drafter_dtype)
    if self_draft is None and pick_device(device).type == "cuda":
        with contextlib.suppress(Unpackable):
            if not lacking(budget := budget_of(*asked, True)):
                return budget
    if not (short := lacking(budget := budget_of(*asked, bool(self_draft)))):
        return budget
    where, kind = pick_device(device), str(dtype or default_dtype(pick_device(device))).removeprefix("torch.")
    found = {}
    for flags, given in settings(eventgpt, videollava, where).items():
        with contextlib.suppress(Unpackable):
            found[flags] = budget_of(*given)
    raise no_room(" and ".join(str(p) for p in (videollava, eventgpt) if p is not None), *short,
                  way_out(found, kind, where))
