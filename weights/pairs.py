"""pairs: both models' recorded answers, one JSON object a line with src, seq, clip, question, videollava_ids,
eventgpt_ids: what `bench.py --record` writes, and tests/sources.py and tests/replay.py read."""

import json

from weights.files import json_lines, refusal, replace_file, trusting
from weights.load import listed


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
