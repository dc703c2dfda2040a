"""train: makes the embedded pair. `python -m weights.tiny.train --out DIR` on a GPU takes minutes; see --help.

Trains the target on video frames and the drafter on event frames of the scenes in scenes.py, both on the same answers,
with plain torch modules of the upstream architectures, and writes upstream checkpoint layouts in fp16. A model whose
folder is already in DIR is left as it is."""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import TensorSpec, serialize_file
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from weights import replace_file
from weights.names import CLIP_MEAN, CLIP_STD
from weights.text import DRAFTER_SYSTEM, Text
from weights.tiny import scenes

SIDE, PATCH, C, HEADS, TOWER_LAYERS, TOWER_FFN = 96, 16, 96, 3, 4, 256
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


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(3 * PATCH ** 2, C, bias=False)
        self.cls = nn.Parameter(torch.randn(C) * 0.02)
        self.pos = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, C) * 0.02)
        self.pre = nn.LayerNorm(C)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(C), q=nn.Linear(C, C), k=nn.Linear(C, C), v=nn.Linear(C, C), out=nn.Linear(C, C),
            norm2=nn.LayerNorm(C), fc1=nn.Linear(C, TOWER_FFN), fc2=nn.Linear(TOWER_FFN, C)))
            for _ in range(TOWER_LAYERS))
        self.post = nn.LayerNorm(C)

    def forward(self, pixels, layers):
        R, side = len(pixels), SIDE // PATCH
        tiles = pixels.reshape(R, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(R, side * side, -1)
        h = self.pre(torch.cat([self.cls.expand(R, 1, C), self.patch(tiles)], 1) + self.pos)
        for layer in self.layers[:layers]:
            x = layer["norm1"](h)
            q, k, v = (layer[n](x).reshape(R, -1, HEADS, C // HEADS).transpose(1, 2) for n in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(R, -1, C)
            h = h + layer["out"](mixed)
            x = layer["fc1"](layer["norm2"](h))
            h = h + layer["fc2"](x * torch.sigmoid(1.702 * x))
        return h

    def export(self, prefix):
        out = {"embeddings.class_embedding": self.cls, "embeddings.position_embedding.weight": self.pos,
               "embeddings.patch_embedding.weight": self.patch.weight.reshape(C, 3, PATCH, PATCH),
               "pre_layrnorm.weight": self.pre.weight, "pre_layrnorm.bias": self.pre.bias,
               "post_layernorm.weight": self.post.weight, "post_layernorm.bias": self.post.bias}
        names = dict(norm1="layer_norm1", norm2="layer_norm2", q="self_attn.q_proj", k="self_attn.k_proj",
                     v="self_attn.v_proj", out="self_attn.out_proj", fc1="mlp.fc1", fc2="mlp.fc2")
        for j, layer in enumerate(self.layers):
            for ours, theirs in names.items():
                for part in ("weight", "bias"):
                    out[f"encoder.layers.{j}.{theirs}.{part}"] = getattr(layer[ours], part)
        return {prefix + name: tensor for name, tensor in out.items()}


class Llama(nn.Module):
    def __init__(self, c, vocab):
        super().__init__()
        D, Fw, self.H, self.N = (c[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                "num_key_value_heads"))
        self.K = c.get("head_dim", D // self.H)
        self.embed, self.head = nn.Embedding(vocab, D), nn.Linear(D, vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.norm = nn.Parameter(torch.ones(D))
        E = dict(q=(D, self.H * self.K), k=(D, self.N * self.K), v=(D, self.N * self.K), o=(self.H * self.K, D),
                 gate=(D, Fw), up=(D, Fw), down=(Fw, D))
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in E.items()})
                                    for _ in range(c["num_hidden_layers"]))
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(2 * c["num_hidden_layers"]))
        freq = 10000.0 ** (-torch.arange(0, self.K, 2) / self.K)
        angle = torch.outer(torch.arange(512.0), freq).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rms(self, x, w):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w

    def turn(self, x):
        a, b = x.chunk(2, -1)
        S = x.shape[2]
        return x * self.cos[:S] + torch.cat([-b, a], -1) * self.sin[:S]

    def forward(self, h):
        B, S, _ = h.shape
        for i, layer in enumerate(self.layers):
            x = self.rms(h, self.norms[2 * i])
            q, k, v = (layer[n](x).reshape(B, S, -1, self.K).transpose(1, 2) for n in "qkv")
            q, k = self.turn(q).to(v.dtype), self.turn(k).to(v.dtype)
            k, v = (t.repeat_interleave(self.H // self.N, 1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # whole prompts only: equal lengths
            h = h + layer["o"](mixed.transpose(1, 2).reshape(B, S, -1))
            x = self.rms(h, self.norms[2 * i + 1])
            h = h + layer["down"](F.silu(layer["gate"](x)) * layer["up"](x))
        return self.head(self.rms(h, self.norm))

    def export(self, prefix, head):
        out = {prefix + "embed_tokens.weight": self.embed.weight, prefix + "norm.weight": self.norm,
               head: self.head.weight}
        names = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
                     gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
        for i, layer in enumerate(self.layers):
            for ours, theirs in names.items():
                out[f"{prefix}layers.{i}.{theirs}.weight"] = layer[ours].weight
            out[f"{prefix}layers.{i}.input_layernorm.weight"] = self.norms[2 * i]
            out[f"{prefix}layers.{i}.post_attention_layernorm.weight"] = self.norms[2 * i + 1]
        return out


class Pair(nn.Module):
    """One of the two models: tower, projector, perhaps adaptor and pooling, decoder."""

    def __init__(self, side, vocab):
        super().__init__()
        self.side, c = side, TARGET if side == "target" else DRAFTER
        D = c["hidden_size"]
        self.tower, self.llm = Tower(), Llama(c, vocab)
        self.fc1, self.fc2 = nn.Linear(C, D), nn.Linear(D, D)
        self.adaptor = nn.Linear(D, D) if side == "drafter" else None
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def visual(self, frames):
        """uint8 [B, R, 3, SIDE, SIDE] to visual rows [B, A, D]."""
        B, R = frames.shape[:2]
        pixels = (frames.flatten(0, 1).float() / 255 - self.mean) / self.std
        rows = self.tower(pixels, TOWER_LAYERS - 1 if self.side == "target" else TOWER_LAYERS)
        rows = self.fc2(F.gelu(self.fc1(rows)))
        if self.side == "target":
            return rows.reshape(B, -1, rows.shape[-1])
        rows = self.adaptor(rows).reshape(B, R, -1, rows.shape[-1])
        return torch.cat([rows.mean(2), rows.mean(1)], 1)

    def forward(self, frames, before, after):
        """Logits of the rows of `after`, ids [B, S] that follow the visual rows; `before` [S] is shared."""
        visual = self.visual(frames)
        head = self.llm.embed(before)[None].expand(len(frames), -1, -1)
        rows = torch.cat([head.float(), visual.float(), self.llm.embed(after).float()], 1)
        return self.llm(rows)[:, -after.shape[1]:]

    def export(self):
        out = {}
        if self.side == "target":
            for tower in ("video_tower", "image_tower"):                        # stills share what clips taught
                out |= self.tower.export(f"{tower}.vision_model.")
            out |= self.llm.export("language_model.model.", "language_model.lm_head.weight")
            names = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
        else:
            out |= self.tower.export("model.visual_tower.visual_tower.vision_model.")
            out |= self.llm.export("model.", "lm_head.weight")
            names = ("model.visual_projector.0", "model.visual_projector.2")
            out |= {f"model.feature_adaptor.{part}": getattr(self.adaptor, part) for part in ("weight", "bias")}
        for name, linear in zip(names, (self.fc1, self.fc2), strict=True):
            out |= {f"{name}.weight": linear.weight, f"{name}.bias": linear.bias}
        return {name: t.detach() for name, t in out.items()}


def save(pair, folder, tokenizer, vocab, image_id):
    """Writes one model in its upstream layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.half().cpu().contiguous() for name, t in pair.export().items()}
    specs = {name: TensorSpec(dtype="float16", shape=list(t.shape), data_ptr=t.data_ptr(), data_len=t.nbytes)
             for name, t in tensors.items()}
    serialize_file(specs, str(folder / "model.safetensors"), {"format": "pt"})
    processor = {"crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_normalize": True,
                 "do_resize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
                 "size": {"shortest_edge": SIDE}}

    def write(path, value):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, (json.dumps(value, indent=1) + "\n").encode())

    if pair.side == "target":
        rows = (SIDE // PATCH) ** 2
        write(folder / "config.json", {
            "architectures": ["VideoLlavaForConditionalGeneration"], "model_type": "video_llava",
            "image_token_index": image_id, "video_token_index": image_id + 1, "pad_token_id": image_id + 2,
            "image_seq_length": rows, "video_seq_length": 8 * (rows + 1), "projector_hidden_act": "gelu",
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16",
            "text_config": {**TEXT, **TARGET, "vocab_size": vocab}, "vision_config": VISION})
        write(folder / "preprocessor_config.json", processor)
    else:
        write(folder / "config.json", {
            **TEXT, **DRAFTER, "model_type": "EventChat_llama", "architectures": ["EventChatModel"],
            "vocab_size": vocab, "mm_visual_tower": "clip", "mm_hidden_size": C, "event_feature_adaptor": True,
            "mm_use_im_start_end": False, "mm_use_im_patch_token": False})
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
        events[i:i + batch] = scenes.event_pictures(scenes.event_maps(light, seeds))[..., left:left + SIDE]
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
        self.tails = [torch.tensor(t, device=device) for t in tails]


def fit(pair, frames, examples, steps, batch, rate, seconds, label, seed=0):
    """AdamW with warm-up and cosine decay over `steps` or `seconds`, whichever runs out first; loss on answers only.

    On a GPU the step is one captured graph: launched kernel by kernel these sizes take 37 ms, all of it waiting."""
    device = frames.device
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    lr = torch.tensor(rate / 200, device=device)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98), capturable=on_gpu)
    chosen = torch.zeros(2, batch, dtype=torch.long, device=device)             # scene and question of each example

    def step():
        ids, mask = examples.ids[chosen[0], chosen[1]].long(), examples.mask[chosen[0], chosen[1], 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            logits = pair(frames[chosen[0]], examples.before, ids[:, :-1])
        each = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    def choose():
        chosen[0].copy_(torch.randint(len(frames), (batch,), generator=generator, device=device))
        chosen[1].copy_(torch.randint(10, (batch,), generator=generator, device=device))

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
    for i in range(steps):
        done = max(i / steps, (time.time() - began) / seconds)
        if done >= 1:
            break
        lr.fill_(rate * min(1, (i + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
        choose()
        value = run()
        if i % 500 == 0:
            print(f"{label} step {i} loss {value.item():.4f} {time.time() - began:.0f} s", flush=True)
        elif i % 50 == 0 and on_gpu:
            torch.cuda.synchronize()                                            # keep the clock honest
    return pair


@torch.no_grad()
def greedy(pair, frames, examples, q, limit=64):
    """Greedy ids for one question about many scenes, by full recomputation."""
    tail = examples.tails[q][None].expand(len(frames), -1)
    ids, done = tail, torch.zeros(len(frames), dtype=torch.bool, device=frames.device)
    visual = pair.visual(frames)
    head = pair.llm.embed(examples.before)[None].expand(len(frames), -1, -1)
    for _ in range(limit):
        logits = pair.llm(torch.cat([head.float(), visual.float(), pair.llm.embed(ids).float()], 1))[:, -1]
        fresh = torch.where(done, 2, logits.argmax(-1))
        ids, done = torch.cat([ids, fresh[:, None]], 1), done | (fresh == 2)
        if done.all():
            break
    rows = ids[:, tail.shape[1]:].tolist()
    return [row[:row.index(2) + 1] if 2 in row else row for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seconds", type=float, default=120, help="at most, for the target")
    parser.add_argument("--drafter-share", type=float, default=1.0, help="of that time, for the drafter")
    parser.add_argument("--held-out", type=int, default=300, help="scenes the closing figures are taken on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, out = torch.device(options.device), options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    began = time.time()
    pieces = train_tokenizer(out / "tokenizer.json")
    text = Text(out / "tokenizer.json")
    vocab = -(-(pieces + 3) // 64) * 64
    worlds, video, events = make_data(0, options.scenes, device)
    truth = [[text.ids(scenes.answer(w, q)) + [2] for q in range(10)] for w in worlds]
    print(f"{len(worlds)} scenes, {pieces} pieces, longest answer {max(len(a) for w in truth for a in w)} ids, "
          f"{time.time() - began:.0f} s", flush=True)

    pairs = {side: Pair(side, vocab).to(device) for side in ("target", "drafter")}
    for side, frames, share in (("target", video, 1.0), ("drafter", events, options.drafter_share)):
        pair, file = pairs[side], out / side / "model.safetensors"
        if file.exists():
            stored = load_file(file)
            for name, tensor in pair.export().items():
                tensor.copy_(stored[name])
            print(f"{side}: taken from {file}", flush=True)
            continue
        fit(pair, frames, Examples(text, side, truth, device), options.steps, options.batch, options.rate,
            options.seconds * share, side)
        save(pair, out / side, out / "tokenizer.json", vocab, pieces)

    held, held_video, held_events = make_data(10_000_000, options.held_out, device)
    for pair, frames in ((pairs["target"], held_video), (pairs["drafter"], held_events)):
        exact, right, asked = 0, {}, {}
        held_examples = Examples(text, pair.side, truth[:1], device)
        for q in (0, 4, 8):
            for world, ids in zip(held, greedy(pair.eval(), frames, held_examples, q), strict=True):
                said_text = text.decode(ids)
                exact += said_text == scenes.answer(world, q)
                found = scenes.parse(said_text)
                for name, value in scenes.stated(world).items():
                    asked[name] = asked.get(name, 0) + 1
                    right[name] = right.get(name, 0) + (found.get(name) == value)
        rates = {name: round(right[name] / asked[name], 3) for name in asked}
        asked_in_all = 3 * len(held)
        print(f"{pair.side}: exact {exact / asked_in_all:.3f} of {asked_in_all} held-out answers, {rates}", flush=True)


if __name__ == "__main__":
    main()
