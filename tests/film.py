"""film: clips of a size, length and codec that a test asks for."""

from fractions import Fraction
from pathlib import Path

import av
import torch

from weights.tiny.make_clips import rgb_frame


def write_film(path, seconds, size=(640, 480), keyframe=250, fps=25, codec="libx264", pixel_format="yuv420p", pts=None,
               **options) -> None:
    """A texture that drifts past, with a square that runs across it: the codec has motion and detail to work on.

    pts: the time stamp of frame number n in 1 / fps; options go to the encoder. One slice a picture, as cameras and
    phones write them: x264 left to itself cuts as many as the machine has cores."""
    (width, height), seeded = size, torch.Generator().manual_seed(0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    coarse = torch.randint(0, 256, (1, 3, height // 8 + 40, width // 8 + 40), generator=seeded).float()
    texture = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear").round()
    texture = texture[0].permute(1, 2, 0).to(torch.uint8)
    side = height // 5
    if codec == "libx264":
        options = {"preset": "veryfast", "crf": "23", "sc_threshold": "0", "x264-params": "sliced-threads=0"} | options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(keyframe), **options})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = Fraction(1, fps)
        for number in range(round(seconds * fps)):
            down, right = abs(2 * number % 400 - 200), abs(3 * number % 500 - 250)
            image = texture[down:down + height, right:right + width].contiguous()
            at = 4 * number % (width - side)
            image[side:2 * side, at:at + side] = torch.tensor([255 - number % 200, number % 256, 90], dtype=torch.uint8)
            frame = rgb_frame(image)
            frame.pts, frame.time_base = pts(number) if pts else number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
