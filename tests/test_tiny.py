"""The embedded pair: its scenes, its texts, its simulated events, its checkpoints and its clips."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from kernels.frames import clip_pixels, draw_events
from tests import tiny_pair
from weights.events import read_events
from weights.load import open_checkpoint
from weights.tiny import make_clips, scenes, train
from weights.video import read_video

TINY = Path(scenes.__file__).resolve().parent
CLIPS = TINY / "clips"
RECORDS = json.loads((CLIPS / "EventGPT_Instruction_Subset.json").read_text())
SIDES = ("target", "drafter")
NOISE = 2 * 0.00015                                 # of pixels and instants that send an event without cause


@pytest.fixture(scope="module")
def pair():
    return engine.load_engine(TINY / "drafter", TINY / "target", device="cpu", gate=False)


def asked(record):
    return dict(event_path=CLIPS / "event_npy" / record["event_data"], video_path=CLIPS / "mp4" / record["mp4_data"],
                query=record["conversations"][0]["value"].removeprefix("<event>\n"), max_new_tokens=64)


# ---- texts


@pytest.mark.parametrize("question", range(len(scenes.QUESTIONS)))
def test_every_answer_parses_back_to_its_scene(question):
    for seed in range(500):
        scene = scenes.sample(seed)
        assert tiny_pair.parse(scenes.answer(scene, question)) == tiny_pair.stated(scene), scene


def test_training_and_held_out_seeds_do_not_meet():
    assert train.SCENES < make_clips.HELD_OUT


def test_every_answer_and_question_survives_the_tokenizer(pair):
    text = pair.target.text
    answers = [scenes.answer(scenes.sample(seed), q) for seed in range(100) for q in range(10)]
    for said in answers + list(scenes.QUESTIONS):
        ids = text.ids(said)
        assert text.decode(ids) == said
        assert len(ids) < tiny_pair.MAX_NEW_TOKENS, f"{len(ids)} ids: {said}"


def test_rates_count_what_a_text_states():
    scene = scenes.sample(next(seed for seed in range(99) if scenes.sample(seed)["kind"] == "shapes"))
    truth = scenes.answer(scene, 0)
    other = next(c for c in scenes.COLOURS if c not in (scene["colour"], scene.get("still_colour")))
    wrong = truth.replace(scene["colour"], other)
    assert set(tiny_pair.attribute_rates([(scene, truth)]).values()) == {1.0}
    rates = tiny_pair.attribute_rates([(scene, truth), (scene, wrong)])
    assert rates["colour"] == 0.5 and rates["heading"] == 1.0


def test_drafts_that_see_the_scene_beat_every_control_that_does_not(pair, tmp_path, monkeypatch):
    """Four questions about two scenes each here; the README shows 500 scenes."""
    monkeypatch.setattr(scenes, "QUESTIONS", scenes.QUESTIONS[:4])
    figures = tiny_pair.evaluate(pair, 8, tmp_path)
    assert not figures["unequal"]
    rates = dict(figures["tokens_per_round"])
    drafter = rates.pop("drafter")
    assert set(rates) == {"previous", "lookup", "taught", "answer"} and all(rate > 1 for rate in rates.values())
    assert figures["interval"]["drafter"][0] > max(rates.values()) and figures["interval"]["drafter"][1] > drafter
    assert all(low <= rates[name] <= high for name, (low, high) in figures["interval"].items() if name in rates)


# ---- what the cameras see


def test_a_seed_always_gives_the_same_film():
    frames, events = scenes.film(scenes.sample(5), 5)
    again_frames, again_events = scenes.film(scenes.sample(5), 5)
    other_frames, _ = scenes.film(scenes.sample(5), 6)
    assert torch.equal(frames, again_frames) and all(map(torch.equal, events, again_events))
    assert not torch.equal(frames, other_frames)


def test_events_are_sorted_inside_the_sensor_and_the_clip():
    for seed in (0, 5):
        _, (x, y, t, p) = scenes.film(scenes.sample(seed), seed)
        assert (t.diff() >= 0).all() and t[0] >= 0 and t[-1] < 1e6 * scenes.FRAMES / scenes.FPS
        assert 0 <= x.min() and x.max() < scenes.W and 0 <= y.min() and y.max() < scenes.H
        assert set(p.unique().tolist()) == {0, 1}


def test_brighter_pixels_send_positive_and_darker_ones_negative_events():
    """Left half 0.2 to 0.8, right half back: |log change| is 1.2, at most ten thresholds, at least one event a third
    of that because a pixel restarts from where it was when it fired, up to two thresholds on."""
    steps = torch.linspace(0.2, 0.8, scenes.FRAMES * scenes.SUB)[None, :, None, None, None]
    light = steps.expand(1, -1, 3, scenes.H, scenes.W).clone()
    light[..., scenes.W // 2:] = 1.0 - light[..., scenes.W // 2:]
    maps = scenes.event_maps(light, [0])[0]
    left, right = maps[..., :scenes.W // 2], maps[..., scenes.W // 2:]
    assert (left < 0).float().mean() <= NOISE and (right > 0).float().mean() <= NOISE
    for half in ((left > 0), (right < 0)):
        per_pixel = half.sum(0).float().mean()
        assert 3.3 <= per_pixel <= 10.5, per_pixel


def test_what_stands_still_sends_noise_only():
    light = scenes.render([scenes.sample(5)], [5])[:, :1].expand(-1, scenes.FRAMES * scenes.SUB, -1, -1, -1)
    assert (scenes.event_maps(light, [5]) != 0).float().mean() <= 1.3 * NOISE      # 590,000 draws: 4 sigma is 1.3


# ---- checkpoints


@pytest.mark.parametrize("side", SIDES)
def test_checkpoint_holds_every_upstream_name_once_in_fp16(side):
    config = open_checkpoint(TINY / side).config                                # refuses what is missing or left over
    made = train.Pair(side, config.get("text_config", config)["vocab_size"]).export()
    raw = (TINY / side / "model.safetensors").read_bytes()
    stored = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    stored.pop("__metadata__", None)
    assert {n: (s["dtype"], s["shape"]) for n, s in stored.items()} == {
        n: ("F16", list(t.shape)) for n, t in made.items()}


def test_pair_stays_small():
    size = sum(f.stat().st_size for side in SIDES for f in (TINY / side).rglob("*") if f.is_file())
    assert size <= 8e6, f"{size / 1e6:.1f} MB of weights travel with every clone"
    size = sum(f.stat().st_size for f in CLIPS.rglob("*") if f.is_file())
    assert size <= 1.5e6, f"{size / 1e6:.1f} MB of clips"


def test_both_sides_speak_the_same_ids():
    target, drafter = ((TINY / side / "tokenizer.json").read_bytes() for side in SIDES)
    assert target == drafter
    added = {t["content"]: t["id"] for t in json.loads(target)["added_tokens"]}
    config = json.loads((TINY / "target" / "config.json").read_text())
    assert (added["<image>"], added["<video>"], added["<pad>"]) == (
        config["image_token_index"], config["video_token_index"], config["pad_token_id"])
    assert (added["<unk>"], added["<s>"], added["</s>"]) == (0, 1, 2)


@pytest.mark.parametrize("side", SIDES)
def test_engine_computes_what_was_trained(side, pair):
    """Visual rows and logits of the training module and of the engine, fp32 both: rounding of sums of 400 terms."""
    model, record = getattr(pair, side), RECORDS[0]
    if side == "target":
        frames = read_video(asked(record)["video_path"], 8)
    else:
        frames = draw_events(read_events(asked(record)["event_path"]))
    pixels = clip_pixels(frames, train.SIDE)
    trained = train.Pair(side, model.config.V)
    stored = load_file(TINY / side / "model.safetensors")
    prompt, said = model.prompt(scenes.QUESTIONS[0]), model.text.ids(scenes.answer(scenes.sample(0), 0))
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in trained.export().items():
            tensor.copy_(stored[name])
        bytes_ = (pixels * trained.std + trained.mean) * 255                    # visual() takes what it was trained on
        rows = trained.visual(bytes_[None])[0]
        logits = trained(bytes_[None], torch.tensor(prompt.before), torch.tensor([prompt.after + said]))[0]
    with torch.inference_mode():
        ours = model.visual_rows(pixels).clone()
        hidden_SD = torch.cat([model.splice(prompt, ours), model.decoder.embed_VD[torch.tensor(said)]])
        ours_logits = model.decoder.forward(hidden_SD, torch.arange(len(hidden_SD)))[-len(logits):]
    assert (ours - rows).abs().max() <= 1e-4 * rows.abs().max()
    assert (ours_logits - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_target_answers_its_embedded_scenes_right_and_the_drafter_sees_what_moves(pair):
    """Trained, and loaded right: the target errs on one answer in a hundred, the drafter never on road or not road."""
    for record in (r for r in RECORDS if r["event_data"].startswith("scenes/")):
        truth = record["conversations"][1]["value"]
        result = pair.generate(mode="speculative", **asked(record))
        assert result.output_text == truth
        found, wanted = tiny_pair.parse(result.preview_text), tiny_pair.parse(truth)
        assert found.get("kind", wanted["kind"]) == wanted["kind"]


# ---- clips


def test_listed_clips_exist_and_can_be_read():
    assert len(RECORDS) == 9
    for record in RECORDS:
        events = read_events(asked(record)["event_path"])
        assert len(events.x) > 100 and 0.5e6 < events.t[-1] - events.t[0] < 1e6
        assert len(read_video(asked(record)["video_path"], 8)) == 8


def test_scene_clips_know_their_answer_and_the_recording_claims_none():
    for i, record in enumerate(RECORDS):
        human, *gpt = record["conversations"]
        assert human["value"].removeprefix("<event>\n") in scenes.QUESTIONS
        if record["event_data"].startswith("scenes/"):
            question = scenes.QUESTIONS.index(human["value"].removeprefix("<event>\n"))
            assert gpt[0]["value"] == scenes.answer(scenes.sample(make_clips.HELD_OUT + i), question)
        else:
            assert not gpt


def test_the_recording_travels_with_its_licence():
    assert "MIT License" in (CLIPS / "LICENSE.davis346_traffic").read_text()
    page = (CLIPS / "README.md").read_text()
    assert "davis346_traffic" in page and "LICENSE.davis346_traffic" in page and "aedat" in page


def test_recorded_events_move_where_the_recorded_frames_change():
    """Same pixels, same clock: over 4 x 4 blocks, event counts and frame differences of a window correlate."""
    for record in RECORDS[6:]:
        events = read_events(asked(record)["event_path"])
        frames = torch.stack(read_video(asked(record)["video_path"], 8)).float().mean(-1)
        height, width = frames.shape[1:]
        counts = torch.zeros(height * width).index_add_(0, events.y.long() * width + events.x.long(),
                                                        torch.ones(len(events.x))).reshape(height, width)
        pooled = [torch.nn.functional.avg_pool2d(m[None, None], 4).flatten()
                  for m in (counts, frames.diff(dim=0).abs().sum(0))]
        assert torch.corrcoef(torch.stack(pooled))[0, 1] >= 0.7


def test_made_clips_are_the_same_bytes_every_time(tmp_path):
    one, two = (make_clips.make_scenes(tmp_path / name, 1) for name in "ab")
    assert one == two
    name = "event_npy/" + one[0]["event_data"]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_under_weights_knows_the_engine_or_the_tests():
    for path in Path(scenes.__file__).resolve().parents[1].rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (engine|bench|tests)\b", path.read_text(), re.M), path
