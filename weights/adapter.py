"""adapter: a small network that turns the drafter's ids into guesses of the target's.

    python -m weights.adapter train PAIRS.jsonl --out DIR           whole sequences held out, resumable
    python -m weights.adapter evaluate PAIRS.jsonl DIR              beside the controls that need no network

TokenAdapter is that of the research repository this engine started from, layer by layer (45.5 M parameters): the
drafter's ids in, the target's ids out, entry i guessing answer id i + `shift`. Its `best_model.pt` loads after
`python -m weights.convert best_model.pt DIR/adapter.safetensors`; sizes come from the shapes, shift is 1.

Measured on 1,100 recorded answers of the 7B pair, one question, `train PAIRS --patience 5` (12 sequences: 3 test, 2
validation, 7 to learn from), accepted of 21 drafts after the target's own first id:
    token adapter      position match 28.08 %   top-5 48.12 %   accepted 8.65     best epoch 3 of 7
    no network         most frequent id at each position 25.43 % and 8.54, constant 9.14, previous answer 12.59
It earns no place by that: the engine's lookup has 13.54 over all 1,100 answers, without a network. Dropped: a causal
decoder of 4.7 M parameters over the answer so far, with the drafter's ids and the previous answer in front or not:
9.15; from 645 answers it does not learn to copy the previous one.

PAIRS: one JSON object a line with src, seq, clip, question, videollava_ids, eventgpt_ids, as `bench.py --record` does.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from weights import controls
from weights.files import (
    InputError,
    brief,
    command,
    insist_number,
    insist_whole,
    json_lines,
    naming,
    open_regular,
    read_json,
    reason_of,
    refusal,
    replace_file,
    say,
    trusting,
)
from weights.load import insist_usable, listed, read_header
from weights.sources import agreeing

WEIGHTS = "adapter.safetensors"
LIMIT = 21                           # drafts of one shot: what the research repository's window held


# ---- recorded pairs --------------------------------------------------------------------------------------------


def read_pairs(path, src: str | None = None, vocab: int = 1 << 31) -> list[dict]:
    """Recorded pairs in order of sequence and clip, end-of-sequence ids left out: [{seq, clip, question, target,
    drafter}]. src: which source run; None takes the only one that the file holds. vocab: ids stay below it. The
    target's ids may also be called llava15_ids; a model's stop ids are those it was recorded with, else LLaMA's 2.
    InputError names the file and the line."""
    rows, found = [], {}
    for at, row in json_lines(path, "recorded pairs, as bench.py --record writes them"):
        with trusting(path, f"line {at} is no recorded pair",
                      "wants src, seq, clip, question, videollava_ids, eventgpt_ids"):
            found[row.get("src")] = None
            if src is not None and row["src"] != src:
                continue
            pair = {"seq": str(row["seq"]), "clip": row["clip"], "question": str(row["question"]),
                    "target": row["llava15_ids" if "llava15_ids" in row else "videollava_ids"],
                    "drafter": row["eventgpt_ids"], "src": str(row["src"])}
            stops = {"target": row.get("videollava_stops", [2]), "drafter": row.get("eventgpt_stops", [2])}
            if type(pair["clip"]) is not type(rows[0]["clip"] if rows else pair["clip"]) or not isinstance(
                    pair["clip"], (int, str)):
                raise TypeError("clips are neither all numbers nor all names")
        for side in ("target", "drafter"):
            ids, ends = pair[side], stops[side]
            if not (isinstance(ids, list) and isinstance(ends, list)) or not all(
                    type(i) is int and 0 <= i < vocab for i in ids + ends):
                raise refusal(path, f"line {at}: the {side}'s ids are not whole numbers from 0 to {vocab - 1}",
                              "record it with the tokenizer both models share")
            pair[side] = [i for i in ids if i not in ends]
        if not pair["target"]:
            raise refusal(path, f"line {at}: an answer without ids", "record it again")
        rows.append(pair)
    if not rows:
        raise refusal(path, "no recorded pairs" if src is None else f"no rows of {src!r}",
                      f"it holds {listed(sorted(map(str, found.keys() - {None})))}; name one of these as --src")
    if len({row["src"] for row in rows}) > 1:
        raise refusal(path, f"holds {listed(sorted({row['src'] for row in rows}))}", "name one of these as --src")
    return sorted(rows, key=lambda r: (r["seq"], r["clip"]))


def write_pairs(path: str, report: dict) -> None:
    """Both models' own answers of every sample, one JSON object a line, in the schema of the recorded pairs that
    tests/sources.py and tests/replay.py read."""
    lines = [json.dumps({
        "src": "headstart", "seq": row["seq"], "clip": row["clip"], "uuid": row["id"], "question": row["question"],
        "target_input": f"video8_{report['config']['frame_rule']}", "commit": report["commit"],
        "max_new_tokens": report["config"]["max_new_tokens"],
        **{f"{name}_{key}": row["modes"][mode][key] for name, mode in (("eventgpt", "drafter_only"),
                                                                       ("videollava", "target_only"))
           for key in ("text", "ids")},
        **{f"{name}_stops": report["weights"].get(side, {}).get("stops", [2])
           for name, side in (("eventgpt", "drafter"), ("videollava", "target"))}}) for row in report["samples"]
        if {"target_only", "drafter_only"} <= row["modes"].keys()]
    replace_file(path, "".join(line + "\n" for line in lines).encode())


def with_previous(rows) -> list[dict]:
    """The rows, each with `previous`: the answer before it to the same question of the same sequence, or []."""
    last, out = {}, []
    for row in rows:
        key = row["seq"], row["question"]
        out.append({**row, "previous": last.get(key, [])})
        last[key] = row["target"]
    return out


def split(rows, test: int, valid: int) -> dict:
    """{"train", "valid", "test"}: whole sequences each, never a clip beside its half-overlapping neighbour in another
    part. Held-out sequences are spread evenly over all sizes; of those, test and validation take turns."""
    by_size = [s for s, _ in sorted(collections.Counter(r["seq"] for r in rows).items(), key=lambda i: (i[1], i[0]))]
    if test < 1 or valid < 1 or len(by_size) < test + valid + 1:
        raise InputError(f"{len(by_size)} sequences: wanted {test} for test, {valid} for validation and one or more to "
                         f"learn from; change --test and --valid")
    held = [by_size[int((i + 0.5) * len(by_size) / (test + valid))] for i in reversed(range(test + valid))]
    turns = sorted(range(len(held)), key=lambda i: (i % 2, i))          # 0, 2, 4, ..., then 1, 3, ...
    parts = {held[i]: "test" if at < test else "valid" for at, i in enumerate(turns)}
    return {part: [r for r in rows if parts.get(r["seq"], "train") == part] for part in ("train", "valid", "test")}


# ---- the networks ----------------------------------------------------------------------------------------------


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


def batch(rows, config: AdapterConfig, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(drafter ids, labels), [B, S] each, of some rows; label 0 counts for nothing. labels[b, i] is the target's id i +
    shift, which entry i is asked for."""
    S = min(config.rows, max(max(len(r["target"]) - config.shift, 1) for r in rows))
    ids = [(r["drafter"] + [0] * S)[:S] for r in rows]
    labels = [(r["target"][config.shift:] + [0] * S)[:S] for r in rows]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


