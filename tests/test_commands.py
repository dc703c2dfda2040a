"""The measurements beside the tests: their figures from small numbers known beforehand, and each run small."""

import argparse
import collections
import functools
import json
import re
from pathlib import Path

import agreement
import breaks
import chain
import containers
import figures
import fuzz
import long_run
import measure
import peers
import pytest
import replay
import sources
import speeds
import tiny_pair
import torch
from pairs import read_pairs

import bench
import engine
from engine import InputError
from weights.tiny import make_clips

PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "seed_pairs.jsonl"
ANSWERS = {"a": [[1, 5, 3, 4], [1, 5, 3, 4], [1, 5, 8, 4]], "b": [[1, 5, 3, 9]], "c": [[7, 5, 3, 9]]}


def pairs(path, answers=ANSWERS, drafter=(9, 9)):
    path.write_text("".join(json.dumps({
        "src": "x", "seq": seq, "clip": clip, "question": "q", "eventgpt_ids": list(drafter), "videollava_ids": ids})
        + "\n" for seq, of in answers.items() for clip, ids in enumerate(of)))
    return path


# ---- sources


def test_sources_replays_whole_sequences_held_out(tmp_path):
    rows = read_pairs(pairs(tmp_path / "p.jsonl"))
    runs = sources.replay(rows, lengths=(2,), shots=(2,), only=["a"])
    (lookup,), (previous,), (often,) = (runs[name] for name in ("lookup", "previous", "most frequent"))
    assert lookup.ids == 9 and previous.shots[2] == [0, 2, 1] and previous.forwards[2] == 3 + 1 + 2
    assert sources.per_forward([previous], 2) == 9 / 6 and sources.accepted([previous], 2) == 1
    assert often.shots[2] == [2, 2, 1]                       # of the others alone: [5, 3] after 1
    assert lookup.shots[2] == [2, 2, 1] and lookup.forwards[2] == 1 + 1 + 2
    cold = sources.replay(rows, own=False, lengths=(2,), shots=(2,), only=["a"])
    assert cold["previous"][0].shots[2] == [0, 0, 0] and cold["lookup"][0].shots[2] == [2, 2, 1]


def test_an_answer_is_never_seen_before_its_ids_are_committed(tmp_path, monkeypatch):
    """The ids drafted for an answer are the same whatever the answer goes on to be."""
    asked = collections.defaultdict(list)

    class Spy(sources.Searched):
        def propose(self, committed, limit):
            asked[end].append((list(committed), super().propose(committed, limit)))
            return asked[end][-1][1]
    monkeypatch.setattr(sources, "Searched", Spy)
    for end in (6, 8):
        rows = read_pairs(pairs(tmp_path / "p.jsonl", {**ANSWERS, "a": [*ANSWERS["a"], [1, end, end, end]]}))
        sources.replay(rows, lengths=(), shots=(5,), only=["a"])
    assert asked[6] == asked[8] and len(asked[6]) == 4


