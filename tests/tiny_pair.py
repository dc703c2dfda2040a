"""tiny_pair: what the embedded pair gets right on held-out scenes, and how many drafts its target accepts.

    python -m tests.tiny_pair [--count 40] [--device cpu] [--packed] [--json PATH]

Scenes that training never saw go the whole way: events through .npz, frames through H.264, Pillow's resize, the engine.
Beside both models stand two controls that see nothing: `answer`, the text training saw most often for the same
question, and `value`, each attribute's own most frequent value. An attribute is read back from a text by `parse`
and counts where the true answer states it. The target's own 4-bit copy drafts as `self`, and behind the drafter's head
start as `cascade`. Beside the drafter's drafts stand as many a round from what sees no scene: `answer`; `previous`, the
last answer to the same question; `lookup`, of the answers so far; `taught`, a lookup that knew 3,000 training answers
before. --packed: the drafter as loaded, then with packed weights.
Exits 1 if a speculative answer differs from target_only's."""

import functools
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from engine import Fixed, Lookup, agreeing, load_engine
from weights import replace_file
from weights.controls import interval
from weights.files import Parser, command, insist_whole
from weights.memory import DRAFTER_DTYPES
from weights.tiny import make_clips, scenes

TINY = Path(scenes.__file__).resolve().parent
MAX_NEW_TOKENS = 64                                 # the longest answer has 58 ids
DRAFTS = 15                                         # a round, of the drafter and of every control alike
TRAINED = range(24000)                              # scenes of training, by seed
ATTRIBUTES = ("kind", "count", "heading", "speed", "shape", "colour", "still", "still_shape", "still_colour")
SEEN_BY_EVENTS = ("kind", "count", "heading", "speed", "shape")


def parse(text: str) -> dict:
    """The attributes an answer states; what it does not state is absent."""
    found, colours, shapes = {}, "|".join(scenes.COLOURS), "|".join(scenes.SHAPES)
    if match := re.search(r"\b(one|two|three) cars?\b", text):
        found |= {"kind": "road", "count": scenes.NUMBERS.index(match[1])}
    elif match := re.search(rf"\b(a|two) ({colours}) ({shapes})s?\b(?! stands)", text):
        found |= {"kind": "shapes", "count": {"a": 1, "two": 2}[match[1]], "colour": match[2], "shape": match[3]}
    if match := re.search(r"\b(slowly|quickly)\b", text):
        found["speed"] = match[1]
    if match := re.search(r"to the (left|right)\b|\b(up|down)wards\b", text):
        found["heading"] = match[1] or match[2]
    if match := re.search(rf"a ({colours}) ({shapes}) stands still", text):
        found |= {"still": True, "still_colour": match[1], "still_shape": match[2]}
    elif "van is parked" in text:
        found["still"] = True
    elif re.search(r"nothing (else is there|is parked)", text):
        found["still"] = False
    return found


def stated(scene: dict) -> dict:
    """The attributes that a scene's answers state, for comparing with `parse`."""
    return {k: scene[k] for k in ATTRIBUTES if k in scene and (scene["still"] or not k.startswith("still_"))}


@functools.cache
def trained() -> list[dict]:
    """The scenes of training."""
    return [scenes.sample(seed) for seed in TRAINED]


def most_frequent(question: int) -> str:
    """The answer that training scenes give most often to QUESTIONS[question]."""
    return Counter(scenes.answer(scene, question) for scene in trained()).most_common(1)[0][0]


def most_frequent_values() -> dict:
    """Each attribute's most frequent value over training scenes that have it."""
    seen = {}
    for scene in trained():
        for name, value in stated(scene).items():
            seen.setdefault(name, Counter())[value] += 1
    return {name: values.most_common(1)[0][0] for name, values in seen.items()}


def attribute_rates(answers: list[tuple[dict, str | dict]]) -> dict[str, float]:
    """Share of texts (or of parsed ones) that state an attribute as the scene has it, where the true answer does."""
    right, asked = Counter(), Counter()
    for scene, text in answers:
        found = parse(text) if isinstance(text, str) else text
        for name, value in stated(scene).items():
            asked[name] += 1
            right[name] += found.get(name) == value
    return {name: right[name] / asked[name] for name in ATTRIBUTES if asked[name]}


