"""`python engine.py`, and the words of the research code: PrefillOnlyInference."""

import ast
import re
import subprocess
import sys
import threading

import pytest
from common import NEW, QUESTIONS, ROOT, TINY, asked, script, truth

import bench
import engine
import weights.given
from engine import InputError, PrefillOnlyInference

CLIP = ["--events", str(TINY / "clips/event_npy/scenes/000001.npz"), "--device", "cpu",
        "--video", str(TINY / "clips/mp4/scenes/000001.mp4"), "--query", QUESTIONS[0]]


# ---- the command line


@pytest.fixture
def line(pair, monkeypatch, capsys):
    """Runs a command line on the shared pair: (exit code, stdout, stderr)."""
    monkeypatch.setattr(engine, "load_engine", lambda *models, **options: engine.pick_device(models[2]) and pair)

    def run(*words):
        try:
            code = engine.main(list(words)) or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return run


def test_without_flags_it_shows_the_claim(user_env):
    done = subprocess.run([sys.executable, "engine.py"], cwd=ROOT, capture_output=True, text=True, env=user_env)
    assert done.returncode == 0 and done.stdout.endswith("\nidentical to target_only: True\n"), done.stderr
    assert " final " in done.stdout and "a yellow circle moving quickly upwards" in done.stdout


@pytest.fixture
def drafter_first(pair, monkeypatch):
    """The target reads its clip when the drafter has said an id: on a busy machine it might be first."""
    said, read = threading.Event(), weights.given.read_video
    script(monkeypatch, pair.drafter, None, before=lambda kind, _: said.set() if kind == "step" else None)
    monkeypatch.setattr("weights.given.read_video", lambda *given: (said.wait(20), read(*given))[1])


def test_without_flags_a_preview_is_shown_before_the_answer(line, drafter_first):
    code, out, _ = line()
    assert code == 0 and out.endswith("\nidentical to target_only: True\n")
    assert 0 <= out.index(" preview ") < out.index(" final ") and "a yellow circle moving quickly upwards" in out


@pytest.mark.parametrize("mode", engine.MODES)
def test_one_question_ends_in_a_line_of_figures(line, pair, mode):
    code, out, err = line(*CLIP, "--mode", mode, "--max-new-tokens", "12")
    lines = out.splitlines()
    assert code == 0 and not err and lines[-1].startswith("12 ids in ") and " forwards; accepted " in lines[-1]
    if mode != "drafter_only":
        answer = next(text for text in lines if " final " in text)
        assert answer.endswith(pair.target.text.decode(truth(pair, 1)[:12]))
    assert (" preview " in lines[-2]) == (mode in ("prefill_only", "drafter_only"))


def test_the_line_of_figures_says_who_drafted_and_in_how_many_forwards(line, pair, monkeypatch):
    result = pair.generate(mode="target_only", **asked(1))
    ids = result.output_ids = result.output_ids[:9]
    result.round_log = [engine.Round("drafter", ids[1:4], 3), engine.Round("", [], 0), engine.Round("lookup", [1], 0)]
    result.count()
    monkeypatch.setattr(pair, "stream", lambda **_: iter([engine.Event("final", "x", "x", ids, 1.0, "stop", result)]))
    assert line(*CLIP)[1].endswith("6 forwards; accepted 3 of 4 drafts (drafter, lookup)\n")


@pytest.mark.parametrize("words,said", [
    (["--nope"], "--nope"), (["--max-new-tokens"], "--max-new-tokens"), ([*CLIP, "--mode", "fast"], "--mode: 'fast'"),
    (["--video", "x.mp4"], "--query"), (["--query", "Q"], "--video: wanted"),
    ([*CLIP, "--max-new-tokens", "0"], "--max-new-tokens: "),
    (["--query", "Q", "--video", "no.mp4", "--events", "no.npz"], "no.mp4"),
    ([*CLIP, "--draft-source", "magic"], "--draft-source 'magic'"), ([*CLIP, "--device", "gpu"], "--device 'gpu'"),
    ([*CLIP, "--max-new-tokens", "999999"], "raise `cache_rows`, lower --max-new-tokens or"),
])
def test_bad_input_is_one_line_and_exit_2(line, words, said):
    code, out, err = line(*words)
    assert code == 2 and not out and err.count("\n") == 1 and said in err


