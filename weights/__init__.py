"""weights: what turns files into tensors, and what is learnt from files. Checkpoints, media, pickles into safetensors,
draft sources, the embedded tiny pair."""

import os
import warnings
from pathlib import Path

# torch looks for numpy at import and says so when it is absent. Nothing at run time needs numpy here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
              RecursionError)        # what taking a damaged JSON file at its word may raise


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: path, reason, way out. bench.py exits 2 with it.

    Whatever a path or a file puts into it, the line stays one: line breaks, control characters and halves of surrogate
    pairs are spelt out."""

    def __init__(self, line: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def replace_file(path, content: bytes) -> None:
    """Writes under another name and renames, so that nobody ever sees half a file. InputError if it cannot be done;
    what was there before is then untouched."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())                          # else a power cut may leave the name without the bytes
        partial.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); free some room, or choose another "
                         f"path") from None
    finally:
        partial.unlink(missing_ok=True)
