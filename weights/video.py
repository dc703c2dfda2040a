"""video: clips and pictures as frames, [H, W, 3] uint8 tensors.

    frames = read_video("clip.mp4", num_frames=8)  # list of [H, W, 3] uint8
    frame = read_image("a.png")                    # one of them

Whatever is wrong with a file ends in InputError: one line with the path, what was wanted, what came, what to try."""

import bisect
import functools
import itertools
import os
import struct
import warnings
import zlib
from concurrent.futures import wait

import av
import torch
from PIL import Image, UnidentifiedImageError

from kernels.frames import cores, pinned, pool
from weights.files import Held, InputError, Refused, looks_like, naming, open_kind, open_regular, reason_of, refusal

MAX_IMAGE_PIXELS = 50_000_000
MAX_VIDEO_PIXELS = 4096 * 4096       # of one frame
MAX_VIDEO_FRAMES = 108_000           # an hour at 30 a second; uniform sampling decodes nearly all of them
MAX_HELD_BYTES = 1 << 28             # of a clip whose packets are held in memory while their frames are chosen
MAX_DECODE_THREADS = 8               # of one decoder; more cost more to start than they bring on a clip of seconds
LONG_PIXELS = 1 << 22                # decoded one after the other: 13 frames of 640 x 480, some 8 ms
MAX_SIDE_RATIO = 256                 # the shorter side grows to the model's 224 or 336, and the longer with it
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi"    # an open list lets a playlist named .mp4 read other files
VIDEO_RULES = ("uniform", "first")
NO_FILM = (av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
           | av.stream.Disposition.still_image)          # covers and previews that some files carry beside it
LEAST_PIXELS, PIXELS_A_BYTE = 1 << 32, 1 << 12       # decoded of any clip, and for each byte of it; H.264 has 50 to 500
MAX_SAMPLES = 4_000_000              # of all tracks of an mp4, a day of sound; FFmpeg keeps 12 to 36 bytes for each
EDIT_SAMPLES = 4_000                 # as many an edit counts for: at most 1,000 edits
MP4_FOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"mvex", b"moof", b"traf", b"edts", b"dinf", b"udta"}


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
PICTURE_FILE = ("a PNG or JPEG", (b"\x89PNG\r\n\x1a\n", b"\xff\xd8"), "convert it to PNG")


# ---- images ----------------------------------------------------------------------------------------------------------

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, MemoryError, ArithmeticError, LookupError, TypeError,
                AttributeError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
                Image.DecompressionBombWarning)


def read_image(path):
    """[H, W, 3] uint8 of one PNG or JPEG, converted to RGB as upstream does: `Image.convert("RGB")`.

    That means: alpha is dropped, palettes are looked up, EXIF rotation is not applied. Raises InputError, also for grey
    of more than 8 bits."""
    try:
        with naming(path):
            with open_kind(path, *PICTURE_FILE)[0] as file:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    warnings.simplefilter("ignore", UserWarning)      # remarks on damaged EXIF, which is not used
                    image = Image.open(file, formats=("PNG", "JPEG"))
                    width, height = image.size
                    check_size(width, height, MAX_IMAGE_PIXELS)
                    image.load()
                    if image.format == "PNG" and short_of_rows(image, file):
                        raise OSError("it ends before its last row")
                    return rgb_of(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal(path, f"an image of more than {MAX_IMAGE_PIXELS} pixels", "make it smaller first") from None
    except IMAGE_ERRORS as error:
        unknown = isinstance(error, UnidentifiedImageError)
        raise refusal(path, "truncated or damaged image ("
                      f"{'no picture behind its first bytes' if unknown else reason_of(error)})",
                      "open it in a viewer, or fetch it again") from None


def rgb_of(image) -> torch.Tensor:
    """[H, W, 3] uint8 of a PIL picture. Refused where Pillow would cut what is beyond 0..255, as of 16 bits."""
    if image.mode[0] in "FI":
        raise Refused(f"is a picture of mode {image.mode}, wanted RGB", "convert it to RGB, 0 to 255")
    rgb = image.convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)


