"""The decoder against real trained weights, and the properties that verification rests on."""

import json
from pathlib import Path

import pytest
import torch

from engine import Decoder, DecoderConfig
from weights.load import open_checkpoint

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
STORIES = FIXTURES / "stories260k"
pytestmark = pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not here: golden tests cannot run")


def stories(cache_rows=256) -> Decoder:
    checkpoint = open_checkpoint(STORIES)
    weights = checkpoint.load(torch.device("cpu"), torch.float32)
    return Decoder(DecoderConfig.read(checkpoint.config), weights, cache_rows)


def run(decoder, ids, at=0, **options):
    ids = torch.tensor(ids)
    return decoder.forward(decoder.embed_VD[ids], torch.arange(at, at + len(ids)), **options)


@pytest.mark.parametrize("case", ["bos", "prompt"])
def test_200_greedy_ids_equal_transformers(case):
    expected, decoder = json.loads((STORIES / "expected.json").read_text())[case], stories()
    logits, ids = run(decoder, expected["prompt_ids"]), []
    for i in range(200):
        ids.append(int(logits[-1].argmax()))
        if i < 199:
            logits = run(decoder, ids[-1:], len(expected["prompt_ids"]) + i)
    assert ids == expected["greedy_ids"]
    first8 = torch.tensor(expected["last_logits_first8"])
    assert (logits[-1, :8] - first8).abs().max() <= 1e-4


@pytest.mark.parametrize("cuts", [[1] * 40, [40], [17, 1, 1, 21], [33, 7], [3, 34, 3]], ids=str)
def test_any_chunking_of_a_prompt_gives_one_prefills_logits(cuts):
    ids = json.loads((STORIES / "expected.json").read_text())["bos"]["greedy_ids"][:40]
    whole, decoder, at, parts = run(stories(), ids), stories(), 0, []
    for cut in cuts:
        parts.append(run(decoder, ids[at:at + cut], at))
        at += cut
    assert (torch.cat(parts) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("row", [39, 17])
def test_only_gives_that_row_and_the_same_cache(row):
    ids = json.loads((STORIES / "expected.json").read_text())["bos"]["greedy_ids"][:40]
    a, b = stories(), stories()
    whole, one = run(a, ids), run(b, ids, only=torch.tensor([row]))
    assert one.shape[0] == 1 and (whole[row:row + 1] - one).abs().max() <= 1e-5 * whole.abs().max()
    assert (a.k_cache_LNMK[:, :, :40] - b.k_cache_LNMK[:, :, :40]).abs().max() <= 1e-6
    assert (a.v_cache_LNMK[:, :, :40] - b.v_cache_LNMK[:, :, :40]).abs().max() <= 1e-6


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_noise_in_stale_cache_rows_changes_nothing(rows):
    ids = json.loads((STORIES / "expected.json").read_text())["bos"]["greedy_ids"][:60]
    decoder = stories()
    run(decoder, ids[:40])
    clean = run(decoder, ids[40:40 + rows], 40)
    for cache in (decoder.k_cache_LNMK, decoder.v_cache_LNMK):
        cache[:, :, 40:] = torch.randn_like(cache[:, :, 40:]) * 100
    assert torch.equal(clean, run(decoder, ids[40:40 + rows], 40))


def test_noise_in_a_visible_cache_row_does_change_the_answer():
    """The inverse of the test above: it would pass on a decoder that reads no cache at all."""
    ids = json.loads((STORIES / "expected.json").read_text())["bos"]["greedy_ids"][:41]
    decoder = stories()
    run(decoder, ids[:40])
    clean = run(decoder, ids[40:], 40)
    decoder.v_cache_LNMK[:, :, 39] += 100
    assert (clean - run(decoder, ids[40:], 40)).abs().max() > 1e-2
