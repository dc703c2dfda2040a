"""show: one finished request for people: its answer with the drafts marked, id by id, its stages as a picture.

A request is a mapping with timeline [(row, stage, start_s, end_s, note)] by start, round_log, a list of
`Round`, of the target's forwards, draft_log [(place in the answer, id)] of the drafter's, mode, output_ids, ttft,
output_text, wall_clock_time, drafted and accepted_tokens; rows are `host`, `drafter` and `target`."""

import io
import os
import sys
import textwrap

from weights import replace_file
from weights.files import printable

COLOURS = {"load": "#9aa5b1", "preprocess": "#c3cad2", "encode": "#6aa9d8", "prefill": "#2f6fa7", "draft": "#e39b3b",
           "verify": "#4d9a57", "decode": "#a9cf9f"}
ROWS = ("host", "drafter", "target")
MARKS = {"accepted": ("\x01", "\x02"), "rejected": ("\x03", "\x04"), "own": ("", "")}
PLAIN = {1: "[", 2: "]", 3: "~", 4: "~"}                     # what stands for the marks in a pipe, and on a terminal
WIDTH = 100                                                  # of the screen
PAINT = {1: "\x1b[32m", 2: "\x1b[0m", 3: "\x1b[31m", 4: "\x1b[0m"}


# ---- in words --------------------------------------------------------------------------------------------------


def fmt(value, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def shown(of: dict | None, form: str = ".2f") -> str:
    """An estimate, with its interval if it has one."""
    return "-" if not of else f"{of['p50']:{form}}" + (
        "" if of["low"] is None else f" [{of['low']:{form}}, {of['high']:{form}}]")


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the last as it is, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)),
                       row[-1]]).rstrip() for row in rows]


def block(name: str, text: str, most: int) -> list[str]:
    """Text under a name, on at most so many lines of the screen."""
    text = "".join(c if c.isprintable() or c in "\x01\x02\x03\x04" else " " for c in text)
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10, max_lines=most,
                         placeholder=" ..", break_on_hyphens=False) or [name]


def colourful() -> bool:
    dumb = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return not dumb and ("FORCE_COLOR" in os.environ or sys.stdout.isatty())


def painted(lines: list[str], paint) -> list[str]:
    """Lines as a terminal may see them, whoever wrote what is in them; paint: what stands for each mark."""
    return [printable(line, "".join(map(chr, PLAIN))).translate(paint) for line in lines]


def marked(*found) -> str:
    """`pieces` as one text with marks around what was drafted."""
    return "".join(" " * text.startswith(" ") + MARKS[kind][0] + text.strip() + MARKS[kind][1] for kind, text in found)


def pieces(result, text) -> list[list[str]]:
    """The answer as [kind, text]: the target's "own" ids, "accepted" drafts, and "rejected" ones with all behind them,
    where they stood; `text` decodes."""
    answer, found, at = result["output_ids"], [], 0

    def add(kind: str, ids: list[int]) -> None:
        if added := text.decode(answer[:at] + ids)[len(text.decode(answer[:at])):] if ids else "":
            found.append([kind, added])

    for _, drafts, right, _ in [("", [], 0, 0), *result["round_log"]]:
        add("accepted", answer[at:at + right])
        at += right
        add("rejected", [i for i in drafts[right:] if i >= 0] if at < len(answer) else [])
        add("own", answer[at:at + 1])
        at += 1
    add("own", answer[at:])
    return found


def explained(result, verdicts, token) -> list[str]:
    """A line for each id of the answer, with marks around drafts, one for the drafts behind a wrong one, and the
    answer; `token` names an id."""
    lines, answer = [f"{'at':>4} {'forward':>7}  {'draft':16} {'':8}  {'said':16} {'margin':>8}  runner-up"], []
    for number, of in enumerate(verdicts):
        drafts = [token(i) for i in of.drafts]
        for i, (own, second, margin) in enumerate(zip(of.ids, of.second, of.margins, strict=True)):
            kind = "own" if i >= len(drafts) else "accepted" if of.drafts[i] == own else "rejected"
            begin, end = MARKS[kind]
            draft = f"{drafts[i]:16} {kind:8}" if i < len(drafts) else " " * 25
            lines.append(f"{of.first + i:4} {number:7}  {begin}{draft}{end}  {token(own):16} {margin:8.3f}  "
                         f"{token(second)}")
            begin, end = MARKS["accepted" if kind == "accepted" else "own"]
            answer.append(begin + token(own).replace("\u2581", " ") + end)
        if len(drafts) > len(of.ids):
            lines.append(f"{'':13} behind it: {' '.join(drafts[len(of.ids):])}")
    margins = [margin for of in verdicts for margin in of.margins]
    return [f"mode     {result['mode']}: {len(result['output_ids'])} ids in {len(verdicts)} forwards, "
            f"{result['accepted_tokens']} of {result['drafted']} drafts accepted; smallest margin {min(margins):.3f} "
            f"at {margins.index(min(margins))}", *lines, "answer  " + "".join(answer)]


