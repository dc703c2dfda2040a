"""tower: layer norm, alone and after a residual sum, and quick-GELU with upstream's roundings."""

import pytest
import torch
from compare import assert_no_worse, differing

from kernels.tower import add_layernorm, add_layernorm_ref, layernorm, layernorm_ref, quick_gelu, quick_gelu_ref

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 100), (3, 1500)], ids=str)
def test_norm_no_further_from_the_truth_than_twice_plain_torch(shape, dtype, device, nan_empty):
    x, w_C, b_C = ((3 * torch.randn(*of, device=device) + 1).to(dtype) for of in (shape, shape[-1:], shape[-1:]))
    truth = layernorm_ref(x.double(), w_C.double(), b_C.double(), 1e-5).float()
    assert_no_worse(layernorm(x, w_C, b_C), layernorm_ref(x, w_C, b_C, 1e-5), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_and_then_normalised(dtype, device, nan_empty):
    x, residual, w_C, b_C = (torch.randn(*of, device=device).to(dtype) for of in ((4, 100), (4, 100), (100,), (100,)))
    normed, total = add_layernorm(x, residual, w_C, b_C)
    plain, wanted = add_layernorm_ref(x, residual, w_C, b_C, 1e-5)
    assert differing(total, wanted) == 0
    assert_no_worse(normed, plain, layernorm_ref(wanted.double(), w_C.double(), b_C.double(), 1e-5).float())


def test_a_row_far_from_zero_keeps_its_digits(device):
    """Mean first, then the squares: in one pass the large mean would eat them."""
    x, ones = torch.randn(3, 256, device=device) + 3e4, torch.ones(256, device=device)
    truth = layernorm_ref(x.double(), ones.double(), 0 * ones.double(), 1e-5).float()
    assert_no_worse(layernorm(x, ones, 0 * ones), layernorm_ref(x, ones, 0 * ones, 1e-5), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 1100), (2, 3, 700)], ids=str)
def test_gelu_no_further_from_the_truth_than_twice_plain_torch(shape, dtype, device, nan_empty):
    x = (3 * torch.randn(*shape, device=device)).to(dtype)
    assert_no_worse(quick_gelu(x), quick_gelu_ref(x), quick_gelu_ref(x.double()).float())


def test_gelu_rounds_where_upstream_rounds(device):
    """What the order decides: one rounding at the end differs in a good part of the elements."""
    x = torch.randn(8, 512, device=device).half()
    one_rounding = quick_gelu_ref(x.float()).half()
    assert differing(quick_gelu(x), quick_gelu_ref(x)) <= 4 < differing(quick_gelu(x), one_rounding)   # exp: an ulp


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")     # the interpreter's numpy; exp(1e4) is inf
def test_large_values_stay_finite(device):
    x = torch.tensor([-1e4, 1e4, 0.0, 2.0], device=device)
    torch.testing.assert_close(quick_gelu(x), quick_gelu_ref(x))
