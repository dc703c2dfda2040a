"""make_clips: held-out clips in the data-set layout of the repository we come from: events, mp4, questions, answers.

    python -m weights.tiny.make_clips OUT [--count 6] [--davis FOLDER]
    python -m weights.tiny.make_clips OUT --films 1s,20s

OUT/EventGPT_Instruction_Subset.json lists them; events are .npz (x, y, t, p; no pickles), video is H.264. With --davis,
the DAVIS346 traffic recording (events.npz, frames.mp4, frame_times.npz, LICENSE) is cut into three windows as well.
--films makes clips of camera size for timing instead; their events are noise."""

import argparse
import ctypes
import json
import shutil
import struct
import uuid
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import torch

from weights import replace_file
from weights.dataset import LIST
from weights.events import read_events
from weights.tiny import scenes

HELD_OUT = 10_000_000                               # first seed that training never sees


def raw(tensor) -> bytes:
    """The bytes of a CPU tensor's elements. bytes(tensor.untyped_storage()) asks for them one by one, in Python."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def write_events(path, x, y, t, p, compression=zipfile.ZIP_DEFLATED) -> None:
    """An .npz of four plain arrays, with the same bytes on every run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codes = {torch.int16: "<i2", torch.int64: "<i8", torch.uint8: "|u1"}
    arrays = {"x": x.to(torch.int16), "y": y.to(torch.int16), "t": t.to(torch.int64), "p": p.to(torch.uint8)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            shape = f"({len(array)},)"
            header = f"{{'descr': '{codes[array.dtype]}', 'fortran_order': False, 'shape': {shape}, }}"
            header += " " * (-(len(header) + 11) % 64) + "\n"
            member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
            entry = zipfile.ZipInfo(name + ".npy", (2020, 1, 1, 0, 0, 0))
            entry.compress_type = compression
            archive.writestr(entry, member + raw(array))


def rgb_frame(image) -> av.VideoFrame:
    """uint8 [H, W, 3] as a frame to encode; its rows may be longer there."""
    height, row = image.shape[0], image.shape[1] * 3
    frame = av.VideoFrame(image.shape[1], height, "rgb24")
    padded = torch.zeros(height, frame.planes[0].line_size, dtype=torch.uint8)
    padded[:, :row] = image.reshape(height, row)
    frame.planes[0].update(raw(padded))
    return frame


def write_video(path, frames, fps=scenes.FPS, crf=16) -> None:
    """uint8 [T, H, W, 3] as H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    T, height, width, _ = frames.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        for image in frames[:, :stream.height, :stream.width]:
            container.mux(stream.encode(rgb_frame(image)))
        container.mux(stream.encode(None))


BENCH_CLIPS = {     # name: (seconds, (width, height), frames from one keyframe to the next)
    "0.5s": (0.5, (640, 480), 250), "1s": (1, (640, 480), 250), "5s": (5, (640, 480), 250), "20s": (20, (640, 480), 50),
    "20s-one-key": (20, (640, 480), 1000), "60s": (60, (640, 480), 50), "1s-large": (1, (1440, 1080), 250),
    "20s-large": (20, (1440, 1080), 50)}


def write_film(path, seconds, size=(640, 480), keyframe=250, fps=25, codec="libx264", pixel_format="yuv420p", pts=None,
               **options) -> None:
    """A texture that drifts past, with a square that runs across it: the codec has motion and detail to work on.

    pts: the time stamp of frame number n in 1 / fps; options go to the encoder. One slice a picture, as cameras and
    phones write them: x264 left to itself cuts as many as the machine has cores."""
    (width, height), seeded = size, torch.Generator().manual_seed(0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    coarse = torch.randint(0, 256, (1, 3, height // 8 + 40, width // 8 + 40), generator=seeded).float()
    texture = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear").round()
    texture = texture[0].permute(1, 2, 0).to(torch.uint8)
    side = height // 5
    if codec == "libx264":
        options = {"preset": "veryfast", "crf": "23", "sc_threshold": "0", "x264-params": "sliced-threads=0"} | options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(keyframe), **options})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = Fraction(1, fps)
        for number in range(round(seconds * fps)):
            down, right = abs(2 * number % 400 - 200), abs(3 * number % 500 - 250)
            image = texture[down:down + height, right:right + width].contiguous()
            at = 4 * number % (width - side)
            image[side:2 * side, at:at + side] = torch.tensor([255 - number % 200, number % 256, 90], dtype=torch.uint8)
            frame = rgb_frame(image)
            frame.pts, frame.time_base = pts(number) if pts else number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def record(seq, clip, conversations, split="test") -> dict:
    name = f"{seq}/{clip:06d}"
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, "headstart/" + name)), "split": split,
            "event_data": f"{name}.npz", "video_data": name, "mp4_data": f"{name}.mp4", "conversations": conversations}


def make_scenes(out: Path, count: int, first: int = HELD_OUT, seq: str = "scenes", questions=None) -> list[dict]:
    """`count` held-out scenes as files; each asks one question (questions[i], or 0, 1, 2, ...) and knows its answer."""
    records = []
    for i in range(count):
        scene, question = scenes.sample(first + i), questions[i] if questions else i % len(scenes.QUESTIONS)
        frames, events = scenes.film(scene, first + i)
        write_events(out / "event_npy" / seq / f"{i:06d}.npz", *events)
        write_video(out / "mp4" / seq / f"{i:06d}.mp4", frames)
        records.append(record(seq, i, [
            {"from": "human", "value": f"<event>\n{scenes.QUESTIONS[question]}"},
            {"from": "gpt", "value": scenes.answer(scene, question)}]))
    return records


def make_davis(out: Path, source: Path, windows: int = 3) -> list[dict]:
    """The real recording in `windows` equal parts. No answer is known: nothing here was trained on it."""
    events = read_events(source / "events.npz")
    with zipfile.ZipFile(source / "frame_times.npz") as archive:
        raw = archive.read("t.npy")
    header = struct.unpack("<H", raw[8:10])[0]
    times = torch.frombuffer(bytearray(raw[10 + header:]), dtype=torch.int64)
    with av.open(str(source / "frames.mp4")) as container:
        frames = [torch.frombuffer(bytearray(frame.to_image().tobytes()), dtype=torch.uint8).reshape(
            frame.height, frame.width, 3) for frame in container.decode(video=0)]
    assert len(frames) == len(times), f"{len(frames)} frames, {len(times)} times"
    records, per = [], len(frames) // windows
    for i in range(windows):
        part = slice(i * per, (i + 1) * per)
        begin, end = times[part][0], times[(i + 1) * per] if (i + 1) * per < len(times) else times[-1] + 40_000
        inside = (events.t >= begin) & (events.t < end)
        write_events(out / "event_npy/davis346_traffic" / f"{i:06d}.npz", events.x[inside], events.y[inside],
                     events.t[inside] - begin, events.p[inside])
        write_video(out / "mp4/davis346_traffic" / f"{i:06d}.mp4", torch.stack(frames[part]), 25, crf=23)
        records.append(record("davis346_traffic", i, [
            {"from": "human", "value": f"<event>\n{scenes.QUESTIONS[(7, 4, 0)[i % 3]]}"}]))
    shutil.copy(source / "LICENSE", out / "LICENSE.davis346_traffic")
    return records


def make_films(out: Path, names: list[str]) -> list[dict]:
    """Clips of BENCH_CLIPS with 132,268 random events each, as many as a real recording of 50 ms has."""
    seeded, records = torch.Generator().manual_seed(0), []
    for name in names:
        seconds, size, keyframe = BENCH_CLIPS[name]
        x, y, t, p = (torch.randint(0, top, (132_268,), generator=seeded) for top in (*size, 50_000, 2))
        write_events(out / "event_npy" / name / "000000.npz", x, y, t, p, zipfile.ZIP_STORED)     # as an .npy is
        write_film(out / "mp4" / name / "000000.mp4", seconds, size, keyframe)
        records.append(record(name, 0, [{"from": "human", "value": f"<event>\n{scenes.QUESTIONS[0]}"}]))
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--davis", type=Path)
    parser.add_argument("--films", metavar="NAMES", help=f"of {', '.join(BENCH_CLIPS)}")
    options = parser.parse_args()
    if options.films and not set(options.films.split(",")) <= set(BENCH_CLIPS):
        parser.error(f"--films: wanted names of {', '.join(BENCH_CLIPS)}, got {options.films}")
    films = options.films.split(",") if options.films else []
    records = make_films(options.out, films) if films else make_scenes(options.out, options.count)
    if options.davis:
        records += make_davis(options.out, options.davis)
    replace_file(options.out / LIST, (json.dumps(records, indent=1) + "\n").encode())
    print(f"{len(records)} clips in {options.out}")


if __name__ == "__main__":
    main()
