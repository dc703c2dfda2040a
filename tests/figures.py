"""figures: what one step, one verify and one prefill cost at 7B shapes on a GPU, and whether their bits agree.

    python -m tests.figures --out tests/results/figures.txt
    python -m tests.figures --generations 1008

Random 7B weights: times are real. Rows: steps at five contexts beside what the measured bandwidth allows, verifies of
16 and 32 rows, 4-bit forwards, vision + prefill of both models, a whole answer; then, which have to be 0 and all:
elements whose bits differ between one row and any forward of 1..32 rows, and answers from forced drafts that equal
plain decode.
Exit 1 if an answer or a bit differs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure  # first: it settles Ctrl-C

# isort: split
import torch
from compare import differing

import engine
from bench import kv_bytes, weight_bytes
from kernels.check import gemm_tflops, quantiles, read_tbps
from weights.files import insist_whole


def main(argv=None) -> int:
    parser = measure.flags(__doc__)
    parser.add_argument("--generations", type=int, default=208, metavar="N",
                        help="answers from forced drafts (default %(default)s)")
    options = parser.parse_args(argv)
    insist_whole("--generations", options.generations, 1)
    device = engine.pick_device(options.device)
    if device.type != "cuda":
        raise engine.InputError("figures: measures 7B models on a GPU; run it where torch sees one")
    e = engine.load_engine("random-7b", "random-7b", device=device, cache_rows=4352, seed=0, self_draft=True)
    target, drafter = e.target, e.drafter
    bandwidth, flops = read_tbps() * 1e12, gemm_tflops() * 1e12
    lines = [f"figures, RANDOM 7B WEIGHTS bf16, {measure.devices([target])}, {measure.versions()}",
             f"read {bandwidth / 1e12:.3f} TB/s, matrix {flops / 1e12:.0f} TFLOP/s, measured in this run",
             f"{'figure':58} {'p20':>8} {'p50':>8} {'p80':>8}"]

    def line(name, values, note=""):
        low, mid, high = quantiles(values)
        lines.append(f"{name:58} {low:8.3f} {mid:8.3f} {high:8.3f}  {note}")
        return mid

    with torch.inference_mode(), target.on_stream():
        measure.fill_with_noise(target)
        for G in (0, 7, 15, 31):
            target.round_graph(G)                            # a capture writes cache rows
        one = {}
        for context in (256, 1024, 2100, 3072, 4000):
            moved = weight_bytes(target) + kv_bytes(target) * context
            mid = one[context] = line(f"step at context {context}, ms", measure.step_times(target, 0, context))
            lines[-1] += (f"{moved / 1e9:.2f} GB, floor {moved / bandwidth * 1e3:.2f} ms, "
                          f"{moved / bandwidth * 1e3 / mid:.0%} of the bandwidth")
        for G in (7, 15, 31):
            mid = line(f"verify of {G + 1} rows at context 2100, ms", measure.step_times(target, G, 2100))
            lines[-1] += f"{mid / one[2100]:.3f} of a step"
        for rows in (1, 2, 8, 16):
            mid = line(f"4-bit forward of {rows} rows at context 2100, chained, ms", copy_times(target, rows, 2100))
            lines[-1] += f"{mid / one[2100]:.3f} of a step"
        measure.at_context(target, 2100)
        mid = line("one draft of the 4-bit copy, ms", measure.device_times(target, lambda: target.draft(True)))
        lines[-1] += f"{mid / one[2100]:.3f} of a step"
        slope, floor = (one[4000] - one[256]) / 3744 * 1e6, kv_bytes(target) / bandwidth * 1e9
        lines.append(f"slope of the step over cache rows 256..4000: {slope:.1f} ns a row, keys and values at the "
                     f"measured bandwidth {floor:.1f} ns ({slope / floor - 1:+.0%})")
        prompt, pixels = engine.Prompt([5] * 5, [5] * 15), torch.randn(8, 3, 224, 224, device=device)
        line("vision + projector + prefill of 2,076 rows, ms", measure.front_times(target, prompt, pixels))
        line("50 ids target_only, pixels on the GPU to ids on the host, ms",
             [measure.host_time(target, lambda: measure.whole(target, prompt, pixels, 50)) for _ in range(10)][2:])
    with torch.inference_mode(), drafter.on_stream():
        prompt, pixels = engine.Prompt([5] * 39, [5] * 20), torch.randn(5, 3, 336, 336, device=device)
        line("drafter, five event frames to the first draft id (641 rows), ms",
             measure.front_times(drafter, prompt, pixels))
    bits = 0
    with torch.inference_mode(), target.on_stream():
        for seed in range(3):
            worst = max(bits_differing(target, context, seed) for context in (1, 700, 2100, 4000))
            lines.append(f"bits that differ, logits and cache rows, 1..32 rows, contexts 1, 700, 2100, 4000, "
                         f"seed {seed}: {worst}")
            bits += worst
        equal, total = forced_drafts(target, options.generations)
        lines.append(f"speculative = target_only, forced drafts of every accepted length 0..15, 128 ids: {equal} of "
                     f"{total} generations")
    measure.publish(lines, options.out)
    return int(bool(bits) or equal < total)


def copy_times(model, rows: int, context: int, chained: int = 4) -> list[float]:
    """Forwards of so many rows with the 4-bit weights; a few in one graph, each on the rows that the last one made."""
    d = model.decoder
    hidden_SD, pos_ids_S = torch.randn_like(model.hidden_MD[:rows]), context + torch.arange(rows, device=model.device)

    def chain():
        x_SD = hidden_SD
        for _ in range(chained):
            logits_SV = d.forward(x_SD, pos_ids_S, steps=model.copy)
            x_SD = d.embed_VD.index_select(0, logits_SV.argmax(1))

    replayed = engine.StepGraph(chain, model)
    return [ms / chained for ms in measure.device_times(model, replayed)]


def bits_differing(model, context: int, seed: int) -> int:
    """Elements whose bits differ between 32 single rows and every forward of 1..32 of them: logits, keys, values."""
    d = model.decoder
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.randint(d.config.V, (32,), generator=generator, device=model.device)
    for cache in (d.k_cache_LNMK, d.v_cache_LNMK):
        cache.normal_(generator=generator)
    pos_ids = context + torch.arange(32, device=model.device)
    spans = [cache[:, :, context:context + 32] for cache in (d.k_cache_LNMK, d.v_cache_LNMK)]
    logits = torch.cat([d.forward(d.embed_VD[ids[i:i + 1]], pos_ids[i:i + 1]) for i in range(32)])
    kept, worst = [span.clone() for span in spans], 0
    for S in range(1, 33):
        for span in spans:
            span.fill_(1e4)                                  # loud, and seen if a row is not written before it is read
        again = d.forward(d.embed_VD[ids[:S]], pos_ids[:S])
        worst = max(worst, differing(again, logits[:S]),
                    *(differing(span[:, :, :S], one[:, :, :S]) for span, one in zip(spans, kept, strict=True)))
    return worst


def forced_drafts(model, generations: int, new: int = 128, rows: int = 700) -> tuple[int, int]:
    """(equal, total): answers from drafts that are right for 0..15 ids a round, against plain decode of the prompt."""
    equal = total = 0
    while total < generations:
        generator = torch.Generator(model.device).manual_seed(1000 + total)
        prompt_ids = torch.randint(model.config.V, (rows,), generator=generator, device=model.device)
        hidden_SD = model.decoder.embed_VD[prompt_ids]
        model.prefill(hidden_SD, new, (), 5)
        for _ in range(new - 1):
            model.round()
        ids = measure.state_of(model, new).ids
        for right in range(16):
            model.prefill(hidden_SD, new, (), 5)
            state = measure.state_of(model, new)
            while not state.done:
                drafts = (ids[state.n_out:state.n_out + 15] + [-1] * 15)[:15]
                if right < 15:
                    drafts[right] = -1
                model.put(drafts)
                model.round(15)
                state = measure.state_of(model, new)
            equal, total = equal + (state.ids == ids), total + 1
    return equal, total


if __name__ == "__main__":
    sys.exit(measure.run(main))
