"""Sampling through the engine: ids follow the target's distribution whatever is drafted; a seed fixes the answer."""

import threading

import measure
import pytest
import torch
from common import TINY, asked, script
from test_sample import CRITICAL, chi_square, cut_at

import engine
from engine import Fixed, InputError
from kernels.round import STATE, State, new_state
from kernels.sample import sampling_words

HOT = [(2.5, 1.0), (4.0, 0.9)]                               # the embedded pair is sure of itself below


# ---- ids against probabilities, on a random decoder of nine ids -------------------------------------------------


def small_model(V=9):
    """A Model of random weights with a prompt of three rows in its cache."""
    c, gen = engine.DecoderConfig(D=16, L=1, H=2, N=2, K=8, F=24, V=V, max_rows=32), torch.Generator().manual_seed(1)
    shapes = {"attn_norm": (16,), "qkv": (48, 16), "o": (16, 16), "mlp_norm": (16,), "gate_up": (48, 16),
              "down": (16, 24)}
    weights = {f"text.layers.0.{name}": torch.randn(shape, generator=gen) / 4 for name, shape in shapes.items()}
    weights |= {"text.embed": torch.randn(V, 16, generator=gen), "text.norm": torch.ones(16),
                "text.head": torch.randn(V, 16, generator=gen) / 4}
    m = engine.Model(engine.Decoder(c, weights, 32), None, "random", (2,))
    m.prefill(m.decoder.embed_VD[:3].clone(), 20, (), 2)
    m.decoder.forward = remembering(m.decoder.forward)
    return m


def remembering(forward):
    """The same forward, which computes each step once: thousands of draws are made from it."""
    known = {}

    def looked_up(hidden_SD, pos_ids_S, only=None):
        key = hidden_SD.numpy().tobytes(), *pos_ids_S.tolist(), only is None or tuple(only.tolist())
        if key not in known:
            known[key] = forward(hidden_SD, pos_ids_S, only)
        return known[key].clone()
    return looked_up


def after(m, seed, drafts, temperature=1.0, top_p=1.0):
    """The state after one round of these drafts that follows answer id 4."""
    m.begin((temperature, top_p, seed), False)
    m.state_W[:STATE + 1] = new_state(1, ids=[4], n_out=1, prompt_len=3, limit=20)
    m.sampling_3.copy_(sampling_words(*m.sampling))
    m.put(list(drafts))
    m.round(len(drafts))
    return State(m.state_W.tolist())


def exact(m, ids, temperature=1.0, top_p=1.0):
    """What the model says after these answer ids, as a distribution in float64."""
    logits_SV = m.decoder.forward(m.decoder.embed_VD[torch.tensor(ids)], 3 + torch.arange(len(ids)))
    return cut_at(top_p, (logits_SV[-1].double() / temperature).softmax(0))


@torch.inference_mode()
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_ids_follow_the_target_and_a_draft_is_accepted_with_its_probability(temperature, top_p):
    """2 x 4 drafts: likely (2,000 seeds), unlikely, never, and no id at all (600 each)."""
    m = small_model()
    p_V = exact(m, [4], temperature, top_p)
    ranked = p_V.argsort(descending=True).tolist()
    drafts = [ranked[0], ranked[int((p_V > 0).sum()) - 1], ranked[-1], 10 ** 9]
    assert p_V[drafts[0]] > 0.2 > p_V[drafts[1]] and (top_p == 1 or p_V[drafts[2]] == 0)
    for k, draft in enumerate(drafts):
        n = 600 if k else 2000
        states = [after(m, 2000 * k + seed, [draft, 5], temperature, top_p) for seed in range(n)]
        ids = torch.tensor([state.ids[1] for state in states])
        assert chi_square(ids, p_V) < CRITICAL[int((p_V > 0).sum()) - 1], f"draft {draft}"
        accepted = sum(state.accept_len > 0 for state in states)
        p = float(p_V[draft]) if draft < 9 else 0.0
        assert abs(accepted - n * p) <= 3.9 * (n * p * (1 - p)) ** 0.5, f"draft {draft}: {accepted} of {n}, p {p}"
        if k == 0:                                           # and so does the id after an accepted draft
            q_V = exact(m, [4, draft], temperature, top_p)
            second = torch.tensor([state.ids[2] for state in states if state.accept_len > 0])
            assert chi_square(second, q_V) < CRITICAL[int((q_V > 0).sum()) - 1]


@torch.inference_mode()
def test_a_second_draw_after_a_rejection_would_be_seen():
    """The biased rule: the draft is refused, and its place drawn again from all of p: it comes too often."""
    m, n = small_model(), 1000
    p_V = exact(m, [4])
    draft, ids = int(p_V.argmax()), []
    for seed in range(n):
        state = after(m, seed, [draft])
        ids.append((state if state.accept_len else after(m, 10 ** 6 + seed, [])).ids[1])
    assert chi_square(torch.tensor(ids), p_V) > 3 * CRITICAL[8]


@torch.inference_mode()
def test_the_first_id_is_drawn_too():
    m, n = small_model(), 500
    hidden_SD = m.decoder.embed_VD[:3].clone()
    p_V = m.decoder.forward(hidden_SD, torch.arange(3))[-1].double().softmax(0)
    ids = []
    for seed in range(n):
        m.begin((1.0, 1.0, seed), False)
        m.prefill(hidden_SD, 20, (), 2)
        ids += State(m.state_W.tolist()).ids
    assert chi_square(torch.tensor(ids), p_V) < CRITICAL[8]


