"""sample: Philox's words, the Gumbel draw and the top-p set of the kernels, against torch and against probability."""

import math

import pytest
import torch
import triton
import triton.language as tl
from compare import differing

from kernels.sample import exponential, philox_ref, sample, sample_ref, sampling_words

FLOATS = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
CRITICAL = dict(zip(range(3, 11), (21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56), strict=True))
# chi-square that 1 in 10,000 exceeds, by degrees of freedom


def state(n_out, device="cpu"):
    return torch.tensor([n_out, 0, 0, 10, -1, 100, 0, 0], device=device)


def chi_square(ids, p_V) -> float:
    """The statistic of drawn ids against their exact probabilities, of which none may be too small for it."""
    assert p_V.sum() == pytest.approx(1, abs=1e-9)
    expected_V, seen_V = len(ids) * p_V, torch.bincount(ids, minlength=len(p_V)).double()
    assert bool((seen_V[p_V == 0] == 0).all()) and expected_V[p_V > 0].min() >= 5
    return float(((seen_V - expected_V) ** 2 / expected_V)[p_V > 0].sum())


def cut_at(top_p: float, p_V):
    """The fewest most likely ids whose mass reaches top_p, and ids alike with the last of them, renormalised."""
    mass, least = 0.0, 1.0
    for p in sorted(p_V.tolist(), reverse=True):
        if mass < top_p:
            least = p
        mass += p
    cut_V = torch.where(p_V >= least, p_V, 0.0)
    return cut_V / cut_V.sum()


@triton.jit
def words_kernel(seed_ptr, high_ptr, low_ptr, draw_ptr, at, V: tl.constexpr):
    col = tl.arange(0, V)
    high, low, _, _ = tl.philox(tl.load(seed_ptr), col, col * 0 + at, col * 0, col * 0)
    tl.store(high_ptr + col, high.to(tl.int64))
    tl.store(low_ptr + col, low.to(tl.int64))
    tl.store(draw_ptr + col, exponential(tl.load(seed_ptr), at, col))


@pytest.mark.parametrize("seed, at, id, want", [
    (0, 0, 0, (0x6627E8D5, 0xE169C58D)),                     # the first two words of Random123's known answers; the
    ((1 << 63) - 1, 40, 575, None)])                         # others need counters that an answer never reaches
def test_words_are_philox_and_equal_on_both_sides(seed, at, id, want, device):
    high, low = philox_ref(seed, torch.tensor([at]), 1024)
    if want:
        assert (int(high[0, id]), int(low[0, id])) == want
    ours = [torch.zeros(1024, dtype=kind, device=device) for kind in (torch.int64, torch.int64, torch.float32)]
    words_kernel[(1,)](torch.tensor([seed], device=device), *ours, at, 1024)
    assert torch.equal(ours[0].cpu(), high[0]) and torch.equal(ours[1].cpu(), low[0])
    assert high.min() >= 0 and high.max() < 1 << 32 and len(set(high[0].tolist())) > 1020
    plain = -torch.log1p(-((high[0].double() + (low[0].double() + 0.5) / 2 ** 32) / 2 ** 32))
    assert bool(((ours[2].cpu().double() - plain).abs() <= 1e-6 * plain + 6e-8 * plain.exp()).all())   # v near 1


def test_words_of_other_counters_and_keys_share_nothing():
    seen = [philox_ref(seed, torch.arange(4), 64)[0].flatten().tolist() for seed in (0, 1, 1 << 32, (1 << 63) - 1)]
    words = [word for of in seen for word in of]
    assert len(set(words)) == len(words) == 1024


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-9])
@pytest.mark.parametrize("S, V", [(1, 7), (2, 9001), (6, 577)])
def test_scores_are_the_definitions_and_the_sets_equal(S, V, top_p, dtype, device, nan_empty):
    logits_SV, words_3 = (3 * torch.randn(S, V)).to(dtype), sampling_words(0.8, top_p, (1 << 40) + V)
    plain_SV = sample_ref(logits_SV, state(5), words_3)
    ours_SV = sample(logits_SV.to(device), state(5, device), words_3.to(device)).cpu()
    assert ours_SV.dtype == torch.float32 and bool((ours_SV.isneginf() == plain_SV.isneginf()).all())
    torch.testing.assert_close(ours_SV, plain_SV, rtol=1e-6, atol=4e-6)
    assert torch.equal(ours_SV.argmax(1), plain_SV.argmax(1))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_row_feels_only_itself_and_its_place_in_the_answer(top_p, device):
    logits_SV, words_3 = (3 * torch.randn(7, 577, device=device)).half(), sampling_words(1.5, top_p, 9).to(device)
    whole_SV = sample(logits_SV, state(4, device), words_3)
    for S in (1, 2, 6):
        assert differing(sample(logits_SV[:S].clone(), state(4, device), words_3), whole_SV[:S]) == 0
    for row in (1, 6):
        alone_1V = sample(logits_SV[row:row + 1].clone(), state(4 + row, device), words_3)
        assert differing(alone_1V[0], whole_SV[row]) == 0
    assert differing(sample(logits_SV, state(5, device), words_3), whole_SV) > 0


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")           # the interpreter's numpy, inf - inf
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_nan_survives_and_infinities_have_their_place(top_p, device):
    inf, nan = float("inf"), float("nan")
    logits_SV = torch.tensor([[0.0, nan, 2.0, 1.0], [0.0, inf, 3.0, inf], [-inf, -inf, 5.0, -inf],
                              [3e38, -3e38, 3e38, 0.0], [-inf, -inf, -inf, -inf], [nan, nan, nan, nan]])
    words_3 = sampling_words(1e-3, top_p, 1)
    for scores in (sample_ref(logits_SV, state(0), words_3),
                   sample(logits_SV.to(device), state(0, device), words_3.to(device)).cpu()):
        assert torch.equal(scores.isnan(), logits_SV.isnan())
        assert not scores[logits_SV.isfinite()].isposinf().any()
        drawn = scores[1:5].argmax(1).tolist()
        assert drawn[0] in (1, 3) and drawn[1] == 2 and drawn[2] in (0, 2)
        assert bool(scores[1, [0, 2]].isneginf().all()) and bool(scores[1:5].amax(1).isfinite().all())