def taught_lookup(text, end: int, count: int = 300) -> Lookup:
    """A lookup of the answers that `count` training scenes give to every question."""
    lookup = Lookup()
    for scene in trained()[:count]:
        for q in range(len(scenes.QUESTIONS)):
            lookup.learn(text.ids(scenes.answer(scene, q)) + [end])
    return lookup


def evaluate(engine, count: int, folder: Path, progress=None, controls: bool = True) -> dict:
    """Figures over `count` held-out scenes written to `folder`; scene i asks question i modulo 10."""
    records = make_clips.make_scenes(folder, count)
    common = [most_frequent(q) for q in range(min(count, len(scenes.QUESTIONS)))]
    texts = {"target": [], "drafter": [], "answer": []}
    exact, accepted, drafted, lens, agreed, unequal, last = Counter(), Counter(), Counter(), {}, [], [], {}
    text, end = engine.target.text, engine.target.stops[0]
    lookups = {"lookup": Lookup(), "taught": taught_lookup(text, end)} if controls else {}
    for i, record in enumerate(records):
        scene, q = scenes.sample(make_clips.HELD_OUT + i), i % len(scenes.QUESTIONS)
        truth = record["conversations"][1]["value"]
        request = dict(event_path=folder / "event_npy" / record["event_data"],
                       video_path=folder / "mp4" / record["mp4_data"],
                       query=scenes.QUESTIONS[q], max_new_tokens=MAX_NEW_TOKENS)
        alone = engine.generate(mode="target_only", **request)
        preview = engine.generate(mode="drafter_only", **request)
        for side, given in (("target", alone.output_text), ("drafter", preview.output_text), ("answer", common[q])):
            texts[side].append((scene, given))
            exact[side] += given == truth
        agreed.append(agreeing(preview.output_ids, alone.output_ids))
        blind = {"answer": Fixed(text.ids(common[q]) + [end]), "previous": Fixed(last.get(q, [])), **lookups}
        own = {"drafter": "drafter"}
        if controls and engine.target.copy:
            own |= {"self": "self", "cascade": ["drafter", "self"]}
        for name, source in {**own, **(blind if controls else {})}.items():
            rounds = 0 if name == "cascade" else DRAFTS if controls else None        # of the drafter
            result = engine.generate(mode="speculative", draft_source=source, draft_len=rounds, **request)
            if result.output_ids != alone.output_ids:
                unequal.append((i, name))
            accepted[name] += result.accepted_tokens
            drafted[name] += result.drafted
            lens.setdefault(name, []).append(result.accept_lens)
        last[q] = alone.output_ids
        if progress:
            progress(i + 1)
    values = most_frequent_values()
    return {
        "scenes": count,
        "exact": {side: exact[side] / count for side in texts},
        "attributes": {side: attribute_rates(given) for side, given in texts.items()} | {
            "value": attribute_rates([(scene, values) for scene, _ in texts["target"]])},
        "drafter_agrees_for": sum(agreed) / count,
        "accept_rate": {name: accepted[name] / max(1, drafted[name]) for name in lens},
        "tokens_per_round": {name: per_round(scenes_of) for name, scenes_of in lens.items()},
        "interval": {name: interval(scenes_of, per_round) for name, scenes_of in lens.items()},
        "accept_len": {name: dict(sorted(Counter(sum(scenes_of, [])).items())) for name, scenes_of in lens.items()},
        "unequal": unequal,
    }


def per_round(accept_lens: list[list[int]]) -> float:
    """Tokens per round over some scenes' rounds."""
    return sum(n + 1 for of in accept_lens for n in of) / max(1, sum(map(len, accept_lens)))


