"""load: a checkpoint on disk to engine tensors on a device. Every complaint comes before any device memory is taken.

    checkpoint = open_checkpoint("checkpoints/eventgpt")       # headers only; InputError names what does not fit
    weights = checkpoint.load(torch.device("cuda"), torch.bfloat16)        # {"text.layers.0.qkv": tensor, ...}

Each checkpoint tensor is read once, in pieces, straight into its rows of the engine tensor: the host holds PIECE bytes
for each of READERS threads and nothing else.
`python -m weights.load DIR` prints names, shapes, bytes and leftovers; `--check` also reads every value, and says how
fast.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from weights.files import (
    InputError,
    Parser,
    Refused,
    brief,
    command,
    look_alike,
    names_in,
    naming,
    open_regular,
    path_text,
    read_json,
    reason_of,
    refusal,
    say,
)
from weights.names import (
    CLIP_MEAN,
    CLIP_STD,
    KINDS,
    RESCALE,
    TEXT_DEFAULTS,
    TEXT_RULES,
    VISION_DEFAULTS,
    Plan,
    canonical,
    extra_rows,
    on_disk,
    plan,
    settled,
    with_defaults,
)

MAX_NAMES = 10                       # tensors listed in one message
MAX_HEADER_BYTES = 4 << 20           # a 7B model has 80 KB; the library would read 100 MB, for half a minute
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = FLOATS | {"I32": torch.int32}
PIECE, READERS = 8 << 20, 4          # bytes read at a time, threads that read
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CLIP_336, ASSUMED_CLIP = "openai/clip-vit-large-patch14-336", {"image_size": 336}
LOOKS_LIKE = [                       # the keys of other checkpoints that people have
    (r"^base_model\.model\.|\.lora_[AB]\.", "a LoRA adapter: merge it into its model first"),
    (r"\.(q_?weight|qzeros|absmax|quant_map|SCB|weight_format|weight_scale(_inv)?|weight_packed|W_q|biases)\b",
     "a quantised checkpoint: use the original in bf16 or fp16"),
    (r"^(module|_orig_mod|_fsdp_wrapped_module)\.", "a wrapper of its trainer: save the module inside of it"),
    (r"^text\..*\.words$", "a drafter packed by weights.convert: it belongs to the config.json written beside it"),
    (r"^model\.(mm_projector|image_tower\.image_tower|video_tower\.video_tower)\.", "the original Video-LLaVA or LLaVA "
     "layout: use LanguageBind/Video-LLaVA-7B-hf"),
    (r"^(model\.)?video_tower\.", "Video-LLaVA"),
    (r"^(model\.)?vision_tower\.", "LLaVA, which has one vision tower and not two"),
    (r"^model\.(visual_tower|visual_projector|feature_adaptor)\.", "EventGPT"),
    (r"^(text_model|vision_model)\.", "CLIP"),
    (r"^output_proj\.|^transformer\.layers\.\d+\.self_attn\.in_proj", "an alignment adapter, not a model"),
    (r"^model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias$", "Qwen or another decoder with biases"),
    (r"^model\.layers\.", "a plain LLaMA"),
]


# ---- folders -----------------------------------------------------------------------------------------------------


def resolve(path_or_id) -> Path:
    """The folder of a checkpoint: a local one, or a snapshot in the hub cache. Never touches the network.

    path_or_id: a path, `ORG/NAME` or `ORG/NAME@REVISION`: a branch, or better the 40 digits of a commit, which pin the
    files; `main` as the cache last saw it unless told.
    """
    with naming(path_or_id):
        name = os.path.expanduser(path_text(path_or_id, "a folder or ORG/NAME"))
    if os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name):
        raise refusal(name, "is a file, wanted a folder with config.json and safetensors",
                      f"give {os.path.dirname(name) or '.'}")
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo, re.ASCII):
        raise refusal(name, "no such folder", "check the spelling, or give ORG/NAME of a downloaded model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):       # ValueError: a NUL inside
        found = [of for of in cached_revisions(repo) if not revision or of.name.startswith(f"{revision:_<7}")]
        revision = brief(revision or "main")
        if len(found) == 1:                  # `hf download --revision` leaves no word of `main`, nor of fewer digits
            logging.getLogger(__name__).warning("%s: revision %s is not in the hub cache; the one that is there is "
                                                "taken, %s", repo, revision, found[0].name)
            return found[0]
        if found:
            raise refusal(repo, f"revision {revision} is not in the hub cache, {listed(of.name for of in found)} are",
                          f"name one, as {repo}@{found[0].name}") from None
        command = f"hf download {repo} --revision {revision}"
        raise refusal(repo, f"no such folder, and revision {revision} is not in the hub cache",
                      f"check the path, or download it with `{command}`") from None


def cached_revisions(repo: str) -> list[Path]:
    """The snapshots of a model that the hub cache holds, whatever their branches are called."""
    from huggingface_hub.constants import HF_HUB_CACHE
    folder = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    return [of for of in sorted(folder.glob("*")) if os.path.exists(of / "config.json")]


def reject_impostor(path, first_bytes):
    """Refuses a file whose first bytes show that it holds no safetensors."""
    if first_bytes.startswith(b"PK\x03\x04"):
        first = "rename it to .bin, then " * str(path).endswith(".safetensors")
        raise refusal(path, "is a pickled torch file", first + "turn it into safetensors: `python -m weights.convert`")
    if (found := look_alike(first_bytes)) and found[1]:
        raise refusal(path, f"is {found[0]}", found[1])


def read_config(folder) -> dict:
    """config.json of a checkpoint folder. EventGPT's comes with `vision_config`, read from the CLIP folder it names."""
    folder = Path(folder)
    if os.path.lexists(folder / "adapter_config.json"):      # upstream puts it on top of a model that lies beside it
        raise refusal(folder, "holds an adapter, adapter_config.json", "merge it first, and give the merged folder "
                      "without that file")
    if not any(re.search(r"config\.json|\.safetensors|\.bin$", name) for name in names_in(folder)):
        for below in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):   # as in a cache
            raise refusal(folder, "has no config.json, a folder below it has", f"give {below.parent}")
    config = read_json(folder / "config.json", "a model's config")
    if config.get("model_type") not in KINDS:
        raise refusal(folder / "config.json",
                      f"model_type is {brief(config.get('model_type'))!r}, wanted one of {', '.join(KINDS)}",
                      "give a Video-LLaVA (-hf form), EventGPT or plain LLaMA folder")
    if config["model_type"] == "EventChat_llama" and not config.get("vision_config"):
        clip = clip_folder(folder, config)
        if clip is None:                                # the tower EventGPT is built on; headers will tell if it isn't
            config["vision_config"] = dict(ASSUMED_CLIP)
        else:
            vision = read_json(clip / "config.json", "the config of a CLIP tower")   # or of a whole CLIP, in a section
            config["vision_config"] = vision.get("vision_config") or vision.get("vision_config_dict") or vision
    layer = config.get("vision_feature_layer")
    if isinstance(layer, list) and len(layer) == 1:          # upstream joins the layers of a list
        config["vision_feature_layer"] = layer[0]
    return config