# ---- as a picture ------------------------------------------------------------------------------------------------


def bars(result) -> list[tuple]:
    """The timeline's rows, each with a bool for each of its drafts, was it accepted: those that a forward of the target
    looked at, and those that a bar made."""
    rows, log, right, at = result["timeline"], list(result["round_log"]), {}, 1
    for source, drafts, accepted, _ in log:                  # {place in the answer: the drafter's id there, accepted}
        right.update(enumerate(drafts[:accepted] if source in ("drafter", "head start") else [], at))
        at += accepted + 1
    stages = ("verify", "decode") if result["mode"] == "speculative" else ("verify",)
    forwards = list(zip([row for row in rows if row[0] == "target" and row[1] in stages], log,
                        strict=False))                       # those queued behind the answer's end have no round
    rounds, early, made, found = dict(forwards), iter(result["draft_log"][1:]), {}, []
    for row in rows:
        flags = []
        if row in rounds:
            _, drafts, accepted, _ = rounds[row]
            flags = [i < accepted for i in range(len(drafts))]
        elif row[1] == "draft":
            place, id_ = next(early, (-1, -1)) if row[0] == "drafter" else (-1, -1)
            after = next((of for of in forwards if of[0][2] >= row[2]), None) if place < 0 else None
            if after and after[1][0] == row[0].replace("target", "self"):            # a round's, on the target's device
                _, drafts, accepted, behind = after[1]
                count = made[after[0]] = made.get(after[0], 0) + 1
                flags = [count <= accepted] if row[0] == "drafter" else [
                    i < accepted for i in range(len(drafts) - behind)]
            else:
                flags = [right.get(place) == id_]
        found.append((*row, flags))
    return found


def draw(result, path) -> None:
    """A PNG: three rows, stages as bars with their milliseconds, accepted drafts filled and rejected ones hollow, the
    time before the target's first id shaded."""
    from PIL import Image, ImageDraw, ImageFont
    left, wide, high, top, font = 90, 1300, 56, 48, ImageFont.load_default(size=14)
    total = max(end for *_, end, _ in result["timeline"]) * 1e3
    image = Image.new("RGB", (left + wide + 20, top + 3 * (high + 14) + 84), "white")
    on, foot, first = ImageDraw.Draw(image), top + 3 * (high + 14), result["ttft"] or 0.0

    def x(seconds):
        return left + seconds * 1e3 / total * wide

    def write(at, text):
        on.text(at, text, fill="black", font=font)

    on.rectangle([left, top - 8, x(first), foot], fill="#f3f1ea")
    write((left, 10), f"{result['mode']}: {len(result['output_ids'])} ids in {result['wall_clock_time'] * 1e3:.0f} ms, "
                      f"first after {first * 1e3:.0f} ms; {result['accepted_tokens']} of {result['drafted']} drafts "
                      f"accepted")
    lanes: dict[str, int] = {}
    for i, name in enumerate(ROWS):
        write((8, top + i * (high + 14) + high // 2 - 9), name)
    for row, stage, start, end, note, accepted in bars(result):
        y0 = top + ROWS.index(row) * (high + 14)
        y1 = y0 + high
        if row == "host":                                    # the two loads overlap
            y0 += lanes.setdefault(note, len(lanes)) % 2 * high // 2
            y1 = y0 + high // 2 - 2
        cells = accepted or [True]
        width = (x(end) - x(start)) / len(cells)
        for n, right in enumerate(cells):
            x0 = x(start) + n * width
            on.rectangle([x0, y0, max(x0 + width - 2, x0 + 1), y1], outline=COLOURS[stage],
                         fill=COLOURS[stage] if right else "white")
        label = f"{stage} {(end - start) * 1e3:.1f}"
        if all(cells) and x(end) - x(start) > on.textlength(label, font=font) + 6:
            write((x(start) + 3, (y0 + y1) // 2 - 9), label)
    step = next((s for s in (m * 10 ** e for e in range(7) for m in (1, 2, 5)) if total / s < 14), 10 ** 7)
    for ms in range(0, int(total) + 1, step):
        on.line([x(ms / 1e3), foot, x(ms / 1e3), foot + 5], fill="black")
        write((x(ms / 1e3) - 8, foot + 8), f"{ms}")
    write((8, foot + 8), "time, ms")
    at = float(left)
    for stage, colour in COLOURS.items():
        on.rectangle([at, foot + 46, at + 12, foot + 58], fill=colour)
        write((at + 16, foot + 43), stage)
        at += 32 + on.textlength(stage, font=font)
    write((at + 8, foot + 43), "filled: accepted drafts, hollow: rejected; shaded: before the first answer id")
    content = io.BytesIO()
    image.save(content, "PNG")
    replace_file(path, content.getvalue())
