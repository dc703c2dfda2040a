"""rows: finished rows of a benchmark, one a sample: on disk, and the figures that follow from them.

On disk a row is one JSON object a line under a header line. A run that dies loses nothing but the row it was in; rows
of several processes are put together by id. Figures are plain functions of rows, every ratio above 1 is faster."""

import collections
import fcntl
import json
import os
import statistics
from pathlib import Path

from kernels.check import quantiles
from weights import InputError, controls
from weights.files import parse_json, read_text, trusting
from weights.sources import agreeing

SAME = ("schema", "commit", "weights", "config")     # of a header: rows under different ones never share a table


def insist_same(path: Path, theirs: dict, ours: dict, way_out: str) -> None:
    """InputError that names each value of SAME in which the header of `path` differs from ours."""
    def flat(of, name=""):
        return {k: v for key in of for k, v in flat(of[key], f"{name} {key}").items()} if isinstance(of, dict) else {
            name.removeprefix(" ").removeprefix("config "): json.dumps(of)[:60]}

    with trusting(path, "not a file of rows", "wants what --rows wrote"):
        theirs, ours = (flat({name: of.get(name) for name in SAME}) for of in (theirs, ours))
    found = [f"{dict(samples='--max-samples').get(name, name)} ({theirs.get(name)}, here {ours.get(name)})"
             for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if found:
        raise InputError(f"{path}: was written with another {', '.join(found[:4])}; {way_out}")


class RowFile:
    """The file of one process. `rows` are those found on resuming, but for rows with an "error", which are to be tried
    again. Without a path it keeps nothing."""

    def __init__(self, path: Path | None, head: dict):
        self.path, self.rows, self.file = path, [], None
        if path is None:
            return
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InputError(f"{path}: is not a regular file, and rows are read back; choose another --rows")
            self.file = open(path, "a+b", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # goes with the process, however it ends
        except BlockingIOError:
            raise InputError(f"{path}: another run is writing to it; wait for it, or choose another --rows") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --rows") from None
        if path.stat().st_size:
            try:
                found, rows, cut = read_rows(path)
                insist_same(path, found, head, "choose another --rows")
                self.rows = [row for row in rows if "error" not in row]
            except InputError:
                self.file.seek(0)
                start, line = self.file.read(), json.dumps(head).encode()
                if b"\n" in start or start.endswith(b"}") or not line.startswith(start[:40]):
                    raise
                cut = len(start)                             # a run like this one died over its first line
            self.file.truncate(path.stat().st_size - cut)    # a line that was cut off is written again
        if not path.stat().st_size:
            self.append(head)
        elif self.file.seek(-1, os.SEEK_END) >= 0 and self.file.read(1) != b"\n":
            self.file.write(b"\n")

    def append(self, value: dict) -> None:
        line = json.dumps(value).encode() + b"\n" if self.file else b""
        try:
            while line:                                      # a nearly full disk takes a part of it first
                line = line[self.file.write(line):]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); free some room and go on with "
                             f"--resume, finished samples are kept") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()


def read_rows(path: Path) -> tuple[dict, list, int]:
    """(header, rows, bytes of a last line without its end, which is left out). Of a row that was tried again the last
    try counts."""
    wanted = "a file of rows, as --rows writes it"
    with trusting(path, "not a file of rows", "wants what --rows wrote"):
        text = read_text(path, wanted, 1 << 32)
        whole, _, cut = text.rpartition("\n") if "\n" in text else (text, "", "")
        head, *rows = [parse_json(path, line, wanted, at) for at, line in enumerate(whole.split("\n"), 1)]
        insist_sound(rows, head["config"])
        if "samples" in head:
            raise ValueError("a report, as --json writes it")
    return head, list({row["id"]: row for row in rows}.values()), len(cut.encode())


def insist_sound(rows: list, config: dict) -> None:
    """ValueError, or what `trusting` knows, unless each is a finished sample of a run with this config."""
    modes = set(config["modes"])
    if type(config["samples"]) is not int or type(rows) is not list or not all(
            type(row["id"]) is str and type(row["at"]) is int and row["modes"].keys() <= modes for row in rows):
        raise ValueError("a line that is no finished sample")
    for row in rows:
        if most := max((abs(n) for n in whole_numbers(row) if not -2 ** 63 < n < 2 ** 63), default=0):
            raise ValueError(f"a number of {most.bit_length()} bits in sample {row['id']}, wanted less than 64")
        for mode, of in row["modes"].items():
            lens = of.get("accept_lens", [])
            if not all(type(n) is int and n >= 0 for n in lens) or lens and sum(lens) > of["drafted"]:
                raise ValueError(f"accepted drafts of {mode} in sample {row['id']} that were not made")


def whole_numbers(value):
    """All of a JSON value."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from whole_numbers(part)
    elif type(value) is int:
        yield value


def merge(paths: list[Path]) -> list:
    """The rows of all files together, by id: differing headers, duplicates and holes are refused."""
    head, rows = {}, {}
    for path in paths:
        own, found, _ = read_rows(path)
        head = head or own
        insist_same(path, own, head, f"merge runs like {paths[0]}")
        for row in found:
            if row["id"] in rows:
                raise InputError(f"{path}: sample {row['id']} is there twice; give every row file once")
            rows[row["id"]] = row
    if missing := head["config"]["samples"] - len(rows):
        raise InputError(f"{paths[0]}: {missing} of {head['config']['samples']} samples are missing; give the row "
                         f"files of all shards, finished")
    return list(rows.values())


# ---- figures -----------------------------------------------------------------------------------------------------


def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def per_question(rows: list) -> dict | None:
    """Of clips that are asked several questions, medians in ms: "open", to read, encode and prefill a clip; "first", to
    the first id of its first question, files on disk; "further", to that of a further one. None: no clip is."""
    asked = [(row.get("open_ms"), (row["modes"].get("target_only") or next(iter(row["modes"].values())))["ttft_ms"])
             for row in rows if row.get("several") and row["modes"]]
    opened = [(open_ms, open_ms + ttft) for open_ms, ttft in asked if open_ms is not None]
    return {"open": median([open_ms for open_ms, _ in opened]), "first": median([first for _, first in opened]),
            "further": median([ttft for open_ms, ttft in asked if open_ms is None])} if asked else None


def forwards(ids: list[int], accepted: int, rounds: int) -> int:
    """The target's forwards behind its prefill: its rounds, and a step for each id that they did not make."""
    return rounds + max(0, len(ids) - 1 - accepted - rounds)


