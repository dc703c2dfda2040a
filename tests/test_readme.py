"""The README's tour points at what it names, its commands exist, its example runs. `--fix` renews the tour's lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def fix():
    path = ROOT / "README.md"
    path.write_text(POINTER.sub(lambda m: f"`{m[1]}#L{defining_line(m[1], m[3])} {m[3]}`", path.read_text()))


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
