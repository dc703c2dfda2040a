"""files: the one way in for small files, the one way out for all files, and what files are taken for by mistake.

    config = read_json("config.json", "a model's config")
    replace_file("report.json", content)

Whatever is wrong with a file ends in InputError: one line with the path, what was wanted, what came, what to try. Only
regular files are read: opening a pipe or a terminal would wait, and a device has no end."""

import argparse
import contextlib
import difflib
import errno
import functools
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import signal
import stat
import sys
import threading
import zipfile
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
              RecursionError, MemoryError)       # what taking a damaged JSON file at its word may raise
OUTPUTS = ("json", "out", "rows", "record", "timeline")      # flags of all commands that name what is written
READS = ("tokenizer", "questions", "from_json", "merge", "compare", "draft_source", "eventgpt", "videollava", "pairs")
STDOUT_ERRORS = (errno.EPIPE, errno.EBADF, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)       # others have names
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ZIP_END = 22                         # bytes of the record at a zip's end, in front of its comment
MAX_SMALL = 64 << 20                 # bytes of a config, an index, a tokenizer
MAX_LIST = 256 << 20                 # bytes of a list of samples, or of recorded pairs
LOOK_ALIKES = [                      # what comes in place of a file, by its first bytes, and the way out if it is sure
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page", "the download saved a page and not the file: fetch it again"),
    (rb"PK\x03\x04", "a zip archive", None),
    (rb"\x1f\x8b", "a gzip file", "unpack it with `gunzip`"),
    (rb"(?s)..[\0-\x3f]\0{5}\{\"", "a safetensors file", "let its name end in .safetensors"),
    (rb"GGUF", "a GGUF file", "use the checkpoint in safetensors form"),
    (rb"\x89HDF", "an HDF5 file", None),
    (rb"#!AER-DAT", "an AEDAT recording", None),
    (rb"Event Stream", "an Event Stream recording", None),
    (rb"% ", "a Prophesee recording", None),
    (rb"\x80", "a bare pickle", None),
    (rb"\x89PNG", "a PNG image", None),
    (rb"\xff\xd8", "a JPEG image", None),
    (rb"\x93NUMPY", "a numpy array", None),
]


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: path, reason, way out. bench.py exits 2 with it.
    Arguments are named in backquotes, or by the first word; `in_flags` makes flags of them.

    Whatever a path or a file puts into it, the line stays one, and can be read."""

    def __init__(self, line: str):
        line = printable(line)
        super().__init__(line if len(line) <= 1200 else f"{line[:700]} .. {line[-450:]}")


class Refused(Exception):
    """Why a file cannot be used: (reason, way out). `naming` makes an InputError of it where the path is known."""


def in_flags(error: InputError, parser, **others: str) -> str:
    """The line in the words of a command: a library names arguments, in backquotes or as the first word, a command its
    flags. others: flags of arguments that the parser calls otherwise."""
    flags = {of.dest: of.option_strings[-1] for of in parser._actions if of.option_strings} | others
    return re.sub(r"^(\w+)(?=[:\s[])|`(\w+)`", lambda of: flags.get(of[1] or of[2], of[0]), str(error))


def number_of(value, convert) -> Any:
    """The number that a value of any library is, by `operator.index` or `float`; NaN where it is none, or several."""
    dtype = getattr(value, "dtype", int)         # of a tensor, or a number of numpy
    with contextlib.suppress(Exception):         # what a class of the caller's raises; OverflowError of 309 digits
        if isinstance(value, (SupportsFloat, SupportsIndex)) and not isinstance(value, bool) and \
                getattr(value, "shape", ()) == () and re.search("int|float", getattr(dtype, "name", str(dtype))):
            return convert(value)
    return math.nan


def insist_whole(name: str, value, low: int, high: float = math.inf) -> int:
    """The whole number that an argument is, of any library's type."""
    whole = number_of(value, operator.index)
    if not low <= whole <= high:
        wanted = f"{low}..{high}" if high < math.inf else f"from {low} up"
        raise InputError(f"{name}: wanted a whole number {wanted}, got {quoted(value)}; change it")
    return whole


