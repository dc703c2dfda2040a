"""fp8: rows and weights in e4m3 lose what three mantissa bits must lose, and nothing to saturation."""

import pytest
import torch

from kernels.fp8 import E4M3, fixed_scale, norm8, norm8_ref, product8, rows8, rows8_ref, weight8
from kernels.rmsnorm import rmsnorm_ref
from kernels.swiglu import swiglu_ref

FLOATS = [torch.float32, torch.float16]
STEP = 2 ** -4                                               # half the distance of two e4m3 numbers, relative


def steps_apart(a8, b8):
    """The most e4m3 numbers between two of the same sign."""
    a, b = (x.view(torch.int8).to(torch.int32) for x in (a8, b8))
    return int((a - b).abs().max())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("S, D", [(1, 64), (5, 96), (3, 1280)])
@pytest.mark.parametrize("add, scaled", [(False, False), (True, False), (True, True)])
def test_norm8_is_its_definition(S, D, add, scaled, dtype, device, nan_empty):
    hidden, fresh = (torch.randn(S, D, device=device).to(dtype) for _ in range(2))
    scale_S = torch.rand(S, device=device) if scaled else None
    ours, kept = norm8(hidden, 1e-5, fresh if add else None, scale_S)
    ref, ref_kept = norm8_ref(hidden, 1e-5, fresh if add else None, scale_S)
    assert ours.dtype == E4M3 and torch.equal(kept, ref_kept)
    assert steps_apart(ours, ref) <= 1 and (ours.float() != ref.float()).float().mean() < 0.01
    truth = rmsnorm_ref(ref_kept.double(), torch.ones(D, device=device).double(), 1e-5)
    off = (ours.double() / fixed_scale(D) - truth).abs()
    assert bool((off <= 1.01 * STEP * truth.abs() + 2 ** -10 / fixed_scale(D)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("S, D", [(1, 64), (5, 96), (3, 1280)])
def test_rows8_is_its_definition(S, D, gated, dtype, device, nan_empty):
    x = (torch.randn(S, D * (1 + gated), device=device) * torch.logspace(-3, 2, S, device=device)[:, None]).to(dtype)
    (ours, scale_S), (_, ref_S) = rows8(x, gated), rows8_ref(x, gated)
    assert torch.allclose(scale_S, ref_S, rtol=1e-3, atol=0)     # fp16: silu may round to a neighbour
    truth = (swiglu_ref(x) if gated else x).double()
    off = (ours.double() * scale_S.double()[:, None] - truth).abs()
    assert bool((off <= 1.02 * STEP * truth.abs() + 2 ** -9 * scale_S[:, None]).all())
    assert torch.equal(ours.float().abs().amax(1), torch.full((S,), 448.0, device=device)), "the range is used whole"


def test_nothing_saturates_and_zeros_stay_zero(device):
    one_hot = torch.zeros(2, 256, device=device)
    one_hot[0, 3] = 1e4                                      # all of a row's size in one value: sqrt(D) after the norm
    x8, _ = norm8(one_hot, 1e-5)
    assert x8.float()[0, 3] == 448 and bool(x8.float().isfinite().all()) and bool((x8.float()[1] == 0).all())
    x8, scale_S = rows8(one_hot)
    assert x8.float()[0, 3] * scale_S[0] == pytest.approx(1e4) and bool((x8.float()[1] == 0).all())


@pytest.mark.parametrize("normed", [False, True])
def test_a_product_is_off_by_its_two_roundings(normed, device):
    torch.manual_seed(0)
    x_SD, w_OD, norm_D = torch.randn(24, 512), torch.randn(96, 512) * 0.02, torch.rand(512) + 0.5
    w = weight8(w_OD, norm_D if normed else None)
    assert w.normed == normed and w.nbytes == 96 * 512 + 8
    if normed:
        y, truth = product8(norm8_ref(x_SD, 1e-5)[0], w, torch.float32), rmsnorm_ref(x_SD, norm_D, 1e-5) @ w_OD.T
    else:
        x8, scale_S = rows8_ref(x_SD)
        y, truth = product8(x8, w, torch.float32) * scale_S[:, None], x_SD @ w_OD.T
    off = (y - truth).norm() / truth.norm()
    # A value is off by up to 1/16, evenly over an octave: 0.026 of it on the whole; two operands, sqrt(2) of that.
    assert 0.025 < off < 0.045


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 17, 656])
def test_bf16_at_7b_shapes(S, device, nan_empty):
    hidden, fresh = (torch.randn(S, 4096, device=device).bfloat16() for _ in range(2))
    norm_D, scale_S = torch.rand(4096, device=device).bfloat16() + 0.5, torch.rand(S, device=device)
    w = weight8(torch.randn(12288, 4096, device=device).bfloat16() * 0.02, norm_D)
    x8, kept = norm8(hidden, 1e-5, fresh, scale_S)
    ref, ref_kept = norm8_ref(hidden, 1e-5, fresh, scale_S)
    assert torch.equal(kept, ref_kept) and steps_apart(x8, ref) <= 1
    y = product8(x8, w, torch.bfloat16)
    truth = x8.double() @ w.w8_OD.double().T * w.scale.double()
    assert (y.double() - truth).norm() / truth.norm() < 5e-3     # bf16 rounds to 2^-9
    both = torch.randn(S, 2 * 11008, device=device).bfloat16()
    (ours, scale_S), (ref, ref_S) = rows8(both, True), rows8_ref(both, True)
    assert (ours.float() != ref.float()).float().mean() < 1e-3 and torch.allclose(scale_S, ref_S, rtol=1e-2)
