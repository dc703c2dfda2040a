"""lookup: the kernel against its definition, and what the definition says."""

import pytest
import torch

from kernels import lookup as module
from kernels.lookup import AFTER, FIRST, ONLY, ORDER, PLACES, Ring, lookup, lookup_ref
from kernels.round import State, new_state
from tests.sources import Searched


def looked_up(ring, ids):
    """The state behind a search; stale ids of an earlier answer lie behind `ids` and must not count."""
    state_W = new_state(len(ids) + 64, ids=[*ids, *[3] * 64], n_out=len(ids))
    lookup(ring, state_W)
    return State(state_W.tolist())


def drafts_of(ring, ids, G=4):
    state = looked_up(ring, ids)
    return (state.slots + [-1] * G)[:G]


def found(ring, ids, G=4):
    """(up to G drafts, whether they are the line's)."""
    state = looked_up(ring, ids)
    return state.slots[:G], bool(state.ahead)


def filled(generator, answers, ids):
    """A ring of random answers of few ids, and these answers."""
    ring, kept = Ring("cpu", 2048), []
    for _ in range(int(torch.randint(0, answers, (1,), generator=generator))):
        length = int(torch.randint(1, 60, (1,), generator=generator))
        kept.append(torch.randint(0, ids, (length,), generator=generator).tolist())
        ring.add(kept[-1])
    return ring, kept


@pytest.fixture(params=[False, True], ids=["kernel", "definition"])
def which(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "INTERPRETED", False)


def test_the_longest_suffix_wins_and_of_equals_the_latest(which):
    ring = Ring("cpu", 1024)
    for answer in ([1, 2, 3, 4, 5], [9, 3, 6, 7], [8, 2, 3, 5, 5]):
        ring.add(answer)
    assert drafts_of(ring, [0, 1, 2, 3]) == [4, 5, -1, -1]               # 1 2 3 fits, ahead of the later 2 3
    assert drafts_of(ring, [0, 0, 2, 3]) == [5, 5, -1, -1]               # 2 3 fits twice
    assert drafts_of(ring, [0, 0, 0, 3]) == [5, 5, -1, -1]
    assert drafts_of(ring, [0, 0, 0, 4], 1) == [5]
    assert drafts_of(ring, [0, 0, 0, 7]) == [-1] * 4                     # nothing ever came after 7
    assert drafts_of(ring, [0, 0, 0, 0]) == [-1] * 4
    assert [looked_up(ring, ids).fit for ids in ([0, 1, 2, 3], [0, 0, 2, 3], [0, 3], [0, 7])] == [3, 2, 1, 0]


def test_a_beginning_fits_a_beginning(which):
    ring = Ring("cpu", 1024)
    ring.add([5, 6])
    ring.add([1, 5, 7])
    assert drafts_of(ring, [5]) == [6, -1, -1, -1]                       # as the first id, though 5 7 came later
    assert drafts_of(ring, [2, 5]) == [7, -1, -1, -1]
    assert drafts_of(ring, []) == [1, 5, 7, -1]                          # before the first id: the latest answer


def test_a_new_ring_and_a_cleared_one_hold_nothing(which):
    """Memory that holds anything but -1 where no answer was written would draft ids that nobody ever said."""
    ring = Ring("cpu", 1024)
    assert drafts_of(ring, [1]) == drafts_of(ring, [0]) == drafts_of(ring, []) == [-1] * 4
    ring.add([1, 2])
    assert drafts_of(ring, [1])[0] == 2 and drafts_of(ring, [2]) == [-1] * 4
    ring.clear()
    assert drafts_of(ring, [1]) == drafts_of(ring, []) == [-1] * 4


def test_the_oldest_answer_is_overwritten_and_the_rest_stays(which):
    ring = Ring("cpu", 1024)
    for i in range(40):                                                  # 26 ids each: 39 fit
        ring.add([100 + i] * 5 + [i + 200] * 20)
    assert drafts_of(ring, [139, 139, 139, 139, 139], 2) == [239, 239]
    assert drafts_of(ring, [101] * 5, 2) == [201, 201]
    assert drafts_of(ring, [100] * 5, 2) == [-1, -1]
    ring.add([7, 8])                                                     # the latest, at a lower place than the rest
    ring.add([6, 7, 9])
    assert drafts_of(ring, [0, 7], 1) == [9]
    ring.add(range(2000, 5000))                                          # longer than all there is room for
    assert drafts_of(ring, [2500], 2) == [2501, 2502] and ring.rows == 1024


@pytest.mark.parametrize("lengths", [[3, 0, 5], [300, 300, 300], [300, 300, 300, 300], [2, 2000]], ids=str)
def test_answers_are_kept_together_as_one_by_one(lengths):
    answers = [[100 * i + k % 90 for k in range(length)] for i, length in enumerate(lengths)]
    together, singly = Ring("cpu", 1024), Ring("cpu", 1024)
    together.add([7, 8, 9])
    together.add_all(answers)
    for ids in [[7, 8, 9], *answers]:
        singly.add(ids)
    assert torch.equal(together.ids_M, singly.ids_M) and together.at == singly.at and together.end == singly.end


def test_an_answer_that_fits_exactly_does_not_wrap(which):
    ring = Ring("cpu", 1024)
    ring.add([5, 6, 7])                                                  # 4 words
    ring.add(range(1000, 2019))                                          # 1,019 ids and the word behind them
    assert drafts_of(ring, [5], 2) == [6, 7] and drafts_of(ring, [2016], 3) == [2017, 2018, -1]
    assert ring.at == ring.rows == 1024
    ring.add([8, 9])
    assert drafts_of(ring, [5], 2) == [-1, -1] and drafts_of(ring, [8], 2) == [9, -1]


