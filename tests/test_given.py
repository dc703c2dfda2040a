"""weights.given: events and frames in memory are read as their files are, whatever holds them; bad ones are refused in
one line."""

import array
import collections.abc
import hashlib
import io
import warnings
import weakref

import numpy
import pytest
import torch
from common import CLIPS, asked, truth
from PIL import Image

from engine import InputError
from kernels.frames import clip_pixels, draw_events
from weights import given
from weights.given import events_given, events_in_memory, video_given
from weights.video import decode_frames, rgb_tensor

RECORDING, CLIP = CLIPS / "event_npy/scenes/000000.npz", CLIPS / "mp4/scenes/000000.mp4"


class Bare:
    """An array with one way in and nothing else."""

    def __init__(self, **ways):
        self.__dict__.update(ways)


def by_dlpack(tensor):
    made = type("OnlyDLPack", (), {"__dlpack__": lambda self, **given: tensor.__dlpack__(**given),
                                   "__dlpack_device__": lambda self: tensor.__dlpack_device__()})
    return made()


def by_array(values):
    """As a pandas Series or an h5py Dataset."""
    return type("OnlyArray", (), {"__array__": lambda self: values})()


def pixels_hash(media, size=32):
    loaded = media.read()
    frames = loaded if isinstance(loaded, list) else draw_events(loaded, 5)
    return hashlib.sha256(bytes(clip_pixels(frames, size).flatten().view(torch.uint8).tolist())).hexdigest()


# ---- events


@pytest.fixture(scope="module")
def recorded():
    """{name: numpy array} of the first 300 events of an embedded clip."""
    with numpy.load(RECORDING) as file:
        return {key: file[key][:300] for key in "xytp"}


