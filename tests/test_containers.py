"""Every odd container of tests/containers.py is read as a player shows it, and time and memory follow its size."""

import av
import containers
import pytest
import torch

from weights import InputError, video


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV cannot write H.264")
@pytest.mark.parametrize("name", containers.FORMS)
def test_frames_are_those_that_a_player_shows(tmp_path, name):
    try:
        path = containers.FORMS[name](tmp_path)
    except av.codec.codec.UnknownCodecError as error:
        pytest.skip(f"this PyAV lacks an encoder: {error}")
    assert containers.compared(path)[1] in ("same", "refused")


@pytest.mark.parametrize("name, frames, planned", [
    ("h264 mp4", 30, True), ("shows twice", 20, False), ("hides the start", 20, False), ("a hundred edits", 100, False),
    ("begins inside a group", 20, False), ("an edit of nothing", 0, False), ("cut mkv", 16, True)])
def test_forms_are_what_their_names_say(tmp_path, name, frames, planned):
    """Else a form that fails to be odd would pass above."""
    path = containers.FORMS[name](tmp_path)
    assert (containers.compared(path, (8,))[0], containers.quick(path)) == (frames, planned)


@pytest.mark.parametrize("ending, g", [("mp4", 300), ("avi", 300)])
def test_a_small_file_cannot_make_us_decode_for_hours(tmp_path, monkeypatch, ending, g):
    """300 pictures that hardly differ in a few kilobytes, and a bound on pixels that follows the bytes."""
    path = containers.film(tmp_path / f"a.{ending}", "mpeg4" if ending == "avi" else "libx264", g=g)
    assert len(video.read_video(path)) == 8
    monkeypatch.setattr(video, "LEAST_PIXELS", 64 * 48 * 20)
    monkeypatch.setattr(video, "PIXELS_A_BYTE", 1)
    with pytest.raises(InputError, match="21 frames of 64 x 48 and more in [0-9]+ bytes; cut the clip"):
        video.read_video(path)
    assert torch.equal(video.read_video(path, 3, "first")[0], containers.shown(path)[0])
