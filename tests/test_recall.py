"""recall: the kernel against its definition, and what the definition says."""

import pytest
import torch

from kernels import recall as module
from kernels.recall import ALONE, FIRST, NOTHING, ORDER, PLACES, Recall, recall, recall_ref
from kernels.round import RECALLED, STATE
from weights.sources import Recalled


def state_of(ids, room=64):
    words = torch.zeros(STATE + room, dtype=torch.int64)
    words[0] = len(ids)
    words[STATE:STATE + room] = 3                            # stale ids of an earlier answer, which must not count
    words[STATE:STATE + len(ids)] = torch.tensor(ids)
    return words


def drafts_of(texts, ids, G=4):
    drafts_G = torch.full((G,), -7, dtype=torch.int64)
    recall(texts, state_of(ids), drafts_G)
    return drafts_G.tolist()


@pytest.fixture(params=[False, True], ids=["kernel", "definition"])
def which(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "INTERPRETED", False)


def test_the_longest_context_wins_and_of_equals_the_latest(which):
    texts = Recall("cpu", 1024)
    for text in ([1, 2, 3, 4, 5], [9, 3, 6, 7], [8, 2, 3, 5, 5]):
        texts.teach(text)
    assert drafts_of(texts, [0, 1, 2, 3]) == [4, 5, -1, -1]              # 1 2 3 fits, ahead of the later 2 3
    assert drafts_of(texts, [0, 0, 2, 3]) == [5, 5, -1, -1]              # 2 3 fits twice
    assert drafts_of(texts, [0, 0, 0, 3]) == [5, 5, -1, -1]
    assert drafts_of(texts, [0, 0, 0, 4], 1) == [5]
    assert drafts_of(texts, [0, 0, 0, 7]) == [-1] * 4                    # nothing ever came after 7
    assert drafts_of(texts, [0, 0, 0, 0]) == [-1] * 4


def test_a_beginning_fits_a_beginning(which):
    texts = Recall("cpu", 1024)
    texts.teach([5, 6])
    texts.teach([1, 5, 7])
    assert drafts_of(texts, [5]) == [6, -1, -1, -1]                      # as the first id, though 5 7 came later
    assert drafts_of(texts, [2, 5]) == [7, -1, -1, -1]
    assert drafts_of(texts, []) == [1, 5, 7, -1]                         # before the first id: the latest text


def test_an_empty_memory_and_a_forgotten_one_say_nothing(which):
    texts = Recall("cpu", 1024)
    assert drafts_of(texts, [1]) == [-1] * 4
    texts.teach([1, 2])
    assert drafts_of(texts, [1])[0] == 2
    texts.forget()
    assert drafts_of(texts, [1]) == [-1] * 4 and texts.texts == 0


def test_the_oldest_text_is_overwritten_and_the_rest_stays(which):
    texts = Recall("cpu", 1024)
    for i in range(40):                                                  # 26 ids each: 39 fit
        texts.teach([100 + i] * 5 + [i + 200] * 20)
    assert drafts_of(texts, [139, 139, 139, 139, 139], 2) == [239, 239]
    assert drafts_of(texts, [101] * 5, 2) == [201, 201]
    assert drafts_of(texts, [100] * 5, 2) == [-1, -1]
    texts.teach([7, 8])                                                  # the latest, at a lower place than the rest
    texts.teach([6, 7, 9])
    assert drafts_of(texts, [0, 7], 1) == [9]
    texts.teach(range(2000, 5000))                                       # longer than all there is room for
    assert drafts_of(texts, [2500], 2) == [2501, 2502] and texts.rows == 1024


RANKS = [rank.value for rank in (NOTHING, FIRST, ALONE)]


def found(texts, ids, G=4):
    """(drafts, their number as the state has it: below zero if they were expected)."""
    state_W, drafts_G = state_of(ids, len(ids) + 64), torch.full((G,), -7, dtype=torch.int64)
    recall(texts, state_W, drafts_G)
    return [i for i in drafts_G.tolist() if i >= 0], int(state_W[RECALLED.value])


