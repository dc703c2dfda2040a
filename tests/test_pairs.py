"""pairs: recorded answers are read by line and source; what is no pair is refused by its line."""

import json

import pytest
from pairs import read_pairs

from engine import InputError


def write_pairs(path, src="headstart", **change):
    """24 pairs of six sequences."""
    path.write_text("".join(json.dumps({"src": src, "seq": f"s{i // 4}", "clip": i % 4, "question": "q",
                                        "videollava_ids": [5, i, 7], "eventgpt_ids": [i, 9], **change}) + "\n"
                            for i in range(24)))
    return path


@pytest.mark.parametrize("change", [{"videollava_ids": None}, {"videollava_ids": [1, 32010]}, {"eventgpt_ids": [-1]},
                                    {"eventgpt_ids": [1.5]}, {"videollava_ids": [True]}, {"clip": "x"},
                                    {"clip": {}}, {"eventgpt_stops": "2"}, {"videollava_stops": [[2]]}])
def test_a_line_that_is_no_pair_or_of_another_vocabulary_is_refused_by_its_number(tmp_path, change):
    path = write_pairs(tmp_path / "pairs.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], json.dumps({**json.loads(lines[3]), **change}), *lines[4:]]))
    with pytest.raises(InputError, match=f"^{path}: line 4[: ]") as error:
        read_pairs(path, "headstart", 32010)
    assert "\n" not in str(error.value)


def test_ids_and_stop_ids_are_those_of_the_models_that_were_recorded(tmp_path):
    """Not LLaMA's; what ends an answer is no part of it."""
    path = write_pairs(tmp_path / "pairs.jsonl", videollava_ids=[40_000, 2, 7], eventgpt_ids=[50_000, 9],
                       videollava_stops=[7, 40_001], eventgpt_stops=[9])
    assert {(*row["target"], "|", *row["drafter"]) for row in read_pairs(path)} == {(40_000, 2, "|", 50_000)}


def test_the_only_kind_of_pairs_is_taken_and_of_several_one_is_named(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", src="mine")
    assert read_pairs(path) == read_pairs(path, "mine") and len(read_pairs(path)) == 24
    with pytest.raises(InputError, match="no rows of 'other'; it holds mine"):
        read_pairs(path, "other")
    path.write_text("\ufeff" + path.read_text() + json.dumps({**json.loads(path.read_text().split("\n")[0]), "src": "b",
                                                             "question": "one\u2028line"}, ensure_ascii=False))
    with pytest.raises(InputError, match="holds b, mine; name one of these"):
        read_pairs(path)
    assert read_pairs(path, "b")[0]["question"] == "one\u2028line"
    for nothing, words in (("", "wanted recorded pairs"), ("\n", "no recorded pairs")):
        path.write_text(nothing)
        with pytest.raises(InputError, match=words):
            read_pairs(path)
