"""Headstart: lossless cross-modal speculative decoding at batch one.

    load_engine(eventgpt, videollava)   -> Engine, of two checkpoints
    Engine.generate(events, video, ..)  -> Result; `stream` yields it as it forms, `close` gives the memory back
    Engine.open(events, video)          -> Clip: one clip, many questions (`generate`, `stream`, `chat`)
    Result                              the answer, and all that is known of how it came about

EventGPT (the drafter) sees events and is ready long before Video-LLaVA (the target), which sees video. The drafter
uses that head start to propose ids; the target verifies them in one forward and goes on. The answer is always the
target's own, token for token: greedy, or with a temperature the one that it alone draws under the seed.

     event frames - encode -+                     video frames - encode -+
     prompt ids --- embed --+ splice - prefill    prompt ids --- embed --+ splice - prefill
                                          |                                            |
                                   drafter cache                                 target cache
                                          |                                            |
        +-> propose: the drafter, earlier answers or the target's own 4-bit copy       |
        |                           +---> verify: one forward of [pending_id, drafts] -+
        |                                                                              |
        +-- cache_len += accept_len + 1, pending_id = bonus_id <---- accept <----------+

Every mode is this loop with another source of drafts: `Engine._rounds`. The file follows the picture: decoder, vision,
drafter and target, step graphs, the request, the engine, loading. What it hands over: kernels to kernels/; to weights/
the arguments of each call (asking.py), the answer (result.py), the times of its stages (timeline.py), who drafts and
whether that pays (drafting.py), what fits a GPU (memory.py), and the reading of files.
`python engine.py` shows the claim on the embedded tiny pair.

Shapes are written into names, one letter a dimension; batch is one and carries none:
    R frames   P patches   C vision width   D model width   S rows in this step   M cache rows   L layers
    H query heads   N key/value heads   K head width   F feed-forward width   V vocabulary   G drafts
    W words of a request's state (kernels/round.py)
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import inspect
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import kernels  # noqa: F401  first: it keeps torch quiet where numpy is absent

# isort: split
import torch
import torch.nn.functional as F
from triton.runtime.cache import triton_key

from kernels.attention import attention, step_attention
from kernels.frames import to_device
from kernels.lookup import AFTER, FIRST, ONLY, Ring, lookup
from kernels.products import product
from kernels.quant import MAX_PACKED_ROWS, NotPackable, Packed, turned
from kernels.rmsnorm import add_rmsnorm, rmsnorm, row_sums
from kernels.rope_store import rope_store
from kernels.round import DONE, FOUND, LIMIT, PROMPT_LEN, STATE, State, close_draft, close_round, new_state, open_round
from kernels.sample import sample, sampling_words
from kernels.skinny import Workspace, skinny
from kernels.swiglu import swiglu
from kernels.tower import add_layernorm, layernorm, quick_gelu
from kernels.unpack import unpack
from weights import InputError, asking, describe, drafting, memory
from weights.asking import MODES, Asked, FilePath, fits, insist_known, takes
from weights.drafting import ENOUGH, PLAIN, WIDTHS, Gate, Line, NonFinite, Proposal, Tenant, noting
from weights.files import (
    Parser,
    command,
    in_flags,
    insist_file,
    insist_flag,
    insist_function,
    insist_kind,
    insist_one_of,
    insist_whole,
    printable,
    ran_out,
)
from weights.given import Shown, path_of
from weights.load import random_tensors, stop_ids
from weights.memory import TINY, as_dtype, memory_budget, model_name, pick_device
from weights.packed import PRODUCTS, SOME, assembled, gains_by_turning, packing
from weights.result import Event, Result, Round, Verdict
from weights.shapes import PROMPT_ROWS, TEXT_ROWS, DecoderConfig, VisionConfig, frames_of, text_config, vision_config
from weights.sources import SOURCES, Adapted, DraftSource, Fixed, Lookup, agreeing, source_named, sources_of
from weights.text import DRAFTER_SYSTEM, Prompt, Text, TextStream, check_question, check_turns
from weights.timeline import Timeline, check_finite, naming_stage

__all__ = ["MODES", "SOURCES", "Adapted", "Clip", "DraftSource", "Engine", "Event", "Fixed", "Gate", "InputError",
           "Lookup", "PrefillOnlyInference", "Result", "Round", "Verdict", "agreeing", "explain", "load_engine",
           "model_name", "source_named"]

VERSION = "0.1.0"
STEP_ROWS = 32          # forwards of up to this many rows go through the step kernels, whose bits ignore the row count
QUESTION_ROWS = (16, 32, 64, 128, 256)           # a GPU has a prefill graph for questions of up to so many rows

# ---- decoder ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Steps:
    """The weights of a step, a forward of few rows: the plain ones, or a copy in 4 bits, whose ids are sometimes wrong.
    Only drafts come from a copy."""
    layers: list                            # of {"attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down"}
    head_VD: torch.Tensor | Packed
    rows: int                               # of a forward, at most
    work: Workspace
    packed: bool = False                    # in 4 bits
    turned: bool = False                    # the rows between these weights are `turned`


LAYER = (*PRODUCTS, "attn_norm", "mlp_norm")


class Decoder:
    """LLaMA over a static cache. One forward, masked by position, serves prefill, draft, verify and decode.

    weights: the `text.*` tensors of weights/names.py, or what `packing` makes of them: then prefill unpacks the 4-bit
    weights one after the other into `room`. Keys are cached after rotary. Row s of a step attends to the cache rows
    0..pos_ids[s] and to nothing else, so what lies beyond is stale and harmless.
    Source: transformers' LlamaForCausalLM, rounding order included.
    """

    def __init__(self, config: DecoderConfig, weights: dict, cache_rows: int):
        self.config, self.w = config, weights
        self.embed_VD = weights["text.embed"]
        self.head_VD = weights.get("text.head", self.embed_VD)
        self.device, self.dtype = self.embed_VD.device, self.embed_VD.dtype
        shape = (config.L, config.N, cache_rows, config.K)
        self.k_cache_LNMK = torch.zeros(shape, dtype=self.dtype, device=self.device)   # zeros: unseen must be finite
        self.v_cache_LNMK = torch.zeros_like(self.k_cache_LNMK)
        freq = 1.0 / config.theta ** (torch.arange(0, config.K, 2, dtype=torch.float32) / config.K)  # upstream's
        angle_MK = torch.outer(torch.arange(cache_rows, dtype=torch.float32), freq).repeat(1, 2)
        self.cos_MK = angle_MK.cos().to(self.device, self.dtype)
        self.sin_MK = angle_MK.sin().to(self.device, self.dtype)

        work = Workspace(self.device, config.D, config.H, config.K, cache_rows)
        self.steps = self._steps(weights, work, config.packed, config.turned)
        unpacks = self.device.type == "cuda" and config.packed
        self.room = torch.empty(config.largest, dtype=self.dtype, device=self.device) if unpacks else None
        self.depths = range(config.L)                        # layers that a forward runs

    @contextlib.contextmanager
    def shortened(self):
        """Forwards in the block run three layers: the first, the second and the last. That compiles every kernel; their
        results mean nothing."""
        kept, self.depths = self.depths, sorted({0, min(1, self.config.L - 1), self.config.L - 1})
        try:
            yield
        finally:
            self.depths = kept

    @property
    def cache_rows(self) -> int:
        return self.k_cache_LNMK.shape[2]

    def _steps(self, weights: dict, work: Workspace, packed: bool = False, turn: bool = False) -> Steps:
        c = self.config
        layers = [{name: weights[f"text.layers.{i}.{name}"] for name in LAYER} for i in range(c.L)]
        return Steps(layers, weights.get("text.head", self.embed_VD), MAX_PACKED_ROWS if packed else STEP_ROWS, work,
                     packed, turn)

    def packed(self) -> Steps:
        """The weights in 4 bits, for steps that draft. NotPackable where their shapes or values forbid it.
        Where weights are uneven the stream between the copies is `turned`; queries, keys, values and logits stay."""
        turn = gains_by_turning(lambda name: self.w[name][:SOME] if self.w[name].dim() > 1 else self.w[name],
                                self.config.L)
        text = [(name, t) for name, t in self.w.items() if name.startswith("text.")]
        made = dict(packing(sorted(text, key=lambda of: of[1].dim()), turn))
        if not all(bool(of.scales.isfinite().all()) for of in made.values() if isinstance(of, Packed)):
            raise NotPackable("values too large for scales in fp16")
        return self._steps(made, self.steps.work, True, turn)

    def forward(self, hidden_SD, pos_ids_S, only=None, steps: Steps | None = None):
        """Writes cache rows pos_ids_S; returns logits [S, V], or those of the rows that `only` (int64, few) names.

        `only` is for prefill: the last layer's queries and feed-forward are computed for these rows alone, since
        nobody reads the others; its keys and values are stored for all. steps: other weights than `self.steps`.
        """
        c, rows, steps = self.config, len(pos_ids_S), steps or self.steps
        if steps.turned:
            hidden_SD = turned(hidden_SD)
        if rows <= steps.rows:
            if not steps.packed:                             # packed products take their own
                row_sums(hidden_SD, steps.work)
            for layer in self.depths:
                hidden_SD = self._step_layer(layer, hidden_SD, pos_ids_S, steps)
            logits_SV = product(hidden_SD, steps.head_VD, steps.work, norm=(self.w["text.norm"], c.eps))
            return logits_SV if only is None else logits_SV.index_select(0, only)
        fresh_SD = None                                      # the last block's output, not yet added to the stream
        for layer in self.depths:
            kept = only if layer == c.L - 1 else None
            hidden_SD, fresh_SD = self._prefill_layer(layer, hidden_SD, fresh_SD, pos_ids_S, kept)
        normed_SD, _ = add_rmsnorm(fresh_SD, hidden_SD, self.w["text.norm"], c.eps)
        return dense(normed_SD, self.head_VD, self.room)

    def _step_layer(self, layer: int, hidden_SD, pos_ids_S, steps: Steps):
        """Few rows at consecutive positions, six launches: the weights are read once, and with plain weights a row's
        bits do not depend on how many rows there are. That is what makes a verify row equal a decode row."""
        c, w, work = self.config, steps.layers[layer], steps.work
        qkv_SE = product(hidden_SD, w["qkv"], work, norm=(w["attn_norm"], c.eps))
        mixed_SHK = step_attention(qkv_SE, self.k_cache_LNMK[layer], self.v_cache_LNMK[layer], pos_ids_S,
                                   self.cos_MK, self.sin_MK, work)
        hidden_SD = product(mixed_SHK.flatten(1), w["o"], work, residual=hidden_SD)
        up_SF = product(hidden_SD, w["gate_up"], work, norm=(w["mlp_norm"], c.eps), gated=True)
        return product(up_SF, w["down"], work, residual=hidden_SD)

    def _prefill_layer(self, layer: int, hidden_SD, fresh_SD, pos_ids_S, only):
        """Many rows, cuBLAS products. Returns the stream and what this layer's feed-forward adds to it."""
        c, w, room = self.config, self.steps.layers[layer], self.room
        if fresh_SD is None:
            normed_SD = rmsnorm(hidden_SD, w["attn_norm"], c.eps)
        else:
            normed_SD, hidden_SD = add_rmsnorm(fresh_SD, hidden_SD, w["attn_norm"], c.eps)
        k_NMK, v_NMK = self.k_cache_LNMK[layer], self.v_cache_LNMK[layer]
        q_SHK = rope_store(dense(normed_SD, w["qkv"], room), pos_ids_S, self.cos_MK, self.sin_MK, k_NMK, v_NMK)
        if only is not None:
            q_SHK, hidden_SD, pos_ids_S = (t.index_select(0, only) for t in (q_SHK, hidden_SD, pos_ids_S))
        mixed_SD = dense(attention(q_SHK, k_NMK, v_NMK, pos_ids_S).flatten(1), w["o"], room)
        normed_SD, hidden_SD = add_rmsnorm(mixed_SD, hidden_SD, w["mlp_norm"], c.eps)
        return hidden_SD, dense(swiglu(dense(normed_SD, w["gate_up"], room)), w["down"], room)