def test_expected_texts_draft_behind_all_of_their_ids_alone(which):
    texts = Recall("cpu", 1024)
    texts.expect([[5, 6, 7, 8]])
    assert found(texts, [5, 6]) == ([7, 8], -2) and found(texts, [5]) == ([6, 7, 8], -3)
    for alone in ([5, 9], [4, 6], [5, 6, 6]):                            # the target went on without them
        assert found(texts, alone) == ([], 0)
    assert found(texts, [5, 6, 7, 8]) == ([], 0)
    ids = list(range(100, 140))
    texts.expect([[*ids[-ORDER:], 1, 2]])
    assert found(texts, ids) == ([1, 2], -2) and found(texts, [*ids, 1]) == ([2], -1)
    assert found(texts, [*ids[:-ORDER], 0, *ids[1 - ORDER:]]) == ([], 0)         # one of the last 16 is another


def test_of_expected_texts_the_first_that_fits_is_taken_and_new_ones_replace_old(which):
    texts = Recall("cpu", 1024)
    texts.expect([[1, 2, 4], [1, 9, 3]])
    assert found(texts, [1]) == ([2, 4], -2) and found(texts, [1, 9]) == ([3], -1)
    texts.expect([[1, 9, 5]])
    assert found(texts, [1]) == ([9, 5], -2) and found(texts, [1, 2]) == ([], 0)
    texts.expect([])
    assert found(texts, [1]) == ([], 0)


def test_expected_texts_are_ranked_beside_remembered_ones(which):
    texts = Recall("cpu", 1024)
    texts.teach([1, 2, 3])
    for rank, drafts in zip(RANKS, (([3], 1), ([4, 5], -2), ([4, 5], -2)), strict=True):
        texts.expect([[1, 2, 4, 5]], rank)
        assert found(texts, [1, 2]) == drafts
    assert found(texts, [7, 2]) == ([], 0)                               # what is remembered does not count
    texts.expect([[1, 2, 4, 5]])
    assert found(texts, [7, 2]) == ([3], 1)
    texts.expect([[1, 2, 4, 5]], FIRST.value)
    assert found(texts, [7, 2]) == ([3], 1)


