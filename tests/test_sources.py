"""Draft sources that need no model: what each proposes, that lookup is bounded and survives a save, names and refusals.
"""

import json
import shutil

import pytest
import torch
from common import save_adapter

from engine import Fixed, InputError, Lookup, model_name, source_named
from tests.sources import Searched
from weights import adapter
from weights.sources import SOURCES, Adapted, DraftSource


def learnt(*answers, model="m") -> Lookup:
    lookup = Lookup(model)
    for answer in answers:
        lookup.learn(answer)
    return lookup


def test_a_known_continuation_is_drafted_by_position():
    assert Fixed([1, 2, 3]).propose([9], 9) == [2, 3] and Fixed([1, 2, 3]).propose([9], 1) == [2]
    assert Fixed([1]).propose([9, 9], 5) == []


def test_lookup_goes_on_behind_the_longest_suffix_and_of_equals_behind_the_latest():
    lookup = Searched()
    for answer in ([1, 2, 3, 4], [9, 2, 3, 5]):
        lookup.learn(answer)
    assert lookup.propose([1, 2, 3], 9) == [4] and lookup.propose([9, 2, 3], 9) == [5]
    assert lookup.propose([8, 2, 3], 9) == [5] and lookup.propose([1], 2) == [2, 3]
    assert lookup.propose([7], 9) == [] and Searched().propose([1], 9) == []
    lookup.learn([8, 2, 3, 6])                               # what is learnt between two proposals counts at once
    assert lookup.propose([8, 2, 3], 9) == [6]


def test_lookup_keeps_its_newest_answers_and_no_more(monkeypatch):
    monkeypatch.setattr(Lookup, "ROWS", 12)
    lookup = learnt(*([i, i + 1, i + 2] for i in range(50)))
    assert list(lookup.answers) == [[47, 48, 49], [48, 49, 50], [49, 50, 51]] and lookup.learnt == 50
    assert lookup.newest(2) == [[48, 49, 50], [49, 50, 51]] and len(lookup.newest(99)) == 3
    lookup.learn(range(30))
    assert list(lookup.answers) == [list(range(11))]         # of one that is too long the beginning


def test_lookup_survives_a_save_and_a_failed_one_leaves_the_old_file(tmp_path):
    lookup, path = learnt([1, 2, 3], [2, 3, 40_000]), tmp_path / "l.json"
    lookup.save(path)
    again = Lookup.load(path, "m")
    assert again.answers == lookup.answers and again.model == "m"
    text = path.read_text()
    lookup.answers.append({7, 8})                            # JSON has no sets
    with pytest.raises(TypeError):
        lookup.save(path)
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["l.json"]


def test_a_cut_foreign_or_strange_file_is_refused_and_stays(tmp_path):
    path = tmp_path / "l.json"
    learnt([1, 2, 3, 4]).save(path)
    text = path.read_text()
    for broken in (text[:-9], text.replace('"m"', '"other"'), text.replace('"lookup"', '"memory"'), "[]",
                   '{"kind": "lookup"}', text.replace("[1, 2", "[1, -2"), text.replace("[1, 2", "[1, 2147483648"),
                   text.replace("[1, 2", "[true, 2"), text.replace('"m"', json.dumps("x\n" * 999)), "[" * 100000):
        path.write_text(broken)
        with pytest.raises(InputError, match="l.json") as error:
            Lookup.load(path, "m")
        assert str(error.value).isprintable() and len(str(error.value)) < 500 and path.read_text() == broken
    with pytest.raises(InputError, match="none.json"):
        Lookup.load(tmp_path / "none.json", "m")


def test_a_model_is_named_by_its_config_its_tokenizer_and_its_weights(tmp_path):
    from bench import TINY
    folder = shutil.copytree(TINY / "target", tmp_path / "t")
    name = model_name(folder)
    assert name == model_name(TINY / "target") == model_name(folder, folder / "tokenizer.json")
    weights = next(folder.glob("*.safetensors"))
    for file in (folder / "config.json", folder / "tokenizer.json", weights):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if file == weights else kept + b" ")
        assert model_name(folder) != name, file
        file.write_bytes(kept)
    assert model_name(folder) == name != model_name("random-7b")
    with pytest.raises(InputError, match="none.json"):
        model_name(folder, tmp_path / "none.json")


def test_an_adapter_drafts_what_its_network_says_at_the_shifted_place(tmp_path):
    torch.manual_seed(0)
    config = adapter.AdapterConfig(vocab=60, rows=16, width=16, layers=1, heads=2, hidden=24)
    network = adapter.TokenAdapter(config).eval()
    save_adapter(tmp_path, network, config)
    source = source_named(f"adapter:{tmp_path}")
    assert isinstance(source, Adapted) and source.needs_drafter
    source.begin("q")
    source.read([7, 8, 9, 10])
    drafts = source.propose([3], 3)
    assert len(drafts) == 3 and source.propose([3, drafts[0]], 2) == drafts[1:]
    assert network(torch.tensor([[7, 8, 9, 10]]))[0, :3].argmax(-1).tolist() == drafts       # shift 1: behind id 0
    source.begin("q")
    assert source.propose([3], 3) == []                      # the drafter wrote nothing: nothing to go by


def test_a_source_is_known_by_its_name(tmp_path):
    assert source_named("drafter") == "drafter" and source_named("self") == "self"
    assert isinstance(source_named("lookup"), Lookup) and source_named("lookup", "m").model == "m"
    file = tmp_path / "l.json"
    fresh = source_named(f"lookup:{file}", "m")
    fresh.learn([1, 2])
    fresh.save(file)
    assert list(source_named(f"lookup:{file}", "m").answers) == [[1, 2]]
    assert set(SOURCES) == {"drafter", "self", "lookup", "adapter"} and DraftSource.needs_drafter is False
    with pytest.raises(NotImplementedError):
        DraftSource().propose([1], 1)


@pytest.mark.parametrize("name", ["nobody", "adapter", "self:FILE", "drafter:x", "adapter:/nowhere", "lookup:",
                                  ":lookup", "memory:FILE", ""])
def test_a_source_that_is_none_is_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        source_named(name)
    assert "\n" not in str(error.value)
