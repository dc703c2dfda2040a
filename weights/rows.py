"""rows: finished rows of a long run on disk, one JSON object a line under a header line. A run that dies loses nothing
but the row it was in; rows of several processes are put together by id."""

import fcntl
import json
from pathlib import Path

from weights import UNREADABLE, InputError, describe

SAME = ("schema", "commit", "weights", "config")     # of a header: rows under different ones never share a table


def insist_same(path: Path, theirs: dict, ours: dict, way_out: str) -> None:
    """InputError that names each value of SAME in which the header of `path` differs from ours."""
    def flat(of, name=""):
        return {k: v for key in of for k, v in flat(of[key], f"{name} {key}").items()} if isinstance(of, dict) else {
            name.removeprefix(" ").removeprefix("config "): json.dumps(of)[:60]}

    theirs, ours = (flat({name: of.get(name) for name in SAME}) for of in (theirs, ours))
    found = [f"{name} ({theirs.get(name)}, here {ours.get(name)})" for name in {**theirs, **ours}
             if theirs.get(name) != ours.get(name)]
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
            self.file = open(path, "ab", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # goes with the process, however it ends
        except BlockingIOError:
            raise InputError(f"{path}: another run is writing to it; wait for it, or choose another --rows") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --rows") from None
        start = path.read_bytes()[:1 << 20]
        if start.startswith(b'{"schema": ') and b"\n" not in start:
            self.file.truncate(0)                            # it died over its first line
        elif start:
            found, rows, whole = read_rows(path)
            insist_same(path, found, head, "choose another --rows")
            self.rows = [row for row in rows if "error" not in row]
            self.file.truncate(whole)                        # a line that was cut off is written again
        if not path.stat().st_size:
            self.append(head)

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
    """(header, rows, bytes of whole lines). A last line without its end is left out; of a row that was tried again the
    last try counts."""
    try:
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        head, *rows = [json.loads(line) for line in raw[:whole].splitlines()]
        assert isinstance(head["config"], dict) and type(head["config"]["samples"]) is int
        modes = set(head["config"]["modes"])
        sound = (type(row["id"]) is str and type(row["at"]) is int and row["modes"].keys() <= modes for row in rows)
        assert all(sound), "a line that is no finished sample"
    except UNREADABLE as error:
        raise InputError(f"{path}: not a file of rows ({describe(error)}); wants what --rows wrote") from None
    return head, list({row["id"]: row for row in rows}.values()), whole


def merge(paths: list[Path]) -> tuple[dict, list]:
    """(header, rows) of all files together, by id: differing headers, duplicates and holes are refused. The header's
    "shards_s" says how many seconds each took."""
    head, rows, took = {}, {}, []
    for path in paths:
        own, found, _ = read_rows(path)
        head = head or own
        insist_same(path, own, head, f"merge runs like {paths[0]}")
        took.append(sum(row.get("took_s", 0.0) for row in found))
        for row in found:
            if row["id"] in rows:
                raise InputError(f"{path}: sample {row['id']} is there twice; give every row file once")
            rows[row["id"]] = row
    if missing := head["config"]["samples"] - len(rows):
        raise InputError(f"{paths[0]}: {missing} of {head['config']['samples']} samples are missing; give the row "
                         f"files of all shards, finished")
    return {**head, "shards_s": took}, list(rows.values())
