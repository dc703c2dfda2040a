"""early: the kernels that ask for their bytes before the one ahead has ended have the bits of the patient ones."""

import math

import pytest
import torch
from compare import assert_no_worse, differing

from kernels.attention import SplitWork, step_attention, takes_attention
from kernels.early import ROOM, product_config
from kernels.rmsnorm import row_sums
from kernels.skinny import Workspace, skinny, skinny_ref, takes_product
from tests.test_attention import step_case
from tests.test_skinny import case, widened

HOPPER, PLAIN = (Workspace("cpu", 4096, 32, 128, 64, pdl=pdl, late=pdl) for pdl in (True, False))


@pytest.mark.parametrize("S, D, dtype, residual, work, taken", [
    (1, 4096, torch.bfloat16, False, HOPPER, True), (8, 4096, torch.float16, True, HOPPER, True),
    (16, 4096, torch.bfloat16, False, HOPPER, True), (17, 4096, torch.bfloat16, False, HOPPER, False),
    (1, 4096, torch.float32, False, HOPPER, False),
    (1, 4096, torch.bfloat16, False, PLAIN, False), (1, 4096, torch.bfloat16, False, None, False),
    (1, 2176, torch.bfloat16, False, HOPPER, True), (1, 2176, torch.bfloat16, True, HOPPER, False),
    (1, 1024, torch.bfloat16, False, HOPPER, False)])
def test_which_products_go_there(S, D, dtype, residual, work, taken, monkeypatch):
    monkeypatch.setattr("kernels.skinny.INTERPRETED", False)
    x_SD = torch.empty(S, D, dtype=dtype, device="meta")
    assert takes_product(x_SD, x_SD if residual else None, work) == taken


@pytest.mark.parametrize("S, K, dtype, device, taken", [
    (16, 128, torch.bfloat16, "meta", True), (17, 128, torch.bfloat16, "meta", False),
    (1, 64, torch.float16, "meta", True), (1, 96, torch.bfloat16, "meta", False),
    (1, 128, torch.float32, "meta", False), (1, 128, torch.bfloat16, "cpu", False)])
def test_which_attention_goes_there(S, K, dtype, device, taken, monkeypatch):
    monkeypatch.setattr("kernels.attention.INTERPRETED", False)
    assert takes_attention(torch.empty(S, 3 * K, dtype=dtype, device=device), K) == taken


@pytest.mark.parametrize("O, D, residual, gated", [(12288, 4096, False, False), (4096, 4096, True, False),
                                                   (22016, 4096, False, True), (4096, 11008, True, False),
                                                   (32064, 4096, False, False)])
def test_the_programs_of_a_processor_fit_beside_the_next_kernels(O, D, residual, gated):
    for S, room in ((1, ROOM), (8, ROOM), (9, 215_000), (16, 215_000)):
        config = product_config(S, O, D, residual, gated, torch.device("cpu"))
        beside = math.ceil(math.ceil(O / config["BLOCK_O"]) / 132)
        filled = beside * config["STAGES"] * (config["BLOCK_O"] + config["BLOCK_S"]) * config["SLICES"] * 256
        assert filled <= room and 2 <= config["STAGES"] <= 6 and S <= config["BLOCK_S"]
        assert 1 <= config["LATE"] <= D // (config["SLICES"] * 128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fold, O, D", [("norm", 12288, 4096), ("residual", 4096, 4096), ("norm gated", 22016, 4096),
                                        ("residual", 4096, 11008), ("norm", 32064, 4096), ("norm", 1000, 2048)])
def test_a_product_has_the_patient_ones_bits_and_sums(fold, O, D, dtype, device, nan_empty):
    for S in (1, 2, 5, 8, 9, 16):
        x_SD, w_OD, folded = case(fold, S, D, O, dtype, device)
        works = [Workspace(device, O if fold == "residual" else D, 1, 16, 16, pdl=pdl) for pdl in (None, False)]
        ours, patient = [], []
        for work, out in zip(works, (ours, patient), strict=True):
            if "norm" in folded:
                row_sums(x_SD, work)
            work.sums_ST[S:] = float("nan")                  # of rows that nobody has
            out += [skinny(x_SD, w_OD, work, **folded), work.sums_ST[:S]]
        assert takes_product(x_SD, folded.get("residual"), works[0])
        assert differing(ours[0], patient[0]) == differing(ours[1], patient[1]) == 0, f"{S} rows"
        truth = skinny_ref(x_SD.double(), w_OD.double(), **{k: widened(v) for k, v in folded.items()}).float()
        assert_no_worse(ours[0], skinny_ref(x_SD, w_OD, **folded), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("H, N, K, dtype", [(32, 32, 128, torch.bfloat16), (8, 2, 128, torch.float16),
                                            (4, 4, 64, torch.bfloat16), (2, 1, 256, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("first", [0, 1, 63, 250, 300, 319, 320, 700, 2111])
def test_a_steps_attention_has_the_bits_of_one_of_32_rows(first, H, N, K, dtype, device, nan_empty):
    for S in (1, 2, 7, 8, 9, 16):
        rows, M = 32, 2304
        qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK = step_case(rows, first, H, N, M, K, dtype, device)
        k_NMK[:, first:] = v_NMK[:, first:] = float("nan")   # what a step must write before it reads
        wide = [k_NMK.clone(), v_NMK.clone()]
        work = SplitWork(device, H, K, M, pdl=True)
        theirs = step_attention(qkv_SE, *wide, pos_ids_S, cos_MK, sin_MK, work)[:S]
        assert takes_attention(qkv_SE[:S], K) and not takes_attention(qkv_SE, K)
        ours = step_attention(qkv_SE[:S], k_NMK, v_NMK, pos_ids_S[:S], cos_MK, sin_MK, work)
        assert differing(ours, theirs) == 0, f"{S} rows"
        for mine, its in zip((k_NMK, v_NMK), wide, strict=True):
            assert differing(mine[:, :first + S], its[:, :first + S]) == 0, f"{S} rows"
