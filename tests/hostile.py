"""hostile: the 72 bad inputs that a user, a broken copy or an attacker gives, each written to disk on demand.

    for name, make in CASES.items():        # "06 os.system": row 6 of the list
        case = make(folder)                 # writes what it needs under `folder`
        case.call(engine)                   # the library: InputError, unless case.exit is 0
        bench.main(case.flags)              # the command line: case.exit

`python tests/hostile.py FOLDER` writes them all, a folder each, and prints the flags that try them."""

import contextlib
import fcntl
import json
import os
import shutil
import struct
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy
import test_load
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_media import (
    ATTACKS,
    BAD_EVENTS,
    BAD_IMAGES,
    BAD_VIDEOS,
    RunsCommand,
    clip_bytes,
    image_bytes,
    npy_of_array,
    npy_of_dict,
    npy_of_pickle,
    npz_of,
    picture,
    small_events,
    some_image,
)

import bench
import engine
import weights.given
import weights.load
import weights.memory
from engine import InputError
from weights import convert
from weights.dataset import read_dataset
from weights.events import read_events
from weights.files import Parser, command
from weights.video import read_image, read_video

TINY = bench.TINY
RECORDS = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())
QUICK = ["--repeats", "1", "--warmup", "0", "--max-new-tokens", "2", "--device", "cpu"]


@dataclass
class Case:
    """One bad input, written. `exit`: 2 refused at once, 1 a sample fails and the others run, 0 accepted by a rule."""
    call: object                            # (engine) -> anything; raises InputError unless exit is 0
    flags: list                             # of bench.py
    words: list = field(default_factory=list)       # parts of the one line
    exit: int = 2
    patch: object = None                    # (monkeypatch) -> None: what happens to the machine meanwhile


# ---- builders --------------------------------------------------------------------------------------------------


def dataset(folder, **bad):
    """A data set of two records, the first with `bad` keys and the second sound; its flags."""
    clips = folder / "data"
    for kind, key, ending in (("event_npy", "event_data", ".npz"), ("mp4", "mp4_data", ".mp4")):
        (clips / kind / "good").mkdir(parents=True, exist_ok=True)
        shutil.copy(TINY / "clips" / kind / RECORDS[0][key], clips / kind / "good" / f"0{ending}")
    (clips / "event_image").mkdir(exist_ok=True)
    good = {"id": "good", "event_data": "good/0.npz", "mp4_data": "good/0.mp4",
            "conversations": [{"from": "human", "value": "What is there?"}, {"from": "gpt", "value": "A shape."}]}
    record = {k: v for k, v in {**good, "id": "bad", **bad}.items() if v != "gone"}
    listing(folder, [record, good])
    return ["--dataset-dir", str(clips), *QUICK]


def listing(folder, content):
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path = folder / "data" / "EventGPT_Instruction_Subset.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return path


def events(blob, *words, name="bad.npy", exit=1):
    """A recording: bytes, or a function of its path that puts something there."""
    def make(folder):
        flags = dataset(folder, event_data=name)
        path = folder / "data" / "event_npy" / name
        blob(path) if callable(blob) else path.write_bytes(blob)
        return Case(lambda e: read_events(path), [*flags, "--modes", "drafter_only"], list(words), exit)
    return make


def video(blob, *words, name="bad.mp4", exit=1, patch=None):
    """A video: bytes, or a function of its path that puts something there."""
    def make(folder):
        flags = dataset(folder, mp4_data=name)
        path = folder / "data" / "mp4" / name
        blob(path) if callable(blob) else path.write_bytes(blob)
        return Case(lambda e: read_video(path), [*flags, "--modes", "target_only"], list(words), exit,
                    patch and (lambda monkeypatch: patch(monkeypatch, path)))
    return make


def of_table(entry):
    """A maker of test_media's BAD_VIDEOS, which wants a folder to work in."""
    make, words = entry
    return video(lambda path: path.write_bytes(make(path.parent)), *words)


def image(blob, *words, exit=1):
    def make(folder):
        flags = dataset(folder, event_data="gone", event_image=["bad.png"])
        path = folder / "data" / "event_image" / "bad.png"
        path.write_bytes(blob)
        return Case(lambda e: read_image(path), [*flags, "--modes", "drafter_only"], list(words), exit)
    return make


