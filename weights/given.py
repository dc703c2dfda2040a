"""given: events, frames and clips as a caller has them, in memory or as paths.

    media = events_given({"x": x, "y": y, "t": t, "p": p})        # media.read() gives Events
    media = video_given(frames, num_frames=8)                     # media.read() gives eight frames [H, W, 3] uint8

An array is anything with the buffer protocol, DLPack, `__cuda_array_interface__` or `__array__`: numpy, torch, CuPy,
Numba, JAX, array.array. numpy itself is never imported: where its arrays come from, it is there. What lies on a GPU
stays there. Arrays are checked and copied at once, so that the caller may write over them; of files only the presence
is checked, they are read later. Whatever is wrong ends in InputError: one line with the argument or path, what was
wanted, what came, what to try."""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from kernels.frames import clip_pixels, draw_events, extent, quiet_copy
from weights.events import EVENT_FILE, MAX_CANVAS, TORCH_TYPES, Events, events_of, read_events, short_shape
from weights.files import Held, InputError, Refused, insist_file, insist_one_of, naming, path_text, quoted, reason_of
from weights.video import (
    IMAGE_ERRORS,
    MAX_IMAGE_PIXELS,
    MAX_VIDEO_PIXELS,
    PICTURE_FILE,
    VIDEO_RULES,
    as_rgb,
    check_size,
    one_size,
    read_image,
    read_video,
    sample_indices,
)

MAX_CONTENT = 1 << 30                # bytes of a file object
MAX_VALUES, MAX_EVENTS, MAX_PICTURES = 1 << 32, 1 << 30, 1000        # of an array, a recording, pictures of events
PICTURES = (".png", ".jpg", ".jpeg")
PATHS = (str, os.PathLike)           # a Held is one
CONTENTS = (bytes, bytearray)
LETTERS = {"?": "b", **dict.fromkeys("bhilqn", "i"), **dict.fromkeys("BHILQN", "u"), **dict.fromkeys("efd", "f")}
TYPES = {**TORCH_TYPES, "u8": torch.uint64, "f2": torch.float16, "f4": torch.float32, "f8": torch.float64,
         "b1": torch.bool}
UNITS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}     # microseconds


class Shown(NamedTuple):
    """What one model is shown."""
    name: Any                        # what messages call it: a path, or an argument
    read: Callable                   # (called when decoding begins, or nothing) -> frames [H, W, 3] uint8, or Events
    size: int = 0                    # bytes of the file; 0 where there is none
    pictures: int | None = None      # how many there are; None: a recording, or a clip

    def pixels(self, loaded, vision, device, event_frames: int, canvas) -> torch.Tensor:
        """Float pixels [R, 3, X, X] of what `read` gave, on the device that draws and resizes: what travels is bytes.
        What cannot be drawn or resized is the user's to mend."""
        try:
            if isinstance(loaded, Events):
                loaded = draw_events(loaded, event_frames, canvas, device)
            return clip_pixels(loaded, vision.image, device)
        except ValueError as error:
            raise InputError(f"{self.name}: {error}; use another recording or clip") from None


@contextlib.contextmanager
def reading(argument: str, value):
    """`naming`, and whatever else the caller's value raises when it is looked into, for lack of memory too, is an
    InputError that names the argument: its class may be of any library, or of the caller's own."""
    with naming(argument):
        try:
            yield
        except (InputError, Refused):
            raise
        except Exception as error:
            raise Refused(f"is a {type(value).__name__} that cannot be read ({reason_of(error)})", "pass tensors or "
                          "arrays, or plain lists and mappings of them") from None


def is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, memoryview) and not is_file(value)


# ---- arrays ----------------------------------------------------------------------------------------------------------

