"""events: event recordings as tensors: `.npy` (EventGPT's pickled dict or a structured array) and `.npz`. No numpy, and
nothing is unpickled.

    events = read_events("sample1.npy")            # Events(x, y, t, p)"""

import ast
import contextlib
import io
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from typing import NamedTuple

import torch

from kernels.frames import extent, quiet_copy
from weights.files import InputError, Refused, insist_whole, insist_whole_zip, naming, open_kind, quoted, reason_of

MAX_EVENT_BYTES = 1 << 30            # of a file, and of the arrays an .npz unpacks to
MAX_PACKED = 100                     # bytes that a byte of an .npz may unpack to; recordings have some 3
MAX_CANVAS = (4096, 4096)            # (H, W); the largest coordinate sizes the picture, so a stray event can cost GBs
MAX_OPCODES = 10_000                 # real event pickles have about 200
MAX_HEADER_BYTES = 10_000            # of an .npy, numpy's own limit


EVENT_FILE = ("an .npy or .npz of events", (b"\x93NUMPY", b"PK\x03\x04"),
              "convert it (h5py, faery, aedat) to an .npz of x, y, t, p")


class Events(NamedTuple):
    """One recording, four 1-D tensors of N events in file order (not sorted by time: upstream does not sort either)."""
    x: torch.Tensor    # int32, column, 0 on the left
    y: torch.Tensor    # int32, row, 0 on top
    t: torch.Tensor    # int64, microseconds, any origin; nothing but the caller's own checks uses it
    p: torch.Tensor    # uint8, 0 negative, 1 positive; in a file also false and true, or -1 and 1


def read_events(path, max_canvas=MAX_CANVAS):
    """Events of an `.npy` (EventGPT's pickled dict, or fields x, y, t, p of a structured array) or an `.npz` of arrays.

    Coordinates are integers from 0, inside `max_canvas` (H, W); other keys of the file are ignored. A pickle is
    walked, never unpickled: it may name numpy's array and dtype constructors, and its bytes become tensors."""
    with naming(path):
        try:
            file, size, head = open_kind(path, *EVENT_FILE)
            with file:
                if size > MAX_EVENT_BYTES:
                    raise Refused(f"{size} bytes, the limit is {MAX_EVENT_BYTES}", "cut the recording into shorter "
                                  "windows")
                zipped = head.startswith(b"PK")
                columns = columns_of_npz(file, size) if zipped else columns_of_npy(file.read(size))
            return events_of(columns, max_canvas)
        except (OSError, MemoryError) as error:
            raise Refused(f"reading failed ({reason_of(error)})", "check the disk and the free memory") from None


def check_canvas(canvas) -> tuple | None:
    """(H, W) of the pictures that events are drawn in, or None: as large as they need. InputError for anything else."""
    if canvas is None:
        return None
    with contextlib.suppress(Exception):                     # of any class; a set has no order, a mapping no first
        height, width = (insist_whole("canvas", canvas[i], 1, MAX_CANVAS[i]) for i in range(len(canvas)))
        return height, width
    raise InputError(f"canvas: wanted (height, width), whole numbers of pixels up to {MAX_CANVAS[0]} x "
                     f"{MAX_CANVAS[1]}, got {quoted(canvas)}; change it, or leave it out")


def events_of(columns, max_canvas):
    """Events of {name: RawArray}, after checking names, types, lengths and ranges."""
    missing = [key for key in "xytp" if key not in columns]
    if missing:
        found = ", ".join(quoted(key, 20) for key in list(columns)[:12]) or "none"
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
                          "drop stray events")
    return Events(as_type(x, torch.int32), as_type(y, torch.int32), as_type(t, torch.int64), polarity(p))


def polarity(codes):
    """uint8 [N], 0 negative and 1 positive, of codes 0 and 1 or -1 and 1, told apart by those that occur. Upstream
    takes anything but 0 as positive, -1 too."""
    low, high = extent(codes)
    signed = low == -1
    if low < -1 or high > 1 or signed and bool((codes == 0).any()):
        found = "-1, 0 and 1" if (low, high) == (-1, 1) else f"from {low} to {high}"
        raise Refused(f"p holds codes {found}, wanted 0 and 1, or -1 and 1", "write 1 for brighter, 0 for darker")
    return as_type(codes > 0 if signed else codes, torch.bool).view(torch.uint8)