def clip_folder(folder, config) -> Path | None:
    """Where `mm_visual_tower` is on this machine: inside or beside the model folder, as written, or the hub cache.
    The released config carries its author's path, so the last name alone is tried as well."""
    tower = config.get("mm_visual_tower")
    if not isinstance(tower, str) or not tower:
        raise refusal(folder / "config.json", "mm_visual_tower is absent, wanted the CLIP folder",
                      f"set it to the path of {CLIP_336}")
    last = re.split(r"[/\\]", tower.rstrip("/\\"))[-1]
    for place in (folder / tower, Path(tower), folder / last, folder.resolve().parent / last):
        if last and os.path.isfile(place / "config.json"):
            return place
    try:
        return resolve(tower)
    except InputError:
        return None


# ---- headers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, known by its header."""
    file: Path
    key: str
    dtype: str                  # as safetensors spells it
    shape: tuple
    start: int                  # byte offset in the file's data; reading in this order reads the disk in order
    nbytes: int


def read_header(path) -> dict:
    """{key: Stored} of one safetensors file, after checking that the file is whole. No tensor is read."""
    path, named = Path(path), os.fsencode(path) == str(path).encode(errors="replace")
    again = "copy or download it again" if named else "rename it: the library opens no path that is not UTF-8"
    with naming(path):
        file, real = open_regular(path, "a safetensors file")
        with file:
            try:
                first = file.read(64)
                length = int.from_bytes(first[:8], "little")
                if real < 8 or length > MAX_HEADER_BYTES:
                    reject_impostor(path, first)
                    raise Refused(f"not a safetensors file (starts with {first[:16]!r})", again)
                if 8 + length > real:
                    raise Refused(f"truncated: its header alone needs {8 + length} bytes, the file has {real}", again)
                file.seek(8)
                header = json.loads(file.read(length), object_pairs_hook=lambda pairs: no_duplicates(path, pairs))
            except InputError:
                raise
            except OSError as error:
                raise Refused(f"cannot be read ({reason_of(error)})", "check the disk and try again") from None
            except (ValueError, RecursionError, MemoryError) as error:
                raise Refused(f"damaged header ({reason_of(error)})", again) from None
    entries = header.items() if isinstance(header, dict) else ()
    spans = {key: entry.get("data_offsets") for key, entry in entries if isinstance(entry, dict)}
    ends = [span[1] for span in spans.values() if isinstance(span, list) and len(span) == 2 and type(span[1]) is int]
    if ends and 8 + length + max(ends) != real:
        state = "truncated" if 8 + length + max(ends) > real else "too long"
        raise refusal(path, f"{state}: wanted {8 + length + max(ends)} bytes, the file has {real}", again)
    try:
        with safe_open(path, framework="pt") as file:   # the library has the last word on overlaps, holes and dtypes
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: Stored(path, key, part.get_dtype(), tuple(part.get_shape()), spans[key][0],
                                spans[key][1] - spans[key][0]) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise refusal(path, f"damaged ({brief(error)})", again) from None


