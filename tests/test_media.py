"""weights.events, weights.video: real files are read right, bad ones refused in one line, nothing is unpickled."""

import hashlib
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.film import write_film
from weights import InputError, video
from weights.events import read_events

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SAMPLES = SHARED / "data" / "event_samples"
PUBLIC = SHARED / "data" / "events_public"
PREPROCESS = SHARED / "fixtures" / "video_llava_tiny" / "preprocess"
SAMPLE_NAMES = ["sample1.npy", "interlaken_00_d_000074.npy", "interlaken_00_d_000079.npy",
                "interlaken_00_d_000089.npy", "interlaken_00_d_000099.npy"]


def needs(path):
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    return path


def refused(read, path, words=()):
    """The message of the InputError that `read(path)` raises: one line, with the path, within a second of this
    process: others may keep the machine busy."""
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        read(path)
    seconds, message = time.process_time() - begin, str(caught.value)
    assert seconds <= 1.0, f"took {seconds:.2f} s"
    assert message.startswith(f"{path}: ") and "; " in message and message.isprintable(), message
    assert len(message) <= 400 + len(str(path)), message
    for word in words:
        assert word in message, message
    return message


# ---- events: files that are right ------------------------------------------------------------------------------------

def small_events(num_events=20, **types):
    seeded = numpy.random.default_rng(num_events)
    kinds = {"x": "u2", "y": "u2", "t": "i8", "p": "u1"} | types
    tops = {"x": 32, "y": 24, "t": 100, "p": 2}
    return {key: numpy.sort(seeded.integers(0, tops[key], num_events)).astype(kind) if key == "t" else
            seeded.integers(0, tops[key], num_events).astype(kind) for key, kind in kinds.items()}


