"""result: what a request gives back: `Event`s while the answer forms, and a `Result` at the end. Plain data: nothing
here imports torch, and all of it pickles. Times in seconds from the request's start."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Event:
    """One moment of a stream. `text` is all text of this kind so far, `delta` what this event added to it."""
    kind: str                               # "preview": the drafter's, may be wrong; "final": the target's, append-only
    text: str
    delta: str
    ids: list[int]
    t_ms: float                             # since the request came in
    finish_reason: str | None = None        # on the last event: "stop" or "length"
    result: Result | None = None            # on the last event


class Round(NamedTuple):
    """One forward of the target after its prefill."""
    source: str                             # who drafted: "drafter", "head start", "lookup", "self", ..; "": nobody
    drafts: list[int]                       # what the forward looked at
    accepted: int                           # of them; the bonus id is not counted
    behind: int = 0                         # the last so many came from earlier answers, behind those of `source`


SOURCED = ("rounds", "drafts", "accepted", "ids", "ms", "judged", "right")        # of a source, see `Result.sourced`


class Verdict(NamedTuple):
    """One forward of the deciding model that made ids of the answer, as `explain` shows it."""
    first: int                              # place in the answer of its first id
    drafts: list[int]                       # of the places from there on; none: prefill or a plain step
    ids: list[int]                          # the accepted drafts, then the model's own id
    second: list[int]                       # the most likely other id of each place
    margins: list[float]                    # logit of the id less that of `second`


@dataclass
class Result(Mapping):
    """What `generate` returns: attributes, and the same as a mapping. Times in seconds from the request's start."""
    output_text: str = ""
    output_ids: list = field(default_factory=list)
    finish_reason: str = ""                 # "stop" (end of sequence, or a stop string) or "length"
    mode: str = ""
    preview_text: str = ""
    preview_ids: list = field(default_factory=list)
    round_log: list = field(default_factory=list)     # a `Round` for each forward that could have had drafts
    drafted: int = 0                        # drafts the target looked at, those beyond the answer's end left out
    accepted_tokens: int = 0                # drafts it agreed with; bonus ids not counted
    rejected_at: int = -1                   # index of the first rejected draft of the first span, -1 if none
    rounds: int = 0
    accept_lens: list = field(default_factory=list)   # of each round; of the last one what is in the answer
    by_source: dict = field(default_factory=dict)     # of `speculative`: what each source brought, see `sourced`
    acceptance_rate: float = 0.0            # accepted / drafted
    tokens_per_round: float = 0.0           # mean of accept_len + 1
    free_tokens_count: int = 0              # drafts the host had before the target's prefill ended
    window_drafts: int = 0                  # those of them it had before the last frame was decoded
    wall_clock_time: float = 0.0
    ttfp: float | None = None               # first preview id on the host
    preview_end: float | None = None        # the last one
    ttft: float | None = None               # first answer id on the host
    tpot: float | None = None               # (end - ttft) / (ids - 1)
    stages: dict = field(default_factory=dict)        # side -> stage -> seconds
    timeline: list = field(default_factory=list)      # (row, stage, start_s, end_s, note)
    draft_log: list = field(default_factory=list)     # (place in the answer, id) of each of the drafter's forwards
    prompt_rows: dict = field(default_factory=dict)   # side -> rows
    peak_memory: int = 0                    # bytes on the target's device; on the CPU the process's peak
    drafter_error: str | None = None        # why a drafter or source gave up, if one did; the answer is not affected

    def __getitem__(self, key):
        return vars(self)[key]

    def __iter__(self):
        return iter(f.name for f in dataclasses.fields(self))

    def __len__(self):
        return len(dataclasses.fields(self))

    def as_dict(self) -> dict:
        """All of it in plain types: `json.dumps` takes it."""
        return {**vars(self), "round_log": [of._asdict() for of in self.round_log]}

    def add_stages(self, entries) -> None:
        """Takes over a request's `Entry`s of weights/timeline.py."""
        for of in entries:
            self.timeline.append((of.row, of.stage, of.start, of.end, of.side if of.row == "host" else ""))
            stages = self.stages.setdefault(of.side, {})
            stages[of.stage] = stages.get(of.stage, 0.0) + of.end - of.start

    def count(self) -> None:
        """The figures that follow from the others. What was drafted beyond the answer's end is none of them."""
        log, left = self.round_log, len(self.output_ids) - 1
        for i, (source, drafts, accepted, behind) in enumerate(log):
            log[i] = Round(source, drafts[:max(0, left)], min(accepted, max(0, left)),
                           max(0, behind - max(0, len(drafts) - max(0, left))))
            left -= accepted + 1
        self.rounds, self.accept_lens = len(log), [of.accepted for of in log]
        self.drafted, self.accepted_tokens = sum(len(of.drafts) for of in log), sum(self.accept_lens)
        self.acceptance_rate = self.accepted_tokens / self.drafted if self.drafted else 0.0
        self.tokens_per_round = self.accepted_tokens / self.rounds + 1 if log else 0.0
        self.by_source = self.sourced() if self.mode == "speculative" else {}
        span = next((of for of in log if of.drafts), None)
        self.rejected_at = span.accepted if span and span.accepted < len(span.drafts) else -1
        if len(self.output_ids) > 1:
            self.tpot = (self.wall_clock_time - self.ttft) / (len(self.output_ids) - 1)

    def sourced(self) -> dict:
        """{who drafted, "none" for plain steps: {rounds, drafts, accepted, ids, ms, judged, right}}; ms / ids is its
        price of an id, ids / rounds what a round gave. A round takes from the end of the target's forward before it to
        the end of its own; an id is one of the answer, the round's own one included. judged, right: of the drafts that
        the source made itself, those that stood behind right ones only, and those of them that were right."""
        ends = sorted(end for row, stage, _, end, _ in self.timeline
                      if row == "target" and stage in ("prefill", "decode", "verify"))
        found: dict[str, dict] = {}
        for (source, drafts, accepted, behind), begin, end in zip(self.round_log, ends, ends[1:], strict=False):
            own = len(drafts) - behind
            of = found.setdefault(source or "none", dict.fromkeys(SOURCED, 0))
            for key, value in zip(SOURCED, (1, len(drafts), accepted, accepted + 1, (end - begin) * 1e3,
                                            min(own, accepted + 1), min(own, accepted)), strict=True):
                of[key] += value
        return found

    def in_old_words(self) -> Result:
        """Itself, with the words of egpt_prefill_only. Times in seconds; a prefill has the vision encoder in it, not
        the files."""
        egpt, vl = (collections.Counter(self.stages.get(side, {})) for side in ("drafter", "target"))
        vars(self).update(
            output_tokens=self.output_ids, draft_tokens=[i for of in self.round_log for i in of.drafts],
            num_draft_tokens=self.drafted, overlap_window=max(0.0, (self.ttft or 0) - (self.ttfp or 1e9)),
            egpt_prefill_time=egpt["encode"] + egpt["prefill"], egpt_draft_time=egpt["draft"],
            vl_prefill_time=vl["encode"] + vl["prefill"], vl_verify_time=vl["verify"], vl_decode_time=vl["decode"])
        return self
