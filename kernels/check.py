"""check: what tests, bench.py and the commands that time kernels share: compare, time, ceilings, table.
Ceilings are measured on the card at hand, never quoted: a read-only stream of 4 GB, and a bf16 product of 8192^3."""

import functools
import os
import sys
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


def quantiles(values):
    """(p20, p50, p80) of a list."""
    values = sorted(values)
    return tuple(values[min(len(values) - 1, int(len(values) * q))] for q in (0.2, 0.5, 0.8))


def graph_of(fn, times=1):
    """A CUDA graph of `times` calls of fn, captured after two eager calls that compile what has to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
        fn()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            fn()
    return graph


def time_ms(fn, calls=1, runs=20, warm=3, graph=True):
    """(p20, p50, p80) milliseconds of one call of fn, `calls` of them in each timed run, as one graph replay.

    fn must go round several buffers if its inputs would fit the L2 cache, or the cache is what gets measured."""
    replay = graph_of(fn, calls).replay if graph else (lambda: [fn() for _ in range(calls)])
    for _ in range(warm):
        replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return quantiles([begin.elapsed_time(end) / calls for begin, end in events])


def read_tbps(gigabytes=4):
    """TB/s of a read-only stream through torch's own reduction, best of ten."""
    x = torch.empty(gigabytes << 28, dtype=torch.float32, device="cuda").normal_()
    times = [time_ms(lambda: x.sum(), runs=5, graph=False)[0] for _ in range(2)]
    return x.numel() * 4 / min(times) / 1e9


def gemm_tflops(n=8192, dtype=torch.bfloat16):
    """TFLOP/s of cuBLAS on a square product of random data."""
    a, b = (torch.randn(n, n, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * n ** 3 / time_ms(lambda: a @ b, runs=10, graph=False)[1] / 1e9


def ceilings(device):
    """{"read_bw": bytes/s, "gemm_flops": FLOP/s} of this machine, now."""
    if device.type == "cuda":
        return {"read_bw": read_tbps() * 1e12, "gemm_flops": gemm_tflops() * 1e12}
    x, a = torch.randn(1 << 25), torch.randn(1024, 1024)
    read, product = (min(timeit.repeat(fn, number=1)) for fn in (x.sum, lambda: a @ a))
    return {"read_bw": x.nbytes / read, "gemm_flops": 2 * 1024 ** 3 / product}


def table(title, header, rows):
    """Prints a fixed-width table: one line a row, floats with three figures after the point."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(title)
    for row in cells:
        first, *rest = (c.rjust(w) for c, w in zip(row, widths, strict=True))
        print("  ".join(["  " + first.strip().ljust(widths[0]), *rest]))


def self_check(main, file):
    """Runs a kernel file's `main`; without a GPU, one line that says where its agreement is tested, and exit 2."""
    if not torch.cuda.is_available():
        name = os.path.basename(file)
        print(f"kernels/{name}: no CUDA device to check and time it on; its agreement is tested on the CPU by Triton's "
              f"interpreter: python -m pytest tests/test_{name}", file=sys.stderr)
        sys.exit(2)
    with torch.inference_mode():
        main()