def checkpoint(name):
    """A broken folder of test_load's table, as the target."""
    kind, shards, spoil, words = test_load.BAD[name]

    def make(folder):
        path = test_load.make(folder / "checkpoint", kind, shards)
        spoil(path)
        return Case(lambda e: weights.load.open_checkpoint(path), pair_flags(target=path), words)
    return make


def pair_flags(drafter=TINY / "drafter", target=TINY / "target"):
    return ["--eventgpt", str(drafter), "--videollava", str(target), *QUICK, "--modes", "target_only", "--max-samples",
            "1"]


def own_target(folder, spoil):
    """A copy of the embedded target after `spoil(its tensors)`."""
    path = folder / "target"
    shutil.copytree(TINY / "target", path)
    tensors = load_file(path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def tokenizer(content, *words):
    def make(folder):
        path = folder / "tokenizer.json"
        raw = json.loads((TINY / "target" / "tokenizer.json").read_text())
        path.write_text(content if isinstance(content, str) else json.dumps(content(raw)))
        return Case(lambda e: engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", tokenizer=path),
                    [*pair_flags(), "--tokenizer", str(path)], [str(path), *words])
    return make


def request(change, flags, *words, exit=2):
    """Arguments: a change to a sound request, and the flags that say the same."""
    def make(folder):
        given = {"event_path": TINY / "clips/event_npy" / RECORDS[0]["event_data"], "max_new_tokens": 2,
                 "video_path": TINY / "clips/mp4" / RECORDS[0]["mp4_data"], "query": "What is there?"} | change
        return Case(lambda e: e.generate(**given), [*QUICK, "--max-samples", "1", "--modes", "target_only,speculative",
                                                    *flags], list(words), exit)
    return make


def record(*words, exit=1, **bad):
    """A listed record with wrong keys beside a sound one."""
    def make(folder):
        return Case(first_problem(folder), [*dataset(folder, **bad), "--modes", "target_only"], list(words), exit)
    return make


def whole_list(content, *words, exit=2):
    """The list of records itself."""
    def make(folder):
        flags = dataset(folder)
        path = listing(folder, content)
        return Case(first_problem(folder), flags, [str(path), *words], exit)
    return make


def first_problem(folder):
    def call(_):
        _, problems = read_dataset(folder / "data", None, -1)
        if problems:
            raise InputError(problems[0])
    return call


def run(flags, *words):
    """A command line that is refused for an output, a shard or a saved file. flags: (folder) -> list."""
    def make(folder):
        given = flags(folder)
        given = given if "--merge" in given else [*QUICK, "--modes", "target_only", "--max-samples", "1", *given]

        def call(_):
            options = bench.parse(given)
            bench.run(options, "bench.py")
        return Case(call, given, list(words))
    return make


# ---- what the builders are given -------------------------------------------------------------------------------


def sparse(nbytes, head=b""):
    def put(path):
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(nbytes)
    return put


def os_system(path):
    """A recording that would create `canary` beside the data set."""
    canary = path.parents[2] / "canary"
    path.write_bytes(npy_of_dict(small_events() | {"note": RunsCommand(f"touch {canary}")}))


def rows(num_events, **values):
    """A structured array with every field under its own name and type."""
    array = numpy.zeros(num_events, [(key, value.dtype) for key, value in values.items()])
    for key, value in values.items():
        array[key] = value
    return array


def denied(monkeypatch, path):
    """No permission, for root as well."""
    real = open

    def refusing(name, *args, **kwargs):
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *args, **kwargs)
    monkeypatch.setattr("builtins.open", refusing)


def ten_hours(path):
    """An .avi whose header announces 1,080,000 frames."""
    blob = bytearray(clip_bytes(path.parent, "long.avi", 9))
    at = blob.index(b"strh") + 8 + 32                        # dwLength of the stream's header
    assert struct.unpack("<I", blob[at:at + 4])[0] == 9
    blob[at:at + 4] = struct.pack("<I", 1_080_000)
    path.write_bytes(blob)


def table_bomb(name, at, value):
    """An .mp4 of 2 KB with 80 million samples announced in one table; FFmpeg would take 2 GB to open it."""
    def put(path):
        blob = bytearray(clip_bytes(path.parent, "t.mp4", 12, options={"movflags": "frag_keyframe+empty_moov"} if
                                    name == b"trun" else {}))
        at_count = blob.index(name) + at
        blob[at_count:at_count + len(value)] = value
        path.write_bytes(blob)
    return put


