"""measure: what the commands beside the tests share: their flags and last lines, and times of parts of a model.

Times by a model's stream need a GPU; `host_time` works anywhere."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench  # first: it settles Ctrl-C

# isort: split
import torch
import triton

from kernels.check import time_ms
from kernels.lookup import lookup
from kernels.round import STATE, SURE, State, new_state
from weights import InputError, replace_file
from weights.files import command, insist_apart, say

ROOT = Path(bench.__file__).resolve().parent


# ---- a command -------------------------------------------------------------------------------------------------


class Flags(bench.Parser):
    def parse_args(self, args=None, namespace=None):
        options = super().parse_args(args, namespace)
        insist_apart(options)                                # before it runs for an hour
        return options


def flags(doc: str, **defaults) -> Flags:
    """A parser whose --help is the command's docstring, with --device and --out."""
    parser = Flags(description=doc)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there too, when all is done")
    parser.set_defaults(**defaults)
    return parser


@command
def run(main, argv=None) -> int:
    """The exit code of `main`, whose bad input is a line in the words of its flags."""
    try:
        return main(argv)
    except InputError as error:
        raise InputError(bench.told(error)) from None


def publish(lines: list[str], out: Path | None) -> None:
    say("\n".join(lines))
    if out:
        replace_file(out, ("\n".join(lines) + "\n").encode())


def versions() -> str:
    """What a report depends on besides its machine."""
    return (f"torch {torch.__version__}, triton {triton.__version__}, commit {bench.commit()}"
            f"{', dirty' if bench.dirty() else ''}, {time.strftime('%Y-%m-%d')}")


def devices(models) -> str:
    """"NVIDIA H200 and CPU", each name once."""
    return " and ".join(dict.fromkeys(torch.cuda.get_device_name(m.device) if m.on_gpu else "CPU" for m in models))


def table(title, header, rows) -> list[str]:
    """A fixed-width table: one line a row, floats with three figures after the point."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [title, *("  ".join(["  " + first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(
        rest, widths[1:], strict=True))]) for first, *rest in cells)]


# ---- a model's state -------------------------------------------------------------------------------------------


def fill_with_noise(model) -> None:
    for cache in (model.decoder.k_cache_LNMK, model.decoder.v_cache_LNMK):
        cache.normal_()


def at_context(model, context: int) -> None:
    """Puts the state where one id follows a prompt of `context` rows and no end is in sight."""
    words = new_state(1, ids=[7], n_out=1, prompt_len=context, limit=10 ** 6)
    model.state_W[:len(words)].copy_(words)


def state_of(model, ids: int) -> State:
    """The model's state with room for so many ids, when all that is queued is done."""
    return model.snapshot(STATE + ids).read()


# ---- recorded ids ----------------------------------------------------------------------------------------------


class Recorded:
    """Ids that win over a model's own, place by place of the answer; the drafts of its 4-bit copy, and their
    probabilities. Behind them come stop ids. The tensor stays, so that graphs which read it see what `set` wrote."""

    def __init__(self, places: int, stop: int, device):
        self.stop, self.recorded_3M = stop, torch.zeros(3, places, dtype=torch.long, device=device)

    def set(self, ids, drafts=(), sures=()) -> None:
        """sures: probabilities of the drafts."""
        places = self.recorded_3M.shape[1]
        rows = [[*ids] + [self.stop] * places, [*drafts] + [self.stop] * places,
                [int(1e6 * sure) for sure in sures] + [999_999] * places]
        self.recorded_3M.copy_(torch.tensor([row[:places] for row in rows]))

    def _at(self, row: int, place_S):
        return self.recorded_3M[row].index_select(0, place_S.clamp(max=self.recorded_3M.shape[1] - 1))

    def choose(self, logits_SV, state_W) -> None:
        """The largest logit of each row becomes that of the recorded id."""
        ids_S = self._at(0, state_W[:1] + torch.arange(len(logits_SV), device=logits_SV.device))
        logits_SV.scatter_(1, ids_S[:, None], torch.finfo(logits_SV.dtype).max)

    def draft(self, state_W) -> None:
        """The last id of the copy's state, and its probability, become the recorded ones."""
        place_1 = state_W[:1] - 1
        state_W.index_copy_(0, STATE + place_1, self._at(1, place_1))
        state_W[SURE.value:SURE.value + 1].copy_(self._at(2, place_1))


