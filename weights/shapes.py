"""shapes: what a config says of a model's sizes, as the engine names them; and the bytes that follow."""

from __future__ import annotations

from dataclasses import dataclass

from weights.files import InputError, insist_whole, quoted
from weights.names import TEXT_DEFAULTS, VISION_DEFAULTS, plan, rotary_base, with_defaults


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
    packed: bool = False        # its weights exist in 4 bits alone
    turned: bool = False        # and the rows between them are turned

    @property
    def largest(self) -> int:
        """Values of a layer's largest weight."""
        return self.D * max(2 * self.F, (self.H + 2 * self.N) * self.K)

    @classmethod
    def read(cls, raw: dict) -> DecoderConfig:
        """From a Hugging Face LLaMA config that `plan` accepts; `rope_parameters` is the newer home of `rope_theta`."""
        theta, raw = rotary_base(raw), with_defaults(raw, TEXT_DEFAULTS)
        H, D = raw["num_attention_heads"], raw["hidden_size"]
        packed = raw.get("packed") or {}
        return cls(D=D, L=raw["num_hidden_layers"], H=H, N=raw.get("num_key_value_heads") or H,
                   K=raw.get("head_dim") or D // H, F=raw["intermediate_size"], V=raw["vocab_size"],
                   eps=raw["rms_norm_eps"], theta=theta, max_rows=raw["max_position_embeddings"],
                   bos_id=raw["bos_token_id"], packed=bool(packed), turned=packed.get("turned", False))


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a CLIP vision tower."""
    C: int = 1024               # width
    layers: int = 24
    heads: int = 16
    image: int = 224            # side of the square it sees, pixels
    patch: int = 14             # side of a patch, pixels
    eps: float = 1e-5

    @property
    def P(self) -> int:
        return (self.image // self.patch) ** 2

    @classmethod
    def read(cls, raw: dict) -> VisionConfig:
        raw = with_defaults(raw, VISION_DEFAULTS)
        return cls(C=raw["hidden_size"], layers=raw["num_hidden_layers"], heads=raw["num_attention_heads"],
                   image=raw["image_size"], patch=raw["patch_size"], eps=raw["layer_norm_eps"])


def text_config(config: dict) -> DecoderConfig:
    """The decoder's shape, which a target keeps in a section and a drafter at the top."""
    return DecoderConfig.read((config.get("text_config") or {}) if config["model_type"] == "video_llava" else config)


def vision_config(config: dict) -> VisionConfig:
    return VisionConfig.read(config.get("vision_config") or {})


def frames_of(config: dict, vision: VisionConfig) -> int:
    """Frames of a clip, from the visual rows that a target's config names."""
    return max(1, (config.get("video_seq_length") or 8 * (vision.P + 1)) // (vision.P + 1))


PROMPT_ROWS = 160           # of a prompt's template and question of 100 ids
TEXT_ROWS = PROMPT_ROWS + 512                    # and of an answer, for which there is room unless told
SPARE_ROWS = 34             # behind an answer, which drafts may fill
LEAST_ROWS = 512


def visual_rows(side: str, config: dict) -> int:
    """Rows that a clip's pictures give, or five event frames'."""
    vision = vision_config(config)
    return frames_of(config, vision) * (vision.P + 1) if side == "target" else 5 + vision.P + 1


def rows_for(side: str, config: dict, text_rows: int = TEXT_ROWS) -> int:
    """Cache rows for a clip, its text and its answer, a multiple of 64; no more than the model was trained for."""
    needed = -(-(visual_rows(side, config) + text_rows + SPARE_ROWS) // 64) * 64
    return min(text_config(config).max_rows, max(LEAST_ROWS, needed))


def rows_of_sides(cache_rows) -> dict:
    """{side: rows or None} of one number for both, or of a pair (target, drafter)."""
    pair = cache_rows if isinstance(cache_rows, (tuple, list)) else (cache_rows, cache_rows)
    if len(pair) != 2:
        raise InputError(f"cache_rows: wanted (target, drafter), got {quoted(cache_rows)}; give one, or both")
    return {side: of if of is None else insist_whole("cache_rows", of, 1)
            for side, of in zip(("target", "drafter"), pair, strict=True)}


def memory_needs(side: str, config: dict, itemsize: int, rows: int, gpu: bool, kernels: dict) -> dict:
    """{"weights", "cache", "packed" (where there are packed copies), "scratch"}: bytes one model allocates from its
    loading to its last request, by arithmetic on the config alone. Torch may reserve more for reuse and returns it when
    short. rows: of the cache; kernels: the bytes that kernels hold, {"packed", "scratch"}, and "replaced", those of the
    weights that exist in packed form alone.

    scratch: fixed buffers, and the larger of what encode and prefill hold at once, as counted in their code: units of
    a row's width, of the longest prompt (its pictures and 64 rows of text, 512 on a GPU, which prepares for as many).
    Names of widths as everywhere: D, F, ...
    """
    d, vision, b, wanted = text_config(config), vision_config(config), itemsize, plan(config)
    R, T, A = frames_of(config, vision) if side == "target" else 5, vision.P + 1, visual_rows(side, config)
    S, HK = min(A + (512 if gpu else 64), rows), d.H * d.K
    pixels = R * 3 * vision.image ** 2 * 4
    F1 = max((t.shape[0] for t in wanted.wanted if t.name.endswith(".fc1.w")), default=0)
    encode = R * T * b * max(7 * vision.C + (2 if gpu else 3) * F1, vision.C + 2 * d.D)
    layer = [4 * d.D + (2 * d.H + 2 * d.N) * d.K, 5 * d.D + 2 * HK, 5 * d.D + HK + 3 * d.F]
    fixed = pixels + 2 * A * d.D * b + 32 * d.V * b + kernels["scratch"]
    if gpu:                                                  # cuBLAS's, for three of its handles and streams; pictures
        fixed += (3 << 25) + (2 << 26)                       # that are resized
    else:                                                    # the plain definitions keep scores, and unpack weights
        layer = [5 * d.D + HK + 4 * d.F, 4 * d.D + (d.H + d.N) * d.K + 2 * d.H * S + 2 * HK * (d.H != d.N)]
        beside = S * b * (8 * d.D + HK) * ("replaced" in kernels)            # in a prefill that unpacks
        encode = max(encode + pixels, (12 * d.D * max(2 * d.F, d.V) + beside) * ("packed" in kernels))
        fixed += S * d.D * b
    cache = rows * b * (2 * d.L * d.N * d.K + 2 * d.K + d.D)     # keys, values, rotary tables, a prefill's first rows
    return {"weights": wanted.nbytes(b) - kernels.pop("replaced", 0), "cache": cache} | kernels | {
        "scratch": fixed + max(encode, S * b * max(layer))}
