"""text: a tokenizer.json turned into ids and back. What a user types never becomes a special id."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from weights import InputError


class Text:
    """Text to ids and back, over one `tokenizer.json`. What a user types never becomes a special id."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            self.head, self.rest = (self._build(raw, scheme) for scheme in ("first", "never"))
            assert self.ids("USER: a")                       # a broken file may fail only when it encodes
            self.size = 1 + max(self.head.get_vocab(with_added_tokens=False).values())     # ids a text may turn into
        except FileNotFoundError:
            raise InputError(f"{path}: no tokenizer.json here; copy it from the Video-LLaVA checkpoint") from None
        except BaseException as error:                       # tokenizers' PanicException is not an Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            reason = str(error).split("\n")[0]
            raise InputError(f"{path}: not a usable tokenizer ({reason}); copy it again from the checkpoint") from None

    @staticmethod
    def _build(raw: dict, scheme: str) -> Tokenizer:
        """The pipeline upstream uses whatever the file stores: no normaliser, and a leading-space mark put in front
        of the first segment only (`scheme` first) or of none (`never`, for what follows visual rows)."""
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        tokenizer = Tokenizer.from_str(json.dumps(
            {**raw, "normalizer": None, "pre_tokenizer": metaspace, "post_processor": None,
             "truncation": None, "padding": None}))
        tokenizer.encode_special_tokens = True               # '</s>' or '<video>' in a question stay plain text
        return tokenizer

    def ids(self, text: str, first: bool = True) -> list[int]:
        return (self.head if first else self.rest).encode(text, add_special_tokens=False).ids

    def token(self, i: int) -> str:
        """The piece that an id stands for, as the file spells it; #i for an id it does not know."""
        piece = self.head.id_to_token(i) if i >= 0 else None
        return f"#{i}" if piece is None else "".join(c if c.isprintable() else f"<{ord(c):#x}>" for c in piece)

    def decode(self, ids: list[int]) -> str:
        return self.head.decode(ids, skip_special_tokens=True)


class TextStream:
    """Grows a text id by id. `push` returns what was added; an unfinished character waits for its last byte."""

    def __init__(self, text: Text):
        self.text, self.ids, self.out = text, [], ""

    def push(self, ids: list[int], end: bool = False) -> str:
        self.ids += ids
        whole = self.text.decode(self.ids)
        ready = whole if end else whole.rstrip("\ufffd")
        delta = ready[len(self.out):]
        self.out += delta
        return delta