def no_duplicates(path, pairs) -> dict:
    """A JSON object whose keys differ; json alone would let the last one win in silence."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise refusal(path, f"its header names {brief(twice)} twice", "ask whoever made the file for a sound one")
    return result


def weight_files(folder) -> tuple:
    """(files, index): the safetensors files of a folder, all present, and {key: file} of the index or None."""
    folder = Path(folder)
    if os.path.lexists(folder / SINGLE):
        return [folder / SINGLE], None
    if not os.path.lexists(folder / INDEX):
        names = names_in(folder)
        shards = [name for name in names if name.endswith(".safetensors")]
        pickled = [name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)]
        if shards:
            raise refusal(folder, f"holds {listed(shards)} but neither {SINGLE} nor {INDEX}",
                          f"add the missing {INDEX}")
        if pickled:
            raise refusal(folder, f"holds pickled weights only ({listed(pickled)}), wanted safetensors",
                          f"turn them into safetensors with `python -m weights.convert {folder}`")
        raise refusal(folder, f"no weights here, wanted {SINGLE} or {INDEX} with its shards",
                      "finish the download, or point at the folder that has them")
    shards, weight_map = shards_of(folder / INDEX, r"[^/\0]*[^/.\0][^/\0]*")
    return [folder / name for name in shards], weight_map


def shards_of(index, pattern: str) -> tuple[list[str], dict]:
    """(names of the shards, {key: name}) of an index; all are there, beside it, and named by `pattern`."""
    again = "copy it from the checkpoint again"
    weight_map = read_json(index, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise refusal(index, "weight_map is not a table of key to file", again)
    shards = sorted(set(weight_map.values()))
    if odd := [name for name in shards if not re.fullmatch(pattern, name)]:
        raise refusal(index, f"names files outside its folder, or no shards ({listed(odd)})", again)
    if missing := [name for name in shards if not os.path.exists(index.parent / name)]:
        raise refusal(index.parent, f"{len(missing)} of {len(shards)} shards missing: {listed(missing)}",
                      "finish the download")
    return shards, weight_map


def listed(names, room=MAX_NAMES) -> str:
    names = list(names)
    return ", ".join(brief(name, 120) for name in names[:room]) + (
        f" and {len(names) - room} more" if len(names) > room else "")


def counted(tensors) -> str:
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"


# ---- a checkpoint ------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A checkpoint whose headers fit the engine; nothing of it is in memory until `load`."""
    folder: Path
    config: dict
    plan: Plan
    files: list                 # of Path
    stored: dict                # canonical name -> Stored, of the tensors that will be read
    unread: list                # of Stored: declared unused, or constants nobody reads

    def load(self, device, dtype, progress=None, made=iter) -> dict:
        """{engine name: tensor} on the device. Each is allocated once and filled from the disk, fused on the way.

        dtype: torch.float32, float16 or bfloat16. progress: called with (bytes read, bytes in all) after every
        checkpoint tensor. made: called with the pairs (name, tensor), which come as norms and biases and then one
        matrix after the other; its pairs are taken. InputError if a file cannot be read through, or if a value is NaN
        or infinite.
        """
        return dict(made(self.tensors(device, dtype, progress)))

    def some_rows(self, name: str, rows: int = 128):
        """The first rows of each part of an engine tensor, or all of a vector; on the host."""
        wanted, found = next(of for of in self.plan.wanted if of.name == name), []
        for part in wanted.parts:
            stored = self.stored[part.name]
            with safe_open(stored.file, framework="pt") as file:
                found.append(file.get_slice(stored.key)[:rows if len(part.shape) > 1 else part.shape[0]])
        return torch.cat(found)

    def fingerprint(self) -> str:
        """16 hex digits that tell checkpoints apart: SHA-256 of config.json, of every tensor's name, dtype and shape,
        and of its first and last 4 KiB. All bytes would take ten seconds at 7B, these take milliseconds."""
        files: dict = {}
        try:
            digest = hashlib.sha256((self.folder / "config.json").read_bytes())
            for name, stored in sorted(self.stored.items()):
                if stored.file not in files:
                    files[stored.file] = open_weights(stored.file)
                file, data = files[stored.file]
                digest.update(f"{name} {stored.dtype} {stored.shape}".encode())
                begin, some = data + stored.start, min(4096, stored.nbytes)
                for at in (begin, begin + stored.nbytes - some):
                    digest.update(os.pread(file.fileno(), some, at))
        except OSError as error:
            raise refusal(self.folder, f"cannot be read ({error.strerror})", "check the disk and try again") from None
        finally:
            for file, _ in files.values():
                file.close()
        return digest.hexdigest()[:16]

    @property
    def revision(self) -> str | None:
        """The commit of a snapshot in the hub cache; None for any other folder."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def tensors(self, device, dtype, progress=None):
        """Yields (engine name, tensor) as they fill up: vectors, then the others one by one, in the order of the files.
        Values are checked at the end."""
        assert dtype in (torch.float32, torch.float16, torch.bfloat16), dtype
        device = torch.device(device)
        jobs = [(self.stored[part.name], part, wanted) for wanted in self.plan.wanted for part in wanted.parts]
        at = {part.name: (str(self.stored[part.name].file), self.stored[part.name].start) for _, part, _ in jobs}
        jobs.sort(key=lambda job: (len(job[2].shape) > 1, min(at[part.name] for part in job[2].parts), at[job[1].name]))
        filling, flags, seen, done, total = {}, [], [], 0, sum(stored.nbytes for stored, _, _ in jobs)
        buffers, files = itertools.cycle([Buffer(device) for _ in range(READERS + 1)]), {}

        def rows_of(job):
            """The values [N] of a job's tensor, which has its memory from the first call on."""
            _, part, wanted = job
            if wanted.name not in filling:
                filling[wanted.name] = torch.empty(wanted.shape, dtype=STORED[wanted.dtype] if wanted.dtype else dtype,
                                                   device=device), len(wanted.parts)
            return filling[wanted.name][0].narrow(0, part.row, part.shape[0]).flatten()

        def pieces():
            """(job, first value, buffer, values on their way into it), as they are asked for, in the order of jobs."""
            for job in jobs:
                stored, part, _ = job
                if stored.file not in files:
                    files[stored.file] = open_weights(stored.file)
                    opened.callback(files[stored.file][0].close)
                step = PIECE // STORED[stored.dtype].itemsize
                for first in range(0, prod(part.shape), step):
                    buffer, to = next(buffers), rows_of(job)[first:first + step] if device.type == "cpu" else None
                    yield job, first, buffer, readers.submit(buffer.read, *files[stored.file], stored, first, to)

        with contextlib.ExitStack() as opened, concurrent.futures.ThreadPoolExecutor(READERS) as readers:
            more = pieces()
            queued = collections.deque(itertools.islice(more, READERS))
            while queued:
                job, first, buffer, reading = queued.popleft()
                stored, _, wanted = job
                try:
                    values, extremes = reading.result()
                except OSError as error:
                    raise refusal(stored.file, f"reading {stored.key} failed ({error.strerror}) after {done} of "
                                  f"{total} bytes", "check the disk or network share and try again") from None
                rows = rows_of(job)
                if device.type != "cpu":
                    buffer.copy_to(rows[first:first + len(values)], values)
                queued.extend(itertools.islice(more, 1))
                seen += extremes
                if first + len(values) < len(rows):
                    continue
                tensor, missing = filling[wanted.name]
                filling[wanted.name] = tensor, missing - 1
                extremes = torch.stack(seen or torch.aminmax(rows))          # a matrix of zeros was never fetched
                flags.append(torch.isfinite(extremes).all() & (extremes.any() | (len(wanted.shape) < 2)))   # no sync
                seen = []
                done += stored.nbytes
                if progress:
                    progress(done, total)
                if missing == 1:
                    del tensor, rows                         # else it would stay while the next one is read
                    yield wanted.name, filling.pop(wanted.name)[0]
        sound = torch.stack(flags).tolist()             # the one wait for the device
        bad = [stored for (stored, _, _), fine in zip(jobs, sound, strict=True) if not fine]
        if bad:
            self._refuse_values(bad, dtype)

    def _refuse_values(self, bad, dtype):
        if empty := [s for s in bad if not bool(stored_values(s).any())]:
            raise refusal(listed(sorted({str(s.file) for s in empty})), f"nothing but zeros in {counted(empty)}: "
                          f"{listed(s.key for s in empty)}", "a download that left holes? fetch the file again")
        damaged = [s for s in bad if not bool(torch.isfinite(stored_values(s)).all())]
        names, files = listed(s.key for s in damaged or bad), listed(sorted({str(s.file) for s in damaged or bad}))
        if damaged:
            raise refusal(files, f"NaN or infinity in {counted(damaged)}: {names}",
                          "download the file again; if it stays, the checkpoint itself is broken")
        raise refusal(files, f"{str(dtype)[6:]} is too narrow for {counted(bad)}: {names}",
                      "load it as bfloat16 or float32")


