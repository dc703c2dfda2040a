"""round: what a forward gets from the state, and how its logits advance the state, against a plain loop."""

import pytest
import torch

from kernels.round import STATE, RoundWork, close_round, close_round_ref, open_round, open_round_ref

NAMES = ("n_out", "done", "accept_len", "prompt_len", "eos_id", "limit", "nonfinite", "rounds")


def state(device, room=40, **words):
    values = [{"prompt_len": 10, "eos_id": -1, "limit": room, **words}.get(name, 0) for name in NAMES]
    return torch.tensor(values + [0] * room, device=device)


def logits_for(ids, V, device, dtype=torch.float32):
    """Rows whose largest logit stands at `ids`."""
    logits_SV = torch.randn(len(ids), V, device=device).clamp(-3, 3).to(dtype)
    logits_SV[torch.arange(len(ids)), torch.tensor(ids)] = 9
    return logits_SV


def ids_of(state_W):
    return state_W[STATE:STATE + int(state_W[0])].tolist()


@pytest.mark.parametrize("V", [7, 5000])
def test_agrees_with_the_plain_loop_on_random_rounds(V, device):
    gen, work = torch.Generator().manual_seed(V), RoundWork(device)
    for trial in range(60):
        G = trial % 6
        logits_SV = torch.randint(0, 3, (G + 1, V), generator=gen).float().to(device)
        drafts_G = logits_SV.argmax(-1)[:-1].clone()
        if G and trial % 4 == 0:
            drafts_G[trial % G] = -1
        ours = state(device, n_out=trial % 12, eos_id=2 if trial % 3 == 0 else -1, limit=15, done=int(trial % 23 == 22))
        plain = ours.clone().cpu()
        close_round(logits_SV, drafts_G, ours, work)
        close_round_ref(logits_SV.cpu(), drafts_G.cpu(), plain)
        assert ours.tolist() == plain.tolist(), f"trial {trial}"


@pytest.mark.parametrize("accepted", range(6))
def test_emits_the_accepted_drafts_and_the_bonus(accepted, device):
    target = [3, 1, 4, 1, 5, 9]
    drafts_G = torch.tensor([x if i < accepted else x + 1 for i, x in enumerate(target[:5])], device=device)
    s = state(device, n_out=1)
    close_round(logits_for(target, 50, device), drafts_G, s)
    assert ids_of(s)[1:] == target[:accepted + 1]
    assert s[:STATE].tolist() == [accepted + 2, 0, accepted, 10, -1, 40, 0, 0]


def test_the_lowest_id_wins_a_tie_and_signed_zeros_tie(device):
    logits_SV = torch.full((2, 5000), -1.0, device=device)
    logits_SV[0, [4096, 17, 4000]] = 2.0
    logits_SV[1, 30], logits_SV[1, 4999], logits_SV[1, 20] = 0.0, 0.0, -0.0
    s = state(device)
    close_round(logits_SV, torch.tensor([17], device=device), s)
    assert ids_of(s) == [17, 20]


def test_ids_stop_at_the_first_eos(device):
    s = state(device, eos_id=4)
    close_round(logits_for([3, 1, 4, 1], 50, device), torch.tensor([3, 1, 4], device=device), s)
    assert ids_of(s) == [3, 1, 4] and int(s[1]) == 1 and int(s[2]) == 3


@pytest.mark.parametrize("room, limit", [(40, 2), (2, 40)])
def test_ids_stop_at_the_limit_and_at_the_end_of_the_buffer(room, limit, device):
    guarded = torch.cat((state(device, room=room, limit=limit), torch.full((40,), 77, device=device)))
    s = guarded[:STATE + room]
    close_round(logits_for([3, 1, 4, 1], 50, device), torch.tensor([3, 1, 4], device=device), s)
    assert ids_of(s) == [3, 1] and int(s[1]) == 1
    assert bool((guarded[STATE + room:] == 77).all())


def test_a_done_state_stays_as_it_is(device):
    s = state(device, done=1, n_out=3)
    before = s.clone()
    close_round(torch.full((3, 50), float("nan"), device=device), torch.tensor([1, 2], device=device), s)
    assert torch.equal(s, before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_in_any_row_is_reported_and_infinity_is_not(sign, dtype, device):
    logits_SV = logits_for([3, 1, 4], 5000, device, dtype)
    logits_SV[0, 5], logits_SV[1, 6] = float("-inf"), float("inf")
    drafts_G, s = torch.tensor([3, 6], device=device), state(device)
    close_round(logits_SV, drafts_G, s)
    assert int(s[6]) == 0 and ids_of(s) == [3, 6, 4]
    logits_SV[2, 4321] = sign * float("nan")
    close_round(logits_SV, drafts_G, s)
    assert int(s[6]) == 1


def test_scratch_is_left_as_it_was_found(device):
    work, s = RoundWork(device), state(device)
    for G in (0, 3, 31):
        close_round(logits_for([1] * (G + 1), 5000, device), torch.zeros(G, dtype=torch.long, device=device), s, work)
        assert int(work.arrived) == 0
    assert ids_of(s) == [1, 1, 1]


@pytest.mark.parametrize("G", [0, 4, 31])
def test_opens_with_the_pending_id_and_the_drafts(G, device):
    s = state(device, n_out=2)
    s[STATE:STATE + 2] = torch.tensor([5, 6])
    drafts_G = torch.randint(0, 30, (G,), device=device)
    if G:
        drafts_G[0], drafts_G[-1] = -1, 10 ** 9              # no ids at all: embedded as the nearest, never accepted
    embed_VD = torch.randn(30, 12, device=device)
    ours, plain = open_round(s, drafts_G, embed_VD), open_round_ref(s, drafts_G, embed_VD)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert ours[0][0] == 6 and ours[1].tolist() == list(range(11, 12 + G))


@pytest.mark.gpu
def test_bf16_logits_of_a_32000_word_vocabulary(device):
    for S in (1, 16, 32):
        logits_SV = torch.randn(S, 32064, device=device).bfloat16()
        drafts_G = logits_SV.argmax(-1)[:-1]
        drafts_G[S // 2:] = -1
        ours, plain = state(device), state("cpu")
        close_round(logits_SV, drafts_G, ours)
        close_round_ref(logits_SV.cpu(), drafts_G.cpu(), plain)
        assert ours.tolist() == plain.tolist()