def dense(x_SD, w_OD, room=None):
    """x @ w.T. Many rows: cuBLAS, which is fastest there, on a packed weight as it comes out of `unpack`. One row,
    prefill's last: the step's kernel. The rows are normed already, also where a packed weight has its norm in it."""
    if isinstance(w_OD, Packed) and x_SD.shape[0] > MAX_PACKED_ROWS:
        return F.linear(x_SD, unpack(w_OD, x_SD.dtype, room))
    if isinstance(w_OD, Packed):
        return product(x_SD, dataclasses.replace(w_OD, normed=False))
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
        del tiles                                            # else it would take memory to the end of the call
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


class Model:
    """What drafter and target share: a decoder, one request's state on the device, its step graphs and its stream.

    state_W int64 holds the answer as it grows (kernels/round.py): the device alone moves it on, the host reads copies.
    `round(G)` is one forward of the pending id and up to G drafts, with its accept; `round(0)` is plain decode.
    """
    side = ""                                                # "drafter" or "target"
    priority = 0                                             # of its stream; lower goes first
    vision: VisionConfig
    origin: dict                                             # {"hash", "revision"} of its checkpoint, see `load_model`
    copy: Steps | None = None                                # its weights in 4 bits, where it drafts for itself
    prompt: Callable                                         # question -> Prompt; the two below say how
    encode: Callable                                         # pixels -> visual rows
    visual: Callable                                         # pictures -> how many rows that is
    num_frames = 5                                           # pictures it is trained to see
    answered: Result | None = None                           # what its cache holds, if it decided that and is done

    def __init__(self, decoder: Decoder, text: Text, path: str, stops: tuple[int, ...], graphs: bool = True):
        self.decoder, self.text, self.path, self.stops = decoder, text, path, stops
        self.device, self.config = decoder.device, decoder.config
        self.on_gpu = self.device.type == "cuda"
        self.graphs = graphs and self.on_gpu
        self.stream = torch.cuda.Stream(self.device, priority=self.priority) if self.on_gpu else None
        self.state_W = new_state(decoder.cache_rows).to(self.device)
        self.host_W = torch.zeros(len(self.state_W), dtype=torch.long, pin_memory=self.on_gpu)   # on its way there
        self.host_read = torch.cuda.Event() if self.on_gpu else None
        self.tail_id = torch.zeros(1, dtype=torch.long, device=self.device)     # the prompt's last id
        self.ring: Ring | None = None                        # earlier answers, and what a drafter elsewhere expects
        self.searches = False                                # it and `sampling` are the request's: see `begin`
        self.sampling: tuple | None = None
        self.sampling_3 = torch.zeros(3, dtype=torch.long, device=self.device)
        self.pixels, self.step_graphs, self.prompt_rows = {}, {}, 0
        self.held, self.cached = 0, []                       # rows of the open clip, and ids whose rows lie behind them
        self.asked_W = torch.zeros(2 + decoder.cache_rows + STEP_ROWS, dtype=torch.long, device=self.device)
        self.hidden_MD = torch.zeros(decoder.cache_rows, self.config.D, dtype=decoder.dtype, device=self.device)
        # One scratch and one stream for the capture of all its graphs: cuBLAS keeps 32 MiB for every stream it meets.
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.capture = torch.cuda.Stream(self.device, priority=self.priority) if self.graphs else None

    def on_stream(self):
        """Context in which this model's work is queued on its own stream; nothing on the CPU."""
        return torch.cuda.stream(self.stream) if self.on_gpu else contextlib.nullcontext()

    def wait_for(self, earlier: Model) -> None:
        """What this model queues from here on starts after what `earlier` has queued so far."""
        if self.on_gpu and earlier.on_gpu:
            self.stream.wait_stream(earlier.stream)
        elif earlier.on_gpu:
            earlier.stream.synchronize()

    def begin(self, sampling: tuple | None, searches: bool) -> None:
        """A request starts. sampling: (temperature, top_p, seed), None: greedy. searches: each forward ends with a
        lookup of the next one's drafts."""
        self.sampling, self.searches = sampling, searches

    def rest(self) -> None:
        """A state on which graphs are captured: any forward may run, and writes only cache rows that nobody needs, or
        can be written again. It has one id, which stands a row behind the open clip, and its limit is far."""
        head = new_state(0, n_out=1, prompt_len=self.held + 1, limit=self.decoder.cache_rows)
        self.state_W[:STATE].copy_(head)
        self.cached = []
        self.asked_W[:2].copy_(torch.tensor([0, 1]))

    def talk(self, question: str | None, turns=()) -> Prompt:
        """The prompt of a question that follows turns (question, answer ids), in both models' template
        `USER: .. ASSISTANT: ..</s>USER: ..`; up to the visual rows if there is no question."""
        if question is None:
            return Prompt(self.prompt("").before, [])
        asked = [*(of for of, _ in turns), question]
        prompt = self.prompt(asked[0])
        for (_, answer), then in zip(turns, asked[1:], strict=True):
            said = answer[:-1] if answer and answer[-1] in self.stops else answer
            prompt.after.extend([*said, self.stops[0], *self.text.ids(f"USER: {then} ASSISTANT:", first=False)])
        return prompt

    def splice(self, prompt: Prompt, visual_AD):
        """The prompt's rows [S, D] with the visual rows in place of the placeholder."""
        before, after = (to_device(torch.tensor(ids, dtype=torch.long), self.device)
                         for ids in (prompt.before, prompt.after))
        embed = self.decoder.embed_VD
        return torch.cat([embed[before], visual_AD.to(embed.dtype), embed[after]])

    # -- forwards. `graph` makes a step graph of the method that is named, for these arguments, unless there is one.

    def graph(self, name: str, *args) -> StepGraph:
        key = (name, *args)
        if key not in self.step_graphs:
            self.step_graphs[key] = StepGraph(lambda: getattr(self, "_" + name)(*args), self)
        return self.step_graphs[key]

    def visual_rows(self, pixels_R3XX, image: bool = False):
        """`encode` as a graph: visual rows of float pixels, on the host or the device. Valid until the next call."""
        encoded = self.encode_graph(len(pixels_R3XX), image)
        self.pixels[len(pixels_R3XX)].copy_(to_device(pixels_R3XX, self.device), non_blocking=True)
        return encoded()

    def encode_graph(self, frames: int, image: bool = False) -> StepGraph:
        if frames not in self.pixels:
            while len(self.pixels) >= 8:                     # other numbers of pictures: graphs and a buffer each
                oldest = next(iter(self.pixels))
                del self.pixels[oldest]
                self.step_graphs = {key: of for key, of in self.step_graphs.items() if key[:2] != ("encode", oldest)}
            side = self.vision.image
            self.pixels[frames] = torch.zeros(frames, 3, side, side, device=self.device)
        return self.graph("encode", frames, image)

    def _encode(self, frames: int, image: bool):
        return self.encode(self.pixels[frames], image)

    def rows_for(self, drafts: int) -> int:
        """Drafts that the verify of so many has rows for: captured ones come in a few widths."""
        return next(width for width in WIDTHS if width >= drafts) if self.graphs else drafts

    def prefill(self, hidden_SD, limit: int, stops: tuple[int, ...], tail_id: int, question: int | None = None) -> None:
        """Fills cache rows 0..S-1 and puts the first answer id into the state. tail_id: the prompt's last id; question:
        its rows behind the visual ones."""
        self.prompt_rows = len(hidden_SD)
        replayed = self.prefill_graph(self.prompt_rows, question)
        self.hidden_MD[:self.prompt_rows].copy_(hidden_SD)
        self._start(limit, stops, tail_id)
        self._close(replayed(), self.searches, self.sampling is not None)

    def prefill_graph(self, rows: int, question: int | None = None) -> StepGraph:
        """On a GPU rows are padded, so that questions of up to QUESTION_ROWS share a graph that is there from loading
        on. A longer one runs without: its kernels take longer than their launches, and a capture longer than both.
        The padding sits behind the prompt: it fills cache rows that nobody sees before decode overwrites them. No round
        number: of 2,080 rows cuBLAS takes 1.2 ms more than of 2,077, of 2,093 0.7 (32 layers, one H200)."""
        room = 0 if question is None else next((n for n in QUESTION_ROWS if n >= question), question)
        size = min(rows - (question or 0) + room, self.decoder.cache_rows) if self.on_gpu else rows
        if question is not None and room not in QUESTION_ROWS:
            return StepGraph(lambda: self._prefill(size), self, captured=False)
        return self.graph("prefill", size)

    def _prefill(self, size: int):
        last_1 = self.state_W[PROMPT_LEN.value:PROMPT_LEN.value + 1] - 1
        return self.decoder.forward(self.hidden_MD[:size], torch.arange(size, device=self.device), only=last_1)

    def _start(self, limit: int, stops: tuple[int, ...], tail_id: int) -> None:
        head = new_state(0, stops, prompt_len=self.prompt_rows, limit=limit)
        self.state_W[:STATE].copy_(to_device(head, self.device), non_blocking=True)
        self.tail_id.fill_(tail_id)
        if self.sampling:
            self.sampling_3.copy_(to_device(sampling_words(*self.sampling), self.device), non_blocking=True)

    def ask(self, ids: list[int], limit: int, stops: tuple[int, ...], known: int = 0) -> None:
        """Runs the ids of a question behind the open clip's rows, and puts the first answer id into the state. The rows
        of the first `known` are there already, as `cached` says.

        Forwards of a fixed number of rows: a row's bits depend neither on how many rows there are nor on which stand
        beside it, so an answer depends on the clip and these ids alone, whatever was asked before."""
        self.prompt_rows, rows = self.held + len(ids), self.decoder.steps.rows
        replayed = self.graph("ask")
        self._start(limit, stops, ids[-1])
        self._send([known, len(ids), *ids, *[0] * rows], self.asked_W)
        for _ in range(known, len(ids), rows):
            last_1V = replayed()
        self._close(last_1V, self.searches, self.sampling is not None)

    def _ask(self):
        """One forward of the next ids. Behind the last one come zeros, whose rows nobody sees."""
        at_1, count_1 = (self.asked_W[i:i + 1] for i in range(2))
        at_S = at_1 + torch.arange(self.decoder.steps.rows, device=self.device)
        ids_S = self.asked_W.gather(0, 2 + at_S).clamp(max=self.config.V - 1)      # a target may know more ids
        pos_ids_S = self.state_W[PROMPT_LEN.value] - count_1 + at_S
        logits_SV = self.decoder.forward(self.decoder.embed_VD[ids_S], pos_ids_S)
        last_1V = logits_SV.index_select(0, (count_1 - 1 - at_1).clamp(max=len(at_S) - 1))
        at_1 += len(at_S)
        return last_1V

    def round(self, G: int = 0) -> None:
        """One forward of [pending_id, up to G of the drafts in the state] and its accept; nothing is returned. A state
        that is done stays as it is."""
        self.round_graph(G)()

    def round_graph(self, G: int) -> StepGraph:
        return self.graph("round", G, self.searches, self.sampling is not None)

    def _round(self, G: int, searches: bool, sampled: bool):
        pos_ids_S, hidden_SD = open_round(self.state_W, G, self.decoder.embed_VD, self.decoder.steps.work.round)
        logits_SV = self.decoder.forward(hidden_SD, pos_ids_S)
        self._close(logits_SV, searches, sampled)
        return logits_SV

    def _close(self, logits_SV, searches: bool, sampled: bool) -> None:
        """Of rows that follow n_out ids the largest elements are the model's ids. Sampled, the draws win: they are made
        before any draft is looked at and depend on none, so accepting what equals them is Leviathan et al. 2023's rule
        for a draft that is certain: d with probability p(d), else an id of p without d."""
        scores_SV = sample(logits_SV, self.state_W, self.sampling_3) if sampled else logits_SV
        close_round(scores_SV, self.state_W, self.decoder.steps.work.round)
        if searches:
            lookup(self.ring, self.state_W)

    def put(self, drafts) -> None:
        """Drafts for the next round, at most 31: a list of ids, or int64 [G] on this device."""
        found_W = self.state_W[FOUND.value:]                 # how many, and behind it they themselves
        if isinstance(drafts, list):
            self._send([len(drafts), *(i if -2 ** 62 < i < 2 ** 62 else -1 for i in drafts)], found_W)
        else:
            found_W[1:1 + len(drafts)].copy_(drafts)
            found_W[0].fill_(len(drafts))

    def _send(self, words: list[int], to_W) -> None:
        """Copies words to the device through page-locked memory, which is made once: afresh it takes 0.09 ms."""
        if self.host_read:
            self.host_read.synchronize()
        self.host_W[:len(words)] = torch.tensor(words)
        to_W[:len(words)].copy_(self.host_W[:len(words)], non_blocking=True)
        if self.host_read:
            self.host_read.record(self.stream)

    def snapshot(self, words: int) -> Snapshot:
        return Snapshot(self.state_W[:words], self.stream)


