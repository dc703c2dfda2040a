"""fuzz: seeded damage to every kind of file the program reads, in child processes with bounds on time and memory.

    python tests/fuzz.py --mutations 20000
    python tests/fuzz.py --mutations 500 --kind npy,config

Half of the damage is to bytes, half is a sound file with one field, member, chunk or box changed. A damaged file is
read through or refused with InputError. Anything else is a violation and makes the exit code 1: another exception, a
signal, a mutation that takes longer than SECONDS, something executed, an accepted file without content, an answer that
differs between modes, or a child that grows by more than MEGABYTES over what it held after its imports.
`--seed N --mutations 1` repeats one."""

import copy
import functools
import importlib
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from weights.files import Parser, command, insist_whole  # noqa: E402  after the path

BATCH = 2500                         # mutations a child lives for
SECONDS = 10                         # for one mutation; what is refused takes milliseconds
MEGABYTES = 256                      # over the baseline after imports and one sound file
COLUMNS = ("accepted", "refused", "foreign", "signals", "executed", "empty")
ODD = [None, True, False, 0, -1, 1, 3.5, -1e308, 2 ** 31, 2 ** 63, 10 ** 30, float("nan"), float("inf"), "", "x",
       "\ud800", "a\0b", "../../x", "/etc/passwd", "\n", [], {}, [[]], [None], [1] * 50, {"": None}, "9" * 400,
       {"rope_type": "linear"}, "x" * 5000]


# ---- damage ----------------------------------------------------------------------------------------------------


