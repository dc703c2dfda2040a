"""asking: the arguments of every call of an engine, each named, typed and explained once.

    @takes(Asked)                                            # Engine.stream(events, video, query, .., timeout)
    def stream(self, asked): ...                             # asked.mode, asked.query, ..

The dataclass is the signature: `inspect.signature`, editors and type checkers see its fields as the method's arguments,
and the method gets them as one object. Nothing here imports a model."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from weights.drafting import WIDTHS
from weights.events import check_canvas
from weights.files import InputError, insist_flag, insist_number, insist_one_of, insist_whole
from weights.given import Shown, check_forms, events_given, video_given
from weights.result import Event
from weights.text import check_sampling, check_stop

FilePath = str | os.PathLike
MODES = ("target_only", "drafter_only", "prefill_only", "prefill_then_verify", "speculative")


@dataclass
class Media:
    """events: an `.npy`/`.npz` file; x, y, t, p in memory (a mapping, four arrays, a structured array, or [N, 4] with
    columns="txyp"; whole times in microseconds, others in seconds, or as time_unit says); or pictures of events, paths
    or in memory. video: an mp4, mov, mkv, webm or avi, its content, a file object, or frames (a list of pictures or of
    uint8 [H, W, 3], or one [R, H, W, 3] or [R, 3, H, W]); image: one picture in its place. Arrays of any library, also
    on a GPU; they are copied. event_path, event_image_path, video_path, image_path: the same, paths only. frame_rule:
    `uniform` or `first`, which frames of a longer video; event_frames: pictures that a recording is drawn in; canvas:
    their (H, W), by default as large as their events need."""
    events: Any = None
    video: Any = None
    _: KW_ONLY
    image: Any = None
    columns: str | None = None
    time_unit: str | None = None
    event_path: FilePath | None = None
    event_image_path: FilePath | list[FilePath] | None = None
    video_path: FilePath | None = None
    image_path: FilePath | None = None
    frame_rule: str = "uniform"
    event_frames: int = 5
    canvas: tuple[int, int] | None = None

    def shown(self, models) -> dict[str, Shown]:
        """{side: Shown} of the models that are used. InputError unless each has one clip, in memory or in a file."""
        self.event_frames = insist_whole("event_frames", self.event_frames, 1, 1000)
        self.canvas = check_canvas(self.canvas)
        check_forms(self.columns, self.time_unit, self.frame_rule)
        return {model.side: video_given(self.video, self.video_path, self.image, self.image_path, model.num_frames,
                                        self.frame_rule, model.on_gpu) if model.side == "target" else
                events_given(self.events, self.event_path, self.event_image_path, self.columns, self.time_unit)
                for model in models}


@dataclass
class Question:
    """query: the question."""
    query: str = ""


@dataclass
class Asking:
    """max_new_tokens: ids of the answer, at most. mode: see MODES. draft_len, overlap_len: drafts a round of the
    drafter or of your source (0..31), and drafts kept from the head start. draft_source: who drafts, `drafter`, `self`,
    `lookup`, `adapter:DIR`, an object with `propose`, or a list of them, asked in this order; None: earlier answers,
    then the drafter, then the target's 4-bit copy, as far as they are there.
    stop: strings that end the answer. The text is cut before the one that is complete first, and nothing of it is ever
    shown; `output_ids` are the fewest ids that hold the text, so the last one may reach beyond it.
    ignore_eos: go on to max_new_tokens. temperature (0..100): 0 is greedy; above, ids are drawn from
    softmax(logits / temperature) cut at top_p (0..1), and the seed (0..2**63 - 1) fixes the answer, whatever the mode
    and the drafts; in `drafter_only` the drafter draws. remember: False leaves what there is to learn from this answer
    to `remember`. timeout: seconds to wait for another thread's request, None: for as long as it takes."""
    max_new_tokens: int = 50
    _: KW_ONLY
    mode: str = "speculative"
    draft_len: int | None = None
    overlap_len: int | None = None
    draft_source: Any = None
    stop: str | Sequence[str] | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    remember: bool = True
    timeout: float | None = 60.0

    def check(self) -> None:
        """Brings the values into their plain forms; InputError for one that has none."""
        insist_one_of("mode", self.mode, MODES)
        self.mode = str.__str__(self.mode)                   # an Enum's word spells itself otherwise
        insist_flag("ignore_eos", self.ignore_eos)
        insist_flag("remember", self.remember)
        self.max_new_tokens = insist_whole("max_new_tokens", self.max_new_tokens, 1, 1_000_000)
        for name in ("draft_len", "overlap_len"):
            if getattr(self, name) is not None:
                setattr(self, name, insist_whole(name, getattr(self, name), 0, WIDTHS[-1]))
        if self.timeout is not None:
            self.timeout = insist_number("timeout", self.timeout, 0)
        self.stop = check_stop(self.stop)
        self.temperature, self.top_p, self.seed = check_sampling(self.temperature, self.top_p, self.seed)