def as_type(values, dtype):
    """[N] of this type; itself if it is."""
    if values.dtype == dtype:
        return values
    return quiet_copy(values, torch.empty(len(values), dtype=dtype, device=values.device))


TORCH_TYPES = {"b1": torch.uint8, "?": torch.uint8, "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32,
               "u8": torch.int64, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64}


class RawArray:
    """An array as a file describes it: numpy type string, shape, and a list of bytes-like rows not looked at yet."""

    def __init__(self, kind=None, shape=(), data=b"", order="|"):
        self.kind, self.shape, self.data, self.order = kind, shape, data, order

    def length(self, key):
        """Number of entries. Refuses anything but one dimension of integers whose bytes are all there."""
        if not isinstance(self.kind, str) or self.kind not in TORCH_TYPES:
            raise Refused(f"{key} has type {quoted(self.kind, 20)}, wanted integers",
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


# ---- .npy and .npz: header as a literal, bytes by slice --------------------------------------------------------------

def parse_header(file):
    """(type, shape) at the start of an .npy file or zip member; leaves the file at the first byte of data. The type is
    a string, or [(name, string), ...] of a structured array."""
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise Refused("not an .npy file of version 1 to 3", "save it again with numpy.save or numpy.savez")
    announced = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if announced > MAX_HEADER_BYTES:
        raise Refused(f"announces a header of {announced} bytes, the limit is {MAX_HEADER_BYTES}",
                      "a damaged file: fetch it again")
    header = file.read(announced)
    if len(header) < announced:
        raise Refused(f"announces a header of {announced} bytes, the file has {len(header)}",
                      "an incomplete copy: fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # about odd literals; a header's are plain
            fields = ast.literal_eval(header.decode("latin-1").strip())
        descr, shape = fields["descr"], fields["shape"]
    except (SyntaxError, ValueError, LookupError, TypeError, MemoryError, RecursionError):
        raise Refused("its .npy header names no shape or type", "a damaged file: fetch it again") from None
    if type(shape) is not tuple or not all(type(n) is int and 0 <= n < 2**60 for n in shape):
        raise Refused("its .npy header announces an impossible shape", "a damaged file: fetch it again")
    return descr, shape


def plain_type(descr):
    """(byte order, kind and width) of numpy's spelling of one plain type, "<u2" for example; else ("|", "unknown")."""
    found = re.fullmatch(r"([<>|=]?)([A-Za-z?]\d{0,6})", descr) if isinstance(descr, str) else None
    return (found[1], found[2]) if found else ("|", "unknown")


def columns_of_npy(blob):
    """{name: RawArray} of an .npy file: a pickled dict of arrays, or a structured array."""
    file = io.BytesIO(blob)
    descr, shape = parse_header(file)
    if plain_type(descr)[1] in ("O", "O8"):
        return columns_of_pickle(file, len(blob))
    fields = descr if isinstance(descr, list) else []
    if not fields or not all(type(f) is tuple and len(f) == 2 and type(f[0]) is str for f in fields):
        raise Refused(f"one plain array of type {plain_type(descr)[1]} and shape {short_shape(shape)}, "
                      f"wanted a dict or fields x, y, t, p", "save four arrays with numpy.savez(x=, y=, t=, p=)")
    if len(shape) != 1:
        raise Refused(f"a structured array of shape {short_shape(shape)}, wanted one dimension", "save a flat array")
    columns, offset = {}, 0
    for name, spelling in fields:
        order, kind = plain_type(spelling)
        # V is padding of an aligned struct; U counts 4-byte characters.
        size = 1 if kind == "?" else int(kind[1:] if kind[1:].isdecimal() else 0) * (4 if kind[0] == "U" else 1)
        columns[name] = (order, kind, offset, size)
        offset += size
    names = [name for name, _ in fields if name]        # padding has none
    if len({*names}) < len(names):
        raise Refused("two of its fields have one name", "save four arrays with numpy.savez(x=, y=, t=, p=)")
    if any(kind in ("unknown", "O", "O8") for _, kind, _, _ in columns.values()) or offset == 0:
        raise Refused("its fields are not all plain numbers", "save four arrays with numpy.savez(x=, y=, t=, p=)")
    data = memoryview(blob)[file.tell():]
    if len(data) != shape[0] * offset:
        raise Refused(f"announces {shape[0]} events of {offset} bytes = {shape[0] * offset}, the file has {len(data)}",
                      "a damaged or incomplete copy: fetch it again")
    if shape[0] == 0:
        return {name: RawArray(kind, shape, b"", order) for name, (order, kind, _, _) in columns.items()}
    rows = torch.frombuffer(bytearray(data[:shape[0] * offset]), dtype=torch.uint8).view(shape[0], offset)
    return {name: RawArray(kind, shape, column_bytes(rows, begin, size) if name in ("x", "y", "t", "p") else b"", order)
            for name, (order, kind, begin, size) in columns.items() if name and size}


def column_bytes(rows, begin, size):
    """The bytes of one field of a structured array, one event after the other."""
    column = bytearray(rows.shape[0] * size)
    torch.frombuffer(column, dtype=torch.uint8).view(-1, size).copy_(rows[:, begin:begin + size])
    return column


ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, RuntimeError, NotImplementedError,
              EOFError, OSError, ValueError, LookupError, OverflowError)


def columns_of_npz(file, size):
    """{name: RawArray} of the members x, y, t, p of an .npz; other members are named but not read."""
    columns, unpacked = {}, 0
    try:
        with zipfile.ZipFile(file) as archive:
            insist_whole_zip(archive)
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in ("x", "y", "t", "p"):
                    columns[name] = None
                    continue
                if name in columns:
                    raise Refused(f"holds {name} twice", "save it again with numpy.savez")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise Refused(f"{name} is compressed by method {info.compress_type}",
                                  "save it with numpy.savez or numpy.savez_compressed")
                unpacked += info.file_size
                most = min(MAX_EVENT_BYTES, max(MAX_PACKED * size, 1 << 24))
                if unpacked > most:
                    raise Refused(f"unpacks to more than {most} bytes", "cut it into shorter windows")
                with archive.open(info) as member:
                    descr, shape = parse_header(member)
                    order, kind = plain_type(descr)
                    if kind == "unknown":
                        raise Refused(f"{name} is not a plain array", f"save {name} as flat integers")
                    columns[name] = RawArray(kind, shape, member.read(info.file_size), order)
    except ZIP_ERRORS as error:
        raise Refused(f"damaged .npz ({reason_of(error)})", "fetch or save it again") from None
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

PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE",
          "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
MARK = object()


class Walker:
    """A pickle stack machine whose only products are numbers, strings, bytes, lists, tuples, dicts and RawArrays. It
    knows the opcodes that protocols 2 to 5 write for them."""

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
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]       # a dict: a huge index is one entry, not a huge table
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
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

    def allowed(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        if Name(module, name) not in ALLOWED:
            raise Refused(f"its pickle asks to import {quoted(f'{module}.{name}', 60)}: refused, nothing was run",
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
            return self.latin1(args[0])
        raise TypeError("a call that makes no array")

    def latin1(self, text):
        """Its bytes. Once per byte of the file: repeating it over one long string must not fill the memory."""
        self.budget -= len(text)
        if self.budget < 0:
            raise Refused("its pickle expands its strings beyond its size", "fetch or save it again")
        return text.encode("latin-1")

    def array(self, target, shape, dtype, data):
        if type(dtype) is not RawArray or type(target) is not RawArray:
            raise TypeError("an array without a type")
        if type(data) is str:                # protocol 2 of Python 2 has strings for bytes
            data = self.latin1(data)
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
        raise Refused(f"damaged pickle ({reason_of(error)})", "fetch or save it again") from None
    if left := len(file.read()):
        raise Refused(f"holds {left} bytes behind its pickle", "damaged, or something was appended: fetch or save it "
                      "again")
    top = walker.stack[-1] if stopped and walker.stack else None
    if type(top) is RawArray and type(top.data) is list and len(top.data) == 1:
        top = top.data[0]
    if type(top) is not dict:
        raise Refused("its pickle holds no dict of arrays", "save x, y, t, p with numpy.savez as an .npz")
    # A plain list or number under one of the four names is answered like an array of the wrong type.
    return {key: value if type(value) is RawArray else RawArray(type(value).__name__) for key, value in top.items()}
