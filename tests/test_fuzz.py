"""300 seeded mutations of every kind of file: each is read or refused in one line. tests/fuzz.py says what else may
not happen, and runs any number of them."""

import fuzz
import pytest


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damage_is_read_through_or_refused(kind):
    tally = fuzz.fuzz(kind, 0, 300)
    assert tally["accepted"] + tally["refused"] == 300 and not fuzz.violations(tally), tally
    assert tally["accepted"] >= 5 and tally["refused"] >= 50, "one side of the reader was not reached"


def test_a_violation_is_seen(tmp_path, monkeypatch):
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
        "sys.exit(fuzz.main())\n")
    monkeypatch.setattr(fuzz, "__file__", str(reader))
    tally = fuzz.fuzz("npy", 0, 5)
    assert {name: tally[name] for name in fuzz.COLUMNS} == {
        "accepted": 2, "refused": 0, "foreign": 1, "signals": 1, "executed": 1, "empty": 1}
    assert tally["peak"] > fuzz.MEGABYTES and fuzz.violations(tally)
