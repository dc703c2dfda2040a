"""sources: who may draft from the host. Nothing here imports torch or knows a model. A source of your own needs one
method:

    class Mine:
        def propose(self, committed, limit):
            return [13, 13, 13][:limit]

Whatever a source proposes, the answer stays the target's. Ids are whole numbers of the target's vocabulary, answers
lists of them."""

from __future__ import annotations

import collections
import itertools
import json
import os

from weights import InputError, replace_file
from weights.files import insist_flag, insist_whole, items_of, quoted, read_json, reason_of, trusting


class DraftSource:
    """Proposes ids from the host. Any object with `propose` will do; this class has the other methods' defaults.

    A wrong, empty, endless or broken proposal costs time and nothing else. One source may serve many requests, one
    after the other, and keep what it likes between them.
    """
    name = "source"                         # of its rounds in a Result
    needs_drafter = False                   # True: the drafter runs, and `read` gets its ids

    def begin(self, question: str) -> None:
        """A request starts."""

    def read(self, preview: list[int]) -> None:
        """The drafter's ids so far; before a `propose`, and only if needs_drafter."""

    def propose(self, committed: list[int], limit: int) -> list[int]:
        """At most `limit` ids that may follow the ids committed so far (never empty)."""
        raise NotImplementedError

    def verdict(self, drafted: int, accepted: int) -> None:
        """How many of the last proposal the target agreed with."""

    def learn(self, answer: list[int]) -> None:
        """The request ended with this answer."""


def listed(ids, most: int | None = None) -> list:
    """The first ids of an answer. InputError if it is none."""
    try:
        return list(itertools.islice(ids, most))
    except TypeError:
        raise InputError(f"answer: wanted a list of ids, got {quoted(ids)}; pass `output_ids`") from None


class Own(DraftSource):
    """A source of the caller's, any object with `propose`: looked into once, and compared with nothing, so that its
    class may answer as it likes. InputError if it is none."""
    PARTS = ("needs_drafter", "name", "begin", "read", "propose", "verdict", "learn")

    def __init__(self, source):
        kind = type(source).__name__
        try:
            parts = {name: getattr(source, name, None) for name in self.PARTS}
            insist_flag("needs_drafter", parts["needs_drafter"] is not None and parts["needs_drafter"])
        except Exception as error:                           # of its class
            raise InputError(f"draft_source: a {kind} whose attributes cannot be read ({reason_of(error)}); mend it"
                             ) from None
        if issubclass(type(source), type) or not callable(parts["propose"]):
            raise InputError(f"draft_source: wanted a name or an object with `propose`, got {kind}; make one by "
                             f"source_named")
        parts["name"] = parts["name"] if isinstance(parts["name"], str) else kind
        vars(self).update({name: part for name, part in parts.items() if part is not None})


class Fixed(DraftSource):
    """Drafts a known continuation by position, whatever the target said before: `ids[i]` guesses answer id i."""
    name = "fixed"

    def __init__(self, ids):
        self.ids = listed(ids)

    def propose(self, committed, limit):
        return self.ids[len(committed):len(committed) + limit]