def tensor_of(value) -> torch.Tensor:
    """A dense tensor on the CPU or a GPU over the memory of any array, or a copy where torch cannot take that. Refused
    if the value is no array."""
    found, kind = value, type(value).__name__
    try:
        if isinstance(value, torch.Tensor):
            if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                raise Refused(f"is a {kind}, which is no array of numbers", "pass a dense tensor on cpu or cuda")
            found = value.detach()
        elif isinstance(value, (list, tuple)):
            found = torch.tensor(value, dtype=None if value else torch.int64)
        elif hasattr(value, "__array_interface__"):
            mask: Any = getattr(value, "mask", False)             # of numpy.ma, whose memory holds what is masked too
            if not callable(mask) and mask is not False and mask.any():
                raise Refused(f"is a {kind} with masked values", "leave them out, or fill them")
            found = of_numpy(value.__array__())
        elif any(step < 0 for step in getattr(value, "strides", None) or ()):
            raise Refused("runs backwards", "pass a contiguous copy")        # torch aborts the process over such a one
        elif hasattr(value, "__dlpack__"):
            found = torch.from_dlpack(value)
        elif hasattr(value, "__cuda_array_interface__"):
            torch.cuda.synchronize()                         # whoever wrote it
            found = torch.as_tensor(value, device="cuda").clone()            # it may be gone sooner
        elif callable(getattr(value, "__array__", None)):    # a pandas Series, an h5py Dataset
            found = of_numpy(value.__array__())
        else:
            found = of_buffer(memoryview(value))
    except (TypeError, ValueError, BufferError, RuntimeError, OverflowError, AttributeError) as error:
        what = "holds more than numbers" if isinstance(value, (list, tuple)) else "is no array of numbers"
        raise Refused(f"is a {kind}, which {what} ({reason_of(error)})", "pass a tensor, a numpy array, or anything "
                      "with the buffer protocol or DLPack") from None
    plain = found.layout == torch.strided and not (found.is_quantized or found.is_nested)
    if not plain or found.device.type not in ("cpu", "cuda"):
        what = "a nested" if found.is_nested else "a quantized" if found.is_quantized else ""
        what = f"{what} tensor" if what else f"a tensor of layout {found.layout} on {found.device}"
        raise Refused(f"is {what}", "pass a dense one on cpu or cuda")
    return found


def of_numpy(array) -> torch.Tensor:
    """Over a numpy array's memory; over a copy where it is read-only, has gaps, runs backwards or is byte-swapped."""
    if array.size > MAX_VALUES:                              # it may repeat one value without end
        raise Refused(f"holds {array.size} values, at most {MAX_VALUES} are read", "pass a part of it")
    plain = array.flags.c_contiguous and array.flags.aligned and array.flags.writeable and array.dtype.isnative
    return torch.from_numpy(array if plain else array.astype(array.dtype.newbyteorder("="), order="C"))


def of_buffer(view: memoryview) -> torch.Tensor:
    """A copy of what the buffer protocol shows."""
    letter = view.format.lstrip("@=<")                       # native on all machines that this runs on
    kind = f"{LETTERS.get(letter, letter)}{view.itemsize}"
    if kind not in TYPES:
        raise TypeError(f"its items are of type {quoted(view.format, 20)}")
    raw = bytearray(view.tobytes() or bytes(view.itemsize))
    return torch.frombuffer(raw, dtype=TYPES[kind])[:view.nbytes // view.itemsize].view(view.shape)


def own(tensor: torch.Tensor, pin: bool = False) -> torch.Tensor:
    """A contiguous copy; in page-locked memory if a GPU will fetch it."""
    if tensor.is_cuda:
        copied = tensor.clone(memory_format=torch.contiguous_format)
        torch.cuda.current_stream(tensor.device).synchronize()               # another stream will read it
        return copied
    return quiet_copy(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin))


def shape_of(value) -> str:
    return short_shape(tuple(value.shape))


def dimensions(value) -> int:
    try:
        return len(getattr(value, "shape", ()))
    except (TypeError, RuntimeError):            # a class; a nested tensor
        return 0


# ---- events ----------------------------------------------------------------------------------------------------------