def test_the_largest_of_two_million_draws_keeps_its_digits():
    """Its E is about 5e-7; a uniform of 24 bits knows nothing between 4.8e-7 and 5.4e-7."""
    high, low = philox_ref(0, torch.arange(2000), 1000)
    at, id = divmod(int(high.argmin()), 1000)
    exact = -math.log1p(-(int(high[at, id]) + (int(low[at, id]) + 0.5) / 2 ** 32) / 2 ** 32)
    assert 0 < exact < 3e-6
    score = float(sample_ref(torch.zeros(1, 1000), state(at), sampling_words(1.0, 1.0, 0))[0, id])
    assert score == pytest.approx(-math.log(exact), abs=4e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.75])
def test_draws_follow_the_softmax_cut_at_top_p(temperature, top_p):
    """40,000 draws at as many places, and 40,000 of 500 seeds."""
    logits_V = torch.tensor([2.0, 1.5, 1.4, 1.0, 0.8, 0.5, 0.5, 0.2, -0.1, -0.2, -0.4])
    p_V = (logits_V.double() / temperature).softmax(0)
    if top_p < 1:
        p_V = cut_at(top_p, p_V)
        assert 3 <= int((p_V > 0).sum()) < 11
    n, limit = 40_000, CRITICAL[int((p_V > 0).sum()) - 1]
    ids = sample_ref(logits_V.expand(n, 11), state(0), sampling_words(temperature, top_p, 7)).argmax(1)
    assert chi_square(ids, p_V) < limit
    ids = torch.cat([sample_ref(logits_V.expand(80, 11), state(3), sampling_words(temperature, top_p, seed)).argmax(1)
                     for seed in range(500)])
    assert chi_square(ids, p_V) < limit
    blurred_V = p_V + 0.02 * (p_V > 0).double()
    assert chi_square(ids, blurred_V / blurred_V.sum()) > limit              # so small a difference shows


def test_top_p_is_the_rule_of_transformers():
    """Its sorted cumulative sum written out in float64: the same set, where no two ids are alike."""
    gen = torch.Generator().manual_seed(0)
    for top_p in (0.05, 0.5, 0.9, 0.99):
        logits_SV = 3 * torch.randn(20, 300, generator=gen)
        ordered, order = logits_SV.double().sort(1)
        low_SV = ordered.softmax(1).cumsum(1) <= 1 - top_p
        removed = low_SV.scatter(1, order, low_SV)
        assert torch.equal(sample_ref(logits_SV, state(0), sampling_words(1.0, top_p, 3)).isneginf(), removed)


def test_ids_alike_with_the_crossing_one_stay():
    logits_1V = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]])
    kept = ~sample_ref(logits_1V, state(0), sampling_words(1.0, 0.87, 3)).isneginf()
    assert kept.tolist() == [[True, True, True, True, True, False]]          # 3 and 2 hold 0.81, one 1 more 0.89


@pytest.mark.gpu
def test_bf16_rows_of_a_32064_word_vocabulary_equal_in_any_forward(device):
    logits_SV = (3 * torch.randn(32, 32_064, device=device)).bfloat16()
    for top_p in (1.0, 0.9):
        words_3 = sampling_words(0.7, top_p, 3).to(device)
        whole_SV = sample(logits_SV, state(0, device), words_3)
        plain_SV = sample_ref(logits_SV.cpu(), state(0), words_3.cpu())
        assert torch.equal(whole_SV.argmax(1).cpu(), plain_SV.argmax(1))
        for row in range(32):
            alone_1V = sample(logits_SV[row:row + 1].clone(), state(row, device), words_3)
            assert differing(alone_1V[0], whole_SV[row]) == 0