def short_of_rows(image, file) -> bool:
    """Whether a PNG's data end early. Pillow leaves what is missing at 0: only a last row of zeros is looked into."""
    width, height = image.size
    if image.crop((0, height - 1, width, height)).getbbox(alpha_only=False):
        return False
    file.seek(8)
    unpack, got, header = zlib.decompressobj(), 0, b""
    while len(chunk := file.read(8)) == 8 and chunk[4:] != b"IEND":
        content = file.read(int.from_bytes(chunk[:4], "big"))
        header = content if chunk[4:] == b"IHDR" else header
        while content and chunk[4:] == b"IDAT" and not unpack.eof:
            got, content = got + len(unpack.decompress(content, 1 << 20)), unpack.unconsumed_tail
        file.seek(4, os.SEEK_CUR)
    bits = header[8] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[header[9]]
    passes = ADAM7 if header[12] else [(0, 0, 1, 1)]
    sides = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return got < sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sides if columns > 0 and rows > 0)


def check_size(width, height, max_pixels):
    if width < 1 or height < 1 or width * height > max_pixels:
        raise Refused(f"{width} x {height} pixels, wanted 1 to {max_pixels} in all", "make it smaller first")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise Refused(f"{width} x {height} pixels, wanted sides within {MAX_SIDE_RATIO} : 1", "crop it first")


# ---- video -----------------------------------------------------------------------------------------------------------

VIDEO_ERRORS = (av.FFmpegError, OSError, EOFError, ValueError, MemoryError, ArithmeticError, LookupError, TypeError,
                RuntimeError)


