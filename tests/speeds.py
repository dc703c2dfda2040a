"""speeds: what each small kernel takes at 7B shapes on a GPU, beside the bytes that it has to move and plain torch.

    python -m tests.speeds

Rows: norms, gates and attention of prefills, towers and steps, 4-bit weights unpacked, the ends of a forward, lookup,
sampling; then events and frames to pixels, from the host, on the CPU and on the GPU. "off by" is the largest distance
from the plain definition, which is timed launch by launch; bounds are tested. Steps stand in `python -m tests.figures`
and `python -m tests.chain`."""

import functools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
from compare import max_err

import engine
from kernels.attention import attention, step_attention, step_attention_ref
from kernels.check import quantiles, read_tbps, time_ms
from kernels.frames import clip_pixels, draw_events
from kernels.lookup import Ring, lookup
from kernels.quant import dequantise, quantise
from kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref
from kernels.rope_store import rope_store, rope_store_ref
from kernels.round import RoundWork, close_draft, close_round, new_state, open_round
from kernels.sample import sample, sampling_words
from kernels.skinny import Workspace
from kernels.swiglu import swiglu, swiglu_ref
from kernels.tower import add_layernorm, add_layernorm_ref, layernorm, layernorm_ref, quick_gelu, quick_gelu_ref
from kernels.unpack import unpack