def npy_of_pickle(pickled):
    """An .npy file as numpy.save writes one for objects, around any pickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled


def npy_of_dict(content, protocol=4):
    return npy_of_pickle(pickle.dumps(numpy.array(content, dtype=object), protocol=protocol))


def npy_of_array(array):
    buffer = io.BytesIO()
    numpy.save(buffer, array)
    return buffer.getvalue()


def commented(npz: bytes) -> bytes:
    file = io.BytesIO(npz)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"recorded on a Tuesday"
    return file.getvalue()


def npz_of(compressed=False, **arrays):
    buffer = io.BytesIO()
    (numpy.savez_compressed if compressed else numpy.savez)(buffer, **arrays)
    return buffer.getvalue()


def saved(folder, blob, name="events.npy"):
    path = folder / name
    path.write_bytes(blob)
    return path


def assert_same(events, content):
    assert [v.dtype for v in events] == [torch.int32, torch.int32, torch.int64, torch.uint8]
    for key in "xyt":
        assert getattr(events, key).tolist() == content[key].astype("i8").tolist(), key
    assert events.p.tolist() == (content["p"] != 0).astype("u1").tolist()


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_real_recordings_are_read_right(name):
    want = json.loads(needs(SAMPLES / "expected.json").read_text())["samples"][name]
    events = read_events(SAMPLES / name)
    assert events.x.numel() == want["num_events"]
    for key, field in want["fields"].items():
        values = getattr(events, key)
        found = (values.min().item(), values.max().item(), values.sum(dtype=torch.int64).item())
        assert found == (field["min"], field["max"], field["sum"]), key


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_real_recordings_equal_the_unpickled_arrays(name):
    content = numpy.load(needs(SAMPLES / name), allow_pickle=True).item()     # these five were checked by hand
    assert_same(read_events(SAMPLES / name), content)


@pytest.mark.parametrize("folder", ["davis346_traffic", "plane_sim_rgb"])
def test_public_npz_is_read_right(folder):
    path = needs(PUBLIC / folder / "events.npz")
    assert_same(read_events(path), numpy.load(path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("inner", [2, 5])
def test_every_pickle_protocol_is_read(tmp_path, protocol, inner):
    content = small_events(300)
    blob = npy_of_dict(content, protocol)
    if inner == 5:      # the dict itself pickled, without the object array around it
        blob = npy_of_pickle(pickle.dumps(content, protocol=protocol))
    assert_same(read_events(saved(tmp_path, blob)), content)


def test_extra_keys_and_scalars_are_ignored(tmp_path):
    content = small_events()
    extra = {"time_start": 0.5, "time_end": numpy.float64(2.5), "duration_ms": 2**70, "num_events": numpy.int64(20),
             "note": "fish", "nested": {"a": [1, (2, 3)], 5: None}, "on": True, "names": numpy.array(["a", "b"])}
    assert_same(read_events(saved(tmp_path, npy_of_dict(extra | content))), content)


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u2", ">i8"])
def test_every_integer_type_and_byte_order_is_read(tmp_path, kind):
    content = small_events(x=kind, y=kind, t=kind, p=kind)
    assert_same(read_events(saved(tmp_path, npy_of_dict(content))), content)
    assert_same(read_events(saved(tmp_path, npz_of(**content), "e.npz")), content)


@pytest.mark.parametrize("kind, p, wanted", [
    ("u1", [0, 1, 1], [0, 1, 1]), ("?", [True, False, True], [1, 0, 1]), ("i8", [-1, 1, -1], [0, 1, 0]),
    ("i1", [-1, -1, -1], [0, 0, 0]), ("i1", [1, 1, 1], [1, 1, 1]), (">i2", [1, -1, 1], [1, 0, 1])])
def test_polarity_is_told_by_the_codes_that_occur(tmp_path, kind, p, wanted):
    content = small_events(3) | {"p": numpy.array(p, kind)}
    assert read_events(saved(tmp_path, npy_of_dict(content))).p.tolist() == wanted
    assert read_events(saved(tmp_path, npz_of(**content), "e.npz")).p.tolist() == wanted


@pytest.mark.parametrize("kind, p, words", [
    ("u1", [1, 2, 1], "from 1 to 2"), ("u1", [1, 255, 1], "from 1 to 255"), ("i1", [-1, 0, 1], "-1, 0 and 1"),
    ("i4", [0, 1, -2], "from -2 to 1"), ("u1", [0, 1, 255], "from 0 to 255")])
def test_polarity_of_other_codes_is_refused_by_them(tmp_path, kind, p, words):
    refused(read_events, saved(tmp_path, npz_of(**small_events(3) | {"p": numpy.array(p, kind)})), [words, "0 and 1"])


@pytest.mark.parametrize("header", [
    "{{'shape': ({n},), 'fortran_order': False, 'descr': '{t}'}}", '{{"descr": "{t}", "fortran_order": False, '
    '"shape": ({n},), }}', "{{ 'fortran_order':False,'descr' :'{t}','shape':\n({n} , )}}"])
def test_headers_of_other_writers_are_read(tmp_path, header):
    content, path = small_events(30), tmp_path / "e.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in content.items():
            text = header.format(n=30, t=values.dtype.str).encode()
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + values.tobytes())
    assert_same(read_events(path), content)
    rows = npy_of_array(numpy.rec.fromarrays(list(content.values()), names=list(content)))
    size = struct.unpack_from("<H", rows, 8)[0]
    assert_same(read_events(saved(tmp_path, rows[:10] + rows[10:10 + size].replace(b"'", b'"') + rows[10 + size:])),
                content)


@pytest.mark.parametrize("header", [
    "__import__('os')", "{'descr': '<u2', 'shape': (-1,)}", "{'descr': '<u2', 'shape': 3}", "(" * 4000,
    "{'descr': '<u2', 'shape': (1.5,)}", "-" * 9000 + "1", "'\\d'", "9" * 5000, "{'shape': (3,), 'descr': ['x']}",
    "{'shape': (True,), 'descr': '<u2'}", "{'shape': (9" + "9" * 4000 + ",), 'descr': '<u2'}"])
def test_headers_that_are_no_numpys_are_refused(tmp_path, header):
    blob = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + bytes(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(read_events, saved(tmp_path, blob))


def test_a_small_npz_does_not_unpack_to_gigabytes(tmp_path):
    path = tmp_path / "e.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, kind in (("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "|u1")):
            count = 2_000_000
            text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({count},), }}".encode()
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text
                             + bytes(count * int(kind[-1])))
    refused(read_events, path, ["unpacks to more than"])


@pytest.mark.parametrize("align", [False, True])
def test_structured_array_is_read(tmp_path, align):
    content = small_events(50)
    fields = numpy.dtype([("p", "?"), ("t", ">i8"), ("x", "<u2"), ("pad", "f4"), ("y", "<i4")], align=align)
    rows = numpy.zeros(50, fields)
    for key in "xytp":
        rows[key] = content[key]
    assert_same(read_events(saved(tmp_path, npy_of_array(rows))), content)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_stored_and_deflated_are_read(tmp_path, compressed):
    content = small_events(200)
    blob = npz_of(compressed, width=numpy.int64(32), label=numpy.array(["car"]), **content)
    assert_same(read_events(saved(tmp_path, blob, "e.npz")), content)
    assert_same(read_events(saved(tmp_path, commented(blob), "e.npz")), content)


def test_file_order_is_kept_when_time_runs_backwards(tmp_path):
    content = small_events()
    content["t"] = content["t"][::-1].copy()
    assert_same(read_events(saved(tmp_path, npy_of_dict(content))), content)


def test_canvas_limit_is_the_callers(tmp_path):
    path = saved(tmp_path, npy_of_dict(small_events() | {"x": numpy.arange(5000, 5020)}))
    refused(read_events, path, ["5019", "4096 x 4096"])
    assert read_events(path, max_canvas=(24, 5020)).x.max() == 5019
    refused(lambda p: read_events(p, max_canvas=(24, 5019)), path, ["5019 x 24"])


def test_strings_work_as_paths(tmp_path):
    path = saved(tmp_path, npy_of_dict(small_events()))
    assert torch.equal(read_events(str(path)).x, read_events(path).x)


# ---- events: files that attack ---------------------------------------------------------------------------------------

class RunsCommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_that_runs_a_command_is_refused_by_name_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    content = small_events() | {"note": RunsCommand(f"touch {canary}")}
    blob = npy_of_dict(content)
    message = refused(read_events, saved(tmp_path, blob), [f"{os.system.__module__}.system", "refused"])
    assert "allow_pickle" not in message
    assert not canary.exists()
    numpy.load(io.BytesIO(blob), allow_pickle=True)      # the trap is armed: upstream's loader does run it
    assert canary.exists()


ATTACKS = {
    "eval": (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", ["builtins.eval"]),
    "f2py": (b"\x80\x02cnumpy.f2py\ncompile\nX\x01\x00\x00\x001\x85R.", ["numpy.f2py.compile"]),
    "stack global": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01a\x85R.", ["posix.system"]),
    "newline in a name": (b"\x80\x04\x8c\x05po\nix\x8c\x06system\x93.", ["system"]),
    "INST": (b"\x80\x02(X\x01\x00\x00\x001iposix\nsystem\n.", ["INST"]),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n)\x81.", ["NEWOBJ"]),
    "extension registry": (b"\x80\x02\x82\x01.", ["EXT1"]),
    "persistent id": (b"\x80\x02Pabc\n.", ["PERSID"]),
    "ndarray called": (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", ["damaged pickle"]),
    "memo bomb": (b"\x80\x02Nr\xff\xff\xff\x0f.", ["no dict"]),
    "1 TB of bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc", ["announces 1099511627776 bytes", "3 left"]),
    "2 GB integer": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc", ["damaged pickle"]),
    "deep nesting": (b"\x80\x02" + b"(" * 2_000_000 + b"t" * 2_000_000 + b".", ["10000 steps"]),
    "self reference": (b"\x80\x02]q\x00h\x00a.", ["no dict"]),
    "deep key": (b"\x80\x02}N" + b"\x85" * 9000 + b"Ns.", ["x, y, t, p"]),
    "stack underflow": (b"\x80\x02\x87.", ["damaged pickle"]),
    "string expanded again and again": (
        b"\x80\x02c_codecs\nencode\nX\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x01X\x06\x00\x00\x00latin1q\x020"
        + b"c_codecs\nencode\nh\x01h\x02\x86R0" * 50 + b".", ["expands"]),
    "ends early": (b"\x80\x02}", ["damaged pickle"]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_pickles_are_refused(tmp_path, attack):
    pickled, words = ATTACKS[attack]
    refused(read_events, saved(tmp_path, npy_of_pickle(pickled)), words)


def test_memory_bombs_stay_small(tmp_path):
    """The hostile pickles, read by a process that may not grow by more than 64 MB."""
    for number, (pickled, _) in enumerate(ATTACKS.values()):
        saved(tmp_path, npy_of_pickle(pickled), f"{number}.npy")
    script = (
        "import sys\nfrom weights import InputError\nfrom weights.events import read_events\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"                 # not ru_maxrss, which starts at the parent's and hides a growth
        "for number in range(int(sys.argv[2])):\n"
        "    try: read_events(f'{sys.argv[1]}/{number}.npy')\n"
        "    except InputError: pass\n"
        "print(peak() - before)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(len(ATTACKS))], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 * 1024      # kilobytes


def zip_with_method(method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for key, values in small_events().items():
            archive.writestr(f"{key}.npy", npy_of_array(values))
    return buffer.getvalue()


def with_member(name):
    """An .npz, and a second x under a name that means it."""
    file = io.BytesIO(npz_of(**small_events()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of zipfile, about the name
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(name, npy_of_array(small_events()["y"]))
    return file.getvalue()


def without(key):
    content = small_events()
    del content[key]
    return content


def object_array(values):
    array = numpy.empty(len(values), dtype=object)
    array[:] = values
    return array


GOOD = npy_of_dict(small_events(2000))
BAD_EVENTS = {     # name: (file content, words of the message)
    "empty": (b"", ["0 bytes"]),
    "text": (b"1,2,3,4\n" * 9, ["not an .npy", "1,2,3"]),
    "web page": (b"<!DOCTYPE html><html>\n", ["web page", "fetch"]),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS"]),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(40), ["HDF5", "h5py"]),
    "AEDAT4": (b"#!AER-DAT4.0\r\n" + bytes(40), ["AEDAT", "faery"]),
    "Prophesee": (b"% evt 3.0\n" + bytes(40), ["Prophesee"]),
    "Event Stream": (b"Event Stream\x02\x00\x00", ["Event Stream"]),
    "bare pickle": (pickle.dumps(small_events()), ["bare pickle"]),
    "random": (bytes(range(200, 255)), ["c8 c9"]),
    "truncated in an array": (GOOD[:9000], ["announces", "left"]),
    "truncated in the header": (GOOD[:40], ["header of"]),
    "huge header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", ["4294967295"]),
    "header without shape": (b"\x93NUMPY\x01\x00\x05\x00{'a'}", ["no shape"]),
    "missing key": (npy_of_dict(without("t")), ["x, y, t, p", "missing: t", "'x'"]),
    "no dict": (npy_of_dict([1, 2]), ["no dict"]),
    "other names": (npz_of(xs=numpy.arange(3)), ["'xs'", "missing: x, y, t, p"]),
    "unequal lengths": (npy_of_dict(small_events() | {"p": numpy.zeros(7, "u1")}), ["x 20", "p 7"]),
    "no events": (npy_of_dict(small_events(0)), ["no events"]),
    "no events npz": (npz_of(**small_events(0)), ["no events"]),
    "float coordinates": (npy_of_dict(small_events(x="f4")), ["x has type 'f4'", "integers"]),
    "NaN time": (npy_of_dict(small_events() | {"t": numpy.full(20, numpy.nan)}), ["t has type 'f8'"]),
    "stray coordinate": (npy_of_dict(small_events() | {"x": numpy.full(20, 65535, "u2")}), ["65535", "4096 x 4096"]),
    "negative x": (npy_of_dict(small_events() | {"x": numpy.arange(-1, 19, dtype="i2")}), ["x is negative", "-1"]),
    "negative y": (npz_of(**small_events() | {"y": numpy.arange(-5, 15)}), ["y is negative", "-5"]),
    "beyond int64": (npz_of(**small_events() | {"t": numpy.full(20, 2**63, "u8")}), ["2^63"]),
    "two dimensions": (npy_of_dict(small_events() | {"x": numpy.zeros((4, 5), "u2")}), ["(4, 5)", "one dimension"]),
    "complex": (npz_of(**small_events() | {"x": numpy.zeros(20, "c8")}), ["x has type 'c8'"]),
    "a list for x": (npy_of_dict(small_events() | {"x": [1, 2, 3]}), ["x has type 'list'"]),
    "objects for x": (npy_of_dict(small_events() | {"x": object_array(range(20))}), ["x has type 'O8'"]),
    "object array in npz": (npz_of(**small_events() | {"x": object_array(range(20))}), ["x has type 'O'"]),
    "plain array": (npy_of_array(numpy.zeros((9, 4), "i8")), ["one plain array", "(9, 4)"]),
    "object array of two": (npy_of_array(object_array([{}, {}])), ["no dict"]),
    "structured in capitals": (npy_of_array(numpy.zeros(3, [(name, "i4") for name in "XYTP"])), ["found 'X', 'Y'"]),
    "structured without p": (npy_of_array(numpy.zeros(3, [("x", "u2"), ("y", "u2"), ("t", "i8")])), ["missing: p"]),
    "structured and cut": (npy_of_array(numpy.zeros(99, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1")]))[:700],
                           ["announces 99 events"]),
    "nested fields": (npy_of_array(numpy.zeros(3, [("x", "u2", (2,)), ("y", "u2")])), ["wanted a dict or fields"]),
    "bzip2 npz": (zip_with_method(zipfile.ZIP_BZIP2), ["compressed by method 12"]),
    "truncated npz": (npz_of(**small_events())[:400], ["damaged .npz"]),
    "bytes behind npz": (npz_of(**small_events()) + b"abc", ["no part of its zip", "something was appended"]),
    "npz behind npz": (npz_of(**small_events(9)) + npz_of(**small_events()), ["no part of its zip"]),
    "npz and half its comment": (commented(npz_of(**small_events()))[:-3], ["no part of its zip"]),
    "bytes behind npz's comment": (commented(npz_of(**small_events())) + b"a", ["no part of its zip"]),
    "bytes behind a pickle": (npy_of_dict(small_events()) + b"abc", ["3 bytes behind its pickle"]),
    "bytes behind rows": (npy_of_array(numpy.zeros(9, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1")])) + b"abc",
                          ["announces 9 events", "the file has 120"]),
    "npz member twice": (with_member("x.npy"), ["holds x twice"]),
    "npz member with and without its ending": (with_member("x"), ["holds x twice"]),
    "field twice": (npy_of_array(numpy.zeros(9, [("x", "u2"), ("z", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1")]))
                    .replace(b"('z'", b"('x'"), ["two of its fields have one name"]),
    "objects beside fields": (npy_of_array(numpy.zeros(9, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1"),
                                                           ("note", "O")])), ["not all plain numbers"]),
    "npz checksum": (npz_of(**small_events()).replace(small_events()["t"].tobytes(), bytes(160)), ["damaged .npz"]),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_bad_event_files_are_refused_in_one_line(tmp_path, name):
    blob, words = BAD_EVENTS[name]
    refused(read_events, saved(tmp_path, blob), words)


READERS = [(read_events, "e.npy"), (video.read_image, "e.png"), (video.read_video, "e.mp4")]


@pytest.mark.parametrize("read, name", READERS)
def test_paths_that_are_no_files_are_refused(tmp_path, read, name):
    refused(read, tmp_path, ["is a folder"])
    refused(read, tmp_path / "none" / name, ["no such file", "does not exist"])
    (tmp_path / f"f{name}").write_bytes(b"a")
    refused(read, tmp_path / name, ["no such file", f"did you mean f{name}?"])
    refused(read, f"https://example.org/{name}", ["is an address", "local files"])
    os.mkfifo(tmp_path / "pipe")
    refused(read, tmp_path / "pipe", ["not a regular file"])
    (tmp_path / "zero").touch()
    refused(read, tmp_path / "zero", ["0 bytes"])
    with pytest.raises(InputError, match="cannot be opened"):
        read("nul\0inside")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "line\nbreak")
    assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("read, name", READERS)
def test_files_without_permission_are_refused(tmp_path, read, name):
    path = saved(tmp_path, b"a", name)
    path.chmod(0)
    refused(read, path, ["Permission denied"])


def test_file_beyond_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "big.npy"
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY")
        file.truncate(2**31)      # sparse: 2 GB that take no room
    refused(read_events, path, ["2147483648 bytes", "limit"])


def test_npz_that_unpacks_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("weights.events.MAX_EVENT_BYTES", 100_000)
    blob = npz_of(compressed=True, **{key: numpy.zeros(50_000, "u2") for key in "xytp"})
    assert len(blob) < 100_000
    refused(read_events, saved(tmp_path, blob, "e.npz"), ["unpacks to more than 100000"])


# ---- damage at random ------------------------------------------------------------------------------------------------

def damaged(blob, chance):
    """One seeded mutation: bytes changed, cut off, taken out, doubled, or a length field blown up."""
    data, kind = bytearray(blob), chance.randrange(6)
    at = chance.randrange(len(data))
    if kind == 0:
        for _ in range(chance.randrange(1, 9)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at:at + chance.randrange(1, 40)]
    elif kind == 3:
        data[at:at] = data[at:at + chance.randrange(1, 40)]
    elif kind == 4:
        data[at:at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"])
    else:
        other = chance.randrange(len(data))
        data[at:at + 8] = data[other:other + 8]
    return bytes(data)


def survive(read, blobs, folder, suffix, rounds, check):
    """Reads `rounds` damaged copies; (read, refused). Anything but a checked result or an InputError is a failure."""
    good = bad = 0
    for seed in range(rounds):
        chance = random.Random(seed)
        path = saved(folder, damaged(blobs[seed % len(blobs)], chance), f"damaged{suffix}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")       # a warning would be a second line on the user's screen
            try:
                check(read(path))
                good += 1
            except InputError as error:
                assert str(error).startswith(f"{path}: ") and str(error).isprintable(), seed
                bad += 1
    return good, bad


def check_events(events):
    assert len({v.numel() for v in events}) == 1 and events.x.numel() > 0
    assert 0 <= events.x.min() and events.x.max() < 4096 and 0 <= events.y.min() and events.y.max() < 4096
    assert events.p.max() <= 1


def check_image(frame):
    assert frame.dtype == torch.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.numel() > 0


def check_clip(clip):
    assert len(clip) == 8
    for frame in clip:
        check_image(frame)


def test_damaged_event_pickles_only_raise_input_error(tmp_path):
    blobs = [npy_of_dict(small_events(12) | {"time_start": numpy.float64(1)}, protocol) for protocol in (2, 3, 4, 5)]
    good, bad = survive(read_events, blobs, tmp_path, ".npy", 500, check_events)
    assert good >= 10 and bad >= 100      # both sides of the reader were reached


def test_damaged_structured_arrays_and_npz_only_raise_input_error(tmp_path):
    rows = numpy.zeros(12, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1")])
    blobs = [npz_of(**small_events(12)), npz_of(True, **small_events(12)), npy_of_array(rows)]
    good, bad = survive(read_events, blobs, tmp_path, ".npz", 400, check_events)
    assert good >= 10 and bad >= 100


def test_damaged_images_only_raise_input_error(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype("u1")
    blobs = [image_bytes(Image.fromarray(pixels), kind) for kind in ("PNG", "JPEG")]
    blobs.append(image_bytes(Image.fromarray(pixels).convert("P"), "PNG"))
    good, bad = survive(video.read_image, blobs, tmp_path, ".png", 400, check_image)
    assert good >= 10 and bad >= 50


def test_damaged_h264_only_raises_input_error(tmp_path):
    paths = [film(tmp_path, name, 1, keyframe=6) for name in ("a.mp4", "b.mkv")]
    good, bad = survive(video.read_video, [path.read_bytes() for path in paths], tmp_path, ".mp4", 160, check_clip)
    assert good >= 10 and bad >= 10


def test_damaged_videos_only_raise_input_error(tmp_path):
    blobs = [clip_bytes(tmp_path, "a.mp4", 12), clip_bytes(tmp_path, "b.mkv", 12), clip_bytes(tmp_path, "c.avi", 12)]
    good, bad = survive(video.read_video, blobs, tmp_path, ".mp4", 120, check_clip)
    assert good >= 10 and bad >= 10


# ---- images ----------------------------------------------------------------------------------------------------------

def image_bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def some_image(mode, size=(31, 17)):
    pixels = numpy.random.default_rng(1).integers(0, 256, (size[1], size[0], 3)).astype("u1")
    if mode == "I;16":
        return Image.fromarray(numpy.arange(size[0] * size[1], dtype="u2").reshape(size[1], size[0]))
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode, kind", [(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
                         + [(mode, "JPEG") for mode in ("RGB", "L", "CMYK")])
def test_images_equal_pillows_rgb(tmp_path, mode, kind):
    path = saved(tmp_path, image_bytes(some_image(mode), kind), "a.png")
    wanted = numpy.asarray(Image.open(path).convert("RGB"))
    frame = video.read_image(path)
    assert frame.dtype == torch.uint8 and numpy.array_equal(frame.numpy(), wanted)


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6       # turn by a quarter
    path = saved(tmp_path, image_bytes(some_image("RGB"), "JPEG", exif=exif), "a.jpg")
    assert video.read_image(path).shape == (17, 31, 3)


def test_several_images_keep_their_order(tmp_path):
    paths = [saved(tmp_path, image_bytes(Image.new("RGB", (3 + i, 2), (i, 0, 0))), f"{i}.png") for i in range(4)]
    assert [(f.shape[1], f[0, 0, 0].item()) for f in map(video.read_image, paths)] == [(3, 0), (4, 1), (5, 2), (6, 3)]


def png_claiming(width, height):
    """A PNG whose header announces a size and whose body is a few bytes."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "text": (b"hello\n", ["not a PNG or JPEG", "hello"]),
    "web page": (b"<html>", ["web page"]),
    "truncated PNG": (image_bytes(some_image("RGB"))[:600], ["truncated"]),
    "truncated JPEG": (image_bytes(some_image("RGB", (200, 200)), "JPEG")[:3000], ["truncated"]),
    "only a PNG signature": (b"\x89PNG\r\n\x1a\n", ["damaged"]),
    "bomb 20000 x 20000": (png_claiming(20_000, 20_000), ["50000000 pixels"]),
    "bomb 10000 x 10000": (png_claiming(10_000, 10_000), ["50000000 pixels"]),      # where Pillow only warns
    "above our limit": (png_claiming(10_000, 5_001), ["10000 x 5001", "50000000"]),
    "grey of 16 bits": (image_bytes(some_image("I;16")), ["mode I;16", "convert it to RGB"]),  # Pillow makes it white
    "sliver": (png_claiming(4000, 1), ["4000 x 1", "256 : 1"]),
    "GIF named PNG": (image_bytes(Image.new("P", (4, 4)), "GIF"), ["not a PNG or JPEG"]),
    "BMP named PNG": (image_bytes(Image.new("RGB", (4, 4)), "BMP"), ["not a PNG or JPEG"]),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_in_one_line(tmp_path, name):
    blob, words = BAD_IMAGES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(video.read_image, saved(tmp_path, blob, "a.png"), words)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("depth, colour", [(8, 2), (1, 0), (4, 3), (16, 6), (8, 4)])
