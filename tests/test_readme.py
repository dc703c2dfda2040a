"""The README's tour points at what it names, its commands exist, its example runs. `--fix` renews the tour's lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
POINTER = re.compile(r"`([\w/]+\.py)#L(\d+) (\w+)`")


def defining_line(path: str, name: str) -> int:
    lines = (ROOT / path).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(class|def) {name}\b", line)]
    assert found, f"{path} defines no {name}"
    return found[0]


def pointers():
    return POINTER.findall((ROOT / "README.md").read_text())


def test_every_pointer_of_the_tour_is_the_line_that_defines_the_name():
    assert len(pointers()) >= 10
    stale = [f"{p}#L{n} {name} is at L{defining_line(p, name)}" for p, n, name in pointers()
             if int(n) != defining_line(p, name)]
    assert not stale, f"{stale}: run python tests/test_readme.py --fix"


def test_every_flag_the_readme_uses_exists():
    text, known = (ROOT / "README.md").read_text(), (ROOT / "bench.py").read_text()
    lines = re.findall(r"(?:python bench\.py|--dataset-dir)[^\n]*", text)
    flags = {flag for line in lines for flag in re.findall(r"--[a-z0-9-]+", line)}
    assert len(flags) >= 6 and all(f'"{f}"' in known for f in flags), flags


@pytest.mark.parametrize("block", ["figures", "h100", "cpu", "tiny"])
def test_every_measured_block_names_its_machine_and_is_filled(block):
    inside = (ROOT / "README.md").read_text().split(f"<!-- bench {block} -->")[1].split(f"<!-- /bench {block} -->")[0]
    assert "```" in inside and re.search(r"H100|CPU", inside), f"block {block} is empty or names no machine"


def test_every_number_of_a_summary_stands_in_the_report_below_it():
    folded = re.findall(r"<summary>(.*?)</summary>(.*?)</details>", (ROOT / "README.md").read_text(), re.S)
    assert len(folded) >= 4
    for summary, report in folded:
        numbers = re.findall(r"\d+\.\d+|\d+ of \d+|\d{3,}", summary)
        assert numbers and all(re.search(rf"(?<![\d.]){re.escape(n)}", report) for n in numbers), (summary, numbers)


def test_every_number_of_the_short_list_stands_in_a_report():
    text = (ROOT / "README.md").read_text()
    listed = re.search(r"In short, each\nfigure.*?\n\n(.*?)\n\n", text, re.S).group(1).replace("2,100", "2100")
    reports = "\n".join(re.findall(r"```\n(.*?)```", text, re.S))
    numbers = re.findall(r"\d+\.\d+|\d+%|\d{3,}", listed)
    assert len(numbers) >= 10 and all(re.search(rf"(?<![\d.]){re.escape(n)}", reports) for n in numbers), numbers


def test_the_library_example_runs_as_printed(user_env):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=user_env)
    assert done.returncode == 0 and len(done.stdout.split()) > 10, done.stderr[-500:]


def test_the_long_run_commands_run_as_printed(tmp_path, user_env):
    """Torchrun and all, in an empty folder, on the embedded clips; only the sizes are made small."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "--merge" in b)
    small = "--max-samples 2 --repeats 1 --warmup 0 --max-new-tokens 8 --modes target_only --device cpu"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clips").symlink_to(ROOT / "weights" / "tiny" / "clips")
    lines = []
    for line in block.strip().splitlines():
        if "--compare" in line:
            lines.append("cp out.json old.json")
        lines.append(line + (f" {small}" if "--dataset-dir" in line else ""))
    script = "\n".join(["set -e", *lines]).replace("bench.py", f'"{ROOT}/bench.py"')
    script = script.replace("torchrun", f'"{sys.executable}" -m torch.distributed.run').replace("python ",
                                                                                             f'"{sys.executable}" ')
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env=user_env)
    assert done.returncode == 0 and "outputs  the same" in done.stdout, done.stderr[-800:]


# ---- every command, in a form of seconds

SMALL = "--max-samples 1 --repeats 1 --warmup 0 --max-new-tokens 4 --device cpu"
CHECKPOINTS = {"checkpoints/EventGPT-7b": "weights/tiny/drafter",
               "LanguageBind/Video-LLaVA-7B-hf": "weights/tiny/target",
               "data/my_egpt_dsec_seq_1s": "weights/tiny/clips"}
