"""peers: transformers' Video-LLaVA beside ours, 7B shapes, one process, pixels and ids on the GPU, runs interleaved.

    pip install transformers
    python -m tests.peers --out tests/results/peers.txt

Three rows: ours, transformers with a dynamic cache, and with a static one, compiled. A ratio is theirs over ours,
paired by run: above 1 ours is faster."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure  # first: it settles Ctrl-C

# isort: split
import torch

import engine
from kernels.check import quantiles
from weights import describe


def main(argv=None) -> int:
    parser = measure.flags(__doc__)
    parser.add_argument("--max-new-tokens", type=int, default=50, metavar="N", help="default %(default)s")
    options = parser.parse_args(argv)
    if options.max_new_tokens < 2:
        raise engine.InputError(f"--max-new-tokens: wanted at least 2, got {options.max_new_tokens}; change it")
    try:
        import transformers
    except ImportError as error:
        raise engine.InputError(f"peers: transformers cannot be imported ({describe(error)}); pip install transformers "
                                f"into an environment of its own") from None
    device = engine.pick_device(options.device)
    if device.type != "cuda":
        raise engine.InputError("peers: compares 7B models on a GPU; run it where torch sees one")
    from weights.load import TARGET_7B
    target = engine.load_engine(None, "random-7b", device=device, cache_rows=2560).target
    lines = [f"peers, RANDOM 7B WEIGHTS bf16, {measure.devices([target])}, transformers {transformers.__version__}, "
             f"{measure.versions()}",
             f"prompt of 2,076 rows with 8 frames, pixels on the GPU, {options.max_new_tokens} ids, milliseconds "
             f"[p20, p80]; x ours: paired by run, above 1 ours is faster",
             f"{'engine':38} {'vision + prefill':>24} {'x ours':>6} {'per id':>22} {'x ours':>6} {'all ids':>24} "
             f"{'x ours':>6}"]
    measure.publish(lines + rows(target, peer_model(TARGET_7B, device), options.max_new_tokens), options.out)
    return 0


def peer_model(config: dict, device):
    """transformers' model of our config's shapes, random weights in bf16 on the device (fp32 on a CPU)."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    from weights.names import TEXT_DEFAULTS, VISION_DEFAULTS
    text, vision = ({"model_type": kind, **defaults, **config[part]} for part, kind, defaults in
                    (("text_config", "llama", TEXT_DEFAULTS), ("vision_config", "clip_vision_model", VISION_DEFAULTS)))
    kept = {k: v for k, v in config.items() if k not in ("text_config", "vision_config", "model_type", "pad_token_id")}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return VideoLlavaForConditionalGeneration(
                VideoLlavaConfig(text_config=text, vision_config=vision, **kept)).eval()
    finally:
        torch.set_default_dtype(previous)


def rows(target, model, new: int, runs: int = 7) -> list[str]:
    """The table's rows: ours, then transformers with a dynamic and with a static, compiled cache."""
    device, visual = target.device, target.num_frames * (target.vision.P + 1)
    pixels = torch.randn(target.num_frames, 3, target.vision.image, target.vision.image, device=device)
    prompt = engine.Prompt([5] * 5, [5] * 15)
    ids = torch.tensor([[5] * 5 + [model.config.video_token_index] * visual + [5] * 15], device=device)
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                 pixel_values_videos=pixels[None].to(target.decoder.dtype))

    def ours(count):
        with torch.inference_mode(), target.on_stream():
            return measure.whole(target, prompt, pixels, count)

    def theirs(count, **cache):
        with torch.inference_mode():
            out = model.generate(**given, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
                                 **cache)
            assert out.shape[1] == ids.shape[1] + count, f"peers: {out.shape[1] - ids.shape[1]} ids, wanted {count}"

    engines = {"headstart target_only": ours, "transformers, dynamic cache": theirs,
               "transformers, static cache, compiled": lambda count: theirs(count, cache_implementation="static")}
    taken = {name: [] for name in engines}
    for run in range(-2, runs):                              # two rounds to compile and warm up
        for name, call in engines.items():
            first, both = (measure.host_time(target, lambda c=call, n=n: c(n)) for n in (1, new))
            if run >= 0:
                taken[name].append((first, (both - first) / (new - 1), both))
    return table(taken)


def table(taken: dict[str, list[tuple]]) -> list[str]:
    """{engine: [(first id, per id, all ids) in ms by run]}, ours first, as lines."""
    lines, mine = [], next(iter(taken.values()))
    for name, times in taken.items():
        cells = []
        for column, own in zip(zip(*times, strict=True), zip(*mine, strict=True), strict=True):
            low, mid, high = quantiles(list(column))
            ratio = statistics.median(t / o for t, o in zip(column, own, strict=True))
            cells.append(f"{mid:8.2f} [{low:.2f}, {high:.2f}]".rjust(24 if len(cells) != 1 else 22) + f" {ratio:6.2f}")
        lines.append(f"{name:38} " + " ".join(cells))
    return lines


if __name__ == "__main__":
    sys.exit(measure.run(main))