class Target(Model):
    """Video-LLaVA. Its greedy answer is the truth. Source: transformers' VideoLlavaForConditionalGeneration."""
    side = "target"
    priority = -1

    def __init__(self, config: dict, weights: dict, text: Text, path: str, stops, cache_rows: int, graphs=True):
        decoder = Decoder(text_config(config), weights, cache_rows)
        super().__init__(decoder, text, path, stops, graphs)
        self.ring = Ring(self.device, memory.LOOKUP_ROWS[self.on_gpu], decoder.steps.work.pdl)
        self.draft_W = self.state_W.clone()                  # the copy's state, see `draft`
        self.seen_W = torch.zeros_like(self.host_W, pin_memory=self.on_gpu)     # its first words on the host, `drafted`
        self.seen = torch.cuda.Event() if self.on_gpu else None
        self.vision = vision_config(config)
        self.video_tower, self.image_tower = Tower(self.vision, weights, "video"), Tower(self.vision, weights, "image")
        self.projector = [weights[f"projector.{i}.{p}"] for i in (0, 1) for p in "wb"]
        layer = config.get("vision_feature_layer", -2)
        self.layers = layer if layer >= 0 else self.vision.layers + 1 + layer      # -2 of 25 hidden states is 23
        self.keep_cls = config.get("vision_feature_select_strategy", "default") == "full"   # images only
        self.num_frames = frames_of(config, self.vision)

    def rest(self):
        super().rest()
        self.draft_W.copy_(self.state_W)

    def visual(self, frames: int, image: bool = False) -> int:
        """Visual rows of so many frames."""
        return frames * (self.vision.P + int(not image or self.keep_cls))

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

    def draft(self, first: bool) -> None:
        """One forward of the 4-bit copy on this model's own cache, and on a state of its own, which begins as this
        model's and gets an id more each time; searched is what may follow there. The row that it writes is written
        again, exactly, by the forward that verifies it."""
        if first:
            self.draft_W.copy_(self.state_W)
        self.graph("draft", self.searches, self.sampling is not None)()

    def _draft(self, searches: bool, sampled: bool) -> None:
        work = self.copy.work.round
        pos_ids_S, hidden_SD = open_round(self.draft_W, 0, self.decoder.embed_VD, work)
        logits_SV = self.decoder.forward(hidden_SD, pos_ids_S, steps=self.copy)
        close_draft(sample(logits_SV, self.draft_W, self.sampling_3) if sampled else logits_SV, self.draft_W, work)
        if searches:
            lookup(self.ring, self.draft_W)

    def drafted(self, places: int) -> State:
        """The copy's state with the draft that was queued last, up to so many ids; waits for it. The GPU waits for the
        host meanwhile, so nothing is made anew."""
        seen_W = self.seen_W[:STATE + places].copy_(self.draft_W[:STATE + places], non_blocking=True)
        if self.seen:
            self.seen.record(self.stream)
            self.seen.synchronize()
        return State(seen_W.tolist())


class Drafter(Model):
    """EventGPT. It proposes, and never decides. Source: the original EventChatModel."""
    side = "drafter"

    def __init__(self, config: dict, weights: dict, text: Text, path: str, stops, cache_rows: int, graphs=True):
        super().__init__(Decoder(text_config(config), weights, cache_rows), text, path, stops, graphs)
        self.vision = vision_config(config)
        self.tower = Tower(self.vision, weights, "events")
        self.projector = [weights[f"projector.{i}.{p}"] for i in (0, 1) for p in "wb"]
        self.adaptor = [weights["adaptor.w"], weights["adaptor.b"]] if "adaptor.w" in weights else None
        flags = [bool(config.get(name, name == "mm_use_im_patch_token")) for name in
                 ("mm_use_im_start_end", "mm_use_im_patch_token")]
        first = 32000 + int(flags[1])                        # a patch token, if added, comes before the two markers
        self.marker_ids = (first, first + 1) if flags[0] else None
        self.committed_W = torch.zeros(1 + cache_rows, dtype=torch.long, device=self.device)     # see `resume`

    def rest(self):
        super().rest()
        self.committed_W[:1].fill_(1)

    def visual(self, frames: int, image: bool = False) -> int:
        """Visual rows of so many frames."""
        return frames + self.vision.P + 1

    def prompt(self, question: str) -> Prompt:
        """Each side of the placeholder is encoded alone, and both get a leading-space mark, as upstream."""
        bos, ids = [self.config.bos_id], self.text.ids
        if self.marker_ids:
            start, end = self.marker_ids
            return Prompt(bos + ids(f"{DRAFTER_SYSTEM} USER: ") + [start],
                          [end] + ids(f"\n{question} ASSISTANT:", first=False))
        return Prompt(bos + ids(f"{DRAFTER_SYSTEM} USER: <ev_start>"), ids(f"<ev_end>\n{question} ASSISTANT:"))

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

    def resume(self, ids: list[int], rows: int = 2) -> None:
        """Takes over a text, the ids of an answer, and drafts one id more.

        Its last `rows` ids are run again. Two of them are enough after a round, whose last accepted draft has no row
        yet; so the row that a fully accepted round leaves missing is always written and nobody has to decide. More
        rows write a text that has none, or whose cache rows belong to another text. Rows are padded to 2, or to as
        many as a step may have; a text that lacks more is run in parts.
        """
        most = self.decoder.steps.rows
        ends = [*range(len(ids) - rows + most, len(ids), most), len(ids)]
        for begin, end in zip([len(ids) - rows, *ends], ends, strict=False):
            size = end - begin if end - begin <= 2 else most
            replayed = self.graph("resume", size)
            self._send([end, *ids[:end]], self.committed_W)
            replayed()

    def _resume(self, rows: int) -> None:
        self.state_W[STATE:].copy_(self.committed_W[1:])               # what lies behind the ids is stale, and unseen
        self.state_W[:1].copy_(self.committed_W[:1])
        self.state_W[DONE.value].fill_(0)
        self.state_W[LIMIT.value].fill_(len(self.state_W))             # the limit was the head start's
        if rows == 1:                                                  # its last id has no row yet, as after any round
            self._round(0, searches=False, sampled=False)
            return
        n_out = self.state_W[:1]
        first = (n_out - rows).clamp(min=-1)                           # before the first answer id comes the prompt
        at_S = first + torch.arange(rows, device=self.device)          # from n_out on they are stale, and unseen
        ids_S = self.state_W.gather(0, STATE + at_S.clamp(min=0, max=len(self.state_W) - STATE - 1))
        ids_S = torch.where(at_S < 0, self.tail_id, ids_S)
        known_S = ids_S.clamp(max=self.config.V - 1)                   # the target may know more ids than the drafter
        logits_SV = self.decoder.forward(self.decoder.embed_VD[known_S], self.state_W[PROMPT_LEN.value] + at_S)
        self._close(logits_SV.index_select(0, n_out - 1 - first), searches=False, sampled=False)

    def written(self, place: int, G: int):
        """Its ids from that place of the answer on: int64 [G], -1 past its own end."""
        at_G = place + torch.arange(G, device=self.device)
        return torch.where(at_G < self.state_W[:1], self.state_W[STATE + place:STATE + place + G], -1)


# ---- step graphs -----------------------------------------------------------------------------------------------