def streaming(device, S=2076, D=4096, F=11008, K=128, copies=6):
    """(name, inputs of several calls, since one would stay in L2, bytes of a call, the kernel, its definition)."""
    def randn(*shape):
        return [torch.randn(*shape, device=device).bfloat16() for _ in range(copies)]

    x, w = randn(S, D), torch.rand(D, device=device).bfloat16()
    yield "rmsnorm", x, 4 * S * D, lambda x: rmsnorm(x, w), lambda x: rmsnorm_ref(x, w, 1e-5)
    yield ("add_rmsnorm", x[1:], 8 * S * D, lambda y: add_rmsnorm(y, x[0], w)[0],
           lambda y: add_rmsnorm_ref(y, x[0], w, 1e-5)[0])
    yield "swiglu", randn(S, 2 * F), 6 * S * F, swiglu, swiglu_ref
    at, (k, v) = torch.arange(S, device=device), torch.zeros(2, D // K, S, K, device=device).bfloat16()
    cos, sin = (of(torch.randn(S, K // 2, device=device)).repeat(1, 2).bfloat16() for of in (torch.cos, torch.sin))
    yield ("rope_store", randn(S, 3 * D), 12 * S * D, lambda x: rope_store(x, at, cos, sin, k, v),
           lambda x: rope_store_ref(x, at, cos, sin, k, v))
    H, work = D // K, Workspace(device, D, D // K, K, S)
    for rows in (S, S // 3):                                 # beside torch's, which knows no positions
        qkv = list(zip(randn(rows, H, K), randn(H, rows, K), randn(H, rows, K), strict=True))
        yield (f"attention, {rows} rows", qkv, 8 * rows * D, lambda of: attention(*of, at[:len(of[0])]),
               lambda of: scaled_dot_product_attention(of[0].transpose(0, 1)[None], *(x[None] for x in of[1:]),
                                                       is_causal=True)[0].transpose(0, 1))
    for rows in (1, 16, 32):
        qkv, caches = randn(rows, 3 * D)[0], list(zip(randn(H, S, K), randn(H, S, K), strict=True))
        yield (f"step attention, {rows} rows", caches, 4 * S * D,
               *(lambda of, qkv=qkv, fn=fn: fn(qkv, *of, at[-len(qkv):], cos, sin)
                 for fn in (functools.partial(step_attention, work=work), step_attention_ref)))
    R, C = 5 * 577 * S // 2076, D // 4                       # rows of five event frames, width of a tower
    x, (w, b) = randn(R, C), torch.rand(2, C, device=device).bfloat16()
    yield "layernorm", x, 4 * R * C, lambda x: layernorm(x, w, b), lambda x: layernorm_ref(x, w, b, 1e-5)
    yield ("add_layernorm", x[1:], 8 * R * C, lambda y: add_layernorm(y, x[0], w, b)[0],
           lambda y: add_layernorm_ref(y, x[0], w, b, 1e-5)[0])
    yield "quick_gelu", randn(R, 4 * C), 16 * R * C, quick_gelu, quick_gelu_ref
    for name, O, I in (("qkv", 3 * D, D), ("o", D, D), ("gate_up", 2 * F, D), ("down", D, F)):
        packed, room = [quantise(w, 4) for w in randn(O, I)], torch.empty(O * I, dtype=torch.bfloat16, device=device)
        yield (f"unpack {name}", packed, packed[0].nbytes + 2 * O * I,
               lambda w, room=room: unpack(w, torch.bfloat16, room), lambda w: dequantise(w).bfloat16())


def launches(device, D=4096, V=32_064, ids=65_536):
    """(name, a call) of what moves little."""
    work, embed_VD, ring = RoundWork(device), torch.randn(V, D, device=device).bfloat16(), Ring(device, ids)
    ring.add(torch.randint(0, V, (ids - 1,)).tolist())
    for S in (1, 16, 32):
        logits_SV = torch.randn(S, V, device=device).bfloat16()
        state_W = new_state(200, ids=[5], n_out=1, prompt_len=10, limit=100).to(device)
        yield f"open_round, {S} rows", lambda s=state_W, G=S - 1: open_round(s, G, embed_VD)
        yield f"close_round, {S} rows", lambda x=logits_SV, s=state_W: close_round(x, s, work)
        for top_p in (1.0, 0.9):
            words_3 = sampling_words(0.8, top_p, 1).to(device)
            yield f"sample, {S} rows, top_p {top_p}", lambda x=logits_SV, s=state_W, w=words_3: sample(x, s, w)
    yield "close_draft", lambda: close_draft(logits_SV[:1], state_W, work)
    yield f"lookup in {ids:,} ids", lambda: lookup(ring, state_W)


def host_ms(fn, runs=20) -> float:
    """p50 of a call from the host, to where all that it has queued is done."""
    times = []
    for _ in range(3 + runs):
        begin = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return quantiles(times[3:])[1]


def pictures(devices, events=132_268, height=480, width=640):
    """(name, p50 ms)."""
    x, y, p = (torch.randint(0, top, (events,), dtype=torch.int32) for top in (width, height, 2))
    recording = SimpleNamespace(x=x, y=y, p=p.to(torch.uint8))
    frames = [torch.randint(0, 256, (height, width, 3), dtype=torch.uint8) for _ in range(8)]
    for device in devices:
        yield f"draw {events:,} events, {device}", host_ms(lambda on=device: draw_events(recording, device=on))
        yield "the same, to pixels of 336", host_ms(
            lambda on=device: clip_pixels(draw_events(recording, device=on), 336, device=on))
        for size in (224, 336):
            yield f"8 frames to pixels of {size}, {device}", host_ms(
                lambda on=device, size=size: clip_pixels(frames, size, device=on))


def report(device, **sizes) -> list[str]:
    """The lines of all tables. sizes: of `streaming`."""
    lines = [f"{'bf16':34} {'p50 us':>9} {'TB/s':>7} {'torch us':>9} {'off by':>8}"]
    for name, inputs, nbytes, ours, plain in streaming(device, **sizes):
        us, theirs = (1e3 * timed(lambda fn=fn, xs=inputs: [fn(x) for x in xs])[1] / len(inputs)
                      for fn, timed in ((ours, measure.graph_ms), (plain, time_ms)))     # it may wait for the GPU
        apart = max_err(ours(inputs[0]), plain(inputs[0]))
        lines.append(f"{name:34} {us:9.2f} {1e-6 * nbytes / us:7.3f} {theirs:9.2f} {apart:8.1e}")
    lines += [f"{name:34} {1e3 * measure.graph_ms(fn, 8)[1]:9.2f}" for name, fn in launches(device)]
    return [*lines, f"{'from the host':34} {'p50 ms':>9}",
            *(f"{name:34} {ms:9.2f}" for name, ms in pictures(dict.fromkeys(("cpu", str(device)))))]


def main(argv=None) -> int:
    options = measure.flags(__doc__).parse_args(argv)
    device = engine.pick_device(options.device)
    if device.type != "cuda":
        raise engine.InputError("speeds: times kernels on a GPU; run it where torch sees one")
    with torch.cuda.device(device), torch.inference_mode():
        head = f"speeds, {torch.cuda.get_device_name(device)}, {measure.versions()}, read {read_tbps():.3f} TB/s"
        measure.publish([head, *report(device)], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(measure.run(main))