class Column:
    """One of x, y, t, p in memory, as `events_of` asks for it. unit: of times, one of UNITS; None: whole ones are
    microseconds, others seconds."""

    def __init__(self, values: torch.Tensor, unit: str | None = None):
        self.values, self.unit = values, unit or ("s" if values.is_floating_point() else "us")

    def length(self, key):
        if self.values.ndim != 1 or self.values.is_complex():
            raise Refused(f"{key} has type {self.values.dtype} and shape {shape_of(self.values)}, wanted one dimension "
                          f"of numbers", "pass four flat arrays, or one [N, 4] with columns")
        if len(self.values) > MAX_EVENTS:
            raise Refused(f"holds {len(self.values)} events, at most {MAX_EVENTS} are drawn", "pass a part of them")
        return len(self.values)

    def integers(self, key):
        """int32 or int64 [N] in memory of its own: whole numbers; times in microseconds, rounded."""
        values, scale = self.values, UNITS[self.unit] if key == "t" else 1.0
        if not values.is_floating_point():
            whole = values.view(torch.int64) if values.dtype == torch.uint64 else values
            if values.dtype == torch.uint64 and whole.amin().item() < 0:
                raise Refused(f"{key} holds values beyond 2^63", f"pass {key} as int64")
            if scale > 1 and max(map(abs, extent(whole.long()))) > (2 ** 63 - 1) // int(scale):
                raise Refused(f"{key} holds times beyond 2^63 microseconds", "mend time_unit")
            if scale != 1:
                return whole.long() * int(scale) if scale > 1 else whole.long() // int(1 / scale)
            return own(whole) if whole.dtype in (torch.int32, torch.int64) else whole.long()
        exact = values.double() * scale
        for wrong, wanted in ((~(exact.abs() < 2.0 ** 53), "finite numbers"),
                              (exact != exact.round() if key != "t" else None, "whole numbers")):
            if wrong is not None and wrong.any():
                at = int(wrong.int().argmax())
                raise Refused(f"{key} is {values[at].item()} at event {at}, wanted {wanted}",
                              "drop such events" if wanted == "finite numbers" else f"round {key}, or mend columns")
        return exact.round().long()


def columns_of(value, columns: str | None) -> dict:
    """{name: array or tensor} of a mapping, four arrays, a structured array, or one array [N, 4]."""
    if callable(getattr(value, "keys", None)):
        return {str(name): value[name] if str(name) in ("x", "y", "t", "p") else None
                for name in itertools.islice(value.keys(), 100_000)}         # they may have no end
    if isinstance(value, (list, tuple)):
        if names := getattr(value, "_fields", None):         # a named tuple may have them in another order
            return dict(zip(names, value, strict=True))
        if len(value) != 4:
            raise Refused(f"is a {type(value).__name__} of {len(value)}, wanted the four arrays x, y, t, p",
                          "pass them in this order, or as a mapping")
        return dict(zip(columns or "xytp", value, strict=True))
    if names := getattr(getattr(value, "dtype", None), "names", None):       # a structured array
        return {name: value[name] for name in names}
    table = tensor_of(value)
    if table.ndim != 2 or table.shape[1] != 4:
        raise Refused(f"is one array of shape {shape_of(table)}, wanted [N, 4]" + ", so turned over"
                      * (table.ndim == 2 and table.shape[0] == 4), "or pass x, y, t, p as a mapping")
    if columns is None:
        raise Refused("is one array [N, 4] that does not say what its columns are",
                      "pass columns=\"xytp\", or \"txyp\" for time first")
    return dict(zip(columns, table.unbind(1), strict=True))


def events_in_memory(value, columns: str | None = None, time_unit: str | None = None, max_canvas=MAX_CANVAS) -> Events:
    """Events of x, y, t, p in memory, copied; they stay on their device. columns: the order of an array [N, 4] or of
    four arrays. time_unit: s, ms, us or ns; None: whole times are microseconds, others seconds."""
    with reading("events", value):
        found = columns_of(value, columns)
        if found.keys() >= {"x", "y", "t", "p"}:
            for name in "xytp":
                try:
                    found[name] = Column(tensor_of(found[name]), time_unit)
                except Refused as refused:
                    raise Refused(f"{name} {refused.args[0]}", refused.args[1]) from None
            if len({found[name].values.device for name in "xytp"}) > 1:
                raise Refused("x, y, t, p lie on several devices", "bring them to one")
        return events_of(found, max_canvas)


def check_forms(columns, time_unit, rule) -> None:
    """What says how media are read, used or not in this mode: columns, time_unit, frame_rule."""
    if columns is not None and (type(columns) is not str or sorted(columns) != sorted("xytp")):
        raise InputError(f"columns: wanted the letters x, y, t, p in their order, got {quoted(columns, 20)}; "
                         f"write \"txyp\" for time first")
    if time_unit is not None:
        insist_one_of("time_unit", time_unit, UNITS)
    insist_one_of("frame_rule", rule, VIDEO_RULES)