def open_checkpoint(path_or_id) -> Checkpoint:
    """A Checkpoint, after reading its config and headers only. One InputError says all that does not fit."""
    folder = resolve(path_or_id)
    config = read_config(folder)
    kind = config["model_type"]
    files, index = weight_files(folder)
    stored, unread, complaints = {}, [], []
    headers = [read_header(file) for file in files]
    if index is not None:
        complaints += index_complaints(index, headers, files)
    kind = "packed" if config.get("packed") else kind
    gather(headers, kind, stored, unread, complaints)
    embed = stored.get("language_model.embed_tokens.weight")
    if kind == "EventChat_llama" and embed and embed.shape:
        V, extra = settled(config, TEXT_RULES, folder / "config.json")["vocab_size"], extra_rows(config)
        if extra and embed.shape[0] == V + extra:
            config["vocab_size"] = V + extra            # rows that the marker flags explain
    text = config.get("text_config")
    for of in (config, text if isinstance(text, dict) else {}):          # a head of its own is never the embeddings
        if of.get("tie_word_embeddings") is True and "lm_head.weight" in stored:
            of["tie_word_embeddings"] = False
    wanted = plan(config, folder / "config.json")
    if kind == "packed":
        from weights.packed import packed_plan  # Triton, a second of start that others need not
        wanted = packed_plan(config, wanted, folder / "config.json")
    insist_ids(folder, config)
    of_events = kind == "EventChat_llama" and config.get("mm_visual_tower")
    insist_processor(clip_folder(folder, config) if of_events else folder, config)
    if kind == "EventChat_llama" and not any(name.startswith(("event_tower.", "events.")) for name in stored):
        clip = clip_folder(folder, config)
        if clip is None:
            raise refusal(folder, f"holds no vision tower, and mm_visual_tower {brief(config['mm_visual_tower'])} in "
                          f"config.json is not here", f"run `hf download {CLIP_336}` and set mm_visual_tower to it")
        clip_files, _ = weight_files(clip)
        gather([read_header(file) for file in clip_files], "clip", stored, unread, complaints)
        files = files + clip_files
    complaints += mismatches(wanted, stored)
    if complaints:
        way_out = advice(kind, [s.key for s in stored.values()])
        for name in ("text_config", "vision_config"):
            if kind == "video_llava" and not config.get(name):
                way_out = f"config.json has no {name}: {way_out}"
        if kind == "EventChat_llama" and config["vision_config"] == ASSUMED_CLIP:
            way_out += f" (mm_visual_tower {brief(config.get('mm_visual_tower'))} is not here: {CLIP_336} was assumed)"
        raise refusal(folder, "; ".join(complaints), way_out)
    unread += [stored.pop(name) for name in sorted(wanted.unused & stored.keys())]
    return Checkpoint(folder, config, wanted, files, stored, unread)