def unsteady(path, sizes=((64, 48), (96, 80))):
    """Motion JPEG whose pictures change their size halfway."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
        container.start_encoding()
        for number in range(12):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = sizes[number // 6]
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
            for packet in encoder.encode(picture(number, *sizes[number // 6]).reformat(format="yuvj420p")):
                packet.stream, packet.pts, packet.dts = stream, number, number
                packet.time_base = encoder.time_base
                container.mux(packet)


def uneven(path):
    """Frames at the times 0, 1, 2, 50, 51, 400, ...: a camera that stalls."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for number, pts in enumerate((0, 1, 2, 50, 51, 400, 401, 402, 403, 1000)):
            frame = picture(number, 64, 48)
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def odd_title(path):
    with av.open(str(path.with_suffix(".mkv")), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(picture(0, 64, 48)))
        container.mux(stream.encode())
    path.write_bytes(path.with_suffix(".mkv").read_bytes().replace(b"TITLETITLE", b"\xff\xfe" * 5))


def renamed(name, num_frames, **options):
    """A sound clip in another container or codec under the name bad.mp4."""
    return lambda path: path.write_bytes(clip_bytes(path.parent, name, num_frames, **options))


def vanishes(folder):
    """A video that was there when the request came in, and is gone when it is read."""
    case = video(renamed("a.mp4", 9), "no such file")(folder)
    path = folder / "data" / "mp4" / "bad.mp4"
    sound = dict(query="What is there?", max_new_tokens=2, mode="target_only")
    case.call = lambda e: e.generate(video_path=path, **sound)

    def patch(monkeypatch):
        real = weights.given.read_video

        def read(name, *args, **kwargs):
            if Path(name) == path:
                path.unlink(missing_ok=True)
            return real(name, *args, **kwargs)
        monkeypatch.setattr("weights.given.read_video", read)
    case.patch = patch
    return case


def pickled(content, wanted):
    """A folder whose only weights are a pickle that wants something built; the converter names it and does not."""
    def make(folder):
        path = test_load.make(folder / "checkpoint")
        (path / "model.safetensors").unlink()
        torch.save(content(folder), path / "pytorch_model.bin")

        def call(_):
            try:
                convert.convert(path)
            except InputError as error:
                assert f"asks to build {wanted}, refused" in str(error) and "weights_only" not in str(error), error
                raise
        return Case(call, pair_flags(target=path), [str(path)])
    return make


class Settings:
    """What a training script pickles beside its tensors."""


def nan_inside(folder):
    path = own_target(folder, lambda t: t["language_model.lm_head.weight"][3].fill_(float("nan")))
    return Case(lambda e: engine.load_engine(None, path, device="cpu"), pair_flags(target=path),
                ["NaN or infinity in 1 tensor", "lm_head"])


def disk_fails(folder):
    path = own_target(folder, lambda t: None)

    def patch(monkeypatch):
        real = weights.load.open_weights

        def fails(name):
            opened = real(name)
            if Path(name).parent == path:
                os.truncate(name, 1_000_000)
            return opened
        monkeypatch.setattr(weights.load, "open_weights", fails)
    return Case(lambda e: weights.load.open_checkpoint(path).load("cpu", torch.float32), pair_flags(target=path),
                ["model.safetensors", "bytes", "check the disk"], patch=patch)


def little_memory(folder):
    def patch(monkeypatch):
        monkeypatch.setattr(weights.memory, "free_bytes", lambda device: (6 << 30, 8 << 30))
    return Case(lambda e: engine.load_engine("random-7b", "random-7b", device="cpu"),
                [*QUICK, "--weights", "random-7b"],
                ["6.442 of 8.590 GB free", "held by", "(pid ", "the float32 target needs 29.4 GB", "choose another"],
                patch=patch)


def saved_source(folder, kind="lookup", ids=(5, 6), model=None, cut=0):
    """`KIND:FILE` of a file that a Lookup of the embedded target saved, with something wrong about it."""
    source, path = engine.Lookup(model or engine.model_name(TINY / "target")), folder / "m.json"
    source.answers.append(list(ids))                         # unchecked
    source.save(path)
    path.write_bytes(path.read_bytes()[:-cut or None])
    return f"{kind}:{path}"


