"""kernels.frames against upstream's recorded numbers: drawn canvases, resized crops, normalised pixels."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kernels import frames
from weights.events import read_events
from weights.names import CLIP_MEAN, CLIP_STD, RESCALE
from weights.video import read_video

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SAMPLES = SHARED / "data" / "event_samples"
PREPROCESS = SHARED / "fixtures" / "video_llava_tiny" / "preprocess"
NAMES = ["sample1.npy", "interlaken_00_d_000074.npy", "interlaken_00_d_000079.npy", "interlaken_00_d_000089.npy",
         "interlaken_00_d_000099.npy"]


def expected(folder):
    path = folder / "expected.json"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    return json.loads(path.read_text())


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def events(x, y, p):
    return SimpleNamespace(x=torch.as_tensor(x), y=torch.as_tensor(y), p=torch.as_tensor(p))


def chosen(recording, keep, shift_x=0, shift_y=0):
    return events(recording.x[keep] - shift_x, recording.y[keep] - shift_y, recording.p[keep])


def draw_ref(x, y, p, height, width):
    """One frame, [H, W, 3] uint8: each event in turn overwrites its pixel."""
    frame_HW3 = torch.full((height, width, 3), 255, dtype=torch.uint8)
    for column, row, polarity in zip(x.tolist(), y.tolist(), p.tolist(), strict=True):
        frame_HW3[row, column] = torch.tensor(frames.COLOURS[polarity != 0], dtype=torch.uint8)
    return frame_HW3


def crop_u8(frame, size):
    """[3, size, size] uint8: what Pillow makes of a frame before it is normalised."""
    return torch.frombuffer(frames.crop_planes(frame, size), dtype=torch.uint8).view(3, size, size)


def clip_table():
    """[3, 256] float32: what each uint8 becomes per channel. Rescaled in double, rounded, normalised in float32."""
    unit = (torch.arange(256, dtype=torch.float64) * RESCALE).float()
    return (unit - torch.tensor(CLIP_MEAN).view(3, 1)) / torch.tensor(CLIP_STD).view(3, 1)


def check_frames(drawn, wanted):
    """Canvas and crop bytes, counts and means of each frame, as far as the recorded frame names them."""
    assert len(drawn) == len(wanted)
    pixels = frames.clip_pixels(drawn, 336)
    for frame, pixel, want in zip(drawn, pixels, wanted, strict=True):
        height, width = frame.shape[:2]
        assert [height, width] == want["canvas_hw"]
        assert sha256(frame) == want["canvas_sha256"]
        assert (frame == torch.tensor([255, 0, 0])).all(-1).sum() == want["red"]
        assert (frame == torch.tensor([0, 0, 255])).all(-1).sum() == want["blue"]
        assert list(frames.resized_hw(height, width, 336)) == want["resized_hw"]
        assert sha256(crop_u8(frame, 336).permute(1, 2, 0)) == want["resize_u8_sha256"]
        # recorded with six digits
        assert abs(pixel.double().mean().item() - want["normalised_mean"]) <= 1e-6
        if "bf16_mean" in want:
            assert abs(pixel.bfloat16().double().mean().item() - want["bf16_mean"]) <= 1e-6
        for place, value in want.get("probe_values", {}).items():
            assert abs(pixel[tuple(map(int, place.split(",")))].item() - value) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_real_recordings_give_upstreams_canvases_crops_and_means(name):
    want = expected(SAMPLES)["samples"][name]
    check_frames(frames.draw_events(read_events(SAMPLES / name), 5), want["frames"])


EDGE_CASES = {
    "portrait": (5, lambda e: chosen(e, (e.x >= 300) & (e.x <= 511) & (e.y >= 100) & (e.y <= 479), 300, 100)),
    "small_upscaled": (5, lambda e: chosen(e, (e.x <= 99) & (e.y <= 59))),
    "wide": (5, lambda e: chosen(e, (e.y >= 400) & (e.x <= 633), 0, 400)),
    "remainder": (5, lambda e: chosen(e, slice(0, 23))),
    "sample1_one_frame": (1, lambda e: e),
    "sample1_three_frames": (3, lambda e: e),
}


@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases_give_upstreams_canvases_and_crops(case):
    want = expected(SAMPLES)["edge_cases"][case]
    num_frames, choose = EDGE_CASES[case]
    recording = choose(read_events(SAMPLES / "sample1.npy"))
    assert recording.x.numel() == want["num_events"]
    check_frames(frames.draw_events(recording, num_frames), want["frames"])


@pytest.mark.parametrize("case", ["overwrite_rule", "signed_polarity"])
def test_last_event_wins_and_only_zero_is_negative(case):
    want = expected(SAMPLES)["edge_cases"][case]
    drawn = frames.draw_events(events(want["x"], want["y"], want["p"]), 1)[0]
    assert drawn.tolist() == want["image_hwc"]


def crowded(num_events, seed):
    seeded = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, top, (num_events,), generator=seeded, dtype=torch.int32) for top in (9, 7, 2)]
    return events(*draw)


@pytest.mark.parametrize("num_events, num_frames", [(1, 1), (5, 5), (23, 5), (997, 4)])
def test_drawing_equals_one_event_at_a_time(num_events, num_frames):
    recording = crowded(num_events, seed=num_events)
    spans = frames.split_by_count(num_events, num_frames)
    for (begin, end), drawn in zip(spans, frames.draw_events(recording, num_frames), strict=True):
        x, y, p = (v[begin:end] for v in (recording.x, recording.y, recording.p))
        plain = draw_ref(x, y, p, y.max().item() + 1, x.max().item() + 1)
        assert torch.equal(drawn, plain)


@pytest.mark.parametrize("num_events, num_frames", [(1, 1), (23, 5), (997, 4), (1537, 3)])
@pytest.mark.parametrize("canvas", [None, (9, 11)])
def test_drawing_all_frames_at_once_equals_one_event_at_a_time(num_events, num_frames, canvas, device, nan_empty):
    """The kernels that a GPU draws with; events of one frame share pixels, and canvases differ in size."""
    recording = crowded(num_events, seed=num_events)
    one_by_one = frames.draw_events(recording, num_frames, canvas)
    on = [values.to(device) for values in (recording.x, recording.y, recording.p.to(torch.uint8))]
    at_once = frames.drawn_at_once(*on, [frame.shape[:2] for frame in one_by_one])
    for drawn, plain in zip(at_once, one_by_one, strict=True):
        assert torch.equal(drawn.cpu(), plain)


def test_more_pixels_than_a_place_can_name_are_the_users_to_mend():
    x = torch.zeros(200, dtype=torch.int32)
    with pytest.raises(ValueError, match="200 events on 200 frames of 3355443200 pixels"):
        frames.drawn_at_once(x, x, x.to(torch.uint8), [(4096, 4096)] * 200)


def test_split_covers_every_event_once_and_the_last_frame_takes_the_rest():
    assert [end - begin for begin, end in frames.split_by_count(23, 5)] == [4, 4, 4, 4, 7]
    for num_events in range(5, 60):
        spans = frames.split_by_count(num_events, 5)
        assert [i for begin, end in spans for i in range(begin, end)] == list(range(num_events))


def test_fixed_canvas_sizes_every_frame_and_keeps_the_drawing():
    recording = crowded(50, seed=1)
    own = frames.draw_events(recording, 5)
    for frame, fixed in zip(own, frames.draw_events(recording, 5, canvas=(12, 10)), strict=True):
        height, width = frame.shape[:2]
        assert fixed.shape == (12, 10, 3) and torch.equal(fixed[:height, :width], frame)
        assert fixed.sum() - frame.sum() == 255 * 3 * (120 - height * width)     # the rest is white


@pytest.mark.parametrize("x, y, num_frames, canvas, words", [
    ([], [], 5, None, "0 events"),
    ([1, 2, 3, 4], [1, 2, 3, 4], 5, None, "4 events cannot fill 5 frames"),
    ([1, 2], [1, 2], 0, None, "0 frames"),
    ([1, 9], [1, 2], 1, (5, 5), "outside the canvas"),
    ([1, -1], [1, 2], 1, None, "outside the canvas"),
])
def test_events_that_cannot_be_drawn_raise_a_clear_sentence(x, y, num_frames, canvas, words):
    recording = events(torch.tensor(x, dtype=torch.int32), torch.tensor(y, dtype=torch.int32), torch.ones(len(x)))
    with pytest.raises(ValueError, match=words):
        frames.draw_events(recording, num_frames, canvas)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same_bytes():
    recording = crowded(100_000, seed=2)
    on_gpu = events(recording.x.cuda(), recording.y.cuda(), recording.p.cuda())
    plain = frames.draw_events(recording, 5)
    for drawn in (frames.draw_events(on_gpu, 5), frames.draw_events(recording, 5, device="cuda")):
        for a, b in zip(plain, drawn, strict=True):
            assert torch.equal(a, b.cpu())


# ---- resize, crop, normalise -----------------------------------------------------------------------------------------

def test_video_crops_equal_hugging_face():
    want = expected(PREPROCESS)
    clip = read_video(PREPROCESS / want["video"])
    crops = torch.stack([crop_u8(frame, 224) for frame in clip])
    assert torch.equal(crops, load_file(PREPROCESS / "expected.safetensors")["crop_uint8"])
    assert sha256(crops) == want["slow"]["sha256_crop_uint8_TCHW"]
    assert frames.resized_hw(240, 320, 224) == tuple(want["resized_hw"])


def test_video_pixels_equal_hugging_face():
    want = expected(PREPROCESS)["slow"]
    pixels = frames.clip_pixels(read_video(PREPROCESS / "shapes_320x240_25fps.mp4"), 224)
    assert list(pixels.shape) == want["shape"] and pixels.dtype == torch.float32
    assert abs(pixels.double().mean().item() - want["mean"]) <= 1e-6
    means = pixels.double().mean((2, 3))
    assert (means - torch.tensor(want["per_frame_channel_mean"])).abs().max() <= 1e-5      # recorded with five digits
    assert len(want["samples"]) == 36
    for sample in want["samples"]:
        value = pixels[sample["frame"], sample["c"], sample["y"], sample["x"]].item()
        assert abs(value - sample["value"]) <= 1e-6


@pytest.mark.parametrize("case", ["portrait_up", "landscape_odd"])
def test_resize_cases_equal_hugging_face(case):
    path = PREPROCESS / "resize_cases.safetensors"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    tensors = load_file(path)
    given = next(v for k, v in tensors.items() if case in k and v.shape[-1] == 3)
    wanted = next(v for k, v in tensors.items() if case in k and v.shape[0] == 3)
    assert torch.equal(crop_u8(given, 224), wanted)


def test_table_equals_rescale_in_double_and_normalise_in_float32():
    numpy = pytest.importorskip("numpy")
    mean, std = (numpy.array(v, dtype=numpy.float32)[:, None] for v in (frames.CLIP_MEAN, frames.CLIP_STD))
    unit = (numpy.arange(256).astype(numpy.float64) * 0.00392156862745098).astype(numpy.float32)
    table = clip_table()
    assert numpy.array_equal(table.numpy(), (unit - mean) / std)
    # the end points that the specification writes out, to its eight digits
    assert (table[:, 0] - torch.tensor([-1.7922626, -1.7520971, -1.4802198])).abs().max() <= 1e-7
    assert (table[:, 255] - torch.tensor([1.9303361, 2.0748837, 2.1458969])).abs().max() <= 2.5e-7


def by_pillow(frame, size):
    """[3, size, size] uint8: the whole frame resized in one call, then its centre: the recipe as upstream spells it."""
    height, width = frames.resized_hw(*frame.shape[:2], size)
    image = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    cut = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def odd_frames(count, seed, most=120):
    """Frames of random sizes, half noise and half hard edges, which overshoot between the two passes of a resize."""
    seeded = torch.Generator().manual_seed(seed)
    for number in range(count):
        height, width = (torch.randint(1, most, (2,), generator=seeded)).tolist()
        frame = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=seeded)
        yield frame if number % 2 else (frame > 127).byte() * 255


def test_crops_equal_pillows():
    """500 random sizes, grown, shrunk and kept, portrait and landscape."""
    for number, frame in enumerate(odd_frames(500, seed=8)):
        size = (28, 33, 56, 1)[number % 4]
        assert torch.equal(crop_u8(frame, size), by_pillow(frame, size)), tuple(frame.shape)


def test_products_of_whole_numbers_equal_pillow():
    """500 random sizes; tall ones among them take the vertical pass first."""
    for number, frame in enumerate(odd_frames(500, seed=9)):
        size = (28, 33, 56, 1)[number % 4]
        found = frames.crop_exact(frame[None], size)[0]
        assert torch.equal(found, by_pillow(frame, size)), (tuple(frame.shape), size)


@pytest.mark.parametrize("height, width, size", [(480, 640, 224), (480, 640, 336), (1080, 1440, 336), (640, 480, 336),
                                                 (1280, 719, 224), (100, 177, 336), (336, 336, 336), (260, 346, 336)])
def test_products_of_whole_numbers_equal_pillow_at_real_sizes(height, width, size):
    seeded = torch.Generator().manual_seed(height)
    frame = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=seeded)
    assert torch.equal(frames.crop_exact(frame[None], size)[0], by_pillow(frame, size))


def test_vertical_pass_comes_first_where_pillow_has_it_first():
    """Only the two orders are possible, so frames on which they differ tell which one Pillow took."""
    told = {True: 0, False: 0}
    for frame in odd_frames(400, seed=10):
        high, wide = frames.resized_hw(*frame.shape[:2], 28)
        image = Image.fromarray(frame.numpy())
        across = image.resize((wide, image.height), Image.Resampling.BICUBIC)
        down = image.resize((image.width, high), Image.Resampling.BICUBIC)
        ways = [first.resize((wide, high), Image.Resampling.BICUBIC).tobytes() for first in (across, down)]
        if ways[0] != ways[1]:
            tall = frame.shape[0] > high and frame.shape[0] - high > 2 * (frame.shape[1] - wide)
            vertical = frames.VERTICAL_FIRST and tall
            assert image.resize((wide, high), Image.Resampling.BICUBIC).tobytes() == ways[vertical], frame.shape
            told[vertical] += 1
    assert told[True] >= 10 * frames.VERTICAL_FIRST and told[False] >= 10, told


def test_frames_on_their_way_to_a_device_keep_their_order():
    given = list(odd_frames(9, seed=11))
    given = given[:4] + [given[4]] * 3 + given[5:]
    found = frames.crops_on(torch.device("cpu"), given, 28)
    assert torch.equal(found, torch.stack([crop_u8(frame, 28) for frame in given]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_pixels_equal_the_cpus():
    given = list(odd_frames(40, seed=12)) + [torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8)] * 8
    for size in (28, 224, 336):
        assert torch.equal(frames.clip_pixels(given, size, device="cuda").cpu(), frames.clip_pixels(given, size))


def test_normalising_gives_the_tables_bits_for_every_input():
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(frames.normalised(every).view(3, 256), clip_table())


def test_pixels_are_the_table_of_the_crop():
    given = torch.randint(0, 256, (31, 47, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    crop, table = crop_u8(given, 28), clip_table()
    wanted = torch.stack([table[c][crop[c].long()] for c in range(3)])
    assert torch.equal(frames.clip_pixels([given], 28)[0], wanted)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_write_into_tensors_of_any_mode(monkeypatch, mode):
    monkeypatch.setattr(frames, "cores", lambda: 2)
    given = list(odd_frames(5, seed=13))
    crops = torch.stack([crop_u8(frame, 300) for frame in given])    # 90,000 elements a plane: several pieces
    wanted = frames.normalised(crops)
    with mode():
        assert torch.equal(frames.clip_pixels(given, 300), wanted)


def test_many_frames_on_threads_equal_one_at_a_time():
    seeded = torch.Generator().manual_seed(4)
    given = [torch.randint(0, 256, (40 + i, 90 - 9 * i, 3), dtype=torch.uint8, generator=seeded) for i in range(9)]
    together = frames.clip_pixels(given, 56)
    assert torch.equal(together, torch.cat([frames.clip_pixels([frame], 56) for frame in given]))


def test_a_forked_child_starts_its_own_threads():
    """The pool is copied by a fork and its threads are not: waiting for them would never end."""
    script = ("import os, sys, torch\nfrom kernels import frames\nframes.cores = lambda: 2\n"
              "given = [torch.full((9, 12, 3), 7, dtype=torch.uint8)] * 3\nwant = frames.clip_pixels(given, 4)\n"
              "child = os.fork()\n"
              "if child == 0: os._exit(0 if torch.equal(frames.clip_pixels(given, 4), want) else 3)\n"
              "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_view_with_other_strides_is_read_by_its_values():
    given = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    view = given.permute(1, 2, 0)
    assert torch.equal(frames.clip_pixels([view], 28), frames.clip_pixels([view.clone()], 28))


def test_a_sliver_is_refused_before_it_grows():
    with pytest.raises(ValueError, match="1 x 150000|150000 x 1"):
        frames.clip_pixels([torch.zeros(1, 150_000, 3, dtype=torch.uint8)], 336)


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="no frames"):
        frames.clip_pixels([], 224)