# ---- the small files beside config.json --------------------------------------------------------------------------


# Settings of generation_config.json that change which ids come out of a greedy or plainly sampled answer, and the
# values that change nothing. Temperature, top_p and the like are arguments of a request here; others are remarks.
NEUTRAL = {"repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
           "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,), "num_beam_groups": (1,), "min_length": (0,),
           "min_new_tokens": (0,), "diversity_penalty": (0,), "bad_words_ids": ([],), "suppress_tokens": ([],),
           "begin_suppress_tokens": ([],), "sequence_bias": ([], {}), "forced_bos_token_id": (),
           "forced_eos_token_id": (), "forced_decoder_ids": ([],), "penalty_alpha": (0,), "guidance_scale": (1,),
           "exponential_decay_length_penalty": (), "stop_strings": ([],), "watermarking_config": (), "dola_layers": (),
           "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window")}
# What CLIP's image processor does, which is what kernels/frames.py computes.
PROCESSOR = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
             "rescale_factor": RESCALE, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "do_pad": False,
             "do_sample_frames": False}
TOKENIZER = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True}       # what weights/text.py does
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def stop_ids(folder, config: dict) -> tuple[int, ...]:
    """The ids that end an answer, as transformers has them: generation_config.json's `eos_token_id`, one or a list;
    where it says nothing the config's own, then its text_config's, then LLaMA's 2. InputError for ids that are none of
    the vocabulary, and for settings there that change an answer and are not computed here."""
    folder, places = Path(folder), []
    beside = folder / "generation_config.json"
    if os.path.lexists(beside):
        settings = read_json(beside, "a generation config")
        for name, neutral in NEUTRAL.items():
            if settings.get(name) is not None and settings[name] not in neutral:
                raise refusal(beside, f"{name} is {brief(settings[name], 60)}, which changes answers and is not "
                              f"computed here", "remove it, if the model may be used without it")
        places.append((beside, settings))
    places += [(folder / "config.json", config), (folder / "config.json", config.get("text_config") or {})]
    where, stops = next(((path, of["eos_token_id"]) for path, of in places if of.get("eos_token_id") is not None),
                        (None, 2))
    stops, V = stops if isinstance(stops, list) else [stops], rows_of_table(config)
    if not 0 < len(stops) <= 16 or not all(type(i) is int and 0 <= i < V for i in stops):
        raise refusal(where, f"eos_token_id is {brief(stops, 60)}, wanted 1 to 16 ids of the vocabulary, 0 to "
                      f"{V - 1}", "copy it from the checkpoint again")
    return tuple(dict.fromkeys(stops))


