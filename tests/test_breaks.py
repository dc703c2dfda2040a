"""The list of deliberate breaks fits the code, and the command that tries them tells caught from uncaught."""

import breaks
import pytest
from breaks import BREAKS, ROOT, Break


@pytest.mark.parametrize("entry", BREAKS, ids=lambda entry: f"{entry.file} {entry.why}")
def test_the_text_of_a_break_occurs_once_and_its_tests_exist(entry):
    assert breaks.occurrences(entry) == 1, f"{entry.file}: {entry.old!r}"
    assert entry.old != entry.new and entry.why
    names = [word.split("::")[0] for word in entry.tests.split() if word.startswith("test_")]
    assert names and all((ROOT / "tests" / name).exists() for name in names if name.endswith(".py"))


def test_there_are_enough_and_each_is_there_once():
    assert len(BREAKS) >= 40
    assert len({(entry.file, entry.old, entry.new) for entry in BREAKS}) == len(BREAKS)


def test_the_command_tells_what_is_caught(tmp_path):
    """A tree of one function and two tests, one of which tests nothing."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "twice.py").write_text("def twice(x):\n    return x + x\n")
    (tmp_path / "tests" / "conftest.py").write_text("import sys; sys.path.insert(0, '..')\n")
    (tmp_path / "tests" / "test_it.py").write_text(
        "from twice import twice\ndef test_it(): assert twice(3) == 6\ndef test_idle(): twice(3)\n")
    tried = [Break("twice.py", "x + x", "x + 4", "wrong sum", "test_it.py -k it"),
             Break("twice.py", "x + x", "3 * x", "wrong factor", "test_it.py -k idle"),
             Break("twice.py", "x + x", "x + y", "no such name", "test_it.py -k nothing_of_this_name"),
             Break("twice.py", "x", "y", "not once", "test_it.py")]
    lines = []
    assert breaks.run(tried, 1, tmp_path, lines.append) == 3
    assert [line.split("  ")[0] for line in lines[:2]] == ["OUT OF DATE", "FAILS UNBROKEN"]
    assert [line.split()[0] for line in lines[2:4]] == ["caught", "UNCAUGHT"]
    assert lines[-1].startswith("4 breaks: 1 caught, 2 not, 1 test selections")
    assert (tmp_path / "twice.py").read_text().endswith("x + x\n")
