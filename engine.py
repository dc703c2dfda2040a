"""Headstart: lossless cross-modal speculative decoding at batch one, in one file.

EventGPT (the drafter) sees events and is ready long before Video-LLaVA (the target), which sees video. The drafter
uses that head start to propose ids; the target verifies them in one forward and goes on. The answer is always the
target's own, token for token: greedy, or with a temperature the one that it alone draws under the seed.

     event frames - encode -+                     video frames - encode -+
     prompt ids --- embed --+ splice - prefill    prompt ids --- embed --+ splice - prefill
                                          |                                            |
                                   drafter cache                                 target cache
                                          |                                            |
        +-> draft: G one-row forwards ----+-- draft_ids --> verify: one forward of [pending_id, draft_ids]
        |                                                                              |
        +-- cache_len += accept_len + 1, pending_id = bonus_id <---- accept <----------+

Read it in the order of the picture: configs, prompts, decoder, vision, drafter and target, step graphs, when to draft,
the request, loading. Kernels are in kernels/; what reads files, and who may draft in the drafter's place, in weights/.
`python engine.py` shows the claim on the embedded tiny pair.

Shapes are written into names, one letter a dimension; batch is one and carries none:
    R frames   P patches   C vision width   D model width   S rows in this step   M cache rows   L layers
    H query heads   N key/value heads   K head width   F feed-forward width   V vocabulary   G draft length
    W words of a request's state
"""

from __future__ import annotations

import collections
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import json
import queue
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import kernels  # noqa: F401  first: it keeps torch quiet where numpy is absent

# isort: split
import torch
import torch.nn.functional as F

from kernels.attention import attention, step_attention
from kernels.fp8 import norm8, product8, rows8, weight8
from kernels.frames import clip_pixels, draw_events, to_device
from kernels.quant import BITS, NotPackable, packed_bytes, quantise
from kernels.quant_rows import MAX_PACKED_ROWS
from kernels.recall import ALONE, FIRST, NOTHING, ORDER, Recall, recall
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rope_store import rope_store
from kernels.round import close_round, open_round
from kernels.sample import sample, sampling_words
from kernels.skinny import Workspace, skinny
from kernels.swiglu import swiglu
from kernels.tower import add_layernorm, layernorm, quick_gelu
from weights import InputError, describe
from weights.events import Events, read_events
from weights.files import insist_file
from weights.load import (
    DRAFTER_7B,
    TARGET_7B,
    free_bytes,
    insist_on_room,
    no_room,
    open_checkpoint,
    plan,
    random_weights,
)
from weights.sources import (
    SOURCES,
    Adapted,
    Best,
    Blend,
    BlendText,
    Constant,
    DrafterText,
    DraftSource,
    Fixed,
    Memory,
    Previous,
    Recalled,
    agreeing,
    source_named,
)
from weights.text import Text, TextStream
from weights.video import VIDEO_RULES, read_images, read_video

__all__ = ["MODES", "SOURCES", "Adapted", "Best", "Blend", "BlendText", "Constant", "DraftSource", "DrafterText",
           "Engine", "Event", "Fixed", "InputError", "Memory", "PrefillOnlyInference", "Previous", "Recalled",
           "Result",
           "load_engine", "model_name", "source_named"]

MODES = ("target_only", "drafter_only", "prefill_only", "prefill_then_verify", "speculative")
STEP_ROWS = 32          # forwards of up to this many rows go through the step kernels, whose bits ignore the row count
RECALL_MOST = 15        # ids that a drafter recalls for one step: 16 rows, as many as packed weights serve; a target
                        # may recall STEP_ROWS - 1, while more than one a step is right: 32 rows take 1.07 of a step
RECALL_ROWS = {True: 1 << 16, False: 1 << 13}    # ids of its earlier texts that a model keeps, on a GPU and on a CPU
RECALL_PAYS = {None: 0.1, 8: 0.45, 4: 0.9}       # ids that must be right in a step for its rows to pay, by bits of its
                                                 # weights: 16 rows take 1.03 of a step, 1.44 at 8 bits, 1.8 to 1.9 at 4
SHARES = (0.5, 0.2, 0.1, 0.05)    # how often a drafter's first, second, .. guess is right, until there is experience
GUESSES = len(SHARES)   # ids that a drafter on its own device names for the next place, the likeliest first
KEPT_ROWS = 32          # cache rows where such a drafter puts aside what another guess takes the place of
CHECKS = {"draft": "recall", "decode": "verify"}    # a stage of one id a forward, and the same with recalled ids
STATE = 8               # words before the ids in a request's state; kernels/round.py names them
N_OUT, DONE, ACCEPT_LEN, PROMPT_LEN, EOS_ID, LIMIT, NONFINITE, RECALLED = range(STATE)

# ---- configs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a LLaMA-style decoder. Defaults are LLaMA-7B's, which upstream config files leave out."""
    D: int = 4096               # model width
    L: int = 32                 # layers
    H: int = 32                 # query heads
    N: int = 32                 # key/value heads, each serving H // N query heads
    K: int = 128                # head width
    F: int = 11008              # feed-forward width
    V: int = 32000              # vocabulary rows
    eps: float = 1e-5           # RMSNorm
    theta: float = 10000.0      # rotary base
    max_rows: int = 4096        # positions the model was trained for
    bos_id: int = 1
    eos_id: int = 2

    def cache_bytes(self, rows: int, itemsize: int) -> int:
        """Keys and values, the rotary tables beside them, and the rows a prefill starts from."""
        return rows * itemsize * (2 * self.L * self.N * self.K + 2 * self.K + self.D)

    @classmethod
    def read(cls, raw: dict) -> DecoderConfig:
        """From a Hugging Face LLaMA config; `rope_parameters` is the newer home of `rope_theta`. null is no value."""
        raw = {name: value for name, value in raw.items() if value is not None}
        H, D = raw.get("num_attention_heads", 32), raw.get("hidden_size", 4096)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"config.json: rope scaling {rope} is not supported; use a model with plain rotary")
        return cls(D=D, L=raw.get("num_hidden_layers", 32), H=H, N=raw.get("num_key_value_heads") or H,
                   K=raw.get("head_dim") or D // H, F=raw.get("intermediate_size", 11008),
                   V=raw.get("vocab_size", 32000), eps=raw.get("rms_norm_eps", 1e-5),
                   theta=raw.get("rope_theta", rope.get("rope_theta", 10000.0)),
                   max_rows=raw.get("max_position_embeddings", 4096),
                   bos_id=raw.get("bos_token_id", 1), eos_id=raw.get("eos_token_id", 2))


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a CLIP vision tower, and the constants of its image processor."""
    C: int = 1024               # width
    layers: int = 24
    heads: int = 16
    image: int = 224            # side of the square it sees, pixels
    patch: int = 14             # side of a patch, pixels
    eps: float = 1e-5
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)

    @property
    def P(self) -> int:
        return (self.image // self.patch) ** 2

    @classmethod
    def read(cls, raw: dict) -> VisionConfig:
        raw = {name: value for name, value in raw.items() if value is not None}
        if raw.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise InputError(f"config.json: vision activation {raw['hidden_act']}, only quick_gelu is supported")
        return cls(C=raw.get("hidden_size", 1024), layers=raw.get("num_hidden_layers", 24),
                   heads=raw.get("num_attention_heads", 16), image=raw.get("image_size", 224),
                   patch=raw.get("patch_size", 14), eps=raw.get("layer_norm_eps", 1e-5))


# ---- prompts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Ids around the visual rows. `rows` is the whole prompt's length once they are spliced in."""
    before: list[int]
    after: list[int]

    def rows(self, visual_rows: int) -> int:
        return len(self.before) + visual_rows + len(self.after)


def check_question(question) -> str:
    if not isinstance(question, str):
        raise InputError(f"question: wanted text, got {type(question).__name__}; pass a str")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("question: holds half a surrogate pair, not valid text; decode it as UTF-8 first") from None
    if len(question) > 100_000:
        raise InputError(f"question: {len(question)} characters, at most 100000; shorten it")
    return question


def check_sampling(temperature, top_p, seed, names=("temperature", "top_p", "seed")) -> None:
    """InputError unless temperature is 0..100, top_p above 0 and up to 1, and seed a whole number 0..2**63 - 1."""
    for name, value, kinds, fits, wanted in (
            (names[0], temperature, (int, float), lambda x: 0 <= x <= 100, "a number 0..100"),
            (names[1], top_p, (int, float), lambda x: 0 < x <= 1, "a number above 0 and up to 1"),
            (names[2], seed, int, lambda x: 0 <= x < 2 ** 63, "a whole number 0..2**63 - 1")):
        if not isinstance(value, kinds) or isinstance(value, bool) or not fits(value):
            raise InputError(f"{name}: wanted {wanted}, got {value!r}; change it")


# ---- decoder ---------------------------------------------------------------------------------------------------