def rows_of_table(config: dict) -> int:
    """Rows of the embedding table: ids below it exist."""
    return with_defaults(config.get("text_config") or config, TEXT_DEFAULTS)["vocab_size"]


def insist_ids(folder, config: dict) -> None:
    """Refuses ids of a checkpoint's small files that its embedding table has no row for: what starts and ends texts."""
    bos = with_defaults(config.get("text_config") or config, TEXT_DEFAULTS)["bos_token_id"]
    if bos >= rows_of_table(config):
        raise refusal(Path(folder) / "config.json", f"bos_token_id is {bos}, the embedding table has "
                      f"{rows_of_table(config)} rows", "copy config.json from the checkpoint again")
    stop_ids(folder, config)
    insist_settings(Path(folder) / "tokenizer_config.json", TOKENIZER)


def insist_processor(folder, config: dict) -> None:
    """Refuses an image processor beside the vision tower, `folder`, that makes other pixels than CLIP's of the tower's
    size. Absent files and keys mean that one, as upstream."""
    if folder is None or config["model_type"] == "llama":
        return
    side = with_defaults(config.get("vision_config") or {}, VISION_DEFAULTS)["image_size"]
    for name in PROCESSOR_FILES:                             # of a height and a width upstream makes a squeezed square
        insist_settings(Path(folder) / name, PROCESSOR | {"size": {"shortest_edge": side},
                                                          "crop_size": {"height": side, "width": side}})


def insist_settings(path, wanted: dict) -> None:
    """Refuses a small file that says other than what is wanted; where it says nothing, that is meant."""
    raw = read_json(path, "the settings of a processor or a tokenizer") if os.path.lexists(path) else {}
    for settings in (raw, raw.get("image_processor"), raw.get("video_processor")):
        for key, found in settings.items() if isinstance(settings, dict) else ():
            if key in wanted and found is not None and not same_setting(found, wanted[key]):
                raise refusal(path, f"{key} is {brief(found, 60)}, and this engine computes only {wanted[key]}",
                              "use a checkpoint of the published architecture")


def same_setting(found, wanted) -> bool:
    """Whether a processor's value is the wanted one: numbers to 6 digits, a size by its side or by its edges."""
    if isinstance(wanted, dict):
        edges = found if isinstance(found, dict) else dict.fromkeys(wanted, found)
        return all(same_setting(of, wanted.get(name)) for name, of in (dict.fromkeys(wanted) | edges).items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(same_setting, found, wanted))
    if wanted is None or isinstance(wanted, bool):
        return found is wanted
    return type(found) in (int, float) and (1 - 1e-6) * wanted <= found <= (1 + 1e-6) * wanted   # of any size


def index_complaints(index, headers, files) -> list:
    """Where the index and the shards disagree."""
    lost = [key for key, name in index.items()
            if not any(key in header for header, file in zip(headers, files, strict=True) if file.name == name)]
    unlisted = [key for header in headers for key in header if key not in index]
    return [f"{counted(keys)} {what}: {listed(keys)}" for keys, what in
            ((lost, "not in the shard that the index names"), (unlisted, "left out by the index"))
            if keys]


def gather(headers, kind, stored, unread, complaints):
    """Adds the tensors of some files under their canonical names; two of one name are a complaint."""
    twice = []
    for header in headers:
        for key, tensor in header.items():
            name = canonical(key, kind)
            if name is None:
                unread.append(tensor)
            elif name in stored:
                twice.append(f"{key} ({stored[name].file.name} and {tensor.file.name})")
            else:
                stored[name] = tensor
    if twice:
        complaints.append(f"{counted(twice)} twice: {listed(twice)}")


