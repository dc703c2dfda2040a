"""fp8: y = x @ w.T with x and w in e4m3, for a drafter's prefill; the product is cuBLAS, nearly twice as fast as bf16.

A weight has one scale for the whole tensor. Rows of x come from one of two kernels, one program a row:
norm8: the stream, after what the last block adds to it, divided by its rms. No value can pass sqrt(D) then, so a fixed
scale of 448 / sqrt(D) never saturates and nothing has to be measured; the norm's weight is folded into w.
rows8: any other rows, each by a scale of its own that brings its largest value to 448; GATED, the rows are gate and up
and silu(gate) * up is taken first. cuBLAS's one scale for all rows is then 1, and whoever reads the product multiplies
by the row's scale: norm8 does. (cuBLAS with a scale a row took 9.09 ms for the products below, that with one 6.97.)
Bytes: norm8 7*S*D, rows8 3*S*D, gated 5*S*F, for bf16 rows: 656 rows of LLaMA-7B 18.8, 8.1 and 36.1 MB a layer.
The products of 32 layers and 656 rows, one H100: bf16 12.11 ms, e4m3 6.97 (1,300 TFLOP/s); norms, SwiGLU and rows8 add
1.77 to bf16 and 2.27 to e4m3. Inside requests a prefill of 641 rows takes 7.81 ms where bf16 takes 12.74."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.check import INTERPRETED, self_check
from kernels.rmsnorm import rmsnorm_ref
from kernels.swiglu import silu_times, swiglu_ref

E4M3 = torch.float8_e4m3fn
STORED = torch.float32 if INTERPRETED else E4M3              # Triton's interpreter loses a carry rounding to e4m3
WEIGHT_ROWS = 1024                                           # turned into e4m3 at a time
TOP = tl.constexpr(448.0)                                    # the largest e4m3 number
TINY = tl.constexpr(1e-20)                                   # a row of zeros gets a scale all the same


@dataclass(frozen=True, eq=False)
class Fp8:
    """A weight [O, D] in e4m3, times one scale."""
    w8_OD: torch.Tensor
    scale: torch.Tensor         # fp32, one number; with the norm's 1 / fixed scale, if one is in front
    one: torch.Tensor           # fp32, 1: the rows' scale as cuBLAS is told it
    normed: bool                # the weight of the norm in front is folded in

    @property
    def nbytes(self) -> int:
        return self.w8_OD.nbytes + self.scale.nbytes + self.one.nbytes


def fixed_scale(D: int) -> float:
    return TOP.value / D ** 0.5


def weight8(w_OD, norm_D=None) -> Fp8:
    """norm_D: the weight of an RMSNorm in front, folded in. Rows go WEIGHT_ROWS at a time: in fp32 they take room."""
    def parts():
        return (part.float() if norm_D is None else part.float() * norm_D.float() for part in w_OD.split(WEIGHT_ROWS))
    scale = (torch.stack([part.abs().max() for part in parts()]).max() / TOP.value).clamp(min=TINY.value)
    w8_OD = torch.cat([(part / scale).clamp(-TOP.value, TOP.value).to(E4M3) for part in parts()])
    scale = scale if norm_D is None else scale / fixed_scale(w_OD.shape[1])
    return Fp8(w8_OD, scale, torch.ones_like(scale), norm_D is not None)


def norm8_ref(hidden_SD, eps, fresh_SD=None, scale_S=None):
    if fresh_SD is not None:
        fresh = fresh_SD.float() if scale_S is None else fresh_SD.float() * scale_S[:, None]
        hidden_SD = (hidden_SD.float() + fresh).to(hidden_SD.dtype)
    D = hidden_SD.shape[1]
    return (rmsnorm_ref(hidden_SD.float(), torch.ones_like(hidden_SD[0]).float(), eps) * fixed_scale(D)).to(E4M3), \
        hidden_SD


def rows8_ref(x_SD, gated=False):
    x = (swiglu_ref(x_SD) if gated else x_SD).float()
    scale_S = (x.abs().amax(1) / TOP.value).clamp(min=TINY.value)
    return (x / scale_S[:, None]).clamp(-TOP.value, TOP.value).to(E4M3), scale_S


@triton.jit
def norm8_kernel(hidden_ptr, fresh_ptr, scale_ptr, x8_ptr, sum_ptr, hidden_stride, fresh_stride, eps, fixed,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr):
    """One row; with ADD what the last block made, times its row's scale, is added first, and the sum stored."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    x = tl.load(hidden_ptr + row * hidden_stride + col, mask=inside, other=0.0).to(tl.float32)     # [BLOCK_D]
    if ADD:
        fresh = tl.load(fresh_ptr + row * fresh_stride + col, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            fresh *= tl.load(scale_ptr + row)
        x = (x + fresh).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + col, x, mask=inside)
        x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / D + eps) * fixed
    tl.store(x8_ptr + row * D + col, y.to(x8_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rows8_kernel(x_ptr, x8_ptr, scale_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, GATED: tl.constexpr):
    """One row of D values; GATED, of gates and ups side by side."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)               # [BLOCK_D]
    if GATED:
        up = tl.load(x_ptr + row * x_stride + D + col, mask=inside, other=0.0).to(tl.float32)
        x = silu_times(x, up, x_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)) / TOP, TINY)
    y = tl.minimum(tl.maximum(x / scale, -TOP), TOP)         # rounding may pass 448, and e4m3 has no infinity
    tl.store(x8_ptr + row * D + col, y.to(x8_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


def norm8(hidden_SD, eps, fresh_SD=None, scale_S=None):
    """(rows [S, D] in e4m3 of the normed sum, the sum). The sum is hidden + fresh * scale, rounded to hidden's dtype;
    without fresh it is hidden itself."""
    S, D = hidden_SD.shape
    assert hidden_SD.stride(1) == 1 and (fresh_SD is None or fresh_SD.shape == (S, D) and fresh_SD.stride(1) == 1), \
        f"norm8: rows {tuple(hidden_SD.shape)}, strides {hidden_SD.stride()}"
    if hidden_SD.device.type == "cpu" and not INTERPRETED:
        return norm8_ref(hidden_SD, eps, fresh_SD, scale_S)
    x8_SD = torch.empty((S, D), dtype=STORED, device=hidden_SD.device)
    add, scaled = fresh_SD is not None, scale_S is not None
    sum_SD = torch.empty((S, D), dtype=hidden_SD.dtype, device=hidden_SD.device) if add else hidden_SD
    fresh_SD = fresh_SD if add else hidden_SD
    norm8_kernel[(S,)](hidden_SD, fresh_SD, scale_S if scaled else hidden_SD, x8_SD, sum_SD, hidden_SD.stride(0),
                       fresh_SD.stride(0), eps, fixed_scale(D), D=D, BLOCK_D=triton.next_power_of_2(D), ADD=add,
                       SCALED=scaled, enable_fp_fusion=False, num_warps=8 if D > 1024 else 2)
    return x8_SD.to(E4M3), sum_SD


def rows8(x_SD, gated=False):
    """(rows in e4m3, their scales fp32 [S]) of x [S, D]; gated: of silu(gate) * up, x = [S, 2F]."""
    S, E = x_SD.shape
    assert x_SD.stride(1) == 1 and not (gated and E % 2), f"rows8: {tuple(x_SD.shape)}, strides {x_SD.stride()}"
    if x_SD.device.type == "cpu" and not INTERPRETED:
        return rows8_ref(x_SD, gated)
    D = E // 2 if gated else E
    x8_SD = torch.empty((S, D), dtype=STORED, device=x_SD.device)
    scale_S = torch.empty(S, dtype=torch.float32, device=x_SD.device)
    rows8_kernel[(S,)](x_SD, x8_SD, scale_S, x_SD.stride(0), D=D, BLOCK_D=triton.next_power_of_2(D), GATED=gated,
                       num_warps=8 if D > 1024 else 2)
    return x8_SD.to(E4M3), scale_S


def product8(x8_SD, w: Fp8, dtype):
    """x8 @ w.T, [S, O] in `dtype`: right as it is behind norm8, to be multiplied by the rows' scales behind rows8."""
    if x8_SD.device.type == "cpu":
        return (x8_SD.float() @ w.w8_OD.float().T * w.scale).to(dtype)
    return torch._scaled_mm(x8_SD, w.w8_OD.t(), w.one, w.scale, out_dtype=dtype, use_fast_accum=True)


def main():
    """Agreement with fp64 of the rounded operands, then what a layer's parts take beside bf16."""
    import torch.nn.functional as F

    from kernels.check import max_err, table, time_ms
    from kernels.rmsnorm import add_rmsnorm
    from kernels.swiglu import swiglu

    S, D, rows = 656, 4096, []
    hidden, fresh = (torch.randn(S, D, device="cuda").bfloat16() for _ in range(2))
    both = torch.randn(S, 2 * 11008, device="cuda").bfloat16()
    norm_D, scale_S = torch.rand(D, device="cuda").bfloat16() + 0.5, torch.rand(S, device="cuda")
    for what, ours, ref in (("norm8", norm8(hidden, 1e-5, fresh, scale_S), norm8_ref(hidden, 1e-5, fresh, scale_S)),
                            ("rows8", rows8(hidden), rows8_ref(hidden)),
                            ("rows8, gated", rows8(both, True), rows8_ref(both, True))):
        off = (ours[0].float() != ref[0].float()).float().mean().item()
        assert off < 1e-3, f"{what}: {off:.2%} of the values differ"        # one step of e4m3, at a tie of roundings
        rows.append((what, 100 * off, max_err(ours[1], ref[1])))
    table("kernels against their definitions", ("", "% of values off", "second result off by"), rows)
    rows, sums = [], [0.0, 0.0]
    for name, O, I in (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate_up", 22016, 4096), ("down", 4096, 11008)):
        full = [torch.randn(O, I, device="cuda").bfloat16() * 0.02 for _ in range(8)]
        packed = [weight8(w, norm_D if name in ("qkv", "gate_up") else None) for w in full]
        x = torch.randn(S, I, device="cuda").bfloat16()
        x8, one = (norm8(x, 1e-5)[0], None) if packed[0].normed else rows8(x)
        y = product8(x8, packed[0], torch.bfloat16)
        truth = x8.double() @ packed[0].w8_OD.double().T * packed[0].scale.double()
        err = ((y.double() - truth).norm() / truth.norm()).item()
        assert err < 5e-3, f"{name}: {err:.1e} from fp64"                    # bf16 rounds to 2^-9
        times = [1e3 * time_ms(lambda ws=ws, f=f: [f(w) for w in ws])[1] / 8 for ws, f in
                 ((full, lambda w, x=x: F.linear(x, w)), (packed, lambda w, x8=x8: product8(x8, w, torch.bfloat16)))]
        sums = [a + b for a, b in zip(sums, times, strict=True)]
        rows.append((name, *times, 2e-6 * S * O * I / times[1], err))
    table(f"products of {S} rows", ("", "bf16 us", "e4m3 us", "TFLOP/s", "off fp64"), rows)
    parts = [("norms", 2, lambda: add_rmsnorm(fresh, hidden, norm_D), lambda: norm8(hidden, 1e-5, fresh, scale_S)),
             ("swiglu", 1, lambda: swiglu(both), lambda: rows8(both, True)), ("mixed", 1, None, lambda: rows8(hidden))]
    rows = [(name, *(count * 1e3 * time_ms(f)[1] if f else 0.0 for f in (a, b))) for name, count, a, b in parts]
    rows.append(("products", *sums))
    rows.append(("32 layers, ms", *(32e-3 * sum(row[i] for row in rows) for i in (1, 2))))
    table(f"a layer of {S} rows without attention", ("", "bf16 us", "e4m3 us"), rows)


if __name__ == "__main__":
    self_check(main, __file__)
