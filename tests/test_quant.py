"""quant: weights of 8 and 4 bits lose what they may lose, and products with them are as good as with full ones. Without
a GPU the kernel's PTX is run by tests/ptx.py."""

import pytest
import torch
import triton.language as tl
from compare import assert_no_worse, differing

from kernels import quant as module
from kernels.products import product
from kernels.quant import MAX_PACKED_ROWS, dequantise, places, quant, quant_ref, quantise, turned
from kernels.skinny import Workspace, skinny
from tests import ptx
from tests.conftest import HAS_GPU
from tests.test_skinny import FOLDS, case, widened

BITS = [8, 4]
# Of rows in the dtype: an ulp of fp16 at 4 may come of rounding twice on the way.
FLOOR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1e-5}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# S, D, O
SHAPES = [(1, 2112, 32), (1, 2304, 32), (2, 64, 32), (5, 704, 32), (8, 384, 64), (9, 192, 32), (16, 576, 32)]


@pytest.fixture(autouse=True)
def the_kernel_everywhere(monkeypatch):
    if not HAS_GPU:
        monkeypatch.setattr(tl, "inline_asm_elementwise", ptx.inline_asm_elementwise)
        monkeypatch.setattr(module, "by_hand", lambda x_SD: True)


def packed_case(fold, bits, S, D, O, dtype, device):
    x_SD, w_OD, folded = case(fold, S, D, O, dtype, device)
    return x_SD, quantise(w_OD, bits, norm_D=folded["norm"][0] if "norm" in folded else None), folded


def check(x_SD, w, folded, **override):
    truth = quant_ref(x_SD.double(), w, **{k: widened(v) for k, v in folded.items()}).float()
    ours, plain = quant(x_SD, w, **folded, **override), quant_ref(x_SD, w, **folded)
    assert_no_worse(ours, plain, truth, floor=FLOOR[x_SD.dtype])
    return ours


# ---- what is lost


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_moves_by_half_a_step_unless_it_was_clipped(bits, device):
    torch.manual_seed(0)                                     # of 60 seeds: 0.9715 are inside, give or take 0.0012
    w_OD = torch.randn(40, 512, device=device)
    w = quantise(w_OD, bits)
    scale_OG, half = w.scales.float().abs().permute(0, 3, 2, 1).reshape(48, 4)[:40], 1 << bits - 1
    step = scale_OG.repeat_interleave(128, 1)
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
    monkeypatch.setitem(module.RATIOS, 4, (1.0,))
    assert tried < 0.99 * (dequantise(quantise(w_OD, 4)) - w_OD).norm()


@pytest.mark.parametrize("D", [64, 192, 256])
@pytest.mark.parametrize("bits", BITS)
def test_weights_on_the_grid_come_back_exactly(bits, D, device):
    half = 1 << bits - 1
    steps_OD = torch.randint(-half, half, (12, D), device=device)
    steps_OD[:, ::64] = -half                                        # the step that fixes a group's scale
    scale_O1 = 2.0 ** torch.randint(-8, 3, (12, 1), device=device)
    scale_O1[::2] *= -1
    w_OD = steps_OD * scale_O1
    w = quantise(w_OD, bits)
    assert differing(dequantise(w) + 0.0, w_OD + 0.0) == 0           # -0 + 0 is 0
    group = 128 if D == 256 else 64
    nbytes = 16 * D * bits // 8 + 16 * D // group * 2
    assert w.shape == (12, D) and w.nbytes == module.packed_bytes(12, D, bits) == nbytes


@pytest.mark.parametrize("bits", BITS)
def test_every_weight_of_a_tile_has_a_place_of_its_own(bits):
    assert sorted(places(bits).tolist()) == list(range(16 * 64))


