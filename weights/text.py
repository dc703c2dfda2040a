"""text: a tokenizer.json turned into ids and back. What a user types never becomes a special id."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from weights.files import InputError, insist_number, insist_whole, items_of, quoted, read_json, reason_of, refusal

# EventGPT's prompt begins with it.
DRAFTER_SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. "
                  "The assistant gives helpful, detailed, and polite answers to the human's questions.")
PROBE = "USER: What is in this scene? ASSISTANT: Two cars, at 30 m."     # must come back from its ids
MARKER = re.compile(r"<[^<>\s]+>")                   # </s>, <video>: an added token that stands for no text


@dataclass(frozen=True)
class Prompt:
    """Ids around the visual rows. `rows` is the whole prompt's length once they are spliced in."""
    before: list[int]
    after: list[int]

    def rows(self, visual_rows: int) -> int:
        return len(self.before) + visual_rows + len(self.after)


class Text:
    """Text to ids and back, over one `tokenizer.json`. InputError unless it is a LLaMA-style tokenizer that works."""

    def __init__(self, path):
        raw = read_json(path, "a tokenizer.json: copy the Video-LLaVA checkpoint's, no tokenizer.model")
        self.path = Path(os.fsdecode(path))
        try:
            self.head, self.rest = (self._build(raw, scheme) for scheme in ("first", "never"))
            came_back = self.decode(self.ids(PROBE))         # a broken file may fail only when it encodes
        except BaseException as error:                       # tokenizers' PanicException is not an Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise refusal(path, f"not a usable tokenizer ({reason_of(error)})", "copy it again from the checkpoint"
                          ) from None
        if came_back.strip() != PROBE:
            raise refusal(path, f"not a LLaMA-style tokenizer: {PROBE!r} comes back as {came_back[:60]!r}",
                          "copy it from the Video-LLaVA checkpoint")
        added = self.head.get_added_tokens_decoder()
        plain = {i for i, token in added.items() if not token.special}
        vocab = self.head.get_vocab(with_added_tokens=False)
        self.size = 1 + max({*vocab.values()} | plain)       # ids that a text may turn into are below
        # What follows may still change or join the text of these: parts of a character, and ids without text.
        self.open_ids = {i for piece, i in vocab.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece)}
        self.open_ids |= {*added} - plain

    @staticmethod
    def _build(raw: dict, scheme: str) -> Tokenizer:
        """The pipeline upstream uses whatever the file stores: no normaliser, nothing random, and a leading-space mark
        put in front of the first segment only (`scheme` first) or of none (`never`, for what follows visual rows)."""
        none = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        added = [{**token, "special": token["special"] or bool(MARKER.fullmatch(token["content"]))}
                 for token in raw.get("added_tokens") or []]
        tokenizer = Tokenizer.from_str(json.dumps(
            {**raw, "normalizer": None, "pre_tokenizer": metaspace, "post_processor": None, "truncation": None,
             "padding": None, "added_tokens": added, "model": {**raw["model"], **none}}))
        tokenizer.encode_special_tokens = True               # '</s>' or '<video>' in a question stay plain text
        return tokenizer

    def differing(self, other: Text) -> int:
        """How many ids that both know stand for another piece there."""
        return sum(self.token(i) != other.token(i) for i in range(min(self.size, other.size)))

    def ids(self, text: str, first: bool = True) -> list[int]:
        return (self.head if first else self.rest).encode(text, add_special_tokens=False).ids

    def token(self, i: int) -> str:
        """The piece that an id stands for, as the file spells it; #i for an id it does not know."""
        piece = self.head.id_to_token(i) if i >= 0 else None
        return f"#{i}" if piece is None else "".join(c if c.isprintable() else f"<{ord(c):#x}>" for c in piece)

    def decode(self, ids: list[int]) -> str:
        return self.head.decode(ids, skip_special_tokens=True)

    def settled(self, ids: list[int]) -> int:
        """How many of the ids have a text that no further id can change: a run of bytes counts as a whole, valid or
        not, and ids without a text do not end it."""
        count = len(ids)
        while count and (ids[count - 1] in self.open_ids or self.head.id_to_token(ids[count - 1]) is None):
            count -= 1
        return count