@torch.no_grad()
def guess(network, config: AdapterConfig, drafter, committed, limit: int) -> list[int]:
    """At most `limit` ids that may follow the target's `committed` ones. drafter: its ids, or []."""
    first, heard = len(committed) - config.shift, drafter[:config.rows]
    if first < 0 or first >= len(heard):
        return []
    device = next(network.parameters()).device
    return network(torch.tensor([heard], device=device))[0, first:first + limit].argmax(-1).tolist()


# ---- files -----------------------------------------------------------------------------------------------------


def save(folder, network, config: AdapterConfig) -> None:
    """config.json and then the weights, each in place only when whole."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(folder, f"cannot be made ({reason_of(error)})", "choose another folder") from None
    replace_file(folder / "config.json", (json.dumps(asdict(config), indent=2) + "\n").encode())
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    replace_file(folder / WEIGHTS, to_bytes(tensors))


def load(folder, device="cpu"):
    """(network in evaluation mode, AdapterConfig) of a folder. Without config.json the sizes are read off the shapes of
    a TokenAdapter, with eight heads and shift +1: what the research repository trained."""
    folder = Path(folder)
    path = folder / WEIGHTS if os.path.isdir(folder) else folder
    if not os.path.exists(path):
        raise refusal(path, "no such file", "train one, or convert best_model.pt to this name with weights.convert")
    header = read_header(path)
    shapes = {key: tuple(stored.shape) for key, stored in header.items()}
    if whole := sorted(key for key, stored in header.items() if stored.dtype not in ("F16", "BF16", "F32", "F64")):
        raise refusal(path, f"holds no floating point numbers in {listed(whole, 4)}", "save it as float32")
    beside = path.parent / "config.json"
    if os.path.exists(beside):
        raw = read_json(beside, "an adapter's config")
        kind, _ = raw.pop("kind", "token"), raw.pop("sees", None)            # of files that were written before
        unknown = set(raw) - {f.name for f in fields(AdapterConfig)}
        if unknown or kind != "token":
            raise refusal(beside, f"no adapter's config (kind {brief(kind)}, unknown {listed(unknown)})",
                          "copy it again from where the adapter was trained")
        config = AdapterConfig(**raw)
    else:
        config = config_of(shapes, path)
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
        raise refusal(path, f"NaN or infinity in {listed(bad, 4)}", "train or download it again")
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


# ---- train and judge -------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(network, config: AdapterConfig, rows, device, limit: int = LIMIT) -> dict:
    """Position match and top-5 in per cent over every target id after the first, and the mean accepted prefix of one
    shot of at most `limit` drafts after the target's own first id."""
    network.eval()
    right, top5, prefixes = [], [], []
    for at in range(0, len(rows), 64):
        some = rows[at:at + 64]
        ids_BS, labels_BS = batch(some, config, device)
        best_BSK = network(ids_BS).topk(5, dim=-1).indices
        hit_BSK = (best_BSK == labels_BS[..., None])
        for b, row in enumerate(some):
            start = max(1 - config.shift, 0)
            span = slice(start, start + len(row["target"]) - 1)
            hits = hit_BSK[b, span, 0].tolist()
            right += hits
            top5 += hit_BSK[b, span].any(-1).tolist()
            prefixes.append(agreeing(hits, [True] * limit))
    mean = lambda values: sum(values) / max(1, len(values))          # noqa: E731
    return {"position": 100 * mean(right), "top5": 100 * mean(top5), "prefix": mean(prefixes)}