@pytest.mark.parametrize("bits", BITS)
def test_a_norms_weight_is_folded_in(bits, device):
    w_OD, norm_D = torch.randn(6, 256, device=device), torch.rand(256, device=device) + 0.5
    w = quantise(w_OD, bits, norm_D=norm_D)
    assert w.normed and differing(dequantise(w), dequantise(quantise(w_OD * norm_D, bits))) == 0
    x_SD = torch.randn(1, 256, device=device)
    with pytest.raises(AssertionError, match="norm False, folded into the weight True"):
        quant(x_SD, w)
    with pytest.raises(AssertionError, match="norm True, folded into the weight False"):
        quant(x_SD, quantise(w_OD, bits), norm=(norm_D, 1e-5))


@pytest.mark.parametrize("D", [5, 96, 256, 576])
def test_turned_twice_is_as_it_was_and_no_length_changes(D, device):
    x_SD = torch.randn(3, D, device=device)
    assert (turned(turned(x_SD)) - x_SD).abs().max() < 1e-5
    assert (turned(x_SD).norm(dim=1) - x_SD.norm(dim=1)).abs().max() < 1e-4


def test_one_column_turns_into_64(device):
    x_SD = torch.zeros(1, 256, device=device, dtype=torch.bfloat16)
    x_SD[0, 70] = 8
    wanted = torch.zeros(256, device=device, dtype=torch.bfloat16)
    wanted[64:128] = 1
    assert torch.equal(turned(x_SD)[0].abs(), wanted)


@pytest.mark.parametrize("bits", BITS)
def test_what_writes_a_turned_stream_and_what_reads_it_cancel(bits, device):
    """More rows than are packed at a time; the error is that of normal weights, see above."""
    torch.manual_seed(0)
    w_OD, norm_D, x_D = torch.randn(1100, 256, device=device), torch.rand(256, device=device) + 0.5, torch.randn(256)
    x_D = x_D.to(device)
    reads = quantise(w_OD, bits, norm_D=norm_D, turn=True)
    writes = quantise(w_OD[:256], bits, turn=True)
    assert reads.normed and not writes.normed
    off = {8: 0.0068, 4: 0.103}[bits]
    for found, meant in ((dequantise(reads) @ turned(x_D[None])[0], w_OD @ (norm_D * x_D)),
                         (turned((dequantise(writes) @ x_D)[None])[0], w_OD[:256] @ x_D)):
        assert 0.5 * off < (found - meant).norm() / meant.norm() < 1.2 * off


def test_a_column_that_sticks_out_costs_less_turned(device):
    """Weights 8 times as large in a column of 64, and the input too: as it is, that column takes steps from the rest of
    its group and is as wrong as they are, times 8."""
    torch.manual_seed(0)
    w_OD, x_SD, ones_D = torch.randn(64, 256), torch.randn(64, 256), torch.ones(256, device=device)
    w_OD[:, 5::64] *= 8
    x_SD[:, 5::64] *= 8
    w_OD, x_SD = w_OD.to(device), x_SD.to(device)
    plain, other = (dequantise(quantise(w_OD, 4, norm_D=ones_D, turn=turn)) for turn in (False, True))
    meant = w_OD @ x_SD.T
    assert (other @ turned(x_SD).T - meant).norm() < 0.3 * (plain @ x_SD.T - meant).norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_zeros_stays_zero(bits, device):
    w_OD = torch.randn(3, 256, device=device)
    w_OD[1, 128:] = 0
    assert bool((dequantise(quantise(w_OD, bits))[1, 128:] == 0).all())


@pytest.mark.parametrize("D", [200, 96])
def test_columns_that_fill_no_whole_blocks_are_refused(D):
    with pytest.raises(module.NotPackable, match=f"{D} inner columns; wants a multiple of 64"):
        quantise(torch.zeros(4, D), 4)


# ---- products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("S, D, O, bits, fold", [
    *((*shape, 4, fold) for shape in SHAPES for fold in ("norm", "residual")),
    *((*shape, 4, "plain") for shape in SHAPES[::3]), *((*shape, 4, "norm gated") for shape in SHAPES[1::2]),
    *((*shape, 8, "norm") for shape in SHAPES[::2]), *((*shape, 8, "residual") for shape in SHAPES[1::2])])