def events_given(events=None, event_path=None, event_image_path=None, columns=None, time_unit=None) -> Shown:
    """What the drafter is shown. events: a path, a file's content or a file object, x, y, t, p in memory, or pictures
    of events; the two others are paths."""
    insist_one("recording, or pictures of events", events=events, event_path=event_path,
               event_image_path=event_image_path)
    argument, value = "events", events
    if event_path is not None:
        value = path_of("event_path", event_path, "an .npy or .npz of events", "events")
    elif event_image_path is not None:
        argument, value = "event_image_path", event_image_path
    with reading(argument, value):
        if event_image_path is not None or event_path is None and are_pictures(value):
            pictures = listed(value)
            if event_image_path is not None:
                pictures = [path_of(argument, path, "a PNG or JPEG", "events") for path in pictures]
            kept = kept_pictures(argument, pictures)
            return Shown(name_of(kept[0], argument), lambda *_: read_kept(kept), pictures=len(kept))
    if is_file(value):
        file = file_of(argument, value, "an .npy or .npz of events")
        return Shown(file, lambda *_: read_events(file), insist_file(file, *EVENT_FILE))
    made = events_in_memory(value, columns, time_unit)
    return Shown(argument, lambda *_: made)


def are_pictures(value) -> bool:
    """Whether `events` are pictures: PIL's, paths of some, a list of paths, or arrays of three dimensions or four."""
    several = is_list(value)
    first = next(iter(value), None) if several else value
    if is_file(first):
        return several or isinstance(first, PATHS) and os.fsdecode(first).lower().endswith(PICTURES)
    return isinstance(first, Image.Image) or dimensions(first) > (1 if several else 2)


# ---- pictures and clips ----------------------------------------------------------------------------------------------

def video_given(video=None, video_path=None, image=None, image_path=None, num_frames: int = 8, rule: str = "uniform",
                for_gpu: bool = False) -> Shown:
    """What the target is shown. video: a path, a file's content, a file object, or frames, of which `rule` takes
    num_frames; image: one picture in its place; the two others are paths."""
    insist_one("video, or one image", video=video, video_path=video_path, image=image, image_path=image_path)
    if image_path is not None:
        image = path_of("image_path", image_path, "an image", "image")
    if image is not None:
        with reading("image", image):
            kept = kept_pictures("image", [image], for_gpu)
        return Shown(name_of(kept[0], "image"), lambda *decoding: read_kept(kept, *decoding), file_size(kept[0]), 1)
    if video_path is not None:
        video = path_of("video_path", video_path, "a video file", "video")
    if is_file(video):
        file = file_of("video", video, "a video file")
        return Shown(file, lambda *decoding: read_video(file, num_frames, rule, for_gpu, *decoding), file_size(file))
    with reading("video", video):
        frames = frames_in(video)
        chosen = sample_indices(len(frames), num_frames, rule)
        several = sorted({*chosen})
        kept = kept_pictures("video", [frames[i] for i in several], for_gpu, several, MAX_VIDEO_PIXELS)
        one_size([of for of in kept if not is_file(of)])
    places = [several.index(i) for i in chosen]

    def read(*decoding):
        with naming("video"):
            found = one_size(read_kept(kept, *decoding))
        return [found[place] for place in places]
    return Shown("video", read)


def frames_in(value):
    """A sequence of frames: the list that was given, or one array by its first dimension."""
    if isinstance(value, Image.Image) or dimensions(value) == 3:
        raise Refused("is one picture, wanted frames", "pass it as image, or in a list")
    if is_list(value):
        if not len(value):
            raise Refused("is an empty list, wanted frames", "pass at least one")
        return value
    # numpy's stay what they are: of a view that torch cannot take, only the frames that are chosen are copied.
    frames = value if hasattr(value, "__array_interface__") else tensor_of(value)
    if frames.ndim != 4 or not len(frames):
        raise Refused(f"is an array of shape {shape_of(frames)}, wanted frames [R, H, W, 3] or [R, 3, H, W]",
                      "bring it to this shape")
    return frames


