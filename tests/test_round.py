"""round: what a forward gets from the state, and how its logits move the state on, against a plain loop."""

import pytest
import torch

from kernels.round import (
    FOUND,
    SLOTS,
    STATE,
    SURE,
    RoundWork,
    State,
    close_draft,
    close_draft_ref,
    close_round,
    close_round_ref,
    new_state,
    open_round,
    open_round_ref,
)


def state(device, room=40, stops=(), drafts=(), **fields):
    words_W = new_state(room, stops, **{"prompt_len": 10, "limit": room, **fields})
    words_W[SLOTS.value:SLOTS.value + len(drafts)] = torch.as_tensor(drafts)
    words_W[FOUND.value] = len(drafts)
    return words_W.to(device)


def seen(state_W):
    return State(state_W.tolist())


def logits_for(ids, V, device, dtype=torch.float32):
    """Rows whose largest logit stands at `ids`."""
    logits_SV = torch.randn(len(ids), V, device=device).clamp(-3, 3).to(dtype)
    logits_SV[torch.arange(len(ids)), torch.tensor(ids)] = 9
    return logits_SV


@pytest.mark.parametrize("V", [7, 5000])
def test_agrees_with_the_plain_loop_on_random_rounds(V, device):
    gen, work = torch.Generator().manual_seed(V), RoundWork(device)
    for trial in range(60):
        G = trial % 6
        logits_SV = torch.randint(0, 3, (G + 1, V), generator=gen).float().to(device)
        drafts = logits_SV.argmax(-1)[:-1].tolist()
        if G and trial % 4 == 0:
            drafts[trial % G] = -1
        ours = state(device, stops=(2, 5) if trial % 3 == 0 else (), drafts=drafts[:G - trial % 2], n_out=trial % 12,
                     limit=15, done=int(trial % 23 == 22))
        plain = ours.clone().cpu()
        close_round(logits_SV, ours, work)
        close_round_ref(logits_SV.cpu(), plain)
        assert ours.tolist() == plain.tolist(), f"trial {trial}"


@pytest.mark.parametrize("accepted", range(6))
def test_emits_the_accepted_drafts_and_the_bonus(accepted, device):
    target = [3, 1, 4, 1, 5, 9]
    s = state(device, n_out=1, drafts=[x if i < accepted else x + 1 for i, x in enumerate(target[:5])])
    close_round(logits_for(target, 50, device), s)
    after = seen(s)
    assert after.ids[1:] == target[:accepted + 1] and after.drafts[:accepted] == target[:accepted]
    assert (after.n_out, after.done, after.accept_len, after.drafted, after.slots) == (accepted + 2, 0, accepted, 5, [])


@pytest.mark.parametrize("rows, found", [(6, 2), (3, 5), (1, 4)])
def test_looks_at_no_more_drafts_than_there_are_and_fit(rows, found, device):
    """What lies behind the found drafts is stale; here it would be right."""
    target = [3, 1, 4, 1, 5, 9][:rows]
    s = state(device, n_out=1, drafts=[3, 1, 4, 1, 5])
    s[FOUND.value] = found
    close_round(logits_for(target, 50, device), s)
    assert seen(s).accept_len == seen(s).drafted == min(rows - 1, found)


def test_the_lowest_id_wins_a_tie_and_signed_zeros_tie(device):
    logits_SV = torch.full((2, 5000), -1.0, device=device)
    logits_SV[0, [4096, 17, 4000]] = 2.0
    logits_SV[1, 30], logits_SV[1, 4999], logits_SV[1, 20] = 0.0, 0.0, -0.0
    s = state(device, drafts=[17])
    close_round(logits_SV, s)
    assert seen(s).ids == [17, 20]


@pytest.mark.parametrize("stops", [(4,), (30, 4), (1, 2, 30, 31, 4)])
def test_ids_stop_at_the_first_stop_id(stops, device):
    target = [3, 7, 4, 7]
    s = state(device, stops=stops, drafts=target[:3])
    close_round(logits_for(target, 50, device), s)
    assert seen(s).ids == [3, 7, 4] and seen(s).done == 1 and seen(s).accept_len == 3


@pytest.mark.parametrize("room, limit", [(40, 2), (2, 40)])
def test_ids_stop_at_the_limit_and_at_the_end_of_the_buffer(room, limit, device):
    guarded = torch.cat((state(device, room=room, limit=limit, drafts=[3, 1, 4]),
                         torch.full((40,), 77, device=device)))
    s = guarded[:STATE + room]
    close_round(logits_for([3, 1, 4, 1], 50, device), s)
    assert seen(s).ids == [3, 1] and seen(s).done == 1
    assert bool((guarded[STATE + room:] == 77).all())