def sample_indices(total, num_frames, rule="uniform"):
    """Frame numbers to take from a clip of `total`: `uniform` floor(k * total / num_frames), `first` 0, 1, 2, ...

    A clip with fewer frames repeats some: uniform 4 of 8 gives 0,0,1,1,2,2,3,3; first repeats the last one."""
    if rule == "uniform":
        return [k * total // num_frames for k in range(num_frames)]
    return [min(k, total - 1) for k in range(num_frames)]


def read_video(path, num_frames=8, rule="uniform", for_gpu=False, decoding=None):
    """List of `num_frames` frames [H, W, 3] uint8 in order of presentation; see `sample_indices` for which. for_gpu: in
    page-locked memory, from where a GPU fetches them; each thread that decodes copies its own there. decoding: called
    when packets have been read and FFmpeg's threads take over for some ms; not for a clip that is there sooner.

    Frames go by number, not by time. How many there are is counted, in packets, and where a packet need not be a frame
    or the header counts another number, in decoded frames: a header's count is a claim. Repeated frames share their
    memory. Rotation metadata is not applied. One container per call, so calls may run on several threads. Raises
    InputError."""
    if rule not in VIDEO_RULES or num_frames < 1:
        raise ValueError(f"read_video: wanted rule in {VIDEO_RULES} and num_frames >= 1, got {rule!r} and {num_frames}")
    take = (lambda frame: pinned(rgb_tensor(frame))) if for_gpu else rgb_tensor
    decoding = decoding or (lambda: None)
    try:
        with naming(path):
            if rule == "uniform":
                frames = uniform_frames(path, num_frames, take, decoding)
            else:
                decoding()
                kept, decoded = decode_frames(path, list(range(num_frames)), True, take)
                frames = [kept[index] for index in sample_indices(decoded, num_frames, "first")]
            return one_size(frames)
    except KeyError:
        raise refusal(path, "decoded to a different number of frames the second time",
                      "is it still being written? copy it first") from None


def uniform_frames(path, num_frames, take, decoding):
    """Uniformly sampled frames: by `planned_frames` where the packets leave no doubt, else decoded and counted."""
    container, stream, codec = open_video(path, decoders="none")
    if "mp4" not in container.format.name:       # an mp4 says how far its pictures are out of order
        container.close()
        container, stream, codec = open_video(path)
    with container:
        packets, total = held_packets(container, stream, codec)
        frames = planned_frames(packets, stream, num_frames, take, decoding)
        # Of an avi a packet may be no frame, or two; other containers have no count, or count what they hide.
        times = [packet.pts for packet in packets]
        sure = ("mp4" in container.format.name and stream.frames == len(packets) and None not in times
                and not any(packet.is_discard for packet in packets))
    if frames:
        return frames
    decoding()
    indices = sample_indices(total, num_frames)
    kept, decoded = decode_frames(path, indices, stop_early=False, take=take, times=sorted(times) if sure else ())
    if decoded != total:
        indices = sample_indices(decoded, num_frames)
        if not kept.keys() >= set(indices):
            kept, _ = decode_frames(path, indices, stop_early=True, take=take)
    return [kept[index] for index in indices]


def held_packets(container, stream, codec):
    """([packet], number of packets) of a stream; those of a large file are counted and not held."""
    packets, total, hold = [], 0, 0 < container.size <= MAX_HELD_BYTES
    try:
        for packet in container.demux(stream):
            if packet.size:
                total += 1
                if hold:
                    packets.append(packet)
            if total > MAX_VIDEO_FRAMES:
                raise Refused(f"more than {MAX_VIDEO_FRAMES} frames", "cut the clip to the part in question")
    except VIDEO_ERRORS as error:
        raise Refused(f"damaged after {total} {codec} packets ({reason_of(error)})",
                      "an incomplete copy? fetch it again") from None
    if not total:
        raise Refused("0 frames", "an empty or incomplete recording: fetch it again")
    return packets, total


def one_size(frames):
    """The frames, if they agree in size: upstream cannot stack others, and guesses nothing either."""
    sizes = list(dict.fromkeys((frame.shape[1], frame.shape[0]) for frame in frames))
    if len(sizes) > 1:
        raise Refused("its pictures change size on the way, from {} x {} to {} x {}".format(*sizes[0], *sizes[1]),
                      "cut it there, or scale it to one size: ffmpeg -i IN -vf scale=640:480 OUT.mp4")
    return frames


def announced_samples(file, at, end, sound=False, depth=0):
    """Samples that an mp4's tables announce between two offsets; 0 for other containers. FFmpeg takes memory for all of
    them when it opens a file: 2 KB may ask for 2 GB. Sound of one constant size is the exception, it has no table."""
    total = 0
    for _ in range(1_000_000):
        if at >= end:                            # a box may claim any size
            break
        file.seek(at)
        box = file.read(24)
        size, body = int.from_bytes(box[:4], "big"), 8
        if size == 1:                            # a long box: its size follows the name
            size, body = int.from_bytes(box[8:16], "big"), 16
        size = size or end - at                  # 0: to the end
        if len(box) < 16 or size < body:
            break
        name = box[4:8]
        if name in MP4_FOLDERS and depth < 12:
            total += announced_samples(file, at + body, min(end, at + size), sound, depth + 1)
        elif name == b"hdlr":
            sound = box[16:20] == b"soun"
        elif name == b"trun":
            total += int.from_bytes(box[12:16], "big")
        elif name == b"elst":                    # FFmpeg walks all samples for each edit; films have one or two
            total += EDIT_SAMPLES * int.from_bytes(box[12:16], "big")
        elif name == b"stsz" and not (sound and any(box[12:16])):
            total += int.from_bytes(box[16:20], "big")
        at += size
    return total


def open_video(path, decoders="all"):
    """An opened container and its first video stream, with the doors to other files and the network shut.

    decoders: "none" keeps FFmpeg from decoding the first pictures when it opens the file, 0.9 in place of 9.0 ms for a
    clip of 640 x 480 beside an H100; what it would learn from them, such as the order of H.264 pictures, then stays
    unknown unless the headers say it."""
    opened, size = open_regular(path, "a video file")
    with opened:
        head = opened.read(256)
        if announced_samples(opened, 0, size) > MAX_SAMPLES:
            raise Refused(f"its tables announce more than {MAX_SAMPLES} samples", "damaged, or cut it shorter")
    try:
        # Absolute: nothing in a relative name then reads as a protocol.
        file = open_regular(path, "")[0] if isinstance(path, Held) else os.path.abspath(os.fsdecode(path))
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
        if decoders == "none":
            options["codec_whitelist"] = "none"
        container = av.open(file, metadata_errors="ignore", options=options)
    except VIDEO_ERRORS as error:
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") or \
                head.startswith(b"\x1aE\xdf\xa3") or head[:4] + head[8:12] == b"RIFFAVI ":
            raise Refused(f"a video container without a usable index ({reason_of(error)})",
                          "an incomplete copy? fetch it again") from None
        what, way_out = looks_like(head, "give an mp4, mov, mkv, webm or avi file")
        raise Refused(f"not a video container but {what}", way_out) from None
    try:
        films = [stream for stream in container.streams.video if not stream.disposition & NO_FILM]
        if not films:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise Refused(f"no video stream (streams found: {kinds})", "give a file with pictures")
        # As FFmpeg's players: the track that is on, and of several not the one of a picture or two.
        stream = max(films, key=lambda s: (bool(s.disposition & av.stream.Disposition.default), min(s.frames or 5, 5)))
        try:
            width, height, codec = stream.width, stream.height, stream.codec_context.name
        except (AttributeError, *VIDEO_ERRORS):
            raise Refused("its video stream is in a codec this build cannot decode",
                          "convert it to H.264, for example with ffmpeg -i IN -c:v libx264 OUT.mp4") from None
        if width and height:                     # 0 x 0: the size stands in the stream, max_pixels below holds
            check_size(width, height, MAX_VIDEO_PIXELS)
        stream.codec_context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}
        stream.thread_type = "AUTO"
        return container, stream, codec
    except BaseException:
        container.close()
        raise