@dataclass
class Told:
    """on_event: called with each `Event`."""
    _: KW_ONLY
    on_event: Callable[[Event], Any] | None = None


# ---- the calls -------------------------------------------------------------------------------------------------


@dataclass
class Opening(Asking, Media):
    """Of `Engine.open`."""


@dataclass
class Asked(Asking, Question, Media):
    """Of `Engine.stream`."""


@dataclass
class AskedTold(Told, Asked):
    """Of `Engine.generate`."""


@dataclass
class Further:
    """Of a clip. None: as it was opened."""
    query: str
    max_new_tokens: int | None = None
    _: KW_ONLY
    mode: str | None = None
    draft_len: int | None = None
    overlap_len: int | None = None
    draft_source: Any = None
    stop: str | Sequence[str] | None = None
    ignore_eos: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    remember: bool | None = None
    timeout: float | None = None


@dataclass
class FurtherChat(Further):
    """chat: the question goes on from the last answer of the chat, and its answer becomes part of it."""
    _: KW_ONLY
    chat: bool = False


@dataclass
class FurtherTold(Told, Further):
    """Of `Clip.generate` and `Clip.chat`."""


@dataclass
class OldAsked(Asked):
    """max_draft_tokens: another word for overlap_len; mode, draft_source: by default the constructor's."""
    max_draft_tokens: int | None = None
    _: KW_ONLY
    mode: str | None = None


@dataclass
class OldTold(Told, OldAsked):
    """Of `PrefillOnlyInference.generate`."""


Given = ParamSpec("Given")
Owner = TypeVar("Owner")
Object = TypeVar("Object")
Returned = TypeVar("Returned")


def insist_known(call: str, given, known) -> None:
    """InputError where a call is given an argument that there is not."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(f"{name}: not an argument of {call}; " + (f"did you mean {near[0]}?" if near else
                                                                       f"help({call}) lists all"))


def fits(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """The function, which refuses arguments that it does not have, or lacks, in InputError."""
    call, signature = function.__qualname__, inspect.signature(function)

    @functools.wraps(function)
    def fitting(*given: Given.args, **named: Given.kwargs) -> Returned:
        insist_known(call, named, [*signature.parameters])
        try:
            signature.bind(*given, **named)
        except TypeError as error:
            raise InputError(f"{call}: {error}; help({call}) lists its arguments") from None
        return function(*given, **named)
    return fitting


def takes(arguments: Callable[Given, Object]) -> Callable[
        [Callable[[Owner, Object], Returned]], Callable[Concatenate[Owner, Given], Returned]]:
    """A method of one argument, an object of this dataclass, becomes one of the dataclass's own arguments, whose
    meaning its help tells."""
    def decorate(method):
        @functools.wraps(method)
        def call(self, *given, **named):
            return method(self, arguments(*given, **named))
        own, named = inspect.signature(method), inspect.signature(arguments, eval_str=True).parameters
        call.__signature__ = own.replace(parameters=[own.parameters["self"], *named.values()])
        call.__annotations__ = {of.name: of.annotation for of in named.values()} | {"return": own.return_annotation}
        told = [inspect.cleandoc(of.__doc__) for of in reversed(arguments.__mro__) if of.__doc__ and ": " in of.__doc__]
        call.__doc__ = "\n\n".join([inspect.cleandoc(method.__doc__ or ""), *told])      # none under python -OO
        return fits(call)
    return decorate
