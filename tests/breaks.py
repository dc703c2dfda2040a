"""breaks: deliberate mistakes, each of which the tests named beside it must see.

    python tests/breaks.py                     every break; some minutes
    python tests/breaks.py --only round -n 2   those whose file, reason or tests hold the word, two at a time

Each is put into a copy of the tree, and only its tests run there. Printed are those that no test sees, and those whose
text no longer occurs exactly once; either makes the exit code 1. tests/test_breaks.py keeps the texts up to date."""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600                        # for the tests of one break


@dataclass(frozen=True)
class Break:
    """`old` becomes `new` in `file`. why: what would be wrong. tests: arguments of pytest, run in tests/."""
    file: str
    old: str
    new: str
    why: str
    tests: str


def of(file, tests, *breaks):
    """Breaks of one file that the same tests catch: (old, new, why)."""
    return [Break(file, *each, tests) for each in breaks]


BREAKS = [
    *of("kernels/round.py", "test_round.py",
        ("state_W[0], state_W[2] = n_out, accept_len", "state_W[0], state_W[2] = n_out, accept_len + 1",
         "the bonus id is counted as an accepted draft"),
        ("tl.store(state_ptr + ACCEPT_LEN, accept_len.to(tl.int64))",
         "tl.store(state_ptr + ACCEPT_LEN, accept_len.to(tl.int64) + 1)",
         "the bonus id is counted as an accepted draft, on the GPU"),
        ("(0x7FFFFFFF - col).to(tl.int64)", "col.to(tl.int64)", "the highest id wins a tie"),
        ("fresh = fresh[:fresh.index(eos) + 1]", "pass", "ids go on behind end-of-sequence"),
        ("tl.where((s < count) & (target == eos), s, MAX_ROWS)", "tl.where(s < 0, s, MAX_ROWS)",
         "ids go on behind end-of-sequence, on the GPU"),
        ("tl.maximum(limit - n_out, 0)", "tl.maximum(limit - n_out, 0) + 1", "one id more than the limit"),
        ("    if done:", "    if False:", "a finished answer grows"),
        ("        if done == 0:", "        if done < 2:", "a finished answer grows, on the GPU"),
        ("state_W[6] |= int(logits_SV.isnan().any())", "state_W[6] = int(logits_SV.isnan().any())",
         "NaN is forgotten by the next finite forward"),
        ("tl.load(state_ptr + NONFINITE) | nonfinite", "nonfinite",
         "NaN is forgotten by the next finite forward, on the GPU"),
        ("pos_ids_S = state_W[3] + n_out - 1 +", "pos_ids_S = state_W[3] + n_out +", "rows stand one place too late")),
    *of("kernels/recall.py", "test_recall.py",
        ("if self.at + len(ids) > self.rows:", "if self.at + len(ids) >= self.rows:",
         "a text that just fits overwrites the oldest"),
        ("torch.empty(PLACES, dtype=torch.int32, pin_memory=self.mail is not None).fill_(-1)",
         "torch.empty(PLACES, dtype=torch.int32, pin_memory=self.mail is not None)",
         "memory that nobody wrote is taken for ids")),
    *of("kernels/attention.py", "test_attention.py",
        ("SENTINEL", "SENTINEL", "a row sees the rows behind it")),
    *of("kernels/frames.py", "test_frames.py",
        ("SENTINEL", "SENTINEL", "polarity is drawn in the other colour")),
    *of("weights/media.py", "test_media.py",
        ('"protocol_whitelist": "file"', '"protocol_whitelist": "file,http,tcp"', "a clip may open an address"),
        ("if packet.is_corrupt:", "if False:", "half a packet passes for a frame"),
        ("[k * total // num_frames for k in range(num_frames)]",
         "[round(k * total / num_frames) for k in range(num_frames)]", "other frames than upstream's are shown")),
]


# ---- the command -----------------------------------------------------------------------------------------------


