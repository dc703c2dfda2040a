"""The benchmark: a schema one can rely on, ratios one can recompute, refusals in one line."""

import copy
import hashlib
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bench
import engine
import weights.load

ROOT = Path(__file__).resolve().parents[1]
CLIPS = bench.TINY / "clips"
QUICK = ["--gate", "off", "--max-samples", "2", "--repeats", "2", "--warmup", "0", "--max-new-tokens", "24",
         "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, user_env):
    """(exit code, printed lines, report) of one short run."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    done = subprocess.run([sys.executable, "bench.py", *QUICK, "--json", str(path)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env=user_env)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines(), json.loads(path.read_text())


def test_every_repeat_runs_the_modes_in_an_order_of_its_own(monkeypatch, capsys):
    ran, real = [], bench.run_sample
    monkeypatch.setattr(bench, "run_sample", lambda *args: ran.append(args[2]) or real(*args))
    assert bench.main([*QUICK, "--modes", "target_only,prefill_then_verify,speculative", "--repeats", "6"]) == 0
    repeats = [tuple(ran[i:i + 3]) for i in range(0, len(ran), 3)]
    assert len(repeats) == 12 and all(len(set(modes)) == 3 for modes in repeats) and len(set(repeats)) > 3


def test_the_last_line_and_the_file_are_one_json_object(run):
    code, lines, report = run
    assert code == 0 and json.loads(lines[-1]) == report


def test_a_sampled_run_compares_under_one_seed_and_says_so(run, tmp_path, capsys):
    flags = [*QUICK, "--temperature", "4", "--top-p", "0.95", "--seed", "3", "--rows", str(tmp_path / "rows.jsonl")]
    assert bench.main(flags) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["config"]["sampling"] == {"temperature": 4.0, "top_p": 0.95, "seed": 3}
    assert "sampling" not in run[2]["config"]
    assert any(line.startswith("run ") and line.endswith("temperature 4.0, top_p 0.95, seed 3") for line in lines)
    assert report["identical"] == {"compared": 6, "equal": 6, "differing": []}
    for ours, greedy in zip(report["samples"], run[2]["samples"], strict=True):
        assert ours["modes"]["target_only"]["ids"] != greedy["modes"]["target_only"]["ids"]
    flags[flags.index("3")] = "4"
    assert bench.main([*flags, "--resume"]) == 2 and "another config" in capsys.readouterr().err


def test_the_report_has_the_fields_of_the_contract(run):
    report = run[2]
    assert report["schema"] == bench.SCHEMA
    assert set(report) >= {"commit", "dirty", "command", "time", "seed", "machine", "weights", "ceilings", "config",
                           "samples", "modes", "controls", "identical", "warnings"}
    assert set(report["machine"]) >= {"gpu", "driver", "cuda", "torch", "triton", "cpu", "cores"}
    assert report["weights"]["kind"] == "tiny" and set(report["modes"]) == set(engine.MODES)
    for row in report["samples"]:
        for mode, of in row["modes"].items():
            assert set(of) >= {"ids", "text", "finish_reason", "e2e_ms", "ttft_ms", "ttfp_ms", "tpot_ms", "stages_ms",
                               "drafted", "accepted", "rounds", "accept_lens", "overlap_drafts", "window_drafts",
                               "identical"}, mode
            assert of["identical"] is (None if mode == "drafter_only" else True)


def test_printed_ratios_can_be_recomputed_from_the_raw_values(run):
    _, lines, report = run
    for mode, of in report["modes"].items():
        ratios = []
        for row in report["samples"]:
            ours, theirs = (sorted(row["modes"][m]["raw"]["e2e_ms"]) for m in (mode, "target_only"))
            ratios.append(sum(theirs) / sum(ours))                       # two repeats: median and mean agree
        ratios.sort()
        p50 = (ratios[0] + ratios[1]) / 2
        assert of["ratio"]["p50"] == pytest.approx(p50, rel=1e-9)
        assert of["ratio"]["low"] <= p50 <= of["ratio"]["high"]
        assert of["worst"] == pytest.approx(1 / ratios[0], rel=1e-9)
        if mode == "speculative":
            assert any(line.startswith("worst ") and f"speculative {1 / ratios[0]:.3f} of" in line for line in lines)
            waits = [ours - theirs for row in report["samples"] for ours, theirs in zip(
                *(row["modes"][m]["raw"]["ttft_ms"] for m in (mode, "target_only")), strict=True)]
            assert of["later_ms"]["low"] <= statistics.median(waits) <= of["later_ms"]["high"]
            assert any(line.startswith("later    first") and f"{mode} {statistics.median(waits):+.2f} [" in line
                       for line in lines)
            loads = [ours - theirs for row in report["samples"] for ours, theirs in zip(
                *(row["modes"][m]["stages_ms"]["target"]["load"] for m in (mode, "target_only")), strict=True)]
            wait = statistics.median(wait - load for wait, load in zip(waits, loads, strict=True))
            assert any(line.startswith("later    from the last frame") and f"{mode} {wait:+.2f} [" in line
                       for line in lines)
        printed = next(line for line in lines if line.startswith(f"{mode} "))
        assert f"{p50:.2f} [" in printed


def quantile(values, q):
    """The value that a share q of all values lies below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


def test_every_printed_number_can_be_recomputed_from_the_raw_values(run):
    """From samples, ceilings and config alone: the aggregates in the report are not looked at."""
    _, lines, report = run
    rows, limits, found = report["samples"], report["ceilings"], 0
    stages = {tuple(words[:2]): words[2:] for words in map(str.split, lines)
              if words[:1] in (["target"], ["drafter"])}
    for (side, stage), words in stages.items():
        alone = "target_only" if side == "target" else "drafter_only"
        raw = [v for row in rows for mode, of in row["modes"].items() if mode == alone or stage == "verify"
               for v in of["stages_ms"].get(side, {}).get(stage, [])]
        beside = [v for row in rows for v in row["modes"]["prefill_only"]["stages_ms"].get(side, {}).get(stage, [])]
        wanted = [f"{quantile(raw, q):.3f}" for q in (0.2, 0.5, 0.8)]
        wanted += [f"{statistics.median(beside):.3f}" if beside else "-"]
        assert words[:4] == wanted, (side, stage)
        prompts = [of["prompt_rows"][side] for row in rows for of in row["modes"].values() if side in of["prompt_rows"]]
        work, S = limits[side], round(statistics.median(prompts))
        if stage in ("draft", "decode", "verify"):
            nbytes = work["weight_bytes"] + work["kv_bytes_per_row"] * S
            share = nbytes / quantile(raw, 0.5) * 1e3 / limits["read_bw"]
            assert words[4:] == [f"{nbytes / 1e9:.3f}", "GB", f"{share:.0%}"]
        elif stage == "prefill":
            flop = work["flop_per_row"] * S + work["flop_per_row_pair"] * S * (S + 1) + work["flop_head"]
            share = flop / quantile(raw, 0.5) * 1e3 / limits["gemm_flops"]
            assert words[4:] == [f"{flop / 1e12:.3f}", "TFLOP", f"{share:.0%}"]
        found += 1
    assert found >= 10
    for mode in report["config"]["modes"]:
        of = [row["modes"][mode] for row in rows]
        line = next(line for line in lines if line.startswith(f"{mode} "))
        numbers = re.findall(r"[\d.]+|-(?= |$)", line.removeprefix(mode).replace("[", " ").replace("]", " "))

        def p50(name, of=of):
            values = [v for sample in of for v in sample["raw"][name] if v is not None]
            return f"{quantile(values, 0.5):.1f}" if values else "-"
        e2e = [v for sample in of for v in sample["raw"]["e2e_ms"]]
        want = [f"{quantile(e2e, q):.1f}" for q in (0.5, 0.2, 0.8)]
        want += [p50("ttft_ms"), p50("ttfp_ms"), p50("tpot_ms"), str(sum(len(sample["ids"]) for sample in of))]
        ratios = [statistics.median(row["modes"]["target_only"]["raw"]["e2e_ms"])
                  / statistics.median(row["modes"][mode]["raw"]["e2e_ms"]) for row in rows]
        rng = random.Random(0)                               # the bootstrap, as the report describes it
        medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
        want += [f"{v:.2f}" for v in (statistics.median(ratios), medians[25], medians[975])]
        lens, drafted = [n for sample in of for n in sample["accept_lens"]], sum(sample["drafted"] for sample in of)
        want += [f"{sum(lens) / drafted:.2f}" if drafted else "-", f"{sum(lens) / len(lens) + 1:.2f}" if lens else "-",
                 *(f"{statistics.median(sample[name] for sample in of):.0f}"
                   for name in ("window_drafts", "overlap_drafts"))]
        assert numbers == want, mode
        line = next(line for line in lines if line.startswith(bench.APPROACHES[mode]))
        ends = [(row["modes"]["target_only"], row["modes"][mode]) for row in rows]
        saved = [statistics.median(base["ttft_ms"] - ours["ttft_ms"] for base, ours in ends),
                 statistics.median(base["e2e_ms"] - base["ttft_ms"] - (ours["e2e_ms"] - ours["ttft_ms"])
                                   for base, ours in ends)]
        assert line.removeprefix(bench.APPROACHES[mode]).split() == [
            p50("ttfp_ms"), *(f"{ms:.1f}" for ms in saved), f"{statistics.median(ratios):.2f}x"], mode
        for line in [line for line in lines if line.startswith(f"accept_len {mode}:")]:
            pairs = [tuple(map(int, pair)) for pair in re.findall(r"(\d+): (\d+)", line)]
            assert pairs == sorted((n, lens.count(n)) for n in set(lens))


def test_a_report_made_again_from_its_rows_is_the_same(run):
    report = run[2]
    made = {"interrupted", "modes", "controls", "identical", "warnings", "ceilings", "samples"}
    head = {k: v for k, v in report.items() if k not in made} | {"ceilings": report["ceilings"]}
    assert "\n".join(bench.render(bench.assemble(head, report["samples"]))) == "\n".join(run[1][:-1])


def test_the_header_names_commit_checkpoints_and_pixels(run, tmp_path):
    _, lines, report = run
    e = engine.load_engine(bench.TINY / "drafter", bench.TINY / "target", device="cpu")
    sample = bench.read_dataset(CLIPS, None, 1)[0][0]
    frames = engine.read_video(sample.video, 8, "uniform")
    pixels = engine.clip_pixels(frames, e.target.vision.image, e.target.vision.mean, e.target.vision.std)
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]
    assert report["samples"][0]["pixels"]["target"] == digest and len(report["samples"][0]["pixels"]["drafter"]) == 16
    assert f"commit {report['commit']}" in "\n".join(lines)
    line = next(line for line in lines if line.startswith("hashes"))
    for side in ("target", "drafter"):
        assert f"{side} {report['weights'][side]['hash']}, pixels {bench.pixels_of(report, side)}" in line
    shutil.copytree(bench.TINY / "target", tmp_path / "target")
    assert weights.load.open_checkpoint(tmp_path / "target").fingerprint() == report["weights"]["target"]["hash"]
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, tmp_path / "target" / "model.safetensors")
    assert weights.load.open_checkpoint(tmp_path / "target").fingerprint() != report["weights"]["target"]["hash"]


