"""frames: draws events into frames, and brings any frame onto the square pixel grid of a CLIP tower.
A frame is [H, W, 3] uint8, red first. Everything here is bit-exact with upstream. Pillow's bicubic rounds and clamps to
uint8 between its two passes, and a float resize differs by up to 24 of 255: on a GPU the same two passes are products
of whole numbers in float64. There drawing is two launches for all frames, and nothing waits for the host.
Bytes: 132,268 events are 1.2 MB as x, y, p; five frames of 480 x 640 are 4.6 MB drawn and 6.8 MB as fp32 pixels of 336.
Measured on 2 calm CPU cores: drawing 3.8 ms; 8 frames of 480 x 640 to 224, 10 ms with a thread per core, 18 without.
From events on the host to pixels on an H100 1.15 ms, of which the GPU computes for 0.34.
CPU steps stay below the size from which torch wakes its own workers: those wait for each other, and hold up a video
that is being decoded beside."""

import ctypes
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import PIL
import torch
import triton
import triton.language as tl
from PIL import Image

from weights.names import CLIP_MEAN, CLIP_STD

COLOURS = ((0, 0, 255), (255, 0, 0))    # negative blue, positive red, on white
ONE = 1 << 22                    # what a weight of 1 is to Pillow
SERIAL = 32_000                  # elements; torch splits the work of 32,768 and more among its own threads
MAX_THREADS = 16                 # more frames than these wait their turn
VERTICAL_FIRST = int(PIL.__version__.split(".")[0]) >= 13        # Pillow 12 always began across
MAX_RESIZED_PIXELS = 50_000_000  # a frame of 1 x 4000 would grow to 336 x 1,344,000 before its crop


def split_by_count(num_events, num_frames):
    """(begin, end) of each frame's events: equal counts in file order, the last frame takes the remainder."""
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames asked for: at least 1 is needed")
    if num_events < num_frames:
        raise ValueError(f"{num_events} events cannot fill {num_frames} frames: use a longer recording or fewer frames")
    step = num_events // num_frames
    return [(i * step, num_events if i == num_frames - 1 else (i + 1) * step) for i in range(num_frames)]


@triton.jit
def last_event_kernel(x_ptr, y_ptr, p_ptr, frame_ptr, last_ptr, N, step, R: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK events, each for its pixel: the largest of 2 * (number + 1) + polarity is the last event's, whatever the
    order of writing. frame_ptr: where each frame's pixels begin, then each frame's width."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frame = tl.minimum(i // step, R - 1)
    begin = tl.load(frame_ptr + frame, mask=i < N, other=0)
    width = tl.load(frame_ptr + R + frame, mask=i < N, other=0)
    x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.int64)
    y = tl.load(y_ptr + i, mask=i < N, other=0).to(tl.int64)
    key = 2 * (i + 1) + (tl.load(p_ptr + i, mask=i < N, other=0) != 0).to(tl.int32)
    tl.atomic_max(last_ptr + begin + y * width + x, key, mask=i < N, sem="relaxed")