@torch.inference_mode()
def test_nan_is_reported_and_a_replay_keeps_its_ids():
    m = small_model()
    assert after(m, 0, [5, 5], 2.0, 0.5).nonfinite == 0
    m = small_model()
    m.decoder.head_VD[7] = float("nan")
    assert after(m, 0, [5, 5], 2.0, 0.5).nonfinite == 1
    m = small_model()
    m.step_graphs.clear()
    measure.replay(m, [4, 8, 1, 6])
    assert all(after(m, seed, [8, 1], 100.0).ids == [4, 8, 1, 6] for seed in range(50))


# ---- one seed, one answer, on the embedded pair ------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_p", HOT)
def test_a_seed_fixes_the_answer_in_every_mode_and_under_any_drafts(pair, temperature, top_p):
    """2 x 2 x (8 forced drafts + 3 modes) = 44 generations against 4 of target_only."""
    answers, lens = set(), []
    for i in range(2):
        options = asked(i, temperature=temperature, top_p=top_p, seed=2 ** 40 + i, ignore_eos=i % 2 == 1)
        ids = pair.generate(mode="target_only", **options).output_ids
        answers.add(tuple(ids[:12]))
        for right in range(i % 2, 16, 2):                    # so many right drafts before a wrong one
            guess = [x if (k % (right + 1)) else x + 1 for k, x in enumerate(ids)]
            result = pair.generate(mode="speculative", draft_source=Fixed(guess), draft_len=15, **options)
            assert result.output_ids == ids, f"sample {i}, {right} right"
            lens += result.accept_lens
        for mode in ("prefill_only", "prefill_then_verify", "speculative"):
            result = pair.generate(mode=mode, **options)
            assert result.output_ids == ids and result.drafter_error is None, f"sample {i}, {mode}"
    assert len(answers) == 2 and set(range(15)) <= set(lens)


def test_cold_and_narrow_sampling_is_greedy_and_seeds_differ(pair):
    for i in range(2):
        greedy = pair.generate(mode="target_only", **asked(i)).output_ids
        for options in (dict(temperature=1e-6), dict(temperature=1e-300), dict(temperature=4, top_p=1e-6),
                        dict(temperature=0, top_p=0.5)):
            assert pair.generate(mode="speculative", **asked(i, seed=3, **options)).output_ids == greedy, options
        hot = [tuple(pair.generate(mode="target_only", temperature=4.0, seed=seed, **asked(i)).output_ids)
               for seed in (0, 1, 2 ** 32, 2 ** 63 - 1)]
        assert len(set(hot)) == 4 and tuple(greedy) not in hot


def test_drafts_stay_greedy_and_the_drafter_alone_draws(pair, monkeypatch):
    greedy = pair.generate(mode="drafter_only", **asked(0)).output_ids
    last, real = threading.Event(), pair.target.prefill
    with monkeypatch.context() as patch:                     # the target's answer would end the preview
        script(patch, pair.drafter, None, before=lambda kind, number: (kind, number) == ("step", len(greedy) - 2)
               and last.set())
        patch.setattr(pair.target, "prefill", lambda *given: (last.wait(20), real(*given)))
        assert pair.generate(mode="prefill_only", temperature=4.0, **asked(0)).preview_ids == greedy
    drawn = [pair.generate(mode="drafter_only", temperature=4.0, seed=seed, **asked(0)).output_ids
             for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and greedy not in drawn


def test_greedy_requests_keep_their_own_steps(monkeypatch):
    e, calls, real = engine.load_engine(None, TINY / "target", device="cpu"), [], engine.sample
    monkeypatch.setattr(engine, "sample", lambda *args: calls.append(1) or real(*args))
    options = asked(0, mode="target_only", max_new_tokens=4, ignore_eos=True)
    for temperature, want in ((0.0, 0), (1.0, 4), (2.0, 4), (0.0, 0)):
        e.generate(temperature=temperature, **options)
        assert len(calls) == want
        calls.clear()
    assert len(e.target.step_graphs) == 4                    # encode, prefill; a step of either kind


@pytest.mark.parametrize("options, word", [
    (dict(temperature=-0.1), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=float("inf")), "temperature"), (dict(temperature="1"), "temperature"),
    (dict(temperature=True), "temperature"), (dict(top_p=0), "top_p"), (dict(top_p=1.01), "top_p"),
    (dict(top_p=None), "top_p"), (dict(seed=-1), "seed"), (dict(seed=2 ** 63), "seed"), (dict(seed=1.0), "seed")])
def test_a_wrong_value_is_one_line_before_anything_runs(pair, options, word, monkeypatch):
    monkeypatch.setattr(pair, "_run", lambda *args: pytest.fail("it ran"))
    with pytest.raises(InputError, match=f"^{word}: wanted [^\n]*; change it$"):
        pair.generate(mode="target_only", **asked(0, **options))


def test_the_library_api_hands_sampling_on(pair):
    inference = engine.PrefillOnlyInference()
    inference.engine = pair
    options = asked(1, temperature=4.0, seed=5)
    answer = inference.generate(**options)
    assert answer.output_ids == pair.generate(mode="target_only", **options).output_ids
    assert answer.mode == "prefill_then_verify"
    assert answer.output_ids != pair.generate(mode="target_only", **asked(1)).output_ids
