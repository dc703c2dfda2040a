"""Draft sources: what each proposes, that memory is bounded and survives a save, what they reach on real answers."""

import collections
import json
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

import bench
from engine import (
    Best,
    Blend,
    BlendText,
    Constant,
    DrafterText,
    Fixed,
    InputError,
    Memory,
    Previous,
    model_name,
    source_named,
)
from weights import adapter, fit_blend

PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "seed_pairs.jsonl"


def taught(source, *answers, question="q"):
    source.begin(question)
    for answer in answers:
        source.learn(answer)
    return source


def test_previous_goes_on_by_position_and_keeps_questions_apart():
    source = taught(Previous(), [1, 2, 3, 4], [5, 6, 7, 8])
    assert source.propose([9], 2) == [6, 7] and source.propose([9] * 4, 2) == []
    source.begin("another")
    assert source.propose([9], 2) == []


def test_constant_takes_the_most_frequent_way_among_answers_that_begin_alike():
    source = taught(Constant(), [1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [7, 8])
    assert source.propose([1], 9) == [2, 4, 5] and source.propose([7], 9) == [8] and source.propose([6], 9) == []


def test_memory_prefers_the_longest_context_and_backs_off():
    source = taught(Memory(order=3, weight=1), [1, 2, 3, 4], [9, 2, 3, 5], [9, 2, 3, 5])
    assert source.propose([1, 2, 3], 1) == [4] and source.propose([9, 2, 3], 1) == [5]
    assert source.propose([8, 2, 3], 1) == [5] and source.propose([9], 3) == [2, 3, 5]
    assert Memory().propose([1], 5) == []


def test_memory_is_bounded_and_forgets_without_a_trace():
    source, fresh = Memory(order=4, most=3), Memory(order=4, most=3)
    for i in range(50):
        source.learn([i, i + 1, i + 2])
    for i in (47, 48, 49):
        fresh.learn([i, i + 1, i + 2])
    assert source.after == fresh.after and len(source.kept) == 3


def test_memory_survives_a_save_and_a_failed_one_leaves_the_old_file(tmp_path):
    source, path = taught(Memory(order=5, most=10, model="m"), [1, 2, 3], [2, 3, 4]), tmp_path / "m.json"
    source.save(path)
    again = Memory.load(path, "m")
    assert again.after == source.after and again.propose([2], 3) == source.propose([2], 3) and again.model == "m"
    text = path.read_text()
    source.kept.append(({7, 8}, 1))                          # JSON has no sets
    with pytest.raises(TypeError):
        source.save(path)
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["m.json"]


def test_memory_refuses_a_cut_foreign_or_strange_file(tmp_path):
    path = tmp_path / "m.json"
    taught(Memory(model="m"), [1, 2, 3, 4]).save(path)
    text = path.read_text()
    old = json.dumps({"order": 8, "most": 5000, "answers": [[[1, 2, 3], 20]]})           # a form that named no model
    for broken in (text[:-9], text.replace('"m"', '"other"'), text.replace('"memory"', '"blend"'), "[]", '{"kind": 1}',
                   text.replace("[1, 2", "[1, 32000"), text.replace("[1, 2", "[1, -2"), text.replace("20]", "-20]"),
                   text.replace('"most": 5000', '"most": 0'), text.replace('"order": 8', '"order": -1'), old,
                   text.replace('"m"', json.dumps("x\n" * 999)), "[" * 100000):
        path.write_text(broken)
        with pytest.raises(InputError, match="m.json: not a saved memory of this model") as error:
            Memory.load(path, "m")
        assert str(error.value).isprintable() and len(str(error.value)) < 400 and path.read_text() == broken
    with pytest.raises(InputError, match="none.json"):
        Memory.load(tmp_path / "none.json", "m")


def test_a_model_is_named_by_its_config_its_tokenizer_and_its_weights(tmp_path):
    folder = shutil.copytree(bench.TINY / "target", tmp_path / "t")
    name = model_name(folder)
    assert name == model_name(bench.TINY / "target") == model_name(folder, folder / "tokenizer.json")
    weights = next(folder.glob("*.safetensors"))
    for file in (folder / "config.json", folder / "tokenizer.json", weights):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if file == weights else kept + b" ")
        assert model_name(folder) != name, file
        file.write_bytes(kept)
    assert model_name(folder) == name != model_name("random-7b")
    with pytest.raises(InputError, match="none.json"):
        model_name(folder, tmp_path / "none.json")