@triton.jit
def paint_kernel(last_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """BLOCK bytes of pixels: white without an event, red after a positive one, blue after a negative one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(last_ptr + at // 3, mask=at < N, other=0)
    lit = (at % 3 == 0) & (key % 2 == 1) | (at % 3 == 2) & (key % 2 == 0) | (key == 0)
    tl.store(out_ptr + at, tl.where(lit, 255, 0).to(tl.uint8), mask=at < N)


def drawn_at_once(x, y, p, sizes):
    """List of frames [H_i, W_i, 3] uint8 of these sizes, views of one tensor on the events' device. x, y, p [N], in
    equal shares of which the last frame takes the remainder; every event is inside its frame."""
    N, R = x.numel(), len(sizes)
    areas = [height * width for height, width in sizes]
    if max(2 * N + 3, sum(areas)) >= 1 << 31:
        raise ValueError(f"{N} events on {R} frames of {sum(areas)} pixels in all, the limit of both is 2^30 and 2^31: "
                         f"use a shorter recording, fewer frames or a smaller canvas")
    begins = [sum(areas[:i]) for i in range(R)]
    frame = to_device(torch.tensor(begins + [width for _, width in sizes]), x.device)
    last = torch.zeros(sum(areas), dtype=torch.int32, device=x.device)
    out = torch.empty(3 * sum(areas), dtype=torch.uint8, device=x.device)
    last_event_kernel[(triton.cdiv(N, 512),)](x, y, p, frame, last, N, N // R, R=R, BLOCK=512, num_warps=4)
    paint_kernel[(triton.cdiv(out.numel(), 4096),)](last, out, out.numel(), BLOCK=4096, num_warps=8)
    return [part.view(*size, 3) for part, size in zip(out.split([3 * area for area in areas]), sizes, strict=True)]


def extent(values):
    """(smallest, largest) of a tensor, in parts that wake none of torch's workers."""
    parts = [part.aminmax() for part in values.split(len(values) if values.is_cuda else SERIAL)]
    return min(int(part.min) for part in parts), max(int(part.max) for part in parts)


def draw_events(events, num_frames=5, canvas=None, device=None):
    """List of `num_frames` frames [H_i, W_i, 3] uint8, drawn as EventGPT does, on `device`, the events' own unless
    given. Events on the host are drawn on a GPU without waiting for it.

    events: anything with 1-D integer tensors x, y, p of one length N, used in file order (time is not looked at).
    canvas: None gives every frame its own, as large as its largest y and x; (H, W) fixes one for all.
    Raises ValueError for fewer events than frames, and for an event outside a fixed canvas."""
    x, y, p = events.x, events.y, events.p
    spans, sizes = split_by_count(x.numel(), num_frames), []
    for begin, end in spans:
        (low_x, top_x), (low_y, top_y) = extent(x[begin:end]), extent(y[begin:end])
        height, width = canvas or (top_y + 1, top_x + 1)
        # The maximum sizes the canvas, the minimum keeps a negative index out.
        if top_y >= height or top_x >= width or low_y < 0 or low_x < 0:
            raise ValueError(f"events span x {low_x}..{top_x}, y {low_y}..{top_y}, outside the canvas of "
                             f"{width} x {height}: give a canvas that holds them, or none")
        sizes.append((height, width))
    device = torch.device(device or x.device)
    if device.type == "cuda":
        return drawn_at_once(*(to_device(values, device) for values in (x, y, p)), sizes)
    x, y, p = (values.to(device) for values in (x, y, p))
    # "The last event wins" has to survive a scatter in any order: the largest of index * 2 + polarity is that event,
    # and its low bit is the colour. Later frames have larger indices, so what an earlier one left behind loses by
    # itself.
    last, frames = filled(8 * max(h * w for h, w in sizes), 0).view(torch.int64), []
    for (begin, end), (height, width) in zip(spans, sizes, strict=True):
        pixel = torch.add(x[begin:end].long(), y[begin:end].long(), alpha=width)
        key = torch.arange(2 * begin, 2 * end, 2).add_(p[begin:end] != 0)
        last.scatter_reduce_(0, pixel, key, "amax")
        positive = last.gather(0, pixel).bitwise_and_(1)
        frame, at = filled(height * width * 3, 255), pixel.mul_(3)
        for negative_is, positive_is in zip(*COLOURS, strict=True):     # red, green, blue
            # All events of a pixel write its winner's colour: any order will do.
            frame.scatter_(0, at, (positive * (positive_is - negative_is)).add_(negative_is).to(torch.uint8))
            at.add_(1)
        frames.append(frame.view(height, width, 3))
    return frames


def filled(count, value):
    """[count] uint8 of one value on the CPU, without torch, whose workers would wake for it and, while a video decodes
    beside, hold each other up: drawing five frames on two busy cores took 125 ms that way and takes 8 this way."""
    return torch.frombuffer(bytearray(bytes([value])) * count, dtype=torch.uint8)


def quiet_copy(tensor, out):
    """`out`, contiguous, filled with the elements of a CPU tensor by this thread alone, in parts too small for torch to
    share out: its workers would spin on the cores that decode a video meanwhile. 132,268 events, read on 2 cores: 1.2
    ms of processor time in place of 2.1, and as long."""
    for there, here in zip(out.view(-1).split(SERIAL), tensor.reshape(-1).split(SERIAL), strict=True):
        there.copy_(here)
    return out


def pinned(tensor):
    """The tensor in page-locked memory, from where it travels to a GPU while the host goes on: itself, or a copy."""
    if tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    return quiet_copy(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))


