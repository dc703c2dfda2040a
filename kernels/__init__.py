"""kernels: one family a file, each with definition, Triton kernel, launch choice and wrapper. `python -m pytest` checks
them, on a GPU where there is one; `python -m tests.speeds` times them."""

import os
import sys
import warnings

# torch looks for numpy at import and says so when it is absent. Nothing at run time needs numpy here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
try:
    os.getcwd()
except FileNotFoundError:                        # torch's MKL would end the process, over another file
    print("current folder: was removed, and torch cannot start there; change to another", file=sys.stderr)
    raise SystemExit(2) from None


def interrupted(kind, *of) -> None:
    """Ctrl-C while torch is imported, a second or two, is a word; of later ones `weights.files.command` knows."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, *of)
    print("interrupted", file=sys.stderr)


here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.abspath("".join(sys.argv[:1])).startswith(os.path.join(here, "")):     # embedded there may be none
    sys.excepthook = interrupted                 # of a command of ours alone
