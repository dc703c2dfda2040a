"""quant: weights of 8 and 4 bits lose what they may lose, and products with them are as good as with full ones."""

import pytest
import torch

from kernels import quant
from kernels.check import assert_no_worse, differing
from kernels.quant import Packed, dequantise, quant_ref, quant_skinny, quantise
from tests.test_skinny import FLOATS, FOLDS, case, widened

BITS = [8, 4]
# Of rows in the dtype: an ulp of fp16 at 4 may come of rounding twice on the way; fp32 adds 1280 products in any order.
FLOOR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1e-5}


def packed_case(fold, bits, S, D, O, dtype, device):
    x_SD, w_OD, folded = case(fold, S, D, O, dtype, device)
    return x_SD, quantise(w_OD, bits, norm_D=folded["norm"][0] if "norm" in folded else None), folded


def check(x_SD, w, folded, **override):
    truth = quant_ref(x_SD.double(), w, **{k: widened(v) for k, v in folded.items()}).float()
    ours, plain = quant_skinny(x_SD, w, **folded, **override), quant_ref(x_SD, w, **folded)
    assert_no_worse(ours, plain, truth, floor=FLOOR[x_SD.dtype])


# ---- what is lost


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_moves_by_half_a_step_unless_it_was_clipped(bits, device):
    torch.manual_seed(0)                                     # of 60 seeds: 0.9715 are inside, give or take 0.0012
    w_OD = torch.randn(40, 512, device=device)
    w = quantise(w_OD, bits)
    step, half = w.scale_OG.float().abs().repeat_interleave(128, 1), 1 << bits - 1
    off, inside = (dequantise(w) - w_OD).abs(), w_OD.abs() <= (half - 1) * step
    assert bool((off[inside] <= 0.5001 * step[inside]).all()) and inside.float().mean() > 0.97
    clipped = (w_OD.abs() - (half - 1) * step)[~inside]              # the last step, or what sticks out beyond it
    assert bool((off[~inside] <= clipped + 1e-3 * step[~inside]).all())


@pytest.mark.parametrize("bits, share", [(8, 0.0068), (4, 0.103)])
def test_normal_weights_lose_this_share_of_their_size(bits, share, device):
    """A uniform error of a step s has size s / sqrt(12); the largest of 128 normal draws is 2.6 on average, so steps
    are 2.6 / 128 and 2.6 / 8, 0.0059 and 0.094 of the weights' size; groups differ, and at 4 bits some are clipped."""
    torch.manual_seed(0)
    w_OD = torch.randn(64, 4096, device=device) * 0.02
    assert (dequantise(quantise(w_OD, bits)) - w_OD).norm() <= share * w_OD.norm()


def test_trying_narrower_scales_loses_less(device, monkeypatch):
    w_OD = torch.randn(64, 1024, device=device)
    tried = (dequantise(quantise(w_OD, 4)) - w_OD).norm()
    monkeypatch.setitem(quant.RATIOS, 4, (1.0,))
    assert tried < 0.99 * (dequantise(quantise(w_OD, 4)) - w_OD).norm()


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", BITS)
def test_weights_on_the_grid_come_back_exactly(bits, group, device):
    half = 1 << bits - 1
    steps_OD = torch.randint(-half, half, (12, 256), device=device)
    steps_OD[:, ::32] = -half                                        # the step that fixes a group's scale
    scale_O1 = 2.0 ** torch.randint(-8, 3, (12, 1), device=device)
    scale_O1[::2] *= -1
    w_OD = steps_OD * scale_O1
    w = quantise(w_OD, bits, group)
    assert differing(dequantise(w) + 0.0, w_OD + 0.0) == 0           # -0 + 0 is 0
    assert w.shape == (12, 256) and w.nbytes == 12 * 256 * bits // 8 + 12 * 256 // group * 2


