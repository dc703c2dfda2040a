"""swiglu: silu of the first half, rounded, times the second."""

import pytest
import torch
from compare import assert_no_worse

from kernels.swiglu import swiglu, swiglu_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
                         ids=str)
@pytest.mark.parametrize("S, F", [(1, 64), (3, 1100)])
def test_no_further_from_the_truth_than_twice_plain_torch(S, F, dtype, device, nan_empty):
    gate_up_SE = (3 * torch.randn(S, 2 * F, device=device)).to(dtype)
    assert_no_worse(swiglu(gate_up_SE), swiglu_ref(gate_up_SE), swiglu_ref(gate_up_SE.double()).float())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")     # the interpreter's numpy; exp(1e4) is inf
def test_large_gates_stay_finite(device):
    gate_up_SE = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 2.0, 2.0]], device=device)
    torch.testing.assert_close(swiglu(gate_up_SE), swiglu_ref(gate_up_SE))