@pytest.mark.parametrize("kind", ["memory", "blend", "blend-text"])
def test_a_run_goes_on_from_the_answers_that_the_last_one_kept(kind, tmp_path, capsys):
    """Same clip twice: the second run drafts the first one's answer from its first round on."""
    file, rates = tmp_path / "kept.json", []
    for _ in range(2):
        assert bench.main(["--draft-source", f"{kind}:{file}", "--device", "cpu", "--modes", "target_only,speculative",
                           "--max-samples", "1", "--repeats", "1", "--warmup", "0", "--gate", "off", "--json", "-",
                           "--max-new-tokens", "20"]) == 0
        report = json.loads(capsys.readouterr().out)
        rates.append(report["samples"][0]["modes"]["speculative"]["accepted"])
    assert rates[0] < rates[1] and json.loads(file.read_text())["model"] == model_name(bench.TINY / "target")


def test_memory_may_be_shared_by_threads():
    source = Memory(order=4, most=40)
    threads = [threading.Thread(target=lambda k=k: [(source.learn([k, i % 7, i % 5]), source.propose([k], 4))
                                                    for i in range(300)]) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    rebuilt = Memory(order=4, most=40)
    for ids, weight in source.kept:
        rebuilt.teach(ids, weight)
    assert source.after == rebuilt.after


def test_blend_goes_with_the_previous_answer_until_it_fails_then_with_what_fits_best():
    source = taught(Blend(), [1, 2, 3, 4, 5, 6, 7], [1, 2, 8, 9, 5, 6, 10])
    assert source.propose([1], 3) == [2, 8, 9]
    assert source.propose([1, 2, 3], 4) == [4, 5, 6, 7]
    assert source.propose([0, 9, 5], 2) == [6, 10] and Blend().propose([1], 4) == []


def test_a_text_votes_where_it_fits_best_and_there_for_the_nearest_place():
    source = BlendText()
    source.begin("q")
    assert source.propose([1], 4) == []
    source.hear([1, 2, 3, 4, 5, 3, 6])
    assert source.propose([1], 4) == [2, 3, 4, 5]
    assert source.propose([1, 2, 9, 5, 3], 1) == [6]         # both of its ids fit there; after the first 3 only one
    assert source.propose([1, 8, 3], 1) == [4]               # one fits at either place, and this one is near
    assert source.propose([7], 2) == []                      # nothing it says
    source.begin("q")
    assert source.propose([1], 4) == []                      # the last request's text is gone


def test_a_text_outvotes_old_answers_while_it_is_right_and_not_when_it_was_wrong():
    memories = [[1, 2, 3, 4], [1, 2, 3, 4]]
    right, wrong = BlendText(), BlendText()
    for i in range(200):                                     # what is heard: the truth, and the truth with other ends
        for source, text in ((right, [1, 10 + i, 20]), (wrong, [1, 9, 9])):
            source.begin("other")
            source.hear(text)
            source.learn([1, 10 + i, 20])
    for source in (right, wrong):
        for answer in memories:
            source.begin("q")
            source.learn(answer)
        source.begin("q")
        source.hear([1, 2, 7, 7])
    assert right.propose([1], 3) == [2, 7, 7]
    plain = taught(Blend(), *([1, 10 + i, 20] for i in range(200)))
    for answer in memories:
        plain.begin("q")
        plain.learn(answer)
    plain.begin("q")
    assert wrong.propose([1], 3) == plain.propose([1], 3) == [2, 3, 4]


def test_without_a_text_it_drafts_what_blend_drafts():
    answers = [[1, 2 + i % 3, 5, 6, 7 + i % 2, 9, 5, 6] for i in range(9)]
    plain, hearing = taught(Blend(), *answers), taught(BlendText(), *answers)
    for at in range(1, 8):
        assert hearing.propose(answers[-1][:at], 15) == plain.propose(answers[-1][:at], 15) != []


def test_an_answer_says_again_what_others_said_again():
    """After 5 a 1 came back twice, and once a 7 was new: 1 is drafted only where it would come back, 7 never again."""
    source = Blend()
    for answer in ([1, 5, 1], [1, 5, 1], [2, 5, 7]):
        source.teach(answer)
    assert source.propose([1, 3, 5], 1) == [1] and source.propose([2, 3, 5], 1) == [7]
    assert source.propose([7, 3, 5], 1) != [7]


def test_blend_drafts_the_same_from_any_cut_of_its_own_draft():
    """Drafting in one go or in rounds is the same walk."""
    source = taught(Blend(), *[[1, 2 + i % 3, 5, 6, 7 + i % 2, 9, 5, 6] for i in range(9)])
    whole = [1] + source.propose([1], 7)
    assert len(whole) == 8
    for cut in range(1, 8):
        assert whole[:cut] + source.propose(whole[:cut], 8 - cut) == whole


def slow_blend(blend, committed, limit):
    """What Blend.propose is defined to give: every vote counted anew for each id, nothing left out."""
    ids, past = list(committed), blend.answers.get(blend.question, ([],))[0]
    while len(ids) < len(committed) + limit:
        votes, n = collections.defaultdict(float), len(ids)
        for age, answer in (*enumerate(past, 1), (0, ids)):
            for at in range(1, len(answer)):
                fit = next((k for k in range(min(at, n)) if answer[at - 1 - k] != ids[-1 - k]), min(at, n))
                if fit:
                    row, weight = blend.PLACE[blend.OFF[min(abs(at - n), 17)]], blend.AGE[age]
                    if age and fit == n:
                        weight = blend.WHOLE[age]
                    votes[answer[at]] += weight * (blend.FIT[min(fit, 64)] * row[min(fit, 64)])
        mass = floor = None
        for length in range(min(16, n), -1, -1):
            key = tuple(ids[n - length:])
            if counts := blend.pool.after.get(key):
                mass = blend.POOL[length] if mass is None else mass
                floor = 0.03 * mass if floor is None else floor
                total = sum(counts.values()) + len(counts)
                for counted, count in counts.items():
                    if counted >= 0 and counted not in ids or counted < 0 and ~counted in ids:
                        votes[counted if counted >= 0 else ~counted] += mass * count / total
                here = blend.pool.after.get((n, key), {}) if 0 < length <= blend.PLACED else {}
                for counted, count in here.items():
                    if counted >= 0 and counted not in ids or counted < 0 and ~counted in ids:
                        votes[counted if counted >= 0 else ~counted] += mass * count / (sum(here.values()) + len(here))
                mass *= len(counts) / total
                if mass < floor:
                    break
        if not votes:
            break
        ids.append(max(votes, key=votes.get))
    return ids[len(committed):]


@pytest.mark.parametrize("seed", range(4))
def test_blend_drafts_what_its_slow_definition_drafts(seed):
    """Random answers of a small vocabulary: many fits, many ties, questions that come back."""
    chance, source = random.Random(seed), Blend(recent=1 + 7 * seed)
    for step in range(60):
        source.begin(f"q{chance.randrange(2)}")
        answer = [chance.randrange(5 + 6 * seed) for _ in range(chance.randrange(1, 40))]
        if step % 3 and source.answers.get(source.question):
            old = source.answers[source.question][0][0]
            cut = chance.randrange(len(old) + 1)
            answer = old[:cut] + answer[cut:] or answer
        at = 1
        while at < len(answer):
            limit = chance.randrange(0, 20)
            drafts = source.propose(answer[:at], limit)
            assert drafts == slow_blend(source, answer[:at], limit)
            at += 1 + bench.prefix(drafts, answer[at:], limit)
        source.teach(answer[::-1]) if step % 5 == 0 else source.learn(answer)


def test_blend_keeps_questions_apart_but_pools_them():
    source = taught(Blend(), [1, 2, 3], question="a")
    source.begin("b")
    assert source.propose([1], 2) == [2, 3]
    source.learn([1, 4, 5])
    assert source.propose([1], 2) == [4, 5]
    source.begin("a")
    assert source.propose([1], 2) == [2, 3]


def test_blend_is_bounded_in_answers_and_questions():
    source = Blend(recent=3, most=5, questions=4)
    for i in range(60):
        source.begin(f"q{i % 10}")
        source.learn([i, i + 1, i + 2])
    assert len(source.pool.kept) == 5 and len(source.answers) == 4
    assert all(len(past) <= 3 for past, _, _ in source.answers.values())


def test_blend_survives_a_save_and_a_failed_one_leaves_the_old_file(tmp_path):
    source, path = taught(Blend(model="m"), [1, 2, 3, 4], [1, 2, 5, 6]), tmp_path / "b.json"
    source.save(path)
    again = Blend.load(path, "m")
    assert again.answers == source.answers and again.pool.after == source.pool.after
    again.begin("q")
    assert again.propose([1], 3) == source.propose([1], 3)
    text = path.read_text()
    source.answers["no", "string"] = [], {}, []              # JSON has no such key
    with pytest.raises(TypeError):
        source.save(path)
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_blend_refuses_a_cut_foreign_or_strange_file(tmp_path):
    path = tmp_path / "b.json"
    taught(Blend(model="m"), [1, 2, 3, 4]).save(path)
    text = path.read_text()
    for broken in (text[:-9], text.replace('"m"', '"other"'), text.replace("[1, 2", "[1, 32000"), "[]", '{"kind": 1}',
                   text.replace("[1, 2", "[1, -2"), text.replace('"recent": 32', '"recent": 1000'), "[" * 100000):
        path.write_text(broken)
        with pytest.raises(InputError, match="b.json") as error:
            Blend.load(path, "m")
        assert "\n" not in str(error.value) and path.read_text() == broken


def test_blend_may_be_shared_by_threads():
    source, broken = Blend(recent=5, most=9), []

    def work(k):
        try:
            for i in range(150):
                source.begin(f"q{k}")
                source.learn([k, i % 7, i % 5, 3])
                source.propose([k, i % 7], 8)
        except Exception as error:
            broken.append(error)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not broken and len(source.pool.kept) == 9


def test_drafter_text_goes_on_where_the_answer_was_heard():
    source = DrafterText()
    source.begin("q")
    assert source.propose([1, 2, 3], 4) == []
    source.hear([9, 2, 3, 4, 5, 1, 2, 3, 7, 8])
    assert source.propose([0, 1, 2, 3], 4) == [7, 8] and source.propose([0, 2, 3], 2) == [4, 5]
    assert source.propose([0, 3], 2) == []                   # one id alone is chance
    source.begin("q")
    assert source.propose([0, 2, 3], 2) == []


@pytest.mark.parametrize("kind", ["token", "follower"])
def test_an_adapter_drafts_what_its_network_says_at_the_shifted_place(tmp_path, kind):
    torch.manual_seed(0)
    config = adapter.AdapterConfig(kind, vocab=60, rows=16, width=16, layers=1, heads=2, hidden=24)
    network = adapter.NETWORKS[kind](config).eval()
    adapter.save(tmp_path, network, config)
    source = source_named(f"adapter:{tmp_path}")
    source.begin("q")
    source.learn([3, 4, 5])
    source.begin("q")
    source.hear([7, 8, 9, 10])
    drafts = source.propose([3], 3)
    assert len(drafts) == 3 and source.propose([3, drafts[0]], 2) == drafts[1:]
    row = {"drafter": [7, 8, 9, 10], "previous": [3, 4, 5], "target": [3, *drafts]}
    inputs, _ = adapter.batch([row], config, "cpu")
    assert network(*inputs)[0, -3:].argmax(-1).tolist() == drafts
    if kind == "token":
        source.begin("q")
        assert source.propose([3], 3) == []                  # nothing heard, nothing to go by


@pytest.mark.parametrize("name", ["nobody", "adapter", "previous:DIR", "adapter:/nowhere", "memory:", ":memory"])
def test_a_source_that_is_none_is_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        source_named(name)
    assert "\n" not in str(error.value)


def test_best_passes_on_what_it_hears():
    source = Best(Previous(), DrafterText())
    source.begin("q")
    source.hear([1, 2, 3])
    assert source.hears and not Best(Previous()).hears and source.propose([1, 2], 4) == [3]


def test_best_settles_on_the_source_that_is_accepted():
    good, bad = Fixed(range(100)), Fixed([7] * 100)
    source, asked = Best(bad, good), []
    for n in range(1, 20):
        drafts = source.propose(list(range(n)), 4)
        asked.append(source.asked)
        source.verdict(len(drafts), bench.prefix(drafts, list(range(n, n + 4)), 4))
    assert asked[-10:] == [1] * 10


@pytest.fixture(scope="module")
def recorded():
    if not PAIRS.exists():
        pytest.skip(f"{PAIRS} is not here: the recorded answers cannot be replayed")
    return bench.read_pairs(PAIRS, "test_tokens_1q")


def test_controls_on_the_recorded_answers_are_reproduced(recorded):
    """Recounted figures of the 1,100 answers, whole sequences held out, drafts after the target's own first id."""
    figures = bench.one_shot_controls(recorded, 21)
    assert figures["previous"] == pytest.approx(13.45, rel=0.02)
    assert figures["constant"] == pytest.approx(8.97, rel=0.02)
    assert figures["drafter"] == pytest.approx(0.007, abs=0.002)


def test_memory_on_a_recorded_subset_reaches_the_recounted_range(recorded):
    """Two of twelve sequences are replayed here; `python bench.py --sources` does all (3.31 and 4.67 at K = 8)."""
    some = [s for s, _ in collections.Counter(r["seq"] for r in recorded).most_common()[-2:]]
    figures = bench.memory_controls(recorded, 8, [8], only=some)
    assert 2.5 < figures[8]["other sequences"] < figures[8]["with own stream"] < 6.0


def test_blend_beats_every_control_on_a_recorded_subset(recorded):
    """Three of twelve sequences; `python bench.py --sources` does all."""
    some = [s for s, _ in collections.Counter(r["seq"] for r in recorded).most_common()[-3:]]
    figures = {name: bench.replay(recorded, name, (15,), (21,), only=some).values()
               for name in ("blend", "memory 16", "previous", "constant")}
    rounds = {name: bench.per_forward(of, 15) for name, of in figures.items()}
    shots = {name: bench.accepted(of, 21) for name, of in figures.items()}
    assert rounds["blend"] > 1.03 * max(rounds[name] for name in rounds if name != "blend")
    assert shots["blend"] > max(shots["constant"], 0.95 * shots["previous"])


def test_blend_drafts_what_its_slow_definition_drafts_on_recorded_answers(recorded):
    source, last = Blend(most=2200), recorded[-1]["seq"]
    for row in recorded:
        if row["seq"] != last:
            source.teach(row["target"])
    for row in [r for r in recorded if r["seq"] == last][:25]:
        source.begin(row["question"])
        ids, at = row["target"], 1
        while at < len(ids):
            drafts = source.propose(ids[:at], 15)
            assert drafts == slow_blend(source, ids[:at], 15)
            at += 1 + bench.prefix(drafts, ids[at:], 15)
        source.learn(ids)


def test_blends_tables_come_out_of_a_fit_to_another_targets_answers():
    pairs = PAIRS.with_name("seed_pairs_llava15.jsonl")
    if not pairs.exists():
        pytest.skip(f"{pairs} is not here: there is nothing to fit")
    rows = [{**row, "target": row["target"][:50]} for row in fit_blend.read_pairs(pairs, "4bit_200508")]
    tables, nats = fit_blend.fit(rows)
    made = fit_blend.with_tables(fit_blend.boosted(tables, 4))                # 4: what the command chose
    for name in ("FIT", "AGE", "WHOLE", "POOL"):             # to 0.05: the valley is flat, and rounding leads along it
        assert getattr(made, name) == pytest.approx(getattr(Blend, name), rel=0.05), name
    assert all(ours == pytest.approx(theirs, rel=0.05) for ours, theirs in zip(made.PLACE, Blend.PLACE, strict=True))
    assert nats < 0.49


def test_a_fit_finds_what_a_stream_lives_on(tmp_path, capsys):
    """Answers that repeat the last but one: its whole fit outweighs the last one's. Bad input is one line."""
    chance = random.Random(0)
    rows = []
    for seq in "abc":
        texts = [[1, 2] + [chance.randrange(3, 40) for _ in range(20)] for _ in range(2)]
        for clip in range(14):
            rows.append({"src": "x", "seq": seq, "clip": clip, "question": "q", "eventgpt_ids": [9],
                         "videollava_ids": texts[clip % 2]})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert fit_blend.main([str(path), "--src", "x"]) == 0
    out = capsys.readouterr().out
    assert "42 answers of 3 sequences" in out and out.count(" = ladder(") == 4 and "PLACE = ((" in out
    tables, _ = fit_blend.fit(fit_blend.read_pairs(path, "x"))
    assert tables["WHOLE"][1] > tables["WHOLE"][0] + 1
    path.write_text("{")
    assert fit_blend.main([str(path)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_interval_needs_more_than_two_sequences_and_holds_its_figure():
    rows = [{"seq": f"s{s}", "clip": c, "question": "q", "drafter": [],         # of sequence s, s ids change every clip
             "target": [1] + [100 * s + i + (10 * c if i < s else 0) for i in range(6)]}
            for s in range(6) for c in range(4)]
    runs = list(bench.replay(rows, "blend", (8,), ()).values())
    assert "[" not in bench.with_interval(bench.per_forward, runs[:2], 8)
    figure, low, high = bench.with_interval(bench.per_forward, runs, 8).replace("[", " ").replace(",", " ").strip(
        "]").split()
    assert float(low) < float(figure) < float(high)


def test_an_answer_is_never_seen_before_its_ids_are_committed():
    """The ids drafted for an answer are the same whatever the answer goes on to be."""
    def rows(last):
        return [{"seq": s, "clip": c, "question": "q", "drafter": [9], "target": [1, 2, 3, 4, 5, 6 + c % 2]}
                for s in "ab" for c in range(4)][:-1] + [{"seq": "b", "clip": 3, "question": "q", "drafter": [9],
                                                           "target": last}]
    asked = []

    class Spy(Blend):
        def propose(self, committed, limit):
            asked.append((committed, super().propose(committed, limit)))
            return asked[-1][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.CONTROLS, "blend", lambda most: Spy())
        for last in ([1, 2, 3, 4, 5, 7], [1, 8, 8, 8, 8, 8]):
            bench.replay(rows(last), "blend", (), (5,), only=["b"])
    assert asked[:4] == asked[4:] and len(asked) == 8


def test_the_sources_page_prints_the_whole_table_from_a_small_file(tmp_path, capsys):
    rows = [{"src": "test_tokens_1q", "seq": f"s{s}", "clip": c, "question": "q", "eventgpt_ids": [9, 9],
             "videollava_ids": [1, 2, 3, 4 + s % 2, 5, 6]} for s in range(3) for c in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert bench.main(["--sources", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in bench.CONTROLS) and "cold" in out
    (tmp_path / "broken.jsonl").write_text("{")
    assert bench.main(["--sources", str(tmp_path / "broken.jsonl"), "--device", "cpu"]) == 2
    assert "broken.jsonl" in capsys.readouterr().err
