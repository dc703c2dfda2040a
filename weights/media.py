"""media: turns the user's files into tensors. Event recordings, images and videos; no numpy, and nothing is unpickled.

    events = read_events("sample1.npy")            # Events(x, y, t, p)
    frames = read_images(["a.png", "b.png"])       # list of [H, W, 3] uint8
    frames = read_video("clip.mp4", num_frames=8)  # list of [H, W, 3] uint8

Whatever is wrong with a file ends in InputError: one line with the path, what was wanted, what came, what to try.
`python -m weights.media FILE` says what a file holds; `--bench` times made clips from file to pixels."""

import bisect
import difflib
import functools
import io
import os
import pickletools
import re
import stat
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import av
import torch
from PIL import Image

from kernels.frames import cores, extent, pinned, quiet_copy
from weights import InputError

MAX_EVENT_BYTES = 1 << 30            # of a file, and of the arrays an .npz unpacks to
MAX_CANVAS = (4096, 4096)            # (H, W); the largest coordinate sizes the picture, so a stray event can cost GBs
MAX_OPCODES = 10_000                 # real event pickles have about 200
MAX_HEADER_BYTES = 10_000            # of an .npy, numpy's own limit
MAX_IMAGE_PIXELS = 50_000_000
MAX_VIDEO_PIXELS = 4096 * 4096       # of one frame
MAX_VIDEO_FRAMES = 108_000           # an hour at 30 a second; uniform sampling decodes nearly all of them
MAX_HELD_BYTES = 1 << 28             # of a clip whose packets are held in memory while their frames are chosen
MAX_DECODE_THREADS = 8               # of one decoder; more cost more to start than they bring on a clip of seconds
LONG_PIXELS = 1 << 22                # decoded one after the other: 13 frames of 640 x 480, some 8 ms
MAX_SIDE_RATIO = 256                 # the shorter side grows to the model's 224 or 336, and the longer with it
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi"    # an open list lets a playlist named .mp4 read other files
VIDEO_RULES = ("uniform", "first")
MAX_SAMPLES = 4_000_000              # of all tracks of an mp4, a day of sound; FFmpeg keeps 12 to 36 bytes for each
MP4_FOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"mvex", b"moof", b"traf", b"edts", b"dinf", b"udta"}


# ---- files and messages ----------------------------------------------------------------------------------------------

class Refused(Exception):
    """Why a file cannot be used: (reason, way out). The reader that knows the path makes an InputError of it."""

    def __init__(self, reason, way_out):
        super().__init__(reason, way_out)