def saved_rows(folder, name, **head):
    """A finished row file of one sample."""
    path = folder / name
    config = {"samples": 1, "modes": ["target_only"], "overlap_len": 15}
    path.write_text(json.dumps({"schema": 1, "commit": "a", "weights": {}, "config": config, **head}) + "\n"
                    + json.dumps({"id": name, "at": 0, "modes": {}}) + "\n")
    return str(path)


def two_writers(folder):
    path = folder / "rows.jsonl"
    case = run(lambda _: ["--rows", str(path), "--resume"], str(path), "another run")(folder)

    def patch(monkeypatch):
        other = open(path, "ab")
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(bench, "_other_run", other, raising=False)       # held until the test is over
    case.patch = patch
    return case


def special_names(folder):
    question = "<video> <image> </s> <event> <unk>"
    case = request({"query": question}, ["--question", question], exit=0)(folder)
    special = {0, 1, 2, *range(512, 576)}

    def call(e):
        assert not special & set(e.target.text.ids(question)), "typed text became a special id"
        return e.generate(query=question, mode="target_only", max_new_tokens=2,
                          video_path=TINY / "clips/mp4" / RECORDS[0]["mp4_data"])
    case.call = call
    return case


def bad_among_good(folder):
    """The embedded clips with one video broken."""
    shutil.copytree(TINY / "clips", folder / "data")
    path = folder / "data" / "mp4" / RECORDS[4]["mp4_data"]
    path.write_bytes(path.read_bytes()[:900])
    return Case(lambda e: read_video(path), ["--dataset-dir", str(folder / "data"), *QUICK, "--modes",
                                                   "target_only"], [str(path)], 1)


def attack(name):
    return events(npy_of_pickle(ATTACKS[name][0]), *ATTACKS[name][1])


def bad_events(name, as_name="bad.npy"):
    return events(BAD_EVENTS[name][0], *BAD_EVENTS[name][1], name=as_name)


