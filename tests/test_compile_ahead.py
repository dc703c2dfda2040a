"""Every kernel, as its wrapper launches it at 7B shapes in bf16, compiles for sm_80, sm_90 and sm_100 without a GPU."""

import subprocess
import sys

from common import ROOT

# Runs in a process of its own, where Triton compiles and does not interpret. Meta tensors carry shapes and no data, so
# the wrappers run as they are; their launches are caught and compiled instead. A program without matrix products is
# lowered once: its PTX of the oldest chip that takes the same is assembled for the newer ones, as PTX promises.
SCRIPT = """
import re
import sys
import torch
from triton import compile
from triton.backends.nvidia.compiler import CUDABackend, sm_arch_from_capability
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

launches = []
JITFunction.run = lambda self, *args, grid, warmup, **options: launches.append((self, args, options))

lowered, stages_of = {}, CUDABackend.add_stages

def add_stages(self, stages, options, language):
    stages_of(self, stages, options, language)
    to_ttgir, to_llvm, to_ptx = (stages[name] for name in ("ttgir", "llir", "ptx"))
    chip, found = ".target " + sm_arch_from_capability(self.target.arch), {}

    def ttgir(src, metadata):
        nonlocal found
        program = re.sub("cuda:[0-9]+", "", str(src))
        if "dot" not in program:
            found = lowered.setdefault((program, *(getattr(options, name) for name in (
                "num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl"))), found)
        return "as before" if found else to_ttgir(src, metadata)

    def ptx(src, metadata):
        if not found:
            found.update(ptx=to_ptx(src, metadata), metadata=dict(metadata))
        metadata.update(found["metadata"] | metadata)
        return re.sub("[.]target sm_[0-9a-z]+", chip, found["ptx"])
    stages["ttgir"], stages["ptx"] = ttgir, ptx
    stages["llir"] = lambda src, metadata: src if found else to_llvm(src, metadata)

CUDABackend.add_stages = add_stages

from kernels.attention import attention, step_attention
from kernels.frames import drawn_at_once
from kernels.lookup import Ring, lookup
from kernels.products import product
from kernels.quant import Packed
from kernels.rmsnorm import add_rmsnorm, rmsnorm, row_sums
from kernels.rope_store import rope_store
from kernels.round import close_draft, close_round, open_round
from kernels.sample import sample
from kernels.skinny import Workspace, skinny
from kernels.swiglu import swiglu
from kernels.tower import add_layernorm, quick_gelu
from kernels.unpack import unpack

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def packed(O, D, bits, normed=False):
    return Packed(meta(O // 16, D // 64, bits // 4, 32, 4, dtype=torch.int32),
                  meta(O // 16, D // 128, 8, 2, dtype=torch.float16), O, bits, 128, normed)

D, F, H, K, V, M = 4096, 11008, 32, 128, 32064, 4096

def launch(S, arch):
    hidden, norm = meta(S, D), (meta(D), 1e-5)
    pos_ids = meta(S, dtype=torch.int64)
    k, v, cos, sin = meta(H, M, K), meta(H, M, K), meta(M, K), meta(M, K)
    if S <= 32:
        work = Workspace("meta", D, H, K, M, pdl=arch >= 90, late=arch == 90)
        state = meta(1000, dtype=torch.int64)
        open_round(state, S - 1, meta(V, D), work.round)
        row_sums(hidden, work)
        step_attention(skinny(hidden, meta(3 * D, D), work, norm=norm), k, v, pos_ids, cos, sin, work)
        hidden = skinny(hidden, meta(D, D), work, residual=hidden)
        skinny(hidden, meta(2 * F, D), work, norm=norm, gated=True)
        skinny(meta(S, F), meta(D, F), work, residual=hidden)
        if S <= 16:
            product(hidden, packed(2 * F, D, 4, True), work, norm=norm, gated=True)
            product(meta(S, F), packed(D, F, 4), work, residual=hidden)
            product(hidden, packed(V, D, 8, True), work, norm=norm)
        logits = meta(S, V)
        close_round(logits, state, work.round)
        scores = sample(logits, state, meta(3, dtype=torch.int64))
        close_round(scores, state, work.round)
        lookup(Ring("meta", pdl=arch >= 90), state)
        if S == 1:
            close_draft(logits, state, work.round)
            close_draft(scores, state, work.round)
    else:
        rmsnorm(hidden, *norm)
        add_rmsnorm(hidden, hidden, *norm)
        attention(rope_store(meta(S, 3 * D), pos_ids, cos, sin, k, v), k, v, pos_ids)
        swiglu(meta(S, 2 * F))
        unpack(packed(2 * F, D, 4), torch.bfloat16, meta(2 * F * D))
        tower = meta(5, 577, 1024)
        add_layernorm(tower, tower.clone(), meta(1024), meta(1024))
        quick_gelu(meta(5, 577, 4096))
        x, y, p = (meta(100_000, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.uint8))
        drawn_at_once(x, y, p, [(480, 640)] * 5)

names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
         torch.int64: "*i64", torch.uint8: "*u8"}
built = {}
for arch, S in (map(int, word.split(":")) for word in sys.argv[1:]):
    launches.clear()
    launch(S, arch)
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
            elif isinstance(value, TensorDescriptor):
                signature[p.name] = f"tensordesc<{names[value.base.dtype][1:]}{list(value.block_shape)}>"
            else:
                signature[p.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and p.name != "S":
                    hints[(i,)] = [["tt.divisibility", 16]]
        key = str((arch, kernel.__name__, signature, constants, hints, options))
        if key not in built:                                 # another number of rows may take the same
            source = GluonASTSource if kernel.is_gluon() else ASTSource
            built[key] = compile(source(kernel, signature, constants, hints), GPUTarget("cuda", arch, 32), options)
        assert len(built[key].asm["cubin"]) > 1000
        print(arch, S, kernel.__name__, built[key].metadata.shared)
"""
STEP = {"open_round_kernel", "row_sums_kernel", "combine_kernel", "close_round_kernel", "top_p_kernel", "scores_kernel",
        "lookup_kernel"}