def kept_pictures(argument: str, values, pin=False, numbers=None, max_pixels=MAX_IMAGE_PIXELS) -> list:
    """Each one a path, which `read_kept` reads, or a copy, uint8 [H, W, 3]."""
    kept = []
    for number, value in zip(numbers or range(len(values)), values, strict=True):
        if is_file(value):
            kept.append(file_of(argument, value, "a PNG or JPEG"))
            insist_file(kept[-1], *PICTURE_FILE)
        else:
            with naming(argument if len(values) == 1 else f"{argument}[{number}]"):
                kept.append(own(picture_of(value, max_pixels), pin))
    if not kept:
        raise InputError(f"{argument}: an empty list; pass one picture or several")
    return kept


def read_kept(kept: list, decoding=lambda: None) -> list:
    decoding()
    return [read_image(of) if is_file(of) else of for of in kept]


def picture_of(value, max_pixels: int) -> torch.Tensor:
    """[H, W, 3] uint8 of a PIL picture, converted as `read_image` does it, or of an array [H, W, 3] or [3, H, W]."""
    if isinstance(value, Image.Image):
        check_size(*value.size, max_pixels)
        try:
            rgb = as_rgb(value)
        except IMAGE_ERRORS as error:
            raise Refused(f"truncated or damaged image ({reason_of(error)})", "open it in a viewer") from None
        return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
    picture = tensor_of(value)
    channels = [axis for axis in (0, 2) if picture.ndim == 3 and picture.shape[axis] == 3]
    if picture.dtype != torch.uint8 or len(channels) != 1:
        raise Refused(f"is an array of {str(picture.dtype).removeprefix('torch.')} and shape {shape_of(picture)}, "
                      f"wanted uint8 [H, W, 3] or [3, H, W]", "convert it to RGB, 0 to 255")
    picture = picture if channels == [2] else picture.permute(1, 2, 0)
    check_size(picture.shape[1], picture.shape[0], max_pixels)
    return picture


# ---- paths and contents ----------------------------------------------------------------------------------------------

def insist_one(wanted: str, **given) -> None:
    """InputError unless exactly one of these arguments was given."""
    found = [name for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise InputError(f"{next(iter(given))}: wanted one {wanted}, got {' and '.join(found) or 'none'}; pass exactly "
                         f"one")


def path_of(argument: str, value, wanted: str, better: str = "") -> str:
    """The text of the path that an argument is. InputError for anything else, with the argument that takes it."""
    with naming(argument):
        return path_text(value, f"the path of {wanted}", f"pass what is in memory as {better}" if better else
                         "give it as text")


def is_file(value) -> bool:
    """Whether it is a path, a file's content, or a file object."""
    return isinstance(value, (*PATHS, *CONTENTS)) or callable(getattr(value, "read", None))


def file_of(argument: str, value, wanted: str):
    """The path, or the content as a Held. A file object is read from where it stands, and put back there."""
    if isinstance(value, Held):
        return value
    if isinstance(value, PATHS):
        return path_of(argument, value, wanted)
    if not isinstance(value, CONTENTS):
        try:
            at = value.tell() if getattr(value, "seekable", lambda: True)() else None        # an mmap has none
            parts, left = [b""], MAX_CONTENT + 1
            while left > 0 and (part := value.read(left)):   # which may be less than there is
                parts.append(part)
                left -= len(part)
            if at is not None:
                value.seek(at)
            value = b"".join(parts)
        except Exception as error:                           # of a compressed file also its library's own
            raise InputError(f"{argument}: a file object that cannot be read ({reason_of(error)}), wanted bytes of "
                             f"{wanted}; open it again with \"rb\", or pass its path") from None
        if left <= 0:
            raise InputError(f"{argument}: a file object of more than {MAX_CONTENT} bytes; pass its path")
    return Held(argument, bytes(value))


def file_size(value) -> int:
    return insist_file(value, "a video file or an image") if is_file(value) else 0


def listed(value) -> list:
    """What a list or an array of several pictures holds; else the one that it is."""
    several = is_list(value) or dimensions(value) == 4
    if several and (count := len(value)) > MAX_PICTURES:
        raise Refused(f"holds {count} pictures, at most {MAX_PICTURES} are shown", "pass fewer")
    values = value if is_list(value) else tensor_of(value) if several else [value]
    return [values[i] for i in range(len(values))]


def name_of(kept, argument: str):
    return kept if is_file(kept) else argument
