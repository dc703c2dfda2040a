"""Rows on disk: what was finished stays, what was cut or failed comes again, unlike runs never share a table."""

import json

import pytest

import engine
from weights import InputError, rows
from weights.rows import RowFile, merge, read_rows

HEAD = {"schema": 2, "commit": "c", "weights": {"target": {"hash": "h"}}, "config": {"modes": ["a"], "samples": 3,
                                                                                   "question": "q"}}


def row(at, **more):
    return {"id": f"s{at}", "at": at, "modes": {"a": {}}, **more}


def written(path, *rows, head=HEAD):
    with RowFile(path, head) as file:
        for of in rows:
            file.append(of)
    return path


def test_rows_come_back_without_a_cut_line_and_a_row_that_failed_is_tried_again(tmp_path):
    path = written(tmp_path / "r.jsonl", row(0), row(1, error="broken"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "s2", "at"')
    with RowFile(path, HEAD) as file:
        assert file.rows == [row(0)] and path.read_bytes() == whole
        file.append(row(1))
    assert read_rows(path)[1] == [row(0), row(1)]
    path.write_bytes(whole[:20])                             # it died over its header
    assert RowFile(path, HEAD).rows == [] and json.loads(path.read_text()) == HEAD
    with RowFile(None, HEAD) as file:
        file.append(row(0))
        assert file.rows == []


def test_what_is_no_header_cut_short_is_never_emptied(tmp_path):
    """Whatever is named as --rows by mistake; and the whole header of a run, however long."""
    path = tmp_path / "r.jsonl"
    for text in (json.dumps(HEAD | {"samples": []}), json.dumps({"schema": "theirs", "a": 1}), '{"schema": 2, "a": "b'):
        for end in ("", "\n"):
            path.write_text(text + end)
            with pytest.raises(InputError, match="a file of rows"):
                RowFile(path, HEAD)
            assert path.read_text() == text + end
    path.unlink()
    long = HEAD | {"skipped": ["x" * 1000] * 1100}
    assert RowFile(written(path, row(0), head=long), long).rows == [row(0)] and path.stat().st_size > 1 << 20
    path.write_text(json.dumps(HEAD))                        # as an editor may leave it
    assert read_rows(written(path, row(0)))[:2] == (HEAD, [row(0)])


def test_a_file_is_one_writers(tmp_path):
    with RowFile(tmp_path / "r.jsonl", HEAD), pytest.raises(InputError, match="another run is writing"):
        RowFile(tmp_path / "r.jsonl", HEAD)


@pytest.mark.parametrize("change,name", [
    ({"commit": "d"}, 'commit ("c", here "d")'), ({"weights": {"target": {"hash": "x"}}}, "weights target hash"),
    ({"config": {**HEAD["config"], "question": "other"}}, 'question ("q", here "other")'),
    ({"config": {**HEAD["config"], "fresh": 1}}, "fresh (None, here 1)"),
    ({"config": {**HEAD["config"], "samples": 7}}, "--max-samples ("), ({"schema": 3}, "schema (2, here 3)")])
def test_rows_of_another_run_are_refused_by_the_name_of_what_differs(tmp_path, change, name):
    path = written(tmp_path / "r.jsonl", row(0))
    with pytest.raises(InputError) as error:
        RowFile(path, {**HEAD, **change})
    assert f"was written with another {name}" in str(error.value) and str(path) in str(error.value)
    other = written(tmp_path / "o.jsonl", row(1), head={**HEAD, **change})
    with pytest.raises(InputError, match="another"):
        merge([path, other])


def test_shards_are_put_together_by_id_and_holes_and_duplicates_refused(tmp_path):
    one, two = written(tmp_path / "1.jsonl", row(2), row(0)), written(tmp_path / "2.jsonl", row(1))
    assert merge([one, two]) == [row(2), row(0), row(1)]
    for paths, words in (([one], "1 of 3 samples are missing"), ([one, two, two], "s1 is there twice")):
        with pytest.raises(InputError, match=words):
            merge(paths)


@pytest.mark.parametrize("text", ["", "{", '{"config": {"samples": 1, "modes": []}}\n{"id": 1, "at": 0, "modes": {}}\n',
                                  '{"config": {"samples": 1, "modes": []}}\n{"id": "a", "at": 0, "modes": {"x": 1}}\n',
                                  '{"config": {"samples": true, "modes": []}}\n', "[" * 100000 + "\n"])
def test_what_is_no_file_of_rows_is_one_line(tmp_path, text):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(InputError, match="a file of rows"):
        read_rows(tmp_path / "r.jsonl")


@pytest.mark.parametrize("of", [{"accept_lens": [10 ** 400]}, {"ids": [10 ** 30]}, {"accept_lens": [-1]},
                                {"accept_lens": [1.5]}, {"accept_lens": [2, 3]}], ids=lambda of: str(of)[:30])
def test_numbers_that_no_run_gives_are_refused_where_rows_are_read(tmp_path, of):
    """--merge and --resume; a figure of them would stand in a report."""
    path = written(tmp_path / "r.jsonl", {**row(0), "modes": {"a": {"drafted": 4, **of}}}, row(1), row(2))
    for read in (lambda: merge([path]), lambda: RowFile(path, HEAD)):
        with pytest.raises(InputError, match=r"not a file of rows \(ValueError: .* in sample s0") as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_rounds_are_counted_and_timed_by_who_drafted():
    """A prefill that ends at 1 s, then rounds of 2, 1 and 4 s by two sources; a step queued behind the end."""
    line = [("target", "prefill", 0.5, 1.0, ""), ("target", "draft", 1.0, 2.0, ""), ("target", "verify", 2.0, 3.0, ""),
            ("drafter", "prefill", 0.2, 2.5, ""), ("target", "decode", 3.0, 4.0, ""),
            ("target", "verify", 4.5, 8.0, ""), ("target", "decode", 8.0, 9.0, "")]
    log = [engine.Round("self", [1, 2, 3], 1), engine.Round("", [], 0), engine.Round("self", [4, 5, 6], 3, 2)]
    result = engine.Result(mode="speculative", timeline=line, round_log=log, output_ids=[0] * 9, ttft=1.0)
    result.count()
    found = result.by_source
    assert found == {"self": {"rounds": 2, "drafts": 6, "accepted": 4, "ids": 6, "ms": pytest.approx(6000), "judged": 3,
                              "right": 2},                   # the last two of six are not its own
                     "none": {"rounds": 1, "drafts": 0, "accepted": 0, "ids": 1, "ms": pytest.approx(1000), "judged": 0,
                              "right": 0}}
    both = rows.added([found, {"self": found["self"]}, {}])
    assert both["self"]["ms"] == pytest.approx(12000) and both["self"]["ids"] == 12 and both["none"]["rounds"] == 1