LONG = "x" * 300
MANY = small_events(2000, x=">u2", t=">i8")
CASES = {
    # events
    "01 missing": events(lambda path: path.with_name("bad2.npy").touch(), "no such file"),
    "01 missing with its folder": events(lambda path: None, "no such file", name="none/bad.npy"),
    "01 name too long": events(lambda path: None, "too long", name=f"{LONG}.npy"),
    "02 folder": events(lambda path: path.mkdir(), "is a folder, wanted an .npy"),
    "03 empty": bad_events("empty"),
    "04 text": bad_events("text"),
    "05 web page": bad_events("web page"),
    "05 LFS pointer": bad_events("LFS pointer"),
    "06 os.system": events(os_system, "posix.system", "refused"),
    "07 eval": attack("eval"),
    "07 numpy.f2py": attack("f2py"),
    "08 memo bomb": attack("memo bomb"),
    "09 terabyte": attack("1 TB of bytes"),
    "10 nesting": attack("deep nesting"),
    "11 truncated in the array": bad_events("truncated in an array"),
    "12 key missing": bad_events("missing key"),
    "12 extra keys": events(npy_of_dict(small_events() | {"time_start": 1}), exit=0),
    "13 unequal lengths": bad_events("unequal lengths"),
    "14 no events": bad_events("no events"),
    "15 float coordinates": bad_events("float coordinates"),
    "15 NaN time": bad_events("NaN time"),
    "16 stray coordinate": bad_events("stray coordinate"),
    "17 negative": bad_events("negative x"),
    "18 time runs backwards": events(npy_of_dict(small_events() | {"t": numpy.arange(20)[::-1].astype("i8")}), exit=0),
    "19 polarity -1 and 1": events(npy_of_dict(small_events() | {"p": numpy.tile([-1, 1], 10).astype("i1")}), exit=0),
    "20 two seconds": events(npy_of_dict(small_events() | {"t": numpy.linspace(0, 2e6, 20).astype("i8")}), exit=0),
    "21 big-endian": events(npz_of(**MANY), name="bad.npz", exit=0),
    "21 structured": events(npy_of_array(rows(20, **small_events())), exit=0),
    "21 Fortran order": events(npy_of_dict(small_events() | {"x": numpy.zeros((4, 5), "u2", "F")}), "(4, 5)"),
    "22 two gigabytes": events(sparse(2 ** 31, b"\x93NUMPY"), "2147483648 bytes"),
    "23 HDF5": bad_events("HDF5", "bad.h5"),
    "23 raw": bad_events("Prophesee", "bad.raw"),
    "23 AEDAT4": bad_events("AEDAT4", "bad.aedat4"),
    # video
    "24 missing": video(lambda path: None, "no such file"),
    "24 folder": video(lambda path: path.mkdir(), "is a folder"),
    "24 no permission": video(renamed("a.mp4", 9), "Permission denied", patch=denied),
    "25 empty": video(b"", "0 bytes"),
    "25 random": of_table(BAD_VIDEOS["random"]),
    "25 text": of_table(BAD_VIDEOS["text"]),
    "26 no index": of_table(BAD_VIDEOS["mp4 without index"]),
    "27 truncated fast-start": of_table(BAD_VIDEOS["truncated fast-start"]),
    "28 truncated fragmented": of_table(BAD_VIDEOS["truncated fragmented"]),
    "29 header only": of_table(BAD_VIDEOS["only an mkv header"]),
    "29 sound only": of_table(BAD_VIDEOS["sound only"]),
    "30 no frame count": video(renamed("a.mkv", 12), exit=0),
    "31 one frame": video(renamed("a.mp4", 1), exit=0),
    "31 seven frames": video(renamed("a.mp4", 7), exit=0),
    "32 ten hours": video(ten_hours, exit=0),
    "32 fragment table": video(table_bomb(b"trun", 8, struct.pack(">I", 80_000_000)), "4000000 samples"),
    "32 size table": video(table_bomb(b"stsz", 8, struct.pack(">II", 1, 80_000_000)), "4000000 samples"),
    "32 8K": video(renamed("a.avi", 1, codec="mjpeg", size=(7680, 4320), pixel_format="yuvj420p"), "7680 x 4320"),
    "33 ten bits": video(renamed("a.mkv", 9, codec="ffv1", pixel_format="yuv420p10le"), exit=0),
    "33 grey": video(renamed("a.mkv", 9, codec="ffv1", pixel_format="gray"), exit=0),
    "34 unknown codec": of_table(BAD_VIDEOS["unknown codec"]),
    "35 concat list": of_table(BAD_VIDEOS["playlist named mp4"]),
    "35 m3u": of_table(BAD_VIDEOS["m3u playlist named mp4"]),
    "36 address": video(lambda path: None, "no such file", name="http://127.0.0.1:9/a.mp4"),
    "36 address in a request": request({"video_path": "http://127.0.0.1:9/a.mp4"}, ["--dataset-dir", "http://a/b"],
                                       "http:"),
    "37 uneven times": video(uneven, exit=0),
    "38 size changes": video(unsteady, "change size", name="bad.avi"),
    "39 invalid metadata": video(odd_title, exit=0),
    "40 vanishes": vanishes,
    # images
    "41 truncated PNG": image(*[BAD_IMAGES["truncated PNG"][0], *BAD_IMAGES["truncated PNG"][1]]),
    "41 truncated JPEG": image(*[BAD_IMAGES["truncated JPEG"][0], *BAD_IMAGES["truncated JPEG"][1]]),
    "42 bomb": image(*[BAD_IMAGES["bomb 20000 x 20000"][0], *BAD_IMAGES["bomb 20000 x 20000"][1]]),
    "43 one pixel": image(image_bytes(Image.new("RGB", (1, 1))), exit=0),
    "43 sliver": image(*[BAD_IMAGES["sliver"][0], *BAD_IMAGES["sliver"][1]]),
    **{f"44 {mode}": image(image_bytes(some_image(mode)), exit=0) for mode in ("P", "RGBA")},
    "44 I;16": image(*[BAD_IMAGES["grey of 16 bits"][0], *BAD_IMAGES["grey of 16 bits"][1]]),
    "44 CMYK": image(image_bytes(some_image("CMYK"), "JPEG"), exit=0),
    "45 rotated": image(image_bytes(some_image("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0"
                                    b"\x01\0\x06\0\0\0\0\0\0"), exit=0),
    "46 GIF named PNG": image(*[BAD_IMAGES["GIF named PNG"][0], *BAD_IMAGES["GIF named PNG"][1]]),
    # weights
    "47 no such folder": lambda folder: Case(lambda e: weights.load.open_checkpoint(folder / "none"),
                                             pair_flags(target=folder / "none"), ["no such folder"]),
    "47 not in the cache": lambda folder: Case(lambda e: weights.load.open_checkpoint("nobody/nothing"),
                                               pair_flags(target="nobody/nothing"), ["hf download nobody/nothing"]),
    **{f"{row} {name}": checkpoint(name) for row, names in {
        48: ("shard missing", "two shards missing"), 49: ("shard truncated", "truncated in the header", "too long"),
        50: ("pointer", "web page"), 51: ("header of a terabyte", "overlap", "unknown dtype", "header no JSON"),
        52: ("key twice", "tensor in two shards"), 53: ("tensor missing", "tensor surplus", "tensor renamed", "lora"),
        54: ("tensor misshapen", "padded vocabulary"), 56: ("bin only",),
        58: ("no config", "config not JSON", "config nested", "other model", "no model_type", "size a string",
             "config a folder")}.items() for name in names},
    "55 NaN inside": nan_inside,
    "57 pickle that calls": pickled(lambda folder: {"a": RunsCommand(f"touch {folder / 'canary'}")}, "posix.system"),
    "57 adapter with a class": pickled(lambda folder: {"a": torch.ones(1), "config": Settings()}, "hostile.Settings"),
    "59 broken": tokenizer("{", "not JSON"),
    "59 no model": tokenizer(lambda raw: {**raw, "model": {"type": "BPE"}}, "not a usable tokenizer"),
    "59 of another model": tokenizer(lambda raw: {**raw, "model": {**raw["model"], "vocab": {
        **raw["model"]["vocab"], **{f"piece {i}": 600 + i for i in range(1000)}}}}, "has 1600 pieces"),
    "60 disk fails": disk_fails,
    # prompts and arguments
    "61 empty question": request({"query": ""}, ["--question", "A?"], exit=0),
    "61 empty flag": run(lambda folder: ["--question", " "], "--question"),
    "61 a million characters": request({"query": "x" * 10 ** 6}, ["--question", "x" * 10 ** 6], "1000000 characters"),
    "62 half a surrogate pair": request({"query": "\ud800"}, ["--question", "\ud800"], "surrogate"),
    "62 NUL": request({"query": "a\0b"}, ["--question", "a\0b"], exit=0),
    "62 bytes": request({"query": b"what"}, ["--question", "\udcff"], "question"),
    "62 None": request({"query": None}, ["--question", ""], "question"),
    "63 special names": special_names,
    **{f"64 {n} new ids": request({"max_new_tokens": n}, ["--max-new-tokens", str(n)], "new") for n in
       (0, -1, 10 ** 9, float("nan"))},
    "64 no drafts": request({"draft_len": 0}, ["--draft-len", "0"], exit=0),
    "64 too many drafts": request({"draft_len": 32}, ["--draft-len", "32"], "31"),
    "65 prompt too long": request({"query": "why " * 400}, ["--question", "why " * 400, "--warmup", "1"],
                                  "cache holds"),
    "65 too many new ids": request({"max_new_tokens": 5000}, ["--max-new-tokens", "5000", "--warmup", "1"],
                                   "cache holds"),
    **{f"66 {name or 'no'} device": run(lambda folder, name=name: ["--device", name], "device") for name in
       ("cuda:9", "tpu", "", "meta", "cuda:x")},
    "67 8 GB": little_memory,
    "67 cache beyond memory": run(lambda folder: ["--cache-rows", str(10 ** 9)], "GB", "cache"),
    "68 no sampling": run(lambda folder: ["--temperature", "nan"], "--temperature"),
    "68 flag without a value": run(lambda folder: ["--repeats"], "--repeats"),
    # data sets
    "69 no list": lambda folder: Case(lambda e: read_dataset(folder, None, -1), ["--dataset-dir", str(folder)],
                                      ["no such file"]),
    "69 dict": whole_list({"id": 1}, "list of records"),
    "69 empty list": whole_list([], "the list is empty"),
    "69 not JSON": whole_list("{", "JSON"),
    "69 nested": whole_list("[" * 10 ** 6, "JSON"),
    "69 not text": whole_list(b"\xff\xfe\0", "not UTF-8"),
    "69 numbers for records": whole_list([1, None, "a"], "record 0", "is a int"),
    "69 no id": record("record 0", "id is null", id="gone"),
    "69 id a list": record("record 0", "id is", id=[1]),
    "69 id not printable": record(id="a\n\ud800\x1b[31m", exit=0),
    "69 id twice": record("twice", id="good"),
    "69 no conversations": record("no question", conversations="gone"),
    "69 conversations a number": record("conversations", conversations=5),
    "69 question a number": record("value is 5", conversations=[{"from": "human", "value": 5}]),
    "69 no events": record("event_data is null", event_data="gone"),
    "69 events a number": record("event_data is 7", event_data=7),
    "69 no video": record("video_data is null", mp4_data="gone"),
    "69 leads out": record("leads out", mp4_data="../../../../../../etc/passwd"),
    "69 absolute": record("leads out", mp4_data="/etc/passwd"),
    "69 NUL in a path": record("cannot be looked up", mp4_data="a\0b"),
    "69 name too long": record("cannot be looked up", mp4_data=LONG),
    "69 images no list": record("event_image", event_data="gone", event_image={"a": 1}),
    "69 link that leads out": lambda folder: linked_out(folder),
    "70 one bad sample": bad_among_good,
    "71 rows are there": lambda folder: run(lambda f: ["--rows", saved_rows(f, "r.jsonl")], "already there")(folder),
    "71 rows of another commit": lambda folder: run(
        lambda f: ["--rows", saved_rows(f, "r.jsonl"), "--resume"], 'commit ("a", here')(folder),
    "71 rows that are none": lambda folder: run(lambda f: ["--rows", str(listing(f, "text\n")), "--resume"],
                                                "a file of rows")(folder),
    "71 report is a folder": run(lambda folder: ["--timeline", str(folder)], "is a folder"),
    "71 rows in no folder": run(lambda folder: ["--rows", str(folder / "no" / "r.jsonl")], "cannot be written"),
    "71 lookup of another model": run(lambda f: ["--draft-source", saved_source(f, model="other")],
                                      "of model 'other'"),
    "71 lookup cut short": run(lambda f: ["--draft-source", saved_source(f, cut=5)], "wanted a saved lookup"),
    "71 lookup of what is no id": run(lambda f: ["--draft-source", saved_source(f, ids=[5, -1])], "no saved lookup"),
    "71 lookup that is a folder": run(lambda f: ["--draft-source", f"lookup:{f}"], "is a folder"),
    "71 lookup in no folder": run(lambda f: ["--draft-source", f"lookup:{f / 'no' / 'm.json'}"], "cannot be written"),
    "71 lookup of many shards": run(lambda f: ["--draft-source", saved_source(f), "--shard", "0/2"], "--shard"),
    "71 memory as it was": run(lambda f: ["--draft-source", saved_source(f, "memory")], "lookup[:FILE]"),
    "72 two writers": two_writers,
    "72 other commits": run(lambda f: ["--merge", saved_rows(f, "a.jsonl"), saved_rows(f, "b.jsonl", commit="b")],
                            "another commit"),
    "72 shard 3 of 2": run(lambda folder: ["--shard", "3/2"], "--shard"),
    "72 merge of nothing": run(lambda folder: ["--merge", str(folder / "none.jsonl")], "no such file"),
}


def linked_out(folder):
    """A link inside the data set that leads far away."""
    flags = dataset(folder, mp4_data="bad.mp4")
    (folder / "data" / "mp4" / "bad.mp4").symlink_to("/etc/passwd")
    return Case(first_problem(folder), [*flags, "--modes", "target_only"], ["leads out"], 1)


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them; made if it is not there")
    options = parser.parse_args(argv)
    for name, make in CASES.items():
        folder = options.folder / name.replace(" ", "_").replace("/", "_")
        folder.mkdir(parents=True)
        with contextlib.suppress(OSError):                   # a name that is too long to be written is one of them
            print(f"{name}: python bench.py {' '.join(make(folder).flags)[:200]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