def beside(train, rows, limit: int = LIMIT) -> dict:
    """The same figures for drafts that need no network: the most frequent id at each position of the training answers,
    the most frequent way on after each beginning, and the previous answer of the sequence."""
    often, ways, accepted, right = {}, collections.defaultdict(dict), collections.defaultdict(list), Counter()
    for question in {r["question"] for r in train}:
        answers = [r["target"] for r in train if r["question"] == question]
        often[question] = controls.position_frequency(answers)
        for answer in answers:
            controls.count(ways[question], answer)
    for r in rows:
        ids = r["target"]
        for name, drafts in (("position frequency", often.get(r["question"], [])[1:]),
                             ("most frequent", controls.follow(ways[r["question"]], ids[:1], len(ids) - 1)),
                             ("previous", r["previous"][1:])):
            right[name] += sum(draft == i for draft, i in zip(drafts, ids[1:], strict=False))
            accepted[name].append(agreeing(drafts[:limit], ids[1:]))
    drafted = max(1, sum(len(r["target"]) - 1 for r in rows))
    return {name: {"position": 100 * right[name] / drafted, "prefix": sum(of) / len(of)}
            for name, of in accepted.items()}


@contextlib.contextmanager
def unfinished(resume, about: dict, device="cpu"):
    """What an interrupted `train` left at `resume`. InputError if that is something else, or of other settings."""
    try:
        with naming(resume), open_regular(resume, "an unfinished run")[0] as file:
            state = torch.load(file, map_location=device, weights_only=True)
        if state["about"] != about:
            raise refusal(resume, "an unfinished run with other settings", "remove it, or give another --out")
        yield state
    except InputError:
        raise
    except Exception as error:                               # whatever a damaged file does to the reader
        raise refusal(resume, f"not an unfinished run ({type(error).__name__})", "remove it") from None


