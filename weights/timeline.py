"""timeline: the stages of a request, on one axis of host clock and GPU events; and what goes wrong in a stage, in one
line that names it. A model is whatever has `side`, `path`, `device`, `on_gpu` and `stream`."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from typing import Any, NamedTuple

import torch

from weights.drafting import NonFinite
from weights.files import InputError, describe, ran_out


class Entry(NamedTuple):
    """One stage on a request's timeline; start and end in seconds, or GPU events until they are resolved."""
    row: str
    side: str
    stage: str
    start: Any
    end: Any
    device: torch.device
    drafts: int                             # that a forward looked at, or made


class Timeline:
    """Stages of one request, host clock and GPU events on one axis."""

    def __init__(self, models):
        self.entries, self.lock = [], threading.Lock()
        self.base = {model.device: torch.cuda.Event(enable_timing=True) for model in models if model.on_gpu}

    def start(self) -> None:
        """Sets time zero, on the host and on every GPU. They are idle here, so the clocks agree to microseconds."""
        for device, event in self.base.items():
            torch.cuda.synchronize(device)
            event.record(torch.cuda.current_stream(device))
        self.t0 = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.t0

    @contextlib.contextmanager
    def stage(self, name: str, model, host: bool = False, drafts: int = 0):
        """Times the block: by GPU events on the model's stream, or by the host clock for CPU work. Yields a dict in
        which the block may set the number of its drafts."""
        gpu, kept = model.on_gpu and not host, {"drafts": drafts}
        if model.on_gpu:
            torch.cuda.nvtx.range_push(name)
        start = end = None
        began = self.now()
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(model.stream)
        try:
            with naming_stage(model, name):
                yield kept
        finally:
            if gpu:
                end.record(model.stream)
            if model.on_gpu:
                torch.cuda.nvtx.range_pop()
            with self.lock:
                self.entries.append(Entry("host" if host else model.side, model.side, name, start or began,
                                          end or self.now(), model.device, kept["drafts"]))

    def resolve(self) -> list[Entry]:
        """The entries by start, in seconds; waits for the GPU."""
        for device in self.base:
            torch.cuda.synchronize(device)
        for i, of in enumerate(self.entries):
            if not isinstance(of.start, float):
                start, end = (self.base[of.device].elapsed_time(event) / 1e3 for event in (of.start, of.end))
                self.entries[i] = of._replace(start=start, end=end)
        self.entries.sort(key=lambda of: of.start)
        return self.entries


class OutOfMemory(NonFinite):
    """Memory ran out inside a stage. Ends the same as NaN does."""


@contextlib.contextmanager
def naming_stage(model, stage: str):
    """Turns memory that runs out in the block, and a compiler that Triton misses, into one line."""
    try:
        yield
        return
    except Exception as error:
        if isinstance(error, subprocess.CalledProcessError) or "C compiler" in str(error):
            raise InputError(f"{model.device}: Triton cannot compile its driver ({describe(error)[:200]}); install gcc "
                             f"or clang and Python's headers (python3-dev), or set CC to a compiler") from None
        if not ran_out(error):
            raise
        reason = describe(error).partition(". ")[0]
    # Outside of the handler, where the failed frames and their tensors are gone.
    raise OutOfMemory(f"{model.path}: memory on {model.device} ran out in the {model.side}'s {stage} ({reason}); lower "
                      f"`cache_rows`, shorten the question, free memory or choose another `drafter_device`")


def check_finite(state, model, stage: str) -> None:
    """NonFinite if a forward up to this state of the model computed NaN or infinity."""
    if state.nonfinite:
        raise NonFinite(f"{model.path}: the {model.side}'s logits hold NaN or infinity after {stage}; check the "
                        f"checkpoint (python -m weights.load --check) and the dtype")
