"""Importing the engine is silent: nothing printed, no CUDA context, no network, no seed, no default changed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUARD = """
import sys, socket
sys.modules["numpy"] = None                              # as on a machine that installed requirements.txt only
def refuse(*_): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
import warnings; warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
before = torch.random.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads(), sys.argv[:]
warnings.resetwarnings()
import engine
assert torch.equal(before[0], torch.random.get_rng_state()), "the import drew random numbers or set a seed"
assert before[1:] == (torch.get_default_dtype(), torch.get_num_threads(), sys.argv[:])
assert not torch.cuda.is_initialized()
assert "triton.experimental.gluon" not in sys.modules, "2 to 3 % of an import, for what a GPU alone needs"
assert not torch.backends.cuda.matmul.allow_tf32
"""


def run(code, env, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=120)


def test_import_is_silent_and_changes_nothing(user_env):
    done = run(GUARD, user_env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_whole_request_runs_without_numpy_and_no_warning_says_so(user_env):
    code = """
import sys; sys.modules["numpy"] = None
import engine
tiny = "weights/tiny/"
e = engine.load_engine(tiny + "drafter", tiny + "target", device="cpu")
r = e.generate(event_path=tiny + "clips/event_npy/scenes/000000.npz", video_path=tiny + "clips/mp4/scenes/000000.mp4",
               query="What is going on in this scene?", max_new_tokens=8)
from array import array
from weights.given import read_events, read_video
events, clip = read_events(tiny + "clips/event_npy/scenes/000000.npz"), tiny + "clips/mp4/scenes/000000.mp4"
for given in (dict(events={key: array("q", getattr(events, key).tolist()) for key in "xytp"}, video=open(clip, "rb")),
              dict(events=events, video=read_video(clip))):
    held = e.generate(query="What is going on in this scene?", max_new_tokens=8, **given)
    assert held.output_ids == r.output_ids and held.drafter_error is None
print(len(r.output_ids))
"""
    done = run(code, user_env, "-W", "default")
    assert done.stdout.strip() == "8" and "NumPy" not in done.stderr and "Error" not in done.stderr, done.stderr[-300:]