def mismatches(wanted: Plan, stored: dict) -> list:
    """What is missing, misshapen, not floating point or left over, ten names, and one of each."""
    parts = {part.name: part for tensor in wanted.wanted for part in tensor.parts}
    kept = {part.name: tensor.dtype and (tensor.dtype,) for tensor in wanted.wanted for part in tensor.parts}
    shapes, dtypes = [], []
    for name, part in parts.items():
        tensor = stored.get(name)
        if tensor and tensor.shape != part.shape:
            shapes.append(f"{tensor.key} is {list(tensor.shape)}, config.json wants {list(part.shape)}")
        elif tensor and tensor.dtype not in (kept[name] or FLOATS):
            dtypes.append(f"{tensor.key} is {tensor.dtype}")
    missing = [on_disk(name, wanted.kind) for name in parts if name not in stored]
    surplus = [tensor.key for name, tensor in stored.items() if name not in parts and name not in wanted.unused]
    found, room = [], MAX_NAMES
    for names, what in ((missing, "missing"), (shapes, "misshapen"), (dtypes, "not plain floating point"),
                        (surplus, "surplus")):
        if names:
            found.append(f"{counted(names)} {what}: {listed(names, room)}")
            room = max(1, room - len(names))
    return found


def advice(kind, keys) -> str:
    """The way out of a checkpoint that does not fit: what its keys look like, if that is something else."""
    own = {"video_llava": "Video-LLaVA", "EventChat_llama": "EventGPT", "llama": "a plain LLaMA",
           "packed": "a packed drafter"}[kind]
    for pattern, what in LOOKS_LIKE:
        if any(re.search(pattern, key) for key in keys):
            if what == own:
                break
            return f"config.json says {kind}, the keys look like {what}"
    return "take config.json and all weight files from one and the same checkpoint"


def bytes_of(tensor) -> memoryview:
    """The memory of a dense tensor on the CPU."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class Buffer:
    """PIECE bytes on the host, pinned for a GPU, which a reader thread fills and the main thread copies from: 14.2 GB
    from memory take 1.3 s on an H200, without threads 2.8. The library's own reading holds Python's lock."""

    def __init__(self, device):
        on_gpu = device.type == "cuda"
        self.tensor = torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu)
        self.bytes = bytes_of(self.tensor)
        self.copied = torch.cuda.Event() if on_gpu else None

    def read(self, file, data: int, stored, first: int, to=None):
        """(the stored values from `first` on, as many as fit, their extremes or ()); `data`: where the data of the file
        begin. to: rows [N] on the CPU that they shall fill, without a way round by the buffer if the types are the
        same; only then extremes, both NaN if one value is. OSError as read, or where the file ends early."""
        dtype, got = STORED[stored.dtype], 0
        at = data + stored.start + first * dtype.itemsize
        nbytes = min(PIECE, stored.nbytes - first * dtype.itemsize)
        same = to is not None and to.dtype == dtype
        room = bytes_of(to) if same else self.bytes
        if self.copied:
            self.copied.synchronize()                        # the piece before has left the buffer
        while got < nbytes:
            count = os.preadv(file.fileno(), [room[got:nbytes]], at + got)
            if not count:
                raise OSError(0, "the file ends there")
            got += count
        values = to if same else self.tensor[:nbytes].view(dtype)
        if to is None:
            return values, ()
        with torch.inference_mode(to.is_inference()):        # which is each thread's own; the caller's may be on
            return values, torch.aminmax(to if same else to.copy_(values))

    def copy_to(self, rows, values):
        """Fills rows [N] with the values; on a GPU the copy is under way on return."""
        if self.copied and values.dtype != rows.dtype:
            values = values.to(rows.device, non_blocking=True)           # narrow or widen over there
        rows.copy_(values, non_blocking=True)
        if self.copied:
            self.copied.record(torch.cuda.current_stream(rows.device))


def open_weights(path):
    """(open file, where its data begin). Read by pread: unlike a mapping, a file cut short meanwhile is an error and no
    crash, and pages already copied don't count as ours."""
    try:
        file = open(path, "rb", buffering=0)
        return file, 8 + int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise refusal(path, f"cannot be opened any more ({error.strerror})", "check the disk and try again") from None


def stored_values(stored):
    """One tensor as it is stored, by the library."""
    try:
        with safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(stored.key)
    except (SafetensorError, OSError) as error:
        raise refusal(stored.file, f"cannot be read again ({brief(error)})", "check the disk and try again") from None


# ---- random weights at real shapes -------------------------------------------------------------------------------

# All other sizes are those of LLaMA-7B and CLIP ViT-L/14, which weights/names.py puts in.
TARGET_7B = {"model_type": "video_llava", "text_config": {"vocab_size": 32064, "num_hidden_layers": 32},
             "vision_config": {"image_size": 224}, "vision_feature_layer": -2, "video_seq_length": 2056}
