"""chain: random LLaMA-7B layers and a step through them, for timing: what a kernel costs beside its neighbours shows
only in a chain. `python -m tests.chain [plain|int4]`: each product over all layers, then whole steps beside what
their bytes take at this card's read-only stream. Another launch choice: `step_ms(.., qkv=dict(LATE=4))`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure

import engine
from kernels.attention import step_attention
from kernels.check import read_tbps
from kernels.products import product
from kernels.quant import HEAD_BITS, LAYER_BITS, quantise
from kernels.rmsnorm import row_sums
from kernels.skinny import Workspace

FOLDS = dict(qkv=("norm",), o=("residual",), gate_up=("norm", "gated"), down=("residual",), head=("norm",))
ROWS = dict(plain=(1, 16, 32), int4=(1, 2, 4, 8, 16))
CONTEXTS = dict(plain=(256, 2100, 4000), int4=(700, 2100))
EDGE_US = dict(plain=1.4, int4=2.1)      # microseconds a kernel, seen on an H200


class Chain:
    """kind: "plain" or "int4". A step's weights are far larger than the L2 cache; so are 4 heads alone."""
    D, F, H, K, V, M = 4096, 11008, 32, 128, 32064, 4096

    def __init__(self, kind="plain", L=32, dtype=torch.bfloat16, device="cuda"):
        D, F, H, K, M = self.D, self.F, self.H, self.K, self.M
        self.kind, self.L, self.dtype, self.device = kind, L, dtype, device
        self.norm = torch.rand(D, device=device).to(dtype) + 0.5, 1e-5
        shapes = dict(qkv=(3 * D, D), o=(D, D), gate_up=(2 * F, D), down=(D, F), head=(self.V, D))

        def weight(name):
            w_OD = (torch.randn(shapes[name], device=device) * 0.02).to(dtype)
            norm_D = self.norm[0] if "norm" in FOLDS[name] else None
            bits = HEAD_BITS if name == "head" else LAYER_BITS
            return quantise(w_OD, bits, norm_D=norm_D) if kind == "int4" else w_OD
        self.w = {name: [weight(name) for _ in range(4 if name == "head" else L)] for name in shapes}
        self.idle_SF = torch.randn(32, max(F, 3 * D), device=device).to(dtype)
        self.k_LNMK, self.v_LNMK = torch.randn(2, L, H, M, K, dtype=dtype, device=device)
        angle_MK = torch.outer(torch.arange(M), 10000.0 ** (-torch.arange(0, K, 2) / K)).repeat(1, 2)
        self.cos_MK, self.sin_MK = angle_MK.cos().to(device, dtype), angle_MK.sin().to(device, dtype)

    def work(self, **options):
        return Workspace(self.device, self.D, self.H, self.K, self.M, **options)

    def step(self, x_SD, pos_ids_S, work, without="", **override):
        """Logits [S, V]. override: {kernel: {launch choice: value}}. without: the kernel of each layer that is left
        out; what stands in the place of its result is as wide."""
        mine = {name: override.get(name, {}) for name in (*FOLDS, "attention")}
        S = len(x_SD)

        def of_layer(x_SD, w, work, name, **keywords):
            if name == without:
                return self.idle_SF[:S, :w.shape[0] // (2 if "gated" in keywords else 1)]
            return product(x_SD, w, work, **keywords, **mine[name])
        if self.kind == "plain":
            row_sums(x_SD, work)
        for i in range(self.L):
            w = {name: weights[i] for name, weights in self.w.items() if name != "head"}
            qkv_SE = of_layer(x_SD, w["qkv"], work, "qkv", norm=self.norm)
            mixed_SD = qkv_SE[:, :self.D] if without == "attention" else step_attention(
                qkv_SE, self.k_LNMK[i], self.v_LNMK[i], pos_ids_S, self.cos_MK, self.sin_MK, work,
                **mine["attention"]).flatten(1)
            x_SD = of_layer(mixed_SD, w["o"], work, "o", residual=x_SD)
            up_SF = of_layer(x_SD, w["gate_up"], work, "gate_up", norm=self.norm, gated=True)
            x_SD = of_layer(up_SF, w["down"], work, "down", residual=x_SD)
        return of_layer(x_SD, self.w["head"][0], work, "head", norm=self.norm)

    def gigabytes(self, context):
        """What a step has to read: all weights once, and the keys and values of the context."""
        weights = sum(w.nbytes for name, ws in self.w.items() for w in (ws[:1] if name == "head" else ws))
        return 1e-9 * (weights + 4 * self.L * context * self.H * self.K)


def case(chain, name, S):
    """(x, keywords) of a product as a layer calls it."""
    O, D = chain.w[name][0].shape
    x_SD, keywords = torch.randn(S, D, device=chain.device).to(chain.dtype), {}
    if "norm" in FOLDS[name]:
        keywords["norm"] = chain.norm
    if "residual" in FOLDS[name]:
        keywords["residual"] = torch.randn(S, O, device=chain.device).to(chain.dtype)
    return x_SD, keywords | (dict(gated=True) if "gated" in FOLDS[name] else {})


def product_us(chain, work, name, S):
    """(microseconds of one product in a row of them over all layers, TB/s of what it has to read)."""
    weights, (x_SD, keywords) = chain.w[name], case(chain, name, S)
    us = 1e3 * measure.graph_ms(lambda: [product(x_SD, w, work, **keywords) for w in weights])[1] / len(weights)
    return us, 1e-6 * weights[0].nbytes / us


def step_ms(chain, work, S, context, **override):
    """p50 milliseconds."""
    x_SD, pos_ids_S = torch.randn(S, chain.D, device="cuda").to(chain.dtype), context + torch.arange(S, device="cuda")
    return measure.graph_ms(lambda: chain.step(x_SD, pos_ids_S, work, **override))[1]


def model_us(chain, context, stream):
    """{kernel: (microseconds that its bytes take at `stream` TB/s, its kernels)}, of one layer, and of the head."""
    of = {name: (1e-6 * weights[0].nbytes / stream, 1) for name, weights in chain.w.items()}
    return of | {"attention": (4e-6 * context * chain.H * chain.K / stream, 2)}


def inside(chain, work, stream, context=2100):
    """What each kernel costs inside a step of one row, and the whole step, beside the model; returns the rows."""
    whole, edge = step_ms(chain, work, 1, context), EDGE_US[chain.kind]
    model, rows = model_us(chain, context, stream), []
    for name, (bytes_us, kernels) in model.items():
        if name != "head":
            us = 1e3 * (whole - step_ms(chain, work, 1, context, without=name)) / chain.L
            rows.append((name, bytes_us, bytes_us + kernels * edge, us))
    layer = sum(bytes_us + kernels * edge for name, (bytes_us, kernels) in model.items() if name != "head")
    head = model["head"][0] + edge
    rows.append(("whole step", 1e3 * chain.gigabytes(context) / stream, layer * chain.L + head, 1e3 * whole))
    return rows


def report(kind) -> list[str]:
    """Times of a kind's products, steps, and kernels inside a step."""
    chain, stream, counts = Chain(kind), read_tbps(), ROWS[kind]
    work, patient, rows = chain.work(), chain.work(pdl=False), []
    for name in FOLDS:
        floor = 1e-6 * chain.w[name][0].nbytes / stream
        rows.append((name, floor, *(x for S in counts for x in product_us(chain, work, name, S))))
    lines = measure.table(f"{kind}: one product after the other over all layers; read-only stream {stream:.3f} TB/s",
                          ("", "floor us", *(x for S in counts for x in (f"us, {S} rows", "TB/s"))), rows)
    rows = []
    for context in CONTEXTS[kind]:
        floor = chain.gigabytes(context) / stream
        for S in counts:
            ms = step_ms(chain, work, S, context)
            rows.append((f"{S} rows, context {context}", ms, step_ms(chain, patient, S, context), floor,
                         100 * floor / ms))
    lines += measure.table(f"{kind}: a step of {chain.L} layers and the head",
                           ("", "p50 ms", "no early start", "floor ms", "% of stream"), rows)
    return lines + measure.table(f"{kind}: inside a step of 1 row, context 2100, us; {EDGE_US[kind]} us lost at each "
                                 f"kernel", ("", "bytes", "predicted", "seen"), inside(chain, work, stream))


def main(argv=None) -> int:
    parser = measure.flags(__doc__)
    parser.add_argument("kind", nargs="?", choices=ROWS, help="of the weights (default: both)")
    options = parser.parse_args(argv)
    if engine.pick_device(options.device).type != "cuda":
        raise engine.InputError("chain: times kernels on a GPU; run it where torch sees one")
    with torch.inference_mode():
        head = f"chain, RANDOM 7B WEIGHTS bf16, {torch.cuda.get_device_name()}, {measure.versions()}"
        kinds = [options.kind] if options.kind else ROWS
        measure.publish([head, *(line for kind in kinds for line in report(kind))], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(measure.run(main))