def test_sources_prints_its_tables_and_intervals_from_three_sequences_on(tmp_path, capsys):
    path, out = pairs(tmp_path / "p.jsonl"), tmp_path / "out.txt"
    assert measure.run(sources.main, [str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed == out.read_text() and "5 recorded answers of 3 sequences (p.jsonl, x)" in printed
    assert all(f"  {name} " in printed for name in ("previous", "most frequent", "n-grams", "lookup", "ratio"))
    assert "cold: other sequences only" in printed and "[" in printed.splitlines()[3]
    few = pairs(tmp_path / "few.jsonl", {"a": [[5], [5]], "b": [[5]]}, drafter=())        # one id, and silence
    assert measure.run(sources.main, [str(few)]) == 0
    assert "too few of them for intervals" in capsys.readouterr().out
    for text in ("", "{", json.dumps({"src": "x"})):
        path.write_text(text)
        assert measure.run(sources.main, [str(path)]) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def recorded():
    if not PAIRS.exists():
        pytest.skip(f"{PAIRS} is not here: the recorded answers cannot be replayed")
    return read_pairs(PAIRS, "test_tokens_1q")


def test_figures_of_the_recorded_answers_are_reproduced(recorded):
    """Two of the twelve sequences; all: previous 13.45 of 21, lookup 13.54 and 5.70 ids a forward, cold 3.32."""
    some = [seq for seq, _ in collections.Counter(row["seq"] for row in recorded).most_common()[-2:]]
    warm, cold = (sources.replay(recorded, own, (15,), (21,), some) for own in (True, False))
    for name, shot, rate in (("previous", 13.104, 1.555), ("most frequent", 10.625, 1.978), ("n-grams", 10.604, 6.323),
                             ("lookup", 13.396, 6.0)):
        assert sources.accepted(warm[name], 21) == pytest.approx(shot, abs=6e-4), name
        assert sources.per_forward(warm[name], 15) == pytest.approx(rate, abs=6e-4), name
    assert sources.accepted(cold["lookup"], 21) == pytest.approx(9.583, abs=6e-4)
    assert sources.per_forward(cold["lookup"], 15) == pytest.approx(4.612, abs=6e-4)


# ---- replay


def request(e2e, ttft, ids, forwards, base_e2e, base_ttft, preview=None):
    return {"e2e": e2e, "ttft": ttft, "ids": ids, "forwards": forwards, "overlap": 4, "window": 2, "preview": preview,
            "base_e2e": base_e2e, "base_ttft": base_ttft}


def test_the_table_of_a_replay_holds_what_was_measured():
    head = {"what": "w", "sequences": 1, "pairs": "p", "src": "s", "new": 50, "gate": "on"}
    rows = [request(50.0, 12.0, 11, 2, 100.0, 10.0, 30.0), request(25.0, 13.0, 11, 3, 100.0, 10.0, 40.0)]
    lines = replay.report(head, {"target_only": [request(100.0, 10.0, 11, 10, 100.0, 10.0)], "lookup, both": rows})
    cells = next(line for line in lines if line.startswith("lookup, both"))[26:].split()
    assert cells == ["2", "25.0", "50.0", "50.0", "12.5", "+2.50", "3.000", "2.000", "4.00", "2", "4", "35.0"]
    assert next(line for line in lines if line.startswith("target_only"))[26:].split()[-1] == "-"
    assert any("came out of all 3 requests" in line for line in lines)


def test_a_setting_says_who_drafts_and_what_lookup_knows():
    made = replay.settings([[1, 5, 6]], [0.25], [0.5])
    assert list(made)[:2] == ["target_only", "drafter, raw"] and made["drafter, raw"].mode == "prefill_then_verify"
    known = {name: (list(of.source.answers), of.learns is of.source) for name, of in made.items()
             if isinstance(of.source, replay.Lookup)}
    assert known == {"lookup, cold": ([], True), "lookup, other sequences": ([[1, 5, 6]], False),
                     "lookup, both": ([[1, 5, 6]], True)}
    both = made["lookup, right with 0.25"]
    assert both.source[0] is both.learns and both.source[1] == "drafter" and list(both.source[0].answers) == [[1, 5, 6]]
    assert made["drafter right with 0.25"].source == "drafter" and made["self right with 0.5"].source == "self"
    assert list(replay.settings([], [0.25], only="cold,right")) == [
        "target_only", "lookup, cold", "drafter right with 0.25", "lookup, right with 0.25"]
    row = {"target": list(range(4000)), "drafter": [3]}
    for name, share in (("drafter right with 0.25", 0.25), ("self right with 0.5", 0.5)):
        says, sures = made[name].drafts(row, replay.random.Random(0), 5000)
        right = sum(a == b for a, b in zip(says, row["target"], strict=True)) / 4000
        assert right == pytest.approx(share, abs=0.03) and len(sures) == 4000
    assert made["drafter, raw"].drafts(row, None, 9) == ([3], [])
    assert "self" in made["lookup, both + self 0.5"].sources and "self" not in made["lookup, both"].sources


@pytest.mark.parametrize("share", [0.9, 0.95, 0.97])
def test_a_forced_copys_sureness_follows_the_published_calibration(share):
    """Drafts are right with the share in all, and of the surest nearly all are."""
    chance = replay.random.Random(1)
    drawn = [replay.sure_of(share, chance) for _ in range(20000)]
    assert sum(right for _, right in drawn) / len(drawn) == pytest.approx(share, abs=0.005)
    surest = [right for sure, right in drawn if sure > 0.9]
    assert min(surest) > 0.99 and any(sure < 0.5 for sure, _ in drawn)


def test_streams_are_short_ones_first_cut_to_the_answers_wanted_and_shared_out():
    rows = [{"seq": seq, "clip": clip} for seq, count in (("a", 5), ("b", 2), ("c", 3)) for clip in range(count)]
    assert {seq: len(of) for seq, of in replay.choose(rows, 6, (0, 1)).items()} == {"b": 2, "c": 3, "a": 1}
    assert list(replay.choose(rows, 6, (1, 2))) == ["c"] and list(replay.choose(rows, 4, (0, 2))) == ["b"]
    with pytest.raises(InputError, match="--shard: 3 shards of 2 sequences"):
        replay.choose(rows, 4, (0, 3))


def test_a_replay_runs_shards_and_merges(tmp_path, capsys):
    """Small, on the embedded pair: every setting gives the recorded ids; right drafts make several a forward."""
    answers = {"a": [[5, 6, 7, 8, 9, 10, 11, 12]] * 2, "b": [[20, 21, 22, 23]], "c": [[30]]}
    path, shards = pairs(tmp_path / "p.jsonl", answers, drafter=()), [str(tmp_path / f"s{i}.json") for i in range(2)]
    given, picture = [str(path), "--device", "cpu", "--gate", "off"], str(tmp_path / "t.png")
    assert measure.run(replay.main, [*given, "--accept", "1.0", "--self", "1.0", "--timeline", picture]) == 0
    lines, names = capsys.readouterr().out.splitlines(), list(replay.settings([], [1.0], [1.0]))
    per = {line[:26].strip(): line for line in lines if line[:26].strip() in names}
    assert list(per) == names and f"came out of all {4 * len(names)} requests" in "\n".join(lines)

    def figure(name):                                        # ids a forward is the fourth from the end
        return float(per[name].split()[-4])
    assert figure("target_only") == 1 and figure("lookup, cold") > 1
    assert figure("drafter right with 1.0") > 2 and figure("self right with 1.0") > 2
    for i, shard in enumerate(shards):
        assert measure.run(replay.main, [*given, "--only", "cold", "--rows", shard, "--shard", f"{i}/2"]) == 0
    assert "drafter" not in capsys.readouterr().out.splitlines()[0], "it drafts in no setting, and was not loaded"
    assert measure.run(replay.main, ["--merge", *shards]) == 0
    out = capsys.readouterr().out
    assert "4 recorded answers of 3 sequences" in out and "came out of all 8 requests" in out
    assert measure.run(replay.main, ["--merge", str(path)]) == 2 and "a shard of a replay" in capsys.readouterr().err
    for bad, words in ((["--src", "nobody"], "nobody"), (["--accept", "often"], "often"),
                       (["--accept", "0.5,1.2"], "1.2"), (["--shard", "0/9"], "--shard"),
                       (["--max-answers", "0"], "--max-answers")):
        assert measure.run(replay.main, [*given, *bad]) == 2 and words in capsys.readouterr().err
    path.write_text(path.read_text().replace("[30]", "[99999]"))
    assert measure.run(replay.main, given) == 2 and "ids are not whole numbers from 0 to" in capsys.readouterr().err


# ---- figures, peers, what they share


@pytest.fixture(scope="module")
def target():
    return engine.load_engine(None, bench.TINY / "target", device="cpu", dtype="fp32").target


def test_forced_drafts_of_every_length_give_the_answer_of_plain_steps(target, monkeypatch):
    with torch.inference_mode():
        assert figures.forced_drafts(target, 16, new=24, rows=20) == (16, 16)
        put, said = target.put, []
        monkeypatch.setattr(target, "put", lambda drafts: said.append(drafts) or put(drafts))
        figures.forced_drafts(target, 1, new=24, rows=20)
    assert len(said) > 24 and {drafts.index(-1) if -1 in drafts else 15 for drafts in said} >= {0, 3, 7}


def test_a_difference_of_one_bit_is_counted(target, monkeypatch):
    real = target.decoder.forward

    def spoiled(hidden_SD, pos_ids_S, only=None):
        logits = real(hidden_SD, pos_ids_S)
        if len(hidden_SD) == 7:
            logits[3, 5] *= 1.0 + 1e-6
        return logits
    with torch.inference_mode():
        monkeypatch.setattr(target.decoder, "forward", spoiled)
        assert figures.bits_differing(target, 10, seed=0) >= 1


def test_a_state_is_put_at_a_context_and_read_back(target):
    with torch.inference_mode():
        measure.at_context(target, 100)
        state = measure.state_of(target, 1)
    assert (state.n_out, state.done, state.prompt_len, state.limit, state.ids) == (1, 0, 100, 10 ** 6, [7])


def test_whole_answers_have_as_many_ids_as_asked(target):
    pixels = torch.zeros(target.num_frames, 3, target.vision.image, target.vision.image)
    with torch.inference_mode():
        ids = measure.whole(target, engine.Prompt([5] * 3, [5] * 4), pixels, 6)
    assert len(ids) == 6 and measure.host_time(target, lambda: None) >= 0


def test_a_peers_ratio_is_paired_by_run_and_above_1_ours_is_faster():
    lines = peers.table({"ours": [(1.0, 2.0, 4.0), (2.0, 2.0, 4.0)], "theirs": [(2.0, 1.0, 4.0), (8.0, 1.0, 8.0)]})
    assert [line.split()[1:] for line in lines] == [
        ["2.00", "[1.00,", "2.00]", "1.00", "2.00", "[2.00,", "2.00]", "1.00", "4.00", "[4.00,", "4.00]", "1.00"],
        ["8.00", "[2.00,", "8.00]", "3.00", "1.00", "[1.00,", "1.00]", "0.50", "8.00", "[4.00,", "8.00]", "1.50"]]


def test_a_kernels_bandwidth_is_what_it_has_to_move_over_its_time(monkeypatch):
    """Of the plain definitions, which CPU tensors take; a call is said to take 2 us, and 5 as the definition's."""
    def timed(fn, count=1, of=2e-3):
        found = fn()
        return [0, of * (len(found) if isinstance(found, list) else 1), 0]

    monkeypatch.setattr(measure, "graph_ms", timed)
    monkeypatch.setattr(speeds, "time_ms", functools.partial(timed, of=5e-3))
    monkeypatch.setattr(speeds, "host_ms", lambda fn: 7.0)
    monkeypatch.setattr(speeds, "launches", functools.partial(speeds.launches, D=64, V=96, ids=1024))
    rows = {line[:34].strip(): line[34:].split() for line in speeds.report(
        torch.device("cpu"), S=32, D=128, F=128, K=64, copies=3)}
    assert rows["rmsnorm"] == ["2.00", f"{4 * 32 * 128 / 2e6:.3f}", "5.00", "0.0e+00"]
    assert rows["step attention, 16 rows"][:2] == ["2.00", f"{4 * 32 * 128 / 2e6:.3f}"]
    assert rows["close_draft"] == ["2.00"] and rows["the same, to pixels of 336"] == ["7.00"]


@pytest.mark.parametrize("command,words", [(figures, "run it where torch sees one"), (peers, "peers: "),
                                           (speeds, "run it where torch sees one"),
                                           (chain, "run it where torch sees one")])
def test_without_a_gpu_a_command_says_so_in_one_line(command, words, capsys):
    assert measure.run(command.main, ["--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""
    assert measure.run(command.main, ["--no-such-flag"]) == 2


def test_flags_may_be_written_with_underscores():
    parser = measure.flags("doc")
    parser.add_argument("--some-number", type=int)
    assert vars(parser.parse_args(["--some_number=3", "--out", "a_b"])) == {
        "device": None, "out": Path("a_b"), "some_number": 3} and isinstance(parser, argparse.ArgumentParser)


def test_every_command_beside_the_tests_ends_in_one_way():
    """A line for bad input, a word for Ctrl-C, nothing for a pipe that nobody reads: weights.files.command."""
    beside = Path(measure.__file__).parent
    for path in {*beside.glob("*.py"), *beside.parent.joinpath("weights").rglob("*.py")} - {*beside.glob("test_*.py")}:
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            assert "measure.run(main)" in text or re.search(r"@command\ndef \w+\(", text), path.name
            assert "ArgumentParser" not in text, path.name


@pytest.mark.parametrize("main, words", [
    (breaks.main, ["--only", "no such break"]), (fuzz.main, ["--kind", "none"]), (containers.main, ["--kept", "x"]),
    (long_run.main, ["rows", "--count", "1"]),
    (long_run.main, ["generations", "--adapter", "nowhere", "--count", "30"]), (agreement.main, ["--count", "0"]),
    (tiny_pair.main, ["--count", "0"]), (functools.partial(measure.run, figures.main), ["--generations", "0"]),
    (make_clips.main, ["no/such", "--count", "0"]), (make_clips.main, [str(bench.TINY / "clips")])])
def test_a_command_beside_the_tests_says_what_it_cannot_take_in_one_line(main, words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "; " in said