class TextStream:
    """Grows a text id by id: what `push` returned, joined, is `Text.decode` of all ids. An unfinished character waits
    for its last byte, and for the id after it.

    stops: the text ends before the one of these that is complete first, however the ids come in; what may still become
    one waits. `ids` are the fewest that hold all of the text shown, so the last one may reach beyond it; without stops,
    and at an end that none of them brought about, they are all."""

    def __init__(self, text: Text, stops: Sequence[str] = ()):
        self.text, self.stops, self.given, self.out, self.stopped = text, stops, [], "", False
        self.ids = [] if stops else self.given

    def push(self, ids: list[int], end: bool = False) -> str:
        """What the ids add to the text; nothing once it has ended. end: nothing will follow."""
        if self.stopped:
            return ""
        self.given += ids
        whole, before = self._whole(len(self.given), end), len(self.out)
        found = [(at + len(of), at) for of in self.stops if (at := whole.find(of, before)) >= 0]
        self.stopped = bool(found)
        if found:
            whole = whole[:min(found)[1]]
        elif not end:
            waits = [n for of in self.stops for n in range(1, len(of)) if whole.endswith(of[:n])]
            whole = whole[:max(before, len(whole) - max(waits, default=0))]
        self.out = whole
        if self.stops:
            count = len(self.given) if end and not found else len(self.ids)
            while count < len(self.given) and len(self._whole(count, False)) < len(whole):
                count += 1
            self.ids = self.given[:count]
        return whole[before:]

    def _whole(self, count: int, end: bool) -> str:
        ids = self.given[:count]
        return self.text.decode(ids if end else ids[:self.text.settled(ids)])


def check_stop(stop) -> tuple[str, ...]:
    """The strings that end an answer; InputError unless it is one, or several."""
    stops = [stop] if isinstance(stop, str) else stop if stop is not None else []
    with contextlib.suppress(TypeError, InputError):         # TypeError: one is no text
        found = tuple(map(str.__str__, items_of("stop", stops, 10_000)))
        if isinstance(stops, (list, tuple)) and all(0 < len(of) <= 1000 for of in found):
            return found
    raise InputError(f"stop: wanted a string of 1 to 1000 characters, or a list of some, got {quoted(stop)}; change it")


def check_question(question) -> str:
    if not isinstance(question, str):
        raise InputError(f"query: wanted the question as text, got {type(question).__name__}; pass a str")
    question = str.__str__(question)                         # a class of the caller's may spell itself otherwise
    try:
        question.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("query: half a surrogate pair, not valid text; decode it as UTF-8 first") from None
    if len(question) > 100_000:
        raise InputError(f"query: the question has {len(question)} characters, at most 100000; shorten it")
    return question


def check_turns(turns, vocab: int) -> list[tuple[str, list[int]]]:
    """A chat so far, wherever it was kept meanwhile. InputError unless it is pairs of a question and its answer's ids,
    whole numbers below `vocab`."""
    found = []
    try:
        for question, ids in items_of("turns", turns, 10_000):
            ids = items_of("ids", ids, 1_000_000)
            found.append((check_question(question), [insist_whole("id", i, 0, vocab - 1) for i in ids]))
        return found
    except (TypeError, ValueError) as error:                 # InputError is a ValueError
        raise InputError(f"turns: wanted pairs (question, ids of its answer) ({reason_of(error)}); put back what "
                         f"`turns` held, or begin a new chat") from None


def check_sampling(temperature, top_p, seed, names=("temperature", "top_p", "seed")) -> tuple[float, float, int]:
    """The three as plain numbers. InputError unless temperature is 0..100, top_p above 0 and up to 1, and seed a whole
    number 0..2**63 - 1."""
    return (insist_number(names[0], temperature, 0, 100), insist_number(names[1], top_p, 0, 1, above=True),
            insist_whole(names[2], seed, 0, 2 ** 63 - 1))
