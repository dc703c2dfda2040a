"""skinny: products of 1..32 rows with norm, SwiGLU and residual folded in; a row never feels how many there are."""

import pytest
import torch
from compare import assert_no_worse, differing

from kernels.attention import step_attention
from kernels.rmsnorm import row_sums
from kernels.skinny import MAX_ROWS, Workspace, skinny, skinny_ref

FLOATS = [torch.float32, torch.float16]
FOLDS = ["plain", "norm", "residual", "norm gated"]


def case(fold, S, D, O, dtype, device):
    """(x_SD, w_OD, keywords) of one of the products of a layer."""
    x_SD, w_OD = torch.randn(S, D, device=device).to(dtype), (torch.randn(O, D, device=device) / D ** 0.5).to(dtype)
    folded = {}
    if "norm" in fold:
        folded["norm"] = (torch.rand(D, device=device).to(dtype) + 0.5, 1e-5)
    if "residual" in fold:
        folded["residual"] = torch.randn(S, O, device=device).to(dtype)
    if "gated" in fold:
        folded["gated"] = True
    return x_SD, w_OD, folded


def widened(x):
    if torch.is_tensor(x):
        return x.double()
    return tuple(widened(part) for part in x) if isinstance(x, tuple) else x


def rows_of(folded, rows):
    return {key: value[rows] if key == "residual" else value for key, value in folded.items()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("S, D, O", [(1, 200, 140), (6, 520, 66), (17, 128, 64), (32, 40, 30)])
def test_no_further_from_the_truth_than_twice_plain_torch(S, D, O, fold, dtype, device, nan_empty):
    torch.manual_seed(D)
    x_SD, w_OD, folded = case(fold, S, D, O, dtype, device)
    truth = skinny_ref(x_SD.double(), w_OD.double(), **{k: widened(v) for k, v in folded.items()}).float()
    plain = skinny_ref(x_SD, w_OD, **folded)
    # An ulp of fp16 at 4: rounding twice on the way, ours and plain may fall on different sides of the same tie.
    assert_no_worse(skinny(x_SD, w_OD, **folded), plain, truth, floor=1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("D, dtype", [
    (64, torch.float32), (192, torch.float32), (264, torch.float16),
    *(pytest.param(D, torch.bfloat16, marks=pytest.mark.gpu) for D in (64, 192, 264))], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
def test_row_bits_ignore_how_many_rows_there_are(D, fold, dtype, device):
    x_SD, w_OD, folded = case(fold, MAX_ROWS, D, 96, dtype, device)
    work = Workspace(device, 96 if fold == "residual" else D, 1, 16, 16)
    if "norm" in fold:
        row_sums(x_SD, work)                                 # of every row: a row's do not depend on the others
    together = skinny(x_SD, w_OD, work, **folded)
    for S in (1, 2, 7, 15, 16, 17, 31):
        few = skinny(x_SD[:S].contiguous(), w_OD, work, **rows_of(folded, slice(0, S)))
        assert differing(few, together[:S]) == 0, f"{S} rows"
    if "norm" in fold:
        row_sums(x_SD[-1:], work)
    last = skinny(x_SD[-1:].contiguous(), w_OD, work, **rows_of(folded, slice(-1, None)))
    assert differing(last, together[-1:]) == 0, "row 31 alone"


def test_the_sums_that_a_norm_reads_ignore_how_many_rows_there_are(device):
    x_SD, w_OD, folded = case("residual", MAX_ROWS, 64, 96, torch.float16, device)
    work = Workspace(device, 96, 1, 16, 16)
    skinny(x_SD, w_OD, work, **folded)
    whole = work.sums_ST.clone()
    for S in (1, 16, 17):
        skinny(x_SD[:S], w_OD, work, **rows_of(folded, slice(0, S)))
        assert differing(work.sums_ST[:S], whole[:S]) == 0


def test_the_fixed_order_of_addition_is_what_keeps_the_bits(device):
    """The inverse: add the inner columns in another order for one row than for many, as libraries tuned by size do."""
    x_SD, w_OD, _ = case("plain", 16, 1024, 64, torch.float32, device)
    one = skinny(x_SD[:1], w_OD, SLICES=2, BLOCK_O=32)
    assert differing(one, skinny(x_SD, w_OD)[:1]) > 0


@pytest.mark.parametrize("fold", FOLDS)
def test_a_row_does_not_feel_what_its_neighbours_hold(fold, device):
    x_SD, w_OD, folded = case(fold, 5, 96, 64, torch.float32, device)
    clean = skinny(x_SD, w_OD, **folded)
    x_SD[3] = float("nan")
    poisoned = skinny(x_SD, w_OD, **folded)
    others = [0, 1, 2, 4]
    assert differing(clean[others], poisoned[others]) == 0 and bool(poisoned[3].isnan().all())


def test_a_norm_reads_the_sums_that_a_residual_or_row_sums_left(device):
    work = Workspace(device, 64, 1, 16, 16)
    x_SD, w_OD, folded = case("residual", 4, 64, 64, torch.float32, device)
    hidden_SD = skinny(x_SD, w_OD, work, **folded)
    norm = (torch.ones(64, device=device), 1e-5)
    torch.testing.assert_close(skinny(hidden_SD, w_OD, work, norm=norm), skinny_ref(hidden_SD, w_OD, norm=norm))
    other_SD = 100 * torch.randn(4, 64, device=device)
    row_sums(other_SD, work)
    torch.testing.assert_close(skinny(other_SD, w_OD, work, norm=norm), skinny_ref(other_SD, w_OD, norm=norm))


def test_a_norm_and_a_residual_together_are_refused(device):
    x_SD, w_OD, folded = case("norm residual", 2, 32, 32, torch.float32, device)
    with pytest.raises(AssertionError, match="norm before and a residual after"):
        skinny(x_SD, w_OD, **folded)


class Layers:
    """Two decoder layers and a head at LLaMA-7B's shapes, random, and the step that runs through them."""
    D, F, H, K, V, M = 4096, 11008, 32, 128, 32064, 4096

    def __init__(self, dtype, device, seed):
        torch.manual_seed(seed)
        D, F, H, K, M = self.D, self.F, self.H, self.K, self.M

        def weight(O, I):
            return (torch.randn(O, I, device=device) * 0.02).to(dtype)
        self.layers = [dict(qkv=weight(3 * D, D), o=weight(D, D), up=weight(2 * F, D), down=weight(D, F),
                            norms=torch.rand(2, D, device=device).to(dtype) + 0.5) for _ in range(2)]
        self.head = weight(self.V, D)
        self.k_LNMK, self.v_LNMK = torch.randn(2, 2, H, M, K, device=device).to(dtype)
        angle_MK = torch.outer(torch.arange(M), 10000.0 ** (-torch.arange(0, K, 2) / K)).repeat(1, 2)
        self.cos_MK, self.sin_MK = angle_MK.cos().to(device, dtype), angle_MK.sin().to(device, dtype)

    def step(self, x_SD, pos_ids_S, k_LNMK, v_LNMK, work):
        for w, k_NMK, v_NMK in zip(self.layers, k_LNMK, v_LNMK, strict=True):
            if w is self.layers[0]:
                row_sums(x_SD, work)
            qkv_SE = skinny(x_SD, w["qkv"], work, norm=(w["norms"][0], 1e-5))
            mixed_SHK = step_attention(qkv_SE, k_NMK, v_NMK, pos_ids_S, self.cos_MK, self.sin_MK, work)
            x_SD = skinny(mixed_SHK.flatten(1), w["o"], work, residual=x_SD)
            up_SF = skinny(x_SD, w["up"], work, norm=(w["norms"][1], 1e-5), gated=True)
            x_SD = skinny(up_SF, w["down"], work, residual=x_SD)
        return skinny(x_SD, self.head, work, norm=(self.layers[0]["norms"][0], 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_verify_of_any_length_has_the_bits_of_single_steps_at_7b_shapes(dtype, seed, device):
    net = Layers(dtype, device, seed)
    work = Workspace(device, net.D, net.H, net.K, net.M)
    for context in (1, 700, 2100, 4000):
        x_SD = torch.randn(MAX_ROWS, net.D, device=device).to(dtype)
        pos_ids_S = context + torch.arange(MAX_ROWS, device=device)
        net.k_LNMK[:, :, context:] = net.v_LNMK[:, :, context:] = 1e4
        k_one, v_one = net.k_LNMK.clone(), net.v_LNMK.clone()
        one = torch.cat([net.step(x_SD[i:i + 1], pos_ids_S[i:i + 1], k_one, v_one, work) for i in range(MAX_ROWS)])
        assert bool(one.isfinite().all())
        for S in range(2, MAX_ROWS + 1):
            k, v = net.k_LNMK.clone(), net.v_LNMK.clone()
            logits_SV, end = net.step(x_SD[:S], pos_ids_S[:S], k, v, work), context + S
            assert differing(logits_SV, one[:S]) == 0, f"logits, context {context}, {S} rows"
            assert differing(k[:, :, :end], k_one[:, :, :end]) == 0, f"keys, context {context}, {S} rows"
            assert differing(v[:, :, :end], v_one[:, :, :end]) == 0, f"values, context {context}, {S} rows"


@pytest.mark.gpu
def test_early_starts_change_no_bit(device):
    """Programmatic dependent launch lets a kernel start before the one ahead has ended; a missing wait shows here."""
    net = Layers(torch.bfloat16, device, 0)
    patient, eager = (Workspace(device, net.D, net.H, net.K, net.M, pdl=pdl) for pdl in (False, None))
    for S in (1, 8, 32):
        x_SD, pos_ids_S = torch.randn(S, net.D, device=device).bfloat16(), 2000 + torch.arange(S, device=device)
        truth = net.step(x_SD, pos_ids_S, net.k_LNMK, net.v_LNMK, patient)
        net.step(x_SD, pos_ids_S, net.k_LNMK, net.v_LNMK, eager)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_SV = net.step(x_SD, pos_ids_S, net.k_LNMK, net.v_LNMK, eager)
        for _ in range(100):
            graph.replay()
            assert differing(logits_SV, truth) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("S", [1, 7, 32])
def test_bf16_at_7b_shapes_is_no_further_than_twice_plain_torch(S, fold, device, nan_empty):
    x_SD, w_OD, folded = case(fold, S, 11008 if fold == "residual" else 4096, 4096, torch.bfloat16, device)
    truth = skinny_ref(x_SD.double(), w_OD.double(), **{k: widened(v) for k, v in folded.items()}).float()
    assert_no_worse(skinny(x_SD, w_OD, **folded), skinny_ref(x_SD, w_OD, **folded), truth)


def test_a_workspace_of_another_width_is_refused(device):
    x_SD, w_OD, folded = case("residual", 2, 64, 96, torch.float32, device)
    with pytest.raises(AssertionError, match="rows of 96, a Workspace for 64"):
        skinny(x_SD, w_OD, Workspace(device, 64, 1, 16, 16), **folded)
    with pytest.raises(AssertionError, match="rows of 64, a Workspace for 96"):
        skinny(x_SD, w_OD, Workspace(device, 96, 1, 16, 16), norm=(x_SD[0], 1e-5))


def test_row_sums_are_the_sums_of_squares(device):
    work, x_SD = Workspace(device, 100, 1, 16, 16), torch.randn(3, 100, device=device)
    row_sums(x_SD, work)
    torch.testing.assert_close(work.sums_ST[:3].sum(1), x_SD.square().sum(1))
