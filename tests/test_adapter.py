"""Adapters: the recorded architecture, no leak between sequences, training that resumes, files that are none."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from engine import InputError
from weights import adapter
from weights.adapter import AdapterConfig, TokenAdapter
from weights.convert import convert

EPOCHS = 14
SMALL = dict(vocab=60, rows=16, width=16, layers=2, heads=2, hidden=24)


def rows_of(sequences=6, clips=4):
    """Answers that follow from the drafter's ids, each one later: what shift 1 can learn."""
    return [{"seq": f"s{s}", "clip": c, "question": "q", "drafter": [k, k + 1, k + 2, k + 3],
             "target": [5, k + 10, k + 11, k + 12]} for s in range(sequences) for c in range(clips)
            for k in [10 + (s * clips + c) % 7 * 4]]


def write_pairs(path, rows, src="headstart"):
    path.write_text("".join(json.dumps({"src": src, "seq": r["seq"], "clip": r["clip"], "question": r["question"],
                                        "videollava_ids": r["target"], "eventgpt_ids": r["drafter"]}) + "\n"
                            for r in rows))
    return path


def test_the_token_adapter_has_the_recorded_layers():
    with torch.device("meta"):
        network = TokenAdapter(AdapterConfig())
    assert sum(p.numel() for p in network.parameters()) == 45_486_346
    keys = set(network.state_dict())
    assert {"embedding.weight", "position_embedding.weight", "output_proj.0.weight", "output_proj.1.bias",
            "transformer.layers.3.self_attn.in_proj_bias"} <= keys


def test_no_entry_looks_ahead():
    torch.manual_seed(0)
    network, ids = TokenAdapter(AdapterConfig(**SMALL)).eval(), torch.randint(1, 60, (1, 8))
    before = network(ids)
    ids[0, 5] = (ids[0, 5] + 1) % 60
    after = network(ids)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


def test_parts_share_no_sequence_and_lose_no_row():
    rows = rows_of(12)
    parts = adapter.split(rows, 3, 2)
    seqs = [{r["seq"] for r in part} for part in parts.values()]
    assert sum(map(len, parts.values())) == len(rows) and sum(map(len, seqs)) == 12
    assert len({r["seq"] for r in parts["test"]}) == 3 and len({r["seq"] for r in parts["valid"]}) == 2
    with pytest.raises(InputError, match="6 sequences"):
        adapter.split(rows_of(6), 4, 3)


def test_labels_are_shifted_against_the_drafter():
    row = {"drafter": [7, 8, 9], "target": [3, 4, 5], "previous": []}
    for shift, labels in ((0, [3, 4, 5]), (1, [4, 5])):
        ids, found = adapter.batch([row], AdapterConfig(shift=shift, **SMALL), "cpu")
        assert found[0].tolist() == labels and ids[0].tolist() == [7, 8, 9][:len(labels)]


def test_training_learns_what_can_be_learnt_and_resumes_to_the_same_weights(tmp_path):
    config, options = AdapterConfig(**{**SMALL, "vocab": 64}), dict(lr=1e-2, test=1, valid=1, batch_rows=8)
    whole = adapter.train(rows_of(8, 14), tmp_path / "whole", config, epochs=EPOCHS, patience=EPOCHS, **options)
    assert whole["test"]["prefix"] > 2.5 > 1.0 > whole["controls"]["position frequency"]["prefix"]
    real, calls = adapter.judge, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapter, "judge", dies)
        adapter.train(rows_of(8, 14), tmp_path / "cut", config, epochs=EPOCHS, patience=EPOCHS, **options)
    again = adapter.train(rows_of(8, 14), tmp_path / "cut", config, epochs=EPOCHS, patience=EPOCHS, **options)
    assert again == whole
    assert (tmp_path / "cut" / adapter.WEIGHTS).read_bytes() == (tmp_path / "whole" / adapter.WEIGHTS).read_bytes()


def test_a_converted_best_model_loads_without_a_config(tmp_path):
    torch.manual_seed(0)
    network = TokenAdapter(AdapterConfig(**{**SMALL, "heads": 8})).eval()
    torch.save({"model_state_dict": network.state_dict(), "epoch": 2, "val_acc": 0.28}, tmp_path / "best_model.pt")
    convert(tmp_path / "best_model.pt", tmp_path / adapter.WEIGHTS)
    again, config = adapter.load(tmp_path)
    ids = torch.randint(0, 60, (1, 9))
    assert config.shift == 1 and config.layers == 2 and torch.equal(again(ids), network(ids))


class Boom:
    def __reduce__(self):
        return open, ("boom", "w")


def test_a_malicious_best_model_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"embedding.weight": torch.ones(2, 2)}, "extra": Boom()}, "best_model.pt")
    (tmp_path / adapter.WEIGHTS).write_bytes(pickle.dumps(Boom()))
    for call in (lambda: convert("best_model.pt", "x.safetensors"), lambda: adapter.load(tmp_path)):
        with pytest.raises(InputError) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "x.safetensors").exists()


