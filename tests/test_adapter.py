"""Adapters: the recorded architecture, the research code's best_model.pt, files that are none."""

import json
import pickle

import pytest
import torch
from common import save_adapter
from safetensors.torch import save_file

from engine import InputError
from weights import adapter
from weights.adapter import AdapterConfig, TokenAdapter
from weights.convert import convert

SMALL = dict(vocab=60, rows=16, width=16, layers=2, heads=2, hidden=24)


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
    save_adapter(tmp_path, TokenAdapter(AdapterConfig(**SMALL)), AdapterConfig(**SMALL))
    config, good = json.loads((tmp_path / "config.json").read_text()), (tmp_path / adapter.WEIGHTS).read_bytes()
    for change in ({"width": 32}, {"kind": "follower"}, {"kind": []}, {"heads": 3}, {"layers": "many"},
                   {"layers": 1_000_000}, {"stray": 1}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError):
            adapter.load(tmp_path)
    with pytest.raises(InputError, match="billion parameters, wanted at most one"):
        AdapterConfig(width=1_048_574, heads=2, layers=9)
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "token", "sees": "drafter"}))  # as it was
    assert adapter.load(tmp_path)[1] == AdapterConfig(**SMALL)
    (tmp_path / adapter.WEIGHTS).write_bytes(good[:len(good) // 2])
    with pytest.raises(InputError, match=adapter.WEIGHTS):
        adapter.load(tmp_path)


def test_an_adapter_of_whole_numbers_is_refused(tmp_path):
    config = AdapterConfig(**SMALL)
    save_adapter(tmp_path, TokenAdapter(config).to(torch.float64), config)
    assert next(adapter.load(tmp_path)[0].parameters()).dtype == torch.float32
    save_file({name: value.to(torch.int8) for name, value in TokenAdapter(config).state_dict().items()},
                      tmp_path / adapter.WEIGHTS)
    with pytest.raises(InputError, match="holds no floating point numbers"):
        adapter.load(tmp_path)


def test_a_disk_that_fails_between_header_and_weights_is_one_line(tmp_path, monkeypatch):
    config = AdapterConfig(**SMALL)
    save_adapter(tmp_path, TokenAdapter(config), config)

    def fails(*_, **__):
        raise adapter.SafetensorError("Error while deserializing: input/output error")
    monkeypatch.setattr(adapter, "load_file", fails)
    with pytest.raises(InputError, match="adapter.safetensors: cannot be read .*; check the disk"):
        adapter.load(tmp_path)