def decode_frames(path, indices, stop_early, take, times=()):
    """({index: what `take` makes of that frame}, frames decoded). stop_early: leave after the last index, else count
    to the end. times: of all frames, if the container says so; as long as they come true it is left there as well, and
    taken at its word."""
    container, stream, codec = open_video(path)
    wanted, last, kept, decoded = set(indices), indices[-1], {}, 0
    left = most_pixels(container)
    try:
        with container:
            for frame in whole_frames(container, stream):
                if decoded in wanted:
                    kept[decoded] = take(frame)
                times = times if decoded < len(times) and frame.pts == times[decoded] else ()
                decoded, left = decoded + 1, left - frame.width * frame.height
                if left < 0:
                    raise Refused(f"{decoded} frames of {frame.width} x {frame.height} and more in {container.size} "
                                  f"bytes", "cut the clip to the part in question")
                if decoded > last and (stop_early or times):
                    return kept, len(times) or decoded
                if decoded > MAX_VIDEO_FRAMES:
                    raise Refused(f"more than {MAX_VIDEO_FRAMES} frames", "cut the clip to the part in question")
    except VIDEO_ERRORS as error:
        raise Refused(f"decoded {decoded} {codec} frames, then failed ({reason_of(error)})",
                      "truncated or damaged: fetch it again, or cut it before that frame") from None
    if decoded == 0:
        raise Refused("0 frames", "an empty or incomplete recording: fetch it again")
    return kept, decoded


def most_pixels(container) -> int:
    """Pixels that a file of its size may make us decode: a few kilobytes can announce hours of still pictures."""
    return max(LEAST_PIXELS, PIXELS_A_BYTE * container.size)


