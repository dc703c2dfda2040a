"""make_clips: held-out clips in the data-set layout of the repository we come from: events, mp4, questions, answers.

    python -m weights.tiny.make_clips OUT [--count 6]

OUT/EventGPT_Instruction_Subset.json lists them; events are .npz (x, y, t, p; no pickles), video is H.264."""

import ctypes
import json
import struct
import sys
import uuid
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image

from weights import InputError, replace_file
from weights.dataset import LIST
from weights.files import Parser, command, insist_whole
from weights.tiny import scenes

HELD_OUT = 10_000_000                               # first seed that training never sees


def raw(tensor) -> bytes:
    """The bytes of a CPU tensor's elements. bytes(tensor.untyped_storage()) asks for them one by one, in Python."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def write_events(path, x, y, t, p) -> None:
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
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member + raw(array))


def rgb_frame(image) -> av.VideoFrame:
    """uint8 [H, W, 3] as a frame to encode."""
    return av.VideoFrame.from_image(Image.frombytes("RGB", image.shape[1::-1], raw(image)))


def write_video(path, frames) -> None:
    """uint8 [T, H, W, 3] as H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    T, height, width, _ = frames.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(scenes.FPS), options={"crf": "16", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        for image in frames[:, :stream.height, :stream.width]:
            container.mux(stream.encode(rgb_frame(image)))
        container.mux(stream.encode(None))


def make_scenes(out: Path, count: int) -> list[dict]:
    """`count` held-out scenes as files; scene i asks question i modulo 10 and knows its answer."""
    records = []
    for i in range(count):
        scene, question, name = scenes.sample(HELD_OUT + i), i % len(scenes.QUESTIONS), f"scenes/{i:06d}"
        frames, events = scenes.film(scene, HELD_OUT + i)
        write_events(out / f"event_npy/{name}.npz", *events)
        write_video(out / f"mp4/{name}.mp4", frames)
        records.append({
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "headstart/" + name)), "split": "test",
            "event_data": f"{name}.npz", "video_data": name, "mp4_data": f"{name}.mp4", "conversations": [
                {"from": "human", "value": f"<event>\n{scenes.QUESTIONS[question]}"},
                {"from": "gpt", "value": scenes.answer(scene, question)}]})
    return records


@command
def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--count", type=int, default=6, help="default %(default)s")
    options = parser.parse_args(argv)
    insist_whole("--count", options.count, 1)
    if (options.out / LIST).exists():                        # it may be the user's own
        raise InputError(f"{options.out / LIST}: is already there, a data set's list; name another folder")
    records = make_scenes(options.out, options.count)
    replace_file(options.out / LIST, (json.dumps(records, indent=1) + "\n").encode())
    print(f"{len(records)} clips in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