DRAFTS = {1: {"quant_kernel", "close_draft_kernel"}, **{rows: {"quant_kernel"} for rows in (2, 8, 16)}}
PREFILL = {"rmsnorm_kernel", "rope_store_kernel", "prefill_kernel", "swiglu_kernel", "layernorm_kernel",
           "quick_gelu_kernel", "last_event_kernel", "paint_kernel", "unpack_kernel"}
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}            # bytes of shared memory a program may use
ROWS = {80: (16, 2076), 90: (1, 16, 32, 2076), 100: (16, 2076)}


def test_every_kernel_compiles_and_fits(user_env, tmp_path):
    env = user_env | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
                      "TRITON_DISABLE_LINE_INFO": "1"}       # a sixth of the time, for debuggers alone
    asked = [f"{arch}:{rows}" for arch in ROWS for rows in ROWS[arch]]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *asked], env=env, cwd=ROOT, capture_output=True, text=True)
    built = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"behind {built[-1:]}:\n{done.stderr[-3000:]}"
    for arch in ROWS:
        found = [(int(rows), name, int(shared)) for of, rows, name, shared in built if int(of) == arch]
        for rows in ROWS[arch]:
            wanted = PREFILL
            if rows <= 32:
                early = {"early_attention_kernel" if rows <= 16 else "step_kernel",
                         "early_product_kernel" if rows <= 16 and arch == 90 else "skinny_kernel"}
                wanted = STEP | early | DRAFTS.get(rows, set())
            assert {name for of, name, _ in found if of == rows} == wanted, f"sm_{arch}, {rows} rows"
        assert 0 < max(shared for *_, shared in found) <= SHARED[arch]