class StepGraph:
    """One captured call of `fn`, which reads and writes static tensors only. Eager where there is no graph.

    A warm-up run of three layers compiles kernels outside the capture; it and the capture write cache rows and state,
    so a graph is built before prefill, or behind the rows of an open clip. `out` is what fn returned, valid until the
    next replay.

    Not `torch.cuda.graph`: that gives all memory that torch keeps for reuse back to the driver, page-locked too, and
    the next warm-up asks for it again. A capture cannot: so it is given back here where little is left.
    """

    def __init__(self, fn, model: Model, captured: bool = True):
        self.fn, self.graph, self.out = fn, None, None
        if not (model.graphs and captured):
            return
        kept = model.state_W.clone()
        model.rest()                                         # the last request's lengths may not fit this shape
        with torch.cuda.device(model.device), torch.inference_mode():
            model.stream.wait_stream(torch.cuda.current_stream(model.device))
            with model.on_stream(), model.decoder.shortened():
                fn()
            torch.cuda.synchronize(model.device)
            free, whole = memory.free_bytes(model.device)
            kept_free = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
            if free - kept_free < whole / 8:
                torch.cuda.empty_cache()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(model.capture):
                self.graph.capture_begin(pool=model.pool, capture_error_mode="thread_local")
                try:
                    self.out = fn()
                finally:
                    self.graph.capture_end()
            model.state_W.copy_(kept)
            torch.cuda.synchronize(model.device)

    def __call__(self):
        if self.graph is None:
            self.out = self.fn()
        else:
            self.graph.replay()
        return self.out