def test_no_further_from_the_truth_than_twice_plain_torch(S, D, O, bits, fold, dtype, device, nan_empty):
    torch.manual_seed(D)
    check(*packed_case(fold, bits, S, D, O, dtype, device))


@pytest.mark.parametrize("fold", ["norm", "residual"])
@pytest.mark.parametrize("S, O", [(1, 14), (3, 70), (12, 30)])
def test_outputs_need_not_fill_their_tiles(S, O, fold, device, nan_empty):
    check(*packed_case(fold, 4, S, 256, O, torch.float16, device))


@pytest.mark.parametrize("tile", [dict(TILES=1), dict(TILES=4), dict(num_warps=1), dict(num_warps=8), dict(AHEAD=1),
                                  dict(AHEAD=3)], ids=str)
@pytest.mark.parametrize("S, fold", [(3, "norm gated"), (16, "residual")])
def test_every_tile_that_is_tuned_over_agrees(S, fold, tile, device, nan_empty):
    tile = dict(TILES=2, num_warps=4, AHEAD=2) | tile
    tile["TILES"] = max(tile["TILES"], 2) if "gated" in fold else tile["TILES"]
    check(*packed_case(fold, 4, S, 640, 64, torch.float16, device), **tile)


@pytest.mark.parametrize("fold", FOLDS)
def test_rows_that_do_not_follow_each_other_in_memory(fold, device, nan_empty):
    x_SD, w, folded = packed_case(fold, 4, 11, 256, 64, torch.float16, device)
    apart_SD = torch.full((11, 704), float("nan"), dtype=torch.float16, device=device)[:, 128:384].copy_(x_SD)
    more = dict(folded)
    if "residual" in folded:
        wide = torch.full((11, 100), float("nan"), dtype=torch.float16, device=device)
        more["residual"] = wide[:, :64].copy_(folded["residual"])
    assert differing(quant(apart_SD, w, **more), quant(x_SD, w, **folded)) == 0


