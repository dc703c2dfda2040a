"""train: makes the embedded pair. `python -m weights.tiny.train --out DIR` on a GPU takes minutes.

Trains the target on video frames and the drafter on event frames of the scenes in scenes.py, both on the same answers,
with plain torch modules of the upstream architectures, and writes upstream checkpoint layouts in fp16. A model whose
folder is already in DIR is left as it is. `python -m tests.tiny_pair` tells what the embedded pair gets right."""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kernels.frames import draw_events
from weights import replace_file
from weights.events import Events
from weights.files import Parser, command
from weights.names import CLIP_MEAN, CLIP_STD, on_disk, plan
from weights.text import DRAFTER_SYSTEM, Text
from weights.tiny import scenes

SIDE, PATCH, C, HEADS, TOWER_LAYERS, TOWER_FFN = 96, 16, 96, 3, 4, 256
SCENES, STEPS, BATCH, RATE, SECONDS = 24_000, 20_000, 160, 1.5e-3, 120     # seconds at most, of each model
TARGET = dict(hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6,
              num_key_value_heads=3, head_dim=32)
DRAFTER = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=4)
TEXT = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=512, hidden_act="silu",
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, torch_dtype="float16")
VISION = dict(model_type="clip_vision_model", hidden_size=C, intermediate_size=TOWER_FFN, image_size=SIDE,
              num_hidden_layers=TOWER_LAYERS, num_attention_heads=HEADS, patch_size=PATCH, hidden_act="quick_gelu",
              layer_norm_eps=1e-5, projection_dim=16)


# ---- tokenizer -------------------------------------------------------------------------------------------------


def train_tokenizer(path, pieces=512):
    """A LLaMA-style BPE: 3 specials, 256 bytes, the rest learnt; then <image>, <video>, <pad>. Written to `path`."""
    texts = [scenes.answer(scenes.sample(seed), q) for seed in range(3000) for q in range(10)]
    texts += [f"USER: \n{q} ASSISTANT:" for q in scenes.QUESTIONS] * 20
    texts += [f"{DRAFTER_SYSTEM} USER: <ev_start>", "<ev_end>\n"] * 200
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace("\u2581", prepend_scheme="always"),
                                                       pre_tokenizers.Split("\n", "isolated")])
    specials = ["<unk>", "<s>", "</s>", *bytes_]
    learnt = trainers.BpeTrainer(vocab_size=pieces, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, learnt)
    raw = json.loads(tokenizer.to_str())
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    raw["decoder"] = json.loads(decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)]).__getstate__())
    raw["model"]["byte_fallback"] = True
    vocab = raw["model"]["vocab"]
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [{"id": i, "content": s, **plain} for i, s in enumerate(("<unk>", "<s>", "</s>"))]
    raw["added_tokens"] += [{"id": len(vocab) + i, "content": s, **plain}
                            for i, s in enumerate(("<image>", "<video>", "<pad>"))]
    replace_file(path, json.dumps(raw, ensure_ascii=False).encode())
    return len(vocab)


# ---- models, as upstream defines them --------------------------------------------------------------------------


