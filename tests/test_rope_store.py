"""rope_store: turns by position with a rounding at every step, and writes just the rows it is told."""

import pytest
import torch
from compare import differing

from kernels.rope_store import rope_store, rope_store_ref


def case(S, H, N, K, M, dtype, device, first=0):
    qkv_SE = torch.randn(S, (H + 2 * N) * K, device=device).to(dtype)
    angle_MK = torch.randn(M, K // 2, device=device).repeat(1, 2)
    cache = torch.full((2, N, M, K), 7.0, dtype=dtype, device=device)
    return qkv_SE, first + torch.arange(S, device=device), angle_MK.cos().to(dtype), angle_MK.sin().to(dtype), *cache


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("S, H, N, K", [(1, 4, 4, 32), (7, 4, 2, 40), (3, 18, 1, 16)])
def test_has_the_bits_of_the_definition(S, H, N, K, dtype, device, nan_empty):
    args = case(S, H, N, K, 50, dtype, device, first=30)
    ref = [a.clone() for a in args]
    assert differing(rope_store(*args), rope_store_ref(*ref)) == 0
    assert differing(args[4], ref[4]) == differing(args[5], ref[5]) == 0


def test_rounds_at_every_step(device):
    """One rounding at the end would change a good part of the elements."""
    args = case(8, 2, 2, 64, 50, torch.float16, device)
    once = rope_store_ref(*(a.float() if a.is_floating_point() else a for a in args)).half()
    assert differing(rope_store(*args), once) > 20


def test_rows_past_the_cache_are_not_written(device):
    args = case(6, 2, 2, 16, 20, torch.float32, device, first=17)
    rope_store(*args)
    for cache_NMK in args[4:]:
        assert bool((cache_NMK[:, :17] == 7).all()) and not bool((cache_NMK[:, 17:] == 7).any())