def test_weights_that_fit_no_config_are_refused_by_name(tmp_path):
    adapter.save(tmp_path, TokenAdapter(AdapterConfig(**SMALL)), AdapterConfig(**SMALL))
    config, good = json.loads((tmp_path / "config.json").read_text()), (tmp_path / adapter.WEIGHTS).read_bytes()
    for change in ({"width": 32}, {"kind": "follower"}, {"kind": []}, {"heads": 3}, {"layers": "many"},
                   {"layers": 1_000_000}, {"stray": 1}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError):
            adapter.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "token", "sees": "drafter"}))  # as it was
    assert adapter.load(tmp_path)[1] == AdapterConfig(**SMALL)
    (tmp_path / adapter.WEIGHTS).write_bytes(good[:len(good) // 2])
    with pytest.raises(InputError, match=adapter.WEIGHTS):
        adapter.load(tmp_path)


@pytest.mark.parametrize("change", [{"videollava_ids": None}, {"videollava_ids": [1, 32010]}, {"eventgpt_ids": [-1]},
                                    {"eventgpt_ids": [1.5]}, {"videollava_ids": [True]}, {"clip": "x"},
                                    {"clip": {}}, {"eventgpt_stops": "2"}, {"videollava_stops": [[2]]}])
def test_pairs_of_another_vocabulary_are_refused_and_nothing_is_written(tmp_path, capsys, change):
    path = write_pairs(tmp_path / "pairs.jsonl", rows_of())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], json.dumps({**json.loads(lines[3]), **change}), *lines[4:]]))
    flags = ["--src", "headstart", "--vocab", "32010", "--out", str(tmp_path / "out")]
    assert adapter.main(["train", str(path), *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "line 4" in told and not (tmp_path / "out").exists()


def test_ids_and_stop_ids_are_those_of_the_models_that_were_recorded(tmp_path):
    """Not LLaMA's: an adapter is as wide as the ids that it learns from, and what ends an answer is no part of it."""
    rows = [{**row, "target": [40_000, 2, 7], "drafter": [50_000, 9]} for row in rows_of()]
    path = write_pairs(tmp_path / "pairs.jsonl", rows)
    lines = [json.loads(line) | {"videollava_stops": [7, 40_001], "eventgpt_stops": [9]}
             for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert {(*row["target"], "|", *row["drafter"]) for row in adapter.read_pairs(path)} == {(40_000, 2, "|", 50_000)}
    sizes = [f"--{n}={v}" for n, v in SMALL.items() if n not in ("rows", "vocab")]
    assert adapter.main(["train", str(path), "--out", str(tmp_path / "out"), "--epochs", "1", "--test", "1",
                         "--valid", "1", *sizes]) == 0
    assert adapter.load(tmp_path / "out")[1].vocab == 50_001


def test_the_only_kind_of_pairs_is_taken_and_of_several_one_is_named(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", rows_of(), src="mine")
    assert adapter.read_pairs(path) == adapter.read_pairs(path, "mine") and len(adapter.read_pairs(path)) == 24
    with pytest.raises(InputError, match="no rows of 'other'; it holds mine"):
        adapter.read_pairs(path, "other")
    path.write_text("\ufeff" + path.read_text() + json.dumps({**json.loads(path.read_text().split("\n")[0]), "src": "b",
                                                             "question": "one\u2028line"}, ensure_ascii=False))
    with pytest.raises(InputError, match="holds b, mine; name one of these"):
        adapter.read_pairs(path)
    assert adapter.read_pairs(path, "b")[0]["question"] == "one\u2028line"
    for nothing, words in (("", "wanted recorded pairs"), ("\n", "no recorded pairs")):
        path.write_text(nothing)
        with pytest.raises(InputError, match=words):
            adapter.read_pairs(path)


def test_answers_of_one_id_and_silent_drafters_are_trained_on_and_judged(tmp_path, capsys):
    rows = [{**row, "target": [5], "drafter": []} for row in rows_of()]
    path, sizes = write_pairs(tmp_path / "pairs.jsonl", rows), [f"--{n}={v}" for n, v in SMALL.items() if n != "rows"]
    given, out = [str(path), "--test", "1", "--valid", "1"], str(tmp_path / "out")
    assert adapter.main(["train", *given, "--out", out, "--epochs", "1", *sizes]) == 0
    assert adapter.main(["evaluate", given[0], out, *given[1:]]) == 0
    assert "previous" in capsys.readouterr().out


def test_controls_of_an_adapter_are_those_counted_by_hand():
    train = [{"question": "q", "target": t} for t in ([1, 2, 3], [1, 2, 4], [1, 5, 4])]
    found = adapter.beside(train, [{"question": "q", "target": [1, 2, 4, 9], "previous": [1, 2, 4]},
                                   {"question": "q", "target": [1, 5, 4], "previous": []}])
    assert found["position frequency"] == {"position": 100 * 3 / 5, "prefix": (2 + 0) / 2}
    assert found["most frequent"] == {"position": 100 * 1 / 5, "prefix": (1 + 0) / 2}      # 2, then 3 before 4
    assert found["previous"] == {"position": 100 * 2 / 5, "prefix": (2 + 0) / 2}


def test_an_adapter_of_whole_numbers_is_refused(tmp_path):
    config = AdapterConfig(**SMALL)
    adapter.save(tmp_path, TokenAdapter(config).to(torch.float64), config)
    assert next(adapter.load(tmp_path)[0].parameters()).dtype == torch.float32
    save_file({name: value.to(torch.int8) for name, value in TokenAdapter(config).state_dict().items()},
                      tmp_path / adapter.WEIGHTS)
    with pytest.raises(InputError, match="holds no floating point numbers"):
        adapter.load(tmp_path)


def test_a_disk_that_fails_between_header_and_weights_is_one_line(tmp_path, monkeypatch):
    config = AdapterConfig(**SMALL)
    adapter.save(tmp_path, TokenAdapter(config), config)

    def fails(*_, **__):
        raise adapter.SafetensorError("Error while deserializing: input/output error")
    monkeypatch.setattr(adapter, "load_file", fails)
    with pytest.raises(InputError, match="adapter.safetensors: cannot be read .*; check the disk"):
        adapter.load(tmp_path)