def test_what_is_expected_fits_its_room(which):
    texts = Recall("cpu", 1024)
    texts.teach(range(1000, 1900))
    many = [[*range(i, i + 2000, 100), 7000 + i] for i in range(100)]
    texts.expect(many)
    kept = [i for i in range(100) if found(texts, many[i][:-1]) == ([7000 + i], -1)]
    assert kept == list(range((PLACES - 3) // 22))
    texts.expect([range(5000, 8000)])
    assert found(texts, list(range(5000, 6000))) == (list(range(6000, 6004)), -4)
    assert found(texts, list(range(5000, 6019))) == ([6019, 6020], -2), "as much of it as there is room for"
    assert found(texts, [1600]) == ([1601, 1602, 1603, 1604], 4), "and what is remembered stays"


def test_a_state_that_is_done_stays_as_it_is(which):
    texts, state_W = Recall("cpu", 1024), state_of([1])
    texts.expect([[1, 2]])
    state_W[1] = 1
    recall(texts, state_W, torch.full((4,), -7))
    assert int(state_W[RECALLED.value]) == 0


@pytest.mark.parametrize("period", [1, 4])
def test_of_a_text_that_repeats_all_that_is_ready_is_drafted(which, period):
    texts, ids = Recall("cpu", 1024), [5 + i % period for i in range(60)]
    texts.expect([ids])
    for n in (20, 30, 33):
        drafts, count = found(texts, ids[:n], 15)
        assert drafts == ids[n:n + 15] and count == -15


@pytest.mark.parametrize("rank", RANKS)
def test_kernel_equals_definition_with_expected_texts(rank):
    generator, counts = torch.Generator().manual_seed(rank + 9), [0, 0]
    for _ in range(25):
        texts = Recall("cpu", 2048)
        for _ in range(int(torch.randint(0, 60, (1,), generator=generator))):
            length = int(torch.randint(1, 60, (1,), generator=generator))
            texts.teach(torch.randint(0, 4, (length,), generator=generator).tolist())
        ids = torch.randint(0, 4, (int(torch.randint(0, 40, (1,), generator=generator)),), generator=generator).tolist()
        others = (torch.randint(0, 4, (n,), generator=generator).tolist() for n in range(5))
        texts.expect([[*ids[-ORDER:], *after] for after in others], rank)
        state_W, drafts_G = state_of(ids), torch.full((7,), -7, dtype=torch.int64)
        recall(texts, state_W, drafts_G)
        truth_G, expected = recall_ref(texts, state_W, 7)
        assert drafts_G.tolist() == truth_G.tolist()
        assert int(state_W[RECALLED.value]) == int((truth_G >= 0).sum()) * (-1 if expected else 1)
        counts[expected] += int(truth_G[0] >= 0)
    assert counts[1] == 25 if rank != NOTHING.value else counts[0] > 10


@pytest.mark.parametrize("G", [1, 7, 15])
def test_kernel_equals_definition_on_texts_of_few_ids(G):
    generator, with_drafts = torch.Generator().manual_seed(G), 0
    for _ in range(25):
        texts = Recall("cpu", 2048)
        for _ in range(int(torch.randint(0, 90, (1,), generator=generator))):
            length = int(torch.randint(1, 60, (1,), generator=generator))
            texts.teach(torch.randint(0, 4, (length,), generator=generator).tolist())
        ids = torch.randint(0, 4, (int(torch.randint(0, 40, (1,), generator=generator)),), generator=generator).tolist()
        state_W, drafts_G = state_of(ids), torch.full((G,), -7, dtype=torch.int64)
        recall(texts, state_W, drafts_G)
        truth = recall_ref(texts, state_W, G)[0].tolist()
        assert drafts_G.tolist() == truth and state_W[RECALLED.value] == sum(i >= 0 for i in truth)
        with_drafts += truth[0] >= 0
        assert int(texts.arrived) == 0                                   # at rest for the next call
    assert with_drafts > 10


@pytest.mark.parametrize("G", [3, 15])
def test_the_source_without_a_target_proposes_the_same(G):
    assert Recalled.ORDER == ORDER
    generator, proposed = torch.Generator().manual_seed(G), 0
    for _ in range(30):
        texts, source = Recall("cpu", 4096), Recalled()
        for _ in range(int(torch.randint(0, 60, (1,), generator=generator))):
            ids = torch.randint(0, 5, (int(torch.randint(1, 50, (1,), generator=generator)),), generator=generator)
            texts.teach(ids.tolist())
            source.learn(ids.tolist())
        ids = torch.randint(0, 5, (int(torch.randint(1, 40, (1,), generator=generator)),), generator=generator).tolist()
        wanted = [i for i in recall_ref(texts, state_of(ids), G)[0].tolist() if i >= 0]
        assert source.propose(ids, G) == wanted
        proposed += len(wanted)
    assert proposed > 30


def test_a_context_counts_up_to_its_order():
    texts = Recall("cpu", 1024)
    texts.teach([1, *[2] * (ORDER + 3), 8])
    texts.teach([3, *[2] * (ORDER + 3), 9])
    assert drafts_of(texts, [1, *[2] * (ORDER + 3)], 1) == [9]           # what tells them apart lies too far back
    assert drafts_of(texts, [1, *[2] * 5], 1) == [2]


def test_bytes_are_those_that_are_held():
    texts = Recall("cpu", 2048)
    assert Recall.nbytes(2048) == sum(t.nbytes for t in vars(texts).values() if torch.is_tensor(t))