class Snapshot:
    """A copy of a state's first words on its way to the host. `read()` waits for it alone, never for work queued later.
    """

    def __init__(self, state_W, stream):
        if stream is None:
            self.host, self.ready = state_W.clone(), None
        else:
            self.host = torch.empty(state_W.shape, dtype=state_W.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                self.host.copy_(state_W, non_blocking=True)
                self.ready = torch.cuda.Event()
                self.ready.record(stream)

    def read(self) -> State:
        if self.ready is not None:
            self.ready.synchronize()
        return State(self.host.tolist())


# ---- the request -----------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What was asked, and what its two workers share while they answer."""
    asked: Asked
    question: str | None                    # None: a clip is opened
    shown: dict[str, Shown]                 # side -> what it is shown
    prompts: dict[str, Prompt]              # side -> its prompt
    clip: Clip | None                       # whose rows are in the caches already
    goes_on: bool                           # behind the clip's last answer
    timeline: Timeline
    gate: Gate | None                       # None: draft whatever it costs
    line: Line | None                       # of a drafter on a device of its own
    earlier: Lookup | None = None           # the answers that are looked up
    tenant: Tenant = PLAIN                  # who drafts for the target
    out: queue.Queue = field(default_factory=queue.Queue)
    stop_drafting: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    drafter_done: threading.Event = field(default_factory=threading.Event)
    host_free: threading.Event = field(default_factory=threading.Event)         # the drafter may use the interpreter
    frames_ready: threading.Event = field(default_factory=threading.Event)      # the target wants the GPU
    frames_at: float = 0.0                              # when the last frame was decoded, seconds
    preview: list = field(default_factory=list)         # (id, seconds) as the host saw them
    round_log: list = field(default_factory=list)
    draft_log: list = field(default_factory=list)
    prefill_end: float | None = None
    sent: int = 0                                       # ids of the answer that the caller has
    tell_now: Callable = lambda: None                   # sends the caller what the host has seen since the last time
    prompt_rows: dict = field(default_factory=dict)
    errors: list = field(default_factory=list)          # why drafters and sources gave up
    workers: set = field(default_factory=set)           # the threads that answer it

    @property
    def image(self) -> bool:
        """One picture in place of a video."""
        return "target" in self.shown and self.shown["target"].pictures is not None

    @property
    def size(self) -> int:
        """Of the video file, in doublings: clips of a size take alike to decode. 0: nothing is decoded."""
        return self.shown["target"].size.bit_length() if "target" in self.shown and not self.clip else 0

    def pictures(self, model: Model) -> int:
        """How many a model sees."""
        ours = model.num_frames if model.side == "target" else self.asked.event_frames
        return self.shown[model.side].pictures or ours

    def send(self, kind: str, ids: list[int]) -> float:
        """Hands ids to the caller, with the time; the lock keeps what both sides send in order of time."""
        with self.timeline.lock:
            now = self.timeline.now()
            self.out.put((kind, ids, now))
        return now

    def show_answer(self, state: State) -> None:
        """Hands the target's ids that are new to the caller."""
        if self.line and not state.done:
            self.line.taken.wait(4e-4)                       # the drafter takes them first: a step is queued already
        fresh, self.sent = state.ids[self.sent:], len(state.ids)
        if fresh:
            self.send("final", fresh)

    def show_preview(self, state: State) -> None:
        """Hands the drafter's ids that are new to the caller."""
        fresh = state.ids[len(self.preview):]
        if fresh:
            now = self.send("preview", fresh)
            self.draft_log += enumerate(fresh, len(self.preview))
            self.preview += [(i, now) for i in fresh]


# ---- the engine ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain(inference: bool = True):
    """torch as the engine's own threads have it, whatever default device, autocast or gradients the caller's has."""
    with torch.inference_mode(inference), torch.device("cpu"), torch.autocast("cpu", enabled=False), \
            torch.autocast("cuda", enabled=False):
        yield


class Closing:
    """`with` ends in `close`."""
    close: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __reduce__(self):
        raise InputError(f"{type(self).__name__}: cannot be copied or sent to another process; make another one there")


class Engine(Closing):
    """A target and its drafter, answering one request at a time. See `load_engine`.

    Two engines may live in one process; on one engine a second request waits for the first, for so long as its
    `timeout` says. `close`, or `with engine`, ends its threads and gives its memory back.
    """

    def __init__(self, target: Target | None, drafter: Drafter | None, draft_len: int = 5, overlap_len: int = 15,
                 gate: bool = True, several: int = 1):
        self.target, self.drafter = target, drafter
        self.draft_len, self.overlap_len, self.several = draft_len, overlap_len, several
        self.gate = Gate() if gate else None
        self.lookup = Lookup()                               # this engine's own answers
        self.in_ring: tuple = (None, 0)                      # whose answers the target's ring holds, and how many
        self.right = 0.5                                     # see Line; it outlives the request
        self.learners: list = []                             # what the last request left to `remember`
        self.apart = bool(target and drafter) and target.device != drafter.device   # the drafter has its own device
        self.target_first = bool(target and target.on_gpu)   # at the interpreter's lock, see `_drafter_side`
        self._clip: weakref.ref[Clip] | None = None          # see `clip`
        self.clips: weakref.WeakSet[Clip] = weakref.WeakSet()               # all that are open
        self.lock = threading.Lock()
        self.owner: int | None = None                        # the thread whose request runs
        self.running: Request | None = None
        self.pid, self.closed = os.getpid(), False
        # One lasting thread a model: cuDNN keeps its plans per thread, and a new thread pays 70 ms to make them again.
        self.threads = {m.side: ThreadPoolExecutor(1, thread_name_prefix=m.side) for m in self.models}

    @property
    def models(self) -> list[Model]:
        return [m for m in (self.target, self.drafter) if m is not None]

    @property
    def copy_stays(self) -> str | None:
        """Why the target's 4-bit copy is not on the drafter's device where that is another one; None: there is none."""
        if not (self.apart and self.target.copy):
            return None
        step, draft = self.gate and self.gate.step, self.gate and self.gate.seconds("self draft")
        most = "step / draft"
        if step and draft:
            most = f"{step / draft:.2f} (step {step * 1e3:.2f} / draft {draft * 1e3:.2f} ms)"
        here, there = self.target.device, self.drafter.device
        return (f"the copy stays on {here} and drafts on the target's own cache; on {there} it would need a cache and "
                f"a prefill of its own, to be at most {most} times as fast as the target")

    def close(self) -> None:
        """Ends the worker threads and frees the models' memory; twice is once. A request that still runs is cancelled,
        and whoever reads it is told so."""
        if self.closed or os.getpid() != self.pid:           # nothing of it came along with a fork
            return
        self.closed, running = True, self.running
        if running:
            running.cancelled.set()
            running.stop_drafting.set()
        if self.owner != threading.get_ident() and self.lock.acquire(timeout=1.0):     # longer, if nobody reads it
            self.lock.release()
        for thread in self.threads.values():
            thread.shutdown()
        for clip in self.clips:
            clip.parked.clear()
        self.target = self.drafter = self._clip = self.running = running = None
        self.learners, self.in_ring = [], (None, 0)
        gc.collect()                                         # a graph and its model refer to each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _insist_usable(self) -> None:
        if self.closed:
            raise InputError("engine: is closed; load another one")
        if os.getpid() != self.pid:
            raise InputError("engine: was loaded before os.fork(), which takes no threads along; load one in the child "
                             "process, or start that by multiprocessing's \"spawn\"")

    @contextlib.contextmanager
    def _turn(self, timeout: float | None):
        """This thread's turn. InputError if another's request runs for longer than so many seconds."""
        if self.running and threading.get_ident() in self.running.workers:
            raise InputError("engine: waits for the source that asks it; load a second one")
        mine = self.lock.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        if not mine:
            gc.collect()                                     # its owner may be a stream that nobody holds
            mine = self.lock.acquire(blocking=False)
        if not mine:
            owner = next((of.name for of in threading.enumerate() if of.ident == self.owner), "another thread")
            raise InputError(f"engine: a request of {owner} has kept it busy for {timeout:g} s; finish or close that, "
                             f"raise `timeout`, or load a second engine")
        try:
            self._insist_usable()
            self.owner = threading.get_ident()
            yield
        finally:
            self.owner = self.running = None
            self.lock.release()

    # -- the loop

    def _rounds(self, model: Model, req: Request, source: Tenant, limit: int, name: str, tell) -> None:
        """propose -> verify -> accept, from the prefill to the end. tell: called with each state that the host sees.

        On a GPU, if the source does not need the host, the next round is queued before the last one was read. The
        caller is told only when the GPU's next work is queued, so that the GPU does not wait for it."""
        words, left = STATE + limit + STEP_ROWS, limit - 1
        state: State | None = None                           # the newest that the host has seen
        untold: State | None = None                          # the same, until the caller has it
        waiting: collections.deque = collections.deque([(model.snapshot(words), None)])      # on their way to the host

        def tell_now():
            nonlocal untold
            if untold:
                tell(untold)
            untold = None

        if model is self.target:
            req.tell_now = tell_now
        while not req.cancelled.is_set():
            while left > 0 and not (state and state.done) and len(waiting) <= (model.on_gpu and not source.needs_host):
                proposal = source.propose(None if waiting else state) or Proposal()
                if proposal is ENOUGH:
                    left = 0
                    break
                with req.timeline.stage("verify" if proposal.rows else name, model, drafts=proposal.rows):
                    model.round(proposal.rows)
                waiting.append((model.snapshot(words), proposal))
                left -= 1
            tell_now()
            if not waiting:
                break
            (snapshot, proposal), before = waiting.popleft(), state
            state = untold = snapshot.read()
            if model is self.target and req.prefill_end is None:
                req.prefill_end = req.timeline.now()
            check_finite(state, model, proposal.rows and "verify" or name if proposal else "prefill")
            if not model.on_gpu:                             # there nothing is queued
                tell_now()
            spoke = proposal and state.n_out > before.n_out
            if spoke and model is self.target and (req.asked.mode == "speculative" or proposal.rows):
                author = "drafter" if before.ahead and proposal.source == "lookup" else proposal.source
                req.round_log.append(Round(author if state.drafted else "", state.drafts, state.accept_len,
                                           proposal.behind))
            if spoke or proposal is None:
                source.saw(proposal, before, state)

    # -- the two sides, each on a thread of its own

    def _target_side(self, req: Request) -> None:
        """Video to answer. Everything it sends is the target's own id."""
        model, frames = self.target, None
        if not req.clip:
            with req.timeline.stage("load", model, host=True):
                frames = req.shown["target"].read(req.host_free.set)       # from here on FFmpeg's threads work
            if self.target_first:
                req.host_free.clear()
        req.frames_at = req.timeline.now()
        req.frames_ready.set()
        with model.on_stream():
            first_id(model, frames, req.asked.max_new_tokens, req)
            req.host_free.set()
            self._rounds(model, req, req.tenant, req.asked.max_new_tokens, "decode", req.show_answer)

    def _drafter_side(self, req: Request) -> None:
        """Events to drafts. It stops when the target is ready, at its limit, at the end of its own text, or when the
        gate expects another draft to cost the target more than it brings.

        Both sides need Python's interpreter lock. Beside a target on a GPU the drafter leaves it to the target while
        that reads packets, and from its last frame until its prefill is queued (`host_free`). Without this the frames
        of a 20 s clip came 6.8 ms later on 16 cores; now it is 0.5, and the preview comes 3.5 ms later."""
        model = self.drafter
        alone = req.asked.mode in ("drafter_only", "prefill_only") or req.question is None
        gate = None if alone or self.apart else req.gate     # on a device of its own it disturbs nobody
        rest = req.asked.max_new_tokens if req.asked.mode == "speculative" else 0
        if gate and not gate.head_start(req.question, req.asked.overlap_len, req.size, rest, req.asked.draft_len):
            return
        req.host_free.wait()
        loaded = None
        if not req.clip:
            with req.timeline.stage("load", model, host=True):
                loaded = req.shown["drafter"].read()
        endless = alone or self.apart and req.asked.mode == "speculative"
        limit = req.asked.max_new_tokens if endless else min(req.asked.overlap_len + 1, req.asked.max_new_tokens)
        req.host_free.wait()
        with model.on_stream():
            first_id(model, loaded, limit, req)
            if req.line:
                return self._draft_line(req, limit)
            self._rounds(model, req, drafting.OwnText(req, gate), limit, "draft", req.show_preview)

    def _draft_line(self, req: Request, limit: int) -> None:
        """On a device of its own: drafts for as long as the answer grows, as if the target accepted everything. Its
        line of drafts lies in the target's ring. The target searches it behind each forward and takes what fits its
        ids at that moment, so neither side waits for the other."""
        model, line, clock, words = self.drafter, req.line, req.timeline.now, STATE + limit + STEP_ROWS
        line.right, behind, tip, began = self.right, [], [], None
        while True:
            state = model.snapshot(words).read()
            if began is not None:
                line.forward = drafting.smoothed(line.forward, clock() - began)
            req.host_free.wait()
            check_finite(state, model, "draft")
            fresh = state.ids[len(behind):]
            line.extend(behind, fresh)
            tip, began = behind + fresh, clock()
            task = None if req.stop_drafting.is_set() else line.next(began)
            if task:                                         # first of all the GPU goes on
                self._draft_behind(req, *task, tip)
            ids, drafts, right = line.tail()
            self.target.ring.set_line(ids, self._rank(req, right))
            if behind and behind != tip[:len(behind)] or line.broken:
                req.draft_log += enumerate(fresh, len(behind))
            else:
                req.show_preview(state)
            while not task:                                  # all is drafted, or would come too late
                line.taken.set()
                line.news.wait(1e-3 if line.spoke else 1e-2)
                line.news.clear()
                if req.stop_drafting.is_set():
                    self.right = line.right
                    return
                began = clock()
                if task := line.next(began):
                    self._draft_behind(req, *task, tip)
            behind = task[0]

    def _draft_behind(self, req: Request, ids: list[int], missing: int, tip: list[int]) -> None:
        """Queues the drafter's forward behind a text whose last `missing` ids have no row in its cache yet. tip: the
        text that its state holds."""
        with req.timeline.stage("draft", self.drafter):
            self.drafter.round() if ids == tip else self.drafter.resume(ids, missing)
        req.line.taken.set()

    def _rank(self, req: Request, right: float) -> int:
        """Whether a drafter's line, with so many right drafts expected, goes before earlier answers."""
        if not req.earlier or not req.earlier.learnt:
            return ONLY.value
        alive = req.gate.alive("lookup", req.question, WIDTHS[-2]) if req.gate else [0.0]
        return FIRST.value if right > sum(alive) else AFTER.value

    # -- checks, assembly

    def _check_rows(self, model: Model, req: Request) -> int:
        """Rows of the prompt; InputError if it and the answer do not fit the cache."""
        prompt, d = req.prompts[model.side], model.decoder
        rows = prompt.rows(model.visual(req.pictures(model), req.image))
        spare = max(req.asked.draft_len, req.asked.overlap_len, WIDTHS[-1] if model is self.target else d.steps.rows,
                    d.steps.rows - 1 if req.clip else 0)
        need = rows + req.asked.max_new_tokens + spare + 2
        if need > d.cache_rows:
            raise InputError(f"{model.path}: {model.side} cache holds {d.cache_rows} rows, prompt {rows} + new "
                             f"{req.asked.max_new_tokens} + drafts {spare + 2} needs {need}; raise `cache_rows`, lower "
                             f"`max_new_tokens` or shorten the question{', or begin a new chat' * req.goes_on}")
        return rows

    def _prepare(self, req: Request, active) -> None:
        """Checks that the request fits the caches, and captures every graph that it needs and loading did not: before
        anything runs, since a capture writes cache rows."""
        drafts = req.tenant is not PLAIN
        for model in active:
            rows = self._check_rows(model, req)
            with naming_stage(model, "preparation"):
                if not req.clip:
                    model.encode_graph(req.pictures(model), req.image and model is self.target)
                    model.prefill_graph(rows, len(req.prompts[model.side].after))
                if req.clip or req.question is None:
                    model.graph("ask")
                for G in (0, *WIDTHS) if model is self.target and drafts and model.graphs else (0,):
                    model.round_graph(G)
                if model is self.target and drafts and model.copy:
                    model.graph("draft", model.searches, model.sampling is not None)
                speculates = model is self.drafter and req.asked.mode == "speculative"
                for size in (1, 2, model.decoder.steps.rows) if speculates else ():
                    model.graph("resume", size)

    def prepare(self, progress=None) -> None:
        """Captures what ordinary requests replay, then answers about a black clip, so that neither the first answer
        nor a question of a new length waits for it. The second answer's question is one without a graph, if the caches
        have room for such: the first prefill of that kind in a thread makes cuBLAS's handle there and takes the memory
        that later ones use. The gate learns what a step takes, and nothing else is learnt.
        progress: called with ("preparation", steps done, steps in all)."""
        self._insist_usable()
        insist_function("progress", progress)

        def capture(model: Model) -> None:
            with naming_stage(model, "preparation"):
                rows = len(model.prompt("").before) + model.visual(model.num_frames)
                for room in reversed(QUESTION_ROWS):         # the longest first: others fit its scratch
                    model.prefill_graph(rows + room, room)
                model.graph("ask")

        def answer(mode: str, question: str) -> None:
            asked = Asked((x, x, x, x % 2), [frame_HW3] * most, question, 4, mode=mode, ignore_eos=True, remember=False)
            entries = collections.deque(self._answer(asked), 1)[0].result.timeline
            if kept and mode == "target_only":
                kept.timed("step", min(end - start for _, stage, start, end, _ in entries if stage == "decode"))

        def fits(question: str) -> bool:
            prompts = [(model, model.prompt(question)) for model in self.models]
            return all(len(prompt.after) <= 2 * QUESTION_ROWS[-1] and prompt.rows(model.visual(model.num_frames))
                       + 2 * STEP_ROWS + 8 <= model.decoder.cache_rows for model, prompt in prompts)

        if not fits("?"):
            return                                           # a request will say what does not fit
        a_word = max(len(model.prompt("why why").after) - len(model.prompt("why").after) for model in self.models)
        words = range(2 * QUESTION_ROWS[-1] // max(1, a_word), 0, -8)
        longest = next(filter(fits, ("why " * count for count in words)), "?")
        x, frame_HW3 = torch.arange(100), torch.zeros(240, 320, 3, dtype=torch.uint8)
        most = max(model.num_frames for model in self.models)
        steps: list[Callable] = [functools.partial(capture, model) for model in self.models]
        both = ("target_only", "?"), ("speculative", longest)
        steps += [functools.partial(answer, *of) for of in (both if self.target else [("drafter_only", longest)])]
        kept, self.gate = self.gate, None
        try:
            for done, step in enumerate(steps, 1):
                with plain():
                    step()
                if progress:
                    progress("preparation", done, len(steps))
        finally:
            self.gate, self.learners, self.right = kept, [], 0.5

    def _fill_ring(self, earlier: Lookup) -> None:
        """Brings the target's ring up to what a Lookup has learnt."""
        owner, count = self.in_ring
        with self.target.on_stream():
            if owner is not earlier:
                self.target.ring.clear()
                count = 0
            if earlier.learnt > count:
                self.target.ring.add_all(earlier.newest(earlier.learnt - count))
        self.in_ring = earlier, earlier.learnt

    @takes(Asked)
    def stream(self, asked: Asked) -> Iterator[Event]:
        """Yields `Event`s while the answer forms; the last one carries `finish_reason` and the `Result`. InputError for
        anything the user can mend, before any model runs where possible."""
        yield from self._answer(asked)

    @takes(asking.AskedTold)
    def generate(self, asked: asking.AskedTold) -> Result:
        """The finished `Result`; arguments as `stream`."""
        return finished(self._answer(asked), asked.on_event)

    @takes(asking.Opening)
    def open(self, opening: asking.Opening) -> Clip:
        """Reads and encodes a clip once, for any number of questions; arguments as `stream`, but for the question.

        What says how to answer holds for every question that does not say it anew; mode and draft_source decide which
        models see the clip. It fills their caches until it is closed: `stream`, `generate` and, of more clips than
        `several` of `load_engine`, another `open` are refused until then."""
        return Clip(self, Asked(**vars(opening)))

    def _checked(self, asked: Asked, clip: Clip | None) -> tuple[list, list[Model], str | None]:
        """(sources, models that take part, why the drafter does not if it was to draft and broke at the clip).
        InputError for what the user can mend; nothing has run then."""
        self._insist_usable()
        asked.check()
        mode, uses_target = asked.mode, asked.mode != "drafter_only"
        if uses_target and self.target is None:
            raise InputError(f"mode {mode}: needs the target, which was not loaded; pass `videollava`")
        drafter = None if clip and "drafter" not in clip.sides else self.drafter
        sources, broke = sources_of(asked.draft_source, self.lookup, self.target, drafter, mode), None
        uses_drafter = mode in ("drafter_only", "prefill_only") or mode != "target_only" and (
            "drafter" in sources or bool(drafting.asking_drafter(sources))
            or mode == "prefill_then_verify" and asked.draft_source is None)
        if uses_drafter and self.drafter is None:
            raise InputError(f"mode {mode}: needs the drafter, which was not loaded; pass `eventgpt`")
        if clip:
            if uses_drafter and mode in ("prefill_then_verify", "speculative"):
                broke = clip.opened.drafter_error
                uses_drafter = not broke or "drafter" in clip.sides
        active: list[Model] = [*[self.target] * uses_target, *[self.drafter] * uses_drafter]
        for side in [model.side for model in active if clip and model.side not in clip.sides]:
            raise InputError(f"clip: the {side} does not see it; open it with the {side}'s file and in a mode that "
                             f"uses both, or ask in another mode")
        if self.owner == threading.get_ident():
            gc.collect()                                     # a stream that nobody holds may be in a cycle
        if self.owner == threading.get_ident():
            raise InputError("engine: a stream of this thread is still open; finish or close it first")
        return sources, active, broke

    def _answer(self, asked: Asked, clip: Clip | None = None, turns=None, opens: Clip | None = None):
        """The one path of every request: checks, then runs it. clip: whose rows are in the caches; turns: the chat that
        the question goes on with; opens: a clip whose rows shall be there, and nothing is asked."""
        sources, active, broke = self._checked(asked, clip)
        with plain():
            shown = clip.shown if clip else asked.shown(active)
        turns = turns if turns is None else check_turns(turns, max(model.config.V for model in self.models))
        asked.query, mode = check_question(asked.query), asked.mode
        question = None if opens else asked.query
        asked = dataclasses.replace(
            asked, draft_len=self.draft_len if asked.draft_len is None else asked.draft_len,
            overlap_len=self.overlap_len if asked.overlap_len is None else asked.overlap_len,
            max_new_tokens=1 if opens else asked.max_new_tokens)
        with self._turn(asked.timeout):
            if clip and clip not in self.clips:
                raise InputError("clip: is closed; open it again")
            room = self.several if opens else 1
            if not clip and len(self.clips) >= room:
                gc.collect()                                 # those that nobody holds are in cycles with requests
            if not clip and len(self.clips) >= room:
                raise InputError(f"engine: {len(self.clips)} clips are open, as many as it was loaded for; close one, "
                                 f"or raise `several`" if opens and self.several > 1 else "engine: an open clip fills "
                                 "the caches; close it first (`with engine.open(..) as clip` does)")
            if opens and self.several > 1:
                opens.parked = {model.side: Parked(model, len(self.clips)) for model in active}
            self._bring(clip)
            for model in self.models:
                model.held = clip.sides.get(model.side, 0) if clip else 0
            gate = self.gate if mode in ("prefill_then_verify", "speculative") and not opens else None
            asks = drafting.asking_drafter(sources)
            if self.drafter in active and "drafter" not in sources and asks and gate and not self.apart:
                active = active if any(gate.pays(of.name) for of in asks) else [self.target]
            line = None
            if self.apart and self.drafter in active and "drafter" in sources and mode == "speculative" and not opens:
                line = Line(() if asked.ignore_eos else self.drafter.stops, asked.max_new_tokens)
            prompts = {model.side: model.talk(question, turns or ()) for model in active}
            req = Request(asked, question, shown, prompts, clip, turns is not None, Timeline(active), gate, line,
                          errors=[broke] * bool(broke))
            self.running = req
            req.earlier = next((of for of in sources if isinstance(of, Lookup)), None)
            req.tenant = drafting.tenant_of(req, sources, self.target, self.drafter)
            self.learners = [of for of in sources if not isinstance(of, str) and not opens]
            searches = req.tenant is not PLAIN and bool(req.earlier or line)
            for model in active:                         # drafts stay greedy, whoever judges them
                model.answered = None
                drawn = (asked.temperature, asked.top_p, asked.seed)
                model.begin(drawn if asked.temperature and model is active[0] else None,
                            searches and model is self.target)
                if model.on_gpu:
                    torch.cuda.reset_peak_memory_stats(model.device)
            if clip or not (self.target in active and self.target_first):
                req.host_free.set()
            with plain():                                # not around the yields: it would leak to the caller
                self._prepare(req, active)
                if searches:
                    with noting(req.errors):             # a Lookup of the caller's may hold anything
                        self._fill_ring(req.earlier or Lookup())
                    self.target.ring.set_line([])
            for source in self.learners:
                with noting(req.errors):
                    source.begin(question)
            req.timeline.start()
            yield from self._run(req, active, asked.remember)
            if opens:
                opens.shown, opens.sides, self._clip = shown, dict(req.prompt_rows), weakref.ref(opens)
                self.clips.add(opens)

    @property
    def clip(self) -> Clip | None:
        """The open one, of several the one that was asked last: its rows are in the caches. A clip that nobody holds
        any more is closed."""
        return self._clip() if self._clip else None

    def _bring(self, clip: Clip | None) -> None:
        """Puts a clip's rows into the caches, after those of another that are there were parked."""
        earlier = self.clip
        if earlier is not clip:
            with plain():
                for model in self.models:
                    if earlier and model.side in earlier.sides:
                        earlier.parked[model.side].leave(model, earlier.sides[model.side])
                    if clip and model.side in clip.sides:
                        clip.parked[model.side].come_back(model)
            self._clip = weakref.ref(clip) if clip else None

    def remember(self, result: Result) -> None:
        """Lets the sources of the last request learn its answer, where `remember=False` had kept it from them."""
        insist_kind("result", result, Result)
        for source in self.learners:
            source.learn(list(result.output_ids))
        self.learners = []

    def _run(self, req: Request, active, remember: bool):
        self._insist_usable()                                # a source may have closed it as it began
        deciding = "target" if self.target in active else "drafter"
        if self.drafter not in active:
            req.drafter_done.set()
        answer = {"target": "final", "drafter": "preview"}[deciding]         # the kind of event that makes it up
        texts = {"preview": TextStream(self.drafter.text, req.asked.stop)} if self.drafter in active else {}
        texts["final"] = TextStream((self.target if deciding == "target" else self.drafter).text, req.asked.stop)
        result, running, error = Result(mode=req.asked.mode), {m.side for m in active}, None
        working: list = []
        try:
            for model in active:
                working.append(self._started(req, model))
            while running:
                self._insist_usable()
                kind, value, at = req.out.get()
                if kind == "end":
                    running.discard(value)
                    if value == "target":                    # a preview of what is already there helps nobody
                        req.stop_drafting.set()
                elif kind == "error":
                    error = error or at
                    req.cancelled.set()
                    req.stop_drafting.set()
                elif texts[kind].stopped:                    # what the model wrote before it heard of that
                    continue
                elif kind == "preview":
                    result.ttfp = at if result.ttfp is None else result.ttfp
                    if deciding == "drafter":
                        result.ttft = result.ttfp
                elif kind == "final":
                    result.ttft = at if result.ttft is None else result.ttft
                    result.wall_clock_time = at
                if text := texts.get(kind):
                    delta = text.push(value)
                    yield Event(kind, text.out, delta, list(text.ids), at * 1e3)
                if texts[answer].stopped:
                    req.cancelled.set()
                    req.stop_drafting.set()
            if error is not None:
                raise error
        finally:                                             # also when the caller closes the generator early
            req.cancelled.set()
            req.stop_drafting.set()
            if os.getpid() == self.pid:                      # after a fork nobody would end
                concurrent.futures.wait(working)
        self._insist_usable()
        yield self._finish(req, result, deciding, texts, remember)

    def _started(self, req: Request, model: Model) -> concurrent.futures.Future:
        try:
            return self.threads[model.side].submit(self._worker, req, model)
        except RuntimeError:                                 # of threads that were ended meanwhile
            self._insist_usable()
            raise InputError("engine: the program is ending, and its threads have; ask before the main thread ends"
                             ) from None

    def _worker(self, req: Request, model: Model) -> None:
        """Runs one side and reports its end. A drafter's failure is noted; only bad input or the target's is raised."""
        req.workers.add(threading.get_ident())
        try:
            here = torch.cuda.device(model.device) if model.on_gpu else contextlib.nullcontext()
            with torch.inference_mode(), here:
                (self._target_side if model is self.target else self._drafter_side)(req)
        except BaseException as thrown:                      # a panic of a library in Rust is no Exception
            error = thrown if isinstance(thrown, Exception) else RuntimeError(describe(thrown))
            bad_input = isinstance(error, InputError) and not isinstance(error, NonFinite)
            if isinstance(error, NonFinite):                 # of unseen rows: they are multiplied by 0, and stay NaN
                with torch.inference_mode(), model.on_stream():
                    for cache in (model.decoder.k_cache_LNMK, model.decoder.v_cache_LNMK):
                        cache[:, :, model.held:].zero_()
            if model is self.target or req.asked.mode == "drafter_only" or bad_input:
                req.out.put(("error", model.side, error))
            else:
                req.errors.append(describe(error))
        finally:
            (req.drafter_done if model is self.drafter else req.host_free).set()
            req.out.put(("end", model.side, None))

    def _finish(self, req: Request, result: Result, deciding: str, texts, remember: bool) -> Event:
        decider = self.target if deciding == "target" else self.drafter
        if "preview" in texts:
            texts["preview"].push([], end=True)
            result.preview_ids, result.preview_text = texts["preview"].ids, texts["preview"].out
        result.preview_end = req.preview[-1][1] if req.preview else None
        final = texts["final"]
        if deciding == "drafter":
            result.preview_text, result.wall_clock_time = "", result.preview_end
            final.push([i for i, _ in req.preview])
        delta = final.push([], end=True)
        result.output_text, result.output_ids = final.out, final.ids
        ended = not req.asked.ignore_eos and result.output_ids[-1:] and result.output_ids[-1] in decider.stops
        result.finish_reason = "stop" if ended or final.stopped else "length"
        entries = req.timeline.resolve()
        result.add_stages(entries)
        if self.gate and deciding == "target" and req.asked.mode != "prefill_only" and req.question is not None:
            drafting.learn(self.gate, req, result, entries, final.stopped)
        if remember:
            for source in self.learners:
                with noting(req.errors):
                    source.learn(list(result.output_ids))
            self.learners = []
        for model in self.models if req.clip else ():        # whose rows a chat may go on from
            if model.side in req.prompt_rows:
                model.cached = req.prompts[model.side].after + (result.output_ids[:-1] if model is decider else [])
                model.cached *= model is decider or not req.errors
        result.prompt_rows, result.draft_log, result.round_log = req.prompt_rows, req.draft_log, req.round_log
        result.drafter_error = next(iter(req.errors), None)
        result.count()
        if deciding == "target":
            result.free_tokens_count = sum(at <= req.prefill_end for _, at in req.preview)
            result.window_drafts = sum(at <= req.frames_at for _, at in req.preview)
        result.peak_memory = memory.peak_memory(decider.device)
        decider.answered = result
        return Event("final", result.output_text, delta, list(result.output_ids), result.wall_clock_time * 1e3,
                     result.finish_reason, result)


def finished(events, on_event=None) -> Result:
    """The Result of a stream, each of whose events is handed on."""
    insist_function("on_event", on_event)
    with contextlib.closing(events):                         # also if that fails
        for event in events:
            if on_event and inspect.isawaitable(on_event(event)):
                raise InputError("on_event: gave what nobody awaits; pass a function that is not async")
    return event.result


class Parked:
    """A clip's rows of one model's cache while another's stand there. InputError if there is no memory for them."""

    def __init__(self, model: Model, open_clips: int):
        caches = model.decoder.k_cache_LNMK, model.decoder.v_cache_LNMK
        try:
            with plain(), model.on_stream():
                self.pairs = [(cache, torch.empty_like(cache)) for cache in caches]
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise InputError(f"engine: {model.device} has no {sum(t.nbytes for t in caches) / 1e9:.3f} GB for another "
                             f"clip's rows, {open_clips} are open; close one, or lower `cache_rows`") from None
        self.held, self.cached = 0, []                       # visual rows that are copied, and ids with rows behind

    def leave(self, model: Model, held: int) -> None:
        end = held + len(model.cached)
        with model.on_stream():
            for cache, parked in self.pairs:                 # visual rows stay as they are
                parked[:, :, self.held:end].copy_(cache[:, :, self.held:end])
        self.held, self.cached = held, model.cached

    def come_back(self, model: Model) -> None:
        end = self.held + len(self.cached)
        with model.on_stream():
            for cache, parked in self.pairs:
                cache[:, :, :end].copy_(parked[:, :, :end])
        model.cached = self.cached


class Clip(Closing):
    """A clip that was read and encoded once: the caches hold its rows, and those of a question go behind them. Made by
    `Engine.open`.

    An answer does not depend on what was asked before: it is what a fresh clip would give, in every mode, and a chat is
    what the same chat asked at once would give; on a GPU that holds for every bit of the target's. Where two ids are
    nearly as likely an answer may part from that of `Engine.generate`, whose prefill is one piece.
    turns: the chat so far, (question, answer ids); `del clip.turns[-1]` takes the last one back."""
    turns: Any = None                                        # or deleted: a new chat

    def __init__(self, engine: Engine, asked: Asked):
        self.engine, self.asked, self.turns = engine, asked, []
        self.shown: dict[str, Shown] = {}
        self.sides: dict[str, int] = {}                      # models that see it -> its rows in their caches
        self.parked: dict[str, Parked] = {}                  # where those may wait, if there may be several clips
        for event in engine._answer(asked, opens=self):
            self.opened = event.result                       # times of reading, encoding and prefill

    @takes(asking.FurtherChat)
    def stream(self, further: asking.FurtherChat) -> Iterator[Event]:
        """Yields `Event`s as `Engine.stream` does, whose arguments these are; None: as the clip was opened."""
        yield from self._answer(further, further.chat)

    @takes(asking.FurtherTold)
    def generate(self, further: asking.FurtherTold) -> Result:
        """The finished `Result` of a question that knows of no other; arguments as `stream`."""
        return finished(self._answer(further, chat=False), further.on_event)

    @takes(asking.FurtherTold)
    def chat(self, further: asking.FurtherTold) -> Result:
        """The same for a question that goes on from the last answer."""
        return finished(self._answer(further, chat=True), further.on_event)

    def _answer(self, further: asking.Further, chat: bool) -> Iterator[Event]:
        given = {of.name: getattr(further, of.name) for of in dataclasses.fields(asking.Further)}
        asked = dataclasses.replace(self.asked, **{name: value for name, value in given.items() if value is not None
                                                   or name == "query"})
        insist_flag("chat", chat)
        turns = ([] if self.turns is None else self.turns) if chat else None
        for event in self.engine._answer(asked, self, turns):
            if event.result and chat:
                self.turns = [*turns, (asked.query, list(event.result.output_ids))]
            yield event

    def close(self) -> None:
        """Gives the caches back; twice is once."""
        engine = self.engine
        if self in engine.clips and not engine.closed and os.getpid() == engine.pid:
            mine = engine.owner == threading.get_ident()     # a stream that was left half read
            with contextlib.nullcontext() if mine else engine._turn(self.asked.timeout):
                engine.clips.discard(self)
                engine._clip = None if engine.clip is self else engine._clip
                self.parked.clear()


@plain()
def explain(model: Model, result: Result) -> list[Verdict]:
    """What the deciding model looked at and how clearly it decided, for the request that it answered last: one more
    pass over the answer, in forwards of up to 32 rows, on the cache that still holds the request. Of a sampled answer
    the margins are those of the logits before the draw."""
    insist_kind("model", model, Model)
    insist_kind("result", result, Result)
    if result is not model.answered:
        raise InputError(f"result: the cache of {model.path} no longer holds it; explain it before the next request, "
                         f"by the model that answered")
    ids, d, first, verdicts, at = result.output_ids, model.decoder, model.prompt_rows - 1, [], 0
    known = torch.cat([model.tail_id, torch.tensor(ids[:-1], dtype=torch.long).to(model.device)])
    rows_SD = d.embed_VD[known.clamp(0, model.config.V - 1)]
    second, margins = [], []
    with model.on_stream():
        for start in range(0, len(ids), d.steps.rows):
            part_SD = rows_SD[start:start + d.steps.rows]
            pos_ids_S = first + start + torch.arange(len(part_SD), device=model.device)
            logits_SV = d.forward(part_SD, pos_ids_S).float()
            for row, (own, (a, b)) in enumerate(zip(ids[start:], logits_SV.topk(2).indices.tolist(), strict=False)):
                second.append(b if a == own else a)
                margins.append(float(logits_SV[row, own] - logits_SV[row, second[-1]]))
    log = [Round("", [], 0), *result.round_log] if result.round_log else []
    log += [Round("", [], 0)] * len(ids)                     # the rest was decoded id by id
    for _, drafts, accepted, _ in log:
        end = at + accepted + 1
        if at < len(ids):
            verdicts.append(Verdict(at, drafts, ids[at:end], second[at:end], margins[at:end]))
        at = end
    return verdicts


def first_id(model: Model, loaded, limit: int, req: Request) -> None:
    """Queues all from frames or events, or from the rows of an open clip, to the first id of at most `limit`, which is
    then in the model's state. Dropped: prefilling frames as they come: the first id would come 1 to 6 ms earlier, and
    the window in which a drafter has the GPU to itself would be gone."""
    prompt, stops = req.prompts[model.side], () if req.asked.ignore_eos else model.stops
    known, model.cached = agreeing(model.cached, prompt.after[:-1]) if req.goes_on else 0, []
    if req.clip:
        with req.timeline.stage("prefill", model):
            model.ask(prompt.after, limit, stops, known)
    else:
        with req.timeline.stage("preprocess", model, host=not model.on_gpu):
            pixels = req.shown[model.side].pixels(loaded, model.vision, model.device, req.asked.event_frames,
                                                  req.asked.canvas)
        with req.timeline.stage("encode", model):
            visual_AD = model.visual_rows(pixels, req.image and model.side == "target")
        with req.timeline.stage("prefill", model):
            tail_id = (prompt.after or prompt.before)[-1]
            model.prefill(model.splice(prompt, visual_AD), limit, stops, tail_id, len(prompt.after))
    req.prompt_rows[model.side] = model.prompt_rows


# ---- loading ---------------------------------------------------------------------------------------------------


def load_model(cls, path, device, dtype=None, cache_rows=None, tokenizer=None, graphs=True, seed=0, packed=False,
               progress=None, must_pack=True):
    """A Target or a Drafter from a folder, a hub id in the local cache, or the word `random-7b` (real shapes,
    random numbers from `seed`, for speed work only). packed: a Drafter exists in 4 bits alone, a Target has a packed
    copy beside its own weights, without must_pack only if it can be. progress: called with (side, bytes read, bytes in
    all) while a checkpoint is read."""
    device = pick_device(device)
    dtype = dtype or memory.default_dtype(device)
    config, checkpoint = memory.open_model(cls.side, path)
    packed = packed or bool(config.get("packed"))            # the folder of a packed drafter
    folder = checkpoint.folder if checkpoint else TINY / "target"
    text = Text(tokenizer or Path(folder) / "tokenizer.json")
    V = text_config(config).V
    if text.size > V:
        raise InputError(f"{text.path}: has {text.size} pieces, the {cls.side} {path} embeds {V}; take the "
                         f"tokenizer.json of this checkpoint")
    stops = stop_ids(folder, config) if checkpoint else (2,)
    cache_rows = cache_rows or memory.rows_for(cls.side, config)
    made: Callable = iter                                    # what becomes of the weights as they come
    if config.get("packed"):
        made = functools.partial(assembled, config=config)
    elif packed and cls is Drafter:
        turn = checkpoint is not None and gains_by_turning(checkpoint.some_rows, text_config(config).L)
        config, made = config | {"packed": {"turned": turn}}, functools.partial(packing, turn=turn)
    try:
        weights = (checkpoint.load(device, dtype, progress and functools.partial(progress, cls.side), made)
                   if checkpoint else dict(made(random_tensors(config, device, dtype, seed))))
        with plain():
            model = cls(config, weights, text, str(path), stops, cache_rows, graphs)
            model.origin = {"hash": checkpoint.fingerprint(), "revision": checkpoint.revision} if checkpoint else {
                "hash": f"seed {seed}", "revision": None}
            if packed and cls is Target:
                try:
                    model.copy = model.decoder.packed()
                except (NotPackable, RuntimeError, MemoryError) as error:
                    if must_pack or not (isinstance(error, NotPackable) or ran_out(error)):
                        raise
                    say_no_copy(path, f"packing it failed ({describe(error)})")
            return model
    except NotPackable as error:
        raise memory.Unpackable(cls.side, path, error) from None
    except (RuntimeError, MemoryError) as error:             # torch.OutOfMemoryError is one
        if not ran_out(error):
            raise
        needs = memory.needs_of(cls.side, config, device, dtype, cache_rows, packed)
        raise memory.no_room(path, device, needs) from None


def say_no_copy(path, why: str) -> None:
    logging.getLogger(__name__).warning("%s: has no 4-bit copy that drafts (`self`): %s", path, why)


@fits
@plain(inference=False)
def load_engine(eventgpt: FilePath | None = None, videollava: FilePath | None = None, device: str | None = None,
                drafter_device: str | None = None, dtype: str | torch.dtype | None = None,
                cache_rows: int | tuple[int, int] | None = None, draft_len: int = 5, overlap_len: int = 15,
                tokenizer: FilePath | None = None, graphs: bool = True, seed: int = 0, gate: bool = True,
                drafter_dtype: str = "bf16", self_draft: bool | None = None, text_rows: int = TEXT_ROWS,
                progress: Callable[[str, int, int], Any] | None = None, several: int = 1) -> Engine:
    """An Engine over the two checkpoints (either may be None).

    eventgpt, videollava: folders, hub ids already in the cache, or `random-7b`. device: `cuda`, `cuda:N` or `cpu`;
    drafter_device: another one for the drafter. dtype: `bf16`, `fp16` or `fp32`, by default bf16 on a GPU and fp32 on
    the CPU. cache_rows: positions of both caches, or a pair (target, drafter); by default what a clip and `text_rows`
    rows of template, question and answer need. tokenizer: a tokenizer.json in place of the checkpoints' own. gate:
    draft only where it is expected to pay; False: whatever it costs. drafter_dtype: `int4` packs the drafter's weights
    as they are read (answers stay the same, drafts are cheaper and a little worse); `bf16` leaves them as they are.
    self_draft: True keeps a 4-bit copy of the target, which drafts for it (see `SelfRounds`); None: on a GPU, and if
    that cannot be, a line in the log says why. progress: see `load_model`, then `Engine.prepare`. several: clips that
    may be open at once; above 1 each takes a cache more of each model, and asking another clip than last time a copy of
    its rows. Raises InputError for what cannot be loaded or does not fit.
    """
    insist_one_of("drafter_dtype", drafter_dtype, memory.DRAFTER_DTYPES)
    dtype = as_dtype(dtype)
    for name, flag in (("gate", gate), ("graphs", graphs), ("self_draft", self_draft is not None and self_draft)):
        insist_flag(name, flag)
    insist_function("progress", progress)
    eventgpt, videollava, tokenizer = (of if of is None else path_of(name, of, wanted) for name, of, wanted in (
        ("eventgpt", eventgpt, "a checkpoint"), ("videollava", videollava, "a checkpoint"),
        ("tokenizer", tokenizer, "a tokenizer.json")))
    if tokenizer is not None:
        insist_file(tokenizer, "a tokenizer.json")
    seed = insist_whole("seed", seed, 0, 2 ** 63 - 2)
    draft_len = insist_whole("draft_len", draft_len, 0, STEP_ROWS - 1)
    overlap_len = insist_whole("overlap_len", overlap_len, 0, STEP_ROWS - 1)
    text_rows = insist_whole("text_rows", text_rows, 1)
    several = insist_whole("several", several, 1, 1000)
    budget = memory_budget(eventgpt, videollava, device, drafter_device, dtype, cache_rows, drafter_dtype, self_draft,
                           text_rows, several)
    options = dict(dtype=dtype, graphs=graphs, progress=progress)
    # Triton finds what it has compiled by a hash of its own 460 MB, up to a second once a process: beside the reading.
    hashing = threading.Thread(target=triton_key, name="triton", daemon=True)
    if any(of["device"] != "cpu" for of in budget.values()):
        hashing.start()
    target = drafter = None
    if videollava is not None:
        target = load_model(Target, videollava, device, cache_rows=budget["target"]["rows"], tokenizer=tokenizer,
                            seed=seed, packed="packed" in budget["target"], must_pack=bool(self_draft), **options)
        if "no_copy" in budget["target"]:
            say_no_copy(videollava, budget["target"]["no_copy"])
    if eventgpt is not None:
        own = os.path.join(eventgpt, "tokenizer.json")
        shared = target.text.path if target is not None and not os.path.exists(own) else None
        drafter = load_model(Drafter, eventgpt, budget["drafter"]["device"], cache_rows=budget["drafter"]["rows"],
                             tokenizer=tokenizer or shared, seed=seed + 1, packed=drafter_dtype == "int4", **options)
    if target and drafter and (apart := target.text.differing(drafter.text)):
        told = "%s: %d pieces have other ids than in %s, so drafts are seldom right; take the checkpoints' own files"
        logging.getLogger(__name__).warning(told, drafter.text.path, apart, target.text.path)
    engine = Engine(target, drafter, draft_len, overlap_len, gate, several)
    if any(model.graphs for model in engine.models):
        hashing.join()
        engine.prepare(progress)
    if engine.copy_stays:
        logging.getLogger(__name__).info(engine.copy_stays)
    return engine


ALIGNED = "prefill_with_alignment"
NO_ADAPTER = "adapter_path: wanted the adapter's folder, got none; pass it, or leave the adapter out"


class PrefillOnlyInference(Closing):
    """The library API of egpt_prefill_only, which this engine grew from; models load on the first call. mode: one of
    MODES, or `prefill_with_alignment`: the adapter's drafts, verified once. adapter_path: a folder with
    its weights (weights/adapter.py); it drafts in the drafter's place unless use_adapter is False. use_4bit: the
    drafter's weights are packed in 4 bits, the target's never are. Other options: those of `load_engine`."""
    OPTIONS = [*inspect.signature(load_engine).parameters][2:]

    def __init__(self, eventgpt_path: FilePath | None = None,
                 videollava_model_id: FilePath | None = "LanguageBind/Video-LLaVA-7B-hf", device: str | None = None,
                 mode: str = "prefill_then_verify", adapter_path: FilePath | None = None,
                 use_adapter: bool | None = None, use_4bit: bool = False, **options):
        insist_known("PrefillOnlyInference", options, [*inspect.signature(type(self)).parameters][:-1] + self.OPTIONS)
        insist_flag("use_4bit", use_4bit)
        insist_flag("use_adapter", use_adapter is not None and use_adapter)
        insist_one_of("mode", mode, (*MODES, ALIGNED))
        if adapter_path is None and (use_adapter or mode == ALIGNED):
            raise InputError(NO_ADAPTER)
        self.source = None
        if adapter_path is not None and use_adapter is not False:
            self.source = Adapted(path_of("adapter_path", adapter_path, "an adapter's folder", "draft_source"))
        self.arguments = dict(eventgpt=eventgpt_path, videollava=videollava_model_id, device=device,
                              **{"drafter_dtype": "int4"} | options if use_4bit else options)
        self.mode, self.lock = mode, threading.Lock()
        self.engine: Engine | None = None

    def load(self) -> Engine:
        if self.engine is None:
            with self.lock:                                  # two threads, one engine
                self.engine = self.engine or load_engine(**self.arguments)
        return self.engine

    def close(self) -> None:
        """Gives the models' memory back; see `Engine.close`."""
        if self.engine:
            self.engine.close()

    @takes(asking.OldTold)
    def generate(self, asked: asking.OldTold) -> Result:
        """The finished Result, which also answers to the research code's words (`Result.in_old_words`)."""
        return finished(self._answer(asked), asked.on_event)

    @takes(asking.OldAsked)
    def stream(self, asked: asking.OldAsked) -> Iterator[Event]:
        """Yields the preview and the answer as they form; the last event has the Result."""
        yield from self._answer(asked)

    def _answer(self, old: asking.OldAsked) -> Iterator[Event]:
        asked = Asked(**{of.name: getattr(old, of.name) for of in dataclasses.fields(Asked)})
        asked.mode = self.mode if old.mode is None else old.mode
        asked.draft_source = self.source if old.draft_source is None else old.draft_source
        if old.max_draft_tokens is not None:
            asked.overlap_len = insist_whole("max_draft_tokens", old.max_draft_tokens, 0, WIDTHS[-1])
        if asked.mode == ALIGNED and not self.source:
            raise InputError(NO_ADAPTER)
        if asked.mode == ALIGNED:
            asked.mode, asked.draft_source = "prefill_then_verify", self.source
        for event in self.load().stream(**vars(asked)):
            yield dataclasses.replace(event, result=event.result and event.result.in_old_words())


# ---- demo and command line -------------------------------------------------------------------------------------


@command
def main(argv=None) -> None:
    """One question about one clip, answered as it forms. Without any flag: a demo on the embedded pair."""
    parser = Parser(prog="python engine.py", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"headstart {VERSION}")
    for flag, metavar, default, text in (
            ("events", "F", None, "an .npy or .npz of events, or an event picture"),
            ("video", "F", None, "mp4, mov, mkv, webm or avi"), ("image", "F", None, "a picture in place of the video"),
            ("query", "Q", None, "the question"), ("device", "D", None, "cpu, cuda or cuda:N (default: cuda if there)"),
            ("eventgpt", "DIR|ID", None, "drafter (neither model: the embedded pair)"),
            ("videollava", "DIR|ID", None, "target: a folder, or ORG/NAME[@REVISION] of the hub cache"),
            ("mode", "M", "speculative", f"{', '.join(MODES)} (default: %(default)s)"),
            ("draft-source", "S", None, "drafter, self, lookup, adapter:DIR, or several with commas")):
        parser.add_argument(f"--{flag}", metavar=metavar, default=default, help=text)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=50, help="default %(default)s")
    clips, argv = TINY / "clips", sys.argv[1:] if argv is None else argv
    of = parser.parse_args(argv or [
        "--device", "cpu", "--query", "What are the key elements in this scene?", "--events",
        f"{clips}/event_npy/scenes/000000.npz", "--video", f"{clips}/mp4/scenes/000000.mp4"])
    of.query or parser.error("--query: the question is missing")
    if not of.eventgpt and not of.videollava:
        of.eventgpt, of.videollava = TINY / "drafter", TINY / "target"
    source = of.draft_source and [name.strip() for name in of.draft_source.split(",")]
    asked = {name: getattr(of, name) for name in ("events", "video", "image", "query", "max_new_tokens")}
    try:
        engine = load_engine(of.eventgpt, of.videollava, of.device, self_draft="self" in source if source else None,
                             text_rows=PROMPT_ROWS + len(of.query.encode(errors="replace")) + max(0, of.max_new_tokens))
        kind = ""
        for event in engine.stream(mode=of.mode, draft_source=source, **asked):
            if event.delta and (event.kind, kind) != ("preview", "final"):     # a preview that goes on comes at the end
                start = f"{kind and chr(10)}{event.t_ms:7.1f} ms  {event.kind:7}  " * (event.kind != kind)
                print(start + printable(event.delta, "\n\t"), end="", flush=True)
                kind = event.kind
    except InputError as error:
        raise InputError(in_flags(error, parser)) from None
    r = event.result
    if r.mode == "prefill_only":
        print(f"\n{(r.preview_end or 0) * 1e3:7.1f} ms  preview  {printable(r.preview_text)}", end="")
    by = ", ".join(dict.fromkeys(of.source for of in r.round_log if of.drafts)) or r.drafter_error or "nobody drafted"
    print(f"\n{len(r.output_ids)} ids in {r.wall_clock_time * 1e3:.1f} ms, {len(r.output_ids) - r.accepted_tokens} "
          f"forwards; accepted {r.accepted_tokens} of {r.drafted} drafts ({by})")
    if not argv:
        print("identical to target_only:", engine.generate(mode="target_only", **asked).output_ids == r.output_ids)


if __name__ == "__main__":
    sys.exit(main())