def test_a_snapshot_of_the_hub_tells_its_revision(tmp_path):
    folder = tmp_path / "snapshots" / ("4cf9d8c" + "0" * 33)
    shutil.copytree(bench.TINY / "target", folder)
    assert weights.load.open_checkpoint(folder).revision == folder.name
    assert weights.load.open_checkpoint(bench.TINY / "target").revision is None


def test_warnings_name_what_spoils_a_figure(run):
    report = copy.deepcopy(run[2])
    rows, machine = report["samples"], report["machine"]
    for row in rows:
        row["modes"]["speculative"]["raw"]["e2e_ms"] = [300.0, 100.0, 100.0]
    machine.update(load=9.0, cores=4, others_on_gpu=2, clocks="1980 MHz, 2619 MHz, 300.00 W, 700.00 W")
    report["clocks_after"] = "1410 MHz, 2619 MHz, 700.00 W, 700.00 W"
    found = "\n".join(bench.warnings_of(bench.mode_figures(rows, ["speculative"], True), rows, report))
    for words in ("p80 is", "2 samples", "2 other processes", "9.0 of 4 cores", "from 1980 to 1410 MHz",
                  "first run takes 3.00x its later ones; raise --warmup"):
        assert words in found, words


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_list_of_records_is_read_piece_by_piece(piece, tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Pieces(real(*args, **kwargs), piece))
    path = tmp_path / "list.json"
    for content in ([{"a": [1, {"b": "]"}]}, 12, 3.5, "x\"y", None, [], -1e5], [{}], [123456789]):
        for indent in (None, 2):
            path.write_text(json.dumps(content, indent=indent))
            assert list(bench.records_of(path)) == content
    for text in ("[", "[1", "[1 2]", "[1,]", "[1,,2]", "[,1]", "[1]]", "[1] 2", "{", "[1}", '["a', "", "[\"a\", tru]"):
        path.write_text(text)
        with pytest.raises(engine.InputError, match="cannot be read as JSON"):
            list(bench.records_of(path))
    for text in ("5", "null", '{"a": 1}', '"a"', "[]", " [ ] "):
        path.write_text(text)
        with pytest.raises(engine.InputError, match="wanted a list of records"):
            list(bench.records_of(path))


