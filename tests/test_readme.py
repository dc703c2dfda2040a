"""README.md: its numbers stand in the reports, its commands exist, its examples run. `--fix` renews some."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
import engine
import weights.memory

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
POINTER = re.compile(r"`([\w/]+\.py)#L(\d+) (\w+)`")
NUMBER = re.compile(r"(?<![\w.])\d*\.?\d+(?![\w.]|,\d)")


def table(name: str) -> list[list[str]]:
    """The rows of the table between <!-- name .. --> and <!-- /name -->, cell by cell."""
    inside = re.search(rf"<!-- {name}\b.*?-->\n(.*?)<!-- /{name} -->", README, re.S).group(1)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines()[2:]]


def occurs(number: str, text: str) -> bool:
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text) is not None


# ---- its size and its links


def test_it_is_short():
    assert README.count("\n") <= 220
    assert README[:README.index("## Install")].count("\n") <= 40


def test_every_link_leads_to_a_file_or_a_heading():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and not [link for link in links if not (
        link[1:] in headings if link.startswith("#") else (ROOT / link).is_file())]
    reports = (ROOT / "tests" / "results" / "README.md").read_text()
    listed = re.findall(r"^\| `([\w.]+)`", reports, re.M)
    assert {f.name for f in (ROOT / "tests" / "results").iterdir()} == {*listed, "README.md"}


# ---- the tour


def defining_line(path: str, name: str) -> int:
    lines = (ROOT / path).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(class|def) {name}\b", line)]
    assert found, f"{path} defines no {name}"
    return found[0]


def test_every_pointer_of_the_tour_is_the_line_that_defines_the_name():
    pointers = POINTER.findall(README)
    stale = [f"{p}#L{n} {name} is at L{defining_line(p, name)}" for p, n, name in pointers
             if int(n) != defining_line(p, name)]
    assert len(pointers) >= 10 and not stale, f"{stale}: run python tests/test_readme.py --fix"


# ---- its numbers


def test_each_number_of_the_gains_stands_in_the_report_that_its_row_links_to():
    rows = table("gains")
    assert len(rows) >= 6
    for what, figure, hardware, commit, report in rows:
        text = (ROOT / re.search(r"\]\((.*?)\)", report).group(1)).read_text()
        numbers = NUMBER.findall(figure)
        assert numbers and [n for n in numbers if not occurs(n, text)] == [], (what, report)
        assert commit in text and hardware.split()[-1] in text, (what, report)


def test_each_number_of_the_approaches_stands_in_its_report():
    text = (ROOT / "tests" / "results" / "cpu.txt").read_text()
    rows = table("approaches")
    assert {row[0] for row in rows} >= {f"`{mode}`" for mode in engine.MODES}
    for mode, *cells in rows:
        line = next(line for line in text.splitlines() if line.startswith(mode.strip("`") + " "))
        assert [n for cell in cells for n in NUMBER.findall(cell) if not occurs(n, line)] == [], mode


def test_figures_in_the_text_stand_in_the_file_that_they_link_to():
    linked = re.findall(r"\[([\d.]+)\]\((tests/results/[^)]+)\)", README)
    assert linked and all(occurs(number, (ROOT / path).read_text()) for number, path in linked)


def gigabytes(cards: str, command: str) -> str:
    """What the memory table prints for a command on GPUs "2 x 24 GB", by arithmetic; InputError if it does not fit."""
    count, size = (int(n) for n in re.fullmatch(r"(?:(\d) x )?(\d+) GB", cards).groups("1"))
    flags, needed = bench.parse(shlex.split(command.strip("`"))[2:]), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.memory, "free_bytes", lambda device: (size * 10 ** 9, size * 10 ** 9))
        patch.setattr(weights.memory, "pick_device", lambda name, *_: torch.device(name or "cuda:0"))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        budget = engine.memory_budget(
            flags.eventgpt and "random-7b", flags.videollava and "random-7b", flags.device, flags.drafter_device,
            cache_rows=flags.cache_rows, drafter_dtype=flags.drafter_dtype,
            self_draft="self" in flags.draft_source if flags.draft_source else None,
            text_rows=bench.PROMPT_ROWS + flags.max_new_tokens)
    for side in budget.values():
        parts = sum(side[part] for part in ("weights", "cache", "packed", "scratch") if part in side)
        needed[side["device"]] = needed.get(side["device"], 0) + parts
    assert len(needed) == count
    return " + ".join(f"{nbytes / 1e9:.1f}" for nbytes in needed.values())


def test_the_memory_table_is_the_budgets_arithmetic_and_fits():
    rows = table("memory")
    stale = [row for row in rows if row[2] != gigabytes(row[0], row[3])]
    assert len(rows) >= 4 and not stale, "run python tests/test_readme.py --fix"


# ---- its commands and examples


def commands() -> list[str]:
    """What it tells to run with Python, in its text and in its shell blocks, without line breaks."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    found = re.findall(r"`(python [^`]*)`", prose) + re.findall(r"\b(python [^\n]*)", blocks)
    reports = re.findall(r"`(python [^`]*)`", (ROOT / "tests" / "results" / "README.md").read_text())
    return sorted({" ".join(command.split()) for command in found + reports})


class Parsed(BaseException):
    """A program has read its flags; it goes no further."""


@pytest.mark.filterwarnings("ignore:'weights")
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_one_that_its_program_knows(command, monkeypatch):
    words = shlex.split(command)[1:]
    if words[:2] == ["-m", "pytest"] or words[0] == "tests/test_readme.py":
        return
    real = ArgumentParser.parse_args

    def parse(*args, **options):
        real(*args, **options)
        raise Parsed
    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
    with pytest.raises(Parsed):
        runpy.run_module(words[1], run_name="__main__", alter_sys=True) if words[0] == "-m" else runpy.run_path(
            words[0], run_name="__main__")


def test_help_is_there_without_a_model(monkeypatch, capsys):
    for program in ("bench.py", "engine.py"):
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        assert end.value.code == 0 and "--videollava" in capsys.readouterr().out


def test_the_examples_run_as_printed_and_the_data_set_is_one(tmp_path, user_env, capfd):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) >= 2
    run_each = "import sys\nfor code in sys.argv[1:]: exec(compile(code, 'example', 'exec'), {})"
    done = subprocess.run([sys.executable, "-c", run_each, *examples], cwd=tmp_path, capture_output=True, text=True,
                          timeout=200, env=user_env | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-800:]
    assert bench.main(["--dataset-dir", str(tmp_path / "mine"), *"--device cpu --repeats 1 --warmup 0 --json - "
                       "--max-new-tokens 4 --modes target_only,speculative".split()]) == 0
    assert json.loads(capfd.readouterr().out)["identical"] == {"compared": 1, "equal": 1, "differing": []}


def test_the_command_for_the_published_checkpoints_runs_on_a_hub_cache(tmp_path, user_env):
    """As `hf download --revision` leaves it, without a word of main; tiny weights stand under the real names."""
    command = next(command for command in commands() if "LanguageBind/Video-LLaVA-7B-hf@4cf9d8c" in command)
    hub = tmp_path / "hub" / "models--LanguageBind--Video-LLaVA-7B-hf"
    for folder in (hub / "refs", hub / "snapshots", tmp_path / "checkpoints", tmp_path / "data"):
        folder.mkdir(parents=True)
    (hub / "refs" / "4cf9d8c").write_text("4cf9d8c" + "0" * 33)
    for link, to in ((hub / "snapshots" / ("4cf9d8c" + "0" * 33), "target"), (tmp_path / "data" / "clips", "clips"),
                     (tmp_path / "checkpoints" / "EventGPT-7b", "drafter")):
        link.symlink_to(ROOT / "weights" / "tiny" / to)
    words = shlex.split(command.replace("--max-samples 10", "--max-samples 1"))[1:]
    small = "--device cpu --repeats 1 --warmup 0 --max-new-tokens 4".split()
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:], *small], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, env=user_env | {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert done.returncode == 0 and "identical to the video model alone" in done.stdout, done.stderr[-800:]
    assert json.loads((tmp_path / "out.json").read_text())["identical"]["differing"] == []


def fix():
    """Renews the lines that the tour points at, and the gigabytes of the memory table."""
    text = POINTER.sub(lambda m: f"`{m[1]}#L{defining_line(m[1], m[3])} {m[3]}`", README)
    for cards, what, printed, command in table("memory"):
        text = text.replace(f"| {cards} | {what} | {printed} | {command} |",
                            f"| {cards} | {what} | {gigabytes(cards, command)} | {command} |")
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
