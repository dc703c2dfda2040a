"""The 72 bad inputs, through the library and through the command line: one line, exit 2 or a counted row, nothing run,
nothing half-written. tests/hostile.py makes them."""

import json
import time

import hostile
import pytest

import bench
import engine
from engine import InputError

ENGINES = {}


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """How fast this machine is says nothing here, and takes half a second a run; an engine that was loaded as wanted
    is taken again."""
    real = engine.load_engine

    def load_engine(*paths, **options):
        key = repr(sorted((name, str(value)) for name, value in options.items() if name != "progress"))
        if paths != (hostile.TINY / "drafter", hostile.TINY / "target") or options.get("tokenizer"):
            return real(*paths, **options)
        return ENGINES.get(key) or ENGINES.setdefault(key, real(*paths, **options))
    monkeypatch.setattr(engine, "load_engine", load_engine)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"read_bw": 1e10, "gemm_flops": 1e11})


def assert_clean(folder, case):
    assert not (folder / "canary").exists(), "something in a file was executed"
    assert not list(folder.rglob("*.partial")), "half a file was left behind"


def assert_one_line(line, case):
    assert line.isprintable() and len(line) < 2000, line
    assert "; " in line, f"no way out: {line}"
    for word in case.words:
        assert word in line, line


def test_every_row_of_the_list_is_here():
    assert {int(name[:2]) for name in hostile.CASES} == set(range(1, 73))


@pytest.mark.parametrize("name", hostile.CASES)
def test_the_library_refuses_in_one_line(name, pair, tmp_path, monkeypatch):
    case = hostile.CASES[name](tmp_path)
    if case.patch:
        case.patch(monkeypatch)
    began = time.process_time()                              # of this process: others may keep the machine busy
    if case.exit == 0:
        case.call(pair)
    else:
        with pytest.raises(InputError) as error:
            case.call(pair)
        assert_one_line(str(error.value), case)
    assert time.process_time() - began < 1.0
    assert_clean(tmp_path, case)


@pytest.mark.parametrize("name", hostile.CASES)
def test_the_command_line_refuses_in_one_line_or_counts_the_sample(name, tmp_path, monkeypatch, capsys):
    case = hostile.CASES[name](tmp_path)
    if case.patch:
        case.patch(monkeypatch)
    before, saved = sorted(tmp_path.rglob("*")), tmp_path / "report.json"
    began = time.process_time()
    code = bench.main([*case.flags, "--details", "--json", str(saved)])
    seconds = time.process_time() - began
    out, err = capsys.readouterr()
    assert code == case.exit, (code, err, out[-400:])
    if code == 2:
        assert out == "" and err.count("\n") == 1 and "Traceback" not in err, (out, err)
        assert_one_line(err[:-1], case)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        assert seconds < 1.0
    else:
        assert err == ""
        report = json.loads(saved.read_text())
        complaints = [row["error"] for row in report["samples"] if "error" in row] + report["skipped"]
        assert len(complaints) == code, complaints
        assert any(row["modes"] for row in report["samples"]), "the sound sample did not run"
        for line in complaints:
            assert_one_line(line, case)
            assert line in out
    assert_clean(tmp_path, case)