def named_by(error):
    """What an InputError's text names as a flag, in the source of a module that a library's user may call."""
    return [text.value for text in ast.walk(error) if isinstance(text, ast.Constant) and isinstance(text.value, str)
            and re.search(r"(^|[ (])--[a-z]", text.value.replace("python -m weights.load --check", ""))]


@pytest.mark.parametrize("module", ["engine", *(f"weights/{name}" for name in (
    "dataset", "drafting", "events", "files", "given", "memory", "shapes", "sources", "text", "video"))])
def test_the_library_names_arguments_and_never_flags(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    made = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and getattr(call.func, "id", "") in
            ("InputError", "Refused", "refusal", "NonFinite", "OutOfMemory")]
    assert not [text for call in made for text in named_by(call)]
    assert made or module in ("weights/shapes", "weights/drafting")


def test_bench_names_its_flags(capsys):
    for words, said in (("--weights random-7b --device cpu --cache-rows 999999999", "or choose another --device"),
                        ("--device gpu", "--device 'gpu': "), ("--temperature -1", "--temperature: ")):
        assert bench.main(words.split()) == 2 and said in capsys.readouterr().err
    assert bench.told(InputError("query: x; lower `max_new_tokens`, `git lfs`")) == (
        "--question: x; lower --max-new-tokens, `git lfs`")
    assert bench.told(InputError("mode 'x': a path/mode: y")) == "--modes 'x': a path/mode: y"
    assert bench.told(InputError("modes.mp4: no such file")) == "modes.mp4: no such file"


def test_the_version_is_the_one_to_cite(line):
    assert line("--version")[1] == f"headstart {engine.VERSION}\n"
    assert f"\nversion: {engine.VERSION}\n" in (ROOT / "CITATION.cff").read_text()


# ---- the research code's words


@pytest.fixture
def api(pair):
    inference = PrefillOnlyInference()
    inference.engine = pair
    return inference


@pytest.mark.parametrize("option,near", [("use_4bits", "use_4bit"), ("adapterpath", "adapter_path"), ("gates", "gate"),
                                         ("cache_row", "cache_rows"), ("videollava", "videollava_model_id"),
                                         ("eventgpt", "eventgpt_path")])
def test_an_unknown_option_is_refused_at_once_with_the_nearest_word(option, near):
    with pytest.raises(InputError, match=rf"^{option}: not an argument .*; did you mean {near}\?$"):
        PrefillOnlyInference(**{option: 1})


def test_every_option_of_load_engine_is_one(monkeypatch):
    given = {}
    monkeypatch.setattr(engine, "load_engine", lambda **options: given.update(options))
    PrefillOnlyInference("e", "v", "cpu", use_4bit=True, gate=False, cache_rows=7).load()
    assert given == dict(eventgpt="e", videollava="v", device="cpu", drafter_dtype="int4", gate=False, cache_rows=7)
    PrefillOnlyInference(use_4bit=True, drafter_dtype="bf16").load()
    assert given["drafter_dtype"] == "bf16"


@pytest.mark.parametrize("options", [{"use_adapter": True}, {"mode": "prefill_with_alignment"}])
def test_an_adapter_needs_its_folder(options):
    with pytest.raises(InputError, match="^adapter_path: "):
        PrefillOnlyInference(**options)