def insist_one_of(name: str, value, choices) -> None:
    """The argument is one of these words."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}: {quoted(value)} is not one of {', '.join(choices)}; pick from these")


def insist_flag(name: str, value) -> None:
    """The argument is True or False, of any library's type: "no" and 0 are neither."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise InputError(f"{name}: wanted True or False, got {quoted(value)}; change it")


def items_of(argument: str, value, most: int) -> list:
    """What a list of the caller's holds. InputError if it has no length, as what can be read once, if its class fails
    to say its items, or if there are more than `most`."""
    try:
        len(value)
        items = list(itertools.islice(value, most + 1))
    except Exception as error:
        raise InputError(f"{argument}: a {type(value).__name__} that cannot be read ({reason_of(error)}); pass a list"
                         ) from None
    if len(items) > most:
        raise InputError(f"{argument}: holds more than {most} items; pass fewer")
    return items


def insist_kind(name: str, value, kind: type) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name}: is a {type(value).__name__}, wanted a {kind.__name__}; pass the engine's own")


def insist_function(name: str, value) -> None:
    if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
        raise InputError(f"{name}: wanted a function that is not async, got {quoted(value)}; pass one, or leave "
                         f"it out")


def insist_number(name: str, value, low: float, high: float = math.inf, above: bool = False) -> float:
    """The number that an argument is, of any library's type. above: `low` itself is too low."""
    number = number_of(value, float)
    if not low <= number <= high or above and number == low:
        wanted = f"{'above ' * above}{low:g}" + (f"{' and up to ' if above else '..'}{high:g}" if high < math.inf else
                                                 " or more")
        raise InputError(f"{name}: wanted a number {wanted}, got {quoted(value)}; change it")
    return number


def insist_filled(words) -> None:
    """Refuses a flag whose value is empty, as by a variable of the shell that is not set: it would be left out."""
    for before, word in zip(["", *words], words, strict=False):
        if not word or re.fullmatch("--[^=]+=", word):
            raise InputError(f"{word[:-1] or before or 'arguments'}: is empty; give a value, or leave it out")


