"""recall: the kernel against its definition, and what the definition says."""

import pytest
import torch

from kernels import recall as module
from kernels.recall import ORDER, Recall, recall, recall_ref
from kernels.round import STATE
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
    assert drafts_of(texts, [2500], 2) == [2501, 2502] and len(texts.ids_M) == 1024


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
        truth = recall_ref(texts.ids_M, texts.at, state_W, G).tolist()
        assert drafts_G.tolist() == truth
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
        wanted = [i for i in recall_ref(texts.ids_M, texts.at, state_of(ids), G).tolist() if i >= 0]
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