@pytest.mark.parametrize("options, words", [
    ({"use_4bit": "no"}, "use_4bit: wanted True or False"), ({"use_adapter": 1}, "use_adapter: wanted"),
    ({"mode": "spec"}, "mode: 'spec' is not one of"), ({"mode": None}, "mode: None is not"),
    ({"adapter_path": ""}, "'': no such file"), ({"adapter_path": b"none"}, "none: no such file"),
    ({"adapter_path": 5}, "adapter_path: is a int")])
def test_an_option_of_the_old_library_is_checked_before_models_load(options, words):
    with pytest.raises(InputError, match=f"^{words}"):
        PrefillOnlyInference(**options)


@pytest.mark.parametrize("options, words", [
    ({"max_draft_tokens": 99}, "max_draft_tokens: wanted a whole number 0..31"), ({"mode": ""}, "mode: '' is not")])
def test_a_request_of_the_old_library_is_refused_in_its_own_words(api, options, words):
    with pytest.raises(InputError, match=f"^{words}"):
        api.generate(**asked(0) | options)


def test_the_adapter_drafts_and_is_verified_once(api, pair, monkeypatch):
    ids = truth(pair, 1)

    class Guess:
        name = "adapter"

        def propose(self, committed, limit):
            return ids[len(committed):len(committed) + min(limit, 4)] + [1]
    monkeypatch.setattr(engine, "Adapted", lambda folder: Guess())
    aligned = PrefillOnlyInference(adapter_path="DIR", mode="prefill_with_alignment")
    aligned.engine = pair
    result = aligned.generate(**asked(1), max_draft_tokens=7)
    assert result.output_ids == ids and result.mode == "prefill_then_verify"
    assert [of.source for of in result.round_log] == ["adapter"] and result["draft_tokens"] == [*ids[1:5], 1]
    assert PrefillOnlyInference(adapter_path="DIR", use_adapter=False).source is None
    with pytest.raises(InputError, match="^adapter_path: wanted the adapter"):
        api.generate(**asked(1), mode="prefill_with_alignment")


def test_the_result_answers_to_the_old_words(api, pair, drafter_first):
    result = api.generate(**asked(0), mode="speculative", max_draft_tokens=3)
    assert result["output_tokens"] == result.output_ids == truth(pair, 0)
    assert result["num_draft_tokens"] == len(result["draft_tokens"]) == result.drafted > 0
    target, drafter = result.stages["target"], result.stages["drafter"]
    assert result["vl_prefill_time"] == target["encode"] + target["prefill"]
    assert result["egpt_prefill_time"] == drafter["encode"] + drafter["prefill"]
    assert result["vl_verify_time"] == target["verify"] and result["egpt_draft_time"] == drafter["draft"]
    assert result["vl_decode_time"] == target.get("decode", 0)
    assert result["overlap_window"] == max(0, result.ttft - result.ttfp) and len(result.preview_ids) <= NEW
    alone = api.generate(**asked(0), mode="target_only")
    assert alone["overlap_window"] == alone["egpt_prefill_time"] == alone["num_draft_tokens"] == 0
    events = list(api.stream(**asked(0)))
    assert events[-1].result["output_tokens"] == result.output_ids and events[0].result is None
    with pytest.raises(InputError, match="^gate: not an argument of PrefillOnlyInference.generate; "):
        api.generate(**asked(0), gate=False)


def test_a_question_of_any_letters_fits_the_caches(line, monkeypatch):
    """A letter may take as many ids as it has bytes."""
    made = {}
    monkeypatch.setattr(engine, "load_engine", lambda *_, **options: made.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        line(*CLIP[:-1], "\U0001f600" * 300, "--max-new-tokens", "3")
    assert made["text_rows"] == engine.PROMPT_ROWS + 1200 + 3


def test_a_file_of_answers_is_kept_by_bench_alone(line):
    """It was taken, and never written."""
    code, _, err = line(*CLIP, "--draft-source", "lookup:none.json")
    assert code == 2 and err.startswith("--draft-source 'lookup:none.json': only bench.py keeps a file of answers; ")