class Decoder:
    """LLaMA over a static cache. One forward, masked by position, serves prefill, draft, verify and decode.

    weights: the `text.*` tensors of weights/names.py. Keys are cached after rotary. Row s of a step attends to the
    cache rows 0..pos_ids[s] and to nothing else, so what lies beyond is stale and harmless.
    drafts: a step's bits may follow its number of rows, since only drafts hang on them.
    Source: transformers' LlamaForCausalLM, rounding order included.
    """

    def __init__(self, config: DecoderConfig, weights: dict, cache_rows: int, drafts: bool = False):
        self.config, self.w = config, weights
        self.embed_VD = weights["text.embed"]
        self.head_VD = weights.get("text.head", self.embed_VD)
        self.device, self.dtype = self.embed_VD.device, self.embed_VD.dtype
        self.layers = [{name: weights[f"text.layers.{i}.{name}"] for name in
                        ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down")} for i in range(config.L)]
        self.step_layers, self.step_head_VD = self.layers, self.head_VD
        self.packed: str | None = None
        self.step_rows, self.fp8 = STEP_ROWS, False
        self.work = Workspace(self.device, config.D, config.H, config.K, cache_rows, drafts=drafts)
        shape = (config.L, config.N, cache_rows, config.K)
        self.k_cache_LNMK = torch.zeros(shape, dtype=self.dtype, device=self.device)   # zeros: unseen must be finite
        self.v_cache_LNMK = torch.zeros_like(self.k_cache_LNMK)
        freq = 1.0 / config.theta ** (torch.arange(0, config.K, 2, dtype=torch.float32) / config.K)  # upstream's
        angle_MK = torch.outer(torch.arange(cache_rows, dtype=torch.float32), freq).repeat(1, 2)
        self.cos_MK = angle_MK.cos().to(self.device, self.dtype)
        self.sin_MK = angle_MK.sin().to(self.device, self.dtype)

    @property
    def cache_rows(self) -> int:
        return self.k_cache_LNMK.shape[2]

    def pack(self, name: str) -> None:
        """From now on steps of up to 16 rows read 8 or 4 bit copies of the weights, to be faster and a little wrong:
        for drafters alone. `int8` and `int4` keep the full weights beside them for more rows. `fp8` has e4m3 weights
        in their place: prefill takes two thirds of the time, and the rows that every draft looks back at are a little
        wrong as well."""
        of_layers, of_head = BITS[name]
        norms = {"qkv": "attn_norm", "o": None, "gate_up": "mlp_norm", "down": None}
        self.step_layers = [layer | {product: quantise(layer[product], of_layers, norm_D=layer.get(norm))
                                     for product, norm in norms.items()} for layer in self.layers]
        self.step_head_VD, self.packed = quantise(self.head_VD, of_head, norm_D=self.w["text.norm"]), name
        self.step_rows, self.fp8, self.work.by_columns = MAX_PACKED_ROWS, name.startswith("fp8"), True
        for i, layer in enumerate(self.layers if self.fp8 else []):
            self.layers[i] = {product: weight8(layer[product], layer.get(norm)) for product, norm in norms.items()}
            for product in norms:
                del self.w[f"text.layers.{i}.{product}"]

    def forward(self, hidden_SD, pos_ids_S, only=None):
        """Writes cache rows pos_ids_S; returns logits [S, V], or those of the rows that `only` (int64, few) names.

        `only` is for prefill: the last layer's queries and feed-forward are computed for these rows alone, since
        nobody reads the others; its keys and values are stored for all.
        """
        c, rows = self.config, len(pos_ids_S)
        if rows <= self.step_rows:
            for layer in range(c.L):
                hidden_SD = self._step_layer(layer, hidden_SD, pos_ids_S)
            logits_SV = skinny(hidden_SD, self.step_head_VD, self.work, norm=(self.w["text.norm"], c.eps))
            return logits_SV if only is None else logits_SV.index_select(0, only)
        fresh_SD = scale_S = None                            # the last block's output, not yet added to the stream
        for layer in range(c.L):
            kept = only if layer == c.L - 1 else None
            if self.fp8:
                hidden_SD, fresh_SD, scale_S = self._prefill_layer8(layer, hidden_SD, fresh_SD, scale_S, pos_ids_S,
                                                                    kept)
            else:
                hidden_SD, fresh_SD = self._prefill_layer(layer, hidden_SD, fresh_SD, pos_ids_S, kept)
        if scale_S is not None:
            fresh_SD = (fresh_SD.float() * scale_S[:, None]).to(self.dtype)
        normed_SD, _ = add_rmsnorm(fresh_SD, hidden_SD, self.w["text.norm"], c.eps)
        return product(normed_SD, self.head_VD)

    def _step_layer(self, layer: int, hidden_SD, pos_ids_S):
        """Few rows at consecutive positions, six launches: the weights are read once, and a row's bits do not
        depend on how many rows there are. That is what makes a verify row equal a decode row."""
        c, w, work = self.config, self.step_layers[layer], self.work
        qkv_SE = skinny(hidden_SD, w["qkv"], work, norm=(w["attn_norm"], c.eps))
        mixed_SHK = step_attention(qkv_SE, self.k_cache_LNMK[layer], self.v_cache_LNMK[layer], pos_ids_S,
                                   self.cos_MK, self.sin_MK, work)
        hidden_SD = skinny(mixed_SHK.flatten(1), w["o"], work, residual=hidden_SD)
        up_SF = skinny(hidden_SD, w["gate_up"], work, norm=(w["mlp_norm"], c.eps), gated=True)
        return skinny(up_SF, w["down"], work, residual=hidden_SD)

    def _prefill_layer(self, layer: int, hidden_SD, fresh_SD, pos_ids_S, only):
        """Many rows, cuBLAS products. Returns the stream and what this layer's feed-forward adds to it."""
        c, w = self.config, self.layers[layer]
        if fresh_SD is None:
            normed_SD = rmsnorm(hidden_SD, w["attn_norm"], c.eps)
        else:
            normed_SD, hidden_SD = add_rmsnorm(fresh_SD, hidden_SD, w["attn_norm"], c.eps)
        k_NMK, v_NMK = self.k_cache_LNMK[layer], self.v_cache_LNMK[layer]
        q_SHK = rope_store(product(normed_SD, w["qkv"]), pos_ids_S, self.cos_MK, self.sin_MK, k_NMK, v_NMK)
        if only is not None:
            q_SHK, hidden_SD, pos_ids_S = (t.index_select(0, only) for t in (q_SHK, hidden_SD, pos_ids_S))
        mixed_SD = product(attention(q_SHK, k_NMK, v_NMK, pos_ids_S).flatten(1), w["o"])
        normed_SD, hidden_SD = add_rmsnorm(mixed_SD, hidden_SD, w["mlp_norm"], c.eps)
        return hidden_SD, product(swiglu(product(normed_SD, w["gate_up"])), w["down"])

    def _prefill_layer8(self, layer: int, hidden_SD, fresh_SD, scale_S, pos_ids_S, only):
        """The same with e4m3 products, whose norms are folded in. What the layer adds has a scale for each row."""
        c, w, dtype = self.config, self.layers[layer], self.dtype
        x8_SD, hidden_SD = norm8(hidden_SD, c.eps, fresh_SD, scale_S)
        k_NMK, v_NMK = self.k_cache_LNMK[layer], self.v_cache_LNMK[layer]
        q_SHK = rope_store(product8(x8_SD, w["qkv"], dtype), pos_ids_S, self.cos_MK, self.sin_MK, k_NMK, v_NMK)
        if only is not None:
            q_SHK, hidden_SD, pos_ids_S = (t.index_select(0, only) for t in (q_SHK, hidden_SD, pos_ids_S))
        x8_SD, scale_S = rows8(attention(q_SHK, k_NMK, v_NMK, pos_ids_S).flatten(1))
        x8_SD, hidden_SD = norm8(hidden_SD, c.eps, product8(x8_SD, w["o"], dtype), scale_S)
        x8_SF, scale_S = rows8(product8(x8_SD, w["gate_up"], dtype), gated=True)
        return hidden_SD, product8(x8_SF, w["down"], dtype), scale_S


def product(x_SD, w_OD):
    """x @ w.T. Many rows: cuBLAS, which is fastest there. One row, prefill's last: the step's kernel."""
    return skinny(x_SD, w_OD) if x_SD.shape[0] <= STEP_ROWS else F.linear(x_SD, w_OD)


# ---- vision ----------------------------------------------------------------------------------------------------


class Tower:
    """CLIP ViT: pixels_R3XX to hidden rows [R, P + 1, C], CLS first, after `layers` encoder layers, no final norm.

    Source: transformers' CLIPVisionModel with quick-GELU. Frames are a batch; nothing mixes them.
    """

    def __init__(self, config: VisionConfig, weights: dict, prefix: str):
        self.config = config
        self.w = {name[len(prefix) + 1:]: t for name, t in weights.items() if name.startswith(prefix + ".")}
        self.patch_CE = self.w["patch"].flatten(1)           # a convolution with stride = kernel is one product

    def __call__(self, pixels_R3XX, layers: int):
        c, w = self.config, self.w
        R, side = len(pixels_R3XX), c.image // c.patch
        tiles = pixels_R3XX.to(self.patch_CE.dtype).reshape(R, 3, side, c.patch, side, c.patch)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(R, c.P, 3 * c.patch ** 2)              # [R, P, patch's numbers]
        h_RSC = torch.cat([w["cls"].expand(R, 1, c.C), F.linear(tiles, self.patch_CE)], 1) + w["pos"]
        del tiles                                            # what nobody needs any more would stay to the end
        h_RSC = layernorm(h_RSC, *self._norm("pre_norm"))
        fresh_RSC = None                                     # the last block's output, not yet added to the stream
        for j in range(layers):
            if fresh_RSC is None:
                normed_RSC = layernorm(h_RSC, *self._norm("layers.0.norm1"))
            else:
                normed_RSC, h_RSC = add_layernorm(fresh_RSC, h_RSC, *self._norm(f"layers.{j}.norm1"))
            qkv = F.linear(normed_RSC, w[f"layers.{j}.qkv.w"], w[f"layers.{j}.qkv.b"])
            q, k, v = qkv.reshape(R, c.P + 1, 3, c.heads, c.C // c.heads).permute(2, 0, 3, 1, 4)
            mixed_RSC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(R, c.P + 1, c.C)
            mixed_RSC = F.linear(mixed_RSC, w[f"layers.{j}.out.w"], w[f"layers.{j}.out.b"])
            normed_RSC, h_RSC = add_layernorm(mixed_RSC, h_RSC, *self._norm(f"layers.{j}.norm2"))
            fresh_RSC = F.linear(quick_gelu(F.linear(normed_RSC, w[f"layers.{j}.fc1.w"], w[f"layers.{j}.fc1.b"])),
                                 w[f"layers.{j}.fc2.w"], w[f"layers.{j}.fc2.b"])
        return h_RSC if fresh_RSC is None else h_RSC + fresh_RSC

    def _norm(self, name: str):
        return self.w[name + ".w"], self.w[name + ".b"], self.config.eps


# ---- drafter and target ----------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What another model expects this one to say, apart from the texts, which lie on the device."""
    alone: bool = False                     # what this model recalls does not count
    lens: tuple[int, ...] = (0,)            # numbers of drafts that a step may look at
    share: float = 0.0                      # how often a draft is right if all before it are; 0: nothing is expected
    drafts: int = 0                         # in the likeliest text, or of a head start the most that there may be


class Model:
    """What drafter and target share: a decoder, one request's state on the device, its step graphs and stream.

    state_W int64 holds the answer as it grows (kernels/round.py): the device alone advances it, the host reads
    copies. `step(G)` is one round of a target with G drafts; `step(0)` is plain decode; `step_recalled(G)` drafts what
    this model wrote before in such a place, so that its own text costs it a forward for several ids.
    """
    side = ""                                                # "drafter" or "target"
    priority = 0                                             # of its stream; lower goes first
    drafts = False                                           # only drafts hang on its ids: its prefill may check some
    vision: VisionConfig
    origin: dict                                             # {"hash", "revision"} of its checkpoint, see `load_model`
    seen: torch.Tensor | None = None                         # the pixels that were encoded last
    prompt: collections.abc.Callable                         # question -> Prompt; the two below say how
    encode: collections.abc.Callable                         # pixels -> visual rows

    def __init__(self, decoder: Decoder, text: Text, path: str, graphs: bool = True):
        self.decoder, self.text, self.path = decoder, text, path
        self.device, self.config = decoder.device, decoder.config
        self.on_gpu = self.device.type == "cuda"
        self.graphs = graphs and self.on_gpu
        self.stream = torch.cuda.Stream(self.device, priority=self.priority) if self.on_gpu else None
        self.state_W = torch.zeros(STATE + decoder.cache_rows, dtype=torch.long, device=self.device)
        # What a warm-up runs on: one id after a prompt of one row, no end in sight.
        self.warm_head = torch.tensor([1, 0, 0, 1, -1, decoder.cache_rows, 0, 0]).to(self.device)
        self.tail_id = torch.zeros(1, dtype=torch.long, device=self.device)     # the prompt's last id
        self.recorded_2W: torch.Tensor | None = None          # `replay` puts ids here that stand in for its own choice
        self.sampling: tuple | None = None                   # this request's (temperature, top_p, seed); None: greedy
        self.sampling_3 = torch.zeros(3, dtype=torch.long, device=self.device)       # the same, for the kernel
        self.logits_SV: torch.Tensor | None = None           # of the last forward, until the next
        self.looks: list | None = None                       # what `_look` saw of each forward, where it is asked for
        self.texts = Recall(self.device, RECALL_ROWS[self.on_gpu], decoder.work.pdl)     # what it wrote before
        self.recall_len, self.recalls = 0, False             # ids recalled a step, at most; whether this request may
        self.recalled = 1.0                                  # how many of them were right of late
        self.expected = Expected()                           # of what another model holds likely
        self.draft_ids, self.pixels, self.steps, self.prompt_rows = {}, {}, {}, 0
        self.hidden_MD = torch.zeros(decoder.cache_rows, self.config.D, dtype=decoder.dtype, device=self.device)
        # One scratch and one stream for the capture of all its graphs: cuBLAS keeps 32 MiB for every stream it meets.
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.capture = torch.cuda.Stream(self.device, priority=self.priority) if self.graphs else None

    def on_stream(self):
        """Context in which this model's work is queued on its own stream; nothing on the CPU."""
        return torch.cuda.stream(self.stream) if self.on_gpu else contextlib.nullcontext()

    def splice(self, prompt: Prompt, visual_AD):
        """The prompt's rows [S, D] with the visual rows in place of the placeholder."""
        before, after = (to_device(torch.tensor(ids), self.device) for ids in (prompt.before, prompt.after))
        embed = self.decoder.embed_VD
        return torch.cat([embed[before], visual_AD.to(embed.dtype), embed[after]])

    def visual_rows(self, pixels_R3XX, image: bool = False):
        """`encode` as a graph: visual rows of float pixels, on the host or the device. Valid until the next call."""
        key = self.prepare_encode(len(pixels_R3XX), image)
        self.seen = self.pixels[key]
        self.seen.copy_(to_device(pixels_R3XX, self.device), non_blocking=True)
        return self.steps[key]()

    def prepare_encode(self, frames: int, image: bool = False):
        key = ("encode", frames, image)
        if key not in self.steps:
            while len(self.pixels) >= 8:                     # other numbers of pictures: a graph and a buffer each
                oldest = next(iter(self.pixels))
                self.steps.pop(oldest, None)
                del self.pixels[oldest]
            side = self.vision.image
            self.pixels[key] = torch.zeros(frames, 3, side, side, device=self.device)
            self.steps[key] = StepGraph(lambda: self.encode(self.pixels[key], image), self)
        return key

    def prefill(self, hidden_SD, limit: int, eos_id: int, tail_id: int) -> None:
        """Fills cache rows 0..S-1 and puts the first answer id into the state."""
        self.prompt_rows = len(hidden_SD)
        key = self.prepare_prefill(self.prompt_rows, self.next_len() if self.drafts else 0)
        self.hidden_MD[:self.prompt_rows].copy_(hidden_SD)
        head = torch.tensor([0, 0, 0, self.prompt_rows, eos_id, limit, 0, 0])
        self.state_W[:STATE].copy_(to_device(head, self.device), non_blocking=True)
        self.tail_id.fill_(tail_id)
        if self.sampling:
            self.sampling_3.copy_(to_device(sampling_words(*self.sampling), self.device), non_blocking=True)
        self._look(key, 0)

    def prepare_prefill(self, rows: int, G: int = 0):
        """On a GPU the rows are padded to a multiple of 16, so that questions of similar length share one graph. The
        padding sits behind the prompt: it fills cache rows that nobody sees before decode overwrites them."""
        size = min(-(-(rows + G) // 16) * 16, self.decoder.cache_rows) if self.on_gpu else rows + G
        sampled = self.sampling is not None
        key = ("prefill", size, sampled, G)
        if key not in self.steps:
            pos_ids_S = torch.arange(size, device=self.device)
            self.steps[key] = StepGraph(lambda: self._prefill(pos_ids_S, sampled, G), self)
        return key

    def _prefill(self, pos_ids_S, sampled: bool, G: int):
        """G: drafts of the answer's first ids, which stand behind the prompt and are checked along with it."""
        rows_S = self.state_W[PROMPT_LEN:PROMPT_LEN + 1] - 1 + torch.arange(G + 1, device=self.device)
        drafts_G = self._drafts(G, recalled=True)
        if G:
            known_G = drafts_G.clamp(0, self.config.V - 1)
            self.hidden_MD.index_copy_(0, rows_S[1:], self.decoder.embed_VD[known_G])
        logits_SV = self.decoder.forward(self.hidden_MD[:len(pos_ids_S)], pos_ids_S, only=rows_S)
        logits_SV = self._chosen(logits_SV, sampled)
        close_round(logits_SV, drafts_G, self.state_W, self.decoder.work.round)
        return logits_SV

    def _drafts(self, G: int, recalled: bool):
        """Drafts of a forward, int64 [G]: those that were put into `draft_ids`, or what this model wrote before in
        such a place."""
        if recalled and G:
            recall(self.texts, self.state_W, self.draft_ids[G])
        return self.draft_ids[G] if G else self.state_W[:0]

    def step(self, G: int = 0) -> None:
        """One forward of [pending_id, G drafts] and its accept; G = 0 is one decode step. Nothing is returned:
        the state moves on. A state that is done stays as it is."""
        self.prepare(G)
        self._look(self._step_key(G), G)

    def step_recalled(self, G: int) -> None:
        """The same with ids that this model recalls, on its device: one forward for several ids, and no host asked."""
        self.prepare(G, recalled=True)
        self._look(self._step_key(G, recalled=True), G)

    def prepare(self, *lengths: int, recalled: bool = False) -> None:
        """Builds the steps for these draft lengths. On CUDA this captures, so it has to come before prefill."""
        sampled = self.sampling is not None
        for G in lengths:
            if G not in self.draft_ids:
                self.draft_ids[G] = torch.full((G,), -1, dtype=torch.long, device=self.device)
            key = self._step_key(G, recalled)
            if key not in self.steps:
                self.steps[key] = StepGraph(lambda G=G: self._round(G, sampled, recalled), self)

    def _step_key(self, G: int, recalled: bool = False):
        kinds = ("recalled",) * recalled + ("sampled",) * (self.sampling is not None)
        return (*kinds, G) if kinds else G

    def next_len(self) -> int:
        """Ids to recall for the next step: none while they are too seldom right to pay for the wider step."""
        if not self.recalls:
            return 0
        if self.texts.texts and self.recalled > self.recall_pays and not self.expected.alone:
            return self.recall_len if self.recalled > 1.0 else min(self.recall_len, RECALL_MOST)
        if self.expected.share > self.recall_pays:
            return min(G for G in self.expected.lens if G >= min(self.expected.drafts, max(self.expected.lens)))
        return 0

    @property
    def recall_pays(self) -> float:
        """Recalled ids that have to be right in a step, on average, to pay for its rows."""
        return RECALL_PAYS[BITS[self.decoder.packed][0] if self.decoder.packed else None]

    def judge(self, G: int, state) -> None:
        """Learns from a step of G recalled ids and its state. Where they do not pay they are tried again after 40 steps
        without. What another model expected is not this one's to judge, nor a step in which only that counted."""
        if not G:
            almost = min(self.recalled + 0.25 / 40 * self.recall_pays, 1.01 * self.recall_pays)
            self.recalled = max(self.recalled, almost)
        elif state[RECALLED] >= 0 and not self.expected.alone:
            self.recalled += 0.25 * (state[ACCEPT_LEN] - self.recalled)

    def expect(self, texts, share: float, drafts: int) -> None:
        """Another model holds these texts likely, the likeliest first (see kernels/recall.py), with so many drafts in
        that one, each right with `share` if all before it are. From any thread. They come before what this model
        recalls where more of them are expected to be right."""
        worth = sum(share ** k for k in range(1, drafts + 1))
        rank = ALONE if self.expected.alone else FIRST if worth > self.recalled else NOTHING
        self.texts.expect(texts, rank.value)
        self.expected.drafts = drafts
        self.expected.share = share if drafts or self.on_gpu else 0.0    # a GPU's next step is queued before its drafts

    def remember(self, ids) -> None:
        """Keeps a text that this model wrote, to be recalled."""
        if len(ids):
            with self.on_stream():
                self.texts.teach(ids)

    def forget(self) -> None:
        """Drops all texts that it might recall."""
        with self.on_stream():
            self.texts.forget()

    def _look(self, key, G: int) -> None:
        """Runs a forward; under `explain` it also keeps where in the answer it stood, its drafts, and the two best ids
        of every row with their logits, all still on the device."""
        first = None if self.looks is None else self.state_W[:1].clone()
        self.logits_SV = self.steps[key]()
        if self.looks is None:
            return
        best = self.logits_SV.float().topk(2)
        self.looks.append((first, self.draft_ids[G].clone() if G else self.state_W[:0], best))

    def verdicts(self, answer: list[int]) -> list[Verdict]:
        """What was kept of each forward that made ids of this answer, read from the device."""
        starts, found = [int(first) for first, _, _ in self.looks], []
        for i, (_, drafts_G, (logits_S2, ids_S2)) in enumerate(self.looks):
            said, drafts = answer[starts[i]:[*starts, len(answer)][i + 1]], drafts_G.tolist()
            while drafts[-1:] == [-1]:                       # a short span is padded
                drafts.pop()
            second = [b if a == own else a for own, (a, b) in zip(said, ids_S2.tolist(), strict=False)]
            margins = (logits_S2[:, 0] - logits_S2[:, 1]).tolist()[:len(said)]
            if said:                                         # steps queued behind the end said nothing
                found.append(Verdict(starts[i], drafts, said, second, margins))
        return found

    def _round(self, G: int, sampled: bool, recalled: bool):
        drafts_G, work = self._drafts(G, recalled), self.decoder.work.round
        _, pos_ids_S, hidden_SD = open_round(self.state_W, drafts_G, self.decoder.embed_VD, work)
        logits_SV = self._chosen(self.decoder.forward(hidden_SD, pos_ids_S), sampled)
        close_round(logits_SV, drafts_G, self.state_W, work)
        return logits_SV

    def replay(self, ids, second=()) -> None:
        """From here on this model computes as ever and says `ids`, recorded elsewhere, then end-of-sequence: real speed
        at a real acceptance without the checkpoint. second: the ids that come next to these in its choice; where it
        ends there is no other choice. Call it before the first request; later calls change the ids."""
        if self.recorded_2W is None:
            assert not self.steps, "replay: graphs without it exist already"
            self.recorded_2W = torch.zeros_like(self.state_W).repeat(2, 1)
        words = self.recorded_2W.shape[1]
        said = (list(ids) + [self.config.eos_id] * words)[:words]
        self.recorded_2W.copy_(torch.tensor([said, [*second, *said[len(second):]][:words]]))

    def _chosen(self, logits_SV, sampled: bool):
        """Rows of a step, after n_out ids, whose largest elements are the model's ids. In a replay the recorded ids win
        every row. Sampled, the draws do: they are made before any draft is looked at and depend on none, so accepting
        what equals them is Leviathan et al. 2023's rule for a draft that is certain: d with probability p(d), else
        an id of p without d."""
        if self.recorded_2W is not None:
            at_S = self.state_W[:1] + torch.arange(len(logits_SV), device=self.device)
            ids_2S = self.recorded_2W.index_select(1, at_S.clamp(max=self.recorded_2W.shape[1] - 1))
            largest = torch.finfo(logits_SV.dtype).max
            logits_SV.scatter_(1, ids_2S[1][:, None], largest / 2).scatter_(1, ids_2S[0][:, None], largest)
        return sample(logits_SV, self.state_W, self.sampling_3) if sampled else logits_SV

    def snapshot(self, words: int) -> Snapshot:
        return Snapshot(self.state_W[:words], self.stream)


class Target(Model):
    """Video-LLaVA. Its greedy answer is the truth. Source: transformers' VideoLlavaForConditionalGeneration."""
    side = "target"
    priority = -1

    def __init__(self, config: dict, weights: dict, text: Text, path: str, cache_rows=None, graphs=True):
        decoder_config = DecoderConfig.read(config.get("text_config") or {})
        super().__init__(Decoder(decoder_config, weights, cache_rows or decoder_config.max_rows), text, path, graphs)
        self.vision = VisionConfig.read(config.get("vision_config") or {})
        self.video_tower, self.image_tower = Tower(self.vision, weights, "video"), Tower(self.vision, weights, "image")
        self.projector = [weights[f"projector.{i}.{p}"] for i in (0, 1) for p in "wb"]
        layer = config.get("vision_feature_layer", -2)
        self.layers = layer if layer >= 0 else self.vision.layers + 1 + layer      # -2 of 25 hidden states is 23
        self.keep_cls = config.get("vision_feature_select_strategy", "default") == "full"   # images only
        self.num_frames = frames_of(config, self.vision)

    def prompt(self, question: str) -> Prompt:
        bos = [self.config.bos_id]
        return Prompt(bos + self.text.ids("USER: "), self.text.ids(f"\n{question} ASSISTANT:", first=False))

    def encode(self, pixels_R3XX, image: bool = False):
        """Visual rows [R * (P + 1), D] of a clip's frames; [R * P, D] for images, whose CLS row upstream drops."""
        tower = self.image_tower if image else self.video_tower
        rows_RSC = tower(pixels_R3XX, self.layers)
        if image and not self.keep_cls:
            rows_RSC = rows_RSC[:, 1:]
        w0, b0, w1, b1 = self.projector
        return F.linear(F.gelu(F.linear(rows_RSC.flatten(0, 1), w0, b0)), w1, b1)


class Drafter(Model):
    """EventGPT. It proposes, and never decides. Source: the original EventChatModel."""
    side = "drafter"
    drafts = True
    SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the human's questions.")

    def __init__(self, config: dict, weights: dict, text: Text, path: str, cache_rows=None, graphs=True):
        decoder_config = DecoderConfig.read(config)
        decoder = Decoder(decoder_config, weights, cache_rows or decoder_config.max_rows, drafts=True)
        super().__init__(decoder, text, path, graphs)
        self.vision = VisionConfig.read(config.get("vision_config") or {"image_size": 336})
        self.tower = Tower(self.vision, weights, "events")
        self.projector = [weights[f"projector.{i}.{p}"] for i in (0, 1) for p in "wb"]
        self.adaptor = [weights["adaptor.w"], weights["adaptor.b"]] if "adaptor.w" in weights else None
        flags = [bool(config.get(name, name == "mm_use_im_patch_token")) for name in
                 ("mm_use_im_start_end", "mm_use_im_patch_token")]
        first = 32000 + int(flags[1])                        # a patch token, if added, comes before the two markers
        self.marker_ids = (first, first + 1) if flags[0] else None
        self.one_zero = torch.tensor([1, 0]).to(self.device)
        self.committed_W = torch.zeros_like(self.state_W)    # what `resume` takes over, and on its way from the host
        self.host_W = torch.zeros(self.state_W.shape, dtype=torch.long, pin_memory=self.on_gpu)
        self.host_read = torch.cuda.Event() if self.on_gpu else None
        self.laid: list[Node] = []                           # on a device of its own: the texts whose last ids have
        self.kept: dict[Node, int] = {}                      # rows behind the prompt, and whose rows are put aside

    def prompt(self, question: str) -> Prompt:
        """Each side of the placeholder is encoded alone, and both get a leading-space mark, as upstream."""
        bos, ids = [self.config.bos_id], self.text.ids
        if self.marker_ids:
            start, end = self.marker_ids
            return Prompt(bos + ids(f"{self.SYSTEM} USER: ") + [start],
                          [end] + ids(f"\n{question} ASSISTANT:", first=False))
        return Prompt(bos + ids(f"{self.SYSTEM} USER: <ev_start>"), ids(f"<ev_end>\n{question} ASSISTANT:"))

    def encode(self, pixels_R3XX, image: bool = False):
        """Visual rows [R + P + 1, D]: one a frame (mean over its rows), then one a patch (mean over frames).

        Means commute with linear maps, so pooling happens right after the last nonlinearity: the same numbers
        to 1e-5 in fp32, a fifth of the work of pooling last.
        """
        rows_RSC = self.tower(pixels_R3XX, self.vision.layers)
        w0, b0, w1, b1 = self.projector
        hidden_RSD = F.gelu(F.linear(rows_RSC, w0, b0))
        if self.adaptor:
            hidden = torch.cat([hidden_RSD.mean(1), hidden_RSD.mean(0)])
            return F.linear(F.linear(hidden, w1, b1), *self.adaptor)
        rows_RSD = F.linear(hidden_RSD, w1, b1)
        return torch.cat([rows_RSD.mean(1), rows_RSD.mean(0)])

    def follow(self, committed_W, G: int):
        """G drafts after the ids in `committed_W`, the target's state: int64 [G], -1 past the drafter's own end."""
        n_out = committed_W[:1].clone()
        self.resume(committed_W)
        if G > 1 and self.next_len():                        # most often enough for all of them
            self.step_recalled(self.recall_len)
        else:
            for _ in range(G - 1):
                self.step(0)
        at_G = n_out + torch.arange(G, device=self.device)
        ids_G = self.state_W.gather(0, (STATE + at_G).clamp(max=len(self.state_W) - 1))
        return torch.where(at_G < self.state_W[:1], ids_G, -1)

    def resume(self, committed_W, rows: int = 2) -> int | None:
        """Takes over the ids in `committed_W`, int64 [W] (a target's state, or eight words that begin with n_out, and
        ids), and drafts one more. Returns how many it recalled with one row (0: none), None with more.

        The last `rows` committed ids are run again. Two of them are enough after a round, whose last accepted draft
        has no row yet; so the row that a fully accepted round leaves missing is always written and the host has
        nothing to decide. More rows write a text that has none: the target went on alone, or said another guess.
        """
        words, G = min(len(committed_W), len(self.state_W)), self.next_len() if rows == 1 else 0
        self.prepare_resume(rows, G)
        if self.host_read and committed_W.device.type == "cpu":          # page-locked memory afresh takes 0.09 ms
            self.host_read.synchronize()
            committed_W = self.host_W[:words].copy_(committed_W[:words])
        self.committed_W[:words].copy_(committed_W[:words], non_blocking=True)
        if self.host_read:
            self.host_read.record(self.stream)
        self.logits_SV = self.steps["resume", rows, G]()
        return G if rows == 1 else None

    def lay(self, node: Node, at: Node) -> int:
        """Moves the cache rows of the text of `node` to their places. Returns how many of its first ids have rows
        there, at most all but the last; the caller runs the others, and sets `laid`. at: the committed answer.

        Rows in their way, of other texts that begin with `at`, go to the cache's last KEPT_ROWS rows while there is
        room: a row serves every text that goes on from its own, so it may come back."""
        path, first, moves, end = node.path(), self.prompt_rows, [], self.decoder.cache_rows
        ready = agreeing(self.laid, path[:-1])
        self.kept = {of: row for of, row in self.kept.items() if of.within(at) or at.within(of)}
        free = [row for row in range(end - KEPT_ROWS, end) if row not in self.kept.values()]
        if not at.place or self.laid[at.place - 1:at.place] == [at]:     # what lies there begins with `at`
            for i, of in enumerate(self.laid[ready:], ready):
                if free and i >= at.place and of not in self.kept:
                    self.kept[of] = free.pop()
                    moves.append((first + i, self.kept[of]))
        while ready < len(path) - 1 and path[ready] in self.kept:
            moves.append((self.kept[path[ready]], first + ready))
            ready += 1
        for of in path[:min(ready, at.place)]:               # these are committed, and lie where they belong
            self.kept.pop(of, None)
        if moves:
            moves_2N = to_device(torch.tensor(moves).t().contiguous(), self.device)
            for cache_LNMK in (self.decoder.k_cache_LNMK, self.decoder.v_cache_LNMK):
                cache_LNMK.index_copy_(2, moves_2N[1], cache_LNMK.index_select(2, moves_2N[0]))
        return ready

    def guesses(self) -> Snapshot | None:
        """What may follow the text of the last forward, the likeliest first: int64 [GUESSES], on their way to the host.
        None where the last forward checked recalled ids."""
        return Snapshot(self.logits_SV[0].topk(GUESSES).indices, self.stream) if len(self.logits_SV) == 1 else None

    def prepare_resume(self, rows: int = 2, G: int = 0) -> None:
        """G: ids recalled with the last row, where it is the only one."""
        if ("resume", rows, G) not in self.steps:
            self.steps["resume", rows, G] = StepGraph(lambda: self._resume(rows, G), self)

    def _resume(self, rows: int, G: int):
        self.state_W[STATE:].copy_(self.committed_W[STATE:])           # what lies behind the ids is stale, and unseen
        self.state_W[:2].copy_(self.committed_W[:2] * self.one_zero)   # keep n_out, clear done
        self.state_W[LIMIT].fill_(len(self.state_W))                   # the limit was the head start's
        if rows == 1:                                        # its last id has no row yet, as after any step
            return self._round(G, sampled=False, recalled=G > 0)
        n_out = self.state_W[:1]
        first = (n_out - rows).clamp(min=-1)                           # before the first answer id comes the prompt
        at_S = first + torch.arange(rows, device=self.device)          # from n_out on they are stale, and unseen
        ids_S = self.state_W.gather(0, STATE + at_S.clamp(min=0, max=len(self.state_W) - STATE - 1))
        ids_S = torch.where(at_S < 0, self.tail_id, ids_S)
        known_S = ids_S.clamp(max=self.config.V - 1)                   # the target may know more ids than the drafter
        logits_SV = self.decoder.forward(self.decoder.embed_VD[known_S], self.state_W[PROMPT_LEN] + at_S)
        last_1V = self._chosen(logits_SV.index_select(0, n_out - 1 - first), sampled=False)
        close_round(last_1V, ids_S[:0], self.state_W, self.decoder.work.round)
        return last_1V


# ---- step graphs -----------------------------------------------------------------------------------------------


class StepGraph:
    """One captured call of `fn`, which reads and writes static tensors only. Eager where there is no graph.

    The warm-up run compiles kernels outside the capture; it and the capture write cache rows and state, so a
    graph is built before prefill. `out` is what fn returned, valid until the next replay.
    """

    def __init__(self, fn, model: Model):
        self.fn, self.graph, self.out = fn, None, None
        if not model.graphs:
            return
        kept = model.state_W.clone()
        model.state_W[:STATE].copy_(model.warm_head)         # the last request's lengths may not fit this shape
        with torch.cuda.device(model.device), torch.inference_mode():
            model.stream.wait_stream(torch.cuda.current_stream(model.device))
            with model.on_stream():
                fn()
            torch.cuda.synchronize(model.device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=model.pool, stream=model.capture,
                                  capture_error_mode="thread_local"):
                self.out = fn()
            model.state_W.copy_(kept)
            torch.cuda.synchronize(model.device)

    def __call__(self):
        if self.graph is None:
            self.out = self.fn()
        else:
            self.graph.replay()
        return self.out


class Snapshot:
    """A copy of int64 numbers, a state or guesses, on its way to the host. `read()` waits for it alone, never for work
    queued later."""

    def __init__(self, state_W, stream):
        if stream is None:
            self.host, self.ready = state_W.clone(), None
        else:
            self.host = torch.empty(state_W.shape, dtype=state_W.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                self.host.copy_(state_W, non_blocking=True)
                self.ready = torch.cuda.Event()
                self.ready.record(stream)

    def read(self) -> list[int]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.host.tolist()


# ---- when to draft ---------------------------------------------------------------------------------------------


class Gate:
    """Drafts only where that is expected to pay: while P(accepted >= k) x step > price of draft k.

    It learns times and acceptance from every request and never touches an id. Acceptance is the share of tries that
    agreed, per kind of draft, question and depth, recent ones counting more; an unknown question takes the pool's
    share. Whatever has no history is tried, and of the requests refused every `probe`-th is let through all the same,
    so that drafts that got better are noticed.
    """

    def __init__(self, decay: float = 0.95, probe: int = 64):
        self.decay, self.probe, self.refused = decay, probe, 0
        self.times = {}                     # what -> its last few durations, seconds
        self.tries = {}                     # (kind, question) -> [tried, agreed] for depth 1, 2, ...

    def timed(self, what, seconds: float) -> None:
        self.times.setdefault(what, collections.deque(maxlen=9)).append(seconds)

    def seconds(self, what):
        """The undisturbed duration of `what`, None if it was never seen."""
        return min(self.times[what]) if what in self.times else None

    @property
    def step(self):
        """Seconds of a plain step, or of a verify where none was ever seen: that costs about the same."""
        return self.seconds("step") or self.seconds("verify")

    @property
    def draft(self):
        """Seconds of a draft of a round; the target's step stands in while none was made."""
        return self.seconds("draft") or self.seconds(("head start", "draft")) or self.step

    @property
    def head_draft(self):
        """(seconds of a drafter's forward in a head start, ids that it brings)."""
        ids = self.usual("ids a forward") or 1.0
        return (ids > 1 and self.seconds(("head start", "recall"))) or self.draft, ids

    def usual(self, what):
        """Its median, for what the host does."""
        return statistics.median(self.times[what]) if what in self.times else None

    def accepted(self, kind: str, question: str, drafted: int, agreed: int) -> None:
        for key in ((kind, question), (kind, None)):
            depths = self.tries[key] = self.tries.pop(key, [])            # asked last, forgotten last
            for k in range(min(drafted, agreed + 1)):        # nothing is learnt behind the first rejection
                if k == len(depths):
                    depths.append([0.0, 0.0])
                depths[k] = [self.decay * depths[k][0] + 1, self.decay * depths[k][1] + (k < agreed)]
        while len(self.tries) > 1000:
            del self.tries[next(iter(self.tries))]

    def alive(self, kind: str, question: str, depth: int) -> list[float]:
        """P(accepted >= k) for k = 1..depth. A depth never reached takes the share of the one before."""
        depths = self.tries.get((kind, question)) or self.tries.get((kind, None)) or []
        share, product_of_shares, found = 1.0, 1.0, []
        for k in range(depth):
            if k < len(depths):
                share = (depths[k][1] + 0.2 * share) / (depths[k][0] + 0.2)
            product_of_shares *= share
            found.append(product_of_shares)
        return found

    def best_len(self, question: str, most: int):
        """(drafts a round, seconds an id) that end an answer soonest on one device; 0 drafts is plain decode."""
        step, draft, verify = self.step, self.draft, self.seconds("verify")
        if step is None or draft is None or verify is None:
            return most, 0.0
        best, ids = (0, step), 1.0
        for G, share in enumerate(self.alive("round", question, most), 1):
            ids += share
            best = min(best, (G, (G * draft + verify) / ids), key=lambda pair: pair[1])
        return best

    def head_start(self, req: Request, now: float) -> bool:
        """Whether the drafter should encode and prefill, `now` being the earliest it can begin."""
        front, step, (forward, ids), ready = self.seconds("front"), self.step, self.head_draft, req.ready(now)
        if front is None or step is None or forward is None or ready is None:
            return True
        at, gain, draft = now + front, 0.0, forward / ids
        for share in self.alive("span", req.question, req.overlap_len + 1)[1:]:       # the first id comes for free
            at += draft
            worth = share * step - min(draft, max(0.0, at - ready))
            if worth <= 0:
                break
            gain += worth
        if req.mode == "speculative":
            gain += max(0.0, step - self.best_len(req.question, req.draft_len)[1]) * req.max_new_tokens
        beside, alone = (self.usual(("frames", req.size, drafting)) for drafting in (True, False))
        price = max(0.0, beside - alone) if beside and alone else 0.0        # reading events slows the video's decoder
        if gain > price + max(0.0, now + front - ready):
            return True
        self.refused += 1
        return self.refused % self.probe == 0

    def another(self, req: Request, drafted: int, now: float) -> bool:
        """Whether a head start of `drafted` ids should grow, with a step already queued: for free while the target is
        not ready, else for a price."""
        step, (forward, ids), ready = self.step, self.head_draft, req.ready(now)
        if step is None or forward is None or ready is None:
            return not req.frames_ready.is_set()
        price = min(forward, max(0.0, now + 2 * forward - ready))
        return sum(self.alive("span", req.question, drafted + max(1, round(ids)))[drafted:]) * step > price

    def pays(self, kind: str, question: str, drafts: int) -> bool:
        """Whether a round of drafts from the host ends an answer sooner than plain steps."""
        step, took = self.step, self.seconds(("round", kind))
        return step is None or took is None or (1 + sum(self.alive(kind, question, drafts))) * step > took

    def learn(self, req: Request, result: Result) -> None:
        """Times of a request's stages, and how far its head start agreed with the answer, verified or not."""
        forwards = 0
        for row, stage, start, end, note in result.timeline:
            if (row, stage) in (("target", "decode"), ("target", "verify")):
                self.timed({"decode": "step"}.get(stage, stage), end - start)
            elif row == "drafter" and note.endswith(" ids"):
                self.timed("draft", (end - start) / int(note.split()[0]))
            elif (row, stage) in (("drafter", "draft"), ("drafter", "recall")):
                self.timed(("head start", stage), end - start)
                forwards += 1
            elif (row, stage) == ("drafter", "prefill"):
                self.timed("front", end - req.ready_at["events", req.size])
        for what, at in req.ready_at.items():
            self.timed(what, at)
        if ("frames", req.size) in req.ready_at:
            drafting = "load" in result.stages.get("drafter", {})
            self.timed(("frames", req.size, drafting), req.ready_at["frames", req.size])
        if forwards:
            self.timed("ids a forward", max(1.0, (len(result.preview_ids) - 1) / forwards))
        if result.preview_ids:
            self.accepted("span", req.question, len(result.preview_ids),
                          agreeing(result.preview_ids, result.output_ids))


class Node:
    """A text that may come: its parent's and one id more. next: the ids that the drafter expects to follow, the
    likeliest first; None until it was asked, empty where it named none."""
    __slots__ = ("parent", "id", "place", "next", "children")

    def __init__(self, parent: Node | None = None, id: int = -1):
        self.parent, self.id = parent, id
        self.place: int = parent.place + 1 if parent else 0  # ids so far
        self.next: list[int] | None = None
        self.children: dict[int, Node] = {}

    def then(self, id: int) -> Node:
        """The text with this id behind it, made when it is first asked for."""
        return self.children.get(id) or self.children.setdefault(id, Node(self, id))

    def tail(self, place: int) -> list[int]:
        """Its ids from that place on."""
        found, node = [], self
        while node.parent and node.place > place:
            found.append(node.id)
            node = node.parent
        return found[::-1]

    def path(self) -> list[Node]:
        """The texts on the way here, this one included; the empty one is not."""
        found, node = [], self
        while node.parent:
            found.append(node)
            node = node.parent
        return found[::-1]

    def within(self, node: Node) -> bool:
        """Whether this text begins with that one."""
        mine = self
        while mine.place > node.place:
            mine = mine.parent
        return mine is node


def smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + 0.2 * (new - old)


class Ahead:
    """What a drafter on its own device expects after each text it was asked about, and how far the answer really is.

    Each side looks when it likes and the target never waits; a guess that it did not confirm is off the way, no more.
    Nothing follows eos_id (-1: no such id), nor `limit` ids. Times in seconds, of any one clock.
    shares: how often of late the next id was the drafter's first guess, its second, ..; they outlive the request. The
    drafter is asked next about the text that they make likeliest: mostly the end of all its first guesses, but where
    these are often wrong what follows a second guess, so that its drafts are ready when the target says it.

    What this can bring: a run of right drafts ends with a wrong one, which costs a target's forward; each draft in it
    costs one of the drafter's, since what follows a wrong draft is not known before. If drafts are right with p and one
    takes c of a target's forward, no order of the two makes more than 1 / (1 - p + p c) ids a forward, not even one
    that knows the length of each run beforehand (head start, recalled ids and second guesses apart).
    Not built: all guesses in one forward of 16 rows, which at 4 bits takes 1.8 to 1.9 of a step."""

    def __init__(self, shares: list[float], eos_id: int, limit: int):
        self.shares, self.eos_id, self.limit = shares, eos_id, limit
        self.root = self.at = Node()                         # at: the committed answer
        self.heard: float | None = None                      # when the target last spoke
        self.step: float | None = None                       # seconds from then until it speaks again, of late
        self.forward: float | None = None                    # seconds of the drafter's forward, of late
        self.news, self.lock = threading.Event(), threading.Lock()           # news: the target has spoken

    def tell(self, node: Node, ids: list[int]) -> Node:
        """The drafter: after the text of `node` come `ids`. Returns the text with all of them."""
        with self.lock:
            end = node
            for i in ids:
                end.next = end.next or [i]
                end = end.then(i)
            node.next = node.next or []                      # asked, and nothing came
        return end

    def guess(self, node: Node, ids: list[int]) -> None:
        """The drafter: what else may come there, the likeliest first."""
        with self.lock:
            first = node.next[:1]
            node.next = [*first, *(i for i in ids if i not in first)][:GUESSES]

    def commit(self, committed: list[int], now: float) -> None:
        """The target, which has committed these ids at `now`, seconds: moves `at` there and counts in `shares` which
        guesses came true."""
        with self.lock:
            for i in committed[self.at.place:]:
                for rank in range(len(self.at.next or ())):
                    self.shares[rank] += 0.02 * ((self.at.next[rank] == i) - self.shares[rank])
                self.at = self.at.then(i)
            if self.heard is not None:
                self.step = smoothed(self.step, now - self.heard)
            self.heard = now
            self.news.set()

    def texts(self) -> tuple[list[list[int]], float, int]:
        """What may follow the answer so far, as `Model.expect` takes it."""
        with self.lock:
            ends, waiting = [], [self.at]
            while waiting:
                node = waiting.pop(0)
                while node.next:
                    waiting += [other for i, other in node.children.items() if other.next and i != node.next[0]]
                    node = node.then(node.next[0])
                ends.append(node)
            texts = [node.tail(self.at.place - ORDER) for node in ends]
            return texts, self.shares[0], ends[0].place - self.at.place

    def likeliest(self, now: float = 0.0) -> Node | None:
        """The drafter, at `now`: the text to be asked about next, None if there is nothing left to ask. Until the
        target has spoken, the end of its own text. Then None as well for a text that would be known `late`, after the
        target has spoken again: if that rejects it, what comes instead has to wait. Nobody waits for an overdue one."""
        waiting, count = [(-1.0, 0, self.at)], 0
        while waiting:
            chance, _, node = heapq.heappop(waiting)
            if node.parent and node.id == self.eos_id or node.place >= self.limit:
                continue                                     # nothing follows
            if node.next is None:
                if not self.forward or not self.step or self.overdue(now):
                    return node
                late = now + self.forward - self.heard - self.step
                return node if late <= max(0.0, -chance * self.forward) else None
            for share, i in zip(self.shares[:1 if self.heard is None else None], node.next, strict=False):
                count += 1
                heapq.heappush(waiting, (chance * share, count, node.then(i)))
        return None

    def overdue(self, now: float) -> bool:
        """Whether the target has been silent for two of its steps."""
        return self.heard is not None and self.step is not None and now > self.heard + 2 * self.step

    def text(self) -> list[int]:
        """The answer as the drafter believes it."""
        node = self.at
        while node.next:
            node = node.then(node.next[0])
        return [of.id for of in node.path()]


# ---- the request -----------------------------------------------------------------------------------------------


@dataclass
class Event:
    """One moment of a stream. `text` is all text of this kind so far, `delta` what this event added to it."""
    kind: str                               # "preview": the drafter's, may be wrong; "final": the target's, append-only
    text: str
    delta: str
    ids: list[int]
    t_ms: float                             # since the request came in
    finish_reason: str | None = None        # on the last event: "stop" or "length"
    result: Result | None = None            # on the last event


@dataclass
class Verdict:
    """One forward of the deciding model that made ids of the answer: the drafts it was shown and what it said."""
    first: int                              # place in the answer of its first id
    drafts: list[int]                       # of the places from there on; none: prefill or a plain step
    ids: list[int]                          # the accepted drafts, then the model's own id
    second: list[int]                       # runner-up of each
    margins: list[float]                    # logit of the id over its runner-up's; sampled, of the draw's scores


@dataclass
class Result(collections.abc.Mapping):
    """What `generate` returns: attributes, and the same as a mapping. Times in seconds from the request's start."""
    output_text: str = ""
    output_ids: list = field(default_factory=list)
    finish_reason: str = ""                 # "stop" (end of sequence) or "length"
    mode: str = ""
    preview_text: str = ""
    preview_ids: list = field(default_factory=list)
    draft_ids: list = field(default_factory=list)     # the overlap drafts, as far as the host saw them
    drafted: int = 0                        # drafts the target looked at
    accepted_tokens: int = 0                # drafts it agreed with; bonus ids not counted
    span_len: int = 0                       # drafts that the first forward behind a head start looked at
    rejected_at: int = -1                   # index of the first rejected draft of that span, -1 if none
    rounds: int = 0
    accept_lens: list = field(default_factory=list)   # of each round; of the last one what is in the answer
    acceptance_rate: float = 0.0            # accepted / drafted
    tokens_per_round: float = 0.0           # mean of accept_len + 1
    free_tokens_count: int = 0              # drafts the host had before the target's prefill ended
    window_drafts: int = 0                  # those of them it had before the last frame was decoded
    wall_clock_time: float = 0.0
    ttfp: float | None = None               # first preview id on the host
    preview_end: float | None = None        # the last one
    ttft: float | None = None               # first answer id on the host
    tpot: float | None = None               # (end - ttft) / (ids - 1)
    stages: dict = field(default_factory=dict)        # side -> stage -> seconds
    timeline: list = field(default_factory=list)      # (row, stage, start_s, end_s, note)
    prompt_rows: dict = field(default_factory=dict)   # side -> rows
    peak_memory: int = 0                    # bytes on the target's device; on the CPU the process's peak
    drafter_error: str | None = None        # why the drafter gave up, if it did; the answer is not affected
    drafts: list = field(default_factory=list)        # (forward, place, ids) of what each of the drafter's forwards
                                                      # wrote, from its prefill on, rounds on the target's device apart
    verdicts: list = field(default_factory=list)      # `Verdict` of each forward, where explain asked for them

    def __getitem__(self, key):
        try:
            return getattr(self, key)
        except AttributeError:
            raise KeyError(key) from None

    def __iter__(self):
        return iter(f.name for f in dataclasses.fields(self))

    def __len__(self):
        return len(dataclasses.fields(self))


class Timeline:
    """Stages of one request as (row, stage, start_s, end_s, note), host clock and GPU events on one axis."""

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
    def stage(self, name: str, model: Model, host: bool = False, note: str = ""):
        """Times the block: by GPU events on the model's stream, or by the host clock for CPU work."""
        gpu = model.on_gpu and not host
        row = "host" if host else model.side
        if model.on_gpu:
            torch.cuda.nvtx.range_push(name)
        start = end = None
        began = self.now()
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(model.stream)
        try:
            with naming_stage(model, name):
                yield
        finally:
            if gpu:
                end.record(model.stream)
            if model.on_gpu:
                torch.cuda.nvtx.range_pop()
            with self.lock:
                self.entries.append((row, model.side, name, start or began, end or self.now(), note, model.device))

    def resolve(self):
        """([(row, stage, start_s, end_s, note)] by start, {side: {stage: seconds}}); waits for the GPU."""
        for device in self.base:
            torch.cuda.synchronize(device)
        rows, stages = [], {}
        for row, side, name, start, end, note, device in self.entries:
            if not isinstance(start, float):
                start, end = (self.base[device].elapsed_time(e) / 1e3 for e in (start, end))
            rows.append((row, name, start, end, note or side if row == "host" else note))
            stages.setdefault(side, {}).setdefault(name, 0.0)
            stages[side][name] += end - start
        return sorted(rows, key=lambda r: r[2]), stages


@dataclass
class Request:
    """What was asked, and what its two workers share while they answer."""
    mode: str
    question: str
    video: collections.abc.Callable         # (call when decoding begins) -> list of uint8 frames [H, W, 3]
    events: collections.abc.Callable        # () -> such frames, or an Events recording
    paths: dict                             # side -> what was asked for, for messages
    image: bool                             # one picture in place of a video
    event_frames: int                       # pictures a recording is drawn in
    canvas: tuple | None                    # (H, W) of those pictures; None: each ends at its largest coordinate
    max_new_tokens: int
    draft_len: int
    overlap_len: int
    source: DraftSource | None
    ignore_eos: bool
    timeline: Timeline
    gate: Gate | None                       # None: draft whatever it costs
    size: int                               # of the video file, in doublings: clips of a size take alike to decode
    sampling: tuple | None                  # (temperature, top_p, seed) of the deciding model; None: greedy
    explain: bool                           # keep what the deciding model looked at
    ahead: Ahead                            # of a drafter on a device of its own
    out: queue.Queue = field(default_factory=queue.Queue)
    stop_drafting: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    drafter_done: threading.Event = field(default_factory=threading.Event)
    host_free: threading.Event = field(default_factory=threading.Event)         # the drafter may use the interpreter
    frames_ready: threading.Event = field(default_factory=threading.Event)      # the target wants the GPU
    ready_at: dict = field(default_factory=dict)        # ("frames" or "events", size) -> seconds
    preview: list = field(default_factory=list)         # (id, seconds) as the host saw them
    accept_lens: list = field(default_factory=list)
    drafted: int = 0
    span_len: int = 0
    prefill_end: float | None = None
    prompt_rows: dict = field(default_factory=dict)
    drafter_error: str | None = None
    drafts: list = field(default_factory=list)          # see Result

    def say(self, kind: str, ids: list[int]) -> float:
        """Hands ids to the caller, with the time; the lock keeps what both sides say in order of time."""
        with self.timeline.lock:
            now = self.timeline.now()
            self.out.put((kind, ids, now))
        return now

    def ready(self, now: float):
        """When the target's frames are ready, in seconds of this request, as far as one can tell; None: no idea."""
        if self.frames_ready.is_set():
            return min(now, self.ready_at["frames", self.size])
        usual = self.gate.usual(("frames", self.size))
        return None if usual is None else max(usual, now)


class Answer:
    """Hands the target's ids to the caller. What a round found is kept until the GPU has its next work queued: telling
    takes the host a while, which the GPU would spend idle."""

    def __init__(self, req: Request, model: Target):
        self.req, self.model, self.told, self.kept = req, model, 0, None
        self.words = STATE + req.max_new_tokens + STEP_ROWS  # of a state that holds the whole answer

    def keep(self, state, stage: str) -> None:
        check_finite(state, self.model, stage)
        self.kept = state
        if not self.model.on_gpu:                            # on the CPU nothing is queued
            self.tell()

    def tell(self, state=None) -> None:
        """The ids of `state`, or of the one that was kept."""
        state, self.kept = state or self.kept, None
        fresh = state[STATE + self.told:STATE + state[N_OUT]] if state else []
        self.told += len(fresh)
        if fresh:
            self.req.say("final", fresh)


class Engine:
    """A target and its drafter, answering one request at a time. See `load_engine`.

    Two engines may live in one process; on one engine a second request waits for the first.
    """

    def __init__(self, target: Target | None, drafter: Drafter | None, draft_len: int = 5, overlap_len: int = 15,
                 gate: bool = True):
        self.target, self.drafter = target, drafter
        self.draft_len, self.overlap_len = draft_len, overlap_len
        self.gate = Gate() if gate else None
        self.shares = list(SHARES)                           # see `Ahead`
        self.remembers = True                                # each text, to be recalled; else the caller, by `remember`
        self.apart = bool(target and drafter) and target.device != drafter.device   # two devices: drafts cost nothing
        self.target_first = bool(target and target.on_gpu)   # in the interpreter; what a CPU computes holds no lock
        self.lock = threading.Lock()
        self.owner: int | None = None                        # the thread whose request runs
        # One lasting thread a model: cuDNN keeps its plans per thread, and a new thread pays 70 ms to make them again.
        self.threads = {m.side: ThreadPoolExecutor(1, thread_name_prefix=m.side) for m in self.models}

    @property
    def models(self) -> list[Model]:
        return [m for m in (self.target, self.drafter) if m is not None]

    def _ahead(self, req: Request) -> bool:
        """Whether the drafter works on a device of its own for as long as the answer grows."""
        return self.apart and req.mode == "speculative" and req.source is None

    # -- the two sides, each on a thread of its own

    def _drafter_side(self, req: Request) -> None:
        """Events to drafts. Runs ahead of the target and stops when told, at its limit, at its own end, or when the
        gate says that another draft would cost the target more than it brings.

        Beside a target on a GPU the interpreter's lock is the target's first: the drafter waits while the target reads
        packets, and from its last frame until its prefill is queued; where frames are there within some ms it starts
        after that. Side by side they made the frames of a 20 s clip 6.8 ms later on 16 cores, now it is 0.5; the
        preview comes 3.5 ms later for it. Dropped, no gain beyond the noise of 1 ms: waiting for a draft asleep instead
        of spinning, a lower priority for this thread, a shorter turn of the lock."""
        model, line = self.drafter, req.timeline
        gate = req.gate if req.source is None else None      # a source that hears the drafter has asked for it
        alone = req.mode in ("drafter_only", "prefill_only")
        if gate and not gate.head_start(req, gate.usual(("events", req.size)) or 0.0):
            return
        req.host_free.wait()
        with line.stage("load", model, host=True):
            loaded = req.events()
        req.ready_at["events", req.size] = line.now()
        if gate and not gate.head_start(req, line.now()):    # what was expected of the clock may have come otherwise
            return
        endless = alone or self.apart and req.mode == "speculative"      # on a device of its own it disturbs nobody
        limit = req.max_new_tokens if endless else min(req.overlap_len + 1, req.max_new_tokens)
        req.host_free.wait()
        with model.on_stream():
            encode_and_prefill(model, loaded, limit, req)
            if self._ahead(req):
                return self._draft_ahead(req, limit)

            def go_on(state):
                req.host_free.wait()
                return not req.stop_drafting.is_set() and (gate is None or gate.another(req, state[N_OUT], line.now()))

            for forward, state in enumerate(self._decode(model, req, limit, "draft", go_on)):
                req.drafts.append((forward, len(req.preview), self._preview(req, state)))

    def _preview(self, req: Request, state) -> list[int]:
        """Hands the drafter's ids that are new to the caller, and returns them."""
        fresh = state[STATE + len(req.preview):STATE + state[N_OUT]]
        if fresh:
            now = req.say("preview", fresh)
            req.preview += [(i, now) for i in fresh]
        return fresh

    def _draft_ahead(self, req: Request, limit: int) -> None:
        """Drafts for as long as the answer grows: after its own text, and once the target has spoken after whatever is
        likeliest to be the answer so far. What it holds likely lies in the target's memory, where a verify finds the
        drafts behind the ids of that moment; nobody waits, and what the target does not confirm is never looked at."""
        model, ahead, line, words = self.drafter, req.ahead, req.timeline, STATE + limit + STEP_ROWS
        node, forward, G, asked_at = ahead.root, 0, None, None
        own = ahead.root                                     # the end of its own text, which is the preview
        model.laid, model.kept = [], {}
        while True:
            on_its_way, guesses, asked = model.snapshot(words), model.guesses(), node
            state = on_its_way.read()                        # guesses may come later
            if asked_at is not None:
                ahead.forward = smoothed(ahead.forward, line.now() - asked_at)
            state[N_OUT] = min(state[N_OUT], limit)          # recalled ids may go beyond it
            req.host_free.wait()
            check_finite(state, model, "draft")
            fresh = state[STATE + node.place:STATE + state[N_OUT]]
            tip = ahead.tell(node, fresh)
            model.laid = tip.path()[:max(node.place, tip.place - 1)]         # its last id has no row yet
            req.drafts.append((forward, node.place, fresh))
            if G is not None and fresh:
                model.judge(G, state)
            if node is own:
                self._preview(req, state)
                own = tip
            if req.stop_drafting.is_set():
                return
            told = ahead.heard
            node, asked_at = ahead.likeliest(line.now()), line.now()
            if node:                                         # first of all the GPU goes on
                G = self._ask(req, node, tip)
            self.target.expect(*ahead.texts())
            if guesses:                                      # there by now, and another look is due
                ahead.guess(asked, guesses.read())
                told = None
            while not node:                                  # all is asked, or would be too late
                ahead.news.wait(1e-3)
                ahead.news.clear()
                if req.stop_drafting.is_set():
                    return
                if ahead.heard == told and not ahead.overdue(line.now()):
                    continue
                node, asked_at = ahead.likeliest(line.now()), line.now()
                if node:
                    G = self._ask(req, node, tip)
                elif ahead.heard != told:                    # of a long text the target's memory holds a part
                    told = ahead.heard
                    self.target.expect(*ahead.texts())
            forward += 1

    def _ask(self, req: Request, node: Node, tip: Node) -> int | None:
        """Queues the drafter's forward behind the text of `node`; its rows are those of `tip`, but for the last id.
        Returns the number of ids recalled for it, None where nothing is learnt about that."""
        model = self.drafter
        if node is tip:
            G = model.next_len()
            with req.timeline.stage("recall" if G else "draft", model, note="ahead"):
                model.step_recalled(G) if G else model.step(0)
            return G
        ids, most = [of.id for of in node.path()], model.decoder.step_rows
        with req.timeline.stage("draft", model, note="resume"):
            ready = model.lay(node, req.ahead.at)
            for end in [*range(ready + most, len(ids), most), len(ids)]:
                head, rows = torch.tensor([end, 0, 0, 0, 0, 0, 0, 0] + ids[:end]), end - ready
                G = model.resume(head, rows if rows <= 2 else most)
        return G

    def _target_side(self, req: Request) -> None:
        """Video to answer. Everything it emits is the target's own greedy id."""
        model, line = self.target, req.timeline
        with line.stage("load", model, host=True):
            frames = req.video(req.host_free.set)            # from here on FFmpeg's threads work
        if self.target_first:
            req.host_free.clear()
        req.ready_at["frames", req.size] = line.now()
        req.frames_ready.set()
        answer = Answer(req, model)
        with model.on_stream():
            encode_and_prefill(model, frames, req.max_new_tokens, req)
            req.host_free.set()
            drafted = req.source is not None or req.preview or "drafter" in req.prompt_rows
            undrafted = req.drafter_done.is_set() and not drafted
            ahead, alone = self._ahead(req), req.mode in ("target_only", "prefill_only")
            if alone or undrafted or ahead or model.recalls:                 # the host has nothing to decide, ever
                for state in self._decode(model, req, req.max_new_tokens, "decode"):
                    if ahead:
                        req.ahead.commit(state[STATE:STATE + state[N_OUT]], line.now())
                        if model.on_gpu and req.prefill_end and not state[DONE]:
                            time.sleep(4e-4)                 # first the drafter hears of it: a step is queued already
                    req.prefill_end = req.prefill_end or line.now()
                    answer.tell(state)
                return
            state = model.snapshot(answer.words).read()
            req.prefill_end = line.now()
            check_finite(state, model, "prefill")
            answer.tell(state)
            if not (self.apart and req.mode == "speculative"):           # there a source hears it to its end
                req.stop_drafting.set()
            state = self._verify_overlap(req, state, answer)
            if req.mode == "speculative" and req.source is None:
                state = self._rounds_with_drafter(req, state, answer)
            elif req.mode == "speculative":
                state = self._rounds_with_source(req, state, answer)
            answer.tell()
            if not state[DONE]:
                for newest in self._decode(model, req, req.max_new_tokens, "decode", known=state[N_OUT]):
                    answer.tell(newest)

    def _decode(self, model: Model, req: Request, limit: int, name: str, go_on=None, known: int = 1):
        """Steps of one row, or of as many as `next_len` recalls, to the end or until `go_on`, told the newest state the
        host has seen, says no. Yields states as the host sees them, one step behind what is queued; the last one has
        everything. Without `go_on` the first step is queued unseen as well: the GPU waits for nobody. known: ids that
        are there already."""
        words, left, stop, stage, state = STATE + limit + STEP_ROWS, limit - known, False, "prefill", None
        pending = collections.deque([(model.snapshot(words), 0)])        # states on their way to the host, ids recalled
        behind = int(model.on_gpu and go_on is None)         # on the CPU nothing is queued: look at once
        while not req.cancelled.is_set():
            while not stop and left > 0 and len(pending) <= behind:
                stop = go_on is not None and not go_on(state)
                if not stop:
                    G = model.next_len()
                    with req.timeline.stage(CHECKS[name] if G else name, model):
                        model.step_recalled(G) if G else model.step(0)
                    pending.append((model.snapshot(words), G))
                    left -= 1
            if not pending:
                break
            snapshot, G = pending.popleft()
            before, state = state[N_OUT] if state else None, snapshot.read()
            check_finite(state, model, stage)
            if before is not None and state[N_OUT] > before:
                model.judge(G, state)
                if model.recalls and not model.drafts:
                    drafts = abs(state[RECALLED]) if G else 0
                    req.drafted += drafts
                    if self._ahead(req) and not req.accept_lens:
                        req.span_len = drafts
                    req.accept_lens.append(state[ACCEPT_LEN])
            yield state
            stop, stage, behind = stop or bool(state[DONE]), name, int(model.on_gpu)

    def _verify_overlap(self, req: Request, state, answer: Answer):
        """The first span, verified in one forward: the drafts made before prefill ended, or what a source proposes."""
        if state[DONE]:
            return state
        if req.source is not None:
            span = self._propose(req, state, req.overlap_len) if req.mode == "prefill_then_verify" else []
        else:
            drafts = [i for i, _ in list(req.preview)]
            span = drafts[1:1 + req.overlap_len] if drafts[:1] == state[STATE:STATE + 1] else []
        if not span:
            return state
        req.span_len = len(span)
        state = self._verify(req, span, req.overlap_len, answer)
        if req.source is not None:
            guarded(req, req.source.verdict, len(span), min(len(span), state[ACCEPT_LEN]))
        return state

    def _propose(self, req: Request, state, limit: int) -> list[int]:
        committed = state[STATE:STATE + state[N_OUT]]
        if req.preview:
            guarded(req, req.source.hear, [i for i, _ in list(req.preview)])
        return guarded(req, lambda: [int(i) for i in req.source.propose(committed, limit)][:limit]) or []

    def _verify(self, req: Request, drafts, G: int, answer: Answer):
        """One target forward over pending_id and up to G drafts; the rest of the span is padded and never matches."""
        model = self.target
        with req.timeline.stage("verify", model):
            req.drafted += len(drafts)
            if isinstance(drafts, list):
                ids = [i if -2**62 < i < 2**62 else -1 for i in drafts] + [-1] * (G - len(drafts))
                model.draft_ids[G].copy_(torch.tensor(ids, pin_memory=model.on_gpu), non_blocking=True)
            else:
                model.draft_ids[G].copy_(F.pad(drafts, (0, G - len(drafts)), value=-1), non_blocking=True)
            model.step(G)
        state = self._seen(answer, "verify")
        req.accept_lens.append(state[ACCEPT_LEN])
        return state

    def _plain(self, req: Request, answer: Answer):
        """One step without drafts, looked at like a round."""
        with req.timeline.stage("decode", self.target):
            self.target.step(0)
        req.accept_lens.append(0)
        return self._seen(answer, "decode")

    def _seen(self, answer: Answer, stage: str):
        """The state behind all that is queued; the caller hears of the one before meanwhile."""
        on_its_way = self.target.snapshot(answer.words)
        answer.tell()
        state = on_its_way.read()
        answer.keep(state, stage)
        return state

    def _rounds_with_drafter(self, req: Request, state, answer: Answer):
        """draft -> verify -> accept, both models on one device: the host looks once a round, a round never waits. Ends
        with the answer, with the drafter, or when the gate sees no draft that pays."""
        model, drafter, gate = self.target, self.drafter, req.gate
        req.drafter_done.wait()
        while not (state[DONE] or req.cancelled.is_set() or req.drafter_error or "drafter" not in req.prompt_rows):
            G = req.draft_len if gate is None else gate.best_len(req.question, req.draft_len)[0]
            if not G:
                break
            try:
                with drafter.on_stream():
                    wait_for(drafter, model)
                    with req.timeline.stage("draft", drafter, note=f"{G} ids"):
                        drafts_G = drafter.follow(model.state_W, G)
                wait_for(model, drafter)
                drafts_G = drafts_G.to(model.device)
            except Exception as error:                       # a drafter that breaks must not cost the answer
                req.drafter_error = describe(error)
                break
            state = self._verify(req, drafts_G, req.draft_len, answer)
            if gate:
                gate.accepted("round", req.question, G, min(G, state[ACCEPT_LEN]))
        return state

    def _rounds_with_source(self, req: Request, state, answer: Answer):
        """The same with drafts from the host. While the gate sees none that pay, the target decodes without them and
        the source is judged by what it would have said, which costs nothing."""
        gate, source, line = req.gate, req.source, req.timeline
        kind = getattr(source, "name", type(source).__name__)
        while not state[DONE] and not req.cancelled.is_set():
            began = line.now()
            drafts = self._propose(req, state, req.draft_len)
            if drafts and gate and not gate.pays(kind, req.question, len(drafts)):
                state = self._decode_and_judge(req, kind, state[N_OUT], answer)
            elif drafts:
                state = self._verify(req, drafts, req.draft_len, answer)
                agreed = min(len(drafts), state[ACCEPT_LEN])
                guarded(req, source.verdict, len(drafts), agreed)
                if gate:
                    gate.timed(("round", kind), line.now() - began)
                    gate.accepted(kind, req.question, len(drafts), agreed)
            else:
                state = self._plain(req, answer)
        return state

    def _decode_and_judge(self, req: Request, kind: str, known: int, answer: Answer):
        """Plain steps until the source's unverified drafts have been right often enough, or to the end."""
        at, drafts = 0, []                                   # drafts that would have followed the first `at` ids

        def go_on(state):
            nonlocal at, drafts
            ids = state[STATE:STATE + state[N_OUT]]
            agreed = agreeing(drafts, ids[at:])
            if drafts and agreed == len(ids) - at < len(drafts):
                return True                                  # not decided yet
            if drafts:
                req.gate.accepted(kind, req.question, len(drafts), agreed)
                guarded(req, req.source.verdict, len(drafts), agreed)
            at, drafts = len(ids), self._propose(req, state, req.draft_len)
            return not (drafts and req.gate.pays(kind, req.question, len(drafts)))

        answer.tell()
        for state in self._decode(self.target, req, req.max_new_tokens, "decode", go_on, known):
            answer.tell(state)
        return state

    # -- checks, assembly

    def _check_rows(self, model: Model, prompt_rows: int, req: Request) -> None:
        spare = max(req.draft_len, req.overlap_len, model.recall_len * model.recalls) + 2
        aside = KEPT_ROWS * (model.drafts and self._ahead(req))
        spare = max(spare, model.decoder.step_rows) if aside else spare      # rows that a resume may run again
        need, have = prompt_rows + req.max_new_tokens + spare + aside, model.decoder.cache_rows
        if need > have:
            raise InputError(f"{model.path}: {model.side} cache holds {have} rows, prompt {prompt_rows} + new "
                             f"{req.max_new_tokens} + drafts {spare}{f' + put aside {aside}' if aside else ''} needs "
                             f"{need}: raise --cache-rows, ask for fewer --max-new-tokens or shorten the question")

    def _prepare(self, req: Request, active, frames: int) -> None:
        """Checks that the request fits the caches, and captures every graph it needs before anything runs: a capture
        writes cache rows. `frames`: event frames of the drafter."""
        for model in active:                                 # drafts stay greedy, whoever judges them
            model.sampling = req.sampling if model is active[0] else None
            model.looks = [] if req.explain and model is active[0] else None
        if self.target in active:
            target, R, ahead = self.target, 1 if req.image else self.target.num_frames, self._ahead(req)
            beside = STEP_ROWS - 1 if self.drafter and self.drafter.recall_len and req.overlap_len else req.overlap_len
            target.recall_len = beside if ahead else req.draft_len
            target.recalls = bool((ahead or req.source and req.source.recalls) and target.recall_len
                                  and req.mode == "speculative")
            verified = {"prefill_then_verify": [req.overlap_len], "speculative": [req.overlap_len, req.draft_len]}
            rows = target.prompt(req.question).rows(R * (target.vision.P + int(not req.image or target.keep_cls)))
            self._check_rows(target, rows, req)
            with naming_stage(target, "preparation"):
                target.prepare_encode(R, req.image)
                target.prepare_prefill(rows)
                target.prepare(0, *([] if ahead else verified.get(req.mode, [])))
                if target.recalls:
                    target.expected = Expected()
                    if ahead:
                        target.expected = Expected(not self.drafter.recall_len,
                                                   (min(req.draft_len, req.overlap_len), req.overlap_len))
                    lens = target.recall_len, min(target.recall_len, RECALL_MOST), *target.expected.lens
                    target.prepare(*(G for G in lens if G), recalled=True)
                    target.expect([], self.shares[0] if ahead else 0.0, 0)
                    target.expected.drafts = req.overlap_len             # of a head start as many as may be
        if self.drafter in active:
            drafter = self.drafter
            drafter.recalls = drafter.recall_len > 0 and req.mode != "drafter_only"          # its own answer is its own
            rows = drafter.prompt(req.question).rows(frames + drafter.vision.P + 1)
            self._check_rows(drafter, rows, req)
            with naming_stage(drafter, "preparation"):
                drafter.prepare_encode(frames)
                drafter.prepare(0)
                drafter.prepare_prefill(rows)
                if drafter.recalls:
                    drafter.prepare(drafter.recall_len, recalled=True)
                    drafter.prepare_prefill(rows, drafter.recall_len)
                if req.mode == "speculative":
                    drafter.prepare_resume()
                    if self.apart:
                        drafter.prepare_resume(drafter.decoder.step_rows)
                        drafter.prepare_resume(1)
                        if drafter.recalls:
                            drafter.prepare_resume(1, drafter.recall_len)

    def stream(self, event_path=None, event_image_path=None, video_path=None, query="", *, image_path=None,
               mode="speculative", max_new_tokens=50, draft_len: int | None = None,
               overlap_len: int | None = None, draft_source: DraftSource | None = None, ignore_eos=False,
               frame_rule="uniform", event_frames=5, canvas=None, temperature=0.0, top_p=1.0,
               seed=0, explain=False) -> collections.abc.Iterator[Event]:
        """Yields `Event`s while the answer forms; the last one carries `finish_reason` and the `Result`.

        event_path: one `.npy`/`.npz`; event_image_path: one PNG or several; video_path: any mp4, mov, mkv, webm, avi;
        image_path: one picture in place of a video; query: the question. mode: see MODES. draft_len, overlap_len:
        drafts a round (0..31) and drafts kept from the head start; beside a drafter on a device of its own a verify
        looks at up to overlap_len drafts, and has draft_len rows for them where no more are ready. draft_source: a
        DraftSource in place of the drafter, which then runs only if the source `hears` it. temperature (0..100): 0 is
        greedy; above, ids are drawn from softmax(logits / temperature) cut at top_p (0..1), and the seed (0..2**63 - 1)
        fixes the answer, whatever the mode and the drafts; in `drafter_only` the drafter draws. explain: the result's
        `verdicts` say what the deciding model was shown and by which margin it decided; some microseconds a forward.
        Raises InputError for anything the user can mend, before any model runs where possible.
        """
        draft_len = self.draft_len if draft_len is None else draft_len
        overlap_len = self.overlap_len if overlap_len is None else overlap_len
        if mode not in MODES:
            raise InputError(f"mode {mode!r}: not one of {', '.join(MODES)}; pick one of these")
        for name, value, low, high in (("max_new_tokens", max_new_tokens, 1, 1_000_000),
                                       ("draft_len", draft_len, 0, STEP_ROWS - 1),
                                       ("overlap_len", overlap_len, 0, STEP_ROWS - 1),
                                       ("event_frames", event_frames, 1, 1000)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InputError(f"{name}: wanted a whole number {low}..{high}, got {value!r}; change it")
        check_sampling(temperature, top_p, seed)
        uses_target = mode != "drafter_only"
        hears = getattr(draft_source, "hears", False)
        uses_drafter = mode != "target_only" and (draft_source is None or hears)
        if uses_target and self.target is None:
            raise InputError(f"mode {mode}: needs the target, which was not loaded; pass --videollava")
        if uses_drafter and self.drafter is None:
            raise InputError(f"mode {mode}: needs the drafter, which was not loaded; pass --eventgpt")
        if uses_target and (video_path is None) == (image_path is None):
            raise InputError("video_path: wanted one video (or one image_path), got "
                             + ("none" if video_path is None else "both") + "; pass exactly one")
        if uses_drafter and (event_path is None) == (event_image_path is None):
            raise InputError("event_path: wanted one event file (or event images), got "
                             + ("none" if event_path is None else "both") + "; pass exactly one")
        if frame_rule not in VIDEO_RULES:
            raise InputError(f"frame_rule {frame_rule!r}: not one of {', '.join(VIDEO_RULES)}; pick one of these")
        images = event_image_path if isinstance(event_image_path, (list, tuple)) else [event_image_path]
        if uses_drafter and event_path is None and not images:
            raise InputError("event_image_path: an empty list; pass one PNG or several")
        for path, wanted, used in ((video_path, "a video file", uses_target), (image_path, "an image", uses_target),
                                   (event_path, "an .npy or .npz of events", uses_drafter),
                                   *((image, "a PNG or JPEG", uses_drafter) for image in images)):
            if used and path is not None:
                insist_file(path, wanted)
        if draft_source is not None and not isinstance(draft_source, DraftSource):
            raise InputError(f"draft_source: wanted a DraftSource, got {type(draft_source).__name__}; make one by "
                             f"source_named")
        question = check_question(query)

        def frames(decoding):
            if image_path is None:
                return read_video(video_path, self.target.num_frames, frame_rule, self.target.on_gpu, decoding)
            decoding()
            return read_images([image_path])

        events = (lambda: read_events(event_path)) if event_path is not None else (lambda: read_images(images))
        if self.owner == threading.get_ident():
            raise InputError("engine: a stream of this thread is still open; finish or close it first")
        with self.lock:
            self.owner = threading.get_ident()
            try:
                broken = None
                if uses_drafter and hears and self.gate and not self.apart:
                    try:
                        uses_drafter = draft_source.worth_hearing()
                    except Exception as error:
                        broken = describe(error)
                active = ([self.target] if uses_target else []) + ([self.drafter] if uses_drafter else [])
                paths = {"target": video_path or image_path, "drafter": event_path or next(iter(images), None)}
                drafts = mode in ("prefill_then_verify", "speculative")
                gate = self.gate if drafts and not (self.apart and draft_source is None) else None
                size = insist_file(video_path or image_path, "a video file").bit_length() if uses_target else 0
                req = Request(mode, question, frames, events, paths, image_path is not None, event_frames, canvas,
                              max_new_tokens, draft_len, overlap_len, draft_source, ignore_eos, Timeline(active), gate,
                              size, (temperature, top_p, seed) if temperature else None, explain,
                              Ahead(self.shares, -1 if ignore_eos or self.drafter is None else
                                    self.drafter.config.eos_id, max_new_tokens), drafter_error=broken)
                if not (uses_target and self.target_first):
                    req.host_free.set()
                for model in active:
                    if model.on_gpu:
                        torch.cuda.reset_peak_memory_stats(model.device)
                with torch.inference_mode():                 # not around the yields: it would leak to the caller
                    self._prepare(req, active, len(images) if event_path is None and uses_drafter else event_frames)
                if draft_source is not None:
                    guarded(req, draft_source.begin, question)
                    if draft_source.recalls:
                        guarded(req, draft_source.attach, self.target)
                req.timeline.start()
                yield from self._run(req, active)
            finally:
                self.owner = None

    def generate(self, *args, **kwargs) -> Result:
        """The finished `Result`; arguments as `stream`."""
        result = None
        for event in self.stream(*args, **kwargs):
            result = event.result or result
        return result

    def _run(self, req: Request, active):
        deciding = "target" if self.target in active else "drafter"
        if self.drafter not in active:
            req.drafter_done.set()
        texts = {"preview": TextStream(self.drafter.text), "final": None} if self.drafter in active else {}
        texts["final"] = TextStream((self.target if deciding == "target" else self.drafter).text)
        result, running, error = Result(mode=req.mode), {m.side for m in active}, None
        working = [self.threads[model.side].submit(self._worker, req, model) for model in active]
        try:
            while running:
                kind, value, at = req.out.get()
                if kind == "end":
                    running.discard(value)
                    if value == "target":                    # a preview of what is already there helps nobody
                        req.stop_drafting.set()
                elif kind == "error":
                    error = error or at
                    req.cancelled.set()
                    req.stop_drafting.set()
                elif kind == "preview":
                    result.ttfp = at if result.ttfp is None else result.ttfp
                    yield self._event("preview", texts["preview"], value, at)
                    if deciding == "drafter":
                        result.ttft = result.ttfp
                elif kind == "final":
                    result.ttft = at if result.ttft is None else result.ttft
                    result.output_ids += value
                    result.wall_clock_time = at
                    yield self._event("final", texts["final"], value, at)
            if error is not None:
                raise error
        finally:                                             # also when the caller closes the generator early
            req.cancelled.set()
            req.stop_drafting.set()
            concurrent.futures.wait(working)
        yield self._finish(req, result, active, deciding, texts)

    @staticmethod
    def _event(kind, text, ids, at):
        delta = text.push(ids)
        return Event(kind, text.out, delta, list(text.ids), at * 1e3)

    def _worker(self, req: Request, model: Model) -> None:
        """Runs one side and reports its end. A drafter's failure is noted; only bad input or the target's is raised."""
        try:
            here = torch.cuda.device(model.device) if model.on_gpu else contextlib.nullcontext()
            with torch.inference_mode(), here:
                (self._target_side if model is self.target else self._drafter_side)(req)
        except BaseException as thrown:                      # a panic of a library in Rust is no Exception
            error = thrown if isinstance(thrown, Exception) else RuntimeError(describe(thrown))
            bad_input = isinstance(error, InputError) and not isinstance(error, NonFinite)
            if model is self.target or req.mode == "drafter_only" or bad_input:
                req.out.put(("error", model.side, error))
            else:
                req.drafter_error = describe(error)
        finally:
            (req.drafter_done if model is self.drafter else req.host_free).set()
            if model is self.drafter and self.target:
                self.target.expected.share = 0.0             # nothing more will come
            req.out.put(("end", model.side, None))

    def remember(self, drafted, answered=()) -> None:
        """Keeps what the drafter wrote, and the target's answer, to be recalled; see `remembers`."""
        self.drafter.remember(drafted)
        if self.target is not None:
            self.target.remember(answered)

    def _finish(self, req: Request, result: Result, active, deciding, texts) -> Event:
        decider = self.target if deciding == "target" else self.drafter
        result.preview_ids = [i for i, _ in req.preview]
        result.preview_end = req.preview[-1][1] if req.preview else None
        if deciding == "drafter":
            result.output_ids = result.preview_ids
            result.wall_clock_time = req.preview[-1][1]
            texts["final"].push(result.output_ids)
        elif "preview" in texts:
            texts["preview"].push([], end=True)
            result.preview_text = texts["preview"].out
        delta = texts["final"].push([], end=True)
        result.output_text = texts["final"].out
        ended = not req.ignore_eos and result.output_ids[-1:] == [decider.config.eos_id]
        result.finish_reason = "stop" if ended else "length"
        result.timeline, result.stages = req.timeline.resolve()
        if req.source is not None:
            guarded(req, req.source.learn, list(result.output_ids))
        if self.remembers and self.drafter in active and self.drafter.recall_len:
            followed, own = req.ahead.text(), result.preview_ids
            if followed[:len(own)] != own:                   # what it followed, and what it wrote of its own accord
                self.drafter.remember(followed)
                followed = own
            self.remember(followed or own, result.output_ids if self.apart else ())
        if self.gate and deciding == "target" and not (req.mode == "prefill_only"):
            self.gate.learn(req, result)
        result.prompt_rows, result.drafter_error = req.prompt_rows, req.drafter_error
        result.verdicts = decider.verdicts(result.output_ids) if req.explain else []
        lens = result.accept_lens = list(req.accept_lens)
        if lens:                                             # drafts right beyond the answer's end are none of it
            lens[-1] = min(lens[-1], len(result.output_ids) - 1 - sum(a + 1 for a in lens[:-1]))
            req.drafted -= req.accept_lens[-1] - lens[-1]
        result.drafted, result.rounds, result.accepted_tokens = req.drafted, len(lens), sum(lens)
        if result.drafted:
            result.acceptance_rate = result.accepted_tokens / result.drafted
        if result.rounds:
            result.tokens_per_round = result.accepted_tokens / result.rounds + 1
        result.span_len, result.drafts = min(req.span_len, result.drafted), req.drafts
        if req.span_len and lens and req.accept_lens[0] == lens[0] < req.span_len:
            result.rejected_at = lens[0]
        if deciding == "target":
            result.draft_ids = result.preview_ids
            result.free_tokens_count = sum(at <= req.prefill_end for _, at in req.preview)
            result.window_drafts = sum(at <= req.ready_at["frames", req.size] for _, at in req.preview)
        if len(result.output_ids) > 1:
            result.tpot = (result.wall_clock_time - result.ttft) / (len(result.output_ids) - 1)
        result.peak_memory = peak_memory(decider.device)
        return Event("final", result.output_text, delta, result.output_ids, result.wall_clock_time * 1e3,
                     result.finish_reason, result)


def guarded(req: Request, call, *args):
    """What a draft source says, or None with a note if it breaks: that must not cost the answer."""
    try:
        return call(*args)
    except (Exception, SystemExit) as error:
        req.drafter_error = describe(error)
        return None


def pixels_of(loaded, model: Model, req: Request):
    """Float pixels [R, 3, X, X] of a recording or of frames, on the model's device, which draws and resizes: what
    travels is bytes. What cannot be drawn or resized is the user's to mend."""
    try:
        if isinstance(loaded, Events):
            loaded = draw_events(loaded, req.event_frames, req.canvas, model.device)
        return clip_pixels(loaded, model.vision.image, model.vision.mean, model.vision.std, device=model.device)
    except ValueError as error:
        raise InputError(f"{req.paths[model.side]}: {error}; use another recording or clip") from None


def encode_and_prefill(model: Model, loaded, limit: int, req: Request) -> None:
    """Queues all from frames or events to the first id of at most `limit`, which is then in the model's state.

    Dropped: prefilling frame pairs as they come. The decoder gives the 8 frames of a 1 s clip after 18.0 to 23.4 ms and
    those of a 20 s clip, out of order, after 40 to 56; four parts take 52.7 ms on an H100 where the whole takes 45.5
    (two 48.5, 6 frames and 2 47.8). The first id would come 1 to 6 ms earlier, and the window in which a drafter has
    the GPU to itself would be gone.
    """
    prompt = model.prompt(req.question)
    with req.timeline.stage("preprocess", model, host=not model.on_gpu):
        pixels = pixels_of(loaded, model, req)
    with req.timeline.stage("encode", model):
        visual_AD = model.visual_rows(pixels, req.image and model.side == "target")
    with req.timeline.stage("prefill", model):
        eos_id = -1 if req.ignore_eos else model.config.eos_id
        model.prefill(model.splice(prompt, visual_AD), limit, eos_id, prompt.after[-1])
    req.prompt_rows[model.side] = model.prompt_rows


def wait_for(later: Model, earlier: Model) -> None:
    """What `later` queues from here on starts after what `earlier` has queued so far."""
    if later.on_gpu and earlier.on_gpu:
        later.stream.wait_stream(earlier.stream)
    elif earlier.on_gpu:
        earlier.stream.synchronize()


class NonFinite(InputError):
    """A model computed NaN. Ends the request for the target; only ends the drafting for the drafter."""


class OutOfMemory(NonFinite):
    """Memory ran out inside a stage. Ends the same as NaN does."""


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was short; the CPU's allocator has no class for it, and a capture that ends hides it."""
    return error is not None and (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                                  or "allocate memory" in str(error) or ran_out(error.__context__))


@contextlib.contextmanager
def naming_stage(model: Model, stage: str):
    """Turns memory that runs out in the block into one line with the stage."""
    try:
        yield
        return
    except Exception as error:
        if not ran_out(error):
            raise
        reason = describe(error).partition(". ")[0]
    # Outside of the handler, where the failed frames and their tensors are gone.
    raise OutOfMemory(f"{model.path}: memory on {model.device} ran out in the {model.side}'s {stage} ({reason}); lower "
                      f"--cache-rows, shorten the question, free memory or choose another --drafter-device")


def check_finite(state, model: Model, stage: str) -> None:
    if state[NONFINITE]:
        raise NonFinite(f"{model.path}: the {model.side}'s logits hold NaN or infinity after {stage}; check the "
                        f"checkpoint (python -m weights.load --check) and the dtype")


def peak_memory(device) -> int:
    """Bytes: the most this process held on a GPU since the request began, or the process's peak on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- loading ---------------------------------------------------------------------------------------------------


def pick_device(name) -> torch.device:
    """A device that is really there, or an InputError that says which are."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: not a device name; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device {name}: {count} CUDA devices here; use cpu, a lower number, or check the driver")
        device = torch.device("cuda", device.index or 0)
    elif device.type != "cpu":
        raise InputError(f"device {name}: only cpu and cuda are supported; use one of these")
    return device


def load_model(cls, path, device, dtype=None, cache_rows=None, tokenizer=None, graphs=True, seed=0, packed=None,
               progress=None):
    """A Target or a Drafter from a folder, a hub id in the local cache, or the word `random-7b` (real shapes,
    random numbers from `seed`, for speed work only). packed: one of BITS, for a Drafter. progress: called with (side,
    bytes read, bytes in all) while a checkpoint is read."""
    assert packed is None or cls is Drafter, "the target decides, so its weights stay as they are"
    device = pick_device(device)
    dtype = dtype or default_dtype(device)
    config, checkpoint = open_model(cls, path)
    folder = Path(__file__).parent / "weights/tiny/target" if checkpoint is None else checkpoint.folder
    text = Text(tokenizer or Path(folder) / "tokenizer.json")
    V = text_config(config).V
    if text.size > V:
        raise InputError(f"{text.path}: has {text.size} pieces, the {cls.side} {path} embeds {V}; take the "
                         f"tokenizer.json of this checkpoint")
    try:
        weights = (checkpoint.load(device, dtype, progress and functools.partial(progress, cls.side)) if checkpoint
                   else random_weights(config, device, dtype, seed))
        with torch.inference_mode():
            model = cls(config, weights, text, str(path), cache_rows, graphs)
            model.origin = {"hash": checkpoint.fingerprint(), "revision": checkpoint.revision} if checkpoint else {
                "hash": f"seed {seed}", "revision": None}
            if packed is not None:
                model.decoder.pack(packed)
            return model
    except NotPackable as error:
        raise InputError(f"{path}: cannot be packed ({error}); leave the drafter's dtype as it is") from None
    except (RuntimeError, MemoryError) as error:             # torch.OutOfMemoryError is one
        if not ran_out(error):
            raise
        raise no_room(path, device, memory_needs(cls, config, device, dtype, cache_rows, packed)) from None


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def open_model(cls, path):
    """(config, Checkpoint) of one side, from its headers alone; the Checkpoint of `random-7b` is None."""
    if str(path) == "random-7b":
        return TARGET_7B if cls is Target else DRAFTER_7B, None
    checkpoint = open_checkpoint(path)
    wanted, kind = "video_llava" if cls is Target else "EventChat_llama", checkpoint.config.get("model_type")
    if kind != wanted:
        raise InputError(f"{path}: holds a {kind} model, the {cls.side} needs {wanted}; swap --eventgpt and "
                         f"--videollava?")
    return checkpoint.config, checkpoint


def model_name(target, tokenizer=None) -> str:
    """Names a target and its tokenizer: a hash of the checkpoint's fingerprint and of tokenizer.json. What a source
    saved belongs to one such name. InputError if a file is not there; nothing is loaded."""
    _, checkpoint = open_model(Target, target)
    folder = Path(__file__).parent / "weights/tiny/target" if checkpoint is None else checkpoint.folder
    file = Path(tokenizer or folder / "tokenizer.json")
    insist_file(file, "a tokenizer.json")
    name = "random-7b" if checkpoint is None else checkpoint.fingerprint()
    return hashlib.sha256(name.encode() + file.read_bytes()).hexdigest()[:16]


def text_config(config: dict) -> DecoderConfig:
    """The decoder's shape, which a target keeps in a section and a drafter at the top."""
    return DecoderConfig.read((config.get("text_config") or {}) if config["model_type"] == "video_llava" else config)


def memory_needs(cls, config: dict, device: torch.device, dtype: torch.dtype, cache_rows: int | None = None,
                 packed: str | None = None) -> dict:
    """{"weights", "cache", "packed" (where steps have copies), "scratch"}: bytes one model allocates from its loading
    to its last request, by arithmetic on the config alone. Torch may reserve more for reuse and returns it when short.

    scratch: fixed buffers, and the larger of what encode and prefill hold at once, as counted in their code: units of
    a row's width, of the longest prompt (its pictures and 64 rows of text). Names of widths as everywhere: D, F, ...
    """
    d, vision, b = text_config(config), VisionConfig.read(config["vision_config"]), dtype.itemsize
    rows, gpu, wanted = cache_rows or d.max_rows, device.type == "cuda", plan(config)
    R, T, A = 5, vision.P + 1, 5 + vision.P
    if cls is Target:
        R = frames_of(config, vision)
        A = R * T
    S, HK = min(A + 64, rows), d.H * d.K
    pixels = R * 3 * vision.image ** 2 * 4
    F1 = max((t.shape[0] for t in wanted.wanted if t.name.endswith(".fc1.w")), default=0)
    encode = R * T * b * max(7 * vision.C + (2 if gpu else 3) * F1, vision.C + 2 * d.D)
    layer = [4 * d.D + (2 * d.H + 2 * d.N) * d.K, 5 * d.D + 2 * HK, 5 * d.D + HK + 3 * d.F]
    fixed = Recall.nbytes(RECALL_ROWS[gpu]) + pixels + 2 * A * d.D * b + 32 * d.V * b
    fixed += 8 * rows * (1 + (cls is Drafter)) + Workspace.nbytes(d.D, d.H, d.K, rows, cls is Drafter)
    if gpu:                                                  # cuBLAS's, on two streams; pictures that are resized
        fixed += (2 << 25) + (2 << 26)
    else:                                                    # the plain definitions keep scores, and unpack weights
        layer = [5 * d.D + HK + 4 * d.F, 4 * d.D + HK + 3 * d.H * S + 2 * HK * (d.H != d.N)]
        encode, fixed = max(encode + pixels, 12 * d.D * max(2 * d.F, d.V) * bool(packed)), fixed + S * d.D * b
    needs = {"weights": wanted.nbytes(b), "cache": d.cache_bytes(rows, b)}
    if packed:
        of_layers, of_head = BITS[packed]
        products = ((d.H + 2 * d.N) * d.K, d.D), (d.D, HK), (2 * d.F, d.D), (d.D, d.F)
        needs["packed"] = packed_bytes(d.V, d.D, of_head) + d.L * sum(packed_bytes(*of, of_layers) for of in products)
    return needs | {"scratch": fixed + max(encode, S * b * max(layer))}


def frames_of(config: dict, vision: VisionConfig) -> int:
    """Frames of a clip, from the visual rows that a target's config names."""
    return max(1, (config.get("video_seq_length") or 8 * (vision.P + 1)) // (vision.P + 1))


def memory_budget(eventgpt=None, videollava=None, device=None, drafter_device=None, dtype=None,
                  cache_rows=None, drafter_dtype="bf16") -> dict:
    """{side: {"device", "free", and the parts of `memory_needs`}}, bytes, from headers alone. InputError if it cannot
    fit: nothing is allocated then."""
    budget, on = {}, {}
    for cls, path, name in ((Target, videollava, device), (Drafter, eventgpt, drafter_device or device)):
        if path is not None:
            where, packed = pick_device(name), drafter_dtype if cls is Drafter and drafter_dtype in BITS else None
            needs = memory_needs(cls, open_model(cls, path)[0], where, dtype or default_dtype(where), cache_rows,
                                 packed)
            budget[cls.side] = {"device": str(where), **needs, "free": free_bytes(where)[0]}
            on.setdefault(where, {}).update({f"{cls.side} {part}": n for part, n in needs.items()})
    for where, parts in on.items():
        insist_on_room(" and ".join(str(p) for p in (videollava, eventgpt) if p is not None), where, parts)
    return budget


def load_engine(eventgpt=None, videollava=None, device=None, drafter_device=None, dtype=None, cache_rows=None,
                draft_len=5, overlap_len=15, tokenizer=None, graphs=True, seed=0, gate=True,
                drafter_dtype="bf16", recall_len=None, progress=None) -> Engine:
    """An Engine over the two checkpoints (either may be None). bf16 on a GPU and fp32 on the CPU unless told.

    eventgpt, videollava: folders, hub ids already in the cache, or `random-7b`. device: `cuda`, `cuda:N` or `cpu`;
    drafter_device: another one for the drafter. cache_rows: positions per model, by default what it was trained for.
    tokenizer: a tokenizer.json in place of the checkpoints' own. gate: draft only where it is expected to pay; False:
    whatever it costs. drafter_dtype: `int8` or `int4` packs the weights of the drafter's steps, `fp8` (8-bit steps) and
    `fp8+int4` those of its prefill too (answers stay the same, drafts are cheaper and a little worse); `bf16` leaves
    them as loaded. recall_len: ids of its earlier texts that the drafter checks in one forward, 0..15, to draft several
    at once (None: 15 on a GPU, where rows cost little, and 0 on the CPU); above 0 a target beside a drafter on another
    device recalls its own answers, up to 31 ids, where that is expected to bring more than the drafts that are ready.
    progress: see `load_model`. Raises InputError for what cannot be loaded or does not fit.
    """
    if drafter_dtype not in ("bf16", *BITS):
        raise InputError(f"drafter_dtype: {drafter_dtype!r} is not one of bf16, {', '.join(BITS)}; pick from these")
    where = pick_device(drafter_device or device)
    if drafter_dtype.startswith("fp8") and where.type == "cuda" and torch.cuda.get_device_capability(where) < (8, 9):
        raise InputError(f"drafter_dtype: {drafter_dtype} needs a GPU of compute capability 8.9, {where} is older; "
                         f"take int8 or int4")
    for name, value, low in (("cache_rows", cache_rows, 1), ("draft_len", draft_len, 0),
                             ("overlap_len", overlap_len, 0)):
        if value is not None and (type(value) is not int or value < low):
            raise InputError(f"{name}: wanted a whole number from {low} up, got {value!r}; change it")
    if recall_len is not None and (type(recall_len) is not int or not 0 <= recall_len <= RECALL_MOST):
        raise InputError(f"recall_len: wanted a whole number 0..{RECALL_MOST}, got {recall_len!r}; change it")
    memory_budget(eventgpt, videollava, device, drafter_device, dtype, cache_rows, drafter_dtype)
    options = dict(dtype=dtype, cache_rows=cache_rows, graphs=graphs, progress=progress)
    target = drafter = None
    if videollava is not None:
        target = load_model(Target, videollava, device, tokenizer=tokenizer, seed=seed, **options)
    if eventgpt is not None:
        own = Path(str(eventgpt)) / "tokenizer.json"
        shared = target.text.path if target is not None and not own.exists() else None
        drafter = load_model(Drafter, eventgpt, drafter_device or device, tokenizer=tokenizer or shared, seed=seed + 1,
                             packed=None if drafter_dtype == "bf16" else drafter_dtype, **options)
        drafter.recall_len = (RECALL_MOST if drafter.on_gpu else 0) if recall_len is None else recall_len
    return Engine(target, drafter, draft_len, overlap_len, gate)


class PrefillOnlyInference:
    """The library API of the research code this engine grew from; models load on the first call.

    >>> inference = PrefillOnlyInference(eventgpt_path=..., videollava_model_id="LanguageBind/Video-LLaVA-7B-hf")
    >>> inference.generate(event_image_path=..., video_path=..., query="...")["output_text"]
    """

    def __init__(self, eventgpt_path=None, videollava_model_id="LanguageBind/Video-LLaVA-7B-hf", device=None,
                 mode="prefill_then_verify", **options):
        self.arguments = dict(eventgpt=eventgpt_path, videollava=videollava_model_id, device=device, **options)
        self.mode, self.engine, self.lock = mode, None, threading.Lock()

    def load(self) -> Engine:
        with self.lock:                                      # two threads, one engine
            if self.engine is None:
                self.engine = load_engine(**self.arguments)
            return self.engine

    def generate(self, event_image_path=None, video_path=None, query="", max_new_tokens=50, **options) -> Result:
        return self.load().generate(event_image_path=event_image_path, video_path=video_path, query=query,
                                    max_new_tokens=max_new_tokens, **{"mode": self.mode, **options})

    def stream(self, event_image_path=None, video_path=None, query="", max_new_tokens=50, **options):
        return self.load().stream(event_image_path=event_image_path, video_path=video_path, query=query,
                                  max_new_tokens=max_new_tokens, **{"mode": self.mode, **options})


# ---- demo ------------------------------------------------------------------------------------------------------


def demo() -> None:
    """One question about an embedded clip, the preview as it forms, and the claim: both modes, the same ids."""
    tiny = Path(__file__).resolve().parent / "weights" / "tiny"
    engine = load_engine(tiny / "drafter", tiny / "target", device="cpu")
    record = json.loads((tiny / "clips" / "EventGPT_Instruction_Subset.json").read_text())[0]
    asked = dict(event_path=tiny / "clips" / "event_npy" / record["event_data"],
                 video_path=tiny / "clips" / "mp4" / record["mp4_data"],
                 query="What are the key elements in this scene?")
    for event in engine.stream(mode="speculative", **asked):
        print(f"{event.t_ms:7.1f} ms  {event.kind:7}  {event.delta}")
    speculative, alone = event.result, engine.generate(mode="target_only", **asked)
    print(f"\npreview  {speculative.preview_text}\nanswer   {speculative.output_text}")
    print(f"accepted {speculative.accepted_tokens} of {speculative.drafted} drafts in {speculative.rounds} rounds; "
          f"identical to target_only: {speculative.output_ids == alone.output_ids}")


if __name__ == "__main__":
    demo()