def to_device(tensor, device):
    """On the device, through pinned memory where that is a GPU, without waiting."""
    return pinned(tensor).to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resized_hw(height, width, size):
    """(height, width) after the shorter side becomes `size`; the longer is truncated, as CLIP's processor does."""
    short, long = min(height, width), max(height, width)
    grown = int(size * long / short)
    if size * grown > MAX_RESIZED_PIXELS:
        raise ValueError(f"a frame of {width} x {height} pixels brought to a shorter side of {size} would have "
                         f"{size} x {grown}, the limit is {MAX_RESIZED_PIXELS} in all: crop it to a less narrow shape")
    return (size, grown) if height <= width else (grown, size)


def cores():
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def pool():
    """Threads that stay: starting eight of them and giving their memory back cost 3 to 4 ms a call."""
    return ThreadPoolExecutor(min(cores(), MAX_THREADS), "frames")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)     # a forked child has the object and none of its threads


def crop_planes(frame_HW3, size):
    """3 * size * size bytes: the frame brought to a shorter side of `size`, bicubic, and its centre, plane by plane."""
    height, width = frame_HW3.shape[:2]
    # Pillow copies from where the tensor lies; without numpy a tensor hands out its memory by address only.
    memory = (ctypes.c_uint8 * (height * width * 3)).from_address(frame_HW3.data_ptr())
    image = Image.frombytes("RGB", (width, height), memory)
    height, width = resized_hw(height, width, size)
    top, left = (height - size) // 2, (width - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return bytearray().join([plane.tobytes() for plane in image.split()])


def pixels_cpu(frames, size):
    """[R, 3, size, size] float32. Pillow resizes without the interpreter, so there is a thread for each frame, which
    also normalises it, while it is in that core's cache: in pieces of SERIAL elements, since larger ones would start a
    team of torch's workers under each of these threads."""
    pixels = torch.empty(len(frames), 3, size * size)
    whole, mean, std = (torch.tensor(v) for v in (255.0, CLIP_MEAN, CLIP_STD))

    def work(number, frame):
        planes = torch.frombuffer(crop_planes(frame, size), dtype=torch.uint8).view(3, -1)
        with torch.inference_mode():             # the caller may be in this mode, and a mode belongs to one thread
            for channel in range(3):
                pieces = zip(planes[channel].split(SERIAL), pixels[number, channel].split(SERIAL), strict=True)
                for piece, out in pieces:
                    torch.div(piece, whole, out=out).sub_(mean[channel]).div_(std[channel])

    each = pool().map if len(frames) > 1 and cores() > 1 else map
    list(each(work, range(len(frames)), [frame.cpu().contiguous() for frame in frames]))
    return pixels.view(-1, 3, size, size)


