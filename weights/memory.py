"""memory: what a device has left and who holds the rest; what a pair of checkpoints takes, from their headers alone;
and the line that says so when it is not enough. A side is "target" or "drafter"."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import subprocess
from pathlib import Path

import torch

from kernels.lookup import Ring
from kernels.quant import HEAD_BITS, LAYER_BITS, NotPackable, packed_bytes
from kernels.round import STATE
from kernels.skinny import Workspace
from weights.files import InputError, insist_file, insist_one_of, refusal
from weights.load import DRAFTER_7B, TARGET_7B, open_checkpoint, pick_device
from weights.packed import replaced_bytes
from weights.shapes import TEXT_ROWS, memory_needs, rows_for, rows_of_sides, text_config

TINY = Path(__file__).resolve().parent / "tiny"
LOOKUP_ROWS = {True: 1 << 16, False: 1 << 13}    # ids of earlier answers that are searched, on a GPU and on a CPU
DRAFTER_DTYPES = ("bf16", "int4")
PARTS = ("weights", "cache", "parked", "packed", "scratch")  # of what one side needs; "parked", "packed" if there is
ENOUGH_ELSEWHERE = "lower `cache_rows`, free memory, or choose another `device`"


def as_dtype(dtype) -> torch.dtype | None:
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype is None or isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    insist_one_of("dtype", dtype, known)
    return known[dtype]


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_bytes(device: torch.device) -> tuple[int, int]:
    """(free, whole) bytes of a device. What torch keeps for reuse counts as free, what the process may not take (by
    `torch.cuda.set_per_process_memory_fraction`) does not; on the host, what Linux could hand out without swapping."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        held, most = torch.cuda.memory_reserved(device), whole
        if (share := torch.cuda.get_per_process_memory_fraction(device)) < 1:
            most = int(share * whole)
            free = max(0, min(free, most - held))
        return free + held - torch.cuda.memory_allocated(device), most
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, whole = (int(facts[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    return free, whole


def bytes_of(budget: dict) -> int:
    """The sum of what each side needs, of `memory_budget`."""
    return sum(of.get(part, 0) for of in budget.values() for part in PARTS)


def lacking(budget: dict) -> tuple[torch.device, dict] | None:
    """The first device that a budget does not fit, and what it should hold: what for -> bytes."""
    for device in dict.fromkeys(of["device"] for of in budget.values()):
        sides = {side: of for side, of in budget.items() if of["device"] == device}
        if bytes_of(sides) > min(of["free"] for of in sides.values()):
            return torch.device(device), {f"{side} {part}": of[part] for side, of in sides.items() for part in PARTS
                                          if part in of}
    return None


def settings(eventgpt, videollava, where: torch.device) -> dict:
    """{flags of bench.py: (drafter, target, drafter's device, cache rows, drafter's dtype, whether the target has a
    4-bit copy)} of what a device may have room for, the cheapest first, and last the drafter alone."""
    at = f" --device {where}" * (where != pick_device(None))
    other = next((f"cuda:{i}" for i in range(torch.cuda.device_count()) if f"cuda:{i}" != str(where)), None)
    alone = f"--videollava {videollava} --modes target_only,speculative --draft-source lookup"
    pair = f"--eventgpt {eventgpt} --videollava {videollava}"
    found: dict[str, tuple] = {}
    if videollava:
        found |= {f"{alone}{at}": (None, videollava, None, None, "bf16", False),
                  f"{alone},self{at}": (None, videollava, None, None, "bf16", True)}
    if videollava and eventgpt:
        found[f"{pair} --drafter-dtype int4{at}"] = eventgpt, videollava, None, None, "int4", False
    if videollava and eventgpt and other:
        found[f"{pair}{at} --drafter-device {other}"] = eventgpt, videollava, other, None, "bf16", False
    if eventgpt:
        found[f"--eventgpt {eventgpt} --modes drafter_only --drafter-dtype int4{at}"] = (
            eventgpt, None, None, None, "int4", False)
    return found


def way_out(budgets: dict, kind: str, where: torch.device) -> str:
    """What to do instead. budgets: {flags: budget} of `settings`; kind: the dtype's name."""
    smallest = next(iter(budgets.values()), {})
    target_fits, has_target = not lacking(smallest), "target" in smallest
    said = ", ".join(f"{bytes_of(of) / 1e9:.1f} GB `{flags}`" for flags, of in budgets.items()
                     if not lacking(of) and ("target" in of) == (has_target and target_fits))
    if has_target and not target_fits:
        return (f"the {kind} target needs {smallest['target']['weights'] / 1e9:.1f} GB for its weights, "
                f"{bytes_of(smallest) / 1e9:.1f} in all, and is never packed: {f'take {said}, ' * bool(said)}free "
                f"memory, or choose another `device`{', cpu' * (where.type != 'cpu')}")
    if said:
        return f"lower `cache_rows`, or take what fits, the most last, as flags of bench.py: {said}"
    return ENOUGH_ELSEWHERE


def nvidia_smi(device: torch.device, query: str) -> list[list[str]]:
    """Rows of `nvidia-smi --query-...` for a device, split at commas; [] where the command does not answer. By the
    card's own number: CUDA_VISIBLE_DEVICES may have given it another one here."""
    try:
        card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except (AssertionError, AttributeError, RuntimeError):   # no such device, or a torch that does not tell
        card = str(device.index or 0)
    try:
        out = subprocess.run(["nvidia-smi", "-i", card, query, "--format=csv,noheader"], capture_output=True, text=True,
                             errors="replace", timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split(", ") for line in out.splitlines() if line.strip()]


def holders(device: torch.device, most: int = 3) -> list[str]:
    """Who holds most of a device's memory, as far as one may see: "NAME (pid N, X GB)"."""
    found = []                                               # (bytes, name, pid)
    if device.type == "cuda":
        for row in nvidia_smi(device, "--query-compute-apps=pid,process_name,used_memory"):
            if len(row) == 3 and row[2].split()[0].isdecimal():
                found.append((int(row[2].split()[0]) << 20, row[1], row[0]))
    else:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                pages = int((folder / "statm").read_text().split()[1])
                found.append((pages * os.sysconf("SC_PAGE_SIZE"), (folder / "comm").read_text().strip(), folder.name))
            except (OSError, ValueError, IndexError):        # it has ended meanwhile
                continue
    return [f"{name} (pid {pid}, {nbytes / 1e9:.1f} GB)" for nbytes, name, pid in sorted(found, reverse=True)[:most]]


def no_room(path, device: torch.device, parts: dict, way_out: str = ENOUGH_ELSEWHERE) -> InputError:
    """The refusal, in GB: what is needed, for what, what is free, and who holds the rest. parts: what for -> bytes."""
    free, whole = (n / 1e9 for n in free_bytes(device))
    needs = ", ".join(f"{name} {n / 1e9:.3f}" for name, n in parts.items())
    held = holders(device)
    return refusal(path, f"needs {sum(parts.values()) / 1e9:.3f} GB ({needs}), {device} has {free:.3f} of "
                   f"{whole:.3f} GB free{', most is held by ' * bool(held)}{', '.join(held)}", way_out)


def peak_memory(device) -> int:
    """Bytes: the most this process held on a GPU since the request began, or the process's peak on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- what a pair takes ----------------------------------------------------------------------------------------


class Unpackable(InputError):
    """Weights of a side whose shapes make no whole groups, or whose values are too large."""

    def __init__(self, side: str, path, error: NotPackable):
        self.why = f"cannot be packed ({error})"
        super().__init__(f"{path}: {self.why}; leave out {'drafter_dtype' if side == 'drafter' else 'self_draft'}")


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


def needs_of(side: str, config: dict, where: torch.device, dtype: torch.dtype, cache_rows=None, packed=False,
             several=1) -> dict:
    """`memory_needs` of one side on this device. "parked": room for each of several clips' keys and values."""
    d, rows, gpu = text_config(config), cache_rows or rows_for(side, config), where.type == "cuda"
    held = {"scratch": Workspace.nbytes(d.D, d.H, d.K, rows) + 16 * (rows + STATE)}
    held["scratch"] += Ring.nbytes(LOOKUP_ROWS[gpu]) if side == "target" else 8 * (rows + 1)
    if packed:
        products = ((d.H + 2 * d.N) * d.K, d.D), (d.D, d.H * d.K), (2 * d.F, d.D), (d.D, d.F)
        held["packed"] = packed_bytes(d.V, d.D, HEAD_BITS) + d.L * sum(packed_bytes(*of, LAYER_BITS) for of in products)
        if side == "drafter":
            held["replaced"] = replaced_bytes(config, dtype.itemsize)
            held["scratch"] += d.largest * dtype.itemsize * gpu
    needs = memory_needs(side, config, dtype.itemsize, rows, gpu, held)
    return needs | {"parked": several * 2 * d.L * d.N * d.K * rows * dtype.itemsize} if several > 1 else needs


def memory_budget(eventgpt=None, videollava=None, device=None, drafter_device=None, dtype=None, cache_rows=None,
                  drafter_dtype="bf16", self_draft=None, text_rows=TEXT_ROWS, several=1) -> dict:
    """{side: {"device", "free", "rows" of its cache, and the parts of `memory_needs`}}, bytes, from headers alone.
    "packed" of the target is its 4-bit copy, see `engine.load_engine`, "no_copy" why there is none where one is made if
    it can be. InputError if it cannot fit, with the settings that do: nothing is allocated then."""
    def budget_of(eventgpt, videollava, drafter_device, cache_rows, drafter_dtype, copied, several=1) -> dict:
        budget, rows = {}, rows_of_sides(cache_rows)
        for side, path, own in (("target", videollava, None), ("drafter", eventgpt, drafter_device)):
            if path is not None:
                config = open_model(side, path)[0]
                where = pick_device(device) if own is None else pick_device(own, "drafter_device")
                of = rows[side] or rows_for(side, config, text_rows)
                packed = copied if side == "target" else drafter_dtype == "int4" or bool(config.get("packed"))
                try:
                    needs = needs_of(side, config, where, dtype or default_dtype(where), of, packed, several)
                except NotPackable as error:
                    raise Unpackable(side, path, error) from None
                budget[side] = {"device": str(where), "rows": of, **needs, "free": free_bytes(where)[0]}
        return budget

    asked = (eventgpt, videollava, drafter_device, cache_rows, drafter_dtype)
    where, no_copy = pick_device(device), None
    on_gpu = videollava is not None and where.type == "cuda"
    if on_gpu and self_draft is not False and torch.cuda.get_device_capability(where) < (8, 0):
        no_copy = f"its products need compute capability 8.0, {where} is older"
        if self_draft:
            raise InputError(f"self_draft: {no_copy}; leave it out")
    if on_gpu and self_draft is None and not no_copy:
        try:
            if not (short := lacking(budget := budget_of(*asked, True, several))):
                return budget
            more = sum(short[1].values()) - min(of["free"] for of in budget.values() if of["device"] == str(short[0]))
            takes = budget["target"]["packed"] / 1e9
            no_copy = f"{more / 1e9:.1f} GB of the {takes:.1f} that it takes are missing on {short[0]}"
        except Unpackable as error:
            no_copy = error.why
    if not (short := lacking(budget := budget_of(*asked, bool(self_draft), several))):
        if no_copy:
            budget["target"]["no_copy"] = no_copy
        return budget
    kind = str(dtype or default_dtype(where)).removeprefix("torch.")
    found = {}
    for flags, given in settings(eventgpt, videollava, where).items():
        with contextlib.suppress(Unpackable):
            found[flags] = budget_of(*given)
    raise no_room(" and ".join(str(p) for p in (videollava, eventgpt) if p is not None), *short,
                  "lower `several`, or " * (several > 1 and not lacking(budget_of(*asked, bool(self_draft))))
                  + way_out(found, kind, where))
