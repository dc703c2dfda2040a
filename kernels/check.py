"""check: what kernels ask of the machine, and what bench.py and the commands that time kernels measure of it. Ceilings
are measured on the card at hand, never quoted: a read-only stream of 4 GB, and a bf16 product of 8192^3."""

import functools
import os
import timeit

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # Triton runs on CPU tensors, slowly; bf16 is wrong there


@functools.cache
def stages_that_fit(wanted, stage_bytes, device):
    """Depth of a software pipeline, at most `wanted`, whose buffers leave 16 KiB of a program's shared memory for the
    rest. A device that is no GPU counts as an H100."""
    gpu = torch.device(device).type == "cuda"
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin if gpu else 232_448
    return max(1, min(wanted, (room - 16_384) // stage_bytes))


def quantiles(values):
    """(p20, p50, p80) of a list."""
    values = sorted(values)
    return tuple(values[min(len(values) - 1, int(len(values) * q))] for q in (0.2, 0.5, 0.8))


def time_ms(fn, runs=20, warm=3):
    """(p20, p50, p80) milliseconds of one call of fn."""
    for _ in range(warm):
        fn()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return quantiles([begin.elapsed_time(end) for begin, end in events])


def read_tbps(gigabytes=4):
    """TB/s of a read-only stream through torch's own reduction, best of ten."""
    x = torch.empty(gigabytes << 28, dtype=torch.float32, device="cuda").normal_()
    times = [time_ms(x.sum, runs=5)[0] for _ in range(2)]
    return x.numel() * 4 / min(times) / 1e9


def gemm_tflops(n=8192, dtype=torch.bfloat16):
    """TFLOP/s of cuBLAS on a square product of random data."""
    a, b = (torch.randn(n, n, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * n ** 3 / time_ms(lambda: a @ b, runs=10)[1] / 1e9


def ceilings(device):
    """{"read_bw": bytes/s, "gemm_flops": FLOP/s} of this machine, now."""
    if device.type == "cuda":
        return {"read_bw": read_tbps() * 1e12, "gemm_flops": gemm_tflops() * 1e12}
    x, a = torch.randn(1 << 25), torch.randn(1024, 1024)
    read, product = (min(timeit.repeat(fn, number=1)) for fn in (x.sum, lambda: a @ a))
    return {"read_bw": x.nbytes / read, "gemm_flops": 2 * 1024 ** 3 / product}