def nodes(value, found):
    """Every (container, key) of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def damaged_json(raw: bytes, chance) -> bytes:
    """A few entries of a JSON text replaced by odd ones, removed, or doubled."""
    value = json.loads(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = nodes(value, [])
        if not places:
            break
        at, key = chance.choice(places[:400] if chance.random() < 0.5 else places)
        kind = chance.randrange(4)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, list):
            at.insert(key, at[key])
        elif kind == 2:
            at[key] = chance.choice(places)[0]
            try:
                json.dumps(value)
            except ValueError:                               # it now holds itself
                at[key] = None
        else:
            at[key] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(value).encode()


def damaged_lines(raw: bytes, chance) -> bytes:
    lines = raw.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = damaged_json(lines[at], chance)
    return b"\n".join(lines) + b"\n"


def near(value, chance):
    """A value of the same type that a writer may have meant, or an odd one."""
    if chance.random() < 0.3:
        return copy.deepcopy(chance.choice(ODD))
    if isinstance(value, bool) or value is None:
        return chance.choice((True, False, None))
    if isinstance(value, (int, float)):
        return chance.choice((value + 1, value - 1, -value, 2 * value, value // 2, float(value), 0, 2 ** 32, 2 ** 63))
    if isinstance(value, str):
        return chance.choice((value.upper(), value[:-1], value * 2, f" {value}", value + "\0", "\ufeff" + value))
    return chance.choice(([value], [], {}, None)) if isinstance(value, list) else {**value, "one more": 1}


def json_with_one_field(raw: bytes, chance) -> bytes:
    value = json.loads(raw)
    at, key = chance.choice(nodes(value, []))
    at[key] = near(at[key], chance)
    return json.dumps(value).encode()


def line_with_one_field(raw: bytes, chance) -> bytes:
    lines = raw.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = chance.choice((json_with_one_field(lines[at], chance), b"", lines[-1], b"\xef\xbb\xbf" + lines[at]))
    return b"\n".join(lines) + b"\n"


NPY_FIELDS = {rb"'<[a-z]\d+'": (b"'<u8'", b"'>i4'", b"'<f4'", b"'|O'", b"'<U1'", b"'|b1'", b"[('x', '<u2')]", b"3"),
              rb"\((\d+),\)": (b"(0,)", b"(1,)", b"(11,)", b"(13,)", b"(3, 4)", b"()", b"(-1,)", b"(9999999999,)",
                               b"[12]"),
              rb"False": (b"True ", b"None ", b"0    "), rb"'descr'": (b"'Descr'", b'"descr"', b"b'des'"),
              rb"\x93NUMPY\x01": (b"\x93NUMPY\x02", b"\x93NUMPY\x03", b"\x93NUMPY\x04")}


def npy_with_one_field(raw: bytes, chance) -> bytes:
    """Another type, shape, order or version in the header, or another value among the events."""
    pattern = chance.choice([of for of in NPY_FIELDS if re.search(of, raw[:300])] or [b"NUMPY"])
    if pattern == b"NUMPY" or chance.random() < 0.3:
        at = chance.randrange(len(raw) // 2, len(raw))
        return raw[:at] + bytes([chance.choice((0, 1, 2, 127, 128, 255))]) + raw[at + 1:]
    found = re.search(pattern, raw[:300])
    fresh = chance.choice(NPY_FIELDS[pattern])
    old = raw[found.start():found.end()]
    made = raw[:found.start()] + fresh + raw[found.end():]
    if len(fresh) != len(old) and raw[6] == 1:               # the header's length goes with it
        size = struct.unpack_from("<H", raw, 8)[0] + len(fresh) - len(old)
        made = made[:8] + struct.pack("<H", max(0, size)) + made[10:]
    return made


def zip_with_one_member(raw: bytes, chance, change=None) -> bytes:
    """A zip with a member dropped, doubled, renamed, emptied, exchanged, packed otherwise or changed. What is no zip,
    as pickles before torch 1.6, loses a byte."""
    if raw[:2] != b"PK":
        at = chance.randrange(len(raw))
        return raw[:at] + raw[at + 1:]
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at, out, how = chance.randrange(len(members)), io.BytesIO(), zipfile.ZIP_STORED
    name, content = members[at]
    op = chance.randrange(7)
    other = change(content, chance) if change else content[:-1]
    members[at:at + 1] = [[], [(name, content)] * 2, [(name.upper(), content)], [(name, b"")],
                          [(name, chance.choice(members)[1])], [(name, other)], [(name, content)]][op]
    if op == 6:
        how = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # a name twice is meant
        with zipfile.ZipFile(out, "w", how) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, how)       # without the time of day
    return out.getvalue()


def events_with_one_field(raw: bytes, chance) -> bytes:
    return zip_with_one_member(raw, chance, npy_with_one_field) if raw[:2] == b"PK" else npy_with_one_field(raw, chance)


def picture_with_one_field(raw: bytes, chance) -> bytes:
    """A PNG with a chunk dropped, doubled, moved or changed, its check sum right; a JPEG with a segment changed."""
    if raw[:2] == b"\xff\xd8":
        at = chance.choice([found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", raw)])
        return raw[:at + 4] + bytes([chance.randrange(256)]) + raw[at + 5:]
    chunks, at = [], 8
    while at < len(raw):
        size = struct.unpack_from(">I", raw, at)[0]
        chunks.append((raw[at + 4:at + 8], raw[at + 8:at + 8 + size]))
        at += 12 + size
    place, op = chance.randrange(len(chunks)), chance.randrange(4)
    kind, content = chunks[place]
    if op == 3 and content:
        where = chance.randrange(len(content))
        content = content[:where] + bytes([chance.choice((0, 1, 2, 3, 6, 8, 16, 255))]) + content[where + 1:]
    chunks[place:place + 1] = [[], [(kind, content)] * 2, [], [(kind, content)]][op]
    chunks += [(kind, content)] * (op == 2)
    return raw[:8] + b"".join(struct.pack(">I", len(of)) + name + of + struct.pack(">I", zlib.crc32(name + of))
                              for name, of in chunks)


def film_with_one_box(raw: bytes, chance) -> bytes:
    """An mp4 with one field of 32 bits in its tables changed, or a box dropped or doubled; others by bytes."""
    from containers import FOLDERS, boxed, walked
    from test_media import damaged as damaged_bytes
    at = raw.find(b"moov") - 4
    if at < 0:
        return damaged_bytes(raw, chance)
    names = [name for name in (b"mvhd", b"tkhd", b"elst", b"mdhd", b"hdlr", b"stsd", b"stts", b"ctts", b"stsc", b"stsz",
                               b"stco", b"stss", b"trak", b"edts", b"stbl", b"mvex", b"trex") if name in raw[at:]]
    aim, op = chance.choice(names), chance.randrange(6)

    def change(name, content):
        if name != aim:
            return name, content
        if op == 0:
            return None
        if op == 1 or len(content) < 8 or name in FOLDERS:
            return boxed(name, content) * 2
        place = 4 * chance.randrange(min(len(content) // 4, 24))
        old = struct.unpack_from(">I", content, place)[0]
        fresh = chance.choice((0, 1, 2, old + 1, max(0, old - 1), 2 * old, 2 ** 31, 2 ** 32 - 1)) % 2 ** 32
        return name, content[:place] + struct.pack(">I", fresh) + content[place + 4:]
    end = at + struct.unpack_from(">I", raw, at)[0]
    return raw[:at] + walked(raw[at:end], change) + raw[end:]


def tensors_with_one_field(raw: bytes, chance) -> bytes:
    length = struct.unpack_from("<Q", raw)[0]
    header = json_with_one_field(raw[8:8 + length], chance)
    return struct.pack("<Q", len(header)) + header + raw[8 + length:]


ONE_FIELD = {"npy": events_with_one_field, "npz": events_with_one_field, "answers": events_with_one_field,
             "png": picture_with_one_field, "mp4": film_with_one_box, "safetensors": tensors_with_one_field,
             "pickled": zip_with_one_member, "pairs": line_with_one_field, "rows": line_with_one_field,
             **dict.fromkeys(("config", "tokenizer", "dataset", "lookup", "small", "index", "adapter"),
                             json_with_one_field)}


def damaged(kind, raw, chance):
    from test_media import damaged as damaged_bytes
    structured = ONE_FIELD[kind]
    if structured is json_with_one_field and chance.random() < 0.3:
        return damaged_json(raw, chance)
    if structured is line_with_one_field and chance.random() < 0.3:
        return damaged_lines(raw, chance)
    return (structured if chance.random() < 0.5 else damaged_bytes)(raw, chance)


# ---- one kind of file: (sound ones, reader that returns whether there is content) -------------------------------


def npy(folder):
    from test_media import ATTACKS, RunsCommand, check_events, npy_of_dict, npy_of_pickle, small_events

    from weights.events import read_events
    sound = [npy_of_dict(small_events(12) | {"time_start": 1.0}, protocol) for protocol in (2, 3, 4, 5)]
    traps = [npy_of_dict(small_events(12) | {"n": RunsCommand(f"touch {folder / 'canary'}")}, p) for p in (2, 4)]
    traps += [npy_of_pickle(pickled) for name, (pickled, _) in ATTACKS.items() if name != "deep nesting"]
    return "e.npy", sound * 4 + traps, lambda path: check_events(read_events(path))


def npz(folder):
    import numpy
    from test_media import check_events, npy_of_array, npz_of, small_events

    from weights.events import read_events
    rows = numpy.zeros(12, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1")])
    blobs = [npz_of(**small_events(12)), npz_of(True, **small_events(12)), npy_of_array(rows)]
    return "e.npz", blobs, lambda path: check_events(read_events(path))


def png(folder):
    from test_media import check_image, image_bytes, some_image

    from weights.video import read_image
    blobs = [image_bytes(some_image(mode, (40, 30))) for mode in ("RGB", "RGBA", "P", "L", "LA")]
    blobs += [image_bytes(some_image("RGB", (40, 30)), "JPEG"), image_bytes(some_image("CMYK", (40, 30)), "JPEG")]
    return "i.png", blobs, lambda path: check_image(read_image(path))


def mp4(folder):
    import av
    from test_media import check_clip, clip_bytes

    from weights.video import read_video
    blobs = [clip_bytes(folder, f"s{i}.{end}", 12, **more) for i, (end, more) in enumerate((
        ("mp4", {}), ("mkv", {}), ("avi", {}), ("mp4", {"options": {"movflags": "faststart"}}),
        ("mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
        *((("mp4", {"codec": "libx264"}),) if "libx264" in av.codecs_available else ()), ("avi", {"codec": "mjpeg",
                                                                          "pixel_format": "yuvj420p"})))]
    return "v.mp4", blobs, lambda path: check_clip(read_video(path))


def safetensors(folder):
    import torch
    from test_load import make

    from weights.load import open_checkpoint

    def read(path):
        weights = open_checkpoint(path.parent).load("cpu", torch.float32)
        assert weights and all(torch.isfinite(t).all() for t in weights.values())
    make(folder)
    return "model.safetensors", [(folder / "model.safetensors").read_bytes()], read


def config(folder):
    """The config of either side, from the file to an answered request."""
    import shutil

    import torch
    from test_load import CLIP, TEXT, tensors_of, write

    import engine
    import weights.given
    text = {**TEXT, "vocab_size": 576, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": None, "tie_word_embeddings": False}
    both = [{"model_type": "video_llava", "text_config": text, "vision_config": CLIP, "vision_feature_layer": -2,
             "vision_feature_select_strategy": "default", "video_seq_length": 40, "projector_hidden_act": "gelu"},
            {**text, "model_type": "EventChat_llama", "mm_visual_tower": "clip", "vision_config": CLIP,
             "event_feature_adaptor": True, "mm_use_im_patch_token": False, "mm_use_im_start_end": False}]
    for side, raw in zip(("target", "drafter"), both, strict=True):
        write(folder / side, raw, tensors_of(raw))
        shutil.copy(ROOT / "weights/tiny/target/tokenizer.json", folder / side)
    frames = [torch.zeros(32, 32, 3, dtype=torch.uint8)] * 8
    weights.given.read_video = lambda path, count, *_: frames * (count // 8) + frames[:count % 8]
    weights.given.read_image = lambda path: frames[0]
    here = str(ROOT / "README.md")                           # a path that exists; the frames above stand for its pixels

    def read(path):
        raw = path.read_bytes()
        is_target = b"video_llava" in raw[:4000]
        side = folder / ("target" if is_target else "drafter")
        (side / "config.json").write_bytes(raw)
        e = engine.load_engine(None, side, "cpu") if is_target else engine.load_engine(side, None, "cpu")
        try:
            asked = {"video_path": here, "mode": "target_only"} if is_target else {"event_image_path": [here],
                                                                                  "mode": "drafter_only"}
            ids = e.generate(query="a", max_new_tokens=2, **asked).output_ids
            assert ids
            if is_target:
                drafts = engine.Fixed([*ids, 5, 6])
                again = e.generate(query="a", max_new_tokens=2, **asked | {"mode": "speculative"}, draft_source=drafts)
                assert again.output_ids == ids, "an answer that differs between modes"
        finally:
            for pool in e.threads.values():
                pool.shutdown()
    return "config.json", [json.dumps(raw).encode() for raw in both], read


def answers(folder):
    """Recordings from the file to the answers of the embedded pair, which no event can change."""
    from test_media import npy_of_dict, npz_of, small_events

    import engine
    import weights.given
    e = engine.load_engine(ROOT / "weights/tiny/drafter", ROOT / "weights/tiny/target", "cpu", gate=False)
    clip = ROOT / "weights/tiny/clips/mp4/scenes/000000.mp4"
    frames = weights.given.read_video(clip, 8)
    weights.given.read_video = lambda *_: frames
    asked = {"video_path": clip, "query": "a", "max_new_tokens": 3}
    wanted = e.generate(mode="target_only", **asked).output_ids

    def read(path):
        found = e.generate(mode="speculative", event_path=path, draft_source="drafter", **asked)
        assert found.output_ids == wanted, "an answer that differs between modes"
    return "e.npz", [npz_of(**small_events(12)), npy_of_dict(small_events(12))], read


def small(folder):
    """generation_config.json and preprocessor_config.json beside a sound checkpoint."""
    from test_load import make

    from weights.load import open_checkpoint, stop_ids
    make(folder / "c", "video_llava")
    blobs = {"generation_config.json": {"eos_token_id": [2, 5], "bos_token_id": 1, "num_beams": 1, "do_sample": False},
             "preprocessor_config.json": {"do_resize": True, "size": {"shortest_edge": 28}, "resample": 3,
                                          "crop_size": {"height": 28, "width": 28},
                                          "image_mean": [0.48145466, 0.4578275, 0.40821073]}}

    def read(path):
        raw = path.read_bytes()
        for name in blobs:
            (folder / "c" / name).unlink(missing_ok=True)
        name = "preprocessor_config.json" if b"resample" in raw or b"crop_size" in raw else "generation_config.json"
        (folder / "c" / name).write_bytes(raw)
        checkpoint = open_checkpoint(folder / "c")
        assert all(type(i) is int and 0 <= i < 40 for i in stop_ids(folder / "c", checkpoint.config))
    return "s.json", [json.dumps(of).encode() for of in blobs.values()], read


def index(folder):
    from test_load import make

    from weights.load import INDEX, open_checkpoint
    make(folder / "c", shards=3)

    def read(path):
        (folder / "c" / INDEX).write_bytes(path.read_bytes())
        checkpoint = open_checkpoint(folder / "c")
        assert {file.parent for file in checkpoint.files} == {folder / "c"}
    return "i.json", [(folder / "c" / INDEX).read_bytes()], read


def adapter(folder):
    from common import save_adapter

    from weights import adapter as of
    config = of.AdapterConfig(vocab=40, rows=16, width=8, layers=1, heads=2, hidden=8)
    save_adapter(folder / "a", of.TokenAdapter(config), config)

    def read(path):
        (folder / "a/config.json").write_bytes(path.read_bytes())
        network, found = of.load(folder / "a")
        assert all(0 <= i < found.vocab for i in of.guess(network, found, [3, 4], [6], 4))
    return "a.json", [(folder / "a/config.json").read_bytes()], read


def tokenizer(folder):
    from weights.text import Text

    def read(path):
        text = Text(path)
        assert text.ids("USER: what is there?") and isinstance(text.decode([5, 300, 511, 9999]), str)
    return "tokenizer.json", [(ROOT / "weights/tiny/target/tokenizer.json").read_bytes()], read


def dataset(folder):
    from weights.dataset import read_dataset
    for kind in ("event_npy", "mp4", "event_image"):
        (folder / kind / "a").mkdir(parents=True)
    for name in ("event_npy/a/0.npy", "mp4/a/0.mp4", "event_image/a/0.png"):
        (folder / name).touch()
    turns = [{"from": "human", "value": "<event>\nWhat is there?"}, {"from": "gpt", "value": "A car."}]
    records = [{"id": i, "event_data": "a/0.npy", "video_data": "a/0", "split": "test", "conversations": turns}
               for i in range(3)]
    records += [{"id": "i", "event_image": ["a/0.png"] * 5, "mp4_data": "a/0.mp4", "conversations": turns}]

    def read(path):
        samples, problems = read_dataset(path.parent, None, -1)
        assert samples and all(line.isprintable() for line in problems)
        for sample in samples:
            for file in (sample.video, *(sample.events if isinstance(sample.events, list) else [sample.events])):
                assert file.resolve().is_relative_to(folder.resolve().parent), file
    return "EventGPT_Instruction_Subset.json", [json.dumps(records).encode()], read


def pairs(folder):
    from pairs import read_pairs

    from weights import controls
    rows = [{"src": "s", "seq": f"q{i % 2}", "clip": f"{i:03}", "question": "q", "videollava_ids": [5, 6, 7 + i % 2, 2],
             "eventgpt_ids": [5, 9, 2]} for i in range(6)]

    def read(path):
        found = read_pairs(path, "s")
        assert found and controls.beside([[row["target"] for row in found]], 5, 2)
    return "p.jsonl", ["\n".join(map(json.dumps, rows)).encode()], read


def lookup(folder):
    from weights.sources import Lookup
    source = Lookup()
    for ids in ([1, 2, 3], [2, 3, 4, 5]):
        source.learn(ids)
    source.save(folder / "sound.json")

    def read(path):
        loaded = Lookup.load(path)
        loaded.learn([1, 2, 3])
        assert all(isinstance(i, int) for answer in loaded.answers for i in answer), "holds what is no id"
    return "m.json", [(folder / "sound.json").read_bytes()], read


def rows(folder):
    from test_bench import HEAD, three_samples

    import bench
    lines = [HEAD, *three_samples()]

    def read(path):
        report = bench.merged([path])
        assert report["samples"] and bench.screen(report) and bench.details(report)
    return "r.jsonl", ["\n".join(map(json.dumps, lines)).encode() + b"\n"], read


def pickled(folder):
    """Torch files through the converter."""
    import torch
    from test_media import RunsCommand

    from weights.convert import convert
    blobs = []
    for content in ({"a": torch.ones(3, 4), "b": torch.arange(5)}, {"model": {"w": torch.ones(2)}, "epoch": 3},
                    {"a": torch.ones(2), "n": RunsCommand(f"touch {folder / 'canary'}")}):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            blobs.append(buffer.getvalue())

    def read(path):
        for made in convert(path):
            assert made.stat().st_size > 8
            made.unlink()
    return "w.bin", blobs, read


KINDS = {"npy": npy, "npz": npz, "png": png, "mp4": mp4, "safetensors": safetensors, "config": config,
         "tokenizer": tokenizer, "dataset": dataset, "pairs": pairs, "lookup": lookup, "rows": rows, "pickled": pickled,
         "small": small, "index": index, "adapter": adapter, "answers": answers}


# ---- the child -------------------------------------------------------------------------------------------------


def peak_mb() -> float:
    """The most this process ever held. Not ru_maxrss: a child starts with its parent's, which hides its own growth."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def child(kind: str, first: int, last: int, folder: Path) -> None:
    """Tries the seeds first..last-1, and keeps its tally in `folder`/tally, so that a crash loses none of it."""
    from weights import InputError
    warnings.simplefilter("error")                           # a warning would be a second line on the user's screen
    name, blobs, read = KINDS[kind](folder)
    path = folder / name
    for blob in blobs[:8]:                                   # a sound file first: the baseline has every library loaded
        path.write_bytes(blob)
        try:
            read(path)
        except InputError:
            pass
    damaged(kind, blobs[0], random.Random(0))
    base, tally = peak_mb(), dict.fromkeys(COLUMNS, 0) | {"slowest": 0.0, "peak": 0.0, "notes": []}
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 * MEGABYTES << 20), hard))         # addresses, not pages
    for seed in range(first, last):
        chance = random.Random(f"{kind} {seed}")
        path.write_bytes(damaged(kind, blobs[seed % len(blobs)], chance))
        tally["seed"] = seed
        save(folder, tally)
        began = time.perf_counter()
        try:
            read(path)
            tally["accepted"] += 1
        except InputError as error:
            tally["refused"] += 1
            if not str(error).isprintable() or not str(error):
                note(tally, "foreign", seed, "not one line")
        except AssertionError as error:
            note(tally, "empty", seed, error)
        except BaseException as error:
            note(tally, "foreign", seed, error)
        tally["slowest"] = max(tally["slowest"], (time.perf_counter() - began) * 1e3)
        tally["peak"] = max(0.0, peak_mb() - base)
        if (folder / "canary").exists():
            note(tally, "executed", seed, "the canary exists")
            (folder / "canary").unlink()
    save(folder, tally | {"seed": last})