def input_error(path, reason, way_out):
    """InputError "PATH: reason; way out" on one line, whatever the path and the file put into it."""
    line = f"{path}: {reason}; {way_out}"
    return InputError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def brief(value, limit=60):
    """repr of something read from a file, short enough for a message."""
    text = repr(value[:limit] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit + 3 else text[:limit] + "..."


def open_regular(path, wanted):
    """(open binary file, size in bytes). Refuses what is missing, a folder, a pipe, a URL, unreadable or empty."""
    name = os.fsdecode(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise Refused("is an address, only local files are read", f"download {wanted} first and give its path")
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise Refused(f"is a folder, wanted {wanted}", "give the path of a file inside it")
        if not stat.S_ISREG(status.st_mode):     # opening a pipe would wait for ever
            raise Refused(f"is not a regular file, wanted {wanted}", "save it to disk first")
        file = open(name, "rb")
    except FileNotFoundError:
        raise Refused(f"no such file, wanted {wanted}", nearest_name(name)) from None
    except (OSError, ValueError) as error:       # ValueError: a NUL inside the path
        raise Refused(f"cannot be opened ({getattr(error, 'strerror', None) or error})",
                      "check the path and its permissions") from None
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        file.close()
        raise Refused(f"0 bytes, wanted {wanted}", "an interrupted copy? fetch it again")
    return file, size


def nearest_name(name):
    """A way out for a missing file: the most similar name in its folder, or the folder that is missing."""
    folder, base = os.path.split(os.path.abspath(name))
    try:
        near = difflib.get_close_matches(base, os.listdir(folder)[:2000], n=1)
    except OSError:
        return f"its folder {folder} does not exist or cannot be read"
    return f"did you mean {near[0]}?" if near else f"check the name; {folder} exists"


def insist_file(path, wanted):
    """Bytes of the file `path`. InputError unless it can be opened now; nothing of it is read."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise input_error(brief(path), f"is a {type(path).__name__}, wanted the path of {wanted}", "give it as text")
    try:
        file, size = open_regular(path, wanted)
        file.close()
        return size
    except Refused as refused:
        raise input_error(path, *refused.args) from None


def looks_like(head, way_out):
    """(what the first bytes of a file say it is, the way out: fetching it again where only a page or pointer came)."""
    text = head[:64].lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "a web page", "the download saved a page instead of the file: fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "run git lfs pull, or download the file itself"
    for start, what in ((b"\x89hdf", "an HDF5 file"), (b"#!aer-dat", "an AEDAT recording"), (b"\x80", "a bare pickle"),
                        (b"event stream", "an Event Stream recording"), (b"% ", "a Prophesee recording"),
                        (b"\x89png", "a PNG image"), (b"\xff\xd8", "a JPEG image"), (b"\x93numpy", "a numpy array")):
        if text.startswith(start):
            return what, way_out
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"text starting with {brief(head[:24].decode('ascii'))}", way_out
    return f"a file starting with the bytes {head[:8].hex(' ')}", way_out


# ---- events ----------------------------------------------------------------------------------------------------------

class Events(NamedTuple):
    """One recording, four 1-D tensors of N events in file order (not sorted by time: upstream does not sort either)."""
    x: torch.Tensor    # int32, column, 0 on the left
    y: torch.Tensor    # int32, row, 0 on top
    t: torch.Tensor    # int64, microseconds, any origin; nothing but the caller's own checks uses it
    p: torch.Tensor    # uint8, 0 negative, 1 positive. In a file anything but 0 is positive, -1 too: upstream's rule


def read_events(path, max_canvas=MAX_CANVAS):
    """Events of an `.npy` (EventGPT's pickled dict, or fields x, y, t, p of a structured array) or an `.npz` of arrays.

    Coordinates are integers from 0, inside `max_canvas` (H, W); other keys of the file are ignored. A pickle is
    walked, never unpickled: it may name numpy's array and dtype constructors, and its bytes become tensors."""
    try:
        file, size = open_regular(path, "an .npy or .npz of events")
        with file:
            if size > MAX_EVENT_BYTES:
                raise Refused(f"{size} bytes, the limit is {MAX_EVENT_BYTES}", "cut the recording into shorter windows")
            head = file.read(256)
            file.seek(0)
            if head.startswith(b"\x93NUMPY"):
                columns = columns_of_npy(file.read(size))
            elif head.startswith(b"PK\x03\x04"):
                columns = columns_of_npz(file)
            else:
                what, way_out = looks_like(head, "convert it (h5py, faery, aedat) to an .npz of x, y, t, p")
                raise Refused(f"not an .npy or .npz file but {what}", way_out)
        return events_of(columns, max_canvas)
    except Refused as refused:
        raise input_error(path, *refused.args) from None
    except (OSError, MemoryError) as error:
        raise input_error(path, f"reading failed ({brief(str(error) or type(error).__name__)})",
                          "check the disk and the free memory") from None


def events_of(columns, max_canvas):
    """Events of {name: RawArray}, after checking names, types, lengths and ranges."""
    missing = [key for key in "xytp" if key not in columns]
    if missing:
        found = ", ".join(brief(key, 20) for key in list(columns)[:12]) or "none"
        raise Refused(f"wanted the keys x, y, t, p, found {found} (missing: {', '.join(missing)})",
                      "save the recording with these four names")
    lengths = {key: columns[key].length(key) for key in "xytp"}
    if len(set(lengths.values())) > 1:
        raise Refused("x, y, t, p differ in length: " + ", ".join(f"{k} {n}" for k, n in lengths.items()),
                      "write the recording again with one entry per event")
    if lengths["x"] == 0:
        raise Refused("holds no events", "choose a window in which something moves")
    x, y, t, p = (columns[key].integers(key) for key in "xytp")
    for key, values, limit in (("x", x, max_canvas[1]), ("y", y, max_canvas[0])):
        low, high = extent(values)
        if low < 0:
            raise Refused(f"{key} is negative (smallest {low}), coordinates start at 0",
                          f"subtract the smallest {key}, or drop those events")
        if high >= limit:
            raise Refused(f"largest {key} is {high}, outside the {max_canvas[1]} x {max_canvas[0]} canvas allowed",
                          "drop stray events, or pass a larger max_canvas")
    return Events(as_type(x, torch.int32), as_type(y, torch.int32), as_type(t, torch.int64),
                  as_type(p, torch.bool).view(torch.uint8))


def as_type(values, dtype):
    """[N] of this type; itself if it is."""
    return values if values.dtype == dtype else quiet_copy(values, torch.empty(len(values), dtype=dtype))


TORCH_TYPES = {"b1": torch.uint8, "?": torch.uint8, "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32,
               "u8": torch.int64, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64}


class RawArray:
    """An array as a file describes it: numpy type string, shape, and a list of bytes-like rows not looked at yet."""

    def __init__(self, kind=None, shape=(), data=b"", order="|"):
        self.kind, self.shape, self.data, self.order = kind, shape, data, order

    def length(self, key):
        """Number of entries. Refuses anything but one dimension of integers whose bytes are all there."""
        if not isinstance(self.kind, str) or self.kind not in TORCH_TYPES:
            raise Refused(f"{key} has type {brief(self.kind, 20)}, wanted integers",
                          f"convert {key} to an integer type before saving")
        shape = self.shape
        if type(shape) is not tuple or len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] < 2**31:
            raise Refused(f"{key} has shape {short_shape(shape)}, wanted one dimension of fewer than 2^31 events",
                          "save four flat arrays")
        wanted = shape[0] * self.itemsize()
        if not isinstance(self.data, (bytes, bytearray, memoryview)):
            raise Refused(f"{key} holds no plain bytes", "save the recording again with numpy.savez")
        if len(self.data) != wanted:
            raise Refused(f"{key} announces {wanted} bytes, the file has {len(self.data)} for it",
                          "a damaged or incomplete copy: fetch it again")
        return shape[0]

    def itemsize(self):
        return 1 if self.kind == "?" else int(self.kind[1:])

    def integers(self, key):
        """1-D int32 or int64 tensor (own memory) of the entries."""
        item = self.itemsize()
        raw = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        if self.order == ">" and item > 1:
            raw = raw.view(-1, item).flip(1).contiguous().view(-1)
        values = raw.view(TORCH_TYPES[self.kind])
        # torch has few operations on uint16 and uint32: widen first.
        values = as_type(values, torch.int32 if item <= 2 else torch.int64)
        if self.kind == "u8" and values.amin().item() < 0:
            raise Refused(f"{key} holds values beyond 2^63", f"save {key} as int64")
        return values


def short_shape(shape):
    """A shape for a message; numbers from a file may have millions of digits."""
    if type(shape) is not tuple or len(shape) > 8 or not all(type(n) is int and abs(n) < 2**63 for n in shape):
        return "that is no shape"
    return "(" + ", ".join(map(str, shape)) + ")"


# ---- .npy and .npz: header by pattern, bytes by slice ----------------------------------------------------------------

HEADER_TYPE = re.compile(r"'descr'\s*:\s*'([<>|=]?)([A-Za-z?]\d*)'\s*,")
HEADER_FIELDS = re.compile(r"'descr'\s*:\s*\[((?:\s*\('[^'\\()]*',\s*'[^'\\()]*'\)\s*,?)+)\s*\]")
HEADER_FIELD = re.compile(r"\('([^'\\()]*)',\s*'([<>|=]?)([A-Za-z?])(\d*)'\)")
HEADER_SHAPE = re.compile(r"'shape'\s*:\s*\(([\d,\s]{0,200})\)")


def parse_header(file):
    """(header text, shape) at the start of an .npy file or zip member; leaves the file at the first byte of data."""
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise Refused("not an .npy file of version 1 to 3", "save it again with numpy.save or numpy.savez")
    width = 2 if magic[6] == 1 else 4
    announced = int.from_bytes(file.read(width), "little")
    if announced > MAX_HEADER_BYTES:
        raise Refused(f"announces a header of {announced} bytes, the limit is {MAX_HEADER_BYTES}",
                      "a damaged file: fetch it again")
    header = file.read(announced)
    if len(header) < announced:
        raise Refused(f"announces a header of {announced} bytes, the file has {len(header)}",
                      "an incomplete copy: fetch it again")
    header = re.sub(r"\s+", " ", header.decode("latin-1"))    # short runs keep the patterns below linear
    shape = HEADER_SHAPE.search(header)
    if not shape:
        raise Refused("its .npy header names no shape", "a damaged file: fetch it again")
    numbers = re.findall(r"\d+", shape[1])
    if any(len(n) > 18 for n in numbers):
        raise Refused("its .npy header announces an impossible shape", "a damaged file: fetch it again")
    return header, tuple(int(n) for n in numbers)


def columns_of_npy(blob):
    """{name: RawArray} of an .npy file: a pickled dict of arrays, or a structured array."""
    file = io.BytesIO(blob)
    header, shape = parse_header(file)
    if re.search(r"'descr'\s*:\s*'\|?O8?'", header):
        return columns_of_pickle(file, len(blob))
    fields = HEADER_FIELDS.search(header)
    if not fields:
        kind = HEADER_TYPE.search(header)
        raise Refused(f"one plain array of type {kind[2] if kind else 'unknown'} and shape {short_shape(shape)}, "
                      "wanted a dict or fields x, y, t, p", "save four arrays with numpy.savez(x=, y=, t=, p=)")
    if len(shape) != 1:
        raise Refused(f"a structured array of shape {short_shape(shape)}, wanted one dimension", "save a flat array")
    columns, offset = {}, 0
    for name, order, kind, width in HEADER_FIELD.findall(fields[1]):
        # V is padding of an aligned struct; U counts 4-byte characters.
        size = 1 if kind == "?" else int(width[:6] or 0) * (4 if kind == "U" else 1)
        columns[name] = (order, kind + width, offset, size)
        offset += size
    if len(HEADER_FIELD.findall(fields[1])) != fields[1].count("(") or offset == 0:
        raise Refused("its fields are not all plain numbers", "save four arrays with numpy.savez(x=, y=, t=, p=)")
    data = memoryview(blob)[file.tell():]
    if len(data) < shape[0] * offset:
        raise Refused(f"announces {shape[0]} events of {offset} bytes = {shape[0] * offset}, the file has {len(data)}",
                      "an incomplete copy: fetch it again")
    if shape[0] == 0:
        return {name: RawArray(kind, shape, b"", order) for name, (order, kind, _, _) in columns.items()}
    rows = torch.frombuffer(bytearray(data[:shape[0] * offset]), dtype=torch.uint8).view(shape[0], offset)
    return {name: RawArray(kind, shape, column_bytes(rows, begin, size), order)
            for name, (order, kind, begin, size) in columns.items() if name in ("x", "y", "t", "p") and size}


def column_bytes(rows, begin, size):
    """The bytes of one field of a structured array, one event after the other."""
    column = bytearray(rows.shape[0] * size)
    torch.frombuffer(column, dtype=torch.uint8).view(-1, size).copy_(rows[:, begin:begin + size])
    return column


ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, RuntimeError, NotImplementedError,
              EOFError, OSError, ValueError, LookupError, OverflowError)


def columns_of_npz(file):
    """{name: RawArray} of the members x, y, t, p of an .npz; other members are named but not read."""
    columns, unpacked = {}, 0
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in ("x", "y", "t", "p") or name in columns:
                    columns.setdefault(name, None)
                    continue
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise Refused(f"{name} is compressed by method {info.compress_type}",
                                  "save it with numpy.savez or numpy.savez_compressed")
                unpacked += info.file_size
                if unpacked > MAX_EVENT_BYTES:
                    raise Refused(f"unpacks to more than {MAX_EVENT_BYTES} bytes", "cut it into shorter windows")
                with archive.open(info) as member:
                    header, shape = parse_header(member)
                    kind = HEADER_TYPE.search(header)
                    if not kind:
                        raise Refused(f"{name} is not a plain array", f"save {name} as flat integers")
                    columns[name] = RawArray(kind[2], shape, member.read(info.file_size), kind[1])
    except ZIP_ERRORS as error:
        raise Refused(f"damaged .npz ({brief(str(error) or type(error).__name__)})", "fetch or save it again") from None
    return columns


# ---- the event pickle: walked, never unpickled -----------------------------------------------------------------------

class Name(NamedTuple):
    """Something a pickle asks to import. It stays a name."""
    module: str
    name: str


# What numpy's own pickles of numeric arrays ask for, protocols 2 to 5. `encode` is how protocol 2 spells bytes.
ALLOWED = {Name("numpy", "ndarray"), Name("numpy", "dtype"), Name("_codecs", "encode")} | {
    Name(f"numpy.{core}.{module}", name) for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))}

