"""quant_rows: steps of 3 to 16 rows with packed weights are as good as with full ones, and leave what skinny leaves."""

import pytest
import torch

from kernels import quant_rows as module
from kernels.attention import columns
from kernels.check import assert_no_worse, differing
from kernels.quant import quant_ref, quant_skinny, quantise
from kernels.quant_rows import MAX_PACKED_ROWS, quant_rows
from kernels.skinny import Workspace, skinny
from tests.test_quant import BITS, FLOOR, packed_case
from tests.test_skinny import FLOATS, FOLDS, rows_of, widened

TILES = [dict(BLOCK_O=outputs, GROUPS=groups)
         for outputs, groups in ((32, 4), (32, 8), (32, 16), (64, 4), (64, 8), (128, 8))]


def check(x_SD, w, folded, work=None, **override):
    truth = quant_ref(x_SD.double(), w, **{k: widened(v) for k, v in folded.items()}).float()
    ours, plain = quant_rows(x_SD, w, work, **folded, **override), quant_ref(x_SD, w, **folded)
    assert_no_worse(ours, plain, truth, floor=FLOOR[x_SD.dtype])
    return ours


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("S, D, O", [(3, 1280, 70), (5, 128, 30), (8, 640, 134), (9, 64, 30), (15, 384, 66),
                                     (16, 1152, 128)])
def test_no_further_from_the_truth_than_twice_plain_torch(S, D, O, bits, fold, dtype, device, nan_empty):
    torch.manual_seed(D)
    check(*packed_case(fold, bits, S, D, O, dtype, device))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_any_size_agree(group, bits, device, nan_empty):
    """4 words a group at the least: fewer than a tensor core's product is long."""
    x_SD, w_OD = torch.randn(7, 384, device=device), torch.randn(40, 384, device=device)
    check(x_SD, quantise(w_OD, bits, group), {})


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("S", [3, 16])
def test_every_tile_that_is_tuned_over_agrees(S, fold, tile, device, nan_empty):
    check(*packed_case(fold, 4, S, 1280, 192, torch.float32, device), BLOCK_S=16, num_warps=tile["GROUPS"], **tile)


@pytest.mark.parametrize("fold", FOLDS)
def test_rows_that_do_not_follow_each_other_in_memory(fold, device, nan_empty):
    wide_SD, w, folded = packed_case(fold, 4, 11, 256, 64, torch.float32, device)
    x_SD = torch.full((11, 700), float("nan"), device=device)[:, 128:384]
    x_SD.copy_(wide_SD)
    if "residual" in folded:
        residual = torch.full((11, 100), float("nan"), device=device)[:, :64]
        folded["residual"] = residual.copy_(folded["residual"])
    assert differing(check(x_SD, w, folded), quant_rows(wide_SD, w, **folded)) == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("S", [3, 8, 9, 16])
def test_columns_that_follow_each_other_make_the_same_bits(S, fold, bits, device, nan_empty):
    """Behind the rows that are there a column holds anything: here NaN."""
    x_SD, w, folded = packed_case(fold, bits, S, 384, 70, torch.float32, device)
    laid_SD = columns(S, 384, x_SD).copy_(x_SD)
    more = folded | {"residual": columns(S, 70, x_SD).copy_(folded["residual"])} if "residual" in folded else folded
    y_SO = quant_rows(laid_SD, w, **more)
    assert differing(y_SO, quant_rows(x_SD, w, **folded)) == 0
    assert y_SO.stride(0) == (1 if "residual" in folded or "gated" in folded else y_SO.shape[1])
    if S > 3:                                                        # fewer rows of the same, as they lie
        check(laid_SD[:3], w, rows_of(more, slice(0, 3)))


@pytest.mark.parametrize("S", [4, 16])
@pytest.mark.parametrize("fold", FOLDS)
def test_a_row_does_not_feel_what_its_neighbours_hold(fold, S, device):
    x_SD, w, folded = packed_case(fold, 4, S, 128, 64, torch.float32, device)
    clean = quant_rows(x_SD, w, **folded)
    x_SD[2] = float("nan")
    poisoned = quant_rows(x_SD, w, **folded)
    others = [i for i in range(S) if i != 2]
    assert differing(clean[others], poisoned[others]) == 0 and bool(poisoned[2].isnan().all())