class Lookup(DraftSource):
    """Earlier answers, pooled over questions: what followed the longest suffix of the answer so far, the latest one if
    several are as long. The newest answers stay, ROWS ids of them. An engine searches them on the target's device
    (kernels/lookup.py), where no round waits for the host.
    `save` and `load` keep the answers as JSON, under the name of the model that gave them."""
    name = "lookup"
    ORDER = 16                              # ids of a context that are compared
    ROWS = 1 << 16

    def __init__(self, model: str = ""):
        self.model, self.answers, self.size, self.learnt = model, collections.deque(), 0, 0

    def learn(self, answer):
        answer = [i if type(i) is int and 0 <= i < 2 ** 31 else insist_whole("answer", i, 0, 2 ** 31 - 1)
                  for i in listed(answer, self.ROWS - 1)]
        self.answers.append(answer)
        self.size, self.learnt = self.size + len(answer) + 1, self.learnt + 1
        while self.size > self.ROWS:
            self.size -= len(self.answers.popleft()) + 1

    def newest(self, count: int) -> list[list[int]]:
        """The last `count` answers, the oldest first; fewer where fewer are kept."""
        return list(itertools.islice(self.answers, max(0, len(self.answers) - count), None))

    def save(self, path) -> None:
        raw = {"kind": "lookup", "model": self.model, "answers": list(self.answers)}
        replace_file(path, json.dumps(raw).encode())

    @classmethod
    def load(cls, path, model: str = "") -> Lookup:
        """What `save` wrote; InputError if it is none, is cut short, or was saved for another model."""
        with trusting(path, "no saved lookup of this model", "name another file, or move it away"):
            raw = read_json(path, "a saved lookup")
            if (raw["kind"], raw["model"]) != ("lookup", model):
                raise ValueError(f"a {str(raw['kind'])[:20]!r} of model {str(raw['model'])[:40]!r}, wanted a lookup "
                                 f"of {model!r}")
            lookup = cls(model)
            for answer in raw["answers"]:
                if not all(type(i) is int and 0 <= i < 2 ** 31 for i in answer):
                    raise ValueError("ids that are no whole numbers below 2**31")
                lookup.learn(answer)
            return lookup


class Adapted(DraftSource):
    """What a trained adapter (weights/adapter.py) makes of the drafter's ids. Source: `prefill_with_alignment` of the
    research code."""
    name, needs_drafter = "adapter", True

    def __init__(self, folder, device="cpu"):
        from weights import adapter
        self.guess, (self.network, self.config) = adapter.guess, adapter.load(folder, device)
        self.preview = []

    def begin(self, question):
        self.preview = []

    def read(self, preview):
        self.preview = list(preview)

    def propose(self, committed, limit):
        return self.guess(self.network, self.config, self.preview, committed, limit)


SOURCES = ("drafter", "self", "lookup", "adapter")


def source_named(name: str, model: str = ""):
    """A source by its name: `drafter` and `self` stay names, since their models are the engine's; `lookup` and
    `lookup:FILE` (what such a source of this model saved there, if it did) are a Lookup, `adapter:DIR` an Adapted."""
    kind, colon, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in SOURCES or (kind in ("drafter", "self") and colon) or bool(path) != bool(colon) or (
            kind == "adapter" and not path):
        raise InputError(f"draft_source {quoted(name)}: not one of drafter, self, lookup[:FILE], adapter:DIR; pick "
                         f"from these")
    if kind == "lookup":
        return Lookup.load(path, model) if path and os.path.exists(path) else Lookup(model)
    return Adapted(path) if kind == "adapter" else kind


def sources_of(asked, own: Lookup, target, drafter, mode: str) -> list:
    """The sources of a request. asked: its draft_source, None: all that there is, the cheapest ids first. own: the
    engine's Lookup; target, drafter: its models, or None."""
    copy = target is not None and target.copy is not None
    if asked is None:
        drafts = ["drafter"] * (drafter is not None)
        return drafts if mode == "prefill_then_verify" else [own, *drafts, *["self"] * copy]
    named = items_of("draft_source", asked, 1000) if issubclass(type(asked), (list, tuple)) else [asked]
    found = []
    for source in named:
        if issubclass(type(source), str):                    # isinstance would ask a class of the caller's
            if source.startswith("lookup:"):
                raise InputError(f"draft_source {quoted(source)}: only bench.py keeps a file of answers; take lookup, "
                                 f"or a Lookup that you load and save")
            source = own if source == "lookup" else source_named(source)
            if source == "self" and not copy:
                raise InputError("draft_source self: the target's 4-bit copy was not made; load the engine with "
                                 "self_draft=True")
        found.append(source if issubclass(type(source), (str, Lookup)) else Own(source))
    return found


def agreeing(ours, theirs) -> int:
    """How many ids two lists share from their start."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