@pytest.mark.parametrize("S", [2, 4, 16])
@pytest.mark.parametrize("fold", FOLDS)
def test_a_row_does_not_feel_what_its_neighbours_hold(fold, S, device):
    x_SD, w, folded = packed_case(fold, 4, S, 128, 32, torch.float16, device)
    clean = quant(x_SD, w, **folded)
    x_SD[1] = float("nan")
    poisoned = quant(x_SD, w, **folded)
    others = [i for i in range(S) if i != 1]
    assert differing(clean[others], poisoned[others]) == 0 and bool(poisoned[1].isnan().all())


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bits, low, high", [(4, -8, 7), (8, -128, 127)])
def test_every_step_of_the_grid_is_met_exactly(bits, low, high, bf16, device):
    """x picks one column at a time, so an answer is one weight."""
    steps_OD = torch.arange(128 * 32, device=device).view(32, 128) * 7 % (high - low + 1) + low
    steps_OD[:, ::32] = low                                          # the step that fixes a group's scale, here 1
    w = quantise(steps_OD.float(), bits)
    for start in range(0, 128, MAX_PACKED_ROWS):
        x_SD = torch.eye(128, device=device, dtype=torch.bfloat16 if bf16 else torch.float16)
        x_SD = x_SD[start:start + MAX_PACKED_ROWS]
        assert bool((quant(x_SD, w) == steps_OD.T[start:start + MAX_PACKED_ROWS]).all())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_words_are_unpacked_exactly(bits, bf16):
    """Every value at every place, beside neighbours of all ones or zeros."""
    kind, per = "bf16" if bf16 else "f16", 32 // bits
    for i in range(per):
        for u in range(1 << bits):
            for rest in (0, 0xffffffff ^ ((1 << bits) - 1) << bits * i):
                words = torch.tensor([rest | u << bits * i]).numpy().astype("uint32")
                code = module.unpacking(bits, bf16, i % 2 * (bits == 4))
                registers = [ptx.halves(x, kind)[0] for x in ptx.run(code, [words, words ^ 0xffffffff], 4)]
                register = i % (per // 2) // (per // 4) * 2
                place, other = i // (per // 2), (1 << bits) - 1 - u
                assert registers[register][place] == u - (1 << bits - 1)
                assert registers[register + 1][place] == other - (1 << bits - 1)


def test_products_are_chosen_by_the_weight(device):
    x_SD, w, folded = packed_case("norm", 8, 3, 128, 48, torch.float16, device)
    assert differing(product(x_SD, w, **folded), quant(x_SD, w, **folded)) == 0
    x_SD, w, folded = case("norm", 3, 128, 48, torch.float16, device)
    assert differing(product(x_SD, w, **folded), skinny(x_SD, w, **folded)) == 0


def test_rows_that_the_kernel_does_not_take_go_through_plain_torch(monkeypatch, device):
    monkeypatch.undo()
    for dtype, wide in ((torch.float32, 128), (torch.float16, 129)):
        x_SD, w, folded = packed_case("norm", 4, 3, 128, 48, dtype, device)
        x_SD = torch.nn.functional.pad(x_SD, (0, wide - 128))[:, :128]
        assert differing(quant(x_SD, w, **folded), quant_ref(x_SD, w, **folded)) == 0


def test_what_does_not_fit_is_refused(device):
    x_SD, w, _ = packed_case("plain", 4, 17, 128, 16, torch.float16, device)
    with pytest.raises(AssertionError, match="17 rows, wanted 1..16"):
        product(x_SD, w)
    with pytest.raises(AssertionError, match=r"weight \(16, 128\) for rows of 256"):
        quant(torch.zeros(4, 256, dtype=torch.float16, device=device), w)
    with pytest.raises(AssertionError, match=r"residual \(4, 20\) beside a result of \(4, 16\)"):
        quant(x_SD[:4], w, residual=torch.zeros(4, 20, device=device))
    with pytest.raises(AssertionError, match="8 gates, wanted a multiple of 16"):
        quant(x_SD[:4], w, gated=True)


# ---- on the card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("S", [1, 2, 3, 8, 9, 16])
def test_two_bytes_at_7b_shapes_are_no_further_than_twice_plain_torch(S, bits, fold, dtype, device, nan_empty):
    x_SD, w, folded = packed_case(fold, bits, S, 11008 if fold == "residual" else 4096, 4096, dtype, device)
    ours = check(x_SD, w, folded)
    assert differing(ours, quant(x_SD, w, **folded)) == 0


@pytest.mark.gpu
def test_large_activations(device):
    """LLaMA-7B's largest activations are a few thousands."""
    x_SD, w, folded = packed_case("plain", 4, 1, 4096, 4096, torch.bfloat16, device)
    x_SD[0, ::97] = 8000.0
    check(x_SD, w, folded)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 3, 16])
def test_early_starts_change_no_bit(S, device):
    """Programmatic dependent launch lets a kernel start before the one ahead has ended; a missing wait shows here."""
    D, F, norm = 4096, 11008, (torch.ones(4096, device=device).bfloat16(), 1e-5)
    up, down = torch.randn(2 * F, D, device=device) / 64, torch.randn(D, F, device=device) / 105
    layers = [(quantise(up, 4, norm_D=norm[0]), quantise(down, 4)) for _ in range(2)]
    x_SD = torch.randn(S, D, device=device).bfloat16()

    def step(work):
        hidden_SD = x_SD
        for up, down in layers:
            up_SF = product(hidden_SD, up, work, norm=norm, gated=True)
            hidden_SD = product(up_SF, down, work, residual=hidden_SD)
        return hidden_SD
    patient, eager = (Workspace(device, D, 32, 128, 64, pdl=pdl) for pdl in (False, None))
    truth = step(patient)
    step(eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden_SD = step(eager)
    for _ in range(100):
        graph.replay()
        assert differing(hidden_SD, truth) == 0