RANKS = [rank.value for rank in (AFTER, FIRST, ONLY)]


def test_the_line_drafts_behind_all_of_its_ids_alone(which):
    ring = Ring("cpu", 1024)
    ring.set_line([5, 6, 7, 8])
    assert found(ring, [5, 6]) == ([7, 8], True) and found(ring, [5]) == ([6, 7, 8], True)
    for other in ([5, 9], [4, 6], [5, 6, 6]):                            # the target went on without it
        assert found(ring, other)[0] == []
    assert found(ring, [5, 6, 7, 8])[0] == []
    ids = list(range(100, 140))
    ring.set_line([*ids[-ORDER:], 1, 2])
    assert found(ring, ids) == ([1, 2], True) and found(ring, [*ids, 1]) == ([2], True)
    assert found(ring, [*ids[:-ORDER], 0, *ids[1 - ORDER:]])[0] == []    # one of the last 16 is another


def test_a_new_line_replaces_the_old_one(which):
    ring = Ring("cpu", 1024)
    ring.set_line([1, 2, 4])
    ring.set_line([1, 9, 5])
    assert found(ring, [1]) == ([9, 5], True) and found(ring, [1, 2])[0] == []
    ring.set_line([])
    assert found(ring, [1])[0] == []


def test_the_line_is_ranked_beside_what_is_remembered(which):
    ring = Ring("cpu", 1024)
    ring.add([1, 2, 3])
    for rank, drafts in zip(RANKS, (([3], False), ([4, 5], True), ([4, 5], True)), strict=True):
        ring.set_line([1, 2, 4, 5], rank)
        assert found(ring, [1, 2]) == drafts
    assert found(ring, [7, 2])[0] == []                                  # what is remembered does not count
    for rank in (AFTER.value, FIRST.value):
        ring.set_line([1, 2, 4, 5], rank)
        assert found(ring, [7, 2]) == ([3], False)


def test_of_a_long_line_as_much_is_kept_as_fits(which):
    ring = Ring("cpu", 1024)
    ring.add(range(1000, 1900))
    ring.set_line(list(range(5000, 8000)))
    assert found(ring, list(range(5000, 6000))) == (list(range(6000, 6004)), True)
    last = 5000 + PLACES - 3
    assert found(ring, list(range(5000, last - 2))) == ([last - 2, last - 1], True)
    assert found(ring, [1600]) == ([1601, 1602, 1603, 1604], False), "and what is remembered stays"


def test_a_state_that_is_done_stays_as_it_is(which):
    ring, state_W = Ring("cpu", 1024), new_state(64, n_out=1, ids=[1], done=1)
    ring.set_line([1, 2])
    before = state_W.clone()
    lookup(ring, state_W)
    assert torch.equal(state_W, before)


@pytest.mark.parametrize("period", [1, 4])
def test_of_a_line_that_repeats_all_that_is_ready_is_drafted(which, period):
    ring, ids = Ring("cpu", 1024), [5 + i % period for i in range(60)]
    ring.set_line(ids)
    for n in (20, 30, 33):
        assert found(ring, ids[:n], 15) == (ids[n:n + 15], True)


@pytest.mark.parametrize("rank", RANKS)
def test_kernel_equals_definition_on_answers_of_few_ids(rank):
    generator, counts = torch.Generator().manual_seed(rank + 9), [0, 0]
    for turn in range(16):
        ring, _ = filled(generator, 70, 4)
        ids = torch.randint(0, 4, (int(torch.randint(0, 40, (1,), generator=generator)),), generator=generator).tolist()
        ring.set_line([*ids[-ORDER:], *torch.randint(0, 4, (turn % 5,), generator=generator).tolist()], rank)
        state = looked_up(ring, ids)
        drafts, ahead, fit = lookup_ref(ring, new_state(len(ids), ids=ids, n_out=len(ids)))
        assert (state.slots, state.ahead, state.fit) == (drafts, ahead, fit)
        assert int(ring.arrived) == 0                                    # at rest for the next call
        counts[ahead] += bool(drafts)
    assert counts[1] > 8 if rank != AFTER.value else counts[0] > 8


@pytest.mark.parametrize("G", [3, 15])
def test_the_source_on_the_host_proposes_the_same(G):
    assert Searched.ORDER == ORDER
    generator, proposed = torch.Generator().manual_seed(G), 0
    for _ in range(30):
        (ring, answers), source = filled(generator, 40, 5), Searched()
        for answer in answers:
            source.learn(answer)
        ids = torch.randint(0, 5, (int(torch.randint(1, 40, (1,), generator=generator)),), generator=generator).tolist()
        wanted = lookup_ref(ring, new_state(len(ids), ids=ids, n_out=len(ids)))[0][:G]
        assert source.propose(ids, G) == wanted
        proposed += len(wanted)
    assert proposed > 30


def test_a_context_counts_up_to_its_order():
    ring = Ring("cpu", 1024)
    ring.add([1, *[2] * (ORDER + 3), 8])
    ring.add([3, *[2] * (ORDER + 3), 9])
    assert drafts_of(ring, [1, *[2] * (ORDER + 3)], 1) == [9]            # what tells them apart lies too far back
    assert drafts_of(ring, [1, *[2] * 5], 1) == [2]


def test_bytes_are_those_that_are_held():
    ring = Ring("cpu", 2048)
    assert Ring.nbytes(2048) == sum(t.nbytes for t in vars(ring).values() if torch.is_tensor(t))
