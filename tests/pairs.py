"""pairs: both models' recorded answers, one JSON object a line with src, seq, clip, question, videollava_ids,
eventgpt_ids: what `bench.py --record` writes, and sources.py and replay.py read."""

from weights.files import MAX_LIST, parse_json, read_text, refusal, trusting
from weights.load import listed


def json_lines(path, wanted: str, most: int = MAX_LIST) -> list:
    """[(line number from 1, value)] of a file with one JSON value a line; blank lines are left out. A line ends at
    "\\n" alone: U+2028 and U+0085 may stand inside a text."""
    lines = enumerate(read_text(path, wanted, most).split("\n"), 1)
    return [(number, parse_json(path, line, wanted, number)) for number, line in lines if line.strip()]


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