def test_a_png_whose_data_end_early_is_refused(tmp_path, depth, colour, interlaced):
    """Pillow shows the rows that are missing as black."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width, height, bits = 13, 9, depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = video.ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = [bytes(1 + (len(range(x, width, dx)) * bits + 7) // 8) for x, y, dx, dy in passes if x < width
            for _ in range(y, height, dy)]                   # all black
    for missing in (0, 1, len(rows) - 1):
        data = zlib.compress(b"".join(rows[:len(rows) - missing]))
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
        blob = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        blob += chunk(b"PLTE", bytes(48)) * (colour == 3) + chunk(b"IDAT", data[:5]) + chunk(b"IDAT", data[5:])
        path = saved(tmp_path, blob + chunk(b"IEND", b""), "a.png")
        if missing:
            refused(video.read_image, path, ["truncated or damaged image"])
        else:
            assert not video.read_image(path).any()


def test_one_by_one_image_is_read(tmp_path):
    path = saved(tmp_path, image_bytes(Image.new("RGB", (1, 1), (7, 8, 9))))
    assert video.read_image(path).tolist() == [[[7, 8, 9]]]


# ---- video -----------------------------------------------------------------------------------------------------------

def picture(number, width, height):
    """A picture that tells its number: a grey level, with some texture so that nothing is skipped as empty."""
    rows = torch.full((height, width, 3), 20 + 9 * number % 200, dtype=torch.uint8)
    rows[: height // 4] = 255 - rows[0, 0, 0]
    return av.VideoFrame.from_ndarray(rows.numpy(), format="rgb24")


def clip_bytes(folder, name, num_frames, codec="mpeg4", size=(64, 48), pixel_format="yuv420p", options=None):
    """A little clip as bytes; the container goes by the name's ending."""
    path = folder / name
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(num_frames):
            frame = picture(number, *size)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def clip(folder, name, num_frames, **options):
    clip_bytes(folder, name, num_frames, **options)
    return folder / name


