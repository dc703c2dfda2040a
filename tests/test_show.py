"""One request as a picture: every draft is there, filled if accepted."""

import collections

from PIL import Image

from weights import show
from weights.result import Round

RED, WHITE = (227, 155, 59), (255, 255, 255)                 # of a filled draft; of a hollow one


def request(mode="speculative"):
    """A head start of four drafts of which two were right, a round of three with one, a plain step and a queued one."""
    log = [Round("head start", [5, 6, 7, 8], 2), Round("drafter", [1, 2, 3], 1), Round("", [], 0)]
    line = [("host", "load", 0.0, 0.05, "target"), ("host", "load", 0.0, 0.01, "drafter"),
            ("drafter", "encode", 0.01, 0.02, ""), ("drafter", "prefill", 0.02, 0.04, ""),
            *(("drafter", "draft", 0.04 + i / 100, 0.05 + i / 100, "") for i in range(4)),
            ("target", "prefill", 0.06, 0.1, ""), ("target", "verify", 0.1, 0.12, ""),
            *(("drafter", "draft", 0.12 + i / 100, 0.13 + i / 100, "") for i in range(3)),
            ("target", "verify", 0.15, 0.17, ""), ("target", "decode", 0.17, 0.18, ""),
            ("target", "decode", 0.18, 0.19, "")]
    return {"mode": mode, "timeline": line, "round_log": log, "output_ids": [4, 5, 6, 9, 1, 9, 9], "ttft": 0.1,
            "draft_log": list(enumerate([4, 5, 6, 7, 8])), "wall_clock_time": 0.18, "drafted": 7, "accepted_tokens": 3}


def test_colours_are_for_terminals_that_have_them(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert show.colourful()
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        assert not show.colourful()
        monkeypatch.delenv(name)


def test_a_bar_says_what_became_of_its_drafts():
    found = show.bars(request())
    assert [of[:5] for of in found] == request()["timeline"]
    of = collections.defaultdict(list)
    for row, stage, *_, accepted in found:
        of[row, stage].append(accepted)
    assert of["target", "verify"] == [[True, True, False, False], [True, False, False]]
    assert of["target", "decode"] == [[], []] and of["host", "load"] == [[], []]
    assert of["drafter", "draft"] == [[True], [True], [False], [False], [True], [False], [False]]
    once = show.bars({**request("prefill_then_verify"), "round_log": request()["round_log"][:1]})
    assert [of[5] for of in once if of[:2] == ("target", "decode")] == [[], []]


def test_a_draft_of_the_targets_own_copy_shows_what_its_round_accepted():
    line = [("target", "prefill", 0.0, 0.1, ""), ("target", "draft", 0.1, 0.13, ""),
            ("target", "verify", 0.13, 0.15, ""), ("target", "decode", 0.15, 0.16, ""),
            ("target", "draft", 0.16, 0.17, ""), ("target", "verify", 0.17, 0.19, "")]
    log = [Round("self", [5, 6, 7], 2), Round("", [], 0), Round("self", [9, 8], 2, 1)]
    found = show.bars({**request(), "timeline": line, "round_log": log, "draft_log": []})
    assert [of[5] for of in found] == [[], [True, True, False], [True, True, False], [], [True], [True, True]]


def test_a_drafter_on_its_own_device_is_right_where_the_target_took_its_draft_at_that_place():
    """It drafts on behind a wrong guess: places repeat, and what was never looked at is hollow."""
    line = [("drafter", "prefill", 0.0, 0.01, ""), ("target", "verify", 0.03, 0.04, ""),
            ("target", "verify", 0.05, 0.06, ""),
            *(("drafter", "draft", i / 100, (i + 1) / 100, "") for i in range(1, 5))]
    log = [Round("drafter", [5, 6], 1), Round("lookup", [8], 1)]     # the answer: 4 5 7 8
    found = show.bars({**request(), "timeline": sorted(line, key=lambda of: of[2]), "round_log": log,
                           "draft_log": [(0, 4), (1, 5), (2, 6), (3, 7), (3, 8)]})
    assert [of[5] for of in found if of[:2] == ("drafter", "draft")] == [[True], [False], [False], [False]]


def test_the_picture_fills_the_accepted_drafts_and_no_others(tmp_path):
    show.draw(request(), tmp_path / "t.png")
    picture = Image.open(tmp_path / "t.png").convert("RGB")
    y = 48 + 1 * (56 + 14) + 8                               # inside the drafter's row, above the labels

    def colour(seconds):
        return picture.getpixel((int(90 + seconds / 0.19 * 1300), y))
    assert [colour(0.045 + i / 100) for i in range(4)] == [RED, RED, WHITE, WHITE]
    assert [colour(0.125 + i / 100) for i in range(3)] == [RED, WHITE, WHITE]
    assert picture.size[0] > 1000 and len(picture.getcolors(1 << 16)) > 8
