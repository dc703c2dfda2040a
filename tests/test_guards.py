"""What a clip may not do: reach another file or an address, show frames that its decoder calls corrupt, or say itself
which of its frames are taken."""

import random

import av
import pytest
import torch
from test_media import clip, every_frame

from tests.film import write_film
from weights import video


def test_a_clip_opens_nothing_but_itself(tmp_path, monkeypatch):
    """FFmpeg is told so each time it opens one: no demuxer that reads other files, no protocol but `file`."""
    given, opened = av.open, []

    def spied(file, *more, **options):
        opened.append((file, options.get("options", {})))
        return given(file, *more, **options)
    path = clip(tmp_path, "a.avi", 9)
    monkeypatch.setattr(video.av, "open", spied)
    video.read_video(path)
    assert opened and {file for file, _ in opened} == {str(path)}
    for _, options in opened:
        assert options["protocol_whitelist"] == "file"
        assert {"hls", "concat", "dash"}.isdisjoint(options["format_whitelist"].split(","))


def test_a_count_of_packets_that_may_not_be_frames_is_held_against_the_frames(tmp_path, monkeypatch):
    """One packet too many still ends inside the clip: only counting shows that the frames taken are others."""
    path, held = clip(tmp_path, "a.mkv", 21), video.held_packets
    frames = every_frame(path)

    def one_too_many(*given):
        packets, total = held(*given)
        return packets, total + 1
    monkeypatch.setattr(video, "held_packets", one_too_many)
    for index, frame in zip(video.sample_indices(21, 8), video.read_video(path), strict=True):
        assert torch.equal(frame, frames[index]), index


def spoilt_film(folder):
    """(path, time stamps of frames that FFmpeg calls corrupt) of an H.264 clip with some bytes of a packet changed."""
    write_film(folder / "film.mp4", 2.4, (96, 64), 10)
    whole = (folder / "film.mp4").read_bytes()
    with av.open(str(folder / "film.mp4")) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for seed in range(200):
        chance, blob = random.Random(seed), bytearray(whole)
        at, size = packets[chance.randrange(len(packets))]
        for _ in range(chance.randrange(1, 4)):
            blob[at + 5 + chance.randrange(max(1, size - 5))] = chance.randrange(256)
        path = folder / f"spoilt {seed}.mp4"
        path.write_bytes(blob)
        corrupt, count = [], 0
        try:
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    count += 1
                    if frame.is_corrupt:
                        corrupt.append(frame.pts)
        except av.FFmpegError:
            continue
        if corrupt and count == len(packets):
            return path, corrupt
    pytest.skip("this FFmpeg calls no damage corrupt")


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV cannot write H.264")
def test_frames_that_are_called_corrupt_are_never_taken_from_a_group_that_was_decoded_alone(tmp_path):
    path, corrupt = spoilt_film(tmp_path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        begin = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= corrupt[0])
        assert video.decode_run(stream=stream, packets=packets[begin:begin + 10], wanted=set(corrupt),
                                take=video.rgb_tensor, threads=1) == {}