def every_frame(path):
    with av.open(str(path)) as container:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24").copy()) for frame in container.decode(video=0)]


def test_frames_equal_the_recorded_bytes():
    want = json.loads(needs(PREPROCESS / "expected.json").read_text())
    frames = video.read_video(PREPROCESS / want["video"])
    hashes = [hashlib.sha256(frame.numpy().tobytes()).hexdigest() for frame in frames]
    assert hashes == want["decoded"]["sha256_per_frame_uint8_HWC"]
    stored = load_file(PREPROCESS / "expected.safetensors")
    assert torch.equal(frames[0], stored["decoded_frame_0"]) and torch.equal(frames[4], stored["decoded_frame_12"])


@pytest.mark.parametrize("total, indices", [
    (25, [0, 3, 6, 9, 12, 15, 18, 21]), (100, [0, 12, 25, 37, 50, 62, 75, 87]),
    (250, [0, 31, 62, 93, 125, 156, 187, 218]), (4, [0, 0, 1, 1, 2, 2, 3, 3]), (1, [0] * 8)])
def test_uniform_indices_are_upstreams(total, indices):
    assert video.sample_indices(total, 8) == indices
    assert [int(i) for i in numpy.arange(0, total, total / 8)] == indices


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.mov", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4"),
                                         ("a.webm", "libvpx"), ("a.webm", "libvpx-vp9"), ("f.mp4", "fragmented")])
