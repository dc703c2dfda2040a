"""Controls: what earlier answers alone would have drafted, on answers small enough to follow by hand."""

import random
import statistics

import pytest

from weights import controls

ANSWERS = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]]


def drafts(answers, at, name, limit=9, **options):
    for i, (answer, found) in enumerate(controls.stream(answers, **options)):
        if i == at:
            return found[name](answer[:1], limit)


def test_previous_goes_on_by_position_and_knows_only_what_was_before():
    assert drafts(ANSWERS, 0, "previous") == [] and drafts(ANSWERS, 2, "previous") == [2, 3, 5]
    assert drafts(ANSWERS, 2, "previous", limit=1) == [2]
    assert drafts(ANSWERS, 2, "previous", others=ANSWERS, own=False) == []


def test_the_most_frequent_way_is_that_of_all_others_or_of_those_given():
    assert drafts(ANSWERS, 0, "most frequent") == [2, 3, 5]            # the other two part after 2: 3 was first
    assert drafts(ANSWERS[:1], 0, "most frequent") == []               # never its own answer
    assert drafts(ANSWERS, 0, "most frequent", others=[[1, 7], [8]]) == [7]


def test_n_grams_take_the_longest_known_context_and_back_off():
    table = {}
    for answer in ([1, 2, 3, 4], [9, 2, 3, 5], [9, 2, 3, 5]):
        controls.count(table, answer, 3)
    assert controls.follow(table, [1, 2, 3], 1, 3) == [4] and controls.follow(table, [9, 2, 3], 1, 3) == [5]
    assert controls.follow(table, [8, 2, 3], 1, 3) == [5] and controls.follow(table, [9], 3, 3) == [2, 3, 5]
    assert controls.follow({}, [1], 5, 3) == []
    assert drafts(ANSWERS, 0, "n-grams") == [] and drafts(ANSWERS, 1, "n-grams", limit=3) == [2, 3, 4]


def test_own_answers_outweigh_those_from_elsewhere():
    others = [[1, 7, 7]] * 3
    assert drafts([[1, 2], [1, 2]], 0, "n-grams", others=others, limit=1) == [7]
    assert drafts([[1, 2], [1, 2]], 1, "n-grams", others=others, limit=1) == [2]


def test_figures_are_mean_accepted_and_ids_over_forwards():
    found = controls.beside([[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 8, 4]]], shot=2, drafts=2)
    assert found["previous"]["accepted"] == pytest.approx((0 + 2 + 1) / 3)
    # behind the first id, rounds of 2: no drafts, 3 forwards; [2, 3] and the own 4, 1; [2, 3] of which 2, then [4], 2
    assert found["previous"]["ids_a_forward"] == pytest.approx(9 / (3 + 1 + 2))
    assert controls.beside([], 2, 2) == {}
    assert controls.beside([[[5]]], 2, 2)["n-grams"] == {"accepted": 0, "ids_a_forward": None}
    assert controls.beside([ANSWERS], 2, 0)["previous"]["ids_a_forward"] == 1


def test_an_interval_needs_three_values_and_is_the_bootstraps():
    assert controls.interval([1.0, 2.0]) is None
    values = [1.0, 2.0, 4.0, 8.0, 9.0]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=5)) for _ in range(1000))
    assert controls.interval(values) == (medians[25], medians[975])
    low, high = controls.interval(values, figure=lambda some: sum(some))
    assert low < sum(values) < high


def test_a_limit_beyond_the_answers_asks_for_no_more_than_they_have():
    """A header may name any number of drafts; a control that repeats itself would fill memory with them."""
    asked = []

    def propose(ids, limit):
        asked.append(limit)
        return [7] * limit

    assert controls.one_shot(propose, [7, 7, 7, 8], 10 ** 12) == 2 and max(asked) == 3
    assert controls.forwards(propose, [7, 7, 7, 8], 10 ** 12) == 1 and max(asked) == 3