def added(tables: list[dict]) -> dict:
    """`Result.by_source` over several answers."""
    total = collections.defaultdict(collections.Counter)
    for source, of in ((source, of) for table in tables for source, of in table.items()):
        total[source].update(of)
    return total


def parting(ours, theirs) -> int | None:
    """Where two lists of ids part for the first time, None if they are equal."""
    return None if ours == theirs else agreeing(ours, theirs)


def estimate(values: list[float]) -> dict | None:
    """{p50, low, high}: the median and its bootstrap interval of 95 %, None without values; below three of them low and
    high are None."""
    if not values:
        return None
    low, high = controls.interval(values) or (None, None)
    return {"p50": statistics.median(values), "low": low, "high": high}


def judged(of: dict) -> str:
    """What a ratio shows, above 1 being faster; what differs by less than 1 % is nothing."""
    if of["low"] is None:
        return "too few samples to tell"
    return ("faster" if of["low"] > 1 and of["p50"] >= 1.01 else "slower" if of["high"] < 1 and of["p50"] <= 0.99
            else "no difference shown")


def compare(rows) -> dict:
    """How many (sample, mode) pairs were compared with target_only, how many are equal, where the others part.
    target_only itself is listed only where its own repeats differ."""
    found = [(row["id"], mode, of) for row in rows for mode, of in row["modes"].items()
             if of["identical"] is not None and not (mode == "target_only" and of["identical"])]
    return {"compared": len(found), "equal": sum(of["identical"] for *_, of in found), "differing": [
        {"id": id_, "mode": mode, "position": of["differs_at"]}
        for id_, mode, of in found if not of["identical"]]}


def per_forward(ids: int, taken: int) -> float | None:
    return ids / taken if taken else None


def mode_figures(rows, config: dict, identical: bool) -> dict:
    """{mode: what its rows of the tables show}; ratios above 1 are faster, and only there if all outputs are identical.

    ratio: target_only's e2e over the mode's, by sample; later_ms: by how much its first id comes later than
    target_only's, by repeat."""
    figures = {}
    for mode in config["modes"]:
        have = [row["modes"][mode] for row in rows if mode in row["modes"]]
        if not have:
            continue
        pairs = [(row["modes"]["target_only"], row["modes"][mode]) for row in rows
                 if mode in row["modes"] and "target_only" in row["modes"]] if identical else []
        ratios = [base["e2e_ms"] / of["e2e_ms"] for base, of in pairs]
        later = [ours - theirs for base, of in pairs for theirs, ours in
                 zip(base["raw"]["ttft_ms"], of["raw"]["ttft_ms"], strict=False) if None not in (theirs, ours)]
        accept_lens, drafted = [a for of in have for a in of["accept_lens"]], sum(of["drafted"] for of in have)
        ids, taken = sum(len(of["ids"]) for of in have), [of["forwards"] for of in have if of["forwards"] is not None]
        reasons = collections.Counter(why_not(mode, of, config) for of in have)
        figures[mode] = {
            **{name: dict(zip(("p20", "p50", "p80"), quantiles(values), strict=True)) if values else None
               for name in ("e2e_ms", "ttft_ms", "ttfp_ms", "tpot_ms")
               for values in [[v for of in have for v in of["raw"][name] if v is not None]]},
            "tokens": ids, "forwards": sum(taken) if taken else None,
            "ids_a_forward": per_forward(ids - len(have), sum(taken)),
            "ratio": estimate(ratios),
            "later_ms": estimate(later) if mode != "target_only" else None,
            "drafted": drafted, "accepted": sum(accept_lens),
            "overlap_drafts": median([of["overlap_drafts"] for of in have]),
            "window_drafts": median([of["window_drafts"] for of in have]),
            "accept_rate": sum(accept_lens) / drafted if drafted else None,
            "tokens_per_round": statistics.mean(accept_lens) + 1 if drafted else None,
            "histogram": dict(sorted(collections.Counter(accept_lens).items())) if drafted else {},
            "by_source": added([of.get("by_source", {}) for of in have]),
            "why_not": "" if drafted else max(reasons, key=reasons.get)}
    return figures


def why_not(mode: str, of: dict, config: dict) -> str:
    """Why the target looked at no draft of a sample in this mode."""
    if mode in ("target_only", "drafter_only", "prefill_only"):
        return {"drafter_only": "another answer", "prefill_only": "a preview only"}.get(mode, "")
    if of["drafter_error"]:
        return "drafter gave up"
    if mode == "lookup_again" or mode == "speculative" and "drafter" not in config["draft_source"]:
        return "nothing proposed"
    if of["preview"]:
        return "first id was wrong"
    return "gate shut" if config["gate"] == "on" else "no draft in time"