@pytest.mark.parametrize("rule", ["uniform", "first"])
def test_every_container_gives_the_frames_by_index(tmp_path, name, codec, rule):
    options = {"movflags": "frag_keyframe+empty_moov"} if codec == "fragmented" else {}
    codec = "mpeg4" if codec == "fragmented" else codec
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = clip(tmp_path, name, 21, codec=codec, options=options)
    frames = every_frame(path)
    assert len(frames) == 21
    read = video.read_video(path, 8, rule)
    for index, frame in zip(video.sample_indices(21, 8, rule), read, strict=True):
        assert torch.equal(frame, frames[index]), index


def avi_saying(folder, count, index, codec="mpeg4", pixel_format="yuv420p"):
    """An avi of 21 frames whose header says `count`, with or without its index."""
    blob = bytearray(clip_bytes(folder, "plain.avi", 21, codec=codec, pixel_format=pixel_format))
    for tag, offset in ((b"avih", 24), (b"strh", 40)):       # dwTotalFrames and the stream's dwLength
        at = blob.index(tag) + offset
        assert struct.unpack_from("<I", blob, at) == (21,)
        struct.pack_into("<I", blob, at, count)
    return saved(folder, bytes(blob if index else blob[:blob.index(b"idx1")]), "lying.avi")


@pytest.mark.parametrize("codec, pixel_format", [("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p")])
@pytest.mark.parametrize("count, index", [(900, False), (1, True), (6, True), (6, False), (0, True)])
def test_the_count_of_an_avi_header_is_a_claim(tmp_path, count, index, codec, pixel_format):
    lying = avi_saying(tmp_path, count, index, codec, pixel_format)
    frames = every_frame(tmp_path / "plain.avi")
    assert len(frames) == 21
    for number, frame in zip(video.sample_indices(21, 8), video.read_video(lying), strict=True):
        assert torch.equal(frame, frames[number]), number