@pytest.fixture(scope="module")
def of_file(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("events") / "few.npz"
    numpy.savez(path, **recorded)
    return path, pixels_hash(events_given(event_path=path))


def structured(of, *names, align=False):
    kinds = {"x": ">u2", "y": "<u2", "t": "<i8", "p": "?", "note": "S3"}
    rows = numpy.zeros(len(of["x"]), numpy.dtype([(name, kinds[name]) for name in names], align=align))
    for name in "xytp":
        rows[name] = of[name]
    return rows


def table(of, order, kind, scale=1):
    return numpy.stack([of[name] * (scale if name == "t" else 1) for name in order], 1).astype(kind)


FORMS = {
    "path": lambda of, path: dict(events=path),
    "text": lambda of, path: dict(events=str(path)),
    "content": lambda of, path: dict(events=path.read_bytes()),
    "file object": lambda of, path: dict(events=io.BytesIO(path.read_bytes())),
    "mapping": lambda of, path: dict(events=dict(of)),
    "npz": lambda of, path: dict(events=numpy.load(path)),
    "tuple of tensors": lambda of, path: dict(events=tuple(torch.tensor(of[k].astype("i4")) for k in "xytp")),
    "tuple in another order": lambda of, path: dict(events=[of[k] for k in "ptyx"], columns="ptyx"),
    "Events": lambda of, path: dict(events=given.read_events(path)),
    "lists": lambda of, path: dict(events={k: of[k].tolist() for k in "xytp"}),
    "structured": lambda of, path: dict(events=structured(of, "t", "note", "x", "p", "y")),
    "aligned": lambda of, path: dict(events=structured(of, "p", "x", "y", "t", align=True)[::-1][::-1]),
    "N x 4, whole": lambda of, path: dict(events=torch.tensor(table(of, "txyp", "i8")), columns="txyp"),
    "N x 4, seconds": lambda of, path: dict(events=table(of, "xytp", "f8", 1e-6), columns="xytp"),
    "N x 4, 32 bits": lambda of, path: dict(events=table(of, "xytp", "f4"), columns="xytp", time_unit="us"),
    "4 x N, turned": lambda of, path: dict(events=numpy.ascontiguousarray(table(of, "ptxy", "i4").T).T, columns="ptxy"),
    "big-endian, backwards": lambda of, path: dict(events={k: of[k][::-1].astype(">i4")[::-1] for k in "xytp"}),
    "named tuple": lambda of, path: dict(events=collections.namedtuple("E", "p x y t")(*map(of.get, "pxyt"))),
    "every second": lambda of, path: dict(events={k: numpy.repeat(of[k], 2)[1::2] for k in "xytp"}),
    "unsigned": lambda of, path: dict(events={k: of[k].astype("u8") for k in "xytp"}),
    "read only": lambda of, path: dict(events={k: numpy.frombuffer(of[k].tobytes(), of[k].dtype) for k in "xytp"}),
    "-1 and 1": lambda of, path: dict(events=dict(of, p=2 * of["p"].astype("i1") - 1)),
    "-1.0 and 1.0": lambda of, path: dict(events=dict(of, p=2.0 * of["p"] - 1)),
    "bool": lambda of, path: dict(events=dict(of, p=torch.tensor(of["p"] > 0))),
    "array.array": lambda of, path: dict(events={k: array.array("q", of[k].tolist()) for k in "xytp"}),
    "bytes as numbers": lambda of, path: dict(events=dict(of, p=memoryview(of["p"].astype("u1").tobytes()))),
    "DLPack": lambda of, path: dict(events={k: by_dlpack(torch.tensor(of[k].astype("i4"))) for k in "xytp"}),
    "__array__": lambda of, path: dict(events={k: by_array(of[k]) for k in "xytp"}),
    "masked, none of it": lambda of, path: dict(events={k: numpy.ma.array(of[k]) for k in "xytp"}),
    "memoryview of a table": lambda of, path: dict(events=memoryview(table(of, "xytp", "i4")), columns="xytp"),
    "milliseconds": lambda of, path: dict(events=dict(of, t=of["t"] / 1e3), time_unit="ms"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_events_in_any_form_give_the_same_pixels(recorded, of_file, form):
    path, wanted = of_file
    media = events_given(**FORMS[form](recorded, path))
    assert pixels_hash(media) == wanted and media.pictures is None
    assert media.read().t.tolist() == recorded["t"].tolist()


def test_nanoseconds_and_seconds_become_microseconds():
    few = dict(x=[1, 2], y=[1, 2], p=[0, 1])
    for t, unit in (([1_700_000_000_000_001_999, 5_000], "ns"), ([0.25, 1e-6], None), ([3, 4], "s"), ([7, 8], None)):
        wanted = {"ns": [1_700_000_000_000_001, 5], "s": [3_000_000, 4_000_000]}.get(
            unit, [250_000, 1] if t[0] == 0.25 else t)
        assert events_in_memory(few | {"t": t}, time_unit=unit).t.tolist() == wanted


def test_an_array_that_nobody_else_holds_lives_as_long_as_its_tensor():
    freed = []
    value = numpy.arange(1000)
    tensor = given.tensor_of(value)
    weakref.finalize(value, freed.append, True)
    del value
    assert tensor.tolist() == list(range(1000)) and not freed
    del tensor
    assert freed


def test_arrays_may_be_written_over_once_they_are_given(recorded):
    mine = {key: torch.tensor(values.astype("i8" if key == "t" else "i4")) for key, values in recorded.items()}
    frames = torch.arange(8 * 12 * 16 * 3).remainder(251).to(torch.uint8).view(8, 12, 16, 3)
    media, clip = events_given(mine), video_given(frames)
    before = pixels_hash(media), pixels_hash(clip)
    for values in (*mine.values(), frames):
        values.zero_()
    assert (pixels_hash(media), pixels_hash(clip)) == before


class Fails(collections.abc.Sequence):
    """A sequence of the caller's own, of whose items none can be had."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        raise OSError(5, "no disk")


def quietly(make, *given):
    """What is new to torch warns of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*given)


def released():
    view = memoryview(bytearray(8))
    view.release()
    return view


FEW = dict(x=[1, 2, 3], y=[1, 2, 3], t=[1, 2, 3], p=[0, 1, 1])


@pytest.mark.parametrize("value,options,words", [
    (FEW | {"t": [1.0, float("nan"), 2.0]}, {}, "t is nan at event 1, wanted finite"),
    (FEW | {"t": [1.0, 2.0, float("inf")]}, {}, "t is inf at event 2"),
    (FEW | {"t": [1, 2, 2 ** 62]}, {"time_unit": "ms"}, "t holds times beyond 2^63 microseconds"),
    (FEW | {"x": [1.0, 2.5, 3.0]}, {}, "x is 2.5 at event 1, wanted whole numbers"),
    (FEW | {"p": [0, 1, 2]}, {}, "p holds codes from 0 to 2"), (FEW | {"p": [-1, 0, 1]}, {}, "codes -1, 0 and 1"),
    (FEW | {"x": [-1, 0, 1]}, {}, "x is negative"), (FEW | {"y": [1, 2, 5000]}, {}, "largest y is 5000"),
    (FEW | {"x": [1, 2]}, {}, "differ in length: x 2, y 3"), ({k: [] for k in "xytp"}, {}, "holds no events"),
    (FEW | {"x": "abc"}, {}, "x is a str"), (FEW | {"x": [1, None, 2]}, {}, "x is a list, which holds more"),
    (FEW | {"x": numpy.array(["1", "2", "3"])}, {}, "x is a ndarray, which is no array of numbers"),
    (FEW | {"t": numpy.arange(3).astype("M8[us]")}, {}, "t is a ndarray"),
    (FEW | {"x": torch.ones(3, dtype=torch.complex64)}, {}, "x has type torch.complex64"),
    (FEW | {"x": torch.ones(3, 1)}, {}, "x has type torch.float32 and shape (3, 1)"),
    (FEW | {"x": torch.tensor([1, 2, 3]).to_sparse()}, {}, "sparse"),
    (FEW | {"x": torch.ones(3, device="meta")}, {}, "on meta"),
    (FEW | {"x": numpy.array([1, 2, 2 ** 64 - 1], "u8")}, {}, "x holds values beyond 2^63"),
    (FEW | {"x": Bare(strides=(-8,), __dlpack__=None)}, {}, "x runs backwards, pass a contiguous copy"),
    ({"x": [1], "y": [1], "t": [1]}, {}, "found 'x', 'y', 't' (missing: p)"), ({"a": 1}, {}, "missing: x, y, t, p"),
    ([[1], [1], [1]], {}, "is a list of 3, wanted the four arrays"), (torch.ones(5, 4), {}, "pass columns="),
    (torch.ones(4, 5), {"columns": "xytp"}, "shape (4, 5), wanted [N, 4], so turned over"),
    (torch.ones(5), {}, "shape (5), wanted [N, 4]"), (5, {}, "is a int"), (object(), {}, "is a object"),
    (numpy.zeros(3, [("x", "S2"), ("y", "i4"), ("t", "i4"), ("p", "i4")]), {}, "x is a ndarray, which is no"),
    (FEW, {"event_path": RECORDING}, "got events and event_path"), (None, {}, "events: wanted one recording"),
    (b"", {}, "0 bytes"), (b"hello", {}, "events: not an .npy or .npz of events but text"), ([], {}, "list of 0"),
    (FEW | {"x": numpy.ma.array([1, 2, 3], mask=[0, 1, 0])}, {}, "x is a MaskedArray with masked values"),
    (numpy.ma.array(structured({k: numpy.array(FEW[k]) for k in FEW}, *"xytp"), mask=[(1, 0, 0, 0)] * 3), {},
     "x is a MaskedArray with masked values"),
    (FEW | {"x": quietly(torch.masked.masked_tensor, torch.ones(3), torch.ones(3) > 0)}, {}, "x is a MaskedTensor"),
    (FEW | {"x": quietly(torch.quantize_per_tensor, torch.ones(3), 1.0, 0, torch.quint8)}, {},
     "x is a quantized tensor"),
    (FEW | {"x": quietly(torch.nested.nested_tensor, [torch.ones(3), torch.ones(2)])}, {}, "x is a nested tensor"),
    ({k: torch.zeros(1, dtype=torch.int32).expand(1 << 45) for k in "xytp"}, {}, "holds 35184372088832 events"),
    ({k: numpy.broadcast_to(numpy.int32(0), 1 << 45) for k in "xytp"}, {}, "x holds 35184372088832 values"),
    (torch.zeros(1, 4, 4, 3, dtype=torch.uint8).expand(1 << 40, 4, 4, 3), {}, "holds 1099511627776 pictures"),
    (None, {"event_image_path": ["a.png"] * 1001}, "holds 1001 pictures, at most 1000"),
    (released(), {}, "is a memoryview that cannot be read"), (Fails(), {}, "is a Fails that cannot be read (no disk)"),
    (None, {"event_path": FEW}, "event_path: is a dict, wanted the path of an .npy or .npz of events; pass what is in "
     "memory as events"),
    (None, {"event_path": given.Events(*map(torch.tensor, FEW.values()))}, "event_path: is a Events, wanted the path"),
    (None, {"event_image_path": [FEW]}, "event_image_path: is a dict"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_bad_events_are_one_line(value, options, words):
    with pytest.raises(InputError) as error:
        events_given(value, **options).read()
    assert words.replace(", pass", "; pass") in str(error.value) and len(str(error.value)) < 300
    assert str(error.value).startswith(("events: ", "event_"))


# ---- frames


@pytest.fixture(scope="module")
def decoded():
    """(all frames of the embedded clip as numpy [R, H, W, 3], the pixels of the eight that are taken)."""
    kept, total = decode_frames(CLIP, list(range(10_000)), False, rgb_tensor)
    frames = numpy.stack([numpy.array(kept[i].tolist(), "u1") for i in range(total)])
    assert total > 8
    return frames, pixels_hash(video_given(video_path=CLIP))


def saved(frames, folder):
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:03}.png")
    return [folder / f"{i:03}.png" for i in range(len(frames))]


SHAPES = {
    "path": lambda frames, folder: CLIP,
    "content": lambda frames, folder: CLIP.read_bytes(),
    "file object": lambda frames, folder: CLIP.open("rb"),
    "PIL pictures": lambda frames, folder: [Image.fromarray(frame) for frame in frames],
    "pictures with alpha": lambda frames, folder: [Image.fromarray(frame).convert("RGBA") for frame in frames],
    "paths of pictures": saved,
    "list of arrays": lambda frames, folder: list(frames),
    "deque of tensors": lambda frames, folder: collections.deque(torch.tensor(frame) for frame in frames),
    "[R, H, W, 3] array": lambda frames, folder: frames,
    "[R, H, W, 3] tensor": lambda frames, folder: torch.tensor(frames),
    "[R, 3, H, W] tensor": lambda frames, folder: torch.tensor(frames).permute(0, 3, 1, 2).contiguous(),
    "[R, 3, H, W] array": lambda frames, folder: frames.transpose(0, 3, 1, 2),
    "blue first, turned": lambda frames, folder: [numpy.ascontiguousarray(f[..., ::-1])[..., ::-1] for f in frames],
    "cut out": lambda frames, folder: numpy.pad(frames, ((0, 0), (3, 2), (5, 1), (0, 0)))[:, 3:-2, 5:-1],
    "memoryview": lambda frames, folder: memoryview(numpy.ascontiguousarray(frames)),
    "DLPack": lambda frames, folder: by_dlpack(torch.tensor(frames)),
}


@pytest.mark.parametrize("form", SHAPES)
def test_the_same_frames_in_any_form_give_the_same_pixels(decoded, tmp_path, form):
    media = video_given(SHAPES[form](decoded[0], tmp_path))
    assert pixels_hash(media) == decoded[1] and media.pictures is None and len(media.read()) == 8


def test_the_frame_rule_holds_for_frames_in_memory():
    frames = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 4, 5, 3)
    for count, rule, wanted in ((8, "uniform", [0, 2, 5, 7, 10, 12, 15, 17]), (3, "first", [0, 1, 2])):
        assert [int(frame[0, 0, 0]) for frame in video_given(frames, num_frames=count, rule=rule).read()] == wanted
    few = video_given(list(frames[:2]), num_frames=4).read()
    assert [int(frame[0, 0, 0]) for frame in few] == [0, 0, 1, 1]


class Slow(io.BytesIO):
    """Gives less than it is asked for, as a socket and an unbuffered file may."""

    def read(self, size=-1):
        return super().read(min(size, 9999))


def test_a_file_object_may_give_its_content_in_parts(decoded):
    assert pixels_hash(video_given(Slow(CLIP.read_bytes()))) == decoded[1]


def test_a_file_object_is_put_back_where_it_stood():
    file = io.BytesIO(b"junk" + CLIP.read_bytes())
    file.seek(4)
    assert [pixels_hash(video_given(file)) for _ in range(2)][1] and file.tell() == 4


GREY = numpy.zeros((9, 8, 8, 3), "u1")


@pytest.mark.parametrize("value,options,words", [
    (GREY.astype("f4"), {}, "video[0]: is an array of float32 and shape (8, 8, 3), wanted uint8"),
    ([*GREY[:4], GREY[4, :6]], {}, "video: its pictures change size"), (GREY[..., 0], {}, "is one picture"),
    ([GREY[0, ..., 0]] * 8, {}, "video[0]: is an array of uint8 and shape (8, 8), wanted"),
    (GREY[:0], {}, "shape (0, 8, 8, 3)"), ([], {}, "is an empty list"),
    (Image.new("RGB", (8, 8)), {}, "is one picture"),
    ([Image.new("F", (8, 8))] * 8, {}, "video[0]: is a picture of mode F, wanted RGB"),
    ([Image.new("I;16", (8, 8))] * 8, {}, "video[0]: is a picture of mode I;16, wanted RGB"),
    (GREY[:, :3, :3], {}, "shape (3, 3, 3)"), (GREY[:, :0], {}, "8 x 0 pixels"),
    ([numpy.zeros((1, 600, 3), "u1")], {}, "sides within 256 : 1"), (numpy.zeros((9, 8, 8, 4), "u1"), {}, "(8, 8, 4)"),
    (["no/such.png"], {}, "no/such.png: no such file"), ([None], {}, "video: is a NoneType"),
    (5, {}, "video: is a int"), (Fails(), {}, "video: is a Fails that cannot be read (no disk)"),
    (released(), {}, "video: is a memoryview that cannot be read"),
    ([numpy.ma.array(GREY[0], mask=GREY[0] == 0)] * 8, {}, "video[0]: is a MaskedArray with masked values"),
    ([numpy.broadcast_to(numpy.uint8(0), (1 << 20, 1 << 20, 3))], {}, "video: holds 3298534883328 values"),
    ({"a": 1}, {}, "video: is a dict"), (b"not a clip, only some words", {}, "video: not a video container but text"),
    (io.StringIO("text"), {}, "expected a bytes-like object, str found), wanted bytes"),
    (io.BytesIO(), {}, "video: 0 bytes"),
    (CLIP.read_bytes()[:3000], {}, "video: a video container without a usable index"),
    (None, {}, "video: wanted one video, or one image, got none"), (CLIP, {"image": GREY[0]}, "got video and image"),
    (None, {"video_path": GREY}, "video_path: is a ndarray, wanted the path of a video file; pass what is"),
    (None, {"image": GREY}, "image: is an array of uint8 and shape (9, 8, 8, 3)"),
    (None, {"image_path": 3}, "image_path: is a int"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_bad_frames_are_one_line(value, options, words):
    with pytest.raises(InputError) as error:
        video_given(value, **options).read()
    assert words in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


# ---- through the engine


def test_the_engine_answers_about_what_is_in_memory(pair, decoded, tmp_path):
    """The same ids as of the files, by both models; pictures of events too."""
    files = asked(0)
    options = dict(query=files["query"], max_new_tokens=files["max_new_tokens"])
    drafted = pair.generate(**files, mode="drafter_only").output_ids
    with numpy.load(RECORDING) as file:
        recording = dict(file)
    drawn = [Image.fromarray(numpy.array(frame.tolist(), "u1")) for frame in draw_events(given.read_events(RECORDING))]
    assert pair.generate(events=recording, mode="drafter_only", **options).output_ids == drafted
    assert pair.generate(events=drawn, mode="drafter_only", **options).output_ids == drafted
    assert pair.generate(events=recording, video=decoded[0], **options).output_ids == truth(pair, 0)
    one = pair.generate(mode="target_only", query="What?", max_new_tokens=5, image=decoded[0][0])
    path = tmp_path / "first.png"
    Image.fromarray(decoded[0][0]).save(path)
    as_file = pair.generate(mode="target_only", query="What?", max_new_tokens=5, image_path=path)
    assert one.output_ids == as_file.output_ids


def test_bad_input_in_memory_is_refused_before_any_model_runs(pair, monkeypatch):
    monkeypatch.setattr(pair.target, "encode", None)
    monkeypatch.setattr(pair.drafter, "encode", None)
    with pytest.raises(InputError, match="^events: t is nan"), monkeypatch.context() as patch:
        patch.setattr(pair, "_prepare", None)
        pair.generate(events=FEW | {"t": [1.0, 2.0, float("nan")]}, video=CLIP, query="Q")
    monkeypatch.undo()
    assert pair.generate(mode="target_only", **asked(0)).output_ids == truth(pair, 0)