@pytest.mark.parametrize("bits", BITS)
def test_value_i_of_word_j_is_column_i_times_words_plus_j(bits):
    per = 32 // bits
    for i in range(per):
        words = torch.full((1, 256 // per), -(1 << 31), dtype=torch.int32)      # the top value is half: zero
        for other in range(per - 1):
            words |= 1 << bits * other + bits - 1
        span = 128 // per
        words[0, span + 3] += 1 << bits * i
        w = Packed(words, torch.ones(1, 2).half(), torch.ones(2, 1).half(), bits, 128)
        at = dequantise(w)[0].nonzero().flatten().tolist()
        assert at == [128 + i * span + 3]


@pytest.mark.parametrize("bits", BITS)
def test_a_norms_weight_is_folded_in(bits, device):
    w_OD, norm_D = torch.randn(6, 256, device=device), torch.rand(256, device=device) + 0.5
    w = quantise(w_OD, bits, norm_D=norm_D)
    assert w.normed and differing(dequantise(w), dequantise(quantise(w_OD * norm_D, bits))) == 0
    x_SD = torch.randn(1, 256, device=device)
    with pytest.raises(AssertionError, match="norm False, folded into the weight True"):
        quant_skinny(x_SD, w)
    with pytest.raises(AssertionError, match="norm True, folded into the weight False"):
        quant_skinny(x_SD, quantise(w_OD, bits), norm=(norm_D, 1e-5))


@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_zeros_stays_zero(bits, device):
    w_OD = torch.randn(3, 256, device=device)
    w_OD[1, 128:] = 0
    assert bool((dequantise(quantise(w_OD, bits))[1, 128:] == 0).all())


@pytest.mark.parametrize("D", [200, 96])
def test_columns_that_fill_no_whole_groups_are_refused(D):
    with pytest.raises(ValueError, match=f"{D} inner columns in groups"):
        quantise(torch.zeros(4, D), 4)


# ---- products


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("S, D, O", [(1, 1280, 14), (2, 128, 30), (1, 640, 70), (2, 64, 30)])
def test_no_further_from_the_truth_than_twice_plain_torch(S, D, O, bits, fold, dtype, device, nan_empty):
    torch.manual_seed(D)
    check(*packed_case(fold, bits, S, D, O, dtype, device))


@pytest.mark.parametrize("tile", [dict(BLOCK_O=2), dict(BLOCK_O=8, BLOCK_W=256, num_warps=2), dict(UNROLL=2)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_every_tile_that_is_tuned_over_agrees(bits, tile, device, nan_empty):
    check(*packed_case("norm gated", bits, 1, 1280, 20, torch.float32, device), **tile)


@pytest.mark.parametrize("fold", FOLDS)
def test_a_row_does_not_feel_what_its_neighbour_holds(fold, device):
    x_SD, w, folded = packed_case(fold, 4, 2, 128, 64, torch.float32, device)
    clean = quant_skinny(x_SD, w, **folded)
    x_SD[1] = float("nan")
    poisoned = quant_skinny(x_SD, w, **folded)
    assert differing(clean[0], poisoned[0]) == 0 and bool(poisoned[1].isnan().all())


def test_rows_of_another_width_or_number_are_refused(device):
    _, w, _ = packed_case("plain", 4, 1, 128, 16, torch.float32, device)
    with pytest.raises(AssertionError, match=r"weight \(16, 128\) for rows of 256"):
        quant_skinny(torch.zeros(1, 256, device=device), w)
    with pytest.raises(AssertionError, match="3 rows, wanted 1..2"):
        quant_skinny(torch.zeros(3, 128, device=device), w)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("S", [1, 2])
def test_bf16_at_7b_shapes_is_no_further_than_twice_plain_torch(S, bits, fold, half, device, nan_empty):
    check(*packed_case(fold, bits, S, 11008 if fold == "residual" else 4096, 4096, torch.bfloat16, device),
          HALF=half and bits == 4)


@pytest.mark.gpu
def test_two_at_a_time_bears_large_activations(device):
    """LLaMA-7B's largest activations are a few thousands."""
    x_SD, w, folded = packed_case("plain", 4, 1, 4096, 4096, torch.bfloat16, device)
    x_SD[0, ::97] = 8000.0
    check(x_SD, w, folded, HALF=True)
