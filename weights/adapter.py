"""adapter: a small network that turns the drafter's ids into guesses of the target's.

TokenAdapter is that of the research repository this engine started from, layer by layer (45.5 M parameters): the
drafter's ids in, the target's ids out, entry i guessing answer id i + `shift`. Its `best_model.pt` loads after
`python -m weights.convert best_model.pt DIR/adapter.safetensors`; sizes come from the shapes, shift is 1.

Training is not here any more: held out, an adapter was right at 28.1 % of places, where the most frequent id of each
place, which needs no network, is right at 25.4 %.
"""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from weights.files import InputError, brief, names_in, naming, path_text, read_json, refusal
from weights.load import listed, read_header

WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True)
class AdapterConfig:
    vocab: int = 32_010              # rows of the embedding; EventGPT adds ten to LLaMA's 32,000
    rows: int = 128                  # positions
    width: int = 512
    layers: int = 4
    heads: int = 8                   # the one size that shapes do not tell
    hidden: int = 2048
    shift: int = 1                   # entry i guesses the target's id i + shift

    def __post_init__(self):
        sizes = [getattr(self, f.name) + (f.name == "shift") for f in fields(self) if f.type is int
                 and type(getattr(self, f.name)) is int]
        if len(sizes) < 7 or not all(0 < s < 1 << 20 for s in sizes) or self.layers > 128 or self.width % self.heads:
            raise InputError(f"adapter: sizes that fit no network ({brief(asdict(self), 200)}); check its config.json")
        values = self.width * (2 * self.vocab + self.rows + self.layers * (4 * self.width + 2 * self.hidden))
        if values > 1 << 30:
            raise InputError(f"adapter: {values / 1e9:.1f} billion parameters, wanted at most one; make it smaller")


class TokenAdapter(nn.Module):
    """Drafter ids [B, S] to logits over target ids [B, S, V]. Module names are the checkpoint's keys."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.embedding, self.position_embedding = (table(rows, config.width) for rows in (config.vocab, config.rows))
        layer = nn.TransformerEncoderLayer(config.width, config.heads, config.hidden, dropout=0.1, activation="gelu",
                                           batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.output_proj = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.vocab))

    def forward(self, ids_BS):
        S = ids_BS.shape[1]
        hidden_BSD = self.embedding(ids_BS) + self.position_embedding.weight[:S]
        return self.output_proj(self.transformer(hidden_BSD, mask=causal(S, ids_BS.device)))


def table(rows: int, width: int) -> nn.Embedding:
    """As torch makes it, but for the meta device: a normal draw there imports 800 modules, 1.6 s."""
    fresh = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=fresh) if fresh.is_meta else nn.Embedding(rows, width)


def causal(S: int, device):
    return torch.ones(S, S, dtype=torch.bool, device=device).triu(1)


@torch.no_grad()
def guess(network, config: AdapterConfig, drafter, committed, limit: int) -> list[int]:
    """At most `limit` ids that may follow the target's `committed` ones. drafter: its ids, or []."""
    first, heard = len(committed) - config.shift, drafter[:config.rows]
    if first < 0 or first >= len(heard):
        return []
    device = next(network.parameters()).device
    return network(torch.tensor([heard], device=device))[0, first:first + limit].argmax(-1).tolist()


def load(folder, device="cpu"):
    """(network in evaluation mode, AdapterConfig) of a folder. Without config.json the sizes are read off the shapes of
    a TokenAdapter, with eight heads and shift +1: what the research repository trained."""
    with naming(folder):
        folder = path_text(folder, "an adapter's folder")
    path = Path(folder, WEIGHTS) if os.path.isdir(folder) else Path(folder)
    if not folder or not (os.path.lexists(path) or os.path.isdir(folder) and WEIGHTS in names_in(folder)):
        raise refusal(folder and path, "no such file", "make it of the research code's best_model.pt: `python -m "
                      "weights.convert best_model.pt DIR/adapter.safetensors`")
    header = read_header(path)
    shapes = {key: tuple(stored.shape) for key, stored in header.items()}
    if whole := sorted(key for key, stored in header.items() if stored.dtype not in ("F16", "BF16", "F32", "F64")):
        raise refusal(path, f"holds no floating point numbers in {listed(whole, 4)}", "save it as float32")
    beside, raw = path.parent / "config.json", None
    if os.path.lexists(beside):
        raw = read_json(beside, "an adapter's config")
        kind, _ = raw.pop("kind", "token"), raw.pop("sees", None)            # of files that were written before
        unknown = set(raw) - {f.name for f in fields(AdapterConfig)}
        if unknown or kind != "token":
            raise refusal(beside, f"no adapter's config (kind {brief(kind)}, unknown {listed(unknown)})",
                          "copy it again from where the adapter was trained")
    try:
        config = AdapterConfig(**raw) if raw is not None else config_of(shapes, path)
    except InputError as error:                              # sizes that fit no network
        raise InputError(f"{path if raw is None else beside}: {str(error).removeprefix(f'{path}: ')}") from None
    with torch.device("meta"):
        network = TokenAdapter(config)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wrong = sorted(key for key in {*wanted, *shapes} if wanted.get(key) != shapes.get(key))
    if wrong:
        raise refusal(path, f"{len(wrong)} tensors missing, unknown or of another shape: {listed(wrong, 4)}",
                      "it belongs to another adapter or another config.json")
    try:
        weights = {key: value.float() for key, value in load_file(path, device=str(device)).items()}
    except (SafetensorError, OSError) as error:
        raise refusal(path, f"cannot be read ({brief(error)})", "check the disk and try again") from None
    bad = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise refusal(path, f"NaN or infinity in {listed(bad, 4)}", "download it again")
    network.load_state_dict(weights, assign=True)
    return network.eval(), config


def config_of(shapes: dict, path) -> AdapterConfig:
    """The sizes of a TokenAdapter whose checkpoint came without any."""
    try:
        (vocab, width), (rows, _) = shapes["embedding.weight"], shapes["position_embedding.weight"]
        depth = len({key.split(".")[2] for key in shapes if key.startswith("transformer.layers.")})
        hidden = shapes["transformer.layers.0.linear1.weight"][0]
    except (KeyError, ValueError, IndexError):
        raise refusal(path, f"holds no TokenAdapter (its tensors: {listed(sorted(shapes), 4)})",
                      "give the state dict of best_model.pt, converted, or a folder with config.json") from None
    return AdapterConfig(vocab, rows, width, depth, 8 if width % 8 == 0 else 1, hidden)