class Pieces:
    """A file that gives at most so many characters at once."""

    def __init__(self, file, most):
        self.file, self.most = file, most

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, size=-1):
        return self.file.read(size if size < 0 else min(size, self.most))


def test_fifty_thousand_records_are_listed_and_ten_of_them_without_the_rest(tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(CLIPS, folder)
    index = folder / "EventGPT_Instruction_Subset.json"
    records = json.loads(index.read_text())
    index.write_text(json.dumps([{**records[i % 9], "id": f"row {i}"} for i in range(50_000)]))
    began = time.process_time()
    samples, problems = bench.read_dataset(folder, None, -1)
    assert len(samples) == 50_000 and not problems and time.process_time() - began < 20
    index.write_bytes(index.read_bytes()[:2 << 20])          # the end is missing, and nobody asked for it
    tracemalloc.start()
    samples, _ = bench.read_dataset(folder, None, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [s.id for s in samples] == [f"row {i}" for i in range(10)] and peak < 16 << 20


def test_a_saved_run_prints_the_same_report_again(run, tmp_path, capsys):
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(run[2]))
    assert bench.main(["--from-json", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == run[1]


def test_the_timeline_draws_every_draft_and_fills_the_accepted_ones(tmp_path):
    e = engine.load_engine(bench.TINY / "drafter", bench.TINY / "target", device="cpu", gate=False)
    options = bench.parse(QUICK)
    options.ignore_eos, options.source = False, None
    result = bench.run_sample(e, bench.read_dataset(CLIPS, None, 1)[0][0], "speculative", options)
    cells = bench.draft_cells(result)
    assert sum(accepted for *_, accepted in cells) == result.accepted_tokens
    assert len(cells) >= result.drafted and all(end >= start for start, end, _ in cells)
    picture, trace = tmp_path / "t.png", tmp_path / "t.json"
    bench.draw_timeline(result, picture)
    bench.write_trace(result, trace)
    assert Image.open(picture).size[0] > 1000 and len(Image.open(picture).convert("RGB").getcolors(1 << 16)) > 6
    bars = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(bars) == len(result.timeline) and {e["tid"] for e in bars} == {0, 1, 2}


def test_a_reader_that_leaves_early_causes_no_traceback(user_env):
    command = f"{sys.executable} bench.py {' '.join(QUICK)} --modes target_only | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, env=user_env)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_recorded_pairs_hold_both_answers_and_feed_the_sources_page(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    assert bench.main([*QUICK, "--modes", "target_only,drafter_only", "--max-samples", "4", "--record", str(path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    for pair, row in zip(pairs, report["samples"], strict=True):
        assert pair["videollava_ids"] == row["modes"]["target_only"]["ids"] and pair["uuid"] == row["id"]
        assert pair["eventgpt_text"] == row["modes"]["drafter_only"]["text"]
        total = sum(pair["ms"]["videollava"])
        assert 0.3 * row["modes"]["target_only"]["e2e_ms"] < total < 1.5 * row["modes"]["target_only"]["e2e_ms"]
        assert len(pair["ms"]["eventgpt"]) == 5 and min(pair["ms"]["eventgpt"]) > 0
    assert bench.main(["--sources", str(path), "--sources-src", "headstart", "--device", "cpu"]) == 0
    assert "4 recorded answers of 1 sequences" in capsys.readouterr().out
    replay = ["--replay", str(path), "--sources-src", "headstart", "--device", "cpu", "--gate", "off"]
    assert bench.main([*replay, "--accept", "1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    per_forward = {name.strip(): float(rest.split("]")[2].split()[1]) for name, rest in
                   ((line[:26], line[26:]) for line in lines[3:6])}
    assert per_forward["target_only"] == 1 and per_forward["drafter right with 1.0"] > 3
    assert "came out of all 16 requests" in lines[-4]
    last_id = {line[:26].strip(): line.split()[-1] for line in lines[3:7]}
    assert last_id["target_only"] == "-" and float(last_id["preview, raw"]) > 0
    shards = [str(tmp_path / f"s{i}.json") for i in range(2)]
    for shard in shards:
        assert bench.main([*replay, "--only", "cold", "--rows", shard]) == 0
    capsys.readouterr()
    assert bench.main([*replay, "--merge", *shards]) == 0
    assert "came out of all 16 requests" in capsys.readouterr().out
    assert bench.main([*replay, "--merge", str(path)]) == 2 and "not a shard" in capsys.readouterr().err
    for bad in (["--sources-src", "nobody"], ["--accept", "often"], ["--accept", "0.5,1.2"], ["--second", "1.5"],
                ["--every", "0"]):
        assert bench.main([*replay, *bad]) == 2 and bad[-1] in capsys.readouterr().err
    assert bench.main([*replay, "--second", "0.5"]) == 2 and "add --accept" in capsys.readouterr().err
    assert bench.main([*QUICK, "--modes", "target_only", "--record", str(path)]) == 2


def test_a_replay_beside_a_drafter_on_a_device_of_its_own(tmp_path, capsys, monkeypatch):
    """Two pretend devices; every setting of forced acceptance, and the memories without a drafter beside them."""
    path, real = tmp_path / "pairs.jsonl", engine.load_engine
    assert bench.main([*QUICK, "--modes", "target_only,drafter_only", "--max-samples", "3", "--record", str(path)]) == 0
    rows = [json.loads(line) | {"seq": f"s{k % 2}"} for k, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def two_devices(*args, **options):
        e = real(*args, **options | dict(recall_len=15))
        e.apart = True
        return e

    monkeypatch.setattr(engine, "load_engine", two_devices)
    capsys.readouterr()
    assert bench.main(["--replay", str(path), "--sources-src", "headstart", "--device", "cpu", "--accept", "0.5",
                       "--second", "0.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:26].strip() for line in lines[3:9]] == [
        "target_only", "drafter right with 0.5", "right with 0.5, second 0.7", "blend-text, right with 0.5",
        "recall, both", "blend, both"]
    assert any("came out of all 18 requests" in line for line in lines)


# ---- long runs


ROWS = ["--modes", "target_only,speculative", "--repeats", "1", "--warmup", "0", "--max-new-tokens", "12", "--device",
        "cpu", "--max-samples", "6", "--question", "What are the key elements in this scene?"]


def ids_of(report):
    return {row["id"]: {mode: of["ids"] for mode, of in row["modes"].items()} for row in report["samples"]}


def test_a_killed_run_resumed_and_three_shards_merged_equal_one_run(tmp_path, capsys):
    def last():
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert bench.main(ROWS) == 0
    whole = last()
    for i in range(3):
        assert bench.main([*ROWS, "--shard", f"{i}/3", "--rows", str(tmp_path / "r.jsonl")]) == 0
    given, first = str(tmp_path / "r.jsonl"), tmp_path / "r.00000-of-00003.jsonl"
    lines = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(lines[:2]) + lines[2][:100])               # died while writing its second row
    assert bench.main([*ROWS, "--shard", "0/3", "--rows", given]) == 2                # never overwritten silently
    assert "--resume" in capsys.readouterr().err
    shards = sorted(map(str, tmp_path.glob("r.*-of-00003.jsonl")))
    assert bench.main(["--merge", *shards]) == 2 and "1 of 6 samples are missing" in capsys.readouterr().err
    assert bench.main([*ROWS, "--shard", "0/3", "--rows", given, "--resume"]) == 0
    capsys.readouterr()
    assert bench.main(["--merge", *shards]) == 0
    merged = last()
    assert len(merged["shards_s"]) == 3 and sum(merged["shards_s"]) == pytest.approx(
        sum(row["took_s"] for row in merged["samples"]))
    assert list(ids_of(merged).items()) == list(ids_of(whole).items())                         # in the same order
    assert merged["controls"] == whole["controls"]               # `previous` needs the order of the data set
    assert bench.main(["--merge", *shards, shards[0]]) == 2 and "twice" in capsys.readouterr().err
    assert bench.main([*ROWS, "--max-new-tokens", "13", "--shard", "0/3", "--rows", given, "--resume"]) == 2
    assert "another config" in capsys.readouterr().err


@pytest.mark.parametrize("environ,want", [
    ({}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)), ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, (1, 3)),
    ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, (0, 8))], ids=str)
def test_the_shard_comes_from_the_flag_or_the_launchers_variables(environ, want):
    assert bench.read_shard(None, environ) == want and bench.read_shard("1/2", environ) == (1, 2)
    for text in ("2/2", "a/b", "1", "-1/2", ""):
        with pytest.raises(engine.InputError, match="--shard"):
            bench.read_shard(text, environ)


def test_compare_pairs_by_sample_and_says_what_it_shows(run, tmp_path, capsys):
    report = copy.deepcopy(run[2])
    old, new, other = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "other.json"
    old.write_text(json.dumps(report))
    for row in report["samples"]:
        row["modes"]["speculative"]["e2e_ms"] /= 2
    new.write_text(json.dumps(report))
    assert bench.main(["--compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "speculative          2.000 [2.000, 2.000]  faster" in out and "outputs  the same" in out
    assert next(line for line in out.splitlines() if line.startswith("target_only")).endswith("no difference shown")
    report["samples"][0]["modes"]["speculative"]["ids"][0] += 1
    other.write_text(json.dumps(report))
    assert bench.main(["--compare", str(old), str(other)]) == 1 and "1 samples answer" in capsys.readouterr().out


def test_json_dash_prints_nothing_but_the_object(user_env):
    done = subprocess.run([sys.executable, "bench.py", *QUICK, "--modes", "target_only", "--json", "-"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, env=user_env)
    assert done.returncode == 0 and json.loads(done.stdout)["schema"] == bench.SCHEMA and done.stderr == ""


def test_ratios_are_withheld_and_the_exit_code_says_so_when_outputs_differ(monkeypatch, capsys):
    real = engine.Engine.generate

    def tampered(self, **options):
        result = real(self, **options)
        if options["mode"] == "speculative":
            result.output_ids = result.output_ids[:5] + [7] + result.output_ids[6:]
        return result

    monkeypatch.setattr(engine.Engine, "generate", tampered)
    assert bench.main([*QUICK, "--repeats", "1"]) == 1
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert all(of["ratio"] is None for of in report["modes"].values()) and "ratios withheld" in out
    assert [d["position"] for d in report["identical"]["differing"]] == [5, 5]


def test_a_listed_file_that_is_missing_is_counted_and_a_broken_one_fails_its_row(tmp_path, capsys):
    folder = tmp_path / "clips"
    shutil.copytree(CLIPS, folder)
    records = json.loads((folder / "EventGPT_Instruction_Subset.json").read_text())
    (folder / "mp4" / records[0]["mp4_data"]).unlink()
    (folder / "mp4" / records[1]["mp4_data"]).write_bytes(b"not a video")
    code = bench.main(["--dataset-dir", str(folder), "--max-samples", "3", "--repeats", "1", "--warmup", "0",
                       "--max-new-tokens", "8", "--modes", "target_only", "--device", "cpu"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 1 and len(report["skipped"]) == 1 and records[0]["mp4_data"] in report["skipped"][0]
    assert [("error" in row) for row in report["samples"]] == [True, False]


@pytest.mark.parametrize("source", ["previous", "constant", "memory", "blend", "best"])      # those that hear nobody
def test_a_source_never_drafts_a_sample_from_that_samples_own_answer(source, capsys):
    """Questions differ, so nothing is known beforehand: more repeats and a warm-up must not raise the acceptance."""
    def accept_lens(repeats, warmup):
        assert bench.main([*QUICK, "--modes", "target_only,speculative", "--draft-source", source, "--repeats", repeats,
                           "--warmup", warmup, "--max-samples", "1"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["samples"][0]["modes"]["speculative"]["accept_lens"]

    assert set(accept_lens("1", "0")) == {0}
    assert set(accept_lens("3", "1")) == {0}


def test_a_source_remembers_the_sample_before(capsys):
    assert bench.main([*QUICK, "--modes", "target_only,speculative", "--draft-source", "previous", "--repeats", "2",
                       "--question", "What are the key elements in this scene?"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = (row["modes"]["speculative"]["accepted"] for row in report["samples"])
    assert first == 0 and second >= report["controls"]["previous"] > 0


def test_a_difference_in_any_repeat_is_placed_and_counts_for_target_only_too(monkeypatch, capsys):
    real, calls = engine.Engine.generate, []

    def tampered(self, **options):
        result = real(self, **options)
        calls.append(options["mode"])
        turn = options["mode"], calls.count(options["mode"])
        if turn == ("speculative", 1):                       # of three repeats, not the last
            result.output_ids = result.output_ids[:3] + [7] + result.output_ids[4:]
        if turn == ("target_only", 2):
            result.output_ids = result.output_ids[:6]
        return result

    monkeypatch.setattr(engine.Engine, "generate", tampered)
    assert bench.main([*QUICK, "--modes", "target_only,speculative", "--max-samples", "1", "--repeats", "3"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {d["mode"]: d["position"] for d in report["identical"]["differing"]} == {"target_only": 6, "speculative": 3}
    assert all(of["ratio"] is None for of in report["modes"].values())


def test_without_a_baseline_nothing_is_called_identical_or_withheld(capsys):
    assert bench.main([*QUICK, "--modes", "drafter_only", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "nothing was compared" in out and "withheld" not in out


def test_a_broken_first_sample_fails_its_row_and_not_the_run(tmp_path, capsys):
    folder = tmp_path / "clips"
    shutil.copytree(CLIPS, folder)
    index = folder / "EventGPT_Instruction_Subset.json"
    records = json.loads(index.read_text())
    (folder / "mp4" / records[0]["mp4_data"]).write_bytes(b"not a video")
    index.write_text(json.dumps([*records[:2], records[1]]))
    assert bench.main(["--dataset-dir", str(folder), "--repeats", "1", "--max-new-tokens", "8", "--modes",
                       "target_only", "--device", "cpu"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [("error" in row) for row in report["samples"]] == [True, False]
    assert len(report["skipped"]) == 1 and "twice" in report["skipped"][0]


def test_wrong_outputs_and_flags_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    saved = tmp_path / "saved.json"
    assert bench.main([*QUICK, "--modes", "target_only", "--repeats", "1", "--json", str(saved)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(engine, "load_engine", never)
    gone = str(tmp_path / "no" / "x")
    cases = [([flag, gone], gone) for flag in ("--json", "--rows", "--record", "--timeline", "--trace", "--from-text")]
    cases += [([flag, value], flag) for flag, value in (
        ("--draft-len", "32"), ("--draft-len", "-1"), ("--overlap-len", "32"), ("--cache-rows", "0"),
        ("--max-samples", "0"), ("--max-samples", "-2"), ("--repeats", "0"), ("--warmup", "-1"),
        ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "hot"), ("--top-p", "0"), ("--top-p", "2"),
        ("--top-p", "0.9"), ("--seed", "-1"), ("--seed", "7"), ("--seed", str(2 ** 63)))]
    cases += [(["--update-readme", "nope"], "no block 'nope'"), (["--tiny", "--weights", "random-7b"], "--tiny"),
              (["--weights", "tiny", "--eventgpt", gone], "--weights"),
              (["--from-json", str(saved), "--update-readme", "nope"], "no block 'nope'"),
              (["--from-text", str(saved)], "--update-readme BLOCK")]
    for flags, words in cases:
        extra = ["--update-readme", "cpu"] if flags[0] == "--from-text" and flags[1] == gone else []
        assert bench.main([*flags, *extra]) == 2, flags
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and out == "", (flags, err)
        assert "not a saved run" not in err


def bad(tmp_path):
    empty, outside = tmp_path / "empty", tmp_path / "outside"
    empty.mkdir()
    outside.mkdir()
    (outside / "EventGPT_Instruction_Subset.json").write_text(json.dumps([
        {"id": 1, "event_data": "../../x.npz", "mp4_data": "../../../etc/passwd",
         "conversations": [{"from": "human", "value": "q"}]}]))
    (tmp_path / "broken.json").write_text("{")
    return {
        "no such data set": (["--dataset-dir", str(tmp_path / "nowhere")], "nowhere"),
        "a folder without the list": (["--dataset-dir", str(empty)], "EventGPT_Instruction_Subset.json"),
        "paths that lead out": (["--dataset-dir", str(outside)], "leads out"),
        "unknown mode": (["--modes", "fast"], "fast"),
        "absent device": (["--device", "cuda:9"], "cuda:9"),
        "not a device": (["--device", "tpu"], "tpu"),
        "not a checkpoint": (["--eventgpt", str(empty), "--videollava", str(empty)], str(empty)),
        "swapped checkpoints": (["--eventgpt", str(bench.TINY / "target"), "--videollava",
                                 str(bench.TINY / "drafter")], "swap"),
        "a hub id that is not in the cache": (["--videollava", "nobody/nothing", "--eventgpt", str(empty)], "nobody"),
        "too many new tokens": (["--max-new-tokens", "100000"], "--cache-rows"),
        "no new tokens": (["--max-new-tokens", "0"], "--max-new-tokens"),
        "a saved run that is none": (["--from-json", str(tmp_path / "broken.json")], "broken.json"),
        "an unwritable report": (["--json", str(tmp_path / "no" / "such" / "x.json"), *QUICK, "--modes", "target_only"],
                                 "x.json"),
        "figures without a GPU": (["--figures", "--device", "cpu"], "GPU"),
        "profile without a GPU": (["--profile", "--device", "cpu"], "--trace"),
    }


@pytest.mark.parametrize("name", [
    "no such data set", "a folder without the list", "paths that lead out", "unknown mode", "absent device",
    "not a device", "not a checkpoint", "swapped checkpoints", "a hub id that is not in the cache",
    "too many new tokens", "no new tokens", "a saved run that is none", "an unwritable report",
    "figures without a GPU", "profile without a GPU"])
def test_bad_input_is_one_line_on_stderr_and_exit_2(name, tmp_path, capsys):
    flags, words = bad(tmp_path)[name]
    assert bench.main(flags) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert not list(tmp_path.glob("**/*.partial"))


def test_help_fits_one_screen_and_help_all_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a CUDA context for a help text"))
    pages = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            bench.parse([flag])
        assert end.value.code == 0
        pages.append(capsys.readouterr().out)
    short, whole = ({word.rstrip(",") for word in page.split() if word.startswith("--")} for page in pages)
    assert len(pages[0].splitlines()) <= 40 and max(map(len, pages[0].splitlines())) <= 120
    assert set(bench.SHORT) <= short and len(whole) > 2 * len(bench.SHORT)
    known = {option for action in bench.flags()._actions if action.help != "==SUPPRESS==" for option in
             action.option_strings if option.startswith("--")}
    assert known <= whole


@pytest.mark.parametrize("words, fixed", [("--weights random-7b", True), ("--tiny", False),
                                          ("--weights random-7b --no-ignore-eos", False), ("--tiny --ignore-eos", True),
                                          ("--weights random-7b --draft-source memory", True)])
def test_random_weights_answer_at_a_fixed_length_unless_told(words, fixed):
    options = bench.parse([*words.split(), "--device", "cpu"])
    bench.check(options)
    assert options.ignore_eos is fixed