def test_a_done_state_stays_as_it_is(device):
    s = state(device, done=1, n_out=3, drafts=[1, 2])
    before = s.clone()
    close_round(torch.full((3, 50), float("nan"), device=device), s)
    assert torch.equal(s, before)


@pytest.mark.parametrize("close", [close_round, close_round_ref])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_in_any_row_is_reported_to_the_end_and_infinity_is_not(close, sign, dtype, device):
    logits_SV = logits_for([3, 1, 4], 5000, device, dtype)
    logits_SV[0, 5], logits_SV[1, 6] = float("-inf"), float("inf")
    s = state(device, drafts=[3, 6])
    close(logits_SV, s)
    assert seen(s).nonfinite == 0 and seen(s).ids == [3, 6, 4]
    logits_SV[2, 4321] = sign * float("nan")
    close(logits_SV, s)
    assert seen(s).nonfinite == 1
    close(logits_for([3], 5000, device), s)
    assert seen(s).nonfinite == 1, "a later forward without NaN does not clear it"


def test_scratch_is_left_as_it_was_found(device):
    work, s = RoundWork(device), state(device)
    for G in (0, 3, 31):
        close_round(logits_for([1] * (G + 1), 5000, device), s, work)
        close_draft(logits_for([1], 5000, device), s, work)
        assert int(work.arrived) == 0
    assert seen(s).ids[:3] == [1, 1, 1]


@pytest.mark.parametrize("G", [0, 4, 31])
def test_opens_with_the_pending_id_and_the_drafts(G, device):
    drafts = torch.randint(0, 30, (G,)).tolist()
    if G:
        drafts[0], drafts[-1] = -1, 10 ** 9                  # no ids at all: embedded as the nearest, never accepted
    s = state(device, n_out=2, drafts=drafts)
    s[STATE:STATE + 2] = torch.tensor([5, 6])
    embed_VD = torch.randn(30, 12, device=device)
    ours, plain = open_round(s, G, embed_VD), open_round_ref(s.cpu(), G, embed_VD.cpu())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, plain, strict=True))
    known = torch.tensor([6, *drafts]).clamp(0, 29)
    assert torch.equal(ours[1].cpu(), embed_VD[known].cpu()) and ours[0].tolist() == list(range(11, 12 + G))


def test_drafts_follow_one_another_and_say_how_sure_they_are(device):
    """Three drafts of a 4-bit copy: each is opened by the one before, at the next position."""
    work, s, embed_VD = RoundWork(device), state(device, n_out=1, drafts=[9, 9]), torch.randn(5000, 12, device=device)
    s[STATE] = 6
    for place, (pending, id) in enumerate(zip((6, 7, 8), (7, 8, 4999), strict=True)):
        pos_ids, hidden_1D = open_round(s, 0, embed_VD, work)
        assert int(pos_ids) == 10 + place and torch.equal(hidden_1D[0], embed_VD[pending])
        logits_1V = torch.randn(1, 5000, device=device)
        logits_1V[0, id] = 6.0 + place
        plain = s.clone().cpu()
        close_draft(logits_1V, s, work)
        close_draft_ref(logits_1V.cpu(), plain)
        assert abs(int(s[SURE.value]) - 1e6 * float(logits_1V.softmax(-1).max())) <= 2
        s[SURE.value] = plain[SURE.value]
        assert s.tolist() == plain.tolist() and seen(s).slots == []
    assert seen(s).ids == [6, 7, 8, 4999]
    logits_1V[0, 44] = float("nan")
    close_draft(logits_1V, s, work)
    assert seen(s).sure == -1


@pytest.mark.gpu
def test_bf16_logits_of_a_32000_word_vocabulary(device):
    for S in (1, 16, 32):
        logits_SV = torch.randn(S, 32064, device=device).bfloat16()
        drafts = logits_SV.argmax(-1)[:-1].tolist()
        drafts[S // 2:] = [-1] * len(drafts[S // 2:])
        ours, plain = state(device, drafts=drafts), state("cpu", drafts=drafts)
        close_round(logits_SV, ours)
        close_round_ref(logits_SV.cpu(), plain)
        assert ours.tolist() == plain.tolist()
