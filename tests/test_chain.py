"""chain: what times the kernels runs the products that a step runs, and counts the bytes that it reads."""

import pytest
import torch

from kernels.chain import FOLDS, ROWS, Chain, agreement
from kernels.quant import packed_bytes


class Small(Chain):
    D, F, H, K, V, M = 64, 128, 4, 16, 96, 40


@pytest.mark.parametrize("kind", ROWS)
def test_a_chain_agrees_steps_and_counts_its_bytes(kind, monkeypatch):
    monkeypatch.setitem(ROWS, kind, (1, 3))
    chain = Small(kind, L=2, dtype=torch.float32, device="cpu")
    work = chain.work()
    assert work.drafts == (kind != "plain")
    assert len(agreement(chain, work)) == len(FOLDS) * len(ROWS[kind])
    logits_SV = chain.step(torch.randn(3, chain.D), 7 + torch.arange(3), work)
    assert logits_SV.shape == (3, chain.V) and bool(logits_SV.isfinite().all())
    D, F, V = chain.D, chain.F, chain.V
    layer = [(3 * D, D), (D, D), (2 * F, D), (D, F)]
    if kind == "plain":
        weights = 4 * (2 * sum(O * I for O, I in layer) + V * D)
    else:
        weights = 2 * sum(packed_bytes(O, I, 4) for O, I in layer) + packed_bytes(V, D, 8)
    assert chain.gigabytes(30) == pytest.approx(1e-9 * (weights + 4 * 2 * 30 * D))