@pytest.mark.parametrize("bits, low, high", [(4, -8, 7), (8, -128, 127)])
def test_every_step_of_the_grid_is_met_exactly(bits, low, high, device):
    """x picks one column at a time, so an answer is one weight; the interpreter unpacks plainly, a GPU by hand."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float16
    steps_OD = torch.arange(256 * 64, device=device).view(64, 256) * 7 % (high - low + 1) + low
    steps_OD[:, ::32] = low                                          # the step that fixes a group's scale, here 1
    w = quantise(steps_OD.float(), bits)
    for start in range(0, 256, MAX_PACKED_ROWS):
        x_SD = torch.eye(256, device=device, dtype=dtype)[start:start + MAX_PACKED_ROWS]
        assert bool((quant_rows(x_SD, w) == steps_OD.T[start:start + MAX_PACKED_ROWS]).all())


def floats_of(asm, words, bf16):
    """The pair of floats that a line of `unpacking` makes of two words, by the letter of the PTX manual."""
    held = {"$1": words[0], "$2": words[1]}

    def read(name):
        return held[name] if name in held else int(name, 0)

    def pair(bits):
        ints = torch.tensor([bits & 0xffff, bits >> 16], dtype=torch.int32).to(torch.uint16)
        return ints.view(torch.bfloat16 if bf16 else torch.float16).double()
    for line in asm.strip("{}").split(";"):
        name, *operands = line.replace(",", " ").split() or [""]
        out, inputs = operands[0] if operands else "", [] if name in ("", ".reg") else [read(x) for x in operands[1:]]
        if name == "mov.b32":
            held[out] = inputs[0]
        elif name == "shr.u32":
            held[out] = inputs[0] >> inputs[1]
        elif name == "prmt.b32":                             # selects four of the eight bytes of two registers
            both = inputs[0] | inputs[1] << 32
            held[out] = sum((both >> 8 * (inputs[2] >> 4 * i & 7) & 0xff) << 8 * i for i in range(4))
        elif name == "lop3.b32":                             # bit (a, b, c) of a table of 8
            held[out] = sum((inputs[3] >> ((inputs[0] >> i & 1) << 2 | (inputs[1] >> i & 1) << 1 | inputs[2] >> i & 1)
                             & 1) << i for i in range(32))
        elif name.startswith("fma.rn."):
            assert name == ("fma.rn.bf16x2" if bf16 else "fma.rn.f16x2") and out == "$0"
            return (pair(inputs[0]) * pair(inputs[1]) + pair(inputs[2])).tolist()
        else:
            assert name in ("", ".reg"), name


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_words_are_unpacked_by_hand_as_plainly(bits, bf16):
    """Every value at every place, beside two neighbours of all ones or zeros."""
    for i in range(32 // bits):
        asm = module.unpacking(i, bits, bf16)
        for u in range(1 << bits):
            other, around = (1 << bits) - 1 - u, 0xffffffff ^ ((1 << bits) - 1) << bits * i
            for rest in (0, around):
                words = rest | u << bits * i, rest ^ around | other << bits * i
                assert floats_of(asm, words, bf16) == [u - (1 << bits - 1), other - (1 << bits - 1)]


# ---- sums of squares, from a product with a residual to the norm behind it


@pytest.mark.parametrize("O, tile", [(96, {}), (96, dict(BLOCK_O=64, GROUPS=4)), (80, {}),
                                     (80, dict(BLOCK_O=64, GROUPS=8, num_warps=8))], ids=str)
def test_a_product_with_a_residual_leaves_the_sums_that_a_norm_reads(O, tile, device):
    x_SD, w, folded = packed_case("residual", 4, 5, 128, O, torch.float32, device)
    work = Workspace(device, O, 1, 16, 16)
    work.sums_ST.fill_(float("nan"))
    y_SO = quant_rows(x_SD, w, work, **folded, **tile)
    padded = torch.nn.functional.pad(y_SO, (0, -O % 32)).view(5, -1, 32)
    torch.testing.assert_close(work.sums_ST[:5], padded.square().sum(2))
    assert work.sums_of is y_SO and bool(work.sums_ST[5:].isnan().all())


def test_a_norm_uses_the_sums_of_its_own_rows_whatever_ran_between(device):
    """A step of one or two rows neither leaves sums nor touches those of others; its rows are never taken for them."""
    work = Workspace(device, 128, 1, 16, 16)
    x_SD, w, folded = packed_case("residual", 4, 9, 128, 128, torch.float32, device)
    next_w = quantise(torch.randn(64, 128, device=device), 4, norm_D=torch.ones(128, device=device))
    norm = (torch.ones(128, device=device), 1e-5)

    def as_without_sums(hidden_SD, product):
        return differing(product(hidden_SD, next_w, work, norm=norm), product(hidden_SD, next_w, norm=norm)) == 0
    wide_SD = skinny(x_SD, w, work, **folded)
    one_SD = skinny(x_SD[:1], w, work, **rows_of(folded, slice(0, 1)))
    assert work.sums_of is wide_SD
    assert as_without_sums(one_SD, quant_skinny)
    torch.testing.assert_close(skinny(wide_SD, next_w, work, norm=norm), quant_ref(wide_SD, next_w, norm))
    assert work.sums_of is wide_SD
    other_SD = 100 * torch.randn(16, 128, device=device)
    assert as_without_sums(other_SD, quant_rows) and work.sums_of is other_SD
    torch.testing.assert_close(skinny(other_SD, next_w, work, norm=norm), quant_ref(other_SD, next_w, norm))
    assert as_without_sums(wide_SD[:4], quant_rows)                  # a new view, a tensor of its own
    full = torch.randn(64, 128, device=device)                       # and full weights read what packed ones left
    wide_SD = skinny(x_SD, w, work, **folded)
    work.sums_of = rows_SD = wide_SD.contiguous()                    # the same rows, as skinny wants them to lie
    torch.testing.assert_close(skinny(rows_SD, full, work, norm=norm), skinny(rows_SD, full, norm=norm))


# ---- who is let in


@pytest.mark.parametrize("S, mine", [(1, False), (2, False), (3, True), (16, True)])
def test_skinny_hands_over_by_the_number_of_rows(S, mine, device, monkeypatch):
    x_SD, w, folded = packed_case("norm", 4, S, 128, 40, torch.float32, device)
    product = quant_rows if mine else quant_skinny
    assert differing(skinny(x_SD, w, **folded), product(x_SD, w, **folded)) == 0


def test_without_a_gpu_plain_torch_answers(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    x_SD, w, folded = packed_case("norm gated", 4, 6, 128, 40, torch.float32, "cpu")
    assert differing(quant_rows(x_SD, w, **folded), quant_ref(x_SD, w, **folded)) == 0


def test_what_does_not_fit_is_refused(device):
    x_SD, w, _ = packed_case("plain", 4, 17, 128, 16, torch.float32, device)
    with pytest.raises(AssertionError, match="17 rows, wanted 3..16"):
        skinny(x_SD, w)
    with pytest.raises(AssertionError, match=r"weight \(16, 128\) for rows of 256"):
        quant_rows(torch.zeros(4, 256, device=device), w)
    with pytest.raises(AssertionError, match="norm True, folded into the weight False"):
        quant_rows(x_SD[:4], w, norm=(x_SD[0], 1e-5))
    with pytest.raises(AssertionError, match=r"residual \(4, 20\) beside a result of \(4, 16\)"):
        quant_rows(x_SD[:4], w, residual=torch.zeros(4, 20, device=device))
    with pytest.raises(AssertionError, match="rows of 16, a Workspace for 64"):
        quant_rows(x_SD[:4], w, Workspace(device, 64, 1, 16, 16), residual=torch.zeros(4, 16, device=device))
    normed = quantise(torch.randn(128, 128, device=device), 4, norm_D=x_SD[0])
    with pytest.raises(AssertionError, match="norm before and a residual after"):
        quant_rows(x_SD[:4], normed, norm=(x_SD[0], 1e-5), residual=x_SD[:4])


# ---- on the card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("S", [3, 8, 16])
def test_two_bytes_at_7b_shapes_are_no_further_than_twice_plain_torch(S, bits, fold, dtype, device, nan_empty):
    x_SD, w, folded = packed_case(fold, bits, S, 11008 if fold == "residual" else 4096, 4096, dtype, device)
    ours = check(x_SD, w, folded)
    assert differing(ours, quant_rows(x_SD, w, **folded)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("S", [3, 8, 16])
def test_early_starts_change_no_bit(S, device):
    """Programmatic dependent launch lets a kernel start before the one ahead has ended; a missing wait shows here."""
    D, F, norm = 4096, 11008, (torch.ones(4096, device=device).bfloat16(), 1e-5)
    up, down = torch.randn(2 * F, D, device=device) / 64, torch.randn(D, F, device=device) / 105
    layers = [(quantise(up, 4, norm_D=norm[0]), quantise(down, 4)) for _ in range(2)]
    x_SD = torch.randn(S, D, device=device).bfloat16()

    def step(work):
        hidden_SD = x_SD
        for up, down in layers:
            hidden_SD = skinny(skinny(hidden_SD, up, work, norm=norm, gated=True), down, work, residual=hidden_SD)
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