PUSHED = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
          "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
          "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
MARK = object()


class Walker:
    """A pickle stack machine whose only products are numbers, strings, bytes, lists, tuples, dicts and RawArrays."""

    def __init__(self, size):
        self.stack, self.memo, self.budget = [], {}, size

    def to_mark(self):
        """The items above the last mark, which goes too."""
        items = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def step(self, op, arg):
        stack = self.stack
        if op in PUSHED:
            stack.append(arg)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in ("PROTO", "FRAME"):
            pass
        elif op == "MARK":
            stack.append(MARK)
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[arg] = stack[-1]       # a dict: a huge index is one entry, not a huge table
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[arg])
        elif op in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[op]())
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            if len(stack) < count:
                raise IndexError("stack is too short")
            stack[-count:] = [tuple(stack[-count:])]
        elif op == "TUPLE":
            stack.append(tuple(self.to_mark()))
        elif op == "LIST":
            stack.append(self.to_mark())
        elif op == "DICT":
            stack.append(self.filled({}, self.to_mark()))
        elif op in ("APPEND", "APPENDS"):
            items = self.to_mark() if op == "APPENDS" else [stack.pop()]
            if type(stack[-1]) is not list:
                raise TypeError("append to something that is no list")
            stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = self.to_mark() if op == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            self.filled(stack[-1], items)
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self.to_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "GLOBAL":
            stack.append(self.allowed(*arg.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self.allowed(module, name))
        elif op == "REDUCE":
            args, function = stack.pop(), stack.pop()
            stack.append(self.made(function, args))
        elif op == "BUILD":
            state = stack.pop()
            self.set_state(stack[-1], state)
        else:
            raise Refused(f"its pickle uses {op}, which no array of numbers needs: refused",
                          "if you trust its origin, save x, y, t, p with numpy.savez as an .npz")

    def filled(self, target, items):
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items for something that is no dict")
        # Other kinds of keys are never event columns; leaving them out also keeps deep tuples from being hashed.
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) is str)
        return target

    def allowed(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        if Name(module, name) not in ALLOWED:
            raise Refused(f"its pickle asks to import {brief(f'{module}.{name}')}: refused, nothing was run",
                          "get the recording from a source you trust, as an .npz of x, y, t, p")
        return Name(module, name)

    def made(self, function, args):
        """What numpy would construct, as data."""
        what = function.name if type(function) is Name else None
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        if what == "_reconstruct":
            return RawArray()
        if what == "dtype" and type(args[0]) is str:
            kind = args[0]
            return RawArray(kind.lstrip("<>|=")[:16], order=kind[:1] if kind[:1] in "<>" else "|")
        if what == "scalar" and type(args[0]) is RawArray:
            return RawArray(args[0].kind, (), args[1] if len(args) > 1 else b"", args[0].order)
        if what == "_frombuffer":
            data, dtype, shape = args[:3]
            return self.array(RawArray(), shape, dtype, data)
        if what == "encode" and len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
            # Once per byte of the file: repeating it over one long string must not fill the memory.
            self.budget -= len(args[0])
            if self.budget < 0:
                raise Refused("its pickle expands its strings beyond its size", "fetch or save it again")
            return args[0].encode("latin-1")
        raise TypeError("a call that makes no array")

    def array(self, target, shape, dtype, data):
        if type(dtype) is not RawArray or type(target) is not RawArray:
            raise TypeError("an array without a type")
        if type(data) is str:                # protocol 2 of Python 2 has strings for bytes
            self.budget -= len(data)
            if self.budget < 0:
                raise Refused("its pickle expands its strings beyond its size", "fetch or save it again")
            data = data.encode("latin-1")
        target.kind, target.order, target.shape, target.data = dtype.kind, dtype.order, shape, data
        return target

    def set_state(self, target, state):
        """numpy's __setstate__: (version, order, ...) of a type, (version, shape, type, fortran, data) of an array."""
        if type(target) is not RawArray or type(state) is not tuple:
            raise TypeError("a state for something that is no array")
        if len(state) == 5:                  # one dimension has no Fortran order to care about
            self.array(target, state[1], state[2], state[4])
        elif len(state) in (8, 9) and type(state[1]) is str and state[1] in ("<", ">", "|", "="):
            target.order = state[1]
        else:
            raise TypeError("a state that numpy does not write")


def columns_of_pickle(file, size):
    """{name: RawArray} of a pickled object array holding one dict. Nothing the pickle names is imported or called."""
    walker = Walker(size)
    stopped = False
    try:
        for count, (op, arg, _) in enumerate(pickletools.genops(file)):
            if count >= MAX_OPCODES:
                raise Refused(f"its pickle has more than {MAX_OPCODES} steps, far beyond what four arrays need",
                              "save x, y, t, p with numpy.savez as an .npz")
            if op.name == "STOP":
                stopped = True
                break
            walker.step(op.name, arg)
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error, DeprecationWarning) as error:
        announced = re.search(r"expected (\d+) bytes in a \w+, but only (\d+) remain", str(error))
        if announced:
            raise Refused(f"announces {announced[1]} bytes, the file has {announced[2]} left",
                          "an incomplete or damaged copy: fetch it again") from None
        raise Refused(f"damaged pickle ({brief(str(error))})", "fetch or save it again") from None
    top = walker.stack[-1] if stopped and walker.stack else None
    if type(top) is RawArray and type(top.data) is list and len(top.data) == 1:
        top = top.data[0]
    if type(top) is not dict:
        raise Refused("its pickle holds no dict of arrays", "save x, y, t, p with numpy.savez as an .npz")
    # A plain list or number under one of the four names is answered like an array of the wrong type.
    return {key: value if type(value) is RawArray else RawArray(type(value).__name__) for key, value in top.items()}