class Parser(argparse.ArgumentParser):
    """Of every command: a wrong or empty flag is one line, like all bad input; --max_samples is --max-samples."""

    way_out = "--help lists all flags"                       # a command's: what is raised elsewhere names no flag

    def __init__(self, *, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, **options)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        insist_filled(words)
        return super().parse_args([re.sub(r"^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in words],
                                  namespace)

    def error(self, message):
        raise InputError(f"{message}; {self.way_out}")

    def _print_message(self, message, file=None):            # argparse's own hides that it could not be written
        print(message or "", end="", file=file or sys.stderr, flush=True)


def becomes_file(path) -> bool:
    """Whether an output is a file, or will be one, and no device or stdout."""
    return bool(path) and str(path) != "-" and (not os.path.exists(path) or os.path.isfile(path))


def insist_writable(path, flag: str) -> None:
    """A long run must not end in a path that was wrong from the start. A device is written to, a file is replaced."""
    if not path or (str(path), flag) == ("-", "json"):
        return
    reason, place = "is a folder, or in none that one may write to", path
    try:
        if not os.path.exists(path) or os.path.isfile(path):
            place = os.path.dirname(os.path.realpath(path))
        if os.access(place, os.W_OK) and not os.path.isdir(path) and os.path.basename(path) and str(path) != "-":
            os.stat(path)
            return
    except FileNotFoundError:                                # a new file; or the current folder was removed
        if place != path:
            return
    except (OSError, ValueError) as error:                   # too long, a link to itself; NUL
        reason = reason_of(error)
    raise InputError(f"{path}: cannot be written ({reason}); choose another --{flag.replace('_', '-')}")


def insist_apart(options: argparse.Namespace, **read) -> None:
    """InputError unless each of a command's OUTPUTS can be written, and is neither another of them, nor a file that the
    command reads, nor where stdout goes. It reads what its READS name, all in a folder too; `read`: more."""
    def place(path):
        with contextlib.suppress(OSError, ValueError):
            found = os.fstat(path) if isinstance(path, int) else os.stat(path)
            return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None
        with contextlib.suppress(OSError, ValueError, TypeError):
            return os.path.realpath(path)

    for name in READS:
        value = getattr(options, name, None) or ""
        value = re.findall(r"(?:^|,)\w+:([^,]+)", value) if name == "draft_source" else value
        read[name] = value if isinstance(value, list) else [value] * bool(value)
    folders = [(os.path.join(form(path), ""), f"read by `{name}`") for name, paths in read.items() for path in paths
               if os.path.isdir(path) for form in (os.path.abspath, os.path.realpath)]
    taken = {place(fd): f"where {of} goes" for fd, of in ((1, "stdout"), (2, "stderr"))}
    taken |= {place(path): f"read by `{name}`" for name, paths in read.items() for path in paths}
    for name in OUTPUTS:
        insist_writable(path := getattr(options, name, None), name)
        if name == "timeline" and path and not str(path).lower().endswith(".png"):
            raise InputError(f"`{name}`: {path} is no PNG; name a file that ends in .png")
        mine = f"written by `{name}`"
        if not becomes_file(path):
            continue
        inside = [of for folder, of in folders if os.path.exists(path) and any(
            form(path).startswith(folder) for form in (os.path.abspath, os.path.realpath))]
        if (other := [*inside, taken.setdefault(place(path), mine)][0]) != mine:
            raise InputError(f"{path}: is {other}, and `{name}` would replace it; name another file")


def rank(text: str) -> int | None:
    """The number of a process or shard, as its launcher writes it; None for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


@dataclass(frozen=True)
class Held:
    """The content of a file that the caller holds in memory, read wherever a path is; `name` is what messages say."""
    name: str
    content: bytes

    def __fspath__(self) -> str:
        return self.name

    __str__ = __fspath__


def printable(text: str, keep: str = "") -> str:
    """Text from outside as a terminal may see it: control characters but for those to `keep`, line breaks and halves of
    surrogate pairs are spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def command(main):
    """main(..) -> exit code, as the program's end wants it: bad input is a line and 2, Ctrl-C a word and 130, as are
    other signals that ask it to end. A pipe that nobody reads any more ends it in silence, a full disk behind stdout
    in a line; closed ones are /dev/null. What stdout's encoding cannot say is spelt out."""
    @functools.wraps(main)
    def run(*argv) -> int:
        for of in () if argv else ENDING:        # the program itself, and nobody who calls its main
            if signal.getsignal(of) is not signal.SIG_IGN:           # as nohup and shells without jobs leave it
                signal.signal(of, signal.default_int_handler)
        for name in ("stdout", "stderr"):        # closed: the next file that is opened would be written to
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = main(*argv)
            sys.stdout.flush()
            return code or 0
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        except InputError as error:
            line, code = str(error), 2
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            line, code = f"memory: ran out ({reason_of(error)}); free some, or ask for less", 2
        except OSError as error:
            if error.filename is None and error.errno not in STDOUT_ERRORS:
                raise
            line, code = f"{error.filename}: cannot be used ({reason_of(error)}); check the path", 2
            if error.filename is None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # nothing more goes there
                if isinstance(error, BrokenPipeError):
                    return 1
                line = f"stdout: cannot be written ({reason_of(error)}); free some room"
        try:
            print(printable(line), file=sys.stderr, flush=True)
        except OSError:                          # full, too: the code is all that is left to say it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        return code
    return run


def refusal(path, reason, way_out) -> InputError:
    """InputError "PATH: reason; way out"."""
    try:
        name = path_text(path, "")
    except Refused:
        name = quoted(path)
    return InputError(f"{name or repr(name)}: {reason}; {way_out}")


def path_text(path, wanted: str, way_out: str = "give it as text") -> str:
    """The text of a path. Refused if it is none, or its class fails to say it."""
    with contextlib.suppress(Exception):
        return os.fsdecode(path)
    raise Refused(f"is a {type(path).__name__}, wanted {wanted}", way_out)


@contextlib.contextmanager
def naming(path):
    """Refused inside becomes an InputError that names the path."""
    try:
        yield
    except Refused as refused:
        raise refusal(path, *refused.args) from None


@contextlib.contextmanager
def trusting(path, what: str, way_out: str):
    """InputError "PATH: what it is not (why); way out" where the block, which takes a file at its word, fails by it."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        raise refusal(path, f"{what} ({describe(error)})", way_out) from None


def spelt(value, spell=str) -> str:
    """What a value says of itself, whatever its class does when it is asked; its class if that fails."""
    try:
        return spell(value)
    except Exception:
        return f"a huge {type(value).__name__}" if type(value) is int else f"a {type(value).__name__}"


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was short; the CPU's allocator has no class for it, and a capture that ends hides it."""
    return error is not None and (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
                                  or "allocate memory" in str(error) or ran_out(error.__context__))


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {(spelt(error).splitlines() or [''])[0]}"


def brief(value, limit: int = 80) -> str:
    """A value that came out of a file, short enough for a message."""
    text = spelt(value[:limit + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def quoted(value, limit: int = 80) -> str:
    """A value as code spells it, short enough for a message."""
    return brief(spelt(value, repr), limit)


def say(text: str) -> None:
    """Prints what holds text from outside."""
    print(printable(text, "\n"))


def reason_of(error: BaseException) -> str:
    """What an exception says, short enough for a message; its class where it says nothing."""
    return brief(getattr(error, "strerror", None) or spelt(error).partition("\n")[0] or type(error).__name__)


# ---- reading -----------------------------------------------------------------------------------------------------


def open_regular(path, wanted: str):
    """(open binary file, size in bytes). Refused: missing, a folder, a pipe or device, a URL, unreadable, empty."""
    if isinstance(path, Held):
        if not path.content:
            raise Refused(f"0 bytes, wanted {wanted}", "is it read to its end already?")
        return io.BytesIO(path.content), len(path.content)
    name = path_text(path, f"the path of {wanted}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise Refused(f"is an address, only local files are read, wanted {wanted}", "download it and give its path")
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise Refused(f"is a folder, wanted {wanted}", "give the path of a file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"is not a regular file, wanted {wanted}", "save it to disk first")
        file = open(name, "rb")
    except FileNotFoundError:
        raise Refused(f"no such file, wanted {wanted}", nearest_name(name)) from None
    except (OSError, ValueError) as error:       # ValueError: a NUL inside the path
        raise Refused(f"cannot be opened ({reason_of(error)}), wanted {wanted}",
                      "check the path and its permissions") from None
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        file.close()
        raise Refused(f"0 bytes, wanted {wanted}", "an interrupted copy? fetch it again")
    return file, size


def nearest_name(name: str) -> str:
    """A way out for a missing file: the most similar name in its folder, or the folder that is missing."""
    folder, base = os.path.split(name)
    if os.path.islink(name):
        return f"it is a link to {brief(os.readlink(name))}, which is not there: mend it, or fetch the file again"
    try:
        folder = os.path.abspath(folder)         # OSError: the current one was removed
        near = difflib.get_close_matches(base, os.listdir(folder)[:2000], 1, 0.81)       # no tokenizer.model for .json
    except OSError:
        return f"its folder {folder or '.'} does not exist or cannot be read"
    return f"did you mean {near[0]}?" if near else f"check the name; {folder} exists"


def names_in(folder) -> list[str]:
    """What a folder holds, in order of its names."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise refusal(folder, f"cannot be read ({error.strerror})", "check the path and its permissions") from None


def open_kind(path, wanted: str, heads: tuple = (), way_out: str = ""):
    """(open binary file, size in bytes, its first bytes). Refused as by `open_regular`, and for other heads."""
    file, size = open_regular(path, wanted)
    head = file.read(256)
    file.seek(0)
    if heads and not head.startswith(heads):
        file.close()
        what, way_out = looks_like(head, way_out)
        raise Refused(f"not {wanted} but {what}", way_out)
    return file, size, head


def insist_file(path, *kind) -> int:
    """Bytes of the file `path`. InputError unless it can be opened now and, of a kind with heads, begins with one; the
    arguments of `open_kind`."""
    with naming(path):
        file, size, _ = open_kind(path, *kind)
        file.close()
    return size


def look_alike(head: bytes):
    """(what the first bytes of a file show it to be, the way out or None), or None where they show nothing."""
    return next(((what, way_out) for pattern, what, way_out in LOOK_ALIKES if re.match(pattern, head)), None)


def looks_like(head: bytes, way_out: str):
    """(what a file of the wrong kind is, judged by its first bytes, and a way out)."""
    if found := look_alike(head):
        return found[0], found[1] or way_out
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"text starting with {head[:24].decode('ascii')!r}", way_out
    return f"a file starting with the bytes {head[:8].hex(' ')}", way_out


def read_bytes(path, wanted: str, most: int = MAX_SMALL) -> bytes:
    """All of a small file. InputError if it cannot be read, is larger than `most` bytes, or is a web page or an LFS
    pointer."""
    with naming(path):
        file, size = open_regular(path, wanted)
        with file:
            if size > most:
                raise Refused(f"{size} bytes, wanted {wanted} of at most {most}", "is it the right file?")
            try:
                content = file.read(size + 1)    # not `most`: Python takes memory for all that it is asked to read
            except (OSError, MemoryError) as error:
                raise Refused(f"cannot be read ({reason_of(error)})", "check the disk and the free memory") from None
        if (found := look_alike(content[:64])) and found[1]:
            raise Refused(f"is {found[0]}, wanted {wanted}", found[1])
        return content


def read_text(path, wanted: str, most: int = MAX_SMALL) -> str:
    """The text of a UTF-8 file; a byte order mark is dropped, line ends stay as they are."""
    content = read_bytes(path, wanted, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refusal(path, f"not UTF-8 text (byte {error.start} is {content[error.start]:#04x}), wanted {wanted}",
                      "save it as UTF-8, or fetch it again") from None


def parse_json(path, text: str, wanted: str, line: int = 1):
    """The value of a JSON text that begins at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno + line - 1} column {error.colno}: {error.msg}" + (
            ", as in JSONL, a value a line" if error.msg == "Extra data" and error.colno == 1 else "")
    except (ValueError, RecursionError, MemoryError) as error:
        reason = f"line {line}: {reason_of(error)}"
    raise refusal(path, f"not JSON ({reason}), wanted {wanted}", "mend it, or fetch it again")


def read_json(path, wanted: str, most: int = MAX_SMALL, kind: type = dict):
    """The value of a JSON file, an object unless another `kind` is given."""
    value = parse_json(path, read_text(path, wanted, most), wanted)
    if not isinstance(value, kind):
        names: dict[type, str] = {dict: "object", list: "list"}
        raise refusal(path, f"holds a JSON {names.get(type(value), type(value).__name__)}, wanted {wanted}: "
                      f"{names[kind]}", "fetch it again")
    return value


def insist_whole_zip(archive: zipfile.ZipFile) -> None:
    """Refused where a file holds bytes in front of its zip, or behind it that are no comment: readers look for the last
    end of a zip that there is, and leave out in silence what else was put into the file."""
    first, size = min((of.header_offset for of in archive.infolist()), default=0), archive.fp.seek(0, os.SEEK_END)
    archive.fp.seek(max(0, size - ZIP_END - 65_535))
    tail = archive.fp.read()
    end = tail[tail.rfind(b"PK\5\6"):]
    if first or len(end) != ZIP_END + int.from_bytes(end[20:ZIP_END], "little"):
        raise Refused("holds bytes that are no part of its zip", "damaged, or something was appended: fetch or save it "
                      "again")


# ---- writing -----------------------------------------------------------------------------------------------------


def replace_file(path, content: bytes | memoryview) -> None:
    """Puts `content` where `path` leads. A regular file, or a new one, is written beside its place and renamed, so that
    nobody ever sees half of it; its mode and owner stay. A device or a pipe is written to, never replaced. InputError
    if it cannot be done; a regular file is then untouched."""
    partial = None
    with naming(path):
        path = path_text(path, "the path of a file to write")
    try:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            status = None
        if status and not stat.S_ISREG(status.st_mode):
            with open(path, "wb") as file:
                file.write(content)
            return
        if not os.path.basename(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target = os.path.realpath(path)
        beside = f".{os.getpid()}.{threading.get_ident()}.partial"           # a name may be as long as names can be
        with open(os.path.join(os.path.dirname(target), beside), "wb") as file:
            partial = file.name
            file.write(content)
            if status:
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
                with contextlib.suppress(OSError):
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
            file.flush()
            os.fsync(file.fileno())              # else a power cut may leave the name without the bytes
        os.replace(partial, target)
        partial = None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({reason_of(error)}); free some room, or choose another path"
                         ) from None
    finally:
        if partial:
            with contextlib.suppress(OSError):
                os.unlink(partial)
