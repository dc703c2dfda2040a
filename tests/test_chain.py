"""chain: what times the kernels runs the products that a step runs, and counts the bytes that it reads."""

import chain as module
import pytest
import torch
from chain import ROWS, Chain

from kernels.quant import packed_bytes


class Small(Chain):
    D, F, H, K, V, M = 64, 128, 4, 16, 96, 40


@pytest.mark.parametrize("kind", ROWS)
def test_a_chain_steps_and_counts_its_bytes(kind):
    chain = Small(kind, L=2, dtype=torch.float32, device="cpu")
    work = chain.work()
    logits_SV = chain.step(torch.randn(3, chain.D), 7 + torch.arange(3), work)
    assert logits_SV.shape == (3, chain.V) and bool(logits_SV.isfinite().all())
    D, F, V = chain.D, chain.F, chain.V
    layer = [(3 * D, D), (D, D), (2 * F, D), (D, F)]
    if kind == "plain":
        weights = 4 * (2 * sum(O * I for O, I in layer) + V * D)
    else:
        weights = 2 * sum(packed_bytes(O, I, 4) for O, I in layer) + packed_bytes(V, D, 8)
    assert chain.gigabytes(30) == pytest.approx(1e-9 * (weights + 4 * 2 * 30 * D))


def test_what_a_kernel_costs_inside_a_step_is_the_step_less_one_without_it(monkeypatch, capsys):
    chain = Small("plain", L=2, dtype=torch.float32, device="cpu")
    seconds = {"": 1.0, "qkv": 0.7, "o": 0.9, "gate_up": 0.4, "down": 0.8, "attention": 0.95}
    monkeypatch.setattr(module, "step_ms", lambda *args, without="": seconds[without])
    rows = {name: of for name, *of in module.inside(chain, chain.work(), 2.0, context=30)}
    D, F, edge = chain.D, chain.F, module.EDGE_US["plain"]
    wanted = dict(qkv=3 * D * D, o=D * D, gate_up=2 * F * D, down=D * F, attention=2 * 30 * D)
    for name, numbers in wanted.items():
        bytes_us = 1e-6 * 4 * numbers / 2.0 if name != "attention" else 4e-6 * 30 * D / 2.0
        kernels = 2 if name == "attention" else 1
        assert rows[name] == pytest.approx([bytes_us, bytes_us + kernels * edge, 1e3 * (1 - seconds[name]) / 2])
    assert rows["whole step"][0] == pytest.approx(1e3 * chain.gigabytes(30) / 2.0)
    head = 1e-6 * 4 * chain.V * D / 2.0
    layers = sum(of[1] for name, of in rows.items() if name != "whole step")
    assert rows["whole step"][1] == pytest.approx(2 * layers + head + edge) and rows["whole step"][2] == 1000.0
    left_out = [chain.step(torch.ones(1, D), 7 + torch.arange(1), chain.work(), without=name) for name in seconds]
    assert all(a.shape == left_out[0].shape for a in left_out)
    assert all(not torch.equal(a, left_out[0]) for a in left_out[1:])


