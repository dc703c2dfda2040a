"""compare: how far a kernel's result is from the truth, and whether two results have the same bits."""

import torch


def max_err(x, truth):
    """Largest absolute distance from `truth`, taken in its dtype. NaN anywhere gives NaN, which fails every `<=`."""
    return (x.to(truth.dtype) - truth).abs().max().item()


def assert_no_worse(ours, plain, truth, factor=2.0, floor=1e-5, what="result"):
    """Ours may be `factor` times as far from the truth as plain torch in the same dtype. Returns both errors."""
    ours_err, plain_err = max_err(ours, truth), max_err(plain, truth)
    assert ours_err <= factor * plain_err + floor, f"{what}: max err {ours_err:.2e}, plain torch {plain_err:.2e}"
    return ours_err, plain_err


def differing(a, b):
    """How many elements of two tensors differ in their bits. 0 means equal, NaN and signed zero included."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.contiguous().view(ints) != b.contiguous().view(ints)).sum())