def train(rows, out, config: AdapterConfig, *, epochs=50, patience=10, lr=1e-4, test=3, valid=2, seed=0, device="cpu",
          batch_rows=32) -> dict:
    """Trains and keeps the epoch with the longest accepted prefix on the validation sequences; returns its figures on
    the test sequences. Label smoothing 0.1, AdamW, cosine, clip 1: the recipe of the adapter this follows."""
    out, parts = Path(out), split(with_previous(rows), test, valid)
    torch.manual_seed(seed)
    network = TokenAdapter(config).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    per_epoch = -(-len(parts["train"]) // batch_rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    about = {"config": asdict(config), "epochs": epochs, "lr": lr, "seed": seed, "test": test, "valid": valid,
             "pairs": len(rows)}
    best, first, resume = {"prefix": -1.0, "position": -1.0}, 0, out / "resume.pt"
    if os.path.exists(resume):
        with unfinished(resume, about, device) as state:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            first, best = state["epoch"], state["best"]
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters; rows: " + ", ".join(
        f"{k} {len(v)} of {len({r['seq'] for r in v})} sequences" for k, v in parts.items()), file=sys.stderr)
    for epoch in range(first, epochs):
        if epoch - best.get("epoch", epoch) >= patience:
            break
        shuffled, began, losses = list(parts["train"]), time.monotonic(), []
        random.Random(seed * 1000 + epoch).shuffle(shuffled)
        torch.manual_seed(seed * 1000 + epoch)               # dropout too goes on as if never interrupted
        network.train()
        for at in range(0, len(shuffled), batch_rows):
            ids_BS, labels_BS = batch(shuffled[at:at + batch_rows], config, device)
            loss = F.cross_entropy(network(ids_BS).flatten(0, 1), labels_BS.flatten(), ignore_index=0,
                                   label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        found = judge(network, config, parts["valid"], device)
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, validation prefix {found['prefix']:.2f}, "
              f"position {found['position']:.1f} %, top-5 {found['top5']:.1f} %, {time.monotonic() - began:.0f} s",
              file=sys.stderr, flush=True)
        if (found["prefix"], found["position"]) > (best["prefix"], best["position"]):
            best = {**found, "epoch": epoch}
            save(out, network, config)
        content = io.BytesIO()
        torch.save({"about": about, "network": network.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "epoch": epoch + 1, "best": best}, content)
        replace_file(resume, content.getbuffer())
    network, config = load(out, device)
    return {"test": judge(network, config, parts["test"], device), "valid": best,
            "controls": beside(parts["train"], parts["test"])}


def lines_of(figures: dict, title: str) -> list[str]:
    lines = [title, f"{'':20}position match %   top-5 %   accepted of {LIMIT}"]
    for name, of in {"adapter": figures["test"], **figures["controls"]}.items():
        lines.append(f"{name:20}{of['position']:16.2f}" + (f"{of['top5']:10.2f}" if "top5" in of else " " * 10)
                     + f"{of['prefix']:16.2f}")
    return lines


@command
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.adapter", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "evaluate"):
        sub = commands.add_parser(name)
        sub.add_argument("pairs", type=Path)
        if name == "evaluate":
            sub.add_argument("folder", type=Path)
        else:
            sub.add_argument("--out", type=Path, required=True)
            for flag in ("vocab", "width", "layers", "heads", "hidden", "shift"):
                sub.add_argument(f"--{flag}", type=int, default=getattr(AdapterConfig, flag) * (flag != "vocab"))
            sub.add_argument("--epochs", type=int, default=50)
            sub.add_argument("--patience", type=int, default=10)
            sub.add_argument("--lr", type=float, default=1e-4)
            sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--src", help="which rows of PAIRS (default: the only kind there)")
        sub.add_argument("--test", type=int, default=3, help="sequences held out (default %(default)s)")
        sub.add_argument("--valid", type=int, default=2, help="sequences to stop by (default %(default)s)")
        sub.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    insist_usable(args.device)
    if args.command == "train":
        for name, low, high in (("epochs", 1, 1_000_000), ("patience", 1, 1_000_000), ("seed", 0, 2 ** 31)):
            insist_whole(f"--{name}", getattr(args, name), low, high)
        insist_number("--lr", args.lr, 0, 1, above=True)
        rows = read_pairs(args.pairs, args.src, args.vocab or 1 << 31)
        found = 1 + max(i for row in rows for i in row["target"] + row["drafter"])
        config = AdapterConfig(vocab=args.vocab or max(found, AdapterConfig.vocab), width=args.width,
                               layers=args.layers, heads=args.heads, hidden=args.hidden, shift=args.shift)
        figures = train(rows, args.out, config, epochs=args.epochs, patience=args.patience, lr=args.lr,
                        test=args.test, valid=args.valid, seed=args.seed, device=args.device)
    else:
        network, config = load(args.folder, args.device)
        rows = read_pairs(args.pairs, args.src, config.vocab)
        parts = split(with_previous(rows), args.test, args.valid)
        figures = {"test": judge(network, config, parts["test"], args.device),
                   "controls": beside(parts["train"], parts["test"])}
    say("\n".join(lines_of(figures, f"token adapter on {args.test} held-out sequences of {args.pairs.name}, "
                             f"{rows[0]['src']}")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
