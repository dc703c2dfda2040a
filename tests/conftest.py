"""What has to be set before torch and Triton are imported: without a GPU Triton's interpreter runs kernels on the CPU,
and tests on several cores at once share these out."""

import dataclasses
import functools
import importlib
import os
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def interpret():
    """Triton's interpreter puts its own functions into triton.language again at every launch, and at every call of a
    function within a kernel, which takes half of its time. Here it does so once. A third of the rest goes into sums
    that look for overflows of integers, and nobody looks at them unless kernels are debugged."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)


if not HAS_GPU:
    interpret()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (bf16, speed, bit equality on the card)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def interpreted_only_in_kernel_tests(request):
    """tests/test_X.py interprets Triton if kernels/X.py exists; elsewhere CPU tensors take the plain torch definitions,
    as they do for users (the interpreter is a thousand times slower, and tests one kernel at a time well enough)."""
    name = Path(request.module.__file__).stem.removeprefix("test_")
    kernel_files = {path.stem for path in (Path(__file__).resolve().parents[1] / "kernels").glob("[!_]*.py")}
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU and name not in kernel_files | {"kernels"}:
            for module in [importlib.import_module(f"kernels.{file}") for file in kernel_files]:
                if hasattr(module, "INTERPRETED"):
                    patch.setattr(module, "INTERPRETED", False)
        yield


@pytest.fixture(autouse=True)
def same_draws_in_any_order(request):
    """Every test begins with its own seed: workers take tests as they come."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def user_env():
    """The environment of a child process that runs the program as a user would: without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture
def device():
    """Where kernels run: the GPU if there is one, else the CPU under the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def nan_empty(monkeypatch):
    """Fresh memory from torch.empty and torch.empty_like holds NaN, or the lowest integer, so that a gap shows."""
    def filled(make):
        def fresh(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)
        return fresh
    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


@pytest.fixture(scope="session")
def loaded_pair():
    """The embedded pair in fp32 on the CPU, gate off: loaded once, and left by every test as it was found."""
    import common

    import engine
    return engine.load_engine(common.TINY / "drafter", common.TINY / "target", device="cpu", dtype=torch.float32,
                              gate=False)


@pytest.fixture(scope="session")
def read_once():
    """`read_video` that decodes each clip once: for tests that are about ids."""
    import weights.given
    once = functools.cache(weights.given.read_video)
    return lambda path, count, rule="uniform", *_: once(path, count, rule)


@pytest.fixture
def pair(loaded_pair, read_once, monkeypatch):
    """The embedded pair on one device, which has learnt nothing yet; each clip is decoded once."""
    import engine
    monkeypatch.setattr("weights.given.read_video", read_once)
    monkeypatch.setattr(loaded_pair, "gate", None)
    monkeypatch.setattr(loaded_pair, "apart", False)
    monkeypatch.setattr(loaded_pair, "lookup", engine.Lookup())
    return loaded_pair


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test's script spends seconds on it; the engine reads no other."""
    import common
    clock = common.Clock()
    monkeypatch.setattr("weights.timeline.time", common.ClockedTime(clock))
    return clock