DRAFTER_7B = {"model_type": "EventChat_llama", "vocab_size": 32000, "mm_visual_tower": CLIP_336,
              "event_feature_adaptor": True, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
              "vision_config": {"image_size": 336}}


def random_tensors(config, device, dtype, seed):
    """Yields (engine name, tensor) of a config's shapes, drawn on the device from `seed`, for speed work.

    Norms are 1 and biases 0; a matrix keeps the size of what it multiplies (std 1 / sqrt(columns)), and the two that
    write into the residual stream are smaller by sqrt(2 layers), so activations stay of order one at any depth.
    """
    wanted, generator = plan(config), torch.Generator(device).manual_seed(seed)
    layers = sum(tensor.name.endswith(".attn_norm") for tensor in wanted.wanted)
    for tensor in wanted.wanted:
        filled = torch.empty(tensor.shape, dtype=dtype, device=device)
        if tensor.name.endswith(".b"):
            filled.zero_()
        elif tensor.name.split(".")[-1].endswith("norm") or "norm" in tensor.name.split(".")[-2]:
            filled.fill_(1)
        else:
            std = 1.0 if tensor.name == "text.embed" else (tensor.numel / tensor.shape[0]) ** -0.5
            if len(tensor.shape) == 1:                  # the CLS row
                std = tensor.shape[0] ** -0.5
            if tensor.name.endswith((".o", ".down", ".out.w", ".fc2.w")):
                std *= (2 * layers) ** -0.5
            filled.normal_(0, std, generator=generator)
        yield tensor.name, filled
        del filled


# ---- python -m weights.load --------------------------------------------------------------------------------------


def report(checkpoint: Checkpoint):
    """Prints every engine tensor with where it comes from, then what stays unread."""
    say(f"{checkpoint.plan.kind} {checkpoint.folder}: {listed(file.name for file in checkpoint.files)}")
    print(f"{'engine tensor':32} {'shape':22} {'dtype':6} {'bytes':>13}  from")
    read = 0
    for tensor in checkpoint.plan.wanted:
        sources = [checkpoint.stored[part.name] for part in tensor.parts]
        nbytes = sum(source.nbytes for source in sources)
        read += nbytes
        print(f"{tensor.name:32} {str(list(tensor.shape)):22} {'/'.join(sorted({s.dtype for s in sources})):6} "
              f"{nbytes:13,}  {' + '.join(source.key for source in sources)}")
    for source in checkpoint.unread:
        say(f"{'(not read)':32} {str(list(source.shape)):22} {source.dtype:6} {source.nbytes:13,}  {source.key}")
    print(f"{len(checkpoint.plan.wanted)} engine tensors from {len(checkpoint.stored)} checkpoint tensors, {read:,} "
          f"bytes; {len(checkpoint.unread)} not read, {sum(s.nbytes for s in checkpoint.unread):,} bytes")


def pick_device(name, argument: str = "device") -> torch.device:
    """A device that is really there, or an InputError that says which are."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"{argument} {name!r}: not a device name; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"{argument} {name}: {count} CUDA devices here; use cpu, a lower number, or check the "
                             f"driver")
        device = torch.device("cuda", device.index or 0)
    elif device.type != "cpu":
        raise InputError(f"{argument} {name}: only cpu and cuda are supported; use one of these")
    return device


def checked(checkpoint: Checkpoint, device: str) -> str:
    """Reads every value, to fp32 on the CPU and bf16 elsewhere, and keeps none."""
    at = pick_device(device)
    torch.zeros(1, device=at).item()                         # the driver's start is not the loader's
    began = time.monotonic()
    for _ in checkpoint.tensors(at, torch.float32 if at.type == "cpu" else torch.bfloat16):
        pass
    took, read = time.monotonic() - began, sum(stored.nbytes for stored in checkpoint.stored.values())
    return f"every value is finite; {read / 1e9:.3f} GB to {device} in {took:.2f} s, {read / took / 1e9:.2f} GB/s"


@command
def main(argv=None) -> int:
    parser = Parser(prog="python -m weights.load", description=__doc__)
    parser.add_argument("checkpoint", metavar="DIR", help="a folder, or ORG/NAME[@REVISION] in the hub cache")
    parser.add_argument("--check", action="store_true", help="also read every value and look for NaN and infinity")
    parser.add_argument("--device", default="cpu", help="of --check: where to (default %(default)s)")
    args = parser.parse_args(argv)
    checkpoint = open_checkpoint(args.checkpoint)
    report(checkpoint)
    if args.check:
        print(checked(checkpoint, args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