def whole_frames(container, stream):
    """Yields the decoded frames of a stream. EOFError behind the last whole one, if the file ends inside a packet: some
    codecs make a picture of half a packet, and then end in peace."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            yield from stream.decode(None)       # those still on their way through the decoder's threads
            raise EOFError("the file ends inside a packet")
        yield from packet.decode()


# The quick way, for the H.264 in mp4, mov and mkv. Reading packets is cheap and decoding them is not: the packets alone
# say how many frames there are, which of them are wanted, and where a group of pictures begins that needs none before
# it. A frame is known by its time stamp. Groups decode side by side, each up to its last wanted frame, and pictures
# that no other refers to are left out. 0.5, 5 and 20 s of 640 x 480, 16 cores: 14, 25 and 32 ms; decoding all of them
# with FFmpeg's own threads 24, 35 and 145.

KIND, PLAIN, IDR, REFERRED = 31, 1, 5, 0x60      # of an H.264 unit's first byte: mask, slices of two kinds, mask


def planned_frames(packets, stream, num_frames, take, decoding):
    """Uniformly sampled frames as decoding them all gives them, or None wherever that cannot be shown beforehand."""
    runs, order = plan(packets, stream, num_frames) or ([], [])
    if not runs or sum(map(len, runs)) * stream.width * stream.height > most_pixels(stream.container):
        return None
    if max(map(len, runs)) * stream.width * stream.height > LONG_PIXELS:
        decoding()
    threads = max(1, min(cores() // min(len(runs), cores()), MAX_DECODE_THREADS))
    decode = functools.partial(decode_run, stream, set(order), take, threads)
    longest, *others = sorted(runs, key=len, reverse=True)
    parts = [pool().submit(decode, run) for run in others]
    try:
        kept = decode(longest)
        for part in parts:
            kept |= part.result()
    except (Refused, *VIDEO_ERRORS):             # decoding them all meets the same, and knows how to say it
        return None
    finally:
        wait(parts)                              # the packets belong to a container that is closed next
    return [kept[pts] for pts in order] if kept.keys() >= set(order) else None


def plan(packets, stream, num_frames):
    """(runs, pts of each frame to take), or None in doubt. A run: packets from an IDR picture to a frame to take, less
    those that neither are to be taken nor needed by another."""
    avcc, times = bytes(stream.codec_context.extradata or b""), [packet.pts for packet in packets]
    if len(avcc) < 5 or avcc[0] != 1 or stream.codec_context.name != "h264" or None in times or any(
            p.is_corrupt or p.is_discard or p.has_sidedata("new_extradata") for p in packets):
        return None
    heads = [slice_head(packet, (avcc[4] & 3) + 1) for packet in packets]
    if len(set(times)) < len(times) or 0 in heads or stream.frames not in (0, len(packets)):
        return None                              # not one frame a packet, or a header that counts otherwise
    if reordering(times) > stream.codec_context.reorder_depth:
        return None                              # more than the decoder sets out to put right
    # A group stands alone if all that is sent before its IDR picture is shown before it, and all behind it later.
    shown, highest = sorted(times), itertools.accumulate(times, max)
    begins = [at for at, high in enumerate(highest) if heads[at] & KIND == IDR and shown[at] == times[at] == high]
    if begins[:1] != [0]:
        return None
    order = [shown[index] for index in sample_indices(len(packets), num_frames)]
    wanted, runs = set(order), []
    for begin, end in itertools.pairwise([*begins, len(packets)]):
        last = max((at for at in range(begin, end) if times[at] in wanted), default=-1)
        needed = [at for at in range(begin, last + 1) if heads[at] & REFERRED or times[at] in wanted]
        if needed:
            runs.append([packets[at] for at in needed])
    return runs, order


def reordering(times):
    """The most pictures that are sent before one and shown after it."""
    past, most = [], 0
    for time in times:
        place = bisect.bisect(past, time)
        most = max(most, len(past) - place)
        past.insert(place, time)
    return most


def slice_head(packet, length_bytes):
    """First byte of the first slice in an H.264 packet; 0 if there is none."""
    data, at = memoryview(packet), 0
    while at + length_bytes < len(data):
        head = data[at + length_bytes]
        if head & KIND in (PLAIN, IDR):
            return head
        at += length_bytes + int.from_bytes(data[at:at + length_bytes], "big")
    return 0


def decode_run(stream, wanted, take, threads, packets):
    """{pts: what `take` makes of that frame} of the packets from one IDR picture on; {} in doubt."""
    decoder, kept = decoder_like(stream, threads), {}
    for packet in (*packets, None):              # None: whatever is still on its way
        for frame in decoder.decode(packet):
            if frame.pts in wanted:
                if frame.pts in kept or frame.is_corrupt:
                    return {}
                kept[frame.pts] = take(frame)
    return kept


def decoder_like(stream, threads):
    """A fresh H.264 decoder for the packets of a stream: what its container says of them, and nothing decoded yet."""
    given, fresh = stream.codec_context, av.CodecContext.create("h264", "r")
    for name in ("extradata", "width", "height", "color_range", "colorspace", "color_primaries", "color_trc",
                 "reorder_depth"):
        setattr(fresh, name, getattr(given, name))
    fresh.options, fresh.thread_type, fresh.thread_count = dict(given.options), "AUTO", threads
    return fresh


def rgb_tensor(frame):
    """[H, W, 3] uint8 of a decoded frame, through libswscale with its defaults, as upstream."""
    check_size(frame.width, frame.height, MAX_VIDEO_PIXELS)
    # One thread: starting more costs more than converting, 0.5 against 0.06 ms for 346 x 260.
    rgb = frame.reformat(format="rgb24", threads=1)
    plane, height, width = rgb.planes[0], rgb.height, rgb.width
    line, used = plane.line_size, 3 * width      # rows are padded where 3 * width is not aligned
    if line == used:
        pixels = plane                           # its memory is the picture's alone, and lives as long as the tensor
    else:
        padded = memoryview(plane)
        pixels = bytearray().join([padded[at:at + used] for at in range(0, height * line, line)])
    # A copy by torch would wake a team of workers whose waiting holds up the decoder's threads.
    return torch.frombuffer(pixels, dtype=torch.uint8, count=height * used).view(height, width, 3)
