"""Every kernel, as its wrapper launches it at 7B shapes in bf16, compiles for sm_80, sm_90 and sm_100 without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs in a process of its own, where Triton compiles and does not interpret. Meta tensors carry shapes and no data, so
# the wrappers run as they are; their launches are caught and compiled instead.
SCRIPT = """
import sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

launches = []
JITFunction.run = lambda self, *args, grid, warmup, **options: launches.append((self, args, options))

from kernels.attention import attention, step_attention
from kernels.fp8 import norm8, rows8
from kernels.frames import drawn_at_once
from kernels.products import product
from kernels.quant import Packed
from kernels.recall import Recall, recall
from kernels.rmsnorm import add_rmsnorm, rmsnorm, row_sums
from kernels.rope_store import rope_store
from kernels.round import close_round, open_round
from kernels.sample import sample
from kernels.skinny import Workspace, skinny
from kernels.swiglu import swiglu
from kernels.tower import add_layernorm, quick_gelu

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def packed(O, D, bits, normed=False):
    return Packed(meta(O // 16, D // 64, bits // 4, 32, 4, dtype=torch.int32),
                  meta(O // 16, D // 128, 8, 2, dtype=torch.float16), O, bits, 128, normed)

arch = int(sys.argv[1])
D, F, H, K, V, M, S = 4096, 11008, 32, 128, 32064, 4096, int(sys.argv[2])
hidden, norm = meta(S, D), (meta(D), 1e-5)
pos_ids = meta(S, dtype=torch.int64)
k, v, cos, sin = meta(H, M, K), meta(H, M, K), meta(M, K), meta(M, K)
if S <= 32:
    work = Workspace("meta", D, H, K, M, pdl=arch >= 90, late=arch == 90)
    state = meta(100, dtype=torch.int64)
    open_round(state, meta(S - 1, dtype=torch.int64), meta(V, D), work.round)
    row_sums(hidden, work)
    step_attention(skinny(hidden, meta(3 * D, D), work, norm=norm), k, v, pos_ids, cos, sin, work)
    hidden = skinny(hidden, meta(D, D), work, residual=hidden)
    skinny(hidden, meta(2 * F, D), work, norm=norm, gated=True)
    skinny(meta(S, F), meta(D, F), work, residual=hidden)
    drafting = Workspace("meta", D, H, K, M, pdl=arch >= 90, late=arch == 90, drafts=True)
    step_attention(meta(S, 3 * D), k, v, pos_ids, cos, sin, drafting)
    if S <= 16:
        product(hidden, packed(2 * F, D, 4, True), work, norm=norm, gated=True)
        product(meta(S, F), packed(D, F, 4), work, residual=hidden)
        product(hidden, packed(V, D, 8, True), work, norm=norm)
    logits = meta(S, V)
    close_round(logits, meta(S - 1, dtype=torch.int64), state, work.round)
    scores = sample(logits, state, meta(3, dtype=torch.int64))
    recall(Recall("meta", pdl=arch >= 90), state, meta(15, dtype=torch.int64))
    close_round(scores, meta(S - 1, dtype=torch.int64), state, work.round)
else:
    rmsnorm(hidden, *norm)
    add_rmsnorm(hidden, hidden, *norm)
    attention(rope_store(meta(S, 3 * D), pos_ids, cos, sin, k, v), k, v, pos_ids)
    swiglu(meta(S, 2 * F))
    tower = meta(5, 577, 1024)
    add_layernorm(tower, tower.clone(), meta(1024), meta(1024))
    quick_gelu(meta(5, 577, 4096))
    x, y, p = (meta(100_000, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.uint8))
    drawn_at_once(x, y, p, [(480, 640)] * 5)
    if arch >= 90:
        norm8(hidden, 1e-5, hidden, meta(S, dtype=torch.float32))
        rows8(hidden)
        rows8(meta(S, 2 * F), gated=True)

names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
         torch.int64: "*i64", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv"}
for kernel, args, options in launches:
    given = dict(zip((p.name for p in kernel.params), args))
    given.update({p.name: options.pop(p.name) for p in kernel.params if p.name in options})
    signature, constants, hints = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = given[p.name]
        if p.is_constexpr:
            signature[p.name], constants[(i,)] = "constexpr", value
        elif torch.is_tensor(value):
            signature[p.name], hints[(i,)] = names[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and p.name != "S":
                hints[(i,)] = [["tt.divisibility", 16]]
    built = compile(ASTSource(kernel, signature, constants, hints), GPUTarget("cuda", arch, 32), options)
    assert len(built.asm["cubin"]) > 1000
    print(kernel.__name__, built.metadata.shared)
"""
STEP = {"open_round_kernel", "row_sums_kernel", "skinny_kernel", "step_kernel", "combine_kernel", "close_round_kernel",
        "top_p_kernel", "scores_kernel", "recall_kernel"}
DRAFTS = {1: {"quant_kernel", "single_kernel"}, **{rows: {"quant_kernel"} for rows in (2, 8, 16)}}
PREFILL = {"rmsnorm_kernel", "rope_store_kernel", "prefill_kernel", "swiglu_kernel", "layernorm_kernel",
           "quick_gelu_kernel", "last_event_kernel", "paint_kernel"}
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}            # bytes of shared memory a program may use


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{(arch, rows): printed lines}; two processes at a time, their compiled files thrown away."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    lines, waiting = {}, [(arch, rows) for arch in SHARED for rows in (1, 16, 2076)]
    waiting += [(90, rows) for rows in (2, 8, 32)]
    while waiting:
        pair = [waiting.pop(0) for _ in range(min(2, len(waiting)))]
        runs = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(arch), str(rows)], env=env, text=True, cwd=ROOT,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for arch, rows in pair]
        for key, run in zip(pair, runs, strict=True):
            out, err = run.communicate()
            assert run.returncode == 0, f"sm_{key[0]}, {key[1]} rows:\n{err[-3000:]}"
            lines[key] = [line.split() for line in out.splitlines()]
    return lines


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("rows, kernels", [(1, STEP), (16, STEP), (2076, PREFILL)])
def test_every_kernel_compiles_and_fits(arch, rows, kernels, built):
    fp8 = {"norm8_kernel", "rows8_kernel"} if kernels == PREFILL and arch >= 90 else set()
    assert {name for name, _ in built[arch, rows]} == kernels | DRAFTS.get(rows, set()) | fp8
    assert max(int(shared) for _, shared in built[arch, rows]) <= SHARED[arch]


@pytest.mark.parametrize("rows", [2, 8, 32])
def test_steps_of_more_rows_compile_and_fit_on_hopper(rows, built):
    assert {name for name, _ in built[90, rows]} == STEP | DRAFTS.get(rows, set())
    assert max(int(shared) for _, shared in built[90, rows]) <= SHARED[90]
