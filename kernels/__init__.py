"""kernels: one family a file, each with definition, Triton kernel, launch choice and wrapper. `python -m pytest` checks
them, on a GPU where there is one; `python -m tests.speeds` times them."""

import os
import signal
import sys
import warnings

# torch looks for numpy at import and says so when it is absent. Nothing at run time needs numpy here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
try:
    os.getcwd()
except FileNotFoundError:                        # torch's MKL would end the process, over another file
    print("current folder: was removed, and torch cannot start there; change to another", file=sys.stderr)
    raise SystemExit(2) from None


def interrupted(*_) -> None:
    """Ctrl-C while torch is imported, a second or two, is a word: raised there, some module swallows it."""
    os.write(2, b"interrupted\n")
    os._exit(130)


# Of our own commands alone. Under -m packages are imported before the command's name stands in sys.argv.
here, (command, *_) = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), [*sys.argv, ""]
if command == "-m":
    command = sys.orig_argv[sys.orig_argv.index("-m") + 1].replace(".", "/") if "-m" in sys.orig_argv else ""
ours = tuple(os.path.join(here, name) for name in ("bench.py", "engine.py", "tests/", "weights/", "kernels/"))
if os.path.abspath(command).startswith(ours) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)    # until `weights.files.command`
