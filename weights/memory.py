"""memory: devices by name, what one has left, who holds the rest, and the line that says so when it is not enough."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import torch

from weights.files import InputError, refusal

PARTS = ("weights", "cache", "packed", "scratch")            # of what one side needs; "packed" if there is such
ENOUGH_ELSEWHERE = "lower `cache_rows`, free memory, or choose another `device`"


def pick_device(name) -> torch.device:
    """A device that is really there, or an InputError that says which are."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device {name!r}: not a device name; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device {name}: {count} CUDA devices here; use cpu, a lower number, or check the driver")
        device = torch.device("cuda", device.index or 0)
    elif device.type != "cpu":
        raise InputError(f"device {name}: only cpu and cuda are supported; use one of these")
    return device


def as_dtype(dtype) -> torch.dtype | None:
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype is None or dtype in known.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in known:
        raise InputError(f"dtype: {dtype!r} is not one of {', '.join(known)}; pick from these")
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
    """The sum of what each side needs, of `engine.memory_budget`."""
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


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was short; the CPU's allocator has no class for it, and a capture that ends hides it."""
    return error is not None and (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                                  or "allocate memory" in str(error) or ran_out(error.__context__))


def peak_memory(device) -> int:
    """Bytes: the most this process held on a GPU since the request began, or the process's peak on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