def lane(device):
    """Names the stream on which work for a device is queued. What is kept on a device is kept for one lane: memory that
    is given back goes to the stream it was taken on, and another one might still be reading it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=16)
def bicubic_weights(have, want, begin, count, device, lane):
    """[count, have] float64 of whole numbers: what Pillow's bicubic takes of `have` pixels, in units of 2^-22, for the
    `count` of `want` pixels from `begin` on. They stay on the device."""
    scale = have / want
    widened = max(scale, 1.0)                    # when shrinking, the kernel spans as many more pixels
    support = 2.0 * widened
    centre = (torch.arange(begin, begin + count, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp(min=0)
    end = (centre + support + 0.5).trunc().clamp(max=have)
    at = first[:, None] + torch.arange(2 * math.ceil(support) + 1, dtype=torch.float64)
    x = ((at - centre[:, None] + 0.5) * (1.0 / widened)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)).where(at < end[:, None], 0.0)
    total = torch.zeros(count, dtype=torch.float64)
    for tap in weight.unbind(1):                 # one after the other, as Pillow adds them
        total += tap
    weight /= total[:, None]
    weight = (weight * ONE + torch.where(weight < 0, -0.5, 0.5)).trunc()
    dense = torch.zeros(count, have, dtype=torch.float64)
    return dense.scatter_add_(1, at.clamp(max=have - 1).long(), weight).to(device)


def crop_exact(frames_RHW3, size):
    """[R, 3, size, size] uint8 of frames of one size, on their device, bit for bit what Pillow makes of them.

    Both passes are products of whole numbers below 2^53 in float64, so any order of adding gives the same sums. Pillow
    works in 8 bits between the passes, and from 13 on takes the vertical one first where that leaves it less to do."""
    height, width = frames_RHW3.shape[1:3]
    high, wide = resized_hw(height, width, size)
    top, left = (high - size) // 2, (wide - size) // 2
    device = frames_RHW3.device
    across, down = (bicubic_weights(*of, size, device, lane(device)) for of in
                    ((width, wide, left), (height, high, top)))

    def to_bytes(sums):
        return sums.add_(ONE // 2).div_(ONE).floor_().clamp_(0, 255)

    planes = frames_RHW3.permute(0, 3, 1, 2).double()
    if VERTICAL_FIRST and height > high and height - high > 2 * (width - wide):  # the rule, found by trying both
        planes = to_bytes(to_bytes(down @ planes) @ across.t())
    else:
        planes = to_bytes(down @ to_bytes(planes @ across.t()))
    return planes.to(torch.uint8)


def crops_on(device, frames, size):
    """[R, 3, size, size] uint8 on a GPU: whole frames travel as bytes, through pinned memory, and are resized there."""
    crops, begin = [], 0
    while begin < len(frames):
        shape, end = frames[begin].shape, begin + 1
        # Frames of one size go together, up to 64 MiB of float64 at a time.
        while end < len(frames) and frames[end].shape == shape and (end - begin + 1) * shape.numel() <= 1 << 23:
            end += 1
        batch = torch.empty(end - begin, *shape, dtype=torch.uint8, device=device)
        for there, frame in zip(batch, frames[begin:end], strict=True):
            there.copy_(pinned(frame) if device.type == "cuda" else frame, non_blocking=True)
        crops.append(crop_exact(batch, size))
        begin = end
    return torch.cat(crops)


def normalised(crops):
    """float32 of uint8 crops [R, 3, X, X], on their device, as CLIP's processor has it: rescaled in double, rounded,
    normalised in float32.

    u / 255 rounded once is what rescaling in double and rounding gives, for all 256 of them. Looking a table up took
    3.6 ms where this takes 0.34."""
    whole, mean, std = constants(crops.device, lane(crops.device))
    return crops.float().div_(whole).sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def constants(device, lane):
    """255, means and deviations, each float32 [C, 1, 1] on the device, where they stay: a fresh copy would wait for all
    that is queued there. The 255 is a tensor, for by a Python number CUDA would multiply with its inverse."""
    return [torch.tensor(values, device=device).view(-1, 1, 1) for values in ((255.0,), CLIP_MEAN, CLIP_STD)]


def clip_pixels(frames, size, device="cpu"):
    """[R, 3, size, size] float32 on `device`: every frame brought to a shorter side of `size`, centre kept, normalised.

    frames: R tensors [H, W, 3] uint8; sizes may differ. On the CPU Pillow resizes. A GPU gets the frames as uint8, and
    resizes to the same bits. Does not wait for it. Raises ValueError for a frame too narrow to be resized."""
    frames, device = list(frames), torch.device(device)
    if not frames:
        raise ValueError("no frames given: at least 1 is needed")
    for frame in frames:                         # before any thread or GPU works on one
        assert frame.dtype == torch.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.numel() > 0, \
            f"wanted frames of uint8 [H, W, 3], got {frame.dtype} {tuple(frame.shape)}"
        resized_hw(*frame.shape[:2], size)
    return pixels_cpu(frames, size) if device.type == "cpu" else normalised(crops_on(device, frames, size))