def occurrences(entry: Break, root: Path = ROOT) -> int:
    """How often the text to be replaced occurs in its file; 0 without that file."""
    path = root / entry.file
    return path.read_text(encoding="utf-8").count(entry.old) if path.exists() else 0


def copy_of(root: Path, folder: Path) -> Path:
    """The tree in `folder`, beside a link to what lies beside the tree."""
    tree = folder / "tree"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
    shared = root.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return tree


def run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """(exit code of pytest, the end of what it printed): 0 passed, 1 failed."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    try:
        done = subprocess.run(command, cwd=tree / "tests", env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 1, "took too long"                            # a break may also show as a hang
    return done.returncode, done.stdout[-2000:] + done.stderr[-500:]


def verdict(entry: Break, tree: Path, root: Path = ROOT) -> tuple[str, str]:
    """("caught", "UNCAUGHT" or "NO TEST", the end of what pytest printed) of one break in a copy of the tree."""
    path, sound = tree / entry.file, (root / entry.file).read_text(encoding="utf-8")
    path.write_text(sound.replace(entry.old, entry.new), encoding="utf-8")
    try:
        code, printed = run_tests(tree, entry.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return {0: "UNCAUGHT", 1: "caught"}.get(code, "NO TEST"), printed      # else: nothing collected, a wrong name, ..


def run(breaks, workers: int = 1, root: Path = ROOT, show=print) -> int:
    """Tries all of them; returns how many are not as they should be."""
    stale = [entry for entry in breaks if occurrences(entry, root) != 1]
    for entry in stale:
        show(f"OUT OF DATE  {entry.file}: {occurrences(entry, root)} times {entry.old!r}")
    fresh, wrong, trees = [entry for entry in breaks if entry not in stale], len(stale), queue.Queue()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as pool:
        for i in range(workers):
            trees.put(copy_of(root, Path(name) / str(i)))

        def within(work, *args):
            tree = trees.get()
            try:
                return work(*args, tree)
            finally:
                trees.put(tree)
        selections = list(dict.fromkeys(entry.tests for entry in fresh))
        sound = pool.map(lambda tests: within(lambda tests, tree: run_tests(tree, tests), tests), selections)
        broken = {tests: printed for tests, (code, printed) in zip(selections, sound, strict=True) if code}
        for tests, printed in broken.items():
            show(f"FAILS UNBROKEN  {tests}\n{printed}")
        fresh = [entry for entry in fresh if entry.tests not in broken]

        def tried(entry):
            began = time.monotonic()
            return *within(lambda entry, tree: verdict(entry, tree, root), entry), time.monotonic() - began
        for entry, (word, printed, seconds) in zip(fresh, pool.map(tried, fresh), strict=True):
            show(f"{word:9} {seconds:6.1f} s  {entry.file}: {entry.why}"
                 + ("" if word == "caught" else f"\n    {entry.old!r}\n    by {entry.tests}")
                 + (f"\n{printed}" if word == "NO TEST" else ""))
            wrong += word != "caught"
    show(f"{len(breaks)} breaks: {len(breaks) - wrong - sum(b.tests in broken for b in breaks)} caught, {wrong} not, "
         f"{len(broken)} test selections that fail without any")
    return wrong + len(broken)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORDS", default="", help="breaks whose line holds all of these words")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="breaks at a time (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    options = parser.parse_args(argv)
    if options.n < 1:
        parser.error(f"-n: wanted 1 or more, got {options.n}")
    chosen = [entry for entry in BREAKS if all(word in f"{entry.file} {entry.why} {entry.tests}"
                                               for word in options.only.split())]
    if not chosen:
        parser.error(f"--only: no break holds {options.only!r}")
    if options.list:
        print("\n".join(f"{entry.file}: {entry.why} ({entry.tests})" for entry in chosen))
        return 0
    return int(run(chosen, options.n, show=lambda line: print(line, flush=True)) > 0)


if __name__ == "__main__":
    sys.exit(main())