FORMS = {                                # a command -> (what changes, what is added, exit code, what is said)
    "python bench.py": ({}, SMALL, 0, "verdict"),
    "python bench.py --figures --generations 1008": ({}, "--device cpu", 2, "run it where torch sees one"),
    "python bench.py --temperature 0.7 --top-p 0.9 --seed 1": ({}, SMALL, 0, "identical to target_only in"),
    "python bench.py --peers": ({}, "--device cpu", 2, "--peers"),
    "python bench.py --weights random-7b --dataset-dir OUT": (
        {"random-7b": "tiny", "OUT": "weights/tiny/clips"}, SMALL, 0, "verdict"),
    "python bench.py --max-samples 1 --gate off --timeline weights/tiny/timeline.png": (
        {"weights/tiny/timeline.png": "SCRATCH/t.png"}, SMALL, 0, "verdict"),
    "python bench.py --explain 3b61 --gate off": ({}, SMALL, 0, "the ids are target_only's"),
    "python bench.py --eventgpt checkpoints/EventGPT-7b --videollava LanguageBind/Video-LLaVA-7B-hf "
    "--dataset-dir data/my_egpt_dsec_seq_1s --max-samples 10 --json out.json": (
        CHECKPOINTS | {"out.json": "SCRATCH/out.json"}, SMALL, 0, "verdict"),
    "python bench.py --profile": ({}, "--device cpu", 2, "on a GPU"),
    "python bench.py --replay PAIRS.jsonl": ({}, "--sources-src headstart --gate off " + SMALL, 0, "came out of all"),
    "python bench.py --sources PAIRS.jsonl": ({}, "--sources-src headstart", 0, "one shot after"),
    "python -m weights.adapter train PAIRS.jsonl --out DIR": (
        {"DIR": "SCRATCH/adapter"}, "--src headstart --test 1 --valid 1 --epochs 1 --kind follower --width 32 "
        "--layers 1 --heads 2 --hidden 32", 0, ""),
    "python -m weights.fit_blend PAIRS.jsonl": ({}, "", 0, ""),
    "python tests/steady.py": ({}, "--requests 30", None, "1 distinct answer"),
    "python -m kernels.quant_rows int4": ({}, "", None, "rows"),         # without a GPU it says so
    "python -m weights.load DIR": ({"DIR": "weights/tiny/target"}, "", 0, "engine tensors"),
    "python -m weights.load DIR --check --device cuda": (
        {"DIR": "weights/tiny/target", "cuda": "cpu"}, "", 0, "every value is finite"),
    "python -m weights.convert DIR": ({"DIR": "SCRATCH/pickled"}, "", 0, "model.safetensors"),
    "python -m weights.tiny.make_clips OUT --films 1s": ({"OUT": "SCRATCH/films"}, "", 0, ""),
    "python -m weights.tiny.evaluate": ({}, "--count 1", 0, "equals target_only: yes"),
    "python -m weights.tiny.evaluate --packed": ({}, "--count 1", 0, "int4"),
    "python tests/fuzz.py --mutations 20000": ({"20000": "10"}, "--kind npy,config", 0, ""),
    "python tests/long_run.py repeat": ({}, "--count 30 --processes 1", 0, "target_only 1"),
    "python tests/long_run.py requests": ({}, "--count 30", None, "1 distinct output"),
}
ELSEWHERE = {                            # and why these are not run here
    "python -m pytest -n 2 --dist worksteal": "is this",
    "python tests/test_readme.py --fix": "writes into the README; what it writes is compared above",
    "python generate.py --compile --compile_prefill --prompt 2100 --max_new_tokens 50": "gpt-fast's, in its repository",
    "python tests/long_run.py rows": "tests/test_faults.py runs it with 30 rows",
    "python tests/long_run.py generations --count 900": "tests/test_faults.py runs it with 78",
    "python bench.py --dataset-dir data/clips --rows rows.jsonl --resume": "the test of the long run above",
    "python bench.py --merge rows.*-of-00002.jsonl --json out.json": "the same",
    "python bench.py --compare old.json out.json": "the same",
}


def commands() -> set[str]:
    """What the README tells to run with Python, in its text and in its shell blocks, without line breaks."""
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    found = re.findall(r"`(python [^`]*)`", prose) + re.findall(r"\b(python [^\n]*)", blocks)
    return {" ".join(command.split()) for command in found}


def test_every_command_of_the_readme_is_run_here_or_says_where():
    assert commands() == FORMS.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder with recorded pairs of four sequences and a pickled checkpoint."""
    folder = tmp_path_factory.mktemp("readme")
    ids = [[5 + (i * k) % 400 for i in range(20)] for k in range(1, 9)]
    (folder / "PAIRS.jsonl").write_text("".join(json.dumps(
        {"src": "headstart", "seq": f"s{k % 4}", "clip": k, "question": "What?", "videollava_ids": of,
         "eventgpt_ids": of[2:]}) + "\n" for k, of in enumerate(ids)))
    (folder / "pickled").mkdir()
    torch.save({"a": torch.ones(2, 2)}, folder / "pickled" / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("command", FORMS)
def test_a_command_of_the_readme_does_what_it_says(command, scratch, user_env):
    changes, more, code, said = FORMS[command]
    for name, value in {"PAIRS.jsonl": "SCRATCH/PAIRS.jsonl", **changes, "SCRATCH": str(scratch)}.items():
        command = command.replace(name, value)
    given = [sys.executable, *command.split()[1:], *more.split()]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=200, env=user_env)
    assert code is None or done.returncode == code, (given, done.stderr[-800:])
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def fix():
    path = ROOT / "README.md"
    path.write_text(POINTER.sub(lambda m: f"`{m[1]}#L{defining_line(m[1], m[3])} {m[3]}`", path.read_text()))


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
