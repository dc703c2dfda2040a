"""dataset: what a data set lists, in the layout of EventGPT's instruction data.

    FOLDER/EventGPT_Instruction_Subset.json    a list of records
    FOLDER/event_npy/NAME.npy                  of `event_data`; pictures FOLDER/event_image/NAME of `event_image` may
                                               stand in for a recording that is not there
    FOLDER/mp4/NAME.mp4                        of `mp4_data`, else of `video_data` without its ending

    samples, problems = read_dataset(Path("dsec"), None, -1)"""

import functools
import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from weights.files import MAX_LIST, InputError, describe, read_json

LIST = "EventGPT_Instruction_Subset.json"
PLACEHOLDERS = ("<event>", "<image>", "<video>")     # where the visual rows go, at either end of a question


@dataclass
class Sample:
    id: str
    question: str
    video: Path
    events: Path | list             # one recording, or a list of event images
    truth: str | None = None
    seq: str = ""                   # folder and number of the clip, as the data set names them
    clip: str = ""
    at: int = 0                     # of its record in the data set
    several: bool = False           # whether more than one question is asked of this clip; they follow one another


def read_dataset(folder: Path, question: str | list[str] | None, limit: int):
    """([Sample], [reason a listed record cannot be run]) of the first `limit` records, of all if it is negative. A
    record whose `conversations` ask several questions is a sample for each: ID, ID#2, .. question: one or several that
    are asked of every clip in place of its own. InputError if the list cannot be read or no record can be run."""
    index = Path(folder) / LIST
    records = read_json(index, "a list of records (--dataset-dir is the folder that holds it)", MAX_LIST, list)
    samples, problems, ids = [], [], set()
    for i, record in enumerate(records if limit < 0 else records[:limit]):
        try:
            found = read_record(Path(folder), record, [question] if isinstance(question, str) else question)
            for sample in found:
                if sample.id in ids:                         # --resume and --merge go by id
                    raise InputError(f"id {sample.id} is there twice; give each record its own")
                sample.at = i
            ids |= {sample.id for sample in found}
            samples += found
        except InputError as error:
            problems.append(f"record {i}: {error}")
    if not samples:
        reason = f"none of {len(problems)} records can be run ({problems[0]})" if problems else "the list is empty"
        raise InputError(f"{index}: {reason}; check the folder")
    return samples, problems


@functools.cache
def home_of(folder: str) -> str:
    """The folder that links in a data set may lead to: the one around it, and never the whole disk."""
    home = Path(os.path.realpath(folder))
    return str(home.parent if home.parent.parent != home.parent else home)


def bare(question: str) -> str:
    """The question without placeholders of visual rows: of events anywhere, of images and videos at either end, which
    is where Video-LLaVA's and LLaVA's instruction lists have them."""
    question, before = question.replace("<event>", ""), None
    while question != before:
        before = question = question.strip()
        for placeholder in PLACEHOLDERS:
            question = question.removeprefix(placeholder).removesuffix(placeholder)
    return question


def read_record(folder: Path, record: dict, questions: list[str] | None) -> list[Sample]:
    """One listed record, a Sample a question. InputError says which key is wrong, or which file is not there."""
    def wanted(of, key, kinds=(str,)):
        value = of.get(key) if isinstance(of, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool) or value in ("", []):
            raise InputError(f"{key} is {json.dumps(value)[:60]}, wanted {' or '.join(k.__name__ for k in kinds)}; "
                             f"mend the record")
        return value

    def inside(*parts):
        path = folder.joinpath(*parts)
        if not os.path.lexists(path):                        # a Mac spells an accent as a letter of its own
            spelt = (Path(folder, *(unicodedata.normalize(form, str(of)) for of in parts)) for form in ("NFC", "NFD"))
            path = next(filter(os.path.lexists, spelt), path)
        try:
            # Links are the user's own, as far as the folder beside the data set; what the list says stays inside.
            named = os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), ""))
            if not named:
                raise InputError(f"{path}: leads out of the data set; use relative paths")
            home = home_of(os.path.abspath(folder))
            if not (real := os.path.realpath(path)).startswith(os.path.join(home, "")):
                raise InputError(f"{path}: leads out of the data set, to {real}; copy it, or link inside {home} only")
            os.stat(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; complete the data set") from None
        except (OSError, ValueError) as error:               # too long, no right to look, NUL
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be looked up ({describe(error)}); check the path") from None
        return path

    if not isinstance(record, dict):
        raise InputError(f"is a {type(record).__name__}, wanted an object; mend the list")
    turns = wanted(record, "conversations", (list,)) if record.get("conversations") else []
    turns = [turn for turn in turns if isinstance(turn, dict)]
    asked = [(question, None) for question in questions or ()]
    for turn, reply in zip(turns, [*turns[1:], {}], strict=False) if not questions else ():
        if turn.get("from") == "human":
            answer = wanted(reply, "value") if reply.get("from") == "gpt" and reply.get("value") else None
            asked.append((bare(wanted(turn, "value")), answer))
    asked = [of for of in asked if of[0]]
    if not asked:
        raise InputError("conversations hold no question, a value from human; mend them, or pass `question`")
    try:
        events = inside("event_npy", wanted(record, "event_data"))
    except InputError:                                       # pictures may stand in for a recording that is not there
        if not record.get("event_image"):
            raise
        names = wanted(record, "event_image", (list,))
        events = [inside("event_image", wanted({"event_image": name}, "event_image")) for name in names]
    name = Path(wanted(record, "mp4_data") if record.get("mp4_data") else wanted(record, "video_data") + ".mp4")
    known, video = str(wanted(record, "id", (str, int))), inside("mp4", name)
    return [Sample(f"{known}#{k}" if k > 1 else known, question, video, events, truth, str(name.parent), name.stem,
                   several=len(asked) > 1) for k, (question, truth) in enumerate(asked, 1)]