# ---- images ----------------------------------------------------------------------------------------------------------

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, MemoryError, ArithmeticError, LookupError, TypeError,
                AttributeError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
                Image.DecompressionBombWarning)


def read_images(paths):
    """List of [H, W, 3] uint8, one per PNG or JPEG, converted to RGB as upstream does: `Image.convert("RGB")`.

    That means: alpha is dropped, palettes are looked up, EXIF rotation is not applied. Raises InputError."""
    return [read_image(path) for path in paths]


def read_image(path):
    try:
        file, _ = open_regular(path, "a PNG or JPEG")
        with file:
            head = file.read(256)
            file.seek(0)
            if not head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8")):
                what, way_out = looks_like(head, "convert it to PNG")
                raise Refused(f"not a PNG or JPEG but {what}", way_out)
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                warnings.simplefilter("ignore", UserWarning)      # remarks on damaged EXIF, which is not used
                image = Image.open(file, formats=("PNG", "JPEG"))
                width, height = image.size
                check_size(width, height, MAX_IMAGE_PIXELS)
                image = image.convert("RGB")
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    except Refused as refused:
        raise input_error(path, *refused.args) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise input_error(path, f"an image of more than {MAX_IMAGE_PIXELS} pixels", "make it smaller first") from None
    except IMAGE_ERRORS as error:
        raise input_error(path, f"truncated or damaged image ({brief(str(error) or type(error).__name__)})",
                          "open it in a viewer, or fetch it again") from None


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

    Frames go by number, not by time. The container's header says how many there are, as upstream takes it; where it has
    no count (webm, mkv) or announces frames that are not there, decoding counts. Repeated frames share their memory.
    Rotation metadata is not applied. One container per call, so calls may run on several threads. Raises InputError."""
    if rule not in VIDEO_RULES or num_frames < 1:
        raise ValueError(f"read_video: wanted rule in {VIDEO_RULES} and num_frames >= 1, got {rule!r} and {num_frames}")
    try:
        take = (lambda frame: pinned(rgb_tensor(frame))) if for_gpu else rgb_tensor
        decoding = decoding or (lambda: None)
        frames = planned_frames(path, num_frames, take, decoding) if rule == "uniform" else None
        if frames is None:
            decoding()
            frames = counted_frames(path, num_frames, rule, take)
        return one_size(frames)
    except Refused as refused:
        raise input_error(path, *refused.args) from None
    except KeyError:
        raise input_error(path, "decoded to a different number of frames the second time",
                          "is it still being written? copy it first") from None


def counted_frames(path, num_frames, rule, take=None):
    """The frames of `read_video` for any file: decoded one after the other and counted as they come."""
    total, trusted = (num_frames, True) if rule == "first" else announced_frames(path)
    indices = sample_indices(total, num_frames, rule)
    kept, decoded = decode_frames(path, indices, stop_early=trusted, take=take)
    if decoded <= indices[-1] or (not trusted and decoded != total):
        indices = sample_indices(decoded, num_frames, rule)
        if not kept.keys() >= set(indices):
            kept, _ = decode_frames(path, indices, stop_early=True, take=take)
    return [kept[index] for index in indices]


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
        elif name == b"stsz" and not (sound and any(box[12:16])):
            total += int.from_bytes(box[16:20], "big")
        at += size
    return total


def open_video(path, decoders="all"):
    """An opened container and its first video stream, with the doors to other files and the network shut.

    decoders: "none" keeps FFmpeg from decoding the first pictures when it opens the file, 0.9 in place of 9.0 ms for a
    clip of 640 x 480 beside an H100; what it would learn from them, such as the order of H.264 pictures, then stays
    unknown unless the headers say it."""
    file, size = open_regular(path, "a video file")
    with file:
        head = file.read(256)
        if announced_samples(file, 0, size) > MAX_SAMPLES:
            raise Refused(f"its tables announce more than {MAX_SAMPLES} samples", "damaged, or cut it shorter")
    try:
        # Absolute: nothing in a relative name then reads as a protocol.
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
        if decoders == "none":
            options["codec_whitelist"] = "none"
        container = av.open(os.path.abspath(os.fsdecode(path)), metadata_errors="ignore", options=options)
    except VIDEO_ERRORS as error:
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") or \
                head.startswith((b"\x1aE\xdf\xa3", b"RIFF")):
            raise Refused(f"a video container without a usable index ({ffmpeg_says(error)})",
                          "an incomplete copy? fetch it again") from None
        what, way_out = looks_like(head, "give an mp4, mov, mkv, webm or avi file")
        raise Refused(f"not a video container but {what}", way_out) from None
    try:
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise Refused(f"no video stream (streams found: {kinds})", "give a file with pictures")
        stream = container.streams.video[0]
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


def ffmpeg_says(error):
    """FFmpeg's sentence without the number and the C function that PyAV wraps around it."""
    return brief(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def announced_frames(path):
    """(number of frames, whether a header says so). Without a header count, packets are counted: close, not binding."""
    container, stream, codec = open_video(path)
    with container:
        total = stream.frames
        trusted = total > 0
        if not trusted:
            try:
                total = 0
                for packet in container.demux(stream):
                    total += packet.size > 0
                    if total > MAX_VIDEO_FRAMES:
                        break
            except VIDEO_ERRORS as error:
                raise Refused(f"damaged after {total} {codec} packets ({ffmpeg_says(error)})",
                              "an incomplete copy? fetch it again") from None
    if total > MAX_VIDEO_FRAMES:
        raise Refused(f"more than {MAX_VIDEO_FRAMES} frames", "cut the clip to the part in question")
    if total == 0:
        raise Refused("0 frames", "an empty or incomplete recording: fetch it again")
    return total, trusted


def decode_frames(path, indices, stop_early, take=None):
    """({index: [H, W, 3] uint8}, frames decoded). stop_early: leave after the last index, else count to the end. take:
    what makes a tensor of a wanted frame, `rgb_tensor` unless given."""
    take = take or rgb_tensor
    container, stream, codec = open_video(path)
    wanted, last, kept, decoded = set(indices), indices[-1], {}, 0
    try:
        with container:
            for packet in container.demux(stream):
                if packet.is_corrupt:            # some codecs make a picture of half a packet, and then end in peace
                    decoded += len(stream.decode(None))      # those still on their way through the decoder's threads
                    raise Refused(f"decoded {decoded} {codec} frames, then the file ends inside a packet",
                                  "an incomplete copy? fetch it again")
                for frame in packet.decode():
                    if decoded in wanted:
                        kept[decoded] = take(frame)
                    decoded += 1
                    if stop_early and decoded > last:
                        return kept, decoded
                if decoded > MAX_VIDEO_FRAMES:
                    raise Refused(f"more than {MAX_VIDEO_FRAMES} frames", "cut the clip to the part in question")
    except VIDEO_ERRORS as error:
        raise Refused(f"decoded {decoded} {codec} frames, then failed ({ffmpeg_says(error)})",
                      "truncated or damaged: fetch it again, or cut it before that frame") from None
    if decoded == 0:
        raise Refused("0 frames", "an empty or incomplete recording: fetch it again")
    return kept, decoded


# The quick way, for the H.264 in mp4, mov and mkv. Reading packets is cheap and decoding them is not: the packets alone
# say how many frames there are, which of them are wanted, and which packets those need. What is wanted is known by its
# time stamp, so groups of pictures decode side by side, and pictures that no other refers to are never decoded.
# Where the packets leave any doubt that `counted_frames` would give these very frames, it gives them.

class Picture(NamedTuple):
    """What the bytes of one H.264 packet say. It holds one whole frame, or there is none of these."""
    idr: bool          # nothing after it refers to anything before it
    referred: bool     # others may be predicted from it


def planned_frames(path, num_frames, take=None, decoding=lambda: None):
    """Uniformly sampled frames as `counted_frames` gives them, or None wherever that cannot be shown beforehand."""
    container, stream, codec = open_video(path, decoders="none")
    if "mp4" not in container.format.name:       # an mp4 says how far its pictures are out of order
        container.close()
        container, stream, codec = open_video(path)
    with container:
        try:
            if codec != "h264" or not 0 < container.size <= MAX_HELD_BYTES:
                return None
            packets = []
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(packet)
                if len(packets) > MAX_VIDEO_FRAMES:
                    return None
            runs, order = plan(packets, stream, num_frames) or (None, None)
            if runs and max(len(needed) for needed, _ in runs) * stream.width * stream.height > LONG_PIXELS:
                decoding()
            kept = runs and decode_runs(stream, runs, take or rgb_tensor)
        except (Refused, *VIDEO_ERRORS):         # counted_frames meets the same, and knows how to say it
            return None
    return [kept[pts] for pts in order] if kept and kept.keys() >= set(order) else None


def plan(packets, stream, num_frames):
    """(runs, pts of each frame to take), or None in doubt. A run: packets from an IDR on, and the pts to keep."""
    length_bytes = avcc_length_bytes(stream)
    if not length_bytes or stream.frames not in (0, len(packets)):
        return None
    pictures, times, highest = [], [], None
    for packet in packets:
        picture = picture_of(packet, length_bytes)
        if picture is None or packet.pts is None or packet.is_corrupt or packet.is_discard or packet.has_sidedata(
                "new_extradata"):
            return None
        if picture.idr and highest is not None and packet.pts <= highest:
            return None                          # shown before something that was sent before it
        highest = packet.pts if highest is None else max(highest, packet.pts)
        pictures.append(picture)
        times.append(packet.pts)
    shown, begins = sorted(times), [i for i, picture in enumerate(pictures) if picture.idr]
    if not begins or begins[0] != 0 or len(set(times)) < len(times):
        return None
    if any(shown[begin] != times[begin] for begin in begins):
        return None                              # shown after something that was sent after it
    if reordering(times) > stream.codec_context.reorder_depth:
        return None                              # more than the decoder sets out to put right
    order = [shown[index] for index in sample_indices(len(packets), num_frames)]
    wanted, runs = set(order), []
    for begin, end in zip(begins, [*begins[1:], len(packets)], strict=True):
        inside = [i for i in range(begin, end) if times[i] in wanted]
        if inside:
            needed = [i for i in range(begin, inside[-1] + 1) if pictures[i].referred or times[i] in wanted]
            runs.append(([packets[i] for i in needed], {times[i] for i in inside}))
    return runs, order


def reordering(times):
    """The most pictures that are sent before one and shown after it."""
    past, most = [], 0
    for time in times:
        place = bisect.bisect(past, time)
        most = max(most, len(past) - place)
        past.insert(place, time)
    return most


def picture_of(packet, length_bytes):
    """Picture of an H.264 packet, or None unless it is exactly one, of slices that agree, with nothing beside it."""
    data, at, kinds, firsts = memoryview(packet), 0, set(), 0
    while at + length_bytes + 1 < len(data):
        length, head = int.from_bytes(data[at:at + length_bytes], "big"), data[at + length_bytes]
        kind = head & 31
        if kind in (1, 5):                       # a slice of a plain picture, of an IDR picture
            kinds.add((kind == 5, head & 0x60 != 0))
            firsts += data[at + length_bytes + 1] >> 7      # its first macroblock is number 0
        elif kind not in (6, 9, 12):             # remarks, delimiters and filling; new parameters are not foreseen
            return None
        at += length_bytes + length
    return Picture(*kinds.pop()) if at == len(data) and len(kinds) == 1 and firsts == 1 else None


def avcc_length_bytes(stream):
    """Bytes of a length field, of an H.264 stream with one set of parameters and whole frames only; else None."""
    data = bytes(stream.codec_context.extradata or b"")
    if len(data) < 12 or data[0] != 1 or data[5] & 31 != 1:
        return None
    sps = data[8:8 + int.from_bytes(data[6:8], "big")]
    return (data[4] & 3) + 1 if whole_frames(sps, stream.width, stream.height) else None


def whole_frames(sps, width, height):
    """Whether a sequence parameter set rules out fields and gaps, which would undo "one packet, one frame"."""
    profile, payload = sps[1] if len(sps) > 4 else 0, sps[4:]      # unit type, profile, constraints, level
    payload = payload.replace(b"\0\0\3", b"\0\0")
    bits, at = "".join(f"{byte:08b}" for byte in payload), 0

    def number():                                # an Exp-Golomb code
        nonlocal at
        zeros = bits.index("1", at) - at
        at += 2 * zeros + 1
        return int(bits[at - zeros - 1:at], 2) - 1

    try:
        number()                                 # its id
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128):
            planes = number() == 3               # chroma format 3 has a bit for separate planes
            at += planes
            number(), number()                   # bit depths
            at += 1
            if bits[at] != "0":                  # scaling lists would have to be read past
                return False
            at += 1
        number()                                 # bits of a frame number
        order = number()
        if order == 0:
            number()
        elif order == 1:
            at += 1
            number(), number()
            for _ in range(number()):
                number()
        number()                                 # reference frames
        gaps = bits[at]
        at += 1
        sides = [16 * (number() + 1) for _ in range(2)]
        # Sides that fit prove that the reading kept step.
        fits = all(0 <= side - wanted < 16 for side, wanted in zip(sides, (width, height), strict=True))
        return fits and gaps == "0" and bits[at] == "1"
    except (ValueError, IndexError):             # it ends early
        return False