def report(figures: dict) -> str:
    """The figures as text."""
    sides = ("target", "drafter", "answer", "value")
    lines = [f"{figures['scenes']} held-out scenes; controls: the most frequent answer, the most frequent value", "",
             f"{'share right':14}" + "".join(f"{side:>10}" for side in sides)]
    seen = {name: "" if name in SEEN_BY_EVENTS else "   not in the events" for name in ATTRIBUTES}
    rows = {"whole answer": figures["exact"], **{
        name: {side: figures["attributes"][side][name] for side in sides} for name in figures["attributes"]["target"]}}
    for name, values in rows.items():
        cells = (f"{values[side]:10.2f}" if side in values else " " * 10 for side in sides)
        lines.append(f"{name:14}" + "".join(cells) + seen.get(name, ""))
    lines += ["", f"drafter_only and target_only agree for {figures['drafter_agrees_for']:.1f} ids"]
    for name in figures["accept_rate"]:
        histogram = "  ".join(f"{n}: {times}" for n, times in figures["accept_len"][name].items())
        around = " [{:.2f}, {:.2f}]".format(*figures["interval"][name]) if figures["interval"][name] else ""
        lines.append(f"{name:11} accept_rate {figures['accept_rate'][name]:.2f}   tokens_per_round "
                     f"{figures['tokens_per_round'][name]:.2f}{around}   accept_len {histogram}")
    seeing = ("drafter", "self", "cascade")
    rivals = {name: rate for name, rate in figures["tokens_per_round"].items() if name not in seeing}
    if rivals:
        best = max(rivals, key=rivals.get)
        lines.append(f"tokens_per_round over scenes [95 %]; the drafter's over {best}'s, the best that sees no scene: "
                     f"{figures['tokens_per_round']['drafter'] / rivals[best]:.2f}")
    lines.append(f"speculative equals target_only: {'no, ' + str(figures['unequal']) if figures['unequal'] else 'yes'}")
    return "\n".join(lines)


def packed_report(figures: dict) -> str:
    """{drafter dtype: figures of `evaluate`} as a table."""
    lines = [f"{'steps':14}{'agree, ids':>12}{'accept_rate':>13}{'tokens_per_round':>18}{'drafter right':>15}"
             f"{'lossless':>10}"]
    for name, f in figures.items():
        lines.append(f"{name:14}{f['drafter_agrees_for']:12.1f}{f['accept_rate']['drafter']:13.3f}"
                     f"{f['tokens_per_round']['drafter']:18.2f}{f['exact']['drafter']:15.2f}"
                     f"{'no' if f['unequal'] else 'yes':>10}")
    return "\n".join(lines)


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="held-out scenes (default %(default)s)")
    parser.add_argument("--eventgpt", default=TINY / "drafter", help="drafter folder (default: the embedded one)")
    parser.add_argument("--videollava", default=TINY / "target", help="target folder (default: the embedded one)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for bf16 there (default %(default)s)")
    parser.add_argument("--packed", action="store_true", help="the drafter as loaded, then with packed weights")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args(argv)
    insist_whole("--count", options.count, 1)
    torch.set_num_threads(min(4, torch.get_num_threads()))

    def progress(done):
        print(f"\r{done}/{options.count}", end="" if done < options.count else "\n", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for dtype in DRAFTER_DTYPES if options.packed else ("bf16",):
            engine = load_engine(options.eventgpt, options.videollava, device=options.device, drafter_dtype=dtype,
                                 gate=False, self_draft=True)        # what is accepted, whether or not it pays here
            name = "as loaded" if dtype == "bf16" else dtype
            figures[name] = evaluate(engine, options.count, Path(folder), progress, controls=not options.packed)
    where = torch.cuda.get_device_name(engine.target.device) if engine.target.on_gpu else "CPU"
    print(f"embedded trained toy pair, {where}, {str(engine.target.decoder.dtype).removeprefix('torch.')}, torch "
          f"{torch.__version__}, python -m tests.tiny_pair --count {options.count}"
          f"{' --packed' if options.packed else ''}")
    unequal = any(f["unequal"] for f in figures.values())
    if options.packed:
        print(packed_report(figures))
    else:
        figures = figures["as loaded"]
        print(report(figures))
    if options.json:
        replace_file(options.json, json.dumps(figures, indent=1).encode() + b"\n")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
