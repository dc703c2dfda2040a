"""200 seeded mutations of every kind of file: each is read or refused in one line. tests/fuzz.py says what else may
not happen, and runs any number of them."""

import random
import subprocess
import sys

import fuzz
import pytest

import weights.given
from weights import InputError

HERE = ("small", "index", "adapter", "answers")              # in this process: a child's imports take seconds


def tallies(program, kinds, mutations):
    """(exit code, {kind: the tally it prints}, all it printed) of tests/fuzz.py, in a process that may fork."""
    done = subprocess.run([sys.executable, program, "--kind", ",".join(kinds), "--mutations", str(mutations)],
                          capture_output=True, text=True)
    assert not done.stderr, done.stderr
    rows = {words[0]: [float(word) for word in words[2:]] for words in map(str.split, done.stdout.splitlines())
            if words[0] in kinds}
    return done.returncode, {kind: dict(zip([*fuzz.COLUMNS, "slowest", "peak"], row, strict=True))
                             for kind, row in rows.items()}, done.stdout


def test_damage_is_read_through_or_refused():
    kinds = [kind for kind in fuzz.KINDS if kind not in HERE]
    code, found, printed = tallies(fuzz.__file__, kinds, 200)
    assert code == 0 and list(found) == kinds, printed
    for kind, tally in found.items():
        assert tally["accepted"] + tally["refused"] == 200 and not fuzz.violations(tally), printed
        assert tally["accepted"] >= 5 and tally["refused"] >= 30, f"{kind}: one side of the reader was not reached"


@pytest.mark.parametrize("kind, count", [("small", 150), ("index", 150), ("adapter", 100), ("answers", 40)])
def test_damage_of_small_files_is_read_through_or_refused(kind, count, tmp_path, monkeypatch):
    monkeypatch.setattr("weights.given.read_video", weights.given.read_video)        # the reader puts frames there
    name, blobs, read = fuzz.KINDS[kind](tmp_path)
    accepted = 0
    for seed in range(count):
        (tmp_path / name).write_bytes(fuzz.damaged(kind, blobs[seed % len(blobs)], random.Random(f"{kind} {seed}")))
        try:
            read(tmp_path / name)
            accepted += 1
        except InputError as error:
            assert str(error).isprintable() and "; " in str(error), error
    assert 0 < accepted < count, "one side of the reader was not reached"


@pytest.mark.parametrize("kind", ["npy", "npz", "png", "mp4", "safetensors", "pickled", "pairs", "small", "index"])
def test_a_changed_field_is_a_change_and_repeats_by_its_seed(kind, tmp_path):
    _, blobs, _ = fuzz.KINDS[kind](tmp_path)
    made = [[fuzz.ONE_FIELD[kind](blob, random.Random(seed)) for seed in range(6)] for blob in blobs[:3] * 2]
    assert made[:len(made) // 2] == made[len(made) // 2:]
    assert len({of for some in made for of in some}) > len(made), "nothing is changed"


def test_a_violation_is_seen(tmp_path):
    """The harness itself: a reader that raises, runs something, dies, hangs, or accepts nothing is reported as such."""
    reader = tmp_path / "broken.py"
    reader.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(fuzz.ROOT / 'tests')!r})\n"
        "import fuzz\n"
        "def kind(folder):\n"
        "    calls = []\n"
        "    def read(path):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 2: raise KeyError('x')\n"
        "        if len(calls) == 3: (folder / 'canary').touch()\n"
        "        if len(calls) == 4: assert False, 'no content'\n"
        "        if len(calls) == 5: held.append(bytearray(300 << 20))\n"
        "        if len(calls) == 6: os.kill(os.getpid(), 11)\n"
        "    held = []\n"
        "    return 'f', [b'abc'], read\n"
        "fuzz.KINDS['npy'] = kind\n"
        "fuzz.prepare = lambda: None\n"
        "sys.exit(fuzz.main())\n")
    code, found, printed = tallies(reader, ["npy"], 5)
    tally = found["npy"]
    assert code == 1 and "KeyError" in printed and {name: tally[name] for name in fuzz.COLUMNS} == {
        "accepted": 2, "refused": 0, "foreign": 1, "signals": 1, "executed": 1, "empty": 1}
    assert tally["peak"] > fuzz.MEGABYTES and fuzz.violations(tally)