def decode_runs(stream, runs, take):
    """{pts: what `take` makes of that frame} of all runs, or None in doubt. Runs go to threads, each with a decoder.

    20 s of 640 x 480 on 16 cores, 8 runs: 34 ms. Dropped: one thread that hands packets round to all decoders, on 2, 4
    or 8 of FFmpeg's threads each (44, 39 and 45 ms), 4 such threads (33 to 36), a decoder's threads 1 or 4 (40, 38)."""
    runs = sorted(runs, key=lambda run: len(run[0]))          # the longest is taken first
    workers = min(len(runs), cores())
    threads = max(1, min(cores() // workers, MAX_DECODE_THREADS))

    def work():
        kept = {}
        while runs:
            try:
                packets, wanted = runs.pop()
            except IndexError:                   # another thread was quicker
                break
            decoder = decoder_like(stream, threads)
            for packet in (*packets, None):      # None: whatever is still on its way
                for frame in decoder.decode(packet):
                    if frame.pts in wanted:
                        if frame.pts in kept or frame.is_corrupt:
                            return None
                        kept[frame.pts] = take(frame)
        return kept

    others = [pool().submit(work) for _ in range(workers - 1)]
    try:
        parts = [work()]
    finally:
        wait(others)                             # the packets belong to a container that is closed next
    parts += [other.result() for other in others]
    return None if None in parts else {pts: frame for part in parts for pts, frame in part.items()}


@functools.cache
def pool():
    """Threads that stay: starting them anew costs more than they save on a short clip."""
    return ThreadPoolExecutor(16, "media")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)     # a forked child has the object and none of its threads


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


# ---- what is in this file? -------------------------------------------------------------------------------------------

def bench(seconds_each=1.0):
    """Prints the media table: made clips, from file to eight normalised frames of 224, and five event frames of 336."""
    from tempfile import TemporaryDirectory
    from time import perf_counter

    from kernels.check import quantiles, table
    from kernels.frames import clip_pixels, draw_events
    from weights.tiny.make_clips import BENCH_CLIPS, write_events, write_film

    def row(name, load, preprocess):
        times, end = [], perf_counter() + seconds_each
        while len(times) < 5 or perf_counter() < end:
            begin = perf_counter()
            loaded = load()
            between = perf_counter()
            preprocess(loaded)
            times.append([1e3 * (t - begin) for t in (between, perf_counter())])
        read, whole = zip(*times[1:], strict=True)
        rest = [b - a for a, b in zip(read, whole, strict=True)]
        return [name, quantiles(read)[1], quantiles(rest)[1], *quantiles(whole), len(whole)]

    rows = []
    with TemporaryDirectory() as folder:
        for name, (seconds, size, keyframe) in BENCH_CLIPS.items():
            path = os.path.join(folder, f"{name}.mp4")
            write_film(path, seconds, size, keyframe)
            label = f"{seconds} s, {size[0]} x {size[1]}, keyframe every {min(keyframe / 25, seconds):g} s"
            rows.append(row(label, lambda path=path: read_video(path), lambda frames: clip_pixels(frames, 224)))
        seeded = torch.Generator().manual_seed(0)
        x, y, t, p = (torch.randint(0, top, (132_268,), generator=seeded) for top in (640, 480, 50_000, 2))
        write_events(Path(folder) / "events.npz", x, y, t, p)
        rows.append(row("132,268 events, 640 x 480", lambda: read_events(Path(folder) / "events.npz"),
                        lambda events: clip_pixels(draw_events(events), 336)))
    table(f"media, ms, {cores()} cores, torch threads {torch.get_num_threads()}, PyAV {av.__version__}: file to pixels",
          ["what", "read p50", "draw, resize p50", "p20", "p50", "p80", "runs"], rows)


def main(argv):
    """One line per file of the command line: events, image or video, whichever it reads as."""
    if not argv:
        print(__doc__)
        return 2
    if argv == ["--bench"]:
        bench()
        return 0
    for path in argv:
        kind = os.path.splitext(path)[1].lower()
        try:
            if kind in (".npy", ".npz"):
                events = read_events(path)
                span = (events.t.max() - events.t.min()).item() / 1e3
                print(f"{path}: {events.x.numel()} events over {span:.3f} ms, x up to {events.x.max().item()}, "
                      f"y up to {events.y.max().item()}, {events.p.sum(dtype=torch.int64).item()} positive")
            elif kind in (".png", ".jpg", ".jpeg"):
                print(f"{path}: image of {' x '.join(map(str, read_image(path).shape[1::-1]))} pixels")
            else:
                total, trusted = announced_frames(path)
                frame = read_video(path, 1)[0]
                print(f"{path}: video of {frame.shape[1]} x {frame.shape[0]}, {total} frames "
                      f"({'header' if trusted else 'packets counted'})")
        except InputError as error:
            print(error)
            return 2
        except Refused as refused:
            print(input_error(path, *refused.args))
            return 2
    return 0


if __name__ == "__main__":
    import sys
    sys.exit(main(sys.argv[1:]))
