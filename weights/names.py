"""names: checkpoint names to engine names, as data. `plan(config)` lists every tensor the engine wants and what it is
made of; nothing here opens a file.

    spelling on disk -> RENAMES -> canonical name -> TEXT, TOWER, PROJECTOR, ADAPTOR -> engine name, rows

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

# ---- spellings on disk, each list applied in order to every key --------------------------------------------------

RENAMES = {
    "video_llava": [                                    # the hub's spelling and three later ones
        (r"^model\.(?=(video_tower|image_tower|multi_modal_projector|language_model)\.)", ""),
        (r"^(video_tower|image_tower)\.vision_model\.", r"\1."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "language_model."),
    ],
    "EventChat_llama": [
        (r"^model\.visual_tower\.visual_tower\.vision_model\.", "event_tower."),
        (r"^model\.visual_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"^model\.visual_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"^model\.feature_adaptor\.", "feature_adaptor."),
        (r"^model\.", "language_model."),
    ],
    "llama": [(r"^model\.", "language_model.")],
    "clip": [(r"^vision_model\.", "event_tower.")],     # the tower alone, from the folder `mm_visual_tower` names
    "packed": [],                                       # of weights/packed.py: the engine's own names
}
ON_DISK = {                                             # back to the published spelling, for messages
    "video_llava": [(r"^language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
                    (r"^(video_tower|image_tower)\.", r"\1.vision_model.")],
    "EventChat_llama": [(r"^language_model\.", "model."),
                        (r"^event_tower\.", "model.visual_tower.visual_tower.vision_model."),
                        (r"^multi_modal_projector\.linear_1\.", "model.visual_projector.0."),
                        (r"^multi_modal_projector\.linear_2\.", "model.visual_projector.2."),
                        (r"^feature_adaptor\.", "model.feature_adaptor.")],
    "llama": [(r"^language_model\.", "model.")],
    "packed": [],
}
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

# What the engine computes and no other; a config that asks for something else is refused before a byte is read.
TEXT_FIXED = {"hidden_act": ("silu", "swish"), "attention_bias": False, "mlp_bias": False, "sliding_window": None}
VISION_FIXED = {"hidden_act": "quick_gelu", "num_channels": 3}
VIDEO_LLAVA_FIXED = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
EVENTGPT_FIXED = {"use_event_qformer": False}           # its weights were never published
# What a config leaves out: LLaMA-7B's and CLIP ViT-L/14's values, as upstream. `with_defaults` puts them in.
TEXT_DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
                 "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
                 "bos_token_id": 1, "eos_token_id": 2}
VISION_DEFAULTS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                   "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-5}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # of CLIP's image processor: red, green, blue, of pixels 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESCALE = 0.00392156862745098                           # 1/255 as its preprocessor_config.json spells it
_POSITIVE = ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e12)
_COUNT = ("a whole number above 0", lambda v: type(v) is int and 0 < v < 2 ** 31)
_ID = ("an id of the vocabulary", lambda v: type(v) is int and 0 <= v < 2 ** 31)
_FLAG = ("true or false", lambda v: type(v) is bool)
VALUES = {"rms_norm_eps": _POSITIVE, "layer_norm_eps": _POSITIVE, "rope_theta": _POSITIVE,
          "max_position_embeddings": _COUNT, "video_seq_length": _COUNT, "bos_token_id": _ID,
          **dict.fromkeys(("event_feature_adaptor", "mm_use_im_patch_token", "mm_use_im_start_end",
                           "tie_word_embeddings"), _FLAG),
          "vision_feature_select_strategy": ("default or full", lambda v: v in ("default", "full"))}
LIMIT = {"num_hidden_layers": 1000}                     # more would fill memory with names; others stay below 2**31
LLAMA_VOCAB = 32000                                     # pieces before any added token


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
    return rename(key, RENAMES[kind])


def on_disk(name: str, kind: str) -> str:
    """The published spelling of a canonical name."""
    return rename(name, ON_DISK[kind])


def rename(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def plan(config: dict, where="config.json") -> Plan:
    """What the engine wants of a checkpoint with this config. InputError, naming `where`, for one it cannot run."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise InputError(f"{where}: model_type is {str(kind)[:60]!r}, wanted one of {', '.join(KINDS)}; "
                         f"give a Video-LLaVA (-hf form), EventGPT or plain LLaMA folder")
    wanted, unused = [], set()
    text = section(config, "text_config", where) if kind == "video_llava" else config
    if kind == "video_llava":
        insist(config, VIDEO_LLAVA_FIXED, where)
        insist(text, {"model_type": "llama"}, where)
    if kind == "EventChat_llama":
        insist(config, EVENTGPT_FIXED, where)
        insist_markers(config, where)
    check_values(text, where)
    if kind != "llama":
        vision = section(config, "vision_config", where)
        insist(vision, VISION_FIXED, where)
        check_values(config, where)
        check_values(vision, where)
        D, C = size(text, "hidden_size", where), size(vision, "hidden_size", where, VISION_DEFAULTS)
        image, patch = (size(vision, name, where, VISION_DEFAULTS) for name in ("image_size", "patch_size"))
        rows = (image // patch) ** 2 + 1
        if kind == "video_llava" and (config.get("video_seq_length") or 0) % rows:
            raise InputError(f"{where}: video_seq_length is {config['video_seq_length']}, no multiple of the {rows} "
                             f"rows that a frame gives; copy config.json from the checkpoint again")
        for tower in ("video", "image") if kind == "video_llava" else ("events",):
            layer = config.get("vision_feature_layer", -2) if kind == "video_llava" else -1
            tower_plan(tower, vision, layer, where, wanted, unused)
        wanted += linear("projector.0", ["multi_modal_projector.linear_1"], D, C)
        wanted += linear("projector.1", ["multi_modal_projector.linear_2"], D, D)
        if kind == "EventChat_llama" and config.get("event_feature_adaptor"):
            wanted += linear("adaptor", ["feature_adaptor"], D, D)
    text_plan(text, where, wanted, unused)
    return Plan(kind, tuple(wanted), frozenset(unused))


def text_plan(text, where, wanted, unused):
    """Appends the decoder's tensors. Sizes that a config leaves out are LLaMA-7B's, as upstream."""
    insist(text, TEXT_FIXED, where)
    rope = section(text, "rope_parameters", where) or section(text, "rope_scaling", where)
    check_values(rope, where)
    for name in ("rope_type", "type"):
        if rope.get(name) not in (None, "default"):
            raise InputError(f"{where}: rope scaling of {name} {str(rope[name])[:60]!r}, and this engine computes only "
                             f"plain rotary positions; use a checkpoint of the published architecture")
    if None not in (rope.get("rope_theta"), text.get("rope_theta")) and rope["rope_theta"] != text["rope_theta"]:
        raise InputError(f"{where}: rope_theta is {text['rope_theta']} and, among the rope parameters, "
                         f"{rope['rope_theta']}; remove the wrong one")
    D, F, V, H, L = (size(text, name, where) for name in
                     ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_hidden_layers"))
    N = size(text, "num_key_value_heads", where, {"num_key_value_heads": H})
    if H % N:
        raise InputError(f"{where}: num_attention_heads {H} is not a multiple of num_key_value_heads {N}; "
                         f"copy config.json from the checkpoint again")
    K = size(text, "head_dim", where, {"head_dim": max(1, D // H)})
    if K % 2:
        raise InputError(f"{where}: head_dim is {K}, and rotary positions turn pairs; copy config.json from the "
                         f"checkpoint again")
    rows = {"attn_norm": [D], "qkv": [H * K, N * K, N * K], "o": [D], "mlp_norm": [D], "gate_up": [F, F], "down": [D]}
    columns = {"qkv": D, "o": H * K, "gate_up": D, "down": F}       # the norms have none
    wanted.append(stack("text.embed", ["language_model.embed_tokens.weight"], [V], D))
    for i in range(L):
        for name, parts in TEXT_LAYER.items():
            keys = [f"language_model.layers.{i}.{part}" for part in parts]
            wanted.append(stack(f"text.layers.{i}.{name}", keys, rows[name], columns.get(name)))
    wanted.append(stack("text.norm", ["language_model.norm.weight"], [D]))
    if text.get("tie_word_embeddings"):
        unused.add("lm_head.weight")                    # a second copy of the embeddings, in some files
    else:
        wanted.append(stack("text.head", ["lm_head.weight"], [V], D))


def tower_plan(tower, vision, layer, where, wanted, unused):
    """Appends a CLIP tower up to hidden state `layer`, counted as upstream does: 0 is the input, -1 the last."""
    C, F, L, H, image, patch = (size(vision, name, where, VISION_DEFAULTS) for name in
                                ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                 "image_size", "patch_size"))
    if type(layer) is not int or not -L - 1 <= layer <= L:
        raise InputError(f"{where}: vision_feature_layer is {str(layer)[:60]}, wanted one of {-L - 1}..{L}; "
                         f"lists of layers are not supported")
    if C % H or image % patch:
        raise InputError(f"{where}: vision width {C} over {H} heads or image {image} over patches of {patch} leaves "
                         f"a remainder; copy config.json from the checkpoint again")
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
        raise InputError(f"{where}: {name} is {str(value)[:60]!r}, wanted an object; "
                         f"copy config.json from the checkpoint again")
    return value


def with_defaults(config: dict, defaults: dict) -> dict:
    """The config with `defaults` for what it leaves out; null is no value."""
    return defaults | {name: value for name, value in config.items() if value is not None}


def size(config, name, where, defaults=TEXT_DEFAULTS) -> int:
    """A positive whole number from the config, or its default."""
    value, limit = config.get(name), LIMIT.get(name, 2 ** 31)
    value = defaults[name] if value is None else value
    if type(value) is not int or not 0 < value < limit:
        raise InputError(f"{where}: {name} is {str(value)[:60]!r}, wanted a whole number from 1 to {limit - 1}; "
                         f"copy config.json from the checkpoint again")
    return value


def insist(config, fixed, where):
    """Refuses a config that asks for something the engine does not compute. Absent and null mean the default."""
    for name, value in fixed.items():
        values = value if isinstance(value, tuple) else (value,)
        if config.get(name) is not None and config[name] not in values:
            raise InputError(f"{where}: {name} is {str(config[name])[:60]!r}, and this engine computes only "
                             f"{values[0]!r}; use a checkpoint of the published architecture")


def check_values(config, where):
    """Refuses the wrong kind of value under keys that are no sizes of a tensor. Absent and null mean the default."""
    for name, (wanted, fine) in VALUES.items():
        value = config.get(name)
        if value is not None and not fine(value):
            raise InputError(f"{where}: {name} is {str(value)[:60]!r}, wanted {wanted}; "
                             f"copy config.json from the checkpoint again")


def extra_rows(config) -> int:
    """Embedding rows that EventGPT's flags append: a patch token (unless its flag is false), then two markers."""
    return bool(config.get("mm_use_im_patch_token", True)) + 2 * bool(config.get("mm_use_im_start_end"))


def insist_markers(config, where):
    """Refuses marker tokens that have no row. The lone patch token never enters a prompt and needs none."""
    V, needed = size(config, "vocab_size", where), LLAMA_VOCAB + extra_rows(config)
    if config.get("mm_use_im_start_end") and V < needed:
        raise InputError(f"{where}: mm_use_im_start_end is true, and the markers' embeddings would be rows up to "
                         f"{needed - 1} of {V}; set it to false, which makes them plain text")
