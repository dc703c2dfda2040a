"""An answer explained: what each forward looked at and how clearly the target decided, id by id."""

import json

import pytest
import torch

import bench
import engine
from weights import InputError, show
from weights.given import Shown
from weights.video import read_video

TINY = bench.TINY
RECORD = json.loads((TINY / "clips" / "EventGPT_Instruction_Subset.json").read_text())[0]
QUESTION = "What are the key elements in this scene?"                # as the record asks
ASKED = {"event_path": TINY / "clips" / "event_npy" / RECORD["event_data"], "query": QUESTION, "max_new_tokens": 24,
         "video_path": TINY / "clips" / "mp4" / RECORD["mp4_data"], "remember": False}


@pytest.fixture(scope="module")
def pair():
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", dtype="fp32", gate=False)


@pytest.fixture(scope="module")
def two_best(pair):
    """([ids], logits [n, 2], ids [n, 2]) of the target's answer, out of one forward over prompt and answer."""
    ids = pair.generate(mode="target_only", **ASKED).output_ids
    target = pair.target
    with torch.inference_mode():
        pixels = Shown("", None).pixels(read_video(ASKED["video_path"], target.num_frames, "uniform"), target.vision,
                                         target.device, 5, None)
        prompt_SD = target.splice(target.prompt(QUESTION), target.encode(pixels))
        rows_SD = torch.cat([prompt_SD, target.decoder.embed_VD[torch.tensor(ids[:-1])]])
        logits_SV = target.decoder.forward(rows_SD, torch.arange(len(rows_SD)))[len(prompt_SD) - 1:]
        best = logits_SV.topk(2)
    assert best.indices[:, 0].tolist() == ids
    return ids, best.values, best.indices


@pytest.mark.parametrize("mode", [mode for mode in engine.MODES if mode != "drafter_only"])
def test_margins_and_runners_up_equal_those_of_one_plain_forward(pair, two_best, mode):
    ids, logits_N2, ids_N2 = two_best
    result = pair.generate(mode=mode, **ASKED)
    verdicts = engine.explain(pair.target, result)
    assert [i for of in verdicts for i in of.ids] == ids == result.output_ids
    assert [i for of in verdicts for i in of.second] == ids_N2[:, 1].tolist()
    margins = torch.tensor([margin for of in verdicts for margin in of.margins])
    torch.testing.assert_close(margins, logits_N2[:, 0] - logits_N2[:, 1], atol=1e-3, rtol=0)
    assert [of.first for of in verdicts] == [sum(len(b.ids) for b in verdicts[:i]) for i in range(len(verdicts))]


def test_only_what_the_cache_still_holds_is_explained(pair):
    """Of anything else the margins would be those of two texts mixed."""
    first, other = (pair.generate(mode=mode, **ASKED) for mode in ("target_only", "drafter_only"))
    assert engine.explain(pair.target, first) and engine.explain(pair.drafter, other)
    for model, result in ((pair.target, other), (pair.drafter, first), (pair.target, engine.Result(**vars(first)))):
        with pytest.raises(InputError, match="^result: the cache of .* no longer holds it; explain it before"):
            engine.explain(model, result)
    next(pair.stream(mode="target_only", **ASKED))
    with pytest.raises(InputError, match="no longer holds it"):
        engine.explain(pair.target, first)


def test_a_verdict_holds_its_drafts_and_a_wrong_one_is_told_from_those_behind_it(pair, two_best):
    ids = two_best[0]
    drafts = [*ids[:4], ids[4] + 1, *ids[5:9]]                # the fifth id is drafted wrong
    result = pair.generate(mode="speculative", draft_source=engine.Fixed(drafts), draft_len=6, **ASKED)
    verdicts = engine.explain(pair.target, result)
    assert verdicts[1].drafts == drafts[1:7] and verdicts[1].ids == ids[1:5]
    assert sum(len(of.ids) - 1 for of in verdicts if of.drafts) >= result.accepted_tokens > 3
    lines = [line.translate(show.PLAIN) for line in show.explained(result, verdicts, pair.target.text.token)]
    assert [line.split()[0] for line in lines if "rejected" in line] == ["4"]
    behind = next(line for line in lines if "behind it" in line)
    assert behind.split("behind it: ")[1].split() == [pair.target.text.token(i) for i in drafts[5:7]]
    answer = lines[-1].removeprefix("answer  ").translate(dict.fromkeys(map(ord, "[]~")))
    assert answer.removesuffix("</s>").strip() == result.output_text


def test_what_others_wrote_reaches_a_terminal_spelt_out():
    lines = ["q \x1b]0;t\x07 \x1b[2J", show.marked(("accepted", "a\x1b[31m"), ("own", "b")), "\u202e\ud800"]
    assert show.painted(lines, show.PLAIN) == ["q \\x1b]0;t\\x07 \\x1b[2J", "[a\\x1b[31m]b", "\\u202e\\ud800"]
    assert show.painted(lines, show.PAINT)[1] == "\x1b[32ma\\x1b[31m\x1b[0mb"


def explain(*flags):
    return bench.main(["--device", "cpu", "--modes", "speculative", "--max-new-tokens", "24", *flags])


def test_the_page_names_the_sample_by_the_beginning_of_its_id(two_best, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert explain("--explain", RECORD["id"][:6], "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["id"] == RECORD["id"] and report["ids"] == report["target_only_ids"] == two_best[0]
    assert explain("--explain", RECORD["id"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert bench.LABELS["tiny"] in lines[0] and lines[-1] == "verdict  the ids are target_only's"
    coloured = [line for line in lines if "\x1b[32m" in line and " accepted" in line]
    assert len(coloured) > 5 and "{" not in "".join(lines)
    monkeypatch.setenv("NO_COLOR", "1")
    assert explain("--explain", RECORD["id"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x01" not in out and out.count(" accepted") > 5


@pytest.mark.parametrize("name, words", [("no such sample", RECORD["id"]), ("-", RECORD["id"]), ("", "is empty")])
def test_a_name_that_is_not_one_sample_is_refused_in_a_line(name, words, capsys):
    code = bench.main(["--device", "cpu", f"--explain={name}"])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_an_answer_that_differs_is_said_to(monkeypatch, capsys):
    real = engine.Engine.generate

    def tampered(self, **options):
        result = real(self, **options)
        if options["mode"] == "speculative":
            result.output_ids = [*result.output_ids[:5], 7, *result.output_ids[6:]]
        return result

    monkeypatch.setattr(engine.Engine, "generate", tampered)
    assert explain("--explain", RECORD["id"]) == 1
    assert "DIFFERENT from target_only, first at answer id 5" in capsys.readouterr().out
