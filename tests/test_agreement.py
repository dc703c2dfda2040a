"""agreement: the measure of a 4-bit copy, on the embedded trained target; the file of SmolLM2 is not fetched here."""

import struct

import pytest
import torch

from kernels.quant import quantise
from tests import agreement


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return agreement.tiny(3)


def test_the_plain_forward_computes_what_the_engine_does(model):
    w, c, answers = model
    decoder = agreement.load_engine(None, agreement.TINY / "target", device="cpu").target.decoder
    hidden_SD, first, ids = answers[0]
    with torch.inference_mode():
        ours, _ = agreement.forward(w, c, hidden_SD)
        theirs = decoder.forward(hidden_SD, torch.arange(len(hidden_SD)))
        assert ids == theirs[first:].argmax(-1).tolist() and ids[-1] == 2
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_a_row_on_known_rows_equals_the_row_of_a_whole_forward(model):
    w, c, (answer, *_) = model
    with torch.inference_mode():
        whole, known = agreement.forward(w, c, answer.hidden_SD)
        rows, _ = agreement.forward(w, c, answer.hidden_SD[answer.first:], answer.first, known)
    assert (rows - whole[answer.first:]).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("bits, nats", [(8, 1e-8), (4, 2e-6)])
def test_a_copy_of_the_trained_target_agrees_with_it(bits, nats, turn, model, monkeypatch):
    """8 bits: a turned copy computes the same. 4 bits: 1e-6 nats over 60 scenes."""
    w, c, answers = model
    monkeypatch.setattr(agreement, "quantise", lambda w_OD, _, **folds: quantise(w_OD, bits, **folds))
    with torch.inference_mode():
        copy = agreement.copy_of(w, c, turn=turn)
        found = agreement.agreement(w, copy, c, answers, turn)
    assert found.right.all() and 0 < found.kl.mean() < nats
    assert "right with 1.000" in agreement.report("toy", found)


def test_a_gguf_file_is_read_by_hand():
    """One field of a kind each, and a tensor of a type each; Q4_1: low nibbles first."""
    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    fields = [text("a") + struct.pack("<II", 4, 7), text("b") + struct.pack("<I", 8) + text("seven"),
              text("c") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 0.5, 2.0)]
    nibbles = [i | (15 - i) << 4 for i in range(16)]
    blocks = [struct.pack("<32f", *range(32)), struct.pack("<2e16B", 0.5, -1.0, *nibbles),
              struct.pack("<e32b", 0.25, *range(-16, 16))]
    listed = [text(name) + struct.pack("<IQQIQ", 2, 16, 2, kind, 128 * i)
              for i, (name, kind) in enumerate(zip("xyz", (0, 3, 8), strict=True))]
    head = b"GGUF" + struct.pack("<IQQ", 3, 3, 3) + b"".join(fields + listed)
    raw = head + bytes(-len(head) % 32) + b"".join(block.ljust(128, b"\0") for block in blocks)
    found, tensors = agreement.read_gguf(bytearray(raw), moved=False)
    assert found == {"a": 7, "b": "seven", "c": [0.5, 2.0]}
    rise = torch.arange(16.0)
    assert torch.equal(tensors["x"], torch.arange(32.0).view(2, 16))
    assert torch.equal(tensors["y"], torch.stack([rise, 15 - rise]) / 2 - 1)
    assert torch.equal(tensors["z"], (torch.arange(32.0) - 16).view(2, 16) / 4)
    _, moved = agreement.read_gguf(bytearray(raw), moved=True)
    assert 0.1 < (moved["y"] - tensors["y"]).abs().max() <= 0.25 and torch.equal(moved["z"], tensors["z"])