def config_of(side, vocab):
    """config.json of one model. The drafter's tower has a config of its own beside it, as upstream."""
    if side == "drafter":
        return {**TEXT, **DRAFTER, "model_type": "EventChat_llama", "architectures": ["EventChatModel"],
                "vocab_size": vocab, "mm_visual_tower": "clip", "mm_hidden_size": C, "event_feature_adaptor": True,
                "mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    rows = (SIDE // PATCH) ** 2
    return {"architectures": ["VideoLlavaForConditionalGeneration"], "model_type": "video_llava",
            "image_seq_length": rows, "video_seq_length": 8 * (rows + 1), "projector_hidden_act": "gelu",
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16",
            "text_config": {**TEXT, **TARGET, "vocab_size": vocab}, "vision_config": VISION}


class Pair:
    """One of the two models: tower, projector, perhaps adaptor and pooling, decoder. `w` has its parameters under the
    canonical names of weights/names.py. The target's image tower is its video tower: stills share what clips taught."""

    def __init__(self, side, vocab, device="cpu"):
        self.side, self.config = side, config_of(side, vocab)
        self.kind, text = self.config["model_type"], self.config.get("text_config", self.config)
        self.H, self.N, self.L = (text[of] for of in ("num_attention_heads", "num_key_value_heads",
                                                      "num_hidden_layers"))
        self.K = text.get("head_dim", text["hidden_size"] // self.H)
        # All of a tower is stored, also what lies behind the layer that is read.
        planned = plan(self.config | {"vision_config": VISION, "vision_feature_layer": -1})
        shapes = {part.name: part.shape for tensor in planned.wanted for part in tensor.parts}
        shapes |= dict.fromkeys(planned.unused, (C,))
        self.stored, self.w = sorted(shapes), {}
        for name in [name for name in self.stored if not name.startswith("image_tower.")]:
            values = self.initial(name, shapes[name], shapes.get(name.replace(".bias", ".weight")))
            self.w[name] = values.to(device).requires_grad_()
        freq = 10000.0 ** (-torch.arange(0, self.K, 2) / self.K)
        angle = torch.outer(torch.arange(512.0), freq).repeat(1, 2).to(device)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.mean, self.std = (torch.tensor(of, device=device)[:, None, None] for of in (CLIP_MEAN, CLIP_STD))

    @staticmethod
    def initial(name, shape, weight):
        """As torch's modules begin, embeddings smaller. weight: the shape of the weight that a bias stands beside."""
        if "norm" in name:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        if "embed_tokens" in name or name.endswith(("class_embedding", "position_embedding.weight")):
            return torch.randn(shape) * 0.02
        return torch.empty(shape).uniform_(-1, 1) * math.prod(weight[1:]) ** -0.5

    def linear(self, name, x):
        return F.linear(x, self.w[name + ".weight"].flatten(1), self.w.get(name + ".bias"))

    def tower(self, pixels, layers):
        """CLIP's rows [R, P + 1, C] of float pixels, behind so many layers."""
        R, side, at = len(pixels), SIDE // PATCH, "video_tower." if self.side == "target" else "event_tower."

        def norm(name, x):
            return F.layer_norm(x, (C,), self.w[f"{at}{name}.weight"], self.w[f"{at}{name}.bias"])

        tiles = pixels.reshape(R, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(R, side * side, -1)
        rows = [self.w[at + "embeddings.class_embedding"].expand(R, 1, C),
                self.linear(at + "embeddings.patch_embedding", tiles)]
        h = norm("pre_layrnorm", torch.cat(rows, 1) + self.w[at + "embeddings.position_embedding.weight"])
        for layer in (f"encoder.layers.{j}." for j in range(layers)):
            x = norm(layer + "layer_norm1", h)
            q, k, v = (self.linear(f"{at}{layer}self_attn.{n}_proj", x).reshape(R, -1, HEADS, C // HEADS).transpose(
                1, 2) for n in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(R, -1, C)
            h = h + self.linear(f"{at}{layer}self_attn.out_proj", mixed)
            x = self.linear(f"{at}{layer}mlp.fc1", norm(layer + "layer_norm2", h))
            h = h + self.linear(f"{at}{layer}mlp.fc2", x * torch.sigmoid(1.702 * x))
        return h

    def rms(self, name, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.w[f"language_model.{name}.weight"]

    def turn(self, x):
        a, b = x.chunk(2, -1)
        S = x.shape[2]
        return x * self.cos[:S] + torch.cat([-b, a], -1) * self.sin[:S]

    def llama(self, h):
        """Logits of all rows of whole prompts [B, S, D]."""
        B, S, _ = h.shape
        for layer in (f"layers.{i}." for i in range(self.L)):
            at, x = "language_model." + layer, self.rms(layer + "input_layernorm", h)
            q, k, v = (self.linear(f"{at}self_attn.{n}_proj", x).reshape(B, S, -1, self.K).transpose(1, 2)
                       for n in "qkv")
            q, k = self.turn(q).to(v.dtype), self.turn(k).to(v.dtype)
            k, v = (t.repeat_interleave(self.H // self.N, 1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + self.linear(at + "self_attn.o_proj", mixed.transpose(1, 2).reshape(B, S, -1))
            x = self.rms(layer + "post_attention_layernorm", h)
            x = F.silu(self.linear(at + "mlp.gate_proj", x)) * self.linear(at + "mlp.up_proj", x)
            h = h + self.linear(at + "mlp.down_proj", x)
        return self.linear("lm_head", self.rms("norm", h))

    def visual(self, frames):
        """uint8 [B, R, 3, SIDE, SIDE] to visual rows [B, A, D]."""
        B, R = frames.shape[:2]
        pixels = (frames.flatten(0, 1).float() / 255 - self.mean) / self.std
        rows = self.tower(pixels, TOWER_LAYERS - 1 if self.side == "target" else TOWER_LAYERS)
        rows = F.gelu(self.linear("multi_modal_projector.linear_1", rows))
        rows = self.linear("multi_modal_projector.linear_2", rows)
        if self.side == "target":
            return rows.reshape(B, -1, rows.shape[-1])
        rows = self.linear("feature_adaptor", rows)
        rows = rows.reshape(B, R, -1, rows.shape[-1])
        return torch.cat([rows.mean(2), rows.mean(1)], 1)

    def __call__(self, frames, before, after):
        """Logits of the rows of `after`, ids [B, S] that follow the visual rows; `before` [S] is shared."""
        embed = self.w["language_model.embed_tokens.weight"]
        head = embed[before][None].expand(len(frames), -1, -1)
        rows = torch.cat([head.float(), self.visual(frames).float(), embed[after].float()], 1)
        return self.llama(rows)[:, -after.shape[1]:]

    def export(self):
        """{published name: tensor}."""
        return {on_disk(name, self.kind): self.w[name.replace("image_tower", "video_tower")].detach()
                for name in self.stored}


def save(pair, folder, tokenizer, image_id):
    """Writes one model in its upstream layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.half().cpu().contiguous() for name, t in pair.export().items()}
    replace_file(folder / "model.safetensors", to_bytes(tensors, {"format": "pt"}))
    processor = {"crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_normalize": True,
                 "do_resize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
                 "size": {"shortest_edge": SIDE}}

    def write(path, value):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, (json.dumps(value, indent=1) + "\n").encode())

    if pair.side == "target":
        write(folder / "config.json", pair.config | {
            "image_token_index": image_id, "video_token_index": image_id + 1, "pad_token_id": image_id + 2})
        write(folder / "preprocessor_config.json", processor)
    else:
        write(folder / "config.json", pair.config)
        write(folder / "clip" / "config.json", VISION)
        write(folder / "clip" / "preprocessor_config.json", processor)
    write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    replace_file(folder / "tokenizer.json", Path(tokenizer).read_bytes())


# ---- data and training -----------------------------------------------------------------------------------------


def make_data(first, count, device, batch=48):
    """Scenes first..first+count: (attributes, video uint8 [n, 8, 3, S, S], events uint8 [n, 5, 3, S, S])."""
    worlds = [scenes.sample(seed) for seed in range(first, first + count)]
    left = (scenes.W - SIDE) // 2
    pick = [k * scenes.FRAMES // 8 for k in range(8)]
    video = torch.empty(count, 8, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    events = torch.empty(count, scenes.EVENT_FRAMES, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    for i in range(0, count, batch):
        seeds = range(first + i, first + min(i + batch, count))
        light = scenes.render(worlds[i:i + batch], seeds, device)
        video[i:i + batch] = scenes.video_frames(light, seeds)[:, pick, :, :, left:left + SIDE]
        for at, (maps, seed) in enumerate(zip(scenes.event_maps(light, seeds), seeds, strict=True), i):
            recording = Events(*scenes.event_list(maps, seed))
            drawn = draw_events(recording, scenes.EVENT_FRAMES, (scenes.H, scenes.W), device)
            events[at] = torch.stack(drawn).permute(0, 3, 1, 2)[..., left:left + SIDE]
    return worlds, video, events


def ids_of(text, side):
    """(ids before the visual rows, ids after them per question) of a model's prompt."""
    bos = [1]
    if side == "target":
        return bos + text.ids("USER: "), [text.ids(f"\n{q} ASSISTANT:", first=False) for q in scenes.QUESTIONS]
    before = bos + text.ids(f"{DRAFTER_SYSTEM} USER: <ev_start>")
    return before, [text.ids(f"<ev_end>\n{q} ASSISTANT:") for q in scenes.QUESTIONS]


class Examples:
    """Padded (prompt tail + answer) ids of every scene and question, and where the answer lies."""

    def __init__(self, text, side, answers, device):
        self.before, tails = ids_of(text, side)
        self.before = torch.tensor(self.before, device=device)
        rows = [[tails[q] + ids for q, ids in enumerate(per_scene)] for per_scene in answers]
        width = max(len(r) for per in rows for r in per)
        self.ids = torch.zeros(len(rows), 10, width, dtype=torch.int16)
        self.mask = torch.zeros(len(rows), 10, width, dtype=torch.bool)         # rows that belong to the answer
        for i, per_scene in enumerate(rows):
            for q, row in enumerate(per_scene):
                self.ids[i, q, :len(row)] = torch.tensor(row, dtype=torch.int16)
                self.mask[i, q, len(tails[q]):len(row)] = True
        self.ids, self.mask = self.ids.to(device), self.mask.to(device)


def fit(pair, frames, examples):
    """AdamW with warm-up and cosine decay over STEPS or SECONDS, whichever runs out first; loss on answers only.

    On a GPU the step is one captured graph: launched kernel by kernel these sizes take 37 ms, all of it waiting."""
    device = frames.device
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    lr = torch.tensor(RATE / 200, device=device)
    optimizer = torch.optim.AdamW(pair.w.values(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98), capturable=on_gpu)
    chosen = torch.zeros(2, BATCH, dtype=torch.long, device=device)             # scene and question of each example

    def step():
        ids, mask = examples.ids[chosen[0], chosen[1]].long(), examples.mask[chosen[0], chosen[1], 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            logits = pair(frames[chosen[0]], examples.before, ids[:, :-1])
        each = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.w.values(), 1.0)
        optimizer.step()
        return loss.detach()

    def choose():
        chosen[0].copy_(torch.randint(len(frames), (BATCH,), generator=generator, device=device))
        chosen[1].copy_(torch.randint(10, (BATCH,), generator=generator, device=device))

    run, graph = step, None
    if on_gpu:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                choose()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        run = lambda: graph.replay() or loss                                    # noqa: E731  replay returns None
    began = time.time()
    for i in range(STEPS):
        done = max(i / STEPS, (time.time() - began) / SECONDS)
        if done >= 1:
            break
        lr.fill_(RATE * min(1, (i + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
        choose()
        value = run()
        if i % 500 == 0:
            print(f"{pair.side} step {i} loss {value.item():.4f} {time.time() - began:.0f} s", flush=True)
        elif i % 50 == 0 and on_gpu:
            torch.cuda.synchronize()                                            # keep the clock honest


@command
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, out = torch.device(options.device), options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    began = time.time()
    pieces = train_tokenizer(out / "tokenizer.json")
    text = Text(out / "tokenizer.json")
    vocab = -(-(pieces + 3) // 64) * 64
    worlds, video, events = make_data(0, SCENES, device)
    truth = [[text.ids(scenes.answer(w, q)) + [2] for q in range(10)] for w in worlds]
    print(f"{len(worlds)} scenes, {pieces} pieces, longest answer {max(len(a) for w in truth for a in w)} ids, "
          f"{time.time() - began:.0f} s", flush=True)

    for side, frames in (("target", video), ("drafter", events)):
        if not (out / side / "model.safetensors").exists():
            pair = Pair(side, vocab, device)
            fit(pair, frames, Examples(text, side, truth, device))
            save(pair, out / side, out / "tokenizer.json", pieces)


if __name__ == "__main__":
    sys.exit(main())
