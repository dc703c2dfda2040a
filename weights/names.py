"""names: checkpoint names to engine names, as data. `plan(config)` lists every tensor the engine wants and what it is
made of; nothing here opens a file.

    spelling on disk -> SPELLINGS -> canonical name -> TEXT, TOWER, PROJECTOR, ADAPTOR -> engine name, rows

    text.embed [V, D]   text.norm [D]   text.head [V, D] (absent when tied: the head is text.embed)
    text.layers.{i}.attn_norm [D]  .qkv [(H + 2N)K, D] (q, k, v)  .o [D, HK]
                   .mlp_norm [D]  .gate_up [2F, D] (gate, up)  .down [D, F]
    {tower}.cls [C]  .patch [C, 3, p, p]  .pos [P + 1, C]  .pre_norm.w .b [C]      tower: video, image or events
    {tower}.layers.{j}.norm1.w .b  .qkv.w [3C, C] .b [3C]  .out.w .b  .norm2.w .b  .fc1.w .b  .fc2.w .b
    projector.0.w [D, C] .b   projector.1.w [D, D] .b   adaptor.w [D, D] .b
"""

import re
from dataclasses import dataclass
from math import prod

from weights import InputError

# ---- spellings on disk: (published, canonical) beginnings of a key, of which the first that fits counts ------------

SPELLINGS: dict[str, list[tuple[str, str]]] = {
    "video_llava": [("video_tower.vision_model.", "video_tower."), ("image_tower.vision_model.", "image_tower."),
                    ("language_model.lm_head.", "lm_head."), ("language_model.model.", "language_model.")],
    "EventChat_llama": [("model.visual_tower.visual_tower.vision_model.", "event_tower."),
                        ("model.visual_projector.0.", "multi_modal_projector.linear_1."),
                        ("model.visual_projector.2.", "multi_modal_projector.linear_2."),
                        ("model.feature_adaptor.", "feature_adaptor."), ("model.", "language_model.")],
    "llama": [("model.", "language_model.")],
    "clip": [("vision_model.", "event_tower.")],        # the tower alone, from the folder `mm_visual_tower` names
    "packed": [],                                       # of weights/packed.py: the engine's own names
}
LATER = re.compile(r"^model\.(?=(video_tower|image_tower|multi_modal_projector|language_model)\.)")     # Video-LLaVA's
KINDS = ("video_llava", "EventChat_llama", "llama")     # `model_type` in config.json
TOWERS = {"video": "video_tower", "image": "image_tower", "events": "event_tower"}
BUFFERS = re.compile(r"\.(position_ids|inv_freq)$")     # older libraries stored these constants; never read
CLIP_TEXT = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")

# ---- canonical name -> engine name; several parts stack along the rows -------------------------------------------