@pytest.mark.parametrize("movflags", ["frag_keyframe", "frag_keyframe+delay_moov", "frag_keyframe+default_base_moof",
                                      "frag_keyframe+empty_moov"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_all_fragments_of_an_mp4_are_counted(tmp_path, movflags, codec):
    """Its header counts the first fragment alone, or nothing."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = clip(tmp_path, "a.mp4", 40, codec=codec, options={"movflags": movflags})
    frames = every_frame(path)
    assert len(frames) == 40
    for number, frame in zip(video.sample_indices(40, 8), video.read_video(path), strict=True):
        assert torch.equal(frame, frames[number]), number


def test_packets_that_show_no_picture_are_not_counted(tmp_path, monkeypatch):
    """A webm's packets may outnumber its frames: the estimate is off, the frames are right."""
    path = clip(tmp_path, "a.mkv", 21)
    frames, held = every_frame(path), video.held_packets
    monkeypatch.setattr(video, "held_packets", lambda *a: (lambda packets, total: (packets, total + 11))(*held(*a)))
    for index, frame in zip(video.sample_indices(21, 8), video.read_video(path), strict=True):
        assert torch.equal(frame, frames[index]), index


def test_a_cover_beside_the_film_is_not_the_film(tmp_path):
    path = clip(tmp_path, "a.mp4", 21)
    cover = image_bytes(some_image("RGB"), "PNG")
    with av.open(str(path)) as given, av.open(str(tmp_path / "b.mp4"), "w") as out:
        film = out.add_stream_from_template(given.streams.video[0])
        picture = out.add_stream("png")
        picture.width, picture.height, picture.pix_fmt = 24, 16, "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        out.start_encoding()
        packet = av.Packet(cover)
        packet.stream = picture
        out.mux(packet)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = film
                out.mux(packet)
    for index, frame in zip(video.sample_indices(21, 8), video.read_video(tmp_path / "b.mp4"), strict=True):
        assert torch.equal(frame, every_frame(path)[index])


@pytest.mark.parametrize("total, rule, numbers", [(1, "uniform", [0] * 8), (7, "uniform", [0, 0, 1, 2, 3, 4, 5, 6]),
                                                  (3, "first", [0, 1, 2, 2, 2, 2, 2, 2])])
def test_short_clips_repeat_frames_by_index(tmp_path, total, rule, numbers):
    path = clip(tmp_path, "a.mp4", total)
    frames = every_frame(path)
    assert len(frames) == total
    for index, frame in zip(numbers, video.read_video(path, 8, rule), strict=True):
        assert torch.equal(frame, frames[index]), index


@pytest.mark.parametrize("size", [(50, 38), (346, 260), (16, 16)])
def test_padded_rows_are_unpadded(tmp_path, size):
    path = clip(tmp_path, "a.mp4", 3, size=size)
    frame = video.read_video(path, 1)[0]
    assert frame.shape == (size[1], size[0], 3) and frame.is_contiguous()
    assert torch.equal(frame, every_frame(path)[0])


def test_frames_outlive_their_container(tmp_path):
    path = clip(tmp_path, "a.mp4", 9)
    first = video.read_video(path)
    copies = [frame.clone() for frame in first]
    for _ in range(5):
        video.read_video(path)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_nothing_is_decoded_past_the_last_frame_needed(tmp_path):
    path = clip(tmp_path, "a.mp4", 40)
    _, decoded = video.decode_frames(path, [0, 3], True, video.rgb_tensor)
    assert decoded == 4


def test_ten_bit_and_grey_become_rgb_as_upstream_converts_them(tmp_path):
    for codec, pixel_format in (("ffv1", "gray"), ("ffv1", "yuv420p10le"), ("ffv1", "bgra")):
        path = clip(tmp_path, f"{pixel_format}.mkv", 3, codec=codec, pixel_format=pixel_format)
        frames = every_frame(path)
        for index, frame in zip(video.sample_indices(3, 8), video.read_video(path), strict=True):
            assert torch.equal(frame, frames[index]), pixel_format


def test_calls_on_several_threads_give_the_same_frames(tmp_path):
    path = clip(tmp_path, "a.mp4", 30)
    wanted, found = video.read_video(path), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: video.read_video(path)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(a, b) for frames in found.values() for a, b in zip(frames, wanted, strict=True))


def test_invalid_metadata_is_ignored(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(picture(0, 64, 48)))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"TITLETITLE", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert len(video.read_video(path)) == 8


def truncated_faststart(folder):
    blob = clip_bytes(folder, "fast.mp4", 40, options={"movflags": "faststart"})      # ends inside a packet
    assert blob.index(b"moov") < blob.index(b"mdat")
    return blob[:blob.index(b"mdat") + (len(blob) - blob.index(b"mdat")) // 3]


def truncated_fragmented(folder):
    blob = clip_bytes(folder, "frag.mp4", 40, options={"movflags": "frag_keyframe+empty_moov"})
    return blob[:blob.index(b"moof")]


def damaged_middle(folder):
    """H.264 with one packet's length field blown up: the decoder says no, where mpeg4 would paint over it."""
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV cannot write H.264")
    path = clip(folder, "m.mp4", 40, codec="libx264", options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size][20]
    blob = bytearray(path.read_bytes())
    blob[at:at + 4] = b"\x7f\xff\xff\xff"
    return bytes(blob)


def sound_only(folder):
    path = folder / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 800), "i2"), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def playlist(folder):
    inner = clip(folder, "inner.mp4", 9)
    return f"ffconcat version 1.0\nfile '{inner}'\n".encode()


def m3u_playlist(folder):
    inner = clip(folder, "inner.mp4", 9)
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{inner}\n#EXT-X-ENDLIST\n".encode()


BAD_VIDEOS = {
    "random": (lambda _: random.Random(0).randbytes(5000), ["not a video container"]),
    "text": (lambda _: b"hello\n" * 50, ["not a video container", "hello"]),
    "web page": (lambda _: b"<!DOCTYPE html><html>", ["web page", "fetch it again"]),
    "an image": (lambda _: image_bytes(some_image("RGB")), ["not a video container"]),
    "a sound of the same family": (lambda _: b"RIFF\x40\0\0\0WAVEfmt " + bytes(48), ["not a video container"]),
    "mp4 without index": (lambda d: clip_bytes(d, "i.mp4", 40)[:2000], ["without a usable index", "incomplete copy"]),
    "truncated fast-start": (truncated_faststart, ["decoded 10 mpeg4 frames, then"]),
    "truncated fragmented": (truncated_fragmented, ["0 frames"]),
    "only an mkv header": (lambda d: clip_bytes(d, "h.mkv", 9)[:300], []),
    "damaged in the middle": (damaged_middle, ["decoded", "h264 frames, then failed"]),
    "sound only": (sound_only, ["no video stream", "audio"]),
    "playlist named mp4": (playlist, ["not a video container"]),
    "m3u playlist named mp4": (m3u_playlist, ["not a video container"]),
    "unknown codec": (lambda d: clip_bytes(d, "u.mp4", 9).replace(b"mp4v", b"zzzz").replace(b"esds", b"free"),
                      ["codec", "H.264"]),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos_are_refused_in_one_line(tmp_path, name):
    make, words = BAD_VIDEOS[name]
    message = refused(video.read_video, saved(tmp_path, make(tmp_path), "bad.mp4"), words)
    assert "avcodec" not in message and "Errno" not in message


def test_oversized_videos_are_refused(tmp_path, monkeypatch):
    path = clip(tmp_path, "a.mp4", 9)
    monkeypatch.setattr(video, "MAX_VIDEO_FRAMES", 8)
    refused(video.read_video, path, ["more than 8 frames", "cut"])
    refused(video.read_video, clip(tmp_path, "a.mkv", 9), ["more than 8 frames"])
    assert len(video.read_video(path, 4, "first")) == 4
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 64 * 48 - 1)
    refused(video.read_video, path, ["64 x 48"])


def test_file_that_vanishes_while_reading_is_an_input_error(tmp_path, monkeypatch):
    path = clip(tmp_path, "a.mp4", 9)
    decode = video.decode_frames
    monkeypatch.setattr(video, "decode_frames", lambda *a, **k: (path.unlink(), decode(*a, **k)))
    refused(video.read_video, path, ["no such file"])


