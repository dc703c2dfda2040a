"""containers: odd ways to store a film, each compared with decoding everything and counting: what a player shows.

    python tests/containers.py              every form: frames of the film, whether the quick way took it, verdict
    python tests/containers.py --keep DIR   and leave the files there

Headers, edit lists, indexes and time stamps are claims. FORMS makes them: encoders and muxers of PyAV, packets left
out and renumbered, and boxes of an mp4 and chunks of an avi rewritten by hand."""

import struct
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import torch

from weights import InputError, video
from weights.files import Parser, command

FRAMES, SIZE = 30, (64, 48)
FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")
X264 = {"preset": "ultrafast", "x264-params": "sliced-threads=0"}


def picture(number: int, size=SIZE):
    """A picture that tells its number, with texture so that nothing is skipped as empty."""
    rows = torch.full((size[1], size[0], 3), 20 + 9 * number % 200, dtype=torch.uint8)
    rows[: size[1] // 4] = 255 - rows[0, 0, 0]
    return av.VideoFrame.from_ndarray(rows.numpy(), format="rgb24")


def film(path: Path, codec="libx264", frames=FRAMES, size=SIZE, pixel_format="yuv420p", g=10, muxer=None, pts=None,
         **options) -> Path:
    """An encoded clip; the container goes by the name's ending. pts: of each number, in 1/25 s."""
    with av.open(str(path), "w", options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=25, options={**(X264 if "264" in codec else {}), "g": str(g), **options})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(frames):
            frame = picture(number, size)
            frame.pts, frame.time_base = pts(number) if pts else number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def remuxed(given: Path, path: Path, change, muxer=None) -> Path:
    """The packets of `given` after change(list of packets) -> list; the container goes by the new name's ending."""
    with av.open(str(given)) as source, av.open(str(path), "w", options=muxer or {}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in change([packet for packet in source.demux(video=0) if packet.size]):
            packet.stream = stream
            out.mux(packet)
    return path


def moved(by: int, of=lambda at: True):
    """Time stamps of the packets `of` (places in the file) shifted by so many ticks."""
    def change(packets):
        for at, packet in enumerate(packets):
            if of(at):
                packet.pts, packet.dts = packet.pts + by, packet.dts + by
        return packets
    return change


# ---- boxes of an mp4 ---------------------------------------------------------------------------------------------


def boxed(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def split(blob: bytes) -> list:
    """[(name, content)] of the boxes in a row."""
    found, at = [], 0
    while at + 8 <= len(blob):
        size, name = struct.unpack_from(">I4s", blob, at)
        found.append((name, blob[at + 8:at + size]))
        at += size
    return found


def walked(blob: bytes, change) -> bytes:
    """The boxes after change(name, content) -> (name, content), None to drop it, or bytes to put there; folders are
    gone into first."""
    out = b""
    for name, content in split(blob):
        made = change(name, walked(content, change) if name in FOLDERS else content)
        out += made if isinstance(made, bytes) else boxed(*made) if made else b""
    return out


def changed(given: Path, path: Path, **changes) -> Path:
    """An mp4 whose boxes of these names hold change(content) instead; None drops the box. The header must come behind
    the media, so that offsets stay."""
    blob = given.read_bytes()
    at = blob.rindex(b"moov") - 4

    def change(name, content):
        if (of := changes.get(name.decode("latin1"), change)) is change:
            return name, content
        made = of and of(content)
        return None if made is None else (name, made)
    path.write_bytes(blob[:at] + walked(blob[at:], change))
    return path


def edits(*entries):
    """(duration in 1/1000 s, time in the media's ticks, rate) of each edit, in place of what is there."""
    listed = [struct.pack(">IiI", duration, time, int(rate * 65536)) for duration, time, rate in entries]
    return lambda _: boxed(b"elst", struct.pack(">II", 0, len(entries)), *listed)


def table(*numbers, also=0):
    return lambda _: struct.pack(f">{1 + len(numbers)}I", also, *numbers)


def patched(at: int, value: int, form=">I"):
    return lambda content: content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form):]


def wide(blob: bytes) -> bytes:
    """Media with a size of 64 bits."""
    at = blob.index(b"mdat") - 4
    size = struct.unpack_from(">I", blob, at)[0]
    if blob[at - 8:at - 4] == struct.pack(">I", 8):          # the muxer leaves a `free` of 8 bytes for it
        return blob[:at - 8] + struct.pack(">I4sQ", 1, b"mdat", size + 8) + blob[at + 8:]
    raise AssertionError("no room for the long size")


def rewritten(change):
    """A form of bytes: change(bytes of the plain film) -> bytes."""
    return lambda d: (d / "a.mp4").write_bytes(change(film(d / "plain.mp4").read_bytes())) and d / "a.mp4"


def avi(codec="mpeg4", pixel_format="yuv420p", count=None, index=True, cut=None, sizes=True):
    def make(d):
        blob = bytearray(film(d / "plain.avi", codec, pixel_format=pixel_format, bf="0").read_bytes())
        for tag, offset in ((b"avih", 24), (b"strh", 40)) if count is not None else ():
            struct.pack_into("<I", blob, blob.index(tag) + offset, count)
        if not sizes:                                        # a recorder that never came back to its header
            struct.pack_into("<I", blob, 4, 0)
            struct.pack_into("<I", blob, blob.index(b"movi") - 4, 0)
        blob = blob if index else blob[:blob.index(b"idx1")]
        path = d / "a.avi"
        path.write_bytes(blob[:cut])
        return path
    return make


def empty_chunks(d):
    """An avi that repeats a picture by a chunk of no bytes."""
    blob = film(d / "plain.avi", "mpeg4", bf="0").read_bytes()
    start = blob.index(b"movi") + 4
    body, at, number = b"", start, 0
    while blob[at:at + 4] == b"00dc":
        size = struct.unpack_from("<I", blob, at + 4)[0]
        body += blob[at:at + 8 + size + size % 2] + (b"00dc\0\0\0\0" if number % 5 == 4 else b"")
        at, number = at + 8 + size + size % 2, number + 1
    (d / "a.avi").write_bytes(blob[:start - 8] + struct.pack("<I", 4 + len(body)) + b"movi" + body)
    return d / "a.avi"


def two_films(d, first=None, second=None):
    """Two video tracks in one file."""
    sizes = {"first": SIZE, "second": (32, 32)}
    path = d / "a.mp4"
    with av.open(str(path), "w") as out:
        streams = []
        for name, more in (("first", first), ("second", second)):
            stream = out.add_stream("libx264", rate=25, options=X264)
            stream.width, stream.height, stream.pix_fmt = *((more or {}).get("size") or sizes[name]), "yuv420p"
            if (more or {}).get("disposition"):
                stream.disposition = more["disposition"]
            streams.append((stream, (more or {}).get("frames", FRAMES)))
        out.start_encoding()
        for stream, frames in streams:
            for number in range(frames):
                frame = picture(number, (stream.width, stream.height))
                frame.pts, frame.time_base = number, Fraction(1, 25)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    return path


def first_off():
    """A change of `tkhd` that switches the first track off."""
    flags = iter((0, 3))
    return lambda content: patched(0, next(flags))(content)


def with_cover(d, ending="mp4"):
    path = d / f"b.{ending}"
    with av.open(str(film(d / "a.mp4"))) as given, av.open(str(path), "w") as out:
        cover = out.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 24, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = out.add_stream_from_template(given.streams.video[0])
        out.start_encoding()
        out.mux(cover.encode(picture(0, (24, 16))))
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return path


def with_sound(d, ending):
    path = d / f"a.{ending}"
    with av.open(str(path), "w") as out:
        pictures, sound = out.add_stream("libx264", rate=25, options=X264), out.add_stream("aac", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = *SIZE, "yuv420p"
        for number in range(FRAMES):
            frame = picture(number)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(pictures.encode(frame))
            samples = av.AudioFrame(format="fltp", layout="mono", samples=320)
            samples.sample_rate, samples.pts = 8000, 320 * number
            for plane in samples.planes:
                plane.update(bytes(plane.buffer_size))
            out.mux(sound.encode(samples))
        out.mux(pictures.encode())
        out.mux(sound.encode())
    return path


def two_thirds(path: Path) -> Path:
    path.write_bytes((blob := path.read_bytes())[:len(blob) * 2 // 3])
    return path


def of(name, *args, **options):
    return lambda d: film(d / name, *args, **options)


def of_boxes(bf="2", **changes):
    return lambda d: changed(film(d / "plain.mp4", bf=bf, g=10), d / "a.mp4", **changes)


def of_packets(change, name="a.mp4", given="plain.mp4", muxer=None, **options):
    return lambda d: remuxed(film(d / given, **options), d / name, change, muxer)


TICKS = 512                                                  # of a picture, as the mp4 muxer numbers 25 a second
FRAGMENTS = ("frag_keyframe", "frag_keyframe+empty_moov", "frag_keyframe+delay_moov", "frag_keyframe+default_base_moof",
             "frag_every_frame+empty_moov", "frag_keyframe+omit_tfhd_offset", "frag_keyframe+separate_moof",
             "frag_keyframe+empty_moov+global_sidx", "hybrid_fragmented", "frag_keyframe+negative_cts_offsets")
FORMS = {
    **{f"mp4 {flags}": of("a.mp4", bf="2", muxer={"movflags": flags}) for flags in (*FRAGMENTS, "faststart", "rtphint",
                                                                                 "negative_cts_offsets")},
    **{f"mpeg4 {flags}": of("a.mp4", "mpeg4", muxer={"movflags": flags}) for flags in FRAGMENTS[:3]},
    **{f"h264 {ending}": of(f"a.{ending}", bf="2") for ending in ("mp4", "mov", "mkv", "avi")},
    "h264, one keyframe": of("a.mp4", g=300), "h264, only keyframes": of("a.mp4", g=1),
    "h264, open groups": of("a.mp4", bf="3", g=6, **{"x264-params": "sliced-threads=0:open-gop=1"}),
    "h264, moving refresh": of("a.mp4", **{"x264-params": "sliced-threads=0:intra-refresh=1"}),
    "h264, fields": of("a.mp4", preset="medium", **{"x264-params": "sliced-threads=0:interlaced=1"}),
    "h264, deep pyramid": of("a.mp4", preset="medium", bf="7", **{"x264-params": "sliced-threads=0:b-pyramid=normal"}),
    "h264, 4:4:4 rgb": of("a.mp4", "libx264rgb", pixel_format="rgb24"),
    "h264, ten bits": of("a.mp4", pixel_format="yuv420p10le"), "h264, grey": of("a.mp4", pixel_format="gray"),
    "hevc": of("a.mp4", "libx265", **{"x265-params": "log-level=none", "preset": "ultrafast"}),
    "hevc mkv": of("a.mkv", "libx265", **{"x265-params": "log-level=none:bframes=4", "preset": "ultrafast"}),
    "av1": of("a.mp4", "libsvtav1", preset="12"), "av1 mkv": of("a.mkv", "libsvtav1", preset="12"),
    "vp8, invisible pictures": of("a.webm", "libvpx", deadline="good", **{"auto-alt-ref": "1", "lag-in-frames": "16",
                                                                       "cpu-used": "8", "arnr-maxframes": "7"}),
    "vp9, invisible pictures": of("a.webm", "libvpx-vp9", deadline="good", **{
        "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "vp9 mp4": of("a.mp4", "libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}),
    "mpeg4, B-frames": of("a.mp4", "mpeg4", bf="2"), "mpeg4 avi, B-frames": of("a.avi", "mpeg4", bf="2"),
    "mpeg2 mkv": of("a.mkv", "mpeg2video", bf="2"), "mjpeg mov": of("a.mov", "mjpeg", pixel_format="yuvj420p"),
    "prores": of("a.mov", "prores_ks", pixel_format="yuv422p10le"), "ffv1": of("a.mkv", "ffv1"),
    "png mov": of("a.mov", "png", pixel_format="rgb24"), "raw avi": of("a.avi", "rawvideo"),
    "sound beside it mp4": lambda d: with_sound(d, "mp4"), "sound beside it mkv": lambda d: with_sound(d, "mkv"),
    "two films": two_films,
    "a short one first": lambda d: two_films(d, {"frames": 3, "size": (32, 32)}, {"size": SIZE}),
    "a picture first": lambda d: two_films(d, {"frames": 1, "size": (16, 16)}, {"size": SIZE}),
    "the first is off": lambda d: changed(two_films(d), d / "b.mp4", tkhd=first_off()),
    "a cover": with_cover, "a cover in a mov": lambda d: with_cover(d, "mov"),
    # edit lists
    "hides the start": of_boxes(elst=None, edts=edits((1000, 12 * TICKS, 1))),
    "hides the start, inside a group": of_boxes(edts=edits((800, 7 * TICKS, 1))),
    "hides the end": of_boxes(edts=edits((480, 2 * TICKS, 1))), "an empty edit first": of_boxes(
        edts=edits((400, -1, 1), (1200, 2 * TICKS, 1))),
    "shows twice": of_boxes(edts=edits((400, 2 * TICKS, 1), (400, 2 * TICKS, 1))),
    "shows the end first": of_boxes(edts=edits((400, 20 * TICKS, 1), (400, 2 * TICKS, 1))),
    "at double speed": of_boxes(edts=edits((600, 2 * TICKS, 2))), "an edit beyond the end": of_boxes(
        edts=edits((400, 900 * TICKS, 1))), "an edit of nothing": of_boxes(edts=edits((0, 2 * TICKS, 1))),
    "a hundred edits": of_boxes(edts=edits(*[(40, (2 + i % 20) * TICKS, 1) for i in range(100)])),
    "no edit list": of_boxes(edts=None), "edits, no B-frames": of_boxes(bf="0", edts=edits((600, 11 * TICKS, 1))),
    "an edit between two pictures": of_boxes(bf="0", edts=edits((620, 5 * TICKS + 100, 1))),
    # tables
    "no sync table": of_boxes(stss=None), "all are sync": of_boxes(stss=table(FRAMES, *range(1, FRAMES + 1))),
    "another sync table": of_boxes(stss=table(2, 1, 6)), "no composition times": of_boxes(ctts=None),
    "negative composition times": of_boxes(ctts=lambda c: struct.pack(">IIIiIi", 1 << 24, 2, 10, -TICKS, 20, 0)),
    "one time for all": of_boxes(stts=table(1, FRAMES, 0)), "two times": of_boxes(stts=table(2, 10, 1, 20, 9 * TICKS)),
    "times for fewer": of_boxes(stts=table(1, 7, TICKS)), "times for more": of_boxes(stts=table(1, 90, TICKS)),
    "no times": of_boxes(stts=table(0)), "durations of nothing": of_boxes(mvhd=patched(16, 0), mdhd=patched(16, 0)),
    "durations of days": of_boxes(mvhd=patched(16, 2 ** 31), mdhd=patched(16, 2 ** 31)),
    "sizes of fewer": of_boxes(stsz=lambda c: c[:8] + struct.pack(">I", 12) + c[12:12 + 48]),
    "a track that is off": of_boxes(tkhd=patched(0, 0)), "turned by 90": of_boxes(
        tkhd=lambda c: c[:40] + struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30) + c[76:]),
    "another shape of pixels": of_boxes(tkhd=patched(76, 200 << 16)),
    "boxes nobody knows": rewritten(lambda b: b + boxed(b"abcd", b"x" * 99)),
    "something behind it": rewritten(lambda b: b + b"\0" * 77), "a second film behind it": rewritten(lambda b: b + b),
    "media of unknown size": rewritten(lambda b: b), "a size of 64 bits": rewritten(wide),
    # packets
    "starts late": of_packets(moved(50 * TICKS)), "starts early": of_packets(moved(-3 * TICKS), bf="2"),
    "starts late mkv": of_packets(moved(50 * TICKS), "a.mkv", bf="2"),
    "a hole": of_packets(lambda p: p[:12] + p[20:]), "begins inside a group": of_packets(lambda p: p[4:], bf="0"),
    "begins inside a group mkv": of_packets(lambda p: p[4:], "a.mkv", bf="0"),
    "pictures nobody needs are missing": of_packets(lambda p: [q for q in p if not q.is_disposable], bf="3",
                                                    preset="medium"),
    "a pause": of_packets(moved(400 * TICKS, lambda at: at >= 10), bf="0"),
    "frames a second that change": of("a.mp4", bf="2", pts=lambda n: n * n),
    "and in mkv": of("a.mkv", pts=lambda n: 7 * n),
    "as a live stream": of("a.mkv", bf="2", muxer={"live": "1"}), "live webm": of(
        "a.webm", "libvpx-vp9", deadline="realtime", muxer={"live": "1"}, **{"cpu-used": "8"}),
    "short clusters": of("a.mkv", muxer={"cluster_time_limit": "40"}), "cues first": of(
        "a.mkv", muxer={"reserve_index_space": "500", "cues_to_front": "1"}),
    "raw time stamps": of("a.mkv", muxer={"write_crc32": "0", "default_mode": "infer"}),
    "cut mkv": lambda d: two_thirds(film(d / "a.mkv")),
    "cut webm": lambda d: two_thirds(film(d / "a.webm", "libvpx", deadline="realtime")),
    # avi
    **{f"avi {codec} says {count}{' without index' * (not index)}": avi(codec, pixel, count, index)
       for codec, pixel in (("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p"), ("libx264", "yuv420p"))
       for count, index in ((0, True), (1, True), (12, False), (900, True))},
    "avi, stale sizes": avi(sizes=False, index=False), "avi, cut": avi(cut=-5000, index=False),
    "avi, repeats by nothing": empty_chunks,
}


def shown(path: Path) -> list:
    """Every picture of the track that FFmpeg's players show, as they show it: decoded one after the other."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return [video.rgb_tensor(frame) for frame in container.decode(container.streams.best("video"))]


def compared(path: Path, counts=(8, 3, 1)) -> tuple[int, str]:
    """(pictures that a player shows, "same", "refused" where it shows none to the end, or what differs)."""
    try:
        frames = shown(path)
    except (av.FFmpegError, IndexError):
        frames = []
    for count in counts:
        for rule in video.VIDEO_RULES:
            try:
                read = video.read_video(path, count, rule)
            except InputError as error:
                if frames:
                    return len(frames), f"REFUSED {error}"
                continue
            wanted = video.sample_indices(len(frames), count, rule) if frames else []
            if not frames or not all(torch.equal(frame, frames[at]) for frame, at in zip(read, wanted, strict=True)):
                numbers = [next((i for i, f in enumerate(frames) if torch.equal(f, frame)), "?") for frame in read]
                return len(frames), f"OTHER FRAMES {rule}: {numbers}, wanted {wanted}"
    return len(frames), "same" if frames else "refused"


def quick(path: Path) -> bool:
    """Whether the packets alone say which frames to decode."""
    try:
        container, stream, codec = video.open_video(path)
        with container:
            return video.plan(video.held_packets(container, stream, codec)[0], stream, 8) is not None
    except (InputError, video.Refused):
        return False


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files there, a folder each")
    options, bad = parser.parse_args(argv), 0
    with tempfile.TemporaryDirectory() as temporary:
        for at, (name, make) in enumerate(FORMS.items()):
            folder = (options.keep or Path(temporary)) / f"{at:03}"
            folder.mkdir(parents=True, exist_ok=True)
            path = make(folder)
            (frames, verdict), planned = compared(path), quick(path)
            bad += verdict not in ("same", "refused")
            print(f"{name:44} {frames:4} {'planned' if planned else 'counted':8} {verdict}", flush=True)
    print(f"{len(FORMS)} forms, {bad} wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