def replay(model, ids, drafts=(), sures=()) -> None:
    """From here on the model computes as ever, but what it gives is recorded elsewhere: real speed at a real acceptance
    without the checkpoint. Later calls change the ids. `model.recorded = None` ends it, but for graphs."""
    if getattr(model, "recorded", None) is None:
        same = "encode", "prefill", "ask"                    # other graphs end with ids
        model.step_graphs = {key: of for key, of in model.step_graphs.items() if key[0] in same}
        model.recorded, kind = Recorded(model.decoder.cache_rows, model.stops[0], model.device), type(model)

        def close(logits_SV, searches, sampled):
            if getattr(model, "recorded", None):
                model.recorded.choose(logits_SV, model.state_W)
            kind._close(model, logits_SV, searches, sampled)

        def draft(searches, sampled):
            kind._draft(model, False, sampled)
            if getattr(model, "recorded", None):
                model.recorded.draft(model.draft_W)
            if searches:
                lookup(model.ring, model.draft_W)
        model._close, model._draft = close, draft
    model.recorded.set(ids, drafts, sures)


# ---- times, in milliseconds ------------------------------------------------------------------------------------


def graph_of(fn, times=1):
    """A CUDA graph of `times` calls of fn, captured after two eager calls that compile what has to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
        fn()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            fn()
    return graph


def graph_ms(fn, calls=1):
    """(p20, p50, p80) of one call of fn, `calls` of them as one graph replay in each timed run. fn must go round
    several buffers if its inputs would fit the L2 cache, or the cache is what gets measured."""
    return tuple(ms / calls for ms in time_ms(graph_of(fn, calls).replay))


def device_times(model, fn, runs: int = 20, between=None) -> list[float]:
    """Each call on the model's stream, by events, after three calls; each starts on an idle GPU. between: what the GPU
    does from one call to the next, untimed."""
    for _ in range(3):
        fn()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        if between:
            between()
        torch.cuda.synchronize(model.device)
        start.record(model.stream)
        fn()
        end.record(model.stream)
    torch.cuda.synchronize(model.device)
    return [start.elapsed_time(end) for start, end in events]


def host_time(model, fn) -> float:
    """From an idle device to an idle device."""
    wait = torch.cuda.synchronize if model.on_gpu else lambda device: None
    wait(model.device)
    start = time.perf_counter()
    fn()
    wait(model.device)
    return (time.perf_counter() - start) * 1e3


def step_times(model, G: int, context: int, runs: int = 30) -> list[float]:
    """Single rounds with G drafts that never match, so that each advances one row."""
    at_context(model, context)
    return device_times(model, lambda: model.round(G), runs, between=lambda: model.put([-1] * G))


def front_times(model, prompt, pixels, decode: int = 49) -> list[float]:
    """Pixels to the first id in the rhythm of requests: `decode` steps lie between one and the next.

    One prefill right after another meets the card's power cap. With `nvidia-smi -lms 50` beside it on an H100: 51.8 ms
    at 700 W and 1,600 MHz (drafter 20.1), 46.3 after 49 steps at 1,965 MHz (18.8), 46.5 after 0.2 s of rest (18.9).
    """
    return device_times(model, lambda: front(model, prompt, pixels, decode + 1),
                        between=lambda: [model.round() for _ in range(decode)])


def front(model, prompt, pixels, new: int) -> None:
    """Pixels [R, 3, X, X] to the first of at most `new` ids, which end nowhere sooner."""
    model.prefill(model.splice(prompt, model.visual_rows(pixels)), new, (), 5)


def whole(model, prompt, pixels, new: int) -> list[int]:
    """All `new` ids, one a step."""
    front(model, prompt, pixels, new)
    for _ in range(new - 1):
        model.round()
    return state_of(model, new).ids
