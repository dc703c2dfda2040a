"""rmsnorm: rounded before the weight, alone and after a residual sum."""

import pytest
import torch
from compare import assert_no_worse, differing

from kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref

FLOATS = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("S, D", [(1, 64), (5, 100), (3, 1500)])
def test_no_further_from_the_truth_than_twice_plain_torch(S, D, dtype, device, nan_empty):
    x_SD, w_D = torch.randn(S, D, device=device).to(dtype), torch.randn(D, device=device).to(dtype)
    truth = rmsnorm_ref(x_SD.double(), w_D.double(), 1e-5).float()
    assert_no_worse(rmsnorm(x_SD, w_D), rmsnorm_ref(x_SD, w_D, 1e-5), truth)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sum_is_rounded_and_then_normalised(dtype, device, nan_empty):
    x_SD, residual_SD, w_D = (torch.randn(*shape, device=device).to(dtype) for shape in ((4, 100), (4, 100), (100,)))
    y_SD, sum_SD = add_rmsnorm(x_SD, residual_SD, w_D)
    y_ref, sum_ref = add_rmsnorm_ref(x_SD, residual_SD, w_D, 1e-5)
    assert differing(sum_SD, sum_ref) == 0
    assert_no_worse(y_SD, y_ref, rmsnorm_ref(sum_ref.double(), w_D.double(), 1e-5).float())


def test_rounds_before_the_weight(device):
    """What the order decides: the two orders fall apart in a good part of the elements."""
    x_SD, w_D = torch.randn(8, 512, device=device).half(), torch.randn(512, device=device).half()
    one_rounding = rmsnorm_ref(x_SD.float(), w_D.float(), 1e-5).half()
    ours = differing(rmsnorm(x_SD, w_D), rmsnorm_ref(x_SD, w_D, 1e-5))
    assert ours <= 4 < differing(rmsnorm(x_SD, w_D), one_rounding)       # 4: rsqrt may differ by an ulp


def test_rows_may_be_a_slice_of_something_wider(device):
    wide_SD, w_D = torch.randn(6, 96, device=device), torch.randn(64, device=device)
    torch.testing.assert_close(rmsnorm(wide_SD[:, :64], w_D), rmsnorm_ref(wide_SD[:, :64], w_D, 1e-5))


@pytest.mark.gpu
def test_bf16_at_7b_shapes_is_no_further_than_twice_plain_torch(device, nan_empty):
    x_SD, w_D = torch.randn(2076, 4096, device=device).bfloat16(), torch.randn(4096, device=device).bfloat16()
    truth = rmsnorm_ref(x_SD.double(), w_D.double(), 1e-5).float()
    assert_no_worse(rmsnorm(x_SD, w_D), rmsnorm_ref(x_SD, w_D, 1e-5), truth)
