"""What many tests share: requests to the embedded pair, drafts to force, and a script for models and clock."""

import functools
import json
import threading
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"
CLIPS = TINY / "clips"
RECORDS = json.loads((CLIPS / "EventGPT_Instruction_Subset.json").read_text())
QUESTIONS = ["What are the key elements in this scene?", "Describe the following scene.", "What do you see happening?"]
NEW = 40                             # ids that `asked` asks for
EOS = 2                              # of both embedded models


def save_adapter(folder, network, config) -> None:
    """As folders of a trained adapter are: config.json, and the weights."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps(asdict(config)))
    save_file({name: value.contiguous() for name, value in network.state_dict().items()},
              Path(folder) / "adapter.safetensors")


def asked(i, question=0, **options):
    """Arguments of `Engine.generate` for the embedded clip i (modulo their number) and one of QUESTIONS."""
    record = RECORDS[i % len(RECORDS)]
    return {"event_path": CLIPS / "event_npy" / record["event_data"], "video_path": CLIPS / "mp4" / record["mp4_data"],
            "query": QUESTIONS[question], "max_new_tokens": NEW, **options}


@functools.cache
def truth(e, i, question=0, ignore_eos=False):
    """The ids of `target_only` for `asked(i, question)`; an engine is asked once."""
    return e.generate(mode="target_only", ignore_eos=ignore_eos, **asked(i, question)).output_ids


def guesses(ids):
    """{name: drafts for the answer `ids`, place by place}: right, wrong, odd and none at all."""
    V, n = 10 ** 9, len(ids)
    wrong = {f"wrong_at_{i}": ids[:i] + [ids[i] + 1] + ids[i + 1:] for i in {1, 2, 5, 6, 11, n // 2, n - 2, n - 1}}
    return {"perfect": ids, "hopeless": [3] * 64, "empty": [], "one": ids[:2], "too_long": ids + ids + ids,
            "eos_inside": ids[:4] + [EOS] + ids[5:], "eos_everywhere": [EOS] * 64,
            "out_of_vocabulary": [V, -1, -V, 2 ** 80, V] * 13, "half_then_oov": ids[:n // 2] + [V] * 32, **wrong}


class Clock:
    """Seconds that a test hands out in place of `time.perf_counter`. Each thread has its own, from `restart` on."""

    def __init__(self):
        self.base, self.at = 1000.0, {}

    def __call__(self) -> float:
        return self.at.get(threading.get_ident(), self.base)

    def spend(self, seconds: float) -> None:
        self.at[threading.get_ident()] = self() + seconds

    def restart(self) -> None:
        """Before a request: every thread begins at the latest time that any has reached."""
        self.base, self.at = max([self.base, *self.at.values()]), {}


class ClockedTime:
    """The module `time` with a Clock for its clocks. A sleep spends its seconds at once."""

    def __init__(self, clock):
        self.perf_counter = self.monotonic = clock
        self.sleep = clock.spend

    def __getattr__(self, name):
        return getattr(time, name)


def script(monkeypatch, model, ids, clock=None, before=None, **seconds):
    """The model's towers and forwards no longer compute: it gives `ids`, then end-of-sequence, whatever it is shown.
    ids None: they compute as ever, and only `before` and the clock are put in.

    seconds: what "encode", "prefill", "step" (one row), "verify" (more rows; default: a step's) and "copy" (a draft of
    the 4-bit copy) take on the clock.
    before: called as before(kind, number), number 0, 1, .. per kind; it may wait, raise, or return a float, with which
    the logits are filled. Returns the forwards so far, a list that grows: (kind, rows, place in the answer of the id
    that the first row gives).
    """
    c, counts, forwards, prompt = model.config, defaultdict(int), [], [0]
    real = model.encode, model.decoder.forward
    seconds = {"encode": 0.0, "prefill": 0.0, "step": 0.0, "verify": seconds.get("step", 0.0), "copy": 0.0, **seconds}

    def spend(kind):
        filled = before and before(kind, counts[kind])
        counts[kind] += 1
        if clock:
            clock.spend(seconds[kind])
        return filled

    def encode(pixels_R3XX, image=False):
        spend("encode")
        if ids is None:
            return real[0](pixels_R3XX, image)
        R, P = len(pixels_R3XX), model.vision.P
        rows = R + P + 1 if model.side == "drafter" else R * (P + (not image))
        return torch.zeros(rows, c.D)

    def forward(hidden_SD, pos_ids_S, only=None, steps=None):
        at_S = (pos_ids_S if only is None else pos_ids_S[only]).tolist()
        kind = "step" if len(pos_ids_S) == 1 else "verify"
        kind = "prefill" if int(pos_ids_S[0]) == 0 else "copy" if steps else kind
        if kind == "prefill":
            prompt[0] = at_S[0]                              # the prompt's last row gives the answer's first id
        forwards.append((kind, len(pos_ids_S), at_S[0] - prompt[0]))
        filled = spend(kind)
        if ids is None:
            logits_SV = real[1](hidden_SD, pos_ids_S, only, steps)
        else:
            logits_SV = torch.zeros(len(at_S), c.V)
            for row, at in enumerate(at_S):
                place = at - prompt[0]
                logits_SV[row, ids[place] if 0 <= place < len(ids) else 2] = 1.0
        return logits_SV.fill_(filled) if isinstance(filled, float) else logits_SV

    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model.decoder, "forward", forward)
    return forwards