def test_wrong_rule_is_a_value_error_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="uniform"):
        video.read_video(tmp_path / "a.mp4", rule="last")


# ---- video, the quick way: packets first, then only the frames that are wanted ---------------------------------------

def film(folder, name, seconds=2.4, **options):
    """A moving clip; its container goes by the name's ending, H.264 unless told."""
    codec = options.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    write_film(folder / name, seconds, **{"size": (96, 64)} | options)
    return folder / name


def assert_frames_of_the_plain_way(path, nums=(8, 1, 5)):
    """What read_video gives is, frame by frame, what decoding everything and counting gives. Returns all frames."""
    every = every_frame(path)
    for num_frames in nums:
        for index, frame in zip(video.sample_indices(len(every), num_frames), video.read_video(path, num_frames),
                                strict=True):
            assert torch.equal(frame, every[index]), (num_frames, index)
    return every


@pytest.fixture
def counted(monkeypatch):
    """The calls of `decode_frames`, which decodes all and counts."""
    calls, decode = [], video.decode_frames
    monkeypatch.setattr(video, "decode_frames", lambda *a, **k: calls.append(a) or decode(*a, **k))
    return calls


def uneven(number):
    """Time stamps of a variable frame rate: gaps of 1, 2 and 9."""
    return 12 * (number // 3) + (0, 1, 3)[number % 3]


PLANNED = {     # name: (file name, options of write_film)
    "one keyframe": ("a.mp4", {}),
    "many keyframes": ("a.mp4", {"keyframe": 7}),
    "every frame a keyframe": ("a.mp4", {"keyframe": 1}),
    "no B-frames": ("a.mp4", {"keyframe": 9, "bf": "0"}),
    "deep B-pyramid": ("a.mp4", {"keyframe": 25, "bf": "7", "x264-params": "sliced-threads=0:b-pyramid=normal:ref=5"}),
    "open GOP": ("a.mp4", {"keyframe": 6, "x264-params": "sliced-threads=0:open-gop=1"}),
    "several slices a picture": ("a.mp4", {"keyframe": 11, "x264-params": "slices=3"}),
    "mkv": ("a.mkv", {"keyframe": 13}),
    "mov": ("a.mov", {"keyframe": 13}),
    "variable frame rate": ("a.mp4", {"keyframe": 8, "pts": uneven}),
    "variable frame rate mkv": ("a.mkv", {"keyframe": 8, "pts": uneven}),
    "shorter than eight frames": ("a.mp4", {"seconds": 0.2}),
    "main profile": ("a.mp4", {"keyframe": 10, "profile": "main"}),
    "4:4:4": ("a.mp4", {"keyframe": 10, "pixel_format": "yuv444p"}),
    "fields": ("a.mp4", {"keyframe": 8, "x264-params": "sliced-threads=0:interlaced=1"}),
    "one IDR, then moving refresh": ("a.mp4", {"keyframe": 8, "x264-params": "sliced-threads=0:intra-refresh=1"}),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", PLANNED)
def test_planned_frames_equal_the_plain_way(tmp_path, monkeypatch, counted, name, threads):
    file_name, options = PLANNED[name]
    path = film(tmp_path, file_name, **options)
    monkeypatch.setattr(video, "cores", lambda: threads)
    every = assert_frames_of_the_plain_way(path)
    assert len(every) == (5 if "shorter" in name else 60) and not counted


def test_frames_nobody_needs_are_not_decoded(tmp_path):
    path = film(tmp_path, "a.mp4", keyframe=10)
    container, stream, codec = video.open_video(path)
    with container:
        runs, order = video.plan(video.held_packets(container, stream, codec)[0], stream, 3)
    assert order == sorted(order) and len(order) == 3
    assert [len(run) for run in runs] == [1, 1, 1]            # frames 0, 20 and 40 begin their groups
    assert runs[1][0].is_keyframe


@pytest.mark.parametrize("color_range, colorspace", [(1, 1), (2, 5), (1, 9)])
def test_colours_that_only_the_container_names_reach_every_decoder(tmp_path, counted, color_range, colorspace):
    """A box beside the stream says how its numbers become colours, and each group of pictures has its own decoder."""
    plain = film(tmp_path, "plain.mp4", keyframe=10)
    with av.open(str(plain)) as given, av.open(str(tmp_path / "said.mp4"), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        stream.codec_context.color_range, stream.codec_context.colorspace = color_range, colorspace
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1          # else no box is written
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    said = assert_frames_of_the_plain_way(tmp_path / "said.mp4")
    assert not counted
    assert any(not torch.equal(a, b) for a, b in zip(said, every_frame(plain), strict=True))


@pytest.mark.parametrize("name, options, called", [("small.mp4", {}, 0), ("large.mp4", {"size": (640, 480)}, 1),
                                                   ("counted.webm", {"codec": "libvpx-vp9", "cpu-used": "8"}, 1)])
def test_the_caller_hears_when_ffmpegs_threads_take_over_for_long(tmp_path, name, options, called):
    heard = []
    video.read_video(film(tmp_path, name, seconds=1.0, **options), decoding=lambda: heard.append(1))
    assert len(heard) == called


UNPLANNED = {     # name: (file name, options, where the plain way decodes what)
    "vp9 webm": ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "keyframe": 8}),
    "mpeg4": ("a.mp4", {"codec": "mpeg4", "keyframe": 8}),
    "avi, without time stamps": ("a.avi", {"keyframe": 8, "bf": "0"}),
    "avi, without time stamps, B-frames": ("a.avi", {"keyframe": 8, "bf": "2"}),
    "edit list": ("a.mp4", {"keyframe": 8, "pts": lambda number: number - 5}),
}


@pytest.mark.parametrize("name", UNPLANNED)
def test_where_a_plan_would_be_in_doubt_the_frames_are_counted(tmp_path, counted, name):
    file_name, options = UNPLANNED[name]
    path = film(tmp_path, file_name, **options)
    assert_frames_of_the_plain_way(path)
    assert counted


def fake_packet(pts, flags):
    packet = {"pts": pts, "is_corrupt": False, "is_discard": False, "has_sidedata": lambda _: False}
    return SimpleNamespace(**packet | flags)


DOUBTS = {     # name: (pts in decoding order, numbers of the IDR packets, header count, flags of packet 3)
    "no time stamp": ([0, 2, 1, None, 4], {0}, 5, {}),
    "a time stamp twice": ([0, 2, 1, 2, 4], {0}, 5, {}),
    "header counts more": ([0, 2, 1, 3, 4], {0}, 6, {}),
    "header counts fewer": ([0, 2, 1, 3, 4], {0}, 4, {}),
    "begins inside a group": ([0, 2, 1, 3, 4], {3}, 5, {}),
    "no keyframe": ([0, 2, 1, 3, 4], set(), 5, {}),
    "reordered deeper than the decoder expects": ([0, 5, 4, 3, 2, 1], {0}, 6, {}),
    "ends inside a packet": ([0, 2, 1, 3, 4], {0}, 5, {"is_corrupt": True}),
    "cut away by an edit list": ([0, 2, 1, 3, 4], {0}, 5, {"is_discard": True}),
    "new parameters on the way": ([0, 2, 1, 3, 4], {0}, 5, {"has_sidedata": lambda kind: kind == "new_extradata"}),
    "a packet without a picture": ([0, 2, 1, 3, 4], {0}, 5, {"slice": 0}),
}


def plan_of_fakes(monkeypatch, times, idr, header_count, flags, depth=2):
    packets = [fake_packet(pts, {"slice": 0x65 if number in idr else 0x41} | (flags if number == 3 else {}))
               for number, pts in enumerate(times)]
    monkeypatch.setattr(video, "slice_head", lambda packet, length_bytes: packet.slice)
    context = SimpleNamespace(reorder_depth=depth, name="h264", extradata=b"\1\x64\0\x0a\xff")
    return video.plan(packets, SimpleNamespace(frames=header_count, codec_context=context), 4)


def test_clean_packets_make_a_plan(monkeypatch):
    runs, order = plan_of_fakes(monkeypatch, [0, 2, 1, 3, 5, 4], {0, 3}, 6, {})
    assert order == [0, 1, 3, 4] and [[packet.pts for packet in run] for run in runs] == [[0, 2, 1], [3, 5, 4]]
    assert plan_of_fakes(monkeypatch, [0, 2, 1, 3, 5, 4], {0, 3}, 0, {})      # a container without a count
    assert plan_of_fakes(monkeypatch, [0, 5, 4, 3, 2, 1], {0}, 6, {}, depth=4)


@pytest.mark.parametrize("times", [[0, 2, 4, 3, 5], [0, 1, 2, 4, 3]])
def test_a_group_that_is_shown_across_its_keyframe_is_no_group(monkeypatch, times):
    """An IDR picture shown before something sent before it, or after something sent after it."""
    runs, _ = plan_of_fakes(monkeypatch, times, {0, 3}, 5, {})
    assert len(runs) == 1


@pytest.mark.parametrize("name", DOUBTS)
def test_no_plan_in_doubt(monkeypatch, name):
    assert plan_of_fakes(monkeypatch, *DOUBTS[name]) is None


def test_a_packet_is_told_by_its_first_slice():
    def unit(head, body=b"\x80\x11\x22"):
        return (len(body) + 1).to_bytes(4, "big") + bytes([head]) + body
    remark = unit(0x06, b"\x05\x01\x00")
    for blob, head in ((remark + unit(0x65), 0x65), (unit(0x41), 0x41), (unit(0x01) + unit(0x65), 1), (remark, 0),
                       (b"", 0), (unit(0x67) + unit(0x25), 0x25), (b"\xff\xff\xff\xff\x06" + unit(0x65), 0)):
        assert video.slice_head(blob, 4) == head, blob


def test_a_plan_that_does_not_come_true_falls_back(tmp_path, monkeypatch, counted):
    """The decoder gives no frame of a time that the packets announced: the plain way answers."""
    path = film(tmp_path, "a.mp4", keyframe=10)
    decode_run = video.decode_run
    monkeypatch.setattr(video, "decode_run",
                        lambda *a: {pts: frame for pts, frame in decode_run(*a).items() if pts != 0})
    assert_frames_of_the_plain_way(path)
    assert len(counted) == 3


def test_truncated_h264_is_answered_as_by_the_plain_way(tmp_path):
    """Cut inside a packet it is refused; between two, the packets that are there are the clip; behind the last frame
    wanted, it is read. Both ways agree."""
    whole = film(tmp_path, "whole.mp4", keyframe=10)
    write_film(tmp_path / "fast.mkv", 2.4, (96, 64), 10)
    with av.open(str(whole), "r") as given, av.open(str(tmp_path / "fast.mp4"), "w",
                                                    options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    blob, every = (tmp_path / "fast.mp4").read_bytes(), every_frame(whole)
    with av.open(str(tmp_path / "fast.mp4"), "r") as container:
        middle = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[30]
    refused(video.read_video, saved(tmp_path, blob[:middle + 9], "half.mp4"), ["h264 frames", "inside a packet"])
    assert len(assert_frames_of_the_plain_way(saved(tmp_path, blob[:middle], "between.mp4"))) == 30
    late = saved(tmp_path, blob[:-20], "late.mp4")
    for index, frame in zip(video.sample_indices(60, 8), video.read_video(late), strict=True):
        assert torch.equal(frame, every[index]), index
    # An mkv has no count to fall short of: what is there is the clip.
    cut = saved(tmp_path, (tmp_path / "fast.mkv").read_bytes()[:-3000], "cut.mkv")
    assert 40 < len(assert_frames_of_the_plain_way(cut)) < 60


def test_a_clip_that_changes_size_is_refused(tmp_path):
    """VP8 may change its size at any keyframe; upstream cannot stack such frames."""
    if "libvpx" not in av.codecs_available:
        pytest.skip("this PyAV cannot write libvpx")
    for name, size in (("a.mkv", (64, 48)), ("b.mkv", (96, 64))):
        clip(tmp_path, name, 9, codec="libvpx", size=size)
    path, time = tmp_path / "both.mkv", 0
    with av.open(str(tmp_path / "a.mkv")) as a, av.open(str(tmp_path / "b.mkv")) as b, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(a.streams.video[0])
        for packet in (*a.demux(video=0), *b.demux(video=0)):
            if packet.size:
                packet.stream, packet.pts, packet.dts, time = stream, 40 * time, 40 * time, time + 1
                out.mux(packet)
    refused(video.read_video, path, ["change size", "64 x 48", "96 x 64"])
    assert len(video.read_video(path, 4, "first")) == 4      # these are all of one size


# ---- the module as a whole -------------------------------------------------------------------------------------------

def test_everything_works_without_numpy(tmp_path, user_env):
    saved(tmp_path, npy_of_dict(small_events(50)), "e.npy")
    saved(tmp_path, npz_of(**small_events(50)), "e.npz")
    saved(tmp_path, image_bytes(some_image("RGB")), "e.png")
    clip(tmp_path, "e.mp4", 9)
    script = (
        "import sys; sys.modules['numpy'] = None\n"
        "from weights import video\nfrom weights.events import read_events\nfrom kernels import frames\n"
        "d = sys.argv[1]\n"
        "for name in ('e.npy', 'e.npz'): drawn = frames.draw_events(read_events(f'{d}/{name}'))\n"
        "for given in (drawn, [video.read_image(f'{d}/e.png')], video.read_video(f'{d}/e.mp4')):\n"
        "    print(tuple(frames.clip_pixels(given, 28).shape))\n")
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=user_env)
    assert done.stdout.split("\n")[:3] == ["(5, 3, 28, 28)", "(1, 3, 28, 28)", "(8, 3, 28, 28)"], done.stderr
    assert done.stderr == ""