TEXT_LAYER = {
    "attn_norm": ["input_layernorm.weight"],
    "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "o": ["self_attn.o_proj.weight"],
    "mlp_norm": ["post_attention_layernorm.weight"],
    "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "down": ["mlp.down_proj.weight"],
}
TOWER_LAYER = {                                         # each comes as .weight and .bias
    "norm1": ["layer_norm1"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "out": ["self_attn.out_proj"],
    "norm2": ["layer_norm2"],
    "fc1": ["mlp.fc1"],
    "fc2": ["mlp.fc2"],
}
LINEAR = {"w": "weight", "b": "bias"}

# ---- what a config may say -----------------------------------------------------------------------------------------
# Section -> {key: (the value where it says nothing, what is wanted, whether a value is that)}. A key that is in no
# section changes no answer. Defaults are LLaMA-7B's and CLIP ViT-L/14's, as upstream; null is no value.


def _size(default, limit=2 ** 31):
    return default, f"a whole number from 1 to {limit - 1}", lambda v: type(v) is int and 0 < v < limit


def _number(default):
    return default, "a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e12


def _flag(default):
    return default, "true or false", lambda v: type(v) is bool


def _only(*values):
    return None, f"{values[0]!r}: this engine computes no other" if values else "none", lambda v: v in values


TEXT_RULES = {
    "hidden_size": _size(4096), "intermediate_size": _size(11008), "num_attention_heads": _size(32),
    "num_hidden_layers": _size(32, 1000),               # more would fill memory with names
    "num_key_value_heads": _size(None), "head_dim": _size(None), "vocab_size": _size(32000),
    "max_position_embeddings": _size(4096), "rms_norm_eps": _number(1e-5), "rope_theta": _number(None),
    "bos_token_id": (1, "an id of the vocabulary", lambda v: type(v) is int and 0 <= v < 2 ** 31),
    "hidden_act": _only("silu", "swish"), "attention_bias": _only(False), "mlp_bias": _only(False),
    "quantization_config": _only(), "sliding_window": _only(), "tie_word_embeddings": _flag(None)}
ROPE_RULES = {"rope_theta": _number(None), "rope_type": _only("default"), "type": _only("default"),
              "partial_rotary_factor": _only(1), "full_attention": _only(), "sliding_attention": _only()}
VISION_RULES = {
    "hidden_size": _size(1024), "intermediate_size": _size(4096), "num_attention_heads": _size(16),
    "num_hidden_layers": _size(24, 1000), "image_size": _size(224), "patch_size": _size(14),
    "layer_norm_eps": _number(1e-5), "hidden_act": _only("quick_gelu"), "num_channels": _only(3),
    "model_type": _only("clip_vision_model", "clip")}
RULES = {                                               # of the top level, by `model_type`
    "video_llava": {
        "projector_hidden_act": _only("gelu"), "multimodal_projector_bias": _only(True),
        "video_seq_length": _size(None), "tie_word_embeddings": _flag(None), "quantization_config": _only(),
        "vision_feature_select_strategy": (None, "default or full", lambda v: v in ("default", "full"))},
    "EventChat_llama": {
        "use_event_qformer": _only(False),              # its weights were never published
        "event_feature_adaptor": _flag(None), "mm_use_im_patch_token": _flag(None), "mm_use_im_start_end": _flag(None)},
    "llama": {}}
TEXT_DEFAULTS, VISION_DEFAULTS = ({name: of[0] for name, of in rules.items() if of[0] is not None}
                                  for rules in (TEXT_RULES, VISION_RULES))
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # of CLIP's image processor: red, green, blue, of pixels 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESCALE = 0.00392156862745098                           # 1/255 as its preprocessor_config.json spells it
LLAMA_VOCAB = 32000                                     # pieces before any added token
AGAIN = "copy config.json from the checkpoint again"


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor and the rows of the engine tensor it fills."""
    name: str                   # canonical
    shape: tuple
    row: int                    # first row


@dataclass(frozen=True)
class Wanted:
    """One engine tensor."""
    name: str
    shape: tuple
    parts: tuple                # of Part, stacked along the first dimension
    dtype: str | None = None    # as safetensors spells it, where it stays as it is stored

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Every engine tensor of a model, and the checkpoint tensors that may be there without being read."""
    kind: str
    wanted: tuple               # of Wanted, in the order the forward meets them
    unused: frozenset           # canonical names

    def nbytes(self, itemsize: int) -> int:
        return itemsize * sum(w.numel for w in self.wanted)


def canonical(key: str, kind: str) -> str | None:
    """The name that all spellings of a checkpoint key share; None for stored constants that nobody reads."""
    if BUFFERS.search(key) or kind == "clip" and CLIP_TEXT.match(key):
        return None
    key = LATER.sub("", key) if kind == "video_llava" else key
    return next((ours + key.removeprefix(theirs) for theirs, ours in SPELLINGS[kind] if key.startswith(theirs)), key)


def on_disk(name: str, kind: str) -> str:
    """The published spelling of a canonical name."""
    return next((theirs + name.removeprefix(ours) for theirs, ours in SPELLINGS[kind] if name.startswith(ours)), name)


def plan(config: dict, where="config.json") -> Plan:
    """What the engine wants of a checkpoint with this config. InputError, naming `where`, for one it cannot run."""
    kind, wanted, unused = config["model_type"], [], set()       # one of KINDS
    own = settled(config, RULES[kind], where)
    text = settled(section(config, "text_config", where) if kind == "video_llava" else config, TEXT_RULES, where)
    if kind == "video_llava":
        settled(text, {"model_type": _only("llama")}, where)
        text["tie_word_embeddings"] = text.get("tie_word_embeddings") or own.get("tie_word_embeddings")
    if kind != "llama":
        vision = settled(section(config, "vision_config", where), VISION_RULES, where)
        V, needed = text["vocab_size"], LLAMA_VOCAB + extra_rows(own)        # a lone patch token enters no prompt
        if own.get("mm_use_im_start_end") and V < needed:
            raise InputError(f"{where}: mm_use_im_start_end is true, and the markers' embeddings would be rows up to "
                             f"{needed - 1} of {V}; set it to false, which makes them plain text")
        D, C = text["hidden_size"], vision["hidden_size"]
        rows = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        if kind == "video_llava" and (own.get("video_seq_length") or 0) % rows:
            raise InputError(f"{where}: video_seq_length is {own['video_seq_length']}, no multiple of the {rows} rows "
                             f"that a frame gives; {AGAIN}")
        for tower in ("video", "image") if kind == "video_llava" else ("events",):
            layer = config.get("vision_feature_layer", -2) if kind == "video_llava" else -1
            tower_plan(tower, vision, layer, where, wanted, unused)
        wanted += linear("projector.0", ["multi_modal_projector.linear_1"], D, C)
        wanted += linear("projector.1", ["multi_modal_projector.linear_2"], D, D)
        if kind == "EventChat_llama" and own.get("event_feature_adaptor"):
            wanted += linear("adaptor", ["feature_adaptor"], D, D)
    text_plan(text, where, wanted, unused)
    return Plan(kind, tuple(wanted), frozenset(unused))


def rotary_base(text: dict, where="config.json") -> float:
    """The base of rotary positions, which has had three homes. InputError if they differ, or scale positions."""
    places = [text, *(section(text, name, where) for name in ("rope_scaling", "rope_parameters"))]
    for rope in places[1:]:
        settled(rope, ROPE_RULES, f"{where}: rope scaling")
    found = {of["rope_theta"] for of in places if of.get("rope_theta") is not None}
    if len(found) > 1:
        raise InputError(f"{where}: rope_theta is {' and elsewhere '.join(map(str, sorted(found)))}; remove one")
    return found.pop() if found else 10000.0


def text_plan(text, where, wanted, unused):
    """Appends the decoder's tensors."""
    rotary_base(text, where)
    D, F, V, H, L = (text[name] for name in
                     ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_hidden_layers"))
    N, K = text.get("num_key_value_heads") or H, text.get("head_dim") or max(1, D // H)
    if H % N:
        raise InputError(f"{where}: num_attention_heads {H} is not a multiple of num_key_value_heads {N}; {AGAIN}")
    if K % 2:
        raise InputError(f"{where}: head_dim is {K}, and rotary positions turn pairs; {AGAIN}")
    rows = {"attn_norm": [D], "qkv": [H * K, N * K, N * K], "o": [D], "mlp_norm": [D], "gate_up": [F, F], "down": [D]}
    columns = {"qkv": D, "o": H * K, "gate_up": D, "down": F}       # the norms have none
    wanted.append(stack("text.embed", ["language_model.embed_tokens.weight"], [V], D))
    for i in range(L):
        for name, parts in TEXT_LAYER.items():
            keys = [f"language_model.layers.{i}.{part}" for part in parts]
            wanted.append(stack(f"text.layers.{i}.{name}", keys, rows[name], columns.get(name)))
    wanted.append(stack("text.norm", ["language_model.norm.weight"], [D]))
    if not text.get("tie_word_embeddings"):
        wanted.append(stack("text.head", ["lm_head.weight"], [V], D))


def tower_plan(tower, vision, layer, where, wanted, unused):
    """Appends a CLIP tower up to hidden state `layer`, counted as upstream does: 0 is the input, -1 the last."""
    C, F, L, H, image, patch = (vision[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                          "num_attention_heads", "image_size", "patch_size"))
    if type(layer) is not int or not -L - 1 <= layer <= L:
        raise InputError(f"{where}: vision_feature_layer is {str(layer)[:60]}, wanted one of {-L - 1}..{L}: this "
                         f"engine takes one layer; use a checkpoint of the published architecture")
    if C % H or image % patch:
        raise InputError(f"{where}: vision width {C} over {H} heads or image {image} over patches of {patch} leaves "
                         f"a remainder; {AGAIN}")
    used, prefix = layer if layer >= 0 else L + 1 + layer, TOWERS[tower]
    wanted.append(stack(f"{tower}.cls", [f"{prefix}.embeddings.class_embedding"], [C]))
    wanted.append(stack(f"{tower}.patch", [f"{prefix}.embeddings.patch_embedding.weight"], [C], 3, patch, patch))
    wanted.append(stack(f"{tower}.pos", [f"{prefix}.embeddings.position_embedding.weight"],
                        [(image // patch) ** 2 + 1], C))
    wanted += linear(f"{tower}.pre_norm", [f"{prefix}.pre_layrnorm"], C)            # upstream's spelling
    for j in range(L):
        for name, parts in TOWER_LAYER.items():
            keys = [f"{prefix}.encoder.layers.{j}.{part}" for part in parts]
            rows, columns = {"fc1": (F, C), "fc2": (C, F)}.get(name, (C, None if name.startswith("norm") else C))
            tensors = linear(f"{tower}.layers.{j}.{name}", keys, rows, columns)
            if j < used:
                wanted += tensors
            else:
                unused |= {part.name for tensor in tensors for part in tensor.parts}
    unused |= {f"{prefix}.post_layernorm.{part}" for part in LINEAR.values()}


def stack(name, keys, rows, *columns) -> Wanted:
    """One engine tensor of checkpoint tensors with the given row counts, one after the other."""
    columns = tuple(c for c in columns if c is not None)
    parts = [Part(key, (r, *columns), sum(rows[:i])) for i, (key, r) in enumerate(zip(keys, rows, strict=True))]
    return Wanted(name, (sum(rows), *columns), tuple(parts))


def linear(name, keys, rows, columns=None) -> list:
    """Weight and bias of one linear map or LayerNorm; `keys` stack, each with `rows` rows."""
    return [stack(f"{name}.{short}", [f"{key}.{long}" for key in keys], [rows] * len(keys),
                  columns if short == "w" else None) for short, long in LINEAR.items()]


# ---- reading a config --------------------------------------------------------------------------------------------


def section(config, name, where) -> dict:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {str(value)[:60]!r}, wanted an object; {AGAIN}")
    return value


def with_defaults(config: dict, defaults: dict) -> dict:
    """The config with `defaults` for what it leaves out; null is no value."""
    return defaults | {name: value for name, value in config.items() if value is not None}


def settled(config: dict, rules: dict, where) -> dict:
    """The config with defaults for what it leaves out; InputError that names a value the rules refuse."""
    for name, (_, wanted, fine) in rules.items():
        if config.get(name) is not None and not fine(config[name]):
            raise InputError(f"{where}: {name} is {str(config[name])[:60]!r}, wanted {wanted}; use a checkpoint of the "
                             f"published architecture, or {AGAIN}")
    return with_defaults(config, {name: default for name, (default, _, _) in rules.items() if default is not None})


def extra_rows(config) -> int:
    """Embedding rows that EventGPT's flags append: a patch token (unless its flag is false), then two markers."""
    return bool(config.get("mm_use_im_patch_token", True)) + 2 * bool(config.get("mm_use_im_start_end"))