def note(tally, column, seed, what):
    tally[column] += 1
    if len(tally["notes"]) < 5:
        where = ""
        if isinstance(what, BaseException) and what.__traceback__:
            at = what.__traceback__
            while at.tb_next:
                at = at.tb_next
            where = f" at {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        tally["notes"].append(ascii(f"{column}, seed {seed}: {type(what).__name__}: {str(what)[:150]}{where}")[1:-1])


def save(folder, tally):
    text = json.dumps(tally).encode()
    with open(folder / "tally", "r+b" if (folder / "tally").exists() else "wb") as file:
        file.write(text.ljust(4096))                         # one page, in place: cheap enough for every mutation


# ---- the parent ------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Imports what every child would import for seconds. A process that forks has one thread and no tensor yet."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("bench", "engine", "test_bench", "test_load", "test_media"):
        importlib.import_module(name)


class Child:
    """A fork of this process that calls `work` and ends; stderr: the file for what it says."""

    def __init__(self, work, stderr):
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(stderr.fileno(), 2)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self, options=os.WNOHANG):
        """Its exit code, a signal's as a negative number; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        return self.poll(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def fuzz(kind: str, first: int, count: int) -> dict:
    """The tally of one kind, over as many children as it takes, forked from this process."""
    total = dict.fromkeys(COLUMNS, 0) | {"slowest": 0.0, "peak": 0.0, "notes": []}
    at, end = first, first + count
    while at < end:
        with tempfile.TemporaryDirectory() as name:
            folder, stop = Path(name), min(at + BATCH, end)
            with open(folder / "stderr", "w+") as stderr:
                code = watched(Child(functools.partial(child, kind, at, stop, folder), stderr), folder)
                stderr.seek(0)
                said = stderr.read()[-300:]
            try:
                tally = json.loads((folder / "tally").read_text())
            except (OSError, ValueError):
                raise SystemExit(f"fuzz: {kind}: the child ended with {code} before its first file: {said}") from None
        for column in COLUMNS:
            total[column] += tally[column]
        for column in ("slowest", "peak"):
            total[column] = max(total[column], tally[column])
        total["notes"] += tally["notes"]
        if code:
            total["signals"] += 1
            total["notes"].append(f"signals, seed {tally['seed']}: child ended with {code}")
        at = tally["seed"] + bool(code)
    return total


def watched(process, folder) -> int:
    """Its exit code; killed if its tally stands still for SECONDS of its own time, or ten times as long on the clock:
    on a busy machine a child may wait for its turn."""
    def own_time():
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:                                      # it has just ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    seen, since = None, (own_time(), time.monotonic())
    while process.poll() is None:
        time.sleep(0.05)
        try:
            now = (folder / "tally").stat().st_mtime_ns
        except OSError:
            now = None
        if now != seen:
            seen, since = now, (own_time(), time.monotonic())
        elif own_time() - since[0] > SECONDS or time.monotonic() - since[1] > 10 * SECONDS:
            process.kill()
    return process.wait()


def violations(tally: dict) -> bool:
    return any(tally[column] for column in COLUMNS[2:]) or tally["peak"] > MEGABYTES


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=500, help="of each kind (default %(default)s)")
    parser.add_argument("--kind", default=",".join(KINDS), help="comma list of %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    options = parser.parse_args(argv)
    insist_whole("--mutations", options.mutations, 1)
    unknown = set(options.kind.split(",")) - set(KINDS)
    if unknown:
        parser.error(f"--kind: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    prepare()
    print(f"{'kind':12} {'mutations':>9} " + " ".join(f"{name:>8}" for name in COLUMNS) + "  slowest ms  peak MB")
    failed = False
    for kind in options.kind.split(","):
        tally = fuzz(kind, options.seed, options.mutations)
        print(f"{kind:12} {options.mutations:9} " + " ".join(f"{tally[name]:8}" for name in COLUMNS)
              + f" {tally['slowest']:11.1f} {tally['peak']:8.1f}", flush=True)
        for line in tally["notes"][:8]:
            print(f"  {line}")
        failed |= violations(tally)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
